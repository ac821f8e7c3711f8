"""What is timed: for each work its candidates, and the ratios that are wanted of them."""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from large_models import large_models
from models import (
    RateNetwork,
    convolutions,
    fully_connected,
    inference,
    perceptron,
    resnet18,
    resnet18_of_settings,
    training_step,
    transformer,
)
from torch import Tensor, nn

import biofx
from biofx.capture.observe import observe
from biofx.model.attribute_guards import refuse_changed_attributes
from biofx.model.graph_module import BioGraphModule, become_graph_module
from biofx.model.late_changes import follow_late_changes

RULES = ("volume_dependent_lr", "crystallize", "rejuvenate_weights", "fuzzy_learning_rates")
_UNSCALED = {"fuzzy_lr_distribution": "baseline"}


@dataclass(frozen=True)
class Work:
    """Things that do the same, to be timed against each other."""

    name: str
    candidates: Mapping[str, Callable[[], object]]
    against: str = "plain"
    """The candidate that the others are divided by."""
    goals: Mapping[str, float] = field(default_factory=dict)
    """Ratios wanted, per candidate."""
    in_percent: bool = False
    """Whether ratios are so small that they are shown in per cent."""


def reference() -> Any:
    """Return the paper's package, None where it is not installed."""
    found = importlib.util.find_spec("bio_transformations")
    return None if found is None else importlib.import_module("bio_transformations")


def works(device: torch.device, *, compiled: bool) -> Iterator[Work]:
    """Yield every work, built when it is asked for, so that one at a time is in memory."""
    images = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
    large = torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    vectors = torch.randn(100, 3072, generator=torch.Generator().manual_seed(0)).to(device)
    yield _splits("5 convolutions", convolutions, images, {2: 0.30, 4: 0.15}, compiled)
    yield _splits("5 convolutions, batch norm", _normalised, images, {2: 0.65, 4: 0.38}, compiled)
    yield _splits("ResNet-18", resnet18, large, {2: 0.70, 4: None}, compiled)
    yield _splits("FCNet", fully_connected, vectors, {2: 0.6, 4: None}, compiled)
    yield _mechanisms(vectors, compiled)
    yield _sub_weights(vectors, compiled)
    if not compiled:
        yield _inference(images)
        yield from _transforms(device)
        yield from _guards(device)
        yield _observed_runs()
        yield from _rules(vectors)
        yield from _monitors(device)
        yield from _turnovers(device)
        yield from _turnover_of_weights(device)
        yield _held_back(device)


def large_works(device: torch.device, *, tiny: bool, compiled: bool) -> Iterator[Work]:
    """Yield a training step of each large model, with the mechanisms that are in the graph.

    Args:
        device: where to.
        tiny: whether the models are so small that the steps can be tried anywhere.
        compiled: whether the steps are.
    """
    for model in large_models(tiny=tiny):
        torch.manual_seed(0)
        plain, x = model.make(), model.inputs.to(device)
        candidates = {"plain": training_step(plain, x, compiled=compiled)}
        for name, config in _MECHANISMS.items():
            bio_model = biofx.transform(plain, config).graph_module
            candidates[name] = training_step(bio_model, x, compiled=compiled)
        candidates["split in 2"] = training_step(_split(plain, 2), x, compiled=compiled)
        yield Work(model.name, candidates)


def series(device: torch.device) -> Iterator[Work]:
    """Yield FCNets of growing width: how the cost of the mechanisms grows."""
    for width in (500, 1000, 2000, 4000):
        x = torch.randn(100, 3072).to(device)
        plain = fully_connected(width=width)
        candidates = {"plain": training_step(plain, x)}
        for name, config in _MECHANISMS.items():
            candidates[name] = training_step(biofx.transform(plain, config).graph_module, x)
        candidates["split in 2"] = training_step(_split(plain, 2), x)
        yield Work(f"FCNet, width {width}", candidates)


_MECHANISMS: dict[str, dict[str, Any]] = {
    "rates": {},
    "rates from their seed": {"fuzzy_lr_dtype": "seed"},
    "rates and signs": {"apply_dales_principle": True},
    "rates and masks": {"weight_density": 0.1},
}


def _normalised(share: int = 1) -> nn.Module:
    return convolutions(share, norm=True)


def _split(model: nn.Module, gamma: int, *, fold: bool = True) -> nn.Module:
    config = {**_UNSCALED, "weight_splitting_Gamma": gamma, "weight_splitting_fold": fold}
    return biofx.transform(model, config).graph_module


def _splits(
    name: str, make: Callable[..., nn.Module], x: Tensor, goals: dict[int, float | None], compiled: bool
) -> Work:
    """Return the training step of a model split in several ways, and of its floor: the folded widths."""
    torch.manual_seed(0)
    plain = make()
    candidates = {"plain": training_step(plain, x, compiled=compiled)}
    package = None if compiled else reference()
    for gamma in goals:
        folded = training_step(_split(plain, gamma), x, compiled=compiled)
        candidates[f"split in {gamma}"] = folded
        candidates[f"floor of {gamma}"] = training_step(make(gamma), x, compiled=compiled)
    if not compiled:
        candidates["split in 2, not folded"] = training_step(_split(plain, 2, fold=False), x)
    if package is not None:
        converter = package.BioConverter(weight_splitting_Gamma=2)
        candidates["reference, 2"] = training_step(converter(_marked(package, copy.deepcopy(plain))), x)
    wanted = {f"split in {gamma}": goal for gamma, goal in goals.items() if goal is not None}
    return Work(f"{name}, training step", candidates, goals=wanted)


def _marked(package: Any, model: nn.Module) -> nn.Module:
    """Tell the reference package which layer is the last, which it does not find by itself."""
    *_, last = (module for module in model.modules() if isinstance(module, nn.Linear))
    package.BioConverter.set_last_module_token_for_module(last)
    return model


def _mechanisms(x: Tensor, compiled: bool) -> Work:
    """Return the training step with mechanisms in the graph, and with every rule at every step."""
    torch.manual_seed(0)
    plain = fully_connected()
    candidates = {"plain": training_step(plain, x, compiled=compiled)}
    for name, config in _MECHANISMS.items():
        made = biofx.transform(plain, config).graph_module
        candidates[name] = training_step(made, x, compiled=compiled)
    if not compiled:
        converted = biofx.BioConverter(apply_dales_principle=True)(plain)
        every = (*RULES, "enforce_dales_principle")
        candidates["all rules every step"] = training_step(converted, x, rules=every)
        package = reference()
        if package is not None:
            made = package.BioConverter(apply_dales_principle=True)(_marked(package, copy.deepcopy(plain)))
            candidates["reference, all rules"] = training_step(made, x, rules=RULES)
    goals = {"rates": 1.10, "rates and signs": 1.15, "all rules every step": 2.0}
    return Work("FCNet, mechanisms, training step", candidates, goals=goals)


def _sub_weights(x: Tensor, compiled: bool) -> Work:
    """Return the training step with several weights for each connection, which are added up at each step."""
    torch.manual_seed(0)
    plain = fully_connected()
    candidates = {"plain": training_step(plain, x, compiled=compiled)}
    for name, config in _SUB_WEIGHTS.items():
        options = {**_UNSCALED, "weight_splitting_mode": "sub-weights", "weight_splitting_Gamma": 2, **config}
        made = biofx.transform(plain, options).graph_module
        candidates[name] = training_step(made, x, compiled=compiled)
    goals = {"2 sub-weights": 1.35}
    return Work("FCNet, sub-weights, training step", candidates, goals=goals)


_SUB_WEIGHTS: dict[str, dict[str, Any]] = {
    "2 sub-weights": {},
    "2 sub-weights, mean": {"weight_splitting_rates": "mean"},
    "2 sub-weights, rates": {"fuzzy_lr_distribution": "uniform"},
    "2 sub-weights, tanh": {"weight_splitting_activation_function": torch.tanh},
    "4 sub-weights": {"weight_splitting_Gamma": 4},
}


def _inference(x: Tensor) -> Work:
    """Return the forward alone, with the folded weights computed anew each time, and deployed."""
    torch.manual_seed(0)
    plain = convolutions()
    candidates = {"plain": inference(plain, x), "floor of 2": inference(convolutions(2), x)}
    split = _split(plain, 2)
    candidates["split in 2"] = inference(split, x)
    candidates["split in 2, deployed"] = inference(biofx.deploy(split), x)
    return Work("5 convolutions, inference", candidates, goals={"split in 2, deployed": 0.28})


def _transforms(device: torch.device) -> Iterator[Work]:
    """Yield transforms of three models, against what torch needs to copy and trace them."""
    everything = {"weight_splitting_Gamma": 2, "apply_dales_principle": True}
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for name, model, x in (
        ("a perceptron of 5 nodes", perceptron(20, 16, 4), torch.ones(1, 20)),
        ("a perceptron of 425 nodes", perceptron(*(16,) * 213), torch.ones(1, 16)),
        ("ResNet-18", resnet18(), images),
    ):
        model, x = model.to(device), x.to(device)
        candidates: dict[str, Callable[[], object]] = {
            "copied and traced": functools.partial(_copied_and_traced, model),
            "everything off": functools.partial(biofx.transform, model, _UNSCALED),
            "recorded": functools.partial(biofx.transform, model, _UNSCALED, example_inputs=(x,)),
            "everything on": functools.partial(biofx.transform, model, everything),
        }
        goals = {"everything off": 1.4, "recorded": 3, "everything on": 4}
        yield Work(f"{name}, transform", candidates, "copied and traced", goals)


def _copied_and_traced(model: nn.Module) -> torch.fx.GraphModule:
    return torch.fx.symbolic_trace(copy.deepcopy(model))


def _guards(device: torch.device) -> Iterator[Work]:
    """Yield what is looked at in each forward, by itself, against the forward of which it is a part."""
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(device)
    signs = {**_UNSCALED, "weight_splitting_Gamma": 2, "apply_dales_principle": True}
    for name, make, config in (
        ("everything off", resnet18, _UNSCALED),
        ("splits and signs", resnet18, signs),
        ("splits and signs, settings read", resnet18_of_settings, signs),
    ):
        torch.manual_seed(0)
        model = biofx.transform(make(), config).graph_module
        look: Callable[[], object] = functools.partial(_look, _graphs(model))
        candidates = {"forward": inference(model, x), "guards": look}
        title = f"ResNet-18, batch of 1, {name}"
        yield Work(title, candidates, "forward", {"guards": 0.005}, in_percent=True)


def _observed_runs() -> Work:
    """A recurrent loop of 50 steps, and the two runs of it that are observed with their analysis."""
    model, x = RateNetwork(), torch.randn(50, 50, 32)
    captured = biofx.capture(model, example_inputs=(x,))

    def observe_and_analyse() -> None:
        captured.observed_runs = observe(model, (x,), frozenset())
        biofx.unit_groups(captured)

    candidates = {
        "forward and backward": training_step(model, x),
        "observe two runs": lambda: observe(model, (x,), frozenset()),
        "observe and analyse": observe_and_analyse,
    }
    nodes = sum(len(graph.nodes) for graph in captured.observed_runs.graphs)
    name = f"a loop of 50 steps, {nodes} nodes observed"
    return Work(name, candidates, "forward and backward", {"observe two runs": 3})


def _monitors(device: torch.device) -> Iterator[Work]:
    """Yield ten training steps of which a monitor watches none or one, without or with activity."""
    mlp = nn.Sequential(
        *(nn.Linear(784, 500), nn.ReLU(), nn.Linear(500, 500), nn.ReLU(), nn.Linear(500, 10)),
    )
    for name, plain, shape in (
        ("784-500-500-10", mlp, (100, 784)),
        ("ResNet-18", resnet18(), (16, 3, 32, 32)),
        ("a small transformer", transformer(), (16, 32, 32)),
    ):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
        monitors: dict[str, list[biofx.Monitor]] = {
            "not watched": [],
            "watched, no activity": [biofx.Monitor(every=10, keep=1, activity=False)],
            "watched": [biofx.Monitor(every=10, keep=1)],
        }
        candidates = {label: _ten_steps(plain, x, observers) for label, observers in monitors.items()}
        yield Work(f"{name}, monitor, ten training steps", candidates, "not watched", {"watched": 1.05})


def _ten_steps(plain: nn.Module, x: Tensor, observers: list[biofx.Monitor]) -> Callable[[], None]:
    model = biofx.transform(plain).graph_module.to(x.device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    handle = biofx.attach(model, optimizer, observers=observers)
    labels = torch.zeros(len(x), dtype=torch.int64, device=x.device)

    def run() -> None:
        for _ in range(10):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), labels).backward()
            optimizer.step()
        assert handle.steps % 10 == 0  # and kept

    return run


def _graphs(model: nn.Module) -> list[BioGraphModule]:
    graphs = (module for module in model.modules() if isinstance(module, BioGraphModule))
    return [graph for graph in graphs if not graph.keeps_forward]


def _look(graphs: list[BioGraphModule]) -> None:
    for graph in graphs:
        follow_late_changes(graph, become_graph_module)
        refuse_changed_attributes(graph)


def _turnovers(device: torch.device) -> Iterator[Work]:
    """Yield ten training steps with turnover of units, at every step and at every tenth."""
    config = {**_UNSCALED, "unit_turnover": "continual-backprop", "unit_turnover_rate": 1e-4}
    for widths, size in (((20, 5, 1), 1), ((784, 100, 100, 100, 10), 30), ((784, 500, 500, 10), 100)):
        torch.manual_seed(0)
        plain, x = perceptron(*widths), torch.randn(size, widths[0]).to(device)
        candidates = {
            "plain": training_step(plain, x),
            "attached": training_step(biofx.transform(plain, _UNSCALED).graph_module, x, attached=()),
        }
        for every, name in ((1, "at every step"), (10, "at every 10th step")):
            made = biofx.transform(plain, config).graph_module
            rules = (biofx.Rule("rejuvenate_units", every=every),)
            candidates[name] = training_step(made, x, attached=rules)
        goals = {"at every step": 1.05} if size == 100 else {}
        title = f"{'-'.join(map(str, widths))}, batch of {size}, turnover of units"
        yield Work(title, {key: _ten_times(step) for key, step in candidates.items()}, goals=goals)


def _rules(x: Tensor) -> Iterator[Work]:
    """Yield each rule by itself against the reference package's."""
    package = reference()
    converters = {"biofx": biofx.BioConverter()} | (
        {} if package is None else {"reference": package.BioConverter()}
    )
    models = {}
    for name, converter in converters.items():
        torch.manual_seed(0)
        models[name] = converter(fully_connected()).to(x.device)
        models[name](x).square().mean().backward()
    goals = {"volume_dependent_lr": 1 / 3, "crystallize": 1 / 5, "rejuvenate_weights": 1 / 5}
    for rule in RULES:
        candidates = {name: getattr(model, rule) for name, model in models.items()}
        against = "biofx" if package is None else "reference"
        yield Work(f"FCNet, {rule}", candidates, against, {"biofx": goals[rule]} if rule in goals else {})


def _turnover_of_weights(device: torch.device) -> Iterator[Work]:
    """Yield the steps between two turnovers of weights, and a turnover against a step.

    Of the networks of experiments on loss of plasticity; a turnover every 1000 steps may cost 5 % of these.
    """
    never = (biofx.Rule("rejuvenate_weights", after=10**9),)
    utility = {**_UNSCALED, "rejuvenation_utility": "gradient", "rejuvenation_redraw": "initial"}
    for widths, size in (((784, 500, 500, 10), 100), ((784, 100, 100, 100, 10), 30)):
        torch.manual_seed(0)
        plain, x = perceptron(*widths), torch.randn(size, 784).to(device)

        def made(plain: nn.Module = plain, **options: Any) -> nn.Module:
            return biofx.transform(plain, biofx.BioConfig(**{**utility, **options})).graph_module

        candidates: dict[str, Callable[[], object]] = {
            "plain": training_step(plain, x),
            "attached": training_step(made(rejuvenation_utility="magnitude"), x, attached=never),
            "utility of the step": training_step(made(rejuvenation_utility_decay=0.0), x, attached=never),
            "mean of every 10th": training_step(made(rejuvenation_utility_every=10), x, attached=never),
            "mean of every step": training_step(made(), x, attached=never),
        }
        name = f"{'-'.join(map(str, widths))}, batch of {size}"
        goals = {"utility of the step": 1.05, "mean of every 10th": 1.05}
        candidates = {key: _ten_times(step) for key, step in candidates.items()}
        yield Work(f"{name}, 10 steps between turnovers of weights", candidates, "attached", goals)
        turnovers: dict[str, Callable[[], object]] = {"step": training_step(plain, x)}
        for kind, options in _SELECTIONS.items():
            model: Any = made(**options)
            training_step(model, x, attached=())()
            turnovers[kind] = model.rejuvenate_weights
        yield Work(f"{name}, a turnover", turnovers, "step", dict.fromkeys(_SELECTIONS, 50))


def _held_back(device: torch.device) -> Work:
    """Return training steps with rules that hold weights back, in the second task, when they pull."""
    torch.manual_seed(0)
    plain, x = perceptron(784, 500, 500, 10), torch.randn(100, 784).to(device)
    attached = biofx.transform(plain, _UNSCALED).graph_module
    candidates = {"plain": training_step(plain, x), "attached": training_step(attached, x, attached=())}
    for name, (rule, tasks, options) in _HOLDING.items():
        made = biofx.transform(plain, {**_UNSCALED, **options}).graph_module
        candidates[name] = training_step(made, x, attached=(biofx.Rule(rule),), tasks=tasks)
    goals = dict.fromkeys(_HOLDING, 1.05)
    return Work("784-500-500-10, batch of 100, held back", candidates, "attached", goals)


_HOLDING: dict[str, tuple[str, int, dict[str, Any]]] = {
    "path of the first task": ("synaptic_intelligence", 1, {"consolidation": "synaptic-intelligence"}),
    "synaptic intelligence": ("synaptic_intelligence", 2, {"consolidation": "synaptic-intelligence"}),
    "elastic": ("elastic_consolidation", 2, {"consolidation": "elastic"}),
    "memory-aware": ("memory_aware", 2, {"consolidation": "memory-aware"}),
    "UPGD": ("upgd", 0, {"consolidation": "upgd"}),
    "UPGD without noise": ("upgd", 0, {"consolidation": "upgd", "upgd_noise": 0.0}),
    "to the initial weight": ("l2_to_initial", 0, {"l2_to_initial_strength": 1e-3}),
}


def _ten_times(step: Callable[[], object]) -> Callable[[], object]:
    def steps() -> None:
        for _ in range(10):
            step()

    return steps


_SELECTIONS: dict[str, dict[str, Any]] = {
    "by chance, magnitude": {"rejuvenation_utility": "magnitude"},
    "by chance": {"rejuvenation_turnover": 0.01},
    "proportion": {"rejuvenation_selection": "proportion", "rejuvenation_turnover": 0.01},
    "threshold": {"rejuvenation_selection": "threshold", "rejuvenation_threshold": 1e-3},
}
