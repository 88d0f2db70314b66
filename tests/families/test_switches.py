"""Every switch of a fit, an inversion and an edit, on each family: turning it changes the result in the way it says.

The formulas behind them are tested where they are; here each is reached from the outside.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from s2edit_pipeline import IdentityAdapter, Inversion, KeepAttention, ReferenceAttribute, S2EditPipeline
from s2edit_pipeline.attention_spatial import mask_at
from s2edit_pipeline.edit_settings import EditSettings
from s2edit_pipeline.fit_settings import FitSettings
from s2edit_pipeline.inversion_record import INVERSIONS
from s2edit_pipeline.prompt_tokens import initial_row

FAMILIES = ("sd1", "sd2_v", "sdxl")
SOURCE = "a photo of a sad lady with glasses"
TARGET = "a photo of a smiling lady with glasses"
LEFT = np.arange(24)[None].repeat(16, 0) < 12
SIZE = {"height": 16, "width": 24}
LARGER = {"height": 32, "width": 48, "inversion": "direct", "output_type": "np"}
PART = (0, 0, 12, 8)


def apart(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a - b).abs().max()) > 1e-5


def same(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-5) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=atol)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Calls:
    """Calls of one pipeline on one picture, each made once."""

    def __init__(self, pipe: S2EditPipeline, picture: Image.Image) -> None:
        self.pipe, self.picture = pipe, picture
        self.fit, self.invert, self.edit = (self._once(make) for make in (self._fit, self._invert, self._edit))

    @staticmethod
    def _once(make: Callable[..., Any]) -> Callable[..., Any]:
        results: dict[str, Any] = {}

        @functools.wraps(make)
        def call(**changes: Any) -> Any:
            key = repr(sorted(changes.items(), key=lambda item: item[0]))
            if key not in results:
                results[key] = make(**changes)
            return results[key]

        return call

    def _fit(self, *, seed: int = 0, **changes: Any) -> IdentityAdapter:
        settings = {"method": "token", "mask": LEFT, "num_steps": 2, "batch_size": 1, **SIZE, **changes}
        return self.pipe.fit_identity(self.picture, SOURCE, "lady", generator=seeded(seed), **settings)

    def _invert(self, *, seed: int = 0, **changes: Any) -> Inversion:
        settings = {"num_inference_steps": 2, **SIZE, **changes}
        noise = {"generator": seeded(seed)} if settings.get("method") == "edit_friendly" else {}
        return self.pipe.invert(self.picture, SOURCE, **noise, **settings)

    def _edit(self, *, seed: int = 0, **changes: Any) -> Edited:
        """Not confined unless told so."""
        steps: list[int] = []
        settings = {"blend_words": False, "output_type": "latent", **changes}
        settings["inversion"] = settings.get("inversion") or self.invert(num_inference_steps=4)
        if isinstance(settings["inversion"], str):
            settings = {"num_inference_steps": 4, **SIZE, **settings}
        result = self.pipe(
            TARGET, self.picture, SOURCE, generator=seeded(seed),
            callback_on_step_end=lambda pipe, step, timestep, tensors: steps.append(step), **settings,
        )  # fmt: skip
        mask = result.edit_masks[0]
        return Edited(
            result.images, result.source, None if mask is None else np.asarray(mask) > 127, len(steps),
            result.attention_maps,
        )  # fmt: skip

    def moved(self, identity: IdentityAdapter) -> float:
        """How far the rows went from where they began."""
        family = self.pipe.family
        start = {n: initial_row(family.tokenizers[n], e, "lady") for n, e in family.text_encoders.items()}
        return max(float((identity.rows[name] - row).abs().max()) for name, row in start.items())


@dataclass(frozen=True)
class Edited:
    images: Any
    source: Any
    mask: np.ndarray | None
    steps: int
    maps: dict[str, Image.Image] | None


@pytest.fixture(scope="module")
def calls(
    request: pytest.FixtureRequest, small_families: dict[str, S2EditPipeline], wide_picture: Image.Image
) -> Calls:
    return Calls(small_families[request.param], wide_picture)


def row(identity: IdentityAdapter) -> torch.Tensor:
    return torch.cat(list(identity.rows.values()))


def weights(identity: IdentityAdapter) -> torch.Tensor:
    return torch.cat([w.flatten() for _, w in sorted(identity.weights.items())])


def first_loss(identity: IdentityAdapter) -> float:
    return identity.measures["reconstruction_loss_first"]


@contextmanager
def batches(pipe: S2EditPipeline) -> Iterator[list[int]]:
    """How many rows each evaluation of the U-Net has."""
    rows: list[int] = []
    handle = pipe.unet.register_forward_pre_hook(lambda module, arguments: rows.append(len(arguments[0])))
    yield rows
    handle.remove()


# ------------------------------------------------------------------------------ fits


def fit_methods(c: Calls) -> bool:
    token, lora, full = (set(c.fit(method=method).weights) for method in ("token", "lora", "full"))
    low_rank = all(".lora_A." in name or ".lora_B." in name for name in lora)
    return not token and low_rank and "unet.conv_in.weight" in full and not any("lora" in name for name in full)


def fit_mask(c: Calls) -> bool:
    one, other = (c.fit(mask=mask).mask for mask in (LEFT, ~LEFT))
    left = mask_at(torch.from_numpy(LEFT).float(), 8, 12)
    return torch.equal(one, left) and torch.equal(other, 1 - left)


def fit_semantic_weight(c: Calls) -> bool:
    longer = {"num_steps": 12, "learning_rate": 2e-2}
    last = []
    for weight in (10.0, 0.0):
        losses: list[float] = []
        c._fit(
            semantic_weight=weight,
            callback_on_step_end=lambda pipe, step, steps, measures, to=losses: to.append(measures["semantic_loss"]),
            **longer,
        )
        last.append(losses[-1])
    return last[0] < last[1]


def fit_detach_sentence(c: Calls) -> bool:
    """The loss is the same; what the text encoder learns is not."""
    one, other = (c.fit(method="lora", semantic_weight=10.0, detach_sentence=d) for d in (False, True))
    return first_loss(one) == first_loss(other) and apart(weights(one), weights(other))


def fit_batch_size(c: Calls) -> bool:
    with batches(c.pipe) as rows:
        c._fit(batch_size=3, num_steps=1)
    return rows == [3]


def fit_response_loss_weight(c: Calls) -> bool:
    """A weight too small to move anything measures what the others' words come to."""
    longer = {"method": "lora", "num_steps": 12, "learning_rate": 2e-3, "batch_size": 2, "response_batch_size": 2}
    kept, left = (c._fit(response_loss_weight=weight, **longer).measures for weight in (30.0, 1e-9))
    return "response_loss_last" not in c.fit().measures and kept["response_loss_last"] < left["response_loss_last"]


def response(c: Calls, word: str) -> float:
    return c.fit(response_loss_weight=1.0, response_words=(word,)).measures["response_loss_last"]


def fit_response_batch_size(c: Calls) -> bool:
    with batches(c.pipe) as rows:
        c._fit(batch_size=3, num_steps=1, response_loss_weight=1.0, response_batch_size=2)
    return rows == [4, 5]


def fit_reference(c: Calls) -> bool:
    hat = ReferenceAttribute(c.picture.rotate(180), "a photo of a man with a hat", "hat", mask=LEFT)
    attribute = c.fit(reference=hat).reference
    return (
        attribute is not None
        and (attribute.token, attribute.subject) == ("[A]", "hat")
        and attribute.rows.keys() == c.fit().rows.keys()
    )


FIT: dict[str, Callable[[Calls], bool]] = {
    "token": lambda c: c.fit(token="<ada>").token == "<ada>" and c.fit().token == "[I]",
    "method": fit_methods,
    "mask": fit_mask,
    "num_steps": lambda c: (
        c.fit(num_steps=3).settings["num_steps"] == 3 and apart(row(c.fit(num_steps=3)), row(c.fit()))
    ),
    "learning_rate": lambda c: c.moved(c.fit(learning_rate=1e-9)) < 1e-6 < 1e-4 < c.moved(c.fit()),
    "token_learning_rate": lambda c: (
        c.moved(c.fit(method="lora", token_learning_rate=1e-9)) < 1e-6 < 1e-4 < c.moved(c.fit(method="lora"))
    ),
    "semantic_weight": fit_semantic_weight,
    "spatial_control": lambda c: (
        c.fit(spatial_control=False, mask=None).mask is None
        and first_loss(c.fit(spatial_control=False, mask=None)) != first_loss(c.fit())
    ),
    "reference": fit_reference,
    "generator": lambda c: torch.equal(row(c.fit()), row(c._fit())) and apart(row(c.fit(seed=1)), row(c.fit())),
    "batch_size": fit_batch_size,
    "lora_rank": lambda c: (
        {len(w) for n, w in c.fit(method="lora", lora_rank=3).weights.items() if ".lora_A." in n} == {3}
    ),
    "lora_layers": lambda c: (
        "unet.conv_in.lora_A.weight" in c.fit(method="lora").weights
        and "unet.conv_in.lora_A.weight" not in c.fit(method="lora", lora_layers="attention").weights
    ),
    "lora_init": lambda c: apart(*(weights(c.fit(method="lora", lora_init=i)) for i in ("gradient", "random"))),
    "lr_scheduler": lambda c: (
        apart(row(c.fit(lr_scheduler="linear")), row(c.fit(lr_scheduler="constant")))
        and first_loss(c.fit(lr_scheduler="linear")) == first_loss(c.fit(lr_scheduler="constant"))
    ),
    "detach_sentence": fit_detach_sentence,
    "preset": lambda c: c.fit(method=None, preset="paper").method == "full" and c.fit(method=None).method == "lora",
    "timestep_sampling": lambda c: (
        first_loss(c.fit(timestep_sampling="high_noise")) != first_loss(c.fit(timestep_sampling="uniform"))
    ),
    "renormalize": lambda c: first_loss(c.fit(renormalize=True)) != first_loss(c.fit()),
    "mask_after": lambda c: first_loss(c.fit(mask_after=True)) != first_loss(c.fit()),
    "mask_threshold": lambda c: (
        c.fit(mask=None, mask_threshold=0.9).mask.sum() < c.fit(mask=None, mask_threshold=0.1).mask.sum()
    ),
    "response_loss_weight": fit_response_loss_weight,
    "response_words": lambda c: len({response(c, word) for word in ("hat", "beard")}) == 2,
    "response_batch_size": fit_response_batch_size,
    "height": lambda c: c.fit(height=8).mask.shape == (4, 12),
    "width": lambda c: c.fit(width=12).mask.shape == (8, 6),
    "crop": lambda c: c.fit(crop=PART).settings["crop"] == "0,0,12,8" and bool(c.fit(crop=PART).mask.all()),
}

# ------------------------------------------------------------------------------ inversions


SERVED = [name for name, method in INVERSIONS.items() if not method.flows_only]


def invert_methods(c: Calls) -> bool:
    inversions = {method: c.invert(method=method) for method in SERVED}
    with_null = {method for method, i in inversions.items() if i.unconditional_embeds is not None}
    with_residuals = {method for method, i in inversions.items() if i.residuals is not None}
    pinned = {method for method, i in inversions.items() if i.pinned}
    return (with_null, with_residuals, pinned) == (
        {"null_text", "negative_prompt"},
        {"edit_friendly"},
        {"direct", "fixed_point", "edit_friendly"},
    )


def null(c: Calls, **changes: Any) -> torch.Tensor:
    return c.invert(method="null_text", **changes).unconditional_embeds


def path(c: Calls, **changes: Any) -> torch.Tensor:
    return c.invert(**changes).trajectory


def invert_keep_attention(c: Calls) -> bool:
    """Of 40 % of four steps, of all, and of none."""
    some, all_, none = (
        c.invert(keep_attention=keep, num_inference_steps=4).attention
        for keep in (None, KeepAttention(share=1.0), KeepAttention(max_bytes=0))
    )
    return (len(some.layers), len(all_.layers), none) == (2, 4, None)


INVERT: dict[str, Callable[[Calls], bool]] = {
    "method": invert_methods,
    "num_inference_steps": lambda c: len(path(c, num_inference_steps=3)) == 4,
    "identity": lambda c: (
        c.invert(identity=c.fit(method="lora")).prompt == "a photo of a sad [I] lady with glasses"
        and apart(path(c, identity=c.fit(method="lora")), path(c))
    ),
    "guidance_scale": lambda c: apart(null(c, guidance_scale=9.0), null(c)),
    "negative_prompt": lambda c: apart(null(c, negative_prompt="a hat"), null(c)),
    "generator": lambda c: apart(*(path(c, method="edit_friendly", seed=seed) for seed in (0, 1))),
    "height": lambda c: path(c, height=8).shape[-2:] == (4, 12),
    "width": lambda c: path(c, width=12).shape[-2:] == (8, 6),
    "clip_skip": lambda c: apart(path(c, clip_skip=1), path(c)),
    "crop": lambda c: c.invert(crop=PART).placement.box == PART and apart(path(c, crop=PART), path(c)),
    "keep_attention": invert_keep_attention,
}

# ------------------------------------------------------------------------------ edits


def edit_cross(c: Calls) -> bool:
    all_, none = (c.edit(cross_replace_steps=share).images for share in (1.0, 0.0))
    named = c.edit(cross_replace_steps={"default_": 1.0}).images
    less = c.edit(cross_replace_steps={"default_": 1.0, "smiling": 0.0}).images
    return apart(all_, none) and same(named, all_) and apart(less, all_)


def edit_mask(c: Calls) -> bool:
    edited, source = c.edit(edit_mask=LEFT), c.invert(num_inference_steps=4).trajectory[:1]
    return torch.equal(edited.images[..., 6:], source[..., 6:]) and apart(edited.images[..., :6], source[..., :6])


def edit_keep_pixels(c: Calls) -> bool:
    settings = {"edit_mask": LEFT, "output_type": "np"}
    picture = np.asarray(c.picture) / 255
    kept, decoded = (c.edit(keep_pixels=keep, **settings).images[0][:, 12:] for keep in (True, False))
    return np.allclose(kept, picture[:, 12:], atol=1e-6) and not np.allclose(decoded, picture[:, 12:], atol=1e-2)


def edit_threshold(c: Calls) -> bool:
    settings = {"blend_words": None, "change_threshold": 0.0}
    wide, narrow = (c.edit(blend_threshold=t, **settings).mask.sum() for t in (0.05, 0.999))
    return wide > narrow > 0


def edit_keep_attention(c: Calls) -> bool:
    """The same edit; what wasn't kept is made again, in rows of its own."""
    rows, images = [], []
    for keep in (KeepAttention(), None):
        with batches(c.pipe) as evaluated:
            images.append(c._edit(inversion="direct", keep_attention=keep).images)
        rows.append(sum(evaluated))
    return rows[0] < rows[1] and torch.allclose(*images, rtol=1e-3, atol=1e-3)


EDIT: dict[str, Callable[[Calls], bool]] = {
    "preset": lambda c: same(
        c.edit(inversion="direct", preset="paper").images, c.edit(inversion="direct", guidance_stop=1.0).images
    ),
    "inversion": lambda c: (
        len({float(c.edit(inversion=method).source.double().sum()) for method in SERVED}) >= 4
        # in one call the source's row is in the targets' batch: other sums
        and same(c.edit(inversion="direct").images, c.edit().images, atol=1e-4)
    ),
    "num_inference_steps": lambda c: c.edit(inversion="direct", num_inference_steps=3).steps == 3,
    "guidance_scale": lambda c: (
        apart(c.edit(guidance_scale=9.0).images, c.edit().images)
        and same(c.edit(guidance_scale=1.0).images, c.edit(guidance_stop=0.0).images)
    ),
    "guidance_rescale": lambda c: (
        apart(c.edit(guidance_rescale=0.7).images, c.edit().images)
        and same(c.edit(guidance_rescale=0.7, guidance_stop=0.0).images, c.edit(guidance_stop=0.0).images)
    ),
    "guidance_stop": lambda c: (
        apart(c.edit(guidance_stop=1.0).images, c.edit().images)
        and apart(c.edit(guidance_stop=0.0).images, c.edit().images)
    ),
    "strength": lambda c: c.edit(strength=0.5).steps == 2 and c.edit().steps == 4,
    "cross_replace_steps": edit_cross,
    "self_replace_steps": lambda c: apart(c.edit(self_replace_steps=1.0).images, c.edit(self_replace_steps=0.0).images),
    "reweight": lambda c: (
        apart(c.edit(reweight={"smiling": 4.0}).images, c.edit().images)
        and same(c.edit(reweight={"smiling": 1.0}).images, c.edit().images)
    ),
    "edit": lambda c: (
        apart(c.edit(edit="refine").images, c.edit().images) and same(c.edit(edit="replace").images, c.edit().images)
    ),
    "blend_words": lambda c: c.edit().mask is None and c.edit(blend_words=None).mask.any(),
    "keep_words": lambda c: not c.edit(blend_words=None, keep_words=["smiling", "sad"]).mask.any(),
    "blend_threshold": edit_threshold,
    "change_threshold": lambda c: (
        c.edit(blend_words=None, change_threshold=0.9).mask.sum()
        < c.edit(blend_words=None, change_threshold=0.0).mask.sum()
    ),
    "edit_mask": edit_mask,
    "keep_pixels": edit_keep_pixels,
    "output_size": lambda c: (
        c.edit(**LARGER, output_size="model").images.shape == (1, 32, 48, 3)
        and c.edit(**LARGER).images.shape == (1, 16, 24, 3)
    ),
    "crop": lambda c: np.array_equal(c.edit(**LARGER, crop=PART).images[0, 8:], np.float32(c.picture)[8:] / 255),
    "negative_prompt": lambda c: apart(c.edit(negative_prompt="a hat").images, c.edit().images),
    "generator": lambda c: apart(*(c.edit(inversion="edit_friendly", seed=seed).images for seed in (0, 1))),
    "height": lambda c: c.edit(inversion="direct", height=8).images.shape[-2:] == (4, 12),
    "width": lambda c: c.edit(inversion="direct", width=12).images.shape[-2:] == (8, 6),
    "clip_skip": lambda c: apart(c.edit(inversion="direct", clip_skip=1).images, c.edit().images),
    "keep_attention": edit_keep_attention,
    "return_attention_maps": lambda c: (
        c.edit().maps is None
        and list(c.edit(return_attention_maps=True).maps) == ["a", "photo", "of", "smiling", "lady", "with", "glasses"]
    ),
}
TABLES = {"fit_identity": FIT, "invert": INVERT, "__call__": EDIT}


@pytest.mark.parametrize("calls", FAMILIES, indirect=True)
@pytest.mark.parametrize(("call", "switch"), [(call, switch) for call, table in TABLES.items() for switch in table])
def test_a_switch_does_what_it_promises(calls: Calls, call: str, switch: str) -> None:
    assert TABLES[call][switch](calls)


@pytest.mark.parametrize("calls", FAMILIES, indirect=True)
def test_the_papers_own_reading_is_reached(calls: Calls) -> None:
    """Each of our own choices turned back: all weights tuned, null-text, guidance to the end, no confinement."""
    pipe, paper = calls.pipe, {"detach_sentence": False, "renormalize": False, "mask_after": False}
    identity = calls.fit(method="full", semantic_weight=0.1, spatial_control=True, mask=None, **paper)
    assert {"unet.conv_in.weight"} < set(identity.weights) and identity.mask is not None
    arguments = {"identity": identity, "guidance_scale": 7.5}
    inversion = calls.invert(method="null_text", **arguments)
    assert inversion.unconditional_embeds is not None and not inversion.pinned
    with_token = "a photo of a smiling [I] lady with glasses"
    paper_edit = pipe(
        with_token, calls.picture, SOURCE, inversion=inversion, guidance_stop=1.0, blend_words=False,
        output_type="latent", **arguments,
    )  # fmt: skip
    assert paper_edit.edit_masks == [None] and bool(torch.isfinite(paper_edit.images).all())
    ours = pipe(with_token, calls.picture, SOURCE, inversion=inversion, output_type="latent", **arguments)
    assert apart(paper_edit.images, ours.images)


# ------------------------------------------------------------------------------ and there are no others

INPUTS = {
    "fit_identity": {"image", "prompt", "subject"},
    "invert": {"image", "prompt"},
    "__call__": {"prompt", "image", "source_prompt", "identity"},
}
"""What a call is about, not how it is done."""

ELSEWHERE = {
    "callback_on_step_end": "test_fit_loop.py::test_the_pipeline_is_left_as_it_was",
    "callback_on_step_end_tensor_inputs": "test_pipeline.py::test_callbacks_see_change_and_stop",
    "output_type": "test_pipeline.py::test_output_types",
    "return_dict": "test_pipeline.py::test_output_types",
    "stop": "test_pipeline.py::test_a_stop_sign_ends_the_call_after_a_step",
    "num_images_per_prompt": "test_pipeline.py::test_drawing_is_what_stable_diffusion_draws",
    "latents": "test_pipeline.py::test_prompt_embeds_and_latents_are_taken",
    "prompt_embeds": "test_pipeline.py::test_prompt_embeds_and_latents_are_taken",
    "negative_prompt_embeds": "test_pipeline.py::test_prompt_embeds_and_latents_are_taken",
    "pooled_prompt_embeds": "families/test_arguments.py::drawing",
    "negative_pooled_prompt_embeds": "families/test_arguments.py::drawing",
    "original_size": "families/test_arguments.py::call_values",
    "crops_coords_top_left": "families/test_arguments.py::call_values",
    "target_size": "families/test_arguments.py::call_values",
    "stock_arguments": "families/test_arguments.py::call_values",
    "early_stop": "test_fit_cost.py::test_a_fit_that_gains_nothing_ends",
    "optimizer": "test_fit_cost.py::test_eight_bits_need_bitsandbytes",
    "gradient_checkpointing": "test_fit_cost.py::test_checkpointing_makes_the_same_gradients",
    "residuals": "test_inversions.py::test_in_a_flow_what_the_sources_steps_miss_is_found",
    "seed": "test_seeds.py::test_a_seed_is_a_generator_that_begins_there",
    "edit_method": "test_own_family.py::test_an_edit_method_of_ones_own",
    "checkpoint_folder": "test_fit_checkpoint.py::fit",
    "complete_prompt": "test_describe.py::test_short_prompts_are_completed_alike",
    "cross_attention_kwargs": "families/test_diffusers_manner.py::test_loras_are_weighed_by_the_call",
    "ip_adapter_image": "families/test_diffusers_manner.py::test_an_ip_adapter_and_an_identity_side_by_side",
    "ip_adapter_image_embeds": "families/test_diffusers_manner.py::test_an_ip_adapter_shows_pictures",
    "settle_from": "test_edit_loop.py::test_at_last_what_drifted_a_little_is_the_source_again",
    "confine_from": "test_edit_words.py::test_the_source_is_kept_from_the_share_asked_for",
}
"""What stock pipelines have as well, and what no argument reaches -> the test that turns it."""


@pytest.mark.parametrize("call", TABLES)
def test_every_switch_is_here(call: str) -> None:
    switches = set(inspect.signature(getattr(S2EditPipeline, call)).parameters) - {"self"} - INPUTS[call]
    settings = {"fit_identity": FitSettings, "__call__": EditSettings}.get(call)
    switches |= {field.name for field in fields(settings)} if settings is not None else set()
    assert switches == set(TABLES[call]) | (switches & ELSEWHERE.keys())


def test_the_others_tests_are_there() -> None:
    for switch, place in ELSEWHERE.items():
        file, test = place.split("::")
        text = (Path(__file__).parent.parent / file).read_text("utf-8")
        body = text.split(f"def {test}(", 1)[1].split("\ndef ", 1)[0]
        assert switch in body, place
