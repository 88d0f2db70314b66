"""The public contract on tiny models of the real classes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline
from PIL import Image

from s2edit_pipeline import IdentityAdapter, S2EditPipeline, S2EditPipelineOutput

SOURCE = "a photo of a sad lady with glasses"
TARGET = "a photo of a smiling lady with glasses"
WITH = "a photo of a smiling [I] lady with glasses"


@pytest.fixture
def identity(pipe: S2EditPipeline, picture: Image.Image, half_mask: np.ndarray) -> IdentityAdapter:
    return pipe.fit_identity(
        picture, SOURCE, "lady", mask=half_mask, num_steps=3, learning_rate=1e-2,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip


# ------------------------------------------------------------------------------ bad input, before any work


@pytest.fixture
def idle(pipe: S2EditPipeline, monkeypatch: pytest.MonkeyPatch) -> S2EditPipeline:
    """A pipeline whose networks must not be asked."""

    def work(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("work was done before the input was checked")

    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        monkeypatch.setattr(module, "forward", work)
    monkeypatch.setattr(pipe.vae, "encode", work)
    monkeypatch.setattr(pipe.vae, "decode", work)
    return pipe


LONG = "a photo of a lady " + "with glasses and a hat " * 20
BAD_PICTURES = [
    ({"image": np.zeros((0, 4, 3), np.uint8)}, ValueError, "no pixels"),
    ({"image": Image.new("RGB", (3, 4000))}, ValueError, "3 x 4000; one side may be at most 4 times the other. Crop"),
    ({"image": "nowhere.png"}, ValueError, "is not a file"),
    ({"image": 7}, TypeError, "PIL picture"),
    ({"height": 30}, ValueError, "height must be a positive multiple of 4"),
]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        *BAD_PICTURES,
        ({"subject": "man"}, ValueError, "subject='man' is not in the prompt .*one of: a, photo, of"),
        ({"subject": ""}, ValueError, "subject is empty"),
        ({"prompt": " "}, ValueError, "prompt is empty"),
        ({"prompt": None}, ValueError, "subject='lady' is a word of the prompt: pass prompt= too"),
        ({"prompt": 3}, TypeError, "prompt must be a string"),
        ({"prompt": LONG}, ValueError, "tokens and the text encoder reads 48"),
        ({"prompt": WITH}, ValueError, r"holds the token '\[I\]' already"),
        ({"token": "lady"}, ValueError, "brackets"),
        ({"method": "dreambooth"}, ValueError, "'dreambooth' is unknown; choose 'full', 'lora' or 'token'"),
        ({"mask": np.ones((32, 16), bool)}, ValueError, "mask is 16 x 32 and the picture 32 x 32"),
        ({"mask": np.zeros((32, 32), bool)}, ValueError, "nothing inside"),
        ({"num_steps": 0}, ValueError, "num_steps"),
        ({"learning_rate": -1.0}, ValueError, "learning_rate"),
        ({"semantic_weight": -1.0}, ValueError, "semantic_weight"),
        ({"mask_threshold": 0}, ValueError, "mask_threshold must be above 0 and below 1, not 0"),
        ({"token_learning_rate": 0.0}, ValueError, "token_learning_rate must be a number above 0"),
        ({"generator": [torch.Generator()] * 2}, ValueError, "generator must be one for a fit, not a list of 2"),
        ({"generator": 3}, TypeError, "generator must be one torch.Generator for a fit, not int"),
        ({"stop": True}, TypeError, "stop must be a threading.Event"),
    ],
)
def test_a_fit_refuses_before_any_work(
    idle: S2EditPipeline, picture: Image.Image, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {"image": picture, "prompt": SOURCE, "subject": "lady", "num_steps": 1}
    with pytest.raises(error, match=message):
        idle.fit_identity(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        *BAD_PICTURES,
        ({"prompt": ""}, ValueError, "prompt is empty"),
        ({"prompt": []}, ValueError, "Pass the target prompt"),
        ({"prompt": None}, ValueError, "Pass the target prompt"),
        ({"prompt": [TARGET, 3]}, TypeError, "prompt must be a string, not int"),
        ({"prompt": LONG}, ValueError, "tokens and the text encoder reads 48"),
        ({"source_prompt": "  "}, ValueError, "source_prompt is empty"),
        ({"inversion": "magic"}, ValueError, "'magic' is unknown; choose .*'direct'"),
        ({"inversion": 5}, TypeError, "what pipe.invert returned, not 5"),
        ({"num_inference_steps": 0}, ValueError, "from 1 to 1000, not 0"),
        ({"num_inference_steps": 2000}, ValueError, "from 1 to 1000"),
        ({"guidance_scale": float("nan")}, ValueError, "guidance_scale must be a number"),
        ({"guidance_scale": "high"}, ValueError, "guidance_scale must be a number"),
        ({"generator": [torch.Generator()] * 2}, ValueError, "generator must be one for an edit, not a list of 2"),
        ({"keep_attention": 1}, TypeError, "keep_attention must be a KeepAttention, not 1"),
        ({"callback_on_step_end": 1}, TypeError, "callback_on_step_end must be a function, not int"),
        ({"no_such_thing": 1}, TypeError, "An edit has no argument 'no_such_thing'"),
        ({"strength": 0.0}, ValueError, "strength must be above 0 and at most 1"),
        ({"keep_words": ["hat"]}, ValueError, "keep_words names 'hat'"),
        ({"guidance_stop": 1.5}, ValueError, "guidance_stop must be from 0 to 1"),
        ({"self_replace_steps": -0.5}, ValueError, "self_replace_steps must be from 0 to 1"),
        ({"cross_replace_steps": 2.0}, ValueError, "cross_replace_steps must be from 0 to 1"),
        ({"reweight": {"hat": 2.0}}, ValueError, "reweight names 'hat'"),
        ({"blend_words": ["hat"]}, ValueError, "none is in"),
        ({"edit_mask": np.ones((3, 3, 3, 3))}, ValueError, "edit_mask"),
        ({"edit_mask": np.ones((16, 32), bool)}, ValueError, "edit_mask is 32 x 16 and the picture 32 x 32"),
        ({"edit": "swap"}, ValueError, "'swap' is unknown"),
        ({"output_type": "gif"}, ValueError, "'gif' is unknown; choose 'pil'"),
        ({"num_images_per_prompt": 2}, ValueError, "deterministic"),
        ({"latents": torch.zeros(1, 4, 16, 16)}, ValueError, "latents can't be combined with image"),
        ({"prompt_embeds": torch.zeros(1, 48, 32)}, ValueError, "prompt_embeds can't be combined with image"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, ValueError, "'noise' can't be handed to callbacks"),
        ({"identity": "./nobody"}, ValueError, "is not a folder"),
        ({"negative_prompt": ["a hat"]}, TypeError, "negative_prompt must be one string, not list"),
    ],
)
def test_an_edit_refuses_before_any_work(
    idle: S2EditPipeline, picture: Image.Image, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {"prompt": TARGET, "image": picture, "source_prompt": SOURCE}
    with pytest.raises(error, match=message):
        idle(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        *BAD_PICTURES,
        ({"prompt": ""}, ValueError, "prompt is empty"),
        ({"method": "edict"}, ValueError, "'edict' is unknown; choose 'direct', .*'fixed_point'"),
        ({"num_inference_steps": 5000}, ValueError, "from 1 to 1000"),
        (
            {"method": "null_text", "negative_prompt": ["a hat"]},
            TypeError,
            "negative_prompt must be one string, not list",
        ),
        ({"guidance_scale": -1.0}, ValueError, "guidance_scale must be a number of at least 0"),
        ({"generator": [torch.Generator()]}, ValueError, "generator must be one for an inversion"),
        ({"keep_attention": 1}, TypeError, "keep_attention must be a KeepAttention, not 1"),
    ],
)
def test_an_inversion_refuses_before_any_work(
    idle: S2EditPipeline, picture: Image.Image, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        idle.invert(**{"image": picture, "prompt": SOURCE, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        *BAD_PICTURES,
        ({"subject": "man"}, ValueError, "'man' is not in the prompt"),
        ({"prompt": LONG}, ValueError, "tokens"),
        ({"threshold": 1.5}, ValueError, "threshold must be above 0 and below 1"),
    ],
)
def test_a_preview_refuses_before_any_work(
    idle: S2EditPipeline, picture: Image.Image, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        idle.preview_mask(**{"image": picture, "prompt": SOURCE, "subject": "lady", **changes})


def test_pictures_as_people_have_them_are_taken(pipe: S2EditPipeline, picture: Image.Image, tmp_path: Path) -> None:
    """CMYK, 16 bits, transparency and the camera's rotation end as the same edit of the same picture."""
    expected = pipe(TARGET, picture, SOURCE, num_inference_steps=3, output_type="latent").images
    array = np.asarray(picture)
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(array[::-1, ::-1]).save(tmp_path / "turned.png", exif=exif)
    opaque = np.concatenate([array, np.full((32, 32, 1), 255, np.uint8)], -1)
    for image in (
        tmp_path / "turned.png", Image.fromarray(opaque), array.astype(np.uint16) * 257, picture.convert("CMYK"),
    ):  # fmt: skip
        edited = pipe(TARGET, image, SOURCE, num_inference_steps=3, output_type="latent").images
        torch.testing.assert_close(edited, expected, rtol=0, atol=0)


def test_models_that_cannot_serve(make_pipe: Callable[[], S2EditPipeline], picture: Image.Image) -> None:
    pipe = make_pipe()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match=r"alphas_cumprod.*DDIMScheduler.from_pretrained"):
        pipe(TARGET, picture, SOURCE)
    pipe = make_pipe()
    pipe.unet.half()
    with pytest.raises(ValueError, match=r"float16 and the text encoder torch.float32.*pipe.to"):
        pipe.fit_identity(picture, SOURCE, "lady")
    pipe = make_pipe()
    pipe.unet.register_to_config(in_channels=9)
    with pytest.raises(ValueError, match="9 channels and the autoencoder gives 4"):
        pipe.invert(picture, SOURCE)


def test_an_inversion_that_does_not_belong(pipe: S2EditPipeline, picture: Image.Image) -> None:
    inversion = pipe.invert(picture, SOURCE, num_inference_steps=3)
    with pytest.raises(ValueError, match=r"num_inference_steps=5, but the inversion was made in 3"):
        pipe(TARGET, picture, SOURCE, inversion=inversion, num_inference_steps=5)
    with pytest.raises(ValueError, match=r"inversion was made under .* invert under the same words"):
        pipe(TARGET, picture, "a photo of a lady", inversion=inversion)
    null_text = pipe.invert(picture, SOURCE, "null_text", 2, guidance_scale=3.0)
    with pytest.raises(ValueError, match=r"optimised for guidance_scale=3, not 4.5"):
        pipe(TARGET, picture, SOURCE, inversion=null_text)


# ------------------------------------------------------------------------------ what comes out


@pytest.mark.parametrize(
    ("output_type", "shape"), [("np", (2, 32, 32, 3)), ("pt", (2, 3, 32, 32)), ("latent", (2, 4, 16, 16))]
)
def test_output_types(pipe: S2EditPipeline, picture: Image.Image, output_type: str, shape: tuple[int, ...]) -> None:
    arguments: dict[str, Any] = {"image": picture, "source_prompt": SOURCE, "num_inference_steps": 2}
    result = pipe([TARGET, SOURCE], output_type=output_type, **arguments)
    assert isinstance(result, S2EditPipelineOutput) and tuple(result.images.shape) == shape
    pil = pipe([TARGET, SOURCE], **arguments)
    assert [i.size for i in pil.images] == [(32, 32)] * 2 and pil.source.size == (32, 32)
    assert [m.size for m in pil.edit_masks] == [(32, 32)] * 2
    if output_type == "np":
        assert np.abs(result.images * 255 - np.stack([np.asarray(i) for i in pil.images])).max() <= 0.5 + 1e-3
    as_tuple = pipe([TARGET, SOURCE], return_dict=False, output_type=output_type, **arguments)
    assert np.array_equal(np.asarray(as_tuple[0]), np.asarray(result.images))


def test_several_prompts_are_each_their_own_edit(pipe: S2EditPipeline, picture: Image.Image) -> None:
    other = "a photo of a sad lady with a hat"
    arguments: dict[str, Any] = {
        "image": picture, "source_prompt": SOURCE, "inversion": pipe.invert(picture, SOURCE, num_inference_steps=4),
        "output_type": "latent",
    }  # fmt: skip
    together = pipe([TARGET, other], **arguments).images
    torch.testing.assert_close(together[:1], pipe(TARGET, **arguments).images, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together[1:], pipe([other], **arguments).images, rtol=1e-4, atol=1e-4)


def test_maps_are_those_of_the_words(pipe: S2EditPipeline, picture: Image.Image) -> None:
    result = pipe(TARGET, picture, SOURCE, num_inference_steps=2, return_attention_maps=True)
    assert list(result.attention_maps) == ["a", "photo", "of", "smiling", "lady", "with", "glasses"]
    assert all(m.mode == "L" and m.size == (32, 32) for m in result.attention_maps.values())
    assert pipe(TARGET, picture, SOURCE, num_inference_steps=2).attention_maps is None


def test_an_edit_mask_is_kept_to(pipe: S2EditPipeline, picture: Image.Image, half_mask: np.ndarray) -> None:
    inversion = pipe.invert(picture, SOURCE, num_inference_steps=5)
    edited = pipe(TARGET, picture, SOURCE, inversion=inversion, edit_mask=half_mask, output_type="latent")
    torch.testing.assert_close(edited.images[..., 8:], inversion.trajectory[:1, ..., 8:], rtol=0, atol=0)
    assert float((edited.images - inversion.trajectory[:1])[..., :8].abs().max()) > 1e-4
    assert np.array_equal(np.asarray(edited.edit_masks[0]) > 127, half_mask)


def test_kept_pixels_are_the_pictures_own(pipe: S2EditPipeline, half_mask: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)  # nothing that an autoencoder would give back
    arguments: dict[str, Any] = {"source_prompt": SOURCE, "num_inference_steps": 3, "edit_mask": half_mask}
    (kept,) = pipe(TARGET, picture, **arguments).images
    (decoded,) = pipe(TARGET, picture, keep_pixels=False, **arguments).images
    assert np.array_equal(np.asarray(kept)[~half_mask], picture[~half_mask])
    assert not np.array_equal(np.asarray(decoded)[~half_mask], picture[~half_mask])
    inversion = pipe.invert(picture, SOURCE, num_inference_steps=3)  # which keeps the picture
    (again,) = pipe(TARGET, inversion=inversion, edit_mask=half_mask).images
    assert np.array_equal(np.asarray(again), np.asarray(kept))


def test_kept_words_are_taken_out_of_the_region(pipe: S2EditPipeline, picture: Image.Image) -> None:
    arguments: dict[str, Any] = {"image": picture, "source_prompt": SOURCE, "num_inference_steps": 4}
    (whole,) = pipe(TARGET, **arguments).edit_masks
    (less,) = pipe(TARGET, keep_words=["glasses"], **arguments).edit_masks
    (none,) = pipe(TARGET, keep_words=["smiling", "sad"], **arguments).edit_masks
    whole, less, none = (np.asarray(m) > 127 for m in (whole, less, none))
    assert none.sum() == 0 < whole.sum() and less.sum() < whole.sum() and not (less & ~whole).any()


def test_a_wide_picture_keeps_its_shape(pipe: S2EditPipeline, half_mask: np.ndarray) -> None:
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 80, 3), dtype=np.uint8))
    whole = {"crop": None, "num_inference_steps": 2}
    result = pipe(TARGET, wide, SOURCE, **whole)
    assert result.images[0].size == result.source.size == result.edit_masks[0].size == (80, 40)
    assert pipe.preview_mask(wide, SOURCE, "lady").size == (80, 40)
    as_worked_at = pipe(TARGET, wide, SOURCE, output_size="model", **whole)
    assert as_worked_at.images[0].size == (48, 24) == as_worked_at.edit_masks[0].size  # the model's 32 x 32
    identity = pipe.fit_identity(wide, SOURCE, "lady", num_steps=1, crop=None)
    assert identity.mask is not None and identity.mask.shape == (12, 24)
    assert pipe(WITH, wide, identity=identity, **whole).images[0].size == (80, 40)


def test_guidance_may_stop_early(pipe: S2EditPipeline, picture: Image.Image) -> None:
    """Stopping at 0 is guidance 1 throughout; a stop between is neither end."""
    arguments: dict[str, Any] = {
        "image": picture, "source_prompt": SOURCE, "num_inference_steps": 4, "output_type": "latent",
        "blend_words": False,
    }  # fmt: skip
    never = pipe(TARGET, guidance_scale=5.0, guidance_stop=0.0, **arguments).images
    torch.testing.assert_close(never, pipe(TARGET, guidance_scale=1.0, **arguments).images, rtol=1e-4, atol=1e-4)
    half, always = (pipe(TARGET, guidance_scale=5.0, guidance_stop=s, **arguments).images for s in (0.5, 1.0))
    assert float((half - never).abs().max()) > 1e-3 and float((half - always).abs().max()) > 1e-3


# ------------------------------------------------------------------------------ identities


def test_the_token_is_put_into_the_source_by_itself(
    pipe: S2EditPipeline, picture: Image.Image, identity: IdentityAdapter
) -> None:
    arguments: dict[str, Any] = {"image": picture, "num_inference_steps": 3, "output_type": "latent"}
    with_source = pipe(WITH, source_prompt="a photo of a sad [I] lady with glasses", identity=identity, **arguments)
    for source in (SOURCE, None):  # None: the identity's own
        edited = pipe(WITH, source_prompt=source, identity=identity, **arguments)
        torch.testing.assert_close(edited.images, with_source.images, rtol=0, atol=0)
    assert pipe.identities == ()  # only for the call
    token = pipe.load_identity(identity)
    inversion = pipe.invert(picture, SOURCE, num_inference_steps=3)
    assert inversion.prompt == "a photo of a sad [I] lady with glasses"
    assert list(inversion.made_with.identities) == ["[I]"]
    for same in ({"identity": token}, {"identity": None}, {"inversion": inversion}):
        call = {**arguments, **same}
        if "inversion" in same:
            del call["num_inference_steps"]
        torch.testing.assert_close(
            pipe(WITH, source_prompt=SOURCE, **call).images, with_source.images, rtol=0, atol=1e-4
        )


def test_after_unloading_the_pipeline_draws_and_edits_as_before(
    pipe: S2EditPipeline, picture: Image.Image, identity: IdentityAdapter
) -> None:
    before = pipe(TARGET, picture, SOURCE, num_inference_steps=3, output_type="latent").images
    pipe.load_identity(identity)
    during = pipe(WITH, picture, SOURCE, num_inference_steps=3, output_type="latent").images
    pipe.unload_identity()
    after = pipe(TARGET, picture, SOURCE, num_inference_steps=3, output_type="latent").images
    assert torch.equal(before, after) and not torch.equal(before, during)


def test_an_error_in_the_edit_takes_the_identity_out_again(
    pipe: S2EditPipeline, picture: Image.Image, identity: IdentityAdapter
) -> None:
    processors = dict(pipe.unet.attn_processors)

    def fail(*args: Any) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        pipe(WITH, picture, SOURCE, identity, num_inference_steps=3, callback_on_step_end=fail)
    assert pipe.identities == ()
    assert all(pipe.unet.attn_processors[name] is one for name, one in processors.items())


def test_an_identity_is_drawn_anew_where_it_was(pipe: S2EditPipeline, identity: IdentityAdapter) -> None:
    result = pipe("a photo of a [I] lady", identity=identity, num_inference_steps=3, generator=seeded(1))
    assert result.images[0].size == (32, 32) and result.source is None


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_token_that_no_prompt_has_is_refused(pipe: S2EditPipeline, picture: Image.Image) -> None:
    """Without weights the identity would change nothing; with weights it does."""
    identity = pipe.fit_identity(picture, SOURCE, "lady", num_steps=1, method="token")
    message = r"'\[I\]' is a token alone, without weights, and no prompt has it: write \[I\] before 'lady'"
    for arguments in ({"image": picture, "source_prompt": SOURCE}, {}):
        with pytest.raises(ValueError, match=message):
            pipe(TARGET, identity=identity, num_inference_steps=1, **arguments)
        assert pipe(WITH, identity=identity, num_inference_steps=1, **arguments).images
    assert pipe.invert(picture, SOURCE, identity=identity, num_inference_steps=1).prompt.count("[I]") == 1


def test_a_mask_is_previewed_on_the_bare_model_alone(
    pipe: S2EditPipeline, picture: Image.Image, identity: IdentityAdapter
) -> None:
    """As a fit: what the noun looks at must not depend on what is loaded."""
    before = np.asarray(pipe.preview_mask(picture, SOURCE, "lady"))
    pipe.load_identity(identity)
    for call in (pipe.preview_mask, pipe.fit_identity):
        with pytest.raises(ValueError, match=r"Identities are loaded \(\[I\]\)\..*pipe.unload_identity\(\) first"):
            call(picture, SOURCE, "lady")
    pipe.unload_identity()
    assert np.array_equal(np.asarray(pipe.preview_mask(picture, SOURCE, "lady")), before)


# ------------------------------------------------------------------------------ as other pipelines do


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_drawing_is_what_stable_diffusion_draws(
    make_pipe: Callable[[str], S2EditPipeline], prediction_type: str
) -> None:
    """To the bit; every scheduler and argument of each family: families/test_stock_equality.py."""
    pipe = make_pipe(prediction_type)
    stock = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {
        "prompt": ["a man", "a lady with glasses"], "num_inference_steps": 5, "guidance_scale": 4.5,
        "num_images_per_prompt": 2, "output_type": "np", "height": 32, "width": 48, "guidance_rescale": 0.3,
    }  # fmt: skip
    for negative in (["a hat"] * 2, ["a hat", "glasses and a beard"]):
        both = {**arguments, "negative_prompt": negative}
        expected = stock(generator=seeded(0), **both).images
        np.testing.assert_array_equal(pipe(generator=seeded(0), **both).images, expected)
    listed = {**both, "num_images_per_prompt": 1}
    drawn = pipe(generator=[seeded(0), seeded(1)], **listed).images
    np.testing.assert_array_equal(drawn, stock(generator=[seeded(0), seeded(1)], **listed).images)


def test_prompt_embeds_and_latents_are_taken(pipe: S2EditPipeline) -> None:
    stock = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    embeds, negative = stock.encode_prompt("a lady", "cpu", 1, True, "a hat")
    arguments: dict[str, Any] = {
        "prompt_embeds": embeds, "negative_prompt_embeds": negative, "num_inference_steps": 3, "guidance_scale": 3.0,
        "latents": torch.randn(1, 4, 16, 16, generator=seeded(5)), "output_type": "np",
    }  # fmt: skip
    np.testing.assert_array_equal(pipe(**arguments).images, stock(**arguments).images)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"prompt": ["a lady", "a man"], "negative_prompt": ["a hat"] * 3},
        {"prompt": ["a lady", "a man"], "negative_prompt": "a hat"},
        {"prompt": "a lady", "height": 33, "width": 32},
        {"prompt": 7},
        {"prompt": "a lady", "prompt_embeds": torch.zeros(1, 48, 32)},
        {"prompt": ["a lady", "a man"], "generator": [torch.Generator()] * 3},
        {"prompt": "a lady", "timesteps": [999, 500], "sigmas": [1.0, 0.5]},
        {"prompt": "a lady", "callback_on_step_end_tensor_inputs": ["noise"]},
        {"prompt": "a lady", "num_inference_steps": 1001},
    ],
)
def test_what_the_stock_pipeline_refuses_is_refused_in_its_words(
    pipe: S2EditPipeline, arguments: dict[str, Any]
) -> None:
    stock = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    messages = []
    for each in (stock, pipe):
        with pytest.raises((ValueError, TypeError)) as error:
            each(**{"num_inference_steps": 2, **arguments})
        messages.append((error.type, str(error.value)))
    assert messages[0] == messages[1]


def test_a_drawing_refuses_what_there_is_not(idle: S2EditPipeline) -> None:
    for changes, error, message in (
        ({"no_such_thing": 1}, TypeError, "StableDiffusionPipeline, which draws .* has no argument 'no_such_thing'"),
        ({"pooled_prompt_embeds": torch.zeros(1, 3)}, TypeError, "has no argument 'pooled_prompt_embeds'"),
        ({"output_type": "gif"}, ValueError, "'gif' is unknown; choose 'pil'"),
        ({"callback_on_step_end": 1}, TypeError, "callback_on_step_end must be a function, not int"),
        ({"stop": 1}, TypeError, "stop must be a threading.Event"),
        ({"guidance_scale": -1.0}, ValueError, "guidance_scale must be a number of at least 0"),
    ):
        with pytest.raises(error, match=message):
            idle("a lady", num_inference_steps=1, **changes)


def test_callbacks_see_change_and_stop(pipe: S2EditPipeline, picture: Image.Image) -> None:
    reports: list[tuple[int, int, set[str]]] = []

    def callback(the_pipe: Any, step: int, timestep: int, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        reports.append((step, timestep, set(tensors)))
        the_pipe.interrupt = step == 2
        return {"latents": tensors["latents"] * 0 + 0.25} if step == 2 else {}

    result = pipe(
        TARGET, picture, SOURCE, num_inference_steps=5, output_type="latent", callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    )  # fmt: skip
    assert [s for s, _, _ in reports] == [0, 1, 2]
    assert [t for _, t, _ in reports] == [801, 601, 401]
    assert all(names == {"latents", "prompt_embeds"} for _, _, names in reports)
    assert result.interrupted and result.images.shape == (1, 4, 16, 16)
    assert pipe.interrupt is False  # no call is at work
    assert pipe(TARGET, picture, SOURCE, num_inference_steps=2).interrupted is False  # the next one starts fresh


@pytest.mark.parametrize("call", ["fit", "invert", "edit", "draw"])
def test_a_stop_sign_ends_the_call_after_a_step(pipe: S2EditPipeline, picture: Image.Image, call: str) -> None:
    """What there is comes back and says that it was interrupted; unset, the sign changes nothing."""
    sign, steps = threading.Event(), []

    def callback(the_pipe: Any, step: int, timestep: int, more: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        if step == 1:
            sign.set()
        return {}

    def run(**arguments: Any) -> Any:
        if call == "fit":
            return pipe.fit_identity(picture, SOURCE, "lady", num_steps=4, method="token", **arguments)
        if call == "invert":
            return pipe.invert(picture, SOURCE, num_inference_steps=4, **arguments)
        inputs = (TARGET, picture, SOURCE) if call == "edit" else (TARGET,)
        return pipe(*inputs, num_inference_steps=4, output_type="latent", **arguments)

    result = run(stop=sign, callback_on_step_end=callback)
    assert result.interrupted and steps == [0, 1]
    assert not run(stop=threading.Event()).interrupted
    assert run(stop=sign).interrupted  # set from the start: after the first step
    assert not pipe.interrupt


def test_the_scheduler_is_never_changed(pipe: S2EditPipeline, picture: Image.Image) -> None:
    before = (dict(pipe.scheduler.config), pipe.scheduler.timesteps.tolist(), pipe.scheduler.num_inference_steps)
    for method in ("direct", "null_text"):
        pipe(TARGET, picture, SOURCE, inversion=method, num_inference_steps=2)
    pipe("a lady", num_inference_steps=2)
    after = (dict(pipe.scheduler.config), pipe.scheduler.timesteps.tolist(), pipe.scheduler.num_inference_steps)
    assert before == after


def test_saving_and_loading_the_pipeline(pipe: S2EditPipeline, picture: Image.Image, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "model")
    expected = pipe(TARGET, picture, SOURCE, num_inference_steps=2, output_type="latent").images
    for cls in (S2EditPipeline, StableDiffusionPipeline):
        loaded: Any = cls.from_pretrained(tmp_path / "model")
        loaded = S2EditPipeline.from_pipe(loaded)
        loaded.set_progress_bar_config(disable=True)
        edited = loaded(TARGET, picture, SOURCE, num_inference_steps=2, output_type="latent").images
        torch.testing.assert_close(edited, expected, rtol=0, atol=0)


def test_from_and_to_stable_diffusion(pipe: S2EditPipeline, picture: Image.Image) -> None:
    stock = StableDiffusionPipeline.from_pipe(pipe)
    again = S2EditPipeline.from_pipe(stock)
    assert again.unet is pipe.unet is stock.unet
    again.set_progress_bar_config(disable=True)
    assert again(TARGET, picture, SOURCE, num_inference_steps=2).images


def test_half_precision_runs(make_pipe: Callable[[], S2EditPipeline], picture: Image.Image) -> None:
    pipe = make_pipe().to(torch.bfloat16)
    identity = pipe.fit_identity(picture, SOURCE, "lady", num_steps=2)
    assert identity.rows["text_encoder"].dtype == torch.float32
    assert all(t.dtype == torch.float16 and bool(torch.isfinite(t).all()) for t in identity.weights.values())
    result = pipe(WITH, picture, identity=identity, num_inference_steps=3)
    assert result.images[0].size == (32, 32) and pipe.unet.dtype == torch.bfloat16
    inversion = pipe.invert(picture, SOURCE, "null_text", 3)
    assert inversion.trajectory.dtype == torch.bfloat16
