from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import transformer

import biofx
from biofx import BioGraphModule, capture
from biofx.layers.lowering import Lowering
from biofx.layers.sites import find_sites


class Encodes(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


class Causal(Encodes):
    def forward(self, x: Tensor) -> Any:
        return self.inner(x, nn.Transformer.generate_square_subsequent_mask(5))


class Padded(Encodes):
    def forward(self, x: Tensor) -> Any:
        padding = torch.arange(5) >= torch.tensor([[5], [3], [4]])
        return self.inner(x, src_key_padding_mask=padding)


class Decodes(Encodes):
    def forward(self, x: Tensor) -> Any:
        mask = nn.Transformer.generate_square_subsequent_mask(5)
        return self.inner(x, x[:, :4] * 2, tgt_mask=mask)


def layer(**options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True, **options)


def decoder_layer(**options: Any) -> nn.Module:
    return nn.TransformerDecoderLayer(8, 2, 16, dropout=0.2, batch_first=True, **options)


def stack(inner: Any, norm: nn.Module | None = None, **options: Any) -> nn.Module:
    if isinstance(inner, nn.TransformerDecoderLayer):
        return nn.TransformerDecoder(inner, 2, norm)
    return nn.TransformerEncoder(inner, 2, norm, **options)


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "layer": (lambda: Encodes(layer()), 4),
    "layer, norm first": (lambda: Encodes(layer(norm_first=True, activation="gelu", bias=False)), 4),
    "layer, activation": (lambda: Encodes(layer(activation=nn.LeakyReLU())), 4),
    "layer, causal": (lambda: Causal(layer()), 4),
    "layer, padded": (lambda: Padded(layer()), 4),
    "encoder": (lambda: Encodes(stack(layer(), nn.LayerNorm(8))), 8),
    "encoder, causal": (lambda: Causal(stack(layer())), 8),
    "encoder, padded": (lambda: Padded(stack(layer(), enable_nested_tensor=False)), 8),
    "decoder layer": (lambda: Decodes(decoder_layer()), 6),
    "decoder": (lambda: Decodes(stack(decoder_layer(norm_first=True), nn.LayerNorm(8))), 12),
}
X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
ignores_nesting = pytest.mark.filterwarnings(
    "ignore:enable_nested_tensor is True", "ignore:The PyTorch API of"
)


def results(model: nn.Module) -> list[Any]:
    torch.manual_seed(0)
    given = X.clone().requires_grad_()
    model.zero_grad()
    output = model(given)
    output.square().sum().backward()
    return [output, given.grad, {name: parameter.grad for name, parameter in model.named_parameters()}]


def lowered(captured: BioGraphModule) -> BioGraphModule:
    for site in find_sites(captured).found:
        Lowering(captured).lower(site)
    captured.graph.lint()
    captured.recompile()
    return captured


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_its_layers_are_seen_and_compute_the_same(name: str, training: bool) -> None:
    make, weights = MODELS[name]
    model = make().train(training)
    captured = capture(model).train(training)
    sites = find_sites(captured)
    assert (len(sites.found), sites.unsupported) == (weights, [])
    torch.testing.assert_close(results(captured), results(model), rtol=0, atol=0)
    shown = lowered(captured)
    torch.testing.assert_close(results(shown), results(model), rtol=0, atol=0)
    if not training:
        with torch.no_grad():
            torch.testing.assert_close(shown(X), model(X))


@ignores_nesting
def test_an_encoder_that_nests_padded_sequences_stays_one_call() -> None:
    model = Padded(stack(layer())).eval()
    captured = capture(model).eval()
    (whole,) = captured.graph.find_nodes(op="call_module", target="inner")
    assert list(whole.meta["nn_module_stack"]) == ["inner"]
    with torch.no_grad():
        assert torch.equal(captured(X), model(X))


def with_hook() -> nn.Module:
    hooked = layer()
    hooked.register_forward_hook(lambda module, args, output: output * 2)
    return hooked


def patched() -> nn.Module:
    changed = layer()
    vars(changed)["forward"] = F.relu
    return changed


def decides(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    "make",
    [
        with_hook,
        patched,
        lambda: layer(activation=decides),
        lambda: nn.Sequential(nn.Transformer(8, 2, 1, 1, 16, batch_first=True)),
    ],
    ids=["hook", "patched", "activation", "Transformer"],
)
@ignores_nesting
def test_what_cannot_be_looked_into_stays_one_call(make: Callable[[], nn.Module]) -> None:
    inner = make()
    if isinstance(inner, nn.Sequential):

        class Translates(Encodes):
            def forward(self, x: Tensor) -> Any:
                return self.inner[0](x, x)  # type: ignore[index]

        model: nn.Module = Translates(inner)
    else:
        model = Encodes(inner)
    captured = capture(model)
    assert len(list(captured.graph.find_nodes(op="call_module"))) == 1
    torch.testing.assert_close(results(captured), results(model), rtol=0, atol=0)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("fast", [False, True])
def test_torch_is_left_as_it_was(fast: bool, fails: bool) -> None:
    class Fails(Encodes):
        def forward(self, x: Tensor) -> Any:
            return self.inner(x) if x.sum() > 0 else x

    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast)
    held = [F._canonical_mask, F._none_or_dtype, transformer._detect_is_causal_mask, transformer._get_seq_len]
    try:
        if fails:
            with pytest.raises(Exception, match="decides by a value"):
                capture(Fails(layer()), regions=False)
        else:
            capture(Encodes(layer()))
        assert torch.backends.mha.get_fastpath_enabled() is fast
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    now = [F._canonical_mask, F._none_or_dtype, transformer._detect_is_causal_mask, transformer._get_seq_len]
    assert now == held


def test_a_captured_layer_can_be_captured_again_compiled_and_exported() -> None:
    model = Causal(layer()).eval()
    captured = capture(model).eval()
    assert torch.equal(capture(captured).eval()(X), captured(X))
    traced = capture(nn.Sequential(torch.fx.symbolic_trace(captured))).eval()
    torch.testing.assert_close(traced(X), captured(X))
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(captured, backend="aot_eager", fullgraph=True)(X), captured(X))
    torch.testing.assert_close(torch.export.export(lowered(captured), (X,)).module()(X), captured(X))


class AroundAnEncoder(nn.Module):
    def __init__(self, decides: bool, **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **options)
        self.encoder, self.out, self.decides = nn.TransformerEncoder(layer, 2), nn.Linear(8, 2), decides

    def forward(self, x: Any) -> Any:
        found = self.encoder(x)
        return self.out(found * 2 if self.decides and found.sum() > 1e9 else found)


class AroundATransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.both, self.out = nn.Transformer(8, 2, 1, 1, 16, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: Any) -> Any:
        return self.out(self.both(x, x))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda: AroundAnEncoder(False),
        lambda: AroundAnEncoder(False, norm_first=True, activation="gelu"),
        lambda: AroundAnEncoder(True),
        AroundATransformer,
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
    ],
    ids=["encoder", "norm first", "in Python", "whole", "bare"],
)
def test_example_inputs_rewrite_no_less_than_none(make: Any, training: bool) -> None:
    model = make().train(training)
    config = biofx.BioConfig(apply_dales_principle=True, fuzzy_learning_rate_factor_nu=0.2)
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    plain: Any = biofx.transform(model, config).report.coverage
    found: Any = biofx.transform(model, config, example_inputs=x).report.coverage
    assert found.rewritten >= plain.rewritten
    assert found.rewritten > 0.9 * found.total - 300  # biases and gains are left
    unchanged = biofx.capture(model, example_inputs=x).eval()
    torch.testing.assert_close(unchanged(x), model.eval()(x))
