"""The paper's Figures 7 to 9 on subjects whose edits have a true answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from ...avatars.world import render
from ...identity_folder import atomic_folder
from ..methods.pipeline_arguments import PIPELINE_METHODS
from ..methods.pipeline_method import PipelineMethod
from ..methods.registry import (
    ABLATION_METHODS,
    ABLATION_PREFIX,
    BENCHMARK_METHODS,
    METHODS,
    MethodSpec,
    variants,
)
from ..sheets import save_figure, save_sheet
from .drawn_subjects import DrawnRun, SubjectKey, edits_of, subject_seed
from .report import METRICS, Values, collect, edited_pictures, example_sheet, summary, write_report
from .runner import file_name, load_model, run_benchmark

GUIDANCE = tuple(float(scale) for scale in range(1, 11))
METHODS_OF: Mapping[int, tuple[str, ...]] = {
    7: BENCHMARK_METHODS,
    8: ABLATION_METHODS,
    9: ("S2Edit", "S2Edit, the paper's"),
}
"""Figure -> the methods that it shows unless others are named."""

_EXAMPLES = 3


def draw_figure(number: int, run: DrawnRun, jobs: int = 1) -> Path:
    """Measure and draw Figure 7, 8 or 9; what is under ``run.out`` already isn't measured again.

    Args:
        run: its methods are the figure's curves, or rows; those that have no strength to turn have no curve.

    Returns:
        The figure's path; beside it are the records and, as JSON, its points.
    """
    return _FIGURES[number](replace(run, out=run.out / f"figure-{number}"), jobs)


def _figure_7(run: DrawnRun, jobs: int) -> Path:
    """Alignment against preservation, a curve for each method over its strength."""
    curves = {s.name: variants(s, METHODS[s.method].curve) for s in run.methods if METHODS[s.method].curve}
    points = _measured(run, curves, ("outside", "aligned"), jobs)
    path = run.out / "figure-7.png"
    with save_figure(path, (7, 5)) as figure:
        axis = figure.subplots()
        for name, curve in points.items():
            axis.plot(curve["outside"], curve["aligned"], "o-", markersize=3, linewidth=1, label=name)
        axis.set(xlabel="preservation: PSNR outside the edit, dB", ylabel="alignment: attributes read as asked for")
        axis.legend(fontsize=7)
    return path


def _figure_8(run: DrawnRun, jobs: int) -> Path:
    """From null-text inversion to S2Edit, a row for each part that is added, with what noun and token look at."""
    unavailable = run_benchmark(run, jobs)
    write_report(run, unavailable, run.methods[0].name)
    lines: list[list[Image.Image | None]] = []
    labels = []
    model = cache(lambda: load_model(run))
    for subject in run.subjects[:_EXAMPLES]:
        edit = edits_of(run, subject)[0]
        for spec in run.methods:
            pictures = edited_pictures(run, spec, subject)
            maps = _attention_maps(run, spec, subject, model)
            lines.append([render(edit.subject), edit.truth(), pictures[0] if pictures else None, *maps])
            labels.append(f"{spec.name.removeprefix(ABLATION_PREFIX)}: {edit.name}")
    path = run.out / "figure-8.png"
    save_sheet(path, lines, ["source", "truth", "edit", "the noun looks at", "[I] looks at"], labels)
    return path


def _figure_9(run: DrawnRun, jobs: int) -> Path:
    """Guidance from 1 to 10."""
    scales = [{"edit": {"guidance_scale": scale}} for scale in GUIDANCE]
    curves = {spec.name: variants(spec, scales) for spec in run.methods if spec.method in PIPELINE_METHODS}
    metrics = [metric for metric in METRICS if metric.name in ("psnr", "outside", "aligned", "identity")]
    points = _measured(run, curves, [m.name for m in metrics], jobs)
    path = run.out / "figure-9.png"
    with save_figure(path, (13, 3)) as figure:
        for axis, metric in zip(figure.subplots(1, len(metrics)), metrics, strict=True):
            for name, curve in points.items():
                axis.plot(GUIDANCE, curve[metric.name], "o-", markersize=3, label=name)
            axis.set(title=metric.title, xlabel="guidance scale")
        figure.axes[0].legend(fontsize=7)
    for name, guided in curves.items():
        examples = [(subject, 0) for subject in run.subjects[:_EXAMPLES]]
        example_sheet(replace(run, methods=guided), examples, run.out / f"figure-9-{file_name(name)}.png")
    return path


def _attention_maps(
    run: DrawnRun, spec: MethodSpec, subject: SubjectKey, model: Callable[[], Any]
) -> list[Image.Image | None]:
    """Where the noun and the token look in the subject's first edit; the token's place is empty without one."""
    folder = run.out / "maps" / file_name(spec.name) / "-".join(map(str, subject))
    if not folder.is_dir():
        edit = edits_of(run, subject)[0]
        noun = edit.subject.noun
        method = spec.make(model(), run.num_inference_steps)
        assert isinstance(method, PipelineMethod)
        prepared = method.prepare(render(edit.subject), edit.source_prompt, noun, subject_seed(run, subject))
        maps = prepared.attention_maps(edit.target_prompt)
        token = prepared.identity.token if prepared.identity else None
        with atomic_folder(folder) as unfinished:
            for name, word in (("noun", noun), ("token", token)):
                if word in maps:
                    maps[word].save(unfinished / f"{name}.png")
    paths = (folder / "noun.png", folder / "token.png")
    return [Image.open(path) if path.is_file() else None for path in paths]


_FIGURES: Mapping[int, Callable[[DrawnRun, int], Path]] = {7: _figure_7, 8: _figure_8, 9: _figure_9}


def _measured(
    run: DrawnRun, curves: Mapping[str, Sequence[MethodSpec]], metrics: Sequence[str], jobs: int
) -> dict[str, dict[str, list[float | None]]]:
    """Curve -> metric -> a mean for each of its methods, None where there are no records; in ``points.json`` too.
    Methods with the same fit share it."""
    run = replace(run, methods=tuple(spec for curve in curves.values() for spec in curve), share_fits=True)
    run_benchmark(run, jobs)
    scores = collect(run)
    points = {
        curve: {metric: [_mean(scores, spec.name, metric) for spec in specs] for metric in metrics}
        for curve, specs in curves.items()
    }
    (run.out / "points.json").write_text(json.dumps(points, indent=1), "utf-8")
    return points


def _mean(scores: Mapping[str, Mapping[str, Values]], name: str, metric: str) -> float | None:
    values = scores.get(name, {}).get(metric)
    return summary(values)["mean"] if values else None
