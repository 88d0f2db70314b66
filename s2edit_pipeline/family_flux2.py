"""FLUX.2 klein, base and distilled: joint attention to three layers of a language model, and a flow."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from .attention_seam import AttentionSite
from .family_base import register_family
from .family_flow import block_number, cells_of, latents_of, middle_half, text_then_picture
from .family_language import LanguageModelFamily
from .noise_guidance import Guidance
from .prompt_embeds import PromptEmbeds
from .prompt_tokenizing import PromptTemplate

_READ_LAYERS = (9, 18, 27)
"""Of the language model: a column is their three hidden states, one after the other."""
_TWO_STREAMS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_FEED_FORWARD = ("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out")


@register_family
class Flux2KleinFamily(LanguageModelFamily):
    """A ``Flux2Transformer2DModel`` that isn't told its guidance: klein's."""

    name = "FLUX.2 klein"
    denoiser_classes = ("Flux2Transformer2DModel",)
    stock_class = Flux2KleinPipeline
    drawn_branches = "apart"
    num_tokens = 512
    pads = True

    @classmethod
    def encodes_for(cls, pipe: Any) -> bool:
        return pipe.transformer is None and type(pipe.text_encoder).__name__ == "Qwen3ForCausalLM"

    # -------------------------------------------------------------------- components

    def check(self) -> None:
        super().check()
        config = self.pipe.transformer.config
        if config.guidance_embeds:
            raise ValueError(
                "The transformer has guidance_embeds=True: it is FLUX.2 dev's, which isn't served. Load klein's, such "
                "as black-forest-labs/FLUX.2-klein-4B."
            )
        given = len(_READ_LAYERS) * self.pipe.text_encoder.config.hidden_size
        if given != config.joint_attention_dim:
            raise ValueError(
                f"The transformer wants columns of {config.joint_attention_dim} numbers and three layers of the text "
                f"encoder give {given}: load both from one model."
            )

    @property
    def latent_channels(self) -> int:
        """Before 2 x 2 of them are packed into a cell."""
        packed: int = self.pipe.transformer.config.in_channels
        return packed // 4

    @property
    def _is_distilled(self) -> bool:
        return bool(self.pipe.config.get("is_distilled"))

    # -------------------------------------------------------------------- prompts

    @property
    def template(self) -> PromptTemplate:
        """The tokenizer's own chat, which doesn't think."""
        return self.chat_template(enable_thinking=False)

    def hidden_states(self, encoded: Any) -> torch.Tensor:
        return torch.cat([encoded.hidden_states[layer] for layer in _READ_LAYERS], -1)

    # -------------------------------------------------------------------- pictures and latents

    @torch.no_grad()
    def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Each channel of a cell is brought to mean 0 and deviation 1, by the autoencoder's own statistics."""
        vae = self.pipe.vae
        latents = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist.mode()
        mean, deviation = self._statistics(latents)
        return pixel_shuffle((pixel_unshuffle(latents, 2) - mean) / deviation, 2).to(self.dtype)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        vae = self.pipe.vae
        latents = latents.to(vae.dtype)
        mean, deviation = self._statistics(latents)
        pixels: torch.Tensor = vae.decode(
            pixel_shuffle(pixel_unshuffle(latents, 2) * deviation + mean, 2), return_dict=False
        )[0]
        return pixels

    def _statistics(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(1, 4C, 1, 1) each: the cells' mean and deviation."""
        vae = self.pipe.vae
        deviation = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
        return vae.bn.running_mean.view(1, -1, 1, 1).to(like), deviation.view(1, -1, 1, 1).to(like)

    # -------------------------------------------------------------------- noise

    @property
    def default_steps(self) -> int:
        return 4 if self._is_distilled else 50

    @property
    def guidance(self) -> Guidance:
        return Guidance("none", default=1.0) if self._is_distilled else Guidance(default=4.0)

    def shift(self, num_cells: int, num_inference_steps: int | None) -> float | None:
        """By the number of steps too; training is taken for as many as it draws in."""
        if not self.pipe.scheduler.config.use_dynamic_shifting:
            return None
        mu: float = compute_empirical_mu(num_cells, num_inference_steps or self.default_steps)
        return mu

    def denoise(self, x: torch.Tensor, timestep: Any, embeds: PromptEmbeds, dtype: torch.dtype) -> torch.Tensor:
        height, width = x.shape[-2:]
        one = torch.arange(1)
        places = torch.cartesian_prod(one, torch.arange(height // 2), torch.arange(width // 2), one)
        words = torch.cartesian_prod(one, one, one, torch.arange(embeds.embeds.shape[1]))
        output = self.denoiser(
            hidden_states=cells_of(x).to(dtype),
            timestep=torch.as_tensor(timestep, dtype=torch.float32, device=x.device).expand(len(x)),
            guidance=None,
            encoder_hidden_states=embeds.embeds.to(dtype),
            txt_ids=words.to(x.device),
            img_ids=places.to(x.device),
            return_dict=False,
        )[0]
        return latents_of(output, height, width).to(x)

    # -------------------------------------------------------------------- attention and adapters

    def attention_site(
        self, grids: Mapping[int, tuple[int, int]], name: str, layer: nn.Module, hidden_states: torch.Tensor, text: Any
    ) -> AttentionSite | None:
        """As FLUX.1's: those of a single stream get text and picture as one."""
        ((cells, grid),) = grids.items()
        num_columns = hidden_states.shape[1] - cells if text is None else text.shape[1]
        tells_words = text is not None and block_number(name) in self._telling_blocks
        return text_then_picture(name, grid, num_columns, tells_words=tells_words)

    @property
    def _telling_blocks(self) -> Sequence[int]:
        return middle_half(self.pipe.transformer.config.num_layers)

    def lora_targets(self, component: str, layers: str) -> list[str]:
        """The attention of all blocks, which in those of a single stream is one layer with the feed-forward; with
        ``layers`` "all" also the feed-forward layers of those with two streams."""
        count = self.pipe.transformer.config.num_single_layers
        attention = [
            *(f"attn.{end}" for end in (*_TWO_STREAMS, "to_qkv_mlp_proj")),
            *(f"single_transformer_blocks.{i}.attn.to_out" for i in range(count)),
        ]
        return attention if layers == "attention" else [*attention, *_FEED_FORWARD]

    # -------------------------------------------------------------------- diffusers' own pipeline

    def stock(self) -> Any:
        components = {name: getattr(self.pipe, name, None) for name in self.stock_components - {"scheduler"}}
        scheduler = copy.deepcopy(self.pipe.scheduler)
        return Flux2KleinPipeline(**components, scheduler=scheduler, is_distilled=self._is_distilled)
