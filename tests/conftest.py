"""Tiny random models of the real classes: nothing here needs trained weights."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from s2edit_pipeline.avatars.tokenizer import build_tokenizer
from s2edit_pipeline.pipeline import S2EditPipeline

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # and a process of theirs adds up in the same order

PROMPT = "a photo of a smiling lady with glasses"


def _components(prediction_type: str) -> dict[str, Any]:
    torch.manual_seed(0)
    tokenizer = build_tokenizer(num_captions=200)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    with torch.no_grad():  # a fresh text encoder tells prompts apart by hundredths only
        text_encoder.get_input_embeddings().weight.mul_(50)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    return {
        "vae": vae.eval(), "text_encoder": text_encoder.eval(), "tokenizer": tokenizer, "unet": unet.eval(),
        "scheduler": scheduler,
    }  # fmt: skip


@pytest.fixture(scope="session")
def _tiny() -> dict[str, dict[str, Any]]:
    return {kind: _components(kind) for kind in ("epsilon", "v_prediction")}


@pytest.fixture
def make_pipe(_tiny: dict[str, dict[str, Any]]) -> Callable[[str], S2EditPipeline]:
    """A fresh tiny pipeline of the given prediction type."""

    def make(prediction_type: str = "epsilon") -> S2EditPipeline:
        pipe = S2EditPipeline(**copy.deepcopy(_tiny[prediction_type]))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture
def pipe(make_pipe: Callable[[str], S2EditPipeline]) -> S2EditPipeline:
    return make_pipe("epsilon")


@pytest.fixture(scope="session")
def picture() -> Image.Image:
    """32 x 32, smooth, another colour in each corner."""
    y, x = np.mgrid[0:32, 0:32] / 31.0
    return Image.fromarray((np.stack([x, y, 1 - x * y], -1) * 255).round().astype(np.uint8))


@pytest.fixture(scope="session")
def half_mask() -> np.ndarray:
    """(32, 32) bool: the left half."""
    mask = np.zeros((32, 32), bool)
    mask[:, :16] = True
    return mask
