"""FLUX.1, dev and schnell: joint attention to T5's columns, a summary by CLIP, and a flow of packed latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import FluxPipeline
from torch import nn

from .attention_seam import AttentionSite
from .family_base import register_family
from .family_flow import (
    PackedFlowFamily,
    block_number,
    cells_of,
    latents_of,
    middle_half,
    text_then_picture,
    word_mean,
)
from .noise_guidance import Guidance
from .prompt_columns import Segment, TokenizedPrompt, with_summary
from .prompt_embeds import PromptEmbeds
from .prompt_tokenizing import tokenize
from .prompt_words import without_tokens

_CLIP, _T5 = "text_encoder", "text_encoder_2"
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")

_TELLING = {19: (11, 12, 14, 17, 18)}
"""Number of blocks with two streams -> those that tell where words look (Shin et al. 2025)."""


@register_family
class FluxFamily(PackedFlowFamily):
    """A ``FluxTransformer2DModel``. Text comes first, also where blocks of a single stream read it and the picture as
    one; no column is padding to it, and words have no positions."""

    name = "FLUX.1"
    denoiser_classes = ("FluxTransformer2DModel",)
    stock_class = FluxPipeline
    drawn_branches = "apart"
    needed = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer", "scheduler")

    @classmethod
    def encodes_for(cls, pipe: Any) -> bool:
        return pipe.transformer is None and pipe.unet is None and "T5" in type(pipe.text_encoder_2).__name__

    # -------------------------------------------------------------------- components

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        """T5 alone: CLIP gives a summary, and reads no learned token."""
        return {name: part for name, part in super().text_encoders.items() if name == _T5}

    @property
    def tokenizers(self) -> dict[str, Any]:
        return {name: part for name, part in super().tokenizers.items() if name == _T5}

    @property
    def fixed_components(self) -> frozenset[str]:
        """T5's weights, which no loader of diffusers' has a LoRA for."""
        return frozenset({_T5})

    @property
    def stock_components(self) -> frozenset[str]:
        return frozenset({*self.needed, "image_encoder", "feature_extractor"})

    @property
    def latent_channels(self) -> int:
        """Before 2 x 2 of them are packed into a cell."""
        packed: int = self.pipe.transformer.config.in_channels
        return packed // 4

    @property
    def guidance(self) -> Guidance:
        """Dev is told the scale; schnell was distilled at one."""
        return Guidance("told" if self._is_told else "none", default=3.5)

    @property
    def _is_told(self) -> bool:
        told: bool = self.pipe.transformer.config.guidance_embeds
        return told

    # -------------------------------------------------------------------- prompts

    @property
    def num_columns(self) -> int:
        """What T5 is given: schnell was distilled with 256 tokens."""
        return 512 if self.pipe.transformer is None or self._is_told else 256

    def tokenize(self, prompt: str, tokenizers: Mapping[str, Any] | None = None) -> TokenizedPrompt:
        """T5's columns; and for the summary the prompt as CLIP reads it without learned tokens: it goes everywhere in
        the picture, past any mask. What is too long for CLIP alone is cut off there, as diffusers does."""
        return self._tokenized(prompt, self.tokenizers if tokenizers is None else tokenizers, truncate=False)

    def tokenize_cut(self, prompt: str) -> TokenizedPrompt:
        return self._tokenized(prompt, self.tokenizers, truncate=True)

    def _tokenized(self, prompt: str, tokenizers: Mapping[str, Any], *, truncate: bool) -> TokenizedPrompt:
        by_t5 = tokenize(tokenizers[_T5], prompt, name=_T5, limit=self.num_columns, truncate=truncate)
        plain = without_tokens(prompt, getattr(tokenizers[_T5], "s2edit_tokens", ()))
        return with_summary(by_t5, tokenize(self.pipe.tokenizer, plain, name=_CLIP, truncate=True))

    def encode(self, prompts: Sequence[TokenizedPrompt], clip_skip: int | None = None) -> PromptEmbeds:
        """As ``FluxPipeline.encode_prompt`` does: T5's output, and CLIP's at the end token.

        Raises:
            ValueError: ``clip_skip``, which there is nothing for.
        """
        if clip_skip is not None:
            raise ValueError(f"{self.name} is told CLIP's summary alone, not its layers; leave clip_skip= out.")
        ids = torch.cat([prompt.ids[_T5] for prompt in prompts]).to(self.device)
        columns = self.pipe.text_encoder_2(ids)[0]
        read = [prompt.read_by(_CLIP) for prompt in prompts]
        ids = torch.cat([segment.ids[_CLIP] for segment in read]).to(self.device)
        output = self.pipe.text_encoder(ids).last_hidden_state
        # not pooler_output: by CLIP's published configuration it is read where the highest id is
        summary = output[range(len(read)), [segment.kept[segment.eos] for segment in read]]
        return PromptEmbeds(columns, summary, {_T5: columns})

    def encode_negative(self, prompt: str | None, like: PromptEmbeds, clip_skip: int | None = None) -> PromptEmbeds:
        """One row, what is too long cut off."""
        return self.encode([self.tokenize_cut(prompt or "")])

    def sentence(self, output: torch.Tensor, segment: Segment) -> torch.Tensor:
        return word_mean(output, segment)

    # -------------------------------------------------------------------- noise

    @property
    def default_steps(self) -> int:
        return super().default_steps if self._is_told else 4

    def denoise(self, x: torch.Tensor, timestep: Any, embeds: PromptEmbeds, dtype: torch.dtype) -> torch.Tensor:
        assert embeds.pooled is not None
        height, width = x.shape[-2:]
        rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1)
        told = embeds if embeds.guidance is not None else embeds.told(self.guidance.neutral)
        output = self.denoiser(
            hidden_states=cells_of(x).to(dtype),
            timestep=torch.as_tensor(timestep, dtype=torch.float32, device=x.device).expand(len(x)),
            guidance=told.guidance if self._is_told else None,
            encoder_hidden_states=embeds.embeds.to(dtype),
            pooled_projections=embeds.pooled.to(dtype),
            txt_ids=torch.zeros(embeds.embeds.shape[1], 3, dtype=dtype, device=x.device),
            img_ids=places.to(x.device, dtype),
            return_dict=False,
        )[0]
        return latents_of(output, height, width).to(x)

    # -------------------------------------------------------------------- attention and adapters

    def attention_site(
        self, grids: Mapping[int, tuple[int, int]], name: str, layer: nn.Module, hidden_states: torch.Tensor, text: Any
    ) -> AttentionSite | None:
        """All blocks attend jointly; those of a single stream get text and picture as one."""
        ((cells, grid),) = grids.items()
        num_columns = hidden_states.shape[1] - cells if text is None else text.shape[1]
        tells_words = text is not None and block_number(name) in self._telling_blocks
        return text_then_picture(name, grid, num_columns, tells_words=tells_words)

    @property
    def _telling_blocks(self) -> Sequence[int]:
        count = self.pipe.transformer.config.num_layers
        return _TELLING.get(count, middle_half(count))

    def lora_targets(self, component: str, layers: str) -> list[str]:
        """The attention of all blocks; with ``layers`` "all" also the feed-forward layers of those with two streams, as
        diffusers' training script has it."""
        attention = [f"attn.{end}" for end in _ATTENTION]
        return attention if layers == "attention" else [*attention, *_FEED_FORWARD]

    # -------------------------------------------------------------------- diffusers' own pipeline

    def draws_null(self, given: Mapping[str, Any]) -> bool:
        """By ``true_cfg_scale``."""
        scale: float = given.get("true_cfg_scale") or 1.0
        return scale > 1
