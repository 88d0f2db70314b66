"""Encoded prompts, and the branches of a batch that they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from .prompt_columns import TokenizedPrompt


@dataclass(frozen=True, eq=False)
class PromptEmbeds:
    """Encoded prompts.

    Attributes:
        embeds: (B, L, D), what the denoiser's attention to the text sees.
        pooled: (B, P), a summary of the whole prompt, where the model is told one.
        outputs: text encoder's name -> (B, L, D'), its own last output at the columns of its segment, which the
            semantic loss compares.
    """

    embeds: torch.Tensor
    pooled: torch.Tensor | None = None
    outputs: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.embeds)

    def rows(self, chosen: slice) -> PromptEmbeds:
        """The prompts ``chosen``."""
        outputs = {name: output[chosen] for name, output in self.outputs.items()}
        return PromptEmbeds(self.embeds[chosen], None if self.pooled is None else self.pooled[chosen], outputs)

    def expand(self, count: int) -> PromptEmbeds:
        """Of a single prompt: ``count`` equal rows, without copies."""
        pooled = None if self.pooled is None else self.pooled.expand(count, -1)
        return PromptEmbeds(self.embeds.expand(count, -1, -1), pooled)

    def with_embeds(self, embeds: torch.Tensor) -> PromptEmbeds:
        """The same summary beside other ``embeds``: null-text inversion optimises these alone."""
        return PromptEmbeds(embeds, self.pooled)

    def zeros(self) -> PromptEmbeds:
        """What SDXL is told in place of an empty negative prompt."""
        pooled = None if self.pooled is None else torch.zeros_like(self.pooled)
        return PromptEmbeds(torch.zeros_like(self.embeds), pooled)


def join(parts: Sequence[PromptEmbeds]) -> PromptEmbeds:
    """All rows, in order."""
    pooled = [part.pooled for part in parts if part.pooled is not None]
    return PromptEmbeds(torch.cat([part.embeds for part in parts]), torch.cat(pooled) if pooled else None)


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
