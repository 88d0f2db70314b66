"""Qwen-Image: joint attention to the columns of Qwen2.5-VL, and a flow of packed latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import QwenImagePipeline
from torch import nn

from .attention_seam import AttentionSite
from .family_base import register_family
from .family_flow import block_number, cells_of, latents_of, middle_half, text_then_picture
from .family_language import LanguageModelFamily
from .noise_guidance import Guidance, guided
from .prompt_embeds import PromptEmbeds
from .prompt_tokenizing import PromptTemplate

_TEMPLATE = PromptTemplate(
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    dropped=range(34),
)
"""What the model was trained with, and how many tokens of it the transformer isn't given."""

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_FEED_FORWARD = ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")


@register_family
class QwenImageFamily(LanguageModelFamily):
    """A ``QwenImageTransformer2DModel``, with the weights that draw from words."""

    name = "Qwen-Image"
    denoiser_classes = ("QwenImageTransformer2DModel",)
    stock_class = QwenImagePipeline
    drawn_branches = "apart"
    num_tokens = 512 + 34
    empty_prompt = " "

    @classmethod
    def encodes_for(cls, pipe: Any) -> bool:
        return pipe.transformer is None and type(pipe.text_encoder).__name__.startswith("Qwen2_5_VL")

    # -------------------------------------------------------------------- components

    def check(self) -> None:
        super().check()
        config = self.pipe.transformer.config
        for switch in ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"):
            if config.get(switch):
                raise ValueError(
                    f"The transformer has {switch}=True: it is Qwen-Image-Edit's or -Layered's, which is given a "
                    "picture. Load the one that draws from words, such as Qwen/Qwen-Image."
                )

    @property
    def latent_channels(self) -> int:
        """Before 2 x 2 of them are packed into a cell."""
        packed: int = self.pipe.transformer.config.in_channels
        return packed // 4

    @property
    def autoencoder_channels(self) -> int:
        channels: int = self.pipe.vae.config.z_dim
        return channels

    @property
    def pixels_per_latent(self) -> int:
        return 2 ** len(self.pipe.vae.temperal_downsample)

    # -------------------------------------------------------------------- prompts

    @property
    def template(self) -> PromptTemplate:
        return _TEMPLATE

    def hidden_states(self, encoded: Any) -> torch.Tensor:
        last: torch.Tensor = encoded.hidden_states[-1]
        return last

    # -------------------------------------------------------------------- pictures and latents

    @torch.no_grad()
    def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """The autoencoder is a film's: a picture is one frame of it."""
        vae = self.pipe.vae
        latents = vae.encode(pixels.to(self.device, vae.dtype)[:, :, None]).latent_dist.mode()[:, :, 0]
        mean, deviation = self._statistics(latents)
        return ((latents - mean) / deviation).to(self.dtype)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        vae = self.pipe.vae
        latents = latents.to(vae.dtype)
        mean, deviation = self._statistics(latents)
        pixels: torch.Tensor = vae.decode((latents * deviation + mean)[:, :, None], return_dict=False)[0]
        return pixels[:, :, 0]

    def _statistics(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(1, C, 1, 1) each: the latents' mean and deviation."""
        config = self.pipe.vae.config
        return tuple(  # type: ignore[return-value]
            torch.tensor(values).view(1, -1, 1, 1).to(like) for values in (config.latents_mean, config.latents_std)
        )

    # -------------------------------------------------------------------- noise

    @property
    def default_steps(self) -> int:
        return 50

    @property
    def guidance(self) -> Guidance:
        return Guidance(default=4.0)

    def combine(self, unconditional: torch.Tensor, conditional: torch.Tensor, scale: float) -> torch.Tensor:
        """Guidance, of which each cell then has the conditional's norm, as the stock pipeline has it."""
        combined, kept = cells_of(guided(unconditional, conditional, scale)), cells_of(conditional)
        rescaled = combined * (kept.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))
        return latents_of(rescaled, *conditional.shape[-2:])

    def denoise(self, x: torch.Tensor, timestep: Any, embeds: PromptEmbeds, dtype: torch.dtype) -> torch.Tensor:
        height, width = x.shape[-2:]
        output = self.denoiser(
            hidden_states=cells_of(x).to(dtype),
            timestep=torch.as_tensor(timestep, dtype=torch.float32, device=x.device).expand(len(x)),
            encoder_hidden_states=embeds.embeds.to(dtype),
            encoder_hidden_states_mask=embeds.mask,
            img_shapes=[[(1, height // 2, width // 2)]] * len(x),
            return_dict=False,
        )[0]
        return latents_of(output, height, width).to(x)

    # -------------------------------------------------------------------- attention and adapters

    def attention_site(
        self, grids: Mapping[int, tuple[int, int]], name: str, layer: nn.Module, hidden_states: torch.Tensor, text: Any
    ) -> AttentionSite | None:
        ((_, grid),) = grids.items()
        telling = middle_half(self.pipe.transformer.config.num_layers)
        return text_then_picture(name, grid, text.shape[1], tells_words=block_number(name) in telling)

    def lora_targets(self, component: str, layers: str) -> list[str]:
        """The attention of all blocks; with ``layers`` "all" their feed-forward layers too."""
        attention = [f"attn.{end}" for end in _ATTENTION]
        return attention if layers == "attention" else [*attention, *_FEED_FORWARD]

    # -------------------------------------------------------------------- diffusers' own pipeline

    def drawing_arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Its guidance is called ``true_cfg_scale``, and needs a negative prompt; the published one says a blank."""
        named = {"true_cfg_scale": given.get("guidance_scale"), **given}
        named.pop("guidance_scale", None)
        says_no = any(given.get(f"negative_prompt{end}") is not None for end in ("", "_embeds"))
        if (named["true_cfg_scale"] or 0) > self.guidance.neutral and not says_no:
            prompts = next((given[one] for one in ("prompt", "prompt_embeds") if given.get(one) is not None), "")
            named["negative_prompt"] = [self.empty_prompt] * (1 if isinstance(prompts, str) else len(prompts))
        return named

    def draws_null(self, given: Mapping[str, Any]) -> bool:
        """By ``true_cfg_scale``."""
        scale: float = given.get("true_cfg_scale") or 1.0
        return scale > 1

    def drawn_embeddings(self, embeds: PromptEmbeds, prefix: str = "") -> dict[str, Any]:
        there = torch.ones_like(embeds.embeds[..., 0], dtype=torch.bool) if embeds.mask is None else embeds.mask
        return {f"{prefix}prompt_embeds": embeds.embeds, f"{prefix}prompt_embeds_mask": there}
