"""What is done to attention: S2Edit's masks, prompt-to-prompt, re-weighting, and the recording of where words look.

Each class is a controller that stands at the seam (``attention_seam``); :class:`Controllers` chains them.

Where picture and text attend to each other in separate layers, what is changed are the probabilities. In joint
attention, of thousands of keys, these are never made: queries, keys and values are exchanged and weighed, keys cut off.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from .attention_seam import AttentionAccess, AttentionController, AttentionSite, Cuts
from .prompt_alignment import PromptAlignment


class Controllers(AttentionController):
    """Several controllers, one after the other; at most one of them cuts."""

    def __init__(self, controllers: Sequence[AttentionController]) -> None:
        self.controllers = tuple(controllers)

    def access_needed(self, site: AttentionSite) -> AttentionAccess:
        return max((c.access_needed(site) for c in self.controllers), default=AttentionAccess.NONE)

    def exchange(
        self, query: torch.Tensor, key: torch.Tensor, site: AttentionSite
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for controller in self.controllers:
            if controller.access_needed(site):
                query, key = controller.exchange(query, key, site)
        return query, key

    def weigh(self, value: torch.Tensor, site: AttentionSite) -> torch.Tensor:
        for controller in self.controllers:
            if controller.access_needed(site):
                value = controller.weigh(value, site)
        return value

    def cuts(self, site: AttentionSite, keys: int, device: torch.device) -> Cuts | None:
        each = [c.cuts(site, keys, device) for c in self.controllers if c.access_needed(site)]
        cuts = [one for one in each if one is not None]
        assert len(cuts) <= 1
        return cuts[0] if cuts else None

    def __call__(self, probs: torch.Tensor, site: AttentionSite) -> torch.Tensor:
        for controller in self.controllers:
            if controller.access_needed(site):
                probs = controller(probs, site)
        return probs


def mask_at(mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(height, width) of 0 and 1: the cells of which ``mask`` (H, W) covers half or more, or else the one it
    covers most; never empty where ``mask`` isn't."""
    share = F.adaptive_avg_pool2d(mask[None, None].float(), (height, width))[0, 0]
    return (share >= share.max().clamp(max=0.5)).float() * (share > 0)


class SpatialControl(AttentionController):
    """``A*_[I] = A_[I] * M_obj`` (S2Edit): the token's cross-attention is cut to its object, in every layer.

    In joint attention, and in layers of the text alone, the other words are cut off from it too (ours): they would
    hand on to the whole picture what they read there. So nobody but itself and the object's own cells looks at it.

    Args:
        masks: token name or any key -> (H, W) mask in [0, 1], at any size.
        columns: for each batch row, the same keys -> positions of that token in the row's prompt.
        renormalize: give what was cut to all else that is looked at (ours; the paper leaves it out).
        mask_after: also cut, outside the object, the share of every position behind the token: the text
            encoder is causal, so these carry identity too (ours).

    Both switches hold for every token, or for the keys that they list.
    """

    def __init__(
        self,
        masks: Mapping[str, torch.Tensor],
        columns: Sequence[Mapping[str, tuple[int, ...]]],
        *,
        renormalize: bool | Collection[str] = False,
        mask_after: bool | Collection[str] = False,
    ) -> None:
        self.masks, self.columns = dict(masks), tuple(columns)
        self.renormalize, self.mask_after = (
            (frozenset(masks) if switch else frozenset()) if isinstance(switch, bool) else frozenset(switch)
            for switch in (renormalize, mask_after)
        )
        self._gates: dict[tuple[str, int, int, int], torch.Tensor] = {}
        self._cuts: dict[tuple[str, int, int, int], Cuts] = {}

    def access_needed(self, site: AttentionSite) -> AttentionAccess:
        cuts = site.kind != "self" and any(self.columns)
        return AttentionAccess.INPUTS if cuts else AttentionAccess.NONE

    @property
    def _renormalized_rows(self) -> list[int]:
        return [row for row, tokens in enumerate(self.columns) if self.renormalize & tokens.keys()]

    def _gate(self, site: AttentionSite, keys: int) -> tuple[list[int], torch.Tensor]:
        """The keys that anybody is cut off from, and (batch, queries, those keys) of 0 and 1."""
        text = range(keys)[site.text] if site.text is not None else range(keys)
        touched = [
            {c for name, positions in row.items() for c in self._cut_columns(name, positions, len(text), site)}
            for row in self.columns
        ]
        columns = sorted(set().union(*touched))
        cells = site.height * site.width
        asking = range(cells) if site.kind != "text" else _others(site, keys)
        gate = torch.ones(len(self.columns), len(asking), len(columns))
        for row, tokens in enumerate(self.columns):
            for name, positions in tokens.items():
                if site.kind == "text":  # of those who ask, the token itself alone
                    own = {text[column] for column in positions}
                    looks = torch.tensor([float(i in own) for i in asking])
                else:
                    looks = mask_at(self.masks[name].cpu(), site.height, site.width).flatten()
                for column in self._cut_columns(name, positions, len(text), site):
                    gate[row, :, columns.index(column)] *= looks
        return [text[column] for column in columns], gate

    def _cut_columns(self, name: str, positions: Sequence[int], length: int, site: AttentionSite) -> Sequence[int]:
        """The text's columns that the token's gate closes."""
        after = name in self.mask_after and positions and site.kind != "text"
        return range(min(positions), length) if after else positions

    def _whole_gate(self, site: AttentionSite, keys: int, device: torch.device) -> torch.Tensor:
        """(batch, 1, queries, keys) of 0 and 1, made once for each size."""
        size = (site.kind, site.height, site.width, keys)
        if size not in self._gates:
            cut, gate = self._gate(site, keys)
            whole = torch.ones(len(gate), 1, gate.shape[1], keys)
            whole[:, 0, :, cut] = gate
            self._gates[size] = whole.to(device)
        return self._gates[size]

    def cuts(self, site: AttentionSite, keys: int, device: torch.device) -> Cuts:
        size = (site.kind, site.height, site.width, keys)
        if size not in self._cuts:
            cut, gate = self._gate(site, keys)
            # queries that are cut off from the same keys in every row go together
            patterns, which = torch.unique(gate.transpose(0, 1).flatten(1), dim=0, return_inverse=True)
            kept = torch.ones(len(patterns), len(self.columns), keys)
            kept[:, :, cut] = patterns.view(len(patterns), len(self.columns), len(cut))
            queries = tuple(torch.nonzero(which == i)[:, 0].to(device) for i in range(len(patterns)))
            self._cuts[size] = Cuts(
                queries,
                tuple(one[:, None, :, None].to(device) for one in kept),
                tuple(self._allowed(one, device) for one in kept),
                torch.cat(queries).argsort(),
            )
        return self._cuts[size]

    def _allowed(self, kept: torch.Tensor, device: torch.device) -> torch.Tensor | None:
        """(batch, 1, 1, keys), from (batch, keys) of 0 and 1: the renormalised rows' softmax is over what is kept."""
        allowed = torch.ones_like(kept, dtype=torch.bool)
        rows = self._renormalized_rows
        allowed[rows] = kept[rows] > 0
        allowed |= ~allowed.any(-1, keepdim=True)  # who is cut off from everything sees nothing, and not NaN
        return None if bool(allowed.all()) else allowed[:, None, None].to(device)

    def __call__(self, probs: torch.Tensor, site: AttentionSite) -> torch.Tensor:
        gated = probs * self._whole_gate(site, probs.shape[-1], probs.device).to(probs.dtype)
        rows = self._renormalized_rows
        if rows:
            scaled = gated[rows] / gated[rows].sum(-1, keepdim=True).clamp(min=1e-6)
            gated = gated.index_copy(0, torch.tensor(rows, device=gated.device), scaled)
        return gated


def _others(site: AttentionSite, keys: int) -> list[int]:
    """Where among all who ask in joint attention, of ``keys``, those are that are no picture cells."""
    cells = range(0) if site.picture is None else range(keys)[site.picture]
    return [i for i in range(keys) if i not in cells]


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


class MapRecorder(AttentionController):
    """Sums cross-attention maps, averaged over heads, of the layers that tell where words look.

    ``maps[(height, width)]`` is (rows, height * width, text columns), the mean over the layers and calls so far. In
    joint attention a map is the softmax over the prompt's words alone: not over the picture, of which there are
    thousands of keys, nor over start, end and padding, where attention goes that has nowhere to go.

    Args:
        rows: those of the batch to look at, in this order; None looks at all. It may be set anew for each batch, as
            many or none.
        columns: for each of these rows the text columns of its words; they count in joint attention.
    """

    def __init__(self, rows: Sequence[int] | None = None, columns: Sequence[Sequence[int]] = ()) -> None:
        self.rows, self.columns = rows, columns
        self._sums: dict[tuple[int, int], torch.Tensor] = {}
        self._counts: dict[tuple[int, int], int] = {}

    def access_needed(self, site: AttentionSite) -> AttentionAccess:
        looks = site.kind in ("cross", "joint") and site.tells_words and (self.rows is None or len(self.rows) > 0)
        if not looks:
            return AttentionAccess.NONE
        return AttentionAccess.PROBABILITIES if site.kind == "cross" else AttentionAccess.INPUTS

    def exchange(
        self, query: torch.Tensor, key: torch.Tensor, site: AttentionSite
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if site.kind == "joint":
            rows = range(len(query)) if self.rows is None else self.rows
            looks = [
                _words_scores(query[row], key[row, :, site.text], columns)
                for row, columns in zip(rows, self.columns, strict=True)
            ]
            self._add((site.height, site.width), torch.stack(looks), 1)
        return query, key

    def __call__(self, probs: torch.Tensor, site: AttentionSite) -> torch.Tensor:
        if site.kind != "cross":
            return probs
        rows = probs.detach() if self.rows is None else probs.detach()[list(self.rows)]
        self._add((site.height, site.width), rows.float().mean(1), 1)
        return probs

    def _add(self, size: tuple[int, int], total: torch.Tensor, count: int) -> None:
        self._sums[size] = self._sums[size] + total if size in self._sums else total
        self._counts[size] = self._counts.get(size, 0) + count

    def add(self, other: MapRecorder) -> None:
        """Go on as if what ``other`` saw had come by here."""
        for size, total in other._sums.items():
            self._add(size, total, other._counts[size])

    @property
    def maps(self) -> dict[tuple[int, int], torch.Tensor]:
        return {size: total / self._counts[size] for size, total in self._sums.items()}

    def word_map(self, row: int, tokens: Sequence[int], height: int, width: int) -> torch.Tensor:
        """(height, width): the map of the word at positions ``tokens`` in the row at ``row``, averaged over sizes."""
        assert self._sums, "nothing recorded: no layer was of the right size"
        total = torch.zeros(height, width, device=next(iter(self._sums.values())).device)
        for (h, w), maps in self.maps.items():
            word = maps[row][:, list(tokens)].mean(-1).view(1, 1, h, w)
            total += F.interpolate(word, (height, width), mode="bilinear", align_corners=False)[0, 0]
        return total / len(self._sums)


@torch.no_grad()
def _words_scores(query: torch.Tensor, key: torch.Tensor, columns: Sequence[int]) -> torch.Tensor:
    """(cells, text columns), the mean over heads of ``softmax(q k^T / sqrt(d))`` over ``columns``, 0 elsewhere.

    Args:
        query, key: (heads, cells, d) and (heads, text columns, d); fewer heads of keys serve several of queries each.
    """
    words = key[:, list(columns)].repeat_interleave(len(query) // len(key), 0)
    scores = (query.float() * query.shape[-1] ** -0.5) @ words.float().mT
    looks = torch.zeros(query.shape[1], key.shape[1], device=query.device)
    looks[:, list(columns)] = scores.softmax(-1).mean(0)
    return looks
