"""Z-Image, base and Turbo: one stream of picture and words, which a language model and two layers of their own read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ZImagePipeline
from torch import nn

from .attention_seam import AttentionSite
from .family_base import register_family
from .family_flow import block_number, middle_half
from .family_language import LanguageModelFamily
from .noise_guidance import Guidance
from .prompt_embeds import PromptEmbeds
from .prompt_tokenizing import PromptTemplate

_MULTIPLE = 32
"""Picture cells and columns are each filled up to a multiple of this, with learned tokens that are looked at."""
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_FEED_FORWARD = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")


@register_family
class ZImageFamily(LanguageModelFamily):
    """A ``ZImageTransformer2DModel``. Turbo's is the same; it is told by its name."""

    name = "Z-Image"
    denoiser_classes = ("ZImageTransformer2DModel",)
    stock_class = ZImagePipeline
    drawn_branches = "null last"
    num_tokens = 512
    told_at = (1.0, 0.0)

    @classmethod
    def encodes_for(cls, pipe: Any) -> bool:
        return pipe.transformer is None and type(pipe.text_encoder).__name__ == "Qwen3Model"

    def check(self) -> None:
        super().check()
        if self.pipe.transformer.config.get("siglip_feat_dim"):
            raise ValueError(
                "The transformer has a siglip_feat_dim: it is Z-Image-Omni's, which is given pictures. Load the one "
                "that draws from words, such as Tongyi-MAI/Z-Image."
            )

    # -------------------------------------------------------------------- prompts

    @property
    def template(self) -> PromptTemplate:
        """The tokenizer's own chat, which thinks."""
        return self.chat_template(enable_thinking=True)

    def hidden_states(self, encoded: Any) -> torch.Tensor:
        last_but_one: torch.Tensor = encoded.hidden_states[-2]
        return last_but_one

    # -------------------------------------------------------------------- noise

    @property
    def _is_turbo(self) -> bool:
        name = getattr(self.pipe, "name_or_path", None) or self.pipe.config.get("_name_or_path")
        return "turbo" in str(name).lower()

    @property
    def default_steps(self) -> int:
        return 9 if self._is_turbo else 50

    @property
    def guidance(self) -> Guidance:
        """Counted from 0, as its own pipeline does; Turbo has learned what guidance does."""
        return Guidance(default=0.0 if self._is_turbo else 5.0, neutral=0.0)

    def combine(self, unconditional: torch.Tensor, conditional: torch.Tensor, scale: float) -> torch.Tensor:
        """``c + w (c - u)``: Stable Diffusion's with a scale of w + 1."""
        return conditional + scale * (conditional - unconditional)

    def denoise(self, x: torch.Tensor, timestep: Any, embeds: PromptEmbeds, dtype: torch.dtype) -> torch.Tensor:
        """The model is told 1 - sigma, and answers with the flow to the picture, not from it."""
        columns = embeds.embeds.to(dtype)
        there = [slice(None)] * len(x) if embeds.mask is None else embeds.mask.unbind(0)
        output = self.denoiser(
            list(x.to(dtype)[:, :, None].unbind(0)),
            torch.as_tensor(timestep, dtype=torch.float32, device=x.device).expand(len(x)),
            [row[own] for row, own in zip(columns, there, strict=True)],
            return_dict=False,
        )[0]
        return -torch.stack(list(output))[:, :, 0].to(x)

    # -------------------------------------------------------------------- attention and adapters

    def attention_site(
        self, grids: Mapping[int, tuple[int, int]], name: str, layer: nn.Module, hidden_states: torch.Tensor, text: Any
    ) -> AttentionSite | None:
        """The picture alone, the text alone, and then both: the cells, what they are filled up with, the columns."""
        ((cells, grid),) = grids.items()
        if name.startswith("noise_refiner"):
            return AttentionSite(name, "self", *grid, holds_layout=True)
        if name.startswith("context_refiner"):
            return AttentionSite(name, "text", *grid, text=slice(0, hidden_states.shape[1]))
        filled = -(-cells // _MULTIPLE) * _MULTIPLE
        telling = middle_half(self.pipe.transformer.config.n_layers)
        return AttentionSite(
            name, "joint", *grid, tells_words=block_number(name) in telling, holds_layout=True,
            text=slice(filled, hidden_states.shape[1]), picture=slice(0, cells),
        )  # fmt: skip

    def lora_targets(self, component: str, layers: str) -> list[str]:
        """The attention of all layers; with ``layers`` "all" their feed-forward layers too."""
        attention = [f"attention.{end}" for end in _ATTENTION]
        return attention if layers == "attention" else [*attention, *_FEED_FORWARD]

    # -------------------------------------------------------------------- diffusers' own pipeline

    def drawn_embeddings(self, embeds: PromptEmbeds, prefix: str = "") -> dict[str, Any]:
        there = [slice(None)] * len(embeds) if embeds.mask is None else embeds.mask.unbind(0)
        return {f"{prefix}prompt_embeds": [row[own] for row, own in zip(embeds.embeds, there, strict=True)]}
