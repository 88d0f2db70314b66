"""Pictures read with all that their files say, and written back: against Pillow, tifffile, written-out bytes and damage
of every kind."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import os
import random
import struct
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageCms, ImageFile, features
from PIL.PngImagePlugin import PngInfo

from s2edit_pipeline import picture_modes
from s2edit_pipeline.picture_files import SourcePicture, read_picture
from s2edit_pipeline.picture_inputs import load_picture
from s2edit_pipeline.picture_saving import picture_bytes, save_picture

HEIGHT, WIDTH = 20, 28
RANDOM = np.random.default_rng(0)
NOISE = RANDOM.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
ALPHA = RANDOM.integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
DEEP = RANDOM.integers(0, 65536, (HEIGHT, WIDTH, 4), dtype=np.uint16)
y, x = np.mgrid[0:HEIGHT, 0:WIDTH] / WIDTH
SMOOTH = (np.stack([x, y, 1 - x * y], -1) * 255).round().astype(np.uint8)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)
THUMBNAIL = b"\xff\xd8 the face as it was \xff\xd9"


def exif_with(orientation: int = 1) -> Image.Exif:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9003] = "2024:05:06 07:08:09"
    exif.get_ifd(0x8769)[0xA002] = HEIGHT
    exif.get_ifd(0x8825)[0x0001] = "N"
    exif[0x8769], exif[0x8825] = exif.get_ifd(0x8769), exif.get_ifd(0x8825)
    exif[0x010F], exif[0x0112], exif[0x8298] = "Maker", orientation, "(c) me"
    return exif


def saved(image: Image.Image, file_format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def deep_png(colors: np.ndarray) -> bytes:
    """Written out by hand, without filters."""
    height, width, channels = colors.shape
    lines = b"".join(b"\x00" + colors[row].astype(">u2").tobytes() for row in range(height))
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2 if channels == 3 else 6, 0, 0, 0)),
        (b"IDAT", zlib.compress(lines)),
        (b"IEND", b""),
    ]
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def deep_tiff(colors: np.ndarray, **options: Any) -> bytes:
    stream = io.BytesIO()
    extra = {"extrasamples": ["unassalpha"]} if colors.ndim == 3 and colors.shape[-1] == 4 else {}
    photometric = "rgb" if colors.ndim == 3 else "minisblack"
    tifffile.imwrite(stream, colors, photometric=photometric, **extra, **options)
    return stream.getvalue()


def palette_picture() -> Image.Image:
    image = Image.fromarray(NOISE).quantize(200)
    image.info["transparency"] = 7
    return image


RGB, GRAY = Image.fromarray(NOISE), Image.fromarray(NOISE[..., 0])
RGBA = Image.fromarray(np.dstack([NOISE, ALPHA]))
GRAY_ALPHA = Image.fromarray(np.dstack([NOISE[..., 0], ALPHA]), "LA")
ONE_BIT = GRAY.point(lambda value: 255 * (value > 127)).convert("1")
CMYK = Image.frombytes("CMYK", (WIDTH, HEIGHT), np.dstack([NOISE, ALPHA]).tobytes())
DEEP_GRAY = Image.fromarray(DEEP[..., 0])

LOSSLESS: dict[str, tuple[bytes, str]] = {
    "png": (saved(RGB, "PNG", icc_profile=SRGB, exif=exif_with(), dpi=(300, 300)), "RGB"),
    "png-rgba": (saved(RGBA, "PNG"), "RGBA"),
    "png-gray": (saved(GRAY, "PNG"), "L"),
    "png-gray-alpha": (saved(GRAY_ALPHA, "PNG"), "LA"),
    "png-one-bit": (saved(ONE_BIT, "PNG"), "1"),
    "png-palette": (saved(palette_picture(), "PNG"), "P"),
    "png-deep-gray": (saved(DEEP_GRAY, "PNG"), "I;16"),
    "png-deep": (deep_png(DEEP[..., :3]), "RGB;16"),
    "png-deep-alpha": (deep_png(DEEP), "RGBA;16"),
    "webp": (saved(RGB, "WEBP", lossless=True, icc_profile=SRGB, exif=exif_with()), "RGB"),
    "webp-rgba": (saved(RGBA, "WEBP", lossless=True, exact=True), "RGBA"),
    "tiff": (saved(RGB, "TIFF", icc_profile=SRGB, exif=exif_with(), dpi=(300, 300)), "RGB"),
    "tiff-lzw": (saved(RGB, "TIFF", compression="tiff_lzw"), "RGB"),
    "tiff-rgba": (saved(RGBA, "TIFF"), "RGBA"),
    "tiff-fax": (saved(ONE_BIT, "TIFF", compression="group4"), "1"),
    "tiff-palette": (saved(Image.fromarray(NOISE).quantize(200), "TIFF"), "P"),
    "tiff-cmyk": (saved(CMYK, "TIFF"), "CMYK"),
    "tiff-float": (saved(Image.fromarray(DEEP[..., 0].astype(np.float32) / 65535), "TIFF"), "F"),
    "tiff-deep-gray": (deep_tiff(DEEP[..., 0]), "I;16"),
    "tiff-deep-gray-motorola": (deep_tiff(DEEP[..., 0], byteorder=">"), "I;16"),
    "tiff-deep": (deep_tiff(DEEP[..., :3]), "RGB;16"),
    "tiff-deep-motorola": (deep_tiff(DEEP[..., :3], byteorder=">", compression="zlib"), "RGB;16"),
    "tiff-deep-alpha": (deep_tiff(DEEP, compression="zlib"), "RGBA;16"),
    "gif": (saved(palette_picture(), "GIF"), "P"),
    "bmp": (saved(RGB, "BMP"), "RGB"),
    "bmp-gray": (saved(GRAY, "BMP"), "L"),
    "bmp-palette": (saved(Image.fromarray(NOISE).quantize(200), "BMP"), "P"),
}  # fmt: skip

SMOOTH_RGB = Image.fromarray(SMOOTH)
LOSSY: dict[str, tuple[bytes, str, str]] = {
    "jpeg": (saved(SMOOTH_RGB, "JPEG", quality=95, icc_profile=SRGB, exif=exif_with(), dpi=(72, 72)), "RGB", "JPEG"),
    "jpeg-444": (saved(SMOOTH_RGB, "JPEG", quality=100, subsampling=0), "RGB", "JPEG"),
    "jpeg-gray": (saved(SMOOTH_RGB.convert("L"), "JPEG", quality=95), "L", "JPEG"),
    "jpeg-cmyk": (saved(SMOOTH_RGB.convert("CMYK"), "JPEG", quality=95), "CMYK", "JPEG"),
    "jpeg-of-two": (saved(SMOOTH_RGB, "MPO", save_all=True, append_images=[SMOOTH_RGB]), "RGB", "JPEG"),
    "webp": (saved(SMOOTH_RGB, "WEBP", quality=95), "RGB", "WEBP"),
    "webp-rgba": (saved(Image.merge("RGBA", [*SMOOTH_RGB.split(), Image.fromarray(ALPHA)]), "WEBP"), "RGBA", "WEBP"),
}
if features.check("avif"):
    LOSSY["avif"] = (saved(SMOOTH_RGB, "AVIF", quality=95, icc_profile=SRGB), "RGB", "AVIF")


def exact_colors(picture: SourcePicture) -> np.ndarray:
    """Everything that the picture's pixels hold, whatever their mode."""
    if picture.deep is not None:
        return picture.deep
    native = picture.native
    return np.asarray(native.convert("RGBA") if native.mode == "P" else native)


# ------------------------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize("kind", LOSSLESS)
def test_what_loses_nothing_comes_back_to_the_bit(kind: str, tmp_path: Path) -> None:
    data, mode = LOSSLESS[kind]
    source = read_picture(data)
    assert source.mode == mode and source.size == (WIDTH, HEIGHT) and source.rgb.mode == "RGB"
    assert source.rgb.size == source.size
    if "deep" in kind:
        pixels = DEEP[..., 0] if "gray" in kind else DEEP if "alpha" in kind else DEEP[..., :3]
        assert source.bit_depth == 16
    else:
        pixels = exact_colors(SourcePicture(Image.open(io.BytesIO(data)), None, RGB, None))
    assert np.array_equal(exact_colors(source), pixels)
    assert (source.alpha is None) == (
        mode not in ("RGBA", "LA", "RGBA;16") and "transparency" not in source.native.info
    )

    suffix = ".tif" if source.format == "TIFF" else f".{(source.format or '').lower()}"
    path = save_picture(source, tmp_path / f"copy{suffix}")
    copy = read_picture(path)
    assert (copy.mode, copy.size, copy.format) == (source.mode, source.size, source.format)
    assert np.array_equal(exact_colors(copy), pixels)
    assert copy.icc_profile == source.icc_profile
    assert (copy.icc_profile == SRGB) == (kind in ("png", "webp", "tiff"))
    with Image.open(path) as opened:
        assert opened.size == (WIDTH, HEIGHT)
        if kind in ("png", "webp", "tiff"):
            assert opened.getexif()[0x010F] == "Maker" and opened.getexif().get(0x0112, 1) == 1
            assert opened.getexif().get_ifd(0x8769)[0x9003] == "2024:05:06 07:08:09"
        if kind in ("png", "tiff"):
            assert np.allclose([float(number) for number in opened.info["dpi"]], 300, atol=0.1)
        if kind in ("tiff-lzw", "tiff-fax"):
            assert opened.info["compression"] == {"tiff-lzw": "tiff_lzw", "tiff-fax": "group4"}[kind]


@pytest.mark.parametrize("kind", LOSSY)
def test_what_loses_something_loses_no_more_the_second_time(kind: str) -> None:
    data, mode, file_format = LOSSY[kind]
    source = read_picture(data)
    assert (source.mode, source.format, source.size) == (mode, file_format, (WIDTH, HEIGHT))
    again = picture_bytes(source)
    copy = read_picture(again)
    assert (copy.mode, copy.format, copy.size) == (source.mode, source.format, source.size)
    assert copy.icc_profile == source.icc_profile
    first, second = (np.asarray(picture.rgb).astype(float) for picture in (source, copy))
    assert np.abs(first - second).mean() < (1 if file_format == "JPEG" else 2)
    if file_format == "JPEG":  # the source's own tables
        assert Image.open(io.BytesIO(again)).quantization == Image.open(io.BytesIO(data)).quantization
    if mode == "RGBA":
        assert np.abs(np.asarray(source.alpha).astype(int) - np.asarray(copy.alpha)).max() == 0


@pytest.mark.parametrize("mode", ["PNG", "TIFF"])
@pytest.mark.parametrize("channels", [3, 4])
def test_other_programs_read_our_sixteen_bits(mode: str, channels: int) -> None:
    data = picture_bytes(read_picture(DEEP[..., :channels]), mode)
    if mode == "TIFF":
        assert np.array_equal(tifffile.imread(io.BytesIO(data)), DEEP[..., :channels])
        return
    lines = np.frombuffer(zlib.decompress(data[data.index(b"IDAT") + 4 : data.index(b"IEND") - 8]), np.uint8)
    lines = lines.reshape(HEIGHT, -1)
    assert (lines[:, 0] == 1).all()  # each byte as the difference to the one before: added up, one by one
    step = 2 * channels
    bytes_ = lines[:, 1:].astype(int)
    for column in range(step, bytes_.shape[1]):
        bytes_[:, column] = (bytes_[:, column] + bytes_[:, column - step]) % 256
    assert np.array_equal(bytes_.astype(np.uint8).view(">u2").reshape(HEIGHT, WIDTH, channels), DEEP[..., :channels])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "deep"])
def test_the_cameras_rotation_is_applied_and_taken_back(file_format: str, orientation: int, tmp_path: Path) -> None:
    if file_format == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    turn: Callable[[np.ndarray], np.ndarray] = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: np.swapaxes(a, 0, 1), 6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(np.swapaxes(a, 0, 1), 2), 8: lambda a: np.rot90(a),
    }[orientation]  # fmt: skip
    if file_format == "deep":
        plain = deep_png(DEEP[..., :3])
        exif = exif_with(orientation).tobytes().removeprefix(b"Exif\x00\x00")
        chunk = struct.pack(">I", len(exif)) + b"eXIf" + exif + struct.pack(">I", zlib.crc32(b"eXIf" + exif))
        data = plain[:33] + chunk + plain[33:]
    else:
        options: dict[str, Any] = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}}.get(file_format, {})
        data = saved(SMOOTH_RGB, file_format, exif=exif_with(orientation), **options)
    source = read_picture(data)
    upright = turn(DEEP[..., :3] if file_format == "deep" else SMOOTH).astype(int)
    pixels = exact_colors(source).astype(int)
    tolerance = 30 if file_format in ("JPEG", "AVIF") else 0
    assert pixels.shape == upright.shape and np.abs(pixels - upright).max() <= tolerance
    assert np.abs(np.asarray(source.rgb).astype(int).shape[0] - upright.shape[0]) == 0

    path = save_picture(source, tmp_path / f"copy.{source.format}".lower().replace("jpeg", "jpg"))
    with Image.open(path) as stored:  # stored upright, and said to be so
        assert stored.getexif().get(0x0112, 1) == 1
        assert stored.size == (upright.shape[1], upright.shape[0])
        assert stored.getexif()[0x8298] == "(c) me"
    assert np.abs(exact_colors(read_picture(path)).astype(int) - upright).max() <= 1.5 * tolerance


def test_exif_is_kept_to_the_byte_but_for_orientation_sides_and_thumbnail() -> None:
    for order in ("<", ">"):
        entries = [(0x010F, 2, 4, b"me\x00\x00"), (0x0112, 3, 1, struct.pack(order + "HH", 6, 0))]
        details = [(0xA002, 4, 1, struct.pack(order + "I", HEIGHT)), (0xA003, 4, 1, struct.pack(order + "I", WIDTH))]
        entries.append((0x8769, 4, 1, struct.pack(order + "I", 50)))
        note = b"maker's own note"
        thumbnail_at = 50 + 2 + 24 + 4 + len(note) + 2 + 24 + 4
        second = [
            (0x0201, 4, 1, struct.pack(order + "I", thumbnail_at)),
            (0x0202, 4, 1, struct.pack(order + "I", len(THUMBNAIL))),
        ]

        def directory(rows: list[tuple[int, int, int, bytes]], following: int, order: str = order) -> bytes:
            body = b"".join(struct.pack(order + "HHI", *row[:3]) + row[3] for row in rows)
            return struct.pack(order + "H", len(rows)) + body + struct.pack(order + "I", following)

        head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8)
        second_at = 50 + 2 + 24 + 4 + len(note)
        plain = bytearray(
            head + directory(entries, second_at) + directory(details, 0) + note + directory(second, 0) + THUMBNAIL
        )
        assert len(head + directory(entries, 0)) == 50
        data = saved(SMOOTH_RGB, "JPEG", exif=b"Exif\x00\x00" + bytes(plain))
        source = read_picture(data)
        assert source.size == (HEIGHT, WIDTH)
        stored = Image.open(io.BytesIO(picture_bytes(source))).info["exif"]
        assert stored == source.exif and THUMBNAIL[5:15] not in stored
        wanted = plain.copy()
        wanted[wanted.index(entries[1][3]) : wanted.index(entries[1][3]) + 4] = struct.pack(order + "HH", 1, 0)
        # upright, the sides are those of the turned picture
        wanted[50 + 2 + 8 : 50 + 2 + 12] = struct.pack(order + "I", HEIGHT)
        wanted[50 + 2 + 20 : 50 + 2 + 24] = struct.pack(order + "I", WIDTH)
        wanted[46:50] = b"\x00" * 4
        wanted[-len(THUMBNAIL) :] = b"\x00" * len(THUMBNAIL)
        assert stored == b"Exif\x00\x00" + bytes(wanted)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_xmp_is_kept_upright(file_format: str) -> None:
    options: dict[str, Any] = {"xmp": XMP}
    if file_format == "PNG":
        options = {"pnginfo": PngInfo()}
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", XMP.decode())
    if file_format == "TIFF":
        options = {"tiffinfo": {700: XMP}}
    source = read_picture(saved(SMOOTH_RGB, file_format, **options))
    assert source.size == (HEIGHT, WIDTH)
    if file_format == "TIFF":  # Pillow takes it out
        assert source.xmp == XMP.replace(b'tiff:Orientation="6"', b"")
    else:
        assert source.xmp == XMP.replace(b'Orientation="6"', b'Orientation="1"')
    for written in ("JPEG", "PNG", "WEBP", "TIFF"):
        assert read_picture(picture_bytes(source, written)).xmp == source.xmp


def test_thumbnails_in_xmp_are_left_out() -> None:
    packet = XMP.replace(b"</rdf:RDF>", b"<xmp:Thumbnails><rdf:Alt>AAAA\nBBBB</rdf:Alt></xmp:Thumbnails></rdf:RDF>")
    source = read_picture(saved(SMOOTH_RGB, "JPEG", xmp=packet))
    assert source.xmp is not None and b"AAAA" not in source.xmp and source.xmp.endswith(b"</rdf:RDF></x:xmpmeta>")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif", ".gif", ".bmp", ".ppm"])
@pytest.mark.parametrize("kind", LOSSLESS)
def test_every_kind_can_be_written_in_every_format(kind: str, suffix: str, tmp_path: Path) -> None:
    source = read_picture(LOSSLESS[kind][0])
    copy = read_picture(save_picture(source, tmp_path / f"copy{suffix}"))
    assert copy.size == source.size
    first, second = (np.asarray(picture.rgb).astype(int) for picture in (source, copy))
    if suffix in (".png", ".tif", ".webp"):
        assert np.abs(first - second).max() <= 1
        assert (copy.alpha is None) == (source.alpha is None)
    elif suffix in (".bmp", ".ppm"):  # without transparency
        assert np.abs(first - second).max() <= 1


def test_a_profile_stays_with_the_kind_of_picture_it_describes() -> None:
    profile = bytearray(SRGB)
    profile[16:20] = b"CMYK"
    source = read_picture(saved(CMYK, "JPEG", icc_profile=bytes(profile), quality=95))
    assert source.icc_profile == bytes(profile)
    assert read_picture(picture_bytes(source)).icc_profile == bytes(profile)
    assert read_picture(picture_bytes(source, "PNG")).icc_profile is None
    assert source.native.info["icc_profile"] == bytes(profile)


def test_saving_refuses_what_cannot_be_written(tmp_path: Path) -> None:
    source = read_picture(RGB)
    with pytest.raises(ValueError, match=r"'\.xyz' is no picture's suffix here; choose one of \.avif"):
        save_picture(source, tmp_path / "a.xyz")
    with pytest.raises(ValueError, match="quality must be from 1 to 100, not 0"):
        picture_bytes(source, quality=0)
    with pytest.raises(ValueError, match="not written here; choose one of JPEG"):
        picture_bytes(source, "EPS")
    wide = read_picture(np.zeros((1, 17000, 3), np.uint8))
    with pytest.raises(ValueError, match=r"17000 x 1 picture.*WEBP.*Save it as PNG"):
        save_picture(wide, tmp_path / "a.webp")
    assert list(tmp_path.iterdir()) == []
    assert save_picture(read_picture(GRAY), tmp_path / "bare").read_bytes()[:4] == b"\x89PNG"


# ------------------------------------------------------------------------------------------------ HEIC


def test_heic_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    header = b"\x00\x00\x00\x1cftypheic\x00\x00\x00\x00mif1heicmiaf"
    with pytest.raises(ValueError, match=r'upload is a HEIC picture.*pip install "s2edit-pipeline\[heif\]".*JPEG'):
        read_picture(header, "upload")
    with pytest.raises(ImportError, match=r'pip install "s2edit-pipeline\[heif\]"'):
        picture_bytes(read_picture(RGB), "HEIF")


@pytest.mark.parametrize("orientation", [1, 6])
def test_heic_is_read_and_written(orientation: int, tmp_path: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    stream = io.BytesIO()
    big = SMOOTH_RGB.resize((140, 100), Image.Resampling.BICUBIC)
    exif = exif_with(orientation).tobytes()
    pillow_heif.from_pillow(big).save(stream, format="HEIF", quality=95, exif=exif, icc_profile=SRGB, xmp=XMP[:40])
    with open(tmp_path / "a.heic", "wb") as file:
        file.write(stream.getvalue())
    source = read_picture(tmp_path / "a.heic")
    upright = np.asarray(big) if orientation == 1 else np.rot90(np.asarray(big), -1)
    assert source.format == "HEIF" and source.icc_profile == SRGB and source.size == upright.shape[1::-1]
    assert np.abs(np.asarray(source.rgb).astype(int) - upright).mean() < 4
    assert source.xmp == XMP[:40]
    copy = read_picture(save_picture(source, tmp_path / "b.heic"))
    assert (copy.format, copy.size, copy.icc_profile) == (source.format, source.size, SRGB)
    assert np.abs(np.asarray(copy.rgb).astype(int) - upright).mean() < 4
    tags = Image.Exif()
    tags.load(copy.exif)
    assert tags[0x010F] == "Maker" and tags.get(0x0112, 1) == 1
    with pytest.raises(ValueError, match="can't be read as a picture"):
        read_picture(stream.getvalue()[:300])


# ------------------------------------------------------------------------------------------------ what comes in


def test_the_same_picture_from_every_source(tmp_path: Path) -> None:
    data = saved(RGB, "PNG")
    path = tmp_path / "ünï code.png"
    path.write_bytes(data)
    pipe_read, pipe_write = os.pipe()
    with os.fdopen(pipe_write, "wb") as end:
        end.write(data)
    with os.fdopen(pipe_read, "rb") as pipe:
        assert np.array_equal(np.asarray(read_picture(pipe).rgb), NOISE)
    with open(path, "rb") as file, tempfile.SpooledTemporaryFile(max_size=1000) as upload:
        upload.write(data)
        upload.seek(0)
        for image in (
            path, str(path), data, bytearray(data), memoryview(data), io.BytesIO(data), upload, file, RGB, [RGB],
            (path,), NOISE, NOISE[None], [NOISE], NOISE.transpose(2, 0, 1), NOISE.transpose(2, 0, 1)[None],
            torch.from_numpy(NOISE), torch.from_numpy(NOISE).permute(2, 0, 1)[None],
            torch.from_numpy(NOISE).permute(2, 0, 1).double() / 255,
        ):  # fmt: skip
            assert np.array_equal(np.asarray(read_picture(image).rgb), NOISE)
            assert np.array_equal(np.asarray(load_picture(image)), NOISE)
    picture = read_picture(path)
    assert read_picture(picture) is picture


def test_a_stream_is_read_from_where_it_stands_and_put_back() -> None:
    stream = io.BytesIO(b"header" + saved(RGB, "PNG"))
    stream.seek(6)
    assert np.array_equal(np.asarray(read_picture(stream).rgb), NOISE) and stream.tell() == 6
    stream.read()
    with pytest.raises(ValueError, match=r"image has been read to its end; call image\.seek\(0\) first"):
        read_picture(stream)


class Upload:
    """As web frameworks have them."""

    async def read(self, size: int = -1) -> bytes:
        return b""


class Broken(io.RawIOBase):
    def read(self, size: int = -1) -> bytes:
        raise OSError("the line was cut")


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ("https://a.b/c.png", ValueError, r"is a URL.*from diffusers\.utils import load_image; load_image\('https"),
        ("HTTP://a.b/c.png", ValueError, "is a URL"),
        ("data:image/png;base64," + base64.b64encode(b"x").decode(), ValueError, r"b64decode"),
        ("a\x00b.png", ValueError, "is not a file"),
        ("x" * 5000, ValueError, "is not a file"),
        (Path(__file__).parent, ValueError, "is not a file"),
        ("", ValueError, "is not a file"),
        (b"", ValueError, "it is empty"),
        (b"%PDF-1.7 ...", ValueError, "a document, not a picture"),
        (b"<?xml version='1.0'?><svg></svg>", ValueError, "a document, not a picture"),
        (b"GIF89a", ValueError, "can't be read as a picture"),
        (io.StringIO("text"), TypeError, r"open\(path, 'rb'\); it gave str"),
        (Upload(), TypeError, r"image\.file"),
        (Broken(), ValueError, "the line was cut"),
        ([], TypeError, "one picture, not 0"),
        ([RGB, RGB], TypeError, "one picture, not 2; call once for each"),
        ([[1, 2]], TypeError, "not list"),
        ({"image": RGB}, TypeError, "not dict"),
        (torch.zeros(3, 4, 4, device="meta"), ValueError, "without plain numbers"),
        (np.zeros((2, 4, 4, 3), np.uint8), ValueError, "as an array must be"),
        (np.zeros((4, 4), object), ValueError, "dtype object"),
        (np.zeros((4, 4), complex), ValueError, "dtype complex"),
        (np.float32(3), TypeError, "not float32"),
        (np.array(3.0), ValueError, "as an array must be"),
        (Image.fromarray(np.full((4, 4), 70000, np.int32)), ValueError, "whole numbers from 70000"),
        (Image.fromarray(np.full((4, 4), 7, np.float32)), ValueError, "Divide by 255"),
        (Image.new("LAB", (4, 4)), ValueError, r"mode 'LAB'.*convert\('RGB'\)"),
    ],
    ids=range(27),
)
def test_what_is_no_picture_is_refused_in_words(image: Any, error: type[Exception], message: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a coroutine that nobody awaited
        with pytest.raises(error, match=message):
            read_picture(image)
        if isinstance(image, Upload):
            gc.collect()
    assert asyncio.run(Upload().read()) == b""


LATENTS = np.random.default_rng(3).normal(size=(4, 16, 16)).astype(np.float32)


@pytest.mark.parametrize(
    "latents",
    [
        torch.from_numpy(LATENTS),
        torch.from_numpy(LATENTS)[None],
        torch.from_numpy(LATENTS)[None].half(),
        LATENTS,
        LATENTS.transpose(1, 2, 0),
        (LATENTS - LATENTS.min()) / np.ptp(LATENTS),  # scaled into [0, 1]
        torch.from_numpy(np.concatenate([LATENTS] * 4))[None],  # 16 channels
    ],
    ids=range(7),
)
def test_latents_are_no_picture(latents: Any) -> None:
    with pytest.raises(ValueError, match=r"look like latents.*pipe\.vae\.decode"):
        read_picture(latents)


def test_four_channels_are_rgba_where_the_fourth_is_like_an_alpha() -> None:
    unit = np.dstack([NOISE, np.where(ALPHA > 100, 255, 0)]) / 255.0
    for image in (unit, torch.from_numpy(unit).permute(2, 0, 1), torch.from_numpy(unit)[None]):
        assert read_picture(image).mode == "RGBA"
    for image in (np.dstack([NOISE, ALPHA]), torch.from_numpy(np.dstack([NOISE, ALPHA])).permute(2, 0, 1)):
        picture = read_picture(image)
        assert picture.mode == "RGBA" and np.array_equal(np.asarray(picture.alpha), ALPHA)
    with pytest.raises(ValueError, match="latents"):
        read_picture(np.dstack([NOISE, ALPHA]) / 255.0)  # no more than a few of its alphas are whole


def test_wide_numbers_that_are_small_are_eight_bits() -> None:
    gray = (NOISE[..., 0] // 2).astype(np.uint16)
    for image in (gray, Image.fromarray(gray), Image.fromarray(gray.astype(np.int32)), np.dstack([gray] * 3)):
        assert np.array_equal(np.asarray(read_picture(image).rgb)[..., 1], gray)


# ------------------------------------------------------------------------------------------------ too large


def header_of(kind: str, width: int, height: int) -> bytes:
    """The beginning of a file that says it is so large, and nothing behind it."""
    if kind == "PNG":
        data = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        chunk = struct.pack(">I", 13) + b"IHDR" + data + struct.pack(">I", zlib.crc32(b"IHDR" + data))
        return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    if kind == "BMP":
        return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    if kind == "GIF":
        return (
            b"GIF89a"
            + struct.pack("<HHBBB", width, height, 0x80, 0, 0)
            + bytes(6)
            + b","
            + bytes(9)
            + b"\x08\x01\x00\x00;"
        )
    return b"P6 %d %d 255\n" % (width, height)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "PPM"])
@pytest.mark.parametrize("size", [(65000, 65000), (14000, 13000), (13500, 13300)])
def test_absurd_sizes_are_refused_from_the_header(
    kind: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any) -> None:
        raise AssertionError("memory would be taken")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(ValueError, match=r"too many pixels|megapixels; at most 179"):
        read_picture(header_of(kind, *size))


def test_the_limit_also_holds_for_what_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture_modes, "MAX_PIXELS", HEIGHT * WIDTH - 1)
    for image in (NOISE, torch.from_numpy(NOISE), RGB, saved(RGB, "PNG")):
        with pytest.raises(ValueError, match=f"image is {WIDTH} x {HEIGHT}, .* megapixels; at most"):
            read_picture(image)


def test_long_files_are_refused_unread(tmp_path: Path) -> None:
    with open(tmp_path / "long.png", "wb") as file:
        file.truncate((1 << 30) + 1)  # a sparse file
    with pytest.raises(ValueError, match="bytes long; a picture's file may have 1,073,741,824 at most"):
        read_picture(tmp_path / "long.png")


def test_a_raw_file_is_not_taken_for_its_thumbnail() -> None:
    stream = io.BytesIO()
    tifffile.imwrite(stream, NOISE, photometric="rgb", subfiletype=1)
    with pytest.raises(ValueError, match=r"a camera's raw file.*develop it"):
        read_picture(stream.getvalue())


# ------------------------------------------------------------------------------------------------ damage


def damaged(data: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """One of six kinds of damage."""
    array = bytearray(data)
    kind = chance.randrange(6)
    if kind == 0:
        return data[: chance.randrange(len(data))]
    if kind == 1:  # single bytes, the header's more often
        for _ in range(chance.randint(1, 20)):
            array[chance.randrange(chance.choice([64, len(array)]) % len(array) or 1)] = chance.randrange(256)
    elif kind == 2:  # one stretch
        start = chance.randrange(len(array))
        array[start : start + chance.randint(1, 40)] = chance.randbytes(chance.randint(0, 40))
    elif kind == 3:  # a stretch once more
        start = chance.randrange(len(array))
        array[start:start] = array[start : start + chance.randint(1, 200)]
    elif kind == 4:  # another file's end
        other = chance.choice(others)
        return data[: chance.randrange(len(data))] + other[chance.randrange(len(other)) :]
    else:  # numbers turned to the largest
        start = chance.randrange(min(len(array), 200))
        array[start : start + 4] = b"\xff" * 4
    return bytes(array)


def test_damaged_files_give_a_picture_or_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else is raised, and no file stays open."""
    monkeypatch.setattr(picture_modes, "MAX_PIXELS", 1_000_000)  # to be quick
    originals = [entry[0] for entry in LOSSLESS.values()] + [entry[0] for entry in LOSSY.values()]
    chance = random.Random(7)
    descriptors = "/proc/self/fd"
    count = len(os.listdir(descriptors)) if os.path.isdir(descriptors) else 0
    outcomes = {"picture": 0, "words": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of what it found
        warnings.simplefilter("error", ResourceWarning)
        for number in range(600):
            data = damaged(originals[number % len(originals)], originals, chance)
            try:
                picture = read_picture(data)
            except ValueError as error:
                assert "image" in str(error) and len(str(error)) > 30
                outcomes["words"] += 1
                continue
            outcomes["picture"] += 1
            assert picture.rgb.size == picture.size and picture.rgb.mode == "RGB"
            assert picture.alpha is None or picture.alpha.size == picture.size
            np.asarray(picture.rgb)
            if number % 5 == 0:  # what could be read can be written
                again = read_picture(picture_bytes(picture, "PNG"))
                assert again.size == picture.size
        gc.collect()
    assert min(outcomes.values()) > 100, outcomes
    if count:
        assert len(os.listdir(descriptors)) == count


def test_reading_again_and_again_takes_no_more_memory() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    if not os.path.exists("/proc/self/statm"):
        pytest.skip("no /proc here")
    good = saved(Image.fromarray(np.tile(NOISE, (20, 20, 1))), "PNG")  # 0.7 MB as RGB
    bad = good[: len(good) // 2]
    for round_number in range(40):
        read_picture(good)
        with pytest.raises(ValueError):
            read_picture(bad)
        if round_number == 9:
            gc.collect()
            start = resident()
    gc.collect()
    assert resident() - start < 15e6


# ------------------------------------------------------------------------------------------------ new colours


BOX = (3, 4, 20, 15)
INSIDE = (slice(BOX[1], BOX[3]), slice(BOX[0], BOX[2]))


@pytest.mark.parametrize("kind", [*LOSSLESS, "jpeg-cmyk", "ycc", "hsv"])
def test_a_colour_that_stays_keeps_its_bits_and_a_new_one_is_shown(kind: str) -> None:
    if kind in ("ycc", "hsv"):
        source = read_picture(Image.fromarray(NOISE).convert({"ycc": "YCbCr", "hsv": "HSV"}[kind]))
    else:
        source = read_picture({**LOSSLESS, **LOSSY}[kind][0])
    before = exact_colors(source).copy()
    colors = source.colors(BOX).copy()
    assert np.array_equal(exact_colors(source.with_colors(BOX, colors)), before)
    changed = np.zeros(colors.shape[:2], bool)
    changed[2:7, 3:9] = True
    bright = np.iinfo(colors.dtype).max
    colors[changed] = (np.array([0.9, 0.5, 0.2]) * bright).astype(colors.dtype)
    result = source.with_colors(BOX, colors)
    assert (result.mode, result.size, result.format) == (source.mode, source.size, source.format)
    assert result.native.info.keys() == source.native.info.keys()
    everywhere = np.zeros((HEIGHT, WIDTH), bool)
    everywhere[INSIDE] = changed
    assert np.array_equal(exact_colors(result)[~everywhere], before[~everywhere])
    assert np.array_equal(exact_colors(source), before)  # the source is left alone
    if source.alpha is not None:
        assert np.array_equal(np.asarray(result.alpha), np.asarray(source.alpha))

    shown = result.colors(BOX)[changed].astype(float) / bright
    wanted = np.array([0.9, 0.5, 0.2])
    gray = float(wanted @ [0.299, 0.587, 0.114])
    native = source.native.mode
    if native == "1":  # dithered to about the same mean
        assert abs(shown.mean() - gray) < 0.2
    elif native == "P":
        opaque = np.ones(changed.sum(), bool) if source.alpha is None else np.asarray(source.alpha)[everywhere] == 255
        assert np.abs(shown[opaque] - wanted).max() < 0.03  # a free place took the colour
    elif source.alpha is not None:  # where little is opaque, no colour under it shows
        opaque = np.asarray(source.alpha)[everywhere] > 210
        assert opaque.any()
        assert np.abs(shown[opaque] - (gray if native == "LA" else wanted)).max() < 0.01
    else:
        tolerance = {"RGB": 1e-4, "CMYK": 0.006, "YCbCr": 0.02, "HSV": 0.02}.get(native, 0.004)
        target = np.full(3, gray) if native in ("L", "I;16", "F") else wanted
        assert np.abs(shown - target).max() < max(tolerance, 0.6 / bright)


@pytest.mark.parametrize("alpha", [1, 60, 200, 255])
def test_colours_under_alpha_show_as_wanted_on_white(alpha: int) -> None:
    """c a + 1 - a, by hand: any colour that is light enough to be shown through white is met."""
    rgba = np.dstack([NOISE, np.full((HEIGHT, WIDTH), alpha, np.uint8)])
    source = read_picture(rgba)
    share = alpha / 255
    new = RANDOM.integers(0, 256, (HEIGHT, WIDTH, 3))
    wanted = np.round(new * share + 255 * (1 - share)).astype(np.uint8)
    result = source.with_colors((0, 0, WIDTH, HEIGHT), wanted)
    straight = np.asarray(result.native).astype(float)
    assert np.array_equal(straight[..., 3], rgba[..., 3])
    shown = straight[..., :3] * share + 255 * (1 - share)
    assert np.abs(shown - wanted).max() <= 1.01


def test_cmyk_keeps_its_black_where_the_colour_allows() -> None:
    inks = np.dstack([NOISE // 2, np.full((HEIGHT, WIDTH), 90, np.uint8)])
    source = read_picture(Image.frombytes("CMYK", (WIDTH, HEIGHT), inks.tobytes()))
    colors = source.colors((0, 0, WIDTH, HEIGHT)).copy()
    colors[:, :10] //= 2  # darker: possible with the same black
    colors[:, 10:20] = 250  # lighter than this black allows
    result = source.with_colors((0, 0, WIDTH, HEIGHT), colors)
    after = np.asarray(result.native)
    assert (after[:, :10, 3] == 90).all() and (after[:, 10:20, 3] == 5).all()
    assert np.array_equal(after[:, 20:], inks[:, 20:])
    assert np.abs(np.asarray(result.native.convert("RGB")).astype(int) - colors).max() <= 2


def test_a_full_palette_is_dithered_and_nothing_becomes_transparent() -> None:
    image = Image.fromarray(SMOOTH).quantize(256)
    stored = np.arange(256, dtype=np.uint8)
    indices = np.array(image)
    indices.ravel()[:256] = stored  # each place is in use
    full = Image.frombytes("P", image.size, indices.tobytes())
    full.putpalette(image.getpalette())
    full.info["transparency"] = 3
    source = read_picture(full)
    box = (0, 10, WIDTH, HEIGHT)
    wanted = source.colors(box)[::-1, ::-1].copy()
    result = source.with_colors(box, wanted)
    assert result.mode == "P" and np.array_equal(np.asarray(result.native)[:10], indices[:10])
    assert result.native.getpalette()[: 3 * 256] == full.getpalette()[: 3 * 256]
    assert np.array_equal(np.asarray(result.alpha), np.asarray(source.alpha))
    assert np.abs(result.colors(box).astype(float).mean((0, 1)) - wanted.mean((0, 1))).max() < 6
    wide = source.widened()
    assert wide.mode == "RGBA" and np.array_equal(np.asarray(wide.native), exact_colors(source))


def test_colours_of_another_shape_or_kind_are_refused() -> None:
    source = read_picture(RGB)
    with pytest.raises(ValueError, match=r"colors must be uint8 \(11, 17, 3\) for this box, not uint16"):
        source.with_colors(BOX, np.zeros((11, 17, 3), np.uint16))
    with pytest.raises(ValueError, match=r"not uint8 \(5, 5, 3\)"):
        source.with_colors(BOX, np.zeros((5, 5, 3), np.uint8))
