"""Others' ways to edit a picture by words: SDEdit, InstructPix2Pix and SINE, each a ``protocol.Method``.

All but SINE are diffusers' own pipelines. Every target prompt starts from the same noise, that of the seed, however
many there are in a call. What each was given to work with, and what is missing: docs/benchmark-rivals.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionInstructPix2PixPipeline
from PIL import Image
from torch import nn

from ...fit_settings import FitSettings
from ...identity_adapter import IdentityAdapter
from ...noise_guidance import guided
from ...noise_schedule import check_finite
from ...picture_files import read_picture
from ...picture_placement import Placement, place_picture
from ...prompt_embeds import PromptEmbeds
from ...prompt_words import insert_token
from .protocol import Edit, plain_fields, weights_digest


def _generators(seed: int, count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for _ in range(count)]


def _placement(picture: Image.Image, pipe: Any) -> Placement:
    """All of ``picture`` on a canvas that ``pipe``'s model works at."""
    multiple = pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)
    native = pipe.unet.config.sample_size * pipe.vae_scale_factor
    return place_picture(picture.size, native, multiple)


def _check_family(pipe: Any, name: str) -> None:
    if getattr(pipe, "text_encoder_2", None) is not None:
        raise ValueError(f"{name} is written for Stable Diffusion 1 and 2; this model has SDXL's second text encoder.")


@dataclass(frozen=True)
class SDEdit:
    """Noise up to ``strength`` of the schedule, then denoise under the target prompt (Meng et al. 2022).

    Attributes:
        pipe: whose components it is made of.
        strength: in (0, 1]: the more, the more is changed.
    """

    pipe: Any
    strength: float = 0.6
    num_inference_steps: int = 50
    guidance_scale: float = 4.5
    name: str = "SDEdit"

    def __post_init__(self) -> None:
        _check_family(self.pipe, self.name)

    def resolved(self) -> dict[str, Any]:
        return plain_fields(self)

    def prepare(self, picture: Image.Image, source_prompt: str, subject: str, seed: int) -> Edit:
        scheduler = DDIMScheduler.from_config(self.pipe.scheduler.config)
        stock = StableDiffusionImg2ImgPipeline(
            **{**self.pipe.components, "scheduler": scheduler}, requires_safety_checker=False
        )
        stock.set_progress_bar_config(disable=True)
        placement = _placement(picture, stock)
        start = placement.to_canvas(picture)

        def edit(target_prompts: Sequence[str]) -> list[Image.Image]:
            edited = stock(
                list(target_prompts),
                image=[start] * len(target_prompts),
                strength=self.strength,
                num_inference_steps=self.num_inference_steps,
                guidance_scale=self.guidance_scale,
                generator=_generators(seed, len(target_prompts)),
            )
            return [placement.from_canvas(one) for one in edited.images]

        return edit


@dataclass(frozen=True)
class InstructPix2Pix:
    """A model that was trained to edit as it is told (Brooks et al. 2023).

    The instruction is the target prompt where nobody wrote another: so was the embedded model's sibling trained, see
    ``instruct_training``.

    Attributes:
        model: with a U-Net that takes the picture beside the noise.
        guidance_scale: how strongly the words pull, the paper's s_T.
        image_guidance_scale: how strongly the picture pulls, s_I, at least 1: the more, the less is changed.
    """

    model: StableDiffusionInstructPix2PixPipeline
    image_guidance_scale: float = 1.5
    guidance_scale: float = 4.5
    num_inference_steps: int = 50
    name: str = "InstructPix2Pix"
    takes_instructions: ClassVar[bool] = True

    @classmethod
    def from_folder(cls, folder: str | Path, **settings: Any) -> InstructPix2Pix:
        """``settings`` are the other fields.

        Raises:
            FileNotFoundError: ``folder`` holds no such model.
        """
        if not (Path(folder) / "model_index.json").exists():
            raise FileNotFoundError(
                f"{folder} is no diffusers folder. Train one, s2edit train-instruct --out OUT, and pass OUT/model."
            )
        return cls(StableDiffusionInstructPix2PixPipeline.from_pretrained(str(folder)), **settings)

    def resolved(self) -> dict[str, Any]:
        return {**plain_fields(self), "weights": weights_digest(self.model.components)}

    def prepare(self, picture: Image.Image, source_prompt: str, subject: str, seed: int) -> Edit:
        self.model.set_progress_bar_config(disable=True)
        placement = _placement(picture, self.model)
        start = placement.to_canvas(picture)

        def edit(target_prompts: Sequence[str]) -> list[Image.Image]:
            edited = self.model(
                list(target_prompts),
                image=[start] * len(target_prompts),
                num_inference_steps=self.num_inference_steps,
                guidance_scale=self.guidance_scale,
                image_guidance_scale=self.image_guidance_scale,
                generator=_generators(seed, len(target_prompts)),
            )
            return [placement.from_canvas(one) for one in edited.images]

        return edit


def model_based_guidance(
    unconditional: torch.Tensor,
    conditional: torch.Tensor,
    fine_tuned: torch.Tensor,
    fine_tuned_weight: float,
    guidance_scale: float,
) -> torch.Tensor:
    """SINE's model-based classifier-free guidance (Zhang et al. 2023, section 3.2), with w the guidance and v the
    share of the pre-trained model, 1 - ``fine_tuned_weight``::

        w (v eps(z, c) + (1 - v) eps^(z, c^)) + (1 - w) eps(z)

    where eps^ is the fine-tuned model under its own prompt c^. Linear, so that v-predictions mix as scores do.
    """
    mixed = (1 - fine_tuned_weight) * conditional + fine_tuned_weight * fine_tuned
    return guided(unconditional, mixed, guidance_scale)


@contextmanager
def _weights(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """``module`` with these parameters; its own tensors are put back, not written to."""
    before = [(parameter, parameter.data) for parameter in module.parameters()]
    try:
        for name, parameter in module.named_parameters():
            parameter.data = tensors[name]
        yield
    finally:
        for parameter, data in before:
            parameter.data = data


@dataclass(frozen=True)
class SINE:
    """Fine-tune the model to the one picture, then draw anew, from noise, under both models' guidance (Zhang et al.
    2023), without the patch-based part of the fine-tuning, which is for sizes other than the picture's own.

    Attributes:
        pipe: the pre-trained model; its ``fit_identity`` is the fine-tuning, without either control.
        fine_tuned_weight: 1 - v, in [0, 1]: the more, the less is changed.
        mixed_share: of the steps, the noisier ones, in which the fine-tuned model has a say (the paper's t > K);
            the others are the pre-trained model's alone.
        fit_steps, learning_rate: of the fine-tuning.
    """

    pipe: Any
    fine_tuned_weight: float = 0.6
    mixed_share: float = 0.5
    fit_steps: int = 60
    learning_rate: float = 1e-4
    num_inference_steps: int = 50
    guidance_scale: float = 4.5
    name: str = "SINE"

    def __post_init__(self) -> None:
        _check_family(self.pipe, self.name)

    @property
    def _fit(self) -> dict[str, Any]:
        return {
            "method": "full",
            "num_steps": self.fit_steps,
            "learning_rate": self.learning_rate,
            "semantic_weight": 0.0,
            "spatial_control": False,
        }

    def resolved(self) -> dict[str, Any]:
        return {**plain_fields(self), "fit": asdict(FitSettings(**self._fit))}

    def prepare(self, picture: Image.Image, source_prompt: str, subject: str, seed: int) -> Edit:
        pipe, model = self.pipe, _Model(self.pipe, picture, self.num_inference_steps)
        identity = pipe.fit_identity(
            picture, source_prompt, subject, **self._fit, generator=torch.Generator().manual_seed(seed)
        )
        fine_tuned, tuned_prompt_embeds = model.with_identity(identity, source_prompt, subject)

        @torch.no_grad()
        def edit(target_prompts: Sequence[str]) -> list[Image.Image]:
            n = len(target_prompts)
            embeds = model.encode_guided(target_prompts)
            noise = torch.randn(model.latent_shape, generator=torch.Generator().manual_seed(seed))
            x = noise.to(embeds).expand(n, -1, -1, -1)
            for step, k in enumerate(range(model.num_steps, 0, -1)):
                unconditional, conditional = model.evaluate(torch.cat([x, x]), k, embeds).chunk(2)
                if step < self.mixed_share * model.num_steps:
                    with _weights(pipe.unet, fine_tuned):
                        tuned = model.evaluate(x, k, tuned_prompt_embeds.expand(n, -1, -1))
                    output = model_based_guidance(
                        unconditional, conditional, tuned, self.fine_tuned_weight, self.guidance_scale
                    )
                else:
                    output = guided(unconditional, conditional, self.guidance_scale)
                x = model.move_down(x, output, k)
                check_finite(x, "SINE's drawing", step)
            return [model.placement.from_canvas(one) for one in model.decode(x)]

        return edit


class _Model:
    """What SINE asks of a pipeline's model, for pictures of the working size of ``picture`` in ``num_steps`` steps.

    Levels count from 0, the picture, to ``num_steps``, the noise.
    """

    def __init__(self, pipe: Any, picture: Image.Image, num_steps: int) -> None:
        self._pipe, self._family = pipe, pipe.family
        placed = self._family.place(read_picture(picture))
        self.placement = placed.placement
        self._schedule = self._family.schedule(num_steps, placed.size)
        self._dtype, self.num_steps = self._family.dtype, self._schedule.num_steps
        height, width = (side // self._family.pixels_per_latent for side in placed.size)
        self.latent_shape = (1, self._family.latent_channels, height, width)

    def with_identity(
        self, identity: IdentityAdapter, source_prompt: str, subject: str
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The U-Net's parameters with ``identity``, and the source prompt with its token encoded (1, T, D)."""
        pipe = self._pipe
        differences = identity.weight_differences("unet")
        tuned = {
            name: (weight + differences[name].to(weight)) if name in differences else weight.detach().clone()
            for name, weight in pipe.unet.named_parameters()
        }
        token = pipe.load_identity(identity)
        try:
            embeds = self._encode([insert_token(source_prompt, subject, token)]).embeds
        finally:
            pipe.unload_identity(token)
        return tuned, embeds

    def _encode(self, prompts: Sequence[str]) -> PromptEmbeds:
        with torch.no_grad():
            return self._family.encode([self._family.tokenize(prompt) for prompt in prompts])

    def encode_guided(self, prompts: Sequence[str]) -> torch.Tensor:
        """(2 N, T, D): of N prompts, the empty prompt N times, then the prompts."""
        targets = self._encode(prompts)
        with torch.no_grad():
            null = self._family.encode_negative(None, targets)
        return torch.cat([null.embeds.expand(len(prompts), -1, -1), targets.embeds])

    def evaluate(self, x: torch.Tensor, level: int, embeds: torch.Tensor) -> torch.Tensor:
        """The U-Net's output for ``x`` (N, C, h, w) at ``level`` under ``embeds`` (N, T, D)."""
        timestep = int(self._schedule.timesteps[level - 1])
        output: torch.Tensor = self._family.denoise(x, timestep, PromptEmbeds(embeds), self._dtype)
        return output

    def move_down(self, x: torch.Tensor, output: torch.Tensor, level: int) -> torch.Tensor:
        """DDIM's step from ``level`` to the one below."""
        return self._schedule.move(x, output, level, level - 1)

    def decode(self, x: torch.Tensor) -> list[Image.Image]:
        pixels = self._family.decode(x)
        return list(self._pipe.image_processor.postprocess(pixels, output_type="pil"))
