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
from ...edit_sampling import EditSettings
from ..metrics.counterfactual import demo_edits
from ..metrics.pixels import psnr
from ..targets import Target, at_least, at_most, target_table
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

PUBLISHED: Mapping[str, Any] = {
    "inversion": "null_text",
    "guidance_stop": 1.0,
    "blend_words": False,
    "cross_replace_steps": 0.8,
    "self_replace_steps": 0.5,
}
"""Null-text inversion with prompt-to-prompt as its authors' notebook sets it: guided to the end, unconfined."""

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
    """``side``: of the picture, None the model's own; ``null_text_cost``: as ``CostRow.cost``, of null-text inversion
    and an edit where no optimisation stops early."""

    num_inference_steps: int
    side: int | None
    machine: Mapping[str, str | int]
    rows: tuple[CostRow, ...]
    null_text_cost: int
    targets: tuple[Target, ...]

    def table(self) -> str:
        """As Markdown; an item that was left out says so."""
        lines = [
            f"| in {self.num_inference_steps} steps | evaluations | backward | cost | seconds | × stock | PSNR, dB |",
            "|---|---|---|---|---|---|---|",
        ]
        measured = {row.item: row for row in self.rows}
        for item, name in ITEMS.items():
            if item not in measured:
                lines.append(f"| {name} | not measured | | | | | |")
                continue
            row = measured[item]
            returned = "" if row.psnr is None else f"{row.psnr:.2f}"
            lines.append(
                f"| {name} | {row.evaluations} | {row.backward_evaluations} | {row.cost} | "
                f"{np.median(row.seconds):.2f} | {row.times_stock:.2f} | {returned} |"
            )
        lines.append(f"| (null-text, where nothing stops early) | | | {self.null_text_cost} | | | |")
        return "\n".join([*lines, "", target_table(self.targets)])


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
        return pipe(prompts, image=picture, source_prompt=prompt, **settings, **changes)

    inversion = pipe.invert(picture, prompt, **settings)
    runs: dict[str, Callable[[], Any]] = {
        "stock": lambda: stock(prompt, generator=torch.Generator().manual_seed(0), **settings),
        "first": lambda: edit(targets[0]),
        "inverted_first": lambda: edit(targets[0], inversion=pipe.invert(picture, prompt, **settings)),
        "further": lambda: edit(targets[1], inversion=inversion),
        "three": lambda: edit(targets),
        "null_text": lambda: edit(targets[0], **PUBLISHED),
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
        _targets(timings),
    )


def _targets(timings: Mapping[str, Timing]) -> tuple[Target, ...]:
    stock, first, inverted_first, further, null_text = (
        timings.get(item) for item in ("stock", "first", "inverted_first", "further", "null_text")
    )
    assert stock is not None

    def seconds(one: Timing | None, other: Timing | None) -> float | None:
        return None if one is None or other is None else one.times(other)

    cost = None if null_text is None or first is None else null_text.counts.cost / first.counts.cost
    return (
        at_most("first edit in one call, seconds × stock", 1.7, seconds(first, stock)),
        at_most("pipe.invert and first edit, seconds × stock", 1.7, seconds(inverted_first, stock)),
        at_most("further edit, seconds × stock", 1.15, seconds(further, stock)),
        at_least("null-text, evaluations × first edit in one call", 10, cost),
        at_least("null-text, seconds × first edit in one call", 8, seconds(null_text, first)),
        at_least("null-text, seconds × pipe.invert and first edit", 8, seconds(null_text, inverted_first)),
    )
