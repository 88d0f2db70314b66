"""``s2edit bench --tune``: the winner of a grid, on people that the benchmark doesn't grade."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from s2edit_pipeline.cli import main
from s2edit_pipeline.evaluation.benchmark.drawn_subjects import DrawnRun
from s2edit_pipeline.evaluation.benchmark.tuning import TUNING_FIRST, criterion
from s2edit_pipeline.evaluation.methods import registry
from s2edit_pipeline.evaluation.methods.registry import MethodFactory, MethodSpec

SMALL = ["--people", "1", "--creatures", "0", "--edits", "2", "--steps", "2", "--device", "cpu"]


def test_tuning_writes_the_best_on_other_people(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = ({"edit": {"guidance_scale": 3.0}}, {"edit": {"guidance_scale": 6.0}})
    known = registry.METHODS["direct + P2P"]
    known = MethodFactory(known.make, grid, known.curve)
    monkeypatch.setitem(registry.METHODS, "direct + P2P", known)
    path = tmp_path / "best.json"
    path.write_text('{"methods": {"S2Edit": {"edit": {"strength": 0.9}}}}')
    argv = ["bench", "--tune", "--out", str(tmp_path), "--settings", str(path), *SMALL, "--methods", "direct + P2P"]
    assert main(argv) == 0
    written = json.loads(path.read_text())
    assert written["subjects"] == {"direct + P2P": [["person", TUNING_FIRST]]} and "PSNR" in written["criterion"]
    assert written["methods"]["S2Edit"] == {"edit": {"strength": 0.9}}  # kept
    scores = {}
    for name, arguments in (("", {}), (" (guidance_scale=3.0)", grid[0]), (" (guidance_scale=6.0)", grid[1])):
        run = DrawnRun(tmp_path, (MethodSpec(f"direct + P2P{name}", "x"),), (("person", TUNING_FIRST),))
        (record,) = [record for *_, record in run.records()]
        scores[json.dumps(arguments)] = sum(e["psnr"] if e["done"] else 0 for e in record["edits"]) / 2
        assert criterion([record]) == pytest.approx(scores[json.dumps(arguments)])
        assert written["scores"]["direct + P2P"][f"direct + P2P{name}"] == round(criterion([record]), 3)
    assert scores[json.dumps(written["methods"]["direct + P2P"])] == max(scores.values())
    assert "The best are in" in capsys.readouterr().out


def test_a_setting_that_fails_is_never_the_best() -> None:
    fine = {"error": None, "edits": [{"psnr": 20.0, "done": False}, {"psnr": 30.0, "done": True}]}
    assert criterion([fine]) == 15
    assert criterion([fine, {"error": "RuntimeError: x"}]) == float("-inf")
