"""The table of settings, on few people and few steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from s2edit_pipeline import load_avatars
from s2edit_pipeline.evaluation.metrics.counterfactual import demo_edits, grade
from s2edit_pipeline.evaluation.studies.edits import PEOPLE, SETTINGS, measure_edits, table


def test_rows_are_graded_against_the_drawings_and_share_their_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    from s2edit_pipeline.avatars.captions import describe
    from s2edit_pipeline.avatars.world import changed_pixels, render, sample_person

    pipe = load_avatars()
    pipe.set_progress_bar_config(disable=True)
    fits, fit = [], pipe.fit_identity
    monkeypatch.setattr(pipe, "fit_identity", lambda *a, **k: fits.append(k) or fit(*a, **k))
    names = ["the defaults", "no identity", "guided to the end", "edit-friendly, strength 0.64"]
    rows = measure_edits(pipe, names, people=[3], num_inference_steps=4, num_steps=1)
    assert [row.name for row in rows] == names and len(fits) == 1
    assert rows[1].cosines is None and rows[0].cosines is not None and rows[0].cosines[0] > 0.1
    # naive: the second row's mean, by hand
    person = sample_person(3, "held_out")
    edits = demo_edits(person)
    images = [
        pipe(e.target_prompt, render(person), describe(person).text, num_inference_steps=4).images[0] for e in edits
    ]
    wanted = sum(grade(e, image).inside for e, image in zip(edits, images, strict=True)) / len(edits)
    assert rows[1].inside == pytest.approx(wanted, abs=0.05)
    assert table(rows).count("\n") == len(names) + 3
    # the autoencoder alone, outside each edit
    with torch.no_grad():
        x = torch.from_numpy(np.asarray(render(person)).copy()).permute(2, 0, 1)[None] / 127.5 - 1
        back = pipe.vae.decode(pipe.vae.encode(x).latent_dist.mode()).sample[0].permute(1, 2, 0)
    error = (np.round(127.5 * (back.clamp(-1, 1).numpy() + 1)) - np.asarray(render(person))) ** 2
    own = [10 * np.log10(255**2 / error[~changed_pixels(person, e.target)].mean()) for e in edits]
    assert rows[0].autoencoder_outside == pytest.approx(np.mean(own), abs=0.01)
    assert pipe.identities == ()


def test_every_setting_is_one_that_the_pipeline_takes() -> None:
    import inspect

    from s2edit_pipeline import S2EditPipeline
    from s2edit_pipeline.latent_inversion import check_method

    fit, call = (inspect.signature(f).parameters for f in (S2EditPipeline.fit_identity, S2EditPipeline.__call__))
    for setting in SETTINGS.values():
        check_method(setting.inversion)
        assert set(setting.edit) <= set(call) and set(setting.fit or {}) <= set(fit)
    assert len(set(PEOPLE)) == len(PEOPLE)
