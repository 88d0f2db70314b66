"""From a benchmark's records to tables and plots: means, and paired differences to one of the methods.

Edits of one subject resemble each other, so every interval draws whole subjects (:mod:`..metrics.intervals`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...avatars.world import IMAGE_SIZE, render
from ..methods.registry import MethodSpec
from ..metrics.intervals import bootstrap_interval
from ..sheets import save_figure, save_sheet
from ..tables import MISSING, markdown_table, number, with_interval
from .drawn_subjects import DrawnRun, SubjectKey, edits_of
from .runner import mean_costs


@dataclass(frozen=True)
class Metric:
    """How ``name`` of a ``scoring.Score`` is shown."""

    name: str
    title: str
    spec: str
    higher_is_better: bool


METRICS = (
    Metric("psnr", "PSNR", ".2f", True),
    Metric("ssim", "SSIM", ".4f", True),
    Metric("feature_distance", "feature distance", ".4f", False),
    Metric("inside", "inside", ".2f", True),
    Metric("outside", "outside", ".2f", True),
    Metric("identity", "identity ΔE", ".2f", False),
    Metric("aligned", "aligned", ".3f", True),
    Metric("agreement", "agreement", ".3f", True),
    Metric("done", "done", ".3f", True),
    Metric("unchanged", "unchanged", ".3f", False),
)
_SHEET_LINES = 8
_BY_CATEGORY = ("psnr", "aligned", "identity")

EditKey = tuple[SubjectKey, str]
"""A subject, and the name of one of its edits."""
Values = dict[EditKey, float]
"""What each edit scored; those that have no such score are left out."""


def collect(run: DrawnRun) -> dict[str, dict[str, Values]]:
    """Method -> metric -> values, of the records that have edits."""
    scores: dict[str, dict[str, Values]] = {}
    for spec, subject, record in run.records():
        for edit in record.get("edits", ()):
            for metric in METRICS:
                if edit[metric.name] is not None:
                    values = scores.setdefault(spec.name, {}).setdefault(metric.name, {})
                    values[subject, edit["name"]] = float(edit[metric.name])
    return scores


def summary(values: Values) -> dict[str, float]:
    """``mean`` over the edits, and its interval, ``low`` to ``high``."""
    array = np.array(list(values.values()))
    low, high = bootstrap_interval(array, [subject for subject, _ in values])
    return {"mean": float(array.mean()), "low": low, "high": high}


def paired(values: Values, baseline: Values) -> dict[str, float]:
    """:func:`summary` of what ``values`` has more than ``baseline`` on the edits that both have."""
    return summary({key: value - baseline[key] for key, value in values.items() if key in baseline})


def make_report(run: DrawnRun, unavailable: Mapping[str, str], baseline: str) -> dict[str, Any]:
    """Everything that the tables say, as JSON holds it.

    Args:
        unavailable: methods that couldn't be made, with the reason.
        baseline: the method that the others are compared with; without records of it nothing is compared.
    """
    scores, categories = collect(run), _categories(run)
    methods: dict[str, dict[str, Any]] = {}
    for spec in run.methods:
        row: dict[str, Any] = {"arguments": dict(spec.arguments), "failures": [], "subjects": 0}
        methods[spec.name] = row
        if spec.name in unavailable:
            row["unavailable"] = unavailable[spec.name]
        if spec.name in scores:
            row |= _method_scores(scores[spec.name], categories)
            if spec.name != baseline and baseline in scores:
                row["paired"] = _paired_scores(scores[spec.name], scores[baseline])
    costs: dict[str, list[Mapping[str, Any]]] = {}
    for spec, subject, record in run.records():
        if record["error"] is not None:
            methods[spec.name]["failures"].append({"subject": list(subject), "error": record["error"]})
        else:
            methods[spec.name]["subjects"] += 1
            costs.setdefault(spec.name, []).append(record)
    for name, records in costs.items():
        methods[name]["cost"] = mean_costs(records)
    settings = {
        "edits": run.edits, "num_inference_steps": run.num_inference_steps, "seed": run.seed, "device": run.device,
        "prompts": run.prompts, "subjects": [list(subject) for subject in run.subjects],
    }  # fmt: skip
    return {"settings": settings, "baseline": baseline, "methods": methods}


def _method_scores(scores: Mapping[str, Values], categories: Mapping[str, set[EditKey]]) -> dict[str, Any]:
    return {
        "edits": len(scores["psnr"]),
        "means": {name: summary(values) for name, values in scores.items()},
        "categories": {
            category: {name: float(np.mean(part)) for name in scores if (part := _part(scores[name], keys))}
            for category, keys in categories.items()
        },
    }


def _paired_scores(scores: Mapping[str, Values], baseline: Mapping[str, Values]) -> dict[str, dict[str, float]]:
    shared = {name: values.keys() & baseline.get(name, {}).keys() for name, values in scores.items()}
    return {name: paired(scores[name], baseline[name]) for name, keys in shared.items() if keys}


def _categories(run: DrawnRun) -> dict[str, set[EditKey]]:
    categories: dict[str, set[EditKey]] = {}
    for _, subject, record in run.records():
        for edit in record.get("edits", ()):
            categories.setdefault(edit["category"], set()).add((subject, edit["name"]))
    return dict(sorted(categories.items()))


def _part(values: Values, keys: set[EditKey]) -> list[float]:
    return [value for key, value in values.items() if key in keys]


# ---------------------------------------------------------------------------- Markdown


def markdown(report: Mapping[str, Any]) -> str:
    """The tables."""
    settings, methods = report["settings"], report["methods"]
    measured = {name: row for name, row in methods.items() if "means" in row}
    parts = [
        f"{len(settings['subjects'])} held-out subjects, at most {settings['edits']} edits of each, "
        f"{settings['prompts']} prompts, "
        f"{settings['num_inference_steps']} steps, seed {settings['seed']}, {settings['device']}. Means over edits, "
        "with 95 % bootstrap intervals over subjects.",
        _means(measured),
        f"Paired differences to {report['baseline']}, edit by edit:",
        _paired(measured),
        "The paper's Table 1. FID needs Inception's weights, which this run was not given; the feature distance stands "
        "in LPIPS's place and can't be compared with it.",
        _first_table(measured),
        "By kind of edit: " + ", ".join(m.title for m in METRICS if m.name in _BY_CATEGORY) + ".",
        _by_category(measured),
        "Cost: U-Net evaluations (a backward pass counts 2) and seconds, once a picture and for each edit.",
        _costs(measured),
        *_troubles(methods),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _means(measured: Mapping[str, Any]) -> str:
    head = ["method", "edits", *(f"{m.title} {'↑' if m.higher_is_better else '↓'}" for m in METRICS)]
    rows = ([name, row["edits"], *_intervals(row["means"])] for name, row in measured.items())
    return markdown_table(head, rows)


def _paired(measured: Mapping[str, Any]) -> str:
    rows = [[name, *_intervals(row["paired"])] for name, row in measured.items() if "paired" in row]
    return markdown_table(["method", *(m.title for m in METRICS)], rows) if rows else "There is nothing to compare."


def _intervals(values: Mapping[str, Mapping[str, float]]) -> list[str | None]:
    return [with_interval(values.get(metric.name), metric.spec) for metric in METRICS]


def _first_table(measured: Mapping[str, Any]) -> str:
    metrics = [metric for metric in METRICS if metric.name in ("feature_distance", "psnr")]
    rows = (
        [name, *(number(row["means"][m.name]["mean"], m.spec) for m in metrics), "not measured"]
        for name, row in measured.items()
    )
    return markdown_table(["method", *(metric.title for metric in metrics), "FID"], rows)


def _by_category(measured: Mapping[str, Any]) -> str:
    metrics = [metric for metric in METRICS if metric.name in _BY_CATEGORY]
    categories = dict.fromkeys(category for row in measured.values() for category in row["categories"])

    def cell(means: Mapping[str, float]) -> str:
        return ", ".join(number(means.get(m.name), m.spec) or MISSING for m in metrics)

    rows = ([name, *(cell(row["categories"].get(c, {})) for c in categories)] for name, row in measured.items())
    return markdown_table(["method", *categories], rows)


def _costs(measured: Mapping[str, Any]) -> str:
    names = ("cost_prepare", "cost_edit", "seconds_prepare", "seconds_edit")
    rows = ([name, *(number(row["cost"][key], ".1f") for key in names)] for name, row in measured.items())
    return markdown_table(["method", "U-Net, once", "U-Net, an edit", "seconds, once", "seconds, an edit"], rows)


def _troubles(methods: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, row in methods.items():
        if "unavailable" in row:
            lines.append(f"- {name} could not be made. {row['unavailable']}")
        for failure in row["failures"]:
            kind, number = failure["subject"]
            lines.append(f"- {name} failed on {kind} {number}: {failure['error']}")
    return ["Not measured:", "\n".join(lines)] if lines else []


# ---------------------------------------------------------------------------- pictures


def write_report(run: DrawnRun, unavailable: Mapping[str, str], baseline: str) -> Path:
    """Write ``report.md``, ``report.json`` and the plots into ``run.out``; returns the first one's path.

    Raises:
        ImportError: matplotlib isn't there: ``pip install "s2edit-pipeline[evaluation]"``.
    """
    report = make_report(run, unavailable, baseline)
    (run.out / "report.json").write_text(json.dumps(report, indent=1), "utf-8")
    path = run.out / "report.md"
    path.write_text(markdown(report), "utf-8")
    if any("means" in row for row in report["methods"].values()):
        _plot_trade_off(report, run.out / "trade-off.png")
        example_sheet(run, [(subject, 0) for subject in run.subjects[:_SHEET_LINES]], run.out / "sheet.png")
    if any("paired" in row for row in report["methods"].values()):
        _plot_differences(report, run.out / "differences.png")
    return path


def _plot_trade_off(report: Mapping[str, Any], path: Path) -> None:
    with save_figure(path, (7, 5)) as figure:
        axis = figure.subplots()
        rows = {name: row for name, row in report["methods"].items() if "means" in row}
        # the references would stretch the axes
        shown = [name for name, row in rows.items() if row["cost"]["cost_edit"] > 0]
        for index, name in enumerate(shown):
            x, y = rows[name]["means"]["outside"], rows[name]["means"]["aligned"]
            bars = [[[v["mean"] - v["low"]], [v["high"] - v["mean"]]] for v in (x, y)]
            marker = "os^D"[index // 10 % 4]  # there are ten colours
            axis.errorbar(x["mean"], y["mean"], bars[1], bars[0], marker, markersize=4, linewidth=0.7, label=name)
        if shown:
            figure.legend(loc="outside right upper", fontsize=7)
        axis.set(xlabel="preservation: PSNR outside the edit, dB", ylabel="alignment: attributes read as asked for")


def _plot_differences(report: Mapping[str, Any], path: Path) -> None:
    shown = [metric for metric in METRICS if metric.name in ("psnr", "feature_distance", "identity", "aligned")]
    rows = {name: row["paired"] for name, row in report["methods"].items() if "paired" in row}
    with save_figure(path, (13, 1 + 0.3 * len(rows))) as figure:
        axes = figure.subplots(1, len(shown), sharey=True)
        for axis, metric in zip(axes, shown, strict=True):
            for line, values in enumerate(rows.values()):
                if metric.name in values:
                    v = values[metric.name]
                    axis.plot([v["low"], v["high"]], [line, line], color="tab:blue", linewidth=1)
                    axis.plot(v["mean"], line, "o", color="tab:blue", markersize=4)
            axis.axvline(0, color="grey", linewidth=0.7)
            better = "right" if metric.higher_is_better else "left"
            axis.set(title=f"{metric.title} ({better} is better)", yticks=range(len(rows)), yticklabels=list(rows))


def edited_pictures(run: DrawnRun, spec: MethodSpec, subject: SubjectKey) -> list[Image.Image] | None:
    """What the method made of ``subject``, in the order of its edits; None without a record of it."""
    path = run.folder(spec, subject) / "edits.png"
    if not path.is_file():
        return None
    strip = Image.open(path)
    return [strip.crop((left, 0, left + IMAGE_SIZE, IMAGE_SIZE)) for left in range(0, strip.width, IMAGE_SIZE)]


def example_sheet(run: DrawnRun, examples: Sequence[tuple[SubjectKey, int]], path: Path) -> None:
    """A line for each subject and number of its edit: source, truth, and what each method made."""
    lines: list[list[Image.Image | None]] = []
    labels = []
    for subject, index in examples:
        edit = edits_of(run, subject)[index]
        pictures = [edited_pictures(run, spec, subject) for spec in run.methods]
        lines.append([render(edit.subject), edit.truth(), *(p[index] if p else None for p in pictures)])
        labels.append(edit.name)
    save_sheet(path, lines, ["source", "truth", *(spec.name for spec in run.methods)], labels)
