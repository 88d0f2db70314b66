"""One word for a reading, and what is passed beside it."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from PIL import Image

from s2edit_pipeline.argument_checks import with_preset
from s2edit_pipeline.edit_settings import EDIT_PRESETS
from s2edit_pipeline.fit_settings import FIT_PRESETS, RECIPES, FitSettings, fit_preset
from s2edit_pipeline.pipeline import S2EditPipeline

PROMPT = "a photo of a sad lady with glasses"


def test_what_is_passed_wins_and_none_is_the_presets() -> None:
    given = {"method": None, "num_steps": 3, "early_stop": True, "batch_size": None}
    assert fit_preset("paper", given) == {
        "method": "full", "num_steps": 3, "learning_rate": 5e-6, "token_learning_rate": 5e-6, "batch_size": 1,
        "timestep_sampling": "uniform", "lr_scheduler": "constant", "early_stop": True, "renormalize": False,
    }  # fmt: skip
    assert fit_preset(None, given) == {"num_steps": 3, "early_stop": True}
    # steps, rates and batch are the method's
    assert fit_preset("paper", {"method": "token", "num_steps": None}) == {
        "method": "token", "timestep_sampling": "uniform", "early_stop": False, "renormalize": False,
    }  # fmt: skip
    assert fit_preset("paper", {"method": "full"}) == FIT_PRESETS["paper"]
    assert with_preset("paper", EDIT_PRESETS, {"blend_words": None}) == EDIT_PRESETS["paper"]
    assert with_preset("paper", EDIT_PRESETS, {"blend_words": ["hat"], "inversion": "ddim"}) == {
        "inversion": "ddim", "guidance_scale": 4.5, "guidance_stop": 1.0, "blend_words": ["hat"],
    }  # fmt: skip


def test_every_preset_is_made_of_arguments_that_may_be_left_out() -> None:
    fit, call = (inspect.signature(f).parameters for f in (S2EditPipeline.fit_identity, S2EditPipeline.__call__))
    for parameters, presets in ((fit, FIT_PRESETS), (call, EDIT_PRESETS)):
        for preset in presets.values():
            assert all(parameters[name].default is None for name in preset)


def test_the_tokens_row_has_a_rate_of_its_own() -> None:
    """The paper's preset trains everything at one rate; where the row is all that is trained, it takes the fit's."""
    paper = FitSettings.of({"preset": "paper", "method": None})
    assert (paper.method, paper.learning_rate, paper.token_learning_rate) == ("full", 5e-6, 5e-6)
    other = FitSettings.of({"preset": "paper", "method": None, "learning_rate": 1e-5, "token_learning_rate": 2e-3})
    assert (other.learning_rate, other.token_learning_rate) == (1e-5, 2e-3)
    for method, recipe in RECIPES.items():
        plain = FitSettings(method=method)
        assert (plain.learning_rate, plain.token_learning_rate) == (recipe.learning_rate, recipe.token_learning_rate)
    assert FitSettings(method="token", learning_rate=3e-3).token_learning_rate == 3e-3
    assert FitSettings(method="lora", learning_rate=3e-3).token_learning_rate == RECIPES["lora"].token_learning_rate


def test_the_papers_fit_in_one_word(pipe: S2EditPipeline, picture: Image.Image) -> None:
    def fit(**arguments: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        return pipe.fit_identity(picture, PROMPT, "lady", num_steps=2, generator=generator, **arguments)

    in_full = fit(
        method="full", learning_rate=5e-6, token_learning_rate=5e-6, batch_size=1, timestep_sampling="uniform",
        early_stop=False,
    )  # fmt: skip
    paper = fit(preset="paper")
    assert paper.method == "full" and paper.settings == in_full.settings
    assert all(torch.equal(paper.weights[name], tensor) for name, tensor in in_full.weights.items())
    assert torch.equal(paper.rows["text_encoder"], in_full.rows["text_encoder"])
    assert fit(preset="paper", method="token").method == "token"
    assert fit().method == "lora"
    with pytest.raises(ValueError, match="preset='papper' is unknown; choose 'paper', or None for ours"):
        fit(preset="papper")


def test_the_papers_edit_in_one_word(pipe: S2EditPipeline, picture: Image.Image) -> None:
    def edit(**arguments: Any) -> Any:
        target = "a photo of a smiling lady with glasses"
        return pipe(target, picture, PROMPT, num_inference_steps=3, output_type="latent", **arguments)

    in_full = edit(inversion="null_text", guidance_stop=1.0, blend_words=False)
    paper, ours = edit(preset="paper"), edit()
    assert paper.edit_masks == [None] and torch.equal(paper.images, in_full.images)
    assert not torch.equal(paper.images, ours.images)
    direct = edit(preset="paper", inversion="direct")
    assert torch.equal(direct.images, edit(inversion="direct", guidance_stop=1.0, blend_words=False).images)
    with pytest.raises(ValueError, match="preset='papper' is unknown"):
        edit(preset="papper")
    with pytest.raises(ValueError, match="preset= is for editing a picture: pass image= too"):
        pipe(PROMPT, preset="paper", num_inference_steps=1)  # no picture: nothing to invert
