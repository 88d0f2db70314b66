"""Where pictures lie on canvases, against the affine map in float64 and a filter written out pixel by pixel."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from s2edit_pipeline.picture_placement import (
    CLOSE_UP_SHARE,
    MAX_ASPECT_RATIO,
    Placement,
    close_up_box,
    place_picture,
    subject_box,
)

MODELS = st.sampled_from([(512, 64), (512, 8), (1024, 64), (1024, 16), (128, 16), (32, 4)])
SIDES = st.integers(1, 3000)


@st.composite
def boxes(draw: Any, width: int, height: int) -> tuple[int, int, int, int]:
    left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    return left, top, draw(st.integers(left + 1, width)), draw(st.integers(top + 1, height))


def size_of(box: tuple[int, int, int, int]) -> tuple[int, int]:
    return box[2] - box[0], box[3] - box[1]


def is_inside(inner: tuple[int, ...], outer: tuple[int, ...]) -> bool:
    return inner[0] >= outer[0] and inner[1] >= outer[1] and inner[2] <= outer[2] and inner[3] <= outer[3]


def ratio_of(size: tuple[int, int]) -> float:
    return max(size[0] / size[1], size[1] / size[0])


# ------------------------------------------------------------------------------------------------ the canvas


@settings(max_examples=300, deadline=None)
@given(SIDES, SIDES, MODELS, st.booleans(), st.data())
def test_a_canvas_fits_its_model_and_nothing_is_squeezed(
    width: int, height: int, model: tuple[int, int], extend: bool, data: Any
) -> None:
    native, multiple = model
    box = data.draw(st.one_of(st.none(), boxes(width, height)))
    part = (0, 0, width, height) if box is None else box
    if ratio_of(size_of(part)) > MAX_ASPECT_RATIO:
        with pytest.raises(ValueError, match=r"one side may be at most 4 times the other.*[Cc]rop"):
            place_picture((width, height), native, multiple, box)
        return
    placement = place_picture((width, height), native, multiple, box, extend=extend)
    wide, tall = placement.canvas_size
    assert wide % multiple == 0 and tall % multiple == 0
    # about the model's own area, as near as its multiples let it come
    assert 0.6 <= wide * tall / native**2 <= 1.7
    assert is_inside(part, placement.box) and is_inside(placement.box, (0, 0, width, height))
    assert is_inside(placement.content, (0, 0, wide, tall))
    if not extend:
        assert placement.box == part
    # each side of the content is within half a canvas pixel of one scale for both
    across, down = size_of(placement.box)
    scale = min(wide / across, tall / down)
    inner = size_of(placement.content)
    assert abs(inner[0] - across * scale) <= 0.5 + 1e-9 or inner[0] == 1
    assert abs(inner[1] - down * scale) <= 0.5 + 1e-9 or inner[1] == 1
    assert wide == inner[0] or tall == inner[1]
    # in the middle
    left, top, right, bottom = placement.content
    assert 0 <= (wide - right) - left <= 1 and 0 <= (tall - bottom) - top <= 1


@settings(max_examples=200, deadline=None)
@given(st.integers(200, 3000), st.integers(200, 3000), st.data())
def test_a_box_grows_into_real_surroundings(width: int, height: int, data: Any) -> None:
    box = data.draw(boxes(width, height))
    if ratio_of(size_of(box)) > MAX_ASPECT_RATIO:
        return
    placement = place_picture((width, height), 512, 64, box)
    (wide, tall), (across, down) = placement.canvas_size, size_of(placement.box)
    fills = abs(across * tall - down * wide) <= max(wide, tall)  # to the pixel
    assert fills or across == width or down == height


def test_canvases_of_common_photographs() -> None:
    for size, model, canvas in [
        ((512, 512), (512, 64), (512, 512)),
        ((4032, 3024), (512, 64), (576, 448)),
        ((3024, 4032), (512, 64), (448, 576)),
        ((4000, 3000), (512, 8), (576, 432)),  # 4:3 to the pixel
        ((1920, 1080), (1024, 64), (1344, 768)),
        ((4000, 3000), (1024, 16), (1152, 864)),
    ]:
        assert place_picture(size, *model).canvas_size == canvas


def test_sides_that_are_wished() -> None:
    assert place_picture((400, 200), 512, 64, height=256).canvas_size == (512, 256)
    assert place_picture((400, 200), 512, 64, width=256).canvas_size == (256, 128)
    narrow = place_picture((3, 4000), 512, 64, height=512, width=512)
    assert narrow.canvas_size == (512, 512) and size_of(narrow.content) == (1, 512)  # padded, not squeezed
    for bad in (500, 0, -64, 64.0):
        with pytest.raises(ValueError, match="height must be a positive multiple of 64"):
            place_picture((400, 200), 512, 64, height=bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("box", [(0, 0, 401, 10), (-1, 0, 5, 5), (5, 5, 5, 9), (0, 0, 1.5, 2), (1, 2, 3), "face", 7])
def test_a_box_outside_the_picture_is_refused(box: Any) -> None:
    with pytest.raises(
        ValueError, match=r"\(left, top, right, bottom\) in whole pixels inside the picture's 400 x 200"
    ):
        place_picture((400, 200), 512, 64, box)


# ------------------------------------------------------------------------------------------------ there and back


@settings(max_examples=200, deadline=None)
@given(SIDES, SIDES, MODELS, st.data())
def test_points_go_there_and_back(width: int, height: int, model: tuple[int, int], data: Any) -> None:
    box = data.draw(boxes(width, height))
    placement = place_picture((width, height), *model, box=box, height=model[0], width=model[0])
    left, top, right, bottom = placement.content
    corners = placement.canvas_points([placement.box[:2], placement.box[2:]])
    np.testing.assert_allclose(corners, [(left, top), (right, bottom)], rtol=1e-12)
    points = np.random.default_rng(0).uniform(0, max(width, height), (5, 2))
    np.testing.assert_allclose(placement.picture_points(placement.canvas_points(points)), points, rtol=1e-9, atol=1e-9)
    # by hand, one point
    x, y = points[0].tolist()
    by_hand = (
        left + (x - placement.box[0]) * (right - left) / (placement.box[2] - placement.box[0]),
        top + (y - placement.box[1]) * (bottom - top) / (placement.box[3] - placement.box[1]),
    )
    np.testing.assert_allclose(placement.canvas_points(points[0]), by_hand, rtol=1e-12)


def lanczos(t: float) -> float:
    return float(np.sinc(t) * np.sinc(t / 3)) if abs(t) < 3 else 0.0


def cubic(t: float) -> float:
    t = abs(t)  # Keys's, a = -1/2
    if t < 1:
        return 1.5 * t**3 - 2.5 * t**2 + 1
    return -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2 if t < 2 else 0.0


def triangle(t: float) -> float:
    return max(0.0, 1 - abs(t))


def sampled(values: np.ndarray, positions: np.ndarray, step: float, kernel: Any, reach: float) -> np.ndarray:
    """The first axis of ``values`` at ``positions``, in float64: the kernel as wide as ``step`` where that shrinks."""
    stretch = max(1.0, step)
    rows = []
    for center in positions:
        weights = np.array([kernel((index + 0.5 - center) / stretch) for index in range(len(values))])
        weights[np.abs(np.arange(len(values)) + 0.5 - center) > reach * stretch] = 0
        rows.append(np.tensordot(weights / weights.sum(), values, 1))
    return np.stack(rows)


PLACEMENTS = [
    place_picture((37, 23), 32, 4),
    place_picture((23, 37), 32, 8, (3, 4, 20, 33), extend=False),
    place_picture((61, 45), 32, 4, (11, 5, 48, 40)),
    place_picture((300, 211), 32, 4),
    Placement((30, 40), (2, 3, 25, 31), (24, 32), (1, 2, 22, 29)),
]


@pytest.mark.parametrize("placement", PLACEMENTS, ids=range(5))
def test_the_canvas_is_the_picture_seen_through_the_affine_map(placement: Placement) -> None:
    width, height = placement.picture_size
    picture = np.random.default_rng(1).uniform(0.3, 0.7, (height, width))  # no overshoot to be clipped
    left, top, right, bottom = placement.content
    wide, tall = placement.canvas_size
    # the picture's point below each canvas pixel's middle; around the content that of the nearest pixel in it
    columns = placement.picture_points([(x + 0.5, 0) for x in np.arange(wide).clip(left, right - 1)])[:, 0]
    rows = placement.picture_points([(0, y + 0.5) for y in np.arange(tall).clip(top, bottom - 1)])[:, 1]
    across, down = placement.scale
    naive = sampled(picture, rows, 1 / down, lanczos, 3)
    naive = sampled(naive.T, columns, 1 / across, lanczos, 3).T
    canvas = np.asarray(placement.to_canvas(Image.fromarray(picture.astype(np.float32))))
    np.testing.assert_allclose(canvas, naive, atol=2e-4)
    eight_bits = Image.fromarray((picture * 255).round().astype(np.uint8))
    rounded = np.asarray(placement.to_canvas(eight_bits)).astype(float)
    assert np.abs(rounded - (naive * 255).clip(0, 255)).max() <= 2  # rounded between the passes and once before


@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
@pytest.mark.parametrize("placement", PLACEMENTS, ids=range(5))
def test_the_way_back_is_the_same_map_the_other_way(placement: Placement, resample: Image.Resampling) -> None:
    wide, tall = placement.canvas_size
    canvas = np.random.default_rng(2).random((tall, wide)).astype(np.float32)
    kernel, reach = (cubic, 2) if resample == Image.Resampling.BICUBIC else (triangle, 1)
    left, top, right, bottom = placement.box
    columns = placement.canvas_points([(x + 0.5, 0) for x in range(left, right)])[:, 0]
    rows = placement.canvas_points([(0, y + 0.5) for y in range(top, bottom)])[:, 1]
    across, down = placement.scale
    naive = sampled(canvas.astype(float), rows, down, kernel, reach)
    naive = sampled(naive.T, columns, across, kernel, reach).T
    np.testing.assert_allclose(placement.from_canvas(canvas, resample=resample), naive, atol=2e-4)
    part = (left + 2, top + 3, right - 4, bottom - 5)
    np.testing.assert_allclose(placement.from_canvas(canvas, part, resample), naive[3:-5, 2:-4], atol=2e-4)


@settings(max_examples=60, deadline=None)
@given(st.integers(40, 400), st.integers(40, 400), st.data())
def test_a_ramp_comes_back_to_the_pixel(width: int, height: int, data: Any) -> None:
    """A picture whose values are its own coordinates: there and back again each pixel says where it is."""
    box = data.draw(boxes(width, height))
    if min(size_of(box)) < 20 or ratio_of(size_of(box)) > MAX_ASPECT_RATIO:
        return
    placement = place_picture((width, height), 64, 8, box, extend=data.draw(st.booleans()))
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    for coordinates, axis in ((x, 0), (y, 1)):
        canvas = placement.to_canvas(Image.fromarray(coordinates))
        back = np.asarray(placement.from_canvas(canvas))
        left, top, right, bottom = placement.box
        margin = math.ceil(6 * max(1, 1 / min(placement.scale)))  # as far as filters reach over the picture's edge
        inner = (slice(margin, -margin), slice(margin, -margin))
        wanted = coordinates[top:bottom, left:right]
        if min(wanted[inner].shape) > 0:
            assert np.abs(back[inner] - wanted[inner]).max() < 0.06, (placement, axis)  # Lanczos bends a ramp by a hair


def test_pictures_arrays_and_tensors_come_back_alike() -> None:
    placement = PLACEMENTS[2]
    wide, tall = placement.canvas_size
    colors = np.random.default_rng(3).uniform(0.3, 0.7, (tall, wide, 3)).astype(np.float32)
    array = placement.from_canvas(colors)
    assert array.shape == (*placement.box_size[::-1], 3) and array.dtype == np.float32
    tensor = placement.from_canvas(torch.from_numpy(colors).permute(2, 0, 1)[None])
    assert tensor.shape == (1, 3, *placement.box_size[::-1])
    assert np.array_equal(tensor[0].permute(1, 2, 0).numpy(), array)
    assert np.array_equal(placement.from_canvas(colors[..., 1]), array[..., 1])
    picture = placement.from_canvas(Image.fromarray((colors * 255).round().astype(np.uint8)))
    assert picture.size == placement.box_size and picture.mode == "RGB"
    assert np.abs(np.asarray(picture) - (array * 255).clip(0, 255)).max() <= 3


def test_masks_on_the_canvas_are_shares_of_area() -> None:
    placement = Placement((40, 30), (4, 2, 34, 22), (12, 16), (1, 2, 11, 12))  # three by two pixels become one
    mask = np.random.default_rng(4).random((30, 40)) > 0.5
    canvas = placement.mask_to_canvas(mask.astype(np.float32))
    assert canvas.shape == (16, 12)
    for y in range(10):
        for x in range(10):
            cell = mask[2 + 2 * y : 4 + 2 * y, 4 + 3 * x : 7 + 3 * x]
            assert abs(canvas[2 + y, 1 + x] - cell.mean()) < 1e-6
    around = canvas.copy()
    around[2:12, 1:11] = 0
    assert not around.any()
    tensor = placement.mask_to_canvas(torch.from_numpy(mask))
    assert isinstance(tensor, torch.Tensor) and np.array_equal(tensor.numpy(), canvas)
    gray = placement.mask_to_canvas(Image.fromarray(mask.astype(np.uint8) * 255))
    assert gray.mode == "L" and np.abs(np.asarray(gray) / 255 - canvas).max() < 0.005


def test_a_mask_comes_back_in_the_whole_picture() -> None:
    placement = PLACEMENTS[2]
    wide, tall = placement.canvas_size
    whole = placement.mask_from_canvas(np.ones((tall, wide), np.float32))
    left, top, right, bottom = placement.box
    inside = np.zeros((45, 61), np.uint8)
    inside[top:bottom, left:right] = 255
    assert whole.mode == "L" and np.array_equal(np.asarray(whole), inside)
    half = torch.zeros(1, 1, tall, wide)
    half[..., : wide // 2] = 1
    half_of = np.asarray(placement.mask_from_canvas(half))
    middle = (left + right) // 2
    assert half_of[top:bottom, left : middle - 3].min() == 255 and half_of[:, middle + 3 :].max() == 0


def test_a_paste_changes_the_box_alone() -> None:
    placement = PLACEMENTS[2]
    picture = Image.fromarray(np.random.default_rng(5).integers(0, 256, (45, 61, 3), dtype=np.uint8))
    before = picture.tobytes()
    canvas = Image.new("RGB", placement.canvas_size, (9, 8, 7))
    result = np.asarray(placement.paste(picture, canvas))
    left, top, right, bottom = placement.box
    inside = np.zeros((45, 61), bool)
    inside[top:bottom, left:right] = True
    assert (result[inside] == (9, 8, 7)).all() and np.array_equal(result[~inside], np.asarray(picture)[~inside])
    assert picture.tobytes() == before


def test_what_is_for_another_placement_is_refused() -> None:
    placement = PLACEMENTS[0]
    with pytest.raises(ValueError, match="The picture is 36 x 23, and this placement is for 37 x 23"):
        placement.to_canvas(Image.new("RGB", (36, 23)))
    with pytest.raises(ValueError, match=r"must be RGB, L or F, not P: picture\.convert\('RGB'\)"):
        placement.to_canvas(Image.new("P", (37, 23)))
    with pytest.raises(ValueError, match="The canvas is 5 x 5, and this placement is for"):
        placement.from_canvas(np.zeros((5, 5)))
    with pytest.raises(ValueError, match="The mask is 5 x 5"):
        placement.mask_to_canvas(np.zeros((5, 5)))
    with pytest.raises(ValueError, match="must lie in the placement's box"):
        placement.from_canvas(np.zeros(placement.canvas_size[::-1]), (0, 0, 38, 23))


# ------------------------------------------------------------------------------------------------ close-ups


@settings(max_examples=300, deadline=None)
@given(st.integers(20, 600), st.integers(20, 600), st.floats(0, 1), st.integers(1, 200), st.data())
def test_a_close_up_holds_the_subject_and_its_margin(
    width: int, height: int, margin: float, min_size: int, data: Any
) -> None:
    subject = data.draw(boxes(width, height))
    shape = data.draw(st.sampled_from([(1, 1), (576, 448), (448, 576), None]))
    mask = np.zeros((height, width), np.float32)
    mask[subject[1] : subject[3], subject[0] : subject[2]] = 1
    box = subject_box(mask, (width, height), margin, shape, min_size)
    assert is_inside(box, (0, 0, width, height)) and is_inside(subject, box)
    around = margin * max(size_of(subject))
    for axis, side in ((0, width), (1, height)):  # the margin, as far as the picture goes
        assert box[axis] <= max(0, subject[axis] - around + 1e-6)
        assert box[axis + 2] >= min(side, subject[axis + 2] + around - 1e-6)
    assert min(size_of(box)) >= min(min_size, width, height)
    across, down = size_of(box)
    if shape is not None and across < width and down < height:  # its shape, to the pixel
        assert abs(across * shape[1] - down * shape[0]) <= max(shape)
    if shape is None:
        shape = (max(1, across), max(1, down))
    # no larger than it has to be: a smaller one of this shape would not hold it, or be too small
    needed = [
        min(side, math.ceil(subject[axis + 2] + around)) - max(0, math.floor(subject[axis] - around))
        for axis, side in ((0, width), (1, height))
    ]
    unit = max(needed[0] / shape[0], needed[1] / shape[1], min_size / min(shape))
    assert across <= max(needed[0], unit * shape[0] + 1) and down <= max(needed[1], unit * shape[1] + 1)


def test_a_close_up_written_out() -> None:
    mask = np.zeros((300, 400), np.float32)
    mask[100:160, 200:240] = 1  # 40 x 60: 18 around it
    assert subject_box(mask, (400, 300)) == (172, 82, 268, 178)
    assert subject_box(mask, (400, 300), margin=0) == (188, 98, 252, 162)  # at least 64
    assert subject_box(mask, (400, 300), margin=0, min_size=1) == (190, 100, 250, 160)
    assert subject_box(mask, (400, 300), margin=0, shape=None, min_size=1) == (200, 100, 240, 160)
    assert subject_box(mask, (800, 600), margin=0, min_size=1) == (380, 200, 500, 320)  # of another resolution
    white = np.uint8(mask * 255)
    for same in (
        torch.from_numpy(mask), torch.from_numpy(mask)[None, None], Image.fromarray(white), white, np.uint8(mask),
        mask > 0, Image.fromarray(mask > 0), np.uint8(mask * 50 + 100), torch.from_numpy(white),
    ):  # fmt: skip
        assert subject_box(same, (400, 300)) == (172, 82, 268, 178)
    with pytest.raises(ValueError, match=r"A mask must be \(H, W\), not \(2, 3, 4\)"):
        subject_box(np.zeros((2, 3, 4)), (4, 3))
    corner = np.zeros((300, 400), bool)
    corner[:20, 380:] = True
    assert subject_box(corner, (400, 300), min_size=100) == (300, 0, 400, 100)
    with pytest.raises(ValueError, match=r"mask is empty.*crop=None"):
        subject_box(np.zeros((3, 4)), (400, 300))


def test_a_close_up_is_worth_it_where_the_subject_is_small() -> None:
    small, large = np.zeros((300, 400), bool), np.zeros((300, 400), bool)
    small[100:150, 200:240] = True
    large[20:280, 50:350] = True
    box = close_up_box(small, (400, 300))
    assert box is not None and box == subject_box(small, (400, 300))
    assert close_up_box(large, (400, 300)) is None
    area = size_of(box)[0] * size_of(box)[1] / 120000
    assert close_up_box(small, (400, 300), share=area * 0.99) is None
    assert close_up_box(small, (400, 300), share=area * 1.01) == box and area < CLOSE_UP_SHARE
    assert close_up_box(small, (400, 300), margin=0, min_size=10) == subject_box(small, (400, 300), 0, min_size=10)
