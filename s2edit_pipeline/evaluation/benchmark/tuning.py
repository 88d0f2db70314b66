"""Each method's best arguments, chosen on people that the benchmark doesn't grade."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..methods.registry import METHODS, MethodSpec, variants
from .drawn_subjects import DrawnRun, SubjectKey
from .runner import Record, run_benchmark

TUNING_FIRST = 5000
"""The first of the held-out people that arguments are chosen on."""

CRITERION = "mean PSNR to the truth in dB, 0 for an edit that the classifier does not read"


def criterion(records: Sequence[Record]) -> float:
    """``CRITERION`` over the edits of all records; a record of a failure has none, so its method is out."""
    if any(record["error"] is not None for record in records):
        return float("-inf")
    return float(np.mean([edit["psnr"] if edit["done"] else 0.0 for record in records for edit in record["edits"]]))


def tune(
    names: Sequence[str],
    subjects: Sequence[SubjectKey],
    out: Path,
    settings: Path,
    jobs: int = 1,
    models: Mapping[str, str] | None = None,
    **more: Any,
) -> dict[str, dict[str, float]]:
    """Try each method's grid, and the method as it is, on ``subjects``; write the best into the file ``settings``.

    Methods in the file that aren't named stay as they are there.

    Args:
        out: where the records lie; a run that was stopped goes on there.
        models: method -> a model folder of its own, which is not written as an argument.
        more: of ``DrawnRun``.

    Returns:
        Method -> candidate's name -> what it scored.

    Raises:
        ValueError: a name that is no method's, or a method that has no grid.
    """
    if idle := [name for name in names if name not in METHODS or not METHODS[name].grid]:
        raise ValueError(f"There is nothing to tune of {', '.join(idle)}; tuned are {', '.join(tuned_methods())}.")
    plain = {n: MethodSpec(n, n, {"model": models[n]} if models and n in models else {}) for n in names}
    candidates = {name: (plain[name], *variants(plain[name], METHODS[name].grid)) for name in names}
    run = DrawnRun(out, tuple(spec for specs in candidates.values() for spec in specs), tuple(subjects), **more)
    run_benchmark(run, jobs)
    records: dict[str, list[Record]] = {}
    for spec, _, record in run.records():
        records.setdefault(spec.name, []).append(record)
    scores = {
        name: {spec.name: criterion(records[spec.name]) for spec in specs if spec.name in records}
        for name, specs in candidates.items()
    }
    winners = {
        name: max(specs, key=lambda spec: scores[name].get(spec.name, float("-inf")))
        for name, specs in candidates.items()
    }
    best = {
        name: {argument: value for argument, value in spec.arguments.items() if argument != "model"}
        for name, spec in winners.items()
        if scores[name]
    }
    _write(settings, best, scores, run)
    return scores


def tuned_methods() -> list[str]:
    return [name for name, factory in METHODS.items() if factory.grid]


def _write(
    settings: Path,
    best: Mapping[str, Mapping[str, Any]],
    scores: Mapping[str, Mapping[str, float]],
    run: DrawnRun,
) -> None:
    before = json.loads(settings.read_text("utf-8")) if settings.is_file() else {}
    content = {
        "criterion": CRITERION,
        "subjects": {**before.get("subjects", {}), **{method: [list(s) for s in run.subjects] for method in best}},
        "num_inference_steps": run.num_inference_steps,
        "methods": {**before.get("methods", {}), **best},
        "scores": {
            **before.get("scores", {}),
            **{m: {n: round(v, 3) for n, v in s.items() if v > float("-inf")} for m, s in scores.items()},
        },
    }
    settings.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
