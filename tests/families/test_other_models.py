"""Models of kinds that aren't served are refused when they are loaded, in words that list those that are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from s2edit_pipeline import S2EditPipeline
from s2edit_pipeline.avatars.tokenizer import build_tokenizer

REFUSAL = (
    r"SD3Transformer2DModel is a model that isn't served yet\. "
    r"Served are: Stable Diffusion 1, 2 and XL \(UNet2DConditionModel\)"
)


@pytest.fixture(scope="module")
def stable_diffusion_3() -> StableDiffusion3Pipeline:
    """A tiny one, of diffusers' own classes."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(num_captions=20)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length, projection_dim=16, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    parts: dict[str, Any] = {
        "transformer": SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=4,
            joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32, out_channels=4,
            pos_embed_max_size=8,
        ),
        "vae": AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), block_out_channels=(8,),
            layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=8, shift_factor=0.1,
        ),
        "text_encoder": CLIPTextModelWithProjection(config), "tokenizer": tokenizer,
        "text_encoder_2": CLIPTextModelWithProjection(config), "tokenizer_2": tokenizer,
        "text_encoder_3": None, "tokenizer_3": None, "scheduler": FlowMatchEulerDiscreteScheduler(),
    }  # fmt: skip
    return StableDiffusion3Pipeline(**parts)


def test_a_transformers_folder_is_refused_as_it_is_loaded(
    stable_diffusion_3: StableDiffusion3Pipeline, tmp_path: Path
) -> None:
    stable_diffusion_3.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=REFUSAL):
        S2EditPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=REFUSAL):
        S2EditPipeline.from_pipe(stable_diffusion_3)
    with pytest.raises(ValueError, match=REFUSAL):
        S2EditPipeline(transformer=stable_diffusion_3.transformer)


def test_a_pipeline_without_a_denoiser_is_refused_as_it_is_used() -> None:
    """It can be made: another may be passed later."""
    pipe = S2EditPipeline()
    assert pipe.components == {}
    for call in (lambda: pipe("a lady"), lambda: pipe.load_identity("nowhere"), lambda: pipe.family):
        with pytest.raises(ValueError, match=r"The pipeline has no unet; load it whole, or pass unet= to from_pretr"):
            call()
