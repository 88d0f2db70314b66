"""Loading into a living pipeline: identities by name, and diffusers' own loaders where identities are loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from diffusers.utils import logging
from torch import nn

from .argument_checks import is_number
from .family_base import ModelFamily, family_of, known_family
from .identity_adapter import IdentityAdapter
from .identity_overlay import IdentityOverlay
from .object_search import PLACED_MASK
from .offloaded_weights import gathered
from .picture_inputs import load_mask
from .pipeline_adapters import weighed_loras
from .pipeline_arguments import base_name
from .pipeline_memory import EDIT_ADVICE, FIT_ADVICE, memory_advice
from .pipeline_turns import Turns, check_stop_sign, in_a_call, turns_of
from .pipeline_work import Work

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class _Guest:
    """The identity that calls at work have brought with them: in which pipeline, which fit with which masks, and under
    which tokens, its own first. Calls that bring the same one share it."""

    overlay: IdentityOverlay
    digest: str
    tokens: tuple[str, ...]


class IdentityLoaders:
    """The pipeline's loaders: what is loaded, and that it isn't pulled out from under an identity."""

    _overlay: IdentityOverlay
    maybe_free_model_hooks: Callable[[], None]
    _optional_components: list[str]
    progress_bar: Callable[..., Any]

    @property
    def family(self) -> ModelFamily:
        """What kind of model this is."""
        return family_of(self)

    @property
    def _turns(self) -> Turns:
        return turns_of(self.family.tuned_components.values())

    @property
    def identities(self) -> tuple[str, ...]:
        """The tokens of the identities loaded now."""
        return tuple(self._overlay.identities)

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
            RuntimeError: called in a callback, in the middle of a call that uses the model.
        """
        turns = self._turns
        self._refuse_in_a_call("load_identity")
        adapter = self._adapter(identity, **kwargs)
        if token is not None or reference_token is not None:
            adapter = adapter.renamed(token, reference_token)
        if mask is not None:
            settings = {**adapter.settings, **PLACED_MASK}
            adapter = replace(adapter, mask=load_mask(mask, None), settings=settings)
        if not is_number(scale):
            raise ValueError(f"scale must be a number, not {scale!r}.")
        with turns.exclusive("load_identity"):
            self._lay(adapter, float(scale))
        return adapter.token

    def unload_identity(self, token: str | None = None) -> None:
        """Take out one identity, or all. With the last one gone the pipeline is, to the bit, as before the first.

        Raises:
            ValueError: no identity of that token is loaded.
            RuntimeError: called in a callback, in the middle of a call that uses the model.
        """
        self._refuse_in_a_call("unload_identity")
        with self._turns.exclusive("unload_identity"):
            if token is not None:
                self._overlay.check_loaded(token)
            if self._overlay.identities:
                self._set_tokenizers(self._overlay.lift(token, self.family.tuned_components))

    def _refuse_in_a_call(self, what: str) -> None:
        if self._turns.current() is not None:
            raise in_a_call(what)

    def _adapter(self, identity: Any, **kwargs: Any) -> Any:
        """``identity`` itself, or the one that its folder or repository holds."""
        if hasattr(identity, "weight_differences"):
            if kwargs:
                raise TypeError(f"{next(iter(kwargs))}= is for an identity that is read from a folder or the Hub.")
            return identity
        if isinstance(identity, str) and identity[:1] in ("[", "<"):
            self._overlay.check_loaded(identity)
            raise ValueError(f"{identity!r} is loaded. Pass another identity, its folder or its Hub repository.")
        return IdentityAdapter.from_pretrained(identity, **kwargs)

    def _lay(self, adapter: Any, scale: float = 1.0) -> None:
        family = self.family
        self._set_tokenizers(self._overlay.lay(adapter, scale, family.tuned_components, family.tokenizers))

    def _set_tokenizers(self, tokenizers: dict[str, Any]) -> None:
        for name, tokenizer in tokenizers.items():
            setattr(self, name.replace("text_encoder", "tokenizer"), tokenizer)

    def _loaded_token(self, identity: Any) -> str | None:
        """The token under which ``identity`` is loaded already, or None; what other calls have brought with them isn't
        loaded.

        Raises:
            ValueError: it is loaded more than once.
        """
        digest = getattr(identity, "fit_digest", None)  # whatever name, mask or strength it was loaded with
        with self._turns.unchanged() as key:
            guest = key.tokens[0] if isinstance(key, _Guest) and key.overlay is self._overlay else None
            tokens = [
                token
                for token, loaded in self._overlay.identities.items()
                if token != guest and (loaded.adapter.fit_digest == digest or identity == token)
            ]
        if len(tokens) > 1:
            raise ValueError(
                f"This identity is loaded more than once, as {' and '.join(tokens)}; say which: identity={tokens[0]!r}."
            )
        return tokens[0] if tokens else None

    @contextmanager
    def _with_identity(self, identity: Any) -> Iterator[str | None]:
        """A turn at the model with ``identity`` in it, unless that is None or loaded already; gives its token."""
        is_name = isinstance(identity, str) and identity in self._overlay.identities
        adapter = None if identity is None or is_name else self._adapter(identity)
        loaded = None if identity is None else self._loaded_token(identity if is_name else adapter)
        if loaded is not None:
            adapter = None

        def enter() -> None:
            self._overlay.ensure(self.family.tuned_components)
            if adapter is not None:
                self._lay(adapter)

        def leave() -> None:
            if adapter is not None:
                self._set_tokenizers(self._overlay.lift(adapter.token, self.family.tuned_components))
            self.maybe_free_model_hooks()

        key = None if adapter is None else _Guest(self._overlay, adapter.digest, tuple(adapter.learned))
        with self._turns.shared(key, enter, leave):
            token = loaded if adapter is None else adapter.token
            if token is not None and token not in self._overlay.identities:
                raise ValueError(f"The identity {token!r} was unloaded meanwhile; load it again, or pass it itself.")
            yield token

    @contextmanager
    def _at_work(
        self, identity: Any, stop: Any, report: Any, alone: str = "", lora_scale: float = 1.0
    ) -> Iterator[tuple[Work, str | None]]:
        """A call's turn at the model, and the token of the identity that it was asked with.

        Args:
            report: makes the stage's report from the call.
            alone: what needs the model to itself; "" shares it.
            lora_scale: on the user's own LoRAs, for this call; another than 1 needs the model to itself.
        """
        check_stop_sign(stop)
        family, turns = self.family, self._turns
        with (
            memory_advice(FIT_ADVICE if alone == "fit_identity" else EDIT_ADVICE),
            turns.call(stop) as call,
            ExitStack() as turn,
        ):
            if alone or lora_scale != 1:
                turn.enter_context(turns.exclusive(alone or "cross_attention_kwargs"))
            token = turn.enter_context(self._with_identity(identity))
            if alone:
                modules = [one for one in self.components.values() if isinstance(one, nn.Module)]
                turn.enter_context(gathered(family.tuned_components, to_train=True, neighbours=modules))
            if lora_scale != 1:
                turn.enter_context(weighed_loras(family.tuned_components.values(), self._overlay, lora_scale))
            work = Work(
                family=family, overlay=self._overlay, call=call, progress_bar=self.progress_bar, report=report(call),
                base_model=base_name(self),
            )  # fmt: skip
            yield work, token

    def _check_bare(self, why: str) -> None:
        """Raises:
        ValueError: identities, LoRAs or IP-Adapters lie over the model.
        """
        if self._overlay.identities:
            raise ValueError(
                f"Identities are loaded ({', '.join(self.identities)}). {why}. Call pipe.unload_identity() first."
            )
        self._overlay.check_alone(self.family.tuned_components)
        for component in self.family.tuned_components.values():
            if getattr(component, "peft_config", None):
                raise ValueError(
                    f"Other LoRA weights are attached. {why}. Merge them, pipe.fuse_lora() then "
                    "pipe.unload_lora_weights(), or only unload them, and fit again."
                )
        if self.family.num_picture_adapters:
            raise ValueError(f"An IP-Adapter is loaded. {why}. Call pipe.unload_ip_adapter() first.")

    # -------------------------------------------------------------------- diffusers' own loaders

    @property
    def components(self) -> dict[str, Any]:
        """As every pipeline's, to make others of: without those that are None and that the stock pipeline of this kind
        of model doesn't know, so that ``StableDiffusionPipeline(**pipe.components)`` works, or SDXL's."""
        every: dict[str, Any] = super().components  # type: ignore[misc]
        family = known_family(self)  # none where the denoiser is missing yet
        known = frozenset() if family is None else family.stock_components
        return {name: one for name, one in every.items() if one is not None or name in known}

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """As every pipeline's; the components that the other pipeline lacks are None."""
        names, _ = cls._get_signature_keys(cls)  # type: ignore[attr-defined]
        components = {name: pipeline.components.get(name) for name in names}
        return super().from_pipe(pipeline, **{**components, **kwargs})  # type: ignore[misc]

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As every pipeline's; loaded identities are left out, save them with their own ``save_pretrained``."""
        with self._turns.exclusive("save_pretrained"):
            loaded = list(self._overlay.identities.values())
            if loaded:
                logger.warning(
                    f"The loaded identities ({', '.join(self.identities)}) are not saved with the pipeline. Save each "
                    "with identity.save_pretrained(folder), and load it again with pipe.load_identity(folder)."
                )
            self.unload_identity()
            optional = self._optional_components
            self._optional_components = [n for n in type(self)._optional_components if getattr(self, n) is None]
            try:
                super().save_pretrained(*args, **kwargs)  # type: ignore[misc]
            finally:
                self._optional_components = optional
                with ExitStack() as every:  # one that can't be laid on keeps none of the others out
                    for one in reversed(loaded):
                        every.callback(self._lay, one.adapter, one.scale)
