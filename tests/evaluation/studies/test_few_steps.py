"""Quality at few steps: the same fits, the same edits."""

from __future__ import annotations

import pytest

from s2edit_pipeline import load_avatars
from s2edit_pipeline.evaluation.studies import few_steps
from s2edit_pipeline.evaluation.studies.edits import measure_edits


def test_rows_share_their_fits_and_differ_in_their_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = load_avatars()
    pipe.set_progress_bar_config(disable=True)
    fits, fit = [], pipe.fit_identity
    monkeypatch.setattr(pipe, "fit_identity", lambda *a, **k: fits.append(k) or fit(*a, **k))
    monkeypatch.setattr(few_steps, "FEW", 2)
    monkeypatch.setattr(few_steps, "MANY", 4)
    report = few_steps.measure_steps(pipe, (2, 4), people=[3], num_steps=2)
    assert [row.name for row in report.rows] == ["2 steps", "4 steps", "2 steps, fixed point"] and len(fits) == 1
    (alone,) = measure_edits(pipe, ["the defaults"], people=[3], num_inference_steps=2, num_steps=2)
    few, many, other = report.rows
    assert other.whole != few.whole
    assert (few.whole, few.inside, few.outside) == pytest.approx((alone.whole, alone.inside, alone.outside), abs=0.05)
    wanted = [many.whole - few.whole, many.inside - few.inside, many.outside - few.outside]
    assert [target.value for target in report.targets] == wanted
    assert [target.met for target in report.targets] == [difference <= 0.5 for difference in wanted]
    assert "2 steps below 4, inside, dB" in report.table()
