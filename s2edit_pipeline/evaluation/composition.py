"""Composition graded: one person's shirt, headwear or hair on another, beside the drawing of just that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import count, cycle
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ..avatars.captions import describe
from ..avatars.world import Person, changed_pixels, render, sample_person
from ..identity_fitting import ReferenceAttribute
from ..prompt_alignment import insert_token
from .counterfactual import grade_against
from .intervals import bootstrap_interval

_MOVED = {
    "clothes": ("clothes", "clothes_color", "clothes_shade", "garment", "print"),
    "headwear": ("headwear", "headwear_color", "headwear_shade"),
    "hair": ("hair", "hair_color", "hair_shade", "cut"),
}
"""Part -> what of a person goes with it, shades, cuts and prints that no caption names among it."""

REFERENCE_FIRST = 10_000
"""The first of the held-out people that serve as references."""


@dataclass(frozen=True)
class CompositionPair:
    """Give ``part`` of ``reference`` to ``source``."""

    source: Person
    reference: Person
    part: str

    @property
    def noun(self) -> str:
        """The word before which ``[A]`` stands."""
        return "hair" if self.part == "hair" else str(getattr(self.reference, self.part))

    @property
    def truth(self) -> Person:
        return replace(self.source, **{name: getattr(self.reference, name) for name in _MOVED[self.part]})

    @property
    def source_prompt(self) -> str:
        return describe(self.source).text

    @property
    def reference_prompt(self) -> str:
        """The reference's caption without the adjectives of the part: what no word says, ``[A]`` has to."""
        return _bare(describe(self.reference).text, self.noun)

    @property
    def target_prompt(self) -> str:
        """The source as it will be, ``[A]`` in place of the part's adjectives."""
        return insert_token(_bare(describe(self.truth).text, self.noun), self.noun, "[A]")


def _bare(caption: str, noun: str) -> str:
    """``caption`` without what stands between "a", "with" or "and" and ``noun``."""
    words = caption.split()
    end = words.index(noun)
    start = end
    while words[start - 1] not in ("a", "an", "with", "and"):
        start -= 1
    kept = [*words[:start], *words[end:]]
    if words[start - 1] in ("a", "an"):
        kept[start - 1] = "an" if noun[0] in "aeiou" else "a"
    return " ".join(kept)


def composition_pairs(number: int) -> list[CompositionPair]:
    """``number`` pairs of held-out people, the three parts by turns; sources show their hair."""

    def people(first: int) -> Iterator[Person]:
        return (sample_person(seed, "held_out") for seed in count(first))

    sources = (p for p in people(0) if p.headwear == "none" and p.hair != "bald")
    references = {
        "clothes": (p for p in people(REFERENCE_FIRST) if p.clothes != "overalls"),
        "headwear": (p for p in people(REFERENCE_FIRST) if p.headwear != "none"),
        "hair": (p for p in people(REFERENCE_FIRST) if p.headwear == "none" and p.hair != "bald"),
    }
    pairs: list[CompositionPair] = []
    for part, source in zip(cycle(references), sources):
        pair = CompositionPair(source, next(references[part]), part)
        if changed_pixels(pair.source, pair.truth).mean() > 0.01:  # two may wear the same
            pairs.append(pair)
        if len(pairs) == number:
            break
    return pairs


SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "both controls": {},
    "identity fine-tuning alone": {"semantic_weight": 0.0, "spatial_control": False},
}
"""How the pairs are fitted: as the method says, and with both controls off."""


@dataclass(frozen=True)
class CompositionRow:
    """PSNR to the truth in dB for each pair: whole, inside the pixels that truly change, outside them; inside of the
    source as it was; and (N, 4) pictures each: source, reference, composition, truth."""

    name: str
    whole: np.ndarray
    inside: np.ndarray
    outside: np.ndarray
    unedited_inside: np.ndarray
    pictures: list[tuple[Image.Image, Image.Image, Image.Image, Image.Image]]


def measure_compositions(
    pipe: Any, pairs: Sequence[CompositionPair], *, num_steps: int = 80, num_inference_steps: int = 25, seed: int = 0
) -> list[CompositionRow]:
    """Fit and compose every pair, once for each of ``SETTINGS``."""
    rows = []
    for name, settings in SETTINGS.items():
        scores, pictures = [], []
        for pair in tqdm(pairs, desc=name):
            source, reference, truth = (render(p) for p in (pair.source, pair.reference, pair.truth))
            identity = pipe.fit_identity(
                source,
                pair.source_prompt,
                pair.source.noun,
                reference=ReferenceAttribute(reference, pair.reference_prompt, pair.noun),
                num_steps=num_steps,
                generator=torch.Generator().manual_seed(seed),
                **settings,
            )
            prompt = insert_token(pair.target_prompt, pair.source.noun, "[I]")
            result = pipe(prompt, source, pair.source_prompt, identity, num_inference_steps=num_inference_steps)
            composed = result.images[0]
            scores.append(astuple(grade_against(pair.source, pair.truth, composed)))
            pictures.append((source, reference, composed, truth))
        whole, inside, outside, unedited = np.array(scores).T
        rows.append(CompositionRow(name, whole, inside, outside, unedited, pictures))
    return rows


def table(rows: Sequence[CompositionRow]) -> str:
    """As Markdown: means with 95 % intervals, and the paired difference to the first row."""
    lines = ["| fitted with | whole | inside | outside | inside, less the first row's |", "|---|---|---|---|---|"]

    def cell(values: np.ndarray) -> str:
        low, high = bootstrap_interval(values)
        return f"{values.mean():.2f} [{low:.2f}, {high:.2f}]"

    for row in rows:
        paired = "-" if row is rows[0] else cell(row.inside - rows[0].inside)
        lines.append(f"| {row.name} | {cell(row.whole)} | {cell(row.inside)} | {cell(row.outside)} | {paired} |")
    lines.append(f"| (the source as it was) | | {rows[0].unedited_inside.mean():.2f} | | |")
    return "\n".join(lines)


def sheet(rows: Sequence[CompositionRow], number: int = 8) -> Image.Image:
    """A line for each pair: source, reference, truth, and each row's composition."""
    lines = []
    for i in range(min(number, len(rows[0].pictures))):
        source, reference, _, truth = rows[0].pictures[i]
        made = [row.pictures[i][2] for row in rows]
        lines.append(np.concatenate([np.asarray(p) for p in (source, reference, truth, *made)], 1))
    return Image.fromarray(np.concatenate(lines))
