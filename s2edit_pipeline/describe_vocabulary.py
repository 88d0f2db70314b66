"""A vocabulary: captions with choices, of which a description is put together.

"a photo of [sad|smiling] {lady|man} [|with glasses] [|with a [red|blue] hat]": of each bracket one choice is said, in
braces are the nouns of the subject. A choice may hold a further bracket, may be empty, and goes before the noun unless
it begins with a preposition: "a photo of a sad lady with glasses and a red hat".
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .prompt_parts import (
    ARTICLES,
    CARRYING,
    PREPOSITIONS,
    article_for,
    fit_article,
    pieces_of,
    takes_article,
)


@dataclass(frozen=True)
class Wording:
    """One of a group's phrases by its number, and the ``words`` in its slots; "" leaves a slot empty."""

    phrase: int
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Phrase:
    """One choice: words, and among them slots; ``texts`` has one more than there are ``slots``."""

    texts: tuple[str, ...]
    slots: tuple[tuple[str, ...], ...] = ()

    def said(self, words: Sequence[str]) -> str:
        """The phrase with ``words`` in its slots."""
        texts = [piece for pair in itertools.zip_longest(self.texts, words, fillvalue="") for piece in pair]
        return with_articles(" ".join(" ".join(texts).split()))

    @property
    def blank(self) -> tuple[str, ...]:
        """Words that leave each slot empty, or, where nothing else is said, the slot's first."""
        return tuple("" if any(self.texts) else slot[0] for slot in self.slots)

    def wordings(self, number: int) -> list[Wording]:
        """Every way to fill the slots of this phrase, its group's ``number``-th."""
        return [Wording(number, words) for words in itertools.product(*self.slots)]


@dataclass(frozen=True)
class Group:
    """What is said at one place, one of ``phrases``; ``is_subject`` where it is the noun."""

    phrases: tuple[Phrase, ...]
    is_subject: bool = False

    def wordings(self) -> list[Wording]:
        """All of every phrase."""
        return [wording for k, phrase in enumerate(self.phrases) for wording in phrase.wordings(k)]


@dataclass(frozen=True)
class Template:
    """A caption with choices: ``opening`` ("a photo of") and its ``groups`` in the order in which they are said."""

    opening: str
    groups: tuple[Group, ...]

    @property
    def subject(self) -> int:
        """Which group is the noun."""
        return next(i for i, group in enumerate(self.groups) if group.is_subject)

    def saying(self, g: int, wording: Wording | None) -> str:
        """What the group ``g`` says in this wording."""
        return "" if wording is None else self.groups[g].phrases[wording.phrase].said(wording.words)

    def caption(self, said: Sequence[str]) -> str:
        """The caption in which the groups say ``said``; "" says nothing."""
        noun = said[self.subject]
        others = [text for i, text in enumerate(said) if text and i != self.subject]
        after = [text for text in others if follows_noun(text)]
        before = [text for text in others if not follows_noun(text)]
        article = [piece.written for piece in article_for(noun, pieces_of(noun))] if takes_article(noun) else []
        pieces, lead = [self.opening, *article, *before, noun], ""
        for text in after:
            first, _, rest = text.partition(" ")
            pieces.append(f"and {rest}" if first == lead else text)
            lead = first
        return with_articles(" ".join(pieces))


def follows_noun(text: str) -> bool:
    """Whether a choice goes after the noun: it begins with a word such as "with", "on" or "wearing"."""
    return text.split()[0] in PREPOSITIONS | CARRYING | {"of"}


def with_articles(text: str) -> str:
    """``text`` with each "a" and "an" as the next word has it."""
    pieces = pieces_of(text)
    for i, piece in enumerate(pieces[:-1]):
        if piece.text in ARTICLES:
            fit_article(pieces, i + 1)
    return "".join(piece.gap + piece.written for piece in pieces)


# ---------------------------------------------------------------------------- reading templates

_EXAMPLE = "'a photo of [sad|smiling] {lady|man} [|with glasses] [|with a [red|blue] hat]'"


def read_template(text: str) -> Template:
    """The template that ``text`` writes, see this module's head.

    Raises:
        TypeError: it is no string.
        ValueError: a bracket isn't closed, or there isn't exactly one pair of braces.
    """
    if not isinstance(text, str):
        raise TypeError(f"A vocabulary is a caption with choices, such as {_EXAMPLE}, not {type(text).__name__}.")
    opening, *parts = re.split(r"(?=[\[{])", text, maxsplit=1)
    rest, groups = "".join(parts).strip(), []
    while rest:
        body, rest = _bracketed(rest, text)
        groups.append(_group(body, text))
    subjects = [group for group in groups if group.is_subject]
    if len(subjects) != 1 or not opening.strip():
        raise ValueError(
            f"A vocabulary says what the picture is and has one pair of braces, around its subject's nouns, such as "
            f"{_EXAMPLE}; {text!r} has {len(subjects)}."
        )
    return Template(" ".join(opening.split()), tuple(groups))


def _bracketed(rest: str, text: str) -> tuple[str, str]:
    """The bracket that ``rest`` begins with, and what follows it."""
    depth = 0
    for i, character in enumerate(rest):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(character, 0)
        if depth == 0:
            if i == 0:
                break
            return rest[: i + 1], rest[i + 1 :].strip()
    raise ValueError(
        f"Between {rest[:20]!r} and the end of the vocabulary {text!r} is a word outside brackets, or a bracket that "
        f"isn't closed; write it like {_EXAMPLE}."
    )


def _group(bracket: str, text: str) -> Group:
    is_subject, choices, depth = bracket[0] == "{", [""], 0
    for character in bracket[1:-1]:
        depth += {"[": 1, "]": -1}.get(character, 0)
        if character == "|" and depth == 0:
            choices.append("")
        else:
            choices[-1] += character
    phrases = []
    for choice in choices:
        pieces = re.split(r"\[([^\[\]]*)\]", choice)
        if any(mark in piece for piece in pieces for mark in "[]{}"):
            raise ValueError(f"Brackets in the vocabulary {text!r} are nested too deep; write it like {_EXAMPLE}.")
        slots = tuple(tuple(word.strip() for word in slot.split("|")) for slot in pieces[1::2])
        phrases.append(Phrase(tuple(" ".join(piece.split()) for piece in pieces[::2]), slots))
    if is_subject and any(phrase.said(phrase.blank) == "" for phrase in phrases):
        raise ValueError(f"A noun of the vocabulary {text!r} is empty; write it like {_EXAMPLE}.")
    return Group(tuple(phrases), is_subject)


def read_vocabulary(vocabulary: str | Sequence[str]) -> tuple[Template, ...]:
    """The templates of a vocabulary: one text, or several, for subjects of which other things are said, as a list or as
    lines.

    Raises:
        TypeError, ValueError: as :func:`read_template`; or there is none.
    """
    texts = vocabulary.splitlines() if isinstance(vocabulary, str) else list(vocabulary)
    if not texts:
        raise ValueError(f"The vocabulary is empty; write it like {_EXAMPLE}.")
    return tuple(read_template(text) for text in texts)
