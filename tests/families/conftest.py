"""Tiny random models of each family, of the real classes, over CLIP's vocabulary."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from s2edit_pipeline import S2EditPipeline
from s2edit_pipeline.avatars.tokenizer import build_tokenizer
from s2edit_pipeline.family_flow import PackedFlowFamily

FAMILIES = ("sd1", "sd2_v", "sdxl")


def _text_config(tokenizer: Any, width: int, **changes: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **changes,
    )  # fmt: skip


def _components(family: str, tokenizer: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    parts: dict[str, Any] = {"tokenizer": tokenizer}
    unet: dict[str, Any] = {"cross_attention_dim": 32, "attention_head_dim": 4}
    if family == "sd1":
        parts["text_encoder"] = CLIPTextModel(_text_config(tokenizer, 32))
    elif family == "sd2_v":
        parts["text_encoder"] = CLIPTextModel(_text_config(tokenizer, 48, hidden_act="gelu"))
        unet = {"cross_attention_dim": 48, "attention_head_dim": [2, 4], "use_linear_projection": True}
    else:
        parts["text_encoder"] = CLIPTextModel(_text_config(tokenizer, 32))
        second = _text_config(tokenizer, 48, hidden_act="gelu", projection_dim=24)
        second.eos_token_id = 2  # as SDXL's own: CLIP then takes the highest id for the end
        parts["text_encoder_2"] = CLIPTextModelWithProjection(second)
        parts["tokenizer_2"] = copy.deepcopy(tokenizer)
        parts["tokenizer_2"].pad_token = "!"
        unet = {
            "cross_attention_dim": 80, "attention_head_dim": [2, 4], "use_linear_projection": True,
            "transformer_layers_per_block": [1, 2], "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 24,
        }  # fmt: skip
    for name in parts.keys() & {"text_encoder", "text_encoder_2"}:
        with torch.no_grad():  # a fresh text encoder tells prompts apart by hundredths only
            parts[name].get_input_embeddings().weight.mul_(50)
    with_attention = ["DownBlock2D" if family == "sdxl" else "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]
    parts["unet"] = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, down_block_types=with_attention,
        up_block_types=[name.replace("Down", "Up") for name in reversed(with_attention)],
        block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, **unet,
    )  # fmt: skip
    parts["vae"] = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=16,
        force_upcast=family == "sdxl",
    )  # fmt: skip
    parts["scheduler"] = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type="v_prediction" if family == "sd2_v" else "epsilon",
    )  # fmt: skip
    return {name: part.eval() if isinstance(part, torch.nn.Module) else part for name, part in parts.items()}


@pytest.fixture(scope="session")
def _families(clip_tokenizer: CLIPTokenizer) -> dict[str, dict[str, Any]]:
    return {family: _components(family, clip_tokenizer) for family in FAMILIES}


@pytest.fixture(scope="session")
def small_families() -> dict[str, S2EditPipeline]:
    """A pipeline of each family over a small vocabulary: learned words are added to it in no time."""
    tokenizer = build_tokenizer(num_captions=200)
    tokenizer.model_max_length = 77
    vocabulary = "a photo of [sad|smiling] {lady|man} [|with glasses] [with a [red|blue] hat|with a beard]"
    pipes = {family: S2EditPipeline(**_components(family, tokenizer), vocabulary=vocabulary) for family in FAMILIES}
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
    return pipes


@pytest.fixture(scope="session")
def small_tokenizers(t5_tokenizer: Any, qwen_tokenizer: Any) -> dict[str, Any]:
    """Of each kind that transformers' text encoders have, over small vocabularies."""
    clip = build_tokenizer(num_captions=200)
    clip.model_max_length = 77
    return {"clip": clip, "t5": t5_tokenizer, "qwen": qwen_tokenizer}


@pytest.fixture
def make_family(_families: dict[str, dict[str, Any]]) -> Callable[..., S2EditPipeline]:
    """A fresh tiny pipeline of the given family and dtype; the tokenizers are shared, copies of them are slow."""

    def make(family: str, dtype: torch.dtype = torch.float32) -> S2EditPipeline:
        parts = {n: p if n.startswith("tokenizer") else copy.deepcopy(p) for n, p in _families[family].items()}
        pipe = S2EditPipeline(**parts).to(dtype)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture(scope="module")
def small_by_nature() -> Iterator[None]:
    """What is worked at where nobody says a size: a reference attribute's picture."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedFlowFamily, "native_side", 8)
        yield


@pytest.fixture(scope="session")
def wide_picture() -> Image.Image:
    """24 x 16: latents of 8 x 12."""
    y, x = np.mgrid[0:16, 0:24] / 23.0
    return Image.fromarray((np.stack([x, y, 1 - x * y], -1) * 255).round().astype(np.uint8))
