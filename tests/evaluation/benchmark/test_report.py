"""The report's numbers, recomputed by hand from the records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from s2edit_pipeline.evaluation.benchmark.drawn_subjects import DrawnRun
from s2edit_pipeline.evaluation.benchmark.report import METRICS, make_report, markdown, write_report
from s2edit_pipeline.evaluation.methods.registry import MethodSpec

SUBJECTS = tuple(("person", 1000 + i) for i in range(6))


@pytest.fixture
def run(tmp_path: Path) -> DrawnRun:
    """Records of invented scores: "ours" on all subjects but a failure, "theirs" with another edit missing."""
    run = DrawnRun(tmp_path, tuple(MethodSpec(name, "unedited") for name in ("ours", "theirs", "absent")), SUBJECTS)
    rng = np.random.default_rng(0)
    for shift, spec in enumerate(run.methods[:2]):
        for i, subject in enumerate(SUBJECTS):
            record: dict[str, Any] = {"name": spec.name, "error": None}
            if (spec.name, i) == ("ours", 5):
                record["error"] = "RuntimeError: out of luck"
            else:
                edits = [_row(rng, i, n, 2.0 * shift) for n in range(1 + i % 3)]
                stages = {stage: {"cost": 10 * (i + 1), "seconds": i / 10} for stage in ("prepare", "edit")}
                record |= {"edits": edits, **stages}
            folder = run.folder(spec, subject)
            folder.mkdir(parents=True)
            (folder / "record.json").write_text(json.dumps(record))
    return run


def _row(rng: np.random.Generator, subject: int, number: int, shift: float) -> dict[str, Any]:
    scores: dict[str, Any] = {m.name: float(subject + shift + rng.random()) for m in METRICS}
    scores |= {"done": bool(rng.random() < 0.5), "unchanged": False, "identity": None if number == 0 else 1.0 + shift}
    return {"name": f"edit {number}", "category": ("hat", "glasses", "mood")[number], **scores}


def _records(run: DrawnRun, name: str) -> dict[int, dict[str, Any]]:
    spec = next(e for e in run.methods if e.name == name)
    values = {n: json.loads((run.folder(spec, (k, n)) / "record.json").read_text()) for k, n in SUBJECTS}
    return {n: record for n, record in values.items() if record["error"] is None}


def test_means_are_over_edits(run: DrawnRun) -> None:
    report = make_report(run, {}, "ours")["methods"]
    for name, number in (("ours", 9), ("theirs", 12)):
        rows = [row for record in _records(run, name).values() for row in record["edits"]]
        assert report[name]["edits"] == len(rows) == number
        for metric in ("psnr", "done", "outside"):
            assert report[name]["means"][metric]["mean"] == pytest.approx(np.mean([row[metric] for row in rows]))
        known = [row["identity"] for row in rows if row["identity"] is not None]
        assert report[name]["means"]["identity"]["mean"] == pytest.approx(np.mean(known))
        hats = [row["psnr"] for row in rows if row["category"] == "hat"]
        assert report[name]["categories"]["hat"]["psnr"] == pytest.approx(np.mean(hats))
        assert "identity" not in report[name]["categories"]["hat"]
    costs = [10 * (i + 1) for i in range(5)]
    assert report["ours"]["cost"]["cost_prepare"] == pytest.approx(np.mean(costs))
    assert report["ours"]["cost"]["cost_edit"] == pytest.approx(np.mean([c / (1 + i % 3) for i, c in enumerate(costs)]))


def test_differences_are_paired_and_their_intervals_draw_subjects(run: DrawnRun) -> None:
    report = make_report(run, {}, "ours")["methods"]
    ours, theirs = _records(run, "ours"), _records(run, "theirs")
    differences = {
        n: [b["psnr"] - a["psnr"] for a, b in zip(ours[n]["edits"], theirs[n]["edits"], strict=True)] for n in ours
    }
    flat = [d for some in differences.values() for d in some]
    values = report["theirs"]["paired"]["psnr"]
    assert values["mean"] == pytest.approx(np.mean(flat)) and len(flat) == 9  # the failed subject has no pair
    keys, means = list(differences), []
    for draw in np.random.default_rng(0).integers(0, 5, (10_000, 5)):
        means.append(np.mean([d for i in draw for d in differences[keys[i]]]))
    low, high = np.percentile(means, [2.5, 97.5])
    assert (values["low"], values["high"]) == pytest.approx((low, high))
    assert "paired" not in report["ours"]
    # subjects differ by more than the methods, and pairs don't feel it
    unpaired = report["theirs"]["means"]["psnr"]
    assert high - low < 0.7 * (unpaired["high"] - unpaired["low"])


def test_nothing_is_left_out_in_silence(run: DrawnRun) -> None:
    text = markdown(make_report(run, {"absent": "FileNotFoundError: no weights"}, "ours"))
    assert "- absent could not be made. FileNotFoundError: no weights" in text
    assert "- ours failed on person 1005: RuntimeError: out of luck" in text
    assert "not measured" in text and "FID needs" in text
    assert f"| theirs | 12 | {make_report(run, {}, 'ours')['methods']['theirs']['means']['psnr']['mean']:.2f} [" in text


def test_the_files(run: DrawnRun) -> None:
    path = write_report(run, {}, "theirs")
    assert path.read_text("utf-8") == markdown(json.loads((run.out / "report.json").read_text()))
    for name in ("trade-off.png", "differences.png", "sheet.png"):
        assert (run.out / name).stat().st_size > 5000
