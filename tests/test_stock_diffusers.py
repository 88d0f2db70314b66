"""What an identity's folder is to somebody who has plain diffusers and not this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image

from s2edit_pipeline import S2EditPipeline, load_avatars
from s2edit_pipeline.identity_adapter import IdentityAdapter

PROMPT = "a photo of a smiling [I] lady with glasses"


def fitted(pipe: S2EditPipeline, picture: Image.Image, method: str = "lora") -> IdentityAdapter:
    """Without spatial control, which plain diffusers doesn't have; perturbed, so that every layer counts."""
    identity = pipe.fit_identity(
        picture, "a photo of a sad lady", "lady", method=method, spatial_control=False, num_steps=1, batch_size=1,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    for i, tensor in enumerate(identity.weights.values()):
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(i))
        tensor.add_(noise, alpha=0.03 if method == "lora" else 0.003)
    identity.rows["text_encoder"].add_(0.3)
    return identity


def drawn_by_stock_and_by_ours(
    pipe: S2EditPipeline, identity: Path | None, has_lora: bool = True, prompt: str = PROMPT
) -> tuple[np.ndarray, np.ndarray]:
    """The same latents, words and steps; pixels in [0, 1]."""
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    latents = torch.randn((1, pipe.unet.config.in_channels, 16, 16), generator=torch.Generator().manual_seed(5))
    arguments: dict[str, Any] = {
        "num_inference_steps": 6, "guidance_scale": 4.5, "latents": latents, "output_type": "np",
    }  # fmt: skip
    stock = StableDiffusionPipeline(
        pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.unet, scheduler, None, None, requires_safety_checker=False
    )
    stock.set_progress_bar_config(disable=True)
    if identity is not None:
        pipe.load_identity(identity)
    ours = pipe(prompt, **arguments).images
    pipe.unload_identity()
    if identity is not None:  # last, it isn't taken off to the bit
        if has_lora:
            stock.load_lora_weights(str(identity))
        stock.load_textual_inversion(str(identity))
    theirs = stock(prompt, **arguments).images
    return theirs, ours


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_stock_stable_diffusion_draws_the_same_picture(
    make_pipe: Any, picture: Image.Image, tmp_path: Path, prediction_type: str
) -> None:
    pipe = make_pipe(prediction_type)
    fitted(pipe, picture).save_pretrained(tmp_path / "ada")
    bare, _ = drawn_by_stock_and_by_ours(pipe, None, prompt=PROMPT.replace("[I] ", ""))
    theirs, ours = drawn_by_stock_and_by_ours(pipe, tmp_path / "ada")
    assert np.abs(theirs - ours).max() <= 1e-4
    assert np.abs(theirs - bare).max() > 1e-2


def test_stock_stable_diffusion_draws_the_same_avatar(tmp_path: Path) -> None:
    pipe = load_avatars()
    pipe.set_progress_bar_config(disable=True)
    picture = Image.linear_gradient("L").resize((128, 128)).convert("RGB")
    fitted(pipe, picture).save_pretrained(tmp_path / "ada")
    size = sum(file.stat().st_size for file in (tmp_path / "ada").iterdir())
    assert size <= 1_000_000, f"{size:,} bytes"
    theirs, ours = drawn_by_stock_and_by_ours(pipe, tmp_path / "ada")
    difference = np.abs(theirs - ours).max()
    print(f"{size:,} bytes; largest difference {difference:.2e}")
    assert difference <= 1e-4


def test_stock_stable_diffusion_reads_a_full_fine_tuning(
    pipe: S2EditPipeline, picture: Image.Image, tmp_path: Path
) -> None:
    """As a LoRA over linear layers and convolutions of different ranks; its biases and norms are ours alone."""
    identity = fitted(pipe, picture, "full")
    for name, tensor in identity.weights.items():
        if tensor.ndim == 1 or "position_embedding" in name:
            tensor.zero_()
    identity.save_pretrained(tmp_path / "ada", kept_energy=0.97, max_bytes=10**8)
    loaded = IdentityAdapter.from_pretrained(tmp_path / "ada")
    assert any(tensor.ndim == 4 for tensor in loaded.weights.values())
    assert len(loaded.lora_metadata["unet.rank_pattern"]) > 5
    theirs, ours = drawn_by_stock_and_by_ours(pipe, tmp_path / "ada")
    assert np.abs(theirs - ours).max() <= 1e-4


def test_the_token_alone_is_read_too(pipe: S2EditPipeline, picture: Image.Image, tmp_path: Path) -> None:
    fitted(pipe, picture, "token").save_pretrained(tmp_path / "ada")
    theirs, ours = drawn_by_stock_and_by_ours(pipe, tmp_path / "ada", has_lora=False)
    assert np.abs(theirs - ours).max() <= 1e-4
