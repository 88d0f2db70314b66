"""The source's attention, kept while its picture is inverted, so that no edit has to ask for it again.

The evaluation that leads from noise level k up to k + 1 is the one that the source's branch of an edit makes at k on
the way back: the same latents, the same level, the same words (``inversion_ddim.ddim_trajectory``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from .argument_checks import check_share
from .attention_maps import MapRecorder
from .attention_prompt_to_prompt import LayerAttention
from .attention_seam import AttentionAccess, AttentionController, AttentionSite


@dataclass(frozen=True)
class KeepAttention:
    """How much of the source's attention an inversion keeps for the edits to come. What isn't kept, an edit asks
    for again, in a branch of its own.

    Attributes:
        share: of the steps, from the noise on: an edit takes attention over in the first
            ``max(cross_replace_steps, self_replace_steps)`` of them.
        max_bytes: the most that is kept; the levels nearest to the noise, where an edit begins, are kept longest.
            Where the words look, which is much smaller, comes on top. 0 keeps nothing.
        dtype: kept as, None the model's own; ``torch.float16`` halves a float32 model's.
        device: of the attention that is kept, None the model's own.
    """

    share: float = 0.4
    max_bytes: int = 2**30
    dtype: torch.dtype | None = None
    device: torch.device | str | None = None

    def __post_init__(self) -> None:
        check_share("KeepAttention: share", self.share)
        if not isinstance(self.max_bytes, int) or isinstance(self.max_bytes, bool) or self.max_bytes < 0:
            raise ValueError(f"KeepAttention: max_bytes must be a whole number of at least 0, not {self.max_bytes!r}.")
        if self.device is not None:
            try:
                torch.device(self.device)
            except RuntimeError as error:
                raise ValueError(f"KeepAttention: device={self.device!r} is none: {error}") from error
        if self.dtype is not None and not (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point):
            raise ValueError(f"KeepAttention: dtype must be a floating point type, not {self.dtype!r}.")


@dataclass(frozen=True)
class SourceAttention:
    """Noise level -> what the source's evaluation there attended to.

    Attributes:
        layers: for the levels that were to be kept, and found room.
        maps: for every level: where its words looked, averaged over heads and layers.
    """

    layers: Mapping[int, LayerAttention] = field(default_factory=dict)
    maps: Mapping[int, MapRecorder] = field(default_factory=dict)


class AttentionKeeper(AttentionController):
    """Keeps what passes the seam, for a batch's first row.

    Args:
        keep: how much.
        num_steps: of the inversion, the noisiest level.
        maps: whether anybody asks where words look.
        words: the text columns of the prompt's words.
    """

    def __init__(self, keep: KeepAttention, num_steps: int, *, maps: bool = True, words: Sequence[int] = ()) -> None:
        self.keep, self.num_steps, self.rows, self.words = keep, num_steps, [0] * maps, [words] * maps
        self.first_kept = num_steps - round(keep.share * num_steps) + 1
        self.level = 0
        self.layers: dict[int, LayerAttention] = {}
        self.maps: dict[int, MapRecorder] = {}

    def begin(self, level: int) -> None:
        """Be told of the next evaluation; one at the same level takes the place of an earlier one."""
        self._make_room()
        self.level = level
        self.maps[level] = MapRecorder(self.rows, self.words)
        self.layers.pop(level, None)
        if level >= self.first_kept:
            self.layers[level] = LayerAttention()

    def access_needed(self, site: AttentionSite) -> AttentionAccess:
        kept = self.level in self.layers
        if site.kind == "cross":
            return AttentionAccess.PROBABILITIES if kept else self.maps[self.level].access_needed(site)
        if site.kind == "joint":
            return AttentionAccess.INPUTS if kept else self.maps[self.level].access_needed(site)
        return AttentionAccess.INPUTS if kept and site.kind == "self" and site.holds_layout else AttentionAccess.NONE

    def exchange(
        self, query: torch.Tensor, key: torch.Tensor, site: AttentionSite
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if site.kind == "cross":
            return query, key
        recorder, layers = self.maps[self.level], self.layers.get(self.level)
        if recorder.access_needed(site):
            recorder.exchange(query, key, site)
        if layers is not None and site.holds_layout:
            picture = slice(None) if site.picture is None else site.picture
            layers.queries_keys[site.name] = (self._kept(query[0]), self._kept(key[0, :, picture]))
        if layers is not None and site.kind == "joint":
            layers.word_keys[site.name] = self._kept(key[0, :, site.text])
        return query, key

    def __call__(self, probs: torch.Tensor, site: AttentionSite) -> torch.Tensor:
        if site.kind == "cross":
            recorder = self.maps[self.level]
            if recorder.access_needed(site):
                recorder(probs, site)
            if self.level in self.layers:
                self.layers[self.level].probabilities[site.name] = self._kept(probs[0])
        return probs

    def _kept(self, x: torch.Tensor) -> torch.Tensor:
        # clone: a view would hold on to the whole batch
        return x.detach().to(device=self.keep.device, dtype=self.keep.dtype, copy=True)

    def _make_room(self) -> None:
        """Let the levels farthest from the noise go until the rest fits; they are all as large, so that those which
        would have to go in the end aren't kept to begin with."""
        if self.layers:
            room = self.keep.max_bytes // max(1, *(layers.num_bytes for layers in self.layers.values()))
            self.first_kept = max(self.first_kept, self.num_steps - room + 1)
        while self.layers and sum(layers.num_bytes for layers in self.layers.values()) > self.keep.max_bytes:
            del self.layers[min(self.layers)]

    def kept(self) -> SourceAttention:
        """What there is now."""
        self._make_room()
        return SourceAttention(dict(self.layers), dict(self.maps))
