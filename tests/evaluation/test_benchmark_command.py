"""``s2edit bench`` from end to end, on the least that there can be."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from s2edit_pipeline.cli import main
from s2edit_pipeline.evaluation.benchmark import figures as benchmark_figures
from s2edit_pipeline.evaluation.benchmark.drawn_subjects import BenchmarkRun
from s2edit_pipeline.evaluation.benchmark.tuning import TUNING_FIRST, criterion
from s2edit_pipeline.evaluation.methods import registry as benchmark_methods
from s2edit_pipeline.evaluation.methods.pipeline_methods import ABLATION, PipelineMethod, Setting
from s2edit_pipeline.evaluation.methods.registry import entrants

SMALL = ["--people", "1", "--creatures", "0", "--edits", "2", "--steps", "2", "--device", "cpu"]
FITTED = ("S2Edit", "S2Edit, the paper's", *(f"ablation: {name}" for name in ("+ IFT", "+ SeC", "+ SpC")))


@pytest.fixture
def best(tmp_path: Path) -> Path:
    """Arguments that make every fit one step long."""
    path = tmp_path / "best.json"
    path.write_text(json.dumps({"methods": {name: {"fit": {"num_steps": 1}} for name in FITTED}}))
    return path


def test_a_run_reports_and_goes_on(tmp_path: Path, best: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["bench", "--out", str(tmp_path / "out"), "--settings", str(best), *SMALL]
    assert main([*argv, "--methods", "unedited", "S2Edit"]) == 0
    shown = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["methods"]["S2Edit"]["arguments"] == {"fit": {"num_steps": 1}}
    assert report["methods"]["S2Edit"]["edits"] == 2 and report["methods"]["unedited"]["means"]["done"]["mean"] == 0
    assert f"| S2Edit | 2 | {report['methods']['S2Edit']['means']['psnr']['mean']:.2f} [" in shown
    # what a rerun would do again would take other seconds
    before = (tmp_path / "out" / "records" / "S2Edit" / "person-1000" / "record.json").read_text()
    assert main([*argv, "--methods", "unedited", "S2Edit"]) == 0
    assert (tmp_path / "out" / "records" / "S2Edit" / "person-1000" / "record.json").read_text() == before
    capsys.readouterr()
    assert main([*argv, "--methods", "unedited", "--seed", "1"]) == 2
    assert "seed 0, not 1" in capsys.readouterr().err


def test_mistakes_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["bench", "--out", str(tmp_path), *SMALL]
    for more, message in (
        (["--methods", "magic"], "no method magic"),
        (["--method-model", "S2Edit"], "METHOD=FOLDER"),
        (["--tune", "--methods", "S2Edit"], "nothing to tune of S2Edit; tuned are null-text"),
        (["--settings", str(tmp_path / "none.json")], "none.json"),
    ):
        assert main([*argv, *more]) == 2
        assert message in capsys.readouterr().err
    assert main(["bench", "--list"]) == 0
    assert "DDIM + P2P" in capsys.readouterr().out


def test_tuning_writes_the_best_on_other_people(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = ({"edit": {"guidance_scale": 3.0}}, {"edit": {"guidance_scale": 6.0}})
    known = benchmark_methods.METHODS["direct + P2P"]
    known = benchmark_methods.Contender(known.make, grid, known.curve)
    monkeypatch.setitem(benchmark_methods.METHODS, "direct + P2P", known)
    path = tmp_path / "best.json"
    path.write_text('{"methods": {"S2Edit": {"edit": {"strength": 0.9}}}}')
    argv = ["bench", "--tune", "--out", str(tmp_path), "--settings", str(path), *SMALL, "--methods", "direct + P2P"]
    assert main(argv) == 0
    written = json.loads(path.read_text())
    assert written["subjects"] == {"direct + P2P": [["person", TUNING_FIRST]]} and "PSNR" in written["criterion"]
    assert written["methods"]["S2Edit"] == {"edit": {"strength": 0.9}}  # kept
    scores = {}
    for name, arguments in (("", {}), (" (guidance_scale=3.0)", grid[0]), (" (guidance_scale=6.0)", grid[1])):
        run = BenchmarkRun(
            tmp_path, (benchmark_methods.Entrant(f"direct + P2P{name}", "x"),), (("person", TUNING_FIRST),)
        )
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


def test_the_figures(tmp_path: Path, best: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_figures, "GUIDANCE", (1.0, 4.0))
    run = BenchmarkRun(tmp_path, entrants(["direct + P2P"], best), (("person", 1000),), edits=2, num_inference_steps=2)
    monkeypatch.setitem(
        benchmark_methods.METHODS,
        "direct + P2P",
        benchmark_methods.Contender(
            benchmark_methods.METHODS["direct + P2P"].make, (), ({"edit": {"guidance_scale": 2.0}},)
        ),
    )
    for number in (7, 9):
        path = benchmark_figures.draw_figure(number, run)
        assert path == tmp_path / f"figure-{number}" / f"figure-{number}.png" and path.stat().st_size > 5000
        points = json.loads((path.parent / "points.json").read_text())["direct + P2P"]
        assert len(points["outside"]) == len(points["aligned"]) == {7: 1, 9: 2}[number]
    assert points["outside"][0] > points["outside"][1]  # guidance moves more of the picture
    records = [json.loads(path.read_text()) for path in tmp_path.glob("figure-*/records/*/*/record.json")]
    assert len(records) == 3 and all(record["prepare"] is None and record["edit"]["cost"] for record in records)
    assert (tmp_path / "figure-9" / "figure-9-direct-P2P.png").is_file()


def _made_of(setting: Setting, name: str, pipe: Any, steps: int, fit: Any = None) -> PipelineMethod:
    return PipelineMethod(name, pipe, setting.with_changes(fit), steps)


def test_figure_8_shows_where_noun_and_token_look(tmp_path: Path, best: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(benchmark_figures, "save_sheet", lambda path, lines, *names: drawn.append((lines, names)))
    names = benchmark_figures.METHODS_OF[8]
    for name, setting in zip(names, ABLATION.values(), strict=True):  # null-text takes its time
        make = partial(_made_of, replace(setting, inversion="direct"))
        monkeypatch.setitem(benchmark_methods.METHODS, name, benchmark_methods.Contender(make))
    run = BenchmarkRun(tmp_path, entrants(names, best), (("person", 1000),), edits=1, num_inference_steps=2)
    benchmark_figures.draw_figure(8, run)
    ((lines, (titles, labels)),) = drawn
    assert len(lines) == len(labels) == 4 and all(len(line) == len(titles) for line in lines)
    assert lines[0][-1] is None and all(line[-1] is not None for line in lines[1:])  # null-text has no token
    assert [label.split(":")[0] for label in labels] == ["null-text", "+ IFT", "+ SeC", "+ SpC"]
    # spatial control cuts what [I] sees at the object's outline
    free, cut = (np.asarray(lines[i][-1]) for i in (2, 3))
    assert (cut == 0).mean() > 0.2 > (free == 0).mean()
    before = (tmp_path / "figure-8" / "report.json").read_text()
    monkeypatch.setattr(benchmark_figures, "load_model", None)  # everything is there already
    benchmark_figures.draw_figure(8, run)
    assert (tmp_path / "figure-8" / "report.json").read_text() == before
