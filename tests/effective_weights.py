"""What a model's weights amount to with adapters attached: PEFT's own products, added up."""

from __future__ import annotations

import torch
from peft.tuners.lora import LoraLayer
from torch import nn


@torch.no_grad()
def effective_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameter name without PEFT's additions -> its value, with the deltas of the active adapters."""
    weights = {
        name.replace(".base_layer.", "."): parameter.detach().clone()
        for name, parameter in module.named_parameters()
        if ".lora_" not in name
    }
    for name, layer in module.named_modules():
        if isinstance(layer, LoraLayer) and not layer.disable_adapters:
            for adapter in layer.active_adapters:
                if adapter in layer.lora_A:
                    weights[f"{name}.weight"] += layer.get_delta_weight(adapter)
    return weights
