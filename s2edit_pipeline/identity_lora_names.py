"""LoRA weights as every release of diffusers reads them: their names and their metadata."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def is_lora(name: str) -> bool:
    """Whether ``name`` is of a LoRA's factor."""
    return name.endswith((".lora_A.weight", ".lora_B.weight"))


def published_name(component: str, name: str) -> str:
    """``component.name``, in a text encoder with the ``text_model`` between them that transformers 5 took out of
    ``CLIPTextModel``: older releases look for it, and newer ones put up with it."""
    inner = component.startswith("text_encoder") and not name.startswith(("text_model.", "text_projection."))
    return f"{component}.text_model.{name}" if inner else f"{component}.{name}"


def name_within(module: nn.Module, name: str) -> str:
    """The other way: what ``module`` itself calls its weight ``name``."""
    return name if hasattr(module, "text_model") else name.removeprefix("text_model.")


def pattern_name(layer: str) -> str:
    """What the metadata calls a text encoder's ``layer``: PEFT matches the ends of names, so without ``text_model`` it
    finds the layer in every release."""
    return layer.removeprefix("text_model.")


def lora_metadata(rank: int, targets: Iterable[str]) -> dict[str, Any]:
    """A component's LoRA configuration with ``alpha = rank``: no more of it than old releases know."""
    return {
        "r": rank, "lora_alpha": rank, "target_modules": sorted(targets), "rank_pattern": {}, "alpha_pattern": {},
        "lora_dropout": 0.0, "bias": "none", "use_dora": False, "use_rslora": False, "lora_bias": False,
    }  # fmt: skip
