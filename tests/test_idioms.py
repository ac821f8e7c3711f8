"""Small modules, each with something in it that goes wrong where a forward is traced without care."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import biofx

sys.path.insert(0, str(Path(__file__).parents[1] / "tools" / "zoo"))
comparison: Any = importlib.import_module("comparison")
IDIOMS: dict[str, Any] = dict(importlib.import_module("idioms").models())
sys.path.pop(0)

REFUSED = {"idiom ReplacedForward": "Make it a method"}
NEEDS_AN_EXAMPLE = {
    "idiom TypeAmongOthers": "expected a tensor",
    "idiom NeedsAMask": "argument 'mask': expected a value",
    "idiom HandsAMaskOn": "argument 'mask': expected a value",
    "idiom EntryThatIsNone": "entry 'mask': expected a value",
    "idiom EntryThatMayBeMissing": "what get() returns: expected a value",
    "idiom ResultThatIsNone": "what it returns: expected a value",
}
NEEDS_INPUTS = "idiom JugglesKeywords given some"

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("recorded", [False, True], ids=["traced", "recorded"])
@pytest.mark.parametrize("name", IDIOMS)
def test_an_idiom_is_equal_in_both_modes_on_fresh_inputs_of_other_sizes_or_refused(
    name: str, recorded: bool
) -> None:
    model, example = IDIOMS[name]()
    outcome = comparison.compare(name, model, example, recorded=recorded, sizes=(2, 3, 4))
    if name in REFUSED:
        assert outcome.verdict == "refused"
        assert REFUSED[name] in outcome.note
    elif name == NEEDS_INPUTS and not recorded:
        assert outcome.verdict == "fails"
        assert "unexpected keyword argument 'gain'" in outcome.note
    elif name in NEEDS_AN_EXAMPLE and not recorded:
        assert outcome.verdict == "guarded"
        assert NEEDS_AN_EXAMPLE[name] in outcome.note
    else:
        assert (outcome.verdict, outcome.note) == ("equal", "")


def test_a_comparison_tells_what_differs() -> None:
    model, example = IDIOMS["idiom FunctionalDropout"]()
    baked = torch.fx.symbolic_trace(model)
    for training, verdict in ((True, "equal"), (False, "DIFFERENT")):
        assert comparison._difference(model, baked, example(2), training)[0] == verdict


ONE_GRAPH = (
    *("FunctionalDropout", "FrozenNormalisation", "NoiseInForward", "BufferByItem", "SharedLayer"),
    *("TiedWeights", "WeightNorm", "ForwardHookOnModel", "PositionsByLength", "AssertsShapes"),
    *("JugglesKeywords", "ReturnsADict", "Closures", "WritesItems", "SizesInArithmetic", "Einsum"),
    *("FunctionByAlias", "FunctionInAnAttribute", "ComparesWithNone"),
)


@pytest.mark.parametrize("name", ONE_GRAPH)
def test_an_idiom_that_a_graph_has_room_for_is_one_graph(name: str) -> None:
    model, example = IDIOMS[f"idiom {name}"]()
    assert biofx.capture(model, example_inputs=example(2)).graph_breaks == {}


REWRITTEN_BELOW_PYTHON = {
    "LayersOfSeveralInputs": ("lstm.weight_ih_l0", "gru.weight_hh_l1", "attention.in_proj_weight"),
    "MixesExperts": ("experts.matrices", "experts.bias"),
}


@pytest.mark.parametrize("recorded", [False, True], ids=["traced", "recorded"])
@pytest.mark.parametrize("name", REWRITTEN_BELOW_PYTHON)
def test_weights_that_python_hands_on_or_reads_are_scaled(name: str, recorded: bool) -> None:
    model, example = IDIOMS[f"idiom {name}"]()
    options = {"example_inputs": example(2)} if recorded else {}
    bio_model, report = biofx.transform(model, {"fuzzy_learning_rate_factor_nu": 0.2}, **options)
    assert bio_model.graph_breaks
    coverage: Any = report.coverage
    assert coverage.visible == coverage.total
    (x,), _ = example(3)
    for one in (model.eval(), bio_model.eval()):
        output = one(x)
        (output[0] if isinstance(output, tuple) else output).sum().backward()
    for path in REWRITTEN_BELOW_PYTHON[name]:
        expected, found = model.get_parameter(path).grad, bio_model.get_parameter(path).grad
        ratio = (found / expected)[expected.abs() > 1e-6]
        assert ratio.min() > 0.79, path
        assert ratio.max() < 1.21, path
        assert ratio.std() > 0.05, path


def test_parameters_that_others_may_read_too_are_not_said_to_be_seen() -> None:
    model, _ = IDIOMS["idiom ReadsExperts"]()
    _, report = biofx.transform(model, {"fuzzy_learning_rate_factor_nu": 0.2})
    coverage: Any = report.coverage
    hidden = [entry.path for entry in coverage.left if not entry.is_visible]
    assert hidden == ["experts.matrices", "experts.bias"]
