"""Small models of the ``transformers`` package with random weights; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

Example = Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]
"""From a batch size to arguments of that size."""

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_TEXT = (
    *(
        "Albert",
        "Bert",
        "BigBird",
        "Bloom",
        "CTRL",
        "Camembert",
        "CodeGen",
        "ConvBert",
        "DebertaV2",
        "Deberta",
    ),
    *("DistilBert", "Electra", "Ernie", "FNet", "Falcon", "GPT2", "GPTBigCode", "GPTJ", "GPTNeo", "GPTNeoX"),
    *(
        "Gemma",
        "Gemma2",
        "Llama",
        "Longformer",
        "MPNet",
        "Mamba",
        "Mamba2",
        "Mistral",
        "Mixtral",
        "MobileBert",
    ),
    *("ModernBert", "Mpt", "Nystromformer", "OPT", "Olmo", "Olmo2", "Persimmon", "Phi", "Phi3", "Qwen2"),
    *("Qwen2Moe", "Qwen3", "RemBert", "Roberta", "RoFormer", "SqueezeBert", "StableLm", "Starcoder2", "XGLM"),
    *(
        "XLM",
        "XLNet",
        "Yoso",
        "Cohere",
        "Granite",
        "Jamba",
        "Rwkv",
        "FalconMamba",
        "Splinter",
        "Qwen3Moe",
        "GptOss",
        "GraniteMoe",
        "DeepseekV3",
    ),
)
_TEXT_TO_TEXT = (
    "Bart",
    "T5",
    "MBart",
    "Pegasus",
    "Marian",
    "Blenderbot",
    "LED",
    "MT5",
    "ProphetNet",
    "M2M100",
)
_IMAGE = (
    *("ViT", "DeiT", "Beit", "ConvNext", "ConvNextV2", "Swin", "Swinv2", "ResNet", "RegNet", "MobileNetV1"),
    *("MobileNetV2", "MobileViT", "MobileViTV2", "Segformer", "PoolFormer", "Levit", "Pvt", "PvtV2"),
    *("EfficientNet", "Dinov2", "Bit", "FocalNet", "Hiera", "ViTMAE", "ViTMSN", "SwiftFormer"),
    *("Data2VecVision", "IJepa"),
)


def models() -> Iterator[tuple[str, Callable[[], tuple[nn.Module, Example]]]]:
    """Yield names and builders of models with an example for each."""
    for name in _TEXT:
        yield f"transformers {name}", lambda name=name: (_built(name, _text_options(name)), _text)  # type: ignore[misc]
    for name in _TEXT_TO_TEXT:
        yield f"transformers {name}", lambda name=name: (_built(name, _both_options(name)), _text_to_text)  # type: ignore[misc]
    for name in _IMAGE:
        yield f"transformers {name}", lambda name=name: _image_model(name)  # type: ignore[misc]
    yield "transformers CLIP", _clip
    yield "transformers Whisper", _whisper
    yield "transformers Wav2Vec2", _wav2vec2
    yield "transformers Llama for sequences", _llama_head
    yield "transformers Bert for tokens", _bert_head


def _package() -> Any:
    """Import the package, which imports torchvision where that is installed."""
    import torchvision_operators

    torchvision_operators.declare()
    import transformers

    return transformers


def _built(name: str, options: dict[str, Any]) -> nn.Module:
    transformers = _package()
    config_class = getattr(transformers, f"{name}Config")
    model_class = getattr(transformers, f"{name}Model")
    config = config_class(**options)
    torch.manual_seed(0)
    model: nn.Module = model_class(config)
    return model


def _text_options(name: str) -> dict[str, Any]:
    special: dict[str, dict[str, Any]] = {
        "Albert": {"embedding_size": 16},
        "Bloom": {"n_layer": 2, "n_head": 4},
        "CTRL": {"n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 48, "n_positions": 64},
        "CodeGen": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64, "n_ctx": 64},
        "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
        "GPTBigCode": {"n_embd": 32, "n_layer": 2, "n_head": 4},
        "GPTJ": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
        "GPTNeo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
        "DistilBert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
        "Longformer": {"attention_window": 4},
        "BigBird": {"attention_type": "original_full"},
        "MobileBert": {"embedding_size": 16, "intra_bottleneck_size": 32, "true_hidden_size": 32},
        "Mamba": {"state_size": 4},
        "Mamba2": {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 4},
        "FalconMamba": {"state_size": 4},
        "Mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
        "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
        "Phi3": {"original_max_position_embeddings": 64},
        "Gemma": {"head_dim": 8},
        "Gemma2": {"head_dim": 8},
        "Qwen2Moe": {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4},
        "Mixtral": {"num_local_experts": 4},
        "Qwen3Moe": {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
        "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 4},
        "GraniteMoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
        "DeepseekV3": {
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
        },
        "XGLM": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48},
        "XLM": {"emb_dim": 32, "n_layers": 2, "n_heads": 4},
        "XLNet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
        "SqueezeBert": {"embedding_size": 32},
        "Electra": {"embedding_size": 16},
        "Rwkv": {"attention_hidden_size": 32, "context_length": 64},
        "Jamba": {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
            "num_experts": 2,
        },
        "FNet": {"use_tpu_fourier_optimizations": False},
        "ModernBert": {"cls_token_id": 1, "sep_token_id": 2},
        "Yoso": {"use_expectation": True},
    }
    options = {**_SIZES, **special.get(name, {})}
    if name == "XLNet":  # of any length
        del options["max_position_embeddings"]
    return options


def _text(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    generator = torch.Generator().manual_seed(batch)
    length = 11 if batch == 4 else 8
    return (), {"input_ids": torch.randint(3, 99, (batch, length), generator=generator)}


def _both_options(name: str) -> dict[str, Any]:
    if name in ("T5", "MT5"):
        own = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    elif name == "ProphetNet":
        own = {
            "num_encoder_layers": 2,
            "num_decoder_layers": 2,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "num_encoder_attention_heads": 4,
            "num_decoder_attention_heads": 4,
        }
    else:
        own = {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
        }
    shared = {"vocab_size": 99, "hidden_size": 32, "pad_token_id": 0, "decoder_start_token_id": 1}
    if name == "LED":
        own |= {
            "attention_window": 4,
            "max_encoder_position_embeddings": 64,
            "max_decoder_position_embeddings": 64,
        }
    if name in ("T5", "MT5", "Bart", "MBart", "Pegasus", "Marian", "Blenderbot", "LED", "M2M100"):
        shared.pop("hidden_size")
    return {**shared, **own}


def _text_to_text(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    ids = _text(batch)[1]["input_ids"]
    return (), {"input_ids": ids, "decoder_input_ids": ids[:, :5]}


def _images(size: int) -> Example:
    def example(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        generator = torch.Generator().manual_seed(batch)
        return (torch.randn(batch, 3, size, size, generator=generator),), {}

    return example


def _image_model(name: str) -> tuple[nn.Module, Example]:
    vit = {**_SIZES, "image_size": 16, "patch_size": 4}
    swin = {
        "image_size": 16,
        "patch_size": 2,
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "window_size": 2,
    }
    special: dict[str, tuple[dict[str, Any], int]] = {
        "Bit": ({"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_groups": 4}, 32),
        "ConvNext": ({"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}, 32),
        "ConvNextV2": ({"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}, 32),
        "Swin": (swin, 16),
        "Swinv2": (swin, 16),
        "ResNet": ({"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}, 32),
        "RegNet": ({"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 8}, 32),
        "MobileNetV1": ({"depth_multiplier": 0.25}, 32),
        "MobileNetV2": ({"depth_multiplier": 0.25}, 32),
        "MobileViT": (
            {"image_size": 32, "hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16]},
            32,
        ),
        "MobileViTV2": ({"image_size": 64, "width_multiplier": 0.25}, 64),
        "Segformer": (
            {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]},
            32,
        ),
        "PoolFormer": ({"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}, 64),
        "Levit": (
            {
                "image_size": 64,
                "hidden_sizes": [16, 16, 16],
                "num_attention_heads": [2, 2, 2],
                "depths": [1, 1, 1],
                "key_dim": [4, 4, 4],
            },
            64,
        ),
        "Pvt": (
            {
                "image_size": 32,
                "hidden_sizes": [8, 8, 8, 8],
                "depths": [1, 1, 1, 1],
                "num_attention_heads": [1, 1, 2, 2],
            },
            32,
        ),
        "PvtV2": (
            {
                "image_size": 32,
                "hidden_sizes": [8, 8, 8, 8],
                "depths": [1, 1, 1, 1],
                "num_attention_heads": [1, 1, 2, 2],
            },
            32,
        ),
        "EfficientNet": ({"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320}, 32),
        "FocalNet": (
            {
                "image_size": 32,
                "embed_dim": 8,
                "depths": [1, 1],
                "focal_levels": [1, 1],
                "focal_windows": [3, 3],
                "hidden_sizes": [8, 16],
            },
            32,
        ),
        "SwiftFormer": ({"image_size": 64, "embed_dims": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}, 64),
        "Hiera": (
            {
                "image_size": [32, 32],
                "embed_dim": 8,
                "depths": [1, 1],
                "num_heads": [1, 2],
                "num_query_pool": 1,
                "masked_unit_size": [4, 4],
                "patch_size": [4, 4],
                "patch_stride": [4, 4],
                "patch_padding": [0, 0],
            },
            32,
        ),
    }
    options, size = special.get(name, (vit, 16))
    return _built(name, options), _images(size)


def _clip() -> tuple[nn.Module, Example]:
    transformers = _package()
    tower = {**_SIZES, "projection_dim": 16}
    config = transformers.CLIPConfig(
        text_config=tower, vision_config={**tower, "image_size": 16, "patch_size": 4}, projection_dim=16
    )
    torch.manual_seed(0)

    def example(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (), {**_text(batch)[1], "pixel_values": _images(16)(batch)[0][0]}

    return transformers.CLIPModel(config), example


def _whisper() -> tuple[nn.Module, Example]:
    transformers = _package()
    config = transformers.WhisperConfig(
        **_both_options("Bart"), num_mel_bins=8, max_source_positions=20, max_target_positions=20
    )
    torch.manual_seed(0)

    def example(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        generator = torch.Generator().manual_seed(batch)
        features = torch.randn(batch, 8, 40, generator=generator)
        return (), {"input_features": features, "decoder_input_ids": _text(batch)[1]["input_ids"]}

    return transformers.WhisperModel(config), example


def _wav2vec2() -> tuple[nn.Module, Example]:
    transformers = _package()
    config = transformers.Wav2Vec2Config(
        **_SIZES,
        conv_dim=(16, 16),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_conv_pos_embedding_groups=2,
        num_conv_pos_embeddings=8,
        mask_time_length=2,
    )
    torch.manual_seed(0)

    def example(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        generator = torch.Generator().manual_seed(batch)
        values: Tensor = torch.randn(batch, 400, generator=generator)
        return (values,), {}

    return transformers.Wav2Vec2Model(config), example


def _llama_head() -> tuple[nn.Module, Example]:
    transformers = _package()
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SIZES)), _text


def _bert_head() -> tuple[nn.Module, Example]:
    transformers = _package()
    torch.manual_seed(0)
    return transformers.BertForTokenClassification(transformers.BertConfig(**_SIZES)), _text
