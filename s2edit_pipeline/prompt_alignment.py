"""How the words of two prompts correspond.

The correspondence feeds prompt-to-prompt (Hertz et al. 2022): word replacement and refinement are the two cases of one
:class:`PromptAlignment`.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

import torch

from .argument_checks import check_choice
from .prompt_columns import TokenizedPrompt, Word
from .prompt_words import FUNCTION_WORDS, NEGATIONS, names_something


@dataclass(frozen=True)
class PromptAlignment:
    """How a target prompt's tokens take over the source prompt's attention.

    The edited attention is ``A_source @ mapping`` where ``share`` is 1 and the target's own where
    it is 0 (prompt-to-prompt, section 3.2: replacement and refinement in one).

    Attributes:
        mapping: (L_source, L_target), each column the source tokens whose maps a target token takes; between columns
            of different segments it is 0.
        share: (L_target,) of 0 and 1.
        changed_source: columns of source words that the target lacks.
        changed_target: columns of target words that the source lacks.
    """

    mapping: torch.Tensor
    share: torch.Tensor
    changed_source: tuple[int, ...]
    changed_target: tuple[int, ...]


def align_prompts(source: TokenizedPrompt, target: TokenizedPrompt, edit: str = "auto") -> PromptAlignment:
    """Align two prompts word by word, within each segment of the denoiser's columns.

    Words in both correspond. Words exchanged one for one ("smiling" for "sad") also do under
    ``edit="replace"``, the new word then starts from the old one's map; under ``"refine"`` new words
    keep their own maps. ``"auto"`` replaces when nothing was added or taken away, and refines otherwise.

    Raises:
        ValueError: unknown ``edit``, or ``"replace"`` for prompts that don't have equally many words; the prompts are
            for different text encoders.
    """
    check_choice("edit", edit, ("auto", "replace", "refine"))
    names = [[segment.name for segment in prompt.segments] for prompt in (source, target)]
    if names[0] != names[1]:
        raise ValueError(
            f"The prompts are for different text encoders, {names[0]} and {names[1]}: tokenize both alike."
        )
    a, b = [w.text for w in source.words], [w.text for w in target.words]
    blocks = difflib.SequenceMatcher(a=a, b=b, autojunk=False).get_opcodes()
    one_for_one = all(tag in ("equal", "replace") and i2 - i1 == j2 - j1 for tag, i1, i2, j1, j2 in blocks)
    if edit == "replace" and not one_for_one:
        raise ValueError(
            f"edit='replace' exchanges words one for one, but {source.text!r} and {target.text!r} differ by added "
            "or removed words; use edit='refine' or leave it to 'auto'."
        )
    replacing = edit == "replace" or (edit == "auto" and one_for_one)

    mapping = torch.zeros(source.num_columns, target.num_columns)
    share = torch.zeros(target.num_columns)

    def tie(left: list[int], right: list[int]) -> None:
        if not left or not right:
            return
        if len(left) == len(right):
            for i, j in zip(left, right, strict=True):
                mapping[i, j] = 1.0
        else:  # a word's attention is shared out over the tokens of its counterpart
            mapping[torch.tensor(left)[:, None], torch.tensor(right)] = 1.0 / len(right)
        share[right] = 1.0

    changed_source: list[int] = []
    changed_target: list[int] = []
    for tag, i1, i2, j1, j2 in blocks:
        if tag == "equal" or (tag == "replace" and replacing):
            for old, new in zip(source.words[i1:i2], target.words[j1:j2], strict=True):
                for here, there in zip(source.segments, target.segments, strict=True):
                    tie(
                        [t for t in old.tokens if t in here.columns],
                        [t for t in new.tokens if t in there.columns],
                    )
        if tag != "equal":
            changed_source += [t for word in source.words[i1:i2] for t in word.tokens]
            changed_target += [t for word in target.words[j1:j2] for t in word.tokens]
    for here, there in zip(source.segments, target.segments, strict=True):
        # what is before the prompt, by its distance from the prompt's start
        for j in range(there.start):
            i = max(here.start - (there.start - j), 0)
            if i < here.start:
                tie([here.offset + i], [there.offset + j])
        # the end token and the padding after it, by their distance from the prompt's end
        for j in range(there.eos, there.num_columns):
            i = min(here.eos + j - there.eos, here.num_columns - 1)
            if i >= here.eos:
                tie([here.offset + i], [there.offset + j])
    return PromptAlignment(mapping, share, tuple(changed_source), tuple(changed_target))


_JOINING = frozenset("and or nor".split())
_DETERMINERS = frozenset("a an the his her its their my your our this that these those some any".split())


def _governed(words: tuple[Word, ...], i: int) -> list[Word]:
    """What the function word ``words[i]`` speaks of: "without" in "without a red hat or glasses", all three."""
    negates = words[i].text in NEGATIONS
    spoken_of: list[Word] = []
    for word in words[i + 1 :]:
        if names_something(word.text):
            spoken_of.append(word)
        elif word.text in _DETERMINERS or (negates and word.text in ("or", "nor", "any")):
            continue
        elif spoken_of or word.text not in FUNCTION_WORDS:
            break
    return spoken_of


def content_words(prompt: TokenizedPrompt, tokens: set[int]) -> tuple[tuple[int, ...], ...]:
    """The words at the columns ``tokens``, a tuple of columns each, without those that name nothing to be seen
    ("a", "with", punctuation).

    A changed negation changes what it negates: of "without" in "without glasses", "glasses". So do other function words
    where nothing else has changed: "with", once "without", is where the glasses are. Where these speak of nothing they
    stand for themselves.
    """
    chosen = [i for i, word in enumerate(prompt.words) if tokens.intersection(word.tokens)]
    telling = [i for i in chosen if names_something(prompt.words[i].text)]
    speaking = [i for i in chosen if prompt.words[i].text in NEGATIONS] if telling else chosen
    looked_at = [prompt.words[i] for i in telling]
    for i in speaking:
        looked_at += [word for word in _governed(prompt.words, i) if word not in looked_at]
    looked_at = looked_at or [prompt.words[i] for i in chosen]
    return tuple(word.tokens for word in sorted(looked_at, key=lambda word: word.span))
