"""What is done to attention: S2Edit's masks, prompt-to-prompt, re-weighting, and the recording of where words look.

Each class is a controller that stands at the seam (``attention_seam``); :class:`Controllers` chains them.
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

    Args:
        masks: token name or any key -> (H, W) mask in [0, 1], at any size.
        columns: for each batch row, the same keys -> positions of that token in the row's prompt.
        renormalize: give what was cut to the row's other tokens (ours; the paper leaves it out).
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
        self._gates: dict[tuple[int, int, int], torch.Tensor] = {}
        self._cuts: dict[tuple[int, int, int], Cuts] = {}

    def access_needed(self, site: AttentionSite) -> AttentionAccess:
        if site.kind != "cross" or not any(self.columns):
            return AttentionAccess.NONE
        return AttentionAccess.PROBABILITIES if self._renormalized_rows else AttentionAccess.INPUTS

    @property
    def _renormalized_rows(self) -> list[int]:
        return [row for row, tokens in enumerate(self.columns) if self.renormalize & tokens.keys()]

    def _gate(self, site: AttentionSite, keys: int, device: torch.device) -> torch.Tensor:
        """(batch, 1, queries, keys) of 0 and 1, made once for each size."""
        size = (site.height, site.width, keys)
        if size not in self._gates:
            gate = torch.ones(len(self.columns), 1, site.height * site.width, keys)
            for row, tokens in enumerate(self.columns):
                for name, positions in tokens.items():
                    cut = range(min(positions), keys) if name in self.mask_after and positions else positions
                    inside = mask_at(self.masks[name].cpu(), site.height, site.width).flatten()
                    for position in cut:
                        gate[row, 0, :, position] *= inside
            self._gates[size] = gate.to(device)
        return self._gates[size]

    def cuts(self, site: AttentionSite, keys: int, device: torch.device) -> Cuts:
        size = (site.height, site.width, keys)
        if size not in self._cuts:
            gate = self._gate(site, keys, device)[:, 0].transpose(0, 1)  # (queries, batch, keys)
            patterns, which = torch.unique(gate.flatten(1), dim=0, return_inverse=True)
            kept = patterns.view(len(patterns), len(self.columns), 1, keys, 1)
            queries = tuple(torch.nonzero(which == i)[:, 0] for i in range(len(patterns)))
            self._cuts[size] = Cuts(queries, tuple(kept), torch.cat(queries).argsort())
        return self._cuts[size]

    def __call__(self, probs: torch.Tensor, site: AttentionSite) -> torch.Tensor:
        gated = probs * self._gate(site, probs.shape[-1], probs.device).to(probs.dtype)
        rows = self._renormalized_rows
        if rows:
            scaled = gated[rows] / gated[rows].sum(-1, keepdim=True).clamp(min=1e-6)
            gated = gated.index_copy(0, torch.tensor(rows, device=gated.device), scaled)
        return gated


@dataclass(frozen=True)
class LayerAttention:
    """What one evaluation of one prompt attended to.

    Attributes:
        probabilities: cross-attention layer -> (heads, queries, keys), as the seam passed them on.
        queries_keys: self-attention layer -> two of (heads, queries, channels of a head).
    """

    probabilities: dict[str, torch.Tensor] = field(default_factory=dict)
    queries_keys: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        tensors = [*self.probabilities.values(), *(x for both in self.queries_keys.values() for x in both)]
        return sum(x.nbytes for x in tensors)


class PromptToPrompt(AttentionController):
    """Prompt-to-prompt (Hertz et al. 2022): the target rows take over the source's attention.

    Cross-attention (section 3.2), in the first part of the steps: ``A_target <- share * (A_source @ mapping)
    + (1 - share) * A_target``. Self-attention: ``A_target <- A_source`` in the first part of the steps, in layers
    that hold the layout: the targets take the source's queries and keys.

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
        takes = self.step < self.self_until and site.holds_layout
        return AttentionAccess.INPUTS if takes else AttentionAccess.NONE

    def exchange(
        self, query: torch.Tensor, key: torch.Tensor, site: AttentionSite
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if site.kind == "cross":
            return query, key
        assert self.source is not None
        rows = self.target_rows.to(query.device)
        query, key = (
            whole.index_copy(0, rows, one.to(whole).expand(len(rows), *one.shape))
            for whole, one in zip((query, key), self.source.queries_keys[site.name], strict=True)
        )
        return query, key

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

    Args:
        weights: (L,) for each target, or None; ``rows`` says which row of the batch each of them is.
    """

    def __init__(self, weights: Sequence[torch.Tensor | None], rows: Sequence[int] = ()) -> None:
        self.weights, self.rows = tuple(weights), rows

    def access_needed(self, site: AttentionSite) -> AttentionAccess:
        weighs = site.kind == "cross" and any(w is not None for w in self.weights)
        return AttentionAccess.PROBABILITIES if weighs else AttentionAccess.NONE

    def __call__(self, probs: torch.Tensor, site: AttentionSite) -> torch.Tensor:
        changed = list(probs.unbind(0))
        for row, weights in zip(self.rows, self.weights, strict=True):
            if weights is not None:
                changed[row] = changed[row] * weights.to(probs)
        return torch.stack(changed)


class MapRecorder(AttentionController):
    """Sums cross-attention maps, averaged over heads, of the layers that tell where words look.

    ``maps[(height, width)]`` is (rows, height * width, keys), the mean over the layers and calls so far.

    Args:
        rows: those of the batch to look at, in this order; None looks at all. It may be set anew for each batch, as
            many or none.
    """

    def __init__(self, rows: Sequence[int] | None = None) -> None:
        self.rows = rows
        self._sums: dict[tuple[int, int], torch.Tensor] = {}
        self._counts: dict[tuple[int, int], int] = {}

    def access_needed(self, site: AttentionSite) -> AttentionAccess:
        looks = site.kind == "cross" and site.tells_words and (self.rows is None or len(self.rows) > 0)
        return AttentionAccess.PROBABILITIES if looks else AttentionAccess.NONE

    def __call__(self, probs: torch.Tensor, site: AttentionSite) -> torch.Tensor:
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
