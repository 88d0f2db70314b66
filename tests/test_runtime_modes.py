"""Ways to run a model that diffusers' users know, with our attention processors in it: the same pictures and fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from s2edit_pipeline import IdentityAdapter
from s2edit_pipeline.pipeline import S2EditPipeline

SOURCE, TARGET = "a photo of a sad lady", "a photo of a smiling [I] lady"
QUICK = {"num_inference_steps": 3, "output_type": "np"}


def blocks(pipe: S2EditPipeline) -> list[torch.nn.Module]:
    """Those that ``compile_repeated_blocks`` compiles."""
    return [module for module in pipe.unet.modules() if type(module).__name__ == "BasicTransformerBlock"]


def fit(pipe: S2EditPipeline, picture: Image.Image, mask: np.ndarray, method: str = "lora") -> IdentityAdapter:
    return pipe.fit_identity(
        picture, SOURCE, "lady", method=method, mask=mask, num_steps=3, batch_size=2,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip


def edit(pipe: S2EditPipeline, picture: Image.Image, identity: IdentityAdapter) -> np.ndarray:
    return pipe(TARGET, picture, SOURCE, identity, num_inference_steps=3, output_type="np").images


def assert_near(found: IdentityAdapter, wanted: IdentityAdapter) -> None:
    """Also their weights' names; the fingerprint says that they belong to the same base."""
    assert found.weights.keys() == wanted.weights.keys() and found.base_fingerprint == wanted.base_fingerprint
    # all at once: a bias of a key has no true gradient, and AdamW makes steps of its rounding
    one, other = (
        torch.cat([tensor.flatten() for _, tensor in sorted({**each.weights, **each.rows}.items())])
        for each in (found, wanted)
    )
    assert float((one - other).norm()) < 0.02 * float(other.norm())


def compiled_agrees(
    pipe: S2EditPipeline, picture: Image.Image, mask: np.ndarray, backend: str, methods: tuple[str, ...]
) -> None:
    wanted = {method: fit(pipe, picture, mask, method) for method in methods}
    pictures = {method: edit(pipe, picture, identity) for method, identity in wanted.items()}
    pipe.unet = unet = torch.compile(pipe.unet, backend=backend)
    for method in methods:
        assert_near(fit(pipe, picture, mask, method), wanted[method])
        assert np.abs(edit(pipe, picture, wanted[method]) - pictures[method]).max() < 1e-3
    assert pipe.unet is unet and not pipe.identities
    torch._dynamo.reset()


def test_a_unet_behind_torch_compile(pipe: S2EditPipeline, picture: Image.Image, half_mask: np.ndarray) -> None:
    """The wrapper, whose parameters have other names; tracing it is slow."""
    with torch.compiler.set_stance("force_eager"):
        compiled_agrees(pipe, picture, half_mask, "eager", ("lora", "full"))


def test_compiled_blocks_are_compiled_once_and_whole(
    pipe: S2EditPipeline, picture: Image.Image, half_mask: np.ndarray
) -> None:
    """Whatever is done to their attention, at which step, in which call. A fit, and a call with LoRA layers in them,
    runs them as they are."""
    identity = fit(pipe, picture, half_mask)
    target = "a photo of a smiling lady"
    wanted = [edit(pipe, picture, identity), pipe(target, picture, SOURCE, **QUICK).images]
    pipe.unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    counts = torch._dynamo.utils.counters
    counts.clear()
    assert np.array_equal(pipe(target, picture, SOURCE, **QUICK).images, wanted[1])
    before = counts["stats"]["unique_graphs"]
    assert before > 0  # it was compiled
    pipe([target, "a photo of a lady"], picture, SOURCE, inversion="ddim", self_replace_steps=1.0, **QUICK)
    assert np.array_equal(edit(pipe, picture, identity), wanted[0])
    assert counts["stats"]["unique_graphs"] == before and not counts["graph_break"]
    assert_near(fit(pipe, picture, half_mask), identity)
    assert all(module._compiled_call_impl is not None for module in blocks(pipe)) and blocks(pipe)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_compiled_unet(pipe: S2EditPipeline, picture: Image.Image, half_mask: np.ndarray, backend: str) -> None:
    """Run with ``-m slow``."""
    compiled_agrees(pipe, picture, half_mask, backend, ("lora",))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_channels_last(
    pipe: S2EditPipeline, picture: Image.Image, half_mask: np.ndarray, method: str, tmp_path: Path
) -> None:
    wanted = fit(pipe, picture, half_mask, method)
    images = edit(pipe, picture, wanted)
    for module in (pipe.unet, pipe.vae):
        module.to(memory_format=torch.channels_last)
    identity = fit(pipe, picture, half_mask, method)
    assert pipe.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert_near(identity, wanted)
    identity.save_pretrained(tmp_path, exact=True)
    assert_near(IdentityAdapter.from_pretrained(tmp_path), wanted)
    assert np.abs(edit(pipe, picture, wanted) - images).max() < 1e-3


def test_an_attention_backend_reaches_none_of_these_layers(
    pipe: S2EditPipeline, picture: Image.Image, half_mask: np.ndarray
) -> None:
    """diffusers' switch is for the processors of its transformers; a U-Net's, and ours around them, do as before."""
    identity = fit(pipe, picture, half_mask)
    wanted = edit(pipe, picture, identity)
    pipe.unet.set_attention_backend("_native_math")
    try:
        assert not any(hasattr(processor, "_attention_backend") for processor in pipe.unet.attn_processors.values())
        assert np.array_equal(edit(pipe, picture, identity), wanted)
    finally:
        pipe.unet.reset_attention_backend()


def test_a_tiled_autoencoder_serves_the_fit(pipe: S2EditPipeline, picture: Image.Image, half_mask: np.ndarray) -> None:
    wanted: Any = fit(pipe, picture, half_mask)
    pipe.vae.enable_tiling()
    pipe.vae.enable_slicing()
    assert_near(fit(pipe, picture, half_mask), wanted)


def test_no_step_asks_for_the_unets_type(
    pipe: S2EditPipeline, picture: Image.Image, half_mask: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers walks through all modules to answer: at each step that made an edit a tenth longer."""
    asked: list[int] = []
    answer = type(pipe.unet).dtype
    monkeypatch.setattr(type(pipe.unet), "dtype", property(lambda unet: asked.append(1) or answer.__get__(unet)))

    def times(steps: int) -> int:
        asked.clear()
        pipe("a photo of a smiling lady", picture, SOURCE, num_inference_steps=steps)
        return len(asked)

    assert times(6) == times(10) > 0

    def times_in_a_fit(steps: int) -> int:
        asked.clear()
        pipe.fit_identity(picture, SOURCE, "lady", num_steps=steps, mask=half_mask)
        return len(asked)

    assert times_in_a_fit(1) == times_in_a_fit(4) > 0
