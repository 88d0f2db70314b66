"""Where words look: cross-attention maps, or in joint attention their like, recorded at the seam."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from .attention_seam import AttentionAccess, AttentionController, AttentionSite


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
        before = self._sums.get(size)
        if before is not None:  # where prompts have as many columns as they need, batches differ by their longest
            width = max(before.shape[-1], total.shape[-1])
            before, total = (F.pad(maps, (0, width - maps.shape[-1])) for maps in (before, total))
        self._sums[size] = total if before is None else before + total
        self._counts[size] = self._counts.get(size, 0) + count

    def add(self, other: MapRecorder) -> None:
        """Go on as if what ``other`` saw had come by here."""
        for size, total in other._sums.items():
            self._add(size, total, other._counts[size])

    @property
    def maps(self) -> dict[tuple[int, int], torch.Tensor]:
        return {size: total / self._counts[size] for size, total in self._sums.items()}

    def word_map(self, row: int, tokens: Sequence[int], height: int, width: int) -> torch.Tensor:
        """(height, width): the map of the word at positions ``tokens`` in the row at ``row``, averaged over sizes.

        Raises:
            ValueError: no layer told where words look.
        """
        if not self._sums:
            raise ValueError(
                f"At {height} x {width} cells no layer of this model tells where words look. Work at a larger size, "
                "height= and width=, or say where: mask= for a fit, edit_mask= for an edit."
            )
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
