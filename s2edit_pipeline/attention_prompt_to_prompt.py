"""Prompt-to-prompt (Hertz et al. 2022): the target takes over the source's attention, and words are re-weighted.

Where picture and text attend to each other in separate layers, the probabilities are changed. In joint attention, of
thousands of keys, these are never made: queries and keys are exchanged, values weighed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .attention_seam import AttentionAccess, AttentionController, AttentionSite
from .prompt_alignment import PromptAlignment


@dataclass(frozen=True)
class LayerAttention:
    """What one evaluation of one prompt attended to.

    Attributes:
        probabilities: cross-attention layer -> (heads, queries, keys), as the seam passed them on.
        queries_keys: self- or joint attention layer -> two of (heads, picture cells, channels of a head).
        word_keys: joint attention layer -> (heads, text columns, channels of a head).
    """

    probabilities: dict[str, torch.Tensor] = field(default_factory=dict)
    queries_keys: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    word_keys: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        both = [x for pair in self.queries_keys.values() for x in pair]
        return sum(x.nbytes for x in [*self.probabilities.values(), *both, *self.word_keys.values()])


class PromptToPrompt(AttentionController):
    """Prompt-to-prompt (Hertz et al. 2022): the target rows take over the source's attention.

    Cross-attention (section 3.2), in the first part of the steps: ``A_target <- share * (A_source @ mapping)
    + (1 - share) * A_target``. Self-attention: ``A_target <- A_source`` in the first part of the steps, in layers
    that hold the layout: the targets take the source's queries and keys.

    In joint attention the target's picture cells take the source's queries and keys ("qiki" of Shin et al. 2025), and
    look at the source's keys in place of those of the words that both prompts have: with these queries the source's own
    scores. New words have their own keys and compete with them in the softmax (ours).

    Args:
        alignments: one for each target.
        cross_until: (L,) for each target: the step up to which each token's map is taken over.
        self_until: the step up to which self-attention is.
    """

    def __init__(
        self,
        alignments: Sequence[PromptAlignment],
        cross_until: Sequence[torch.Tensor],
        self_until: int,
    ) -> None:
        self.alignments, self.cross_until, self.self_until = tuple(alignments), tuple(cross_until), self_until
        self._last_cross = max((float(until.max()) for until in self.cross_until), default=0.0)
        self._moved: dict[tuple[torch.device, torch.dtype], list[tuple[torch.Tensor, ...]]] = {}
        self.step, self.target_rows = 0, torch.arange(0)
        self.source: LayerAttention | None = None

    def begin(self, step: int, source: LayerAttention | None, target_rows: Sequence[int]) -> None:
        """Be told of the next batch: what the source's evaluation there attended to, None where nothing is taken over,
        and which rows are the targets' conditional branches."""
        self.step, self.source, self.target_rows = step, source, torch.tensor(list(target_rows))

    @property
    def active_until(self) -> int:
        """The step from which on nothing is taken over."""
        return round(max(self._last_cross, self.self_until)) if self.alignments else 0

    def access_needed(self, site: AttentionSite) -> AttentionAccess:
        if site.kind == "cross":
            return AttentionAccess.PROBABILITIES if self.step < self._last_cross else AttentionAccess.NONE
        takes = self._takes_layout(site) or (site.kind == "joint" and self.step < self._last_cross)
        return AttentionAccess.INPUTS if takes else AttentionAccess.NONE

    def _takes_layout(self, site: AttentionSite) -> bool:
        return self.step < self.self_until and site.holds_layout and (site.kind == "self" or site.picture is not None)

    def exchange(
        self, query: torch.Tensor, key: torch.Tensor, site: AttentionSite
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if site.kind == "cross":
            return query, key
        assert self.source is not None
        rows = self.target_rows.to(query.device)
        if self._takes_layout(site):
            source_query, source_key = self.source.queries_keys[site.name]
            if site.kind != "text":
                query = query.index_copy(0, rows, source_query.to(query).expand(len(rows), *source_query.shape))
            key = key.clone()
            key[rows, :, slice(None) if site.picture is None else site.picture] = source_key.to(key)
        if site.kind == "joint" and self.step < self._last_cross:
            key = self._with_sources_words(key, site)
        return query, key

    def _with_sources_words(self, key: torch.Tensor, site: AttentionSite) -> torch.Tensor:
        """``key`` with the source's in place of its words' that are taken over now; a word that takes several of the
        source's tokens takes their mean."""
        assert self.source is not None
        source, key = self.source.word_keys[site.name].to(key), key.clone()
        words = key[:, :, site.text]  # a view
        for (mapping, share, until), row in zip(self._tied(key), self.target_rows.tolist(), strict=True):
            length, count = mapping.shape
            means = (mapping / mapping.sum(0).clamp(min=1e-6)).mT @ source[:, :length]
            now = (share * (self.step < until))[:, None]
            words[row, :, :count] = now * means + (1 - now) * words[row, :, :count]
        return key

    def __call__(self, probs: torch.Tensor, site: AttentionSite) -> torch.Tensor:
        if site.kind != "cross":
            return probs
        assert self.source is not None
        source = self.source.probabilities[site.name].to(probs)
        edited = list(probs.unbind(0))
        for (mapping, share, until), row in zip(self._tied(probs), self.target_rows.tolist(), strict=True):
            now = share * (self.step < until)
            edited[row] = now * (source @ mapping) + (1 - now) * probs[row]
        return torch.stack(edited)

    def _tied(self, like: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
        """Each target's mapping, share and last step, brought to where they are used once."""
        where = (like.device, like.dtype)
        if where not in self._moved:
            self._moved[where] = [
                (alignment.mapping.to(like), alignment.share.to(like), until.to(like.device))
                for alignment, until in zip(self.alignments, self.cross_until, strict=True)
            ]
        return self._moved[where]


class Reweighting(AttentionController):
    """Prompt-to-prompt's attention re-weighting (Hertz et al. 2022, section 3.2): ``A <- A * weights``.

    In joint attention the words' values are weighed, as the picture's cells see them: ``(A * w) V = A (w V)``.

    Args:
        weights: (L,) for each target, or None; ``rows`` says which row of the batch each of them is.
    """

    def __init__(self, weights: Sequence[torch.Tensor | None], rows: Sequence[int] = ()) -> None:
        self.weights, self.rows = tuple(weights), rows

    def access_needed(self, site: AttentionSite) -> AttentionAccess:
        if site.kind not in ("cross", "joint") or not any(w is not None for w in self.weights):
            return AttentionAccess.NONE
        return AttentionAccess.PROBABILITIES if site.kind == "cross" else AttentionAccess.INPUTS

    def weigh(self, value: torch.Tensor, site: AttentionSite) -> torch.Tensor:
        if site.kind != "joint":
            return value
        value = value.clone()
        words = value[:, :, site.text]  # a view
        for row, weights in zip(self.rows, self.weights, strict=True):
            if weights is not None:
                words[row, :, : len(weights)] *= weights.to(value)[:, None]
        return value

    def __call__(self, probs: torch.Tensor, site: AttentionSite) -> torch.Tensor:
        if site.kind != "cross":
            return probs
        changed = list(probs.unbind(0))
        for row, weights in zip(self.rows, self.weights, strict=True):
            if weights is not None:
                changed[row] = changed[row] * weights.to(probs)
        return torch.stack(changed)
