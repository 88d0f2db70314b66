"""Edits of a held-out drawn subject: every kind that a caption can ask for and a drawing can answer."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice, zip_longest
from typing import Any

import numpy as np

from ...avatars.creatures import CREATURE_MARKS, HELD_OUT_EYES, NUM_EARS, NUM_HEADS, NUM_LAYOUTS
from ...avatars.drawing import SHADES
from ...avatars.people import HAIR_COLORS, MARKS
from ...avatars.world import Creature, Person, Subject, render_array
from ..metrics.counterfactual import CounterfactualEdit

BENCHMARK_FIRST = 1000
"""The first of the held-out subjects that are graded; defaults were chosen on others."""

_SHADES = tuple(range(len(SHADES)))
_UNSAID: Mapping[str, tuple[Any, ...]] = {
    "hair_color": HAIR_COLORS,
    "natural_brows": (False, True),
    "eyes": HELD_OUT_EYES,
    "ears": tuple(range(NUM_EARS)),
    "head": tuple(range(NUM_HEADS)),
    "layout": tuple(range(NUM_LAYOUTS)),
    "hair_shade": _SHADES,
    "clothes_shade": _SHADES,
    "fur_shade": _SHADES,
}
"""What a caption may leave unsaid and a picture hidden -> the values that it could have; marks are each kind's own."""


@dataclass(frozen=True)
class DrawnEdit(CounterfactualEdit):
    """An edit, and the ``category`` that it counts under."""

    category: str


def drawn_edits(subject: Subject, number: int | None = None, *, seed: int = 0) -> list[DrawnEdit]:
    """Edits of ``subject`` with another prompt and another picture each, whose truth the picture settles.

    Args:
        number: how many at most, one of each category before a second of any; None takes all.
        seed: which ones; of several subjects, each with a seed of its own, every category gets its share.
    """
    rng = random.Random(f"edits-{seed}")
    of_category: dict[str, list[tuple[DrawnEdit, dict[str, str]]]] = {}
    targets = {subject}
    for category, name, changes in _changes(subject):
        edit = DrawnEdit(name, subject, subject.edited(**changes), category)
        if edit.target not in targets:
            targets.add(edit.target)
            of_category.setdefault(category, []).append((edit, changes))
    groups = list(of_category.values())
    rng.shuffle(groups)
    for group in groups:
        rng.shuffle(group)
    hidden = list(_hidden_variants(subject))
    settled = [(edit for edit, changes in group if _is_settled(edit, changes, hidden)) for group in groups]
    by_turns = (edit for turn in zip_longest(*settled) for edit in turn if edit is not None)
    return list(islice(by_turns, number))  # an edit is drawn when its turn has come


def _changes(subject: Subject) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Category, name and changes of every edit of its kind of subject, possible or not."""
    worn = subject.glasses
    for value, category in (("none", "glasses off"), ("glasses", "glasses"), ("sunglasses", "sunglasses")):
        if value != worn:
            yield category, category, {"glasses": value}
    for mood in subject.ATTRIBUTES["expression"]:
        yield "expression", mood, {"expression": mood}
    for color in ("blue", "green", "pink", "orange"):
        yield "background", f"{color} background", {"background": color}
    yield from _creature_changes(subject) if isinstance(subject, Creature) else _person_changes(subject)
    mood = "smiling" if subject.expression != "smiling" else "surprised"
    glasses = "glasses" if worn == "none" else "none"
    yield (
        "two at once",
        f"{mood}, glasses {'on' if worn == 'none' else 'off'}",
        {"expression": mood, "glasses": glasses},
    )


def _person_changes(person: Subject) -> Iterator[tuple[str, str, dict[str, str]]]:
    assert isinstance(person, Person)
    if person.noun == "man":
        for kind, category in (("none", "shaved"), ("beard", "beard"), ("moustache", "moustache")):
            if kind != person.facial_hair:
                yield category, category, {"facial_hair": kind}
    if person.shows("hair_color"):
        for color in ("red", "black", "blond"):
            yield "hair colour", f"{color} hair", {"hair_color": color}
        yield "two at once", "pink hair, purple clothes", {"hair_color": "pink", "clothes_color": "purple"}
    if person.hair_visible and not person.hair.startswith("long"):  # long hair would go, and no word says so
        for kind, color in (("hat", "red"), ("beanie", "blue")):
            yield "hat", f"{color} {kind}", {"headwear": kind, "headwear_color": color}
    for color in ("red", "blue", "yellow"):
        yield "clothes colour", f"{color} {person.clothes}", {"clothes_color": color}


def _creature_changes(creature: Creature) -> Iterator[tuple[str, str, dict[str, str]]]:
    for color in ("blue", "orange", "pink"):
        yield "fur colour", f"{color} fur", {"fur_color": color}
    for pattern in ("none", "stripes", "dots"):
        if pattern != creature.pattern:
            yield "pattern", "no pattern" if pattern == "none" else pattern, {"pattern": pattern}
    if creature.headwear == "none":
        for kind, color in (("hat", "red"), ("beanie", "blue"), ("crown", "yellow")):
            yield "hat", f"{color} {kind}", {"headwear": kind, "headwear_color": color}
    yield "two at once", "green fur, pink background", {"fur_color": "green", "background": "pink"}


# ---------------------------------------------------------------------------- what a picture settles


def _hidden_variants(subject: Subject) -> Iterator[dict[str, Any]]:
    """Other values of what no caption says that would give the same picture."""
    picture = render_array(subject)
    marks = CREATURE_MARKS if isinstance(subject, Creature) else MARKS
    for name, values in {**_UNSAID, "mark": marks}.items():
        for value in values:
            if getattr(subject, name, value) != value:
                variant = {name: value}
                if np.array_equal(render_array(replace(subject, **variant)), picture):  # type: ignore[type-var]
                    yield variant


def _is_settled(edit: CounterfactualEdit, changes: Mapping[str, str], hidden: list[dict[str, Any]]) -> bool:
    """Whether the edit shows, in words and picture, and nothing comes to light that the picture hides."""
    truth = render_array(edit.target)
    if edit.source_prompt == edit.target_prompt or np.array_equal(truth, render_array(edit.subject)):
        return False
    variants = (replace(edit.subject, **variant) for variant in hidden)  # type: ignore[type-var]
    return all(np.array_equal(render_array(v.edited(**changes)), truth) for v in variants)
