"""Pictures that come as arrays and tensors: their shapes, their ranges, and what only looks like a picture."""

from __future__ import annotations

import numpy as np
import torch

from .picture_modes import check_size


def pixel_array(image: np.ndarray | torch.Tensor, name: str) -> np.ndarray:
    """(H, W), (H, W, 3) or (H, W, 4), uint8 or uint16, of what ``picture_files.read_picture`` takes.

    Raises:
        ValueError: no pixels, a shape, type or range that no picture has, latents.
    """
    if isinstance(image, torch.Tensor):
        return _plain_numbers(_channels_last(_to_numpy(image, name), name, first=True), name)
    return _plain_numbers(_channels_last(np.asarray(image), name, first=False), name)


def _to_numpy(tensor: torch.Tensor, name: str) -> np.ndarray:
    try:
        tensor = tensor.detach().cpu()
        return (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    except (NotImplementedError, RuntimeError, TypeError) as error:  # a meta tensor, a sparse or a quantised one
        raise ValueError(f"{name} is a tensor without plain numbers: {error}") from error


def _channels_last(array: np.ndarray, name: str, first: bool) -> np.ndarray:
    """(H, W) or (H, W, C) of any shape that a picture may have; ``first``: it is a tensor, whose channels come first
    where both could be meant, and which has a channel axis."""
    shape = array.shape
    if array.ndim == 4 and shape[0] == 1:
        array = array[0]
    if array.ndim == 3:
        axes = [axis for axis in ((0, 2) if first else (2, 0)) if array.shape[axis] in (1, 3, 4)]
        if axes:
            array = np.moveaxis(array, axes[0], -1)
            return array[..., 0] if array.shape[-1] == 1 else array
        if array.shape[0] > 4 and array.shape[0] % 16 == 0 and np.issubdtype(array.dtype, np.floating):
            raise ValueError(_latents_message(name, array, array.shape[0]))
    if array.ndim == 2 and not first:
        return array
    if first:
        raise ValueError(f"{name} as a tensor must be (3, H, W) or (1, 3, H, W), not {shape}.")
    raise ValueError(f"{name} as an array must be (H, W), (H, W, 3) or (H, W, 4), not {shape}.")


def _latents_message(name: str, array: np.ndarray, channels: int) -> str:
    return (
        f"{name} has {channels} channels that run from {float(array.min()):.3g} to {float(array.max()):.3g}: these "
        "look like latents, not like a picture. Pass the picture they were made from, or decode them first: "
        "pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample. If they are RGBA, pass them as uint8."
    )


def _plain_numbers(array: np.ndarray, name: str) -> np.ndarray:
    if array.size == 0:
        raise ValueError(f"{name} has no pixels: its shape is {array.shape}.")
    check_size(array.shape[1::-1], name)
    if np.issubdtype(array.dtype, np.floating):
        array = _from_unit_range(array, name)
    elif array.dtype == bool:
        array = array.astype(np.uint8) * 255
    elif array.dtype == np.uint16:
        if array.ndim == 3 and array.max() <= 255:  # 8 bits in a wide type
            array = array.astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ValueError(f"{name} has dtype {array.dtype}; expected uint8, uint16, or floating point in [0, 1].")
    return np.ascontiguousarray(array)


def _from_unit_range(array: np.ndarray, name: str) -> np.ndarray:
    low, high = float(array.min()), float(array.max())  # NaN where there is one
    in_range = low >= -1e-3 and high <= 1 + 1e-3
    if array.ndim == 3 and array.shape[-1] == 4:
        opacity = array[..., 3]
        if not in_range or float(np.mean((opacity == 0) | (opacity == 1))) < 0.5:
            raise ValueError(_latents_message(name, array, 4))
    if not in_range:
        raise ValueError(
            f"{name} is floating point and must lie in [0, 1]; it runs from {low:g} to {high:g}. "
            "Divide by 255, or for [-1, 1] use (image + 1) / 2."
        )
    return np.round(array.astype(np.float32).clip(0, 1) * np.float32(255)).astype(np.uint8)
