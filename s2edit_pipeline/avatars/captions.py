"""The caption grammar of the avatars world: what is said about a person, word by word."""

from __future__ import annotations

import random
from dataclasses import dataclass

from .world import CAPTION_PREFIX, Person


@dataclass(frozen=True)
class Caption:
    """A caption, and for each of its words the part of the picture that it speaks of.

    ``words[i]`` refers to ``parts[i]``, one of ``world.PARTS`` or None; ``said`` maps each
    named attribute that the caption settles to its value.
    """

    words: tuple[str, ...]
    parts: tuple[str | None, ...]
    said: dict[str, str]

    @property
    def text(self) -> str:
        return " ".join(self.words)


_MENTION = {
    "expression": 0.85, "hair": 0.85, "hair_color": 0.85, "headwear": 0.95, "headwear_color": 0.8, "glasses": 0.95,
    "facial_hair": 0.95, "clothes": 0.75, "clothes_color": 0.85, "background": 0.7,
}  # fmt: skip


def describe(person: Person, rng: random.Random | None = None) -> Caption:
    """What a caption says of ``person``; with ``rng``, some of it, sometimes in another order.

    Without ``rng`` everything that can be said is said, in the grammar's own order. What is
    worn is nearly always said, so that silence comes to mean that it isn't there.
    """

    def say(attribute: str) -> bool:
        return rng is None or rng.random() < _MENTION[attribute]

    said: dict[str, str] = {}

    def state(attribute: str) -> str:
        said[attribute] = getattr(person, attribute)
        return said[attribute]

    head: list[tuple[str, str | None]] = [(word, None) for word in CAPTION_PREFIX.split()]
    adjectives: list[tuple[str, str | None]] = []
    if say("expression"):
        adjectives.append((state("expression"), "expression"))
    if person.hair == "bald" and person.hair_visible and say("hair"):
        adjectives.append((state("hair"), "person"))
    first = adjectives[0][0] if adjectives else person.noun
    head.append(("an" if first[0] in "aeiou" else "a", None))
    head += [*adjectives, (person.noun, "person")]

    phrases: list[list[tuple[str, str | None]]] = []
    if person.hair_visible and person.hair != "bald" and say("hair"):
        length, curl = state("hair").split()
        phrase: list[tuple[str, str | None]] = [(length, "hair")]
        if curl == "curly":
            phrase.append((curl, "hair"))
        if say("hair_color"):
            phrase.append((state("hair_color"), "hair"))
        phrases.append([*phrase, ("hair", "hair")])
    if person.glasses != "none" and say("glasses"):
        phrases.append([(state("glasses"), "glasses")])
    if person.facial_hair != "none" and say("facial_hair"):
        phrases.append([("a", None), (state("facial_hair"), "facial_hair")])
    for thing in ("headwear", "clothes"):
        kind = getattr(person, thing)
        if kind == "none" or not say(thing):
            continue
        state(thing)
        words: list[tuple[str, str | None]] = [(kind, thing)]
        if say(f"{thing}_color"):
            words.insert(0, (state(f"{thing}_color"), thing))
        if kind != "overalls":
            words.insert(0, ("an" if words[0][0][0] in "aeiou" else "a", None))
        phrases.append(words)
    if rng is not None and rng.random() < 0.4:
        rng.shuffle(phrases)

    body: list[tuple[str, str | None]] = []
    for i, phrase in enumerate(phrases):
        body += [("with" if i == 0 else "and", None), *phrase]
    if say("background"):
        color = state("background")
        body += [("on", None), ("an" if color[0] in "aeiou" else "a", None)]
        body += [(color, "background"), ("background", "background")]
    # what is worn is said nearly always: saying nothing settles that it isn't there
    for attribute in ("glasses", "facial_hair", "headwear"):
        if getattr(person, attribute) == "none":
            said[attribute] = "none"
    all_words, all_parts = zip(*(head + body), strict=True)
    return Caption(words=all_words, parts=all_parts, said=said)
