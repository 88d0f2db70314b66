"""What a fit is worth and what it costs: its edits' grades against its time, for each method at several numbers of
steps, the defaults and ``preset="paper"`` among them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ...avatars.captions import describe
from ...avatars.world import Subject, render, sample_person
from ...prompt_alignment import insert_token
from ..costs.counts import count_unet
from ..metrics.classifier import load_attribute_classifier
from ..metrics.counterfactual import CounterfactualEdit, demo_edits, grade
from ..metrics.intervals import bootstrap_interval
from ..sheets import save_figure

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
        evaluations, backward_evaluations: rows through the U-Net in a fit, see ``unet_counts``.
    """

    series: str
    num_steps: int
    scores: np.ndarray
    seconds: float
    evaluations: int
    backward_evaluations: int


def measure_fits(
    pipe: Any,
    people: Sequence[int] = range(4),
    *,
    series: Mapping[str, Sequence[Mapping[str, Any] | None]] = SERIES,
    edits_of: Callable[[Subject], list[CounterfactualEdit]] = demo_edits,
    num_inference_steps: int = 25,
    seed: int = 0,
) -> list[FitPoint]:
    """Fit each person in each way, and grade the edits against the drawings."""
    classifier = load_attribute_classifier()
    points = []
    for name, fits in series.items():
        for arguments in fits:
            scores, seconds, steps, counts = [], [0.0], 0, None
            for number in tqdm(people, desc=f"{name} {arguments}", leave=False):
                person = sample_person(number, "held_out")
                picture, prompt, identity = render(person), describe(person).text, None
                edits = edits_of(person)
                targets = [edit.target_prompt for edit in edits]
                if arguments is not None:
                    generator = torch.Generator().manual_seed(seed)
                    with count_unet(pipe.unet) as counts:
                        identity = pipe.fit_identity(picture, prompt, person.noun, generator=generator, **arguments)
                    seconds.append(identity.measures["seconds"])
                    steps = identity.settings["num_steps"]
                    targets = [insert_token(target, person.noun, identity.token) for target in targets]
                images = pipe(
                    targets, picture, prompt, identity=identity, num_inference_steps=num_inference_steps
                ).images
                read = classifier.predict(np.stack([np.asarray(image) for image in images]))
                graded = []
                for edit, image, found in zip(edits, images, read, strict=True):
                    marks = grade(edit, image)
                    graded.append((marks.whole, marks.inside, marks.outside, edit.is_read_in(found)))
                scores.append(np.mean(graded, 0))
            forward, backward = (counts.evaluations, counts.backward_evaluations) if counts else (0, 0)
            taken = float(np.median(seconds[1:] or seconds))
            points.append(FitPoint(name, steps, np.stack(scores), taken, forward, backward))
    return points


def paired_difference(found: np.ndarray, reference: np.ndarray) -> tuple[float, float, float]:
    """Mean of ``found - reference`` over the same N people, and its 95% interval (bootstrap over people)."""
    difference = found - reference
    return (float(difference.mean()), *bootstrap_interval(difference))


def table(points: Sequence[FitPoint]) -> str:
    """As Markdown, each row against the paper's."""
    paper = next(point for point in points if point.series == PAPER)
    lines = [
        "| fit | steps | U-Net rows, forward and backward | seconds | share of the paper's | whole | inside | outside "
        "| done | whole, less the paper's (95%) | done, less the paper's (95%) |",
        "|" + "---|" * 11,
    ]
    for p in points:
        whole, inside, outside, done = p.scores.mean(0)
        differences = [
            "{:+.2f} ({:+.2f} to {:+.2f})".format(*paired_difference(p.scores[:, i], paper.scores[:, i]))
            for i in (0, 3)
        ]
        lines.append(
            f"| {p.series} | {p.num_steps} | {p.evaluations}, {p.backward_evaluations} | {p.seconds:.1f} | "
            f"{p.seconds / paper.seconds:.3f} | {whole:.2f} | {inside:.2f} | {outside:.2f} | {done:.2f} | "
            f"{' | '.join(differences)} |"
        )
    return "\n".join(lines)


def plot(points: Sequence[FitPoint], path: str) -> None:
    """Whole PSNR, and the share of edits done, against the fit's seconds; saved to ``path``.

    Raises:
        ImportError: matplotlib isn't there: ``pip install "s2edit-pipeline[evaluation]"``.
    """
    with save_figure(path, (10, 4.6), dpi=110) as figure:
        from matplotlib.ticker import LogLocator, NullFormatter

        axes = figure.subplots(1, 2)
        for axis, column, label in zip(axes, (0, 3), ("PSNR to the truth, dB", "edits done"), strict=True):
            for name in dict.fromkeys(point.series for point in points):
                own = sorted((p for p in points if p.series == name), key=lambda p: p.seconds)
                heights = [float(p.scores[:, column].mean()) for p in own]
                if own[0].num_steps == 0:
                    axis.axhline(heights[0], color="grey", linestyle=":", label=name)
                else:
                    axis.plot(
                        [p.seconds for p in own], heights, "o-" if len(own) > 1 else "*", markersize=8, label=name
                    )
            axis.set(xscale="log", xlabel="seconds of a fit", ylabel=label)
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.grid(alpha=0.3)
        figure.legend(*axes[0].get_legend_handles_labels(), fontsize="small", ncols=4, loc="outside lower center")
