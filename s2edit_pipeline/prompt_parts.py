"""The parts of a plain English caption: what joins them, what they are about, and the articles that they take.

"a photo of a sad lady with long hair and glasses on a blue background" is "a photo", "of a sad lady", "with long hair",
"and glasses" and "on a blue background".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from .prompt_words import token_like, words_of

ARTICLES = frozenset("a an".split())
POSSESSIVES = frozenset("his her its their my your our".split())
DETERMINERS = ARTICLES | POSSESSIVES | frozenset("the this that these those some no another".split())
JOINING = frozenset(["and", "or", "nor", "&", ","])
PREPOSITIONS = frozenset(
    (
        "with without in on at by near under over behind beside before against from into onto to through around "
        "among between inside outside above below across along for as while"
    ).split()
)
PLACES = PREPOSITIONS - {"with", "without", "for", "as"}
"""What joins a caption's place or background to it."""
CARRYING = frozenset("wearing holding carrying having has sporting".split())
"""What goes when the last thing that is worn or held goes."""
PICTURES = frozenset(
    (
        "photo photograph picture portrait image painting drawing sketch illustration render rendering shot "
        "close-up closeup headshot selfie snapshot view"
    ).split()
)
NO_PARTICIPLES = frozenset(
    (
        "ring rings earring string king wing painting building clothing ceiling morning evening lightning stocking "
        "wedding drawing bed seed weed sled shed thing nothing something rendering"
    ).split()
)
MOODS = frozenset("sad angry happy neutral serious calm tired proud shy asleep awake".split())
"""Words that say what a subject does or feels, beside those in -ing and -ed: they go before others."""
LOOKS = frozenset(
    (
        "bald old young tall small big slim blond blonde pale dark light red orange yellow green blue purple pink "
        "white grey gray black brown"
    ).split()
)
"""Words that say how a subject looks: they go right before it."""
UNCOUNTED = frozenset(
    (
        "hair makeup make-up jewelry jewellery lipstick eyeliner mascara blush armor armour clothing snow rain fog "
        "smoke fire water grass fur skin light sunlight sand mud dust blood ice stubble denim leather lace men "
        "women people children teeth feet face-paint"
    ).split()
)
_AN = re.compile(
    r"(?!uni(?![mnd])|u(?:k|s[eu]|t[ei])|ufo|eu|ewe|one\b|once)[aeiou]|hour|heir|hono|honest|8|1[18](?!\d)"
)
"""The words that begin with a vowel's sound."""


@dataclass(eq=False)
class Piece:
    """A word or mark as it is written, the space before it, and the word as words are compared."""

    gap: str
    written: str
    text: str

    @property
    def is_token(self) -> bool:
        return bool(token_like(self.written))


@dataclass(eq=False)
class Part:
    """A stretch of a caption: ``lead`` joins it to what is before ("with", ", and", "standing in"), ``body`` is what
    is said ("a blue hat")."""

    lead: list[Piece] = field(default_factory=list)
    body: list[Piece] = field(default_factory=list)

    @property
    def goes_on(self) -> bool:
        """Whether it is a further item of the list before it: "and glasses"."""
        return bool(self.lead) and all(piece.text in JOINING for piece in self.lead)

    @property
    def leads(self) -> set[str]:
        return {piece.text for piece in self.lead}


def pieces_of(text: str) -> list[Piece]:
    """The words of ``text``; an "'s" is a piece of its own."""
    pieces, end = [], 0
    for word in words_of(text, token_like(text)):
        gap, written = text[end : word.start], text[word.start : word.end]
        cut = len(written) - 2 if word.kind == "word" and word.text.endswith("'s") else len(written)
        pieces.append(Piece(gap, written[:cut], word.text[:-2] if cut < len(written) else word.text))
        if cut < len(written):
            pieces.append(Piece("", written[cut:], "'s"))
        end = word.end
    return pieces


def matches_of(pieces: Sequence[Piece], phrase: str) -> list[range]:
    """Where ``phrase`` is, without those that overlap one before."""
    wanted = [piece.text for piece in pieces_of(phrase)]
    found: list[range] = []
    for i in range(len(pieces) - len(wanted) + 1):
        free = not found or i >= found[-1].stop
        if free and [piece.text for piece in pieces[i : i + len(wanted)]] == wanted:
            found.append(range(i, i + len(wanted)))
    return found


def drop(pieces: list[Piece], dropped: Sequence[Piece]) -> None:
    """Take pieces out; what follows them has the space that was before them."""
    for piece in dropped:
        i = pieces.index(piece)
        if i + 1 < len(pieces) and (i == 0 or pieces[i + 1].gap):
            pieces[i + 1].gap = piece.gap
        del pieces[i]


def is_participle(word: str) -> bool:
    return word.endswith(("ing", "ed")) and len(word) > 4 and word not in NO_PARTICIPLES


def _begins_part(pieces: Sequence[Piece], i: int, body: Sequence[Piece], first: bool) -> bool:
    """Whether the piece ``i`` joins what follows to ``body`` rather than be part of it."""
    word = pieces[i].text
    if word == "'s" or pieces[i].is_token:
        return False
    if word in JOINING or word in PREPOSITIONS or not any(c.isalnum() for c in word):
        return True
    if word == "of":  # "a photo of a man", and "a cup of tea" is one thing
        return first and bool(body) and body[-1].text in PICTURES
    if not body or body[-1].text in DETERMINERS:
        return False
    after = pieces[i + 1].text if i + 1 < len(pieces) else "."
    ends = after in PREPOSITIONS or after in DETERMINERS or after in JOINING or not after[0].isalnum()
    return word in CARRYING or (word.endswith("ing") and is_participle(word) and ends)


def parts_of(pieces: Sequence[Piece]) -> list[Part]:
    parts = [Part()]
    for i, piece in enumerate(pieces):
        if not _begins_part(pieces, i, parts[-1].body, len(parts) == 1):
            parts[-1].body.append(piece)
        elif parts[-1].body:
            parts.append(Part([piece]))
        else:
            parts[-1].lead.append(piece)
    return parts


def subject_part(parts: Sequence[Part], subject: str | None) -> int:
    """The part that names the subject: of "a photo of a man …" the second."""
    if subject is not None:
        return next((i for i, part in enumerate(parts) if matches_of(part.body, subject)), 0)
    return 1 if len(parts) > 1 and "of" in parts[1].leads else 0


def noun_of(body: Sequence[Piece]) -> Piece | None:
    """The last word of ``body``; but that of "a man smiling" is "man", and that of "a cup of tea" is "cup"."""
    words = [piece for piece in body if piece.text not in DETERMINERS and not piece.is_token]
    of = next((i for i, piece in enumerate(words) if piece.text in ("of", "'s")), len(words))
    words = words[:of] if "of" in [piece.text for piece in words] else words
    while len(words) > 1 and is_participle(words[-1].text):
        words.pop()
    return words[-1] if words else None


def subject_noun(prompt: str) -> str | None:
    """The noun that a caption is about: "lady" of "a photo of a sad lady with glasses"; None where there is none."""
    parts = parts_of(pieces_of(prompt))
    noun = noun_of(parts[subject_part(parts, None)].body)
    return None if noun is None else noun.text


def changes_only_the_subject(source: str, target: str) -> bool:
    """Whether all that ``target`` says otherwise than ``source`` is of the subject: how it looks, what it does, wears
    or has. The background, the place and the kind of picture are not."""
    before, after = (_told(parts_of(pieces_of(text))) for text in (source, target))
    changed = [part for part in (*before, *after) if (part in before) != (part in after)]
    return all(is_the_subjects for *_, is_the_subjects in changed)


def _told(parts: Sequence[Part]) -> list[tuple[tuple[str, ...], tuple[str, ...], bool]]:
    """Each part's words, and whether it tells of the subject: it names it, or what it has or does."""
    subject, told, is_the_subjects = subject_part(parts, None), [], False
    for i, part in enumerate(parts):
        if i == subject:
            is_the_subjects = True
        elif not part.goes_on:
            is_the_subjects = i > subject and not part.leads & PLACES
        lead, body = (tuple(p.text for p in pieces if not p.is_token) for pieces in (part.lead, part.body))
        told.append((lead, body, is_the_subjects))
    return told


def list_end(parts: Sequence[Part], first: int) -> int:
    """The last item of the list that the part ``first`` begins: "a hat, a beard and glasses"; commas alone are none."""
    last = first
    for i in range(first + 1, len(parts)):
        if not parts[i].goes_on:
            break
        if parts[i].leads & {"and", "or", "nor", "&"}:
            last = i
    return last


# ---------------------------------------------------------------------------- articles


def takes_article(noun: str) -> bool:
    """Whether one of it is "a …": no plural, and nothing that isn't counted."""
    plural = noun.endswith("s") and not noun.endswith(("ss", "us", "is"))
    return not plural and noun not in UNCOUNTED


def fit_article(pieces: Sequence[Piece], i: int) -> None:
    """Let an "a" or "an" before the piece ``i``, and before tokens there, fit the word that follows it."""
    before = i - 1
    while before >= 0 and pieces[before].is_token:
        before -= 1
    after = next((piece for piece in pieces[before + 1 :] if not piece.is_token), None)
    if before >= 0 and after is not None and pieces[before].text in ARTICLES:
        article = "an" if _AN.match(after.text) else "a"
        if pieces[before].text != article:
            first = article[0].upper() if pieces[before].written[0].isupper() else article[0]
            pieces[before].written, pieces[before].text = first + article[1:], article


def article_for(noun: str, pieces: Sequence[Piece]) -> list[Piece]:
    """The article of ``pieces``, a thing named ``noun`` that has none, or nothing."""
    if not takes_article(noun):
        return []
    article = "an" if _AN.match(pieces[0].text) else "a"
    return [Piece(pieces[0].gap, article, article)]
