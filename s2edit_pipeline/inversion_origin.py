"""What an inversion was made with, so that it is never walked back with something else."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from .family_base import ModelFamily
from .identity_fingerprint import fingerprint, is_same_base
from .identity_overlay import IdentityOverlay
from .inversion_record import Inversion, MadeWith
from .noise_schedule import NoiseSchedule
from .offloaded_weights import stored, unreadable
from .picture_files import SourcePicture


def made_with(family: ModelFamily, overlay: IdentityOverlay, schedule: NoiseSchedule) -> MadeWith:
    """What the model's answers depend on now, besides what goes in."""
    components = family.tuned_components
    return MadeWith(
        schedule=schedule.signature,
        family=family.name,
        weights={name: fingerprint(module, overlay.originals(name)) for name, module in components.items()},
        loras=active_loras(components, overlay),
        identities={token: overlay.state(token) for token in overlay.identities},
    )


def active_loras(components: Mapping[str, nn.Module], overlay: IdentityOverlay) -> str:
    """The user's own LoRAs that are at work: names, strengths and a digest of their weights; "" without any."""
    ours, states = overlay.adapter_names, []
    for component, module in components.items():
        sums: dict[str, list[float]] = {}
        for layer in module.modules():
            if not isinstance(layer, LoraLayer) or layer.disable_adapters:
                continue
            for name in layer.active_adapters:
                if name not in ours and name in layer.lora_A:
                    weights = (stored(part[name], "weight") for part in (layer.lora_A, layer.lora_B))
                    sums.setdefault(name, []).extend([layer.scaling[name], *map(_summary, weights)])
        states += [f"{name} in {component} ({_digest(numbers)})" for name, numbers in sorted(sums.items())]
    return ", ".join(states)


@torch.no_grad()
def _summary(weight: torch.Tensor | None) -> float:
    if weight is None or weight.is_meta:
        return math.nan
    flat = weight.detach().double().flatten()
    return float((flat * torch.linspace(1, 2, len(flat), dtype=torch.float64, device=flat.device)).sum())


def _digest(numbers: list[float]) -> str:
    return hashlib.sha256(" ".join(f"{number:.9g}" for number in numbers).encode()).hexdigest()[:8]


def difference(
    inversion: Inversion, family: ModelFamily, overlay: IdentityOverlay, schedule: NoiseSchedule
) -> str | None:
    """What ``inversion`` was made with that is another now, as a sentence without its end; None where nothing is."""
    before = inversion.made_with
    states = {token: overlay.state(token) for token in overlay.identities}
    for token, state in before.identities.items():
        if states.get(token) != state:
            loaded = "another identity, scale or mask is" if token in states else "it isn't"
            return f"The inversion was made with the identity {token!r}, and {loaded} loaded under that name"
    for token in states:
        if token not in before.identities:
            return f"The inversion was made without the identity {token!r}, which is loaded now"
    components = family.tuned_components
    if before.family != family.name or before.weights.keys() != components.keys():
        return f"The inversion was made with another model ({before.family or 'unknown'})"
    for name, module in components.items():
        if not _is_same(before.weights[name], module, overlay.originals(name)):
            return f"The inversion was made with other weights of the {name}"
    loras = active_loras(components, overlay)
    if before.loras != loras:
        return f"The inversion was made with the LoRAs {before.loras or 'none'}, and active are {loras or 'none'}"
    if before.schedule != schedule.signature:
        return "The inversion was made with another scheduler, or other settings of it: its noise levels differ"
    return None


def _is_same(wanted: Any, module: nn.Module, originals: Mapping[str, torch.Tensor]) -> bool:
    """Weights that can't be read where they are offloaded are taken for the same."""
    if wanted is None or unreadable(module):
        return True
    return is_same_base(wanted, module, originals)


def check_inversion(
    inversion: Any,
    family: ModelFamily,
    overlay: IdentityOverlay,
    schedule: NoiseSchedule,
    source: SourcePicture | None,
) -> None:
    """Raises:
    ValueError: ``inversion`` was made with another model, scheduler, LoRA or identity, or of another picture, than an
        edit would use now.
    """
    again = "invert again: pipe.invert(image, prompt)"
    differs = difference(inversion, family, overlay, schedule)
    if differs is not None:
        raise ValueError(f"{differs}. Bring back what was there, or {again}.")
    if source is not None and inversion.picture_digest != source.digest:
        raise ValueError(f"The inversion was made of another picture than image=; pass that one, or {again}.")
    channels = inversion.trajectory.shape[1]
    if channels != family.latent_channels:
        raise ValueError(
            f"The inversion has {channels} latent channels, this model {family.latent_channels}: it was made with "
            f"another model. Load that one, or {again}."
        )
