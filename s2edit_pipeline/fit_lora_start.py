"""Where a LoRA's first matrices point before its first step (LoRA-GA, Wang et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from .fit_weights import frozen, lora_layers
from .identity_compression import leading_triples
from .packed_weights import is_packed

ROW_LENGTH = 3**-0.5
"""What PEFT's own rows have in the mean: entries uniform within 1 / sqrt(in)."""


def start_along_gradient(components: Mapping[str, nn.Module], backwards: Sequence[Callable[[], None]]) -> bool:
    """Turn each A to where the loss falls fastest, and leave every B at 0, so that the model is still the base model.

    ``G`` (out, in) be the loss's gradient by a layer's weight, a convolution's as (out, in * kh * kw). With B = 0 a
    step moves the weight by ``dB A``, and ``dB`` follows ``G A^T``. So of all A of r rows those that span the right
    singular vectors of G's r largest singular values have most of G within reach (section 3.2 there; B = 0, with which
    the weight needs no offset, is ours). PEFT's random rows have r / in of it in the mean.

    Layers whose weights quantisation has packed, which no gradient reaches, keep PEFT's rows.

    A layer's gradient is looked at, and let go, as soon as it is whole; with one of ``backwards`` no two are ever held.

    Args:
        components: with PEFT's adapters in place, untrained.
        backwards: each adds its part of the loss's gradient to the parameters that require one.

    Returns:
        Whether every gradient was finite; where one wasn't, A is left as it was.
    """
    layers = [one for one in lora_layers(components) if not is_packed(one.get_base_layer().weight)]
    weights = [layer.get_base_layer().weight for layer in layers]
    finite = []

    def turn(layer: LoraLayer) -> Callable[[torch.Tensor], None]:
        def take(weight: torch.Tensor) -> None:
            assert weight.grad is not None
            gradient, weight.grad = weight.grad.flatten(1).float(), None
            finite.append(bool(torch.isfinite(gradient).all()))
            if finite[-1]:
                (first,) = layer.lora_A.values()
                directions = leading_triples(gradient, len(first.weight))[2].mT
                # their signs are the SVD's whim; fixed, the same picture is fitted alike on other machines
                directions = directions * directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()
                # a layer may have fewer directions than A has rows: those beyond stay random
                first.weight.data[: len(directions)] = ROW_LENGTH * directions.unflatten(1, first.weight.shape[1:])

        return take

    hooks = []
    with frozen(components):
        for weight in weights:
            weight.requires_grad_(True)
            weight.grad = None
        *others, last = backwards
        for backward in others:
            backward()
        try:
            for layer, weight in zip(layers, weights, strict=True):
                hooks.append(weight.register_post_accumulate_grad_hook(turn(layer)))
            last()
        finally:
            for hook in hooks:
                hook.remove()
    return all(finite)
