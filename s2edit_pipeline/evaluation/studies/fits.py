"""What a fit is worth and what it costs: its edits' grades against its time, for each method at several numbers of
steps, the defaults and ``preset="paper"`` among them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from ...avatars.captions import describe
from ...avatars.world import Subject, render, sample_person
from ...identity_adapter import IdentityAdapter
from ...prompt_words import insert_token
from ..costs.counts import UNetCounts, count_unet
from ..methods.fit_cache import FitTask, fit_identity
from ..methods.pipeline_arguments import AS_THE_MODEL_GIVES_IT, PipelineArguments
from ..metrics.classifier import load_attribute_classifier
from ..metrics.counterfactual import CounterfactualEdit, demo_edits
from ..metrics.intervals import paired_difference
from ..sheets import save_figure
from ..tables import markdown_table, number
from .edits import edit_scores

PAPER = 'preset="paper"'
_PLAIN_LORA = {
    "lora_layers": "attention", "lora_init": "random", "lora_rank": 4, "batch_size": 4, "lr_scheduler": "constant",
}  # fmt: skip
SERIES: Mapping[str, Sequence[Mapping[str, Any] | None]] = {
    "no identity": [None],
    PAPER: [{"preset": "paper"}],
    "the defaults": [{}],
    "lora": [{"num_steps": n} for n in (5, 10, 40)],
    "lora from a random start, attention alone": [
        {**_PLAIN_LORA, "num_steps": n, "learning_rate": rate} for n, rate in ((10, 3e-3), (60, 1e-3))
    ],
    "full, a falling rate": [
        {"method": "full", "num_steps": n, "learning_rate": 2.25e-3 / n, "lr_scheduler": "linear"} for n in (5, 15)
    ],
    "full": [{"method": "full"}],
    "token": [{"method": "token", "num_steps": n} for n in (10, 20, 40)],
}
"""Name -> the fits, as arguments of ``fit_identity``; None fits nothing."""


@dataclass(frozen=True)
class FitPoint:
    """One way to fit, over N people.

    Attributes:
        series: its name in ``SERIES``.
        num_steps: of each fit; 0 without one.
        scores: (N, 4), each person's mean over the edits: PSNR to the truth in dB, whole, inside the pixels that truly
            change and outside them, and the share done.
        seconds: median of the fits, the mask among them.
        evaluations, backward_evaluations: rows through the U-Net in a fit, see ``UNetCounts``.
    """

    series: str
    num_steps: int
    scores: np.ndarray
    seconds: float
    evaluations: int
    backward_evaluations: int


@dataclass(frozen=True)
class FitReport:
    """A point for each way to fit, over the same people."""

    points: tuple[FitPoint, ...]

    def table(self) -> str:
        """As Markdown, each row against the paper's."""
        paper = next(point for point in self.points if point.series == PAPER)
        head = [
            "fit", "steps", "U-Net rows, forward and backward", "seconds", "share of the paper's", "whole", "inside",
            "outside", "done", "whole, less the paper's (95%)", "done, less the paper's (95%)",
        ]  # fmt: skip
        rows = (
            [
                p.series, p.num_steps, f"{p.evaluations}, {p.backward_evaluations}", number(p.seconds, ".1f"),
                number(p.seconds / paper.seconds, ".3f"), *(number(float(mean)) for mean in p.scores.mean(0)),
                *("{:+.2f} ({:+.2f} to {:+.2f})".format(*_difference(p, paper, column)) for column in (0, 3)),
            ]
            for p in self.points
        )  # fmt: skip
        return markdown_table(head, rows)


def _difference(point: FitPoint, reference: FitPoint, column: int) -> tuple[float, float, float]:
    return paired_difference(point.scores[:, column], reference.scores[:, column])


def measure_fits(
    pipe: Any,
    people: Sequence[int] = range(4),
    *,
    series: Mapping[str, Sequence[Mapping[str, Any] | None]] = SERIES,
    edits_of: Callable[[Subject], list[CounterfactualEdit]] = demo_edits,
    num_inference_steps: int = 25,
    seed: int = 0,
) -> FitReport:
    """Fit each person in each way, and grade the edits against the drawings."""
    classifier = load_attribute_classifier()
    points = []
    for name, fits in series.items():
        for fit in fits:
            results = []
            for person_number in tqdm(people, desc=f"{name} {fit}", leave=False):
                person = sample_person(person_number, "held_out")
                edits = edits_of(person)
                task = FitTask(render(person), describe(person).text, person.noun, seed)
                with count_unet(pipe.unet) as counts:
                    identity = fit_identity(pipe, PipelineArguments(fit), task)
                images = _edited(pipe, identity, task, edits, num_inference_steps)
                results.append((identity, counts, edit_scores(edits, images, classifier)[:, [0, 1, 2, 4]].mean(0)))
            points.append(_point(name, results))
    return FitReport(tuple(points))


def _edited(
    pipe: Any,
    identity: IdentityAdapter | None,
    task: FitTask,
    edits: Sequence[CounterfactualEdit],
    num_inference_steps: int,
) -> list[Image.Image]:
    targets = [edit.target_prompt for edit in edits]
    if identity is not None:
        targets = [insert_token(target, task.subject, identity.token) for target in targets]
    settings = {"identity": identity, "num_inference_steps": num_inference_steps, **AS_THE_MODEL_GIVES_IT}
    images: list[Image.Image] = pipe(targets, task.picture, task.source_prompt, **settings).images
    return images


def _point(series: str, results: Sequence[tuple[IdentityAdapter | None, UNetCounts, np.ndarray]]) -> FitPoint:
    """Of each person's identity, what it asked of the U-Net, and its edits' mean scores."""
    identities = [identity for identity, _, _ in results if identity is not None]
    seconds = float(np.median([identity.measures["seconds"] for identity in identities])) if identities else 0.0
    num_steps = identities[-1].settings["num_steps"] if identities else 0
    _, counts, _ = results[-1]
    scores = np.stack([scores for _, _, scores in results])
    return FitPoint(series, num_steps, scores, seconds, counts.evaluations, counts.backward_evaluations)


def plot(report: FitReport, path: str) -> None:
    """Whole PSNR, and the share of edits done, against the fit's seconds; saved to ``path``.

    Raises:
        ImportError: matplotlib isn't there: ``pip install "s2edit-pipeline[evaluation]"``.
    """
    points = report.points
    with save_figure(path, (10, 4.6), dpi=110) as figure:
        from matplotlib.ticker import LogLocator, NullFormatter

        axes = figure.subplots(1, 2)
        for axis, column, label in zip(axes, (0, 3), ("PSNR to the truth, dB", "edits done"), strict=True):
            for name in dict.fromkeys(point.series for point in points):
                line = sorted((p for p in points if p.series == name), key=lambda p: p.seconds)
                heights = [float(p.scores[:, column].mean()) for p in line]
                if line[0].num_steps == 0:
                    axis.axhline(heights[0], color="grey", linestyle=":", label=name)
                else:
                    marker = "o-" if len(line) > 1 else "*"
                    axis.plot([p.seconds for p in line], heights, marker, markersize=8, label=name)
            axis.set(xscale="log", xlabel="seconds of a fit", ylabel=label)
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.grid(alpha=0.3)
        figure.legend(*axes[0].get_legend_handles_labels(), fontsize="small", ncols=4, loc="outside lower center")
