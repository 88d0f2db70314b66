"""Edits put back into photographs, against the formula written out with SciPy, true edits and the source's own bits."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage

from s2edit_pipeline.picture_compose import CHANGED, MOST_DRIFT, TONE_SHARE, UNCHANGED, compose, mask_warning
from s2edit_pipeline.picture_files import SourcePicture, read_picture
from s2edit_pipeline.picture_placement import Placement, place_picture

SIDE = 1024
BOX = (180, 20, 692, 532)


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    """A face with grain at full resolution: 1024 x 1024."""
    large = Image.fromarray(skimage.data.astronaut()).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    grain = np.random.default_rng(0).normal(0, 5, (SIDE, SIDE, 3))
    return Image.fromarray((np.asarray(large) + grain).round().clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def placement() -> Placement:
    return place_picture((SIDE, SIDE), 256, 32, BOX)


def disc(center: tuple[int, int], radius: int) -> Image.Image:
    mask = Image.new("L", (4 * SIDE, 4 * SIDE))
    (x, y), r = center, radius
    ImageDraw.Draw(mask).ellipse((4 * (x - r), 4 * (y - r), 4 * (x + r), 4 * (y + r)), fill=255)
    return mask.resize((SIDE, SIDE), Image.Resampling.BOX)


def with_disc(photograph: Image.Image) -> tuple[Image.Image, Image.Image]:
    """The true edit, a green disc on the face, and where it is."""
    shape = disc((440, 230), 60)
    truth = photograph.copy()
    truth.paste((40, 160, 90), mask=shape)
    return truth, shape


def autoencoded(picture: Image.Image, placement: Placement) -> np.ndarray:
    """On the canvas, blurred, as an autoencoder would: (H, W, 3) in [0, 1]."""
    canvas = placement.to_canvas(picture).filter(ImageFilter.GaussianBlur(1.0))
    return np.asarray(canvas).astype(np.float32) / 255


def cells_around(shape: Image.Image, placement: Placement, grown: int) -> np.ndarray:
    """(32, 32): the latents' cells that the shape touches, and ``grown`` more around them."""
    touched = placement.mask_to_canvas(np.asarray(shape) / 255.0).reshape(32, 8, 32, 8).max((1, 3)) > 0
    return ndimage.binary_dilation(touched, iterations=grown).astype(np.float32)


def colors_of(picture: SourcePicture | Image.Image) -> np.ndarray:
    image = picture.rgb if isinstance(picture, SourcePicture) else picture
    return np.asarray(image).astype(np.float64)


def decibels(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(np.mean((a - b) ** 2), 1e-9)))


# ------------------------------------------------------------------------------------------------ what stays


def native_kinds(photograph: Image.Image) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    small = photograph.crop((250, 50, 450, 250))
    array = np.asarray(small)
    alpha = Image.fromarray(rng.integers(0, 256, (200, 200), dtype=np.uint8))
    deep = (array.astype(np.uint16) // 2 + 60) * 257 + rng.integers(0, 200, (200, 200, 3), dtype=np.uint16)
    palette = small.quantize(256)
    palette.info["transparency"] = 9
    return {
        "RGB": small, "L": small.convert("L"), "1": small.convert("1"), "P": palette, "CMYK": small.convert("CMYK"),
        "RGBA": Image.merge("RGBA", [*small.split(), alpha]), "LA": Image.merge("LA", [small.convert("L"), alpha]),
        "I;16": Image.fromarray(deep[..., 0]), "RGB;16": deep, "YCbCr": small.convert("YCbCr"),
        "RGBA;16": np.dstack([deep, np.asarray(alpha).astype(np.uint16) * 257]),
        "F": Image.fromarray((deep[..., 1] / 65535).astype(np.float32)),
    }  # fmt: skip


KINDS = ["RGB", "L", "1", "P", "CMYK", "RGBA", "LA", "I;16", "RGB;16", "YCbCr", "RGBA;16", "F"]


@pytest.mark.parametrize("kind", KINDS)
def test_outside_the_mask_every_mode_keeps_its_bits(photograph: Image.Image, kind: str) -> None:
    source = read_picture(native_kinds(photograph)[kind])
    assert source.mode == kind
    placement = place_picture(source.size, 64, 8, (30, 20, 170, 160))
    rng = np.random.default_rng(2)
    height, width = placement.canvas_size[::-1]
    edited, reconstruction = rng.random((2, height, width, 3)).astype(np.float32)
    region = np.zeros((height // 8, width // 8), np.float32)
    region[2:6, 1:7] = 1
    result, mask = compose(source, edited, reconstruction, region, placement)
    assert (result.mode, result.size) == (source.mode, source.size)
    assert mask.mode == "L" and mask.size == source.size
    outside = np.asarray(mask) == 0
    assert 0.2 < outside.mean() < 0.95
    for before, after in ((source.native, result.native), (source.deep, result.deep)):
        if before is not None:
            assert np.array_equal(np.asarray(before)[outside], np.asarray(after)[outside])
    if source.alpha is not None:
        assert np.array_equal(np.asarray(source.alpha), np.asarray(result.alpha))
    changed = np.abs(colors_of(result) - colors_of(source)).max(-1)
    assert changed[np.asarray(mask) > 200].mean() > 10  # and inside there is an edit
    # an edit that changed nothing gives back the source, whatever the mode
    same, _ = compose(source, reconstruction, reconstruction, region, placement)
    assert np.array_equal(np.asarray(same.native), np.asarray(source.native))
    assert same.deep is None or np.array_equal(same.deep, source.deep)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.02, 0.9), st.integers(1, 3), st.integers(0, 12))
def test_nothing_changes_outside_the_region(seed: int, share: float, blobs: int, feather: int) -> None:
    """Whatever its form: the mask is 0 outside, and the picture as it was wherever the mask is 0."""
    rng = np.random.default_rng(seed)
    picture = Image.fromarray(rng.integers(0, 256, (150, 190, 3), dtype=np.uint8))
    placement = place_picture(picture.size, 64, 8, (11, 7, 155, 140))
    height, width = placement.canvas_size[::-1]
    cells = ndimage.gaussian_filter(rng.random((height // 8, width // 8)), blobs / 2)
    region = (cells > np.quantile(cells, 1 - share)).astype(np.float32)
    edited, reconstruction = rng.random((2, height, width, 3)).astype(np.float32)
    result, mask = compose(picture, edited, reconstruction, region, placement, feather=feather)
    values = np.asarray(mask)
    assert np.array_equal(np.asarray(result.native)[values == 0], np.asarray(picture)[values == 0])
    whole = np.kron(region, np.ones((8, 8), np.float32))
    if feather < 2:  # without a border to fade in, the filter reaches one canvas pixel further
        whole = ndimage.grey_dilation(whole, (3, 3))
    left, top, right, bottom = placement.box
    middles = np.mgrid[top:bottom, left:right].reshape(2, -1).T[:, ::-1] + 0.5
    columns, rows = np.floor(placement.canvas_points(middles)).astype(int).T
    assert (values[top:bottom, left:right].ravel()[whole[rows, columns] == 0] == 0).all()
    values = values.copy()
    values[top:bottom, left:right] = 0
    assert not values.any()


def test_an_edit_that_changed_nothing_gives_back_the_photograph(photograph: Image.Image, placement: Placement) -> None:
    unedited = autoencoded(photograph, placement)
    result, mask = compose(photograph, unedited, unedited, None, placement)
    assert np.array_equal(np.asarray(result.native), np.asarray(photograph))
    assert np.asarray(mask).max() == 255
    untouched, empty = compose(photograph, 1 - unedited, unedited, np.zeros((32, 32)), placement)
    assert np.array_equal(np.asarray(untouched.native), np.asarray(photograph)) and np.asarray(empty).max() == 0


# ------------------------------------------------------------------------------------------------ the formula


def octagon(steps: int) -> np.ndarray:
    """What ``steps`` growings, by four neighbours and by eight in turn, reach."""
    reach = np.zeros((2 * steps + 1, 2 * steps + 1), bool)
    reach[steps, steps] = True
    for step in range(steps):
        form = np.ones((3, 3), bool) if step % 2 else ndimage.generate_binary_structure(2, 1)
        reach = ndimage.binary_dilation(reach, form)
    return reach


def gain_by_scipy(difference: np.ndarray) -> np.ndarray:
    """g in float64."""
    tone = difference.astype(np.float64)
    for _ in range(2):
        tone = ndimage.uniform_filter(tone, (9, 9, 1), mode="nearest")
    structure = ndimage.grey_dilation(np.abs(difference - tone).max(-1), footprint=octagon(3), mode="nearest")
    change = ndimage.uniform_filter(structure + TONE_SHARE * np.abs(tone).max(-1), 3, mode="nearest")
    share = ((change - UNCHANGED) / (CHANGED - UNCHANGED)).clip(0, 1)
    return 1 - (3 * share**2 - 2 * share**3)


@pytest.mark.parametrize("amount", [0.03, 0.3, 0.5])
def test_inside_the_region_it_is_the_edit_and_what_the_model_lost(
    photograph: Image.Image, placement: Placement, amount: float
) -> None:
    """edited + g (source - reconstruction), each written out, deep inside where nothing is faded."""
    reconstruction = autoencoded(photograph, placement)
    rng = np.random.default_rng(3)
    blobs = ndimage.gaussian_filter(rng.normal(size=reconstruction.shape), (6, 6, 0))
    blobs *= amount / np.abs(blobs).max()
    edited = (reconstruction + blobs).clip(0, 1).astype(np.float32)
    whole = place_picture((SIDE, SIDE), 256, 32)  # all of the picture: it has no border to match the tone along
    whole_edit = np.zeros((256, 256, 3), np.float32)
    whole_unedited = autoencoded(photograph, whole)
    whole_edit[:] = (whole_unedited + blobs[:256, :256]).clip(0, 1)
    result, mask = compose(photograph, whole_edit, whole_unedited, None, whole)
    assert np.asarray(mask).min() == 255
    del edited
    g = np.asarray(Image.fromarray(gain_by_scipy(whole_edit - whole_unedited).astype(np.float32)))
    sampled_gain = whole.from_canvas(g, resample=Image.Resampling.BILINEAR)[..., None].astype(np.float64)
    edit_there, model_there = (whole.from_canvas(values).astype(np.float64) for values in (whole_edit, whole_unedited))
    wanted = edit_there + sampled_gain * (colors_of(photograph) / 255 - model_there)
    assert np.abs(colors_of(result) - (wanted * 255).clip(0, 255)).max() <= 0.51
    spread = {0.03: (0.99, 1), 0.3: (0.7, 0.98), 0.5: (0.3, 0.7)}[amount]
    assert spread[0] < sampled_gain.mean() <= spread[1]  # the whole range of the gain is met


def test_tanned_skin_keeps_its_grain_and_a_new_thing_has_none_of_the_old(
    photograph: Image.Image, placement: Placement
) -> None:
    unedited = autoencoded(photograph, placement)
    softly = ndimage.gaussian_filter(np.asarray(disc((440, 230), 90)) / 255.0, 12)[..., None]
    tanned = Image.fromarray((colors_of(photograph) * (1 - softly * [0.2, 0.3, 0.4])).round().astype(np.uint8))
    replaced, shape = with_disc(photograph)

    def grain(picture: np.ndarray) -> np.ndarray:
        return picture - ndimage.gaussian_filter(picture, (2, 2, 0))

    grains = {}
    for name, truth in (("tan", tanned), ("disc", replaced)):
        result, _ = compose(
            photograph, autoencoded(truth, placement), unedited, cells_around(shape, placement, 4), placement
        )
        middle = np.asarray(disc((440, 230), 45)) > 0
        of_source, of_result = grain(colors_of(photograph))[middle], grain(colors_of(result))[middle]
        grains[name] = float((of_source * of_result).sum() / np.square(of_source).sum())
    assert 0.35 < grains["tan"] < 1 and abs(grains["disc"]) < 0.03, grains


def test_a_true_edit_is_met_and_the_rest_keeps_its_grain(photograph: Image.Image, placement: Placement) -> None:
    truth, shape = with_disc(photograph)
    edited, unedited = autoencoded(truth, placement), autoencoded(photograph, placement)
    region = cells_around(shape, placement, 2)
    result, mask = compose(photograph, edited, unedited, region, placement)
    inside = np.asarray(mask) > 0
    pasted = placement.paste(photograph, Image.fromarray((edited * 255).round().astype(np.uint8)))
    ours, plain = (decibels(colors_of(p)[inside], colors_of(truth)[inside]) for p in (result, pasted))
    assert ours > 29 and ours > plain + 1.2, (ours, plain)
    disc_alone = np.asarray(disc((440, 230), 52)) > 0
    assert decibels(colors_of(result)[disc_alone], colors_of(truth)[disc_alone]) > 45
    beside = inside & (np.asarray(disc((440, 230), 76)) == 0)  # in the region, but not edited
    assert beside.sum() > 1000
    assert decibels(colors_of(result)[beside], colors_of(truth)[beside]) > 45
    assert decibels(colors_of(pasted)[beside], colors_of(truth)[beside]) < 35  # which the model alone doesn't keep


# ------------------------------------------------------------------------------------------------ the border


def largest_jump(picture: np.ndarray, values: np.ndarray) -> float:
    """The largest difference between the tones of neighbours of which one lies in the mask and one doesn't: means over
    three by three pixels, so that it isn't the grain's."""
    smooth = ndimage.uniform_filter(picture, (3, 3, 1))
    jumps = []
    for axis in (0, 1):
        first, second = (np.moveaxis(a, axis, 0)[:-3] for a in (smooth, np.roll(smooth, -3, axis)))
        borders = np.moveaxis((values > 0) != np.roll(values > 0, -3, axis), axis, 0)[:-3]
        jumps.append(np.abs(first - second)[borders].max())
    return float(max(jumps))


@pytest.mark.parametrize("drift", [(0.0, 0.0, 0.0), (0.03, -0.02, 0.02), (-0.04, -0.04, -0.04)])
def test_there_is_no_seam(photograph: Image.Image, placement: Placement, drift: tuple[float, float, float]) -> None:
    """The tone drifts by some levels everywhere, as edits do: along the border nothing jumps that doesn't in truth."""
    truth, shape = with_disc(photograph)
    offset = np.array(drift, np.float32)
    edited = (autoencoded(truth, placement) + offset).clip(0, 1)
    region = cells_around(shape, placement, 2)
    result, mask = compose(photograph, edited, autoencoded(photograph, placement), region, placement)
    values = np.asarray(mask)
    assert largest_jump(colors_of(result), values) <= largest_jump(colors_of(truth), values) + 2
    # and the drift doesn't stay inside either: the skin between the disc and the border is the photograph's
    beside = (values == 255) & (np.asarray(disc((440, 230), 74)) == 0)
    remaining = (colors_of(result)[beside] - colors_of(photograph)[beside]).mean(0)
    assert np.abs(remaining).max() <= 0.35 * np.abs(offset).max() * 255 + 0.3
    if any(drift):  # a paste of the same region has it all
        cut = np.asarray(placement.mask_from_canvas(np.kron(region, np.ones((8, 8))))) > 127
        pasted = np.where(
            cut[..., None],
            colors_of(placement.paste(photograph, Image.fromarray(np.uint8(edited * 255)))),
            colors_of(photograph),
        )
        assert np.abs((pasted - colors_of(photograph))[beside].mean(0)).max() > 3 * np.abs(remaining).max()


def test_a_large_change_along_the_border_is_the_edit_and_stays(photograph: Image.Image, placement: Placement) -> None:
    unedited = autoencoded(photograph, placement)
    region = np.zeros((32, 32), np.float32)
    region[8:24, 8:24] = 1
    edited = (unedited * 0.5).astype(np.float32)
    result, mask = compose(photograph, edited, unedited, region, placement)
    deep = np.asarray(mask) == 255
    assert deep.sum() > 20000
    share = colors_of(result)[deep].mean() / colors_of(photograph)[deep].mean()
    assert abs(share - 0.5) < 0.03 and MOST_DRIFT < 0.1


def test_the_edit_fades_in_from_the_border_but_not_from_the_pictures_own(photograph: Image.Image) -> None:
    corner = place_picture((SIDE, SIDE), 256, 32, (0, 0, 512, 512))
    black = np.zeros((256, 256, 3), np.float32)
    white = np.ones((256, 256, 3), np.float32)
    _, mask = compose(photograph, white, black, None, corner, feather=8)
    values = np.asarray(mask).astype(int)
    assert values[0, 0] == 255 and values[:400, :400].min() == 255  # to the picture's corner
    assert values[512:].max() == 0 and values[:, 512:].max() == 0
    along = values[100, :512]
    assert (np.diff(along) <= 0).all() and along[511] <= 8 and along[492] == 255 and 100 < along[502] < 155
    # over the feather it rises as a straight step blurred twice does: the same from the left as from above
    assert np.array_equal(values, values.T)


def test_the_stairs_of_the_cells_are_smoothed(placement: Placement, photograph: Image.Image) -> None:
    rows, columns = np.mgrid[0:32, 0:32]
    region = (rows + columns < 32).astype(np.float32)
    unedited = np.zeros((256, 256, 3), np.float32)
    _, mask = compose(photograph, unedited + 1, unedited, region, placement, feather=16)
    half = np.asarray(mask)[BOX[1] : BOX[3], BOX[0] : BOX[2]] > 127
    edge = half[100:400].sum(1) + np.arange(100, 400)  # a straight line at 45 degrees is constant here
    assert np.ptp(edge) <= 7  # the stairs are 16 pixels of the picture wide


@pytest.mark.parametrize("width", [1, 2, 3, 5, 8])
def test_a_thin_region_has_its_edit(photograph: Image.Image, placement: Placement, width: int) -> None:
    """A stroke thinner than the feather isn't faded away."""
    region = np.zeros((256, 256), np.float32)
    region[100 : 100 + width, 40:200] = 1
    unedited = np.full((256, 256, 3), 0.5, np.float32)
    _, mask = compose(photograph, np.ones_like(unedited), unedited, region, placement)
    values = np.asarray(mask)[:, 400]
    assert values.max() > (180 if width == 1 else 250)  # one pixel's own peak is lost between two of the picture's
    rows = np.flatnonzero(values)
    assert abs(rows.mean() - (BOX[1] + 2 * (100 + width / 2) - 0.5)) < 0.6
    assert len(rows) <= 2 * width + 2


def test_regions_of_every_form(photograph: Image.Image, placement: Placement) -> None:
    unedited = autoencoded(photograph, placement)
    cells = np.zeros((32, 32), bool)
    cells[10:20, 8:24] = True
    edited = 1 - unedited
    wanted = np.asarray(compose(photograph, edited, unedited, cells, placement)[0].native)
    forms: list[Any] = [
        cells.astype(np.float32), cells.astype(np.uint8), torch.from_numpy(cells), torch.from_numpy(cells)[None, None],
        Image.fromarray(cells.astype(np.uint8) * 255),
    ]  # fmt: skip
    for region in forms:
        assert np.array_equal(np.asarray(compose(photograph, edited, unedited, region, placement)[0].native), wanted)
    tensors = [torch.from_numpy(a).permute(2, 0, 1) for a in (edited, unedited)]
    for batch in (tensors, [t[None] for t in tensors]):
        assert np.array_equal(np.asarray(compose(photograph, *batch, cells, placement)[0].native), wanted)
    eight_bits = [Image.fromarray((a * 255).round().astype(np.uint8)) for a in (edited, unedited)]
    close = np.asarray(compose(photograph, *eight_bits, cells, placement)[0].native)
    assert np.abs(close.astype(int) - wanted).max() <= 3


def test_a_mask_of_the_pictures_own_size_is_obeyed_to_the_pixel(photograph: Image.Image, placement: Placement) -> None:
    rng = np.random.default_rng(5)
    own = np.asarray(disc((440, 230), 80)) > 127
    own &= rng.random(own.shape) > 0.1  # with holes of single pixels
    unedited = autoencoded(photograph, placement)
    result, mask = compose(photograph, 1 - unedited, unedited, Image.fromarray(own), placement)
    assert (np.asarray(mask)[~own] == 0).all() and np.asarray(mask).max() == 255
    assert np.array_equal(np.asarray(result.native)[~own], np.asarray(photograph)[~own])


def test_a_soft_region_lets_through_as_much_as_it_says(photograph: Image.Image, placement: Placement) -> None:
    half = np.full((32, 32), 0.5, np.float32)
    unedited = np.zeros((256, 256, 3), np.float32)
    edited = np.ones((256, 256, 3), np.float32)
    result, mask = compose(photograph, edited, unedited, half, placement)
    middle = (slice(150, 400), slice(300, 600))
    assert set(np.unique(np.asarray(mask)[middle])) <= {127, 128}
    mean = (colors_of(photograph) * 0.5 + 255 * 0.5)[middle]
    assert np.abs(colors_of(result)[middle] - mean).max() <= 1


def test_without_a_reconstruction_the_source_stands_for_it(photograph: Image.Image, placement: Placement) -> None:
    truth, shape = with_disc(photograph)
    canvas = np.asarray(placement.to_canvas(photograph)).astype(np.float32) / 255
    edited = np.asarray(placement.to_canvas(truth)).astype(np.float32) / 255
    region = cells_around(shape, placement, 2)
    result, _ = compose(photograph, edited, None, region, placement)
    same, _ = compose(photograph, edited, canvas, region, placement)
    assert np.array_equal(np.asarray(result.native), np.asarray(same.native))


def test_the_source_is_left_alone_and_its_file_still_known(photograph: Image.Image, placement: Placement) -> None:
    source = read_picture(photograph)
    before = source.native.tobytes()
    unedited = autoencoded(photograph, placement)
    arrays = [unedited.copy(), (1 - unedited).copy(), np.ones((32, 32), np.float32)]
    copies = [a.copy() for a in arrays]
    result, _ = compose(source, arrays[1], arrays[0], arrays[2], placement)
    assert source.native.tobytes() == before and result is not source
    assert all(np.array_equal(a, b) for a, b in zip(arrays, copies, strict=True))
    assert (result.format, result.exif, result.icc_profile) == (source.format, source.exif, source.icc_profile)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"edited": np.zeros((5, 5, 3))}, r"edited is \(5, 5, 3\), and the canvas \(256, 256, 3\)"),
        ({"edited": np.full((256, 256, 3), -1.0)}, r"edited must lie in \[0, 1\]; it runs from -1.*\(x \+ 1\) / 2"),
        ({"edited": np.full((256, 256, 3), np.nan)}, "must lie in"),
        ({"reconstruction": torch.zeros(2, 3, 256, 256)}, r"reconstruction must be \(3, H, W\)"),
        ({"region": np.zeros((7, 7))}, "The region is 7 x 7; it must have"),
        ({"region": np.zeros((2, 7, 7))}, r"A mask must be \(H, W\), not \(2, 7, 7\)"),
        ({"source": np.zeros((9, 9, 3), np.uint8)}, r"The source is \(9, 9\) and the placement for \(1024, 1024\)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    photograph: Image.Image, placement: Placement, change: dict[str, Any], message: str
) -> None:
    plain = np.zeros((256, 256, 3), np.float32)
    given_: dict[str, Any] = {"source": photograph, "edited": plain, "reconstruction": plain, "region": None}
    with pytest.raises(ValueError, match=message):
        compose(**{**given_, **change}, placement=placement)


# ------------------------------------------------------------------------------------------------ masks, costs


def test_masks_to_warn_of() -> None:
    mask = np.zeros((100, 100), np.float32)
    assert "The mask is empty" in str(mask_warning(mask))
    mask[:1, :9] = 1
    tiny = str(mask_warning(mask))
    assert "covers 0.09% of the picture, too little" in tiny and 'crop="auto"' in tiny
    mask[:1, :10] = 1
    assert mask_warning(mask) is None
    mask[:90] = 1
    assert mask_warning(mask) is None
    mask[:91] = 1
    assert "edit_mask covers 91% of the picture" in str(
        mask_warning(Image.fromarray(np.uint8(mask * 255)), "edit_mask")
    )
    assert mask_warning(torch.full((1, 1, 4, 4), 0.4)) is not None  # nothing reaches half


COSTS = """
import time
import numpy as np, skimage.data
from PIL import Image
from s2edit_pipeline.picture_compose import compose
from s2edit_pipeline.picture_files import read_picture
from s2edit_pipeline.picture_placement import place_picture
source = read_picture(np.asarray(Image.fromarray(skimage.data.astronaut()).resize((4000, 3000))))
placement = place_picture(source.size, 512, 64)
unedited = np.asarray(placement.to_canvas(source.rgb)).astype(np.float32) / 255
def memory(kind):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(kind))
open("/proc/self/clear_refs", "w").write("5")  # from here on the peak is counted anew
resident = memory("VmRSS")
start = time.process_time()
compose(source, 1 - unedited, unedited, None, placement)
seconds = time.process_time() - start
print(seconds, memory("VmHWM") - resident)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_twelve_megapixels_take_seconds_and_little_memory() -> None:
    """All of the picture edited, the most there can be; on one core."""
    output = subprocess.run([sys.executable, "-c", COSTS], check=True, capture_output=True, text=True).stdout
    seconds, extra = (float(number) for number in output.split())
    assert extra < 300e6, extra
    assert seconds < 6, seconds  # 2 where nothing else runs
