"""How sure a mean is: percentile bootstrap intervals, over single values or over whole groups of them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np


def bootstrap_interval(
    values: np.ndarray, groups: Sequence[Hashable] | None = None, *, seed: int = 0, draws: int = 10_000
) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the mean of ``values`` (N,).

    Args:
        groups: N, which of the values belong together, and are then drawn together: several edits of one subject are
            no independent values. None takes each for itself.

    Raises:
        ValueError: no values, or another number of groups.
    """
    values = np.asarray(values, np.float64)
    labels = range(len(values)) if groups is None else groups
    if len(values) == 0 or len(labels) != len(values):
        raise ValueError(f"There must be values, and a group for each; there are {len(values)} and {len(labels)}.")
    places = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    index = np.array([places[label] for label in labels])
    sums, counts = np.bincount(index, values), np.bincount(index)
    drawn = np.random.default_rng(seed).integers(0, len(counts), (draws, len(counts)))
    low, high = np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), [2.5, 97.5])
    return float(low), float(high)


def paired_difference(values: np.ndarray, reference: np.ndarray) -> tuple[float, float, float]:
    """Mean of ``values - reference`` (N,), over the same N subjects, and the two ends of its 95 % interval."""
    difference = values - reference
    return (float(difference.mean()), *bootstrap_interval(difference))
