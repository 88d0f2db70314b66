"""Any picture that people have, read into one record that still knows what its file was like."""

from __future__ import annotations

import hashlib
import importlib
import io
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps, JpegImagePlugin, features

from .picture_arrays import pixel_array
from .picture_metadata import exif_of, profile_for, upright_exif, upright_xmp, xmp_of
from .picture_modes import (
    Box,
    alpha_of,
    check_size,
    deep_gray,
    flat_deep,
    is_deep_gray,
    paint,
    paint_deep,
    plain_mode,
    rgb_of,
    rgba_of,
    strips,
)

MAX_FILE_BYTES = 1 << 30
"""A file may be as long as this."""

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "TIFF", "GIF", "BMP", "DIB", "AVIF", "JPEG2000", "PPM", "ICO")
"""What Pillow is let read; HEIC comes besides, through pillow-heif."""

_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"mif2")
_AVIF_BRANDS = (b"avif", b"avis")
_DEEP_MODES = {"RGB;16B": "RGB;16L", "RGB;16L": "RGB;16B", "RGB;16N": "RGB;16B"}
_DEEP_MODES |= {mode.replace("RGB", "RGBA"): other.replace("RGB", "RGBA") for mode, other in _DEEP_MODES.items()}
if sys.byteorder == "big":
    _DEEP_MODES |= {"RGB;16N": "RGB;16L", "RGBA;16N": "RGBA;16L"}


@dataclass(frozen=True)
class SourcePicture:
    """A picture as it came, upright, and what its file said.

    Attributes:
        native: upright, in its own mode; its ``info`` holds the profile and EXIF that belong to it.
        deep: (H, W, 3) or (H, W, 4) uint16, of a picture with 16 bits a colour, for which Pillow has no mode (its
            ``native`` is then the upper 8); None otherwise.
        rgb: upright 8-bit RGB, transparency laid on white: what a model sees.
        alpha: "L", None where nothing can be transparent.
        format: Pillow's name of the file's format; None for what never was a file.
        icc_profile, exif, xmp: as stored; EXIF and XMP with the orientation reset and without thumbnails. The numbers
            in ``rgb`` are those of the profile: they aren't converted.
        save_options: what keeps a file of the same format as good as it was, such as JPEG's own tables.
    """

    native: Image.Image
    deep: np.ndarray | None
    rgb: Image.Image
    alpha: Image.Image | None
    format: str | None = None
    icc_profile: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    save_options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def size(self) -> tuple[int, int]:
        """(width, height), upright."""
        return self.native.size

    @property
    def mode(self) -> str:
        """Pillow's name of its mode; "RGB;16" or "RGBA;16" for 16 bits a colour."""
        return self.native.mode if self.deep is None else f"{self.native.mode};16"

    @property
    def bit_depth(self) -> int:
        """Of each channel: 1, 8, 16, or 32 for "F"."""
        if self.deep is not None:
            return 16
        return {"1": 1, "I;16": 16, "I": 16, "F": 32}.get(self.native.mode, 8)

    def colors(self, box: Box) -> np.ndarray:
        """(h, w, 3) of ``box`` (left, top, right, bottom), transparency laid on white: uint16 where the picture has
        more than 8 bits, else uint8."""
        left, top, right, bottom = box
        if self.deep is not None:
            return flat_deep(self.deep[top:bottom, left:right])
        if self.color_type == np.uint16:
            return np.repeat(deep_gray(self.native.crop(box))[..., None], 3, -1)
        return np.asarray(self.rgb.crop(box))

    @cached_property
    def digest(self) -> str:
        """A hash of its RGB pixels and its size."""
        return hashlib.sha256(repr(self.size).encode() + self.rgb.tobytes()).hexdigest()[:32]

    @cached_property
    def color_type(self) -> np.dtype[Any]:
        """Of what :meth:`colors` gives: uint16 where the picture has more than 8 bits, else uint8."""
        return np.dtype(np.uint8 if self.deep is None and not is_deep_gray(self.native) else np.uint16)

    def with_colors(self, box: Box, colors: np.ndarray) -> SourcePicture:
        """A picture like this one with other colours in ``box``: its own mode, its transparency, what its file said.
        A pixel whose colour stays keeps its bits, in every mode; see ``picture_modes.paint`` for the others.

        Args:
            colors: (h, w, 3) of the type that :meth:`colors` gives.
        """
        left, top, right, bottom = box
        shape = (bottom - top, right - left, 3)
        if colors.shape != shape or colors.dtype != self.color_type:
            raise ValueError(
                f"colors must be {self.color_type} {shape} for this box, not {colors.dtype} {colors.shape}."
            )
        changed = np.empty(shape[:2], bool)
        for strip in strips(box):
            rows = slice(strip[1] - top, strip[3] - top)
            changed[rows] = (colors[rows] != self.colors(strip)).any(-1)
        if self.deep is None:
            native = paint(self.native, box, colors, changed)
            return replace(self, native=native, rgb=rgb_of(native))
        deep = paint_deep(self.deep, box, colors, changed)
        native = _upper_bytes(deep)
        native.info = dict(self.native.info)
        return replace(self, native=native, deep=deep, rgb=rgb_of(native))

    def widened(self) -> SourcePicture:
        """A picture like this one in a mode that can take any colours: a palette becomes RGB, or RGBA where it has
        transparency, and one bit becomes 8; other pictures are themselves."""
        mode = {"1": "L", "P": "RGB" if self.alpha is None else "RGBA"}.get(self.native.mode)
        if mode is None:
            return self
        native = rgba_of(self.native) if mode == "RGBA" else self.native.convert(mode)
        return replace(self, native=native)


def read_picture(image: Any, name: str = "image") -> SourcePicture:
    """``image`` as a record of the picture and of what its file said.

    Args:
        image: a path; a file's ``bytes``, ``BytesIO`` or open file (from where it stands; it is left there);
            a PIL picture of any mode; an array (H, W), (H, W, 3), (H, W, 4), (3, H, W) or with a leading 1: bool,
            uint8, uint16 or floating point in [0, 1]; a tensor of the same shapes, channels first where both could
            be meant; or a list of one of these. JPEG, PNG, WebP, TIFF, GIF, BMP, AVIF and, with pillow-heif, HEIC.
            Of an animation it is the first frame. A file with 16 bits a colour keeps them where it comes as a file.
            Four channels are RGBA if they are uint8 or uint16. In floating point they are so only if at least
            half of the fourth are exactly 0 or 1, as an alpha's are; else they are refused as latents.
        name: how errors call it.

    Raises:
        TypeError: something else came.
        ValueError: no pixels or too many, a shape or range that no picture has, latents, an unreadable or damaged
            file, a URL.
    """
    if isinstance(image, (list, tuple)):
        if len(image) != 1:
            raise TypeError(f"{name} must be one picture, not {len(image)}; call once for each.")
        image = image[0]
    if isinstance(image, SourcePicture):
        return image
    if isinstance(image, (str, os.PathLike)):
        return _read_file(_file_bytes(image, name), f"{name}={os.fspath(image)!r}")
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _read_file(bytes(image), name)
    if isinstance(image, Image.Image):
        return _read_pil(image, name)
    if callable(getattr(image, "read", None)):
        return _read_file(_stream_bytes(image, name), name)
    if isinstance(image, (torch.Tensor, np.ndarray)):
        array = pixel_array(image, name)
        if array.dtype == np.uint16 and array.ndim == 3:
            return _picture(_upper_bytes(array), name, deep=array)
        return _picture(Image.fromarray(array), name)
    raise TypeError(
        f"{name} must be a PIL picture, an array (H, W, 3), a tensor (3, H, W), a path, or a file's bytes, "
        f"not {type(image).__name__}."
    )


# ------------------------------------------------------------------------------------------------ files


def _file_bytes(path: str | os.PathLike[str], name: str) -> bytes:
    text = os.fsdecode(path)
    if text.lower().startswith(("http://", "https://")):
        raise ValueError(
            f"{name}={text!r} is a URL; fetch it first: from diffusers.utils import load_image; load_image({text!r})."
        )
    if text.startswith("data:"):
        raise ValueError(f"{name} is a data URL; give its bytes: base64.b64decode(text.split(',', 1)[1]).")
    try:
        file = Path(text)
        size = file.stat().st_size if file.is_file() else None
    except (ValueError, OSError):  # a null byte in it, too long, a folder that may not be looked into
        size = None
    if size is None:
        raise ValueError(f"{name}={text[:300]!r} is not a file; give the path of a picture, or the picture itself.")
    _check_length(size, f"{name}={text!r}")
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"{name}={text!r} can't be read as a picture: {error}") from error


def _stream_bytes(stream: Any, name: str) -> bytes:
    """What an open binary file holds from where it stands; it is put back there."""
    start = None
    with suppress(Exception):  # of a pipe or a socket, which can be read once
        start = stream.tell()
    try:
        data = stream.read(MAX_FILE_BYTES + 1) if start is not None else stream.read()
        if start is not None:
            stream.seek(start)
    except Exception as error:
        raise ValueError(f"{name} can't be read: {type(error).__name__}: {error}") from error
    if hasattr(data, "close") and not isinstance(data, (bytes, bytearray)):
        data.close()  # an upload whose read() is a coroutine
        raise TypeError(f"{name}.read() must be called with await; give the file below it: {name}.file.")
    if not isinstance(data, (bytes, bytearray)):
        raise TypeError(f"{name} must be a file opened for bytes, open(path, 'rb'); it gave {type(data).__name__}.")
    if not data and start:
        raise ValueError(f"{name} has been read to its end; call {name}.seek(0) first.")
    return bytes(data)


def _check_length(length: int, name: str) -> None:
    if length > MAX_FILE_BYTES:
        raise ValueError(f"{name} is {length:,} bytes long; a picture's file may have {MAX_FILE_BYTES:,} at most.")


def _read_file(data: bytes, name: str) -> SourcePicture:
    _check_length(len(data), name)
    if not data:
        raise ValueError(f"{name} can't be read as a picture: it is empty.")
    brand = data[8:12] if data[4:8] == b"ftyp" else b""
    if brand in _HEIF_BRANDS or (brand in _AVIF_BRANDS and not features.check("avif")):
        return _read_heif(data, name, "AVIF" if brand in _AVIF_BRANDS else "HEIF")
    try:
        image = _opened(data, name)
        if image.format == "TIFF" and getattr(image, "tag_v2", {}).get(254, 0) == 1:
            raise _Refusal(
                f"{name} is a camera's raw file, of which only a thumbnail could be read; develop it and save it as "
                "TIFF or JPEG."
            )
        options = _save_options(image, data)
        raw_modes = {_raw_mode(tile) for tile in image.tile}
        is_deep = bool(raw_modes) and raw_modes <= set(_DEEP_MODES) and "transparency" not in image.info
        upright = _upright(image)
        metadata = (image.format, image.info.get("icc_profile"), exif_of(image), xmp_of(image))
        deep = _deep_colors(data, upright, name) if is_deep else None
        return _picture(upright, name, metadata, options, deep)
    except _Refusal as refusal:
        raise ValueError(str(refusal)) from None
    except Exception as error:
        raise ValueError(f"{name} can't be read as a picture: {_reason(error, data)}") from error


class _Refusal(ValueError):
    """A message that says all by itself."""


def _opened(data: bytes, name: str) -> ImageFile.ImageFile:
    """Pillow's picture of a file of which only the header has been read, its size checked."""
    Image.init()  # else Pillow doesn't know all of its formats yet
    image = Image.open(io.BytesIO(data), formats=[known for known in FORMATS if known in Image.OPEN])
    try:
        check_size(image.size, name)
    except ValueError as error:
        raise _Refusal(str(error)) from None
    return image


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF says nothing of how the camera was held
        return image


def _reason(error: Exception, data: bytes) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        if data[:4] == b"%PDF" or b"<svg" in data[:1000] or data[:2] == b"%!":
            return "it is a document, not a picture; save it as PNG."
        return "it is none of JPEG, PNG, WebP, TIFF, GIF, BMP, AVIF and HEIC, or its beginning is damaged."
    if isinstance(error, Image.DecompressionBombError):
        return f"it has too many pixels ({error})."
    return f"{error}" or type(error).__name__


def _raw_mode(tile: Any) -> str | None:
    arguments = tile[3]
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else None


def _deep_colors(data: bytes, upright: Image.Image, name: str) -> np.ndarray:
    """(H, W, 3 or 4) uint16. Pillow keeps the upper byte of each colour: read in the other byte order, it keeps the
    lower one."""
    image = _opened(data, name)
    swapped: list[Any] = []
    for tile in image.tile:
        arguments = tile[3]
        other = _DEEP_MODES[_raw_mode(tile) or ""]
        arguments = (other, *arguments[1:]) if isinstance(arguments, tuple) else other
        swapped.append(tile._replace(args=arguments) if hasattr(tile, "_replace") else (*tile[:3], arguments))
    image.tile = swapped
    lower = np.asarray(_upright(image))
    deep = np.asarray(upright).astype(np.uint16)
    deep <<= 8
    deep |= lower
    return deep


def _upper_bytes(deep: np.ndarray) -> Image.Image:
    return Image.fromarray((deep >> 8).astype(np.uint8))


def _read_heif(data: bytes, name: str, file_format: str) -> SourcePicture:
    try:
        pillow_heif = importlib.import_module("pillow_heif")
    except ImportError:
        kind = "a HEIC picture" if file_format == "HEIF" else "an AVIF picture"
        raise ValueError(
            f'{name} is {kind}, which needs one more package: pip install "s2edit-pipeline[heif]". '
            "Or save it as JPEG first."
        ) from None
    try:
        opened = pillow_heif.open_heif(io.BytesIO(data))
        try:
            check_size(opened.size, name)
        except ValueError as error:
            raise _Refusal(str(error)) from None
        image = opened.to_pillow()
        metadata = (file_format, image.info.get("icc_profile"), image.info.get("exif"), image.info.get("xmp"))
        return _picture(image, name, metadata)
    except _Refusal as refusal:
        raise ValueError(str(refusal)) from None
    except Exception as error:
        raise ValueError(f"{name} can't be read as a picture: {error or type(error).__name__}") from error


def _is_lossless_webp(data: bytes) -> bool:
    """Whether the first chunk of pixels is VP8L."""
    start = 12
    while start + 8 <= len(data):
        if data[start : start + 4] in (b"VP8 ", b"VP8L", b"ANMF"):
            return data[start : start + 4] == b"VP8L"
        length = int.from_bytes(data[start + 4 : start + 8], "little")
        start += 8 + length + length % 2
    return False


def _save_options(image: Image.Image, data: bytes) -> dict[str, Any]:
    """What Pillow's ``save`` needs to write a file of the same format as good as this one."""
    options: dict[str, Any] = {}
    if image.format in ("JPEG", "MPO"):
        tables = getattr(image, "quantization", None)
        sampling = JpegImagePlugin.get_sampling(image) if image.mode in ("RGB", "YCbCr") else -1
        if tables:
            options["qtables"] = {number: list(table) for number, table in tables.items()}
        if sampling >= 0:
            options["subsampling"] = sampling
    elif image.format == "WEBP":
        options["lossless"] = _is_lossless_webp(data)
    elif image.format == "TIFF":
        options["compression"] = image.info.get("compression")
    resolution = image.info.get("dpi")
    if isinstance(resolution, tuple) and len(resolution) == 2:
        numbers = tuple(float(number) for number in resolution)
        if all(0 < number < 1e5 for number in numbers):
            options["dpi"] = numbers
    return options


# ------------------------------------------------------------------------------------------------ pictures


def _picture(
    upright: Image.Image,
    name: str,
    metadata: tuple[str | None, Any, bytes | None, bytes | str | None] = (None, None, None, None),
    options: Mapping[str, Any] = MappingProxyType({}),
    deep: np.ndarray | None = None,
) -> SourcePicture:
    """The record of an upright picture; ``metadata`` is its format, profile, EXIF and XMP."""
    file_format, profile, exif, xmp = metadata
    native = plain_mode(upright, name).copy()
    transparency = native.info.get("transparency") if native.mode == "P" else None
    exif = upright_exif(exif, native.size)
    profile = profile_for(profile if isinstance(profile, bytes) else None, native.mode)
    belongings = {"transparency": transparency, "icc_profile": profile, "exif": exif, "dpi": options.get("dpi")}
    native.info = {key: value for key, value in belongings.items() if value is not None}
    return SourcePicture(
        native=native,
        deep=deep,
        rgb=rgb_of(native),
        alpha=alpha_of(native),
        format="JPEG" if file_format == "MPO" else "BMP" if file_format == "DIB" else file_format,
        icc_profile=profile,
        exif=exif,
        xmp=upright_xmp(xmp),
        save_options=MappingProxyType(dict(options)),
    )


def _read_pil(image: Image.Image, name: str) -> SourcePicture:
    check_size(image.size, name)
    try:
        options = _save_options(image, b"")
        options.pop("lossless", None)
        upright = _upright(image)
        metadata = (image.format, image.info.get("icc_profile"), exif_of(image), xmp_of(image))
    except Exception as error:
        raise ValueError(f"{name} can't be read as a picture: {error or type(error).__name__}") from error
    return _picture(upright, name, metadata, options)
