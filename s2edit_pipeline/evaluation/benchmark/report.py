"""From a benchmark's records to tables and plots: means, and paired differences to one of the methods.

Edits of one subject resemble each other, so every interval draws whole subjects (:mod:`intervals`).
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
from ..metrics.intervals import bootstrap_interval
from ..sheets import save_figure, save_sheet
from .drawn_subjects import BenchmarkRun, SubjectKey, edits_of
from .runner import mean_costs


@dataclass(frozen=True)
class Metric:
    """How ``name`` of a ``benchmark_metrics.Score`` is shown."""

    name: str
    title: str
    digits: int
    higher_is_better: bool

    def show(self, value: float) -> str:
        return f"{value:.{self.digits}f}"


METRICS = (
    Metric("psnr", "PSNR", 2, True),
    Metric("ssim", "SSIM", 4, True),
    Metric("feature_distance", "feature distance", 4, False),
    Metric("inside", "inside", 2, True),
    Metric("outside", "outside", 2, True),
    Metric("identity", "identity ΔE", 2, False),
    Metric("aligned", "aligned", 3, True),
    Metric("agreement", "agreement", 3, True),
    Metric("done", "done", 3, True),
    Metric("unchanged", "unchanged", 3, False),
)
_SHEET_LINES = 8
_BY_CATEGORY = ("psnr", "aligned", "identity")

Values = dict[tuple[SubjectKey, str], float]
"""Subject and edit -> what it scored; those that have no such score are left out."""


def collect(run: BenchmarkRun) -> dict[str, dict[str, Values]]:
    """Entrant -> metric -> values, of the records that hold edits."""
    found: dict[str, dict[str, Values]] = {}
    for entrant, subject, record in run.records():
        for edit in record.get("edits", ()):
            for metric in METRICS:
                if edit[metric.name] is not None:
                    values = found.setdefault(entrant.name, {}).setdefault(metric.name, {})
                    values[subject, edit["name"]] = float(edit[metric.name])
    return found


def summary(values: Values) -> dict[str, float]:
    """``mean`` over the edits, and its interval, ``low`` to ``high``."""
    array = np.array(list(values.values()))
    low, high = bootstrap_interval(array, [subject for subject, _ in values])
    return {"mean": float(array.mean()), "low": low, "high": high}


def paired(values: Values, baseline: Values) -> dict[str, float]:
    """:func:`summary` of what ``values`` has more than ``baseline`` on the edits that both have."""
    return summary({key: value - baseline[key] for key, value in values.items() if key in baseline})


def make_report(run: BenchmarkRun, unavailable: Mapping[str, str], baseline: str) -> dict[str, Any]:
    """Everything that the tables say, as JSON holds it.

    Args:
        unavailable: entrants that couldn't be made, with the reason.
        baseline: the entrant that the others are compared with; without records of it nothing is compared.
    """
    scores, categories = collect(run), _categories(run)
    methods: dict[str, dict[str, Any]] = {}
    for entrant in run.entrants:
        row: dict[str, Any] = {"arguments": dict(entrant.arguments), "failures": [], "subjects": 0}
        methods[entrant.name] = row
        if entrant.name in unavailable:
            row["unavailable"] = unavailable[entrant.name]
        if entrant.name not in scores:
            continue
        held = scores[entrant.name]
        row["edits"] = len(held["psnr"])
        row["means"] = {name: summary(values) for name, values in held.items()}
        row["categories"] = {
            category: {name: float(np.mean(part)) for name in held if (part := _of_category(held[name], keys))}
            for category, keys in categories.items()
        }
        if entrant.name != baseline and baseline in scores:
            shared = {name: values.keys() & scores[baseline].get(name, {}).keys() for name, values in held.items()}
            row["paired"] = {name: paired(held[name], scores[baseline][name]) for name, keys in shared.items() if keys}
    costs: dict[str, list[Mapping[str, Any]]] = {}
    for entrant, subject, record in run.records():
        if record["error"] is not None:
            methods[entrant.name]["failures"].append({"subject": list(subject), "error": record["error"]})
        else:
            methods[entrant.name]["subjects"] += 1
            costs.setdefault(entrant.name, []).append(record)
    for name, records in costs.items():
        methods[name]["cost"] = mean_costs(records)
    settings = {
        "edits": run.edits, "num_inference_steps": run.num_inference_steps, "seed": run.seed, "device": run.device,
        "subjects": [list(subject) for subject in run.subjects],
    }  # fmt: skip
    return {"settings": settings, "baseline": baseline, "methods": methods}


def _categories(run: BenchmarkRun) -> dict[str, set[tuple[SubjectKey, str]]]:
    found: dict[str, set[tuple[SubjectKey, str]]] = {}
    for _, subject, record in run.records():
        for edit in record.get("edits", ()):
            found.setdefault(edit["category"], set()).add((subject, edit["name"]))
    return dict(sorted(found.items()))


def _of_category(values: Values, keys: set[tuple[SubjectKey, str]]) -> list[float]:
    return [value for key, value in values.items() if key in keys]


# ---------------------------------------------------------------------------- Markdown


def markdown(report: Mapping[str, Any]) -> str:
    """The tables."""
    settings, methods = report["settings"], report["methods"]
    measured = {name: row for name, row in methods.items() if "means" in row}
    parts = [
        f"{len(settings['subjects'])} held-out subjects, at most {settings['edits']} edits of each, "
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


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _with_interval(metric: Metric, values: Mapping[str, Mapping[str, float]]) -> str:
    if metric.name not in values:
        return "-"
    mean, low, high = (metric.show(values[metric.name][key]) for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _means(measured: Mapping[str, Any]) -> str:
    head = ["method", "edits", *(f"{m.title} {'↑' if m.higher_is_better else '↓'}" for m in METRICS)]
    return _table(
        head,
        [
            [name, str(row["edits"]), *(_with_interval(metric, row["means"]) for metric in METRICS)]
            for name, row in measured.items()
        ],
    )


def _paired(measured: Mapping[str, Any]) -> str:
    rows = [
        [name, *(_with_interval(metric, row["paired"]) for metric in METRICS)]
        for name, row in measured.items()
        if "paired" in row
    ]
    return _table(["method", *(metric.title for metric in METRICS)], rows) if rows else "There is nothing to compare."


def _first_table(measured: Mapping[str, Any]) -> str:
    shown = [metric for metric in METRICS if metric.name in ("feature_distance", "psnr")]
    rows = [
        [name, *(m.show(row["means"][m.name]["mean"]) for m in shown), "not measured"] for name, row in measured.items()
    ]
    return _table(["method", *(metric.title for metric in shown), "FID"], rows)


def _by_category(measured: Mapping[str, Any]) -> str:
    shown = [metric for metric in METRICS if metric.name in _BY_CATEGORY]
    categories = dict.fromkeys(category for row in measured.values() for category in row["categories"])

    def cell(held: Mapping[str, float]) -> str:
        return ", ".join(m.show(held[m.name]) if m.name in held else "-" for m in shown)

    rows = [[name, *(cell(row["categories"].get(c, {})) for c in categories)] for name, row in measured.items()]
    return _table(["method", *categories], rows)


def _costs(measured: Mapping[str, Any]) -> str:
    names = ("cost_prepare", "cost_edit", "seconds_prepare", "seconds_edit")
    rows = [[name, *(f"{row['cost'][key]:.1f}" for key in names)] for name, row in measured.items()]
    return _table(["method", "U-Net, once", "U-Net, an edit", "seconds, once", "seconds, an edit"], rows)


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


def write_report(run: BenchmarkRun, unavailable: Mapping[str, str], baseline: str) -> Path:
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
        for number, name in enumerate(shown):
            x, y = rows[name]["means"]["outside"], rows[name]["means"]["aligned"]
            bars = [[[v["mean"] - v["low"]], [v["high"] - v["mean"]]] for v in (x, y)]
            marker = "os^D"[number // 10 % 4]  # there are ten colours
            axis.errorbar(x["mean"], y["mean"], bars[1], bars[0], marker, markersize=4, linewidth=0.7, label=name)
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


def edited_pictures(run: BenchmarkRun, name: str, subject: SubjectKey) -> list[Image.Image] | None:
    """What the entrant ``name`` made of ``subject``, in the order of its edits; None without a record of it."""
    entrant = next(e for e in run.entrants if e.name == name)
    path = run.folder(entrant, subject) / "edits.png"
    if not path.is_file():
        return None
    strip = Image.open(path)
    return [strip.crop((left, 0, left + IMAGE_SIZE, IMAGE_SIZE)) for left in range(0, strip.width, IMAGE_SIZE)]


def example_sheet(run: BenchmarkRun, examples: Sequence[tuple[SubjectKey, int]], path: Path) -> None:
    """A line for each subject and number of its edit: source, truth, and what each entrant made."""
    names = [e.name for e in run.entrants]
    lines: list[list[Image.Image | None]] = []
    labels = []
    for subject, index in examples:
        edit = edits_of(run, subject)[index]
        made = [edited_pictures(run, name, subject) for name in names]
        lines.append([render(edit.subject), edit.truth(), *(p[index] if p else None for p in made)])
        labels.append(edit.name)
    save_sheet(path, lines, ["source", "truth", *names], labels)
