"""Rows are measured once, kept as they come, and compared by subject."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from s2edit_pipeline.evaluation.methods.pipeline_arguments import PipelineArguments
from s2edit_pipeline.evaluation.studies.prompts import FITS, PromptReport, PromptRow, chosen_fits, measure_prompts
from s2edit_pipeline.pipeline import S2EditPipeline

QUICK = {"num_steps": 1, "lora_layers": "attention", "lora_init": "random", "height": 32, "width": 32}
ONE_STEP = {
    "no identity": PipelineArguments(fit=None, edit={"height": 32, "width": 32, "output_size": "picture"}),
    "kept": PipelineArguments(fit={**QUICK, "response_loss_weight": 1.0}, edit={"height": 32, "width": 32}),
}


def test_rows_are_kept_and_not_measured_again(pipe: S2EditPipeline, tmp_path: Path, monkeypatch: Any) -> None:
    file = tmp_path / "rows" / "rows.jsonl"
    arguments: dict[str, Any] = {"prompts": ("short",), "fits": ONE_STEP, "num_inference_steps": 2}
    first = measure_prompts(pipe, [("person", 0)], file, **arguments)
    lines = file.read_text().splitlines()
    assert [json.loads(line)["fit"] for line in lines] == ["no identity", "kept"]
    more = measure_prompts(pipe, [("person", 0), ("creature", 0)], file, **arguments)
    assert len(file.read_text().splitlines()) == 4 and more.rows[:2] == first.rows
    assert [row.subject for row in more.rows] == ["person-0", "person-0", "creature-0", "creature-0"]
    measure_prompts(pipe, [("person", 0)], file, **{**arguments, "num_inference_steps": 3})  # other rows
    assert len(file.read_text().splitlines()) == 6
    assert "person\n" in more.table() and "creature\n" in more.table()
    with pytest.raises(ValueError, match="not 'long'"):
        measure_prompts(pipe, [("person", 0)], file, prompts=("long",))


def test_differences_are_by_subject() -> None:
    values = {("a", "20"): 20.0, ("a", "kept"): 22.0, ("b", "20"): 30.0, ("b", "kept"): 31.0, ("c", "20"): 5.0}
    rows = tuple(PromptRow(f"person-{s}", "short", fit, v, v, v, 1.0, 2.0, "") for (s, fit), v in values.items())
    table = PromptReport(rows).table()
    assert "| short | 20 | 3 | 18.33 | 18.33 | 18.33 | 1.00 | 2.0 | - | - | - |" in table
    assert "| short | kept | 2 | 26.50 | 26.50 | 26.50 | 1.00 | 2.0 | +1.50 (+1.00 to +2.00) |" in table


def test_fits_are_chosen_by_name() -> None:
    assert list(chosen_fits(["20 steps"])) == ["20 steps"] and chosen_fits(None) == dict(FITS)
    with pytest.raises(ValueError, match="no fit 30 steps; choose from 'no identity'"):
        chosen_fits(["30 steps"])
