"""Every code block of the user guide runs as printed, and does what the guide says it does."""

import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx
from biofx import BioConfig, BioConverter, BioGraphModule, Distribution
from biofx.operators.split_ops import fold_weight, pool_synapses, sum_synapses

GUIDE = Path(__file__).resolve().parents[2] / "shared" / "advanced_usage.rst"
BLOCKS = 13

pytestmark = [
    pytest.mark.skipif(not GUIDE.exists(), reason="the user guide is not beside this checkout"),
]

Namespace = dict[str, Any]
Run = Callable[..., Namespace]


def code_blocks(text: str) -> list[str]:
    """The dedented contents of the guide's Python blocks, in order."""
    lines, found = text.splitlines(), []
    for start, line in enumerate(lines):
        if line.strip() != ".. code-block:: python":
            continue
        margin = len(line) - len(line.lstrip())
        body: list[str] = []
        for inner in lines[start + 1 :]:
            if inner.strip() and len(inner) - len(inner.lstrip()) <= margin:
                break
            body.append(inner)
        found.append(textwrap.dedent("\n".join(body)).strip("\n"))
    return found


# TorchScript reads annotations that are types and not texts, so nothing is imported from __future__
class Net(nn.Module):
    """The guide's ten inputs, with a layer ``fc1`` of an even number of units and one output."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(10, 20)
        self.fc2 = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))  # type: ignore[no-any-return]


class EveryModel:
    """An optimizer for guide code that makes its model after the optimizer: it steps what has a gradient."""

    def __init__(self, namespace: Namespace, lr: float) -> None:
        self.namespace, self.lr = namespace, lr
        self.gradients: list[dict[str, Tensor]] = []

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.namespace["bio_model"].named_parameters()

    def zero_grad(self) -> None:
        for _, parameter in self._parameters():
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        self.gradients.append({name: p.grad.clone() for name, p in self._parameters() if p.grad is not None})
        for _, parameter in self._parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=self.lr)


@pytest.fixture
def run() -> Iterator[Run]:
    """Run one block by its number, with the guide's undefined names supplied; returns its namespace."""

    def run_block(number: int, **names: Any) -> Namespace:
        source = code_blocks(GUIDE.read_text(encoding="utf-8"))[number]
        source = re.sub(r"\bbio_transformations(\.bio_config|\.bio_module)?\b", "biofx", source)
        assert "bio_transformations" not in source
        generator = torch.Generator().manual_seed(3)
        inputs = torch.randn(32, 10, generator=generator)
        targets = torch.randn(32, 5, generator=generator)
        torch.manual_seed(0)
        namespace: Namespace = {
            "__name__": "guide",
            "torch": torch,
            "nn": nn,
            "BioConfig": BioConfig,
            "BioConverter": BioConverter,
            "Distribution": Distribution,
            "YourModel": Net,
            "model": Net(),
            "converter": BioConverter(),
            "criterion": nn.MSELoss(),
            "device": torch.device("cpu"),
            "inputs": inputs,
            "targets": targets,
            "inputs_batch": inputs,
            "train_loader": [(inputs[k : k + 8], targets[k : k + 8]) for k in range(0, 32, 8)],
        }
        namespace["optimizer"] = EveryModel(namespace, lr=0.05)
        namespace.update(names)
        exec(compile(source, f"<block {number} of the guide>", "exec", dont_inherit=True), namespace)
        return namespace

    with torch.random.fork_rng():
        yield run_block


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """The rules that a block applies to a model, in order, with what they returned."""
    from biofx.plasticity import model_states

    recorded: list[tuple[str, dict[str, Any]]] = []
    original = model_states.apply_rule

    def recording(model: nn.Module, rule: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        result = original(model, rule, *args, **kwargs)
        recorded.append((rule, result))
        return result

    monkeypatch.setattr("biofx.model.graph_module.apply_rule", recording)
    return recorded


def plain_gradients(model: nn.Module, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    nn.functional.mse_loss(model(inputs), targets).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def factors_of(layer: Any) -> Tensor:
    factors: Tensor = layer.bio_mod.fuzzy_learning_rate_parameters
    return factors


def test_no_block_is_missed() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    assert len(code_blocks(text)) == text.count("code-block::") == BLOCKS
    tested = {
        int(number)
        for name, function in vars(sys.modules[__name__]).items()
        if name.startswith("test_")
        for number in re.findall(r"run\((\d+)", inspect.getsource(function))
    }
    assert tested == set(range(BLOCKS))


def test_comprehensive_configuration(run: Run) -> None:
    names = run(0)
    config, bio = names["converter"].get_config(), names["bio_model"]
    assert config == BioConfig(
        fuzzy_learning_rate_factor_nu=0.2,
        fuzzy_lr_distribution=Distribution.NORMAL,
        fuzzy_lr_dynamic=True,
        fuzzy_lr_min=0.5,
        fuzzy_lr_max=1.5,
        fuzzy_lr_update_freq=5,
        fuzzy_lr_decay=0.98,
        dampening_factor=0.7,
        crystal_thresh=5e-05,
        rejuvenation_parameter_dre=10.0,
        weight_splitting_Gamma=2,
        weight_splitting_activation_function=config.weight_splitting_activation_function,
        base_lr=0.05,
        stability_factor=2.5,
        lr_variability=0.15,
        apply_dales_principle=True,
    )
    assert isinstance(config.weight_splitting_activation_function, nn.ReLU)
    assert factors_of(bio.fc1).std().item() == pytest.approx(0.2, rel=0.2)
    assert 0.5 <= factors_of(bio.fc1).min() < factors_of(bio.fc1).max() <= 1.5
    # the hidden layer's output is split, activated inside, and its outgoing synapses follow the unit's sign
    model, x = names["model"], names["inputs"]
    hidden = torch.relu(model.fc1(x))
    pooled = torch.relu(hidden.unflatten(1, (10, 2)).sum(2).repeat_interleave(2, 1))
    sign = bio.fc2.bio_mod.sign if bio.fc2.bio_mod.sign is not None else torch.zeros(20)
    weight = torch.where(bio.fc2.weight * sign < 0, 0.0, bio.fc2.weight)
    torch.testing.assert_close(bio(x), nn.functional.linear(pooled, weight, bio.fc2.bias))


def test_from_dict_and_update(run: Run) -> None:
    printed: list[str] = []
    names = run(1, print=lambda value: printed.append(str(value)))
    config = names["converter"].get_config()
    assert config == BioConfig(
        fuzzy_learning_rate_factor_nu=0.2,
        dampening_factor=0.7,
        crystal_thresh=5e-05,
        rejuvenation_parameter_dre=10.0,
        weight_splitting_Gamma=2,
        fuzzy_lr_distribution=Distribution.LOGNORMAL,
        fuzzy_lr_dynamic=True,
        apply_dales_principle=True,
    )
    assert printed == [str(config)]
    assert "lognormal" in printed[0]
    assert "dampening_factor=0.7" in printed[0]


def test_ten_distributions(run: Run, calls: list[tuple[str, dict[str, Any]]]) -> None:
    names = run(2)
    configs = {value.fuzzy_lr_distribution: value for key, value in names.items() if key.endswith("_config")}
    assert set(configs) == set(Distribution) - {Distribution.LOG_UNIFORM}  # which is younger than the guide
    wide, x, y = (
        nn.Sequential(nn.Linear(10, 400), nn.ReLU(), nn.Linear(400, 5)),
        names["inputs"],
        names["targets"],
    )
    stds = {"baseline": 0.0, "uniform": 0.16 / 3**0.5, "normal": 0.16, "lognormal": 0.161, "gamma": 0.16}
    stds |= {"beta": 0.16 / (2 / 0.16 + 1) ** 0.5, "layer_adaptive": 0.16 / 3**0.5, "temporal": 0.16}
    for distribution, config in configs.items():
        bio = BioConverter(config)(wide)
        plain = plain_gradients(bio, x, y)
        bio.fuzzy_learning_rates()
        first = factors_of(bio.get_submodule("0")).clone()
        scaled = bio.get_parameter("0.weight").grad
        assert scaled is not None
        torch.testing.assert_close(scaled, plain["0.weight"] * first)
        if distribution.value in stds:
            assert first.std().item() == pytest.approx(stds[distribution.value], rel=0.05)
        else:
            assert 0.03 < first.std() < 0.16
        moved = False
        for _ in range(10):
            plain_gradients(bio, x, y)
            bio.update_fuzzy_learning_rates()
            moved = moved or not torch.equal(factors_of(bio.get_submodule("0")), first)
        assert moved == (distribution in (Distribution.TEMPORAL, Distribution.ACTIVITY))
    last = BioConverter(configs[Distribution.LAYER_ADAPTIVE])(wide)
    ratio = factors_of(last.get_submodule("2")).std() / factors_of(last.get_submodule("0")).std()
    assert ratio.item() == pytest.approx(0.5, abs=0.05)


def test_custom_activations(run: Run) -> None:
    names = run(3)
    bio, model, x = names["bio_model"], names["model"], names["inputs"]
    assert isinstance(bio, BioGraphModule)
    assert len(bio.graph.find_nodes(op="call_function", target=sum_synapses)) == 1

    def expected(activation: Callable[[Tensor], Tensor]) -> Tensor:
        pooled = activation(model.fc1(x)).unflatten(1, (10, 2)).sum(2).repeat_interleave(2, 1)
        output: Tensor = model.fc2(torch.relu(pooled))
        return output

    torch.testing.assert_close(bio(x), expected(lambda h: torch.where(h > 0, h, 0.05 * h)))
    for name, definition in (
        ("custom_sigmoid_activation", lambda h: 2 / (1 + (-h).exp())),
        ("custom_tanh_activation", lambda h: torch.tanh(1.5 * h)),
    ):
        other = BioConverter(weight_splitting_Gamma=2, weight_splitting_activation_function=names[name])
        torch.testing.assert_close(other(model)(x), expected(definition))


def test_output_layer_is_marked(run: Run) -> None:
    converter = BioConverter(weight_splitting_Gamma=5, weight_splitting_fold=False)
    names = run(4, converter=converter)
    bio, model = names["bio_model"], names["model"]
    assert model.fc3.last_module_token
    pools = bio.graph.find_nodes(op="call_function", target=pool_synapses)
    assert [pool.args[0].target for pool in pools] == ["fc1", "fc2"]
    # the mark itself, and not only the graph, keeps a layer whole
    BioConverter.set_last_module_token_for_module(model.fc2)
    again = converter(model)
    pools = again.graph.find_nodes(op="call_function", target=pool_synapses)
    assert [pool.args[0].target for pool in pools] == ["fc1"]


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive:UserWarning")
def test_monitoring(
    run: Run, calls: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    plt = pytest.importorskip("matplotlib.pyplot")
    shown: list[list[tuple[str, list[float]]]] = []
    monkeypatch.setattr(
        plt,
        "show",
        lambda: shown.append([(a.get_title(), list(a.lines[0].get_ydata())) for a in plt.gcf().axes]),
    )
    try:
        names = run(5)
    finally:
        plt.close("all")
    crystallized, rejuvenated, variability = (
        names[f"{kind}_history"]
        for kind in ("crystallized_weights", "rejuvenated_weights", "learning_rate_variability")
    )
    assert len(crystallized) == len(variability) == 100
    assert len(rejuvenated) == 10
    assert [rule for rule, _ in calls[:3]] == ["crystallize", "fuzzy_learning_rates", "rejuvenate_weights"]
    # with these gradients some synapses are caught along the way, on top of those drawn below 0.9
    drawn = factors_of(BioConverter()(names["model"]).fc1)
    assert crystallized[0] >= int((drawn < 0.9).sum())
    assert variability[-1] > variability[0] > 0.16 / 3**0.5 * 0.8
    assert crystallized == sorted(crystallized)
    # each count of changed weights is what the call said, but for new weights within 1e-6 of the old
    said = [result["fc1.weight"] for rule, result in calls if rule == "rejuvenate_weights"]
    assert all(0 <= told - counted <= 1 for told, counted in zip(said, rejuvenated, strict=True))
    assert sum(rejuvenated) > 0
    # the gradients that reached the optimizer carried the factors
    last = names["optimizer"].gradients[-1]
    assert set(last) == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}
    assert shown == [
        [
            ("Crystallized Weights Over Time", crystallized),
            ("Rejuvenated Weights Over Time", rejuvenated),
            ("Learning Rate Variability Over Time", variability),
        ]
    ]


def test_custom_bio_module(run: Run) -> None:
    names = run(6)
    bio, model = names["bio_model"], names["model"]
    state = bio.fc1.bio_mod
    assert type(state).__name__ == "CustomBioModule"
    assert state.get_parent() is bio.fc1
    assert state.config == names["custom_converter"].get_config().replace(
        weight_splitting_activation_function=state.config.weight_splitting_activation_function
    )
    scale, history = 1.0, torch.zeros(10)
    for step in range(100):
        concentration = 0.5 + 0.5 * torch.sin(torch.tensor(step / 10)).item()
        scale *= 1 + 0.1 * concentration
        history[(step + 1) % 10] = concentration
    torch.testing.assert_close(bio.fc1.weight.data, model.fc1.weight.data * scale, rtol=1e-4, atol=0)
    torch.testing.assert_close(state.activity_history, history)
    assert state.current_step == 100
    assert "fc1.bio_mod.activity_history" in bio.state_dict()
    assert "custom_bio_method" not in biofx.BioModule.exposed_functions


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The TorchScript type system:UserWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_combining_with_torch(
    run: Run,
    calls: list[tuple[str, dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    names = run(7)
    bio, model, x = names["bio_model"], names["model"], names["inputs"]
    assert [rule for rule, _ in calls] == ["volume_dependent_lr", "fuzzy_learning_rates", "crystallize"] * 4
    assert all(result == {"fc1.weight": 200, "fc2.weight": 100} for rule, result in calls if "lr" in rule)
    # the first step's gradient carried both kinds of factors
    first_inputs, first_targets = names["train_loader"][0]
    plain = plain_gradients(model, first_inputs, first_targets)["fc1.weight"]
    factors = factors_of(BioConverter()(model).fc1)
    magnitude = model.fc1.weight.abs()
    falling = 0.1 * (-2.0 * magnitude / (magnitude + magnitude.mean())).exp()
    noise = names["optimizer"].gradients[0]["fc1.weight"] / (plain * factors * falling)
    noise = noise[noise.isfinite()].detach()
    assert noise.mean().item() == pytest.approx(1, abs=4 * 0.2 / len(noise) ** 0.5)
    assert noise.std().item() == pytest.approx(0.2, rel=0.25)
    # the file is a program of its own
    loaded = torch.jit.load(tmp_path / "bio_model_scripted.pt")
    assert torch.equal(loaded(x), bio(x))
    assert not torch.equal(loaded(x), model(x))
    assert not hasattr(loaded, "crystallize")


def test_data_parallel_branch() -> None:
    """The branch for several GPUs, which the block takes only where there are some."""
    wrapped = nn.DataParallel(BioConverter()(Net()))
    wrapped(torch.ones(4, 10)).sum().backward()
    assert wrapped.module.volume_dependent_lr() == {"fc1.weight": 200, "fc2.weight": 100}
    assert wrapped.module.fuzzy_learning_rates() == {"fc1.weight": 200, "fc2.weight": 100}
    assert set(wrapped.module.crystallize()) == {"fc1.weight", "fc2.weight"}


def test_selective_application(run: Run, calls: list[tuple[str, dict[str, Any]]]) -> None:
    bio = BioConverter()(Net())
    names = run(8, bio_model=bio)
    every = ["volume_dependent_lr", "fuzzy_learning_rates", "crystallize", "rejuvenate_weights"]
    selective = ["fuzzy_learning_rates", "crystallize", "rejuvenate_weights", *["fuzzy_learning_rates"] * 3]
    assert [rule for rule, _ in calls] == [*every * 4, *selective]
    replaced = [result["fc1.weight"] for rule, result in calls if rule == "rejuvenate_weights"]
    assert all(isinstance(count, int) for count in replaced)
    assert sum(replaced) > 0
    assert len(names["optimizer"].gradients) == 8
    assert bio.fc1.bio_mod.events == 4 + 5


def test_static_distributions_cost_nothing_to_update(run: Run) -> None:
    created: list[BioConfig] = []

    def recorded(**fields: Any) -> BioConfig:
        created.append(BioConfig(**fields))
        return created[-1]

    names = run(9, BioConfig=recorded)
    assert names["config"] is created[1]
    for config, is_dynamic in zip(created, (False, True), strict=True):
        bio = BioConverter(config.replace(fuzzy_lr_update_freq=1))(Net())
        before = factors_of(bio.fc1).clone()
        result = bio.update_fuzzy_learning_rates()
        assert torch.equal(factors_of(bio.fc1), before) is not is_dynamic
        assert (result["fc1.weight"] == 200) is is_dynamic


def test_batches_for_activity(run: Run) -> None:
    config = BioConfig(fuzzy_lr_distribution=Distribution.ACTIVITY, fuzzy_lr_dynamic=True)
    bio = BioConverter(config)(Net())
    start = factors_of(bio.fc1).clone()
    names = run(10, bio_model=bio)
    state, x = bio.fc1.bio_mod, names["inputs_batch"]
    hidden = torch.relu(bio.fc1(x)).abs().detach()
    activity = hidden.mean(0)
    for row in hidden:
        activity = 0.9 * activity + 0.1 * row
    torch.testing.assert_close(state.activity, activity)
    assert state.steps == 1 + len(x)
    spread = (2 - activity / activity.mean()).clamp(0.5, 1.5)
    torch.testing.assert_close(factors_of(bio.fc1), 1 + 0.16 * spread[:, None] * state.noise)
    assert not torch.equal(factors_of(bio.fc1), start)


def test_splitting_by_model_size(run: Run) -> None:
    names = run(11)
    pools = []
    for name in ("small_model_converter", "large_model_converter", "very_large_model_converter"):
        graph = names[name](Net()).graph
        folds = graph.find_nodes(op="call_function", target=fold_weight)
        pools.append([node.kwargs["rows"] for node in folds if "rows" in node.kwargs])
    assert pools == [[4], [2], []]


def test_parameters_by_network_size(run: Run) -> None:
    names = run(12)
    layer = nn.Sequential(nn.Linear(200, 200))
    spread, replaced = {}, {}
    for name in ("small_config", "large_config"):
        bio = BioConverter(names[name])(layer)
        spread[name] = factors_of(bio.get_submodule("0")).std().item()
        replaced[name] = bio.rejuvenate_weights()["0.weight"]
    assert spread["small_config"] == pytest.approx(0.16 / 3**0.5, rel=0.02)
    assert spread["large_config"] == pytest.approx(0.1 / 3**0.5, rel=0.02)
    magnitude = layer.get_parameter("0.weight").detach().abs()
    std = layer.get_parameter("0.weight").detach().std(correction=0)
    for name, protection in (("small_config", 8.0), ("large_config", 12.0)):
        chance = (-protection * magnitude / std).exp()
        deviation = (chance * (1 - chance)).sum().sqrt()
        assert abs(replaced[name] - chance.sum()) < 4 * deviation
