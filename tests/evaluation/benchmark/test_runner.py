"""The benchmark run: records, going on, refusals, failures. Its systems are drawn here; none asks the model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from s2edit_pipeline.avatars.world import render, sample
from s2edit_pipeline.evaluation.benchmark import drawn_subjects, runner
from s2edit_pipeline.evaluation.benchmark.drawn_subjects import DrawnRun, edits_of
from s2edit_pipeline.evaluation.benchmark.runner import read_record, run_benchmark
from s2edit_pipeline.evaluation.benchmark.scoring import score_edit
from s2edit_pipeline.evaluation.methods import registry
from s2edit_pipeline.evaluation.methods.registry import MethodFactory, MethodSpec, method_specs

SUBJECTS = (("person", 1000), ("person", 1001), ("creature", 1000))


@dataclass
class Blur:
    """Draws the picture softened; ``work`` is done at each preparation."""

    name: str
    pipe: Any
    radius: float
    work: Any = None

    def resolved(self) -> dict[str, Any]:
        return {"radius": self.radius}

    def prepare(self, picture: Image.Image, source_prompt: str, subject: str, seed: int) -> Any:
        if self.work is not None:
            self.work(self, picture, subject, seed)
        noisy = picture.filter(ImageFilter.GaussianBlur(self.radius))
        grain = torch.randint(0, 3, (), generator=torch.Generator().manual_seed(seed)).item()
        noisy = noisy.point(lambda v: v + grain)
        return lambda targets: [noisy] * len(targets)


@pytest.fixture
def preparations(make_pipe: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    """Preparations made so far; the methods "soft", "blind" and "absent" are known besides, and the model is tiny."""
    monkeypatch.setattr(runner, "load_model", lambda run: make_pipe())
    prepared: list[tuple[str, str, int]] = []

    def factory(work: Any = None) -> MethodFactory:
        def note(method: Blur, picture: Image.Image, subject: str, seed: int) -> None:
            prepared.append((method.name, subject, seed))
            if work is not None:
                work(method, subject)

        def make(name: str, pipe: Any, num_inference_steps: int, radius: float = 1.0) -> Blur:
            return Blur(name, pipe, radius, note)

        return MethodFactory(make, ({"radius": 0.3}, {"radius": 6.0}), ({"radius": 1.0}, {"radius": 3.0}))

    def fail(method: Blur, subject: str) -> None:
        if subject in ("cat", "dog", "monster"):
            raise RuntimeError("no eyes for it")

    def spoil(method: Blur, subject: str) -> None:
        with torch.no_grad():
            method.pipe.unet.conv_in.bias.add_(1)

    def refuse(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError("its weights are not here; pass --method-model absent=FOLDER")

    more = {
        "soft": factory(), "blind": factory(fail), "spoiler": factory(spoil), "absent": MethodFactory(refuse),
    }  # fmt: skip
    monkeypatch.setattr(registry, "METHODS", {**registry.METHODS, **more})
    return prepared


def _run(out: Path, *names: str, subjects: Sequence[tuple[str, int]] = SUBJECTS, **more: Any) -> DrawnRun:
    return DrawnRun(out, method_specs(names), tuple(subjects), **{"edits": 2, "num_inference_steps": 2, **more})


def test_records_hold_the_scores_of_the_pictures(tmp_path: Path, preparations: list[Any]) -> None:
    run = _run(tmp_path, "unedited", "soft", subjects=SUBJECTS[1:])
    assert run_benchmark(run) == {}
    assert len(list(run.records())) == 4
    for spec, subject, record in run.records():
        assert (record["name"], record["error"]) == (spec.name, None)
        assert record["subject"] == f"{subject[0]}-{subject[1]}"
        edits = edits_of(run, subject)
        strip = Image.open(run.folder(spec, subject) / "edits.png")
        assert strip.size == (2 * 128, 128) and len(record["edits"]) == len(edits) == 2
        for i, (edit, row) in enumerate(zip(edits, record["edits"], strict=True)):
            score = score_edit(edit, strip.crop((128 * i, 0, 128 * i + 128, 128)), _classifier(subject[0]))
            assert all(row[name] == value for name, value in vars(score).items())
            assert (row["name"], row["category"], row["prompt"]) == (edit.name, edit.category, edit.target_prompt)
        if spec.name == "unedited":
            assert np.array_equal(strip.crop((0, 0, 128, 128)), render(sample(*subject, "held_out")))
            assert all(row["unchanged"] and not row["done"] for row in record["edits"])


def _classifier(kind: str) -> Any:
    from s2edit_pipeline.evaluation.metrics.classifier import load_attribute_classifier

    return load_attribute_classifier(kind)


def test_a_stopped_run_goes_on_and_ends_the_same(tmp_path: Path, preparations: list[Any], monkeypatch) -> None:
    whole = _run(tmp_path / "whole", "soft", subjects=SUBJECTS[:2])
    run_benchmark(whole)
    assert [seed for *_, seed in preparations] == [1000, 1001]
    parts = replace(whole, out=tmp_path / "parts")
    real, calls = drawn_subjects.score_edit, []

    def killed(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 4:  # within the second record
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(drawn_subjects, "score_edit", killed)
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(parts)
    assert len(list(parts.records())) == 1
    preparations.clear()
    run_benchmark(parts)
    assert [seed for *_, seed in preparations] == [1001]  # the first isn't made again
    preparations.clear()
    run_benchmark(replace(parts, subjects=SUBJECTS))
    assert [seed for *_, seed in preparations] == [1000]  # more subjects are only added
    assert _without_seconds(parts) == _without_seconds(whole)


def _without_seconds(run: DrawnRun) -> str:
    records = [record for *_, record in run.records()]
    for record in records:
        for stage in ("prepare", "edit"):
            del record[stage]["seconds"]
    return json.dumps(records)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed 0, not 1"),
        ({"edits": 1}, "edits 2, not 1"),
        ({"num_inference_steps": 4}, "num_inference_steps 2, not 4"),
        (
            {"methods": (MethodSpec("soft", "soft", {"radius": 2.0}),)},
            r"arguments \{\}, not \{'radius': 2.0\}; resolved \{'radius': 1.0\}, not \{'radius': 2.0\}",
        ),
    ],
)
def test_records_of_other_settings_are_refused(
    tmp_path: Path, preparations: list[Any], change: Any, message: str
) -> None:
    run = _run(tmp_path, "soft", subjects=SUBJECTS[:1])
    run_benchmark(run)
    with pytest.raises(ValueError, match=f"records of 'soft' made with {message}.*another --out"):
        run_benchmark(replace(run, **change))
    assert len(preparations) == 1


def test_records_of_other_defaults_are_refused(tmp_path: Path, preparations: list[Any], monkeypatch) -> None:
    run = _run(tmp_path, "soft", subjects=SUBJECTS[:1])
    run_benchmark(run)
    monkeypatch.setattr(Blur, "resolved", lambda self: {"radius": self.radius, "grain": 3})
    with pytest.raises(ValueError, match=r"records of 'soft' made with resolved \{'radius': 1.0\}, not .*'grain': 3"):
        run_benchmark(run)
    assert len(preparations) == 1


def test_records_of_other_edits_are_refused(tmp_path: Path, preparations: list[Any], monkeypatch) -> None:
    run = _run(tmp_path, "soft", subjects=SUBJECTS[:1])
    run_benchmark(run)
    monkeypatch.setattr(drawn_subjects, "edits_of", lambda run, subject: edits_of(run, subject)[::-1])
    with pytest.raises(ValueError, match="'soft' with other edits; give another --out"):
        run_benchmark(run)


def test_a_failure_is_recorded_and_tried_once_more(tmp_path: Path, preparations: list[Any]) -> None:
    run = _run(tmp_path, "blind", "soft", "absent")
    unavailable = run_benchmark(run)
    assert unavailable == {"absent": "FileNotFoundError: its weights are not here; pass --method-model absent=FOLDER"}
    errors = {(e.name, *s): r["error"] for e, s, r in run.records()}
    assert errors.pop(("blind", "creature", 1000)) == "RuntimeError: no eyes for it"
    assert len(errors) == 5 and not any(errors.values())
    preparations.clear()
    run_benchmark(run)
    assert [(name, seed) for name, _, seed in preparations] == [("blind", 1000)]


def test_a_method_that_leaves_other_weights_is_found_out(tmp_path: Path, preparations: list[Any]) -> None:
    run = _run(tmp_path, "spoiler", "soft", subjects=SUBJECTS[:1])
    run_benchmark(run)
    spoiler, after = (read_record(run.folder(e, SUBJECTS[0])) for e in run.methods)
    assert spoiler is not None and "left the model with other weights" in spoiler["error"]
    assert after is not None and after["error"] is None  # on a model made anew


def test_two_methods_cannot_share_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Two methods have one name: a b, a-b"):
        DrawnRun(tmp_path, (MethodSpec("a b", "unedited"), MethodSpec("a-b", "unedited")), SUBJECTS)


@pytest.mark.slow
def test_processes_make_the_same_records(tmp_path: Path) -> None:
    one = _run(tmp_path / "one", "unedited", "direct + P2P")
    two = replace(one, out=tmp_path / "two")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run_benchmark(one)
    finally:
        torch.set_num_threads(threads)
    run_benchmark(two, jobs=2)
    assert _without_seconds(one) == _without_seconds(two)
