"""``s2edit measure``: every measure takes its own flags, refuses all others, and passes them on."""

from __future__ import annotations

import argparse
import json
import re
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from s2edit_pipeline import avatars
from s2edit_pipeline.cli import main
from s2edit_pipeline.evaluation import measure_command
from s2edit_pipeline.evaluation.costs import cuda, memory, scaling
from s2edit_pipeline.evaluation.costs import edits as edit_costs
from s2edit_pipeline.evaluation.measure_command import MEASURES, as_json
from s2edit_pipeline.evaluation.studies import base_model, compositions, descriptions, edits, fits, inversions


@dataclass
class Report:
    arguments: dict[str, Any]

    def table(self) -> str:
        return f"the table of {self.arguments}"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Measurements, plots and sheets so far; none is made."""
    events: list[tuple[str, Any]] = []

    def stand_in(module: types.ModuleType, name: str) -> None:
        def measure(*args: Any, **more: Any) -> Report:
            events.append((name, {"args": [len(a) if isinstance(a, (range, list)) else a for a in args[1:]], **more}))
            return Report(events[-1][1])

        monkeypatch.setattr(module, name, measure)

    for module, name in (
        (base_model, "measure_base_model"), (inversions, "measure_inversions"), (edits, "measure_edits"),
        (edits, "measure_steps"), (compositions, "measure_compositions"), (fits, "measure_fits"),
        (descriptions, "measure_descriptions"),
        (memory, "measure_memory"), (edit_costs, "measure_edit_costs"), (scaling, "measure_scaling"),
    ):  # fmt: skip
        stand_in(module, name)
    monkeypatch.setattr(cuda, "measure_cuda_costs", lambda names, **more: Report({"names": names, **more}))
    for module in (fits, scaling):
        monkeypatch.setattr(module, "plot", lambda report, path: events.append(("plot", path)))
    monkeypatch.setattr(avatars, "load_avatars", lambda: types.SimpleNamespace(set_progress_bar_config=lambda **_: 0))
    return events


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ("base-model --captions 8 --steps 3", {"num_captions": 8, "num_pairs": 2, "num_inference_steps": 3, "seed": 0}),
        ("inversions --people 2", {"people": range(2), "num_inference_steps": 50}),
        ("edits --setting λ --setting full --seed 4", {"args": [2], "num_inference_steps": 25, "seed": 4}),
        ("compositions --people 6", {"args": [6], "num_inference_steps": 25, "seed": 0}),
        ("fits --people 9 --steps 2", {"args": [9], "num_inference_steps": 2, "seed": 0}),
        ("describe --people 2 --creatures 3", {"args": [2, 3]}),
        ("steps --people 9", {"people": range(9), "seed": 0}),
        ("memory --steps 3", {"args": [3]}),
        ("costs --steps 7 --items first further", {"args": [7, 5], "items": ["first", "further"], "side": None}),
        ("costs --side 256", {"args": [50, 5], "items": tuple(edit_costs.ITEMS), "side": 256}),
        ("scaling --repeats 3", {"repeats": 3}),
    ],
)
def test_flags_reach_the_measurement(calls: list[tuple[str, Any]], options: str, arguments: dict[str, Any]) -> None:
    assert main(["measure", *options.split()]) == 0
    ((_, passed),) = calls
    assert passed == {"args": [], **arguments}


def test_confinement_is_some_settings_on_varied_edits(calls: list[tuple[str, Any]]) -> None:
    assert main("measure confinement --people 3".split()) == 0
    ((name, passed),) = calls
    assert name == "measure_edits" and passed["args"] == [edits.CONFINEMENT] and passed["people"] == range(3)


def test_random_models_are_measured_instead(calls: list[tuple[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main("measure costs --random sdxl sd15 --sides 64 --tiny --repeats 2 --json".split()) == 0
    passed = json.loads(capsys.readouterr().out)["arguments"]
    assert passed == {
        "names": ["sdxl", "sd15"], "tiny": True, "sides": [64], "num_inference_steps": 2, "num_fit_steps": 2,
        "repeats": 2,
    }  # fmt: skip


def test_tables_are_printed_and_json_is_printed_or_saved(
    calls: list[tuple[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "measured.json"
    assert main(["measure", "scaling", "--plot", "there.png", "--json", str(out)]) == 0
    assert capsys.readouterr().out.startswith("the table of {")
    saved = json.loads(out.read_text("utf-8"))
    assert saved == {"arguments": {"args": [], "repeats": 5}} and calls[-1] == ("plot", "there.png")
    assert main(["measure", "scaling", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == saved


@pytest.mark.parametrize(
    "options",
    [
        "edits --people 20", "steps --steps 5", "scaling --steps 5", "memory --people 2", "inversions --sheet s.png",
        "confinement --setting full", "base-model --repeats 2", "fits --sheet s.png", "compositions --plot p.png",
        "costs --people 2",
    ],
)  # fmt: skip
def test_flags_of_other_measures_are_refused(
    calls: list[tuple[str, Any]], options: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["measure", *options.split()])
    assert end.value.code == 2 and not calls
    assert f"unrecognized arguments: {' '.join(options.split()[1:])}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("costs --items edit", "The item 'edit' is unknown; choose from stock, first"),
        ("costs --sides 512", "--sides is for --random MODEL"),
        ("costs --tiny", "--tiny is for --random MODEL"),
        ("costs --random sd15 --items first", "--items doesn't go with --random"),
        ("costs --random sd15 --side 64", "--side doesn't go with --random"),
        ("costs --random sd15 --model there", "--model doesn't go with --random"),
        ("edits --setting best", "There is no setting best; choose from the defaults"),
    ],
)
def test_arguments_that_cannot_be_used_are_told(
    options: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure_command, "_load", lambda args: None)
    assert main(["measure", *options.split()]) == 2
    assert message in capsys.readouterr().err


def test_every_measure_in_the_docs_is_one_that_is_understood() -> None:
    """Each ``s2edit measure`` in docs, with its flags."""
    parser = argparse.ArgumentParser()
    measure_command.add_arguments(parser)
    docs = Path(__file__).parents[2] / "docs"
    commands = [
        command
        for page in sorted(docs.glob("*.md"))
        for command in re.findall(r"s2edit measure ([^`#\n]*)", page.read_text("utf-8"))
    ]
    assert {command.split()[0] for command in commands} == set(MEASURES)
    for command in commands:
        words = re.findall(r'"([^"]*)"|(\S+)', command)
        parser.parse_args([quoted or plain for quoted, plain in words])


def test_json_holds_numbers_and_words() -> None:
    @dataclass
    class Row:
        scores: np.ndarray
        name: str = "a"
        pictures: list[Any] = field(default_factory=list, metadata={"json": False})

    value = {"rows": (Row(np.array([1.0, np.nan])),), 3: np.float32(0.5), "far": float("-inf"), "none": None, "b": True}
    wanted = {"rows": [{"scores": [1.0, None], "name": "a"}], "3": 0.5, "far": None, "none": None, "b": True}
    assert as_json(value) == wanted and json.loads(json.dumps(as_json(value), allow_nan=False)) == wanted
