"""What diffusers asks of every pipeline, and of Stable Diffusion's above all, asked of Stable Diffusion 1 and XL at
tiny size: drawing and editing. What is refused is in docs/diffusers.md, with its reason."""

from __future__ import annotations

import inspect
import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.schedulers import KarrasDiffusionSchedulers
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from s2edit_pipeline import S2EditPipeline

SOURCE, TARGET = "a photo of a sad lady with glasses", "a photo of a smiling lady with glasses"
FAMILIES = ("sd1", "sdxl")
STOCK = {"sd1": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
IMG2IMG = {"sd1": StableDiffusionImg2ImgPipeline, "sdxl": StableDiffusionXLImg2ImgPipeline}
Arguments = Callable[..., dict[str, Any]]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pipe(family: str, make_family: Callable[..., S2EditPipeline]) -> S2EditPipeline:
    return make_family(family)


@pytest.fixture(params=["draw", "edit"])
def arguments(request: pytest.FixtureRequest, wide_picture: Image.Image) -> Arguments:
    """A call's arguments, with a fresh generator."""

    def make(**changes: Any) -> dict[str, Any]:
        made: dict[str, Any] = {
            "prompt": TARGET, "num_inference_steps": 2, "output_type": "np", "generator": seeded(), "height": 16,
            "width": 24, "guidance_scale": 5.0,
        }  # fmt: skip
        if request.param == "edit":
            made |= {"image": wide_picture, "source_prompt": SOURCE, "guidance_stop": 1.0, "blend_words": False}
        return made | changes

    return make


def images(pipe: Any, arguments: dict[str, Any]) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    made: np.ndarray = pipe(**arguments).images
    return made


def close(a: np.ndarray, b: np.ndarray, tolerance: float = 1e-4) -> bool:
    return a.shape == b.shape and float(np.abs(a - b).max()) < tolerance


# ------------------------------------------------------------------------------ every pipeline


def test_the_call_has_the_parameters_of_text_guided_variation() -> None:
    parameters = inspect.signature(S2EditPipeline.__call__).parameters
    required = {
        "prompt", "image", "height", "width", "guidance_scale", "negative_prompt", "prompt_embeds",
        "negative_prompt_embeds", "num_inference_steps", "num_images_per_prompt", "generator", "latents", "output_type",
        "return_dict", "callback_on_step_end", "callback_on_step_end_tensor_inputs", "cross_attention_kwargs",
        "ip_adapter_image", "ip_adapter_image_embeds",
    }  # fmt: skip
    assert required <= parameters.keys()
    assert all(parameters[name].default is not inspect.Parameter.empty for name in required)


def test_saved_and_loaded_with_a_variant_and_in_mixed_types(
    pipe: S2EditPipeline, arguments: Arguments, tmp_path: Path
) -> None:
    expected = images(pipe, arguments())
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert close(images(S2EditPipeline.from_pretrained(tmp_path, variant="fp16"), arguments()), expected)
    with pytest.raises(ValueError, match="variant"):
        S2EditPipeline.from_pretrained(tmp_path, variant="other")
    mixed = S2EditPipeline.from_pretrained(
        tmp_path, variant="fp16", torch_dtype={"unet": torch.bfloat16, "default": torch.float16}
    )
    dtypes = {name: part.dtype for name, part in mixed.components.items() if isinstance(part, torch.nn.Module)}
    assert dtypes.pop("unet") == torch.bfloat16 and set(dtypes.values()) == {torch.float16}


def test_truly_optional_components_may_be_none(pipe: S2EditPipeline, arguments: Arguments, tmp_path: Path) -> None:
    """Those of this model: others need what these don't."""
    assert not {"vae", "unet", "text_encoder", "tokenizer", "scheduler"} & set(pipe._optional_components)
    for name in pipe._optional_components:
        setattr(pipe, name, None)
    expected = images(pipe, arguments())
    pipe.save_pretrained(tmp_path)
    loaded = S2EditPipeline.from_pretrained(tmp_path)
    assert all(getattr(loaded, name) is None for name in pipe._optional_components)
    assert close(images(loaded, arguments()), expected)


def test_a_text_encoder_that_was_let_go_is_saved_as_none(pipe: S2EditPipeline, tmp_path: Path) -> None:
    pipe.text_encoder = pipe.tokenizer = None
    pipe.save_pretrained(tmp_path)
    assert S2EditPipeline.from_pretrained(tmp_path).text_encoder is None


def test_components_make_the_same_pipeline_again(pipe: S2EditPipeline, arguments: Arguments) -> None:
    again = S2EditPipeline(**pipe.components)
    assert again.components.keys() == pipe.components.keys()
    assert np.array_equal(images(again, arguments()), images(pipe, arguments()))


def test_every_callback_tensor_may_be_asked_for_and_given_back(pipe: S2EditPipeline, arguments: Arguments) -> None:
    names = pipe._callback_tensor_inputs

    def last_is_zero(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        assert set(tensors) <= set(names)
        if step == pipeline.num_timesteps - 1:
            tensors["latents"] = torch.zeros_like(tensors["latents"])
        return tensors

    result = pipe(
        **arguments(
            callback_on_step_end=last_is_zero, callback_on_step_end_tensor_inputs=names, output_type="latent"
        )
    )  # fmt: skip
    assert float(result.images.abs().sum()) == 0


def test_a_callback_may_raise_the_guidance_step_by_step(pipe: S2EditPipeline, arguments: Arguments) -> None:
    def more(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipeline._guidance_scale += 1.0
        return tensors

    pipe(**arguments(guidance_scale=2.0, callback_on_step_end=more))
    assert pipe.guidance_scale == 2.0 + pipe.num_timesteps == 4.0 and pipe.do_classifier_free_guidance


def test_prompts_are_encoded_apart_from_the_rest(pipe: S2EditPipeline, family: str) -> None:
    """By a pipeline of text encoders alone; another without any draws from the embeddings as from the words."""
    words = {name for name in pipe.components if "text" in name or "tokenizer" in name}
    reader = S2EditPipeline(**{name: pipe.components[name] for name in words})
    drawer = S2EditPipeline(**{name: part for name, part in pipe.components.items() if name not in words})
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    for negative in (None, "a hat"):
        embeds = reader.encode_prompt(TARGET, "cpu", 2, True, negative)
        assert len(embeds) == (2 if family == "sd1" else 4)
        settings = {"num_inference_steps": 2, "output_type": "np", "height": 16, "width": 24}
        expected = images(
            pipe,
            settings
            | {"prompt": TARGET, "negative_prompt": negative, "num_images_per_prompt": 2, "generator": seeded()},
        )
        drawn = dict(zip(names, embeds, strict=False)) | settings
        assert close(images(drawer, drawn | {"generator": seeded()}), expected)
    alone = reader.encode_prompt(TARGET, do_classifier_free_guidance=False)
    assert alone[1] is None and torch.equal(alone[0], reader.encode_prompt([TARGET])[0])
    with pytest.raises(ValueError, match="The pipeline has no text_encoder"):
        images(drawer, settings | {"prompt": TARGET})


def test_a_long_prompt_is_cut_where_the_edit_does_not_depend_on_the_rest(
    pipe: S2EditPipeline, arguments: Arguments, caplog: pytest.LogCaptureFixture
) -> None:
    tail = " very" * 80 + " old"
    sources = {"source_prompt": SOURCE + tail} if "source_prompt" in arguments() else {}
    with caplog.at_level(logging.WARNING):
        long = images(pipe, arguments(prompt=TARGET + tail, **sources))
    assert "old" in caplog.text and np.isfinite(long).all()
    kept = " very" * (77 - 2 - len(pipe.tokenizer.tokenize(TARGET)))
    short = {"source_prompt": SOURCE + kept} if sources else {}
    assert close(long, images(pipe, arguments(prompt=TARGET + kept, **short)))
    if sources:
        with pytest.raises(ValueError, match="tokens and the text encoder reads 77"):
            images(pipe, arguments(prompt=TARGET + tail, source_prompt=SOURCE + tail + " hat"))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            inversion = pipe.invert(arguments()["image"], SOURCE + tail, num_inference_steps=2, height=16, width=24)
        assert "cut off was" in caplog.text
        assert pipe(TARGET + tail, inversion=inversion, source_prompt=SOURCE + tail, num_inference_steps=2).images


def test_pictures_may_come_as_pil_arrays_or_tensors(pipe: S2EditPipeline, wide_picture: Image.Image) -> None:
    array = np.asarray(wide_picture).astype(np.float32) / 255
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    forms = [wide_picture, [wide_picture], array, [array], array[None], tensor, [tensor], tensor[None]]
    settings = {"source_prompt": SOURCE, "num_inference_steps": 1, "output_type": "np"}
    first, *others = (pipe(TARGET, image=form, **settings).images for form in forms)
    assert all(close(first, other, 2e-2) for other in others)


def test_another_autoencoder_may_be_put_in(pipe: S2EditPipeline, arguments: Arguments) -> None:
    torch.manual_seed(0)
    wider = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32), layers_per_block=1, latent_channels=4, norm_num_groups=4,
    )  # fmt: skip
    before = images(pipe, arguments())
    pipe.vae = wider.eval()
    after = images(pipe, arguments())
    assert after.shape == before.shape and not close(after, before)


@pytest.mark.parametrize("kind", KarrasDiffusionSchedulers)
def test_every_karras_scheduler_draws(small_families: dict[str, S2EditPipeline], kind: Any) -> None:
    import diffusers

    of_that_kind = getattr(diffusers, kind.name)
    pipe = S2EditPipeline(**small_families["sd1"].components)
    if "SDE" in kind.name:
        pytest.importorskip("torchsde")
    pipe.scheduler = of_that_kind.from_config(pipe.scheduler.config)
    made = images(pipe, {"prompt": TARGET, "num_inference_steps": 4, "output_type": "np", "generator": seeded()})
    assert made.shape == (1, 16, 16, 3) and np.isfinite(made).all()


def test_from_pipe_keeps_the_config_and_the_processors(pipe: S2EditPipeline, family: str, arguments: Arguments) -> None:
    """From each stock pipeline of the model to ours, and back."""
    expected = images(pipe, arguments())
    processors = dict(pipe.unet.attn_processors)
    for other_class in (STOCK[family], IMG2IMG[family]):
        stock = other_class.from_pipe(pipe)
        ours = S2EditPipeline.from_pipe(stock)
        again = other_class.from_pipe(ours)
        plain = [{k: v for k, v in one.config.items() if not k.startswith("_")} for one in (stock, again)]
        assert plain[0] == plain[1]
        assert np.array_equal(images(ours, arguments()), expected)
    assert dict(pipe.unet.attn_processors) == processors


# ------------------------------------------------------------------------------ Stable Diffusion's functions


def test_freeu_is_switched_on_and_off(pipe: S2EditPipeline, arguments: Arguments) -> None:
    plain = images(pipe, arguments())
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert not close(images(pipe, arguments()), plain)
    pipe.disable_freeu()
    assert np.array_equal(images(pipe, arguments()), plain)


def test_fused_projections_change_nothing(pipe: S2EditPipeline, arguments: Arguments) -> None:
    plain = images(pipe, arguments())
    pipe.fuse_qkv_projections()
    assert close(images(pipe, arguments()), plain, 1e-3)
    pipe.unfuse_qkv_projections()
    assert close(images(pipe, arguments()), plain, 1e-5)


# ------------------------------------------------------------------------------ LoRA


def lora(pipe: S2EditPipeline, rank: int = 4, strength: float = 0.5) -> dict[str, torch.Tensor]:
    """Of the U-Net's and the text encoders' attention, in diffusers' form."""
    generator, state = seeded(1), {}
    for component, ends in (("unet", ("to_q", "to_v")), ("text_encoder", ("q_proj",)), ("text_encoder_2", ("q_proj",))):
        module = getattr(pipe, component)
        for name, layer in [] if module is None else module.named_modules():
            if isinstance(layer, torch.nn.Linear) and name.endswith(ends):
                shapes = (rank, layer.in_features), (layer.out_features, rank)
                for part, shape in zip("AB", shapes, strict=True):
                    state[f"{component}.{name}.lora_{part}.weight"] = strength * torch.randn(shape, generator=generator)
    return state


def test_loras_are_weighed_by_the_call(pipe: S2EditPipeline, arguments: Arguments, family: str) -> None:
    """As ``set_adapters`` weighs them, and as the stock pipeline does."""
    plain = images(pipe, arguments())
    with pytest.raises(ValueError, match=r"\['scale'\] weighs LoRAs, and none is loaded"):
        pipe(**arguments(cross_attention_kwargs={"scale": 0.5}))
    state = lora(pipe)
    pipe.load_lora_weights(dict(state), adapter_name="one")
    whole, half, none = (images(pipe, arguments(cross_attention_kwargs={"scale": s})) for s in (1.0, 0.3, 0.0))
    assert close(none, plain, 1e-5) and not close(whole, plain, 1e-3) and not close(half, whole, 1e-4)
    assert np.array_equal(images(pipe, arguments()), whole)  # to the bit: nothing of the weighing stays
    if "image" not in arguments():
        stock = STOCK[family](**pipe.components)
        assert close(images(stock, arguments(cross_attention_kwargs={"scale": 0.3})), half, 1e-5)
    pipe.set_adapters("one", 0.3)
    assert close(images(pipe, arguments()), half, 1e-5)
    pipe.disable_lora()
    assert close(images(pipe, arguments()), plain, 1e-5)
    pipe.enable_lora()
    pipe.set_adapters("one", 1.0)
    pipe.fuse_lora(lora_scale=0.3)
    pipe.unload_lora_weights()
    assert close(images(pipe, arguments()), half, 1e-3)
    with pytest.raises(ValueError, match=r"cross_attention_kwargs holds 'gligen'"):
        pipe(**arguments(cross_attention_kwargs={"gligen": 1}))


def test_an_identity_is_not_weighed_as_a_lora(pipe: S2EditPipeline, wide_picture: Image.Image) -> None:
    state = lora(pipe)
    identity = pipe.fit_identity(
        wide_picture, SOURCE, "lady", num_steps=1, batch_size=1, height=16, width=24, learning_rate=0.05,
        mask=np.arange(24)[None].repeat(16, 0) < 12, generator=seeded(), lora_init="random",
    )  # fmt: skip
    arguments = {
        "prompt": "a photo of a smiling [I] lady with glasses", "image": wide_picture, "num_inference_steps": 2,
        "output_type": "np",
    }  # fmt: skip
    pipe.load_identity(identity)
    alone = images(pipe, arguments)
    with pytest.raises(ValueError, match=r"load_identity\(identity, scale=...\)"):
        images(pipe, arguments | {"cross_attention_kwargs": {"scale": 0.5}})
    pipe.load_lora_weights(state)
    assert close(images(pipe, arguments | {"cross_attention_kwargs": {"scale": 0.0}}), alone, 1e-5)


# ------------------------------------------------------------------------------ IP-Adapter


def ip_adapter(pipe: S2EditPipeline, width: int = 16, *, face: bool = False, seed: int = 0) -> dict[str, Any]:
    """Random weights of an adapter for encoded pictures of ``width`` numbers."""
    generator, unet, layers = seeded(seed), pipe.unet, {}
    cross = unet.config.cross_attention_dim
    for number, name in enumerate(name for name in unet.attn_processors if "attn2" in name):
        hidden = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for part in "kv":
            weight = torch.randn(hidden, cross, generator=generator)
            layers[f"{2 * number + 1}.to_{part}_ip.weight"] = weight
    norm = {"norm.weight": torch.ones(cross), "norm.bias": torch.zeros(cross)}
    if not face:
        projection = {
            "proj.weight": torch.randn(4 * cross, width, generator=generator),
            "proj.bias": torch.zeros(4 * cross),
        }
    else:
        projection = {
            "proj.0.weight": torch.randn(2 * width, width, generator=generator), "proj.0.bias": torch.zeros(2 * width),
            "proj.2.weight": torch.randn(4 * cross, 2 * width, generator=generator),
            "proj.2.bias": torch.zeros(4 * cross),
        }  # fmt: skip
    return {"image_proj": projection | norm, "ip_adapter": layers}


def load(pipe: S2EditPipeline, *states: dict[str, Any]) -> None:
    pipe.load_ip_adapter(
        list(states), subfolder=[""] * len(states), weight_name=[""] * len(states), image_encoder_folder=None
    )


def embeds(seed: int = 0, *, guided: bool = True) -> torch.Tensor:
    return torch.randn(2 if guided else 1, 1, 16, generator=seeded(seed))


@pytest.mark.parametrize("face", [False, True], ids=["plain", "FaceID"])
def test_an_ip_adapter_shows_pictures(pipe: S2EditPipeline, arguments: Arguments, face: bool) -> None:
    plain = images(pipe, arguments())
    with pytest.raises(ValueError, match=r"ip_adapter_image_embeds= is for an IP-Adapter, and none is loaded"):
        pipe(**arguments(ip_adapter_image_embeds=[embeds()]))
    load(pipe, ip_adapter(pipe, face=face))
    shown = images(pipe, arguments(ip_adapter_image_embeds=[embeds()]))
    other = images(pipe, arguments(ip_adapter_image_embeds=[embeds(1)]))
    assert not close(shown, plain, 1e-2) and not close(shown, other, 1e-3)
    pipe.set_ip_adapter_scale(0.0)
    assert close(images(pipe, arguments(ip_adapter_image_embeds=[embeds()])), plain, 1e-5)
    unguided = arguments(ip_adapter_image_embeds=[embeds(guided=False)], guidance_scale=1.0)
    assert images(pipe, unguided).shape == plain.shape
    if "image" in arguments():
        with pytest.raises(ValueError, match="must hold the unconditional pictures' rows before the others"):
            pipe(**arguments(ip_adapter_image_embeds=[embeds(guided=False)]))
        pipe.set_ip_adapter_scale(1.0)
        assert np.array_equal(images(pipe, arguments()), plain)  # shown nothing, it isn't there
    else:
        with pytest.raises(ValueError, match="An IP-Adapter is loaded: show it something"):
            pipe(**arguments())
    pipe.unload_ip_adapter()
    assert np.array_equal(images(pipe, arguments()), plain)


def test_an_edits_source_is_the_bare_models_whatever_is_shown(pipe: S2EditPipeline, wide_picture: Image.Image) -> None:
    """Also where its branch isn't pinned; and an inversion made before serves."""
    settings = {"source_prompt": SOURCE, "num_inference_steps": 2, "output_type": "np", "blend_words": False}
    before = pipe.invert(wide_picture, SOURCE, num_inference_steps=2)
    bare = pipe(TARGET, wide_picture, inversion="ddim", **settings)
    load(pipe, ip_adapter(pipe))
    assert torch.equal(pipe.invert(wide_picture, SOURCE, num_inference_steps=2).trajectory, before.trajectory)
    shown = pipe(TARGET, wide_picture, inversion="ddim", ip_adapter_image_embeds=[embeds()], **settings)
    assert close(shown.source, bare.source, 1e-5) and not close(shown.images, bare.images, 1e-3)
    assert pipe(TARGET, inversion=before, source_prompt=SOURCE, ip_adapter_image_embeds=[embeds()]).images


def test_an_ip_adapter_and_an_identity_side_by_side(pipe: S2EditPipeline, wide_picture: Image.Image) -> None:
    mask = np.arange(24)[None].repeat(16, 0) < 12
    fit = {"num_steps": 1, "batch_size": 1, "height": 16, "width": 24, "learning_rate": 0.05, "lora_init": "random"}
    identity = pipe.fit_identity(wide_picture, SOURCE, "lady", mask=mask, generator=seeded(), **fit)
    word = "a photo of a smiling [I] lady with glasses"
    calls = [
        {"prompt": word, "image": wide_picture, "num_inference_steps": 2, "output_type": "np", "blend_words": False},
        {"prompt": word, "num_inference_steps": 2, "output_type": "np", "height": 16, "width": 24},
    ]
    pipe.load_identity(identity)
    alone = [images(pipe, {**call, "generator": seeded()}) for call in calls]
    load(pipe, ip_adapter(pipe))
    pipe.set_ip_adapter_scale(0.0)
    for scale, same in ((0.0, True), (1.0, False)):
        pipe.set_ip_adapter_scale(scale)
        for call, without in zip(calls, alone, strict=True):
            both = images(pipe, {**call, "generator": seeded(), "ip_adapter_image_embeds": [embeds()]})
            assert close(both, without, 1e-5) is same
    pipe.unload_identity()
    with pytest.raises(ValueError, match=r"An IP-Adapter is loaded\. A new identity is fitted to the bare model"):
        pipe.fit_identity(wide_picture, SOURCE, "lady", mask=mask, **fit)


def test_ip_adapters_masks_say_where_a_picture_counts(pipe: S2EditPipeline, arguments: Arguments) -> None:
    load(pipe, ip_adapter(pipe))
    everywhere, nowhere, left = (torch.ones(1, 1, 8, 12) * value for value in (1.0, 0.0, 1.0))
    left[..., 6:] = 0.0
    made = [
        images(
            pipe,
            arguments(ip_adapter_image_embeds=[embeds()], cross_attention_kwargs={"ip_adapter_masks": [mask]}),
        )
        for mask in (everywhere, nowhere, left)
    ]
    unmasked = images(pipe, arguments(ip_adapter_image_embeds=[embeds()]))
    assert close(made[0], unmasked, 1e-4) and not close(made[1], unmasked, 1e-3)
    assert not close(made[2], made[0], 1e-4) and not close(made[2], made[1], 1e-4)
    pipe.set_ip_adapter_scale(0.0)
    assert close(images(pipe, arguments(ip_adapter_image_embeds=[embeds()])), made[1], 1e-4)


def test_two_ip_adapters_and_several_pictures(pipe: S2EditPipeline, arguments: Arguments) -> None:
    load(pipe, ip_adapter(pipe), ip_adapter(pipe, seed=1))
    both = images(pipe, arguments(ip_adapter_image_embeds=[embeds(), embeds(1)]))
    swapped = images(pipe, arguments(ip_adapter_image_embeds=[embeds(1), embeds()]))
    assert not close(both, swapped, 1e-3)
    if "image" in arguments():
        with pytest.raises(ValueError, match="ip_adapter_image_embeds lists 1 for 2 IP-Adapters"):
            pipe(**arguments(ip_adapter_image_embeds=[embeds()]))
        with pytest.raises(ValueError, match="An edit shows each IP-Adapter one picture"):
            pipe(**arguments(ip_adapter_image_embeds=[torch.cat([embeds(), embeds()], 1), embeds()]))


def test_a_picture_is_encoded_by_the_image_encoder(pipe: S2EditPipeline, arguments: Arguments) -> None:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8,
        projection_dim=16,
    )  # fmt: skip
    size = {"height": 16, "width": 16}
    pipe.register_modules(
        image_encoder=CLIPVisionModelWithProjection(config).eval(),
        feature_extractor=CLIPImageProcessor(size=size, crop_size=size),
    )
    load(pipe, ip_adapter(pipe))
    shown = Image.new("RGB", (16, 16), "red")
    by_picture = images(pipe, arguments(ip_adapter_image=shown))
    file = io.BytesIO()
    shown.save(file, "PNG")
    assert np.array_equal(images(pipe, arguments(ip_adapter_image=file.getvalue())), by_picture)
    pixels = pipe.feature_extractor(shown, return_tensors="pt").pixel_values
    with torch.no_grad():
        encoded = pipe.image_encoder(pixels).image_embeds[None]
    by_embeds = images(pipe, arguments(ip_adapter_image_embeds=[torch.cat([torch.zeros_like(encoded), encoded])]))
    assert close(by_picture, by_embeds, 1e-5)
