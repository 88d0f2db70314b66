"""Edits' seconds against steps, the picture's side and the number of edits in a call, with the law that they follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from ...avatars.captions import describe
from ...avatars.world import render, sample_person
from ..methods.pipeline_arguments import AS_THE_MODEL_GIVES_IT
from ..metrics.counterfactual import varied_edits
from ..sheets import save_figure
from ..tables import markdown_table, number
from .edits import PERSON
from .laws import LineFit, PowerFit, call_evaluations, fit_line, fit_power
from .timing import machine, take_turns


@dataclass(frozen=True)
class ScalingPoint:
    """A call of ``edits`` edits, inversion included, of a picture ``side`` pixels wide and high; median ``seconds``."""

    steps: int
    side: int
    edits: int
    evaluations: int
    seconds: float


@dataclass(frozen=True)
class Scaling:
    """What was measured, and fitted to it.

    Attributes:
        edits_steps: the steps of the calls that vary the number of edits, at the first side.
        by_side: side -> seconds of one edit as a line of U-Net evaluations.
        by_edits: the same over the number of edits in a call.
        slopes: the lines' slopes as a power of the side; None where there is one side only.
    """

    machine: Mapping[str, str | int]
    points: tuple[ScalingPoint, ...]
    edits_steps: int
    by_side: Mapping[int, LineFit]
    by_edits: LineFit
    slopes: PowerFit | None

    def table(self) -> str:
        """As Markdown: what was measured, then seconds = a + b × evaluations."""
        points = ([p.steps, p.side, p.edits, p.evaluations, number(p.seconds, ".3f")] for p in self.points)
        fits = {f"steps, {side} px": fit for side, fit in self.by_side.items()} | {"edits in a call": self.by_edits}
        laws = (
            [name, number(fit.intercept, ".3f"), number(1000 * fit.slope), number(fit.residual, ".1%")]
            for name, fit in fits.items()
        )
        parts = [
            markdown_table(["steps", "side", "edits", "U-Net evaluations", "seconds"], points),
            markdown_table(["what varies", "a, s", "b, ms", "largest residual"], laws),
        ]
        if self.slopes is not None:
            growth, residual = self.slopes.exponent, self.slopes.residual
            parts.append(f"b grows like side^{growth:.2f} (largest residual {residual:.1%}).")
        return "\n\n".join(parts)


def _of_one_edit(points: Sequence[ScalingPoint], side: int) -> list[ScalingPoint]:
    return [p for p in points if p.side == side and p.edits == 1]


def _of_several_edits(points: Sequence[ScalingPoint], steps: int, side: int) -> list[ScalingPoint]:
    return sorted((p for p in points if p.steps == steps and p.side == side), key=lambda p: p.edits)


def measure_scaling(
    pipe: Any,
    steps: Sequence[int] = (5, 10, 20, 35, 50),
    sides: Sequence[int] = (128, 192, 256),
    edits: Sequence[int] = (1, 2, 4, 8),
    repeats: int = 5,
) -> Scaling:
    """Measure in turns: all ``steps`` at the first of ``sides``, the first three at the others, and at the third the
    ``edits`` in one call.

    Raises:
        ValueError: fewer than two steps, or of edits.
    """
    person = sample_person(PERSON, "held_out")
    picture, prompt = render(person), describe(person).text
    targets = [edit.target_prompt for edit in varied_edits(person)]
    fewer = tuple(steps)[:3]
    settings = [(n, sides[0], 1) for n in steps]
    settings += [(n, side, 1) for side in sides[1:] for n in fewer]
    settings += [(fewer[-1], sides[0], n) for n in edits]

    def call(n: int, side: int, count: int) -> Callable[[], Any]:
        prompts = list(islice(cycle(targets), count))
        return lambda: pipe(
            prompts,
            image=picture,
            source_prompt=prompt,
            num_inference_steps=n,
            height=side,
            width=side,
            **{**AS_THE_MODEL_GIVES_IT, "output_size": "model"},
        )

    runs = {str(setting): call(*setting) for setting in dict.fromkeys(settings)}
    for side in sides:
        call(fewer[0], side, 1)()  # what only the first run of a size has to do
    timings = take_turns(runs, pipe.unet, repeats)
    points = []
    for setting in dict.fromkeys(settings):
        n, side, count = setting
        timing = timings[str(setting)]
        evaluations = call_evaluations(n, count)
        assert timing.counts.evaluations == evaluations, f"{setting}: {timing.counts} for {evaluations} evaluations"
        points.append(ScalingPoint(n, side, count, evaluations, timing.median))

    def line(chosen: Sequence[ScalingPoint]) -> LineFit:
        return fit_line([p.evaluations for p in chosen], [p.seconds for p in chosen])

    by_side = {side: line(_of_one_edit(points, side)) for side in sides}
    slopes = fit_power(list(by_side), [fit.slope for fit in by_side.values()]) if len(by_side) > 1 else None
    by_edits = line(_of_several_edits(points, fewer[-1], sides[0]))
    return Scaling(machine(pipe.unet.device), tuple(points), fewer[-1], by_side, by_edits, slopes)


def plot(scaling: Scaling, out: str | Path) -> None:
    """Three panels, what was measured and the fitted law, into the picture file ``out``.

    Raises:
        ImportError: matplotlib isn't there: ``pip install "s2edit-pipeline[evaluation]"``.
    """
    with save_figure(out, (11, 3.4)) as figure:
        of_steps, of_sides, of_edits = figure.subplots(1, 3)
        for side, fit in scaling.by_side.items():
            measured = _of_one_edit(scaling.points, side)
            (drawn,) = of_steps.plot(
                [p.steps for p in measured], [p.seconds for p in measured], "o", label=f"{side} px"
            )
            law = [fit.at(p.evaluations) for p in measured]
            of_steps.plot([p.steps for p in measured], law, color=drawn.get_color(), linewidth=1)
        of_steps.set(title="one edit, inversion included", xlabel="steps", ylabel="seconds", ylim=(0, None))
        of_steps.legend()
        sides = list(scaling.by_side)
        of_sides.plot(sides, [1000 * fit.slope for fit in scaling.by_side.values()], "o")
        if scaling.slopes is not None:
            law = [1000 * scaling.slopes.at(side) for side in sides]
            of_sides.plot(sides, law, linewidth=1, label=f"side^{scaling.slopes.exponent:.2f}")
            of_sides.set(xscale="log", yscale="log")
            of_sides.legend()
        of_sides.set(title="each U-Net evaluation", xlabel="side, pixels", ylabel="milliseconds")
        of_sides.set_xticks(sides, [str(side) for side in sides], minor=False)
        of_sides.set_xticks([], minor=True)
        calls = _of_several_edits(scaling.points, scaling.edits_steps, sides[0])
        of_edits.plot([p.edits for p in calls], [p.seconds for p in calls], "o")
        of_edits.plot([p.edits for p in calls], [scaling.by_edits.at(p.evaluations) for p in calls], linewidth=1)
        of_edits.set(
            title=f"one call, {scaling.edits_steps} steps", xlabel="edits in it", ylabel="seconds", ylim=(0, None)
        )
