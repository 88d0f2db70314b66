"""Encoded prompts, and the branches of a batch that they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch.nn import functional as F

from .prompt_columns import TokenizedPrompt


@dataclass(frozen=True, eq=False)
class PromptEmbeds:
    """Encoded prompts.

    Attributes:
        embeds: (B, L, D), what the denoiser's attention to the text sees.
        pooled: (B, P), a summary of the whole prompt, where the model is told one.
        outputs: text encoder's name -> (B, L, D'), its own last output at the columns of its segment, which the
            semantic loss compares.
        mask: (B, L) of bool, the columns that there are, where prompts have as many as they need; None: all.
        guidance: (B,), how strongly the words pull, where the model is told; None: as it has learned them.
    """

    embeds: torch.Tensor
    pooled: torch.Tensor | None = None
    outputs: Mapping[str, torch.Tensor] = field(default_factory=dict)
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
        return PromptEmbeds(self.embeds[chosen], pooled, outputs, mask, guidance)

    def expand(self, count: int) -> PromptEmbeds:
        """Of a single prompt: ``count`` equal rows, without copies."""
        embeds, pooled, mask, guidance = (
            None if each is None else each.expand(count, *each.shape[1:])
            for each in (self.embeds, self.pooled, self.mask, self.guidance)
        )
        assert embeds is not None
        return PromptEmbeds(embeds, pooled, mask=mask, guidance=guidance)

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
        mask=torch.cat(masks) if has_mask else None,
        guidance=guidance,
    )


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
