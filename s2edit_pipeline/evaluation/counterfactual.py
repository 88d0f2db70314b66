"""Edits of avatars whose true result can be drawn, and how near an edited picture comes to it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..avatars.captions import describe
from ..avatars.world import Person, changed_pixels, render
from .picture_metrics import psnr


@dataclass(frozen=True)
class CounterfactualEdit:
    """An edit of ``person``: its ``name``, the ``target`` person, and the prompts before and after."""

    name: str
    person: Person
    target: Person

    @property
    def source_prompt(self) -> str:
        return describe(self.person).text

    @property
    def target_prompt(self) -> str:
        return describe(self.target).text

    def truth(self) -> Image.Image:
        """The picture that a perfect edit gives."""
        return render(self.target)


def counterfactual(person: Person, name: str, **changes: str) -> CounterfactualEdit:
    """The edit that changes these named attributes of ``person``.

    Raises:
        ValueError: nothing would change, or ``changes`` names what no caption can say.
    """
    target = person.edited(**changes)
    if target == person:
        raise ValueError(f"The edit {name!r} changes nothing: the person has {changes} already.")
    return CounterfactualEdit(name, person, target)


def demo_edits(person: Person) -> list[CounterfactualEdit]:
    """Up to four edits of ``person``: something on the nose, another expression, hair, and a removal.

    None uncovers what the picture hides: under a hat, neither the hair nor a beard's colour could be known.
    """
    edits = []
    if person.glasses == "none":
        edits.append(counterfactual(person, "glasses on", glasses="glasses"))
    else:
        worn = "sunglasses" if person.glasses == "glasses" else "glasses"
        edits.append(counterfactual(person, f"{worn} instead", glasses=worn))
    mood = "smiling" if person.expression != "smiling" else "surprised"
    edits.append(counterfactual(person, mood, expression=mood))
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


def varied_edits(person: Person) -> list[CounterfactualEdit]:
    """Six to eight edits of ``person``: the demo's, two more expressions, the clothes' colour and the background."""
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
    return grade_against(edit.person, edit.target, edited)


def grade_against(person: Person, target: Person, edited: Image.Image) -> Grade:
    """:func:`grade` for any two people: ``person`` was edited, ``target`` is what should have come out."""
    truth = np.asarray(render(target))
    changed = changed_pixels(person, target)
    picture = np.asarray(edited.convert("RGB"))
    return Grade(
        whole=psnr(picture, truth),
        inside=psnr(picture, truth, changed),
        outside=psnr(picture, truth, ~changed),
        unedited_inside=psnr(np.asarray(render(person)), truth, changed),
    )
