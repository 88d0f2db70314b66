"""Pictures and masks as people hand them in, made into what the pipeline works on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

MAX_ASPECT_RATIO = 4.0
"""Longer side over shorter side, at most: the models have seen nothing thinner."""


def load_picture(image: Any, name: str = "image") -> Image.Image:
    """``image`` as an upright 8-bit RGB picture.

    Args:
        image: a PIL picture of any mode; a path; an array (H, W), (H, W, 3) or (H, W, 4), uint8, uint16 or
            floating point in [0, 1]; or a tensor (3, H, W) or (1, 3, H, W), floating point in [0, 1] or uint8.
            Transparency is laid on white, 16 bits become 8, CMYK and palettes become RGB, and the camera's
            rotation (EXIF) is applied.

    Raises:
        TypeError: something else came.
        ValueError: no pixels, a shape or range that no picture has, an unreadable file.
    """
    image = _open(image, name)
    if _has_alpha(image):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info


def _open(image: Any, name: str) -> Image.Image:
    """``image`` as an upright 8-bit PIL picture of any mode; raises as :func:`load_picture`."""
    if isinstance(image, (str, os.PathLike)):
        path = Path(image)
        if not path.is_file():
            raise ValueError(f"{name}={str(image)!r} is not a file; give the path of a picture, or the picture itself.")
        try:
            with Image.open(path) as opened:
                opened.load()
                image = opened
        except Exception as error:
            raise ValueError(f"{name}={str(image)!r} can't be read as a picture: {error}") from error
    if isinstance(image, (list, tuple)):
        raise TypeError(f"{name} must be one picture, not {len(image)}; call once for each.")
    if isinstance(image, torch.Tensor):
        image = _tensor_to_array(image, name)
    if isinstance(image, np.ndarray):
        image = _array_to_picture(image, name)
    if not isinstance(image, Image.Image):
        raise TypeError(
            f"{name} must be a PIL picture, an array (H, W, 3), a tensor (3, H, W) or a path, "
            f"not {type(image).__name__}."
        )
    if image.width == 0 or image.height == 0:
        raise ValueError(f"{name} has no pixels: it is {image.width} x {image.height}.")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits and more a channel; PIL would clip, not scale
        values = np.asarray(image).astype(np.float64)
        image = Image.fromarray((values / 257 if values.max() > 255 else values).round().clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        image = _array_to_picture(np.asarray(image), name)
    return image


def _tensor_to_array(image: torch.Tensor, name: str) -> np.ndarray:
    if image.ndim == 4 and image.shape[0] == 1:
        image = image[0]
    if image.ndim != 3 or image.shape[0] not in (1, 3, 4):
        raise ValueError(f"{name} as a tensor must be (3, H, W) or (1, 3, H, W), not {tuple(image.shape)}.")
    array = image.detach().cpu().permute(1, 2, 0)
    return (array.float() if array.is_floating_point() else array).numpy()


def _array_to_picture(array: np.ndarray, name: str) -> Image.Image:
    if array.ndim == 4 and array.shape[0] == 1:
        array = array[0]
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ValueError(f"{name} as an array must be (H, W), (H, W, 3) or (H, W, 4), not {array.shape}.")
    if array.size == 0:
        raise ValueError(f"{name} has no pixels: its shape is {array.shape}.")
    if array.dtype == np.uint16:
        array = np.round(array / 257).astype(np.uint8)
    elif np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())  # NaN where there is one
        if not (low >= -1e-3 and high <= 1 + 1e-3):
            raise ValueError(
                f"{name} is floating point and must lie in [0, 1]; it runs from {low:g} to {high:g}. "
                "Divide by 255, or for [-1, 1] use (image + 1) / 2."
            )
        array = np.round(array.astype(np.float64).clip(0, 1) * 255).astype(np.uint8)
    elif array.dtype == bool:
        array = array.astype(np.uint8) * 255
    elif array.dtype != np.uint8:
        raise ValueError(f"{name} has dtype {array.dtype}; expected uint8, uint16, or floating point in [0, 1].")
    return Image.fromarray(np.ascontiguousarray(array))


def working_size(
    size: tuple[int, int], native: int, multiple: int, height: int | None = None, width: int | None = None
) -> tuple[int, int]:
    """The (height, width) at which a picture of ``size`` (width, height) is worked on.

    Asked-for sides are taken; otherwise the picture keeps its shape and gets the model's ``native`` area,
    each side a multiple of ``multiple``.

    Raises:
        ValueError: a side asked for isn't such a multiple, or the picture is too long and thin.
    """
    for name, side in (("height", height), ("width", width)):
        if side is not None and (not isinstance(side, int) or side <= 0 or side % multiple):
            raise ValueError(f"{name} must be a positive multiple of {multiple} for this model, not {side!r}.")
    picture_width, picture_height = size
    if height is not None and width is not None:
        return height, width
    ratio = picture_width / picture_height
    if max(ratio, 1 / ratio) > MAX_ASPECT_RATIO:
        raise ValueError(
            f"The picture is {picture_width} x {picture_height}; one side may be at most {MAX_ASPECT_RATIO:g} times "
            "the other. Crop it to what you want to edit (image.crop((left, top, right, bottom))), or pass height= "
            "and width= to have it resized."
        )
    if height is not None:
        return height, max(multiple, round(height * ratio / multiple) * multiple)
    if width is not None:
        return max(multiple, round(width / ratio / multiple) * multiple), width
    tall = native / ratio**0.5
    wide = native * ratio**0.5
    return max(multiple, round(tall / multiple) * multiple), max(multiple, round(wide / multiple) * multiple)


def picture_to_tensor(picture: Image.Image, height: int, width: int) -> torch.Tensor:
    """(1, 3, height, width) float32 in [-1, 1], resized if need be."""
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    array = np.asarray(picture).astype(np.float32)
    return torch.from_numpy(array).permute(2, 0, 1)[None] / 127.5 - 1.0


def load_mask(mask: Any, size: tuple[int, int] | None, name: str = "mask") -> torch.Tensor:
    """A mask of a picture of ``size`` (width, height) as (height, width) float32 in [0, 1]; white is inside. With None
    it keeps its own size.

    Args:
        mask: PIL picture, path, (H, W) array or tensor: bool, uint8, or floating point in [0, 1]. Its size may
            differ from the picture's as long as its shape (aspect ratio) is the same; it is resized then.
            What is transparent is outside; in a mask of a single colour, what is opaque is inside.

    Raises:
        TypeError, ValueError: as :func:`load_picture`; another shape than the picture's; nothing inside.
    """
    if isinstance(mask, torch.Tensor):
        mask = mask.detach().cpu()
        mask = (mask.float() if mask.is_floating_point() else mask).squeeze().numpy()
    if isinstance(mask, np.ndarray) and mask.ndim == 3 and mask.shape[0] == 1:
        mask = mask[0]
    if isinstance(mask, np.ndarray) and mask.dtype in (np.int64, np.int32):
        mask = mask.astype(bool) if mask.max(initial=0) <= 1 else mask.astype(np.uint8)
    if isinstance(mask, np.ndarray) and mask.dtype == np.uint8 and mask.max(initial=0) == 1:
        mask = mask.astype(bool)  # 0 and 1, the other usual way to write one
    picture = _open(mask, name)
    if _has_alpha(picture):
        picture = picture.convert("RGBA")
        *colors, alpha = picture.split()
        if all(low == high for low, high in (channel.getextrema() for channel in colors)):
            picture = alpha
        else:
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, (0, 0, 0, 255)), picture)
    picture = picture.convert("L")
    width, height = size = picture.size if size is None else size
    if abs(picture.width * height - picture.height * width) > 0.02 * picture.height * width:
        raise ValueError(
            f"{name} is {picture.width} x {picture.height} and the picture {width} x {height}: not the same shape. "
            f"Make it for this picture, or resize it yourself: {name}.resize({size})."
        )
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.BOX)
    values = torch.from_numpy(np.asarray(picture).astype(np.float32) / 255.0)
    if float(values.max()) < 0.5:
        raise ValueError(f"{name} has nothing inside: no value reaches half of white. White (1) marks the object.")
    return values
