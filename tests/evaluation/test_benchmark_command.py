"""``s2edit bench`` from end to end, on the least that there can be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from s2edit_pipeline.cli import main

SMALL = ["--people", "1", "--creatures", "0", "--edits", "2", "--steps", "2", "--device", "cpu"]


@pytest.fixture
def best(tmp_path: Path) -> Path:
    """Arguments that make the fit one step long."""
    path = tmp_path / "best.json"
    path.write_text(json.dumps({"methods": {"S2Edit": {"fit": {"num_steps": 1}}}}))
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


def test_prompts_may_say_less(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["bench", "--out", str(tmp_path), *SMALL, "--methods", "unedited", "autoencoder alone"]
    assert main([*argv, "--prompts", "short"]) == 0
    assert "short prompts" in capsys.readouterr().out
    record = json.loads((tmp_path / "records" / "unedited" / "person-1000" / "record.json").read_text())
    assert record["settings"]["prompts"] == "short"
    assert all(len(edit["prompt"].split()) < 12 for edit in record["edits"])
    assert main(argv) == 2
    assert "prompts 'short', not 'complete'" in capsys.readouterr().err


def test_mistakes_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["bench", "--out", str(tmp_path), *SMALL]
    for more, message in (
        (["--methods", "magic"], "no method magic"),
        (["--method-model", "S2Edit"], "METHOD=FOLDER"),
        (["--tune", "--methods", "S2Edit"], "nothing to tune of S2Edit; tuned are null-text"),
        (["--settings", str(tmp_path / "none.json")], "none.json"),
        (["--baseline", "SDEdit", "--methods", "unedited"], "--baseline 'SDEdit' takes no part; choose from unedited"),
        (["--tune", "--baseline", "SDEdit"], "--baseline is for the report"),
        (["--figure", "9", "--baseline", "SDEdit"], "--baseline is for the report"),
        (["--figure", "9", "--prompts", "short"], "--prompts is for the report"),
        (["--tune", "--prompts", "short"], "--prompts is for the report"),
    ):
        assert main([*argv, *more]) == 2
        assert message in capsys.readouterr().err
    assert main(["bench", "--list"]) == 0
    assert "DDIM + P2P" in capsys.readouterr().out
