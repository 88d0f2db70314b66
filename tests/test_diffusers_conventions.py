"""What every diffusers pipeline keeps to, in the manner of diffusers' common pipeline tests: drawing and editing."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.callbacks import SDCFGCutoffCallback
from PIL import Image
from safetensors.torch import save_file

from s2edit_pipeline import S2EditPipeline
from s2edit_pipeline.pipeline_components import OPTIONS

SOURCE, TARGET = "a photo of a sad lady", "a photo of a smiling lady"
Call = Callable[..., Any]
COMPONENTS = set(inspect.signature(S2EditPipeline.__init__).parameters) - {"self", *OPTIONS}


@pytest.fixture(params=["draw", "edit"])
def arguments(request: pytest.FixtureRequest, picture: Image.Image) -> Callable[[], dict[str, Any]]:
    """A call's arguments, with a fresh generator."""

    def make(**changes: Any) -> dict[str, Any]:
        made: dict[str, Any] = {"prompt": TARGET, "num_inference_steps": 3, "output_type": "np"}
        if request.param == "draw":
            made["generator"] = torch.Generator().manual_seed(0)
        else:
            made |= {"image": picture, "source_prompt": SOURCE}
        return made | changes

    return make


def test_a_saved_pipeline_is_the_same_again(pipe: S2EditPipeline, arguments: Call, tmp_path: Path) -> None:
    expected = pipe(**arguments()).images
    pipe.save_pretrained(tmp_path)
    for loader in (S2EditPipeline, StableDiffusionPipeline):  # the folder is Stable Diffusion's
        loaded = loader.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        again = loaded if loader is S2EditPipeline else S2EditPipeline.from_pipe(loaded)
        again.set_progress_bar_config(disable=True)
        assert np.abs(again(**arguments()).images - expected).max() < 1e-4


def test_optional_components_stay_none(pipe: S2EditPipeline, arguments: Call, tmp_path: Path) -> None:
    absent = {name for name in COMPONENTS if getattr(pipe, name) is None}
    assert absent == COMPONENTS - {"vae", "text_encoder", "tokenizer", "unet", "scheduler"}
    pipe.save_pretrained(tmp_path)
    loaded = S2EditPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert {name for name in COMPONENTS if getattr(loaded, name) is None} == absent
    assert np.abs(loaded(**arguments()).images - pipe(**arguments()).images).max() < 1e-4


@pytest.mark.parametrize("missing", ["text_encoder", "tokenizer", "unet", "vae", "scheduler"])
def test_a_needed_component_that_is_none_is_named(pipe: S2EditPipeline, arguments: Call, missing: str) -> None:
    part = S2EditPipeline(**{**pipe.components, missing: None})
    assert getattr(part, missing) is None
    with pytest.raises(ValueError, match=f"The pipeline has no {missing}; load it whole, or pass {missing}="):
        part(**arguments())


def test_components_make_other_pipelines(pipe: S2EditPipeline, arguments: Call) -> None:
    """Those that are None are left out, unless the stock pipeline has them."""
    assert set(pipe.components) == {
        "vae", "text_encoder", "tokenizer", "unet", "scheduler", "safety_checker", "feature_extractor", "image_encoder"
    }  # fmt: skip
    assert set(pipe.components) < COMPONENTS
    assert StableDiffusionPipeline(**pipe.components, requires_safety_checker=False).unet is pipe.unet
    again = S2EditPipeline(**pipe.components)
    again.set_progress_bar_config(disable=True)
    assert again.unet is pipe.unet
    assert np.array_equal(again(**arguments()).images, pipe(**arguments()).images)


def test_no_component_has_a_default_that_the_loader_could_prefer() -> None:
    """diffusers takes what has one from the folder, whatever was passed; the class can be called without them still."""
    parameters = inspect.signature(S2EditPipeline.__init__).parameters
    assert all(parameters[name].default is inspect.Parameter.empty for name in COMPONENTS)
    assert all(parameters[name].default is not inspect.Parameter.empty for name in OPTIONS)
    assert S2EditPipeline().unet is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_is_that_of_every_module(pipe: S2EditPipeline, arguments: Call, tmp_path: Path, dtype: Any) -> None:
    expected = pipe(**arguments()).images
    pipe.save_pretrained(tmp_path)
    loaded = S2EditPipeline.from_pretrained(tmp_path, dtype=dtype)
    loaded.set_progress_bar_config(disable=True)
    for each in (loaded, pipe.to(dtype)):
        modules = [m for m in each.components.values() if isinstance(m, torch.nn.Module)]
        assert each.dtype == dtype and {m.dtype for m in modules} == {dtype}
        images = each(**arguments()).images
        assert np.isfinite(images).all()
        if dtype == torch.bfloat16 or "image" in arguments():  # the same seed is other noise in float64
            assert np.abs(images - expected).mean() < 0.05
    assert pipe.to("cpu").device == torch.device("cpu")


def test_from_pipe_there_and_back(pipe: S2EditPipeline, arguments: Call) -> None:
    expected = pipe(**arguments()).images
    config = dict(pipe.config)
    stock = StableDiffusionPipeline.from_pipe(pipe)
    assert stock.unet is pipe.unet and stock.text_encoder is pipe.text_encoder
    again = S2EditPipeline.from_pipe(stock)
    again.set_progress_bar_config(disable=True)
    assert all(again.config[name] == value for name, value in config.items() if not name.startswith("_"))
    assert np.array_equal(again(**arguments()).images, expected)
    assert np.array_equal(pipe(**arguments()).images, expected)


def test_the_class_is_found_by_its_name(pipe: S2EditPipeline, tmp_path: Path) -> None:
    assert issubclass(S2EditPipeline, DiffusionPipeline)
    pipe.save_pretrained(tmp_path)
    index = DiffusionPipeline.load_config(tmp_path)
    assert index["_class_name"] == "S2EditPipeline" and set(index["unet"]) == {"diffusers", "UNet2DConditionModel"}


def test_dicts_and_tuples_are_the_same(pipe: S2EditPipeline, arguments: Call) -> None:
    as_dict = pipe(**arguments())
    as_tuple = pipe(**arguments(return_dict=False))
    assert isinstance(as_tuple, tuple) and np.array_equal(as_tuple[0], as_dict.images)


def test_output_types_are_the_same_picture(pipe: S2EditPipeline, arguments: Call) -> None:
    as_array = pipe(**arguments()).images
    as_tensor = pipe(**arguments(output_type="pt")).images
    as_pil = pipe(**arguments(output_type="pil")).images
    assert np.abs(as_tensor.permute(0, 2, 3, 1).numpy() - as_array).max() < 1e-6
    assert np.abs(np.stack([np.asarray(image) for image in as_pil]) / 255 - as_array).max() < 0.51 / 255
    own = {"keep_pixels": False, "output_size": "model"} if "image" in arguments() else {}
    latents, whole = (pipe(**arguments(output_type=kind, **own)).images for kind in ("latent", "np"))
    decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    assert np.abs((decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).detach().numpy() - whole).max() < 1e-5


def test_a_batch_is_its_pictures_one_by_one(pipe: S2EditPipeline, arguments: Call) -> None:
    prompts = [TARGET, "a photo of a lady with glasses", "a lady"]
    singles, batch = [], {"prompt": prompts}
    drawing = "generator" in arguments()
    for i, prompt in enumerate(prompts):
        own = {"generator": torch.Generator().manual_seed(i)} if drawing else {}
        singles.append(pipe(**arguments(prompt=prompt, **own)).images[0])
    if drawing:
        batch["generator"] = [torch.Generator().manual_seed(i) for i in range(3)]
    together = pipe(**arguments(**batch)).images
    assert together.shape == (3, 32, 32, 3)
    assert np.abs(together - np.stack(singles)).max() < 1e-4


def test_several_pictures_of_each_prompt(pipe: S2EditPipeline) -> None:
    def draw(**changes: Any) -> np.ndarray:
        return pipe(num_inference_steps=2, output_type="np", **changes).images

    for prompts in (1, 2):
        for each in (1, 2):
            made = draw(
                prompt=[TARGET] * prompts if prompts > 1 else TARGET, num_images_per_prompt=each,
                generator=[torch.Generator().manual_seed(i) for i in range(prompts * each)],
            )  # fmt: skip
            assert len(made) == prompts * each
    last = draw(prompt=TARGET, generator=torch.Generator().manual_seed(3))
    assert np.abs(made[3] - last[0]).max() < 1e-4


# ------------------------------------------------------------------------------ callbacks


NAMES = ["latents", "prompt_embeds", "negative_prompt_embeds"]


@pytest.mark.parametrize("names", [["latents"], NAMES, None])
def test_callbacks_get_the_tensors_that_they_name(
    pipe: S2EditPipeline, arguments: Call, names: list[str] | None
) -> None:
    steps: list[tuple[int, int]] = []

    def look(pipeline: Any, step: int, timestep: int, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert pipeline is pipe
        assert list(tensors) == (names or ["latents"])
        assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())
        steps.append((step, int(timestep)))
        return {}

    pipe(**arguments(callback_on_step_end=look, callback_on_step_end_tensor_inputs=names))
    assert [step for step, _ in steps] == [0, 1, 2]
    assert [t for _, t in steps] == sorted((t for _, t in steps), reverse=True)
    with pytest.raises(ValueError, match=r"'noise' can't be handed to callbacks|but found \['noise'\]"):
        pipe(**arguments(callback_on_step_end=look, callback_on_step_end_tensor_inputs=["noise"]))


def test_callbacks_read_the_calls_facts(pipe: S2EditPipeline, arguments: Call) -> None:
    """After it too."""
    facts: list[tuple[Any, ...]] = []

    def look(pipeline: Any, step: int, timestep: int, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        facts.append((pipeline.guidance_scale, pipeline.num_timesteps, pipeline.do_classifier_free_guidance))
        return {}

    pipe(**arguments(callback_on_step_end=look, guidance_scale=3.0))
    assert facts == [(3.0, 3, True)] * 3
    assert (pipe.guidance_scale, pipe.num_timesteps, pipe.interrupt) == (3.0, 3, False)


def test_a_callback_may_change_the_guidance_of_the_steps_to_come(pipe: S2EditPipeline, arguments: Call) -> None:
    """``_guidance_scale`` is diffusers' own name, which its callbacks set."""

    def images(change_at: int | None) -> np.ndarray:
        def change(pipeline: Any, step: int, timestep: int, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
            if step == change_at:
                pipeline._guidance_scale = 15.0
            return {}

        more = {} if "generator" in arguments() else {"guidance_stop": 1.0, "blend_words": False}
        return pipe(**arguments(callback_on_step_end=change, guidance_scale=5.0, **more)).images

    always, last_changed, never_changed = images(None), images(1), images(2)
    assert np.array_equal(always, never_changed)  # there is no step after the last
    assert np.abs(always - last_changed).max() > 1e-5


def test_callbacks_may_change_the_latents(pipe: S2EditPipeline, arguments: Call) -> None:
    def zero(pipeline: Any, step: int, timestep: int, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else tensors

    changed = pipe(**arguments(callback_on_step_end=zero, output_type="latent")).images
    assert float(changed.abs().sum()) == 0
    assert float(pipe(**arguments(output_type="latent")).images.abs().sum()) > 1


@pytest.mark.parametrize("name", ["interrupt", "_interrupt"])
def test_callbacks_may_stop_it(pipe: S2EditPipeline, arguments: Call, name: str) -> None:
    """``_interrupt`` is the name that diffusers' guides have callbacks set."""
    steps: list[int] = []
    latents: list[torch.Tensor] = []

    def stop(pipeline: Any, step: int, timestep: int, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        steps.append(step)
        latents.append(tensors["latents"].clone())
        setattr(pipeline, name, step == 1)
        assert pipeline.interrupt is (step == 1)
        return {}

    result = pipe(**arguments(callback_on_step_end=stop, output_type="latent"))
    assert steps == [0, 1] and result.interrupted
    assert torch.equal(result.images, latents[-1][-1:])
    steps.clear()
    result = pipe(**arguments(callback_on_step_end=lambda *_: steps.append(0) or {}))
    assert len(steps) == 3 and not result.interrupted and not pipe.interrupt  # the next call isn't stopped


def test_diffusers_own_callbacks_draw_as_in_its_pipeline(pipe: S2EditPipeline, picture: Image.Image) -> None:
    """They steer the stock pipeline's loop; an edit's loop refuses them, and names what does the same there."""
    stock = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    images = []
    for each in (stock, pipe):
        arguments = {"num_inference_steps": 4, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
        cutoff = SDCFGCutoffCallback(cutoff_step_ratio=0.5)
        images.append(each(TARGET, guidance_scale=5.0, callback_on_step_end=cutoff, **arguments).images)
    assert np.array_equal(images[0], images[1])
    guided = pipe(TARGET, guidance_scale=5.0, **(arguments | {"generator": torch.Generator().manual_seed(0)})).images
    assert np.abs(guided - images[0]).max() > 1e-5
    with pytest.raises(TypeError, match=r"SDCFGCutoffCallback steers .*pass guidance_stop="):
        pipe(TARGET, picture, SOURCE, callback_on_step_end=cutoff)


# ------------------------------------------------------------------------------ memory


def test_slicing_and_tiling_change_nothing(pipe: S2EditPipeline, arguments: Call) -> None:
    expected = pipe(**arguments()).images
    pipe.enable_attention_slicing(1)
    assert np.abs(pipe(**arguments()).images - expected).max() < 1e-4
    pipe.disable_attention_slicing()
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
    assert np.abs(pipe(**arguments()).images - expected).max() < 1e-4


class Recorder(accelerate.hooks.ModelHook):
    """Notes each call of its module."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls.append(self.name)
        return args, kwargs


def test_model_offload_hooks_are_freed_after_each_call(
    pipe: S2EditPipeline, arguments: Call, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """enable_model_cpu_offload's hooks, on the CPU: in its order, and put on anew after each public call."""
    expected = pipe(**arguments()).images
    enabled: list[int] = []

    def enable(*args: Any, **kwargs: Any) -> None:
        """As diffusers does, without its check that there is an accelerator; ``_all_hooks`` is its own attribute."""
        enabled.append(1)
        pipe.remove_all_hooks()
        pipe._all_hooks, hook = [], None
        for name in pipe.model_cpu_offload_seq.split("->"):
            if isinstance(getattr(pipe, name), torch.nn.Module):
                _, hook = accelerate.cpu_offload_with_hook(getattr(pipe, name), "cpu", prev_module_hook=hook)
                pipe._all_hooks.append(hook)

    monkeypatch.setattr(pipe, "enable_model_cpu_offload", enable)
    enable()
    assert np.array_equal(pipe(**arguments()).images, expected)
    pipe.invert(picture, SOURCE, num_inference_steps=2)
    pipe.preview_mask(picture, SOURCE, "lady")
    assert len(enabled) == 4
    assert pipe.family.device == torch.device("cpu")
    pipe.remove_all_hooks()
    assert np.array_equal(pipe(**arguments()).images, expected)


def test_modules_are_called_in_the_offloading_order(pipe: S2EditPipeline, arguments: Call) -> None:
    calls: list[str] = []
    names = [n for n in pipe.model_cpu_offload_seq.split("->") if getattr(pipe, n) is not None]
    for name in names:
        accelerate.hooks.add_hook_to_module(getattr(pipe, name), Recorder(name, calls))
    pipe(**arguments())
    turns = [name for name, before in zip(calls, [None, *calls], strict=False) if name != before]
    draws, edits = names, [names[0], "vae", *names[1:]]  # an edit encodes the picture too
    assert names == ["text_encoder", "unet", "vae"] and turns == (edits if "image" in arguments() else draws)


def test_weights_may_stay_on_disk_or_cpu_until_they_are_needed(pipe: S2EditPipeline, arguments: Call) -> None:
    """enable_sequential_cpu_offload's hooks: between calls the modules' weights are on the meta device."""
    expected = pipe(**arguments()).images
    for name in ("text_encoder", "unet", "vae"):
        accelerate.cpu_offload(getattr(pipe, name), torch.device("cpu"), offload_buffers=True)
    assert pipe.unet.conv_in.weight.device.type == "meta"
    assert np.array_equal(pipe(**arguments()).images, expected)
    assert pipe.unet.conv_in.weight.device.type == "meta"


# ------------------------------------------------------------------------------ diffusers' own loaders


@pytest.fixture
def learned_word(pipe: S2EditPipeline, tmp_path: Path) -> Path:
    """A textual inversion."""
    path = tmp_path / "word.safetensors"
    save_file({"<cat>": torch.randn(32, generator=torch.Generator().manual_seed(0))}, path)
    return path


def test_a_textual_inversion_comes_before_identities(
    pipe: S2EditPipeline, picture: Image.Image, half_mask: np.ndarray, learned_word: Path
) -> None:
    """Taken out from under them it would take their tokens along; one that was there first works beside them."""
    identity = pipe.fit_identity(picture, SOURCE, "lady", mask=half_mask, num_steps=1, method="token")
    pipe.load_identity(identity)
    vocabulary = len(pipe.tokenizer)
    for call in (lambda: pipe.load_textual_inversion(str(learned_word)), lambda: pipe.unload_textual_inversion()):
        with pytest.raises(ValueError, match=r"textual_inversion changes .*\(\[I\]\).*unload_identity\(\) first"):
            call()
    assert len(pipe.tokenizer) == vocabulary and pipe.identities == ("[I]",)
    pipe.unload_identity()
    pipe.load_textual_inversion(str(learned_word))
    arguments = {"num_inference_steps": 2, "output_type": "np"}
    prompts = ("a lady with <cat>", "a [I] lady with <cat>")
    alone = pipe(prompts[0], generator=torch.Generator().manual_seed(0), **arguments).images
    plain = pipe("a lady with hat", generator=torch.Generator().manual_seed(0), **arguments).images
    assert np.abs(alone - plain).max() > 1e-4
    pipe.load_identity(identity)
    both = pipe(prompts[1], generator=torch.Generator().manual_seed(0), **arguments).images
    assert np.abs(both - alone).max() > 1e-5
    pipe.unload_identity()
    assert np.array_equal(pipe(prompts[0], generator=torch.Generator().manual_seed(0), **arguments).images, alone)
    pipe.unload_textual_inversion()
    assert "<cat>" not in pipe.tokenizer.get_vocab()


def test_a_lora_is_fused_before_identities(pipe: S2EditPipeline, picture: Image.Image) -> None:
    pipe.load_identity(pipe.fit_identity(picture, SOURCE, "lady", num_steps=1, method="token"))
    for call in (pipe.fuse_lora, pipe.unfuse_lora):
        with pytest.raises(ValueError, match=r"fuse_lora changes what the loaded identities \(\[I\]\)"):
            call()
