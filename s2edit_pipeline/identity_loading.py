"""Identities in a living pipeline: loaded by name, beside each other, and taken out without a trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from .attention_control import SpatialControl
from .identity_adapter import IdentityAdapter
from .identity_overlay import IdentityOverlay
from .picture_inputs import load_mask
from .pipeline_parts import PipelineParts
from .prompt_alignment import TokenizedPrompt, insert_token, split_words
from .prompt_encoding import PromptEmbeds, encode_prompts, join


class IdentityLoading(PipelineParts):
    """Mixed into the pipeline: its loaded identities, and prompts that say their tokens."""

    _loaded: IdentityOverlay

    @property
    def identities(self) -> tuple[str, ...]:
        """The tokens of the identities loaded now."""
        return tuple(self._loaded.identities)

    def load_identity(
        self,
        identity: Any,
        token: str | None = None,
        scale: float = 1.0,
        *,
        mask: Any = None,
        reference_token: str | None = None,
        **kwargs: Any,
    ) -> str:
        """Load an identity into the pipeline; prompts can then say its token.

        Args:
            identity: an ``IdentityAdapter``, a folder, or a Hub repository's name.
            token: another name for it.
            scale: strength of its weights, 1 as fitted, 0 as if they weren't there.
            mask: where it is in the picture that will be edited, white inside; None: where it was in its own. Two
                people in one picture, each fitted to a picture of their own, need it.
            reference_token: another name for its reference attribute's token.
            kwargs: for ``IdentityAdapter.from_pretrained``.

        Returns:
            The token.

        Raises:
            ValueError: it belongs to another base model, or its token is taken; nothing is changed then.
        """
        if isinstance(identity, str) and identity[:1] in ("[", "<"):
            raise ValueError(
                f"No identity {identity!r} is loaded; loaded are: {', '.join(self.identities) or 'none'}. "
                "Pass the identity itself, its folder or its Hub repository."
            )
        adapter = (
            identity if hasattr(identity, "weight_differences") else IdentityAdapter.from_pretrained(identity, **kwargs)
        )
        if token is not None or reference_token is not None:
            adapter = adapter.renamed(token, reference_token)
        if mask is not None:
            adapter = replace(adapter, mask=load_mask(mask, None))
        self._set_tokenizers(self._loaded.lay(adapter, scale, self._components_with_weights(), self._tokenizers))
        return adapter.token

    def unload_identity(self, token: str | None = None) -> None:
        """Take out one identity, or all. With the last one gone the pipeline is, to the bit, as before the first.

        Raises:
            ValueError: no identity of that token is loaded.
        """
        self._set_tokenizers(self._loaded.lift(token, self._components_with_weights()))

    def _set_tokenizers(self, tokenizers: dict[str, Any]) -> None:
        for name, tokenizer in tokenizers.items():
            setattr(self, name.replace("text_encoder", "tokenizer"), tokenizer)

    @contextmanager
    def _with_identity(self, identity: Any) -> Iterator[str | None]:
        """``identity`` loaded for the length of the context, unless it is None or loaded already; gives its token."""
        self._loaded.ensure(self._components_with_weights())
        if identity is None:
            yield None
            return
        digest = getattr(identity, "fit_digest", None)  # whatever name, mask or strength it was loaded with
        loaded = [
            token
            for token, one in self._loaded.identities.items()
            if one.adapter.fit_digest == digest or (isinstance(identity, str) and identity == token)
        ]
        if len(loaded) > 1:
            raise ValueError(
                f"This identity is loaded more than once, as {' and '.join(loaded)}; say which: identity={loaded[0]!r}."
            )
        if loaded:
            yield loaded[0]
            return
        token = self.load_identity(identity)
        try:
            yield token
        finally:
            self.unload_identity(token)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As every pipeline's; loaded identities are left out, save them with their own ``save_pretrained``."""
        loaded = tuple(self._loaded.identities.values())
        self.unload_identity()
        try:
            super().save_pretrained(*args, **kwargs)  # type: ignore[misc]
        finally:
            for one in loaded:
                self.load_identity(one.adapter, scale=one.scale)

    def _refuse_while_loaded(self, what: str) -> None:
        if self._loaded.identities:
            raise ValueError(
                f"{what} changes what the loaded identities ({', '.join(self.identities)}) were laid over. "
                "Call unload_identity() first, then this, and load them again."
            )

    def load_textual_inversion(self, *args: Any, **kwargs: Any) -> None:
        """As Stable Diffusion's; before identities are loaded.

        Raises:
            ValueError: identities are loaded.
        """
        self._refuse_while_loaded("load_textual_inversion")
        super().load_textual_inversion(*args, **kwargs)  # type: ignore[misc]

    def fuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """As Stable Diffusion's; before identities are loaded.

        Raises:
            ValueError: identities are loaded.
        """
        self._refuse_while_loaded("fuse_lora")
        super().fuse_lora(*args, **kwargs)  # type: ignore[misc]

    def unfuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """As Stable Diffusion's; before identities are loaded.

        Raises:
            ValueError: identities are loaded.
        """
        self._refuse_while_loaded("unfuse_lora")
        super().unfuse_lora(*args, **kwargs)  # type: ignore[misc]

    def _spatial_control(self, rows: Sequence[TokenizedPrompt | None]) -> SpatialControl:
        """Each learned token's mask for each row of a batch; rows without a prompt (unconditional) have none."""
        masks, columns = {}, []
        switched: dict[str, list[str]] = {"renormalize": [], "mask_after": []}
        for one in self._loaded.identities.values():
            for token, (_, mask) in one.adapter.learned.items():
                if mask is not None:
                    masks[token] = mask
                    for switch, tokens in switched.items():
                        tokens += [token] if one.adapter.settings.get(switch) else []
        names = {token: self.tokenizer.convert_tokens_to_ids(token) for token in masks}
        for prompt in rows:
            found: dict[str, tuple[int, ...]] = {}
            for token in masks:
                at = () if prompt is None else torch.nonzero(prompt.input_ids[0] == names[token])[:, 0].tolist()
                if len(at):
                    found[token] = tuple(at)
            columns.append(found)
        return SpatialControl(masks, columns, renormalize=switched["renormalize"], mask_after=switched["mask_after"])

    def _identity_state(self, token: str) -> str:
        """What a loaded identity does to a picture's inversion: which fit, how strong, held where."""
        return self._loaded.state(token)

    # -------------------------------------------------------------------- prompts with identities

    @torch.no_grad()
    def _encode_prompts(self, prompts: Sequence[TokenizedPrompt], clip_skip: int | None = None) -> PromptEmbeds:
        """With the loaded identities' rows in place."""
        encoded = [encode_prompts(self._text_encoders, [p], self._execution_device, clip_skip) for p in prompts]
        return join(encoded)

    def _encode_negative(self, prompt: str | None, like: PromptEmbeds, clip_skip: int | None = None) -> PromptEmbeds:
        """One row: the negative prompt, or the empty one; of an SDXL trained so, None is zeros of ``like``'s shape."""
        if prompt is None and self.text_encoder_2 is not None and self.config.force_zeros_for_empty_prompt:
            return PromptEmbeds(like.embeds[:1], None if like.pooled is None else like.pooled[:1]).zeros()
        return self._encode_prompts([self._tokenize(prompt or "")], clip_skip)

    def _source_prompt(self, prompt: str, target_tokens: Sequence[str]) -> str:
        """``prompt`` with each loaded token that a target holds put before its subject."""
        for token in target_tokens:
            adapter = self._loaded.identities[token].adapter
            if token not in split_words(prompt, [token]):
                prompt = insert_token(prompt, adapter.subject, token)
        return prompt

    def _fitting_tokens(self, prompt: str, asked: str | None) -> list[str]:
        """The tokens to put into a source prompt: the one asked for, or none where it says one itself, or those of
        the loaded identities whose subject it names."""
        if asked is not None:
            return [asked]
        if self._tokens_in([prompt]):
            return []
        words = f" {' '.join(split_words(prompt))} "
        fitting = {
            token: one.adapter.subject.lower()
            for token, one in self._loaded.identities.items()
            if f" {' '.join(split_words(one.adapter.subject))} " in words
        }
        if len(set(fitting.values())) < len(fitting):
            raise ValueError(
                f"Several loaded identities stand before the same noun in {prompt!r}: {', '.join(fitting)}. "
                f"Say which, identity={next(iter(fitting))!r}, or write the tokens into the prompt."
            )
        return list(fitting)

    def _tokens_in(self, prompts: Sequence[str]) -> list[str]:
        return [t for t in self._loaded.identities if any(t in split_words(p, [t]) for p in prompts)]
