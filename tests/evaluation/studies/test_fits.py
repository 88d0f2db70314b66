"""What fits are worth and cost: counted, graded and compared as said."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from s2edit_pipeline import S2EditPipeline, load_avatars
from s2edit_pipeline.evaluation.studies.edits import measure_edits
from s2edit_pipeline.evaluation.studies.fits import (
    PAPER,
    SERIES,
    FitPoint,
    FitReport,
    measure_fits,
    plot,
)  # fmt: skip


def test_fits_are_counted_and_their_edits_graded() -> None:
    pipe = load_avatars()
    pipe.set_progress_bar_config(disable=True)
    series = {"no identity": [None], "lora": [{"num_steps": 2, "batch_size": 3}]}
    bare, fitted = measure_fits(pipe, [3], series=series, num_inference_steps=4).points
    assert (bare.num_steps, bare.evaluations, bare.backward_evaluations, bare.seconds) == (0, 0, 0, 0)
    assert (fitted.num_steps, fitted.evaluations, fitted.backward_evaluations) == (2, 4 + 3 * 3, 3 * 3)
    # 4 for the mask; two steps, and the gradient that the adapters start along
    assert fitted.scores.shape == (1, 4) and fitted.seconds > 0
    (row,) = measure_edits(pipe, ["no identity"], people=[3], num_inference_steps=4).rows
    assert bare.scores[0] == pytest.approx([row.whole, row.inside, row.outside, row.done], abs=1e-6)
    assert np.abs(fitted.scores - bare.scores).max() > 1e-3 and not pipe.identities


def point(series: str, shift: float, seconds: float = 8.0, steps: int = 9) -> FitPoint:
    scores = np.random.default_rng(3).normal(25, 3, (40, 4)) + np.random.default_rng(4).normal(shift, 0.5, (40, 1))
    return FitPoint(series, steps, scores, seconds, 40, 36)


def test_the_table_and_the_picture_show_every_row(tmp_path: Path) -> None:
    points = [point("no identity", -1, 0.0, 0), point(PAPER, 0, 64.0, 400), *(point("lora", 0, s) for s in (4.0, 8.0))]
    shown = FitReport(tuple(points)).table().splitlines()
    assert len(shown) == 2 + 4 and shown[-1].startswith("| lora | 9 | 40, 36 | 8.0 | 0.125 |")
    assert shown[3].count("+0.00 (+0.00 to +0.00)") == 2  # the paper's against itself
    pictures = []
    for seconds in (4.0, 30.0):
        more = (point("full", 1, seconds), point("full", 2, 2 * seconds))
        plot(FitReport((*points, *more)), str(tmp_path / "fits.png"))
        pictures.append(np.asarray(Image.open(tmp_path / "fits.png").convert("RGB")).astype(int))
    assert pictures[0].shape == pictures[1].shape and np.abs(pictures[0] - pictures[1]).max() > 100


def test_every_fit_is_one_that_the_pipeline_takes() -> None:
    taken = inspect.signature(S2EditPipeline.fit_identity).parameters
    assert SERIES[PAPER] == [{"preset": "paper"}] and SERIES["the defaults"] == [{}]
    for fits in SERIES.values():
        assert all(set(fit or {}) <= set(taken) for fit in fits)
