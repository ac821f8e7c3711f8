"""What a monitor sees of activity: on which steps, in which forwards, and that it leaves the model alone."""

from __future__ import annotations

import copy
import gc
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import biofx
from biofx import BioConfig, Monitor
from biofx.diagnostics import UnitActivity
from biofx.diagnostics.unit_activity import SeenActivity
from biofx.graph.regions import region_paths

PLAIN = BioConfig(fuzzy_lr_distribution=biofx.Distribution.BASELINE)


def trained(model: nn.Module, monitor: Monitor, *batches: Tensor | list[Tensor], call: Any = None) -> Any:
    """Take a step for each batch, or list of batches whose gradients accumulate; return what was attached."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    handle = biofx.attach(model, optimizer, observers=[monitor])
    for batch in batches:
        optimizer.zero_grad()
        for part in batch if isinstance(batch, list) else [batch]:
            (call or model)(part).square().mean().backward()
        optimizer.step()
    return handle


def expected(activity: Tensor, channel_axis: int = -1) -> UnitActivity | None:
    kept = SeenActivity(256)
    kept.add(activity, channel_axis)
    return kept.measure(0.1)


def activity_of(monitor: Monitor, path: str, record: int = -1) -> UnitActivity:
    found = monitor.records[record].layers[path].activity
    assert found is not None
    return found


def equal(found: UnitActivity | None, wanted: UnitActivity | None) -> None:
    """Compare figures of single precision."""
    assert found is not None
    assert wanted is not None
    assert vars(found) == pytest.approx(vars(wanted), rel=1e-6)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def listeners(model: nn.Module) -> int:
    shown: Any = type(model)
    return 0 if shown._shown is None else len(shown._shown.listeners)


class ConvNet(nn.Module):
    """Convolutions whose units are behind normalisation, a sum, and a nonlinearity that writes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.branch, self.relu = nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.relu(self.norm(self.stem(x)))
        x = F.leaky_relu(self.branch(x) + x)
        x *= 3  # after it was seen
        return self.head(x.mean((2, 3)))


class Feedforward(nn.Module):
    """The residual MLP of a transformer, for ``(batch, sequence, 6)``."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 24), nn.Linear(24, 6)

    def forward(self, x: Tensor) -> Any:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def test_units_are_seen_behind_their_nonlinearity(mlp: nn.Module, vectors: Tensor) -> None:
    bio, _ = biofx.transform(mlp, PLAIN)
    first, _, second, _, last = (bio.get_submodule(str(place)) for place in range(5))
    with torch.no_grad():
        h = [torch.relu(first(vectors))]
        h += [torch.relu(second(h[0]))]
        h += [last(h[1])]
    monitor = Monitor()
    trained(bio, monitor, vectors)
    for path, activity in zip(("0.weight", "2.weight", "4.weight"), h, strict=True):
        assert activity_of(monitor, path) == expected(activity)


def test_units_of_convolutions_are_seen_before_what_changes_them_in_place() -> None:
    torch.manual_seed(0)
    net, images = ConvNet().train(), drawn(5, 3, 6, 6)
    with torch.no_grad():
        stem = torch.relu(F.batch_norm(net.stem(images), None, None, training=True))
        branch = F.leaky_relu(net.branch(stem) + stem)
        head = net.head(3 * branch.mean((2, 3)))
    monitor = Monitor()
    trained(biofx.transform(net, PLAIN).graph_module, monitor, images)
    found = {path: layer.activity for path, layer in monitor.records[0].layers.items()}
    equal(found["stem.weight"], expected(stem, -3))
    equal(found["branch.weight"], expected(branch, -3))
    equal(found["head.weight"], expected(head))
    assert activity_of(monitor, "stem.weight").samples == 5 * 36


def test_hidden_units_of_a_transformer_have_a_sample_at_each_position() -> None:
    torch.manual_seed(0)
    block, x = Feedforward(), drawn(3, 7, 6)
    with torch.no_grad():
        hidden = F.gelu(block.up(block.norm(x)))
    monitor = Monitor()
    trained(biofx.transform(block, PLAIN).graph_module, monitor, x)
    found = activity_of(monitor, "up.weight")
    assert found == expected(hidden)
    assert (found.units, found.samples) == (24, 21)


def test_units_that_are_dead_by_construction_are_counted(mlp: nn.Module, vectors: Tensor) -> None:
    first: Any = mlp.get_submodule("0")
    with torch.no_grad():
        first.bias[:2] = -100  # of 6 units
    monitor = Monitor(dormancy=0)
    trained(biofx.transform(mlp, PLAIN).graph_module, monitor, vectors)
    found = activity_of(monitor, "0.weight")
    with torch.no_grad():
        dead = int((torch.relu(first(vectors)) == 0).all(0).sum())
    assert found.dead == found.dormant == dead >= 2


@pytest.mark.parametrize(
    "config",
    [
        {"weight_splitting_Gamma": 2},
        {"weight_splitting_Gamma": 2, "weight_splitting_fold": False},
        {"weight_splitting_Gamma": 2, "weight_splitting_mode": "sub-weights"},
        {"apply_dales_principle": True},
        {"unit_turnover": "redo"},
        {"fuzzy_lr_distribution": "activity", "fuzzy_lr_dynamic": True},
    ],
)
def test_units_of_rewritten_layers_are_seen(config: dict[str, Any], mlp: nn.Module, vectors: Tensor) -> None:
    bio, _ = biofx.transform(mlp, PLAIN.replace(**config))
    monitor = Monitor()
    trained(bio, monitor, vectors)
    # of sub-weights, the first stands for all
    found = [activity_of(monitor, path) for path in monitor.records[0].layers if "sub_weight" not in path]
    assert [activity.samples for activity in found] == [5, 5, 5]
    assert found[-1].units == 2


def test_only_due_steps_are_seen(mlp: nn.Module) -> None:
    bio, _ = biofx.transform(mlp, PLAIN)
    monitor, batches = Monitor(every=3), [drawn(step + 2, 4, seed=step) for step in range(7)]
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.01)
    biofx.attach(bio, optimizer, observers=[monitor])
    listening = []
    for batch in batches:
        listening.append(listeners(bio))
        bio(batch).sum().backward()
        optimizer.step()
    assert listening == [1, 0, 0, 1, 0, 0, 1]
    assert [activity_of(monitor, "2.weight", place).samples for place in range(3)] == [2, 5, 8]
    assert listeners(bio) == 0


def test_forwards_in_evaluation_do_not_count(mlp: nn.Module, vectors: Tensor) -> None:
    bio, _ = biofx.transform(mlp, PLAIN)
    monitor = Monitor()
    handle = trained(bio, monitor, vectors)
    bio.eval()
    bio(drawn(1000, 4))
    bio.train()
    handle.detach()
    trained(bio, monitor, vectors)
    assert [activity_of(monitor, "0.weight", place).samples for place in (0, 1)] == [5, 5]


def test_all_forwards_of_a_step_count(mlp: nn.Module) -> None:
    bio, _ = biofx.transform(mlp, PLAIN)
    parts = [drawn(4, 4, seed=seed) for seed in range(3)]
    with torch.no_grad():
        hidden = torch.relu(bio.get_submodule("0")(torch.cat(parts)))
    monitor = Monitor()
    trained(bio, monitor, parts)
    assert activity_of(monitor, "0.weight").samples == 12
    equal(activity_of(monitor, "0.weight"), expected(hidden))


def test_autocast_is_seen_as_it_computes(mlp: nn.Module, vectors: Tensor) -> None:
    bio, _ = biofx.transform(mlp, PLAIN)

    def call(x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return bio(x).float()

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        hidden = torch.relu(bio.get_submodule("0")(vectors))
    assert hidden.dtype == torch.bfloat16
    monitor = Monitor()
    trained(bio, monitor, vectors, call=call)
    assert activity_of(monitor, "0.weight") == expected(hidden)


def test_recomputed_forwards_do_not_count_again(mlp: nn.Module, vectors: Tensor) -> None:
    bio, _ = biofx.transform(mlp, PLAIN)
    monitor = Monitor()
    trained(bio, monitor, vectors, call=lambda x: checkpoint(bio, x, use_reentrant=False))
    assert activity_of(monitor, "0.weight").samples == 5


def test_layer_that_is_called_twice_has_the_samples_of_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Any:
            return self.layer(torch.tanh(self.layer(x)))

    monitor = Monitor()
    trained(biofx.transform(Twice(), PLAIN).graph_module, monitor, drawn(6, 4))
    assert activity_of(monitor, "layer.weight").samples == 12


class Decides(nn.Module):
    """Part of it stays in Python, and calls a part of two layers once or twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.gate = Gate()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        return self.head(torch.relu(self.gate(torch.relu(self.stem(x)))))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Any:
        return self.down(torch.tanh(self.up(x)))


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Any:
        return self.block(self.block(x)) if x.sum() > 0 else self.block(-x)


def test_regions_that_python_calls_are_seen() -> None:
    torch.manual_seed(0)
    bio, _ = biofx.transform(Decides(), PLAIN)
    assert region_paths(bio) == ("gate.block",)
    x = drawn(5, 4).abs()
    with torch.no_grad():
        stem = torch.relu(bio.get_submodule("stem")(x))
        up, down = bio.get_submodule("gate.block.up"), bio.get_submodule("gate.block.down")
        hidden = torch.tanh(up(stem))
        again = torch.tanh(up(down(hidden)))
    monitor = Monitor()
    trained(bio, monitor, x)
    assert activity_of(monitor, "stem.weight") == expected(stem)
    equal(activity_of(monitor, "gate.block.up.weight"), expected(torch.cat([hidden, again])))
    assert activity_of(monitor, "head.weight").samples == 5


def test_compiled_forwards_are_not_seen_and_compiled_once(mlp: nn.Module, vectors: Tensor) -> None:
    bio, _ = biofx.transform(mlp, PLAIN)
    compiled_graphs = []

    def backend(graph_module: Any, inputs: Any) -> Any:
        compiled_graphs.append(graph_module)
        return graph_module.forward

    torch._dynamo.reset()
    monitor = Monitor(every=2)
    trained(bio, monitor, vectors, vectors, vectors, call=torch.compile(bio, backend=backend))
    assert len(compiled_graphs) == 1
    assert [layer.activity for record in monitor.records for layer in record.layers.values()] == [None] * 6


def test_graph_state_and_random_numbers_stay_as_they_are(
    mlp: nn.Module, vectors: Tensor, unchanged: Any
) -> None:
    bio, _ = biofx.transform(nn.Sequential(mlp, nn.Dropout(0.5)), PLAIN)
    code, outputs = bio.code, []
    for monitor in (None, Monitor()):
        if monitor is not None:
            monitor.watch(bio)
            assert listeners(bio) == 1
        torch.manual_seed(3)
        outputs.append((bio(vectors), torch.get_rng_state()))
        with unchanged(bio), torch.random.fork_rng():
            bio(vectors)
        assert bio.code == code
    assert all(torch.equal(*pair) for pair in zip(*outputs, strict=True))


def test_copies_of_a_model_that_is_seen_are_not(mlp: nn.Module, vectors: Tensor) -> None:
    bio, _ = biofx.transform(mlp, PLAIN)
    monitor = Monitor()
    monitor.watch(bio)
    buffer = io.BytesIO()
    torch.save(bio, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(bio), torch.load(buffer, weights_only=False)):
        assert listeners(other) == 0
        other(vectors)
    trained(bio, monitor, vectors)
    assert activity_of(monitor, "0.weight").samples == 5


def test_nothing_is_left_when_the_monitor_is_closed_or_gone(mlp: nn.Module) -> None:
    bio, _ = biofx.transform(mlp, PLAIN)
    monitor = Monitor()
    monitor.watch(bio)
    assert listeners(bio) == 1
    monitor.close()
    assert listeners(bio) == 0
    monitor.watch(bio)
    del monitor
    gc.collect()
    assert listeners(bio) == 0


def test_two_monitors_see_the_same(mlp: nn.Module, vectors: Tensor) -> None:
    bio, _ = biofx.transform(mlp, PLAIN)
    every, second = Monitor(), Monitor(every=2, rank_samples=3)
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.01)
    biofx.attach(bio, optimizer, observers=[every, second])
    for _ in range(3):
        bio(vectors).sum().backward()
        optimizer.step()
    assert [activity_of(every, "0.weight", place).rank_samples for place in range(3)] == [5, 5, 5]
    assert [activity_of(second, "0.weight", place).rank_samples for place in range(2)] == [3, 3]


def test_loop_of_ones_own_sees_after_watch(mlp: nn.Module, vectors: Tensor) -> None:
    bio, monitor = biofx.BioConverter()(mlp), Monitor(every=2)
    monitor.watch(bio)
    for _ in range(3):
        bio(vectors).sum().backward()
        monitor.record(bio)
    assert [activity_of(monitor, "0.weight", place).samples for place in (0, 1)] == [5, 5]


def test_graph_that_is_changed_is_seen_again(mlp: nn.Module, vectors: Tensor) -> None:
    bio, _ = biofx.transform(mlp, PLAIN)
    monitor = Monitor()
    handle = trained(bio, monitor, vectors)
    bio.recompile()
    handle.detach()
    trained(bio, monitor, vectors, vectors)
    assert activity_of(monitor, "0.weight").samples == 5


def test_activity_is_left_out_on_request(mlp: nn.Module, vectors: Tensor) -> None:
    bio, _ = biofx.transform(mlp, PLAIN)
    monitor = Monitor(activity=False)
    trained(bio, monitor, vectors)
    assert listeners(bio) == 0
    assert monitor.records[0].layers["0.weight"].activity is None


@pytest.mark.parametrize("options", [{"dormancy": 2}, {"rank_samples": 0}, {"activity": "yes"}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(biofx.OptionError, match=next(iter(options))):
        Monitor(**options)
