"""Encoded prompts, and the branches of a batch that they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch.nn import functional as F

from .prompt_columns import TokenizedPrompt


@dataclass(frozen=True)
class ShownPicture:
    """What IP-Adapters are to be shown, as it came: a picture (or a list, one for each adapter), or encoded pictures in
    its place; and where each counts."""

    image: Any = None
    embeds: Sequence[torch.Tensor] | None = None
    masks: Sequence[torch.Tensor] | None = None


@dataclass(frozen=True, eq=False)
class PicturePrompt:
    """Encoded pictures for an IP-Adapter, a row for each prompt.

    Attributes:
        embeds: for each adapter (B, n, ...), its n pictures.
        shown: for each row whether it is shown them; the others are as without the adapter.
        masks: for each adapter (1, n, h, w), where its pictures count; None for everywhere.
    """

    embeds: tuple[torch.Tensor, ...]
    shown: tuple[bool, ...]
    masks: tuple[torch.Tensor, ...] | None = None

    def expand(self, count: int) -> PicturePrompt:
        """Of a single row: ``count`` equal ones, without copies."""
        embeds = tuple(one.expand(count, *one.shape[1:]) for one in self.embeds)
        return PicturePrompt(embeds, self.shown * count, self.masks)


@dataclass(frozen=True, eq=False)
class PromptEmbeds:
    """Encoded prompts.

    Attributes:
        embeds: (B, L, D), what the denoiser's attention to the text sees.
        pooled: (B, P), a summary of the whole prompt, where the model is told one.
        outputs: text encoder's name -> (B, L, D'), its own last output at the columns of its segment, which the
            semantic loss compares.
        picture: what an IP-Adapter is shown beside the words, or None.
        mask: (B, L) of bool, the columns that there are, where prompts have as many as they need; None: all.
        guidance: (B,), how strongly the words pull, where the model is told; None: as it has learned them.
    """

    embeds: torch.Tensor
    pooled: torch.Tensor | None = None
    outputs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    picture: PicturePrompt | None = None
    mask: torch.Tensor | None = None
    guidance: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.embeds)

    def rows(self, chosen: slice) -> PromptEmbeds:
        """The prompts ``chosen``."""
        outputs = {name: output[chosen] for name, output in self.outputs.items()}
        pooled, mask, guidance = (
            None if each is None else each[chosen] for each in (self.pooled, self.mask, self.guidance)
        )
        return PromptEmbeds(self.embeds[chosen], pooled, outputs, mask=mask, guidance=guidance)

    def expand(self, count: int) -> PromptEmbeds:
        """Of a single prompt: ``count`` equal rows, without copies."""
        embeds, pooled, mask, guidance = (
            None if each is None else each.expand(count, *each.shape[1:])
            for each in (self.embeds, self.pooled, self.mask, self.guidance)
        )
        assert embeds is not None
        picture = None if self.picture is None else self.picture.expand(count)
        return PromptEmbeds(embeds, pooled, picture=picture, mask=mask, guidance=guidance)

    def with_embeds(self, embeds: torch.Tensor) -> PromptEmbeds:
        """The same summary beside other ``embeds``: null-text inversion optimises these alone."""
        return replace(self, embeds=embeds, outputs={})

    def told(self, scale: float) -> PromptEmbeds:
        """The same words, which pull as strongly as ``scale``."""
        return replace(self, guidance=torch.full((len(self),), scale, device=self.embeds.device))

    def zeros(self) -> PromptEmbeds:
        """What SDXL is told in place of an empty negative prompt."""
        pooled = None if self.pooled is None else torch.zeros_like(self.pooled)
        return PromptEmbeds(torch.zeros_like(self.embeds), pooled)


def join(parts: Sequence[PromptEmbeds]) -> PromptEmbeds:
    """All rows, in order; those of fewer columns than the longest have zeros there that the mask leaves out."""
    length = max(part.embeds.shape[1] for part in parts)
    has_mask = any(part.mask is not None or part.embeds.shape[1] < length for part in parts)
    padded = [F.pad(part.embeds, (0, 0, 0, length - part.embeds.shape[1])) for part in parts]
    masks = [
        F.pad(
            torch.ones_like(part.embeds[..., 0], dtype=torch.bool) if part.mask is None else part.mask,
            (0, length - part.embeds.shape[1]),
        )
        for part in parts
    ]
    pooled = [part.pooled for part in parts if part.pooled is not None]
    guidance = None
    if any(part.guidance is not None for part in parts):
        each = [part.told(1.0).guidance if part.guidance is None else part.guidance for part in parts]
        guidance = torch.cat([scale for scale in each if scale is not None])
    return PromptEmbeds(
        torch.cat(padded),
        torch.cat(pooled) if pooled else None,
        picture=_join_pictures(parts),
        mask=torch.cat(masks) if has_mask else None,
        guidance=guidance,
    )


def _join_pictures(parts: Sequence[PromptEmbeds]) -> PicturePrompt | None:
    first = next((part.picture for part in parts if part.picture is not None), None)
    if first is None:
        return None
    nothing = PicturePrompt(tuple(torch.zeros_like(one[:1]) for one in first.embeds), (False,))
    pictures = [part.picture or nothing.expand(len(part)) for part in parts]
    embeds = tuple(torch.cat(each) for each in zip(*(picture.embeds for picture in pictures), strict=True))
    return PicturePrompt(embeds, tuple(row for picture in pictures for row in picture.shown), first.masks)


@dataclass(frozen=True, eq=False)
class Branch:
    """One row of a denoiser's batch.

    Attributes:
        role: "source", "unconditional" or "target".
        embeds: one encoded prompt.
        prompt: its words, whose learned tokens are masked; None where there are none to mask.
    """

    role: str
    embeds: PromptEmbeds
    prompt: TokenizedPrompt | None = None

    def with_picture(self, picture: PicturePrompt | None) -> Branch:
        """Shown ``picture`` beside its words; None shows it none."""
        return replace(self, embeds=replace(self.embeds, picture=picture))

    def told(self, scale: float) -> Branch:
        """The same, its words pulling as strongly as ``scale``, in a model that is told."""
        return replace(self, embeds=self.embeds.told(scale))


@dataclass(frozen=True, eq=False)
class Batch:
    """The branches that are evaluated together. Everything that a row needs follows from this one list: its embeddings,
    its pooled vector, its masks, and its part in prompt-to-prompt."""

    branches: tuple[Branch, ...]

    @cached_property
    def embeds(self) -> PromptEmbeds:
        return join([branch.embeds for branch in self.branches])

    def rows(self, role: str) -> list[int]:
        """The rows of the branches of this role."""
        return [row for row, branch in enumerate(self.branches) if branch.role == role]

    def __len__(self) -> int:
        return len(self.branches)
