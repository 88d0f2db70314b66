"""A target prompt from a source prompt: words exchanged, added and taken away, the grammar around them kept.

The rules are those of plain English captions ("a photo of a sad lady with long hair and glasses on a blue background")
and are few, so that the outcome can be foreseen. Exchanging words works in every language.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .prompt_parts import (
    ARTICLES,
    CARRYING,
    DETERMINERS,
    LOOKS,
    MOODS,
    PICTURES,
    POSSESSIVES,
    PREPOSITIONS,
    Part,
    Piece,
    article_for,
    drop,
    fit_article,
    is_participle,
    list_end,
    matches_of,
    noun_of,
    parts_of,
    pieces_of,
    subject_part,
    takes_article,
)
from .prompt_words import NEGATIONS, missing_phrase, names_something, token_like, words_of


def change_words(
    prompt: str,
    *,
    replace: Mapping[str, str] | None = None,
    add: Sequence[str] | None = None,
    remove: Sequence[str] | None = None,
    subject: str | None = None,
) -> str:
    """The target prompt that differs from the source ``prompt`` as asked; all other words stay, ``[I]`` too.

    Words are exchanged first, then taken away, then added. "a" and "an" follow.

    Args:
        replace: word or phrase -> what stands in its place, wherever it is: ``{"sad": "smiling"}``.
        add: things, which join what the subject is "with": "glasses", "a red hat"; a single thing without an article
            gets one ("beard" is "a beard"). A word for how the subject is goes before it instead: one in -ing or -ed or
            for a mood first ("smiling", "sad"), one for its looks last ("bald", "old", a colour).
        remove: things, taken away with their adjectives and what joined them ("with a grey beard"), or adjectives,
            taken away alone.
        subject: the noun that is added to; None: the first that the prompt speaks of.

    Raises:
        TypeError: something isn't a string.
        ValueError: a word isn't there, and the message lists those that are; it is there already; the subject itself
            would go.
    """
    _check_strings(prompt, replace, add, remove)
    removed = [remove] if isinstance(remove, str) else list(remove or [])
    added = [add] if isinstance(add, str) else list(add or [])
    pieces = pieces_of(prompt)
    for phrase in (*(replace or {}), *removed, *([] if subject is None else [subject])):
        if not matches_of(pieces, phrase):
            raise ValueError(missing_phrase(phrase, prompt, token_like(prompt)))
    _exchange(pieces, replace or {})
    for phrase in removed:
        if not matches_of(pieces, phrase):
            raise ValueError(f"remove={phrase!r} is gone already with another change; leave one of the two out.")
        while matches := matches_of(pieces, phrase):
            pieces = _without(pieces, matches[0], subject)
    for phrase in added:
        pieces = _with(pieces, phrase, subject)
    text = "".join(piece.gap + piece.written for piece in pieces).strip()
    return prompt[: len(prompt) - len(prompt.lstrip())] + text + prompt[len(prompt.rstrip()) :]


def _check_strings(prompt: str, replace: Mapping[str, str] | None, *lists: Sequence[str] | None) -> None:
    if not isinstance(prompt, str):
        raise TypeError(f"A prompt must be a string, not {type(prompt).__name__}.")
    if replace is not None and not isinstance(replace, Mapping):
        raise TypeError(f"replace must be a mapping such as {{'sad': 'smiling'}}, not {type(replace).__name__}.")
    phrases = [*(replace or {}), *(replace or {}).values()]
    for given in lists:
        phrases += [given] if isinstance(given, str) else list(given or [])
    for phrase in phrases:
        if not isinstance(phrase, str):
            raise TypeError(f"A word to change must be a string, not {type(phrase).__name__}.")
        if not words_of(phrase):
            raise ValueError(f"{phrase!r} holds no word; to take a word away name it in remove=['beard'].")


# ---------------------------------------------------------------------------- the three changes


def _exchange(pieces: list[Piece], replace: Mapping[str, str]) -> None:
    """Exchange phrases for others, of two that overlap the longer one."""
    places: list[tuple[range, str]] = []
    for old in sorted(replace, key=lambda phrase: -len(pieces_of(phrase))):
        for place in matches_of(pieces, old):
            if all(place.stop <= other.start or other.stop <= place.start for other, _ in places):
                places.append((place, replace[old]))
    body_of = {id(noun_of(part.body)): part.body for part in parts_of(pieces) if part.body}
    for place, new in sorted(places, key=lambda found: -found[0].start):
        old_pieces, new_pieces = pieces[place.start : place.stop], pieces_of(new)
        first = new_pieces[0]
        first.gap = old_pieces[0].gap
        if old_pieces[0].written[0].isupper():
            first.written = first.written[0].upper() + first.written[1:]
        pieces[place.start : place.stop] = new_pieces
        if first.text in DETERMINERS:
            if place.start and pieces[place.start - 1].text in DETERMINERS:
                drop(pieces, [pieces[place.start - 1]])
        elif body := next((body_of[id(piece)] for piece in old_pieces if id(piece) in body_of), None):
            _exchange_article(pieces, body, old_pieces, new_pieces)
        fit_article(pieces, pieces.index(first))


def _exchange_article(pieces: list[Piece], body: Sequence[Piece], old: Sequence[Piece], new: Sequence[Piece]) -> None:
    """Give what ``body`` says the article, or none, that it takes with the noun of ``new`` for that of ``old``."""
    old_noun, new_noun = noun_of(old), noun_of(new)
    if old_noun is None or new_noun is None:
        return
    start = body[0] if body[0] in pieces else new[0]  # its first word may have been exchanged
    if start.text in ARTICLES and not takes_article(new_noun.text):  # "a hat" to "glasses"
        drop(pieces, [start])
        return
    # "red overalls" to "a red shirt"; of names, and in languages without articles, nothing is known
    knows = new_noun.written.islower() and _is_english(pieces)
    place = pieces.index(start)
    has_one = start.text in DETERMINERS or (place > 0 and pieces[place - 1].text in DETERMINERS)
    if knows and not has_one and not takes_article(old_noun.text):
        articles = article_for(new_noun.text, [start])
        pieces[place:place] = articles
        start.gap = " " if articles else start.gap


def _is_english(pieces: Sequence[Piece]) -> bool:
    return any(piece.text in ("a", "an", "the", "of", "with") for piece in pieces)


def _without(pieces: Sequence[Piece], place: range, subject: str | None) -> list[Piece]:
    """The pieces without those at ``place``, and without what they leave hanging."""
    gone = pieces[place.start : place.stop]
    parts = parts_of(pieces)
    about = parts[subject_part(parts, subject)]
    for part in [part for part in parts if any(piece in gone for piece in (*part.lead, *part.body))]:
        said = [piece for piece in part.body if piece in gone]
        noun = noun_of(part.body)
        is_noun = bool(said) and (noun in said or part.body[-1] in said)
        if part is about and noun is not None and noun in said:
            raise ValueError(
                f"{noun.written!r} is what the prompt is about, which can't be taken away; exchange it, "
                f"replace={{{noun.written!r}: ...}}, or name another subject=."
            )
        if is_noun and part is not about:
            _drop_part(parts, parts.index(part))
        elif said:
            after = next(iter(part.body[part.body.index(said[-1]) + 1 :]), None)
            drop(part.body, said)
            if after is not None:
                fit_article(part.body, part.body.index(after))
        else:
            drop(part.lead, [piece for piece in part.lead if piece in gone])
    return [piece for part in parts for piece in (*part.lead, *part.body)]


def _drop_part(parts: list[Part], k: int) -> None:
    """Take the part ``k`` out of ``parts``, a list's item or the whole phrase, and mend what joins the others."""
    part = parts[k]
    if k + 1 < len(parts):  # "a hat on his head"
        after = parts[k + 1]
        if after.body and after.body[0].text in POSSESSIVES and after.leads <= PREPOSITIONS:
            del parts[k + 1]
    head = k
    while head > 0 and parts[head].goes_on:
        head -= 1
    end = list_end(parts, head)
    kept = [piece for piece in part.lead if is_participle(piece.text) and piece.text not in CARRYING]
    if k == head and end > head:
        parts[k + 1].lead = part.lead
    elif head < k == end and k - 1 > head:
        parts[k - 1].lead = part.lead
    elif kept and not part.goes_on:  # "standing in a park"
        parts.insert(k + 1, Part(part.lead[: part.lead.index(kept[-1]) + 1]))
    del parts[k]
    if k <= end == head + 2 and len(parts[head + 1].lead) == 2:  # two are left: no comma before "and"
        parts[head + 1].lead = parts[head + 1].lead[1:]


def _with(pieces: Sequence[Piece], phrase: str, subject: str | None) -> list[Piece]:
    """The pieces with a thing, or with how the subject is."""
    new = pieces_of(phrase)
    new[0].gap = " "
    core = [piece for piece in new if piece.text not in DETERMINERS]
    named = " ".join(piece.written for piece in core)
    while core and (matches := matches_of(pieces, named)):
        pieces = _without_denial(pieces, matches[0], named)
    parts = parts_of(pieces)
    about = parts[subject_part(parts, subject)]
    last = new[-1].text
    if new[0].text not in DETERMINERS and (last in MOODS | LOOKS or is_participle(last)):
        noun = noun_of(about.body)
        at = next((i for i, piece in enumerate(about.body) if piece.text not in DETERMINERS), len(about.body))
        if last in LOOKS and noun is not None:
            at = about.body.index(noun)
            while at and about.body[at - 1].is_token:
                at -= 1
        if at == 0 and about.body:
            new[0].gap, about.body[0].gap = about.body[0].gap, " "
        about.body[at:at] = new
        fit_article(about.body, at)
    else:
        noun = noun_of(new)
        if new[0].text not in DETERMINERS and noun is not None:
            new = [*article_for(noun.text, new), *new]
        lists = [i for i, part in enumerate(parts) if i > parts.index(about) and "with" in part.leads]
        if lists:
            parts.insert(list_end(parts, lists[0]) + 1, Part([Piece(" ", "and", "and")], new))
        else:
            parts.insert(list_end(parts, parts.index(about)) + 1, Part([Piece(" ", "with", "with")], new))
    return [piece for part in parts for piece in (*part.lead, *part.body)]


def _without_denial(pieces: Sequence[Piece], place: range, named: str) -> list[Piece]:
    """The pieces without a "without glasses" or "no glasses".

    Raises:
        ValueError: what is at ``place`` isn't denied: it is there.
    """
    parts = parts_of(pieces)
    k = next(i for i, part in enumerate(parts) if pieces[place.stop - 1] in (*part.lead, *part.body))
    head = k
    while head > 0 and parts[head].goes_on:
        head -= 1
    if not (parts[head].leads & NEGATIONS or (parts[k].body and parts[k].body[0].text in NEGATIONS)):
        raise ValueError(f"{named!r} is in the prompt already; to change it, replace={{{named!r}: ...}}.")
    return _without(pieces, place, None)


# ---------------------------------------------------------------------------- what two prompts share


def _telling(prompt: str) -> list[str]:
    return [
        word.text
        for word in words_of(prompt, token_like(prompt))
        if word.kind != "learned" and names_something(word.text) and word.text not in PICTURES
    ]


def _kept(source: str, target: str) -> tuple[int, int]:
    """How many telling words ``source`` has, and how many of them ``target`` has too."""
    wanted, there = _telling(source), _telling(target)
    return len(wanted), sum(min(wanted.count(word), there.count(word)) for word in set(wanted))


def shared_words(source: str, target: str) -> float:
    """How many of ``source``'s words ``target`` has too, from 0 to 1: of those that name something to be seen, each as
    often as it is in both. 1 where ``source`` has none."""
    total, kept = _kept(source, target)
    return kept / total if total else 1.0


_ORDERS = frozenset(
    (
        "make turn change add remove put give let replace take convert edit transform delete erase swap please can "
        "could keep get"
    ).split()
)


def prompt_warning(source: str, target: str) -> str | None:
    """What to warn of where ``target`` is an instruction ("make him smile"), or leaves most of ``source`` out; else
    None."""
    first = [next(iter(words_of(prompt)), None) for prompt in (source, target)]
    openings = ["" if word is None else word.text for word in first]
    if openings[1] in _ORDERS and openings[0] != openings[1]:
        return (
            f"The prompt {target!r} reads like an instruction. A target prompt says what the picture is to show: write "
            f"the source prompt {source!r} again with words changed, or call change_words."
        )
    total, kept = _kept(source, target)
    if total - kept >= 3 and kept < total / 3:
        return (
            f"The prompt {target!r} has few words of the source prompt {source!r}, and what it leaves out may change "
            "too: repeat every word that you want to keep, or call change_words."
        )
    return None
