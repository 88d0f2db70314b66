"""Stable Diffusion 1, 2 and XL: a U-Net with cross-attention to CLIP's words, and a variance-preserving diffusion."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import logging
from torch import nn

from .attention_seam import AttentionSite
from .family_base import ModelFamily, register_family
from .family_ip_adapter import denoiser_arguments, encode_pictures, loaded_adapters
from .noise_guidance import PLAIN_GUIDANCE, Guidance
from .noise_schedule import (
    NoiseSchedule,
    check_diffusion_scheduler,
    diffusion_schedule,
    diffusion_training_schedule,
)
from .offloaded_weights import computing_type
from .prompt_columns import TokenizedPrompt, side_by_side
from .prompt_embeds import PicturePrompt, PromptEmbeds, ShownPicture
from .prompt_tokenizing import tokenize

logger = logging.get_logger(__name__)

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_CLIP_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
_TOLD_GUIDANCE = Guidance(form="told")
_SHALLOWEST_MAP = 16
"""Latents with no side longer than this are themselves small enough for their maps to tell where words look."""


@register_family
class UNetFamily(ModelFamily):
    """A ``UNet2DConditionModel``; with a second text encoder it is Stable Diffusion XL's."""

    name = "Stable Diffusion 1, 2 and XL"
    denoiser_name = "unet"
    denoiser_classes = ("UNet2DConditionModel",)
    takes_picture_adapters = True

    @property
    def is_xl(self) -> bool:
        """Whether it is a Stable Diffusion XL: by its second text encoder, or where there are no text encoders by what
        its U-Net is told."""
        if getattr(self.pipe, "text_encoder_2", None) is not None or self.pipe.text_encoder is not None:
            return self.pipe.text_encoder_2 is not None
        unet = self.pipe.unet
        return unet is not None and unet.config.addition_embed_type == "text_time"

    @classmethod
    def encodes_for(cls, pipe: Any) -> bool:
        return pipe.text_encoder_3 is None and pipe.transformer is None and "CLIP" in type(pipe.text_encoder).__name__

    # -------------------------------------------------------------------- checks

    def check(self) -> None:
        self._check_there("scheduler")
        check_diffusion_scheduler(self.pipe.scheduler)
        self.check_drawing(reads_words=True)

    def check_drawing(self, *, reads_words: bool) -> None:
        pipe = self.pipe
        self._check_there("vae", "unet", "scheduler")
        if type(pipe.scheduler).__name__ not in KarrasDiffusionSchedulers.__members__:  # these the stock pipeline takes
            check_diffusion_scheduler(pipe.scheduler)
        if pipe.safety_checker is not None and pipe.feature_extractor is None:
            raise ValueError(
                "The safety checker needs the feature_extractor: load it too, or pass safety_checker=None."
            )
        if pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
            raise ValueError(
                f"The U-Net takes {pipe.unet.config.in_channels} channels and the autoencoder gives "
                f"{pipe.vae.config.latent_channels}: an inpainting or instruction model can't be used; load its base."
            )
        if reads_words:
            self._check_words()

    def _check_words(self) -> None:
        """Raises:
        ValueError: a text encoder is missing, or doesn't belong to the U-Net.
        """
        pipe = self.pipe
        if pipe.text_encoder is None and pipe.text_encoder_2 is not None:
            raise ValueError(
                "This model has the second text encoder alone: it is an SDXL refiner, which can't draw alone. "
                "Load its base, such as stabilityai/stable-diffusion-xl-base-1.0."
            )
        self._check_there("text_encoder", "tokenizer")
        if self.is_xl or pipe.tokenizer_2 is not None:
            self._check_there("text_encoder_2", "tokenizer_2")
        self._check_conditions()
        for encoder in self.text_encoders.values():
            if pipe.unet.dtype != computing_type(encoder):
                raise ValueError(
                    f"The U-Net is {pipe.unet.dtype} and the text encoder {encoder.dtype}. "
                    "Load with one type, from_pretrained(..., dtype=torch.float32), or call pipe.to(torch.float32)."
                )

    def _check_there(self, *names: str) -> None:
        """Raises:
        ValueError: a component is missing.
        """
        for name in names:
            if getattr(self.pipe, name) is None:
                raise ValueError(f"The pipeline has no {name}; load it whole, or pass {name}= to from_pretrained.")

    def _check_conditions(self) -> None:
        """Raises:
        ValueError: the U-Net wants to be told other things than these text encoders and sizes.
        """
        unet, second = self.pipe.unet, self.pipe.text_encoder_2
        kind = unet.config.addition_embed_type
        if kind is None and second is None:
            return
        if kind != "text_time" or second is None:
            raise ValueError(
                f"The U-Net has addition_embed_type={kind!r} and the pipeline "
                f"{'no' if second is None else 'a'} second text encoder. Stable Diffusion has neither; "
                "SDXL has 'text_time' and both text encoders: load all components from one model."
            )
        wanted = unet.add_embedding.linear_1.in_features
        given = 6 * unet.config.addition_time_embed_dim + second.config.projection_dim
        if wanted != given:
            raise ValueError(
                f"The U-Net wants {wanted} numbers beside the prompt, and SDXL's prompt summary and six sizes are "
                f"{given}: a refiner (which asks for an aesthetics score) or another model's U-Net can't be used; load "
                "SDXL's base."
            )

    # -------------------------------------------------------------------- prompts

    def tokenize(self, prompt: str, tokenizers: Mapping[str, Any] | None = None) -> TokenizedPrompt:
        tokenizers = self.tokenizers if tokenizers is None else tokenizers
        return self._tokenized(prompt, tokenizers)

    def tokenize_cut(self, prompt: str) -> TokenizedPrompt:
        return self._tokenized(prompt, self.tokenizers, truncate=True)

    def _tokenized(self, prompt: str, tokenizers: Mapping[str, Any], *, truncate: bool = False) -> TokenizedPrompt:
        each = tokenizers.items()
        return side_by_side([tokenize(one, prompt, name=name, truncate=truncate) for name, one in each])

    def encode(self, prompts: Sequence[TokenizedPrompt], clip_skip: int | None = None) -> PromptEmbeds:
        """As diffusers' own pipelines do.

        Stable Diffusion 1 and 2 take the text encoder's output; SDXL takes the penultimate hidden states of both
        text encoders side by side, and the second's projected output at the end token.

        Args:
            clip_skip: how many layers to stop earlier.
        """
        contexts, outputs, pooled = [], {}, None
        for name, encoder in self.text_encoders.items():
            ids = torch.cat([prompt.ids[name] for prompt in prompts]).to(self.device)
            encoded = encoder(ids, output_hidden_states=self.is_xl or clip_skip is not None)
            outputs[name] = encoded.last_hidden_state
            if self.is_xl:
                contexts.append(encoded.hidden_states[-2 - (clip_skip or 0)])
            elif clip_skip is None:
                contexts.append(encoded.last_hidden_state)
            else:
                text_model: Any = getattr(encoder, "text_model", encoder)  # transformers 4 nests it
                contexts.append(text_model.final_layer_norm(encoded.hidden_states[-1 - clip_skip]))
            if name == "text_encoder_2":
                # not encoded.text_embeds: SDXL's config makes CLIP look for the end at the highest id, which is [I]'s
                ends = torch.tensor([prompt.eos for prompt in prompts], device=ids.device)
                at_end = encoded.last_hidden_state[torch.arange(len(prompts), device=ids.device), ends]
                projection: Any = encoder.text_projection
                pooled = projection(at_end)
        return PromptEmbeds(torch.cat(contexts, -1), pooled, outputs)

    def encode_negative(self, prompt: str | None, like: PromptEmbeds, clip_skip: int | None = None) -> PromptEmbeds:
        """One row; an SDXL trained so is told zeros where there is no negative prompt. What is too long is cut off, as
        diffusers' own pipelines do, with a warning: nothing of an edit depends on where its words stand."""
        if prompt is None and self.is_xl and self.pipe.config.get("force_zeros_for_empty_prompt", True):
            return like.rows(slice(1)).zeros()
        tokenized = self.tokenize_cut(prompt or "")
        if tokenized.lost:
            logger.warning(
                f"The negative prompt is longer than the text encoder reads; cut off was: {tokenized.lost!r}."
            )
        return self.encode([tokenized], clip_skip)

    @property
    def num_picture_adapters(self) -> int:
        return len(loaded_adapters(self.pipe.unet))

    def encode_pictures(self, shown: ShownPicture, *, guided: bool) -> tuple[PicturePrompt, PicturePrompt]:
        return encode_pictures(self, shown, guided=guided)

    # -------------------------------------------------------------------- pictures and latents

    @property
    def native_size(self) -> int:
        sample_size = self.pipe.unet.config.sample_size
        side: int = sample_size if isinstance(sample_size, int) else min(sample_size)
        return side * self.pixels_per_latent

    @property
    def size_multiple(self) -> int:
        return self.pixels_per_latent * 2 ** (len(self.pipe.unet.config.block_out_channels) - 1)

    @contextmanager
    def autoencoder_in_range(self) -> Iterator[None]:
        """SDXL's autoencoder overflows in float16 and says so (``force_upcast``): float32 for the length of the
        context, as diffusers' own pipeline does; then its weights are, to the bit, as before."""
        vae = self.pipe.vae
        if not (self.is_xl and vae.config.get("force_upcast")):
            yield
            return
        with _UPCASTING:  # one thread at a time: the weights are swapped
            halves = [(p, p.data) for p in vae.parameters()] if vae.dtype == torch.float16 else []
            for parameter, half in halves:
                parameter.data = half.float()
            try:
                yield
            finally:
                for parameter, half in halves:
                    parameter.data = half

    # -------------------------------------------------------------------- noise

    def schedule(self, num_inference_steps: int, size: tuple[int, int] | None = None) -> NoiseSchedule:
        return diffusion_schedule(self.pipe.scheduler, num_inference_steps)

    def training_schedule(self, size: tuple[int, int] | None = None) -> NoiseSchedule:
        return diffusion_training_schedule(self.pipe.scheduler)

    @property
    def guidance(self) -> Guidance:
        """Latent consistency models' U-Nets (Luo et al. 2023) are told the scale."""
        return PLAIN_GUIDANCE if self.pipe.unet.config.time_cond_proj_dim is None else _TOLD_GUIDANCE

    def denoise(self, x: torch.Tensor, timestep: Any, embeds: PromptEmbeds, dtype: torch.dtype) -> torch.Tensor:
        added: dict[str, Any] = {}
        pictures, masks = denoiser_arguments(self.pipe.unet, embeds.picture, x)
        if pictures is not None:
            added["image_embeds"] = pictures
        if embeds.pooled is not None:
            height, width = (side * self.pixels_per_latent for side in x.shape[-2:])
            # what SDXL is told of the picture's size: as it was, where it was cut, as it is to be
            size_ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=dtype, device=x.device)
            added |= {"text_embeds": embeds.pooled.to(dtype), "time_ids": size_ids.expand(len(x), -1)}
        unet = self.tuned_components["unet"] if torch.is_grad_enabled() else self.denoiser  # gradients: uncompiled
        output: torch.Tensor = unet(
            x.to(dtype),
            timestep.to(x.device) if isinstance(timestep, torch.Tensor) else timestep,
            encoder_hidden_states=embeds.embeds.to(dtype),
            timestep_cond=self._told_guidance(embeds, dtype),
            added_cond_kwargs=added or None,
            cross_attention_kwargs=None if masks is None else {"ip_adapter_masks": masks},
            return_dict=False,
        )[0]
        return output.to(x)

    def _told_guidance(self, embeds: PromptEmbeds, dtype: torch.dtype) -> torch.Tensor | None:
        """(B, time_cond_proj_dim): the scale as a U-Net is told it (Luo et al. 2023), which counts it from 0."""
        width = self.pipe.unet.config.time_cond_proj_dim
        if width is None:
            return None
        told = embeds if embeds.guidance is not None else embeds.told(self.guidance.neutral)
        assert told.guidance is not None
        counted = 1000 * (told.guidance.float() - 1)
        return get_timestep_embedding(counted, width, downscale_freq_shift=1).to(dtype)

    # -------------------------------------------------------------------- attention and adapters

    def attention_grids(self, height: int, width: int) -> dict[int, tuple[int, int]]:
        grids: dict[int, tuple[int, int]] = {}
        for _ in self.pipe.unet.config.block_out_channels:
            grids.setdefault(height * width, (height, width))
            height, width = (height + 1) // 2, (width + 1) // 2
        return grids

    def attention_site(
        self, grids: Mapping[int, tuple[int, int]], name: str, layer: nn.Module, hidden_states: torch.Tensor, text: Any
    ) -> AttentionSite | None:
        """Layers at 1/16 and 1/32 of the picture's side tell where words look (S2Edit); at 1/16 and below they hold
        the layout (prompt-to-prompt). Latents that are as small as a 1/16 layer themselves count as one."""
        cells = hidden_states.shape[1] if hidden_states.ndim == 3 else hidden_states.shape[2:].numel()
        grid = grids.get(cells)
        if grid is None:
            return None
        height, width = next(iter(grids.values()))  # the latents' own
        factor = 2 if min(height, width) > _SHALLOWEST_MAP else 1
        most, fewest = (-(-height // f) * -(-width // f) for f in (factor, 2 * factor))
        return AttentionSite(
            name,
            "self" if text is None else "cross",
            *grid,
            tells_words=text is not None and fewest <= cells <= most,
            holds_layout=text is None and cells <= most,
        )

    def lora_targets(self, component: str, layers: str) -> list[str]:
        """With ``layers`` "all" every linear layer and convolution of the U-Net, otherwise its attention projections;
        of a text encoder always these."""
        if component != "unet":
            return list(_CLIP_ATTENTION)
        if layers == "attention":
            return list(_ATTENTION)
        unet = self.tuned_components["unet"]
        return [name for name, layer in unet.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]

    # -------------------------------------------------------------------- diffusers' own pipeline

    @property
    def stock_components(self) -> frozenset[str]:
        both = {"vae", "unet", "scheduler", "text_encoder", "tokenizer", "feature_extractor", "image_encoder"}
        return frozenset(both | ({"text_encoder_2", "tokenizer_2"} if self.is_xl else {"safety_checker"}))

    def stock(self) -> Any:
        pipe = self.pipe
        components = {name: getattr(pipe, name) for name in self.stock_components - {"scheduler"}}
        scheduler = copy.deepcopy(pipe.scheduler)  # its steps are each call's own
        if self.is_xl:
            zeros = pipe.config.get("force_zeros_for_empty_prompt", True)
            return StableDiffusionXLPipeline(**components, scheduler=scheduler, force_zeros_for_empty_prompt=zeros)
        return StableDiffusionPipeline(
            **components, scheduler=scheduler, requires_safety_checker=pipe.safety_checker is not None
        )


_UPCASTING = threading.RLock()
