"""From the records of real pictures to tables: what methods preserve and cost, and, where wanted, the metrics that need
fetched weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..methods.registry import MethodSpec
from ..metrics import learned
from ..metrics.intervals import bootstrap_interval
from ..tables import markdown_table, number, with_interval
from .dataset_run import DatasetRun
from .datasets import DatasetEdit
from .runner import Record, mean_costs, read_record

Pictures = Sequence[Image.Image]
Measure = Callable[[Pictures, Pictures, Sequence[str]], float]
"""``measure(before, after, target_prompts)``, one of each for an edit."""

_PRESERVED = {"psnr_outside": ("PSNR outside ↑", ".2f"), "ssim_outside": ("SSIM outside ↑", ".4f")}
_COSTS = {
    "cost_prepare": "U-Net, once", "cost_edit": "U-Net, an edit",
    "seconds_prepare": "seconds, once", "seconds_edit": "seconds, an edit",
}  # fmt: skip


def standard_measures(clip_model: str | None = None) -> dict[str, Measure]:
    """Those of ``metrics.learned`` that need no truth.

    Args:
        clip_model: CLIP score's, on the Hub or a folder; None takes the usual one.
    """
    clip = clip_model or learned.CLIP_MODEL
    return {
        "CLIP score ↑": lambda before, after, prompts: learned.clip_score(after, prompts, model=clip),
        "LPIPS ↓": lambda before, after, prompts: learned.lpips(before, after),
        "FID ↓": lambda before, after, prompts: learned.fid(before, after),
    }


def dataset_report(
    run: DatasetRun, unavailable: Mapping[str, str], measures: Mapping[str, Measure] | None = None
) -> dict[str, Any]:
    """Everything that the tables say, as JSON holds it.

    Args:
        unavailable: methods that couldn't be made, with the reason.
        measures: to be taken besides; each gives a number, or a text: not measured, and why.
    """
    methods: dict[str, dict[str, Any]] = {}
    for spec in run.methods:
        row = methods[spec.name] = {"arguments": dict(spec.arguments), "pictures": 0, "failures": []}
        if spec.name in unavailable:
            row["unavailable"] = unavailable[spec.name]
        successes: list[tuple[DatasetEdit, Record]] = []
        for subject in run.subjects:
            record = read_record(run.folder(spec, subject))
            if record is None:
                continue
            if record["error"] is None:
                successes.append((subject, record))
            else:
                row["failures"].append({"picture": subject.name, "error": record["error"]})
        if successes:
            row |= _summary(successes)
            if measures:
                pictures = _pictures(run, spec, successes)
                row["standard_metrics"] = {name: _value(measure, *pictures) for name, measure in measures.items()}
    settings = {
        "pictures": [subject.name for subject in run.subjects], "num_inference_steps": run.num_inference_steps,
        "seed": run.seed, "device": run.device, "model": run.model,
    }  # fmt: skip
    return {"settings": settings, "methods": methods}


def _summary(successes: Sequence[tuple[DatasetEdit, Record]]) -> dict[str, Any]:
    rows = [(subject.name, edit) for subject, record in successes for edit in record["edits"]]
    summary: dict[str, Any] = {
        "pictures": len(successes),
        "edits": len(rows),
        "edits_with_mask": sum(edit["psnr_outside"] is not None for _, edit in rows),
        "told_instructions": sum(edit["told"] != edit["prompt"] for _, edit in rows),
        "token_left_out": [
            {"picture": name, "prompt": edit["prompt"]} for name, edit in rows if edit["token_left_out"]
        ],
        "cost": mean_costs([record for _, record in successes]),
    }
    for measure in _PRESERVED:
        values = {i: edit[measure] for i, (_, edit) in enumerate(rows) if edit[measure] is not None}
        summary[measure] = None
        if values:
            low, high = bootstrap_interval(np.array(list(values.values())), [rows[i][0] for i in values])
            summary[measure] = {"mean": float(np.mean(list(values.values()))), "low": low, "high": high}
    return summary


def _pictures(
    run: DatasetRun, spec: MethodSpec, successes: Sequence[tuple[DatasetEdit, Record]]
) -> tuple[list[Image.Image], list[Image.Image], list[str]]:
    """Of each edit: the source, what became of it, and the target prompt."""
    before, after, prompts = [], [], []
    for subject, _ in successes:
        source = subject.picture()
        with Image.open(run.folder(spec, subject) / "edits.png") as strip:
            for i, prompt in enumerate(subject.target_prompts):
                before.append(source)
                after.append(strip.crop((i * source.width, 0, (i + 1) * source.width, source.height)))
                prompts.append(prompt)
    return before, after, prompts


def _value(measure: Measure, before: Pictures, after: Pictures, prompts: Sequence[str]) -> float | str:
    try:
        return measure(before, after, prompts)
    except (ImportError, OSError, ValueError) as error:
        return f"not measured: {error}"


# ---------------------------------------------------------------------------- Markdown


def markdown(report: Mapping[str, Any]) -> str:
    """The tables."""
    settings, methods = report["settings"], report["methods"]
    measured = {name: row for name, row in methods.items() if row["pictures"]}
    head = ["method", "edits", "with a mask", *(title for title, _ in _PRESERVED.values()), *_COSTS.values()]
    rows = [
        [
            name, row["edits"], row["edits_with_mask"],
            *(with_interval(row[measure], spec) for measure, (_, spec) in _PRESERVED.items()),
            *(number(row["cost"][cost], ".1f") for cost in _COSTS),
        ]
        for name, row in measured.items()
    ]  # fmt: skip
    parts = [
        f"{len(settings['pictures'])} pictures, {settings['num_inference_steps']} steps, seed {settings['seed']}, "
        f"{settings['device']}, {settings['model'] or 'the embedded model'}. Means over edits, with 95 % bootstrap "
        "intervals over pictures; U-Net evaluations count a backward pass 2.",
        markdown_table(head, rows),
    ]
    standard = {name: row["standard_metrics"] for name, row in measured.items() if "standard_metrics" in row}
    if standard:
        titles = list(dict.fromkeys(title for values in standard.values() for title in values))
        lines = ([name, *(_number_or_reason(values[t]) for t in titles)] for name, values in standard.items())
        parts.append(markdown_table(["method", *titles], lines))
    return "\n\n".join([*parts, *_remarks(methods)]) + "\n"


def _number_or_reason(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _remarks(methods: Mapping[str, Any]) -> list[str]:
    """What went otherwise than planned."""
    lines = []
    for name, row in methods.items():
        if "unavailable" in row:
            lines.append(f"- {name} could not be made. {row['unavailable']}")
        lines += [f"- {name} failed on {failure['picture']}: {failure['error']}" for failure in row["failures"]]
        if row.get("told_instructions"):
            lines.append(f"- {name} was given the dataset's instruction for {row['told_instructions']} target prompts.")
        lines += [
            f"- {name} left its token out of {omission['prompt']!r} ({omission['picture']}), which lacks the subject."
            for omission in row.get("token_left_out", ())
        ]
    return ["\n".join(lines)] if lines else []


def write_dataset_report(
    run: DatasetRun, unavailable: Mapping[str, str], measures: Mapping[str, Measure] | None = None
) -> Path:
    """Write ``report.md`` and ``report.json``, see :func:`dataset_report`, into ``run.out``; the first's path."""
    report = dataset_report(run, unavailable, measures)
    run.out.mkdir(parents=True, exist_ok=True)
    (run.out / "report.json").write_text(json.dumps(report, indent=1), "utf-8")
    path = run.out / "report.md"
    path.write_text(markdown(report), "utf-8")
    return path
