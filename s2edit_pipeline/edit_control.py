"""The branches of an edit in their batches, and everything that is done to their attention."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from .attention_control import Controllers, MapRecorder, PromptToPrompt, Reweighting, SpatialControl
from .source_attention import AttentionKeeper, KeepAttention, SourceAttention


@dataclass(frozen=True)
class BranchRows:
    """Which row of a U-Net's batch is what: the source's conditional branch and, where it isn't pinned to its
    trajectory, its unconditional one; then the targets' unconditional branches while they are guided, then their
    conditional ones."""

    source: bool = False
    source_unconditional: bool = False
    num_targets: int = 0
    guided: bool = False

    @property
    def unconditional(self) -> slice:
        first = self.source + self.source_unconditional
        return slice(first, first + self.num_targets * self.guided)

    @property
    def conditional(self) -> slice:
        first = self.unconditional.stop
        return slice(first, first + self.num_targets)

    @property
    def conditional_rows(self) -> range:
        return range(self.conditional.start, self.conditional.stop)

    @property
    def num_unconditional(self) -> int:
        return self.source_unconditional + self.num_targets * self.guided

    @property
    def total(self) -> int:
        return self.conditional.stop


class EditControl(Controllers):
    """Everything that is done to the attention of an edit's branches.

    To the source's: the spatial control, then its attention is kept for the targets of the same step, in the same
    batch or the next. To the targets': the spatial control, prompt-to-prompt, the recording of where words look and
    the re-weighting, in this order. So the source is masked before its attention is taken over; the targets' own
    columns are masked with it, and a column that was taken over is 0 already wherever the mask is. Where a word looks
    is read before it is weighed.

    Args:
        spatial_control: for a batch of such rows.
        map_queries: the most and the fewest queries of the layers that tell where words look.
        kept: what the inversion kept of the source's attention.
        maps: whether anybody asks where words look.
    """

    def __init__(
        self,
        spatial_control: Callable[[BranchRows], SpatialControl],
        prompt_to_prompt: PromptToPrompt,
        map_queries: tuple[int, int],
        reweighting: Reweighting,
        kept: SourceAttention | None = None,
        *,
        maps: bool = True,
    ) -> None:
        super().__init__(())
        self._spatial_control = cache(spatial_control)
        self.prompt_to_prompt, self.reweighting, self.map_queries = prompt_to_prompt, reweighting, map_queries
        self.source_maps, self.target_maps = MapRecorder(*map_queries), MapRecorder(*map_queries)
        self.kept, self.maps = SourceAttention() if kept is None else kept, maps
        self._keeper: AttentionKeeper | None = None

    def needs_source(self, step: int, level: int, *, maps: bool) -> bool:
        """Whether the source has to be asked at ``step`` for its attention, or with ``maps`` for where its words look:
        what was kept serves as well."""
        taken_over = step < self.prompt_to_prompt.active_until and level not in self.kept.layers
        return taken_over or (maps and level not in self.kept.maps)

    def begin_source(self, step: int, level: int, rows: BranchRows) -> None:
        """Be told that the next batch is the source's alone, for the targets' that follows."""
        self.controllers = (self._spatial_control(rows), self._ask_source(step, level))

    def begin(self, step: int, level: int, rows: BranchRows) -> None:
        """Be told that the next batch is the targets', with the source's row first if ``rows`` has it."""
        in_this_batch = [self._ask_source(step, level)] if rows.source else []
        own = None if self._keeper is None else self._keeper.layers.get(level)
        self.prompt_to_prompt.begin(step, self.kept.layers.get(level) or own, rows.conditional_rows)
        self.reweighting.rows = rows.conditional_rows
        self.target_maps.rows = rows.conditional_rows if self.maps else ()
        self.controllers = (
            self._spatial_control(rows), *in_this_batch, self.prompt_to_prompt, self.target_maps, self.reweighting,
        )  # fmt: skip

    def end(self, level: int) -> None:
        """Be told that the targets' batch was asked: where the source looked is noted, and its attention goes."""
        maps = self.kept.maps.get(level) or (None if self._keeper is None else self._keeper.maps[level])
        if maps is not None:
            self.source_maps.add(maps)
        self._keeper = self.prompt_to_prompt.source = None

    def _ask_source(self, step: int, level: int) -> AttentionKeeper:
        """What keeps the source's attention of the next batch."""
        share = 1.0 if step < self.prompt_to_prompt.active_until else 0.0
        keep = KeepAttention(share, max_bytes=sys.maxsize)
        self._keeper = AttentionKeeper(keep, level, self.map_queries, maps=self.maps)
        self._keeper.begin(level)
        return self._keeper

    def looks(
        self,
        target: int,
        source_tokens: Sequence[Sequence[int]],
        target_tokens: Sequence[Sequence[int]],
        size: torch.Size,
    ) -> list[torch.Tensor]:
        """Where words of the source and of one target have looked so far, a map (height, width) = ``size`` each."""
        maps = [self.source_maps.word_map(0, tokens, *size) for tokens in source_tokens]
        return maps + [self.target_maps.word_map(target, tokens, *size) for tokens in target_tokens]
