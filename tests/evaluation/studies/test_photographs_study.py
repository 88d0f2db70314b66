"""Avatars in photographs: where they are, and what is counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from s2edit_pipeline import load_avatars
from s2edit_pipeline.avatars.world import changed_pixels, render
from s2edit_pipeline.evaluation.metrics.pixels import psnr
from s2edit_pipeline.evaluation.studies import photographs as study
from s2edit_pipeline.evaluation.studies.photographs import ALONE, FOUND, SIDES, SIZE, TOLD, WHOLE


def test_each_scene_holds_its_person_and_is_the_photograph_elsewhere() -> None:
    scenes = study.scenes(12)
    assert scenes[:5] == study.scenes(5) and len({scene.person for scene in scenes}) == 12
    sides = [scene.side for scene in scenes]
    assert min(sides) == SIDES[0] and max(sides) > 330 and max(sides) <= SIDES[1]
    for scene in scenes[:2]:
        picture, empty = scene.photograph(), study.background(scene.background)
        assert picture.size == empty.size == SIZE
        assert np.array_equal(np.asarray(scene.part(picture)), np.asarray(render(scene.person, scene.side)))
        differs = (np.asarray(picture) != np.asarray(empty)).any(-1)
        left, top, right, bottom = scene.box
        differs[top:bottom, left:right] = False
        assert not differs.any() and right <= SIZE[0] and bottom <= SIZE[1]


def test_the_truth_scores_as_the_truth(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A fit and an edit that answer with the photograph of the target; one way's outside is disturbed."""
    pipe = load_avatars()
    (scene,) = study.scenes(1)
    calls: list[object] = []

    def edit(self: study._Call, picture: Image.Image, person: object, targets: list[str], crop: object) -> object:
        calls.append(crop)
        answers = []
        for each in scene.edits():
            answer = picture.copy()
            answer.paste(render(each.target, scene.side), (0, 0) if picture.size != SIZE else scene.place)
            if crop is None and picture.size == SIZE:
                answer.putpixel((3, 3), (1, 2, 3))
            answers.append(answer)
        box = None if crop is None else ",".join(map(str, scene.box))
        return type("Identity", (), {"settings": {"crop": box}}), answers

    monkeypatch.setattr(study._Call, "edit", edit)
    report = study.measure_photographs(pipe, 1, folder=tmp_path)
    assert calls == [scene.box, "auto", None, None]
    first = scene.edits()[0]
    changed = changed_pixels(scene.person, first.target, scene.side)
    before = psnr(render(scene.person, scene.side), render(first.target, scene.side), changed)
    for row in report.rows:
        assert row.inside == float("inf") and (row.edit != first.name or row.unedited_inside == before)
        assert np.isinf(row.outside) == (row.way != WHOLE)
        assert row.overlap == (1.0 if row.way != WHOLE else pytest.approx(scene.side**2 / (SIZE[0] * SIZE[1])))
    assert np.mean([row.done for row in report.rows]) > 0.9
    assert study.measure_photographs(pipe, 1, folder=tmp_path) == report and len(calls) == 4  # it goes on
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('[{"scene": 1')  # cut short
    assert study.measure_photographs(pipe, 1, ways=[TOLD], folder=tmp_path).rows == tuple(report.of(TOLD))
    assert study.sheet(tmp_path, [0], side=64).size == (6 * 72 + 8, 64 + 22 + 8 + 8)


def test_the_table_compares_with_the_avatar_alone() -> None:
    def row(way: str, inside: float, outside: float = float("inf")) -> study.PhotographRow:
        return study.PhotographRow(0, way, 100, "smiling", inside, 9.0, outside, True, 1.0, 2.0)

    rows = (row(TOLD, 20.5), row(FOUND, 12.0, 30.0), row(ALONE, 20.0))
    lines = study.PhotographReport(rows).table().splitlines()
    assert lines[2] == f"| {TOLD} | 1, 1 | 20.50 | +0.50 | 1.00 | 1.00 | 2.0 |"
    assert lines[3] == f"| {FOUND} | 1, 1 | 12.00 | -8.00 | 0.00 | 1.00 | 2.0 |"
    assert lines[4] == f"| {ALONE} | 1, 1 | 20.00 | - | - | 1.00 | 2.0 |"
    assert lines[5].startswith("| (the photograph as it was) | - | 9.00 |")
    with pytest.raises(ValueError, match="There is no way close; choose from close up, told where"):
        study.measure_photographs(None, 1, ways=["close"])
