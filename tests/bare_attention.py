"""A layer that does nothing but attend."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class BareLayer(nn.Module):
    """Hands its inputs, (batch, heads, length, channels), to the kernel as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.processor: Any = BareProcessor()

    def set_processor(self, processor: Any) -> None:
        self.processor = processor

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        output: torch.Tensor = self.processor(self, hidden_states, **arguments)
        return output


class BareProcessor:
    def __call__(self, attn: nn.Module, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        return F.scaled_dot_product_attention(hidden_states, **arguments)
