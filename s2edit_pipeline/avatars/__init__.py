"""The embedded base models, and the world they were trained in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..pipeline import S2EditPipeline

MODEL_FOLDER = Path(__file__).parent / "weights"
"""The trained U-Net model: a standard diffusers folder, which ``StableDiffusionPipeline.from_pretrained`` loads too."""
FLOW_FOLDER = Path(__file__).parent / "flow_weights"
"""The trained flow transformer: what a ``StableDiffusion3Pipeline`` doesn't take from :data:`MODEL_FOLDER`."""


def load_avatars(family: str = "unet", **kwargs: Any) -> S2EditPipeline:
    """An embedded avatars model as a ready pipeline; no network is used.

    Args:
        family: "unet", as Stable Diffusion 1, or "flow", a small transformer as Stable Diffusion 3's.
        kwargs: for ``S2EditPipeline.from_pretrained``, such as ``dtype=torch.bfloat16``; float32 by default.

    Raises:
        ValueError: another family.
        FileNotFoundError: the flow transformer's weights are not there.
    """
    import torch

    from ..pipeline import S2EditPipeline

    kwargs.setdefault("dtype", kwargs.pop("torch_dtype", torch.float32))
    if family == "unet":
        return S2EditPipeline.from_pretrained(str(MODEL_FOLDER), **kwargs)
    if family != "flow":
        raise ValueError(f"family is 'unet' or 'flow', not {family!r}.")
    if not FLOW_FOLDER.exists():
        raise FileNotFoundError(
            f"{FLOW_FOLDER} is missing; train it (s2edit train-avatars --family flow --out RUN) and write it there: "
            f"recipe.export_flow(RUN, {str(FLOW_FOLDER)!r})."
        )
    from .flow_model import shared_parts

    return S2EditPipeline.from_pretrained(str(FLOW_FOLDER), **{**shared_parts(MODEL_FOLDER, kwargs["dtype"]), **kwargs})
