"""A kind of model that the package has never heard of, made known from outside: it fits, inverts and edits."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from PIL import Image
from torch import nn
from torch.nn import functional as F

from s2edit_pipeline import S2EditPipeline
from s2edit_pipeline.attention_seam import AttentionSite
from s2edit_pipeline.edit_loop import EDITS, EditedLatents, EditMethod, EditTask, register_edit
from s2edit_pipeline.family_base import ModelFamily, family_of, register_family, unregister_family
from s2edit_pipeline.noise_schedule import NoiseSchedule
from s2edit_pipeline.prompt_columns import TokenizedPrompt
from s2edit_pipeline.prompt_embeds import Batch, PromptEmbeds
from s2edit_pipeline.prompt_tokenizing import tokenize

SOURCE, TARGET = "a photo of a sad lady", "a photo of a smiling [I] lady"


class PebbleTransformer(ModelMixin, ConfigMixin):
    """Pixels in cells of 2 x 2; one self- and one cross-attention; predicts a flow."""

    @register_to_config
    def __init__(self, in_channels: int = 12, width: int = 32) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(in_channels + 1, width), nn.Linear(width, in_channels)
        self.looks = Attention(width, heads=4, dim_head=8)
        self.reads = Attention(width, cross_attention_dim=32, heads=4, dim_head=8)

    def forward(self, x: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        cells = x.flatten(2).transpose(1, 2)
        told = time.to(x).reshape(-1, 1, 1).expand(len(x), cells.shape[1], 1)
        hidden = self.into(torch.cat([cells, told], -1))
        hidden = hidden + self.looks(hidden)
        hidden = hidden + self.reads(hidden, encoder_hidden_states=text)
        return self.out(hidden).transpose(1, 2).unflatten(2, x.shape[2:])


class PebbleFamily(ModelFamily):
    name, denoiser_name, denoiser_classes = "Pebble", "transformer", ("PebbleTransformer",)
    native_size, size_multiple, pixels_per_latent = 32, 2, 2  # type: ignore[assignment]
    stock_components = frozenset({"transformer", "text_encoder", "tokenizer", "scheduler"})  # type: ignore[assignment]

    def check(self) -> None:
        pass

    def tokenize(self, prompt: str, tokenizers: Mapping[str, Any] | None = None) -> TokenizedPrompt:
        return tokenize((tokenizers or self.tokenizers)["text_encoder"], prompt)

    def encode(self, prompts: Sequence[TokenizedPrompt], clip_skip: int | None = None) -> PromptEmbeds:
        output = self.pipe.text_encoder(torch.cat([prompt.input_ids for prompt in prompts])).last_hidden_state
        return PromptEmbeds(output, outputs={"text_encoder": output})

    def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        return F.pixel_unshuffle(pixels, 2)

    def decode(self, latents: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        return F.pixel_shuffle(latents, 2)

    def schedule(self, num_inference_steps: int, size: tuple[int, int] | None = None) -> NoiseSchedule:
        sigmas = torch.linspace(0, 1, num_inference_steps + 1, dtype=torch.float64)
        return NoiseSchedule(1 - sigmas, sigmas, sigmas[1:].float(), "flow")

    def training_schedule(self, size: tuple[int, int] | None = None) -> NoiseSchedule:
        return self.schedule(1000)

    def denoise(self, x: torch.Tensor, timestep: Any, embeds: PromptEmbeds, dtype: torch.dtype) -> torch.Tensor:
        return self.denoiser(x.to(dtype), torch.as_tensor(timestep), embeds.embeds.to(dtype)).to(x)

    def attention_grids(self, height: int, width: int) -> dict[int, tuple[int, int]]:
        return {height * width: (height, width)}

    def attention_site(
        self, grids: Mapping[int, tuple[int, int]], name: str, layer: nn.Module, hidden_states: torch.Tensor, text: Any
    ) -> AttentionSite:
        kind, size = ("self" if text is None else "cross"), grids[hidden_states.shape[1]]
        return AttentionSite(name, kind, *size, tells_words=text is not None, holds_layout=text is None)

    def lora_targets(self, component: str, layers: str) -> list[str]:
        return ["to_q", "to_k", "to_v", "to_out.0"] if component == "transformer" else ["q_proj", "v_proj"]

    def stock(self) -> Any:
        raise NotImplementedError


@pytest.fixture
def pebble(pipe: S2EditPipeline) -> Iterator[S2EditPipeline]:
    """A pipeline of that kind over the tiny text encoder."""
    register_family(PebbleFamily)
    torch.manual_seed(0)
    made = S2EditPipeline(
        transformer=PebbleTransformer().eval(),
        text_encoder=pipe.text_encoder,
        tokenizer=pipe.tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    made.set_progress_bar_config(disable=True)
    yield made
    unregister_family(PebbleFamily)


def state(pipe: S2EditPipeline) -> dict[str, torch.Tensor]:
    parts = {"transformer": pipe.transformer, "text_encoder": pipe.text_encoder}
    return {f"{part}.{n}": v.clone() for part, module in parts.items() for n, v in module.state_dict().items()}


@pytest.mark.parametrize("method", ["lora", "full", "token"])
def test_fit_save_load_invert_and_edit(
    pebble: S2EditPipeline, picture: Image.Image, half_mask: np.ndarray, method: str, tmp_path: Any
) -> None:
    assert isinstance(family_of(pebble), PebbleFamily)
    before, modules = state(pebble), list(pebble.transformer.modules())
    identity = pebble.fit_identity(
        picture, SOURCE, "lady", num_steps=3, method=method, mask=half_mask, generator=torch.Generator().manual_seed(0)
    )
    identity.save_pretrained(tmp_path / "ada", exact=True)
    pebble.load_identity(tmp_path / "ada")
    plain = pebble.invert(picture, SOURCE, num_inference_steps=6)
    result = pebble(TARGET, picture, SOURCE, inversion=plain, output_type="np")
    again = pebble(TARGET, picture, SOURCE, num_inference_steps=6, output_type="np")
    assert np.abs(result.images - again.images).max() < 1e-5
    # the source is pinned: it comes back exactly
    np.testing.assert_allclose(result.source[0] * 255, np.asarray(picture), atol=1e-3)
    assert np.abs(result.images - result.source).max() > 1e-4
    pebble.unload_identity()
    assert all(torch.equal(value, before[name]) for name, value in state(pebble).items())
    assert list(pebble.transformer.modules()) == modules


@pytest.mark.parametrize("inversion", ["ddim", "fixed_point", "null_text", "negative_prompt", "edit_friendly"])
def test_every_inversion_serves_it(pebble: S2EditPipeline, picture: Image.Image, inversion: str) -> None:
    result = pebble(
        TARGET.replace("[I] ", ""), picture, SOURCE, inversion=inversion, num_inference_steps=4, output_type="np",
        generator=torch.Generator().manual_seed(0), return_attention_maps=True,
    )  # fmt: skip
    assert np.isfinite(result.images).all() and set(result.attention_maps) >= {"smiling", "lady"}


def test_an_edit_method_of_ones_own(pebble: S2EditPipeline, picture: Image.Image) -> None:
    """Registered from outside: every target is the model's plain answer along the source's trajectory (SDEdit's)."""

    def unguided(task: EditTask) -> EditedLatents:
        x = task.inversion.trajectory[-1:].expand(len(task.targets), -1, -1, -1)
        for level in range(task.schedule.num_steps, 0, -1):
            batch = Batch(tuple(task.targets))
            task.control.begin(task.schedule.num_steps - level, level, batch)
            x = task.schedule.move(x, task.denoise(x, level, batch), level, level - 1)
            task.control.end(level)
        return EditedLatents(x, task.inversion.trajectory[:1], (None,) * len(task.targets))

    register_edit("unguided", EditMethod(unguided))
    try:
        settings = {
            "num_inference_steps": 4,
            "output_type": "np",
            "guidance_scale": 1.0,
            "keep_pixels": False,
            "residuals": False,
        }
        free = {"blend_words": False, "cross_replace_steps": 0.0, "self_replace_steps": 0.0}
        own = pebble("a photo of a hat", picture, SOURCE, edit_method="unguided", **settings, **free).images
        assert np.abs(own - pebble("a photo of a hat", picture, SOURCE, **settings, **free).images).max() < 1e-5
    finally:
        del EDITS["unguided"]
    with pytest.raises(ValueError, match=r"edit_method='unguided' is unknown; choose.*prompt_to_prompt"):
        pebble(TARGET, picture, SOURCE, edit_method="unguided")


def test_its_mask_is_where_the_word_looks(pebble: S2EditPipeline, picture: Image.Image) -> None:
    mask = pebble.preview_mask(picture, SOURCE, "lady")
    assert mask.size == picture.size and mask.mode == "L" and 0 < np.asarray(mask).mean() < 255


def test_a_kind_that_nobody_serves_is_refused_with_those_that_are(pipe: S2EditPipeline) -> None:
    with pytest.raises(ValueError, match=r"PebbleTransformer is a model that isn't served.*UNet2DConditionModel"):
        S2EditPipeline(transformer=PebbleTransformer(), scheduler=copy.deepcopy(pipe.scheduler))
