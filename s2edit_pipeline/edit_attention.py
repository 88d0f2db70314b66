"""Everything that is done to the attention of an edit's branches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch

from .attention_chain import Controllers
from .attention_maps import MapRecorder
from .attention_prompt_to_prompt import PromptToPrompt, Reweighting
from .attention_source import AttentionKeeper, KeepAttention, SourceAttention
from .attention_spatial import SpatialControl
from .prompt_embeds import Batch


class EditControl(Controllers):
    """Everything that is done to the attention of an edit's branches.

    To the source's: the spatial control, then its attention is kept for the targets of the same step, in the same
    batch or the next. To the targets': the spatial control, prompt-to-prompt, the recording of where words look and
    the re-weighting, in this order. So the source is masked before its attention is taken over; the targets' own
    columns are masked with it, and a column that was taken over is 0 already wherever the mask is. Where a word looks
    is read before it is weighed.

    Args:
        spatial_control: makes a batch's.
        kept: what the inversion kept of the source's attention.
        maps: whether anybody asks where words look.
    """

    def __init__(
        self,
        spatial_control: Callable[[Batch], SpatialControl],
        prompt_to_prompt: PromptToPrompt,
        reweighting: Reweighting,
        kept: SourceAttention | None = None,
        *,
        maps: bool = True,
    ) -> None:
        super().__init__(())
        self._make_spatial_control = spatial_control
        self._spatial_controls: dict[tuple[int, ...], SpatialControl] = {}
        self.prompt_to_prompt, self.reweighting = prompt_to_prompt, reweighting
        self.source_maps, self.target_maps = MapRecorder(), MapRecorder()
        self.kept, self.maps = SourceAttention() if kept is None else kept, maps
        self._keeper: AttentionKeeper | None = None

    def needs_source(self, step: int, level: int, *, maps: bool) -> bool:
        """Whether the source has to be asked at ``step`` for its attention, or with ``maps`` for where its words look:
        what was kept serves as well."""
        taken_over = step < self.prompt_to_prompt.active_until and level not in self.kept.layers
        return taken_over or (maps and level not in self.kept.maps)

    def begin(self, step: int, level: int, batch: Batch) -> None:
        """Be told of the next batch: the targets', with the source among its branches or not, or a source's alone,
        whose attention the targets' batch that follows takes over."""
        spatial = self._spatial_control(batch)
        asks_source = [self._ask_source(step, level, _words(batch, row)) for row in batch.rows("source")]
        targets = batch.rows("target")
        if not targets:
            self.controllers = (spatial, *asks_source)
            return
        asked_before = None if self._keeper is None else self._keeper.layers.get(level)
        self.prompt_to_prompt.begin(step, self.kept.layers.get(level) or asked_before, targets)
        self.reweighting.rows = targets
        self.target_maps.rows = targets if self.maps else ()
        self.target_maps.columns = [_words(batch, row) for row in self.target_maps.rows]
        self.controllers = (spatial, *asks_source, self.prompt_to_prompt, self.target_maps, self.reweighting)

    def _spatial_control(self, batch: Batch) -> SpatialControl:
        """Its gates take a while to make: the same words have the same one."""
        key = tuple(id(branch.prompt) for branch in batch.branches)
        if key not in self._spatial_controls:
            self._spatial_controls[key] = self._make_spatial_control(batch)
        return self._spatial_controls[key]

    def forget_source(self) -> None:
        """Let the source's kept attention go."""
        self.kept = SourceAttention()

    def end(self, level: int) -> None:
        """Be told that the targets' batch was asked: where the source looked is noted, and its attention goes."""
        maps = self.kept.maps.get(level) or (None if self._keeper is None else self._keeper.maps[level])
        if maps is not None:
            self.source_maps.add(maps)
        self._keeper = self.prompt_to_prompt.source = None

    def _ask_source(self, step: int, level: int, words: Sequence[int]) -> AttentionKeeper:
        """What keeps the source's attention of the next batch."""
        share = 1.0 if step < self.prompt_to_prompt.active_until else 0.0
        keep = KeepAttention(share, max_bytes=sys.maxsize)
        self._keeper = AttentionKeeper(keep, level, maps=self.maps, words=words)
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


def _words(batch: Batch, row: int) -> list[int]:
    """The text columns of the words of a row of ``batch``."""
    prompt = batch.branches[row].prompt
    return [] if prompt is None else prompt.word_columns
