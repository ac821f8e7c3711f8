from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx
from biofx import capture
from biofx.errors import InputError
from biofx.operators.compound_ops import attend
from tests.layers.lowered import lowered


class Attends(nn.Module):
    """Calls an attention with all that it can be called with."""

    def __init__(self, layer: nn.Module, **options: Any) -> None:
        super().__init__()
        self.layer = layer
        self.options = options

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Any:
        return self.layer(query, key, value, **self.options)


class Itself(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(x, x, x, need_weights=False)[0]


class Masked(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, mask: Tensor, padding: Tensor) -> Any:
        return self.layer(x, x, x, attn_mask=mask, key_padding_mask=padding)


def results(model: nn.Module, *given: Tensor, fixed: tuple[Any, ...] = ()) -> list[Any]:
    torch.manual_seed(0)
    inputs = [entry.detach().clone().requires_grad_() for entry in given]
    model.zero_grad()
    output = model(*inputs, *fixed)
    outputs = [entry for entry in (output if isinstance(output, tuple) else (output,)) if entry is not None]
    torch.stack([entry.square().sum() for entry in outputs]).sum().backward()
    return [
        outputs,
        [entry.grad for entry in inputs],
        {name: parameter.grad for name, parameter in model.named_parameters()},
    ]


LAYERS: dict[str, Callable[[], nn.MultiheadAttention]] = {
    "plain": lambda: nn.MultiheadAttention(6, 2),
    "one head, no bias": lambda: nn.MultiheadAttention(6, 1, bias=False),
    "batch first, dropout": lambda: nn.MultiheadAttention(6, 2, dropout=0.3, batch_first=True),
    "added key and value": lambda: nn.MultiheadAttention(6, 3, add_bias_kv=True, add_zero_attn=True),
    "other sizes": lambda: nn.MultiheadAttention(6, 2, kdim=4, vdim=5, add_bias_kv=True, dropout=0.3),
    "other sizes, no bias": lambda: nn.MultiheadAttention(6, 2, kdim=4, bias=False, batch_first=True),
}
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no weights": {"need_weights": False},
    "weights of each head": {"average_attn_weights": False},
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", CALLS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_lowered_attention_equals_it_to_the_bit(name: str, options: str, training: bool) -> None:
    layer = LAYERS[name]()
    model = Attends(layer, **CALLS[options]).train(training)
    found = lowered(model).train(training)
    assert not found.graph.find_nodes(op="call_module")
    assert list(found.state_dict()) == list(model.state_dict())
    for batch in ((3,), ()):
        lengths = [(4, *batch), (5, *batch), (5, *batch)]
        shapes = [shape[::-1] if layer.batch_first else shape for shape in lengths]
        sizes = (6, layer.kdim, layer.vdim)
        given = [torch.randn(*shape, size) for shape, size in zip(shapes, sizes, strict=True)]
        torch.testing.assert_close(results(found, *given), results(model, *given), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["bool", "float", "per head"])
@pytest.mark.parametrize("training", [True, False])
def test_masks(kind: str, training: bool) -> None:
    model = Masked(nn.MultiheadAttention(6, 2, batch_first=True, dropout=0.2)).train(training)
    mask = torch.ones(4, 4, dtype=torch.bool).triu(1)
    padding = torch.tensor([[False] * 4, [False] * 3 + [True]])
    if kind == "float":
        mask, padding = (torch.zeros(m.shape).masked_fill(m, float("-inf")) for m in (mask, padding))
    elif kind == "per head":
        mask = mask.expand(4, 4, 4)
    found = lowered(model).train(training)
    x = torch.randn(2, 4, 6)
    expected = results(model, x, fixed=(mask, padding))
    torch.testing.assert_close(results(found, x, fixed=(mask, padding)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_a_causal_mask(training: bool) -> None:
    mask = nn.Transformer.generate_square_subsequent_mask(4)

    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.MultiheadAttention(6, 2, dropout=0.2)

        def forward(self, x: Tensor, mask: Tensor) -> Any:
            return self.layer(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]

    model = Causal().train(training)
    found = lowered(model).train(training)
    x = torch.randn(4, 2, 6)
    expected = results(model, x, fixed=(mask,))
    torch.testing.assert_close(results(found, x, fixed=(mask,)), expected, rtol=0, atol=0)


def test_it_agrees_with_the_fused_inference_path() -> None:
    model = Itself(nn.MultiheadAttention(6, 2, batch_first=True)).eval()
    found = lowered(model).eval()
    x = torch.randn(2, 4, 6)
    with torch.no_grad():
        torch.testing.assert_close(found(x), model(x))


def test_nested_tensors_are_refused() -> None:
    found = lowered(Itself(nn.MultiheadAttention(6, 2, batch_first=True))).eval()
    nested = torch.nested.nested_tensor([torch.randn(3, 6), torch.randn(2, 6)], layout=torch.jagged)
    with pytest.raises(InputError, match="found a nested one"):
        found(nested)


def model_of_two() -> nn.Module:
    layer = nn.MultiheadAttention(6, 2, batch_first=True)
    other = nn.MultiheadAttention(6, 2, batch_first=True)
    return nn.Sequential(Itself(layer), Itself(other), Itself(layer))


@pytest.mark.parametrize(
    "again",
    [
        copy.deepcopy,
        lambda bio: pickle.loads(pickle.dumps(bio)),
        torch.fx.symbolic_trace,
        capture,
        lambda bio: torch.compile(bio, backend="aot_eager", fullgraph=True),
    ],
    ids=["deepcopy", "pickle", "fx", "capture", "compile"],
)
def test_a_lowered_attention_survives(again: Callable[[Any], Any]) -> None:
    torch._dynamo.reset()
    bio_model, _ = biofx.transform(model_of_two(), passes="scale-gradients")
    x = torch.randn(2, 4, 6)
    expected = results(bio_model, x)
    found = again(bio_model)
    if hasattr(found, "graph"):
        assert len(found.graph.find_nodes(op="call_function", target=attend)) == 3
    output, inputs, parameters = results(found, x)
    torch.testing.assert_close([output, inputs], expected[:2])
    torch.testing.assert_close(list(parameters.values()), list(expected[2].values()))


def test_a_lowered_attention_can_be_exported() -> None:
    bio_model, _ = biofx.transform(model_of_two(), passes="scale-gradients")
    x = torch.randn(2, 4, 6)
    torch.testing.assert_close(torch.export.export(bio_model, (x,)).module()(x), bio_model(x))


def test_every_weight_has_learning_rates_of_its_own() -> None:
    model = model_of_two()
    bio_model, report = biofx.transform(model, passes="scale-gradients{nu=0.3}")
    x = torch.randn(2, 4, 6)
    for each in (model, bio_model):
        each(x).square().sum().backward()
    for place in ("0", "1"):
        for path, state in (
            (f"{place}.layer.in_proj_weight", f"{place}.layer.bio_mod.in_proj_weight"),
            (f"{place}.layer.out_proj.weight", f"{place}.layer.out_proj.bio_mod"),
        ):
            factors = bio_model.get_buffer(f"{state}.fuzzy_learning_rate_parameters")
            plain: Any = model.get_parameter(path).grad
            assert factors.std() > 0.05
            torch.testing.assert_close(bio_model.get_parameter(path).grad, plain * factors)
    first = [remark for remark in report.passes[0].remarks if remark.node == "_0_layer"]
    assert [remark.layer for remark in first] == ["0.layer", "0.layer.out_proj"]
    assert [remark.message.partition(":")[0] for remark in first] == ["in_proj_weight", "out_proj.weight"]
    assert "one set for 2 uses" in first[0].message
