"""The paper's Figures 7 to 9 on subjects whose edits have a true answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from ..avatars.world import render
from ..identity_folder import atomic_folder
from .benchmark import BenchmarkRun, SubjectKey, edits_of, subject_seed
from .benchmark_methods import (
    ABLATION_METHODS,
    ABLATION_PREFIX,
    BENCHMARK_METHODS,
    METHODS,
    Entrant,
    variants,
)
from .benchmark_report import METRICS, Values, collect, edited_pictures, example_sheet, summary, write_report
from .method_records import file_name, load_model, run_benchmark
from .own_methods import SETTINGS, PipelineMethod
from .sheets import save_figure, save_sheet

GUIDANCE = tuple(float(scale) for scale in range(1, 11))
METHODS_OF: Mapping[int, tuple[str, ...]] = {
    7: BENCHMARK_METHODS,
    8: ABLATION_METHODS,
    9: ("S2Edit", "S2Edit, the paper's"),
}
"""Figure -> the methods that it shows unless told."""

_EXAMPLES = 3


def draw_figure(number: int, run: BenchmarkRun, jobs: int = 1) -> Path:
    """Measure and draw Figure 7, 8 or 9; what is under ``run.out`` already isn't measured again.

    Args:
        run: its entrants are the figure's curves, or rows; those that have no strength to turn have no curve.

    Returns:
        The figure's path; beside it are the records and, as JSON, its points.
    """
    return _FIGURES[number](replace(run, out=run.out / f"figure-{number}"), jobs)


def _figure_7(run: BenchmarkRun, jobs: int) -> Path:
    """Alignment against preservation, a curve for each method over its strength."""
    curves = {e.name: variants(e, METHODS[e.method].curve) for e in run.entrants if METHODS[e.method].curve}
    points = _measured(run, curves, ("outside", "aligned"), jobs)
    path = run.out / "figure-7.png"
    with save_figure(path, (7, 5)) as figure:
        axis = figure.subplots()
        for name, curve in points.items():
            axis.plot(curve["outside"], curve["aligned"], "o-", markersize=3, linewidth=1, label=name)
        axis.set(xlabel="preservation: PSNR outside the edit, dB", ylabel="alignment: attributes read as asked for")
        axis.legend(fontsize=7)
    return path


def _figure_8(run: BenchmarkRun, jobs: int) -> Path:
    """From null-text inversion to S2Edit, a row for each part that is added, with what noun and token look at."""
    unavailable = run_benchmark(run, jobs)
    write_report(run, unavailable, run.entrants[0].name)
    lines: list[list[Image.Image | None]] = []
    labels = []
    model = cache(lambda: load_model(run))
    for subject in run.subjects[:_EXAMPLES]:
        edit = edits_of(run, subject)[0]
        for entrant in run.entrants:
            pictures = edited_pictures(run, entrant.name, subject)
            maps = _attention_maps(run, entrant, subject, model)
            lines.append([render(edit.subject), edit.truth(), pictures[0] if pictures else None, *maps])
            labels.append(f"{entrant.name.removeprefix(ABLATION_PREFIX)}: {edit.name}")
    path = run.out / "figure-8.png"
    save_sheet(path, lines, ["source", "truth", "edit", "the noun looks at", "[I] looks at"], labels)
    return path


def _figure_9(run: BenchmarkRun, jobs: int) -> Path:
    """Guidance from 1 to 10."""
    scales = [{"edit": {"guidance_scale": scale}} for scale in GUIDANCE]
    curves = {e.name: variants(e, scales) for e in run.entrants if e.method in SETTINGS}
    shown = [metric for metric in METRICS if metric.name in ("psnr", "outside", "aligned", "identity")]
    points = _measured(run, curves, [m.name for m in shown], jobs)
    path = run.out / "figure-9.png"
    with save_figure(path, (13, 3)) as figure:
        for axis, metric in zip(figure.subplots(1, len(shown)), shown, strict=True):
            for name, curve in points.items():
                axis.plot(GUIDANCE, curve[metric.name], "o-", markersize=3, label=name)
            axis.set(title=metric.title, xlabel="guidance scale")
        figure.axes[0].legend(fontsize=7)
    for name, guided in curves.items():
        examples = [(subject, 0) for subject in run.subjects[:_EXAMPLES]]
        example_sheet(replace(run, entrants=guided), examples, run.out / f"figure-9-{file_name(name)}.png")
    return path


def _attention_maps(
    run: BenchmarkRun, entrant: Entrant, subject: SubjectKey, model: Callable[[], Any]
) -> list[Image.Image | None]:
    """Where the noun and the token look in the subject's first edit; the token's place is empty without one."""
    folder = run.out / "maps" / file_name(entrant.name) / "-".join(map(str, subject))
    if not folder.is_dir():
        edit = edits_of(run, subject)[0]
        noun = edit.subject.noun
        method = entrant.make(model(), run.num_inference_steps)
        assert isinstance(method, PipelineMethod)
        prepared = method.prepare(render(edit.subject), edit.source_prompt, noun, subject_seed(run, subject))
        maps = prepared.attention_maps(edit.target_prompt)
        token = prepared.identity.token if prepared.identity else None
        with atomic_folder(folder) as made:
            for name, word in (("noun", noun), ("token", token)):
                if word in maps:
                    maps[word].save(made / f"{name}.png")
    paths = (folder / "noun.png", folder / "token.png")
    return [Image.open(path) if path.is_file() else None for path in paths]


_FIGURES: Mapping[int, Callable[[BenchmarkRun, int], Path]] = {7: _figure_7, 8: _figure_8, 9: _figure_9}


def _measured(
    run: BenchmarkRun, curves: Mapping[str, Sequence[Entrant]], metrics: Sequence[str], jobs: int
) -> dict[str, dict[str, list[float | None]]]:
    """Curve -> metric -> a mean for each of its entrants, None where there are no records; in ``points.json`` too.
    Entrants with the same fit share it."""
    run = replace(run, entrants=tuple(entrant for curve in curves.values() for entrant in curve), share_fits=True)
    run_benchmark(run, jobs)
    scores = collect(run)
    points = {
        curve: {metric: [_mean(scores, entrant.name, metric) for entrant in entrants] for metric in metrics}
        for curve, entrants in curves.items()
    }
    (run.out / "points.json").write_text(json.dumps(points, indent=1), "utf-8")
    return points


def _mean(scores: Mapping[str, Mapping[str, Values]], name: str, metric: str) -> float | None:
    values = scores.get(name, {}).get(metric)
    return summary(values)["mean"] if values else None
