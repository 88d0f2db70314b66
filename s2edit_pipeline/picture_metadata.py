"""What a photograph's file says beside its pixels: EXIF, XMP and the colour profile, kept true for an edited copy."""

from __future__ import annotations

import re
import struct

from PIL import Image

EXIF_PREFIX = b"Exif\x00\x00"
ORIENTATION = 0x0112
"""EXIF's tag of how the camera was held."""

_EXIF_FOLDER, _PIXEL_WIDTH, _PIXEL_HEIGHT = 0x8769, 0xA002, 0xA003
_THUMBNAIL_OFFSET, _THUMBNAIL_LENGTH = 0x0201, 0x0202
_NUMBER_FORMATS = {3: "H", 4: "I"}
_DESCRIPTIVE_TAGS = (270, 271, 272, 282, 283, 296, 305, 306, 315, 33432, 34665, 34853)
"""Of a TIFF's tags those that describe the photograph (maker, date, artist, place ...), not how it is stored."""

_PROFILE_SPACES = {
    "1": b"GRAY", "L": b"GRAY", "LA": b"GRAY", "I;16": b"GRAY", "I": b"GRAY", "F": b"GRAY", "CMYK": b"CMYK",
}  # fmt: skip


class _Directory:
    """The entries of one EXIF directory that starts at ``offset`` of ``data``, a TIFF in bytes."""

    def __init__(self, data: bytearray, order: str, offset: int) -> None:
        self.data, self.order = data, order
        (count,) = struct.unpack_from(order + "H", data, offset)
        self.end = offset + 2 + 12 * count
        if self.end + 4 > len(data):
            raise ValueError("EXIF directory runs past the end")
        self.entries = {
            struct.unpack_from(order + "H", data, start)[0]: start for start in range(offset + 2, self.end, 12)
        }

    def number(self, tag: int) -> int | None:
        if tag not in self.entries:
            return None
        start = self.entries[tag]
        (kind,) = struct.unpack_from(self.order + "H", self.data, start + 2)
        if kind not in _NUMBER_FORMATS:
            return None
        return int(struct.unpack_from(self.order + _NUMBER_FORMATS[kind], self.data, start + 8)[0])

    def set_number(self, tag: int, value: int) -> None:
        if self.number(tag) is not None:
            start = self.entries[tag]
            (kind,) = struct.unpack_from(self.order + "H", self.data, start + 2)
            struct.pack_into(self.order + _NUMBER_FORMATS[kind], self.data, start + 8, value)


def upright_exif(exif: bytes | None, size: tuple[int, int]) -> bytes | None:
    """``exif`` for the picture turned upright and edited, everything else to the byte as it was.

    The orientation becomes 1 and the sides those of ``size`` (width, height). The thumbnail is wiped out: it would go
    on showing the picture as it was before the edit.

    Returns:
        EXIF with its prefix; None where there is none or where it can't be read.
    """
    if not exif:
        return None
    while exif.startswith(EXIF_PREFIX):
        exif = exif[len(EXIF_PREFIX) :]
    data = bytearray(exif)
    try:
        order = {b"II": "<", b"MM": ">"}[bytes(data[:2])]
        (offset,) = struct.unpack_from(order + "I", data, 4)
        main = _Directory(data, order, offset)
        main.set_number(ORIENTATION, 1)
        details = main.number(_EXIF_FOLDER)
        if details is not None:
            folder = _Directory(data, order, details)
            folder.set_number(_PIXEL_WIDTH, size[0])
            folder.set_number(_PIXEL_HEIGHT, size[1])
        (second,) = struct.unpack_from(order + "I", data, main.end)
        if second:
            thumbnail = _Directory(data, order, second)
            start, length = thumbnail.number(_THUMBNAIL_OFFSET), thumbnail.number(_THUMBNAIL_LENGTH)
            if start is not None and length is not None:
                stop = min(start + length, len(data))
                data[start:stop] = bytes(max(0, stop - start))
            struct.pack_into(order + "I", data, main.end, 0)
    except (KeyError, ValueError, struct.error):
        return None
    return EXIF_PREFIX + bytes(data)


def upright_xmp(xmp: bytes | str | None) -> bytes | None:
    """``xmp`` for the picture turned upright and edited: orientation 1, no thumbnails, the rest as it was."""
    if not xmp:
        return None
    text = xmp.encode() if isinstance(xmp, str) else bytes(xmp)
    text = re.sub(rb"(tiff:Orientation\s*(?:=\s*[\"']|>\s*))\d+", rb"\g<1>1", text)
    return re.sub(rb"<xmp:Thumbnails\b.*?</xmp:Thumbnails>", b"", text, flags=re.DOTALL)


def exif_of(image: Image.Image) -> bytes | None:
    """The EXIF of an opened picture; of a TIFF, what its tags say of the photograph."""
    try:
        if image.format == "TIFF":
            tags = image.getexif()
            exif = Image.Exif()
            for tag in _DESCRIPTIVE_TAGS:
                value = dict(tags.get_ifd(tag)) if tag in (34665, 34853) else tags.get(tag)
                if value:
                    exif[tag] = value
            return exif.tobytes() if len(exif) else None
        stored = image.info.get("exif")
        if isinstance(stored, bytes) and stored:
            return stored
        tags = image.getexif()
        return tags.tobytes() if len(tags) else None
    except Exception:  # damaged EXIF costs the EXIF, not the picture
        return None


def xmp_of(image: Image.Image) -> bytes | None:
    """The XMP packet of an opened picture."""
    xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
    if not xmp and image.format == "TIFF":
        xmp = getattr(image, "tag_v2", {}).get(700)
    return xmp if isinstance(xmp, bytes) else xmp.encode() if isinstance(xmp, str) else None


def profile_for(icc_profile: bytes | None, mode: str) -> bytes | None:
    """``icc_profile`` where it describes pictures of ``mode``; None where it describes others, CMYK's for RGB."""
    if not icc_profile or len(icc_profile) < 128:
        return None
    return icc_profile if icc_profile[16:20] == _PROFILE_SPACES.get(mode, b"RGB ") else None
