"""From attention to masks, against scipy-free naive loops, written-out cases and the avatars' own pixels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from s2edit_pipeline.attention_maps import MapRecorder
from s2edit_pipeline.attention_seam import AttentionSite
from s2edit_pipeline.noise_schedule import NoiseSchedule
from s2edit_pipeline.object_masks import (
    changed_cells,
    edit_region,
    gaussian_smooth,
    largest_component,
    mask_to_picture,
    threshold_map,
)
from s2edit_pipeline.object_search import MASK_LEVELS, object_mask


def noise_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sigma", [0.7, 1.5])
def test_smoothing_is_a_gaussian(sigma: float) -> None:
    values = noise_of(9, 13).double()
    reference = ndimage.gaussian_filter(values.numpy(), sigma, mode="nearest", radius=max(1, round(3 * sigma)))
    torch.testing.assert_close(gaussian_smooth(values, sigma), torch.from_numpy(reference), rtol=1e-9, atol=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.2, 0.8))
def test_the_largest_component_is_scipys(seed: int, share: float) -> None:
    mask = noise_of(8, 11, seed=seed) < share
    largest = largest_component(mask).numpy()
    labels, count = ndimage.label(mask.numpy())
    sizes = [int((labels == i + 1).sum()) for i in range(count)]
    assert largest.sum() == max(sizes, default=0)
    assert count == 0 or any(np.array_equal(largest, labels == i + 1) for i in range(count))


def test_a_map_becomes_the_blob_above_the_threshold() -> None:
    attention = torch.full((12, 12), 0.1)
    attention[2:8, 3:9] = 0.9  # the object
    attention[10:12, 0:2] = 0.9  # something else
    blob = torch.zeros(12, 12)
    blob[2:8, 3:9] = 1
    assert torch.equal(threshold_map(attention, 0.5, sigma=0.1), blob)
    assert torch.equal(threshold_map(attention * 7 + 3, 0.5, sigma=0.1), blob)  # any scale
    lower, higher = threshold_map(attention, 0.2), threshold_map(attention, 0.8)
    assert lower.sum() > blob.sum() > higher.sum()  # its border is soft


def test_a_word_that_looks_nowhere_is_refused() -> None:
    with pytest.raises(ValueError, match=r"same everywhere.*mask="):
        threshold_map(torch.full((8, 8), 0.3), 0.5)


def test_an_edit_region_is_the_union_over_words() -> None:
    a, b = torch.zeros(6, 6), torch.zeros(6, 6)
    a[1, 1], b[4, 4], b[4, 5] = 0.01, 0.5, 0.1  # each word by its own largest value
    union = torch.zeros(6, 6)
    union[0:3, 0:3] = union[3:6, 3:6] = 1  # spread by one cell
    assert torch.equal(edit_region([a, b], 0.4), union)
    assert torch.equal(edit_region([a], 0.4), torch.where(torch.arange(6) < 3, union, 0))


def test_a_word_that_looks_nowhere_may_change_nothing() -> None:
    assert float(edit_region([torch.zeros(4, 4)], 0.4).max()) == 0


def test_masks_as_pictures_are_black_and_white_at_the_given_size() -> None:
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
    source, edited = noise_of(3, 4, 5), noise_of(3, 4, 5) * 1.5 + 0.1
    cells = changed_cells(edited, source, threshold)
    change = [
        [math.sqrt(sum((float(edited[c, y, x]) - float(source[c, y, x])) ** 2 for c in range(3)) / 3) for x in range(5)]
        for y in range(4)
    ]
    most = max(max(row) for row in change)
    assert cells.tolist() == [[float(value >= threshold * most * (1 - 1e-6)) for value in row] for row in change]
    assert changed_cells(source, source, 0.2).sum() == 20  # nothing changed: nothing to tell apart


class Family:
    """A model with one layer, in which the word looks at another cell of 6 x 6 at each level."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.full, self.dtype = schedule, torch.float32
        self.calls: list[tuple[torch.Tensor, Any]] = []

    def schedule(self, num_inference_steps: int, size: tuple[int, int]) -> NoiseSchedule:
        assert num_inference_steps == self.full.num_steps and size == (48, 48)
        return self.full

    def training_schedule(self) -> NoiseSchedule:
        return self.full

    def pixel_size(self, latents: torch.Tensor) -> tuple[int, int]:
        return 8 * latents.shape[-2], 8 * latents.shape[-1]

    def encode(self, prompts: Any) -> str:
        return f"encoded {prompts[0].text}"

    @contextmanager
    def control_attention(self, controller: MapRecorder, height: int, width: int) -> Iterator[None]:
        self.recorder = controller
        yield

    def denoise(self, x: torch.Tensor, timestep: Any, embeds: str, dtype: torch.dtype) -> torch.Tensor:
        assert embeds == "encoded a lady" and dtype == torch.float32
        self.calls.append((x, timestep))
        probs = torch.full((1, 1, 36, 3), 0.01)
        probs[..., 8 + len(self.calls), 1] = 0.9
        self.recorder(probs, AttentionSite("layer", "cross", 6, 6, tells_words=True))
        return x


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_the_word_is_looked_for_at_each_level_in_the_noised_picture(kind: str) -> None:
    """The levels are shares of the way, the noise is always the same, and what is thresholded is the mean map. A
    flow's timesteps aren't whole numbers."""
    share = torch.linspace(0, 1, 21, dtype=torch.float64)
    signal, noise = ((1 - share).sqrt(), share.sqrt()) if kind == "epsilon" else (1 - share, share)
    schedule = NoiseSchedule(signal, noise, torch.arange(20) if kind == "epsilon" else share[1:].float(), kind)
    family: Any = Family(schedule)
    latents = noise_of(1, 4, 6, 6)
    prompt: Any = SimpleNamespace(text="a lady", find=lambda word: {"lady": (1,)}[word], word_columns=[0, 1])
    before = torch.get_rng_state()
    mask = object_mask(SimpleNamespace(family=family), latents, prompt, "lady", 0.5)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), before)

    generator, steps = torch.Generator().manual_seed(0), [round(20 * part) for part in MASK_LEVELS]
    assert len(family.calls) == len(steps) == 4
    for (x, timestep), level in zip(family.calls, steps, strict=True):
        drawn = torch.randn(latents.shape, generator=generator)
        torch.testing.assert_close(x, float(signal[level]) * latents + float(noise[level]) * drawn)
        assert timestep == schedule.timesteps[level - 1].item()
    mean = torch.full((36,), 0.01)
    mean[9:13] = (0.9 + 3 * 0.01) / 4
    assert torch.equal(mask, threshold_map(mean.view(6, 6), 0.5))
    assert 0 < mask.sum() < 36


def test_the_mask_of_a_person_is_the_person() -> None:
    """On the embedded model: the noun's mask against the renderer's own pixels of held-out people."""
    from s2edit_pipeline import load_avatars
    from s2edit_pipeline.avatars.captions import describe
    from s2edit_pipeline.avatars.world import part_masks, render, sample_person

    pipe = load_avatars()
    overlaps = []
    for seed in (3, 12, 5):
        person: Any = sample_person(seed, "held_out")
        mask = np.asarray(pipe.preview_mask(render(person), describe(person).text, person.noun)) > 127
        truth = part_masks(person, 128)["person"]
        overlaps.append(float((mask & truth).sum() / (mask | truth).sum()))
    assert min(overlaps) > 0.7, overlaps
