"""Bootstrap intervals: how often they cover, and groups drawn whole."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from s2edit_pipeline.evaluation.metrics.intervals import bootstrap_interval, paired_difference


def test_the_interval_covers_as_often_as_it_says() -> None:
    rng, hits = np.random.default_rng(0), 0
    for i in range(200):
        low, high = bootstrap_interval(rng.normal(3.0, 2.0, 40), seed=i, draws=1000)
        hits += low <= 3.0 <= high
    assert 0.88 <= hits / 200 <= 0.99
    low, high = bootstrap_interval(np.full(9, 2.5))
    assert low == high == 2.5


def test_groups_are_drawn_whole() -> None:
    rng = np.random.default_rng(1)
    groups = [g for g in "abcdefgh" for _ in range(1 + ord(g) % 3)]
    values = np.array([ord(g) / 3 for g in groups]) + rng.normal(0, 0.1, len(groups))
    # naive: lists joined, one draw at a time
    members = {g: [v for v, h in zip(values, groups, strict=True) if h == g] for g in dict.fromkeys(groups)}
    names, means = list(members), []
    for row in np.random.default_rng(0).integers(0, 8, (2000, 8)):
        means.append(np.mean([v for i in row for v in members[names[i]]]))
    wanted = np.percentile(means, [2.5, 97.5])
    assert bootstrap_interval(values, groups, draws=2000) == pytest.approx(tuple(wanted), abs=1e-9)
    low, high = bootstrap_interval(values, draws=2000)
    assert high - low < 0.9 * (wanted[1] - wanted[0])  # taken singly, the values would seem surer than they are


def test_nothing_has_no_interval() -> None:
    with pytest.raises(ValueError, match="0 and 0"):
        bootstrap_interval(np.array([]))
    with pytest.raises(ValueError, match="3 and 2"):
        bootstrap_interval(np.arange(3.0), ["a", "b"])


def test_the_interval_of_a_difference_is_that_of_pairs() -> None:
    rng = np.random.default_rng(3)
    people = rng.normal(25, 3, 40)
    values = people + rng.normal(0, 0.5, 40)
    reference = people + rng.normal(0.3, 0.4, 40)
    mean, low, high = paired_difference(values, reference)
    difference = values - reference
    wanted = stats.t.interval(0.95, 39, difference.mean(), stats.sem(difference))
    assert mean == pytest.approx(difference.mean()) and mean < 0
    assert (low, high) == pytest.approx(wanted, abs=0.1 * (wanted[1] - wanted[0]))
    assert high - low < 0.5  # people differ by 3 dB, which falls out
