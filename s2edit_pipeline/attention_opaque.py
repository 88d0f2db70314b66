"""A controlled attention layer in a compiled graph: one operator that ``torch.compile`` doesn't look into.

So blocks around it are compiled whole (``fullgraph=True``), once, whatever is done to the attention at which step. What
is differentiated isn't compiled.
"""

from __future__ import annotations

import hashlib
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch

Attend = Callable[..., torch.Tensor]

_NUMBERS = itertools.count()
_LAYERS: weakref.WeakValueDictionary[int, OpaqueLayer] = weakref.WeakValueDictionary()


class OpaqueLayer:
    """One layer for as long as it is controlled.

    Args:
        attend: ``attend(attn, hidden_states, text)``, the layer's work, run as it is.
        attn: the layer.
    """

    def __init__(self, attend: Attend, attn: Any) -> None:
        self.attend, self.attn = attend, attn
        number = next(_NUMBERS)
        self.number = torch.tensor(number)  # of a plain number a graph would be made anew, for each
        _LAYERS[number] = self

    def __call__(self, hidden_states: torch.Tensor, text: torch.Tensor | None) -> torch.Tensor:
        return _attend(hidden_states, text, self.number)


def _run(hidden_states: torch.Tensor, text: torch.Tensor | None, number: torch.Tensor) -> torch.Tensor:
    layer = _LAYERS[int(number)]
    return layer.attend(layer.attn, hidden_states, text).contiguous()


def _shape(hidden_states: torch.Tensor, text: torch.Tensor | None, number: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


# the package and diffusers' copy of it may be loaded side by side
_attend = torch.library.custom_op(
    f"s2edit::attend_{hashlib.sha256(__name__.encode()).hexdigest()[:12]}", _run, mutates_args=()
)
_attend.register_fake(_shape)
