"""Edits of avatars whose true result can be drawn, and how near an edited picture comes to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ...avatars.captions import describe
from ...avatars.world import Creature, Person, Subject, changed_pixels, render
from .pixels import psnr


@dataclass(frozen=True)
class CounterfactualEdit:
    """An edit of ``subject``: its ``name``, the ``target`` subject, and the prompts before and after."""

    name: str
    subject: Subject
    target: Subject

    @property
    def source_prompt(self) -> str:
        return describe(self.subject).text

    @property
    def target_prompt(self) -> str:
        return describe(self.target).text

    def truth(self) -> Image.Image:
        """The picture that a perfect edit gives."""
        return render(self.target)

    def is_read_in(self, predicted: Mapping[str, str]) -> bool:
        """Whether a classifier's ``predicted`` values, by attribute, are the target's wherever the edit changes one."""
        changed = [name for name in predicted if getattr(self.target, name) != getattr(self.subject, name)]
        return all(predicted[name] == getattr(self.target, name) for name in changed)


def counterfactual(subject: Subject, name: str, **changes: str) -> CounterfactualEdit:
    """The edit that changes these named attributes of ``subject``.

    Raises:
        ValueError: nothing would change, or ``changes`` names what no caption can say.
    """
    target = subject.edited(**changes)
    if target == subject:
        raise ValueError(f"The edit {name!r} changes nothing: the subject has {changes} already.")
    return CounterfactualEdit(name, subject, target)


def demo_edits(subject: Subject) -> list[CounterfactualEdit]:
    """Up to four edits of ``subject``: something on the nose, another expression, hair or fur, and a removal.

    None uncovers what the picture hides: under a hat, neither the hair nor a beard's colour could be known.
    """
    edits = []
    if subject.glasses == "none":
        edits.append(counterfactual(subject, "glasses on", glasses="glasses"))
    else:
        worn = "sunglasses" if subject.glasses == "glasses" else "glasses"
        edits.append(counterfactual(subject, f"{worn} instead", glasses=worn))
    mood = "smiling" if subject.expression != "smiling" else "surprised"
    edits.append(counterfactual(subject, mood, expression=mood))
    return edits + (_creature_edits(subject) if isinstance(subject, Creature) else _person_edits(subject))


def _creature_edits(creature: Creature) -> list[CounterfactualEdit]:
    color = "blue" if creature.fur_color != "blue" else "orange"
    edits = [counterfactual(creature, f"{color} fur", fur_color=color)]
    if creature.pattern != "none":
        edits.append(counterfactual(creature, f"no {creature.pattern}", pattern="none"))
    else:
        edits.append(counterfactual(creature, "dots", pattern="dots"))
    return edits


def _person_edits(person: Subject) -> list[CounterfactualEdit]:
    assert isinstance(person, Person)
    edits = []
    if person.noun == "man" and person.facial_hair != "beard" and person.hair_visible:
        edits.append(counterfactual(person, "a beard", facial_hair="beard"))
    elif person.hair_visible and person.hair != "bald":
        color = "red" if person.hair_color != "red" else "black"
        edits.append(counterfactual(person, f"{color} hair", hair_color=color))
    else:
        color = "red" if person.clothes_color != "red" else "blue"
        edits.append(counterfactual(person, f"{color} clothes", clothes_color=color))
    for attribute, label in (("glasses", "glasses off"), ("facial_hair", "shaved")):
        if getattr(person, attribute) != "none":
            edits.append(counterfactual(person, label, **{attribute: "none"}))
            break
    return edits


def varied_edits(person: Subject) -> list[CounterfactualEdit]:
    """Six to eight edits of ``person``: the demo's, two more expressions, the clothes' colour and the background."""
    assert isinstance(person, Person)
    edits = demo_edits(person)
    moods = [mood for mood in ("angry", "surprised", "sad") if mood != person.expression]
    more = [{"expression": mood} for mood in moods]
    more.append({"clothes_color": "purple" if person.clothes_color != "purple" else "green"})
    more.append({"background": "green" if person.background != "green" else "pink"})
    targets = {edit.target for edit in edits}
    for changes in more:
        if person.edited(**changes) not in targets:
            edits.append(counterfactual(person, " ".join(changes.values()), **changes))
    return edits[:8]


@dataclass(frozen=True)
class Grade:
    """PSNR to the truth in dB: over the whole picture, inside the pixels that truly change, and outside them;
    ``unedited_inside`` is what leaving the picture as it was would score inside."""

    whole: float
    inside: float
    outside: float
    unedited_inside: float


def grade(edit: CounterfactualEdit, edited: Image.Image) -> Grade:
    """How near ``edited``, a picture of the size of the truth, comes to the truth.

    Raises:
        ValueError: the sizes differ.
    """
    return grade_against(edit.subject, edit.target, edited)


def grade_against(person: Subject, target: Subject, edited: Image.Image) -> Grade:
    """:func:`grade` for any two subjects: ``person`` was edited, ``target`` is what should have come out."""
    truth = np.asarray(render(target))
    changed = changed_pixels(person, target)
    picture = np.asarray(edited.convert("RGB"))
    return Grade(
        whole=psnr(picture, truth),
        inside=psnr(picture, truth, changed),
        outside=psnr(picture, truth, ~changed),
        unedited_inside=psnr(np.asarray(render(person)), truth, changed),
    )
