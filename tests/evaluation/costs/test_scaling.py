"""Scaling: real calls and counts, made-up seconds of a known law."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from s2edit_pipeline import load_avatars
from s2edit_pipeline.evaluation.costs import scaling as scaling_study
from s2edit_pipeline.evaluation.costs.counts import count_unet
from s2edit_pipeline.evaluation.costs.timing import Timing


def test_the_law_is_found_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def turns(runs: Mapping[str, Callable[[], Any]], unet: Any, repeats: int) -> dict[str, Timing]:
        timings = {}
        for name, run in runs.items():
            with count_unet(unet) as counts:
                side = run().images[0].width
            seconds = 0.1 + 2e-6 * side**1.5 * counts.evaluations
            timings[name] = Timing((seconds,) * repeats, counts, None)
        return timings

    monkeypatch.setattr(scaling_study, "take_turns", turns)
    pipe = load_avatars()
    pipe.set_progress_bar_config(disable=True)
    scaling = scaling_study.measure_scaling(pipe, steps=(1, 2, 3, 4), sides=(64, 96), edits=(1, 2), repeats=1)
    measured = [(p.steps, p.side, p.edits, p.evaluations) for p in scaling.points]
    assert measured == [
        (1, 64, 1, 3), (2, 64, 1, 6), (3, 64, 1, 9), (4, 64, 1, 12), (1, 96, 1, 3), (2, 96, 1, 6), (3, 96, 1, 9),
        (3, 64, 2, 14),
    ]  # fmt: skip
    assert scaling.slopes is not None and scaling.slopes.exponent == pytest.approx(1.5)
    for fit, side in ((scaling.by_side[64], 64), (scaling.by_side[96], 96), (scaling.by_edits, 64)):
        assert (fit.intercept, fit.slope) == pytest.approx((0.1, 2e-6 * side**1.5)) and fit.residual < 1e-9
    assert "b grows like side^1.50" in scaling.table()
    scaling_study.plot(scaling, tmp_path / "scaling.png")
    drawn = np.asarray(Image.open(tmp_path / "scaling.png").convert("L"))
    panels = np.array_split(drawn, 3, axis=1)
    assert all((panel < 200).mean() > 0.01 for panel in panels)
