"""How near two pictures are, pixel by pixel: PSNR and SSIM."""

from __future__ import annotations

import numpy as np
from PIL import Image

Picture = Image.Image | np.ndarray


def _as_array(picture: Picture, name: str) -> np.ndarray:
    """(H, W, 3) float64 on the scale 0 to 255."""
    array = np.asarray(picture.convert("RGB") if isinstance(picture, Image.Image) else picture)
    if array.ndim != 3 or array.shape[2] != 3 or array.size == 0:
        raise ValueError(f"{name} must be a PIL picture or an array (H, W, 3), not of shape {array.shape}.")
    if array.dtype == np.uint8:
        return array.astype(np.float64)
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(
            f"{name} must be uint8 or floating point, not {array.dtype}; convert it with astype(np.uint8)."
        )
    low, high = array.min(), array.max()
    if not (low >= 0 and high <= 1):  # NaN fails too
        raise ValueError(
            f"{name} is floating point and must lie in [0, 1], not [{low:g}, {high:g}]; rescale or clip it."
        )
    return array.astype(np.float64) * 255


def _pair(a: Picture, b: Picture) -> tuple[np.ndarray, np.ndarray]:
    first, second = _as_array(a, "a"), _as_array(b, "b")
    if first.shape != second.shape:
        raise ValueError(f"The pictures differ in shape: {first.shape} and {second.shape}; resize one of them.")
    return first, second


def psnr(a: Picture, b: Picture, region: np.ndarray | None = None) -> float:
    """Peak signal-to-noise ratio in dB, in float64; infinite for equal pictures.

    Args:
        a, b: PIL pictures, or arrays (H, W, 3): uint8, or floating point in [0, 1].
        region: (H, W) bool: only these pixels count.

    Raises:
        ValueError: no such pictures, shapes that differ, or a region that isn't (H, W) bool or has no pixel.
    """
    first, second = _pair(a, b)
    error = (first - second) ** 2
    if region is not None:
        if region.shape != first.shape[:2] or region.dtype != np.bool_:
            raise ValueError(f"region must be {first.shape[:2]} bool, not {region.shape} {region.dtype}.")
        if not region.any():
            raise ValueError("region is empty: there is no pixel to compare.")
        error = error[region]
    mean = float(error.mean())
    return float("inf") if mean == 0 else float(10 * np.log10(255**2 / mean))


def ssim(a: Picture, b: Picture) -> float:
    """Structural similarity (Wang et al. 2004) as scikit-image computes it with its defaults, in [-1, 1].

    Args:
        a, b: PIL pictures, or arrays (H, W, 3): uint8, or floating point in [0, 1]; at least 7 pixels each way.

    Raises:
        ValueError: no such pictures, or shapes that differ.
        ImportError: scikit-image isn't there: ``pip install "s2edit-pipeline[evaluation]"``.
    """
    first, second = _pair(a, b)
    if min(first.shape[:2]) < 7:
        raise ValueError(
            f"ssim compares windows of 7 x 7 pixels; the pictures have {first.shape[0]} x {first.shape[1]}."
        )
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise ImportError('ssim needs scikit-image: pip install "s2edit-pipeline[evaluation]".') from error
    return float(structural_similarity(first, second, channel_axis=-1, data_range=255.0))
