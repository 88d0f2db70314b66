"""An inversion is walked back with what it was made with, or refused in words that name what is another now."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler
from peft import LoraConfig
from PIL import Image
from torch import nn

from s2edit_pipeline import Inversion, S2EditPipeline
from s2edit_pipeline.inversion_record import MadeWith

SOURCE, TARGET = "a photo of a sad lady", "a photo of a smiling lady"
WITH_TOKEN = "a photo of a smiling [I] lady"
STEPS = 2


def edit(pipe: S2EditPipeline, inversion: Inversion, target: str = TARGET, **arguments: Any) -> torch.Tensor:
    images: Any = pipe(target, inversion=inversion, output_type="latent", **arguments).images  # type: ignore[union-attr]
    return images


def refused(pipe: S2EditPipeline, inversion: Inversion, message: str, target: str = TARGET, **arguments: Any) -> None:
    """In these words, which also say how to go on, and before the model is evaluated."""
    evaluations: list[int] = []
    hook = pipe.unet.register_forward_pre_hook(lambda *_: evaluations.append(1))
    with pytest.raises(ValueError, match=rf"{message}.*invert again: pipe.invert\(image, prompt\)"):
        edit(pipe, inversion, target, **arguments)
    hook.remove()
    assert not evaluations


# ------------------------------------------------------------------------------ what is changed, and put back


@contextmanager
def other_scheduler(pipe: S2EditPipeline, **settings: Any) -> Iterator[None]:
    before = pipe.scheduler
    pipe.scheduler = DDIMScheduler.from_config(before.config, **settings)
    yield
    pipe.scheduler = before


@contextmanager
def noisy_weights(module: nn.Module) -> Iterator[None]:
    """N(0, 3e-4) added to each weight."""
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(3e-4 * torch.randn(parameter.shape, generator=generator))
    yield
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(before[name])


CHANGES: dict[str, tuple[Callable[[S2EditPipeline], Any], str]] = {
    "the scheduler's noise": (
        lambda pipe: other_scheduler(pipe, beta_end=0.013),
        r"another scheduler, or other settings of it: its noise levels differ",
    ),
    "the scheduler's steps": (
        lambda pipe: other_scheduler(pipe, timestep_spacing="trailing"),
        r"another scheduler, or other settings of it",
    ),
    "what the model predicts": (
        lambda pipe: other_scheduler(pipe, prediction_type="v_prediction"),
        r"another scheduler, or other settings of it",
    ),
    "the U-Net's weights": (lambda pipe: noisy_weights(pipe.unet), "made with other weights of the unet"),
    "the text encoder's weights": (
        lambda pipe: noisy_weights(pipe.text_encoder),
        "made with other weights of the text_encoder",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_model_is_refused_until_the_first_is_back(
    pipe: S2EditPipeline, picture: Image.Image, name: str
) -> None:
    change, message = CHANGES[name]
    inversion = pipe.invert(picture, SOURCE, num_inference_steps=STEPS)
    reference = edit(pipe, inversion)
    with change(pipe):
        refused(pipe, inversion, message)
        refused(pipe, inversion, message, image=picture)
        other = pipe.invert(picture, SOURCE, num_inference_steps=STEPS)
        edit(pipe, other)
    assert torch.equal(edit(pipe, inversion), reference)
    refused(pipe, other, message)


def test_what_is_the_same_by_another_name_is_accepted(pipe: S2EditPipeline, picture: Image.Image) -> None:
    """Another class of scheduler with the same levels; the same weights in another type."""
    inversion = pipe.invert(picture, SOURCE, num_inference_steps=STEPS)
    reference = edit(pipe, inversion)
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config)
    assert torch.equal(edit(pipe, inversion), reference)
    pipe.to(dtype=torch.float64)
    assert edit(pipe, inversion).dtype == torch.float64


# ------------------------------------------------------------------------------ LoRAs


def style(pipe: S2EditPipeline, name: str, seed: int) -> None:
    torch.manual_seed(seed)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), name)


def test_a_lora_its_strength_and_its_weights_count(pipe: S2EditPipeline, picture: Image.Image) -> None:
    bare = pipe.invert(picture, SOURCE, num_inference_steps=STEPS)
    style(pipe, "ink", 0)
    refused(pipe, bare, r"made with the LoRAs none, and active are ink in unet \(\w+\)")
    inked = pipe.invert(picture, SOURCE, num_inference_steps=STEPS)
    reference = edit(pipe, inked)

    pipe.set_adapters("ink", 0.5)  # its strength
    refused(pipe, inked, r"made with the LoRAs ink in unet \(\w+\), and active are ink in unet \(\w+\)")
    pipe.set_adapters("ink", 1.0)
    assert torch.equal(edit(pipe, inked), reference)

    weight = next(p for n, p in pipe.unet.named_parameters() if "lora_B.ink" in n)  # its weights
    before = weight.clone()
    with torch.no_grad():
        weight[0, 0] += 1e-3
    refused(pipe, inked, "made with the LoRAs ink in unet")
    with torch.no_grad():
        weight.copy_(before)
    assert torch.equal(edit(pipe, inked), reference)

    style(pipe, "oil", 1)  # another one beside it, then in its place
    pipe.set_adapters(["ink", "oil"])
    refused(pipe, inked, r"and active are ink in unet \(\w+\), oil in unet \(\w+\)")
    pipe.set_adapters("oil")
    refused(pipe, inked, r"and active are oil in unet \(\w+\)")

    pipe.disable_lora()
    refused(pipe, inked, "and active are none")
    edit(pipe, bare)
    pipe.enable_lora()
    pipe.set_adapters("ink")
    assert torch.equal(edit(pipe, inked), reference)
    pipe.delete_adapters(["ink", "oil"])
    edit(pipe, bare)


# ------------------------------------------------------------------------------ the picture and the words


def test_another_picture_is_refused(pipe: S2EditPipeline, picture: Image.Image) -> None:
    inversion = pipe.invert(picture, SOURCE, num_inference_steps=STEPS)
    reference = edit(pipe, inversion)
    for same in (picture, picture.copy(), np.asarray(picture)):
        assert torch.equal(edit(pipe, inversion, image=same), reference)
    pixels = np.asarray(picture).copy()
    pixels[3, 4, 1] += 1
    for other in (Image.fromarray(pixels), picture.resize((30, 32)), picture.transpose(Image.Transpose.ROTATE_180)):
        refused(pipe, inversion, r"made of another picture than image=; pass that one, or", image=other)


def test_an_inversion_of_another_kind_of_model_or_of_nothing_known(pipe: S2EditPipeline, picture: Image.Image) -> None:
    inversion = pipe.invert(picture, SOURCE, num_inference_steps=STEPS)
    foreign = replace(inversion, made_with=replace(inversion.made_with, family="FLUX.1"))
    refused(pipe, foreign, r"made with another model \(FLUX.1\)")
    refused(pipe, replace(inversion, made_with=MadeWith()), r"made with another model \(unknown\)")
    refused(pipe, replace(inversion, interrupted=True), "was stopped before its end")
    with pytest.raises(ValueError, match=r"has 5 latent channels, this model 4"):
        edit(pipe, replace(inversion, trajectory=torch.zeros(STEPS + 1, 5, 16, 16)))


def test_other_words_and_numbers_of_the_call(pipe: S2EditPipeline, picture: Image.Image) -> None:
    inversion = pipe.invert(picture, SOURCE, num_inference_steps=STEPS)
    for arguments, message in (
        ({"clip_skip": 1}, "made with clip_skip=None, not 1; use that, or invert again"),
        ({"num_inference_steps": 3}, r"num_inference_steps=3, but the inversion was made in 2; leave it out"),
        ({"source_prompt": "a photo of a lady"}, "made under 'a photo of a sad lady' and the edit's source prompt is"),
    ):
        with pytest.raises(ValueError, match=message):
            edit(pipe, inversion, **arguments)


# ------------------------------------------------------------------------------ identities


def test_an_identity_its_strength_and_its_mask_count(
    pipe: S2EditPipeline, picture: Image.Image, half_mask: np.ndarray
) -> None:
    """Also an identity that no prompt speaks of: it acts on every evaluation all the same."""
    identity, stranger = (
        pipe.fit_identity(
            picture, SOURCE, "lady", mask=half_mask, num_steps=1, learning_rate=0.05,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (0, 1)
    )  # fmt: skip
    bare = pipe.invert(picture, SOURCE, num_inference_steps=STEPS)
    pipe.load_identity(identity)
    refused(pipe, bare, r"made without the identity '\[I\]', which is loaded now")

    inversion = pipe.invert(picture, SOURCE, num_inference_steps=STEPS)
    silent = pipe.invert(picture, "a photo of a hat", num_inference_steps=STEPS)  # says nothing of it
    reference = edit(pipe, inversion, WITH_TOKEN)
    for one, changes in ((identity, {"scale": 0.5}), (identity, {"mask": 1.0 - half_mask}), (stranger, {})):
        pipe.unload_identity()
        pipe.load_identity(one, **changes)
        refused(pipe, inversion, r"the identity '\[I\]', and another identity, scale or mask is loaded", WITH_TOKEN)
    pipe.unload_identity()
    with pytest.raises(ValueError, match=r"'\[I\]' in 'a photo of a sad \[I\] lady'.*none of that name is loaded"):
        edit(pipe, inversion)
    refused(pipe, silent, r"the identity '\[I\]', and it isn't loaded under that name", "a photo of a red hat")
    edit(pipe, bare)
    pipe.load_identity(identity)
    assert torch.equal(edit(pipe, inversion, WITH_TOKEN), reference)
    pipe.load_identity(stranger, token="[J]")
    refused(pipe, inversion, r"made without the identity '\[J\]', which is loaded now", WITH_TOKEN)
    pipe.unload_identity("[J]")
    assert torch.equal(edit(pipe, inversion, WITH_TOKEN), reference)


def test_an_identity_that_a_call_brings_counts_like_a_loaded_one(
    pipe: S2EditPipeline, picture: Image.Image, half_mask: np.ndarray
) -> None:
    identity = pipe.fit_identity(picture, SOURCE, "lady", mask=half_mask, num_steps=1, learning_rate=0.05)
    inversion = pipe.invert(picture, SOURCE, num_inference_steps=STEPS, identity=identity)
    reference = edit(pipe, inversion, WITH_TOKEN, identity=identity)
    with pytest.raises(ValueError, match=r"none of that name is loaded.*pass identity=identity"):
        edit(pipe, inversion)
    pipe.load_identity(identity)
    assert torch.equal(edit(pipe, inversion, WITH_TOKEN), reference)
