"""Stable Diffusion 3 and 3.5: joint attention to the columns of two CLIPs and T5, and a flow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from torch import nn
from torch.nn import functional as F

from .attention_seam import AttentionSite
from .family_base import register_family
from .family_flow import FlowFamily, block_number, dynamic_mu, middle_half, picture_then_text, word_mean
from .noise_schedule import FlowTime
from .picture_files import SourcePicture
from .picture_modes import Box
from .picture_placement import PlacedPicture
from .prompt_columns import Segment, TokenizedPrompt, one_after_another, side_by_side, with_summary
from .prompt_embeds import PromptEmbeds
from .prompt_tokenizing import tokenize
from .prompt_words import split_words, without_tokens

_CLIPS = ("text_encoder", "text_encoder_2")
_T5 = "text_encoder_3"
_T5_COLUMNS = 256
"""What diffusers' pipeline gives it where nobody says otherwise, zeros where there is no T5."""

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_TEXT_ATTENTION = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
_CLIP_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")

_TELLING = {
    (24, False): (4, 5, 7, 8, 9),  # 3 medium
    (24, True): (5, 7, 8, 9, 10),  # 3.5 medium
    (38, False): (16, 18, 20, 21, 24),  # 3.5 large
    (6, False): (2, 3, 4, 5),  # the embedded one, whose layers were taught so
}
"""(Blocks, whether some have attention of the picture alone) -> those that tell where words look (Shin et al. 2025)."""


@register_family
class StableDiffusion3Family(FlowFamily):
    """An ``SD3Transformer2DModel``. T5 may be absent, as diffusers allows; so may be the second CLIP of a model that
    was made with one CLIP in both places."""

    name = "Stable Diffusion 3 and 3.5"
    denoiser_classes = ("SD3Transformer2DModel",)
    stock_class = StableDiffusion3Pipeline

    # -------------------------------------------------------------------- components

    @property
    def fixed_components(self) -> frozenset[str]:
        """T5's weights, which no loader of diffusers' has a LoRA for."""
        return frozenset({_T5})

    @property
    def stock_components(self) -> frozenset[str]:
        numbered = {f"{part}{end}" for part in ("text_encoder", "tokenizer") for end in ("", "_2", "_3")}
        return frozenset({*numbered, "vae", "transformer", "scheduler", "image_encoder", "feature_extractor"})

    def stock(self) -> Any:
        stock = super().stock()
        if stock.text_encoder_2 is None:  # one CLIP in both places
            stock.register_modules(text_encoder_2=self.pipe.text_encoder, tokenizer_2=self.pipe.tokenizer)
        return stock

    def check(self) -> None:
        super().check()
        pipe, config = self.pipe, self.pipe.transformer.config
        for name in ("text_encoder_2", _T5):
            tokenizer = name.replace("text_encoder", "tokenizer")
            if (getattr(pipe, name) is None) != (getattr(pipe, tokenizer) is None):
                raise ValueError(f"{name} and {tokenizer} belong together, and one is missing: load both, or neither.")
        pooled = [getattr(pipe, name).config.projection_dim for name in self._clips]
        if sum(pooled) * (2 if len(pooled) == 1 else 1) != config.pooled_projection_dim:
            raise ValueError(
                f"The transformer wants a summary of {config.pooled_projection_dim} numbers and the CLIPs give "
                f"{' and '.join(map(str, pooled))}: load text_encoder and text_encoder_2 from one model."
            )

    @property
    def _clips(self) -> list[str]:
        return [name for name in _CLIPS if name in self.text_encoders]

    # -------------------------------------------------------------------- prompts

    def tokenize(self, prompt: str, tokenizers: Mapping[str, Any] | None = None) -> TokenizedPrompt:
        """CLIP's columns, then T5's; and for the summary the prompt as both CLIPs read it without learned tokens: it
        goes everywhere in the picture, past any mask. Where T5 reads on, CLIP's end is cut off, as diffusers' is."""
        tokenizers = self.tokenizers if tokenizers is None else tokenizers
        return self._tokenized(prompt, tokenizers, truncate=False)

    def _tokenized(self, prompt: str, tokenizers: Mapping[str, Any], *, truncate: bool) -> TokenizedPrompt:
        clips = {name: tokenizer for name, tokenizer in tokenizers.items() if name in _CLIPS}
        parts = [self._by_clips(prompt, clips, truncate=truncate or _T5 in tokenizers)]
        learned = [token for tokenizer in clips.values() for token in getattr(tokenizer, "s2edit_tokens", ())]
        if not truncate and any(token in split_words(parts[0].lost, learned) for token in learned):
            self._by_clips(prompt, clips, truncate=False)  # says what is too long
        if _T5 in tokenizers:
            parts.append(tokenize(tokenizers[_T5], prompt, name=_T5, limit=_T5_COLUMNS, truncate=truncate))
        whole, plain = one_after_another(parts), without_tokens(prompt, learned)
        return whole if plain == prompt else with_summary(whole, self._by_clips(plain, clips, truncate=True))

    def _by_clips(self, prompt: str, clips: Mapping[str, Any], *, truncate: bool) -> TokenizedPrompt:
        limit = next(iter(clips.values())).model_max_length
        return side_by_side(
            [tokenize(one, prompt, name=name, limit=limit, truncate=truncate) for name, one in clips.items()]
        )

    def encode(self, prompts: Sequence[TokenizedPrompt], clip_skip: int | None = None) -> PromptEmbeds:
        """As ``StableDiffusion3Pipeline.encode_prompt`` does: both CLIPs' penultimate hidden states side by side,
        filled up with zeros to T5's width, then T5's output; and both CLIPs' projected output at the end token.

        Args:
            clip_skip: how many of CLIP's layers to stop earlier.
        """
        contexts, summaries, outputs = [], [], {}
        for name in self._clips:
            hidden, summary, outputs[name] = self._by_clip(name, prompts, clip_skip)
            contexts.append(hidden)
            summaries.append(summary)
        if len(contexts) == 1:
            contexts, summaries = contexts * 2, summaries * 2
        context = torch.cat(contexts, -1)
        width = self.pipe.transformer.config.joint_attention_dim
        if _T5 in self.text_encoders:
            ids = torch.cat([prompt.ids[_T5] for prompt in prompts]).to(self.device)
            last = outputs[_T5] = self.text_encoders[_T5](ids)[0]
        else:
            last = context.new_zeros(len(prompts), _T5_COLUMNS, width)
        embeds = torch.cat([F.pad(context, (0, width - context.shape[-1])), last.to(context)], 1)
        return PromptEmbeds(embeds, torch.cat(summaries, -1), outputs)

    def _by_clip(
        self, name: str, prompts: Sequence[TokenizedPrompt], clip_skip: int | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the CLIP ``name`` gives of ``prompts``: hidden states (B, L, D), summaries (B, P), outputs (B, L, D)."""
        encoder: Any = self.text_encoders[name]
        read = [prompt.read_by(name) for prompt in prompts]
        summed = [next((s for s in prompt.summaries if name in s.ids), prompt.read_by(name)) for prompt in prompts]
        apart = [segment for segment, own in zip(summed, read, strict=True) if segment is not own]
        ids = torch.cat([segment.ids[name] for segment in [*read, *apart]]).to(self.device)
        encoded = encoder(ids, output_hidden_states=True)
        rows, beyond = [], len(read)
        for i, (segment, own) in enumerate(zip(summed, read, strict=True)):
            rows.append(i if segment is own else beyond)
            beyond += segment is not own
        ends = [segment.kept[segment.eos] for segment in summed]
        summary = encoder.text_projection(encoded.last_hidden_state[rows, ends])
        hidden = encoded.hidden_states[-2 - (clip_skip or 0)]
        return hidden[: len(read)], summary, encoded.last_hidden_state[: len(read)]

    def encode_negative(self, prompt: str | None, like: PromptEmbeds, clip_skip: int | None = None) -> PromptEmbeds:
        """One row; all of CLIP's layers, and what is too long cut off, as diffusers' own pipeline does."""
        return self.encode([self._tokenized(prompt or "", self.tokenizers, truncate=True)])

    def sentence(self, output: torch.Tensor, segment: Segment) -> torch.Tensor:
        return word_mean(output, segment) if segment.name == _T5 else super().sentence(output, segment)

    # -------------------------------------------------------------------- pictures and latents

    @property
    def _patch(self) -> int:
        patch: int = self.pipe.transformer.config.patch_size
        return patch

    @property
    def native_size(self) -> int:
        side: int = self.pipe.transformer.config.sample_size
        return side * self.pixels_per_latent

    @property
    def size_multiple(self) -> int:
        return self._patch * self.pixels_per_latent

    def place(
        self, source: SourcePicture, box: Box | None = None, size: tuple[int | None, int | None] = (None, None)
    ) -> PlacedPicture:
        """Raises:
        ValueError: as the base's; or a side is beyond the positions that the model has learned.
        """
        placed = super().place(source, box, size)
        most = self.pipe.transformer.config.pos_embed_max_size * self.size_multiple
        if max(placed.size) > most:
            height, width = placed.size
            raise ValueError(
                f"This model works at {most} pixels a side or less, not at a height of {height} and a width of "
                f"{width}; pass height= and width=."
            )
        return placed

    # -------------------------------------------------------------------- noise

    def flow_time(self, size: tuple[int, int] | None, num_inference_steps: int | None) -> FlowTime:
        height, width = (side // self.size_multiple for side in size or (self.native_size, self.native_size))
        return FlowTime(at_one=1000.0, mu=dynamic_mu(self.pipe.scheduler, height * width))

    def denoise(self, x: torch.Tensor, timestep: Any, embeds: PromptEmbeds, dtype: torch.dtype) -> torch.Tensor:
        assert embeds.pooled is not None
        output: torch.Tensor = self.denoiser(
            hidden_states=x.to(dtype),
            timestep=torch.as_tensor(timestep, dtype=torch.float32, device=x.device).expand(len(x)),
            encoder_hidden_states=embeds.embeds.to(dtype),
            pooled_projections=embeds.pooled.to(dtype),
            return_dict=False,
        )[0]
        return output.to(x)

    # -------------------------------------------------------------------- attention and adapters

    def attention_grids(self, height: int, width: int) -> dict[int, tuple[int, int]]:
        grid = height // self._patch, width // self._patch
        return {grid[0] * grid[1]: grid}

    def attention_site(
        self, grids: Mapping[int, tuple[int, int]], name: str, layer: nn.Module, hidden_states: torch.Tensor, text: Any
    ) -> AttentionSite | None:
        """Every block attends jointly; some of 3.5 medium's have a second attention, of the picture alone."""
        grid = grids.get(hidden_states.shape[1])
        if grid is None:
            return None
        if text is None:
            return AttentionSite(name, "self", *grid, holds_layout=True)
        return picture_then_text(name, grid, text.shape[1], tells_words=block_number(name) in self._telling_blocks)

    @property
    def _telling_blocks(self) -> Sequence[int]:
        config = self.pipe.transformer.config
        return _TELLING.get((config.num_layers, bool(config.dual_attention_layers)), middle_half(config.num_layers))

    def lora_targets(self, component: str, layers: str) -> list[str]:
        """With ``layers`` "all" the transformer's attention and feed-forward layers, otherwise its attention alone; of
        CLIP always the attention."""
        if component != "transformer":
            return list(_CLIP_ATTENTION)
        attention = [
            *(f"attn.{end}" for end in (*_ATTENTION, *_TEXT_ATTENTION)),
            *(f"attn2.{end}" for end in _ATTENTION),
        ]
        return attention if layers == "attention" else [*attention, *_FEED_FORWARD]
