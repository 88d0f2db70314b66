"""A prompt as its text encoders read it, and which of the denoiser's columns each word of it is.

A word may be any number of tokens, in the columns of several encoders. ``prompt_tokenizing`` makes the records; two
prompts' words are brought together in ``prompt_alignment``.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from .prompt_words import TextWord, find_phrase, missing_phrase, vector_names, words_of


@dataclass(frozen=True)
class Word:
    """A word of a prompt.

    Attributes:
        text: as words are compared (NFC, without case), or a learned token's own spelling.
        tokens: the denoiser's columns that it fills, in all segments.
        span: ``[start, end)`` in the prompt as it was written.
    """

    text: str
    tokens: tuple[int, ...]
    span: tuple[int, int] = (0, 0)


@dataclass(frozen=True, eq=False)
class Segment:
    """The columns that one text encoder gives, or several side by side (SDXL, SD3's two CLIPs).

    Attributes:
        name: the (first) encoder's.
        ids, masks: encoder's name -> (1, L) what it reads, and 1 where that isn't padding, 0 where it is.
        spans: what each column is of the prompt, ``[start, end)`` in its text; None of what is put around it: special
            tokens, a template, padding.
        start, eos: the columns ``[start, eos)`` of this segment are the prompt's; at ``eos`` is what follows it.
        kept: for each column the position in ``ids``: those that the denoiser isn't given are missing.
        offset: the segment's first column among the denoiser's.
        lost: the end of the prompt that was cut off, "" if it was read whole.
    """

    name: str
    ids: Mapping[str, torch.Tensor]
    masks: Mapping[str, torch.Tensor]
    spans: tuple[tuple[int, int] | None, ...]
    start: int
    eos: int
    kept: tuple[int, ...]
    offset: int = 0
    lost: str = ""

    @property
    def num_columns(self) -> int:
        return len(self.spans)

    @property
    def columns(self) -> range:
        """Among the denoiser's."""
        return range(self.offset, self.offset + self.num_columns)


@dataclass(frozen=True, eq=False)
class TokenizedPrompt:
    """A prompt as its text encoders see it.

    Attributes:
        text: as it was written.
        segments: their columns lie one after the other in the denoiser: one segment in a U-Net (SDXL's two encoders
            share it), CLIP and T5 in SD3.
        learned: names of learned tokens, whole words wherever they are.
        summaries: what encoders read that give a summary: those without columns (FLUX's CLIP), or others that read the
            prompt without learned tokens for it (SD3's CLIPs).
    """

    text: str
    segments: tuple[Segment, ...]
    learned: tuple[str, ...] = ()
    summaries: tuple[Segment, ...] = ()

    @property
    def ids(self) -> dict[str, torch.Tensor]:
        """Text encoder's name -> (1, L), what its columns are of, or its summary where it has none."""
        found: dict[str, torch.Tensor] = {}
        for segment in (*self.segments, *self.summaries):
            for name, ids in segment.ids.items():
                found.setdefault(name, ids)
        return found

    def read_by(self, name: str) -> Segment:
        """What the text encoder ``name`` reads: its segment, or its summary.

        Raises:
            ValueError: there is no such encoder.
        """
        for segment in (*self.segments, *self.summaries):
            if name in segment.ids:
                return segment
        raise ValueError(f"{name!r} is none of the prompt's text encoders: {', '.join(self.ids)}.")

    @property
    def input_ids(self) -> torch.Tensor:
        """(1, L) of the first encoder."""
        return next(iter(self.ids.values()))

    @property
    def input_ids_2(self) -> torch.Tensor | None:
        """(1, L) of ``text_encoder_2``: SDXL's has the first one's tokens, padded and numbered its own way."""
        return self.ids.get("text_encoder_2")

    @property
    def eos(self) -> int:
        """Where the prompt ends in the first segment."""
        return self.segments[0].eos

    @property
    def num_columns(self) -> int:
        """How many columns the denoiser reads."""
        return sum(segment.num_columns for segment in self.segments)

    @property
    def lost(self) -> str:
        """What no encoder reads of the prompt."""
        return min((segment.lost for segment in self.segments), key=len)

    @cached_property
    def _text_words(self) -> list[TextWord]:
        return words_of(self.text, self.learned)

    @cached_property
    def _owners(self) -> dict[int, tuple[int, ...]]:
        """Column -> the numbers of the words of ``text`` that it is part of; a column of blanks goes with the next
        word, or with the one before where the next is a learned token."""
        starts, ends = ([getattr(word, side) for word in self._text_words] for side in ("start", "end"))
        owners = {}
        for column, (start, end) in self._spans.items() if starts else ():
            over = range(bisect_right(ends, start), bisect_left(starts, end))
            owners[column] = tuple(over) or (self._beside(bisect_left(starts, start)),)
        return owners

    def _beside(self, after: int) -> int:
        """The number of the word that blanks before the word ``after`` go with."""
        words = self._text_words
        takes_it = after < len(words) and words[after].kind != "learned"
        return after if takes_it or after == 0 else after - 1

    @cached_property
    def words(self) -> tuple[Word, ...]:
        """In order; together they have every column of the prompt's, each once.

        Where tokens reach over several words of the text (Chinese characters, punctuation such as ``"),``) these are
        one word here. A mark that shares its tokens with letters has none of its own, and is no word here; nor is what
        was cut off.
        """
        texts = self._text_words
        members = [[i] for i in range(len(texts))]  # of each text word's group, one list for all of them
        columns: dict[int, list[int]] = {}
        for column, over in self._owners.items():
            named = [i for i in over if texts[i].kind != "mark"] or list(over)
            for i in range(named[0] + 1, named[-1] + 1):
                if members[i] is not members[named[0]]:
                    joined = sorted(members[named[0]] + members[i])
                    for j in joined:
                        members[j] = joined
            columns.setdefault(named[0], []).append(column)
        words = []
        for i, group in enumerate(members):
            its = sorted(column for j in group for column in columns.get(j, ()))
            if group[0] == i and its:
                words.append(Word(self._spelled(group), tuple(its), (texts[i].start, texts[group[-1]].end)))
        return tuple(self._with_all_vectors(words))

    def _spelled(self, members: Sequence[int]) -> str:
        text = ""
        for before, i in zip([None, *members], members, strict=False):
            apart = before is not None and self._text_words[before].end < self._text_words[i].start
            text += (" " if apart else "") + self._text_words[i].text
        return text

    def _with_all_vectors(self, words: Sequence[Word]) -> list[Word]:
        """A textual inversion of several vectors, "<cat> <cat>_1", is the one word "<cat>"."""
        joined: list[Word] = []
        count = 0
        for word in words:
            names = vector_names(joined[-1].text, self.learned) if joined and joined[-1].text in self.learned else []
            if count < len(names) - 1 and word.text == names[count + 1]:
                count += 1
                last = joined[-1]
                joined[-1] = Word(last.text, (*last.tokens, *word.tokens), (last.span[0], word.span[1]))
            else:
                joined.append(word)
                count = 0
        return joined

    def columns(self, phrase: str, segment: str | None = None) -> tuple[int, ...]:
        """The denoiser's columns of every occurrence of ``phrase`` (one word, or several in a row), in the order of
        the text and then of the segments.

        Args:
            segment: of this segment alone.

        Raises:
            ValueError: the prompt doesn't hold it; the message lists the words it does hold.
        """
        spans = find_phrase(self.text, phrase, self.learned)
        found: list[int] = []
        for start, end in spans:
            whole = {i for i, w in enumerate(self._text_words) if start <= w.start and w.end <= end}
            cut = {i for i, w in enumerate(self._text_words) if w.start < end < w.end}  # "man's" for "man"
            of_whole = [c for c, over in self._owners.items() if whole.intersection(over)]
            of_cut = [c for c, over in self._owners.items() if cut.intersection(over)]
            inside = [c for c in of_cut if self._spans[c][0] < end and start < self._spans[c][1]]
            found += sorted({*of_whole, *inside})
        chosen = [s for s in self.segments if segment in (None, s.name)]
        if not chosen:
            raise ValueError(f"The segment {segment!r} is none of {', '.join(s.name for s in self.segments)}.")
        if spans and not found:
            why = f"it was cut off, with {self.lost[:40]!r}" if self.lost else "the tokenizer leaves it out"
            raise ValueError(f"{phrase!r} is in the prompt {self.text[:80]!r} and has no token: {why}.")
        if not spans:
            raise ValueError(missing_phrase(phrase, self.text, self.learned))
        return tuple(c for c in dict.fromkeys(found) if any(c in s.columns for s in chosen))

    @cached_property
    def _spans(self) -> dict[int, tuple[int, int]]:
        """Column -> what it is of the text."""
        pairs = [pair for s in self.segments for pair in zip(s.columns, s.spans, strict=True)]
        return {column: span for column, span in pairs if span is not None}

    @property
    def word_columns(self) -> list[int]:
        """Those of all its words: no start, end, template or padding."""
        return [column for word in self.words for column in word.tokens]

    def says(self, token: str) -> bool:
        """Whether the learned ``token`` is one of the prompt's words."""
        return any(word.text == token for word in self.words)

    def find(self, phrase: str) -> tuple[int, ...]:
        """As :meth:`columns`, in all segments."""
        return self.columns(phrase)


# ---------------------------------------------------------------------------- several encoders


def side_by_side(prompts: Sequence[TokenizedPrompt]) -> TokenizedPrompt:
    """One prompt as several encoders read it that share the denoiser's columns, as SDXL's two do.

    Raises:
        ValueError: their tokenizers cut the prompt up differently, so that its words would be in different columns.
    """
    first = prompts[0]
    for other in prompts[1:]:
        for here, there in zip(first.segments, other.segments, strict=True):
            if (here.spans, here.start, here.eos) == (there.spans, there.start, there.eos):
                continue
            place = next((a for a, b in zip(here.spans, there.spans, strict=False) if a != b), None)
            where = "" if place is None else f" at {first.text[place[0] : place[1]]!r}"
            raise ValueError(
                f"The two tokenizers cut {first.text!r} into different tokens{where}. SDXL's have one vocabulary: load "
                "both from one model, and learned words into both (load_textual_inversion for each tokenizer)."
            )
    segments = []
    for row in zip(*(prompt.segments for prompt in prompts), strict=True):
        ids = {name: tensor for segment in row for name, tensor in segment.ids.items()}
        masks = {name: tensor for segment in row for name, tensor in segment.masks.items()}
        segments.append(replace(row[0], ids=ids, masks=masks))
    return replace(first, segments=tuple(segments), learned=_all_learned(prompts))


def one_after_another(prompts: Sequence[TokenizedPrompt]) -> TokenizedPrompt:
    """One prompt as several encoders read it whose columns follow each other in the denoiser, as SD3's CLIP and T5 do.

    Raises:
        ValueError: the prompts are different texts.
    """
    texts = list(dict.fromkeys(prompt.text for prompt in prompts))
    if len(texts) > 1:
        raise ValueError(f"The encoders' columns are of one prompt; these are {texts[0]!r} and {texts[1]!r}.")
    segments: list[Segment] = []
    for segment in (segment for prompt in prompts for segment in prompt.segments):
        offset = segments[-1].columns.stop if segments else 0
        segments.append(replace(segment, offset=offset))
    summaries = tuple(summary for prompt in prompts for summary in prompt.summaries)
    return TokenizedPrompt(prompts[0].text, tuple(segments), _all_learned(prompts), summaries)


def with_summary(prompt: TokenizedPrompt, summary: TokenizedPrompt) -> TokenizedPrompt:
    """``prompt`` with what an encoder reads of it that gives a summary and no columns, as FLUX's CLIP."""
    return replace(prompt, summaries=(*prompt.summaries, *summary.segments))


def _all_learned(prompts: Sequence[TokenizedPrompt]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for prompt in prompts for name in prompt.learned))
