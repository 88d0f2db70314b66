"""Offloaded weights: read where they are kept, brought together to be changed or trained, handed back as found.

diffusers knows three ways to offload: whole models (accelerate's ``CpuOffload``), single layers (its
``AlignDevicesHook``: between calls the parameters are on the meta device), and groups of layers (hooks of its own).
Its layerwise casting keeps weights in a smaller type between calls, such as float8.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import cpu_offload
from accelerate.hooks import (
    AlignDevicesHook,
    CpuOffload,
    ModelHook,
    SequentialHook,
    add_hook_to_module,
    remove_hook_from_module,
)
from diffusers.hooks import apply_group_offloading, layerwise_casting
from diffusers.hooks import group_offloading as groups
from torch import nn

_GROUP_HOOKS = (groups._GROUP_OFFLOADING, groups._LAYER_EXECUTION_TRACKER, groups._LAZY_PREFETCH_GROUP_OFFLOADING)


def stored(module: nn.Module, name: str) -> torch.Tensor | None:
    """``module``'s own parameter ``name``; where accelerate has offloaded it, the tensor that it keeps in its place.

    None where there is none.
    """
    parameter = module._parameters.get(name)
    if parameter is None or not parameter.is_meta:
        return parameter
    for hook in _hooks(module):
        if isinstance(hook, AlignDevicesHook) and hook.weights_map is not None:
            return hook.weights_map[name]
    return parameter


def is_offloaded(module: nn.Module) -> bool:
    """Whether ``module`` as a whole is moved about by accelerate or diffusers."""
    registry = getattr(module, "_diffusers_hook", None)
    return bool(_hooks(module)) or (registry is not None and registry.get_hook(groups._GROUP_OFFLOADING) is not None)


def computing_type(module: Any) -> torch.dtype:
    """The type that ``module`` works in: layerwise casting's own, else its weights'."""
    casts = (hook.compute_dtype for layer in module.modules() if (hook := _casting_hook(layer)) is not None)
    return next(casts, module.dtype)


def unreadable(module: nn.Module) -> bool:
    """Whether what ``module``'s parameters hold now isn't its weights: offloaded by a way that isn't known here."""
    config = _group_config(module)
    if config is not None and config.offload_to_disk_path is not None:
        return True  # the tensors that stand there are empty ones
    return any(
        tensor is not None and tensor.is_meta
        for layer in module.modules()
        for tensor in (stored(layer, name) for name in layer._parameters)
    )


def check_gathering(components: Mapping[str, nn.Module], *, to_train: bool) -> None:
    """Raises:
    ValueError: :func:`gathered` can't bring the weights of one of ``components`` together.
    """
    for name, module in components.items():
        _way(name, module, to_train)


@contextmanager
def gathered(
    components: Mapping[str, nn.Module], *, to_train: bool = False, neighbours: Iterable[nn.Module] = ()
) -> Iterator[None]:
    """Within the context the weights of ``components`` are their modules' own and can be changed; afterwards they are
    offloaded as before, what was attached meanwhile too.

    Args:
        to_train: they are also where the work is done, in the type that it is done in, and stay so: a backward pass
            needs the weights that the forward pass used.
        neighbours: the other modules that are offloaded with them, which would send them away.

    Raises:
        ValueError: they are offloaded in a way that isn't served; nothing has been changed then.
    """
    ways = [_way(name, module, to_train) for name, module in components.items()]
    with ExitStack() as back:
        if to_train:
            back.enter_context(_not_sent_away(components.values(), neighbours))
        for way in ways:
            back.enter_context(way)
        for module in components.values() if to_train else ():
            back.enter_context(_in_computing_type(module))
        yield


def _way(name: str, module: nn.Module, to_train: bool) -> AbstractContextManager[None]:
    """The context in which ``module``'s weights are there.

    Raises:
        ValueError: there is none.
    """
    config = _group_config(module)
    if config is not None and config.offload_to_disk_path is not None:
        raise ValueError(
            f"The {name} is offloaded to the disk by groups, and its weights can't be changed or trained there. Load "
            "the model again and call enable_group_offload(...) without offload_to_disk_path=."
        )
    if config is not None:
        return _without_groups(module, config, to_train)
    hooks = [hook for layer in module.modules() for hook in _hooks(layer)]
    if not hooks:
        return nullcontext()
    if len(hooks) == 1 and isinstance(hooks[0], CpuOffload) and module._hf_hook is hooks[0]:
        return _on_its_device(module, hooks[0]) if to_train else nullcontext()
    layers = [hook for hook in hooks if isinstance(hook, AlignDevicesHook) and hook.offload]
    others = [hook for hook in hooks if hook not in layers]
    in_memory = all(isinstance(getattr(hook.weights_map, "dataset", None), dict) for hook in layers)
    beside = all(isinstance(hook, AlignDevicesHook) and hook.execution_device is None for hook in others)
    if layers and in_memory and beside and len({str(hook.execution_device) for hook in layers}) == 1:
        return _without_layers(module, layers, to_train)
    if not to_train and not any(parameter.is_meta for parameter in module.parameters()):
        return nullcontext()
    kinds = ", ".join(sorted({type(hook).__name__ for hook in hooks}))
    raise ValueError(
        f"The weights of the {name} are offloaded or spread in a way that isn't served ({kinds}), and can't be changed "
        f"or trained. The {name} is offloaded so by disk_offload() or a device_map. Call pipe.reset_device_map() or "
        "pipe.remove_all_hooks() first; pipe.enable_model_cpu_offload(), pipe.enable_sequential_cpu_offload() and "
        "enable_group_offload() are served."
    )


def _hooks(module: nn.Module) -> list[ModelHook]:
    """accelerate's hooks of ``module`` itself."""
    hook: Any = getattr(module, "_hf_hook", None)
    if isinstance(hook, SequentialHook):
        return list(hook.hooks)
    return [] if hook is None else [hook]


def _group_config(module: nn.Module) -> Any:
    """How ``module`` is offloaded by groups, or None where it isn't."""
    for layer in module.modules():
        registry = getattr(layer, "_diffusers_hook", None)
        hook = None if registry is None else registry.get_hook(groups._GROUP_OFFLOADING)
        if hook is not None:
            return hook.config
    return None


@contextmanager
def _not_sent_away(components: Iterable[nn.Module], neighbours: Iterable[nn.Module]) -> Iterator[None]:
    """Before its own turn a model that is offloaded whole sends the one before it away; not so within the context,
    where that one is of ``components``."""
    kept = {id(module) for module in components}
    chained = [
        (hook, hook.prev_module_hook)
        for module in neighbours
        for hook in _hooks(module)
        if isinstance(hook, CpuOffload) and id(_unwrapped(getattr(hook.prev_module_hook, "model", None))) in kept
    ]
    try:
        for hook, _ in chained:
            hook.prev_module_hook = None
        yield
    finally:
        for hook, before in chained:
            hook.prev_module_hook = before


def _unwrapped(module: Any) -> Any:
    """What ``torch.compile`` wraps."""
    return getattr(module, "_orig_mod", module)


@contextmanager
def _on_its_device(module: nn.Module, hook: CpuOffload) -> Iterator[None]:
    remove_hook_from_module(module)
    try:
        module.to(hook.execution_device)
        yield
    finally:
        add_hook_to_module(module, hook)  # which sends it away again


@contextmanager
def _without_layers(module: nn.Module, hooks: list[AlignDevicesHook], to_train: bool) -> Iterator[None]:
    device, offload_buffers = hooks[0].execution_device, any(hook.offload_buffers for hook in hooks)
    remove_hook_from_module(module, recurse=True)
    try:
        if to_train:
            module.to(device)
        yield
    finally:
        if to_train:
            module.to("cpu")
        cpu_offload(module, device, offload_buffers=offload_buffers)


@contextmanager
def _in_computing_type(module: nn.Module) -> Iterator[None]:
    """Layerwise casting casts nothing within the context; what is cast back afterwards are the same numbers."""
    casts = [
        (layer, hook, hook.storage_dtype)
        for layer in module.modules()
        if (hook := _casting_hook(layer)) is not None and hook.storage_dtype != hook.compute_dtype
    ]
    try:
        for layer, hook, _ in casts:
            hook.storage_dtype = hook.compute_dtype
            layer.to(hook.compute_dtype)
        yield
    finally:
        for layer, hook, storage_dtype in casts:
            hook.storage_dtype = storage_dtype
            layer.to(storage_dtype)


def _casting_hook(layer: nn.Module) -> Any:
    registry: Any = getattr(layer, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook(layerwise_casting._LAYERWISE_CASTING_HOOK)


@contextmanager
def _without_groups(module: nn.Module, config: Any, to_train: bool) -> Iterator[None]:
    for layer in module.modules():
        registry: Any = getattr(layer, "_diffusers_hook", None)
        if registry is not None:
            for name in _GROUP_HOOKS:
                registry.remove_hook(name, recurse=False)
    try:
        module.to(config.onload_device if to_train else config.offload_device)
        yield
    finally:
        module.to(config.offload_device)
        apply_group_offloading(
            module,
            onload_device=config.onload_device,
            offload_device=config.offload_device,
            offload_type=config.offload_type,
            num_blocks_per_group=config.num_blocks_per_group,
            non_blocking=config.non_blocking,
            use_stream=config.stream is not None,
            record_stream=config.record_stream,
            low_cpu_mem_usage=config.low_cpu_mem_usage,
            block_modules=config.block_modules,
            exclude_kwargs=config.exclude_kwargs,
        )
