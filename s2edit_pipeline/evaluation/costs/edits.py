"""What edits cost, beside diffusers' own pipeline drawing a picture on the same model, and beside null-text's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from ...avatars.captions import describe
from ...avatars.world import render, sample_person
from ...edit_settings import EditSettings
from ..methods.pipeline_arguments import AS_THE_MODEL_GIVES_IT, PROMPT_TO_PROMPT
from ..metrics.counterfactual import demo_edits
from ..metrics.pixels import psnr
from ..tables import markdown_table, number
from .laws import free_edit_evaluations, null_text_evaluations
from .timing import Timing, machine, take_turns

ITEMS: Mapping[str, str] = {
    "stock": "diffusers' own pipeline draws one picture",
    "first": "the first edit in one call, its inversion included",
    "inverted_first": "the first edit after a call of pipe.invert, which keeps attention; both",
    "further": "each further edit with that inversion",
    "three": "three edits in one call, inversion included",
    "null_text": "null-text inversion and prompt-to-prompt, as published",
}

PERSON = 3
"""A held-out person with at least three edits."""


@dataclass(frozen=True)
class CostRow:
    """One of ``ITEMS``.

    Attributes:
        evaluations, backward_evaluations, cost: see ``UNetCounts``.
        seconds: of each repeat.
        times_stock: the median over repeats of the seconds, as a multiple of the stock pipeline's in the same one.
        psnr: of what the inversion returns of the picture, in dB; None where nothing was inverted.
    """

    item: str
    evaluations: int
    backward_evaluations: int
    cost: int
    seconds: tuple[float, ...]
    times_stock: float
    psnr: float | None


@dataclass(frozen=True)
class EditCosts:
    """A row for each item that was measured.

    Attributes:
        side: of the picture, None the model's own.
        null_text_cost: as ``CostRow.cost``, of null-text inversion and an edit where no optimisation stops early.
        ratios: see :func:`null_text_ratios`.
    """

    num_inference_steps: int
    side: int | None
    machine: Mapping[str, str | int]
    rows: tuple[CostRow, ...]
    null_text_cost: int
    ratios: Mapping[str, float | None]

    def table(self) -> str:
        """As Markdown; an item that was left out says so."""
        measured = {row.item: row for row in self.rows}
        items = [_cells(name, measured.get(item)) for item, name in ITEMS.items()]
        items.append(["(null-text, where nothing stops early)", "", "", self.null_text_cost, "", "", ""])
        head = ["evaluations", "backward", "cost", "seconds", "× stock", "PSNR, dB"]
        return "\n\n".join(
            [
                markdown_table([f"in {self.num_inference_steps} steps", *head], items),
                markdown_table(
                    ["null-text with prompt-to-prompt, as a multiple of", ""],
                    ([name, number(ratio) or "not measured"] for name, ratio in self.ratios.items()),
                ),
            ]
        )


def _cells(name: str, row: CostRow | None) -> list[str | int | None]:
    if row is None:
        return [name, "not measured", "", "", "", "", ""]
    seconds = number(float(np.median(row.seconds)))
    counts = [row.evaluations, row.backward_evaluations, row.cost]
    return [name, *counts, seconds, number(row.times_stock), number(row.psnr) or ""]


def measure_edit_costs(
    pipe: Any,
    num_inference_steps: int = 50,
    repeats: int = 5,
    *,
    items: Sequence[str] = tuple(ITEMS),
    guidance_scale: float = EditSettings.guidance_scale,
    side: int | None = None,
) -> EditCosts:
    """Measure ``items`` on a held-out person under the full caption; they take turns, the stock pipeline always first.

    Args:
        side: of the picture in pixels; None takes the model's own. On a small one the time between a tiny model's
            layers weighs more than the layers.

    Raises:
        ValueError: an item that there isn't.
    """
    for item in items:
        if item not in ITEMS:
            raise ValueError(f"The item {item!r} is unknown; choose from {', '.join(ITEMS)}.")
    person = sample_person(PERSON, "held_out")
    picture, prompt = render(person), describe(person).text
    targets = [edit.target_prompt for edit in demo_edits(person)][:3]
    stock = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    if side is not None:
        settings |= {"height": side, "width": side}
        picture = picture.resize((side, side))

    def edit(prompts: str | list[str], **changes: Any) -> Any:
        return pipe(prompts, image=picture, source_prompt=prompt, **{**AS_THE_MODEL_GIVES_IT, **settings, **changes})

    inverting = {name: value for name, value in settings.items() if name != "guidance_scale"}
    inversion = pipe.invert(picture, prompt, **inverting)
    runs: dict[str, Callable[[], Any]] = {
        "stock": lambda: stock(prompt, generator=torch.Generator().manual_seed(0), **settings),
        "first": lambda: edit(targets[0]),
        "inverted_first": lambda: edit(targets[0], inversion=pipe.invert(picture, prompt, **inverting)),
        "further": lambda: edit(targets[1], inversion=inversion),
        "three": lambda: edit(targets),
        "null_text": lambda: edit(targets[0], inversion="null_text", **PROMPT_TO_PROMPT),
    }
    for item in ("stock", "first"):
        runs[item]()  # what only the first run of a process has to do
    wanted = {item: runs[item] for item in ITEMS if item == "stock" or item in items}
    timings = take_turns(wanted, pipe.unet, repeats)
    rows = []
    for item, timing in timings.items():
        counts = timing.counts
        returned = None if item == "stock" else psnr(timing.result.source, picture)
        rows.append(
            CostRow(
                item, counts.evaluations, counts.backward_evaluations, counts.cost, timing.seconds,
                timing.times(timings["stock"]), returned,
            )
        )  # fmt: skip
    forward, backward = null_text_evaluations(num_inference_steps)
    return EditCosts(
        num_inference_steps,
        settings.get("height"),
        machine(pipe.unet.device),
        tuple(rows),
        forward + free_edit_evaluations(num_inference_steps) + 2 * backward,
        null_text_ratios(timings),
    )


def null_text_ratios(timings: Mapping[str, Timing]) -> dict[str, float | None]:
    """How many times as much null-text with prompt-to-prompt takes as an edit, inversion included; None where one of
    the two wasn't measured.

    Args:
        timings: of ``ITEMS``, by name.
    """
    null_text = timings.get("null_text")
    first, inverted_first = timings.get("first"), timings.get("inverted_first")
    return {
        "the first edit in one call, cost": _ratio(null_text, first, lambda a, b: a.counts.cost / b.counts.cost),
        "the first edit in one call, seconds": _ratio(null_text, first, Timing.times),
        "pipe.invert and the first edit, seconds": _ratio(null_text, inverted_first, Timing.times),
    }


def _ratio(a: Timing | None, b: Timing | None, ratio: Callable[[Timing, Timing], float]) -> float | None:
    return None if a is None or b is None else ratio(a, b)
