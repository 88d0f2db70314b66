"""No argument is ignored: in every situation each parameter of each public call changes the result, or is refused by
its name. Where neither can be, it says why."""

from __future__ import annotations

import copy
import hashlib
import inspect
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from s2edit_pipeline import IdentityAdapter, KeepAttention, ReferenceAttribute, S2EditPipeline, describe_captioner
from s2edit_pipeline.attention_maps import MapRecorder
from s2edit_pipeline.edit_loop import EDITS, EditedLatents, EditMethod, EditTask
from s2edit_pipeline.inversion_record import INVERSIONS

SOURCE, TARGET = "a photo of a sad lady with glasses", "a photo of a smiling lady with glasses"
LEFT = np.arange(24)[None].repeat(16, 0) < 12
PART = (0, 0, 12, 8)

REPEATABLE = dict.fromkeys(("generator", "seed"), "a call that draws no noise is repeatable with any generator")
MEMORY = "it is about memory alone"
OWN_SIZE = {"output_size": "the picture is as large as what is worked at"}
NOTHING_TO_KEEP = "a random model may change every pixel: test_pipeline.py::test_kept_pixels_are_the_pictures_own"
OTHER_METHOD = "another method than the preset's is fitted as that method is"
LONG_FITS = "it ends fits that gain nothing any more: test_fit_cost.py::test_a_fit_that_gains_nothing_ends"
SITUATION = "it makes the situation"


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(0))


def stopped() -> threading.Event:
    event = threading.Event()
    event.set()
    return event


@dataclass
class Situation:
    """A call as it is made where nothing else is passed.

    Attributes:
        arguments: makes them, with fresh generators.
        refused: the parameters that must be refused here.
        idle: those that can change nothing here -> why they aren't refused.
        changes: where a parameter needs others beside it, or another value than everywhere.
    """

    call: str
    arguments: Callable[[], dict[str, Any]]
    refused: set[str] = field(default_factory=set)
    idle: Mapping[str, str] = field(default_factory=dict)
    changes: Mapping[str, dict[str, Any]] = field(default_factory=dict)


class Walk:
    """The tiny pipeline, its inputs, and another value for every parameter."""

    def __init__(self, pipe: S2EditPipeline, picture: Image.Image) -> None:
        self.pipe, self.picture = pipe, picture
        self.identity: IdentityAdapter = pipe.fit_identity(
            picture, SOURCE, "lady", method="lora", mask=LEFT, num_steps=1, batch_size=1, height=16, width=24,
            learning_rate=0.05, generator=seeded(0),
        )  # fmt: skip
        self.xl = pipe.text_encoder_2 is not None

    def outcome(self, situation: Situation, changes: Mapping[str, Any]) -> tuple[str, str]:
        """("refused", the message) or ("done", a hash of all that came back, what callbacks heard included)."""
        reports: list[Any] = []

        def listen(pipe: S2EditPipeline, step: int, timestep: int, tensors: Mapping[str, Any]) -> dict[str, Any]:
            reports.append((step, int(timestep), sorted(tensors)))
            return {}

        call = getattr(self.pipe, situation.call)
        arguments = {"callback_on_step_end": listen, **situation.arguments(), **copy.copy(changes)}
        if situation.call == "preview_mask":
            del arguments["callback_on_step_end"]
        try:
            result = call(**arguments)
        except (TypeError, ValueError) as error:
            return "refused", str(error)
        return "done", digest([result, reports])


def digest(value: Any) -> str:
    """A hash of what a call returned. An identity's settings, which repeat the arguments, and seconds are left out."""
    hasher = hashlib.sha256()

    def add(one: Any) -> None:
        hasher.update(type(one).__name__.encode())
        if isinstance(one, torch.Tensor):
            hasher.update(one.detach().double().numpy().tobytes() + repr(tuple(one.shape)).encode())
        elif isinstance(one, np.ndarray):
            hasher.update(one.tobytes() + repr(one.shape).encode())
        elif isinstance(one, Image.Image):
            add(np.asarray(one))
        elif isinstance(one, Mapping):
            for key, item in one.items():
                if key != "seconds":
                    add(key)
                    add(item)
        elif isinstance(one, (list, tuple)):
            for item in one:
                add(item)
        elif isinstance(one, MapRecorder):
            add(one.maps)
        elif hasattr(one, "__dataclass_fields__"):
            add({name: item for name, item in vars(one).items() if name not in ("settings", "library_versions")})
        else:
            hasher.update(repr(one).encode())

    add(value)
    return hasher.hexdigest()


def sources_latents(task: EditTask) -> EditedLatents:
    """An edit method of one's own: it changes nothing."""
    source = task.inversion.trajectory[:1]
    return EditedLatents(source.repeat(len(task.targets), 1, 1, 1), source, (None,) * len(task.targets))


@pytest.fixture(scope="module")
def walk(
    request: pytest.FixtureRequest, small_families: dict[str, S2EditPipeline], wide_picture: Image.Image
) -> Iterator[Walk]:
    """Hundreds of calls are made: of Stable Diffusion 1's kind the least U-Net that there can be."""
    pipe = small_families[request.param]
    if request.param == "sd1":
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, down_block_types=["CrossAttnDownBlock2D"],
            up_block_types=["CrossAttnUpBlock2D"], block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
            cross_attention_dim=32, attention_head_dim=4,
        )  # fmt: skip
        pipe = S2EditPipeline(**{**pipe.components, "unet": unet.eval()})
        pipe.set_progress_bar_config(disable=True)
    with pytest.MonkeyPatch.context() as patch:  # where a picture has to be described
        patch.setattr(describe_captioner, "load_captioner", lambda *_: lambda picture: "a photo of a cat with a hat")
        patch.setitem(EDITS, "sources_latents", EditMethod(sources_latents))
        yield Walk(pipe, wide_picture)


def problems(walk: Walk, situation: Situation, values: Mapping[str, Any]) -> list[str]:
    """What is wrong with each parameter of the situation's call, one after the other."""
    parameters = inspect.signature(getattr(S2EditPipeline, situation.call)).parameters.keys() - {"self"}
    assert parameters == values.keys(), "a parameter has no other value here"
    assert situation.refused | situation.idle.keys() <= parameters
    kind, plain = walk.outcome(situation, {})
    assert kind == "done", plain
    assert walk.outcome(situation, {}) == (kind, plain)  # it is repeatable, so that a difference says something
    wrong = []
    for name in sorted(parameters):
        if situation.idle.get(name) == SITUATION:
            continue
        changes = situation.changes.get(name, {name: values[name]})
        kind, result = walk.outcome(situation, changes)
        if name in situation.refused:
            named = "eta" if name == "stock_arguments" else name
            if kind != "refused" or named not in result:
                wrong.append(f"{name} is not refused by its name: {result}")
        elif kind == "refused":
            wrong.append(f"{name} is refused: {result}")
        elif name not in situation.idle and result == plain:
            wrong.append(f"{name} changes nothing")
    return wrong


# ------------------------------------------------------------------------------ drawing and editing


def call_values(walk: Walk) -> dict[str, Any]:
    """Another value for each parameter of ``__call__``."""
    width = 80 if walk.xl else 32
    return {
        "prompt": "a photo of a smiling lady with a hat", "image": walk.picture.rotate(180),
        "source_prompt": "a photo of a lady with glasses", "identity": walk.identity, "inversion": "ddim",
        "num_inference_steps": 4, "guidance_scale": 9.0, "cross_replace_steps": 1.0, "self_replace_steps": 1.0,
        "reweight": {"smiling": 4.0}, "blend_words": False, "edit_mask": LEFT, "generator": seeded(9),
        "output_type": "pt", "return_dict": False, "callback_on_step_end": None,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"], "preset": "paper", "edit": "refine",
        "blend_threshold": 0.999, "change_threshold": 0.95, "guidance_rescale": 0.7, "guidance_stop": 1.0,
        "strength": 0.5, "residuals": False, "keep_words": ["smiling", "sad"], "keep_pixels": False,
        "negative_prompt": "a hat", "output_size": "model", "crop": PART,
        "num_images_per_prompt": 2, "prompt_embeds": noise(1, 77, width), "negative_prompt_embeds": noise(1, 77, width),
        "pooled_prompt_embeds": noise(1, 24), "negative_pooled_prompt_embeds": noise(1, 24), "original_size": (40, 30),
        "crops_coords_top_left": (3, 5), "target_size": (16, 32), "latents": noise(1, 4, 8, 12), "height": 24,
        "width": 32, "clip_skip": 1, "return_attention_maps": True, "keep_attention": KeepAttention(share=1.0),
        "stop": stopped(), "seed": 9, "stock_arguments": 0.5, "complete_prompt": True, "ip_adapter_image": walk.picture,
        "ip_adapter_image_embeds": [noise(2, 1, 16)], "cross_attention_kwargs": {"scale": 0.5},
        "edit_method": "sources_latents",
    }  # fmt: skip


EDITING = {
    "source_prompt", "inversion", "preset", "reweight", "edit_mask", "keep_words", "keep_pixels", "blend_words",
    "blend_threshold", "change_threshold", "guidance_stop", "strength", "edit", "cross_replace_steps",
    "self_replace_steps", "return_attention_maps", "keep_attention", "residuals", "output_size", "crop",
    "complete_prompt", "edit_method",
}  # fmt: skip
DRAWING = {
    "num_images_per_prompt", "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds", "latents", "original_size", "crops_coords_top_left", "target_size",
    "stock_arguments",
}  # fmt: skip
OF_ADAPTERS = {"ip_adapter_image", "ip_adapter_image_embeds", "cross_attention_kwargs"}
"""Arguments that a loaded IP-Adapter or LoRA obeys, see test_diffusers_manner.py; here none is."""
NOT_OF_AN_EDIT = DRAWING | OF_ADAPTERS | {"residuals"}  # which a flow's inversions alone find
XL_ALONE = {
    "pooled_prompt_embeds", "negative_pooled_prompt_embeds", "original_size", "crops_coords_top_left", "target_size"
}  # fmt: skip
SEED = {"seed": {"seed": 9, "generator": None}}
ETA = {"stock_arguments": {"eta": 0.5}, **SEED}
OF_THE_INVERSION = {
    "num_inference_steps", "height", "width", "clip_skip", "source_prompt", "keep_attention", "crop", "complete_prompt",
}  # fmt: skip
"""Arguments that a finished inversion has settled."""


def drawing(walk: Walk) -> Situation:
    embeds = {"prompt": None, "prompt_embeds": noise(1, 77, 80 if walk.xl else 32)}
    negative = {"negative_prompt_embeds": noise(1, 77, 80 if walk.xl else 32)}
    pooled = {"pooled_prompt_embeds": noise(1, 24), "negative_pooled_prompt_embeds": 0 * noise(1, 24)}
    if walk.xl:
        embeds |= pooled | {"negative_prompt_embeds": 0 * noise(1, 77, 80)}
        negative |= {"negative_pooled_prompt_embeds": noise(1, 24)}
    idle = {"image": SITUATION}
    if not walk.xl:
        idle["clip_skip"] = SITUATION  # the stock pipeline's own breaks on transformers 5
    return Situation(
        "__call__",
        lambda: {"prompt": TARGET, "num_inference_steps": 2, "output_type": "np", "generator": seeded(0)},
        EDITING | OF_ADAPTERS | (set() if walk.xl else XL_ALONE),
        idle,
        {
            **ETA,
            "prompt_embeds": embeds,
            "negative_prompt_embeds": negative,
            **({"pooled_prompt_embeds": embeds, "negative_pooled_prompt_embeds": negative} if walk.xl else {}),
        },
    )


def editing(walk: Walk, inversion: Any = None, seed: int | None = None, **more: Any) -> Callable[[], dict[str, Any]]:
    size = {"num_inference_steps": 3, "height": 16, "width": 24}
    made = size if inversion is None or isinstance(inversion, str) else {}
    return lambda: {
        "prompt": TARGET, "image": walk.picture, "source_prompt": SOURCE, "inversion": inversion, "output_type": "np",
        "generator": None if seed is None else seeded(seed), **made, **more,
    }  # fmt: skip


def inverted(walk: Walk, method: str) -> Any:
    return walk.pipe.invert(walk.picture, SOURCE, method, 3, height=16, width=24)


CALLS: dict[str, Callable[[Walk], Situation]] = {
    "drawing": drawing,
    "editing": lambda walk: Situation(
        "__call__", editing(walk), NOT_OF_AN_EDIT, {**OWN_SIZE, **REPEATABLE, "keep_attention": MEMORY}, ETA
    ),
    "editing, not pinned": lambda walk: Situation(
        "__call__", editing(walk, "ddim"), NOT_OF_AN_EDIT | {"keep_attention"},
        {**OWN_SIZE, **REPEATABLE, "inversion": SITUATION}, ETA,
    ),
    "editing, at random": lambda walk: Situation(
        "__call__", editing(walk, "edit_friendly", seed=0), NOT_OF_AN_EDIT,
        {**OWN_SIZE, "keep_attention": MEMORY, "inversion": SITUATION}, ETA,
    ),
    "editing, away from the source": lambda walk: Situation(
        "__call__", editing(walk, "negative_prompt"), NOT_OF_AN_EDIT | {"keep_attention", "negative_prompt"},
        {**OWN_SIZE, **REPEATABLE, "inversion": SITUATION}, ETA,
    ),
    "editing, where the caller says": lambda walk: Situation(
        "__call__", editing(walk, edit_mask=LEFT),
        NOT_OF_AN_EDIT | {"blend_words", "blend_threshold", "change_threshold", "keep_words"},
        {**OWN_SIZE, **REPEATABLE, "keep_attention": MEMORY, "edit_mask": SITUATION},
        {**ETA, "blend_words": {"blend_words": ["glasses"]}},
    ),
    "editing, anywhere": lambda walk: Situation(
        "__call__", editing(walk, blend_words=False),
        NOT_OF_AN_EDIT | {"blend_threshold", "change_threshold", "keep_words"},
        {**OWN_SIZE, **REPEATABLE, "keep_attention": MEMORY, "keep_pixels": NOTHING_TO_KEEP},
        {**ETA, "blend_words": {"blend_words": None}},
    ),
    "editing, with a finished inversion": lambda walk: Situation(
        "__call__", editing(walk, inverted(walk, "direct")), NOT_OF_AN_EDIT | OF_THE_INVERSION | {"image", "identity"},
        {**OWN_SIZE, **REPEATABLE, "inversion": SITUATION}, ETA,
    ),
    "editing, with a null-text inversion": lambda walk: Situation(
        "__call__", editing(walk, inverted(walk, "null_text")),
        NOT_OF_AN_EDIT | OF_THE_INVERSION | {"image", "identity", "guidance_scale", "negative_prompt"},
        {**OWN_SIZE, **REPEATABLE, "inversion": SITUATION}, ETA,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("walk", "name"), [*(("sd1", name) for name in CALLS), ("sdxl", "drawing")], indirect=["walk"])
def test_no_argument_of_a_call_is_ignored(walk: Walk, name: str) -> None:
    assert not problems(walk, CALLS[name](walk), call_values(walk))


# ------------------------------------------------------------------------------ inversions


def inversion_of(walk: Walk, method: str) -> Situation:
    guided = method == "null_text"
    return Situation(
        "invert",
        lambda: {
            "image": walk.picture, "prompt": SOURCE, "method": method, "num_inference_steps": 2, "height": 16,
            "width": 24, **({"generator": seeded(0)} if INVERSIONS[method].draws_noise else {}),
        },
        (set() if guided else {"guidance_scale", "negative_prompt"})
        | (set() if INVERSIONS[method].pinned else {"keep_attention"})
        | (set() if INVERSIONS[method].draws_noise else {"generator", "seed"}),
        {"method": SITUATION},
        SEED,
    )  # fmt: skip


@pytest.mark.parametrize("walk", ["sd1"], indirect=True)
@pytest.mark.parametrize("method", [name for name, one in INVERSIONS.items() if not one.flows_only])
def test_no_argument_of_an_inversion_is_ignored(walk: Walk, method: str) -> None:
    values = {
        "image": walk.picture.rotate(180), "prompt": "a photo of a lady", "method": None, "num_inference_steps": 3,
        "identity": walk.identity, "guidance_scale": 9.0, "negative_prompt": "a hat", "generator": seeded(9),
        "height": 24, "width": 32, "clip_skip": 1, "keep_attention": KeepAttention(max_bytes=0),
        "callback_on_step_end": None, "stop": stopped(), "crop": PART, "seed": 9,
    }  # fmt: skip
    assert not problems(walk, inversion_of(walk, method), values)


# ------------------------------------------------------------------------------ fits and masks


LORA = {"lora_rank", "lora_layers", "lora_init"}
OF_THE_WORDS = {"response_words", "response_batch_size"}
OF_THE_MASK = {"mask", "renormalize", "mask_after", "mask_threshold"}
FITS: dict[str, tuple[dict[str, Any], set[str], dict[str, str]]] = {  # arguments, refused, idle
    "lora": ({"method": "lora"}, OF_THE_WORDS, {"preset": OTHER_METHOD}),
    "full": ({"method": "full", "num_steps": None}, LORA | OF_THE_WORDS, {}),
    "token": ({"method": "token"}, LORA | OF_THE_WORDS | {"detach_sentence"}, {"preset": OTHER_METHOD}),
    "words kept": (
        {"method": "token", "response_loss_weight": 1.0, "batch_size": 2}, LORA | {"detach_sentence"},
        {"preset": OTHER_METHOD, "batch_size": SITUATION},
    ),
    "a mask": (
        {"method": "token", "mask": LEFT}, LORA | OF_THE_WORDS | {"detach_sentence", "mask_threshold"},
        {"preset": OTHER_METHOD},
    ),
    "no spatial control": (
        {"method": "token", "spatial_control": False}, LORA | OF_THE_MASK | OF_THE_WORDS | {"detach_sentence"},
        {"preset": OTHER_METHOD, "spatial_control": SITUATION},
    ),
    "no semantic loss": (
        {"method": "lora", "semantic_weight": 0.0}, OF_THE_WORDS | {"detach_sentence"},
        {"preset": OTHER_METHOD, "semantic_weight": SITUATION},
    ),
}  # fmt: skip


@pytest.mark.parametrize("walk", ["sd1"], indirect=True)
@pytest.mark.parametrize("name", FITS)
def test_no_argument_of_a_fit_is_ignored(
    walk: Walk, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class AdamW8bit(torch.optim.AdamW):  # stands in for bitsandbytes', which needs a CUDA device
        def __init__(self, groups: Any, weight_decay: float) -> None:
            super().__init__(groups, weight_decay=weight_decay, betas=(0.5, 0.6))

    package = types.SimpleNamespace(optim=types.SimpleNamespace(AdamW8bit=AdamW8bit))
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    arguments, refused, idle = FITS[name]
    is_lora = arguments["method"] == "lora"
    quick = {"lora_layers": "attention", "lora_init": "random"} if is_lora else {}
    values = {
        "image": walk.picture.rotate(180), "prompt": "a photo of a lady", "subject": "glasses", "token": "<ada>",
        "method": None, "mask": ~LEFT, "num_steps": 3, "learning_rate": 1e-4, "semantic_weight": 5.0,
        "spatial_control": False, "generator": seeded(9), "callback_on_step_end": None, "preset": "paper",
        "reference": ReferenceAttribute(walk.picture.rotate(180), "a photo of a man with a hat", "hat", mask=LEFT),
        "batch_size": 2, "timestep_sampling": "high_noise", "lr_scheduler": "constant" if is_lora else "cosine",
        "early_stop": True, "optimizer": "adamw_8bit", "gradient_checkpointing": True, "lora_rank": 3,
        "lora_layers": "all" if is_lora else "attention", "lora_init": "gradient" if is_lora else "random",
        "detach_sentence": True, "renormalize": True, "mask_after": True, "mask_threshold": 0.1,
        "height": 24, "width": 32, "token_learning_rate": 1e-4, "stop": stopped(), "crop": PART,
        "complete_prompt": True, "checkpoint_folder": tmp_path / "fit", "seed": 9,
        "response_loss_weight": 2.0, "response_words": ["smiling"], "response_batch_size": 1,
    }  # fmt: skip

    def fit() -> dict[str, Any]:
        common = {"num_steps": 2, "batch_size": 1, "height": 16, "width": 24, "generator": seeded(0)}
        settings = {**common, **quick, **arguments}
        if settings["num_steps"] is None:  # the preset's own steps, cut short
            settings |= {"num_steps": 2}
        return {"image": walk.picture, "prompt": SOURCE, "subject": "lady", **settings}

    kept = "the same fit, kept on its way: tests/test_fit_checkpoint.py"
    idle = {
        "method": SITUATION,
        "checkpoint_folder": kept,
        "early_stop": LONG_FITS,
        "gradient_checkpointing": MEMORY,
        **idle,
    }
    changes: dict[str, Any] = dict(SEED)
    if name == "a mask":
        changes["spatial_control"] = {"spatial_control": False, "mask": None}
    if name == "no spatial control":
        changes["reference"] = {"reference": replace(values["reference"], mask=None)}
    assert not problems(walk, Situation("fit_identity", fit, refused, idle, changes), values)


@pytest.mark.parametrize("walk", ["sd1"], indirect=True)
def test_no_argument_of_a_preview_is_ignored(walk: Walk) -> None:
    def preview() -> dict[str, Any]:
        return {"image": walk.picture, "prompt": SOURCE, "subject": "lady"}

    values = {
        "image": walk.picture.rotate(180), "prompt": "a photo of a lady", "subject": "glasses", "threshold": 0.9,
        "height": 24, "width": 48, "crop": PART,
    }  # fmt: skip
    assert not problems(walk, Situation("preview_mask", preview), values)


@pytest.mark.parametrize("walk", ["sd1"], indirect=True)
def test_two_rates_of_the_one_row_are_refused(walk: Walk) -> None:
    with pytest.raises(ValueError, match=r"learning_rate=0.1 and token_learning_rate=0.2: .*Give one of them"):
        walk.pipe.fit_identity(
            walk.picture, SOURCE, "lady", method="token", learning_rate=0.1, token_learning_rate=0.2
        )  # fmt: skip


@pytest.mark.parametrize("walk", ["sd1"], indirect=True)
def test_loading_options_go_with_folders_alone(walk: Walk) -> None:
    with pytest.raises(TypeError, match="revision= is for an identity that is read from a folder or the Hub"):
        walk.pipe.load_identity(walk.identity, revision="main")
