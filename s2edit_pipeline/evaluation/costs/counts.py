"""U-Net evaluations and backward passes, counted: a cost that no busy machine can blur."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass
class UNetCounts:
    """What a U-Net was asked since counting began.

    Attributes:
        evaluations: rows of the batches that went through forward; one picture at one noise level is one.
        backward_evaluations: rows that went through backward.
    """

    evaluations: int = 0
    backward_evaluations: int = 0

    @property
    def cost(self) -> int:
        """In forward evaluations, a backward counted as 2."""
        return self.evaluations + 2 * self.backward_evaluations


@contextmanager
def count_unet(unet: nn.Module) -> Iterator[UNetCounts]:
    """Count what ``unet`` is asked within the context; nothing else about it changes.

    A backward is seen at the output, so one that the U-Net's own forward began is counted whether the gradient is
    wanted of its weights, its latents or its words.
    """
    counts = UNetCounts()

    def after_forward(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        sample = output[0] if isinstance(output, tuple) else output.sample
        counts.evaluations += len(sample)
        if sample.requires_grad:

            def after_backward(gradient: torch.Tensor) -> None:
                counts.backward_evaluations += len(gradient)

            sample.register_hook(after_backward)

    handle = unet.register_forward_hook(after_forward, with_kwargs=True)
    try:
        yield counts
    finally:
        handle.remove()
