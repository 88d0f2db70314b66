"""What a fit trains, and that it is put back: contexts around the model's own modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from .identity_lora_names import lora_metadata, published_name
from .prompt_tokens import embedding_table


@dataclass(frozen=True)
class TunedWeights:
    """What is trained.

    Attributes:
        parameters: to train.
        harvest: returns weights and LoRA metadata as in ``IdentityAdapter``.
        untuned: within it the model is, to the bit, as before the fit; what is trained stands aside.
    """

    parameters: list[nn.Parameter]
    harvest: Callable[[], tuple[dict[str, torch.Tensor], dict[str, Any]]]
    untuned: Callable[[], AbstractContextManager[None]]


@contextmanager
def frozen(components: Mapping[str, nn.Module]) -> Iterator[None]:
    """No parameter asks for a gradient; afterwards each is as before, its accumulated ``grad`` included."""
    parameters = [(p, p.requires_grad, p.grad) for module in components.values() for p in module.parameters()]
    modes = [(m, m.training) for module in components.values() for m in module.modules()]
    for module in components.values():
        module.requires_grad_(False)
        module.eval()
    try:
        yield
    finally:
        for parameter, required, gradient in parameters:
            parameter.requires_grad_(required)
            parameter.grad = gradient
        for submodule, mode in modes:
            submodule.training = mode


@contextmanager
def full_weights(components: Mapping[str, nn.Module]) -> Iterator[TunedWeights]:
    """All weights of ``components``, trained as float32 copies; the original tensors are put back, not written to."""
    tables = [embedding_table(module).weight for name, module in components.items() if name.startswith("text_encoder")]
    tuned = [
        (published_name(name, inner), p, p.data)
        for name, module in components.items()
        for inner, p in module.named_parameters()
        if not any(p is table for table in tables)  # [I]'s own row is trained; the words' rows stay
    ]
    words = [table.data for table in tables]

    def harvest() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        return {name: (p.data - original.float()).cpu() for name, p, original in tuned}, {}

    originals = [*((p, original) for _, p, original in tuned), *zip(tables, words, strict=True)]

    @contextmanager
    def untuned() -> Iterator[None]:
        trained = [parameter.data for parameter, _ in originals]
        try:
            for parameter, original in originals:
                parameter.data = original
            yield
        finally:
            for (parameter, _), data in zip(originals, trained, strict=True):
                parameter.data = data

    try:
        for _, parameter, original in tuned:
            parameter.data = original.to(torch.float32, copy=True)
            parameter.requires_grad_(True)
        for table in tables:
            table.data = table.data.float()
        yield TunedWeights([p for _, p, _ in tuned], harvest, untuned)
    finally:
        for table, original in zip(tables, words, strict=True):
            table.data = original
        for _, parameter, original in tuned:
            parameter.data = original


@contextmanager
def lora_weights(
    components: Mapping[str, nn.Module], targets: Mapping[str, list[str]], rank: int, seed: int
) -> Iterator[TunedWeights]:
    """PEFT's LoRA in the layers ``targets`` of ``components``; afterwards the very modules that were there are back.

    What is harvested is float16, the form in which it is saved: the rounding is far below what a step moves.
    """
    adapter = "s2edit_fit"
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    attached: list[tuple[nn.Module, str]] = []
    configs = {name: peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets[name]) for name in components}

    def harvest() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        weights: dict[str, torch.Tensor] = {}
        metadata: dict[str, Any] = {}
        for name, module in components.items():
            state = peft.get_peft_model_state_dict(module, adapter_name=adapter, save_embedding_layers=False)
            weights |= {published_name(name, key): value.detach().half().cpu() for key, value in state.items()}
            facts = lora_metadata(rank, targets[name])
            metadata |= {f"{name}.{key}": value for key, value in facts.items()}
        return weights, metadata

    try:
        for name, module in components.items():
            replaced += [(p, n, c) for p in module.modules() for n, c in p.named_children()]
            attributes = set(vars(module))
            # on the meta device: PEFT would draw from the process's generator, which other threads use
            peft.inject_adapter_in_model(configs[name], module, adapter_name=adapter, low_cpu_mem_usage=True)
            attached += [(module, added) for added in set(vars(module)) - attributes]  # peft_config and the like
        _start(components, adapter, torch.Generator().manual_seed(seed))
        parameters = [p for m in components.values() for n, p in m.named_parameters() if f".{adapter}." in n]
        yield TunedWeights(parameters, harvest, partial(_switched_off, lora_layers(components)))
    finally:
        for parent, child_name, child in replaced:
            if getattr(parent, child_name) is not child:
                setattr(parent, child_name, child)
        for module, added in attached:
            delattr(module, added)


def lora_layers(components: Mapping[str, nn.Module]) -> list[LoraLayer]:
    """All layers with adapters."""
    return [m for module in components.values() for m in module.modules() if isinstance(m, LoraLayer)]


@contextmanager
def _switched_off(layers: Sequence[LoraLayer]) -> Iterator[None]:
    """Without their adapters, which train on afterwards."""
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def _start(components: Mapping[str, nn.Module], adapter: str, generator: torch.Generator) -> None:
    """Factors in float32 where each layer is, as PEFT starts them: A uniform within 1 / sqrt(in), B zero."""
    for layer in lora_layers(components):
        device = layer.get_base_layer().weight.device
        down, up = layer.lora_A[adapter], layer.lora_B[adapter]
        first = nn.init.kaiming_uniform_(torch.empty(down.weight.shape), a=5**0.5, generator=generator)
        down.weight, up.weight = (
            nn.Parameter(first.to(device)),
            nn.Parameter(torch.zeros(up.weight.shape, device=device)),
        )


@contextmanager
def no_weights() -> Iterator[TunedWeights]:
    yield TunedWeights([], lambda: ({}, {}), nullcontext)


@contextmanager
def checkpointed(denoiser: Any) -> Iterator[None]:
    """``denoiser``'s activations are made again in the backward pass instead of kept (Chen et al. 2016); afterwards
    each block does as before."""
    names = ("gradient_checkpointing", "_gradient_checkpointing_func")
    before = [(m, {n: vars(m)[n] for n in names if n in vars(m)}) for m in denoiser.modules()]
    denoiser.enable_gradient_checkpointing()
    try:
        yield
    finally:
        for module, attributes in before:
            for name in names:
                vars(module).pop(name, None)
            vars(module).update(attributes)
