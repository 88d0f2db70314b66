"""Pictures and masks as people have them, against Pillow's own conversions and written-out pixels."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from s2edit_pipeline import ReferenceAttribute, S2EditPipeline
from s2edit_pipeline.picture_inputs import load_mask, load_picture, picture_to_tensor


def pixels(height: int = 5, width: int = 7, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


RGB = pixels()
SOURCE = "a photo of a sad lady with glasses"


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(RGB),
        RGB,
        RGB[None],
        RGB.astype(np.uint16) * 257,
        RGB / 255.0,
        (RGB / 255.0).astype(np.float32),
        torch.from_numpy(RGB).permute(2, 0, 1),
        torch.from_numpy(RGB).permute(2, 0, 1)[None].float() / 255,
        np.concatenate([RGB, np.full_like(RGB[..., :1], 255)], -1),
    ],
    ids=lambda x: f"{type(x).__name__}-{getattr(x, 'dtype', '')}",
)
def test_the_same_picture_in_every_form(image: Any) -> None:
    found = load_picture(image)
    assert found.mode == "RGB" and np.array_equal(np.asarray(found), RGB)


def test_files_are_read_and_their_names_told_when_they_cannot_be(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png")
    for path in (tmp_path / "a.png", str(tmp_path / "a.png")):
        assert np.array_equal(np.asarray(load_picture(path)), RGB)
    (tmp_path / "b.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"b\.png.* can't be read as a picture"):
        load_picture(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])  # cut off
    with pytest.raises(ValueError, match=r"c\.png.* can't be read"):
        load_picture(tmp_path / "c.png")
    with pytest.raises(ValueError, match="is not a file"):
        load_picture(tmp_path / "d.png")


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    grey = np.array([[0, 257, 32896, 254 * 257, 65535]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    found = np.asarray(load_picture(tmp_path / "deep.png"))
    assert found[0, :, 0].tolist() == [0, 1, 128, 254, 255]
    assert np.array_equal(found[..., 0], found[..., 2])


def test_cmyk_is_what_pillow_makes_of_it() -> None:
    cmyk = Image.fromarray(RGB).convert("CMYK")
    assert cmyk.mode == "CMYK"
    assert np.array_equal(np.asarray(load_picture(cmyk)), np.asarray(cmyk.convert("RGB")))
    # and by the formula: (255 - C)(255 - K) / 255
    assert np.array_equal(np.asarray(load_picture(cmyk)), RGB)


def test_transparency_lies_on_white() -> None:
    alpha = np.random.default_rng(1).integers(0, 256, (5, 7, 1), dtype=np.uint8)
    found = np.asarray(load_picture(Image.fromarray(np.concatenate([RGB, alpha], -1)))).astype(float)
    share = alpha / 255.0
    assert np.abs(found - (RGB * share + 255 * (1 - share))).max() <= 1
    grey = Image.fromarray(np.concatenate([RGB[..., :1], alpha], -1)[..., :2], "LA")
    wanted = RGB[..., :1] * share + 255 * (1 - share)
    assert np.abs(np.asarray(load_picture(grey)).astype(float)[..., :1] - wanted).max() <= 1


def test_palettes_with_a_transparent_colour() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    palette.info["transparency"] = 1
    assert np.asarray(load_picture(palette)).tolist() == [[[10, 20, 30], [255, 255, 255]]]


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (3, lambda a: a[::-1, ::-1]),
        (6, lambda a: np.rot90(a, -1)),
        (8, lambda a: np.rot90(a)),
        (2, lambda a: a[:, ::-1]),
    ],
)
def test_the_cameras_rotation_is_applied(tmp_path: Path, orientation: int, turn: Any) -> None:
    image = Image.fromarray(RGB)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "photo.png", exif=exif)
    assert np.array_equal(np.asarray(load_picture(tmp_path / "photo.png")), turn(RGB))


@pytest.mark.parametrize(
    ("image", "error", "said"),
    [
        (np.zeros((0, 5, 3), np.uint8), ValueError, "no pixels"),
        (Image.new("RGB", (0, 4)), ValueError, "no pixels: it is 0 x 4"),
        (np.zeros((5, 7, 2), np.uint8), ValueError, r"\(H, W\), \(H, W, 3\) or \(H, W, 4\), not \(5, 7, 2\)"),
        (np.full((5, 7, 3), 200.0), ValueError, "Divide by 255"),
        (np.full((5, 7, 3), -0.5), ValueError, r"\(image \+ 1\) / 2"),
        (np.full((5, 7, 3), np.nan), ValueError, "must lie in"),
        (np.zeros((5, 7, 3), np.int64), ValueError, "dtype int64"),
        (torch.zeros(5, 7), ValueError, r"\(3, H, W\)"),
        (torch.zeros(2, 3, 5, 7), ValueError, r"\(3, H, W\)"),
        ([Image.fromarray(RGB)] * 2, TypeError, "one picture, not 2"),
        (7, TypeError, "not int"),
        (None, TypeError, "not NoneType"),
    ],
    ids=range(12),
)
def test_what_is_no_picture(image: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        load_picture(image)


def test_the_callers_picture_is_left_alone() -> None:
    image = Image.fromarray(RGB).convert("RGBA")
    before, mode = image.tobytes(), image.mode
    load_picture(image)
    assert (image.tobytes(), image.mode) == (before, mode)


def test_pixels_run_from_minus_one_to_one() -> None:
    found = picture_to_tensor(Image.fromarray(RGB))
    wanted = torch.from_numpy(RGB.astype(np.float64) / 127.5 - 1).permute(2, 0, 1)[None]
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-6)


HALF = np.zeros((6, 8), bool)
HALF[:, :4] = True


@pytest.mark.parametrize(
    "mask",
    [
        HALF,
        HALF.astype(np.uint8),
        HALF.astype(np.uint8) * 255,
        HALF.astype(np.float32),
        HALF.astype(np.int64),
        torch.from_numpy(HALF),
        torch.from_numpy(HALF).float()[None, None],
        Image.fromarray(HALF.astype(np.uint8) * 255),
        Image.fromarray(HALF),
        Image.fromarray(HALF.astype(np.uint8) * 255).convert("RGB"),
        np.kron(HALF, np.ones((3, 3), bool)),  # another size, the same shape
    ],
    ids=lambda x: f"{type(x).__name__}-{getattr(x, 'dtype', getattr(x, 'mode', ''))}-{np.shape(x)}",
)
def test_the_same_mask_in_every_form(mask: Any) -> None:
    found = load_mask(mask, (8, 6))
    assert found.dtype == torch.float32 and torch.equal(found, torch.from_numpy(HALF).float())


def test_masks_with_transparency() -> None:
    """Editors write them both ways: white on nothing, or any one colour on nothing."""
    alpha = (HALF * 255).astype(np.uint8)
    for shade in (255, 0):
        rgba = np.full((6, 8, 4), shade, np.uint8)
        rgba[..., 3] = alpha
        assert torch.equal(load_mask(Image.fromarray(rgba), (8, 6)), torch.from_numpy(HALF).float())
    rgba = np.zeros((6, 8, 4), np.uint8)  # black and transparent outside, white inside
    rgba[HALF] = 255
    assert torch.equal(load_mask(Image.fromarray(rgba), (8, 6)), torch.from_numpy(HALF).float())
    opaque = np.dstack([np.repeat(alpha[..., None], 3, -1), np.full((6, 8), 255, np.uint8)])
    assert torch.equal(load_mask(Image.fromarray(opaque), (8, 6)), torch.from_numpy(HALF).float())


@pytest.mark.parametrize(
    ("mask", "error", "said"),
    [
        (np.ones((8, 6), bool), ValueError, "mask is 6 x 8 and the picture 8 x 6.*resize"),
        (np.zeros((6, 8), bool), ValueError, "nothing inside"),
        (np.full((6, 8), 0.3), ValueError, "no value reaches half"),
        (np.full((6, 8), 3.0), ValueError, "mask is floating point"),
        ("nowhere.png", ValueError, "mask='nowhere.png' is not a file"),
        (7, TypeError, "mask must be"),
    ],
)
def test_what_is_no_mask(mask: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        load_mask(mask, (8, 6))


def test_every_call_takes_pictures_and_masks_as_files(
    pipe: S2EditPipeline, picture: Image.Image, half_mask: np.ndarray, tmp_path: Path
) -> None:
    mask, files = Image.fromarray(half_mask), (tmp_path / "a.png", tmp_path / "m.png")
    picture.save(files[0])
    mask.save(files[1])
    a, m = (file.read_bytes() for file in files)
    made = []
    for given, its_mask in ((picture, mask), files, (a, m), (io.BytesIO(a), io.BytesIO(m))):
        fit: dict[str, Any] = {"prompt": SOURCE, "subject": "lady", "method": "token", "num_steps": 1, "batch_size": 1}
        reference = ReferenceAttribute(given, SOURCE, "glasses", mask=its_mask)
        identity = pipe.fit_identity(given, **fit, mask=its_mask, reference=reference, seed=0)
        inversion = pipe.invert(given, SOURCE, num_inference_steps=1)
        edit = pipe("a happy lady", given, SOURCE, inversion=inversion, edit_mask=its_mask)
        made.append(
            [
                identity.rows["text_encoder"].tolist(),
                inversion.trajectory.tolist(),
                np.asarray(edit.images[0]).tolist(),
                np.asarray(pipe.preview_mask(given, SOURCE, "lady")).tolist(),
                pipe.describe(given, vocabulary="a {lady|man}").prompt,
            ]
        )
    assert all(one == made[0] for one in made)
