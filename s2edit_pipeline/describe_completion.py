"""A short prompt made complete: what a picture's description says beside it is added, and its own words stay.

Source and target are completed alike, so that what they share stays the same in the edit. Where the target says
something of its own ("red hair"), it keeps that, and takes over only what goes with it ("short curly red hair").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .describe_vocabulary import Group, Phrase, Template, Wording, follows_noun
from .prompt_changes import change_words
from .prompt_parts import (
    CARRYING,
    DETERMINERS,
    LOOKS,
    MOODS,
    PREPOSITIONS,
    Part,
    Piece,
    is_participle,
    noun_of,
    parts_of,
    pieces_of,
    subject_noun,
    subject_part,
)
from .prompt_words import insert_token


@dataclass(frozen=True)
class Heard:
    """What a prompt says that a group could say too: its ``words``, as they stand in the prompt, and the group's
    ``wordings`` that say all of them."""

    words: str
    wordings: tuple[Wording, ...]


def heard_in(prompt: str, template: Template) -> dict[int, Heard]:
    """Group -> what ``prompt`` says of it; groups that it is silent about are left out."""
    parts = parts_of(pieces_of(prompt))
    about = parts[subject_part(parts, None)]
    heard: dict[int, Heard] = {}
    for g, group in enumerate(template.groups):
        if g == template.subject:
            continue
        for part in parts:
            spoken = _spoken_of(group, part, part is about)
            if spoken:
                heard[g] = Heard(as_written(spoken), _that_say(group, [piece.text for piece in spoken]))
                break
    return heard


def _spoken_of(group: Group, part: Part, is_about: bool) -> list[Piece]:
    """The words of ``part`` that ``group`` could say: of the subject's own part its adjectives, of others all that goes
    with a noun that the group knows."""
    telling = [piece for piece in part.body if piece.text not in DETERMINERS and not piece.is_token]
    noun = noun_of(part.body)
    if is_about:
        known = {words[-1] for words in _every_saying(group, before_noun=True)}
        return [piece for piece in telling if piece is not noun and piece.text in known][:1]
    known = {words[-1] for words in _every_saying(group, before_noun=False)}
    return telling if noun is not None and noun.text in known else []


def _every_saying(group: Group, before_noun: bool) -> list[list[str]]:
    """The telling words of all that ``group`` can say before its subject's noun, or after it."""
    phrases = [(phrase, phrase.said(tuple(slot[0] for slot in phrase.slots))) for phrase in group.phrases]
    return [telling_words(text) for _, text in phrases if text and follows_noun(text) is not before_noun]


def telling_words(text: str) -> list[str]:
    skipped = DETERMINERS | PREPOSITIONS | CARRYING
    return [piece.text for piece in pieces_of(text) if piece.text not in skipped]


def as_written(pieces: Sequence[Piece]) -> str:
    return "".join((piece.gap if i else "") + piece.written for i, piece in enumerate(pieces))


def _that_say(group: Group, words: Sequence[str]) -> tuple[Wording, ...]:
    """The wordings of ``group`` that say all of ``words`` that it knows."""
    each = {
        wording: set(telling_words(group.phrases[wording.phrase].said(wording.words))) for wording in group.wordings()
    }
    known = set().union(*each.values()) & set(words)
    return tuple(wording for wording, said in each.items() if known <= said)


# ---------------------------------------------------------------------------- adding


def completed(
    prompt: str, template: Template, chosen: Sequence[Wording | None], source: Mapping[int, Heard] | None = None
) -> str:
    """``prompt`` with what ``chosen``, the description's wordings, say beside its own words.

    Args:
        source: of a target prompt, what its source said by itself: where the target is silent about that, it was taken
            away, and stays so.
    """
    own, added = heard_in(prompt, template), []
    for g, wording in enumerate(chosen):
        text = template.saying(g, wording)
        if g == template.subject or not text:
            continue
        if g in own:
            prompt = _filled_in(prompt, template.groups[g], own[g], text)
        elif source is None or g not in source:
            added.append(text)
    return with_sayings(prompt, added)


def with_sayings(prompt: str, sayings: Sequence[str]) -> str:
    """``prompt`` with what it is silent about: "sad", "with a red hat", "on a blue background"."""
    adjectives = [text for text in sayings if not follows_noun(text)]
    things = [text for text in sayings if follows_noun(text)]
    for text in reversed(adjectives):
        prompt = _with_adjective(prompt, text)
    for text in sorted(things, key=lambda text: not text.startswith("with ")):
        if text.startswith("with "):
            prompt = change_words(prompt, add=[text.removeprefix("with ")])
        else:
            prompt = f"{prompt.rstrip()} {text}"
    return prompt


def _filled_in(prompt: str, group: Group, own: Heard, text: str) -> str:
    """``prompt``, its own words of ``group`` in the wording that has most in common with ``text``."""
    wanted = telling_words(text)
    sayings = [group.phrases[wording.phrase].said(wording.words) for wording in own.wordings]
    best = max(sayings, key=lambda one: (len({*telling_words(one)} & {*wanted}), -len(telling_words(one))), default="")
    fuller = [piece for piece in pieces_of(best) if piece.text in telling_words(best)]
    known = {word for saying in sayings for word in telling_words(saying)}
    strange = [piece for piece in pieces_of(own.words) if piece.text not in known]
    if strange or len(fuller) <= len(pieces_of(own.words)):
        return prompt
    return change_words(prompt, replace={own.words: as_written(fuller)})


def _with_adjective(prompt: str, word: str) -> str:
    """``prompt`` with ``word`` before its subject, unless one like it is there."""
    last = pieces_of(word)[-1].text
    if last in MOODS | LOOKS or is_participle(last):
        return change_words(prompt, add=[word])
    noun = subject_noun(prompt)
    return prompt if noun is None else insert_token(prompt, noun, word)


def template_of(caption: str) -> tuple[Template, list[Wording | None]]:
    """A free caption as a template that says it: the subject, and each thing after it that is joined by "with", "on",
    "wearing" and the like."""
    parts = parts_of(pieces_of(caption))
    place = subject_part(parts, None)
    noun = noun_of(parts[place].body)
    subject = Group((Phrase((noun.written if noun is not None else "",)),), is_subject=True)
    groups, lead = [subject], ""
    for part in parts[place + 1 :]:
        lead = lead if part.goes_on else as_written(part.lead)
        if part.body and follows_noun(lead or "-"):
            groups.append(Group((Phrase((f"{lead} {as_written(part.body)}",)),)))
    opening = as_written([piece for part in parts[:place] for piece in (*part.lead, *part.body)])
    return Template(opening, tuple(groups)), [Wording(0)] * len(groups)
