"""A picture written back to a file in its own mode, with the profile, EXIF and XMP that it came with."""

from __future__ import annotations

import importlib
import io
import logging
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin, features
from PIL.PngImagePlugin import PngInfo

from .picture_files import SourcePicture
from .picture_metadata import EXIF_PREFIX, profile_for
from .picture_modes import plain_mode, rgba_of

logger = logging.getLogger(__name__)

QUALITY = 95
"""Of lossy files where the source doesn't say its own."""

SUFFIXES = {
    ".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG", ".png": "PNG", ".webp": "WEBP", ".tif": "TIFF",
    ".tiff": "TIFF", ".gif": "GIF", ".bmp": "BMP", ".dib": "BMP", ".avif": "AVIF", ".heic": "HEIF", ".heif": "HEIF",
    ".jp2": "JPEG2000", ".ppm": "PPM", ".pgm": "PPM",
}  # fmt: skip
"""Suffix of a file's name -> Pillow's name of the format."""

_MODES: dict[str, tuple[str, ...]] = {
    "JPEG": ("L", "RGB", "CMYK"),
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "RGB;16", "RGBA;16"),
    "WEBP": ("RGB", "RGBA"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "RGB;16", "RGBA;16"),
    "GIF": ("L", "P"),
    "BMP": ("1", "L", "P", "RGB"),
    "AVIF": ("RGB", "RGBA"),
    "HEIF": ("RGB", "RGBA"),
    "JPEG2000": ("L", "LA", "RGB", "RGBA"),
    "PPM": ("1", "L", "RGB"),
}
"""What each format can hold, as far as Pillow or this module writes it."""

_JPEG_SEGMENT = 65_500
"""EXIF and XMP of a JPEG have to fit into one segment each."""


def save_picture(picture: SourcePicture, path: str | os.PathLike[str], quality: int | None = None) -> Path:
    """Write ``picture`` to ``path``, in the format that its suffix names, or its own where it has none.

    The mode, profile, EXIF, XMP and resolution are the picture's. A format that can't hold the mode gets the nearest:
    transparency is laid on white for JPEG and BMP, 16 bits become 8, CMYK becomes RGB and leaves its profile behind.
    The file is written only when it is whole.

    Args:
        quality: 1 to 100, of lossy formats. None: a JPEG's own tables where it comes from a JPEG, else 95.

    Returns:
        The path written.

    Raises:
        ValueError: a suffix that no picture has here; what the format can't hold, such as too many pixels for WebP.
    """
    path = Path(path)
    file_format = SUFFIXES.get(path.suffix.lower())
    if file_format is None and path.suffix:
        raise ValueError(f"{path.suffix!r} is no picture's suffix here; choose one of {', '.join(sorted(SUFFIXES))}.")
    data = picture_bytes(picture, file_format, quality)
    path.write_bytes(data)
    return path


def picture_bytes(picture: SourcePicture, file_format: str | None = None, quality: int | None = None) -> bytes:
    """The file that :func:`save_picture` writes. ``file_format`` is Pillow's name of it, such as "JPEG" or "PNG"; None:
    the picture's own, PNG where it has none."""
    file_format = (file_format or picture.format or "PNG").upper()
    if file_format == "ICO":
        file_format = "PNG"
    if file_format not in _MODES:
        raise ValueError(f"file_format={file_format!r} is not written here; choose one of {', '.join(_MODES)}.")
    if quality is not None and not 1 <= quality <= 100:
        raise ValueError(f"quality must be from 1 to 100, not {quality!r}.")
    mode = picture.mode
    if mode not in _MODES[file_format] or (
        mode == "P" and picture.alpha is not None and file_format not in ("PNG", "GIF")
    ):
        mode = _nearest_mode(picture, file_format)
    if mode.endswith(";16") and mode != "I;16":
        return _deep_png(picture) if file_format == "PNG" else _deep_tiff(picture)
    image = _in_mode(picture, mode)
    options = _options(picture, file_format, mode, quality)
    stream = io.BytesIO()
    try:
        if file_format == "HEIF" or (file_format == "AVIF" and not features.check("avif")):
            _write_heif(image, stream, file_format, options)
        else:
            image.save(stream, file_format, **options)
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(
            f"A {image.width} x {image.height} picture of mode {mode} can't be written as {file_format}: {error}. "
            "Save it as PNG."
        ) from error
    return stream.getvalue()


def _nearest_mode(picture: SourcePicture, file_format: str) -> str:
    modes = _MODES[file_format]
    if file_format == "GIF":
        return "P"
    if picture.alpha is not None and "RGBA" in modes:
        return "LA" if picture.native.mode == "LA" and "LA" in modes else "RGBA"
    is_gray = picture.native.mode in ("1", "L", "LA", "I;16", "I", "F")
    return "L" if is_gray and "L" in modes else "RGB"


def _in_mode(picture: SourcePicture, mode: str) -> Image.Image:
    """The picture in a mode that may not be its own, its ``info`` without what ``save`` is told by itself."""
    if picture.mode == mode:
        image = plain_mode(picture.native.copy(), "picture")
    elif mode in ("RGBA", "LA"):
        image = rgba_of(picture.native).convert(mode)
    elif mode == "P":
        image = _palette(picture)
    else:
        image = picture.rgb.convert(mode)
    image.info = {key: value for key, value in image.info.items() if key == "transparency"}
    return image


def _palette(picture: SourcePicture) -> Image.Image:
    """With 255 colours and one that is transparent, where the picture has transparency; else with 256."""
    if picture.alpha is None:
        return picture.rgb.quantize(256, Image.Quantize.MEDIANCUT)
    image = picture.rgb.quantize(255, Image.Quantize.MEDIANCUT)
    indices = np.array(image)
    indices[np.asarray(picture.alpha) < 128] = 255
    transparent = Image.frombytes("P", image.size, indices.tobytes())
    transparent.putpalette((image.getpalette() or [])[: 3 * 255])
    transparent.info["transparency"] = 255
    return transparent


def _options(picture: SourcePicture, file_format: str, mode: str, quality: int | None) -> dict[str, Any]:
    """What Pillow's ``save`` is told for this format."""
    source = picture.save_options if picture.format == file_format else {}
    options: dict[str, Any] = {}
    profile = profile_for(picture.icc_profile, mode)
    if profile is not None and file_format not in ("GIF", "BMP", "PPM", "JPEG2000"):
        options["icc_profile"] = profile
    if "dpi" in picture.save_options and file_format in ("JPEG", "PNG", "TIFF", "BMP"):
        options["dpi"] = picture.save_options["dpi"]
    if file_format in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF"):
        options |= _descriptions(picture, file_format)
    if file_format == "JPEG":
        if quality is None and "qtables" in source:
            options |= {key: source[key] for key in ("qtables", "subsampling") if key in source}
        else:
            options |= {"quality": QUALITY if quality is None else quality, "subsampling": 0}
    elif file_format == "WEBP":
        is_lossless = quality is None and (
            source.get("lossless", False) or picture.format in ("PNG", "GIF", "BMP", "TIFF")
        )
        options |= {"lossless": is_lossless, "quality": QUALITY if quality is None else quality, "exact": True}
    elif file_format in ("AVIF", "HEIF"):
        options["quality"] = QUALITY if quality is None else quality
    elif file_format == "TIFF":
        compression = source.get("compression")
        if compression in (None, "jpeg", "webp", "tiff_jpeg") or not features.check("libtiff"):
            compression = "tiff_adobe_deflate" if features.check("libtiff") and compression else None
        if compression in ("group3", "group4", "tiff_ccitt") and mode != "1":
            compression = "tiff_adobe_deflate"
        options["compression"] = compression
    return options


def _descriptions(picture: SourcePicture, file_format: str) -> dict[str, Any]:
    """EXIF and XMP as each format's ``save`` takes them."""
    exif, xmp = picture.exif, picture.xmp
    options: dict[str, Any] = {}
    if file_format == "JPEG":
        if exif is not None and len(exif) > _JPEG_SEGMENT:
            logger.warning("The EXIF is %d bytes long, too long for a JPEG: it is left out.", len(exif))
            exif = None
        if xmp is not None and len(xmp) > _JPEG_SEGMENT:
            logger.warning("The XMP is %d bytes long, too long for a JPEG: it is left out.", len(xmp))
            xmp = None
        if xmp is not None:
            packet = b"http://ns.adobe.com/xap/1.0/\x00" + xmp
            options["extra"] = b"\xff\xe1" + struct.pack(">H", len(packet) + 2) + packet
    elif file_format == "PNG":
        if xmp is not None:
            options["pnginfo"] = PngInfo()
            options["pnginfo"].add_itxt("XML:com.adobe.xmp", xmp.decode("utf-8", "replace"))
    elif file_format == "TIFF":
        if xmp is not None:
            options["tiffinfo"] = {700: xmp}
    elif xmp is not None:
        options["xmp"] = xmp
    if exif is not None:
        if file_format == "TIFF":
            tags = _exif_tags(exif)
            options["exif"] = tags
        else:
            options["exif"] = exif
    return options


def _exif_tags(exif: bytes) -> Image.Exif:
    tags = Image.Exif()
    tags.load(exif)
    for folder in (0x8769, 0x8825):
        tags.get_ifd(folder)
    return tags


def _write_heif(image: Image.Image, stream: io.BytesIO, file_format: str, options: dict[str, Any]) -> None:
    try:
        pillow_heif = importlib.import_module("pillow_heif")
    except ImportError:
        raise ImportError(
            f'Writing {file_format} needs one more package: pip install "s2edit-pipeline[heif]". Or save as JPEG.'
        ) from None
    pillow_heif.from_pillow(image).save(stream, format=file_format, **options)


# ------------------------------------------------------------------------------------------------ 16 bits a colour


def _deep_png(picture: SourcePicture) -> bytes:
    """A PNG of 16 bits a colour, which Pillow doesn't write (PNG specification, third edition)."""
    assert picture.deep is not None
    height, width, channels = picture.deep.shape
    lines = picture.deep.astype(">u2").reshape(height, -1).view(np.uint8)
    step = 2 * channels
    filtered = np.empty((height, 1 + lines.shape[1]), np.uint8)
    filtered[:, 0] = 1  # Sub: each byte as its difference to the one of the pixel before
    filtered[:, 1 : 1 + step] = lines[:, :step]
    filtered[:, 1 + step :] = lines[:, step:] - lines[:, :-step]
    color_type = 2 if channels == 3 else 6
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0))]
    if picture.icc_profile is not None:
        chunks.append((b"iCCP", b"icc\x00\x00" + zlib.compress(picture.icc_profile)))
    if "dpi" in picture.save_options:
        per_meter = [round(number / 0.0254) for number in picture.save_options["dpi"]]
        chunks.append((b"pHYs", struct.pack(">IIB", *per_meter, 1)))
    if picture.exif is not None:
        chunks.append((b"eXIf", picture.exif.removeprefix(EXIF_PREFIX)))
    if picture.xmp is not None:
        chunks.append((b"iTXt", b"XML:com.adobe.xmp\x00\x00\x00\x00\x00" + picture.xmp))
    chunks += [(b"IDAT", zlib.compress(filtered.data, 3)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def _deep_tiff(picture: SourcePicture) -> bytes:
    """A little-endian TIFF of 16 bits a colour in one deflated strip (TIFF 6.0, sections 3 and 8)."""
    assert picture.deep is not None
    height, width, channels = picture.deep.shape
    strip = zlib.compress(np.ascontiguousarray(picture.deep, "<u2").data, 3)
    tags = TiffImagePlugin.ImageFileDirectory_v2(prefix=b"II")
    if picture.exif is not None:
        exif = _exif_tags(picture.exif)
        for tag in exif:
            tags[tag] = dict(exif.get_ifd(tag)) if tag in (0x8769, 0x8825) else exif[tag]
        tags.pop(0x0112, None)
    tags[TiffImagePlugin.IMAGEWIDTH] = width
    tags[TiffImagePlugin.IMAGELENGTH] = height
    tags[TiffImagePlugin.BITSPERSAMPLE] = (16,) * channels
    tags[TiffImagePlugin.COMPRESSION] = 8
    tags[TiffImagePlugin.PHOTOMETRIC_INTERPRETATION] = 2
    tags[TiffImagePlugin.SAMPLESPERPIXEL] = channels
    tags[TiffImagePlugin.ROWSPERSTRIP] = height
    tags[TiffImagePlugin.STRIPOFFSETS] = 0  # counted from where the directory ends, as Pillow writes it
    tags[TiffImagePlugin.STRIPBYTECOUNTS] = len(strip)
    tags[TiffImagePlugin.PLANAR_CONFIGURATION] = 1
    if channels == 4:
        tags[TiffImagePlugin.EXTRASAMPLES] = 2  # straight alpha
    if "dpi" in picture.save_options:
        horizontal, vertical = picture.save_options["dpi"]
        tags[TiffImagePlugin.X_RESOLUTION], tags[TiffImagePlugin.Y_RESOLUTION] = horizontal, vertical
        tags[TiffImagePlugin.RESOLUTION_UNIT] = 2
    if picture.xmp is not None:
        tags[TiffImagePlugin.XMP] = picture.xmp
    if picture.icc_profile is not None:
        tags[TiffImagePlugin.ICCPROFILE] = picture.icc_profile
    stream = io.BytesIO()
    tags.save(stream)
    stream.write(strip)
    return stream.getvalue()
