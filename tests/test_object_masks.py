"""From attention to masks, against scipy-free naive loops, written-out cases and the avatars' own pixels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from s2edit_pipeline.attention_controls import MapRecorder
from s2edit_pipeline.noise_schedule import NoiseSchedule
from s2edit_pipeline.object_masks import changed_cells, edit_region, feather, gaussian_smooth, largest_component, mask_to_picture, record_maps, threshold_map


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sigma", [0.7, 1.5])
def test_smoothing_is_a_gaussian(sigma: float) -> None:
    values = noise(9, 13).double()
    wanted = ndimage.gaussian_filter(values.numpy(), sigma, mode="nearest", radius=max(1, round(3 * sigma)))
    torch.testing.assert_close(gaussian_smooth(values, sigma), torch.from_numpy(wanted), rtol=1e-9, atol=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.2, 0.8))
def test_the_largest_component_is_scipys(seed: int, share: float) -> None:
    mask = noise(8, 11, seed=seed) < share
    found = largest_component(mask).numpy()
    labels, count = ndimage.label(mask.numpy())
    sizes = [int((labels == i + 1).sum()) for i in range(count)]
    assert found.sum() == max(sizes, default=0)
    assert count == 0 or any(np.array_equal(found, labels == i + 1) for i in range(count))


def test_a_map_becomes_the_blob_above_the_threshold() -> None:
    attention = torch.full((12, 12), 0.1)
    attention[2:8, 3:9] = 0.9  # the object
    attention[10:12, 0:2] = 0.9  # something else
    wanted = torch.zeros(12, 12)
    wanted[2:8, 3:9] = 1
    assert torch.equal(threshold_map(attention, 0.5, sigma=0.1), wanted)
    assert torch.equal(threshold_map(attention * 7 + 3, 0.5, sigma=0.1), wanted)  # any scale
    lower, higher = threshold_map(attention, 0.2), threshold_map(attention, 0.8)
    assert lower.sum() > wanted.sum() > higher.sum()  # its border is soft


def test_a_word_that_looks_nowhere_is_refused() -> None:
    with pytest.raises(ValueError, match=r"same everywhere.*mask="):
        threshold_map(torch.full((8, 8), 0.3), 0.5)


def test_an_edit_region_is_the_union_over_words() -> None:
    a, b = torch.zeros(6, 6), torch.zeros(6, 6)
    a[1, 1], b[4, 4], b[4, 5] = 0.01, 0.5, 0.1  # each word by its own largest value
    found = edit_region([a, b], 0.4)
    wanted = torch.zeros(6, 6)
    wanted[0:3, 0:3] = wanted[3:6, 3:6] = 1  # spread by one cell
    assert torch.equal(found, wanted)
    assert torch.equal(edit_region([a], 0.4), torch.where(torch.arange(6) < 3, wanted, 0))


@pytest.mark.parametrize("radius", [0, 2, 4])
def test_feathering_is_nothing_outside_and_whole_inside(radius: int) -> None:
    region = torch.zeros(6, 8)
    region[2:5, 0:5] = 1
    found = feather(region, 48, 64, radius)
    cells = torch.from_numpy(np.kron(region.numpy(), np.ones((8, 8))))
    assert float(found[cells == 0].abs().max()) == 0
    distance = torch.from_numpy(ndimage.distance_transform_cdt(np.pad(cells, 9, mode="edge"), "chessboard"))[9:-9, 9:-9]
    assert float(found[distance > 2 * radius].min()) == 1
    assert float(found[(distance > 0)].min()) > 0
    if radius:
        along = found[28, 20:44]  # out through the right border: only ever less
        assert bool((along.diff() <= 1e-6).all()) and 0 < float(along[16]) < 1


def test_a_word_that_looks_nowhere_may_change_nothing() -> None:
    assert float(edit_region([torch.zeros(4, 4)], 0.4).max()) == 0


def test_masks_as_pictures_are_black_and_white_at_the_size_asked_for() -> None:
    mask = torch.zeros(4, 6)
    mask[:, :3] = 1
    picture = mask_to_picture(mask, (60, 40))
    assert picture.size == (60, 40) and picture.mode == "L"
    values = np.asarray(picture)
    assert set(np.unique(values)) == {0, 255}
    assert values[:, :28].min() == 255 and values[:, 32:].max() == 0
    assert np.array_equal(np.asarray(mask_to_picture(mask, (6, 4))), (mask.numpy() * 255).astype(np.uint8))


@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0])
def test_cells_that_changed_little_beside_the_most_changed_one_are_left_out(threshold: float) -> None:
    source, edited = noise(3, 4, 5), noise(3, 4, 5) * 1.5 + 0.1
    found = changed_cells(edited, source, threshold)
    change = [
        [math.sqrt(sum((float(edited[c, y, x]) - float(source[c, y, x])) ** 2 for c in range(3)) / 3) for x in range(5)]
        for y in range(4)
    ]
    most = max(max(row) for row in change)
    assert found.tolist() == [[float(value >= threshold * most * (1 - 1e-6)) for value in row] for row in change]
    assert changed_cells(source, source, 0.2).sum() == 20  # nothing changed: nothing to tell apart


def test_maps_are_recorded_at_each_level_from_the_noised_picture() -> None:
    schedule = NoiseSchedule(torch.linspace(1, 0.01, 11, dtype=torch.float64), torch.arange(10), "epsilon")
    seen: list[tuple[torch.Tensor, int]] = []

    def denoise(x: torch.Tensor, level: int, prompt_embeds: torch.Tensor) -> torch.Tensor:
        seen.append((x, level))
        return x

    latents = noise(1, 4, 6, 6)
    record_maps(
        denoise, MapRecorder(9), latents, torch.zeros(1, 3, 2), schedule, [2, 7], torch.Generator().manual_seed(5)
    )
    generator = torch.Generator().manual_seed(5)
    for x, level in seen:
        a = float(schedule.alphas_bar[level])
        wanted = math.sqrt(a) * latents + math.sqrt(1 - a) * torch.randn(latents.shape, generator=generator)
        torch.testing.assert_close(x, wanted)
    assert [level for _, level in seen] == [2, 7]


def test_the_mask_of_a_person_is_the_person() -> None:
    """On the embedded model: the noun's mask against the renderer's own pixels of held-out people."""
    from s2edit_pipeline import load_avatars
    from s2edit_pipeline.avatars.captions import describe
    from s2edit_pipeline.avatars.world import part_masks, render, sample_person

    pipe = load_avatars()
    overlaps = []
    for seed in (3, 12, 5):
        person: Any = sample_person(seed, "held_out")
        found = np.asarray(pipe.preview_mask(render(person), describe(person).text, person.noun)) > 127
        truth = part_masks(person, 128)["person"]
        overlaps.append(float((found & truth).sum() / (found | truth).sum()))
    assert min(overlaps) > 0.7, overlaps
