"""The words of a prompt: where each is in the text, how they are compared, and what is written around them.

Words are found in any script. Chinese, Japanese, Korean and Thai write no spaces where a subject may end, so there each
character is a word, and a subject of several is several words in a row. Words are compared in Unicode's composed form
(NFC) without regard to case; their positions are always those of the text as it was written.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TextWord:
    """A word of a text.

    Attributes:
        text: in the form in which words are compared; a learned token's own spelling.
        start, end: ``[start, end)`` in the text as it was written.
        kind: "word"; "glyph", one character of a script that writes no spaces; "mark", a punctuation mark or a
            picture character; "learned", a learned token.
    """

    text: str
    start: int
    end: int
    kind: Literal["word", "glyph", "mark", "learned"]


# ---------------------------------------------------------------------------- characters

# scripts in which a word may end without a space, by code point: Thai, Lao, Myanmar, Khmer (letters and vowel signs,
# not digits), Hangul, kana, bopomofo, Han
_UNSPACED = re.compile(
    "[\u0e01-\u0e4e\u0e81-\u0ecf\u0edc-\u0edf\u1000-\u103f\u1050-\u108f\u1780-\u17d3\u1100-\u11ff\u3130-\u318f"
    "\ua960-\ua97f\uac00-\ud7ff\u3005-\u3007\u3021-\u3029\u3031-\u3035\u3041-\u3096\u309d-\u309f\u30a1-\u30fa"
    "\u30fc-\u30ff\u3105-\u312f\u31a0-\u31bf\u31f0-\u31ff\uff66-\uff9f\uffa0-\uffdc\u2e80-\u2fd5\u3400-\u4dbf"
    "\u4e00-\u9fff\uf900-\ufaff\U0001b000-\U0001b16f\U00020000-\U0003ffff]"
)
_LATER_JAMO = re.compile("[\u1160-\u11ff\ud7b0-\ud7ff]")  # Hangul vowels and final consonants
_HALF_WIDTH_VOICING = "\uff9e\uff9f"
_SPACES_WITHOUT_WIDTH = "\u200b\ufeff"
_ZERO_WIDTH_JOINER = "\u200d"
_APOSTROPHES, _HYPHENS = "'\u2019\u02bc", "-\u2010\u2011"
_NOT_COMPARED = re.compile("[\ufe00-\ufe0f]")  # how a character is to look


def _is_blank(c: str) -> bool:
    return c.isspace() or c in _SPACES_WITHOUT_WIDTH or unicodedata.category(c) in ("Cc", "Zs", "Zl", "Zp")


def _is_letter(c: str) -> bool:
    return c.isalnum() or c == "_"


def _is_glyph(c: str) -> bool:
    return _is_letter(c) and _UNSPACED.match(c) is not None


def _clings(c: str) -> bool:
    """Whether ``c`` belongs to the character before it: accents, vowel signs, what has no shape, skin tones."""
    return (
        unicodedata.category(c) in ("Mn", "Mc", "Me", "Cf") and not _is_blank(c)
    ) or "\U0001f3fb" <= c <= "\U0001f3ff"


def compared_form(word: str) -> str:
    """``word`` as words are compared: composed (NFC), without case, apostrophes and hyphens of one kind each."""
    plain = "".join(c for c in word if unicodedata.category(c) != "Cf")
    plain = unicodedata.normalize("NFC", _NOT_COMPARED.sub("", plain))
    plain = unicodedata.normalize("NFC", plain.casefold())
    plain = re.sub(f"[{_APOSTROPHES}]", "'", plain)
    return re.sub(f"[{_HYPHENS}]", "-", plain) or word


def _end_of_word(text: str, i: int) -> int:
    """Where the word of letters and digits that begins at ``i`` ends: "lady-friend" and "isn't" are one."""
    end = i + 1
    while end < len(text):
        c = text[end]
        joined = c in _APOSTROPHES + _HYPHENS and _is_letter(text[end + 1 : end + 2] or " ")
        joined = joined and not _is_glyph(text[end + 1])
        if not (_clings(c) or joined or (_is_letter(c) and not _is_glyph(c))):
            break
        end += 1
    return end


def _end_of_glyph(text: str, i: int) -> int:
    end = i + 1
    while end < len(text):
        c = text[end]
        stacked = unicodedata.combining(text[end - 1]) == 9 and _is_glyph(c)  # the sign before it takes a consonant
        jamo = _LATER_JAMO.match(c) is not None and text[end - 1] >= "\u1100"
        if not (_clings(c) or stacked or jamo or c in _HALF_WIDTH_VOICING):
            break
        end += 1
    return end


def _end_of_mark(text: str, i: int) -> int:
    flag = text[i : i + 2]
    end = i + (2 if len(flag) == 2 and all("\U0001f1e6" <= c <= "\U0001f1ff" for c in flag) else 1)
    while end < len(text):
        c = text[end]
        joined = text[end - 1] == _ZERO_WIDTH_JOINER and not _is_letter(c) and not _is_blank(c)
        if not (_clings(c) or joined):
            break
        end += 1
    return end


def words_of(text: str, learned: Iterable[str] = ()) -> list[TextWord]:
    """The words of ``text`` in order, apart from each other; between them is nothing but space.

    Args:
        learned: names, such as ``"[I]"``, that are whole words exactly as they are spelled.
    """
    names = "|".join(re.escape(name) for name in sorted(set(learned), key=len, reverse=True) if name)
    pattern = re.compile(names) if names else None
    words: list[TextWord] = []
    i = 0
    while i < len(text):
        name = pattern.match(text, i) if pattern else None
        if name is not None:
            words.append(TextWord(name.group(), i, name.end(), "learned"))
            i = name.end()
            continue
        c = text[i]
        if _is_blank(c) or unicodedata.category(c) == "Cf":
            i += 1
            continue
        kind: Literal["word", "glyph", "mark"]
        if _is_glyph(c):
            kind, end = "glyph", _end_of_glyph(text, i)
        elif _is_letter(c):
            kind, end = "word", _end_of_word(text, i)
        else:
            kind, end = "mark", _end_of_mark(text, i)
        words.append(TextWord(compared_form(text[i:end]), i, end, kind))
        i = end
    return words


def split_words(prompt: str, learned: Iterable[str] = ()) -> list[str]:
    """The words of ``prompt`` as they are compared; names in ``learned`` (such as ``"[I]"``) stay as they are."""
    return [word.text for word in words_of(prompt, learned)]


def vector_names(name: str, learned: Iterable[str]) -> list[str]:
    """``name`` and, where it is a textual inversion of several vectors, its further ones: "<cat>", "<cat>_1", ….

    diffusers numbers them so (``TextualInversionLoaderMixin``).
    """
    known, names = set(learned), [name]
    while f"{name}_{len(names)}" in known:
        names.append(f"{name}_{len(names)}")
    return names


# ---------------------------------------------------------------------------- phrases


def find_phrase(text: str, phrase: str, learned: Iterable[str] = ()) -> list[tuple[int, int]]:
    """``[start, end)`` in ``text`` of each occurrence of ``phrase``, one word or several in a row.

    "man" is also the first part of "man's", without the "'s". The name of a textual inversion of several vectors
    reaches over all of them. Whole words only, but where a script writes no spaces.
    """
    learned = list(learned)
    wanted, words = words_of(phrase, learned), words_of(text, learned)
    spans = []
    for i in range(len(words) - len(wanted) + 1):
        if not wanted or any(w.text != v.text for w, v in zip(wanted[:-1], words[i:], strict=False)):
            continue
        last = i + len(wanted) - 1
        end = _end_of_match(text, words[last], wanted[-1])
        if end is None:
            continue
        for name in vector_names(wanted[-1].text, learned)[1:] if wanted[-1].kind == "learned" else []:
            if last + 1 < len(words) and words[last + 1].text == name:
                last += 1
                end = words[last].end
        spans.append((words[i].start, end))
    return spans


def _end_of_match(text: str, word: TextWord, wanted: TextWord) -> int | None:
    """Where ``wanted`` ends in ``word``, or None where it is another."""
    if word.text == wanted.text:
        return word.end
    if word.kind != "word" or word.text != f"{wanted.text}'s":
        return None
    written = text[word.start : word.end]
    apostrophe = max(written.rfind(c) for c in _APOSTROPHES)
    return word.start + apostrophe


def listed(words: Sequence[TextWord]) -> list[str]:
    """The words as a message shows them, each once: characters without spaces between them joined."""
    shown: list[str] = []
    for before, word in zip([None, *words], words, strict=False):
        if before is not None and before.kind == word.kind == "glyph" and before.end == word.start:
            shown[-1] += word.text
        else:
            shown.append(word.text)
    return list(dict.fromkeys(shown))


_IRREGULAR = {
    "men": "man", "women": "woman", "children": "child", "people": "person", "persons": "person", "feet": "foot",
    "teeth": "tooth", "geese": "goose", "mice": "mouse", "oxen": "ox",
}  # fmt: skip


def _singulars(word: str) -> set[str]:
    """``word`` and what it may be the plural of."""
    forms = {word, _IRREGULAR.get(word, word)}
    for end, changed in (("ies", "y"), ("ves", "f"), ("ves", "fe"), ("es", ""), ("s", "")):
        if word.endswith(end) and len(word) - len(end) + len(changed) >= 3:
            forms.add(word[: len(word) - len(end)] + changed)
    if word.endswith(("women", "men")):
        forms.add(word[:-2] + "an")
    return forms


def close_words(phrase: str, text: str, learned: Iterable[str] = ()) -> list[str]:
    """What in ``text`` may be meant by ``phrase``, which is not in it: its plural or singular, or a like spelling."""
    wanted, words = split_words(phrase), words_of(text, learned)
    rows = [words[i : i + len(wanted)] for i in range(len(words) - len(wanted) + 1)] if wanted else []
    forms = [
        " ".join(word.text for word in row)
        for row in rows
        if all(_singulars(a) & _singulars(b.text) for a, b in zip(wanted, row, strict=True))
    ]
    if forms:
        return list(dict.fromkeys(forms))
    spelled = [" ".join(word.text for word in row) for row in rows if row[-1].kind != "mark"]
    return difflib.get_close_matches(" ".join(wanted), list(dict.fromkeys(spelled)), n=2, cutoff=0.7)


def missing_phrase(phrase: str, text: str, learned: Iterable[str] = ()) -> str:
    """The message that ``phrase`` isn't in ``text``: the words that are, and what may be meant."""
    close = close_words(phrase, text, learned)
    hint = f" Did you mean {' or '.join(repr(word) for word in close)}?" if close else ""
    there = ", ".join(listed(words_of(text, learned))) or "(none)"
    return f"{phrase!r} is not in the prompt {text!r}; its words are: {there}.{hint}"


def insert_token(prompt: str, subject: str, token: str, *, fitted: bool = False) -> str:
    """``prompt`` with ``token`` put before each occurrence of ``subject`` (P to P~, "a photo of a [I] lady").

    A prompt that holds the token already comes back as it is.

    Args:
        fitted: ``subject`` isn't the caller's own word but the one that the identity ``token`` was fitted to.

    Raises:
        ValueError: ``subject`` is empty or isn't a word (or words in a row) of the prompt.
    """
    words = words_of(prompt, [token])
    if any(word.text == token for word in words):
        return prompt
    spans = find_phrase(prompt, subject, [token])
    if not spans:
        close = close_words(subject, prompt, [token])
        choice = ", ".join(listed(words)) or "(the prompt is empty)"
        if fitted:
            raise ValueError(
                f"The identity {token} was fitted to {subject!r}, which is not in the prompt {prompt!r}. Say "
                f"{subject!r} there, or write {token} before the noun that it stands for, one of: {choice}."
            )
        hint = f" {close[0]!r} is in the prompt; pass subject={close[0]!r}." if close else ""
        raise ValueError(
            f"subject={subject!r} is not in the prompt {prompt!r}; choose the noun that names who or what is "
            f"to be kept, one of: {choice}.{hint}"
        )
    starts = {start for start, _ in spans}
    for word in reversed(words):
        if word.start in starts:
            space = "" if word.kind == "glyph" else " "
            prompt = f"{prompt[: word.start]}{token}{space}{prompt[word.start :]}"
    return prompt


def without_tokens(prompt: str, tokens: Iterable[str]) -> str:
    """``prompt`` without the learned ``tokens``, P~ to P: "a photo of a [I] lady" is "a photo of a lady"."""
    tokens = list(tokens)
    for word in reversed(words_of(prompt, tokens) if tokens else []):
        if word.text in tokens:
            end = word.end + (prompt[word.end : word.end + 1] == " ")
            prompt = prompt[: word.start] + prompt[end:]
    return prompt


# ---------------------------------------------------------------------------- what words do

NEGATIONS = frozenset("without no not never minus lacking".split())
"""Words that say that what follows isn't there."""

FUNCTION_WORDS = NEGATIONS | frozenset(
    (
        "a an the and or nor but with of in on at by to from for as into onto over under is are was were be being has "
        "have having his her its their my your our this that these those some any who whose which"
    ).split()
)
"""Words that name nothing to be seen."""


def names_something(word: str) -> bool:
    """Whether ``word``, as words are compared, names something to be seen: no punctuation, no function word."""
    if word in FUNCTION_WORDS:
        return False
    return any(c.isalnum() or unicodedata.category(c) == "So" for c in word)


_TOKEN_LIKE = re.compile(r"\[[\w*][\w.*:+-]*\]|<[\w*][\w.*:+-]*>")


def token_like(text: str) -> list[str]:
    """What in ``text`` looks like a learned token: one word in square or angle brackets, "[I]" or "<ada>"."""
    return _TOKEN_LIKE.findall(text)


def unknown_tokens(prompt: str, known: Iterable[str] = ()) -> list[str]:
    """Token-like words of ``prompt``, such as ``[I]`` or ``<ada>``, that none of ``known`` is; each once, in order.

    Token-like is one word in square or angle brackets: "[a photo]" and "<3" aren't.
    """
    words = words_of(prompt, known)
    rest = list(prompt)
    for word in words:
        if word.kind == "learned":
            rest[word.start : word.end] = " " * (word.end - word.start)
    return list(dict.fromkeys(token_like("".join(rest))))


# ---------------------------------------------------------------------------- weights

_WEIGHT = re.compile(r"\s*:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*$")
_RATIO = re.compile(r"\d\s*:\s*\d+\s*$")


def parse_weights(prompt: str) -> tuple[str, dict[str, float]]:
    r"""The plain prompt and the weights written into it: ``"a (smiling:1.4) man"`` is "a smiling man", smiling 1.4.

    Only ``(words:number)`` is a weight; nested ones multiply. All else stays text: ``(words)`` and ``((words))``;
    square brackets, which are learned tokens' ("[I]"); Compel's ``word++`` and ``word--`` ("C++", a dash); a ratio or
    a time ("16:9", "at 5:30"). ``\(`` and ``\)`` are plain brackets.

    Returns:
        The prompt without the weights' brackets; word or phrase -> weight, as ``reweight=`` takes it, without those of
        weight 1.

    Raises:
        ValueError: a weight begins or ends within a word; a phrase is in the prompt several times and not with one
            weight in all places: ``reweight`` speaks of a phrase wherever it is.
    """
    open_brackets: list[int] = []
    out: list[tuple[str, float]] = []  # characters, each with its weight
    i = 0
    while i < len(prompt):
        c = prompt[i]
        if c == "\\" and prompt[i + 1 : i + 2] in ("(", ")"):
            out.append((prompt[i + 1], 1.0))
            i += 2
            continue
        if c == "(":
            open_brackets.append(len(out))
        out.append((c, 1.0))
        if c == ")" and open_brackets:
            start = open_brackets.pop()
            inner = "".join(text for text, _ in out[start + 1 : -1])
            number = None if _RATIO.search(inner) else _WEIGHT.search(inner)
            if number is not None and inner[: number.start()].strip():
                factor = float(number.group(1))
                first = start + 1 + len(inner) - len(inner.lstrip())
                out[start:] = [(text, w * factor) for text, w in out[first : start + 1 + number.start()]]
        i += 1
    plain = "".join(text for text, _ in out)
    return plain, _phrases(plain, [weight for _, weight in out])


def _phrases(plain: str, weights: Sequence[float]) -> dict[str, float]:
    """Runs of words of one weight other than 1 -> that weight."""
    runs: list[tuple[int, int, float]] = []
    for word in words_of(plain, token_like(plain)):
        weight = weights[word.start]
        if set(weights[word.start : word.end]) != {weight}:
            raise ValueError(
                f"A weight is a whole word's; in {plain!r} it ends within {plain[word.start : word.end]!r}."
            )
        if (
            runs
            and runs[-1][2] == weight
            and weights[runs[-1][1] : word.start] == [weight] * (word.start - runs[-1][1])
        ):
            runs[-1] = (runs[-1][0], word.end, weight)
        else:
            runs.append((word.start, word.end, weight))
    found: dict[str, float] = {}
    places: dict[str, int] = {}
    for start, end, weight in runs:
        if weight == 1:
            continue
        phrase = plain[start:end]
        if found.setdefault(phrase, weight) != weight:
            raise ValueError(
                f"{phrase!r} has two weights, {found[phrase]:g} and {weight:g}; take a word beside it in, "
                f"such as '({phrase} hat:{weight:g})', so that each phrase is there once."
            )
        places[phrase] = places.get(phrase, 0) + 1
    for phrase, count in places.items():
        if len(find_phrase(plain, phrase, token_like(plain))) > count:
            raise ValueError(
                f"{phrase!r} is in {plain!r} with the weight {found[phrase]:g} and without; take a word beside it in, "
                f"such as '({phrase} hat:{found[phrase]:g})', so that the phrase is there once."
            )
    return found
