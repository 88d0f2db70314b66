"""One word for a reading, and what is said beside it."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from PIL import Image

from s2edit_pipeline.edit_settings import with_preset
from s2edit_pipeline.fit_settings import FIT_PRESETS
from s2edit_pipeline.pipeline import S2EditPipeline

PROMPT = "a photo of a sad lady with glasses"


def test_what_is_passed_wins_and_none_is_the_presets() -> None:
    given = {"method": None, "num_steps": 3, "early_stop": True, "batch_size": None}
    assert with_preset("paper", "fit", given) == {
        "method": "full", "num_steps": 3, "learning_rate": 5e-6, "batch_size": 1,
        "timestep_sampling": "uniform", "lr_scheduler": "constant", "early_stop": True,
    }  # fmt: skip
    assert with_preset(None, "fit", given) == {"num_steps": 3, "early_stop": True}
    # steps, rates and batch are the method's
    assert with_preset("paper", "fit", {"method": "token", "num_steps": None}) == {
        "method": "token", "timestep_sampling": "uniform", "early_stop": False,
    }  # fmt: skip
    assert with_preset("paper", "fit", {"method": "full"}) == PRESETS["paper"].fit
    assert with_preset("paper", "edit", {"blend_words": None}) == PRESETS["paper"].edit
    assert with_preset("paper", "edit", {"blend_words": ["hat"], "inversion": "ddim"}) == {
        "inversion": "ddim", "guidance_stop": 1.0, "blend_words": ["hat"],
    }  # fmt: skip


def test_every_preset_is_made_of_arguments_that_may_be_left_out() -> None:
    fit, call = (inspect.signature(f).parameters for f in (S2EditPipeline.fit_identity, S2EditPipeline.__call__))
    for preset in PRESETS.values():
        assert all(fit[name].default is None for name in preset.fit)
        assert all(call[name].default is None for name in preset.edit)


def test_the_papers_fit_in_one_word(pipe: S2EditPipeline, picture: Image.Image) -> None:
    def fit(**arguments: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        return pipe.fit_identity(picture, PROMPT, "lady", num_steps=2, generator=generator, **arguments)

    written = fit(method="full", learning_rate=5e-6, batch_size=1, timestep_sampling="uniform", early_stop=False)
    paper = fit(preset="paper")
    assert paper.method == "full" and paper.settings == written.settings
    assert all(torch.equal(paper.weights[name], tensor) for name, tensor in written.weights.items())
    assert fit(preset="paper", method="token").method == "token"
    assert fit().method == "lora"
    with pytest.raises(ValueError, match="preset='papper' is unknown; choose 'paper', or None for ours"):
        fit(preset="papper")


def test_the_papers_edit_in_one_word(pipe: S2EditPipeline, picture: Image.Image) -> None:
    def edit(**arguments: Any) -> Any:
        target = "a photo of a smiling lady with glasses"
        return pipe(target, picture, PROMPT, num_inference_steps=3, output_type="latent", **arguments)

    written = edit(inversion="null_text", guidance_stop=1.0, blend_words=False)
    paper, ours = edit(preset="paper"), edit()
    assert paper.edit_masks == [None] and torch.equal(paper.images, written.images)
    assert not torch.equal(paper.images, ours.images)
    direct = edit(preset="paper", inversion="direct")
    assert torch.equal(direct.images, edit(inversion="direct", guidance_stop=1.0, blend_words=False).images)
    with pytest.raises(ValueError, match="preset='papper' is unknown"):
        edit(preset="papper")
    assert len(pipe(PROMPT, preset="paper", num_inference_steps=1).images) == 1  # no picture: nothing to invert
