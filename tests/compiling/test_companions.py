"""The companion of a compiled model: rules, checkpoints, checks, and what it is not for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx
from biofx.errors import BiofxWarning, CheckpointError, InputError
from tests.compiling.compiled_models import ALL, RATES, Net, assert_same_state, transformed

CONFIG = ALL.replace(weight_density=0.5, fuzzy_lr_distribution="temporal", fuzzy_lr_dynamic=True)
RULES: list[biofx.Rule | str] = [
    biofx.Rule("rejuvenate_weights", every=2),
    "update_fuzzy_learning_rates",
    biofx.Rule("crystallize", every=3),
]


class Run:
    """A compiled model in training."""

    def __init__(self, model: nn.Module, *, then: str = "eager") -> None:
        torch._dynamo.reset()
        self.model = model
        self.call: Any = torch.compile(model, backend=biofx.backend(CONFIG, then=then, initialise=True))
        model.eval()
        with torch.no_grad():
            self.call(torch.zeros(2, 4))
        model.train()
        self.companion = biofx.companion(self.call)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        self.plasticity = biofx.attach(self.companion, self.optimizer, RULES)

    def steps(self, *seeds: int) -> None:
        for seed in seeds:
            step(self.call, self.optimizer, seed)


def step(call: Any, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(5 + seed % 3, 4)
    optimizer.zero_grad()
    call(x).square().sum().backward()
    optimizer.step()


def made() -> Net:
    torch.manual_seed(1)
    return Net()


def test_training_is_that_of_a_transformed_model_and_resumes_from_a_file(tmp_path: Path) -> None:
    expected = transformed(made(), CONFIG)
    optimizer = torch.optim.AdamW(expected.parameters(), lr=0.01)
    biofx.attach(expected, optimizer, RULES)
    run = Run(made())
    for seed in range(6):
        step(expected, optimizer, seed)
    run.steps(*range(6))
    assert_same_state(run.companion, expected)
    assert biofx.check(run.companion).ok

    path = tmp_path / "run.pt"
    biofx.save(run.companion, path, optimizer=run.optimizer, plasticity=run.plasticity)
    run.steps(6, 7, 8)
    resumed = Run(made())
    biofx.load(path, resumed.companion, optimizer=resumed.optimizer, plasticity=resumed.plasticity)
    resumed.steps(6, 7, 8)
    assert_same_state(resumed.companion, run.companion)
    assert_same_state(resumed.model, run.model)
    with pytest.raises(CheckpointError, match=r"of a model that was compiled, .*load into biofx.companion"):
        biofx.load(path, made())


def test_activity_and_turnover_of_units() -> None:
    config = biofx.BioConfig(
        fuzzy_lr_distribution=biofx.Distribution.ACTIVITY,
        fuzzy_lr_dynamic=True,
        unit_turnover="continual-backprop",
    )
    rules = ["rejuvenate_units", "update_fuzzy_learning_rates"]
    model, expected = made(), transformed(made(), config)
    found: Any = torch.compile(model, backend=biofx.backend(config, then="eager"))
    for call, module in ((found, model), (expected, expected)):
        module.eval()
        call(torch.zeros(2, 4))
        module.train()
    pairs = ((found, model, biofx.companion(found)), (expected, expected, expected))
    for call, module, state in pairs:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
        biofx.attach(state, optimizer, rules)
        for seed in range(4):
            step(call, optimizer, seed)
    assert float(biofx.companion(found).get_buffer("stem.bio_mod.activity").min()) > 0
    assert_same_state(biofx.companion(found), expected)


def test_a_companion_is_not_deployed_and_its_state_is_that_of_a_transformed_model() -> None:
    model = made().eval()
    found: Any = torch.compile(model, backend=biofx.backend(RATES, then="eager"))
    found(torch.zeros(2, 4))
    with pytest.raises(InputError, match="found the companion of a compiled one"):
        biofx.deploy(biofx.companion(found))
    bio_model, _ = biofx.transform(made(), RATES.replace(seed=8))
    bio_model.load_state_dict(biofx.companion(found).state_dict())
    assert_same_state(bio_model, biofx.companion(found))


def test_weights_that_only_one_mode_uses_join_and_are_said_where_it_is_late() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.aux = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Any:
            hidden = torch.relu(self.body(x))
            return (self.head(hidden), self.aux(hidden)) if self.training else self.head(hidden)

    model, x = Auxiliary().eval(), torch.randn(3, 4)
    expected = transformed(model, RATES)
    found: Any = torch.compile(model, backend=biofx.backend(RATES, then="eager"))
    found(x)
    with pytest.warns(BiofxWarning, match=r"no graph that was compiled reads 'aux.weight'"):
        before = biofx.companion(found)
    with pytest.warns(BiofxWarning, match=r"the companion did not have .'aux.bias', 'aux.weight'."):
        sum(output.sum() for output in found.train()(x)).backward()
    assert biofx.companion(found) is before
    assert_same_state(before, expected)
    attachment = biofx.attach(before, torch.optim.SGD(model.parameters(), lr=0.1))
    assert sorted(attachment.modes) == ["aux.weight", "body.weight", "head.weight"]


def test_without_a_call_there_is_none() -> None:
    with pytest.raises(InputError, match=r"found a Linear that was not, or .* call the compiled model once"):
        biofx.companion(nn.Linear(2, 2))
    with pytest.raises(InputError, match="expected a compiled model, found str"):
        biofx.companion("model")  # type: ignore[arg-type]


def test_an_optimizer_that_erases_rates_is_warned_of() -> None:
    model = made()
    found: Any = torch.compile(model, backend=biofx.backend(RATES, then="eager"))
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.warns(BiofxWarning, match=r"biofx.attach"):
        step(found, optimizer, 0)
