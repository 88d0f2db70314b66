"""Models whose weights are elsewhere between calls: every call gives what it gives without, and leaves them so.

The execution device is the CPU here, and a GPU in the tests marked so."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from accelerate.hooks import CpuOffload
from diffusers.hooks import apply_group_offloading
from PIL import Image

from s2edit_pipeline import IdentityAdapter
from s2edit_pipeline.identity_fingerprint import fingerprint
from s2edit_pipeline.offloaded_weights import gathered
from s2edit_pipeline.pipeline import S2EditPipeline

SOURCE, TARGET = "a photo of a sad lady", "a photo of a smiling [I] lady"
PARTS = ("text_encoder", "unet", "vae")
VOCABULARY = "a photo of a [sad|smiling] {lady|man}"


def offload(pipe: S2EditPipeline, way: str, device: str = "cpu") -> None:
    if way == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif way == "sequential" and device != "cpu":
        pipe.enable_sequential_cpu_offload(device=device)
    elif way == "sequential":  # diffusers numbers the device, and "cpu:0" isn't accelerate's "cpu"
        for name in PARTS:
            accelerate.cpu_offload(getattr(pipe, name), torch.device("cpu"))
    else:
        for name in PARTS:
            apply_group_offloading(getattr(pipe, name), torch.device(device), offload_type=way, num_blocks_per_group=1)


def state_of(pipe: S2EditPipeline, way: str) -> dict[str, Any]:
    """What is where, by module."""
    found = {}
    for part in PARTS:
        for name, module in getattr(pipe, part).named_modules():
            hook, registry = getattr(module, "_hf_hook", None), getattr(module, "_diffusers_hook", None)
            found[f"{part}.{name}"] = (
                type(hook).__name__,
                None if registry is None else sorted(registry.hooks),
                sorted((n, p.device.type, p.requires_grad) for n, p in module.named_parameters(recurse=False)),
                module.training,
            )
    return found


def fit(pipe: S2EditPipeline, picture: Image.Image, mask: np.ndarray | None, **options: Any) -> IdentityAdapter:
    """``mask`` None: an automatic one."""
    options = {"method": "lora", "num_steps": 1, "batch_size": 1, "crop": None, **options}
    return pipe.fit_identity(picture, SOURCE, "lady", mask=mask, generator=torch.Generator().manual_seed(0), **options)


def edit(pipe: S2EditPipeline, picture: Image.Image, identity: Any = None, **options: Any) -> np.ndarray:
    target = TARGET if identity is not None or pipe.identities else TARGET.replace("[I] ", "")
    return pipe(target, picture, SOURCE, identity, num_inference_steps=2, output_type="np", **options).images


WAYS = ["model", "sequential", "leaf_level", pytest.param("block_level", marks=pytest.mark.slow)]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def plain(_tiny: dict[str, dict[str, Any]], picture: Image.Image, half_mask: np.ndarray) -> dict[str, Any]:
    """What a model gives that isn't offloaded."""
    pipe = S2EditPipeline(**copy.deepcopy(_tiny["epsilon"]))
    pipe.set_progress_bar_config(disable=True)
    found = results(pipe, picture)
    found["full"] = fit(pipe, picture, half_mask, method="full", num_steps=1)
    found["fingerprints"] = fingerprints(pipe)
    found["no identity"] = edit(pipe, picture)
    pipe.load_identity(found["full"])
    found["full's edit"] = edit(pipe, picture)
    return found


def fingerprints(pipe: S2EditPipeline) -> dict[str, Any]:
    return {name: fingerprint(getattr(pipe, name), pipe._overlay.originals(name)) for name in ("unet", "text_encoder")}


def results(pipe: S2EditPipeline, picture: Image.Image) -> dict[str, Any]:
    """Fit, invert, edit, describe, preview."""
    identity = fit(pipe, picture, None)
    inversion = pipe.invert(picture, SOURCE, num_inference_steps=2)
    null_text = pipe.invert(picture, SOURCE, "null_text", num_inference_steps=1, guidance_scale=4.5)
    return {
        "identity": identity,
        "mask": np.asarray(pipe.preview_mask(picture, SOURCE, "lady")),
        "inversion": inversion,
        "trajectory": inversion.trajectory.float().cpu().numpy(),
        "null_text": null_text.unconditional_embeds.float().cpu().numpy(),
        "edit": edit(pipe, picture, inversion=inversion),
        "identity's edit": edit(pipe, picture, identity),
        "described": pipe.describe(picture, vocabulary=VOCABULARY).prompt,
    }


def everything_agrees(
    pipe: S2EditPipeline,
    picture: Image.Image,
    wanted: dict[str, Any],
    way: str,
    device: str = "cpu",
    atol: float = 0.0,
) -> None:
    offload(pipe, way, device)
    before = state_of(pipe, way)
    found = results(pipe, picture)
    assert state_of(pipe, way) == before
    assert found["described"] == wanted["described"]
    assert found["inversion"].made_with.weights.keys() == {"unet", "text_encoder"}
    for name, weight in wanted["identity"].weights.items():
        assert torch.allclose(found["identity"].weights[name].float(), weight.float(), atol=10 * atol)
    for name in ("trajectory", "null_text", "edit", "identity's edit"):
        assert np.abs(found[name] - wanted[name]).max() <= atol, name
    assert np.mean(found["mask"] != wanted["mask"]) <= atol
    plain = edit(pipe, picture, inversion=found["inversion"])
    assert np.abs(found["identity's edit"] - plain).max() > 1e-4  # it is at work


def test_every_call_is_as_without(pipe: S2EditPipeline, picture: Image.Image, plain: dict[str, Any], way: str) -> None:
    everything_agrees(pipe, picture, plain, way)


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["model", "sequential", "leaf_level", "block_level"])
def test_every_call_is_as_without_on_a_gpu(
    make_pipe: Callable[[], S2EditPipeline], picture: Image.Image, way: str
) -> None:
    """There it shows whether what is trained is where the work is done."""
    wanted = results(make_pipe().to("cuda"), picture)
    everything_agrees(make_pipe(), picture, wanted, way, "cuda", atol=1e-3)


@pytest.mark.parametrize("kind", ["identity", "full"])
def test_an_identity_comes_and_goes(
    pipe: S2EditPipeline, picture: Image.Image, plain: dict[str, Any], way: str, kind: str
) -> None:
    """It is offloaded with the model that it lies over; the weights are read where they are kept."""
    offload(pipe, way)
    before, identity = state_of(pipe, way), plain[kind]
    pipe.load_identity(identity)
    assert np.array_equal(edit(pipe, picture), plain[f"{kind}'s edit"])
    down = next((m for n, m in pipe.unet.named_modules() if ".lora_A." in n), None)
    assert (down is not None) == (kind == "identity")
    if down is not None and way == "sequential":
        assert down.weight.is_meta
    if down is not None and way == "leaf_level":
        assert down._diffusers_hook.hooks
    pipe.load_identity(identity, token="[J]")
    assert fingerprints(pipe) == plain["fingerprints"]
    pipe.unload_identity()
    assert state_of(pipe, way) == before and np.array_equal(edit(pipe, picture), plain["no identity"])


def test_what_is_trained_stays_where_the_work_is_done(
    pipe: S2EditPipeline, picture: Image.Image, half_mask: np.ndarray, way: str
) -> None:
    """No weights come and go under a backward pass; the autoencoder stays offloaded."""
    offload(pipe, way)
    before, seen = state_of(pipe, way), []

    def look(pipe: S2EditPipeline, step: int, total: int, measures: Any) -> None:
        for part in ("text_encoder", "unet"):
            for module in getattr(pipe, part).modules():
                assert not hasattr(module, "_hf_hook") and not getattr(module, "_diffusers_hook", Plain).hooks
                assert not any(p.is_meta for p in module.parameters(recurse=False))
        seen.append((hasattr(pipe.vae, "_hf_hook"), pipe.family.device))

    fit(pipe, picture, half_mask, callback_on_step_end=look)
    assert seen == [(way in ("model", "sequential"), torch.device("cpu"))]

    def fail(*arguments: Any) -> None:
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        fit(pipe, picture, half_mask, callback_on_step_end=fail)
    assert state_of(pipe, way) == before


class Plain:
    hooks: tuple[str, ...] = ()


def test_a_models_turn_does_not_send_away_what_is_trained(pipe: S2EditPipeline) -> None:
    """The autoencoder's hook sends the U-Net to the CPU, before it encodes a picture; not in the midst of a fit."""
    pipe.enable_model_cpu_offload(device="cpu")
    hook, modules = pipe.vae._hf_hook, [getattr(pipe, name) for name in PARTS]
    assert isinstance(hook, CpuOffload) and hook.prev_module_hook.model is pipe.unet
    chain = hook.prev_module_hook
    with gathered({"unet": pipe.unet}, to_train=True, neighbours=modules):
        assert hook.prev_module_hook is None and not hasattr(pipe.unet, "_hf_hook")
    assert hook.prev_module_hook is chain and isinstance(pipe.unet._hf_hook, CpuOffload)


def test_a_users_lora_is_read_where_it_is_kept(pipe: S2EditPipeline, picture: Image.Image) -> None:
    """An inversion notes its weights, which are on the meta device."""
    from peft import LoraConfig

    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    wanted = pipe.invert(picture, SOURCE, num_inference_steps=2)
    offload(pipe, "sequential")
    found = pipe.invert(picture, SOURCE, num_inference_steps=2)
    assert found.made_with == wanted.made_with and "default" in wanted.made_with.loras
    assert torch.equal(found.trajectory, wanted.trajectory)


def to_the_disk_by_groups(pipe: S2EditPipeline, folder: Path) -> None:
    options = {"offload_type": "leaf_level", "offload_to_disk_path": str(folder)}
    apply_group_offloading(pipe.unet, torch.device("cpu"), **options)


def to_the_disk(pipe: S2EditPipeline, folder: Path) -> None:
    accelerate.disk_offload(pipe.unet, str(folder), torch.device("cpu"), offload_buffers=True)


@pytest.mark.parametrize(
    ("go", "mend"),
    [(to_the_disk_by_groups, "without offload_to_disk_path="), (to_the_disk, r"pipe\.remove_all_hooks\(\)")],
)
def test_weights_on_the_disk_are_refused(
    pipe: S2EditPipeline,
    picture: Image.Image,
    half_mask: np.ndarray,
    plain: dict[str, Any],
    go: Callable[[S2EditPipeline, Path], None],
    mend: str,
    tmp_path: Path,
) -> None:
    go(pipe, tmp_path)
    identity, before = plain["identity"], edit(pipe, picture)
    for call in (
        lambda: fit(pipe, picture, half_mask),
        lambda: pipe.load_identity(identity),
        lambda: edit(pipe, picture, identity),
        lambda: pipe.invert(picture, SOURCE, "null_text", num_inference_steps=2),
    ):
        with pytest.raises(ValueError, match=f"The (weights of the )?unet (is|are) offloaded.*{mend}"):
            call()
    assert pipe.identities == () and np.array_equal(edit(pipe, picture), before)
