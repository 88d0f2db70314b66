"""How near two pictures are."""

from __future__ import annotations

import numpy as np
from PIL import Image

Picture = Image.Image | np.ndarray


def _as_array(picture: Picture, name: str) -> np.ndarray:
    """(H, W, C) float64 on the scale 0 to 255."""
    array = np.asarray(picture.convert("RGB") if isinstance(picture, Image.Image) else picture)
    if array.ndim not in (2, 3) or array.size == 0:
        raise ValueError(f"{name} must be a picture (H, W) or (H, W, C) with pixels, not of shape {array.shape}.")
    values = array.astype(np.float64)
    return values * 255 if np.issubdtype(array.dtype, np.floating) else values


def psnr(a: Picture, b: Picture, region: np.ndarray | None = None) -> float:
    """Peak signal-to-noise ratio in dB, in float64; infinite for equal pictures.

    Args:
        a, b: PIL pictures, or arrays (H, W, C): uint8, or floating point in [0, 1].
        region: (H, W) bool: only these pixels count.

    Raises:
        ValueError: shapes differ, or the region is empty.
    """
    first, second = _as_array(a, "a"), _as_array(b, "b")
    if first.shape != second.shape:
        raise ValueError(f"The pictures differ in shape: {first.shape} and {second.shape}; resize one of them.")
    error = (first - second) ** 2
    if region is not None:
        if region.shape != first.shape[:2]:
            raise ValueError(f"region is {region.shape} and the pictures {first.shape[:2]}.")
        if not region.any():
            raise ValueError("region is empty: there is no pixel to compare.")
        error = error[region.astype(bool)]
    mean = float(error.mean())
    return float("inf") if mean == 0 else float(10 * np.log10(255**2 / mean))


def ssim(a: Picture, b: Picture) -> float:
    """Structural similarity (Wang et al. 2004) as scikit-image computes it, in [-1, 1].

    Raises:
        ValueError: shapes differ.
        ImportError: scikit-image isn't there: pip install "s2edit-pipeline[evaluation]".
    """
    from skimage.metrics import structural_similarity

    first, second = _as_array(a, "a"), _as_array(b, "b")
    if first.shape != second.shape:
        raise ValueError(f"The pictures differ in shape: {first.shape} and {second.shape}; resize one of them.")
    return float(structural_similarity(first, second, channel_axis=-1 if first.ndim == 3 else None, data_range=255.0))
