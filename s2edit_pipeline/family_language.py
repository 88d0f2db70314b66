"""What flows have in common whose prompts a causal language model reads, inside a chat's template."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch.nn import functional as F

from .family_flow import PackedFlowFamily
from .prompt_columns import TokenizedPrompt
from .prompt_embeds import PromptEmbeds
from .prompt_tokenizing import PromptTemplate, tokenize

_ENCODER = "text_encoder"


class LanguageModelFamily(PackedFlowFamily):
    """Prompts have as many columns as they need, or as many as there may be. The model reads from left to right: all
    columns after ``[I]`` know of it, and what follows the prompt has read all of it, which is what the semantic loss
    compares."""

    num_tokens: ClassVar[int]
    """The most that are read, the template's included."""
    pads: ClassVar[bool] = False
    """Whether prompts are filled up to as many, with columns that are looked at too."""
    empty_prompt: ClassVar[str] = ""
    """What is said where there is no negative prompt."""

    # -------------------------------------------------------------------- components

    @property
    def fixed_components(self) -> frozenset[str]:
        """The language model's weights."""
        return frozenset({_ENCODER})

    @property
    def stock_components(self) -> frozenset[str]:
        return frozenset(self.needed)

    # -------------------------------------------------------------------- prompts

    @property
    @abstractmethod
    def template(self) -> PromptTemplate:
        """What a prompt is put into."""

    def chat_template(self, **switches: Any) -> PromptTemplate:
        """The tokenizer's own, of a chat in which the user says the prompt."""
        said = [{"role": "user", "content": "{}"}]
        text = self.pipe.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True, **switches)
        return PromptTemplate(text)

    @abstractmethod
    def hidden_states(self, encoded: Any) -> torch.Tensor:
        """(B, L, D): what the denoiser is given of the text encoder's answer, at every token."""

    def tokenize(self, prompt: str, tokenizers: Mapping[str, Any] | None = None) -> TokenizedPrompt:
        return self._tokenized(prompt, self.tokenizers if tokenizers is None else tokenizers, truncate=False)

    def tokenize_cut(self, prompt: str) -> TokenizedPrompt:
        return self._tokenized(prompt, self.tokenizers, truncate=True)

    def _tokenized(self, prompt: str, tokenizers: Mapping[str, Any], *, truncate: bool) -> TokenizedPrompt:
        return tokenize(
            tokenizers[_ENCODER],
            prompt,
            limit=self.num_tokens,
            truncate=truncate,
            pad=self.pads,
            template=self.template,
        )

    def encode(self, prompts: Sequence[TokenizedPrompt], clip_skip: int | None = None) -> PromptEmbeds:
        """As the stock pipeline does; the columns that shorter prompts lack are zeros, which the mask leaves out.

        Raises:
            ValueError: ``clip_skip``, which there is nothing for.
        """
        if clip_skip is not None:
            raise ValueError(f"{self.name} reads prompts by a language model, not by CLIP; leave clip_skip= out.")
        segments = [prompt.segments[0] for prompt in prompts]
        ids, there = (
            self._padded([getattr(segment, part)[_ENCODER][0] for segment in segments]) for part in ("ids", "masks")
        )
        encoded = self.pipe.text_encoder(
            input_ids=ids, attention_mask=there, output_hidden_states=True, use_cache=False
        )
        hidden = self.hidden_states(encoded)
        rows = [hidden[i, list(segment.kept)] for i, segment in enumerate(segments)]
        columns = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = self._padded([torch.ones(len(row), dtype=torch.bool) for row in rows])
        return PromptEmbeds(columns, outputs={_ENCODER: columns}, mask=None if bool(mask.all()) else mask)

    def _padded(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        length = max(len(row) for row in rows)
        return torch.stack([F.pad(row, (0, length - len(row))) for row in rows]).to(self.device)

    def encode_negative(self, prompt: str | None, like: PromptEmbeds, clip_skip: int | None = None) -> PromptEmbeds:
        """One row, what is too long cut off."""
        return self.encode([self.tokenize_cut(prompt or self.empty_prompt)])
