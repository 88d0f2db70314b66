"""Models beside the common ones: kinds that aren't served are refused when they are loaded, in words that list those
that are; a U-Net that is told its guidance is told it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    LatentConsistencyModelPipeline,
    UNet2DConditionModel,
)
from PIL import Image

from s2edit_pipeline import S2EditPipeline
from s2edit_pipeline.family_base import family_of, registered_families

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


def test_every_transformer_is_served_or_refused_by_its_class() -> None:
    served = {name for family in registered_families() for name in family.denoiser_classes}
    for name in [name for name in dir(diffusers) if name.endswith(("Transformer2DModel", "Transformer3DModel"))]:
        pipe = SimpleNamespace(transformer=type(name, (), {})(), unet=None)
        if name in served:
            assert name in family_of(pipe).denoiser_classes
        else:
            with pytest.raises(ValueError, match=f"{name} is a model that isn't served yet") as refusal:
                family_of(pipe)
            assert all(f"({one}" in str(refusal.value) for one in served)
    assert len(served) >= 6


SOURCE, TARGET = "a photo of a sad lady", "a photo of a smiling lady"


@pytest.fixture(scope="module")
def consistency(small_families: dict[str, S2EditPipeline]) -> S2EditPipeline:
    """Stable Diffusion 1 at tiny size with a latent consistency model's U-Net, which is told its guidance."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, down_block_types=["CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D"], block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=32, attention_head_dim=4, time_cond_proj_dim=12,
    )  # fmt: skip
    made = S2EditPipeline(**{**small_families["sd1"].components, "unet": unet.eval()})
    made.set_progress_bar_config(disable=True)
    return made


def test_a_u_net_is_told_its_guidance_as_diffusers_tells_it(consistency: S2EditPipeline) -> None:
    family, x = consistency.family, torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    embeds = family.encode([family.tokenize(TARGET)])
    for scale in (1.0, 3.0, 8.5):
        stock = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, torch.tensor([scale - 1]), 12)
        told = consistency.unet(x, 500, embeds.embeds, timestep_cond=stock).sample
        assert torch.equal(family.denoise(x, 500, embeds.told(scale), torch.float32), told)
        untold = family.denoise(x, 500, embeds, torch.float32)  # as in a fit
        assert torch.equal(untold, told) == (scale == 1.0)


def test_an_edit_tells_its_guidance_and_asks_no_unconditional_branch(
    consistency: S2EditPipeline, wide_picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    forward = consistency.unet.forward
    monkeypatch.setattr(consistency.unet, "forward", lambda x, *a, **k: (rows.append(len(x)), forward(x, *a, **k))[1])
    settings = {"num_inference_steps": 3, "output_type": "np", "blend_words": False, "guidance_stop": 1.0}
    pictures = [consistency(TARGET, wide_picture, SOURCE, guidance_scale=g, **settings).images for g in (1.0, 6.0)]
    assert np.abs(pictures[0] - pictures[1]).max() > 1e-3 and max(rows) <= 2
    with pytest.raises(ValueError, match="negative_prompt has no effect on this model, which has no unconditional"):
        consistency(TARGET, wide_picture, SOURCE, negative_prompt="a hat", num_inference_steps=3)
