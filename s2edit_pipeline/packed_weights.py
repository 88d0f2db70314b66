"""Weights that quantisation has packed: bitsandbytes', torchao's and GGUF's tensors, no numbers to compute with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


def is_packed(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` stands for numbers that it doesn't hold as such; float8, a type of its own, isn't packed."""
    return not tensor.is_floating_point() or hasattr(type(tensor), "__tensor_flatten__")


def kind_of(tensor: torch.Tensor) -> str:
    """What a packed tensor is called: its class ("Params4bit", "GGUFParameter"), or of a plain one its type."""
    plain = type(tensor) in (torch.Tensor, nn.Parameter)
    return str(tensor.dtype).removeprefix("torch.") if plain else type(tensor).__name__


def stored_parts(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Name -> the plain tensors that a packed one is stored in, "" for the only one.

    None of bitsandbytes' 4 bits: on a CPU it lays their bytes out anew at the first call.
    """
    if hasattr(tensor, "quant_state"):
        return {}
    if hasattr(type(tensor), "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        parts = {name: getattr(tensor, name) for name in names}
        return {f".{name}{inner}": part for name, one in parts.items() for inner, part in _parts_of(one).items()}
    return {"": tensor.detach().as_subclass(torch.Tensor)}


def _parts_of(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return stored_parts(tensor) if hasattr(type(tensor), "__tensor_flatten__") else {"": tensor}


def is_too_coarse(tensor: torch.Tensor) -> bool:
    """Whether a small difference can't be added to ``tensor``: it is packed, or of numbers of 8 bits."""
    return is_packed(tensor) or tensor.element_size() == 1


def check_fine(components: Mapping[str, nn.Module]) -> None:
    """Raises:
    ValueError: weights of ``components`` are too coarse to be trained themselves.
    """
    for name, module in components.items():
        for parameter in module.parameters():
            if is_too_coarse(parameter):
                raise ValueError(
                    f"method='full' trains all weights, and those of the {name} are quantised ({kind_of(parameter)}). "
                    "Take method='lora', which lays adapters over them; or load the model without quantisation and "
                    "layerwise casting."
                )
