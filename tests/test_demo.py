"""The command line's demo, from arguments to the sheet."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from s2edit_pipeline import cli
from s2edit_pipeline.avatars.world import render, sample_person


def test_the_demo_ends_with_a_sheet_and_its_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    assert cli.main(["demo", "--out", str(out), "--fit-steps", "2", "--steps", "4"]) == 0
    report = json.loads((out / "report.json").read_text())
    assert len(report["edits"]) >= 3
    assert all(np.isfinite([e["whole"], e["inside"], e["outside"]]).all() for e in report["edits"])
    assert (out / "identity" / "identity.json").exists()
    sheet = np.asarray(Image.open(out / "sheet.png"))
    # the source is the first cell of the first row, drawn larger: its mean colour is the picture's own
    cell = sheet[22 + 8 + 22 : 22 + 8 + 22 + 192, 8 : 8 + 192]
    source = np.asarray(render(sample_person(3, "held_out")))
    assert np.abs(cell.mean((0, 1)) - source.mean((0, 1))).max() < 1.5
    printed = capsys.readouterr().out
    for edit in report["edits"]:
        assert edit["name"] in printed


def test_a_picture_of_ones_own(tmp_path: Path) -> None:
    render(sample_person(9, "held_out")).save(tmp_path / "mine.png")
    command = ["demo", "--out", str(tmp_path / "out"), "--fit-steps", "1", "--steps", "3"]
    command += ["--image", str(tmp_path / "mine.png"), "--prompt", "a photo of a man", "--subject", "man"]
    assert cli.main([*command, "--edit", "a photo of a smiling man", "--edit", "a man/person"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [e["name"] for e in report["edits"]] == ["a photo of a smiling man", "a man/person"]
    assert (tmp_path / "out" / "2-a-man-person.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "there-is-none.png", "--prompt", "a man", "--subject", "man", "--edit", "a man"], "not a file"),
        (["--image", "x.png"], "--prompt"),
        (["--prompt", "a man"], "--image"),
        (["--inversion", "nonsense"], "unknown"),
        (["--image", "pyproject.toml", "--prompt", "a man", "--subject", "man", "--edit", "a man"], "can't be read"),
    ],
)
def test_arguments_that_cannot_be_used(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", "--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_edit_without_the_subject_is_refused_before_the_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    render(sample_person(9, "held_out")).save(tmp_path / "mine.png")
    command = ["demo", "--out", str(tmp_path / "out"), "--image", str(tmp_path / "mine.png"), "--subject", "man"]
    for edit in ("a photo of a lady", "a photo of a woman"):
        assert cli.main([*command, "--prompt", "a photo of a man", "--edit", edit]) == 2
        assert "'man'" in capsys.readouterr().err
    assert cli.main([*command, "--prompt", "a man", "--edit", "a sad man", "--mask", "nowhere.png"]) == 2
    assert "mask='nowhere.png' is not a file" in capsys.readouterr().err
    assert not (tmp_path / "out" / "identity").exists()


def test_it_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    """Where no test has imported anything before it."""
    command = [sys.executable, "-m", "s2edit_pipeline", "demo", "--out", str(tmp_path / "demo")]
    done = subprocess.run([*command, "--fit-steps", "1", "--steps", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "demo" / "sheet.png").is_file() and "PSNR to the truth" in done.stdout
