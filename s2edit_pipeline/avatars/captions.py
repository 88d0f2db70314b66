"""The caption grammar of the avatars world: what is said about a subject, word by word."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from .creatures import CREATURE_HEADWEAR, PATTERNS, SPECIES
from .drawing import BACKGROUNDS, COLORS, EXPRESSIONS, GLASSES
from .people import CLOTHES, FACIAL_HAIR, HAIR_COLORS, HAIR_KINDS, HEADWEAR, NOUNS
from .world import CAPTION_PREFIX, CREATURE_ATTRIBUTES, PERSON_ATTRIBUTES, Creature, Person, Subject


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
    "facial_hair": 0.95, "clothes": 0.75, "clothes_color": 0.85, "background": 0.7, "fur_color": 0.85, "pattern": 0.95,
}  # fmt: skip

_Words = list[tuple[str, str | None]]
"""Words, each with the part that it speaks of."""


class _Speaker:
    """Says attributes of ``subject`` and remembers which; with ``rng`` leaves some of them out at random, with ``only``
    all others."""

    def __init__(self, subject: Subject, rng: random.Random | None, only: Collection[str] | None) -> None:
        self.subject, self.rng, self.only = subject, rng, only
        self.said: dict[str, str] = {}

    def says(self, attribute: str) -> bool:
        if self.only is not None:
            return attribute in self.only
        return self.rng is None or self.rng.random() < _MENTION[attribute]

    def state(self, attribute: str) -> str:
        self.said[attribute] = getattr(self.subject, attribute)
        return self.said[attribute]


def _article(word: str) -> tuple[str, None]:
    return ("an" if word[0] in "aeiou" else "a", None)


def _thing(speaker: _Speaker, attribute: str) -> _Words | None:
    """ "a blue hat", or None where there is none or nothing is said of it."""
    kind = getattr(speaker.subject, attribute)
    if kind == "none" or not speaker.says(attribute):
        return None
    words: _Words = [(speaker.state(attribute), attribute)]
    if speaker.says(f"{attribute}_color"):
        words.insert(0, (speaker.state(f"{attribute}_color"), attribute))
    return words if kind == "overalls" else [_article(words[0][0]), *words]


def _of_person(person: Person, speaker: _Speaker) -> tuple[_Words, list[_Words]]:
    """Adjectives and phrases."""
    adjectives: _Words = []
    if speaker.says("expression"):
        adjectives.append((speaker.state("expression"), "expression"))
    if person.hair == "bald" and person.hair_visible and speaker.says("hair"):
        adjectives.append((speaker.state("hair"), "person"))
    phrases: list[_Words | None] = []
    if person.hair_visible and person.hair != "bald" and speaker.says("hair"):
        length, curl = speaker.state("hair").split()
        phrase: _Words = [(length, "hair")]
        if curl == "curly":
            phrase.append((curl, "hair"))
        if speaker.says("hair_color"):
            phrase.append((speaker.state("hair_color"), "hair"))
        phrases.append([*phrase, ("hair", "hair")])
    elif person.hair_visible and person.hair != "bald" and speaker.only and speaker.says("hair_color"):
        phrases.append([(speaker.state("hair_color"), "hair"), ("hair", "hair")])
    if person.glasses != "none" and speaker.says("glasses"):
        phrases.append([(speaker.state("glasses"), "glasses")])
    if person.facial_hair != "none" and speaker.says("facial_hair"):
        phrases.append([("a", None), (speaker.state("facial_hair"), "facial_hair")])
    phrases += [_thing(speaker, "headwear"), _thing(speaker, "clothes")]
    return adjectives, [phrase for phrase in phrases if phrase]


def _of_creature(creature: Creature, speaker: _Speaker) -> tuple[_Words, list[_Words]]:
    """Adjectives and phrases."""
    adjectives: _Words = []
    for attribute, part in (("expression", "expression"), ("fur_color", "creature")):
        if speaker.says(attribute):
            adjectives.append((speaker.state(attribute), part))
    speaker.state("species")
    phrases: list[_Words | None] = []
    for attribute in ("pattern", "glasses"):
        if getattr(creature, attribute) != "none" and speaker.says(attribute):
            phrases.append([(speaker.state(attribute), attribute)])
    phrases.append(_thing(speaker, "headwear"))
    return adjectives, [phrase for phrase in phrases if phrase]


def describe(subject: Subject, rng: random.Random | None = None, *, only: Collection[str] | None = None) -> Caption:
    """What a caption says of ``subject``; with ``rng``, some of it, sometimes in another order.

    Without ``rng`` everything that can be said is said, in the grammar's own order. What is
    worn is nearly always said, so that silence comes to mean that it isn't there.

    Args:
        only: the attributes that are said, such as people say them: a colour of hair without its cut too.
    """
    speaker = _Speaker(subject, rng, only)
    if isinstance(subject, Person):
        adjectives, phrases = _of_person(subject, speaker)
    else:
        assert isinstance(subject, Creature)
        adjectives, phrases = _of_creature(subject, speaker)
    words: _Words = [(word, None) for word in CAPTION_PREFIX.split()]
    words.append(_article(adjectives[0][0] if adjectives else subject.noun))
    words += [*adjectives, (subject.noun, subject.PART)]
    if rng is not None and rng.random() < 0.4:
        rng.shuffle(phrases)
    for i, phrase in enumerate(phrases):
        words += [("with" if i == 0 else "and", None), *phrase]
    if speaker.says("background"):
        color = speaker.state("background")
        words += [("on", None), _article(color), (color, "background"), ("background", "background")]
    # what is worn is said nearly always: saying nothing settles that it isn't there
    for attribute in ("glasses", "facial_hair", "headwear", "pattern"):
        if getattr(subject, attribute, None) == "none" and (only is None or attribute in only):
            speaker.said[attribute] = "none"
    said_words, parts = zip(*words, strict=True)
    return Caption(words=said_words, parts=parts, said=speaker.said)


def vocabulary() -> list[str]:
    """All that captions can say, as ``describe_vocabulary`` writes it: one caption with choices for each kind of
    subject."""
    colors, hair_colors, backgrounds = ("|".join(words) for words in (COLORS, HAIR_COLORS, BACKGROUNDS))
    moods, nouns, species = ("|".join(words) for words in (EXPRESSIONS, NOUNS, SPECIES))
    hair = [" ".join(word for word in kind.split() if word != "straight") for kind in HAIR_KINDS if kind != "bald"]
    tops = ["bald", *(f"with {kind} [{hair_colors}] hair" for kind in hair), *_worn(HEADWEAR, colors)]
    clothes = [f"with {'' if kind == 'overalls' else 'a '}[{colors}] {kind}" for kind in CLOTHES]
    return [
        f"{CAPTION_PREFIX} [{moods}] {{{nouns}}} [{'|'.join(tops)}] {_optional(GLASSES)} "
        f"{_optional(FACIAL_HAIR, 'a ')} [{'|'.join(clothes)}] [on a [{backgrounds}] background]",
        f"{CAPTION_PREFIX} [{moods}] [{colors}] {{{species}}} {_optional(PATTERNS)} {_optional(GLASSES)} "
        f"[{'|'.join(['', *_worn(CREATURE_HEADWEAR, colors)])}] [on a [{backgrounds}] background]",
    ]


def _worn(kinds: Sequence[str], colors: str) -> list[str]:
    return [f"with a [{colors}] {kind}" for kind in kinds if kind != "none"]


def _optional(kinds: Sequence[str], article: str = "") -> str:
    return f"[{'|'.join(['', *(f'with {article}{kind}' for kind in kinds if kind != 'none')])}]"


def read_caption(text: str) -> dict[str, str]:
    """What a caption in the grammar settles: the inverse of :func:`describe`'s ``said``, for what it says of its
    subject and of what is worn."""
    words = text.split()
    noun = next(word for word in words if word in (*NOUNS, *SPECIES))
    attributes = PERSON_ATTRIBUTES if noun in NOUNS else CREATURE_ATTRIBUTES
    place = words.index(noun)
    said = {"species": noun} if noun in SPECIES else {}
    for word in words[:place]:
        for attribute, values in (("expression", EXPRESSIONS), ("fur_color", COLORS), ("hair", HAIR_KINDS)):
            if word in values:
                said[attribute] = word
    for i, word in enumerate(words[place + 1 :], place + 1):
        before = words[i - 1]
        for attribute in ("glasses", "facial_hair", "headwear", "clothes", "pattern"):
            if word in attributes.get(attribute, ()):
                said[attribute] = word
                if before in COLORS and f"{attribute}_color" in attributes:
                    said[f"{attribute}_color"] = before
        if word == "background":
            said["background"] = before
        if word == "hair":
            said |= {"hair_color": before} if before in HAIR_COLORS else {}
            phrase = words[i - 3 : i]
            for length in {"short", "long"} & {*phrase}:  # neither in "red hair"
                said["hair"] = f"{length} {'curly' if 'curly' in phrase else 'straight'}"
    nothing = {name: "none" for name in ("glasses", "facial_hair", "headwear", "pattern") if name in attributes}
    return nothing | said
