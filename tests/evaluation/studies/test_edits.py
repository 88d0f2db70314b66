"""The table of settings, on few people and few steps."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

from s2edit_pipeline import S2EditPipeline, load_avatars
from s2edit_pipeline.avatars.captions import describe
from s2edit_pipeline.avatars.world import changed_pixels, render, sample_person
from s2edit_pipeline.evaluation.metrics.counterfactual import demo_edits, grade
from s2edit_pipeline.evaluation.studies import edits
from s2edit_pipeline.evaluation.studies.edits import (
    CONFINEMENT,
    PEOPLE,
    SETTINGS,
    EditReport,
    measure_edits,
    measure_steps,
)
from s2edit_pipeline.inversion_record import inversion_method


def test_rows_are_graded_against_the_drawings_and_share_their_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = load_avatars()
    pipe.set_progress_bar_config(disable=True)
    fits, fit = [], pipe.fit_identity
    monkeypatch.setattr(pipe, "fit_identity", lambda *a, **k: fits.append(k) or fit(*a, **k))
    names = ["the defaults", "no identity", "guided to the end", "edit-friendly, strength 0.64"]
    report = measure_edits(pipe, names, people=[3], num_inference_steps=4, num_steps=1)
    rows = report.rows
    assert [row.name for row in rows] == names and len(fits) == 1
    assert rows[1].cosines is None and rows[0].cosines is not None and rows[0].cosines[0] > 0.1
    # naive: the second row's mean, by hand
    person = sample_person(3, "held_out")
    demo = demo_edits(person)
    images = [
        pipe(e.target_prompt, render(person), describe(person).text, num_inference_steps=4, keep_pixels=False).images[0]
        for e in demo
    ]
    wanted = sum(grade(e, image).inside for e, image in zip(demo, images, strict=True)) / len(demo)
    assert rows[1].inside == pytest.approx(wanted, abs=0.05)
    assert report.table().count("\n") == len(names) + 3
    # the autoencoder alone, outside each edit
    with torch.no_grad():
        x = torch.from_numpy(np.asarray(render(person)).copy()).permute(2, 0, 1)[None] / 127.5 - 1
        back = pipe.vae.decode(pipe.vae.encode(x).latent_dist.mode()).sample[0].permute(1, 2, 0)
    error = (np.round(127.5 * (back.clamp(-1, 1).numpy() + 1)) - np.asarray(render(person))) ** 2
    autoencoder = [10 * np.log10(255**2 / error[~changed_pixels(person, e.target)].mean()) for e in demo]
    assert rows[0].autoencoder_outside == pytest.approx(np.mean(autoencoder), abs=0.01)
    assert pipe.identities == ()


def test_every_setting_is_one_that_the_pipeline_takes() -> None:
    fit, call = (inspect.signature(f).parameters for f in (S2EditPipeline.fit_identity, S2EditPipeline.__call__))
    for setting in SETTINGS.values():
        inversion_method(setting.inversion)
        assert set(setting.edit) <= set(call) and set(setting.fit or {}) <= set(fit)
    assert len(set(PEOPLE)) == len(PEOPLE)
    assert set(CONFINEMENT) <= set(SETTINGS)


def test_a_setting_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="no setting the best; choose from the defaults, no identity"):
        measure_edits(None, ["the defaults", "the best"])


def test_several_peoples_edits_weigh_alike() -> None:
    """Means are over edits, whoever's they are; seconds are a person's."""
    pipe = load_avatars()
    pipe.set_progress_bar_config(disable=True)
    settings = {"people": [3, 12], "num_inference_steps": 2}
    (both,) = measure_edits(pipe, ["no identity"], **settings).rows
    apart = [measure_edits(pipe, ["no identity"], **{**settings, "people": [n]}).rows[0] for n in (3, 12)]
    counts = [len(demo_edits(sample_person(n, "held_out"))) for n in (3, 12)]
    for name in ("whole", "inside", "outside", "done", "autoencoder_outside"):
        wanted = np.average([getattr(row, name) for row in apart], weights=counts)
        assert getattr(both, name) == pytest.approx(wanted), name


# ---------------------------------------------------------------------------- few steps


def test_steps_share_their_fits_and_differ_in_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = load_avatars()
    pipe.set_progress_bar_config(disable=True)
    fits, fit = [], pipe.fit_identity
    monkeypatch.setattr(pipe, "fit_identity", lambda *a, **k: fits.append(k) or fit(*a, **k))
    report = measure_steps(pipe, (2, 4), few=2, many=4, people=[3], num_steps=2)
    assert [row.name for row in report.rows] == ["2 steps", "4 steps", "2 steps, fixed point"] and len(fits) == 1
    (alone,) = measure_edits(pipe, ["the defaults"], people=[3], num_inference_steps=2, num_steps=2).rows
    few, many, other = report.rows
    assert other.whole != few.whole
    assert (few.whole, few.inside, few.outside) == pytest.approx((alone.whole, alone.inside, alone.outside), abs=0.05)
    wanted = (many.whole - few.whole, many.inside - few.inside, many.outside - few.outside)
    assert report.losses == {"2 steps below 4": wanted}
    assert "| 2 steps below 4 | " + " | ".join(f"{loss:.2f}" for loss in wanted) in report.table()
    monkeypatch.setattr(edits, "measure_edits", lambda *args, **more: EditReport((few,)))
    assert measure_steps(pipe, (2,), few=2, many=4).losses == {"2 steps below 4": None}


@pytest.mark.slow
def test_twenty_steps_are_within_half_a_decibel_of_fifty() -> None:
    pipe = load_avatars()
    pipe.set_progress_bar_config(disable=True)
    (losses,) = measure_steps(pipe, (20, 50), people=range(3)).losses.values()
    assert losses is not None and max(losses) <= 0.5, losses
