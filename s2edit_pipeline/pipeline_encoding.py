"""Prompts to embeddings, as diffusers' pipelines offer it beside their call."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .family_base import encoding_family, known_family
from .identity_overlay import IdentityOverlay
from .identity_prompts import check_prompt, check_tokens, encode_each, tokenize_each
from .prompt_embeds import join


class PromptEncoding:
    """The part of ``S2EditPipeline`` that encodes prompts; text encoders and tokenizers are all that it needs."""

    _overlay: IdentityOverlay
    _with_identity: Callable[[Any], AbstractContextManager[Any]]

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | list[str],
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        *,
        clip_skip: int | None = None,
    ) -> tuple[torch.Tensor | None, ...]:
        """Embeddings, to hand to a drawing in the prompts' place. A loaded identity's token is encoded too, but its
        mask isn't in embeddings; what is too long is cut, with a warning.

        Args:
            prompt: one, or several.
            device: where the embeddings go; None leaves them where they are made.
            num_images_per_prompt: equal rows for each prompt.
            do_classifier_free_guidance: whether the negative embeddings are made; they are None otherwise.
            negative_prompt: one for all, or one for each.
            clip_skip: layers of the text encoder to leave out.

        Returns:
            ``(prompt_embeds, negative_prompt_embeds)``, (n, L, D) each. A model that is told a summary besides has
            ``(..., pooled_prompt_embeds, negative_pooled_prompt_embeds)`` after them, (n, P) each. Z-Image's are
            lists, of (L, D) for each prompt.

        Raises:
            TypeError, ValueError: a prompt that is no text or empty, or says a token that isn't loaded; as many
                negative prompts as there aren't prompts; prompts of different lengths in a model whose prompts have as
                many columns as they need.
        """
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        family = encoding_family(self)
        # without a denoiser nothing was laid on, and nobody is at work
        with nullcontext() if known_family(self) is None else self._with_identity(None):
            for text in texts:
                check_prompt(text, "prompt")
                check_tokens(text, family, self._overlay)
            encoded = encode_each(family, tokenize_each(texts, family, self._overlay), clip_skip)
            negatives = [negative_prompt] * len(texts) if not isinstance(negative_prompt, list) else negative_prompt
            if len(negatives) != len(texts):
                raise ValueError(
                    f"negative_prompt lists {len(negatives)} for {len(texts)} prompts; give one for all, or each."
                )
            null = join([family.encode_negative(text, encoded, clip_skip) for text in negatives])
        handed = [
            family.drawn_embeddings(encoded),
            family.drawn_embeddings(null) if do_classifier_free_guidance else {},
        ]
        if any(
            one.mask is not None and isinstance(named.get("prompt_embeds"), torch.Tensor)
            for one, named in zip((encoded, null), handed, strict=True)
        ):
            raise ValueError(
                f"These prompts have {encoded.embeds.shape[1]} columns or fewer, each as many as it needs: encode them "
                "one by one."
            )

        def rows(name: str) -> list[Any]:
            each = [named.get(name) for named in handed]
            return [None if one is None else self._repeated(one, num_images_per_prompt, device) for one in each]

        pooled = rows("pooled_prompt_embeds") if encoded.pooled is not None else []
        return (*rows("prompt_embeds"), *pooled)

    @staticmethod
    def _repeated(embeds: Any, count: int, device: torch.device | str | None) -> Any:
        """Each row, or each of a list of prompts, ``count`` times."""
        if isinstance(embeds, list):
            return [one.to(device) for one in embeds for _ in range(count)]
        return embeds.to(device).repeat_interleave(count, 0)
