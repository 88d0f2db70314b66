"""S2Edit's spatial control, ``A*_[I] = A_[I] * M_obj``: the token's attention is masked to its object.

Where picture and text attend to each other in separate layers, the probabilities are masked. In joint attention, of
thousands of keys, these are never made: queries are cut off from keys.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch.nn import functional as F

from .attention_seam import AttentionAccess, AttentionController, AttentionSite, Cuts


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
