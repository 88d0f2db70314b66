"""Composition graded: something of one person on another (clothes, headwear, hair, glasses, a beard, a mark in the face
that no word describes), beside the drawing of just that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from itertools import count, cycle, islice
from typing import Any

import numpy as np
from PIL import Image, ImageFilter
from tqdm.auto import tqdm

from ...avatars.captions import describe
from ...avatars.world import PERSON_ATTRIBUTES, Person, changed_pixels, render, sample_person
from ...fit_settings import ReferenceAttribute
from ...prompt_words import insert_token
from ..methods.fit_cache import FitCache, FitTask
from ..methods.pipeline_arguments import AS_THE_MODEL_GIVES_IT, PipelineArguments
from ..metrics.classifier import AttributeClassifier, load_attribute_classifier
from ..metrics.counterfactual import grade_against
from ..metrics.intervals import bootstrap_interval
from ..tables import markdown_table, number

_MOVED = {
    "clothes": ("clothes", "clothes_color", "clothes_shade", "garment", "print"),
    "headwear": ("headwear", "headwear_color", "headwear_shade"),
    "hair": ("hair", "hair_color", "hair_shade", "cut"),
    "glasses": ("glasses",),
    "facial_hair": ("facial_hair",),
    "mark": ("mark",),
}
"""Part -> what of a person goes with it, shades, cuts and prints that no caption names among it."""

PARTS = tuple(_MOVED)
MARK_REACH = 8
"""How far around a mark its mask reaches, in pixels: a cell of the latents."""

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
        """The word before which ``[A]`` stands. Glasses are "glasses", dark or not; a mark has no word of its own, so
        that ``[A]`` stands before the person's."""
        nouns = {"hair": "hair", "glasses": "glasses", "mark": self.reference.noun}
        return nouns.get(self.part) or str(getattr(self.reference, self.part))

    @property
    def truth(self) -> Person:
        return replace(self.source, **{name: getattr(self.reference, name) for name in _MOVED[self.part]})

    @property
    def source_prompt(self) -> str:
        return describe(self.source).text

    @property
    def reference_prompt(self) -> str:
        """The reference's caption without the adjectives of the part: what no word says, ``[A]`` has to."""
        return self._bare(self.reference)

    @property
    def target_prompt(self) -> str:
        """The source as it will be, ``[A]`` in place of the part's adjectives."""
        return insert_token(self._bare(self.truth), self.noun, "[A]")

    @property
    def reference_mask(self) -> np.ndarray | None:
        """(128, 128) bool: where the mark is, which no noun's attention would find; None for the other parts."""
        if self.part != "mark":
            return None
        mark = changed_pixels(self.reference, replace(self.reference, mark="none"))
        around = Image.fromarray(mark).convert("L").filter(ImageFilter.MaxFilter(2 * MARK_REACH + 1))
        return np.asarray(around) > 0

    def _bare(self, person: Person) -> str:
        """The caption of ``person``, who has the part, without what stands between "a", "with" or "and" and that."""
        words = describe(person).text.split()
        if self.part == "mark":
            return " ".join(words)
        word = str(getattr(person, self.part)) if self.part == "glasses" else self.noun
        end = words.index(word)
        words[end] = self.noun
        start = end
        while words[start - 1] not in ("a", "an", "with", "and"):
            start -= 1
        remaining = [*words[:start], *words[end:]]
        if words[start - 1] in ("a", "an"):
            remaining[start - 1] = "an" if self.noun[0] in "aeiou" else "a"
        return " ".join(remaining)


_FITS_SOURCE: Mapping[str, Callable[[Person], bool]] = {
    "clothes": lambda p: True,
    "headwear": lambda p: True,
    "hair": lambda p: True,
    "glasses": lambda p: p.glasses == "none",
    "facial_hair": lambda p: p.noun == "man" and p.facial_hair == "none",
    "mark": lambda p: p.mark == "none" and p.glasses == "none",  # glasses would hide it
}
_FITS_REFERENCE: Mapping[str, Callable[[Person], bool]] = {
    "clothes": lambda p: p.clothes != "overalls",
    "headwear": lambda p: p.headwear != "none",
    "hair": lambda p: p.headwear == "none" and p.hair != "bald",
    "glasses": lambda p: p.glasses != "none",
    "facial_hair": lambda p: p.facial_hair != "none",
    "mark": lambda p: p.mark != "none" and p.glasses == "none",
}


def _people(first: int, fits: Callable[[Person], bool]) -> Iterator[Person]:
    return (p for seed in count(first) if fits(p := sample_person(seed, "held_out")))


def composition_pairs(
    number: int, *, sources_from: int = 0, references_from: int = REFERENCE_FIRST
) -> list[CompositionPair]:
    """``number`` pairs of held-out people, the parts by turns; sources show their hair, and nobody is one twice.

    A beard has the colour of its wearer's hair in this world, so its reference gets the source's.

    Args:
        sources_from, references_from: the first person to be looked at, among each.
    """
    references = {part: _people(references_from, _FITS_REFERENCE[part]) for part in PARTS}

    def pairs() -> Iterator[CompositionPair]:
        taken: set[Person] = set()
        for part in cycle(PARTS):
            source = next(
                p
                for p in _people(sources_from, _FITS_SOURCE[part])
                if p.headwear == "none" and p.hair != "bald" and p not in taken
            )
            reference = next(
                p for p in references[part] if p not in taken and (part != "mark" or p.noun == source.noun)
            )
            taken |= {source, reference}
            if part == "facial_hair":
                reference = replace(reference, hair_color=source.hair_color, hair_shade=source.hair_shade)
            pair = CompositionPair(source, reference, part)
            if changed_pixels(pair.source, pair.truth).any():  # two may wear the same
                yield pair

    return list(islice(pairs(), number))


SETTINGS: Mapping[str, PipelineArguments] = {
    "both controls": PipelineArguments(),
    "no semantic control": PipelineArguments(fit={"semantic_weight": 0.0}),
    "no spatial control": PipelineArguments(fit={"spatial_control": False}),
    "identity fine-tuning alone": PipelineArguments(fit={"semantic_weight": 0.0, "spatial_control": False}),
}
"""As the method says, with either control off, and with both."""


@dataclass(frozen=True)
class CompositionRow:
    """One setting's results, an entry for each pair.

    Attributes:
        parts: (N,) what was given.
        whole, inside, outside: (N,) PSNR to the truth in dB: over the picture, inside the pixels that truly change, and
            outside them.
        unedited_inside: (N,) inside, of the source as it was.
        agreement: (N,) the share of the part's named attributes that the classifier reads as in the truth; NaN for a
            mark, which has no name.
        pictures: source, reference, composition, truth.
    """

    name: str
    parts: np.ndarray
    whole: np.ndarray
    inside: np.ndarray
    outside: np.ndarray
    unedited_inside: np.ndarray
    agreement: np.ndarray
    pictures: list[tuple[Image.Image, Image.Image, Image.Image, Image.Image]] = field(metadata={"json": False})

    def of(self, part: str) -> CompositionRow:
        """The pairs of ``part`` alone."""
        chosen = self.parts == part
        arrays = {
            name: getattr(self, name)[chosen]
            for name in ("parts", "whole", "inside", "outside", "unedited_inside", "agreement")
        }
        return replace(self, **arrays, pictures=[p for p, c in zip(self.pictures, chosen, strict=True) if c])


@dataclass(frozen=True)
class CompositionReport:
    """A row for each setting, over the same pairs."""

    rows: tuple[CompositionRow, ...]

    def table(self) -> str:
        """As Markdown: of all pairs and of each part's, means with 95 % intervals and the paired difference to the
        first row."""
        head = ["part (pairs)", "fitted with", "whole", "inside", "outside"]
        head += ["inside, less the first row's", "read as the truth"]
        cells: list[list[str | None]] = []
        parts = [part for part in PARTS if (self.rows[0].parts == part).any()]
        for part in (None, *parts):
            rows = [row if part is None else row.of(part) for row in self.rows]
            first = rows[0]
            title = f"{'all' if part is None else part.replace('_', ' ')} ({len(first.parts)})"
            for row in rows:
                difference = None if row is first else _cell(row.inside - first.inside)
                scores = (_cell(values) for values in (row.whole, row.inside, row.outside))
                cells.append([title, row.name, *scores, difference, _cell(row.agreement)])
            unedited = number(float(first.unedited_inside.mean()))
            cells.append([title, "(the source as it was)", "", unedited, "", "", ""])
        return markdown_table(head, cells)


def _cell(values: np.ndarray) -> str:
    """Mean and interval of those that are numbers; nothing where none is."""
    values = values[~np.isnan(values)]
    if not len(values):
        return ""
    low, high = bootstrap_interval(values)
    return f"{values.mean():.2f} [{low:.2f}, {high:.2f}]"


def measure_compositions(
    pipe: Any,
    pairs: Sequence[CompositionPair],
    settings: Mapping[str, PipelineArguments] = SETTINGS,
    *,
    num_steps: int | None = None,
    num_inference_steps: int = 25,
    seed: int = 0,
) -> CompositionReport:
    """Fit and compose every pair, once for each of ``settings``; those that fit alike share the fit.

    Args:
        num_steps: of each fit; None takes the default's.
        num_inference_steps: of each edit.
        seed: of each fit's noise.
    """
    classifier, fits = load_attribute_classifier(), FitCache()
    scores: dict[str, list[tuple[float, ...]]] = {name: [] for name in settings}
    pictures: dict[str, list[tuple[Image.Image, Image.Image, Image.Image, Image.Image]]] = {n: [] for n in settings}
    for pair in tqdm(pairs, desc="compositions"):
        source, reference, truth = (render(p) for p in (pair.source, pair.reference, pair.truth))
        for name, setting in settings.items():
            arguments = setting if num_steps is None else setting.with_changes(fit={"num_steps": num_steps})
            masked = (arguments.fit or {}).get("spatial_control", True)  # without spatial control a mask has no effect
            mask = pair.reference_mask if masked else None
            attribute = ReferenceAttribute(reference, pair.reference_prompt, pair.noun, mask=mask)
            task = FitTask(source, pair.source_prompt, pair.source.noun, seed, attribute)
            composed = pipe(
                insert_token(pair.target_prompt, pair.source.noun, "[I]"),
                source,
                pair.source_prompt,
                fits.identity(pipe, arguments, task),
                arguments.inversion,
                num_inference_steps=num_inference_steps,
                **{**AS_THE_MODEL_GIVES_IT, **arguments.edit},
            ).images[0]
            graded = astuple(grade_against(pair.source, pair.truth, composed))
            scores[name].append((*graded, part_agreement(classifier, pair, composed)))
            pictures[name].append((source, reference, composed, truth))
    parts = np.array([pair.part for pair in pairs])
    rows = []
    for name in settings:
        whole, inside, outside, unedited, agreement = np.array(scores[name]).T
        rows.append(CompositionRow(name, parts, whole, inside, outside, unedited, agreement, pictures[name]))
    return CompositionReport(tuple(rows))


def part_agreement(classifier: AttributeClassifier, pair: CompositionPair, composed: Image.Image) -> float:
    """The share of the part's named attributes that ``classifier`` reads in ``composed`` as in the truth; NaN where it
    has none."""
    truth = pair.truth
    named = [name for name in _MOVED[pair.part] if name in PERSON_ATTRIBUTES and truth.shows(name)]
    (predicted,) = classifier.predict(np.array(composed.convert("RGB"))[None])
    return float(np.mean([predicted[name] == getattr(truth, name) for name in named])) if named else float("nan")


def sheet(report: CompositionReport, num_pairs: int = 2 * len(PARTS)) -> Image.Image:
    """A line for each of the first ``num_pairs`` pairs: source, reference, truth, and each row's composition."""
    lines, rows = [], report.rows
    for i in range(min(num_pairs, len(rows[0].pictures))):
        source, reference, _, truth = rows[0].pictures[i]
        compositions = [row.pictures[i][2] for row in rows]
        lines.append(np.concatenate([np.asarray(p) for p in (source, reference, truth, *compositions)], 1))
    return Image.fromarray(np.concatenate(lines))
