"""The pipeline's own settings as systems of the benchmark: against the same calls made by hand."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from s2edit_pipeline import S2EditPipeline
from s2edit_pipeline.edit_sampling import EditSettings
from s2edit_pipeline.evaluation.costs.counts import count_unet
from s2edit_pipeline.evaluation.methods.pipeline_methods import ABLATION, PAPER, SETTINGS, FitsOfOnePicture, Setting
from s2edit_pipeline.evaluation.methods.registry import METHODS, Entrant
from s2edit_pipeline.identity_fitting import RECIPES
from s2edit_pipeline.latent_inversion import check_method
from s2edit_pipeline.prompt_alignment import insert_token

SOURCE, TARGET = "a photo of a smiling lady with glasses", "a photo of a sad lady with glasses"
STEPS = 3


@pytest.mark.parametrize("name", ["S2Edit", "S2Edit, the paper's", "edit-friendly + P2P"])
def test_a_setting_is_its_call(pipe: S2EditPipeline, picture: Image.Image, name: str) -> None:
    setting = SETTINGS[name]
    fit = None if setting.fit is None else {"num_steps": 1}
    changes = {"guidance_scale": 6.0}
    method = Entrant("mine", name, {"fit": fit, "edit": changes}).make(pipe, STEPS)
    assert method.name == "mine"
    with count_unet(pipe.unet) as counts:
        prepared = method.prepare(picture, SOURCE, "lady", seed=5)
    assert counts.evaluations >= STEPS
    (got,) = prepared([TARGET])
    identity, target = None, TARGET
    if setting.fit is not None:
        identity = pipe.fit_identity(
            picture, SOURCE, "lady", generator=torch.Generator().manual_seed(5), num_steps=1, **setting.fit
        )
        target = insert_token(target, "lady", "[I]")
    seeded = [torch.Generator().manual_seed(5) for _ in range(2)]
    inversion = pipe.invert(
        picture, SOURCE, setting.inversion, STEPS, identity=identity, generator=seeded[0], **changes
    )
    result = pipe(target, picture, SOURCE, identity, inversion, **{**setting.edit, **changes})
    assert np.array_equal(got, result.images[0])
    # in one call the source's row joins the targets' batch, which rounds otherwise
    result = pipe(
        target, picture, SOURCE, identity, setting.inversion, STEPS, generator=seeded[1], **{**setting.edit, **changes}
    )
    assert np.abs(np.asarray(got, int) - np.asarray(result.images[0], int)).max() <= 1
    assert pipe.identities == ()
    maps = prepared.attention_maps(TARGET)
    assert "lady" in maps and ("[I]" in maps) == (identity is not None)


def test_the_reference_rows_edit_nothing(pipe: S2EditPipeline, picture: Image.Image) -> None:
    for name in ("unedited", "autoencoder alone"):
        prepared = METHODS[name].make(name, pipe, STEPS).prepare(picture, SOURCE, "lady", 0)
        first, second = prepared([TARGET, "anything"])
        assert np.array_equal(first, second)
        if name == "unedited":
            assert np.array_equal(first, picture)
    with torch.no_grad():
        x = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 127.5 - 1
        back = pipe.vae.decode(pipe.vae.encode(x).latent_dist.mode()).sample[0].permute(1, 2, 0).clamp(-1, 1)
    assert np.abs(127.5 * (back.numpy() + 1) - np.asarray(first)).max() < 1


def test_every_setting_is_one_that_the_pipeline_takes() -> None:
    fit, call = (inspect.signature(f).parameters for f in (S2EditPipeline.fit_identity, S2EditPipeline.__call__))
    for contender in METHODS.values():
        for arguments in (*contender.grid, *contender.curve):
            assert set(arguments.get("edit", {})) <= set(call) and set(arguments.get("fit", {})) <= set(fit)
        assert len(contender.grid) <= 6
    for setting in (*SETTINGS.values(), *ABLATION.values()):
        check_method(setting.inversion)
        assert set(setting.edit) <= set(call) and set(setting.fit or {}) <= set(fit)


def test_the_papers_setting_and_its_ablation() -> None:
    assert PAPER.fit == {"preset": "paper"} and PAPER.inversion == "null_text"
    assert PAPER.edit == {"guidance_stop": 1.0, "blend_words": False}
    first, tuned, semantic, both = ABLATION.values()
    assert first.fit is None and (tuned.fit, semantic.fit, both.fit) == (
        {"preset": "paper", "semantic_weight": 0.0, "spatial_control": False},
        {"preset": "paper", "spatial_control": False},
        {"preset": "paper"},
    )
    assert len({(s.inversion, tuple(s.edit.items())) for s in ABLATION.values()}) == 1


def test_a_fit_that_is_not_there_takes_no_arguments() -> None:
    with pytest.raises(ValueError, match="fits no identity, so num_steps"):
        Setting(None).with_changes(fit={"num_steps": 3})
    changed = Setting({"method": "full"}).with_changes({"num_steps": 3}, {"strength": 0.5})
    assert changed == Setting({"method": "full", "num_steps": 3}, "direct", {"strength": 0.5})


def test_what_decides_a_setting_has_the_packages_defaults_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, paper = Setting().resolved(), PAPER.resolved()
    recipe = RECIPES["lora"]
    assert ours["fit"]["num_steps"] == recipe.num_steps and ours["fit"]["method"] == "lora"
    assert ours["edit"]["guidance_stop"] == EditSettings.guidance_stop and ours["inversion"] == "direct"
    assert paper["fit"]["num_steps"] == 400 and paper["fit"]["learning_rate"] == 5e-6
    assert paper["edit"]["guidance_stop"] == 1.0 and paper["edit"]["blend_words"] is False
    assert Setting(None).resolved()["fit"] is None
    monkeypatch.setitem(RECIPES, "lora", replace(recipe, num_steps=recipe.num_steps + 1))
    changed = Setting().resolved()
    assert changed["fit"].pop("num_steps") == ours["fit"].pop("num_steps") + 1 and changed == ours
    for setting in (*SETTINGS.values(), *ABLATION.values()):
        json.dumps(setting.resolved())


def test_fits_that_are_the_same_are_made_once(
    pipe: S2EditPipeline, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[Any, ...]] = []

    def fit(setting: Setting, pipe: Any, *task: Any) -> Any:
        made.append((setting.fit, *task[1:]))
        return object()

    monkeypatch.setattr(Setting, "fit_identity", fit)
    fits = FitsOfOnePicture()
    strong, weak = (Setting(edit={"guidance_scale": scale}) for scale in (9.0, 2.0))
    first = fits.fit(strong, pipe, picture, SOURCE, "lady", 3)
    assert fits.fit(weak, pipe, picture.copy(), SOURCE, "lady", 3) is first and len(made) == 1
    other = fits.fit(Setting({"num_steps": 2}), pipe, picture, SOURCE, "lady", 3)
    assert other is not first and fits.fit(strong, pipe, picture, SOURCE, "lady", 3) is first
    for task in ((picture.rotate(90), SOURCE, "lady", 3), (picture, TARGET, "lady", 3), (picture, SOURCE, "lady", 4)):
        assert fits.fit(strong, pipe, *task) not in (first, other)
    assert len(made) == 5
