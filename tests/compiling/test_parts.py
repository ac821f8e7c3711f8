"""A model that the compiler cuts in parts: what each part can know, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx
from biofx.errors import BiofxWarning, CaptureError
from tests.compiling.compiled_models import (
    RATES,
    SIGNS,
    Broken,
    Nest,
    assert_learns_as,
    assert_same_state,
    learn,
    transformed,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute"
)  # which dynamo asks of what crosses a break


def compiled(model: nn.Module, config: Any, *, then: str = "eager", **options: Any) -> Any:
    return torch.compile(model, backend=biofx.backend(config, then=then, **options))


@pytest.mark.parametrize(
    "config", [RATES, RATES.replace(weight_density=0.5, weight_mask_initialisation="keep")]
)
def test_what_each_weight_has_to_itself_is_that_of_the_whole(config: biofx.BioConfig) -> None:
    model = Nest()
    expected = transformed(model, config)
    found = compiled(model, config)
    for batch in (5, 6):
        assert_learns_as(found, model, expected, torch.randn(batch, 4))
    companion = biofx.companion(found)
    assert companion.state_dict().keys() == expected.state_dict().keys()
    rates = [name for name in companion.state_dict() if name.endswith(("parameters", "mask"))]
    assert len(rates) >= 9
    assert all(torch.equal(companion.state_dict()[name], expected.state_dict()[name]) for name in rates)


def test_code_of_one_module_runs_for_another_at_all_sizes() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Broken(), Broken()

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.second(self.first(x))
            return found

    both = Both()
    expected = transformed(both, RATES)
    found = compiled(both, RATES, then="aot_eager")
    for batch in (5, 6, 7):
        assert_learns_as(found, both, expected, torch.randn(batch, 4), rtol=1e-5, atol=1e-6)
    assert_same_state(biofx.companion(found), expected)


def test_rules_act_on_all_parts() -> None:
    model = Broken()
    expected = transformed(model, RATES)
    found = compiled(model, RATES)
    found(torch.randn(5, 4))
    rules = [biofx.Rule("rejuvenate_weights", every=2), biofx.Rule("crystallize", every=3)]
    pairs = [(found, model, biofx.companion(found)), (expected, expected, expected)]
    for call, trained, state in pairs:
        optimizer = torch.optim.AdamW(trained.parameters(), lr=0.01)
        attachment = biofx.attach(state, optimizer, rules)
        assert len(attachment.modes) == 4
        for seed in range(6):
            optimizer.zero_grad()
            call(torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
            optimizer.step()
    assert_same_state(biofx.companion(found), expected)
    assert biofx.check(biofx.companion(found)).ok


@pytest.mark.parametrize(
    ("model", "config", "words"),
    [
        (
            Broken,
            SIGNS,
            r"constrain-signs must know what follows 'b', .* has cut Broken in parts: a graph break at "
            r"compiled_models.py:\d+ in forward: .*Leave these layers out, exclude=\['b'\]",
        ),
        (Nest, biofx.BioConfig(weight_splitting_Gamma=2), "split-weights must know what follows 'before'"),
        (Broken, RATES.replace(fuzzy_lr_distribution="layer_adaptive"), "the place of each layer"),
        (Broken, RATES.replace(weight_mask_self_connections=False), "to leave out self-connections"),
        (Broken, RATES.replace(unit_turnover="redo"), "watch-units must see the whole model"),
    ],
)
def test_what_needs_the_whole_is_refused(model: type[nn.Module], config: biofx.BioConfig, words: str) -> None:
    found = compiled(model(), config)
    with pytest.raises(CaptureError, match=words):
        found(torch.randn(5, 4))


def test_the_part_after_a_break_says_so_and_layers_may_be_left_out() -> None:
    model = Broken()
    with pytest.raises(
        CaptureError, match=r"must know what feeds 'c', .* it goes on in forward after a graph"
    ):
        compiled(model, SIGNS, exclude="b")(torch.randn(5, 4))
    torch._dynamo.reset()
    config = SIGNS.override(["b", "c"], apply_dales_principle=False)
    config = config.replace(dales_constrain_readout=True)
    model = Broken()
    expected = transformed(model, config)
    found = compiled(model, config)
    assert_learns_as(found, model, expected, torch.randn(5, 4))
    signs = biofx.companion(found).get_buffer("c.bio_mod.sign")
    assert torch.equal(signs, expected.get_buffer("c.bio_mod.sign"))


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.b(torch.relu(self.a(x)))
        return found


class InPython(nn.Module):
    """Its own forward is not compiled, that of its module is."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.after = Inner(), nn.Linear(4, 2)

    @torch._dynamo.disable(recursive=False)  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = nn.functional.linear(self.inner(x), self.after.weight)
        return found


def test_a_forward_that_stays_in_python_is_said() -> None:
    model = InPython()
    expected = transformed(model, RATES)
    found, x = compiled(model, RATES), torch.randn(5, 4)
    _, gradients = learn(found, model, x)
    _, wanted = learn(expected, expected, x)
    assert torch.equal(gradients["inner.a.weight"], wanted["inner.a.weight"])
    with pytest.warns(
        BiofxWarning, match=r"no graph that was compiled reads 'after.weight': Python uses them"
    ):
        companion = biofx.companion(found)
    name = "inner.b.bio_mod.fuzzy_learning_rate_parameters"
    assert torch.equal(companion.get_buffer(name), expected.get_buffer(name))
    torch._dynamo.reset()
    with pytest.raises(CaptureError, match=r"has cut InPython in parts: .*forward .* runs in Python"):
        compiled(model, SIGNS)(x)


def test_the_last_compilation_before_dynamo_gives_up_is_said() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.number = nn.Linear(2, 2), 0

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.fc(x) * (1.0 if self.number == 0 else 2.0 if self.number == 1 else 3.0)
            return found

    model = Sized()
    found = compiled(model, RATES)
    with torch._dynamo.config.patch(recompile_limit=2):
        found(torch.ones(3, 2))
        model.number = 1
        with pytest.warns(BiofxWarning, match="forward has been compiled 2 times, and dynamo stops there"):
            found(torch.ones(3, 2))
