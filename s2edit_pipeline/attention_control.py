"""The one place where attention is seen and changed.

:func:`attention_control` puts a processor in front of every attention layer for the length of a
context. Where a controller wants a layer's probabilities they are made explicitly, ``softmax(Q K^T / sqrt(d))``,
and pass through the controller; where it can do with queries, keys and values the fused kernel runs; everywhere else
the installed processor runs untouched.
Controllers: :class:`SpatialControl` (S2Edit's masked cross-attention), :class:`PromptToPrompt`
(Hertz et al. 2022), :class:`MapRecorder`; :class:`Controllers` chains them.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch.nn import functional as F

from .prompt_alignment import PromptAlignment


@dataclass(frozen=True)
class AttentionSite:
    """One attention layer at the size it has in this call: ``height`` x ``width`` queries."""

    name: str
    is_cross: bool
    height: int
    width: int


class Look(IntEnum):
    """How closely a controller looks at a layer; the closest of several decides."""

    AWAY = 0
    """The installed processor runs."""
    LAYER = 1
    """Queries, keys and values are enough: the fused kernel runs."""
    PROBABILITIES = 2
    """They are made explicitly."""


@dataclass(frozen=True)
class Cuts:
    """Which keys each query is cut off from.

    Attributes:
        queries: for each group of queries that are cut alike, their indices; every query is in one group.
        kept: for each group, (batch, 1, keys, 1) of 0 and 1.
        restore: (queries,), where in the groups, one after the other, each query is.
    """

    queries: tuple[torch.Tensor, ...]
    kept: tuple[torch.Tensor, ...]
    restore: torch.Tensor


class AttentionController:
    """What stands at the seam; as it is, it changes nothing."""

    def wants(self, site: AttentionSite) -> Look:
        """How closely this layer is looked at now."""
        return Look.AWAY

    def exchange(
        self, query: torch.Tensor, key: torch.Tensor, site: AttentionSite
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The queries and keys to go on with, from (batch, heads, length, channels of a head) each."""
        return query, key

    def cuts(self, site: AttentionSite, keys: int, device: torch.device) -> Cuts | None:
        """Where probabilities aren't made: which of them ``__call__`` would set to 0, if any."""
        return None

    def __call__(self, probs: torch.Tensor, site: AttentionSite) -> torch.Tensor:
        """The probabilities to go on with, from ``probs`` (batch, heads, height * width, keys)."""
        return probs


class Controllers(AttentionController):
    """Several controllers, one after the other; at most one of them cuts."""

    def __init__(self, controllers: Sequence[AttentionController]) -> None:
        self.controllers = tuple(controllers)

    def wants(self, site: AttentionSite) -> Look:
        return max((c.wants(site) for c in self.controllers), default=Look.AWAY)

    def exchange(
        self, query: torch.Tensor, key: torch.Tensor, site: AttentionSite
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for controller in self.controllers:
            if controller.wants(site):
                query, key = controller.exchange(query, key, site)
        return query, key

    def cuts(self, site: AttentionSite, keys: int, device: torch.device) -> Cuts | None:
        every = [c.cuts(site, keys, device) for c in self.controllers if c.wants(site)]
        some = [cuts for cuts in every if cuts is not None]
        assert len(some) <= 1
        return some[0] if some else None

    def __call__(self, probs: torch.Tensor, site: AttentionSite) -> torch.Tensor:
        for controller in self.controllers:
            if controller.wants(site):
                probs = controller(probs, site)
        return probs


class ControlledAttnProcessor:
    """diffusers' attention with the controller at its seam; defers to ``installed`` elsewhere."""

    def __init__(
        self, name: str, installed: Any, controller: AttentionController, sizes: Mapping[int, tuple[int, int]]
    ):
        self.name, self.installed, self.controller, self.sizes = name, installed, controller, sizes

    def __call__(  # type: ignore[no-untyped-def]
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, **kwargs
    ):
        is_cross = encoder_hidden_states is not None
        queries = hidden_states.shape[1:-1] if hidden_states.ndim == 3 else hidden_states.shape[2:]
        height, width = self.sizes.get(queries.numel(), (0, 0))
        site = AttentionSite(self.name, is_cross, height, width)
        look = self.controller.wants(site) if height else Look.AWAY
        if look is Look.AWAY:
            kwargs |= {} if temb is None else {"temb": temb}  # the sliced processor knows no such argument
            return self.installed(attn, hidden_states, encoder_hidden_states, attention_mask, **kwargs)

        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        is_picture = hidden_states.ndim == 4
        if is_picture:
            channels = hidden_states.shape[1]
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, context.shape[1], context.shape[0])
            attention_mask = attention_mask.view(context.shape[0], attn.heads, -1, attention_mask.shape[-1])
        if is_cross and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)

        attend = self._attend_explicitly if look is Look.PROBABILITIES else self._attend_fused
        hidden_states = attend(attn, hidden_states, context, attention_mask, site).transpose(1, 2).flatten(2)

        hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
        if is_picture:
            hidden_states = hidden_states.transpose(1, 2).unflatten(2, (height, width))
            assert hidden_states.shape[1] == channels
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor

    def _queries_and_keys(
        self, attn: Any, hidden_states: torch.Tensor, context: torch.Tensor, site: AttentionSite
    ) -> tuple[torch.Tensor, torch.Tensor]:
        query, key = _split_heads(attn, attn.to_q(hidden_states)), _split_heads(attn, attn.to_k(context))
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        return self.controller.exchange(query, key, site)

    def _attend_explicitly(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        context: torch.Tensor,
        mask: torch.Tensor | None,
        site: AttentionSite,
    ) -> torch.Tensor:
        """``controller(softmax(Q K^T / sqrt(d))) V``, the softmax in float32: (batch, heads, queries, channels).

        Scores and probabilities are the largest tensors that an edit makes. So what led to them is let go as soon as
        it has served, before a controller makes its own copy of them.
        """
        query, key = self._queries_and_keys(attn, hidden_states, context, site)
        if attn.upcast_attention:  # Stable Diffusion 2's scores overflow in float16
            query, key = query.float(), key.float()
        scores = (query * attn.scale) @ key.transpose(-1, -2)
        del query, key
        if mask is not None:
            scores = scores + mask
        probs = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(hidden_states.dtype)
        del scores
        probs = self.controller(probs, site)  # the seam
        return probs @ _split_heads(attn, attn.to_v(context))

    def _attend_fused(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        context: torch.Tensor,
        mask: torch.Tensor | None,
        site: AttentionSite,
    ) -> torch.Tensor:
        """The same without the probabilities. ``(A * gate) V`` is, for queries that are cut off from the same
        keys, ``A (kept * V)``: they look at values from which those keys' are missing."""
        query, key = self._queries_and_keys(attn, hidden_states, context, site)
        value = _split_heads(attn, attn.to_v(context))
        cuts = self.controller.cuts(site, key.shape[2], key.device)
        if cuts is None:
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=attn.scale)
        groups = []
        for queries, kept in zip(cuts.queries, cuts.kept, strict=True):
            own_mask = mask if mask is None or mask.shape[2] == 1 else mask[:, :, queries]
            groups.append(
                F.scaled_dot_product_attention(
                    query[:, :, queries], key, value * kept.to(value), attn_mask=own_mask, scale=attn.scale
                )
            )
        return torch.cat(groups, 2)[:, :, cuts.restore]


# diffusers asks what a processor takes at each of its calls; said once, the answer takes a quarter of the time
ControlledAttnProcessor.__call__.__signature__ = inspect.signature(ControlledAttnProcessor.__call__)  # type: ignore[attr-defined]


def _split_heads(attn: Any, x: torch.Tensor) -> torch.Tensor:
    """(batch, length, channels) to (batch, heads, length, channels of a head)."""
    return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


_PLAIN_PROCESSORS = {
    "AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor", "SlicedAttnProcessor", "ControlledAttnProcessor",
}  # fmt: skip


def layer_sizes(unet: Any, height: int, width: int) -> dict[int, tuple[int, int]]:
    """Number of queries -> (height, width) at each depth of ``unet`` for latents of ``height`` x ``width``."""
    sizes: dict[int, tuple[int, int]] = {}
    for _ in unet.config.block_out_channels:
        sizes.setdefault(height * width, (height, width))
        height, width = (height + 1) // 2, (width + 1) // 2
    return sizes


@contextmanager
def attention_control(unet: Any, controller: AttentionController, height: int, width: int) -> Iterator[None]:
    """Put ``controller`` at every attention layer of ``unet``; the processors found are put back at the end.

    Args:
        height, width: of the latents that will come.

    Raises:
        ValueError: a layer holds a processor whose arithmetic isn't plain attention (IP-Adapter, fused
            projections, added keys), so that its probabilities can't be taken over.
    """
    installed = dict(unet.attn_processors)
    for name, processor in installed.items():
        if type(processor).__name__ not in _PLAIN_PROCESSORS:
            raise ValueError(
                f"{name} holds {type(processor).__name__}, whose attention can't be edited. Take it out first: "
                "pipe.unload_ip_adapter(), pipe.unfuse_qkv_projections() or unet.set_default_attn_processor()."
            )
    sizes = layer_sizes(unet, height, width)
    unet.set_attn_processor(
        {name: ControlledAttnProcessor(name, held, controller, sizes) for name, held in installed.items()}
    )
    try:
        yield
    finally:
        unet.set_attn_processor(dict(installed))  # it empties the dict that it is given


# ------------------------------------------------------------------------------ controllers


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

    def wants(self, site: AttentionSite) -> Look:
        if not site.is_cross or not any(self.columns):
            return Look.AWAY
        return Look.PROBABILITIES if self._renormalized_rows else Look.LAYER

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
    + (1 - share) * A_target``. Self-attention: ``A_target <- A_source`` in the first part of the steps, in layers of
    at most ``max_self_queries`` queries: the targets take the source's queries and keys.

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
        max_self_queries: int,
    ) -> None:
        self.alignments, self.cross_until, self.self_until = tuple(alignments), tuple(cross_until), self_until
        self.max_self_queries = max_self_queries
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

    def wants(self, site: AttentionSite) -> Look:
        if site.is_cross:
            return Look.PROBABILITIES if self.step < self._last_cross else Look.AWAY
        takes = self.step < self.self_until and site.height * site.width <= self.max_self_queries
        return Look.LAYER if takes else Look.AWAY

    def exchange(
        self, query: torch.Tensor, key: torch.Tensor, site: AttentionSite
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if site.is_cross:
            return query, key
        assert self.source is not None
        rows = self.target_rows.to(query.device)
        query, key = (
            whole.index_copy(0, rows, one.to(whole).expand(len(rows), *one.shape))
            for whole, one in zip((query, key), self.source.queries_keys[site.name], strict=True)
        )
        return query, key

    def __call__(self, probs: torch.Tensor, site: AttentionSite) -> torch.Tensor:
        if not site.is_cross:
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

    def wants(self, site: AttentionSite) -> Look:
        weighs = site.is_cross and any(w is not None for w in self.weights)
        return Look.PROBABILITIES if weighs else Look.AWAY

    def __call__(self, probs: torch.Tensor, site: AttentionSite) -> torch.Tensor:
        changed = list(probs.unbind(0))
        for row, weights in zip(self.rows, self.weights, strict=True):
            if weights is not None:
                changed[row] = changed[row] * weights.to(probs)
        return torch.stack(changed)


class MapRecorder(AttentionController):
    """Sums cross-attention maps, averaged over heads, of the layers of ``min_queries`` to ``max_queries`` queries.

    ``maps[(height, width)]`` is (rows, height * width, keys), the mean over the layers and calls so far.

    Args:
        rows: those of the batch to look at, in this order; None looks at all. It may be set anew for each batch, as
            many or none.
    """

    def __init__(self, max_queries: int, min_queries: int = 1, rows: Sequence[int] | None = None) -> None:
        self.max_queries, self.min_queries, self.rows = max_queries, min_queries, rows
        self._sums: dict[tuple[int, int], torch.Tensor] = {}
        self._counts: dict[tuple[int, int], int] = {}

    def wants(self, site: AttentionSite) -> Look:
        looks = site.is_cross and self.min_queries <= site.height * site.width <= self.max_queries
        return Look.PROBABILITIES if looks and (self.rows is None or len(self.rows)) else Look.AWAY

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
