"""Manifests: what is written is read, in every form, and what can't be used is named."""

from __future__ import annotations

import argparse
import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2edit_pipeline.cli import main, make_parser
from s2edit_pipeline.many.manifest import Column, Manifest, text, value, whole_number
from s2edit_pipeline.many.work import Desk

COLUMNS = {"image": Column(text, required=True), "prompt": Column(text), "seed": Column(whole_number)}
ROWS: list[dict[str, Any]] = [
    {"image": "a.png", "prompt": 'a "lady",\nand a 猫', "seed": 7},
    {"image": "b.png", "prompt": "a man", "seed": 0},
    {"image": "c.png", "seed": 3},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n", "utf-8")
    elif path.suffix == ".csv":
        names = list(dict.fromkeys(name for row in rows for name in row))
        with open(path, "w", newline="", encoding="utf-8-sig") as file:  # as Excel writes it
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)
    else:
        arrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(arrow.Table.from_pylist(rows), path, row_group_size=2)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_every_form_is_read_alike_and_any_row_again(suffix: str, tmp_path: Path) -> None:
    manifest = Manifest(write(tmp_path / f"m{suffix}", ROWS), COLUMNS)
    rows = list(manifest)
    assert [(row.number, dict(row.cells)) for row in rows] == list(enumerate(ROWS, start=1))
    for row in reversed(rows):
        assert manifest.row_at(row.number, row.place) == row


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), min_size=1)), max_size=6))
def test_rows_of_a_csv_are_found_again_by_their_place(tmp_path_factory: Any, prompts: list[tuple[str]]) -> None:
    path = tmp_path_factory.getbasetemp() / "m.csv"
    written = io.StringIO()
    csv.writer(written, lineterminator="\n").writerows([("image", "prompt"), *(("a.png", p) for (p,) in prompts)])
    path.write_bytes(written.getvalue().encode("utf-8"))
    manifest = Manifest(path, COLUMNS)
    rows = list(manifest)
    assert [row.cells["prompt"] for row in rows] == [prompt for (prompt,) in prompts]
    assert [manifest.row_at(row.number, row.place) for row in rows] == rows


def test_values_of_arguments_are_json_or_text() -> None:
    read = [value(cell) for cell in ("0.5", "true", '{"smiling": 2}', "direct", 0.5, ["a"])]
    assert read == [0.5, True, {"smiling": 2}, "direct", 0.5, ["a"]]


def fit_many(*argv: str) -> argparse.Namespace:
    parsed: argparse.Namespace = make_parser([argv[0]]).parse_args([*argv, "--out", "out"])
    return parsed


@pytest.mark.parametrize(
    ("command", "name", "content", "said"),
    [
        ("fit-many", "m.csv", "image,promt\na.png,b\n", ["row 0", "'promt'", "'prompt'"]),
        ("fit-many", "m.csv", "prompt\na\n", ["row 0", "'image'"]),
        ("fit-many", "m.csv", "image,image\na.png,b\n", ["row 0", "'image'", "twice"]),
        ("fit-many", "m.csv", "", ["row 0", "empty"]),
        ("fit-many", "m.csv", "image,seed\na.png,1\nb.png,x\n", ["row 2", "'seed'", "'x'"]),
        ("fit-many", "m.csv", "image,seed\na.png,1\n,2\n", ["row 2", "'image'", "empty"]),
        ("fit-many", "m.csv", "image,seed\na.png,1,3\n", ["row 1", "3 cells"]),
        ("fit-many", "m.csv", "image,subject\na.png,lady\n", ["row 1", "'subject'", "'prompt'"]),
        ("fit-many", "m.csv", "image,token\na.png,ada\n", ["row 1", "'token'", "'ada'"]),
        ("fit-many", "m.csv", b"image\n\xff.png\n", ["row 1", "utf-8"]),
        ("fit-many", "m.jsonl", '{"image": "a.png"}\n{"image": 7}\n', ["row 2", "'image'", "text"]),
        ("fit-many", "m.jsonl", '{"image": "a.png"}\n{"imag": "a.png"}\n', ["row 2", "'imag'", "'image'"]),
        ("fit-many", "m.jsonl", '{"image": "a.png"}\n{"image"\n', ["row 2"]),
        ("fit-many", "m.jsonl", "[1]\n", ["row 1", "object"]),
        ("fit-many", "m.jsonl", '{"image": "a.png", "seed": 1.5}\n', ["row 1", "'seed'", "1.5"]),
        ("fit-many", "m.jsonl", '{"image": "a.png", "seed": true}\n', ["row 1", "'seed'", "True"]),
        ("fit-many", "m.jsonl", '{"image": "a.png", "seed": 1e999}\n', ["row 1", "'seed'"]),
        ("edit-many", "m.csv", "image,prompt,strength\na,b,0.5\na,b,7\n", ["row 2", "'strength'", "7"]),
        ("edit-many", "m.csv", "image,prompt,inversion\na,b,best\n", ["row 1", "'inversion'", "best"]),
        ("edit-many", "m.csv", "image,prompt,preset\na,b,best\n", ["row 1", "'preset'", "best"]),
        ("edit-many", "m.csv", "image,prompt,num_inference_steps\na,b,x\n", ["row 1", "'num_inference_steps'"]),
        ("edit-many", "m.csv", "image,prompt,latents\na,b,x\n", ["row 0", "'latents'"]),
        ("edit-many", "m.csv", "image,prompt,seed,inversion\na,b,1,direct\n", ["row 1", "'seed'", "no noise"]),
        ("edit-many", "m.csv", "image,prompt,blend_words,blend_threshold\na,b,false,0.3\n", ["row 1", "threshold"]),
        ("edit-many", "m.txt", "image\n", [".csv"]),
    ],
)  # fmt: skip
def test_a_bad_manifest_is_refused_before_any_work_in_one_line(
    command: str,
    name: str,
    content: str | bytes,
    said: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("s2edit_pipeline.many.command.load_model", lambda args: pytest.fail("work was begun"))
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main([command, name, "--out", "out"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert all(word in line for word in said), line


def test_files_are_looked_for_beside_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("image\na.png\n")
    manifest = Desk(fit_many("fit-many", str(tmp_path / "m.csv"))).manifest
    assert manifest.file("a.png") == str(tmp_path / "a.png") and manifest.file("https://x/a.png") == "https://x/a.png"
    assert manifest.file("/elsewhere/a.png") == "/elsewhere/a.png"


def test_without_ray_several_workers_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.data", None)
    (tmp_path / "m.csv").write_text("image\na.png\n")
    assert main(["fit-many", str(tmp_path / "m.csv"), "--out", str(tmp_path / "out"), "--workers", "2"]) == 2
    assert "s2edit-pipeline[ray]" in capsys.readouterr().err and not (tmp_path / "out").exists()
