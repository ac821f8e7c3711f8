"""Small transformers as they come, with example inputs: one sign for each unit of the residual stream."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 31,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IDS: dict[str, Any] = {"input_ids": torch.tensor([[3, 4, 5, 6, 7], [9, 8, 7, 6, 5]])}
CONFIG = biofx.BioConfig(apply_dales_principle=True, dales_initialisation="keep")


def built(name: str, **options: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**{**SIZES, **options})
        model: nn.Module = getattr(transformers, f"{name}Model")(config)
    return model


def effective_weights(model: nn.Module, names: list[str], inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Return the weights that functions of torch are called with in a run, by the names of parameters."""
    found: dict[str, Tensor] = {}
    parameters = dict(model.named_parameters())

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            for given in args:
                for name in names:
                    raw = parameters[name]
                    if (
                        isinstance(given, Tensor)
                        and given is not raw
                        and given.shape == raw.shape
                        and bool(((given == raw) | (given == 0)).all())
                    ):
                        found[name] = given.detach()
            return func(*args, **(kwargs or {}))

    with Watch(), torch.no_grad():
        model(**inputs)
    return found


def signs_of_columns(weight: Tensor) -> Tensor:
    """Return the sign of each column of ``(out, in)``; 2 where it has weights of both signs."""
    positive, negative = (weight > 0).any(0), (weight < 0).any(0)
    return torch.where(positive & negative, 2, positive.int() - negative.int())


READERS: dict[str, tuple[dict[str, Any], list[str], bool]] = {
    "Llama": (
        {},
        [
            *(f"layers.{layer}.self_attn.v_proj.weight" for layer in (0, 1)),
            *(f"layers.{layer}.mlp.{name}.weight" for layer in (0, 1) for name in ("gate_proj", "up_proj")),
        ],
        False,
    ),
    "Gemma": ({"head_dim": 4}, [f"layers.{layer}.mlp.up_proj.weight" for layer in (0, 1)], False),
    "GPT2": (
        {"n_embd": 16, "n_layer": 2, "n_head": 4},
        [f"h.{layer}.mlp.c_fc.weight" for layer in (0, 1)],
        True,
    ),
}


@pytest.mark.parametrize("name", READERS)
def test_all_that_read_the_residual_stream_agree_on_the_signs_of_its_units(name: str) -> None:
    options, readers, transposed = READERS[name]
    bio, report = biofx.transform(built(name, **options), CONFIG, example_inputs=((), IDS))
    done = {remark.layer for remark in report.remarks if remark.kind == "applied"}
    assert {reader.removesuffix(".weight") for reader in readers} <= done
    found = effective_weights(bio, readers, IDS)
    assert list(found) != []
    assert set(found) == set(readers)
    signs = [signs_of_columns(weight.T if transposed else weight) for weight in found.values()]
    assert all(torch.equal(entry, signs[0]) for entry in signs)
    assert set(signs[0].tolist()) == {-1, 1}


def test_a_transposed_weight_keeps_queries_and_keys_free() -> None:
    bio, _ = biofx.transform(built("GPT2", n_embd=16, n_layer=2, n_head=4), CONFIG, example_inputs=((), IDS))
    name = "h.0.attn.c_attn.weight"
    weight, raw = effective_weights(bio, [name], IDS)[name], dict(bio.named_parameters())[name]
    assert torch.equal(weight[:, :32], raw[:, :32])  # (in, out): queries, keys and values side by side
    assert not torch.equal(weight[:, 32:], raw[:, 32:])
    assert 2 not in signs_of_columns(weight[:, 32:].T)


def test_signs_that_regions_share_survive_copies_and_deployment() -> None:
    model = built("Llama")
    bio, _ = biofx.transform(model, CONFIG, example_inputs=((), IDS))
    expected = bio.eval()(**IDS).last_hidden_state
    twin = copy.deepcopy(bio)
    with torch.no_grad():
        bio.get_parameter("layers.0.input_layernorm.weight").fill_(0)
    assert torch.equal(twin(**IDS).last_hidden_state, expected)
    name = "layers.0.mlp.up_proj.weight"
    before = signs_of_columns(effective_weights(twin, [name], IDS)[name])
    with torch.no_grad():
        twin.get_parameter(name).neg_()
    after = signs_of_columns(effective_weights(twin, [name], IDS)[name])
    assert not bool((before * after < 0).any())  # weights of the other sign are held at 0
    deployed = biofx.deploy(twin)
    torch.testing.assert_close(deployed(**IDS).last_hidden_state, twin(**IDS).last_hidden_state)


def test_a_layer_with_its_own_gain_is_held_from_below_0() -> None:
    bio, report = biofx.transform(built("Llama"), CONFIG, example_inputs=((), IDS))
    held = [remark.layer for remark in report.remarks if remark.message.startswith("gains kept from below 0")]
    assert {"layers.0.input_layernorm", "layers.1.post_attention_layernorm"} <= set(held)
    plain = bio(**IDS).last_hidden_state
    with torch.no_grad():
        bio.get_parameter("layers.0.input_layernorm.weight").fill_(-1)
        below = bio(**IDS).last_hidden_state
        bio.get_parameter("layers.0.input_layernorm.weight").fill_(0)
        at_0 = bio(**IDS).last_hidden_state
    assert torch.equal(below, at_0)
    assert not torch.equal(below, plain)
