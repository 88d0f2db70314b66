"""Prompts to what the U-Net is told: by one text encoder (Stable Diffusion 1 and 2) or by two (SDXL)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .prompt_columns import TokenizedPrompt, side_by_side
from .prompt_tokenizing import tokenize


@dataclass(frozen=True)
class PromptEmbeds:
    """Encoded prompts.

    Attributes:
        embeds: (B, L, D), what the U-Net's cross-attention sees.
        pooled: (B, P), SDXL's summary of the whole prompt, or None.
        outputs: text encoder's name -> (B, L, D'), its own last output, as :func:`encode_prompts` found it.
    """

    embeds: torch.Tensor
    pooled: torch.Tensor | None = None
    outputs: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.embeds)

    def repeat(self, count: int) -> PromptEmbeds:
        """Each row ``count`` times, one after the other."""
        pooled = None if self.pooled is None else self.pooled.repeat_interleave(count, 0)
        return PromptEmbeds(self.embeds.repeat_interleave(count, 0), pooled)

    def zeros(self) -> PromptEmbeds:
        """What SDXL is told in place of an empty negative prompt."""
        pooled = None if self.pooled is None else torch.zeros_like(self.pooled)
        return PromptEmbeds(torch.zeros_like(self.embeds), pooled)


def join(parts: Sequence[PromptEmbeds]) -> PromptEmbeds:
    """All rows, in order."""
    return PromptEmbeds(torch.cat([part.embeds for part in parts]), join_pooled(parts))


def join_pooled(parts: Sequence[PromptEmbeds]) -> torch.Tensor | None:
    """(B, P) of all rows in order, or None where the model has no such thing."""
    pooled = [part.pooled for part in parts if part.pooled is not None]
    return torch.cat(pooled) if pooled else None


def tokenize_for(tokenizers: Mapping[str, Any], texts: Mapping[str, Any]) -> TokenizedPrompt:
    """One prompt, for each text encoder by its own tokenizer.

    Args:
        tokenizers, texts: text encoder's name -> its tokenizer, and the prompt as that is to read it.

    Raises:
        TypeError, ValueError: as ``prompt_tokenizing.tokenize``; the tokenizers cut the prompt up differently, so that
            its words would be at different positions.
    """
    return side_by_side([tokenize(t, texts[name], name=name) for name, t in tokenizers.items()])


def encode_prompts(
    text_encoders: Mapping[str, nn.Module],
    prompts: Sequence[TokenizedPrompt],
    device: torch.device,
    clip_skip: int | None = None,
) -> PromptEmbeds:
    """Encode ``prompts`` as diffusers' own pipelines do; differentiable.

    Stable Diffusion 1 and 2 take the text encoder's output; SDXL takes the penultimate hidden states of both
    text encoders side by side, and the second's projected output at the end token.

    Args:
        text_encoders: "text_encoder", and with SDXL "text_encoder_2" -> the module.
        clip_skip: how many layers to stop earlier.
    """
    is_xl = len(text_encoders) > 1
    contexts, outputs, pooled = [], {}, None
    for name, encoder in text_encoders.items():
        ids = torch.cat([prompt.ids[name] for prompt in prompts]).to(device)
        encoded = encoder(ids, output_hidden_states=is_xl or clip_skip is not None)
        outputs[name] = encoded.last_hidden_state
        if is_xl:
            contexts.append(encoded.hidden_states[-2 - (clip_skip or 0)])
        elif clip_skip is None:
            contexts.append(encoded.last_hidden_state)
        else:
            text_model: Any = getattr(encoder, "text_model", encoder)  # transformers 4 nests it
            contexts.append(text_model.final_layer_norm(encoded.hidden_states[-1 - clip_skip]))
        if name == "text_encoder_2":
            # not encoded.text_embeds: SDXL's config makes CLIP look for the end at the highest id, which is [I]'s
            ends = torch.tensor([prompt.eos for prompt in prompts], device=device)
            at_end = encoded.last_hidden_state[torch.arange(len(prompts), device=device), ends]
            projection: Any = encoder.text_projection
            pooled = projection(at_end)
    return PromptEmbeds(torch.cat(contexts, -1), pooled, outputs)
