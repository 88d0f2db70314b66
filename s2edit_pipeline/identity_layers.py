"""PEFT's layers with identities' adapters in them, beside a user's own, and what an identity needs of a layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.overrides import TorchFunctionMode

from .identity_lora_names import name_within

Components = Mapping[str, nn.Module]


def place_of(module: nn.Module, path: str) -> LayerPlace:
    parent, _, child = path.rpartition(".")
    return LayerPlace(module.get_submodule(parent), child)


def parameter_of(module: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter ``name``, also where PEFT has since wrapped its layer; None where there is none."""
    layer, _, leaf = name.rpartition(".")
    try:
        owner = module.get_submodule(layer)
        owner = owner.get_base_layer() if isinstance(owner, BaseTunerLayer) else owner
        parameter = getattr(owner, leaf)
    except AttributeError:
        return None
    return parameter if isinstance(parameter, nn.Parameter) else None


class LayerPlace:
    """Where a layer is: under ``child`` of ``parent``, perhaps behind tuners' wrappers."""

    def __init__(self, parent: nn.Module, child: str) -> None:
        self.parent, self.child = parent, child

    def chain(self) -> Iterator[nn.Module]:
        """What stands there, and what that wraps, to the base layer."""
        module = self.parent._modules.get(self.child)
        while isinstance(module, nn.Module):
            yield module
            module = module.base_layer if isinstance(module, BaseTunerLayer) else None

    @property
    def base(self) -> nn.Module:
        *_, base = self.chain()
        return base

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        """``new`` in the place of ``old``, which is in the chain."""
        above: nn.Module | None = None
        for module in self.chain():
            if module is old:
                if above is None:
                    setattr(self.parent, self.child, new)
                else:
                    above.base_layer = new
                return
            above = module

    def wrap(self, fresh: LoraLayer) -> LoraLayer:
        """A LoRA layer around the base: the one that is there, or ``fresh``, put there."""
        for module in self.chain():
            if isinstance(module, LoraLayer):
                return module
        self.replace(self.base, fresh)
        return fresh


class AdaptedLayer:
    """A layer with adapters of identities, and the state that PEFT keeps in it.

    ``scalings``: our adapters' names -> their factors' scale. ``paused``: the user's adapters that disable_lora() has
    switched off here, None where it hasn't. PEFT has one switch for all of a layer's adapters, so the switch is left on
    and the user's are taken from the active ones. Their coming back shows in our factors' ``requires_grad``, which
    enable_lora() turns on.
    """

    def __init__(self, component: str, parent: nn.Module, child: str, wrapper: LoraLayer) -> None:
        self.component, self.parent, self.child, self.wrapper = component, parent, child, wrapper
        self.scalings: dict[str, float] = {}
        self.paused: list[str] | None = None

    def is_in_place(self) -> bool:
        if self.parent._modules.get(self.child) is not self.wrapper:
            return any(module is self.wrapper for module in LayerPlace(self.parent, self.child).chain())
        downs = self.wrapper._modules["lora_A"]._modules  # type: ignore[union-attr]
        return all(name in downs for name in self.scalings)

    def is_settled(self) -> bool:
        wrapper = self.wrapper
        if wrapper._disable_adapters or isinstance(wrapper._active_adapter, str):
            return False
        downs = wrapper._modules["lora_A"]._modules
        if self.paused is not None and len(wrapper._active_adapter) > len(self.scalings):
            return False
        return all(
            name in wrapper._active_adapter
            and wrapper.scaling[name] == scaling
            and not downs[name].weight.requires_grad
            for name, scaling in self.scalings.items()
        )

    def settle(self) -> None:
        """Ours active, at their scale and frozen; the user's as the user wants them."""
        wrapper = self.wrapper
        ups_and_downs = [part[name].weight for part in (wrapper.lora_A, wrapper.lora_B) for name in self.scalings]
        theirs = [name for name in wrapper.active_adapters if name not in self.scalings]
        if wrapper._disable_adapters:
            self.paused = theirs or self.paused or []
        elif self.paused is not None and theirs:
            self.paused = theirs  # set_adapters() chooses which; enable_lora() switches them on
        elif self.paused is not None and any(weight.requires_grad for weight in ups_and_downs):
            theirs, self.paused = [name for name in self.paused if name in wrapper.r], None
        wrapper._disable_adapters = False
        wrapper._active_adapter = [*(theirs if self.paused is None else []), *self.scalings]
        for weight in ups_and_downs:
            weight.requires_grad_(False)
        wrapper.scaling.update(self.scalings)

    def add(self, name: str, fresh: LoraLayer, factors: Any, scale: float) -> None:
        """Give the layer the adapter ``name``, which PEFT has made in ``fresh``, with ``factors`` for its weights."""
        wrapper, rank = self.wrapper, len(factors.down)
        self.scalings[name] = scaling = scale * factors.scale  # first: what isn't finished can be removed
        if wrapper is not fresh:
            for part in (*fresh.adapter_layer_names, *fresh.other_param_names):
                if name in getattr(fresh, part):
                    getattr(wrapper, part)[name] = getattr(fresh, part)[name]
        weight = wrapper.get_base_layer().weight
        dtype = weight.dtype if weight.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16) else None
        for part, tensor in ((wrapper.lora_A[name], factors.down), (wrapper.lora_B[name], factors.up)):
            value = tensor.detach().to(weight.device, dtype or torch.float32, copy=True)
            part.weight = nn.Parameter(value, requires_grad=False)
        ends = ("out_features", "in_features") if factors.down.ndim == 2 else ("out_channels", "in_channels")
        setattr(wrapper.lora_A[name], ends[0], rank)
        setattr(wrapper.lora_B[name], ends[1], rank)
        # so that PEFT's own way back to "1" is our scale
        wrapper.r[name], wrapper.lora_alpha[name], wrapper.scaling[name] = rank, scaling * rank, scaling

    def remove(self, name: str) -> None:
        """Take the adapter ``name`` out, and the wrapper too if it was the last one of anybody's."""
        if self.scalings.pop(name, None) is None or not any(
            module is self.wrapper for module in LayerPlace(self.parent, self.child).chain()
        ):
            return
        wrapper = self.wrapper
        theirs = [other for other in wrapper.active_adapters if other != name]
        wrapper._active_adapter = theirs  # first: deleting an active adapter would choose others
        wrapper.delete_adapter(name)
        if not self.scalings and self.paused is not None:
            wrapper._active_adapter, wrapper._disable_adapters, self.paused = self.paused, True, None
        if not wrapper.r:
            LayerPlace(self.parent, self.child).replace(wrapper, wrapper.base_layer)


class _Uninitialised(TorchFunctionMode):
    """New layers keep whatever is in their memory: no random number is taken from anybody. In this thread alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def lora_layers(bases: list[nn.Module], peft_name: str, module: nn.Module) -> list[LoraLayer]:
    """PEFT's layer around each of ``bases``, which are ``module``'s; these and what is around them are not touched."""
    if not bases:
        return []
    holder = nn.ModuleList(bases)
    for flag in ("is_loaded_in_8bit", "is_loaded_in_4bit", "hf_quantizer"):  # by which PEFT chooses its layers
        if hasattr(module, flag):
            setattr(holder, flag, getattr(module, flag))
    required = [(parameter, parameter.requires_grad) for base in bases for parameter in base.parameters()]
    config = LoraConfig(r=1, lora_alpha=1, target_modules=r"\d+", init_lora_weights=False, inference_mode=True)
    try:
        with _Uninitialised():
            inject_adapter_in_model(config, holder, adapter_name=peft_name)
    finally:
        for parameter, requires in required:
            parameter.requires_grad = requires
    for layer, base in zip(holder, bases, strict=True):
        layer.train(base.training)
    return list(holder)


# ------------------------------------------------------------------------------ whether an identity fits


def check_rows(adapter: Any, text_encoders: Components) -> None:
    wanted = {
        name: (encoder.get_input_embeddings().weight.shape[1],)  # type: ignore[operator]
        for name, encoder in text_encoders.items()
    }
    for token, (rows, _) in adapter.learned.items():
        shapes = {name: tuple(row.shape) for name, row in rows.items()}
        if shapes != wanted:
            raise ValueError(f"The token {token!r} has rows of {shapes}; this model's are of {wanted}.")


def check_fit(adapter: Any, components: Components) -> None:
    """Raises:
    ValueError: the identity's weights are of other components, names or shapes than ``components``.
    """
    foreign = {name.split(".")[0] for name in adapter.weights} - components.keys()
    if foreign:
        raise ValueError(f"The identity changes {', '.join(sorted(foreign))}, which this model doesn't have.")
    for component, module in components.items():
        for saved_name, difference in adapter.plain_differences(component).items():
            _check_shape(component, module, name_within(module, saved_name), tuple(difference.shape), is_lora=False)
        for saved_path, factors in adapter.lora_factors(component).items():
            path = name_within(module, saved_path)
            # the shape without the product: a small file's factors can multiply out to more than the machine holds
            shape = (len(factors.up), *factors.down.shape[1:])
            _check_shape(component, module, f"{path}.weight", shape, is_lora=True)
            if getattr(place_of(module, path).parent, "fused_projections", False):
                raise ValueError(
                    f"The {component}'s attention projections are fused, so that an adapter of {path} would be passed "
                    "by. Call pipe.unfuse_qkv_projections() first."
                )


def _check_shape(component: str, module: nn.Module, name: str, shape: tuple[int, ...], is_lora: bool) -> None:
    parameter = parameter_of(module, name)
    if parameter is None:
        raise ValueError(f"The identity changes {component}.{name}, which this model doesn't have.")
    owner = module.get_submodule(name.rpartition(".")[0])
    owner = owner.get_base_layer() if isinstance(owner, BaseTunerLayer) else owner
    is_linear = isinstance(owner, nn.Linear)
    if is_lora and not is_linear and not isinstance(owner, nn.Conv2d):
        raise ValueError(
            f"The identity has a LoRA of {component}.{name}, and that layer is {type(owner).__name__} here, neither "
            "linear nor a convolution: it was fitted to another model."
        )
    # a weight that quantisation has packed: what it stands for
    packed = is_linear and name.endswith(".weight")
    present = (owner.out_features, owner.in_features) if packed else tuple(parameter.shape)
    if present != shape:
        raise ValueError(f"The identity's {component}.{name} is {shape}; the model's is {present}.")
    if not is_lora and not parameter.is_floating_point():
        raise ValueError(
            f"The identity changes {component}.{name} as a whole, and it is quantised here. Load the model without "
            "quantisation, or fit the identity with method='lora'."
        )
