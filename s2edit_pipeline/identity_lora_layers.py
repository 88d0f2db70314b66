"""A layer with identities' LoRAs in it, beside a user's own: PEFT's layers, made for many layers at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.overrides import TorchFunctionMode


class LayerPlace:
    """Where a layer is: under ``child`` of ``parent``, perhaps behind tuners' wrappers."""

    def __init__(self, parent: nn.Module, child: str) -> None:
        self.parent, self.child = parent, child

    @classmethod
    def of(cls, module: nn.Module, path: str) -> LayerPlace:
        """That of ``module``'s layer ``path``."""
        parent, _, child = path.rpartition(".")
        return cls(module.get_submodule(parent), child)

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
        """Whether the wrapper is where it was put, perhaps inside others, with all our adapters in it."""
        is_there = any(module is self.wrapper for module in LayerPlace(self.parent, self.child).chain())
        return is_there and all(name in self.wrapper.lora_A for name in self.scalings)

    def is_settled(self) -> bool:
        """Whether nothing is to be done; asked of every layer before every call, so without PEFT's properties."""
        wrapper: Any = self.wrapper
        present: Any = self.parent._modules.get(self.child)
        if present is not wrapper or wrapper._disable_adapters or wrapper.merged_adapters:
            return False
        active = wrapper._active_adapter
        if isinstance(active, str) or (self.paused is not None and len(active) > len(self.scalings)):
            return False
        downs = wrapper._modules["lora_A"]._modules
        for name, scaling in self.scalings.items():
            down = downs.get(name)
            if down is None or name not in active or wrapper.scaling.get(name) != scaling:
                return False
            if down._parameters["weight"].requires_grad:
                return False
        return True

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
    """PEFT's layer around each of ``bases``, which are ``module``'s; these and what is around them are not touched.

    Of layers that are alike PEFT makes one, and the others are its twins: it takes PEFT 3 ms to make one.
    """
    alike: dict[Any, nn.Module] = {}
    kinds = [_kind(base) for base in bases]
    for kind, base in zip(kinds, bases, strict=True):
        alike.setdefault(kind, base)
    holder = nn.ModuleList(alike.values())
    for flag in ("is_loaded_in_8bit", "is_loaded_in_4bit", "hf_quantizer"):  # by which PEFT chooses its layers
        if hasattr(module, flag):
            setattr(holder, flag, getattr(module, flag))
    required = [(parameter, parameter.requires_grad) for base in alike.values() for parameter in base.parameters()]
    config = LoraConfig(r=1, lora_alpha=1, target_modules=r"\d+", init_lora_weights=False, inference_mode=True)
    try:
        with _Uninitialised():
            inject_adapter_in_model(config, holder, adapter_name=peft_name)
    finally:
        for parameter, requires in required:
            parameter.requires_grad = requires
    models = dict(zip(alike, holder, strict=True))
    layers = []
    for kind, base in zip(kinds, bases, strict=True):
        layer = models[kind] if base is alike[kind] else _twin(models[kind], base)
        layers.append(layer.train(base.training))
    return layers


def _kind(layer: nn.Module) -> Any:
    """The same for layers that PEFT makes the same of."""
    weight = layer.weight
    if type(layer) is nn.Linear:
        return nn.Linear, weight.shape, weight.dtype, weight.device, layer.bias is None
    if type(layer) is nn.Conv2d:
        geometry = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode)
        return nn.Conv2d, weight.shape, weight.dtype, weight.device, layer.bias is None, geometry
    return id(layer)


def _twin(module: nn.Module, base: nn.Module) -> nn.Module:
    """A copy of PEFT's layer ``module`` around ``base``; parameters are shared until they are set."""
    twin = type(module).__new__(type(module))
    containers = (dict, list, set)
    vars(twin).update({n: v.copy() if isinstance(v, containers) else v for n, v in vars(module).items()})
    for name, child in module._modules.items():
        if child is not None:
            twin._modules[name] = base if name == "base_layer" else _twin(child, base)
    return twin
