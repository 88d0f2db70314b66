"""The metrics against scikit-image and against loops over pixels."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from s2edit_pipeline.evaluation.metrics.pixels import psnr, ssim


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    """Two uint8 pictures, taller than wide, in which the second is the first with noise."""
    rng = np.random.default_rng(0)
    first = rng.integers(0, 256, (24, 17, 3), dtype=np.uint8)
    noise = rng.integers(-90, 91, first.shape)
    return first, np.clip(first + noise, 0, 255).astype(np.uint8)


def _naive_psnr(a: np.ndarray, b: np.ndarray, region: np.ndarray, peak: float) -> float:
    total, count = 0.0, 0
    for y in range(a.shape[0]):
        for x in range(a.shape[1]):
            if region[y, x]:
                for c in range(3):
                    total += (float(a[y, x, c]) - float(b[y, x, c])) ** 2
                    count += 1
    return 20 * math.log10(peak) - 10 * math.log10(total / count)


def test_psnr_is_scikit_images(pair: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = pair
    assert psnr(a, b) == pytest.approx(peak_signal_noise_ratio(a, b), abs=1e-9)
    x, y = a / 255, b / 255
    assert psnr(x, y) == pytest.approx(peak_signal_noise_ratio(x, y, data_range=1.0), abs=1e-9)
    x32, y32 = x.astype(np.float32), y.astype(np.float32)
    expected = peak_signal_noise_ratio(x32.astype(np.float64), y32.astype(np.float64), data_range=1.0)
    assert psnr(x32, y32) == pytest.approx(expected, abs=1e-9)


def test_pil_uint8_and_floating_point_pictures_mix(pair: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = pair
    expected = psnr(a, b)
    for first in (a, Image.fromarray(a), a / 255):
        for second in (b, Image.fromarray(b), b / 255):
            assert psnr(first, second) == pytest.approx(expected, abs=1e-9)


def test_psnr_of_a_region_is_a_loop_over_its_pixels(pair: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = pair
    rng = np.random.default_rng(1)
    for share in (0.02, 0.3, 1.0):
        region = rng.random(a.shape[:2]) < share
        region[3, 5] = True
        assert psnr(a, b, region) == pytest.approx(_naive_psnr(a, b, region, 255), abs=1e-9)
        assert psnr(a / 255, b / 255, region) == pytest.approx(_naive_psnr(a / 255, b / 255, region, 1), abs=1e-9)


def test_equal_pictures_are_infinitely_near(pair: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = pair
    assert psnr(a, a.copy()) == math.inf
    region = np.zeros(a.shape[:2], bool)
    region[:4] = True
    half = b.copy()
    half[:4] = a[:4]
    assert psnr(a, half, region) == math.inf and psnr(a, half, ~region) < 40


def test_the_arguments_stay_as_they_are(pair: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = pair
    copies = a.copy(), b.copy()
    psnr(a, b, a[..., 0] > 100)
    ssim(a, b)
    assert np.array_equal(a, copies[0]) and np.array_equal(b, copies[1])


def test_ssim_is_scikit_images(pair: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = pair
    expected = structural_similarity(a, b, channel_axis=2, data_range=255)
    assert 0 < expected < 0.95
    assert ssim(a, b) == pytest.approx(expected, abs=1e-9)
    assert ssim(Image.fromarray(a), b / 255) == pytest.approx(expected, abs=1e-9)
    assert ssim(a, a) == pytest.approx(1)


def test_ssim_without_scikit_image_says_what_to_install(
    pair: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    with pytest.raises(ImportError, match=r"pip install .s2edit-pipeline\[evaluation\]"):
        ssim(*pair)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_pictures_that_cannot_be_compared_are_refused(metric, pair: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = pair
    with pytest.raises(ValueError, match=r"differ in shape: \(24, 17, 3\) and \(17, 24, 3\); resize"):
        metric(a, b.transpose(1, 0, 2))
    with pytest.raises(ValueError, match=r"b must be a PIL picture or an array \(H, W, 3\), not of shape \(24, 17\)"):
        metric(a, b[..., 0])
    with pytest.raises(ValueError, match=r"a must be .* not of shape \(0, 17, 3\)"):
        metric(a[:0], b[:0])
    with pytest.raises(ValueError, match="b must be uint8 or floating point, not int64"):
        metric(a, b.astype(np.int64))
    with pytest.raises(ValueError, match=r"a is floating point and must lie in \[0, 1\], not \[0, 255\]"):
        metric(a.astype(np.float64), b)
    with pytest.raises(ValueError, match="b is floating point"):
        metric(a, np.full(a.shape, np.nan))


def test_regions_that_mean_nothing_are_refused(pair: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = pair
    with pytest.raises(ValueError, match="region is empty"):
        psnr(a, b, np.zeros((24, 17), bool))
    with pytest.raises(ValueError, match=r"region must be \(24, 17\) bool, not \(17, 24\) bool"):
        psnr(a, b, np.ones((17, 24), bool))
    with pytest.raises(ValueError, match=r"region must be \(24, 17\) bool, not \(24, 17\) float64"):
        psnr(a, b, np.ones((24, 17)))


def test_ssim_needs_a_whole_window(pair: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = pair
    with pytest.raises(ValueError, match="7 x 7 pixels; the pictures have 6 x 17"):
        ssim(a[:6], b[:6])
