"""The embedded base model, and the world it was trained in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..pipeline import S2EditPipeline

MODEL_FOLDER = Path(__file__).parent / "weights"
"""The trained model: a standard diffusers folder, which ``StableDiffusionPipeline.from_pretrained`` loads too."""


def load_avatars(**kwargs: Any) -> S2EditPipeline:
    """The embedded avatars model as a ready pipeline; no network is used.

    Args:
        kwargs: for ``S2EditPipeline.from_pretrained``, such as ``dtype=torch.bfloat16``; float32 by default.
    """
    import torch

    from ..pipeline import S2EditPipeline

    kwargs.setdefault("dtype", kwargs.pop("torch_dtype", torch.float32))
    return S2EditPipeline.from_pretrained(str(MODEL_FOLDER), **kwargs)
