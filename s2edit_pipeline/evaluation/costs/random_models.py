"""Pipelines of the published models' shapes with random weights: what they cost can be measured without them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ...avatars.tokenizer import build_tokenizer
from ...pipeline import S2EditPipeline

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """Arguments of the components' classes, where they differ from the classes' own defaults; ``text_encoder_2`` is
    SDXL's."""

    unet: Config
    text_encoder: Config
    prediction_type: str = "epsilon"
    text_encoder_2: Config | None = None
    scaling_factor: float = 0.18215
    autoencoder_channels: tuple[int, ...] = (128, 256, 512, 512)


_CLIP_L: Config = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "vocab_size": 49408,
}  # fmt: skip
_OPENCLIP_H: Config = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
    "hidden_act": "gelu", "vocab_size": 49408,
}  # fmt: skip
_OPENCLIP_BIGG: Config = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "hidden_act": "gelu", "projection_dim": 1280, "vocab_size": 49408,
}  # fmt: skip
_SDXL_BLOCKS: Config = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True, "addition_embed_type": "text_time",
}  # fmt: skip

FAMILIES: Mapping[str, Family] = {
    "sd15": Family({"sample_size": 64, "cross_attention_dim": 768}, _CLIP_L),
    "sd21": Family(
        {
            "sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
        },
        _OPENCLIP_H,
        "v_prediction",
    ),
    "sdxl": Family(
        {
            **_SDXL_BLOCKS,
            "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20],
            "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": [1, 2, 10],
            "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
        },
        _CLIP_L,
        text_encoder_2=_OPENCLIP_BIGG,
        scaling_factor=0.13025,
    ),
}  # fmt: skip
"""Stable Diffusion 1.5, 2.1 (768 pixels) and XL 1.0, as published."""


def _tiny_text(**changes: Any) -> Config:
    return {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "vocab_size": 2000, **changes,
    }  # fmt: skip


_TINY_AUTOENCODER = (32, 32, 32, 32)

TINY_FAMILIES: Mapping[str, Family] = {
    "sd15": Family(
        {
            "sample_size": 8, "cross_attention_dim": 32, "block_out_channels": (32, 32, 64, 64),
            "attention_head_dim": 4, "layers_per_block": 1,
        },
        _tiny_text(),
        autoencoder_channels=_TINY_AUTOENCODER,
    ),
    "sd21": Family(
        {
            "sample_size": 8, "cross_attention_dim": 48, "block_out_channels": (32, 32, 64, 64),
            "attention_head_dim": [2, 2, 4, 4], "use_linear_projection": True, "layers_per_block": 1,
        },
        _tiny_text(hidden_size=48, hidden_act="gelu"),
        "v_prediction",
        autoencoder_channels=_TINY_AUTOENCODER,
    ),
    "sdxl": Family(
        {
            **_SDXL_BLOCKS,
            "sample_size": 8, "cross_attention_dim": 80, "attention_head_dim": [2, 2, 4],
            "block_out_channels": (32, 32, 64), "transformer_layers_per_block": [1, 1, 2], "layers_per_block": 1,
            "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 24,
        },
        _tiny_text(),
        text_encoder_2=_tiny_text(hidden_size=48, hidden_act="gelu", projection_dim=24),
        scaling_factor=0.13025,
        autoencoder_channels=_TINY_AUTOENCODER,
    ),
}  # fmt: skip
"""The same blocks, narrow and few."""


def random_pipeline(
    family: Family, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> S2EditPipeline:
    """A pipeline of ``family`` with random weights, made on ``device``; prompts are cut by the avatars' own words, into
    CLIP's 77 positions."""
    tokenizer = build_tokenizer(num_captions=200)
    tokenizer.model_max_length = 77
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    levels = len(family.autoencoder_channels)
    parts: dict[str, Any] = {}
    with torch.device(device):
        parts["unet"] = UNet2DConditionModel(**family.unet)
        parts["vae"] = AutoencoderKL(
            block_out_channels=family.autoencoder_channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=2,
            scaling_factor=family.scaling_factor,
            force_upcast=family.text_encoder_2 is not None,
        )
        parts["text_encoder"] = CLIPTextModel(CLIPTextConfig(**family.text_encoder, **ends))
        if family.text_encoder_2 is not None:
            parts["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(**family.text_encoder_2, **ends))
    parts = {name: part.to(dtype).eval() for name, part in parts.items()}
    parts["tokenizer"] = tokenizer
    if family.text_encoder_2 is not None:
        parts["tokenizer_2"] = copy.deepcopy(tokenizer)
    parts["scheduler"] = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=family.prediction_type,
    )
    pipe = S2EditPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe
