"""Generated calls of the public methods, good and bad: each ends in a result or in our own clear error, and leaves the
pipeline as it was found."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from s2edit_pipeline import IdentityAdapter, S2EditPipeline
from s2edit_pipeline.edit_output import S2EditPipelineOutput
from s2edit_pipeline.inversion_record import Inversion

PROMPT = "a photo of a smiling lady with glasses"
WORDS = ["lady", "glasses", "smiling", "a", "猫", "женщина", "[I]", "[J]", "<ada>", "(lady:1.4)", "", " ", "‍", "\n"]


class Raised(Exception):
    """Of a caller's own callback: it comes through as it is."""


def _picture(size: tuple[int, int], mode: str) -> Image.Image:
    y, x = np.mgrid[0 : size[1], 0 : size[0]] / max(*size, 2)
    return Image.fromarray((np.stack([x, y, 1 - x * y], -1) * 255).round().astype(np.uint8)).convert(mode)


sizes = st.sampled_from([(32, 32), (32, 48), (33, 31), (1, 1), (1, 64), (70, 30)])
good_pictures = st.builds(_picture, st.just((32, 32)), st.sampled_from(["RGB", "L", "RGBA", "P", "1", "CMYK"]))
bad_pictures = st.one_of(
    st.builds(_picture, sizes, st.sampled_from(["RGB", "L"])),
    st.sampled_from([None, "nowhere.png", "", 7, b"", [], {}, np.zeros(3), np.full((8, 8, 3), np.nan)]),
    st.sampled_from(
        [torch.zeros(3, 0, 0), torch.zeros(32, 32), torch.full((3, 32, 32), 7.0), torch.zeros(2, 3, 32, 32)]
    ),
)
prompts = st.one_of(
    st.just(PROMPT),
    st.lists(st.sampled_from(WORDS), max_size=6).map(" ".join),
    st.text(max_size=12),
    st.sampled_from([None, 7, [], [PROMPT], ["", PROMPT], b"lady", "lady " * 100]),
)
numbers = st.one_of(
    st.sampled_from([0, 1, 0.5, 0.4, 2, 4.5]),
    st.sampled_from([-1, 1e9, float("nan"), float("inf"), True, "1", None, [], np.float32(0.5), torch.tensor(0.5)]),
)
steps = st.one_of(st.sampled_from([1, 2, 3]), st.sampled_from([None, 0, -1, 2.0, "2", True, 10_000_000, np.int64(2)]))
fit_steps = steps.filter(lambda count: count != 10_000_000)  # a fit of so many is allowed, and takes its time
masks = st.one_of(
    st.none(),
    st.sampled_from([Image.new("L", (32, 32), "white"), Image.new("L", (32, 32)), np.eye(32, dtype=bool)]),
    st.sampled_from(
        ["nowhere.png", 7, np.zeros((3, 3, 3, 3)), torch.full((32, 32), float("nan")), Image.new("L", (5, 9))]
    ),
)
generators = st.one_of(
    st.none(),
    st.builds(lambda seed: torch.Generator().manual_seed(seed), st.integers(0, 3)),
    st.sampled_from([7, "x", []]),
)
crops = st.sampled_from(["auto", None, (0, 0, 16, 16), (0, 0, 0, 0), (-5, 0, 99, 1), "all", 7, (1, 2)])
sides = st.sampled_from([None, 32, 16, 0, -8, 33, "32", 1.5])


def _raise(*_: Any, **__: Any) -> Any:
    raise Raised


callbacks = st.sampled_from([None, None, lambda *a, **k: {}, lambda *a, **k: None, _raise, 7])
methods = st.sampled_from(
    ["direct", "ddim", "null_text", "negative_prompt", "fixed_point", "edit_friendly", "flowedit", "best", 7]
)


def mostly(good: Any, other: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Three of four are good, so that calls with several arguments get somewhere."""
    return st.integers(0, 3).flatmap(
        lambda i: other if i == 0 else (good if isinstance(good, st.SearchStrategy) else st.just(good))
    )


def some(required: Mapping[str, st.SearchStrategy[Any]], other: Mapping[str, st.SearchStrategy[Any]]) -> Any:
    """The required arguments and up to three of the others."""
    names = st.lists(st.sampled_from(sorted(other)), max_size=3, unique=True)
    return names.flatmap(lambda chosen: st.fixed_dictionaries({**required, **{name: other[name] for name in chosen}}))


CALLS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "__call__": some(
        {
            "prompt": mostly("a photo of a smiling lady with a beard", prompts),
            "image": mostly(good_pictures, bad_pictures),
            "source_prompt": mostly(PROMPT, prompts),
            "num_inference_steps": mostly(2, steps),
        },
        {
            "inversion": methods, "guidance_scale": numbers, "cross_replace_steps": numbers, "strength": numbers,
            "self_replace_steps": numbers, "guidance_stop": numbers, "guidance_rescale": numbers,
            "reweight": st.sampled_from([None, {}, {"smiling": 2.0}, {"no": 1}, {"lady": float("nan")}, [], 7]),
            "blend_words": st.sampled_from([None, False, True, ["lady"], "lady", ["no"], 7, [7]]),
            "keep_words": st.sampled_from([None, ["glasses"], ["no"], 7]),
            "edit_mask": masks, "generator": generators, "crop": crops, "height": sides, "width": sides,
            "output_type": st.sampled_from(["pil", "np", "pt", "latent", "jpg", None]),
            "output_size": st.sampled_from(["picture", "model", "huge", None]),
            "keep_pixels": st.sampled_from([True, False]), "edit": st.sampled_from(["auto", "replace", "refine", "x"]),
            "preset": st.sampled_from([None, "paper", "x"]), "negative_prompt": prompts,
            "identity": st.sampled_from([None, "[I]", "[K]", "nowhere/at/all", 7]),
            "return_attention_maps": st.sampled_from([True, False]), "callback_on_step_end": callbacks,
            "clip_skip": st.sampled_from([None, 1, 0, 99, "x"]), "no_such_argument": st.just(1),
            "num_images_per_prompt": st.sampled_from([1, 2, 0, "x"]), "latents": st.just(torch.zeros(1, 4, 16, 16)),
            "stop": st.sampled_from([None, 7]), "edit_method": st.sampled_from(["prompt_to_prompt", "x"]),
        },
    ),
    "invert": some(
        {
            "image": mostly(good_pictures, bad_pictures), "prompt": mostly(PROMPT, prompts),
            "num_inference_steps": mostly(2, steps),
        },
        {
            "method": methods, "guidance_scale": numbers, "negative_prompt": prompts, "generator": generators,
            "crop": crops, "height": sides, "width": sides, "clip_skip": st.sampled_from([None, 1, 0, 99, "x"]),
            "callback_on_step_end": callbacks, "keep_attention": st.sampled_from([None, 7]),
        },
    ),
    "fit_identity": some(
        {
            "image": mostly(good_pictures, bad_pictures), "prompt": mostly(PROMPT, prompts),
            "subject": mostly("lady", prompts), "num_steps": mostly(1, fit_steps),
        },
        {
            "token": st.one_of(st.sampled_from(["[I]", "<ada>", "lady", "", "[a b]", 7]), st.text(max_size=5)),
            "method": st.sampled_from([None, "lora", "full", "token", "x"]), "mask": masks, "generator": generators,
            "batch_size": fit_steps, "learning_rate": numbers, "semantic_weight": numbers, "mask_threshold": numbers,
            "lora_rank": st.sampled_from([1, 2, 0, "x", 10_000]), "spatial_control": st.sampled_from([True, False]),
            "response_loss_weight": numbers, "reference": st.sampled_from([None, 7]), "crop": crops,
            "height": sides, "width": sides, "callback_on_step_end": callbacks,
            "preset": st.sampled_from([None, "x"]), "lr_scheduler": st.sampled_from(["linear", "x"]),
        },
    ),
    "preview_mask": some(
        {
            "image": mostly(good_pictures, bad_pictures), "prompt": mostly(PROMPT, prompts),
            "subject": mostly("lady", prompts),
        },
        {"crop": crops, "height": sides, "width": sides},
    ),
    "load_identity": some(
        {"identity": st.sampled_from(["fitted", "fitted", "nowhere", "a/b/c", "", 7, None, "[I]"])},
        {
            "token": st.one_of(st.sampled_from(["[J]", "lady", "", 7]), st.text(max_size=5)), "scale": numbers,
            "mask": masks, "reference_token": st.sampled_from([None, "[A]"]), "revision": st.just("main"),
        },
    ),
}  # fmt: skip
SCHEDULERS: list[Callable[[Any], Any]] = [
    DDIMScheduler.from_config, DDPMScheduler.from_config, DPMSolverMultistepScheduler.from_config,
    EulerDiscreteScheduler.from_config,
]  # fmt: skip
calls = st.sampled_from(sorted(CALLS)).flatmap(lambda name: st.tuples(st.just(name), CALLS[name]))


def state_of(pipe: S2EditPipeline) -> tuple[Any, ...]:
    """What a call must leave as it is."""
    digest = hashlib.sha256()
    for component in (pipe.unet, pipe.text_encoder, pipe.vae):
        for name, tensor in component.state_dict().items():
            digest.update(name.encode() + tensor.detach().numpy().tobytes())
    modes = [module.training for one in (pipe.unet, pipe.text_encoder, pipe.vae) for module in one.modules()]
    grads = [p.requires_grad for one in (pipe.unet, pipe.text_encoder, pipe.vae) for p in one.parameters()]
    processors = [type(one).__name__ for one in pipe.unet.attn_processors.values()]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.unet.modules())
    return (
        digest.hexdigest(), modes, grads, processors, hooks, len(pipe.tokenizer), dict(pipe.scheduler.config),
        pipe.identities, torch.is_grad_enabled(),
    )  # fmt: skip


def check(pipe: S2EditPipeline, fitted: IdentityAdapter, name: str, arguments: dict[str, Any]) -> str:
    """Make the call; "done", or the error's type."""
    given = {key: fitted if key == "identity" and one == "fitted" else one for key, one in arguments.items()}
    before = state_of(pipe)
    try:
        found = getattr(pipe, name)(**given)
    except Raised:
        assert "callback_on_step_end" in arguments
        outcome = "raised"
    except (ValueError, TypeError, FileNotFoundError) as error:
        words = str(error)
        assert len(words) > 10 and "\n\n" not in words, words
        frame = error.__traceback__
        while frame is not None and frame.tb_next is not None:
            frame = frame.tb_next
        raised_in = frame.tb_frame.f_code.co_filename if frame is not None else ""
        ours = "s2edit_pipeline" in raised_in or "unexpected keyword argument" in words
        assert ours, f"{type(error).__name__} of {raised_in}: {words}"
        outcome = type(error).__name__
    else:
        wanted = {"__call__": S2EditPipelineOutput, "invert": Inversion, "fit_identity": IdentityAdapter}
        assert isinstance(found, wanted.get(name, (Image.Image, str)))
        outcome = "done"
        if name == "load_identity":
            assert pipe.identities == (found,)
            pipe.unload_identity()
    assert state_of(pipe) == before
    return outcome


@pytest.fixture(scope="module")
def kept(_tiny: dict[str, dict[str, Any]]) -> tuple[S2EditPipeline, IdentityAdapter]:
    pipe = S2EditPipeline(**copy.deepcopy(_tiny["epsilon"]))
    pipe.set_progress_bar_config(disable=True)
    return pipe, pipe.fit_identity(_picture((32, 32), "RGB"), PROMPT, "lady", num_steps=1)


def holds_for(count: int) -> Callable[[Any], Any]:
    return settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)


@holds_for(60)
@given(call=calls)
def test_calls_end_in_a_result_or_our_own_error(
    kept: tuple[S2EditPipeline, IdentityAdapter], call: tuple[str, dict[str, Any]]
) -> None:
    check(*kept, *call)


@pytest.mark.slow
@holds_for(4000)
@given(call=calls, scheduler=st.sampled_from(SCHEDULERS))
def test_4000_calls_under_several_schedulers(
    kept: tuple[S2EditPipeline, IdentityAdapter], call: tuple[str, dict[str, Any]], scheduler: Callable[[Any], Any]
) -> None:
    pipe, fitted = kept
    pipe.scheduler = scheduler(pipe.scheduler.config)
    check(pipe, fitted, *call)
