"""Pictures and masks as people hand them in, made into what the pipeline works on."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from .picture_files import read_picture
from .picture_modes import has_alpha, rgb_of


def load_picture(image: Any, name: str = "image") -> Image.Image:
    """``image`` as an upright 8-bit RGB picture: :func:`picture_files.read_picture`, of which it is the ``rgb``.

    Args:
        image: a path; a file's bytes, ``BytesIO`` or open file; a PIL picture of any mode; an array or a tensor,
            channels last or first, uint8, uint16 or floating point in [0, 1]; a list of one of these.
            Transparency is laid on white, 16 bits become 8, CMYK and palettes become RGB, and the camera's
            rotation (EXIF) is applied.

    Raises:
        TypeError: something else came.
        ValueError: no pixels or too many, a shape or range that no picture has, latents, an unreadable file, a URL.
    """
    return read_picture(image, name).rgb


def picture_to_tensor(picture: Image.Image) -> torch.Tensor:
    """(1, 3, H, W) float32 in [-1, 1] of an RGB picture."""
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
    picture = read_picture(mask, name).native
    if has_alpha(picture):
        picture = picture.convert("RGBA")
        *colors, alpha = picture.split()
        if all(low == high for low, high in (channel.getextrema() for channel in colors)):
            picture = alpha
        else:
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, (0, 0, 0, 255)), picture)
    else:
        picture = rgb_of(picture)
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
