from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx
from biofx.deploy.plain_masks import write_out_masks
from biofx.layers.transformer_layers import detects_causal_mask

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
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
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


def test_what_is_known_only_when_it_runs_is_refused() -> None:
    traced = torch.fx.GraphModule(nn.Module(), torch.fx.Graph())
    mask, said = traced.graph.placeholder("mask"), traced.graph.placeholder("said")
    traced.graph.output(traced.graph.call_function(detects_causal_mask, (mask, said, 5)))
    with pytest.raises(biofx.PassError, match="whether the mask is causal is known only when the model runs"):
        write_out_masks(traced)
