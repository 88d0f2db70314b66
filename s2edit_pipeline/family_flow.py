"""What transformers that were trained by flow matching have in common."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from .attention_seam import AttentionSite
from .family_base import DEFAULT_INVERSION, ModelFamily
from .noise_schedule import (
    FlowTime,
    NoiseSchedule,
    check_flow_scheduler,
    flow_schedule,
    flow_training_schedule,
)
from .offloaded_weights import computing_type
from .prompt_columns import Segment

FEW_STEPS = 10
"""Fewer are a distilled model's: its path isn't straight enough to be walked up, so that FlowEdit is better there."""


class FlowFamily(ModelFamily):
    """A transformer that predicts a flow, on the levels of a ``FlowMatchEulerDiscreteScheduler``."""

    denoiser_name = "transformer"
    edit_defaults: ClassVar[Mapping[str, Any]] = {"self_replace_steps": 0.2}
    kept_attention = 0.0
    renormalizes = True

    needed: ClassVar[tuple[str, ...]] = ("vae", "text_encoder", "tokenizer", "transformer", "scheduler")
    """The components without which nothing can be done."""

    # -------------------------------------------------------------------- checks

    def check(self) -> None:
        pipe = self.pipe
        for name in self.needed:
            if getattr(pipe, name, None) is None:
                raise ValueError(f"The pipeline has no {name}; load it whole, or pass {name}= to from_pretrained.")
        check_flow_scheduler(pipe.scheduler)
        self.check_channels()
        for name, encoder in self._numbered("text_encoder").items():
            if computing_type(encoder) != pipe.transformer.dtype:
                raise ValueError(
                    f"The transformer is {pipe.transformer.dtype} and the {name} {encoder.dtype}. Load with one type, "
                    "from_pretrained(..., dtype=torch.bfloat16), or call pipe.to(torch.float32)."
                )

    def check_channels(self) -> None:
        """Raises:
        ValueError: the transformer takes other latents than the autoencoder gives.
        """
        given = self.autoencoder_channels
        if self.latent_channels != given:
            raise ValueError(
                f"The transformer takes {self.latent_channels} channels and the autoencoder gives {given}: load both "
                "from one model."
            )

    @property
    def autoencoder_channels(self) -> int:
        """C of the latents that the autoencoder gives."""
        channels: int = self.pipe.vae.config.latent_channels
        return channels

    # -------------------------------------------------------------------- noise

    @property
    def default_steps(self) -> int:
        return 28

    @abstractmethod
    def flow_time(self, size: tuple[int, int] | None, num_inference_steps: int | None) -> FlowTime:
        """What the denoiser is told, and how the scheduler is asked, for pictures of ``size``; without a number of
        steps, of training."""

    def schedule(self, num_inference_steps: int, size: tuple[int, int] | None = None) -> NoiseSchedule:
        return flow_schedule(self.pipe.scheduler, num_inference_steps, self.flow_time(size, num_inference_steps))

    def training_schedule(self, size: tuple[int, int] | None = None) -> NoiseSchedule:
        return flow_training_schedule(self.pipe.scheduler, self.flow_time(size, None))

    def default_inversion(self, num_inference_steps: int) -> str:
        few = isinstance(num_inference_steps, int) and num_inference_steps < FEW_STEPS
        return "flowedit" if few else DEFAULT_INVERSION

    # -------------------------------------------------------------------- diffusers' own pipeline

    stock_class: ClassVar[Any]

    @property
    def lora_components(self) -> tuple[str, ...]:
        return tuple(getattr(self.stock_class, "_lora_loadable_modules", ()))

    def stock(self) -> Any:
        components = {name: getattr(self.pipe, name, None) for name in self.stock_components - {"scheduler"}}
        return self.stock_class(**components, scheduler=copy.deepcopy(self.pipe.scheduler))


class PackedFlowFamily(FlowFamily):
    """One whose picture cells are 2 x 2 latents each, and whose stock pipeline names its native size itself."""

    native_side: ClassVar[int] = 128
    """Of the square pictures that it was made for, in latents: 1,024 pixels with the published autoencoders."""
    told_at: ClassVar[tuple[float, float]] = (0.0, 1.0)
    """What the denoiser is told of a picture, and of noise."""

    @property
    def native_size(self) -> int:
        return self.native_side * self.pixels_per_latent

    @property
    def size_multiple(self) -> int:
        return 2 * self.pixels_per_latent

    def flow_time(self, size: tuple[int, int] | None, num_inference_steps: int | None) -> FlowTime:
        """From noise 1 down to 1/N, as the stock pipelines ask the scheduler."""
        height, width = (side // self.size_multiple for side in size or (self.native_size, self.native_size))
        steps, scheduler = num_inference_steps, self.pipe.scheduler
        asks = isinstance(steps, int) and steps > 0 and not scheduler.config.get("use_flow_sigmas")
        sigmas = np.linspace(1, 1 / steps, steps) if asks and steps is not None else None
        return FlowTime(*self.told_at, mu=self.shift(height * width, steps), sigmas=sigmas)

    def shift(self, num_cells: int, num_inference_steps: int | None) -> float | None:
        """Of the noise levels, in a picture of ``num_cells`` cells; None where the scheduler's is fixed."""
        return dynamic_mu(self.pipe.scheduler, num_cells)

    def drawn_size(self, given: Mapping[str, Any]) -> tuple[int, int]:
        """By the pictures': packed latents have none of their own."""
        return given["height"] // self.pixels_per_latent, given["width"] // self.pixels_per_latent

    def attention_grids(self, height: int, width: int) -> dict[int, tuple[int, int]]:
        grid = height // 2, width // 2
        return {grid[0] * grid[1]: grid}


def word_mean(output: torch.Tensor, segment: Segment) -> torch.Tensor:
    """(D,), what stands for a whole prompt where the text encoder reads both ways and has no place for it: the mean
    over the words' columns (Sentence-T5, Ni et al. 2022), of ``output`` (L, D)."""
    return output[segment.start : max(segment.eos, segment.start + 1)].mean(0)


def dynamic_mu(scheduler: Any, num_cells: int) -> float | None:
    """The shift of the noise levels that diffusers' pipelines compute for ``num_cells`` picture cells (Esser et al.
    2024, section 5.3.2), or None where the scheduler's is fixed."""
    config = scheduler.config
    if not config.use_dynamic_shifting:
        return None
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    mu: float = num_cells * slope + config.base_shift - slope * config.base_image_seq_len
    return mu


def block_number(name: str) -> int:
    """Of the block that the layer ``name`` is in: 3 of "transformer_blocks.3.attn"."""
    return int(name.split(".")[1])


def middle_half(count: int) -> range:
    """Of ``count`` blocks those in the middle, which tell where words look as long as nobody has measured better."""
    return range(count // 4, count - count // 4)


def picture_then_text(
    name: str, grid: tuple[int, int], num_columns: int, *, tells_words: bool, holds_layout: bool = True
) -> AttentionSite:
    """The site of joint attention in which the picture's cells come first, and then the text's columns."""
    cells = grid[0] * grid[1]
    return AttentionSite(
        name, "joint", *grid, tells_words=tells_words, holds_layout=holds_layout,
        text=slice(cells, cells + num_columns), picture=slice(0, cells),
    )  # fmt: skip


def text_then_picture(
    name: str, grid: tuple[int, int], num_columns: int, *, tells_words: bool, holds_layout: bool = True
) -> AttentionSite:
    """The site of joint attention in which the text's columns come first, and then the picture's cells."""
    return AttentionSite(
        name, "joint", *grid, tells_words=tells_words, holds_layout=holds_layout,
        text=slice(0, num_columns), picture=slice(num_columns, num_columns + grid[0] * grid[1]),
    )  # fmt: skip


def cells_of(latents: torch.Tensor) -> torch.Tensor:
    """(B, hw / 4, 4C): ``latents`` (B, C, h, w), the channels of 2 x 2 of them packed into a cell, row by row."""
    return pixel_unshuffle(latents, 2).flatten(2).mT


def latents_of(cells: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, C, height, width), the inverse of :func:`cells_of`."""
    return pixel_shuffle(cells.mT.unflatten(2, (height // 2, width // 2)), 2)
