"""The one place where attention is seen and changed.

:func:`attention_control` puts a processor in front of every attention layer for the length of a
context. Where a controller wants a layer, the probabilities are made explicitly, ``softmax(Q K^T / sqrt(d))``,
and pass through the controller; everywhere else the installed processor runs untouched.
Controllers: :class:`SpatialControl` (S2Edit's masked cross-attention), :class:`PromptToPrompt`
(Hertz et al. 2022), :class:`MapRecorder`; :class:`Controllers` chains them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

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


class AttentionController(Protocol):
    """What stands at the seam."""

    def wants(self, site: AttentionSite) -> bool:
        """Whether this layer's probabilities are needed now."""

    def __call__(self, probs: torch.Tensor, site: AttentionSite) -> torch.Tensor:
        """The probabilities to go on with, from ``probs`` (batch, heads, height * width, keys)."""


class Controllers:
    """Several controllers, one after the other."""

    def __init__(self, controllers: Sequence[AttentionController]) -> None:
        self.controllers = tuple(controllers)

    def wants(self, site: AttentionSite) -> bool:
        return any(c.wants(site) for c in self.controllers)

    def __call__(self, probs: torch.Tensor, site: AttentionSite) -> torch.Tensor:
        for controller in self.controllers:
            if controller.wants(site):
                probs = controller(probs, site)
        return probs


class ControlledAttnProcessor:
    """diffusers' attention with the controller between softmax and values; defers to ``installed`` elsewhere."""

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
        if not height or not self.controller.wants(site):
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

        probs = _probabilities(attn, hidden_states, context, attention_mask)
        probs = self.controller(probs, site)  # the seam
        hidden_states = (probs @ _split_heads(attn, attn.to_v(context))).transpose(1, 2).flatten(2)

        hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
        if is_picture:
            hidden_states = hidden_states.transpose(1, 2).unflatten(2, (height, width))
            assert hidden_states.shape[1] == channels
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor


def _split_heads(attn: Any, x: torch.Tensor) -> torch.Tensor:
    """(batch, length, channels) to (batch, heads, length, channels of a head)."""
    return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def _probabilities(
    attn: Any, hidden_states: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """(batch, heads, queries, keys): ``softmax(Q K^T / sqrt(d))``, the softmax in float32.

    Scores and probabilities are the largest tensors that an edit makes. So what led to them is let go as soon as it
    has served, before a controller makes its own copy of them.
    """
    query, key = _split_heads(attn, attn.to_q(hidden_states)), _split_heads(attn, attn.to_k(context))
    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    scores = (query * attn.scale) @ key.transpose(-1, -2)
    del query, key
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1, dtype=torch.float32).to(hidden_states.dtype)


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


class SpatialControl:
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

    def wants(self, site: AttentionSite) -> bool:
        return site.is_cross and any(self.columns)

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

    def __call__(self, probs: torch.Tensor, site: AttentionSite) -> torch.Tensor:
        gated = probs * self._gate(site, probs.shape[-1], probs.device).to(probs.dtype)
        rows = [row for row, tokens in enumerate(self.columns) if self.renormalize & tokens.keys()]
        if rows:
            scaled = gated[rows] / gated[rows].sum(-1, keepdim=True).clamp(min=1e-6)
            gated = gated.index_copy(0, torch.tensor(rows, device=gated.device), scaled)
        return gated


class PromptToPrompt:
    """Prompt-to-prompt (Hertz et al. 2022): the target rows take over attention of the source row.

    Cross-attention (section 3.2), in the first part of the steps: ``A_target <- share * (A_source @ mapping)
    + (1 - share) * A_target``. Self-attention: ``A_target <- A_source`` in the first part of the steps, in layers of
    at most ``max_self_queries`` queries.

    Args:
        source_row: batch row of the source prompt.
        target_rows: batch rows of the targets' conditional branches.
        alignments: one for each target row.
        cross_until: (L,) for each target row: the step up to which each token's map is taken over.
        self_until: the step up to which self-attention is.
    """

    def __init__(
        self,
        source_row: int,
        target_rows: Sequence[int],
        alignments: Sequence[PromptAlignment],
        cross_until: Sequence[torch.Tensor],
        self_until: int,
        max_self_queries: int,
    ) -> None:
        self.source_row, self.target_rows = source_row, tuple(target_rows)
        self.alignments, self.cross_until, self.self_until = tuple(alignments), tuple(cross_until), self_until
        self.max_self_queries = max_self_queries
        self.step = 0
        self._last_cross = max((float(until.max()) for until in self.cross_until), default=0.0)

    def wants(self, site: AttentionSite) -> bool:
        if site.is_cross:
            return self.step < self._last_cross
        return self.step < self.self_until and site.height * site.width <= self.max_self_queries

    def __call__(self, probs: torch.Tensor, site: AttentionSite) -> torch.Tensor:
        source = probs[self.source_row]
        edited = list(probs.unbind(0))
        for i, row in enumerate(self.target_rows):
            if not site.is_cross:
                edited[row] = source
                continue
            alignment = self.alignments[i]
            share = (alignment.share * (self.step < self.cross_until[i])).to(probs)
            edited[row] = share * (source @ alignment.mapping.to(probs)) + (1 - share) * probs[row]
        return torch.stack(edited)


class Reweighting:
    """Prompt-to-prompt's attention re-weighting (Hertz et al. 2022, section 3.2): ``A <- A * weights``.

    Args:
        rows: batch rows.
        weights: (L,) for each of them, or None.
    """

    def __init__(self, rows: Sequence[int], weights: Sequence[torch.Tensor | None]) -> None:
        self.weights = {row: w for row, w in zip(rows, weights, strict=True) if w is not None}

    def wants(self, site: AttentionSite) -> bool:
        return site.is_cross and bool(self.weights)

    def __call__(self, probs: torch.Tensor, site: AttentionSite) -> torch.Tensor:
        changed = list(probs.unbind(0))
        for row, weights in self.weights.items():
            changed[row] = changed[row] * weights.to(probs)
        return torch.stack(changed)


class MapRecorder:
    """Sums cross-attention maps, averaged over heads, of the layers of ``min_queries`` to ``max_queries`` queries.

    ``maps[(height, width)]`` is (batch, height * width, keys), the mean over the layers and calls so far.
    """

    def __init__(self, max_queries: int, min_queries: int = 1) -> None:
        self.max_queries, self.min_queries = max_queries, min_queries
        self._sums: dict[tuple[int, int], torch.Tensor] = {}
        self._counts: dict[tuple[int, int], int] = {}

    def wants(self, site: AttentionSite) -> bool:
        return site.is_cross and self.min_queries <= site.height * site.width <= self.max_queries

    def __call__(self, probs: torch.Tensor, site: AttentionSite) -> torch.Tensor:
        size, seen = (site.height, site.width), probs.detach().float().mean(1)
        self._sums[size] = self._sums[size] + seen if size in self._sums else seen
        self._counts[size] = self._counts.get(size, 0) + 1
        return probs

    @property
    def maps(self) -> dict[tuple[int, int], torch.Tensor]:
        return {size: total / self._counts[size] for size, total in self._sums.items()}

    def word_map(self, row: int, tokens: Sequence[int], height: int, width: int) -> torch.Tensor:
        """(height, width): the map of the word at positions ``tokens`` in batch row ``row``, averaged over sizes."""
        assert self._sums, "nothing recorded: no layer was of the right size"
        total = torch.zeros(height, width, device=next(iter(self._sums.values())).device)
        for (h, w), maps in self.maps.items():
            word = maps[row][:, list(tokens)].mean(-1).view(1, 1, h, w)
            total += F.interpolate(word, (height, width), mode="bilinear", align_corners=False)[0, 0]
        return total / len(self._sums)
