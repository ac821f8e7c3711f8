"""A save or a load that cannot be finished is one error of ours, and leaves everything as it was."""

from __future__ import annotations

import copy
import errno
import os
import resource
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx
from biofx.errors import BiofxWarning, CheckpointError

RULES = ["crystallize", "rejuvenate_weights", "synaptic_scaling"]
CONFIG = {"fuzzy_lr_distribution": "activity", "fuzzy_lr_dynamic": True}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.out = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.norm(self.first(x))))  # type: ignore[no-any-return]


Run = tuple[Any, Any, Any]


def run(seed: int, kind: Any = torch.optim.Adam, **options: Any) -> Run:
    """A run that has taken two steps."""
    torch.manual_seed(seed)
    model, _ = biofx.transform(Net(), CONFIG)
    optimizer = kind(model.parameters(), lr=0.01 * (1 + seed), **options)
    plasticity = biofx.attach(model, optimizer, RULES)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
    return model, optimizer, plasticity


def bits(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (value.dtype, tuple(value.shape), value.detach().to_dense().reshape(-1).tolist())
    if isinstance(value, dict):
        return {str(key): bits(entry) for key, entry in value.items()}
    return [bits(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def everything(run: Run) -> Any:
    """What each of them holds, and which objects hold it."""
    model, optimizer, plasticity = run
    holders = [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
    modes = [(name, module.training) for name, module in model.named_modules()]
    named = dict(enumerate(optimizer.state.values()))
    return bits(
        [dict(model.state_dict()), named, optimizer.param_groups, plasticity.state_dict(), holders, modes]
    )


@contextmanager
def refused(run: Run, match: str) -> Iterator[None]:
    before = everything(run)
    with pytest.raises(CheckpointError, match=match):
        yield
    assert everything(run) == before
    # and it goes on
    model, optimizer, _ = run
    optimizer.zero_grad()
    model(torch.ones(5, 4)).sum().backward()
    optimizer.step()


class Midway(torch.optim.Adam):
    """Fails after it has changed most of what it holds, in place and by replacing it."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.param_groups[0]["lr"] = 99.0
        self.param_groups[0]["betas"] = (0.0, 0.0)
        self.defaults["lr"] = 98.0
        for entry in self.state.values():
            entry["exp_avg"].fill_(7.0)
            entry["more"] = 1
        for parameter in list(self.state)[1:]:
            del self.state[parameter]
        with torch.no_grad():
            self.param_groups[0]["params"][0].add_(1)
        self.param_groups.append({"params": []})
        raise ZeroDivisionError("midway")


class Late(torch.optim.Adam):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        raise RuntimeError("late")


class Interrupted(torch.optim.Adam):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("kind", "told"), [(Midway, "ZeroDivisionError: midway"), (Late, "RuntimeError: late")]
)
def test_an_optimizer_that_fails_midway_takes_nothing_along(kind: Any, told: str, tmp_path: Path) -> None:
    model, optimizer, plasticity = run(0, kind)
    biofx.save(model, tmp_path / "a.pt", optimizer=optimizer, plasticity=plasticity)
    target = run(1, kind)
    with refused(target, rf"found a {kind.__name__} that raises: {told}"):
        biofx.load(tmp_path / "a.pt", target[0], optimizer=target[1], plasticity=target[2])
    state = biofx.checkpoints.optimizer_state(model, optimizer)
    with refused(target, told):
        biofx.checkpoints.load_optimizer_state(target[0], target[1], state)


def test_an_interrupt_midway_is_no_error_of_ours_and_changes_nothing(tmp_path: Path) -> None:
    model, optimizer, plasticity = run(0, Interrupted)
    biofx.save(model, tmp_path / "a.pt", optimizer=optimizer, plasticity=plasticity)
    target = run(1, Interrupted)
    before = everything(target)
    with pytest.raises(KeyboardInterrupt):
        biofx.load(tmp_path / "a.pt", target[0], optimizer=target[1], plasticity=target[2])
    assert everything(target) == before


def test_of_two_optimizers_the_first_does_not_keep_what_the_second_refuses(tmp_path: Path) -> None:
    def both(seed: int) -> tuple[Any, list[Any]]:
        torch.manual_seed(seed)
        model, _ = biofx.transform(Net(), CONFIG)
        parameters = list(model.parameters())
        optimizers = [
            torch.optim.SGD(parameters[:2], lr=0.1 + seed, momentum=0.9),
            Late(parameters[2:], lr=0.01),
        ]
        model(torch.randn(5, 4)).sum().backward()
        optimizers[0].step()
        with pytest.warns(BiofxWarning, match="Late steps a model .* have no effect"):
            optimizers[1].step()
        return model, optimizers

    model, optimizers = both(0)
    biofx.save(model, tmp_path / "a.pt", optimizer=optimizers)
    target, own = both(1)
    before = bits([dict(target.state_dict()), *(list(optimizer.state.values()) for optimizer in own)])
    with pytest.raises(CheckpointError, match="late"):
        biofx.load(tmp_path / "a.pt", target, optimizer=own)
    assert bits([dict(target.state_dict()), *(list(optimizer.state.values()) for optimizer in own)]) == before
    assert own[0].param_groups[0]["lr"] == 1.1


class Stubborn(nn.Linear):
    """Takes its own state over, and then refuses."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.touched = True
        raise LookupError("stubborn")


def test_a_module_that_fails_midway_takes_nothing_along(tmp_path: Path) -> None:
    def made(seed: int) -> Any:
        torch.manual_seed(seed)
        return biofx.transform(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), Stubborn(6, 2))).graph_module

    biofx.save(made(0), tmp_path / "a.pt")
    target = made(1)
    before = bits(dict(target.state_dict()))
    with pytest.raises(CheckpointError, match="LookupError: stubborn"):
        biofx.load(tmp_path / "a.pt", target)
    assert bits(dict(target.state_dict())) == before
    assert not hasattr(target.get_submodule("2"), "touched")
    torch.manual_seed(2)
    plain = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), Stubborn(6, 2))
    with pytest.raises(CheckpointError, match="LookupError: stubborn"):
        biofx.load(tmp_path / "a.pt", plain)


def edited(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    return path


def state(content: dict[str, Any], name: str = "first.weight") -> Any:
    return content["optimizers"][0]["state"][name]


MOMENT = r"optimizer: 'exp_avg' of 'first.weight': "


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda c: state(c).update(exp_avg=torch.zeros(6)),
            MOMENT + r"expected shape \(6, 4\), found shape \(6,\)",
        ),
        (lambda c: state(c).update(exp_avg=torch.zeros(1, 4)), MOMENT + r"expected shape \(6, 4\)"),
        (
            lambda c: state(c).update(exp_avg=torch.zeros(6, 4).to_sparse()),
            MOMENT + "expected layout torch.strided",
        ),
        (
            lambda c: state(c).update(exp_avg=torch.zeros(6, 4, dtype=torch.int64)),
            MOMENT + "expected numbers like",
        ),
        (
            lambda c: state(c).update(exp_avg=torch.zeros(6, 4, dtype=torch.complex64)),
            MOMENT + "expected numbers",
        ),
        (
            lambda c: state(c).update(exp_avg=torch.zeros(6, 4, device="meta")),
            MOMENT + "expected a tensor with val|meta",
        ),
        (lambda c: state(c).update(exp_avg=3), MOMENT + "expected a tensor, found a int"),
        (lambda c: state(c).update(step=torch.zeros(6, 4)), r"'step' of 'first.weight': expected shape \(\)"),
        (
            lambda c: c["optimizers"][0]["groups"][0].update(lr="high"),
            "expected a number for 'lr', found 'high'",
        ),
        (lambda c: c["optimizers"][0]["groups"][0].update(lr={}), "expected a number for 'lr'"),
        (lambda c: c["optimizers"][0].update(groups=[3]), "expected groups with the names"),
        (lambda c: c["optimizers"][0].update(shapes={"first.weight": 3}), "malformed|shape"),
        (lambda c: c.update(optimizers=[3]), "expected"),
        (lambda c: c.update(plasticity=[3]), "plasticity"),
        (lambda c: c["plasticity"][0].update(steps="many"), "plasticity"),
        (lambda c: c["plasticity"][0].update(rules=[{"rule": 1}]), "plasticity"),
        (lambda c: c.update(rules={"first.weight": 3}), "expected"),
        (lambda c: c["model"].update({"norm.running_mean": torch.zeros(6, device="meta")}), "meta"),
        (lambda c: c["model"].update({3: torch.zeros(6)}), "found 3"),
        (lambda c: c.update(record='{"steps": [], "graph": 3}'), "record"),
        (lambda c: c.update(record=c["record"].replace('"graph": [', '"graph": [3, ')), "graph"),
        (lambda c: c.update(record=c["record"].replace('"passes": {', '"passes": 3, "other": {')), "record"),
        (lambda c: c.update(extra=[1]), "expected 'extra' to be a dict"),
    ],
)
def test_what_no_run_could_use_is_not_loaded(
    change: Callable[[dict[str, Any]], object], match: str, tmp_path: Path
) -> None:
    model, optimizer, plasticity = run(0)
    biofx.save(model, tmp_path / "a.pt", optimizer=optimizer, plasticity=plasticity)
    target = run(1)
    with refused(target, match):
        path = edited(tmp_path / "a.pt", change)
        biofx.load(path, target[0], optimizer=target[1], plasticity=target[2])


def test_a_fresh_optimizer_is_told_of_a_wrong_shape_too(tmp_path: Path) -> None:
    model, optimizer, _ = run(0)
    biofx.save(model, tmp_path / "a.pt", optimizer=optimizer)
    path = edited(tmp_path / "a.pt", lambda content: state(content).update(exp_avg_sq=torch.zeros(4, 6)))
    fresh, _ = biofx.transform(Net(), CONFIG)
    own = torch.optim.Adam(fresh.parameters())
    with pytest.raises(CheckpointError, match=r"'exp_avg_sq' of 'first.weight': expected shape \(6, 4\)"):
        biofx.load(path, fresh, optimizer=own)
    assert not own.state


class Exact(torch.optim.Optimizer):
    """Keeps in float64 what it sums of gradients in another type."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                total = self.state[parameter].setdefault(
                    "total", torch.zeros_like(parameter, dtype=torch.float64)
                )
                total += parameter.grad
                parameter -= group["lr"] * total.to(parameter.dtype)


def test_what_is_kept_more_exactly_than_the_parameters_stays_so(tmp_path: Path) -> None:
    def made(seed: int) -> tuple[Any, Any]:
        torch.manual_seed(seed)
        model = biofx.transform(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))).graph_module
        return model, Exact(model.parameters(), lr=0.01)

    def train(model: Any, optimizer: Any) -> None:
        for number in range(3):
            optimizer.zero_grad()
            model(torch.arange(8.0).reshape(2, 4) / (3 + number)).square().mean().backward()
            optimizer.step()

    model, optimizer = made(0)
    train(model, optimizer)
    biofx.save(model, tmp_path / "a.pt", optimizer=optimizer)
    target, own = made(1)
    biofx.load(tmp_path / "a.pt", target, optimizer=own)
    for one, other in zip(optimizer.state.values(), own.state.values(), strict=True):
        assert other["total"].dtype == torch.float64
        assert torch.equal(one["total"], other["total"])
    train(model, optimizer)
    train(target, own)
    assert bits(dict(model.state_dict())) == bits(dict(target.state_dict()))


def test_sums_of_sparse_gradients_come_back(tmp_path: Path) -> None:
    def made(seed: int) -> tuple[Any, Any]:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 2))
        model = biofx.transform(net, {"fuzzy_lr_distribution": "baseline"}).graph_module
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        model(torch.tensor([1, 3])).sum().backward()
        optimizer.step()
        return model, optimizer

    model, optimizer = made(0)
    assert any(entry["momentum_buffer"].is_sparse for entry in optimizer.state.values())
    biofx.save(model, tmp_path / "a.pt", optimizer=optimizer)
    target, own = made(1)
    biofx.load(tmp_path / "a.pt", target, optimizer=own)
    for one, other in zip(optimizer.state.values(), own.state.values(), strict=True):
        assert bits(one["momentum_buffer"]) == bits(other["momentum_buffer"])


class Counting(torch.optim.SGD):
    """Remembers something of all parameters together."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        held: Any = self.state
        held["count"] = held.get("count", 0) + 1
        super().step(closure)


@pytest.mark.parametrize("kind", ["file", "folder", "named"])
def test_what_an_optimizer_remembers_of_all_parameters_comes_back(kind: str, tmp_path: Path) -> None:
    def made(seed: int) -> tuple[Any, Any]:
        torch.manual_seed(seed)
        model = biofx.transform(nn.Linear(4, 2)).graph_module
        return model, Counting(model.parameters(), lr=0.1, momentum=0.9)

    model, optimizer = made(0)
    for _ in range(3):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    target, own = made(1)
    if kind == "file":
        biofx.save(model, tmp_path / "a.pt", optimizer=optimizer)
        biofx.load(tmp_path / "a.pt", target, optimizer=own)
    elif kind == "folder":
        biofx.checkpoints.save_sharded(model, tmp_path / "a", optimizer=optimizer)
        biofx.checkpoints.load_sharded(tmp_path / "a", target, optimizer=own)
    else:
        biofx.checkpoints.load_optimizer_state(
            target, own, biofx.checkpoints.optimizer_state(model, optimizer)
        )
    assert dict(own.state)["count"] == 3
    assert len(own.state) == 3


# saving


class Silent(torch.optim.SGD):
    def state_dict(self) -> dict[str, Any]:
        raise AttributeError("no state")


class Odd(torch.optim.SGD):
    def state_dict(self) -> dict[str, Any]:
        return {"mine": 1}


def knot() -> dict[str, Any]:
    held: dict[str, Any] = {}
    held["self"] = held
    return held


def freed() -> Tensor:
    tensor = torch.ones(3)
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (lambda model: {"extra": [1]}, "extra: expected a dict of names to values, found a list"),
        (lambda model: {"extra": {"f": open}}, "found a builtin_function_or_method"),
        (
            lambda model: {"extra": {"t": torch.ones(3, device="meta")}},
            r"\['t'\]: expected a tensor with values",
        ),
        (lambda model: {"extra": {"t": freed()}}, r"\['t'\]: expected a tensor with values"),
        (lambda model: {"extra": knot()}, "at most 100 values within each other"),
        (lambda model: {"extra": {"s": {1, 2}}}, "found a set"),
        (
            lambda model: {"optimizer": Silent(model.parameters(), lr=1)},
            "a Silent that raises: AttributeError: no st",
        ),
        (lambda model: {"optimizer": Odd(model.parameters(), lr=1)}, "a Odd that raises: KeyError"),
    ],
)
@pytest.mark.parametrize("save", [biofx.save, biofx.checkpoints.save_sharded])
def test_what_cannot_be_saved_is_said_and_the_old_one_stays(
    options: Callable[[Any], dict[str, Any]], match: str, save: Any, tmp_path: Path
) -> None:
    model, _, _ = run(0)
    place = tmp_path / "kept"
    save(model, place)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=match):
        save(model, place, **options(model))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("save", [biofx.save, biofx.checkpoints.save_sharded])
def test_a_model_without_values_is_not_saved_and_takes_none(save: Any, tmp_path: Path) -> None:
    model = biofx.transform(Net(), CONFIG).graph_module
    biofx.save(model, tmp_path / "a.pt")
    biofx.checkpoints.save_sharded(model, tmp_path / "a")
    empty = copy.deepcopy(model).to("meta")
    with pytest.raises(
        CheckpointError, match=r"expected a tensor with values, found one without.*meta device"
    ):
        save(empty, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CheckpointError, match="on the meta device; call to_empty"):
            biofx.load(tmp_path / "a.pt", empty)
        with pytest.raises(CheckpointError, match="on the meta device; call to_empty"):
            biofx.checkpoints.load_sharded(tmp_path / "a", empty)
        with torch.device("meta"):
            plain = Net()
        with pytest.raises(CheckpointError, match="on the meta device; call to_empty"):
            biofx.load(tmp_path / "a.pt", plain)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let the system refuse to make a file larger than that, as it does on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("size", [0, 1000, 60_000])
@pytest.mark.parametrize("save", [biofx.save, biofx.checkpoints.save_sharded])
def test_a_full_disk_is_said_and_leaves_the_old_one(size: int, save: Any, tmp_path: Path) -> None:
    wide = biofx.transform(nn.Sequential(nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 2))).graph_module
    place = tmp_path / "kept"
    save(wide, place)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with files_of_at_most(size), pytest.raises(CheckpointError, match=f"{os.strerror(errno.EFBIG)}"):
        save(wide, place)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("save", [biofx.save, biofx.checkpoints.save_sharded])
def test_a_path_that_is_none_is_one_clear_error(save: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    model = biofx.transform(Net(), CONFIG).graph_module
    wrong: list[Any] = [3, None, tmp_path / "file" / "below", "a\0b", tmp_path / ("x" * 300)]
    for path in wrong:
        with pytest.raises(CheckpointError):
            save(model, path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    for path in (*wrong, tmp_path, tmp_path / "file", tmp_path / "missing"):
        with pytest.raises(CheckpointError):
            biofx.load(path, Net())
        with pytest.raises(CheckpointError):
            biofx.checkpoints.load_sharded(path, model)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("out.bias"),
        lambda state: state.update({"new": torch.ones(1)}),
        lambda state: state.update({"out.bias": torch.ones(3)}),
        lambda state: state.update({"out.bias": 3}),
        lambda state: state.update({"out.bio_mod.activity": torch.ones(7)}),
    ],
)
def test_a_state_dict_that_does_not_fit_changes_nothing(change: Callable[[dict[str, Any]], object]) -> None:
    model, target = run(0)[0], run(1)
    state = dict(model.state_dict())
    change(state)
    before = everything(target)
    with pytest.raises((RuntimeError, CheckpointError)):  # as any module of torch raises
        target[0].load_state_dict(state)
    assert everything(target) == before
    target[0].load_state_dict(model.state_dict())
    assert bits(dict(target[0].state_dict())) == bits(dict(model.state_dict()))
