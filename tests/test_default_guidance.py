"""How strongly words pull where the caller doesn't say: the model's own guidance, wherever it is loaded from."""

from __future__ import annotations

import json
from collections.abc import Callable
from logging import getLogger
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from s2edit_pipeline import S2EditPipeline, load_avatars
from s2edit_pipeline.avatars import MODEL_FOLDER, recipe

SOURCE, TARGET = "a photo of a sad lady", "a photo of a smiling lady"


def own(pipe: S2EditPipeline, scale: float | None) -> S2EditPipeline:
    """A pipeline over the same components, with this guidance of its own."""
    made = S2EditPipeline(**pipe.components, default_guidance_scale=scale)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize(("scale", "meant"), [(None, 4.5), (2.0, 2.0), (3, 3.0)])
def test_no_guidance_is_the_models_own(
    pipe: S2EditPipeline, picture: Image.Image, scale: float | None, meant: float
) -> None:
    pipe, seen = own(pipe, scale), []
    edit: dict[str, Any] = {"image": picture, "source_prompt": SOURCE, "blend_words": False}
    drawing: dict[str, Any] = {"latents": torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(0))}
    for arguments in (edit, drawing):
        arguments |= {"num_inference_steps": 2, "output_type": "pt"}
        by_itself = pipe(TARGET, **arguments, callback_on_step_end=lambda p, *_: seen.append(p.guidance_scale) or {})
        said, other = (pipe(TARGET, guidance_scale=s, **arguments).images for s in (meant, meant + 2))
        assert torch.equal(by_itself.images, said) and not torch.equal(said, other)
    assert seen == [meant] * 4
    null_text = pipe.invert(picture, SOURCE, "null_text", 1)
    assert null_text.guidance_scale == meant
    pipe(TARGET, inversion=null_text, output_type="latent")  # the two agree


def test_the_papers_reading_is_guided_as_the_paper_says(pipe: S2EditPipeline, picture: Image.Image) -> None:
    scales: list[float | None] = []

    def look(pipe: Any, *_: Any) -> dict[str, Any]:
        scales.append(pipe.guidance_scale)
        return {}

    for more in ({}, {"guidance_scale": 3.0}):
        own(pipe, 2.0)(
            TARGET, picture, SOURCE, preset="paper", num_inference_steps=1, output_type="latent",
            callback_on_step_end=look, **more,
        )  # fmt: skip
    assert scales == [4.5, 3.0]


def test_it_goes_where_the_model_goes(make_pipe: Callable[..., S2EditPipeline], tmp_path: Path) -> None:
    own(make_pipe(), 2.0).save_pretrained(tmp_path)
    loaded = S2EditPipeline.from_pretrained(tmp_path)
    assert loaded.family.default_guidance_scale == 2.0
    assert S2EditPipeline.from_pretrained(tmp_path, default_guidance_scale=3.0).family.default_guidance_scale == 3.0
    assert S2EditPipeline.from_pipe(loaded).family.default_guidance_scale == 2.0
    through_stock = StableDiffusionPipeline.from_pipe(loaded)
    assert S2EditPipeline.from_pipe(through_stock).family.default_guidance_scale == 2.0
    assert make_pipe().family.default_guidance_scale == 4.5


def test_the_embedded_models_folder_says_its_own(caplog: pytest.LogCaptureFixture) -> None:
    """To this pipeline; to others it is a plain folder, which they load without a word about it."""
    assert load_avatars().family.default_guidance_scale == 2.0
    assert S2EditPipeline.from_pretrained(MODEL_FOLDER).family.default_guidance_scale == 2.0
    index = json.loads((MODEL_FOLDER / "model_index.json").read_text("utf-8"))
    assert {name: index[f"_{name}"] for name in recipe.OPTIONS} == recipe.OPTIONS  # what a new training writes
    diffusers_logger = getLogger("diffusers")
    propagates, diffusers_logger.propagate = diffusers_logger.propagate, True
    try:
        caplog.clear()
        StableDiffusionPipeline.from_pretrained(MODEL_FOLDER)
        assert "guidance" not in caplog.text
    finally:
        diffusers_logger.propagate = propagates


@pytest.mark.parametrize("scale", [-1.0, "high", float("nan")])
def test_what_is_no_guidance(pipe: S2EditPipeline, scale: Any) -> None:
    with pytest.raises(ValueError, match="default_guidance_scale must be a number of at least 0"):
        own(pipe, scale)
