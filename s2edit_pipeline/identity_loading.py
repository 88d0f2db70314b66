"""Identities in a living pipeline: loaded by name, beside each other, and taken out without a trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from hashlib import sha256
from typing import Any

import numpy as np
import torch

from .attention_control import SpatialControl
from .identity_adapter import IdentityAdapter, LoadedIdentities, check_base
from .identity_token import token_rows, with_tokens
from .picture_inputs import load_mask
from .pipeline_parts import PipelineParts
from .prompt_columns import TokenizedPrompt
from .prompt_encoding import PromptEmbeds, encode_prompts, join
from .prompt_words import insert_token, split_words


class IdentityLoading(PipelineParts):
    """Mixed into the pipeline: its loaded identities, and prompts that say their tokens."""

    _loaded: LoadedIdentities
    _plain_tokenizers: dict[str, Any]

    @property
    def identities(self) -> tuple[str, ...]:
        """The tokens of the identities loaded now."""
        return tuple(self._loaded.adapters)

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
        if adapter.token in self._loaded.adapters:
            raise ValueError(
                f"An identity {adapter.token!r} is loaded already. Give this one another name, "
                f"load_identity(..., token='[{adapter.token.strip('[]<>')}2]'), or unload_identity({adapter.token!r})."
            )
        check_base(adapter, self._components_with_weights(), self._loaded)
        if not np.isfinite(scale):
            raise ValueError(f"scale must be a number, not {scale!r}.")
        taken = [name for name in adapter.learned if name in self._learned_tokens]
        if taken:
            argument = "token" if taken[0] == adapter.token else "reference_token"
            raise ValueError(
                f"A token {taken[0]!r} is loaded already, with the identity {self._owner(taken[0])!r}; give this one "
                f"another name: load_identity(..., {argument}='[{taken[0].strip('[]<>')}2]')."
            )
        plain = self._plain_tokenizers if self._loaded.adapters else self._tokenizers
        tokens = [*self._learned_tokens, *adapter.learned]
        tokenizers = {name: _tokenizer_with(tokenizer, tokens) for name, tokenizer in plain.items()}
        tables = {name: encoder.get_input_embeddings() for name, encoder in self._text_encoders.items()}  # type: ignore[operator]
        wanted = {name: (table.weight.shape[1],) for name, table in tables.items()}
        for name, (rows, _) in adapter.learned.items():
            shapes = {part: tuple(row.shape) for part, row in rows.items()}
            if shapes != wanted:
                raise ValueError(f"The token {name!r} has rows of {shapes}; this model's are of {wanted}.")
        self._loaded.add(adapter, scale, self._components_with_weights())
        self._plain_tokenizers = plain
        self._set_tokenizers(tokenizers)
        return adapter.token

    def unload_identity(self, token: str | None = None) -> None:
        """Take out one identity, or all. With the last one gone the pipeline is, to the bit, as before the first.

        Raises:
            ValueError: no identity of that token is loaded.
        """
        tokens = list(self._loaded.adapters) if token is None else [token]
        for name in tokens:
            if name not in self._loaded.adapters:
                raise ValueError(f"No identity {name!r} is loaded; loaded are: {', '.join(self.identities) or 'none'}.")
            self._loaded.remove(name, self._components_with_weights())
        if tokens:
            names = self._learned_tokens
            self._set_tokenizers({name: _tokenizer_with(t, names) for name, t in self._plain_tokenizers.items()})

    def _set_tokenizers(self, tokenizers: dict[str, Any]) -> None:
        self.tokenizer = tokenizers["text_encoder"]
        self.tokenizer_2 = tokenizers.get("text_encoder_2")

    @property
    def _learned_tokens(self) -> list[str]:
        """The tokens of the loaded identities and of their reference attributes."""
        return [name for adapter, _ in self._loaded.adapters.values() for name in adapter.learned]

    def _owner(self, token: str) -> str:
        """The loaded identity that ``token``, its own or its reference attribute's, belongs to."""
        return next(name for name, (adapter, _) in self._loaded.adapters.items() if token in adapter.learned)

    @contextmanager
    def _with_identity(self, identity: Any) -> Iterator[str | None]:
        """``identity`` loaded for the length of the context, unless it is None or loaded already; gives its token."""
        if identity is None:
            yield None
            return
        digest = getattr(identity, "digest", None)  # the same fit under whatever name, mask or strength it was loaded
        loaded = [
            token
            for token, (adapter, _) in self._loaded.adapters.items()
            if adapter.digest == digest or (isinstance(identity, str) and identity == token)
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
        held = dict(self._loaded.adapters)
        self.unload_identity()
        try:
            super().save_pretrained(*args, **kwargs)  # type: ignore[misc]
        finally:
            for adapter, scale in held.values():
                self.load_identity(adapter, scale=scale)

    def _refuse_while_loaded(self, what: str) -> None:
        if self._loaded.adapters:
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
        for adapter, _ in self._loaded.adapters.values():
            for token, (_, mask) in adapter.learned.items():
                if mask is not None:
                    masks[token] = mask
                    for switch, tokens in switched.items():
                        tokens += [token] if adapter.settings.get(switch) else []
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
        adapter, scale = self._loaded.adapters[token]
        masks = [mask for _, mask in adapter.learned.values()]
        held = [[] if mask is None else [list(mask.shape), mask.flatten().tolist()] for mask in masks]
        return f"{adapter.digest} x {scale:g} at {sha256(repr(held).encode()).hexdigest()[:16]}"

    # -------------------------------------------------------------------- prompts with identities

    @torch.no_grad()
    def _encode_prompts(self, prompts: Sequence[TokenizedPrompt], clip_skip: int | None = None) -> PromptEmbeds:
        """With the loaded identities' rows in place."""
        with ExitStack() as rows:
            for name, encoder in self._text_encoders.items():
                tokenizer = self._tokenizers[name]
                rows.enter_context(
                    token_rows(
                        encoder,
                        {
                            tokenizer.convert_tokens_to_ids(token): held[name].to(self._execution_device)
                            for adapter, _ in self._loaded.adapters.values()
                            for token, (held, _) in adapter.learned.items()
                        },
                    )
                )
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
            adapter, _ = self._loaded.adapters[token]
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
            token: adapter.subject.lower()
            for token, (adapter, _) in self._loaded.adapters.items()
            if f" {' '.join(split_words(adapter.subject))} " in words
        }
        if len(set(fitting.values())) < len(fitting):
            raise ValueError(
                f"Several loaded identities stand before the same noun in {prompt!r}: {', '.join(fitting)}. "
                f"Say which, identity={next(iter(fitting))!r}, or write the tokens into the prompt."
            )
        return list(fitting)

    def _tokens_in(self, prompts: Sequence[str]) -> list[str]:
        return [t for t in self._loaded.adapters if any(t in split_words(p, [t]) for p in prompts)]


def _tokenizer_with(plain: Any, tokens: list[str]) -> Any:
    """``plain`` itself without ``tokens``; else a copy that knows them and names them in ``s2edit_tokens``."""
    if not tokens:
        return plain
    tokenizer = with_tokens(plain, tokens)
    tokenizer.s2edit_tokens = tuple(tokens)
    return tokenizer
