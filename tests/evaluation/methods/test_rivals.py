"""The rivals against diffusers' own pipelines and against their formulas, on tiny random models."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
)
from PIL import Image

from s2edit_pipeline import S2EditPipeline
from s2edit_pipeline.avatars.instruct_training import widen_unet
from s2edit_pipeline.evaluation.methods.rivals import SINE, InstructPix2Pix, SDEdit, model_based_guidance
from s2edit_pipeline.fit_settings import RECIPES

SOURCE = "a photo of a smiling lady with glasses"
TARGETS = ["a photo of a sad lady with glasses", "a photo of a smiling lady with a red hat"]


def _array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def _same(a: Image.Image, b: Image.Image) -> bool:
    """Up to one level: batches of other sizes add up in another order."""
    return a.size == b.size and np.abs(_array(a) - _array(b)).max() <= 1


def _stock(cls: Any, pipe: S2EditPipeline, **changed: Any) -> Any:
    parts = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "tokenizer", "unet")}
    made = cls(
        **{**parts, **changed},
        scheduler=DDIMScheduler.from_config(pipe.scheduler.config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


# ---------------------------------------------------------------------------- SDEdit


def test_sdedit_is_diffusers_image_to_image(pipe: S2EditPipeline, picture: Image.Image) -> None:
    before = dict(pipe.scheduler.__dict__)
    method = SDEdit(pipe, strength=0.5, num_inference_steps=6, guidance_scale=3.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        edited = method.prepare(picture, SOURCE, "lady", 4)(TARGETS)
    stock = _stock(StableDiffusionImg2ImgPipeline, pipe)
    for target, image in zip(TARGETS, edited, strict=True):
        generator = torch.Generator().manual_seed(4)
        settings = {"strength": 0.5, "num_inference_steps": 6, "guidance_scale": 3.0, "generator": generator}
        assert _same(image, stock(target, image=picture, **settings).images[0])
    assert not _same(*edited)
    assert pipe.scheduler.__dict__ == before


def test_more_strength_moves_further_from_the_picture(pipe: S2EditPipeline, picture: Image.Image) -> None:
    far = []
    for strength in (0.2, 0.6, 1.0):
        edit = SDEdit(pipe, strength=strength, num_inference_steps=5).prepare(picture, SOURCE, "lady", 0)
        far.append(np.abs(_array(edit(TARGETS[:1])[0]) - _array(picture)).mean())
    assert far[0] < far[1] < far[2]


# ---------------------------------------------------------------------------- InstructPix2Pix


@pytest.fixture
def instructed(pipe: S2EditPipeline) -> Any:
    """A widened U-Net that has learned something of the picture: noise in its new channels."""
    unet = widen_unet(pipe.unet)
    with torch.no_grad():
        unet.conv_in.weight[:, 4:].normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    return _stock(StableDiffusionInstructPix2PixPipeline, pipe, unet=unet.eval())


def test_instruct_pix2pix_is_diffusers_told_the_target(instructed: Any, picture: Image.Image) -> None:
    method = InstructPix2Pix(instructed, num_inference_steps=4, guidance_scale=3.0, image_guidance_scale=1.8)
    edited = method.prepare(picture, SOURCE, "lady", 7)(TARGETS)
    for target, image in zip(TARGETS, edited, strict=True):
        generator = torch.Generator().manual_seed(7)
        settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "image_guidance_scale": 1.8}
        assert _same(image, instructed(target, image=picture, generator=generator, **settings).images[0])
    other = method.prepare(picture.transpose(Image.Transpose.ROTATE_90), SOURCE, "lady", 7)(TARGETS[:1])[0]
    assert not _same(other, edited[0])


def test_a_saved_folder_is_loaded_and_a_missing_one_explained(
    instructed: Any, picture: Image.Image, tmp_path: Any
) -> None:
    instructed.save_pretrained(str(tmp_path / "model"))
    given_model = InstructPix2Pix(instructed, num_inference_steps=2)
    loaded = InstructPix2Pix.from_folder(tmp_path / "model", num_inference_steps=2)
    images = [m.prepare(picture, SOURCE, "lady", 0)(TARGETS[:1])[0] for m in (given_model, loaded)]
    assert _same(*images)
    with pytest.raises(FileNotFoundError, match="s2edit train-instruct --out OUT"):
        InstructPix2Pix.from_folder(tmp_path)


# ---------------------------------------------------------------------------- SINE


def test_the_combined_score_is_the_papers_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    null, told, tuned = torch.randn(3, 2, 4, 3, 3, generator=generator)
    for v, w in ((0.4, 7.5), (1.0, 3.0), (0.0, 3.0), (0.75, 1.0)):
        got = model_based_guidance(null, told, tuned, 1 - v, w)
        for i in range(null.numel()):
            e, e_c, e_hat = (x.double().flatten()[i].item() for x in (null, told, tuned))
            assert got.flatten()[i].item() == pytest.approx(w * (v * e_c + (1 - v) * e_hat) + (1 - w) * e, abs=1e-5)


def _sine(pipe: S2EditPipeline, **settings: Any) -> SINE:
    small = {"num_inference_steps": 4, "fit_steps": 3, "learning_rate": 3e-3, "guidance_scale": 3.0}
    return SINE(pipe, **{**small, **settings})


def test_without_the_fine_tuned_model_sine_draws_the_target(pipe: S2EditPipeline, picture: Image.Image) -> None:
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    stock = _stock(StableDiffusionPipeline, pipe)
    drawn = stock(TARGETS[0], latents=noise, num_inference_steps=4, guidance_scale=3.0).images[0]
    for settings in ({"fine_tuned_weight": 0.0, "mixed_share": 1.0}, {"fine_tuned_weight": 1.0, "mixed_share": 0.0}):
        edited = _sine(pipe, **settings).prepare(picture, SOURCE, "lady", 5)(TARGETS[:1])[0]
        assert _same(edited, drawn)


def _encode(pipe: S2EditPipeline, prompt: str) -> torch.Tensor:
    """(1, T, D) with the identity that is loaded."""
    embeds: torch.Tensor = pipe.family.encode([pipe.family.tokenize(prompt)]).embeds
    return embeds


def test_with_the_fine_tuned_model_alone_the_targets_words_have_no_say(
    pipe: S2EditPipeline, picture: Image.Image
) -> None:
    weights = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    edited = _sine(pipe, fine_tuned_weight=1.0, mixed_share=1.0).prepare(picture, SOURCE, "lady", 5)(TARGETS)
    assert _same(*edited)
    # it is guided by the tuned model under its own prompt, away from the untuned one under none
    identity = pipe.fit_identity(
        picture, SOURCE, "lady", method="full", num_steps=3, learning_rate=3e-3, semantic_weight=0,
        spatial_control=False, generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    abar = pipe.scheduler.alphas_cumprod.double()
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    ids = torch.tensor(pipe.tokenizer([""], padding="max_length").input_ids)
    with torch.no_grad():
        null = pipe.text_encoder(ids).last_hidden_state
        for t in (751, 501, 251, 1):
            plain = pipe.unet(x, t, null).sample
            pipe.load_identity(identity)
            tuned_embeds = _encode(pipe, SOURCE.replace("lady", f"{identity.token} lady"))
            told = pipe.unet(x, t, tuned_embeds).sample
            pipe.unload_identity()
            epsilon = plain + 3.0 * (told - plain)
            now, after = abar[t], abar[max(t - 250, 0)]
            x = (after / now).sqrt() * (x - (1 - now).sqrt() * epsilon) + (1 - after).sqrt() * epsilon
            x = x.float()
        pixels = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample[0].permute(1, 2, 0)
    wanted = 127.5 * (pixels.clamp(-1, 1).numpy() + 1)
    assert np.abs(_array(edited[0]) - wanted).max() <= 2
    # nothing is left behind
    assert pipe.identities == ()
    for name, weight in pipe.unet.state_dict().items():
        assert torch.equal(weight, weights[name]), name


def test_between_the_two_models_both_have_a_say(pipe: S2EditPipeline, picture: Image.Image) -> None:
    images = [
        _sine(pipe, fine_tuned_weight=weight, mixed_share=0.5).prepare(picture, SOURCE, "lady", 5)(TARGETS[:1])[0]
        for weight in (0.0, 0.5, 1.0)
    ]
    assert not _same(images[0], images[1]) and not _same(images[1], images[2])


# ---------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("kind", ["SDEdit", "InstructPix2Pix", "SINE"])
def test_edits_have_the_pictures_size_and_follow_the_seed_whatever_is_asked_beside(
    kind: str, pipe: S2EditPipeline, instructed: Any, picture: Image.Image
) -> None:
    made = {
        "SDEdit": lambda: SDEdit(pipe, num_inference_steps=3),
        "InstructPix2Pix": lambda: InstructPix2Pix(instructed, num_inference_steps=3),
        "SINE": lambda: _sine(pipe, num_inference_steps=3),
    }
    method = made[kind]()
    assert method.name == kind
    wide = picture.resize((50, 41))
    both = method.prepare(wide, SOURCE, "lady", 3)(TARGETS)
    assert [image.size for image in both] == [(50, 41)] * 2
    again = method.prepare(wide, SOURCE, "lady", 3)(TARGETS[1:])
    other = method.prepare(wide, SOURCE, "lady", 4)(TARGETS[1:])
    assert _same(both[1], again[0]) and not _same(both[1], other[0])


def test_sdxl_is_refused_in_words(pipe: S2EditPipeline) -> None:
    class Both:
        text_encoder_2 = object()

    for method in (SDEdit, SINE):
        with pytest.raises(ValueError, match="written for Stable Diffusion 1 and 2"):
            method(Both())


def test_what_decides_a_rivals_pictures(pipe: S2EditPipeline, instructed: Any) -> None:
    assert SDEdit(pipe, name="mine", num_inference_steps=3).resolved() == {"strength": 0.6, "guidance_scale": 4.5}
    fitted = SINE(pipe, fit_steps=7).resolved()
    assert fitted["fit_steps"] == 7 == fitted["fit"]["num_steps"] and fitted["fit"]["method"] == "full"
    assert fitted["fit"]["batch_size"] == RECIPES["full"].batch_size and fitted["mixed_share"] == 0.5
    method = InstructPix2Pix(instructed)
    before = method.resolved()
    assert before == method.resolved() and before["image_guidance_scale"] == 1.5
    with torch.no_grad():
        instructed.unet.conv_in.bias.add_(1)  # other weights are another system
    after = method.resolved()
    assert after.pop("weights") != before.pop("weights") and after == before
