"""The branches of an edit in one batch, and everything that is done to their attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from .attention_control import (
    AttentionController,
    Controllers,
    LayerAttention,
    MapRecorder,
    PromptToPrompt,
    Reweighting,
    SpatialControl,
)
from .source_attention import SourceAttention


@dataclass(frozen=True)
class BranchRows:
    """Which row of the U-Net's batch is what: the source's conditional branch, its unconditional one, the targets'
    unconditional ones, their conditional ones; each but the last only where a step has it."""

    num_targets: int
    source: bool
    source_unconditional: bool
    guided: bool

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
    def total(self) -> int:
        return self.conditional.stop


class EditControl(Controllers):
    """The spatial control, prompt-to-prompt, the recording of where words look and the re-weighting, in this order.

    The source is masked before its attention is taken over; the targets' own columns are masked with it, and a column
    that was taken over is 0 already wherever the mask is. Where a word looks is read before it is weighed.

    Args:
        spatial_control: for a batch of such rows.
        map_queries: the most and the fewest queries of the layers that tell where words look.
    """

    def __init__(
        self,
        spatial_control: Callable[[BranchRows], SpatialControl],
        prompt_to_prompt: PromptToPrompt,
        map_queries: tuple[int, int],
        reweighting: Reweighting,
        kept: SourceAttention | None = None,
    ) -> None:
        self._spatial_control = cache(spatial_control)
        self.prompt_to_prompt, self.reweighting = prompt_to_prompt, reweighting
        self.source_maps, self.target_maps = MapRecorder(*map_queries), MapRecorder(*map_queries)
        self.kept = SourceAttention() if kept is None else kept
        super().__init__(())

    def needs_source(self, step: int, level: int, *, maps: bool) -> bool:
        """Whether the source's branch has to be asked at ``step`` for its attention, or with ``maps`` for where its
        words look: what was kept serves as well."""
        taken_over = step < self.prompt_to_prompt.active_until and level not in self.kept.layers
        return taken_over or (maps and level not in self.kept.maps)

    def begin(self, step: int, level: int, rows: BranchRows) -> None:
        """Be told of the next batch."""
        source: int | LayerAttention = self.kept.layers.get(level, 0)
        self.prompt_to_prompt.begin(step, source, rows.conditional_rows)
        self.reweighting.rows = self.target_maps.rows = rows.conditional_rows
        if level in self.kept.maps:
            self.source_maps.add(self.kept.maps[level])
        self.source_maps.rows = range(rows.source and level not in self.kept.maps)
        recorders: list[AttentionController] = [self.source_maps, self.target_maps]
        self.controllers = (
            self._spatial_control(rows), self.prompt_to_prompt, *recorders, self.reweighting,
        )  # fmt: skip

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
