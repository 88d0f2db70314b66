"""``seed=``, against a generator that the caller makes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from s2edit_pipeline import S2EditPipeline

SOURCE, TARGET = "a photo of a sad lady with glasses", "a photo of a smiling lady with glasses"


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fit(pipe: S2EditPipeline, picture: Image.Image, **more: Any) -> Any:
    return pipe.fit_identity(picture, SOURCE, "lady", method="token", num_steps=1, **more).rows["text_encoder"]


def invert(pipe: S2EditPipeline, picture: Image.Image, **more: Any) -> Any:
    return pipe.invert(picture, SOURCE, "edit_friendly", 2, **more).trajectory


def edit(pipe: S2EditPipeline, picture: Image.Image, **more: Any) -> Any:
    settings = {"inversion": "edit_friendly", "num_inference_steps": 2, "output_type": "np", "blend_words": False}
    return pipe(TARGET, picture, SOURCE, **settings, **more).images


def draw(pipe: S2EditPipeline, picture: Image.Image, **more: Any) -> Any:
    return pipe(TARGET, num_inference_steps=2, output_type="np", height=16, width=16, **more).images


CALLS = [fit, invert, edit, draw]


@pytest.mark.parametrize("call", CALLS)
def test_a_seed_is_a_generator_that_begins_there(
    call: Callable[..., Any], pipe: S2EditPipeline, picture: Image.Image
) -> None:
    made = [np.asarray(call(pipe, picture, seed=seed)) for seed in (3, np.int64(3), 4)]
    assert np.array_equal(made[0], call(pipe, picture, generator=seeded(3)))
    assert np.array_equal(made[0], made[1]) and not np.array_equal(made[0], made[2])


def test_of_a_list_each_picture_has_its_own(pipe: S2EditPipeline, picture: Image.Image) -> None:
    both = draw(pipe, picture, num_images_per_prompt=2, seed=[3, 4])
    apart = [draw(pipe, picture, seed=seed)[0] for seed in (3, 4)]
    np.testing.assert_allclose(both, apart, atol=1e-5)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"seed": 3, "generator": seeded(3)}, ValueError, "seed= and generator= both say what noise is drawn"),
        ({"seed": 0.5}, TypeError, "seed must be a whole number, or a list of them, not 0.5"),
        ({"seed": True}, TypeError, "seed must be a whole number"),
        ({"seed": -1}, ValueError, "seed must be from 0 to 2"),
        ({"generator": 3}, TypeError, "generator must be one torch.Generator for .*, not int; a number is a seed"),
    ],
)
def test_what_is_no_seed_is_refused(
    call: Callable[..., Any],
    pipe: S2EditPipeline,
    picture: Image.Image,
    arguments: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        call(pipe, picture, **arguments)


@pytest.mark.parametrize("call", [fit, invert, edit])
def test_one_pictures_noise_has_one_seed(call: Callable[..., Any], pipe: S2EditPipeline, picture: Image.Image) -> None:
    with pytest.raises(ValueError, match=r"generator must be one for .*, not a list of 2"):
        call(pipe, picture, seed=[1, 2])
