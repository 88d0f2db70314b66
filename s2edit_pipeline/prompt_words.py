"""Words to token spans, and how the words of two prompts correspond.

Spans come from the tokenizer's own character offsets, so a word may be any number of tokens.
The correspondence feeds prompt-to-prompt (Hertz et al. 2022): word replacement and refinement
are the two cases of one :class:`PromptAlignment`.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Word:
    """A word of a prompt: its ``text`` (lower case unless it is a learned token) and the token positions it fills."""

    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt as the text encoder sees it: ``input_ids`` (1, L) padded, its words, and where it ends (``eos``);
    ``input_ids_2`` is what SDXL's second text encoder gets: the same tokens, padded and numbered its own way."""

    text: str
    input_ids: torch.Tensor
    words: tuple[Word, ...]
    eos: int
    input_ids_2: torch.Tensor | None = None

    @property
    def ids(self) -> dict[str, torch.Tensor]:
        """Text encoder's name -> (1, L)."""
        ids = {"text_encoder": self.input_ids}
        return ids if self.input_ids_2 is None else {**ids, "text_encoder_2": self.input_ids_2}

    def find(self, phrase: str) -> tuple[int, ...]:
        """Token positions of every occurrence of ``phrase`` (one word, or several in a row).

        Raises:
            ValueError: the prompt doesn't hold it; the message lists the words it does hold.
        """
        wanted = split_words(phrase, [w.text for w in self.words if w.text.startswith(("[", "<"))])
        texts = [word.text for word in self.words]
        found: list[int] = []
        for i in range(len(texts) - len(wanted) + 1):
            if wanted and texts[i : i + len(wanted)] == wanted:
                found += [t for word in self.words[i : i + len(wanted)] for t in word.tokens]
        if not found:
            raise ValueError(
                f"{phrase!r} is not in the prompt {self.text!r}; its words are: {', '.join(texts) or '(none)'}."
            )
        return tuple(found)


def _word_spans(prompt: str, learned: list[str]) -> list[tuple[str, int, int]]:
    """(word, start, end) of each word; learned tokens are whole words, punctuation marks are words of their own."""
    names = "|".join(re.escape(name) for name in sorted(learned, key=len, reverse=True))
    pattern = (f"(?P<learned>{names})|" if names else "") + r"\w+(?:['\u2019-]\w+)*|[^\w\s]"
    spans = []
    for match in re.finditer(pattern, prompt):
        text = match.group()
        is_learned = bool(names) and match.group("learned") is not None
        spans.append((text if is_learned else text.lower(), match.start(), match.end()))
    return spans


def split_words(prompt: str, learned: list[str] | tuple[str, ...] = ()) -> list[str]:
    """The words of ``prompt``, lower case; names in ``learned`` (such as ``"[I]"``) stay whole and as they are."""
    return [text for text, _, _ in _word_spans(prompt, list(learned))]


def learned_tokens(tokenizer: Any) -> list[str]:
    """The names that were added to ``tokenizer``'s own vocabulary, special tokens aside."""
    return [name for name in tokenizer.get_added_vocab() if name not in tokenizer.all_special_tokens]


def tokenize(tokenizer: Any, prompt: str) -> TokenizedPrompt:
    """Tokenize ``prompt`` and find its words' token positions.

    Raises:
        TypeError: ``prompt`` is no string.
        ValueError: it is longer than the text encoder reads; the message names what would be cut off.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"A prompt must be a string, not {type(prompt).__name__}.")
    limit = tokenizer.model_max_length
    encoded = tokenizer(prompt, return_offsets_mapping=True, add_special_tokens=True)
    ids, offsets = encoded.input_ids, encoded.offset_mapping
    if len(ids) > limit:
        first_lost = offsets[limit - 1][0]
        raise ValueError(
            f"The prompt has {len(ids)} tokens and the text encoder reads {limit} (start and end included). "
            f"Shorten it: what follows {prompt[:first_lost].rstrip()[-40:]!r} would be cut off."
        )
    special = set(tokenizer.all_special_ids)
    spans = _word_spans(prompt, learned_tokens(tokenizer))
    words = []
    for text, start, end in spans:
        tokens = tuple(
            i for i, (a, b) in enumerate(offsets) if ids[i] not in special and a < end and b > start and b > a
        )
        if tokens:
            words.append(Word(text, tokens))
    padding = [tokenizer.pad_token_id] * (limit - len(ids))
    return TokenizedPrompt(prompt, torch.tensor([ids + padding]), tuple(words), len(ids) - 1)


def insert_token(prompt: str, subject: str, token: str) -> str:
    """``prompt`` with ``token`` put before each occurrence of ``subject`` (P to P~, "a photo of a [I] lady").

    A prompt that holds the token already comes back as it is.

    Raises:
        ValueError: ``subject`` is empty or isn't a word (or words in a row) of the prompt.
    """
    words = _word_spans(prompt, [token])
    if any(text == token for text, _, _ in words):
        return prompt
    wanted = split_words(subject)
    starts = [
        words[i][1]
        for i in range(len(words) - len(wanted) + 1)
        if wanted and [text for text, _, _ in words[i : i + len(wanted)]] == wanted
    ]
    if not starts:
        raise ValueError(
            f"subject={subject!r} is not in the prompt {prompt!r}; choose the noun that names who or what is "
            f"to be kept, one of: {', '.join(text for text, _, _ in words) or '(the prompt is empty)'}."
        )
    for start in reversed(starts):
        prompt = f"{prompt[:start]}{token} {prompt[start:]}"
    return prompt


@dataclass(frozen=True)
class PromptAlignment:
    """How a target prompt's tokens take over the source prompt's attention.

    The edited attention is ``A_source @ mapping`` where ``share`` is 1 and the target's own where
    it is 0 (prompt-to-prompt, section 3.2: replacement and refinement in one).

    Attributes:
        mapping: (L_source, L_target), each column the source tokens whose maps a target token takes.
        share: (L_target,) of 0 and 1.
        changed_source: token positions of source words that the target lacks.
        changed_target: token positions of target words that the source lacks.
    """

    mapping: torch.Tensor
    share: torch.Tensor
    changed_source: tuple[int, ...]
    changed_target: tuple[int, ...]


def align_prompts(source: TokenizedPrompt, target: TokenizedPrompt, edit: str = "auto") -> PromptAlignment:
    """Align two prompts word by word.

    Words in both correspond. Words exchanged one for one ("smiling" for "sad") also do under
    ``edit="replace"``, the new word then starts from the old one's map; under ``"refine"`` new words
    keep their own maps. ``"auto"`` replaces when nothing was added or taken away, and refines otherwise.

    Raises:
        ValueError: unknown ``edit``, or ``"replace"`` for prompts that don't have equally many words.
    """
    if edit not in ("auto", "replace", "refine"):
        raise ValueError(f"edit={edit!r} is unknown; choose 'auto', 'replace' or 'refine'.")
    a, b = [w.text for w in source.words], [w.text for w in target.words]
    blocks = difflib.SequenceMatcher(a=a, b=b, autojunk=False).get_opcodes()
    one_for_one = all(tag in ("equal", "replace") and i2 - i1 == j2 - j1 for tag, i1, i2, j1, j2 in blocks)
    if edit == "replace" and not one_for_one:
        raise ValueError(
            f"edit='replace' exchanges words one for one, but {source.text!r} and {target.text!r} differ by added "
            "or removed words; use edit='refine' or leave it to 'auto'."
        )
    replacing = edit == "replace" or (edit == "auto" and one_for_one)

    length = source.input_ids.shape[1]
    mapping = torch.zeros(length, target.input_ids.shape[1])
    share = torch.zeros(target.input_ids.shape[1])

    def tie(left: tuple[int, ...], right: tuple[int, ...]) -> None:
        if len(left) == len(right):
            for i, j in zip(left, right, strict=True):
                mapping[i, j] = 1.0
        else:  # a word's attention is shared out over the tokens of its counterpart
            mapping[torch.tensor(left)[:, None], torch.tensor(right)] = 1.0 / len(right)
        share[list(right)] = 1.0

    changed_source: list[int] = []
    changed_target: list[int] = []
    for tag, i1, i2, j1, j2 in blocks:
        if tag == "equal" or (tag == "replace" and replacing):
            for i, j in zip(range(i1, i2), range(j1, j2), strict=True):
                tie(source.words[i].tokens, target.words[j].tokens)
        if tag != "equal":
            changed_source += [t for word in source.words[i1:i2] for t in word.tokens]
            changed_target += [t for word in target.words[j1:j2] for t in word.tokens]
    # the start token, then the end token and the padding after it, by their distance from the end
    tie((0,), (0,))
    for j in range(target.eos, mapping.shape[1]):
        i = min(source.eos + j - target.eos, length - 1)
        tie((i,), (j,))
    return PromptAlignment(mapping, share, tuple(changed_source), tuple(changed_target))


_FUNCTION_WORDS = frozenset(
    (
        "a an the and or with without of in on at by to from for as is are has have his her its their this that "
        "some no not"
    ).split()
)


def content_words(prompt: TokenizedPrompt, tokens: set[int]) -> tuple[tuple[int, ...], ...]:
    """The words at the positions ``tokens``, a tuple of positions each, without those that name nothing to be seen
    ("a", "with", punctuation), unless there are no others."""
    chosen = [word for word in prompt.words if tokens.intersection(word.tokens)]
    telling = [w for w in chosen if w.text not in _FUNCTION_WORDS and any(c.isalnum() for c in w.text)]
    return tuple(word.tokens for word in telling or chosen)
