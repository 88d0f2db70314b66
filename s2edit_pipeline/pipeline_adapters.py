"""diffusers' loaders of adapters: what they lay over the model isn't pulled out from under an identity or a call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

from .family_base import ModelFamily, known_family
from .identity_overlay import IdentityOverlay
from .pipeline_turns import Turns


@contextmanager
def weighed_loras(components: Iterable[nn.Module], overlay: IdentityOverlay, scale: float) -> Iterator[None]:
    """Within the context the user's own LoRAs in ``components`` count ``scale`` times as much; the identities don't."""
    layers = [layer for component in components for layer in component.modules() if isinstance(layer, LoraLayer)]
    before = [(layer.scaling, dict(layer.scaling)) for layer in layers]
    try:
        for scaling, values in before:
            theirs = values.keys() - overlay.adapter_names
            scaling.update({name: scale * values[name] for name in theirs})
        yield
    finally:
        for scaling, values in before:
            scaling.update(values)


class AdapterLoaders:
    """Textual inversions, LoRAs and IP-Adapters."""

    _overlay: IdentityOverlay
    _turns: Turns
    family: ModelFamily

    def _refuse_while_loaded(self, what: str) -> None:
        if self._overlay.identities:
            raise ValueError(
                f"{what} changes what the loaded identities ({', '.join(self._overlay.identities)}) were laid over. "
                "Call unload_identity() first, then this, and load them again."
            )

    @property
    def _lora_loadable_modules(self) -> list[str]:
        """Those of the kind of model that this is; read by diffusers' own ``set_adapters`` and the like."""
        family = known_family(self)
        own = () if family is None else family.lora_components
        return list(own) or super()._lora_loadable_modules  # type: ignore[misc]

    def load_lora_weights(self, *args: Any, **kwargs: Any) -> None:
        """As diffusers' own pipeline of this model; when no call is at work."""
        with self._turns.exclusive("load_lora_weights"):
            if self.family.lora_components:
                self.family.stock().load_lora_weights(*args, **kwargs)
            else:
                super().load_lora_weights(*args, **kwargs)  # type: ignore[misc]

    def unload_lora_weights(self, *args: Any, **kwargs: Any) -> None:
        """As diffusers' own; when no call is at work."""
        with self._turns.exclusive("unload_lora_weights"):
            super().unload_lora_weights(*args, **kwargs)  # type: ignore[misc]

    def set_adapters(self, *args: Any, **kwargs: Any) -> None:
        """As diffusers' own; when no call is at work."""
        with self._turns.exclusive("set_adapters"):
            super().set_adapters(*args, **kwargs)  # type: ignore[misc]

    @classmethod
    def load_lora_into_text_encoder(
        cls, state_dict: Any, network_alphas: Any, text_encoder: Any, *args: Any, **kwargs: Any
    ) -> None:
        """As Stable Diffusion's; a text encoder that the model doesn't have is passed by without a word."""
        if text_encoder is not None:
            super().load_lora_into_text_encoder(  # type: ignore[misc]
                state_dict, network_alphas, text_encoder, *args, **kwargs
            )

    def load_textual_inversion(self, *args: Any, **kwargs: Any) -> None:
        """As Stable Diffusion's; before identities are loaded.

        Raises:
            ValueError: identities are loaded.
        """
        with self._turns.exclusive("load_textual_inversion"):
            self._refuse_while_loaded("load_textual_inversion")
            super().load_textual_inversion(*args, **kwargs)  # type: ignore[misc]

    def unload_textual_inversion(self, *args: Any, **kwargs: Any) -> None:
        """As Stable Diffusion's; before identities are loaded: it would take their tokens out of the tokenizer.

        Raises:
            ValueError: identities are loaded.
        """
        with self._turns.exclusive("unload_textual_inversion"):
            self._refuse_while_loaded("unload_textual_inversion")
            super().unload_textual_inversion(*args, **kwargs)  # type: ignore[misc]

    def fuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """As Stable Diffusion's; before identities are loaded.

        Raises:
            ValueError: identities are loaded.
        """
        with self._turns.exclusive("fuse_lora"):
            self._refuse_while_loaded("fuse_lora")
            super().fuse_lora(*args, **self._with_components(args, kwargs))  # type: ignore[misc]

    def unfuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """As Stable Diffusion's; before identities are loaded.

        Raises:
            ValueError: identities are loaded.
        """
        with self._turns.exclusive("unfuse_lora"):
            self._refuse_while_loaded("unfuse_lora")
            super().unfuse_lora(*args, **self._with_components(args, kwargs))  # type: ignore[misc]

    def _with_components(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """``kwargs`` with the model's own components, where the caller names none."""
        return kwargs if args else {"components": self._lora_loadable_modules, **kwargs}

    def load_ip_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As Stable Diffusion's; when no call is at work. Drawings and edits are then shown ``ip_adapter_image=``.

        Raises:
            ValueError: there are none for this kind of model.
        """
        if not self.family.takes_picture_adapters:
            raise ValueError(f"{self.family.name} takes no IP-Adapter here.")
        with self._turns.exclusive("load_ip_adapter"):
            super().load_ip_adapter(*args, **kwargs)  # type: ignore[misc]

    def unload_ip_adapter(self) -> None:
        """As Stable Diffusion's; when no call is at work."""
        with self._turns.exclusive("unload_ip_adapter"):
            super().unload_ip_adapter()  # type: ignore[misc]

    def set_ip_adapter_scale(self, scale: Any) -> None:
        """As Stable Diffusion's; when no call is at work."""
        with self._turns.exclusive("set_ip_adapter_scale"):
            super().set_ip_adapter_scale(scale)  # type: ignore[misc]
