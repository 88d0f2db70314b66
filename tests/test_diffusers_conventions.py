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
from PIL import Image

from s2edit_pipeline import S2EditPipeline

SOURCE, TARGET = "a photo of a sad lady", "a photo of a smiling lady"
Call = Callable[..., Any]


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
    wanted = pipe(**arguments()).images
    pipe.save_pretrained(tmp_path)
    for loader in (S2EditPipeline, StableDiffusionPipeline):  # the folder is Stable Diffusion's
        loaded = loader.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        again = loaded if loader is S2EditPipeline else S2EditPipeline.from_pipe(loaded)
        again.set_progress_bar_config(disable=True)
        assert np.abs(again(**arguments()).images - wanted).max() < 1e-4


def test_optional_components_stay_none(pipe: S2EditPipeline, arguments: Call, tmp_path: Path) -> None:
    absent = {name for name in pipe._optional_components if getattr(pipe, name) is None}
    assert absent == {"safety_checker", "feature_extractor", "image_encoder", "text_encoder_2", "tokenizer_2"}
    pipe.save_pretrained(tmp_path)
    loaded = S2EditPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert {name for name in pipe._optional_components if getattr(loaded, name) is None} == absent
    assert np.abs(loaded(**arguments()).images - pipe(**arguments()).images).max() < 1e-4


@pytest.mark.parametrize("missing", ["text_encoder", "tokenizer", "unet", "vae", "scheduler"])
def test_a_needed_component_that_is_none_is_named(pipe: S2EditPipeline, arguments: Call, missing: str) -> None:
    part = S2EditPipeline(**{**pipe.components, missing: None})
    assert getattr(part, missing) is None
    with pytest.raises(ValueError, match=f"The pipeline has no {missing}; load it whole, or pass {missing}="):
        part(**arguments())


def test_components_are_what_init_takes(pipe: S2EditPipeline, arguments: Call) -> None:
    taken = set(inspect.signature(S2EditPipeline.__init__).parameters)
    settings = {"self", "requires_safety_checker", "force_zeros_for_empty_prompt"}
    assert set(pipe.components) == taken - settings - {"text_encoder_2", "tokenizer_2"}  # SDXL's
    again = S2EditPipeline(**pipe.components)
    again.set_progress_bar_config(disable=True)
    assert again.unet is pipe.unet
    assert np.array_equal(again(**arguments()).images, pipe(**arguments()).images)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_is_that_of_every_module(pipe: S2EditPipeline, arguments: Call, tmp_path: Path, dtype: Any) -> None:
    wanted = pipe(**arguments()).images
    pipe.save_pretrained(tmp_path)
    loaded = S2EditPipeline.from_pretrained(tmp_path, dtype=dtype)
    loaded.set_progress_bar_config(disable=True)
    for each in (loaded, pipe.to(dtype)):
        modules = [m for m in each.components.values() if isinstance(m, torch.nn.Module)]
        assert each.dtype == dtype and {m.dtype for m in modules} == {dtype}
        found = each(**arguments()).images
        assert np.isfinite(found).all()
        if dtype == torch.bfloat16 or "image" in arguments():  # the same seed is other noise in float64
            assert np.abs(found - wanted).mean() < 0.05
    assert pipe.to("cpu").device == torch.device("cpu")


def test_from_pipe_there_and_back(pipe: S2EditPipeline, arguments: Call) -> None:
    wanted = pipe(**arguments()).images
    config = dict(pipe.config)
    stock = StableDiffusionPipeline.from_pipe(pipe)
    assert stock.unet is pipe.unet and stock.text_encoder is pipe.text_encoder
    again = S2EditPipeline.from_pipe(stock)
    again.set_progress_bar_config(disable=True)
    assert all(again.config[name] == value for name, value in config.items() if not name.startswith("_"))
    assert np.array_equal(again(**arguments()).images, wanted)
    assert np.array_equal(pipe(**arguments()).images, wanted)


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
    latents = pipe(**arguments(output_type="latent")).images
    decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    assert np.abs((decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).detach().numpy() - as_array).max() < 1e-5


def test_a_batch_is_its_pictures_one_by_one(pipe: S2EditPipeline, arguments: Call) -> None:
    prompts = [TARGET, "a photo of a lady with glasses", "a lady"]
    singles, batch = [], {"prompt": prompts}
    drawing = "generator" in arguments()
    for i, prompt in enumerate(prompts):
        own = {"generator": torch.Generator().manual_seed(i)} if drawing else {}
        singles.append(pipe(**arguments(prompt=prompt, **own)).images[0])
    if drawing:
        batch["generator"] = [torch.Generator().manual_seed(i) for i in range(3)]
    found = pipe(**arguments(**batch)).images
    assert found.shape == (3, 32, 32, 3)
    assert np.abs(found - np.stack(singles)).max() < 1e-4


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


def test_callbacks_get_what_they_ask_for(pipe: S2EditPipeline, arguments: Call) -> None:
    names = list(pipe._callback_tensor_inputs)
    assert names == ["latents", "prompt_embeds", "negative_prompt_embeds"]
    for asked in (["latents"], names, None):
        seen: list[tuple[int, int]] = []

        def look(pipeline: Any, step: int, timestep: int, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            assert pipeline is pipe
            assert list(tensors) == (asked or ["latents"])  # noqa: B023
            assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())
            seen.append((step, timestep))  # noqa: B023
            return {}

        pipe(**arguments(callback_on_step_end=look, callback_on_step_end_tensor_inputs=asked))
        assert [step for step, _ in seen] == [0, 1, 2]
        assert [t for _, t in seen] == sorted((t for _, t in seen), reverse=True)
    with pytest.raises(ValueError, match="'noise' can't be handed to callbacks"):
        pipe(**arguments(callback_on_step_end=look, callback_on_step_end_tensor_inputs=["noise"]))


def test_callbacks_may_change_the_latents(pipe: S2EditPipeline, arguments: Call) -> None:
    def zero(pipeline: Any, step: int, timestep: int, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else tensors

    changed = pipe(**arguments(callback_on_step_end=zero, output_type="latent")).images
    assert float(changed.abs().sum()) == 0
    assert float(pipe(**arguments(output_type="latent")).images.abs().sum()) > 1


def test_callbacks_may_stop_it(pipe: S2EditPipeline, arguments: Call) -> None:
    steps: list[int] = []
    latents: list[torch.Tensor] = []

    def stop(pipeline: Any, step: int, timestep: int, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        steps.append(step)
        latents.append(tensors["latents"].clone())
        pipeline._interrupt = step == 1
        return {}

    found = pipe(**arguments(callback_on_step_end=stop, output_type="latent")).images
    assert steps == [0, 1] and pipe.interrupt
    assert torch.equal(found, latents[-1][-1:])
    steps.clear()
    pipe(**arguments(callback_on_step_end=lambda *_: steps.append(0) or {}))
    assert len(steps) == 3 and not pipe.interrupt  # the next call isn't stopped


# ------------------------------------------------------------------------------ memory


def test_slicing_and_tiling_change_nothing(pipe: S2EditPipeline, arguments: Call) -> None:
    wanted = pipe(**arguments()).images
    pipe.enable_attention_slicing(1)
    assert np.abs(pipe(**arguments()).images - wanted).max() < 1e-4
    pipe.disable_attention_slicing()
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
    assert np.abs(pipe(**arguments()).images - wanted).max() < 1e-4


class Recorder(accelerate.hooks.ModelHook):
    """Says when its module is asked."""

    def __init__(self, name: str, seen: list[str]) -> None:
        self.name, self.seen = name, seen

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.seen.append(self.name)
        return args, kwargs


def test_model_offload_hooks_are_freed_after_each_call(
    pipe: S2EditPipeline, arguments: Call, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """enable_model_cpu_offload's hooks, on the CPU: in its order, and put on anew after each public call."""
    wanted = pipe(**arguments()).images
    enabled: list[int] = []

    def enable(*args: Any, **kwargs: Any) -> None:
        """As diffusers does, without its check that there is an accelerator."""
        enabled.append(1)
        pipe.remove_all_hooks()
        pipe._all_hooks, hook = [], None
        for name in pipe.model_cpu_offload_seq.split("->"):
            if isinstance(getattr(pipe, name), torch.nn.Module):
                _, hook = accelerate.cpu_offload_with_hook(getattr(pipe, name), "cpu", prev_module_hook=hook)
                pipe._all_hooks.append(hook)

    monkeypatch.setattr(pipe, "enable_model_cpu_offload", enable)
    enable()
    assert np.array_equal(pipe(**arguments()).images, wanted)
    pipe.invert(picture, SOURCE, num_inference_steps=2)
    pipe.preview_mask(picture, SOURCE, "lady")
    assert len(enabled) == 4
    assert pipe._execution_device == torch.device("cpu")
    pipe.remove_all_hooks()
    assert np.array_equal(pipe(**arguments()).images, wanted)


def test_modules_are_asked_in_the_offloading_order(pipe: S2EditPipeline, arguments: Call) -> None:
    seen: list[str] = []
    names = [n for n in pipe.model_cpu_offload_seq.split("->") if getattr(pipe, n) is not None]
    for name in names:
        accelerate.hooks.add_hook_to_module(getattr(pipe, name), Recorder(name, seen))
    pipe(**arguments())
    turns = [name for name, before in zip(seen, [None, *seen], strict=False) if name != before]
    draws, edits = names, [names[0], "vae", *names[1:]]  # an edit encodes the picture too
    assert names == ["text_encoder", "unet", "vae"] and turns == (edits if "image" in arguments() else draws)


def test_weights_may_stay_on_disk_or_cpu_until_they_are_asked_for(pipe: S2EditPipeline, arguments: Call) -> None:
    """enable_sequential_cpu_offload's hooks: between calls the modules' weights are on the meta device."""
    wanted = pipe(**arguments()).images
    for name in ("text_encoder", "unet", "vae"):
        accelerate.cpu_offload(getattr(pipe, name), torch.device("cpu"), offload_buffers=True)
    assert pipe.unet.conv_in.weight.device.type == "meta"
    assert np.array_equal(pipe(**arguments()).images, wanted)
    assert pipe.unet.conv_in.weight.device.type == "meta"


def test_identities_and_offloading(pipe: S2EditPipeline, picture: Image.Image, half_mask: np.ndarray) -> None:
    """An identity that is loaded is offloaded with its model; one can't be laid on weights that aren't there."""
    identity = pipe.fit_identity(picture, SOURCE, "lady", mask=half_mask, num_steps=1)
    arguments: dict[str, Any] = {
        "prompt": "a photo of a smiling [I] lady", "image": picture, "num_inference_steps": 2, "output_type": "np",
    }  # fmt: skip
    pipe.load_identity(identity)
    wanted = pipe(**arguments).images
    for name in ("text_encoder", "unet", "vae"):
        accelerate.cpu_offload(getattr(pipe, name), torch.device("cpu"), offload_buffers=True)
    assert np.array_equal(pipe(**arguments).images, wanted)
    for change in (lambda: pipe.load_identity(identity, token="[J]"), pipe.unload_identity):
        with pytest.raises(ValueError, match=r"weights of the \w+ are offloaded.*remove_all_hooks"):
            change()
    assert pipe.identities == ("[I]",)
    pipe.remove_all_hooks()
    pipe.unload_identity()
    assert pipe.identities == ()
