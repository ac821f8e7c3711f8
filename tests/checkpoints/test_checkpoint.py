from __future__ import annotations

import copy
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx
from biofx import BioConfig, BioConverter, Rule
from biofx.errors import CheckpointError
from biofx.passes import ScaleGradients, SplitWeights
from biofx.plasticity.model_states import bio_modules

RULES: list[Rule | str] = [
    "crystallize",
    Rule("rejuvenate_weights", every=2),
    "volume_dependent_lr",
    "synaptic_scaling",
]
EVERYTHING = BioConfig(
    weight_splitting_Gamma=2,
    apply_dales_principle=True,
    fuzzy_lr_distribution=biofx.Distribution.ACTIVITY,
    fuzzy_lr_dynamic=True,
    fuzzy_lr_granularity="neuron",
)


class Net(nn.Module):
    """A convolution, batch normalisation, dropout, a layer called twice and a tied one."""

    def __init__(self, hidden: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm1d(4)
        self.mix = nn.Linear(20, hidden)
        self.twice = nn.Linear(hidden, hidden)
        self.tied = nn.Linear(hidden, hidden)
        self.tied.weight = self.twice.weight
        self.out = nn.Linear(hidden, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.conv(x))).flatten(1)
        y = nn.functional.dropout(torch.relu(self.mix(y)), 0.2, self.training)
        y = torch.relu(self.tied(torch.relu(self.twice(torch.relu(self.twice(y))))))
        return self.out(y)  # type: ignore[no-any-return]


def batches() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(3)
    while True:
        yield torch.randn(8, 2, 5, generator=generator)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: list[Tensor]) -> list[float]:
    losses = []
    for batch in data:
        optimizer.zero_grad()
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def bits(value: Any) -> Any:
    """A value with its tensors as bytes, to be compared to the bit."""
    if isinstance(value, Tensor):
        return (
            value.dtype,
            tuple(value.shape),
            value.detach().contiguous().view(-1).view(torch.uint8).tolist(),
        )
    if isinstance(value, dict):
        return {key: bits(entry) for key, entry in value.items()}
    return [bits(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def snapshot(model: nn.Module, *others: Any) -> Any:
    """Everything there is to know, so that any change shows."""
    return bits([dict(model.state_dict()), *(other.state_dict() for other in others)])


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD])
def test_a_run_goes_on_from_a_file_as_if_it_had_never_stopped(
    optimizer_class: Callable[..., torch.optim.Optimizer], tmp_path: Path
) -> None:
    options = {"lr": 1e-2, "weight_decay": 1e-3} | (
        {"momentum": 0.9} if optimizer_class is torch.optim.SGD else {}
    )
    source = batches()
    data = [next(source) for _ in range(12)]
    torch.manual_seed(5)
    bio_model, _ = biofx.transform(Net(), EVERYTHING)
    optimizer = optimizer_class(bio_model.parameters(), **options)
    plasticity = biofx.attach(bio_model, optimizer, RULES)
    before = train(bio_model, optimizer, data[:5])
    path = tmp_path / "run.pt"
    biofx.save(
        bio_model, path, optimizer=optimizer, plasticity=plasticity, extra={"random": torch.get_rng_state()}
    )
    after = train(bio_model, optimizer, data[5:])
    assert len({*before, *after}) == 12
    torch.manual_seed(99)
    checkpoint = biofx.checkpoints.Checkpoint.read(path)
    resumed = biofx.load(checkpoint, Net())
    own_optimizer = optimizer_class(resumed.parameters(), **options)
    own_plasticity = biofx.attach(resumed, own_optimizer, RULES)
    assert biofx.load(checkpoint, resumed, optimizer=own_optimizer, plasticity=own_plasticity) is resumed
    assert own_plasticity.steps == 5
    torch.set_rng_state(checkpoint.extra["random"])
    assert train(resumed, own_optimizer, data[5:]) == after
    assert snapshot(resumed) == snapshot(bio_model)


def a_predicate(candidate: Any) -> bool:
    return candidate.path in ("twice", "out")


CONFIGS: dict[str, Any] = {
    "everything": lambda model: biofx.transform(model, EVERYTHING),
    "off": lambda model: biofx.transform(model, {"fuzzy_lr_distribution": "baseline"}),
    "selected": lambda model: biofx.transform(
        model, BioConfig(weight_splitting_Gamma=2), only=["mix", nn.Conv1d], exclude="re:tw.*"
    ),
    "overrides": lambda model: biofx.transform(
        model,
        EVERYTHING.override("mix", weight_splitting_Gamma=3, dampening_factor=0.25).override(
            a_predicate, crystal_min=0.2, weight_splitting_Gamma=1
        ),
    ),
    "predicates": lambda model: biofx.transform(
        model, passes=[SplitWeights(only=a_predicate), ScaleGradients(exclude=[a_predicate, "mix"])]
    ),
    "text": lambda model: biofx.transform(
        model, passes='(split-weights{activation=torch.tanh}){only="mix"},scale-gradients{nu=0.3}'
    ),
    "opaque": lambda model: biofx.transform(model, EVERYTHING, opaque=["norm"]),
    "twice": lambda model: biofx.transform(
        biofx.transform(model, passes="split-weights").graph_module, {"apply_dales_principle": True}
    ),
    "converted": lambda model: (BioConverter(EVERYTHING)(model), None),
    "converted with overrides": lambda model: (
        BioConverter(EVERYTHING.override(a_predicate, crystal_min=0.2))(model),
        None,
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_was_made_is_made_again_from_the_plain_model(name: str, tmp_path: Path) -> None:
    bio_model = CONFIGS[name](Net())[0]
    bio_model(next(batches())).sum().backward()
    biofx.save(bio_model, tmp_path / "model.pt")
    torch.manual_seed(77)
    plain = Net()
    before = snapshot(plain)
    loaded = biofx.load(tmp_path / "model.pt", plain)
    assert snapshot(plain) == before
    assert biofx.format_graph(loaded) == biofx.format_graph(bio_model)
    assert snapshot(loaded) == snapshot(bio_model)
    remade = bio_modules(loaded)
    for place, state in bio_modules(bio_model).items():
        assert remade[place].config == state.config
    x = next(batches())
    assert torch.equal(loaded.eval()(x), bio_model.eval()(x))
    biofx.save(loaded, tmp_path / "again.pt")
    assert (
        biofx.checkpoints.Checkpoint.read(tmp_path / "again.pt").record
        == biofx.checkpoints.Checkpoint.read(tmp_path / "model.pt").record
    )


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_knows_how_it_was_made(copied: Callable[[Any], Any], tmp_path: Path) -> None:
    bio_model, _ = biofx.transform(Net(), EVERYTHING)
    biofx.save(copied(bio_model), tmp_path / "copy.pt")
    record = biofx.checkpoints.Checkpoint.read(tmp_path / "copy.pt").record
    assert record.model == "Net"
    assert record.steps[0].pipeline.startswith("split-weights,constrain-signs,scale-gradients{")
    assert (record.seed, record.biofx, record.torch) == (0, biofx.__version__, torch.__version__)


def test_a_file_is_plain_and_carries_the_type_of_numbers(tmp_path: Path) -> None:
    bio_model = biofx.transform(Net(), EVERYTHING).graph_module.to(torch.bfloat16)
    biofx.save(bio_model, tmp_path / "half.pt", extra={"epoch": 3, "losses": [0.5, 0.25], "t": torch.ones(2)})
    content = torch.load(tmp_path / "half.pt", weights_only=True)
    assert content["extra"]["losses"] == [0.5, 0.25]
    loaded = biofx.load(tmp_path / "half.pt", Net())
    assert loaded.get_parameter("mix.weight").dtype == torch.bfloat16
    assert loaded.get_submodule("tied").weight is loaded.get_submodule("twice").weight
    with pytest.raises(CheckpointError, match=r"expected torch.float32, as the model has it, found torch.bf"):
        biofx.load(tmp_path / "half.pt", biofx.transform(Net(), EVERYTHING).graph_module)


def saved_run(path: Path) -> tuple[Any, Any, Any]:
    bio_model, _ = biofx.transform(Net(), EVERYTHING)
    optimizer = torch.optim.AdamW(bio_model.parameters(), lr=1e-2)
    plasticity = biofx.attach(bio_model, optimizer, RULES)
    source = batches()
    train(bio_model, optimizer, [next(source) for _ in range(3)])
    biofx.save(bio_model, path, optimizer=optimizer, plasticity=plasticity)
    return bio_model, optimizer, plasticity


def refuse(path: Path, run: tuple[Any, Any, Any], match: str) -> None:
    """Loading fails with one clear error, and changes nothing."""
    before = snapshot(*run)
    with pytest.raises(CheckpointError, match=match):
        biofx.load(path, run[0], optimizer=run[1], plasticity=run[2])
    assert snapshot(*run) == before
    with pytest.raises(CheckpointError, match=match):
        biofx.load(path, Net())


def test_a_truncated_or_damaged_file_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    run = saved_run(path)
    whole = path.read_bytes()
    train(run[0], run[1], [next(batches())])
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        cut = int(torch.randint(len(whole), (), generator=generator))
        path.write_bytes(whole[:cut])
        refuse(path, run, "expected a checkpoint that biofx.save wrote")
    turned = 0
    for _ in range(60):
        place, bit = (int(torch.randint(high, (), generator=generator)) for high in (len(whole), 8))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :])
        try:
            found = biofx.checkpoints.Checkpoint.read(path)
        except CheckpointError:
            turned += 1
            continue
        # a bit that nothing reads, such as padding between the records
        path.write_bytes(whole)
        expected = biofx.checkpoints.Checkpoint.read(path)
        assert all(torch.equal(found.model[key], value) for key, value in expected.model.items())
    assert turned > 30
    path.write_bytes(b"")
    refuse(path, run, "expected a checkpoint that biofx.save wrote")
    path.write_bytes(b"not a checkpoint")
    refuse(path, run, "expected a checkpoint that biofx.save wrote")
    path.unlink()
    refuse(path, run, "cannot read")
    refuse(tmp_path, run, "cannot read")


class Hostile:
    """Would run a command where it is unpickled."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("touched"),))


def test_no_code_of_a_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": "biofx.checkpoint", "schema": 1, "record": Hostile()}, "hostile.pt")
    with pytest.raises(CheckpointError, match="expected a checkpoint that"):
        biofx.load("hostile.pt", Net())
    assert not Path("touched").exists()


def edited(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c.update(schema=2), "expected schema 1 or older, found 2.*upgrade biofx"),
        (lambda c: c.update(schema="1"), "expected schema 1"),
        (lambda c: c.update(format="other"), "expected a checkpoint that biofx.save wrote"),
        (lambda c: c.update(record="{}"), "expected the record of a transform"),
        (lambda c: c.update(record="[" * 100_000), "expected the record of a transform"),
        (lambda c: c.pop("rules"), "expected 'rules' to be a dict"),
        (lambda c: c["model"].pop("mix.weight"), "expected 'mix.weight'"),
        (lambda c: c["model"].pop("mix.bio_mod.fuzzy_learning_rate_parameters"), "expected 'mix.bio_mod"),
        (lambda c: c["model"].update({"new.weight": torch.ones(2)}), "found 'new.weight'"),
        (lambda c: c["model"].update({"mix.bio_mod.new": torch.ones(2)}), "found 'mix.bio_mod.new'"),
        (lambda c: c["model"].update({"mix.weight": torch.ones(6, 21)}), r"expected shape \(6, 20\)"),
        (lambda c: c["model"].update({"mix.bio_mod.noise": torch.ones(7, 3)}), r"mix.bio_mod.noise.*found"),
        (lambda c: c["model"].update({"mix.bio_mod.activity": torch.ones(9)}), r"activity.*found \(9,\)"),
        (lambda c: c["model"].update({"mix.weight": 3}), "expected a tensor, found a int"),
        (lambda c: c["rules"].update({"no.weight": {}}), "expected a model with a weight 'no.weight'"),
        (lambda c: c["rules"]["mix.weight"].update(seed=-1), "seed"),
    ],
)
def test_a_file_that_does_not_fit_is_one_clear_error(
    change: Callable[[dict[str, Any]], object], match: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.pt"
    run = saved_run(path)
    train(run[0], run[1], [next(batches())])
    refuse(edited(path, change), run, match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c["optimizers"][0].update({"class": "SGD"}), "of class AdamW, found that of SGD"),
        (lambda c: c["optimizers"][0]["groups"][0]["parameters"].pop(), "malformed"),
        (lambda c: c["optimizers"][0].pop("rest"), "'rest'"),
        (lambda c: c["optimizers"][0]["shapes"].update({"mix.weight": (1,)}), "'mix.weight' of shape"),
        (lambda c: c["optimizers"].clear(), "expected as many as were saved, 0"),
        (lambda c: c["plasticity"][0].update(version=9), "version 9"),
        (lambda c: c["plasticity"][0]["rules"].pop(), "same schedule"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(
    change: Callable[[dict[str, Any]], object], match: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.pt"
    run = saved_run(path)
    train(run[0], run[1], [next(batches())])
    before = snapshot(*run)
    with pytest.raises(CheckpointError, match=match):
        biofx.load(edited(path, change), run[0], optimizer=run[1], plasticity=run[2])
    assert snapshot(*run) == before


def test_another_model_is_refused_with_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    saved_run(path)
    with pytest.raises(CheckpointError, match=r"its graph has 'mix_observed_spread = .*groups=3"):
        biofx.load(path, Net(hidden=8))
    plain = tmp_path / "plain.pt"
    biofx.save(biofx.transform(Net(), {"weight_splitting_Gamma": 0}).graph_module, plain)
    with pytest.raises(CheckpointError, match=r"'mix.weight': expected shape \(8, 20\), found \(6, 20\)"):
        biofx.load(plain, Net(hidden=8))
    with pytest.raises(CheckpointError, match=r"the checkpoint is of a Net.*its graph has"):
        biofx.load(path, nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
    frozen = Net()
    frozen.mix.weight.requires_grad_(False)
    with pytest.raises(CheckpointError, match="same weights frozen"):
        biofx.load(path, frozen)
    other, _ = biofx.transform(Net(), EVERYTHING.replace(weight_splitting_Gamma=1))
    with pytest.raises(CheckpointError, match="Transform it with the same options"):
        biofx.load(path, other)
    other, _ = biofx.transform(Net(), EVERYTHING.replace(dampening_factor=0.5))
    with pytest.raises(
        CheckpointError, match=r"expected dampening_factor=0\.5, as the model has it, found 0\.6"
    ):
        biofx.load(path, other)
    with pytest.raises(biofx.errors.InputError, match="expected a model"):
        biofx.load(path, "model")  # type: ignore[arg-type]


def test_a_selector_that_picks_other_layers_now_is_refused(tmp_path: Path) -> None:
    class Chain(nn.Sequential):
        pass

    def chain(count: int) -> nn.Module:
        return Chain(*(nn.Linear(4, 4) for _ in range(count)))

    biofx.save(biofx.transform(chain(3), passes="scale-gradients", only="*").graph_module, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=r"the selector \* picked"):
        biofx.load(tmp_path / "c.pt", chain(4))


def scaled_tanh(x: Tensor) -> Tensor:
    return torch.tanh(x * 1.5)


class CustomConverter(BioConverter):
    def _bio_modulize(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.add_module("bio_mod", CustomState(module, config=self.config))


class CustomState(biofx.BioModule):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("history", torch.zeros(10))


@pytest.mark.parametrize(
    "make",
    [
        lambda: (
            biofx.transform(
                Net(),
                BioConfig(weight_splitting_Gamma=2, weight_splitting_activation_function=scaled_tanh),
            ).graph_module
        ),
        lambda: CustomConverter(EVERYTHING)(Net()),
    ],
)
def test_what_a_file_cannot_carry_the_user_makes_again(make: Callable[[], Any], tmp_path: Path) -> None:
    bio_model = make()
    biofx.save(bio_model, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"a checkpoint .*cannot (say what|hold).*load into the result"):
        biofx.load(tmp_path / "model.pt", Net())
    torch.manual_seed(8)
    again = make()
    assert not torch.equal(again.mix.weight, bio_model.mix.weight)
    biofx.load(tmp_path / "model.pt", again)
    assert snapshot(again) == snapshot(bio_model)


class Inner(nn.Module):
    """A weight without a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.raw)


def test_the_state_of_a_weight_without_a_layer(tmp_path: Path) -> None:
    bio_model, _ = biofx.transform(nn.Sequential(Inner(), nn.Linear(4, 2)), EVERYTHING)
    biofx.save(bio_model, tmp_path / "model.pt")
    loaded = biofx.load(tmp_path / "model.pt", nn.Sequential(Inner(), nn.Linear(4, 2)))
    assert snapshot(loaded) == snapshot(bio_model)


def test_what_cannot_be_saved_leaves_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    bio_model, _, _ = saved_run(path)
    before = path.read_bytes()
    stranger = torch.optim.SGD(Net().parameters(), lr=0.1)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"extra": {"f": scaled_tanh}}, r"\['extra'\]\['f'\]: expected plain values.*found a function"),
        ({"extra": {1.5: 2}}, "expected keys"),
        ({"optimizer": stranger}, "of another model, perhaps the one before"),
    ]
    for options, match in cases:
        with pytest.raises(CheckpointError, match=match):
            biofx.save(bio_model, path, **options)
    with pytest.raises(biofx.errors.InputError, match="expected a Optimizer"):
        biofx.save(bio_model, path, optimizer="adam")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="without a record of how it was made"):
        biofx.save(Net(), path)
    with pytest.raises(CheckpointError, match="found one that was changed since"):
        biofx.save(SplitWeights(gamma=3, only="mix")(biofx.transform(Net(), {}).graph_module)[0], path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]
    for hostile in (tmp_path / "missing" / "run.pt", tmp_path, tmp_path / ("x" * 300), "\0"):
        with pytest.raises(CheckpointError, match="cannot write"):
            biofx.save(bio_model, hostile)


def test_hostile_names_of_modules_and_files(tmp_path: Path) -> None:
    for name in ("it's", "[bold]", "/etc", "x" * 200, "größe", "naïve 名前", "{x}"):
        model = nn.Sequential()
        model.add_module(name, nn.Linear(4, 4))
        model.add_module("out", nn.Linear(4, 2))
        bio_model, report = biofx.transform(model, EVERYTHING)
        assert str(report)
        path = tmp_path / f"{name.replace('/', '_')}.pt"
        biofx.save(bio_model, path)
        loaded = biofx.load(path, copy.deepcopy(model))
        assert torch.equal(loaded(torch.ones(2, 4)), bio_model(torch.ones(2, 4)))
        assert zipfile.is_zipfile(path)


def test_plain_checkpoints_go_in_and_come_out_with_the_optimizer() -> None:
    source = batches()
    data = [next(source) for _ in range(8)]
    plain = Net().eval()
    plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    train(plain, plain_optimizer, data[:3])
    weights = copy.deepcopy(plain.state_dict())
    state = copy.deepcopy(biofx.checkpoints.optimizer_state(plain, plain_optimizer))
    expected = train(plain, plain_optimizer, data[3:])

    torch.manual_seed(1)
    bio_model = biofx.transform(Net(), {"fuzzy_lr_distribution": "baseline"}).graph_module.eval()
    bio_model.load_state_dict(weights)
    groups = [{"params": list(reversed([*bio_model.parameters()]))}]  # the order does not matter, names do
    optimizer = torch.optim.AdamW(groups, lr=0.5)
    biofx.checkpoints.load_optimizer_state(bio_model, optimizer, state)
    assert optimizer.param_groups[0]["lr"] == 1e-2
    assert train(bio_model, optimizer, data[3:6]) == expected[:3]

    back = Net().eval()
    back.load_state_dict(biofx.checkpoints.plain_state(bio_model))
    back_optimizer = torch.optim.AdamW(back.parameters(), lr=1e-2)
    biofx.checkpoints.load_optimizer_state(
        back, back_optimizer, biofx.checkpoints.optimizer_state(bio_model, optimizer)
    )
    assert train(back, back_optimizer, data[6:]) == expected[3:]


def test_plain_state_leaves_out_what_only_the_transformed_model_has() -> None:
    bio_model, _ = biofx.transform(Net(), EVERYTHING)
    assert set(biofx.checkpoints.plain_state(bio_model)) == set(Net().state_dict())
    assert set(bio_model.state_dict()) > set(Net().state_dict())


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    model = Net()
    bio_model, _ = biofx.transform(model, EVERYTHING)
    stale = torch.optim.AdamW(model.parameters(), lr=0.1)
    with pytest.raises(CheckpointError, match=r"group 0 steps a parameter \(number 0, shape \(4, 2, 3\)\)"):
        biofx.checkpoints.optimizer_state(bio_model, stale)
    good = torch.optim.AdamW(bio_model.parameters(), lr=0.1)
    state = biofx.checkpoints.optimizer_state(bio_model, good)
    with pytest.raises(CheckpointError, match="of another model"):
        biofx.checkpoints.load_optimizer_state(bio_model, stale, state)
    part = torch.optim.AdamW(bio_model.get_submodule("mix").parameters(), lr=0.1)
    with pytest.raises(CheckpointError, match="Build the optimizer with the same groups"):
        biofx.checkpoints.load_optimizer_state(bio_model, part, state)
    with pytest.raises(
        CheckpointError, match=r"as biofx.checkpoints.optimizer_state returns it, found one in which 'class'"
    ):
        biofx.checkpoints.load_optimizer_state(bio_model, good, good.state_dict())
    with pytest.raises(CheckpointError, match="transformed model with its optimizer, found a plain model"):
        biofx.load(
            biofx.checkpoints.Checkpoint(bio_model.transform_record, {}, {}, (), (), {}),
            model,
            optimizer=stale,
        )


def test_a_state_of_other_widths_than_those_of_expanded_layers_is_refused(tmp_path: Path) -> None:
    config = {"apply_dales_principle": True, "dales_method": "expand", "dales_constrain_readout": True}
    bio_model, _ = biofx.transform(Net(), config)
    before = copy.deepcopy(bio_model.state_dict())
    with pytest.raises(
        CheckpointError, match=r"'conv.weight': expected shape \(8, 2, 3\), in which each unit"
    ):
        bio_model.load_state_dict(Net().state_dict())
    for key, value in bio_model.state_dict().items():
        assert torch.equal(value, before[key])
    with pytest.raises(CheckpointError, match=r"'conv.weight', whose units became"):
        biofx.checkpoints.plain_state(bio_model)
    biofx.save(bio_model, tmp_path / "run.pt")
    again = biofx.load(tmp_path / "run.pt", Net())
    x = next(batches())
    assert torch.equal(again.eval()(x), bio_model.eval()(x))
    copy.deepcopy(bio_model).load_state_dict(again.state_dict())


def test_what_the_graph_tells_of_units_survives_a_way_without_values() -> None:
    """Which units a layer reads is in no state dict, and must not be lost where tensors have no values."""
    torch.manual_seed(1)
    bio_model, _ = biofx.transform(Net(), EVERYTHING)
    state, x = copy.deepcopy(bio_model.state_dict()), next(batches())
    expected = bio_model.eval()(x)
    state_of_mix: Any = bio_model.get_submodule("mix.bio_mod")
    index = state_of_mix.unit_index.clone()
    ways: list[Callable[[Any], Any]] = [
        lambda model: model.to("meta").to_empty(device="cpu"),
        lambda model: model.to_empty(device="cpu"),
        lambda model: pickle.loads(pickle.dumps(model.to("meta"))).to_empty(device="cpu"),
        lambda model: model.half().float(),
    ]
    for way in ways:
        back = way(copy.deepcopy(bio_model))
        back.tied.weight = back.twice.weight  # torch parts them on the way over meta
        back.load_state_dict(state)
        assert torch.equal(back.get_submodule("mix.bio_mod").unit_index, index)
        torch.testing.assert_close(back(x), expected, rtol=0, atol=0)
