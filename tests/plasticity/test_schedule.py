"""Entries of a schedule with options and layers of their own."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import biofx
from biofx import BioConfig, Distribution, Rule, attach
from biofx.config import config_options, rule_options
from biofx.errors import CheckpointError, OptionError, PlasticityError, SelectorError
from biofx.select import Candidate
from tests.plasticity.runs import mlp, state_of, train

BASE: dict[str, Any] = {
    "fuzzy_learning_rate_factor_nu": 0.4,
    "crystal_thresh": 0.05,
    "unit_turnover": "continual-backprop",
    "unit_turnover_rate": 0.02,
    "unit_turnover_maturity": 2,
}
"""Options under which each rule does something within a few steps."""
TEMPORAL: dict[str, Any] = {"fuzzy_lr_distribution": Distribution.TEMPORAL, "fuzzy_lr_dynamic": True}
GRADIENT = {"rejuvenation_utility": "gradient", "rejuvenation_turnover": 0.1}
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("synaptic_scaling", {"rate": 0.7}, {}),
    ("crystallize", {"dampening": 0.2, "threshold": 0.4}, {}),
    ("volume_dependent_lr", {"base": 0.5, "stability": 1.0, "variability": 0.05}, {}),
    ("update_fuzzy_learning_rates", {"update_freq": 1, "decay": 0.5}, TEMPORAL),
    ("rejuvenate_weights", {"protection": 0.4}, {}),
    ("rejuvenate_weights", {"turnover": 0.3, "redraw": "zero"}, {}),
    ("rejuvenate_weights", {"selection": "threshold", "threshold": 0.9}, {}),
    ("rejuvenate_weights", {"turnover": 0.3, "utility_decay": 0.2, "utility_every": 2}, GRADIENT),
    ("rejuvenate_units", {"rate": 0.4, "maturity": 0}, {}),
    ("rejuvenate_units", {"turnover": "redo", "dormancy": 1.0}, {}),
    ("shrink_and_perturb", {"factor": 0.5, "perturbation": 0.3}, {}),
    (
        "synaptic_intelligence",
        {"strength": 50.0, "damping": 0.02, "effect": "rates"},
        {"consolidation": "synaptic-intelligence"},
    ),
    ("elastic_consolidation", {"strength": 900.0, "decay": 0.5}, {"consolidation": "elastic"}),
    ("memory_aware", {"strength": 90.0}, {"consolidation": "memory-aware"}),
    (
        "upgd",
        {"utility_decay": 0.5, "noise": 0.1, "scaling": "layer"},
        {"consolidation": "upgd"},
    ),
    ("l2_to_initial", {"strength": 0.5}, {"l2_to_initial_strength": 0.01}),
]
LAYERS = "0"


def run(config: BioConfig, rules: list[Any], steps: int = 6, optimizer: str = "SGD") -> nn.Module:
    """Return a model after some steps, in which each rule of tasks has seen the end of one."""
    torch.manual_seed(0)
    bio, _ = biofx.transform(mlp(), config)
    made = getattr(torch.optim, optimizer)(bio.parameters(), lr=0.05)
    plasticity = attach(bio, made, rules)
    data = torch.randn(8, 6, generator=torch.Generator().manual_seed(5))
    if config.consolidation not in ("off", "upgd"):
        plasticity.begin_task()
        train(bio, made, 3)
        plasticity.begin_task(None if config.consolidation == "synaptic-intelligence" else [data])
    train(bio, made, steps, seed=3)
    return bio


def same(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return all(torch.equal(states[0][key], value) for key, value in states[1].items())


def fields(rule: str, options: dict[str, Any]) -> dict[str, Any]:
    return {rule_options(rule)[name]: value for name, value in options.items()}


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize(
    ("rule", "options", "base"), CASES, ids=[f"{c[0]}-{next(iter(c[1]))}" for c in CASES]
)
def test_options_at_a_rule_are_those_of_a_config_to_the_bit(
    rule: str, options: dict[str, Any], base: dict[str, Any], optimizer: str
) -> None:
    config = BioConfig(**{**BASE, **base})
    without = run(config, [Rule(rule, every=1)], optimizer=optimizer)
    by_config = run(config.replace(**fields(rule, options)), [rule], optimizer=optimizer)
    by_rule = run(config, [Rule(rule, **options)], optimizer=optimizer)
    by_fields = run(config, [Rule(rule, **fields(rule, options))], optimizer=optimizer)
    assert same(by_rule, by_config)
    assert same(by_fields, by_config)
    assert not same(by_rule, without)


@pytest.mark.parametrize(
    ("rule", "options", "base"), CASES, ids=[f"{c[0]}-{next(iter(c[1]))}" for c in CASES]
)
def test_options_for_some_layers_are_those_of_an_override_to_the_bit(
    rule: str, options: dict[str, Any], base: dict[str, Any]
) -> None:
    config = BioConfig(**{**BASE, **base})
    rest = Rule(rule, exclude=LAYERS) if rule != "rejuvenate_units" else None
    entries = [Rule(rule, only=LAYERS, **options), *([rest] if rest else [])]
    by_config = run(config.override(LAYERS, **fields(rule, options)), [rule])
    by_rule = run(config, entries)
    assert same(by_rule, by_config)
    assert not same(by_rule, run(config, [rule]))


def test_every_option_that_a_rule_can_be_given_is_tried() -> None:
    tried = {(rule, rule_options(rule)[name]) for rule, options, _ in CASES for name in options}
    settable = {
        (rule, field)
        for field, declared in config_options().items()
        for rule, at_rule in declared.rules.items()
        if at_rule.shapes is None
    }
    equal = {  # read by the same lines for each of these
        ("elastic_consolidation", "consolidation_effect"),
        ("memory_aware", "consolidation_effect"),
    }
    assert settable - tried == equal


def test_entries_of_a_rule_run_each_on_their_layers_at_their_times() -> None:
    bio, _ = biofx.transform(mlp(), {"rejuvenation_turnover": 0.5})
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.1)
    ran: dict[str, list[int]] = {"0.weight": [], "2.weight": []}

    def observe(step: int, layers: Any) -> None:
        for path, layer in layers.items():
            if "rejuvenate_weights" in layer.touched:
                ran[path].append(step)

    rules = [
        Rule("rejuvenate_weights", every=2, only="0", turnover=0.3),
        Rule("rejuvenate_weights", every=3, exclude=["0"]),
        Rule("rejuvenate_weights", every=2, after=5, only=nn.Linear, exclude="re:2"),
    ]
    attach(bio, optimizer, rules, observers=[observe])
    train(bio, optimizer, 8)
    assert ran == {"0.weight": [0, 2, 4, 5, 6, 7], "2.weight": [0, 3, 6]}
    assert state_of(bio).config.rejuvenation_turnover == 0.5


def test_layers_that_no_entry_names_keep_the_default_of_dynamic_factors() -> None:
    config = BioConfig(**TEMPORAL, fuzzy_lr_update_freq=1)
    bio, _ = biofx.transform(mlp(), config)
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.1)
    attach(bio, optimizer, [Rule("update_fuzzy_learning_rates", every=3, only="0")])
    train(bio, optimizer, 6)
    assert (state_of(bio, "0").steps, state_of(bio, "2").steps) == (2, 6)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (["crystallize", Rule("crystallize", every=10)], "both due at step 0 for '0.weight'"),
        (
            [
                Rule("synaptic_scaling", every=4, rate=0.2),
                Rule("synaptic_scaling", every=6, after=2, only="2"),
            ],
            r"synaptic_scaling every 4 \(rate=0.2\) and synaptic_scaling every 6 after 2 on '2' are both due "
            r"at step 8 for '2.weight'.*other layers \(only=, exclude=\) or times",
        ),
        (
            [
                Rule("rejuvenate_weights", until=3, utility_decay=0.5),
                Rule("rejuvenate_weights", after=3, only="2"),
            ],
            "one value of rejuvenation_utility_decay in all entries of 'rejuvenate_weights' for '2.weight', "
            "since it is read at every step, found 0.5 and 0.99",
        ),
    ],
)
def test_entries_that_contradict_each_other_are_refused(rules: list[Any], message: str) -> None:
    bio, _ = biofx.transform(mlp())
    with pytest.raises(OptionError, match=message):
        attach(bio, torch.optim.SGD(bio.parameters(), lr=0.1), rules)


def test_entries_that_never_meet_may_share_layers() -> None:
    bio, _ = biofx.transform(mlp())
    rules = [Rule("synaptic_scaling", every=2), Rule("synaptic_scaling", every=4, after=1, rate=0.5)]
    assert attach(bio, torch.optim.SGD(bio.parameters(), lr=0.1), rules).rules == tuple(rules)


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        (
            Rule("synaptic_scaling", only="laye"),
            SelectorError,
            "rule 'synaptic_scaling': selector 'laye' matches",
        ),
        (
            Rule("synaptic_scaling", only="encodr.*"),
            SelectorError,
            "selector 'encodr.*' matches nothing; did you mean 'encoder'",
        ),
        (
            Rule("synaptic_scaling", only="act"),
            SelectorError,
            "expected selectors that pick a layer with a weight, found none that is picked by only='act'; "
            "layers with weights: 'encoder', 'head'",
        ),
        (
            Rule("rejuvenate_weights", utility="gradient"),
            OptionError,
            r"rule 'rejuvenate_weights': rejuvenation_utility is decided when the model is transformed: "
            r"found 'gradient' at the rule, where 'encoder.weight' has 'magnitude'; transform with "
            r"BioConfig\(rejuvenation_utility='gradient'\) or config.override",
        ),
        (
            Rule("rejuvenate_weights", selection="proportion", turnover=0.1),
            OptionError,
            "rejuvenation_selection is decided when the model is transformed",
        ),
        (Rule("rejuvenate_units", turnover="redo"), OptionError, "unit_turnover is decided when"),
        (Rule("shrink_and_perturb", initial_gain=2.0), OptionError, "initial_gain is decided when"),
        (Rule("l2_to_initial", strength=0.1), OptionError, "l2_to_initial_strength is decided when"),
        (Rule("crystallize", floor=0.2), OptionError, "crystal_min is decided when"),
        (
            Rule("rejuvenate_weights", selection="threshold"),
            OptionError,
            "rule 'rejuvenate_weights': rejuvenation_threshold: expected a fraction of the mean for",
        ),
        (
            Rule("rejuvenate_weights", redraw="initial", only="head"),
            PlasticityError,
            "rejuvenate_weights has nothing to act on .*how a Odd is initialised is not known",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, Rule) else "",
)
def test_what_the_model_does_not_allow_is_refused_when_it_is_attached(
    rule: Rule, error: type[Exception], message: str
) -> None:
    class Odd(nn.Linear):
        def reset_parameters(self) -> None:
            nn.init.zeros_(self.weight)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.act, self.head = nn.Linear(6, 8), nn.ReLU(), Odd(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.act(self.encoder(x)))  # type: ignore[no-any-return]

    bio, _ = biofx.transform(Net())
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.1)
    with pytest.raises(error, match=message):
        attach(bio, optimizer, [rule])
    attach(bio, optimizer, ["synaptic_scaling"])  # nothing is left of it


def test_a_tied_weight_is_left_alone_where_one_of_its_layers_is_excluded() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.two.weight = self.one.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.two(self.one(x).relu()))  # type: ignore[no-any-return]

    bio, _ = biofx.transform(Tied())
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.1)
    touched: list[set[str]] = []
    for rule in (Rule("synaptic_scaling", only="two"), Rule("synaptic_scaling", exclude="two")):
        seen: set[str] = set()

        def observe(step: int, layers: Any, seen: set[str] = seen) -> None:
            seen.update(path for path, layer in layers.items() if layer.touched)

        plasticity = attach(bio, optimizer, [rule], observers=[observe])
        train(bio, optimizer)
        plasticity.detach()
        touched.append(seen)
    assert touched == [{"one.weight"}, {"out.weight"}]


def test_sub_weights_and_modules_in_python_are_picked_by_their_layer() -> None:
    class Looped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            while float(x.detach().abs().max()) > 3:
                x = self.inner(x).tanh()
            return self.out(self.inner(x))  # type: ignore[no-any-return]

    sub: dict[str, Any] = {"weight_splitting_Gamma": 2, "weight_splitting_mode": "sub-weights"}
    cases: list[tuple[Any, dict[str, Any], str]] = [(mlp, sub, "0"), (Looped, {}, "inner")]
    for model, options, layers in cases:
        results = []
        for at_rule in (False, True):
            torch.manual_seed(0)
            config = BioConfig(**options)
            given = {} if at_rule else {"synaptic_scaling_rate": 0.9}
            bio, _ = biofx.transform(model(), config.override(layers, **given) if given else config)
            optimizer = torch.optim.SGD(bio.parameters(), lr=0.5)
            some = Rule("synaptic_scaling", only=layers, rate=0.9)
            rules: list[Any] = (
                [some, Rule("synaptic_scaling", exclude=layers)] if at_rule else ["synaptic_scaling"]
            )
            attach(bio, optimizer, rules)
            train(bio, optimizer, 4)
            results.append(bio)
        assert same(*results)


def is_first(candidate: Candidate) -> bool:
    return candidate.path == "0"


def entries(predicate: Any = is_first) -> list[Any]:
    return [
        Rule("rejuvenate_weights", every=2, only=predicate, turnover=0.5),
        Rule("rejuvenate_weights", every=3, exclude="0", redraw="zero"),
        Rule("crystallize", only=["0", "type:Tanh"], threshold=0.4),
    ]


def started(rules: list[Any]) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    bio, _ = biofx.transform(mlp(), BioConfig(**BASE))
    optimizer = torch.optim.AdamW(bio.parameters(), lr=0.05)
    return bio, optimizer, attach(bio, optimizer, rules)


def test_schedule_with_options_is_saved_and_goes_on_to_the_bit(tmp_path: Path) -> None:
    bio, optimizer, plasticity = started(entries())
    train(bio, optimizer, 5)
    biofx.save(bio, tmp_path / "run.pt", optimizer=optimizer, plasticity=plasticity)
    other, stepping, resumed = started(entries(lambda candidate: candidate.path == "0"))
    biofx.load(tmp_path / "run.pt", other, optimizer=stepping, plasticity=resumed)
    assert resumed.steps == 5
    for model, made in ((bio, optimizer), (other, stepping)):
        train(model, made, 5, seed=4)
    assert same(bio, other)


@pytest.mark.parametrize(
    ("position", "changed"),
    [
        (0, Rule("rejuvenate_weights", every=2, only="0", turnover=0.4)),
        (0, Rule("rejuvenate_weights", every=2, only="0")),
        (2, Rule("crystallize", threshold=0.4)),
        (2, Rule("crystallize", only="2", threshold=0.4)),
    ],
    ids=str,
)
def test_state_of_a_schedule_with_other_options_or_layers_is_refused(
    position: int, changed: Rule, tmp_path: Path
) -> None:
    bio, optimizer, plasticity = started(entries("0"))
    biofx.save(bio, tmp_path / "run.pt", optimizer=optimizer, plasticity=plasticity)
    rules = entries("0")
    rules[position] = changed
    other, stepping, resumed = started(rules)
    with pytest.raises(CheckpointError, match="expected a state of the same schedule") as caught:
        biofx.load(tmp_path / "run.pt", other, optimizer=stepping, plasticity=resumed)
    assert str(changed) in str(caught.value)
    assert "turnover=0.5" in str(caught.value)


def test_state_of_plain_entries_is_what_earlier_versions_read() -> None:
    _, _, plasticity = started(["crystallize", Rule("synaptic_scaling", every=3, after=1)])
    state = plasticity.state_dict()
    assert state["version"] == 1
    assert state["rules"] == [
        {"name": "crystallize", "every": 1, "after": 0, "until": None},
        {"name": "synaptic_scaling", "every": 3, "after": 1, "until": None},
    ]
    _, _, with_options = started(entries())
    assert with_options.state_dict()["version"] == 2
    assert with_options.state_dict()["rules"][0] == {
        "name": "rejuvenate_weights",
        "every": 2,
        "after": 0,
        "until": None,
        "only": {"nodes": with_options.state_dict()["rules"][0]["only"]["nodes"], "predicate": "is_first"},
        "paths": ["0.weight"],
        "options": {"rejuvenation_turnover": 0.5},
    }


@pytest.mark.parametrize("how", [copy.deepcopy, lambda run: pickle.loads(pickle.dumps(run))])
def test_copies_go_on_with_options_and_layers_even_of_a_lambda(how: Any) -> None:
    bio, optimizer, plasticity = started(entries(lambda candidate: candidate.path == "0"))
    train(bio, optimizer, 3)
    twin, other, copied = how((bio, optimizer, plasticity))
    for model, made in ((bio, optimizer), (twin, other)):
        train(model, made, 5, seed=4)
    assert same(bio, twin)
    copied.load_state_dict(plasticity.state_dict())
    assert str(copied.rules[0]) == str(plasticity.rules[0])


def test_a_step_that_fails_leaves_the_options_of_the_config() -> None:
    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            if getattr(self, "fails", False):
                raise RuntimeError("no step")
            return super().step(closure)

    bio, _ = biofx.transform(mlp())
    optimizer = Failing(bio.parameters(), lr=0.1)
    before = state_of(bio).config
    attach(bio, optimizer, [Rule("synaptic_scaling", rate=0.9)])
    train(bio, optimizer)
    optimizer.fails = True  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="no step"):
        train(bio, optimizer)
    assert state_of(bio).config is before


def test_monitor_and_check_know_what_entries_did() -> None:
    bio, _ = biofx.transform(mlp())
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.1)
    monitor = biofx.Monitor()
    rules = [Rule("rejuvenate_weights", only="2", turnover=0.5), Rule("crystallize", only="0", dampening=0.5)]
    attach(bio, optimizer, rules, observers=[monitor])
    train(bio, optimizer, 3)
    for record in monitor.records:
        assert set(record.layers["0.weight"].touched) == {"crystallize"}
        assert "rejuvenate_weights" in record.layers["2.weight"].touched
        assert "crystallize" not in record.layers["2.weight"].touched
    assert biofx.check(bio).ok
