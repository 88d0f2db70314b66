"""Models of kinds that aren't served are refused when they are loaded, in words that list those that are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from s2edit_pipeline import S2EditPipeline

REFUSAL = (
    r"DiTTransformer2DModel is a model that isn't served yet\. "
    r"Served are: .*Stable Diffusion 1, 2 and XL \(UNet2DConditionModel\)"
)


@pytest.fixture(scope="module")
def told_a_class() -> DiTPipeline:
    """A tiny one, of diffusers' own classes: it is told a class's number and no words."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, norm_type="ada_norm_zero", norm_elementwise_affine=False, num_embeds_ada_norm=10,
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8)
    return DiTPipeline(transformer=transformer, vae=vae, scheduler=DDIMScheduler())


def test_a_transformers_folder_is_refused_as_it_is_loaded(told_a_class: DiTPipeline, tmp_path: Path) -> None:
    told_a_class.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=REFUSAL):
        S2EditPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=REFUSAL):
        S2EditPipeline.from_pipe(told_a_class)
