"""The laws of evaluations, against what a tiny model is really asked; the fits, on data of known laws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from s2edit_pipeline.evaluation.costs.counts import count_unet
from s2edit_pipeline.evaluation.costs.laws import (
    call_evaluations,
    edit_evaluations,
    fit_line,
    fit_power,
    free_edit_evaluations,
    null_text_evaluations,
)
from s2edit_pipeline.evaluation.methods.pipeline_arguments import PROMPT_TO_PROMPT

SOURCE = "a photo of a smiling lady with glasses"
TARGETS = ["a photo of a sad lady with glasses", "a photo of a smiling lady", "a photo of a smiling man with glasses"]


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_inversions_and_edits_ask_as_often_as_the_law_says(pipe: Any, picture: Image.Image, steps: int) -> None:
    with count_unet(pipe.unet) as counts:
        inversion = pipe.invert(picture, SOURCE, num_inference_steps=steps)
    # one a step, and one at the noise that it ends in; the walk up asks at the levels 1, 1, 2, …, N - 1
    assert counts.evaluations == steps + (steps > 1)
    for stop, number in ((0.0, 1), (0.3, 3), (0.5, 1), (0.5, 2), (1.0, 1)):
        with count_unet(pipe.unet) as counts:
            pipe(TARGETS[:number], source_prompt=SOURCE, inversion=inversion, guidance_stop=stop)
        assert counts.evaluations == edit_evaluations(steps, number, stop), (stop, number)
    with count_unet(pipe.unet) as counts:
        pipe(TARGETS[:2], image=picture, source_prompt=SOURCE, num_inference_steps=steps)
    assert counts.evaluations == call_evaluations(steps, 2)


@pytest.mark.parametrize("number", [1, 3])
def test_null_text_where_nothing_stops_early(pipe: Any, picture: Image.Image, number: int) -> None:
    # far too much guidance: ten small steps of an embedding don't make up for it
    settings = {"num_inference_steps": 2, "guidance_scale": 500.0}
    with count_unet(pipe.unet) as counts:
        inversion = pipe.invert(picture, SOURCE, "null_text", **settings)
    assert (counts.evaluations, counts.backward_evaluations) == null_text_evaluations(2)
    with count_unet(pipe.unet) as counts:
        pipe(
            TARGETS[:number], source_prompt=SOURCE,
            inversion=inversion, **{**PROMPT_TO_PROMPT, "guidance_scale": 500.0},
        )  # fmt: skip
    assert (counts.evaluations, counts.backward_evaluations) == (free_edit_evaluations(2, number), 0)


def test_a_line_is_found_and_how_far_off_it_is() -> None:
    x = np.array([14.0, 26.0, 51.0, 126.0])
    fit = fit_line(x, 0.2 + 0.03 * x)
    assert (fit.intercept, fit.slope) == pytest.approx((0.2, 0.03)) and fit.residual < 1e-9
    assert fit.at(1000) == pytest.approx(30.2)
    # two points at each end, 10 % above and below: of relative distances the line between them is the best
    fit = fit_line([1.0, 1.0, 10.0, 10.0], [1.1, 0.9, 11.0, 9.0])
    weights = 1 / np.array([1.1, 0.9, 11.0, 9.0]) ** 2
    ends = [np.average([1.1, 0.9], weights=weights[:2]), np.average([11.0, 9.0], weights=weights[2:])]
    assert fit.at(1) == pytest.approx(ends[0]) and fit.at(10) == pytest.approx(ends[1])
    assert fit.residual == pytest.approx((1.1 - ends[0]) / 1.1)


def test_a_power_is_found_under_noise() -> None:
    x, rng = np.array([128.0, 192.0, 256.0, 512.0, 1024.0]), np.random.default_rng(0)
    exact = fit_power(x, 3e-7 * x**2.3)
    assert (exact.factor, exact.exponent) == pytest.approx((3e-7, 2.3)) and exact.residual < 1e-9
    assert exact.at(100) == pytest.approx(3e-7 * 100**2.3)
    noisy = fit_power(x, 3e-7 * x**2.3 * rng.uniform(0.95, 1.05, len(x)))
    assert noisy.exponent == pytest.approx(2.3, abs=0.1) and 0.001 < noisy.residual < 0.1


def test_too_little_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two different points"):
        fit_line([5.0, 5.0], [1.0, 1.1])
    with pytest.raises(ValueError, match=r"above 0, and there is -0\.1"):
        fit_power([1.0, 2.0], [0.3, -0.1])


def test_null_text_asks_ten_times_what_an_edit_does() -> None:
    """The factor by which an edit has to be cheaper, where no optimisation stops early."""
    for steps in (25, 50):
        forward, backward = null_text_evaluations(steps)
        assert forward + free_edit_evaluations(steps) + 2 * backward >= 10 * call_evaluations(steps)
