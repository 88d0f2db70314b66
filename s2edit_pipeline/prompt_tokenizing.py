"""Tokenizers at work: a prompt's tokens, what each is of its text, and words that a vocabulary lacks.

Which tokens a word is comes from the tokenizer's own character offsets.
"""

from __future__ import annotations

import difflib
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .prompt_columns import Segment, TokenizedPrompt
from .prompt_words import TextWord, compared_form, names_something, vector_names, words_of

TOKENIZING = threading.RLock()
"""A fast tokenizer keeps how it pads and cuts from call to call: one thread at a time."""

_NO_LIMIT = 10**6
"""From here on a tokenizer's ``model_max_length`` is no limit: one without a limit says 1e30."""


def learned_tokens(tokenizer: Any) -> list[str]:
    """The names that were added to ``tokenizer``'s own vocabulary, special tokens aside."""
    special = set(tokenizer.all_special_tokens)
    return [name for name in tokenizer.get_added_vocab() if name not in special]


@dataclass(frozen=True)
class PromptTemplate:
    """What a prompt is put into before it is tokenized.

    Attributes:
        text: with "{}" where the prompt goes, such as a chat's.
        dropped: positions of the ids whose columns the denoiser isn't given: those before the prompt, in Qwen-Image.
    """

    text: str = "{}"
    dropped: range = range(0)


def tokenize(
    tokenizer: Any,
    prompt: str,
    *,
    name: str = "text_encoder",
    limit: int | None = None,
    truncate: bool = False,
    pad: bool = True,
    template: PromptTemplate = PromptTemplate(),
    learned: Sequence[str] | None = None,
) -> TokenizedPrompt:
    """Tokenize ``prompt`` and find its words' columns, of one segment.

    The ids are those of ``tokenizer(prompt, padding="max_length", max_length=limit, truncation=True)``, as diffusers'
    pipelines ask for them, but that each vector of a textual inversion is there already.

    Args:
        name: the text encoder's.
        limit: the most tokens it is given, special tokens and template included; None: the tokenizer's own.
        truncate: cut a longer prompt; what was cut off is in ``lost``.
        pad: up to ``limit``; else the ids are as many as there are.
        template: what the prompt is put into.
        learned: names that are whole words even where this tokenizer doesn't know them; those that it does know are.

    Raises:
        TypeError: ``prompt`` is no string.
        ValueError: it is longer than the text encoder reads, and the message names what would be cut off; it isn't
            Unicode; the tokenizer has no limit and none is given, or no offsets.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"A prompt must be a string, not {type(prompt).__name__}.")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"The prompt {prompt!r} holds half a character at {error.start}: it isn't Unicode.") from None
    if limit is None:
        limit = tokenizer.model_max_length
        if limit >= _NO_LIMIT:
            raise ValueError("This tokenizer names no limit; say how many tokens its encoder reads: limit=512.")
    before, found, after = template.text.partition("{}")
    if not found:
        raise ValueError(f"The template {template.text!r} has no '{{}}' for the prompt.")
    names = tuple(dict.fromkeys([*learned_tokens(tokenizer), *(learned or ())]))
    read = _with_all_vectors(tokenizer, names, _encode(tokenizer, before, prompt, after))
    lost = ""
    if len(read.ids) > limit:
        end = len(read.ids) - read.num_after
        rest = _first_unread(words_of(prompt, names), read.spans[max(limit - read.num_after, 0) : end], len(prompt))
        if not truncate:
            raise ValueError(
                f"The prompt has {len(read.ids)} tokens and the text encoder reads {limit} (start and end included). "
                f"Shorten it: what follows {prompt[:rest].rstrip()[-40:]!r} would be cut off."
            )
        lost = prompt[rest:].strip()
        read = read.without(range(max(limit - read.num_after, 0), end))
    if all(span is None for span in read.spans):  # where it would be
        probe = _encode(tokenizer, before, "a", after).spans
        start = min(next((i for i, span in enumerate(probe) if span is not None), 0), len(read.ids) - read.num_after)
    else:
        start = next(i for i, span in enumerate(read.spans) if span is not None)
    segment = _segment(tokenizer, read, start, name, limit if pad else len(read.ids), template.dropped)
    return TokenizedPrompt(prompt, (replace(segment, lost=lost),), names)


_Span = tuple[int, int] | None


@dataclass(frozen=True)
class _Tokens:
    """``ids`` as a tokenizer gives them; what each is of the prompt, None of what is put around it; and how many
    special tokens it ends with."""

    ids: list[int]
    spans: list[_Span]
    num_after: int

    def without(self, places: range) -> _Tokens:
        kept = [i for i in range(len(self.ids)) if i not in places]
        return replace(self, ids=[self.ids[i] for i in kept], spans=[self.spans[i] for i in kept])


def _encode(tokenizer: Any, before: str, prompt: str, after: str) -> _Tokens:
    """The whole text's tokens, with spans in ``prompt``."""
    try:
        with TOKENIZING:
            encoded = tokenizer(
                before + prompt + after, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False
            )
    except NotImplementedError as error:
        raise ValueError(
            f"{type(tokenizer).__name__} doesn't say which letters a token is: load the fast tokenizer, use_fast=True."
        ) from error
    first, last = len(before), len(before) + len(prompt)
    spans: list[_Span] = []
    for (start, end), special in zip(encoded.offset_mapping, encoded.special_tokens_mask, strict=True):
        inside = (start < last and end > first) or first <= start == end <= last
        spans.append(None if special or not inside else (max(start - first, 0), min(end, last) - first))
    mask = list(encoded.special_tokens_mask)
    num_after = next((i for i, special in enumerate(reversed(mask)) if not special), max(len(mask) - 1, 0))
    return _Tokens(list(encoded.input_ids), spans, num_after)


def _with_all_vectors(tokenizer: Any, names: Sequence[str], tokens: _Tokens) -> _Tokens:
    """With a textual inversion's further vectors after its first, as ``maybe_convert_prompt`` of diffusers has it."""
    known = set(tokenizer.get_added_vocab())
    further = {
        tokenizer.convert_tokens_to_ids(name): tokenizer.convert_tokens_to_ids(vector_names(name, known)[1:])
        for name in names
        if f"{name}_1" in known
    }
    ids: list[int] = []
    spans: list[_Span] = []
    for i, (token, span) in enumerate(zip(tokens.ids, tokens.spans, strict=True)):
        more = further.get(token, [])
        if tokens.ids[i + 1 : i + 2] == more[:1]:  # they are written out
            more = []
        ids += [token, *more]
        spans += [span] * (1 + len(more))
    return replace(tokens, ids=ids, spans=spans)


def _first_unread(words: Sequence[TextWord], cut: Sequence[_Span], length: int) -> int:
    """Where the first word begins of which a token is in ``cut``."""
    start = min((span[0] for span in cut if span is not None), default=length)
    return next((word.start for word in words if word.start < start < word.end), start)


def _segment(tokenizer: Any, read: _Tokens, start: int, name: str, length: int, dropped: range) -> Segment:
    """``read`` padded to ``length``; ``start`` is where the prompt begins in it."""
    missing = max(length - len(read.ids), 0)
    if missing and tokenizer.pad_token_id is None:
        raise ValueError(f"{type(tokenizer).__name__} has no token to pad with; set its pad_token, or pass pad=False.")
    left = missing if getattr(tokenizer, "padding_side", "right") == "left" else 0
    right = missing - left
    ids = [tokenizer.pad_token_id] * left + read.ids + [tokenizer.pad_token_id] * right
    mask = [0] * left + [1] * len(read.ids) + [0] * right
    spans: list[_Span] = [None] * left + read.spans + [None] * right
    kept = tuple(i for i in range(len(ids)) if i not in dropped)
    end = max((i + 1 for i, span in enumerate(spans) if span is not None), default=left + start)
    return Segment(
        name=name,
        ids={name: torch.tensor([ids])},
        masks={name: torch.tensor([mask])},
        spans=tuple(spans[i] for i in kept),
        start=sum(i < left + start for i in kept),
        eos=sum(i < end for i in kept),
        kept=kept,
    )


def unknown_words(prompt: str, tokenizer: Any, known: Sequence[str] = ()) -> dict[str, list[str]]:
    """Words of ``prompt`` that a small vocabulary, in which each word that was trained is one token, doesn't have.

    Args:
        known: learned tokens' names, known besides those that the tokenizer itself has.

    Returns:
        Each such word in order -> up to three words of the vocabulary that are spelled like it, the likest first.
        Punctuation, single letters and function words of English are never among them.
    """
    names = [*learned_tokens(tokenizer), *known]
    ending = "</w>"
    pieces = set(tokenizer.get_vocab())
    ends_marked = any(piece.endswith(ending) and len(piece) > len(ending) + 1 for piece in pieces)
    whole = (piece for piece in pieces if not ends_marked or piece.endswith(ending))
    vocabulary = {compared_form(re.sub(r"^[▁Ġ]|</w>$", "", piece)) for piece in whole}
    vocabulary = {word for word in vocabulary if len(word) > 1 and word.isalpha()}
    unknown: dict[str, list[str]] = {}
    for word in words_of(prompt, names):
        plain = re.sub(r"(n't|'\w+)$", "", word.text)
        for part in re.findall(r"[^\W_]+", plain) if word.kind == "word" else [word.text]:
            short = part.isascii() and (len(part) < 2 or not part.isalpha())
            if word.kind != "learned" and not short and names_something(part) and part not in vocabulary:
                unknown[part] = difflib.get_close_matches(part, sorted(vocabulary), n=3, cutoff=0.75)
    return unknown
