"""Words whose effect a fit keeps: prompts that say one thing otherwise than the fit's own prompt does.

A fit to one picture takes hold of all that is in it. Under a short prompt, "a photo of a man", that is the man's sad
face and green sweater too, and "smiling" then changes little. So the fit is held to what words did before it
(``fit_losses.response_loss``): of each step one of these prompts is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from .describe_completion import Heard, as_written, heard_in, telling_words, with_sayings
from .describe_vocabulary import Group, Template, Wording, follows_noun, read_vocabulary
from .prompt_changes import change_words
from .prompt_columns import TokenizedPrompt
from .prompt_parts import matches_of, pieces_of, subject_noun

GENERAL_VOCABULARY = (
    "a photo of [smiling|sad|angry|surprised] [old|young] {person} [|with [black|blond|red|grey] hair] "
    "[|with glasses|with sunglasses] [|with a beard|with a moustache] [|with a [red|blue|black] hat] "
    "[with a [red|blue|green|white|black] shirt] [on a [red|blue|green|white|black] background]"
)
"""What is said of a picture where the model brings no vocabulary of its own."""

Sayings = tuple[tuple[tuple[str, ...], ...], ...]
"""Prompts by what they say otherwise, and these by its kinds: hair -> long hair -> its colours. One is drawn of each in
turn, so that a kind of many colours doesn't come up more often than one of few."""


@dataclass(frozen=True)
class ToldOtherwise:
    """A prompt that says one thing otherwise than the fit's, without the token and with it."""

    prompt: TokenizedPrompt
    prompt_with_token: TokenizedPrompt


@dataclass(frozen=True)
class ResponseWords:
    """The prompts that may be drawn: ``sayings``, and ``tokenized``, each of them as the model reads it."""

    sayings: Sayings
    tokenized: Mapping[str, ToldOtherwise]

    @classmethod
    def of(cls, sayings: Sayings, tokenize: Callable[[str], ToldOtherwise]) -> ResponseWords:
        """Without those that are too long for the model, which ``tokenize`` refuses by a ValueError."""
        tokenized = {}
        for text in (text for phrases in sayings for texts in phrases for text in texts):
            with suppress(ValueError):
                tokenized[text] = tokenize(text)
        fitting = [[tuple(t for t in texts if t in tokenized) for texts in phrases] for phrases in sayings]
        kept = [tuple(texts for texts in phrases if texts) for phrases in fitting]
        return cls(tuple(phrases for phrases in kept if phrases), tokenized)

    def drawn(self, count: int, generator: torch.Generator | None, device: torch.device) -> list[ToldOtherwise]:
        """``count`` of them, by ``generator`` on its ``device``."""
        shares = torch.rand((count, 3), generator=generator, device=device).tolist()
        prompts = []
        for of_group, of_phrase, of_word in shares:
            phrases = self.sayings[_place(of_group, self.sayings)]
            texts = phrases[_place(of_phrase, phrases)]
            prompts.append(self.tokenized[texts[_place(of_word, texts)]])
        return prompts


def _place(share: float, items: Sequence[object]) -> int:
    """Which of ``items`` is at ``share``, in [0, 1), of the way through them."""
    return min(int(share * len(items)), len(items) - 1)


def sayings_of(prompt: str, subject: str, words: Sequence[str] | None, vocabulary: str | None) -> Sayings:
    """What may be said otherwise than ``prompt`` says it.

    Args:
        subject: the noun that each of them keeps.
        words: things and adjectives to add, as ``change_words`` takes them; None: what the vocabulary says.
        vocabulary: the model's own, or None.

    Raises:
        ValueError: the prompt says all of ``words`` already.
    """
    if words is None:
        return _of_vocabulary(prompt, subject, GENERAL_VOCABULARY if vocabulary is None else vocabulary)
    there = pieces_of(prompt)
    missing = [word for word in words if not matches_of(there, word)]
    if not missing:
        raise ValueError(
            f"response_words={list(words)!r}: prompt={prompt!r} says all of them already. Name words that an edit may "
            "ask for and the picture doesn't show, such as response_words=['smiling', 'glasses'], or leave it out."
        )
    return tuple(((change_words(prompt, add=[word], subject=subject),),) for word in missing)


def _of_vocabulary(prompt: str, subject: str, vocabulary: str) -> Sayings:
    templates, noun = read_vocabulary(vocabulary), subject_noun(prompt)
    known = [template for template in templates if noun in _nouns(template)]
    groups: list[tuple[tuple[str, ...], ...]] = []
    for template in known or templates:
        heard = heard_in(prompt, template)
        for g, group in enumerate(template.groups):
            if g == template.subject:
                continue
            phrases = [
                tuple(dict.fromkeys(_said(prompt, template, g, way, heard.get(g)) for way in phrase.wordings(k)))
                for k, phrase in enumerate(group.phrases)
            ]
            kept = [tuple(text for text in texts if _is_other(text, prompt, subject)) for texts in phrases]
            groups.append(tuple(texts for texts in kept if texts))
    return tuple(dict.fromkeys(group for group in groups if group))


def _nouns(template: Template) -> list[str]:
    subject = template.groups[template.subject]
    return [phrase.said(phrase.blank) for phrase in subject.phrases]


def _is_other(text: str, prompt: str, subject: str) -> bool:
    return text != prompt and bool(matches_of(pieces_of(text), subject))


def _said(prompt: str, template: Template, g: int, wording: Wording, heard: Heard | None) -> str:
    """``prompt`` with the group ``g`` in this wording: said beside the rest, or in place of what was ``heard`` of it.
    Where it can't be put there, ``prompt`` as it is."""
    text = template.saying(g, wording)
    if heard is None:
        return with_sayings(prompt, [text]) if text else prompt
    if len(matches_of(pieces_of(prompt), heard.words)) != 1:
        return prompt
    if not text:
        return change_words(prompt, remove=[heard.words])
    if follows_noun(text) not in _places(template.groups[g], heard):
        return prompt
    telling = telling_words(text)
    new = as_written([piece for piece in pieces_of(text) if piece.text in telling])
    return prompt if new == heard.words else change_words(prompt, replace={heard.words: new})


def _places(group: Group, heard: Heard) -> set[bool]:
    """Whether what was heard stands behind the noun (True) or before it (False)."""
    sayings = [group.phrases[wording.phrase].said(wording.words) for wording in heard.wordings]
    return {follows_noun(text) for text in sayings if text}
