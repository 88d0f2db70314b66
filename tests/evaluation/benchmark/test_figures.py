"""The paper's figures from end to end, on the least that there can be."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from s2edit_pipeline.evaluation.benchmark import figures
from s2edit_pipeline.evaluation.benchmark.drawn_subjects import DrawnRun
from s2edit_pipeline.evaluation.methods import registry
from s2edit_pipeline.evaluation.methods.pipeline_arguments import ABLATION, PipelineArguments
from s2edit_pipeline.evaluation.methods.pipeline_method import PipelineMethod
from s2edit_pipeline.evaluation.methods.registry import MethodFactory, method_specs

FITTED = ("S2Edit", "S2Edit, the paper's", *(f"ablation: {name}" for name in ("+ IFT", "+ SeC", "+ SpC")))


@pytest.fixture
def best(tmp_path: Path) -> Path:
    """Arguments that make every fit one step long."""
    path = tmp_path / "best.json"
    path.write_text(json.dumps({"methods": {name: {"fit": {"num_steps": 1}} for name in FITTED}}))
    return path


def test_the_figures(tmp_path: Path, best: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "GUIDANCE", (1.0, 4.0))
    run = DrawnRun(tmp_path, method_specs(["direct + P2P"], best), (("person", 1000),), edits=2, num_inference_steps=2)
    monkeypatch.setitem(
        registry.METHODS,
        "direct + P2P",
        MethodFactory(registry.METHODS["direct + P2P"].make, (), ({"edit": {"guidance_scale": 2.0}},)),
    )
    for number in (7, 9):
        path = figures.draw_figure(number, run)
        assert path == tmp_path / f"figure-{number}" / f"figure-{number}.png" and path.stat().st_size > 5000
        points = json.loads((path.parent / "points.json").read_text())["direct + P2P"]
        assert len(points["outside"]) == len(points["aligned"]) == {7: 1, 9: 2}[number]
    assert points["outside"][0] > points["outside"][1]  # guidance moves more of the picture
    records = [json.loads(path.read_text()) for path in tmp_path.glob("figure-*/records/*/*/record.json")]
    assert len(records) == 3 and all(record["prepare"] is None and record["edit"]["cost"] for record in records)
    assert (tmp_path / "figure-9" / "figure-9-direct-P2P.png").is_file()


def _made_of(base: PipelineArguments, name: str, pipe: Any, steps: int, fit: Any = None) -> PipelineMethod:
    return PipelineMethod(name, pipe, base.with_changes(fit), steps)


def test_figure_8_shows_where_noun_and_token_look(tmp_path: Path, best: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(figures, "save_sheet", lambda path, lines, *names: drawn.append((lines, names)))
    names = figures.METHODS_OF[8]
    for name, base in zip(names, ABLATION.values(), strict=True):  # null-text takes its time
        make = partial(_made_of, replace(base, inversion="direct"))
        monkeypatch.setitem(registry.METHODS, name, MethodFactory(make))
    run = DrawnRun(tmp_path, method_specs(names, best), (("person", 1000),), edits=1, num_inference_steps=2)
    figures.draw_figure(8, run)
    ((lines, (titles, labels)),) = drawn
    assert len(lines) == len(labels) == 4 and all(len(line) == len(titles) for line in lines)
    assert lines[0][-1] is None and all(line[-1] is not None for line in lines[1:])  # null-text has no token
    assert [label.split(":")[0] for label in labels] == ["null-text", "+ IFT", "+ SeC", "+ SpC"]
    # spatial control cuts what [I] sees at the object's outline
    free, cut = (np.asarray(lines[i][-1]) for i in (2, 3))
    assert (cut == 0).mean() > 0.2 > (free == 0).mean()
    before = (tmp_path / "figure-8" / "report.json").read_text()
    monkeypatch.setattr(figures, "load_model", None)  # everything is there already
    figures.draw_figure(8, run)
    assert (tmp_path / "figure-8" / "report.json").read_text() == before
