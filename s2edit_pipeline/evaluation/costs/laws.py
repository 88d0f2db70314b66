"""What inversions and edits ask of the U-Net, in closed form, and the law of their seconds, fitted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...edit_settings import EditSettings


def edit_evaluations(
    num_inference_steps: int, num_edits: int = 1, guidance_stop: float = EditSettings.guidance_stop
) -> int:
    """Of edits in one call with a direct inversion that kept what they take over: each a conditional branch at every
    step, and an unconditional one at the steps before ``guidance_stop * N``."""
    return num_edits * (num_inference_steps + math.ceil(guidance_stop * num_inference_steps))


def call_evaluations(num_inference_steps: int, num_edits: int = 1) -> int:
    """Of a call that inverts, "direct", and edits: it keeps nothing for later, so the source is asked again, once for
    all edits, at the steps that take its attention over, the noisiest of which the walk up leaves out."""
    source_again = round(EditSettings.self_replace_steps * num_inference_steps)
    return num_inference_steps + source_again + edit_evaluations(num_inference_steps, num_edits)


def null_text_evaluations(num_inference_steps: int, num_inner_steps: int = 10) -> tuple[int, int]:
    """Evaluations and backward passes of null-text inversion (Mokady et al. 2023, algorithm 1) where no optimisation
    stops early: a step up; on the way down the conditional branch, the inner steps, and the step that they lead to."""
    return num_inference_steps * (1 + 1 + num_inner_steps + 1), num_inference_steps * num_inner_steps


def free_edit_evaluations(num_inference_steps: int, num_edits: int = 1) -> int:
    """Of edits guided to the end, beside a source that is pinned to nothing: all branches at every step."""
    return num_inference_steps * (2 + 2 * num_edits)


@dataclass(frozen=True)
class LineFit:
    """``intercept + slope * x``; ``residual`` is its largest distance from what was measured, as a share of that."""

    intercept: float
    slope: float
    residual: float

    def at(self, x: float) -> float:
        return self.intercept + self.slope * x


@dataclass(frozen=True)
class PowerFit:
    """``factor * x ** exponent``; ``residual`` as a line's."""

    factor: float
    exponent: float
    residual: float

    def at(self, x: float) -> float:
        return self.factor * x**self.exponent


def fit_line(x: Sequence[float], y: Sequence[float]) -> LineFit:
    """Least squares of the relative distances: a short run's seconds are as good as a long one's.

    Raises:
        ValueError: fewer than two different ``x``.
    """
    _check_points(x)
    measured = np.asarray(y, float)
    slope, intercept = np.polyfit(x, measured, 1, w=1 / measured)
    fitted = intercept + slope * np.asarray(x, float)
    return LineFit(float(intercept), float(slope), _largest_share(fitted, measured))


def fit_power(x: Sequence[float], y: Sequence[float]) -> PowerFit:
    """Least squares of the logarithms.

    Raises:
        ValueError: fewer than two different ``x``, or what no power can be.
    """
    _check_points(x)
    if min(*x, *y) <= 0:
        raise ValueError(f"A power is above 0, and there is {min(*x, *y):g}; with seconds, repeat more often.")
    measured = np.asarray(y, float)
    exponent, logarithm = np.polyfit(np.log(x), np.log(measured), 1)
    fitted = np.exp(logarithm) * np.asarray(x, float) ** exponent
    return PowerFit(float(np.exp(logarithm)), float(exponent), _largest_share(fitted, measured))


def _check_points(x: Sequence[float]) -> None:
    if len(set(x)) < 2:
        raise ValueError(f"A law needs at least two different points, not {list(x)}; measure more of them.")


def _largest_share(fitted: np.ndarray, measured: np.ndarray) -> float:
    return float(np.max(np.abs(fitted - measured) / np.abs(measured)))
