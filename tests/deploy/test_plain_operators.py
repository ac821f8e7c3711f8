from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx
from biofx.deploy.plain_operators import write_out
from biofx.layers.attention import detects_causal_mask

CAUSAL = nn.Transformer.generate_square_subsequent_mask(5)


class Encoder(nn.Module):
    """A masked encoder of two layers, for ``(batch, 5, 8)``."""

    mask: Tensor

    def __init__(self, mask: Tensor, **said: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.register_buffer("mask", mask)
        self.out = nn.Linear(8, 3)
        self.said = said

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.encoder(x, mask=self.mask, **self.said))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (CAUSAL, {}),
        (CAUSAL, {"is_causal": True}),
        (CAUSAL.isinf(), {}),
        (torch.ones(5, 5).tril(-2).bool(), {"is_causal": False}),
        (torch.randn(5, 5), {}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.filterwarnings("ignore:The TorchScript type system:UserWarning")
def test_masked_encoders_deploy_whatever_the_mask(mask: Tensor, said: dict[str, Any]) -> None:
    config = biofx.BioConfig(apply_dales_principle=True, weight_splitting_Gamma=2)
    bio_model = biofx.transform(Encoder(mask, **said), config).graph_module.eval()
    assert any(node.target is detects_causal_mask for node in bio_model.graph.nodes)
    deployed = biofx.deploy(bio_model)
    x = torch.randn(3, 5, 8)
    expected = bio_model(x)
    torch.testing.assert_close(deployed(x), expected)
    with torch.no_grad():
        bio_model.get_buffer("mask").zero_()
    if not said.get("is_causal"):  # the mask matters
        assert not torch.allclose(bio_model(x), expected)
    file = io.BytesIO()
    torch.save(deployed, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(x), expected)
    torch.testing.assert_close(torch.jit.script(deployed)(x), expected)
    program = torch.export.export(deployed, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    more = torch.randn(7, 5, 8)
    torch.testing.assert_close(program.module()(more), deployed(more))
    assert "biofx" not in str(program)


class Sliced(nn.Module):
    """Reads parts of a buffer that the size of an input decides; ``(batch, steps)``."""

    table: Tensor
    parts: tuple[Callable[[Any, int], Any], ...] = (
        *(lambda t, n: t[:n], lambda t, n: t[:, -n:], lambda t, n: t[..., n], lambda t, n: t[..., :n, None]),
        *(lambda t, n: t[None, 1, :n:2], lambda t, n: t[n - 9 :, 1:], lambda t, n: t[..., :n, 1:-1]),
        *(lambda t, n: (t == 0)[: n + 7, ::n], lambda t, n: t[[0, 2], :n], lambda t, n: t.shape[:n]),
    )

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("table", torch.arange(24.0).view(4, 6))
        self.places = nn.Embedding(6, 4)

    def forward(self, x: Tensor) -> Any:
        steps = x.shape[1]
        return [self.fc(x) + self.places.weight[:steps], *(part(self.table, steps) for part in self.parts)]


def test_parts_of_a_buffer_follow_sizes_after_loading() -> None:
    bio_model = biofx.transform(Sliced(), {"apply_dales_principle": True}).graph_module
    deployed = biofx.deploy(bio_model)
    file = io.BytesIO()
    torch.save(deployed, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    program = torch.export.export(
        deployed, (torch.randn(3, 2, 4),), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)
    )
    for steps in (2, 3, 5):
        x = torch.randn(3, steps, 4)
        expected = bio_model.eval()(x)
        torch.testing.assert_close(deployed(x), expected)
        torch.testing.assert_close(loaded(x), expected)
    x = torch.randn(7, 2, 4)
    torch.testing.assert_close(program.module()(x), deployed(x))


def test_what_is_known_only_when_it_runs_is_refused() -> None:
    traced = torch.fx.GraphModule(nn.Module(), torch.fx.Graph())
    mask, said = traced.graph.placeholder("mask"), traced.graph.placeholder("said")
    traced.graph.output(traced.graph.call_function(detects_causal_mask, (mask, said, 5)))
    with pytest.raises(
        biofx.errors.PassError, match="whether the mask is causal is known only when the model runs"
    ):
        write_out(traced)
