"""Identities laid over a model: beside each other, beside a user's own LoRAs, and lifted off again to the bit.

LoRA factors are attached unmerged, in PEFT's own layers, one adapter name for each identity: they cost what the factors
take. Differences of whole tensors (``method="full"``, and the biases and norms of a compressed one) are added, with the
original tensors kept. A learned token's row is laid over the embedding table by a hook.

A user's LoRAs live in the same PEFT layers. Whatever diffusers does to them (``load_lora_weights``, ``set_adapters``,
``disable_lora``, ``delete_adapters``, ``unload_lora_weights``) it does to all adapters that it meets, so
:meth:`IdentityOverlay.ensure`, called before the model is used, puts the identities' back where they belong.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from types import MappingProxyType
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.hooks import RemovableHandle

from .identity_fingerprint import check_base, is_same_base
from .identity_lora_layers import AdaptedLayer, LayerPlace, lora_layers
from .identity_lora_names import name_within
from .offloaded_weights import gathered
from .packed_weights import is_too_coarse, kind_of
from .prompt_tokens import lay_rows, with_tokens

Components = Mapping[str, nn.Module]


ADAPTER_PREFIX = "s2edit_"
"""Of PEFT's names for identities' adapters."""


@dataclass(frozen=True)
class LoadedIdentity:
    """An identity that is laid on.

    Attributes:
        adapter: the ``IdentityAdapter``, under the name and with the mask that it was loaded with.
        scale: strength of its weights, 1 as fitted.
    """

    adapter: Any
    scale: float


class IdentityOverlay:
    """The identities laid over a pipeline's components now.

    ``components`` in every method: name -> module, the denoiser ("unet" or "transformer") and the text encoders. They
    are the same modules from the first identity's coming to the last one's going.
    """

    def __init__(self) -> None:
        self._identities: dict[str, LoadedIdentity] = {}
        self._adapter_names: dict[str, str] = {}
        self._plain_tokenizers: dict[str, Any] = {}
        self._modules: dict[str, nn.Module] = {}
        self._layers: dict[tuple[str, str], AdaptedLayer] = {}
        self._originals: dict[tuple[str, str], torch.Tensor] = {}
        self._row_hooks: list[RemovableHandle] = []
        self._tables: dict[str, tuple[nn.Module, dict[int, torch.Tensor]]] = {}

    # -------------------------------------------------------------------- what is laid on

    @property
    def identities(self) -> Mapping[str, LoadedIdentity]:
        """Token -> identity, in the order of their coming."""
        return MappingProxyType(self._identities)

    @property
    def adapter_names(self) -> frozenset[str]:
        """PEFT's names of the identities' adapters."""
        return frozenset(self._adapter_names.values())

    @property
    def tokens(self) -> tuple[str, ...]:
        """All learned tokens: the identities' and their reference attributes'."""
        return tuple(token for loaded in self._identities.values() for token in loaded.adapter.learned)

    def owner(self, token: str) -> str:
        """The identity that ``token``, its own or its reference attribute's, belongs to.

        Raises:
            KeyError: none of the loaded ones.
        """
        for name, loaded in self._identities.items():
            if token in loaded.adapter.learned:
                return name
        raise KeyError(token)

    def check_loaded(self, token: str) -> None:
        """Raises:
        ValueError: no identity of that token is loaded.
        """
        if token not in self._identities:
            raise ValueError(
                f"No identity {token!r} is loaded; loaded are: {', '.join(self._identities) or 'none'}. Load it, "
                "pipe.load_identity(folder or Hub name), or pass identity=."
            )

    def state(self, token: str | None = None) -> str:
        """What tells which fits, scales and masks are laid on: of the identity ``token``, or of all.

        Raises:
            KeyError: no identity of that token is loaded.
        """
        if token is None:
            return "; ".join(f"{name} {self.state(name)}" for name in self._identities)
        loaded = self._identities[token]
        masks = [mask for _, mask in loaded.adapter.learned.values()]
        values = [None if mask is None else (tuple(mask.shape), mask.flatten().tolist()) for mask in masks]
        places = hashlib.sha256(repr(values).encode()).hexdigest()[:16]
        return f"{loaded.adapter.digest} x {loaded.scale:g} at {places}"

    def originals(self, component: str) -> dict[str, torch.Tensor]:
        """Parameter name -> base value, of what is changed in ``component`` now."""
        return {name: original for (part, name), original in self._originals.items() if part == component}

    # -------------------------------------------------------------------- laying on and lifting off

    def lay(self, adapter: Any, scale: float, components: Components, tokenizers: Mapping[str, Any]) -> dict[str, Any]:
        """Lay ``adapter`` over ``components``. All is checked first; after any exception all is as before.

        Args:
            adapter: an ``IdentityAdapter``.
            scale: strength of its weights, 1 as fitted, 0 as if they weren't there.
            tokenizers: text encoder's name -> its present tokenizer, of those in which tokens have rows.

        Returns:
            Text encoder's name -> a copy of its tokenizer that knows all learned tokens, for the caller to install.

        Raises:
            ValueError: the identity belongs to another base model or doesn't fit this one, or a token's name is taken.
        """
        self._check_names(adapter, scale)
        self.check_alone(components)
        if self._identities:
            self._check_components(components)
        with gathered(components):
            return self._lay(adapter, float(scale), components, tokenizers)

    def _lay(self, adapter: Any, scale: float, components: Components, tokenizers: Mapping[str, Any]) -> dict[str, Any]:
        check_base(adapter, components, {name: self.originals(name) for name in components})
        plain = self._plain_tokenizers if self._identities else dict(tokenizers)
        extended = {name: with_tokens(t, [*self.tokens, *adapter.learned]) for name, t in plain.items()}
        _check_rows(adapter, {name: components[name] for name in plain})
        _check_fit(adapter, components)

        self._modules = dict(components)
        loaded, peft_name = LoadedIdentity(adapter, scale), self._free_name()
        self._identities[adapter.token], self._adapter_names[adapter.token] = loaded, peft_name
        try:
            for component in components:
                self._attach(component, loaded, peft_name)
                self._add_differences(component, loaded)
            self._lay_rows(extended)
            self._settle()
        except BaseException:
            self._remove(adapter.token)
            raise
        self._plain_tokenizers = plain
        return extended

    def lift(self, token: str | None, components: Components) -> dict[str, Any]:
        """Lift the identity ``token`` off, or all (None). With the last one gone the components are, to the bit and
        module by module, as before the first; a user's LoRAs stay.

        Returns:
            Text encoder's name -> its tokenizer, for the caller to install: the very one of before the first identity
            when none is left. Nothing where nothing was loaded.

        Raises:
            ValueError: no identity of that token is loaded, the weights are offloaded in a way that isn't served, or a
                LoRA is fused into them.
        """
        leaving = list(self._identities) if token is None else [token]
        for name in leaving:
            self.check_loaded(name)
        if not leaving:
            return {}
        self._check_components(components)
        self._check_unfused()
        *others, last = leaving
        with gathered(components):
            for name in others:
                self._remove(name)
            return self._remove(last)

    def ensure(self, components: Components) -> None:
        """Put the identities back where the user's doings with LoRAs have taken or switched them off; cheap where
        nothing has.

        Raises:
            ValueError: a component was replaced, a LoRA was fused over the identities, or the weights below them were
                changed.
        """
        if not self._identities:
            return
        self._check_components(components)
        if not all(map(AdaptedLayer.is_settled, self._layers.values())):
            missing = {layer.component for layer in self._layers.values() if not layer.is_in_place()}
            with gathered({component: components[component] for component in missing}):
                for component in missing:
                    self._attach_again(component)
            self._settle()
        for name, (table, rows) in self._tables.items():
            if self._modules[name].get_input_embeddings() is not table:  # type: ignore[operator]
                self._row_hooks += lay_rows(self._modules[name], rows)
                self._tables[name] = (self._modules[name].get_input_embeddings(), rows)  # type: ignore[operator]

    # -------------------------------------------------------------------- checks

    def _check_names(self, adapter: Any, scale: float) -> None:
        if adapter.token in self._identities:
            raise ValueError(
                f"An identity {adapter.token!r} is loaded already. Give this one another name, "
                f"load_identity(..., token='[{adapter.token.strip('[]<>')}2]'), or unload_identity({adapter.token!r})."
            )
        if isinstance(scale, bool) or not isinstance(scale, Real) or not math.isfinite(scale):
            raise ValueError(f"scale must be a number, not {scale!r}.")
        taken = next((name for name in adapter.learned if name in self.tokens), None)
        if taken is not None:
            argument = "token" if taken == adapter.token else "reference_token"
            raise ValueError(
                f"A token {taken!r} is loaded already, with the identity {self.owner(taken)!r}; give this one "
                f"another name: load_identity(..., {argument}='[{taken.strip('[]<>')}2]')."
            )

    def _check_components(self, components: Components) -> None:
        for name, module in self._modules.items():
            if components.get(name) is not module:
                raise ValueError(
                    f"The {name} is another module than the one that the identities ({', '.join(self._identities)}) "
                    f"were laid over. Put that one back, call unload_identity(), then change the {name} and load them "
                    "again."
                )

    def check_alone(self, components: Components) -> None:
        """Raises:
        ValueError: another pipeline that shares these modules, as ``from_pipe`` makes it, has laid identities on them.
        """
        for component, module in components.items():
            for layer in module.modules():
                if isinstance(layer, LoraLayer) and any(
                    name.startswith(ADAPTER_PREFIX) and name not in self.adapter_names for name in layer.r
                ):
                    raise ValueError(
                        f"Another pipeline that shares the {component} has an identity loaded. Call unload_identity() "
                        "there first, or load the identities into that pipeline."
                    )

    def _free_name(self) -> str:
        """PEFT's name for the next identity: no user's adapter and no other identity has it."""
        taken = set(self._adapter_names.values())
        for module in self._modules.values():
            taken |= set(getattr(module, "peft_config", None) or {})
        return next(name for i in range(1, len(taken) + 2) if (name := f"{ADAPTER_PREFIX}{i}") not in taken)

    # -------------------------------------------------------------------- LoRA

    def _attach(self, component: str, loaded: LoadedIdentity, peft_name: str) -> None:
        """Attach the LoRA factors of an identity in ``component``."""
        module = self._modules[component]
        factors = {name_within(module, path): f for path, f in loaded.adapter.lora_factors(component).items()}
        places = {path: LayerPlace.of(module, path) for path in factors}
        made = lora_layers([place.base for place in places.values()], peft_name, module) if places else []
        for (path, place), fresh in zip(places.items(), made, strict=True):
            layer = self._layers.get((component, path))
            if layer is None or not layer.is_in_place():
                layer = self._layers[component, path] = AdaptedLayer(
                    component, place.parent, place.child, place.wrap(fresh)
                )
            layer.add(peft_name, fresh, factors[path], loaded.scale)

    def _attach_again(self, component: str) -> None:
        """After somebody has taken PEFT's layers out of ``component``; they may have fused them before that."""
        for loaded in self._identities.values():
            wanted = loaded.adapter.base_fingerprint[component]
            if not is_same_base(wanted, self._modules[component], self.originals(component)):
                raise ValueError(
                    f"The weights of the {component} were changed below the loaded identities "
                    f"({', '.join(self._identities)}), as fuse_lora() and then unload_lora_weights() do. Call "
                    "unload_identity(), load the base model again, and the identities into it."
                )
        for key in [key for key in self._layers if key[0] == component]:
            layer = self._layers.pop(key)
            for peft_name in list(layer.scalings):
                layer.remove(peft_name)
        for token, loaded in self._identities.items():
            self._attach(component, loaded, self._adapter_names[token])

    def _settle(self) -> None:
        self._check_unfused()
        for layer in self._layers.values():
            if not layer.is_settled():
                layer.settle()

    def _check_unfused(self) -> None:
        for layer in self._layers.values():
            if layer.wrapper.merged_adapters:
                raise ValueError(
                    f"A LoRA was fused into the {layer.component} while identities ({', '.join(self._identities)}) are "
                    "loaded. Call pipe.unfuse_lora(): LoRAs that aren't fused work beside identities."
                )

    # -------------------------------------------------------------------- plain differences and rows

    @torch.no_grad()
    def _add_differences(self, component: str, loaded: LoadedIdentity) -> None:
        module = self._modules[component]
        for saved_name, difference in loaded.adapter.plain_differences(component).items():
            name = name_within(module, saved_name)
            parameter = _parameter(module, name)
            assert parameter is not None
            self._originals.setdefault((component, name), parameter.data)
            wide = torch.promote_types(parameter.dtype, torch.float32)
            changed = parameter.data.to(wide) + loaded.scale * difference.to(parameter.device, wide)
            parameter.data = changed.to(parameter.dtype)

    def _put_originals_back(self) -> None:
        for (component, name), original in self._originals.items():
            parameter = _parameter(self._modules[component], name)
            assert parameter is not None
            parameter.data = original.to(parameter)
        self._originals.clear()

    def _lay_rows(self, tokenizers: Mapping[str, Any]) -> None:
        """In place of those that are there: the loaded identities' under the ids that ``tokenizers`` give."""
        laid, tables = [], {}
        for name, tokenizer in tokenizers.items():
            encoder = self._modules[name]
            rows = {
                tokenizer.convert_tokens_to_ids(token): rows[name].detach().to(next(encoder.parameters()).device)
                for loaded in self._identities.values()
                for token, (rows, _) in loaded.adapter.learned.items()
            }
            laid += lay_rows(encoder, rows)
            tables[name] = (encoder.get_input_embeddings(), rows)  # type: ignore[operator]
        for hook in self._row_hooks:
            hook.remove()
        self._row_hooks, self._tables = laid, tables

    def _remove(self, token: str) -> dict[str, Any]:
        """Take out what there is of the identity ``token``, be it laid whole or in part; the others stay. Gives the
        tokenizers that know these."""
        gone, peft_name = self._identities.pop(token), self._adapter_names.pop(token)
        for key, layer in list(self._layers.items()):
            layer.remove(peft_name)
            if not layer.scalings:
                del self._layers[key]
        if any(gone.adapter.plain_differences(component) for component in self._modules):
            self._put_originals_back()
            for loaded in self._identities.values():
                for component in self._modules:
                    self._add_differences(component, loaded)
        tokenizers = self._plain_tokenizers
        if self._identities:
            tokenizers = {name: with_tokens(tokenizer, self.tokens) for name, tokenizer in tokenizers.items()}
            self._lay_rows(tokenizers)
        else:
            self._lay_rows({})
            self._plain_tokenizers, self._modules = {}, {}
        return tokenizers


# ------------------------------------------------------------------------------ whether an identity fits


def _parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter ``name``, also where PEFT has since wrapped its layer; None where there is none."""
    layer, _, leaf = name.rpartition(".")
    try:
        owner = module.get_submodule(layer)
        owner = owner.get_base_layer() if isinstance(owner, BaseTunerLayer) else owner
        parameter = getattr(owner, leaf)
    except AttributeError:
        return None
    return parameter if isinstance(parameter, nn.Parameter) else None


_OTHER_MODEL = "It was fitted to another model: load that one, or fit it again, pipe.fit_identity(...)."


def _check_rows(adapter: Any, text_encoders: Components) -> None:
    wanted = {
        name: (encoder.get_input_embeddings().weight.shape[1],)  # type: ignore[operator]
        for name, encoder in text_encoders.items()
    }
    for token, (rows, _) in adapter.learned.items():
        shapes = {name: tuple(row.shape) for name, row in rows.items()}
        if shapes != wanted:
            raise ValueError(f"The token {token!r} has rows of {shapes}; this model's are of {wanted}. {_OTHER_MODEL}")


def _check_fit(adapter: Any, components: Components) -> None:
    """Raises:
    ValueError: the identity's weights are of other components, names or shapes than ``components``.
    """
    foreign = {name.split(".")[0] for name in adapter.weights} - components.keys()
    if foreign:
        raise ValueError(
            f"The identity changes {', '.join(sorted(foreign))}, which this model doesn't have. {_OTHER_MODEL}"
        )
    for component, module in components.items():
        for saved_name, difference in adapter.plain_differences(component).items():
            _check_shape(component, module, name_within(module, saved_name), tuple(difference.shape), is_lora=False)
        for saved_path, factors in adapter.lora_factors(component).items():
            path = name_within(module, saved_path)
            # the shape without the product: a small file's factors can multiply out to more than the machine holds
            shape = (len(factors.up), *factors.down.shape[1:])
            _check_shape(component, module, f"{path}.weight", shape, is_lora=True)
            if getattr(LayerPlace.of(module, path).parent, "fused_projections", False):
                raise ValueError(
                    f"The {component}'s attention projections are fused, so that an adapter of {path} would be passed "
                    "by. Call pipe.unfuse_qkv_projections() first."
                )


def _check_shape(component: str, module: nn.Module, name: str, shape: tuple[int, ...], is_lora: bool) -> None:
    parameter = _parameter(module, name)
    if parameter is None:
        raise ValueError(f"The identity changes {component}.{name}, which this model doesn't have. {_OTHER_MODEL}")
    owner = module.get_submodule(name.rpartition(".")[0])
    owner = owner.get_base_layer() if isinstance(owner, BaseTunerLayer) else owner
    is_linear = isinstance(owner, nn.Linear)
    if is_lora and not is_linear and not isinstance(owner, nn.Conv2d):
        raise ValueError(
            f"The identity has a LoRA of {component}.{name}, and that layer is {type(owner).__name__} here, neither "
            f"linear nor a convolution. {_OTHER_MODEL}"
        )
    # a weight that quantisation has packed: what it stands for
    packed = is_linear and name.endswith(".weight")
    present = (owner.out_features, owner.in_features) if packed else tuple(parameter.shape)
    if present != shape:
        raise ValueError(f"The identity's {component}.{name} is {shape}; the model's is {present}. {_OTHER_MODEL}")
    if not is_lora and is_too_coarse(parameter):
        raise ValueError(
            f"The identity changes {component}.{name} as a whole, and it is quantised here ({kind_of(parameter)}). "
            "Load the model without quantisation and layerwise casting, or fit the identity with method='lora'."
        )
