"""IP-Adapter (Ye et al. 2023) on a U-Net: pictures beside the words.

Where a row of a batch is shown no picture, the adapter's part of the attention is multiplied by 0 there: that row is,
to the bit, as without the adapter. So inversions and source branches are the bare model's, whatever is loaded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .prompt_embeds import PicturePrompt, ShownPicture


def loaded_adapters(denoiser: nn.Module) -> list[nn.Module]:
    """The IP-Adapters in ``denoiser``: the layer of each that makes tokens of an encoded picture."""
    unet: Any = getattr(denoiser, "_orig_mod", denoiser)
    if getattr(unet.config, "encoder_hid_dim_type", None) != "ip_image_proj" or unet.encoder_hid_proj is None:
        return []
    return list(unet.encoder_hid_proj.image_projection_layers)


def encode_pictures(family: Any, shown: ShownPicture, *, guided: bool) -> tuple[PicturePrompt, PicturePrompt]:
    """What the prompts' rows are shown, and the unconditional ones: one row each.

    Raises:
        ValueError: the adapters can't be shown this.
    """
    adapters = loaded_adapters(family.pipe.unet)
    if (shown.image is None) == (shown.embeds is None):
        raise ValueError("Pass ip_adapter_image= or ip_adapter_image_embeds=, one of them.")
    if shown.embeds is not None and len(shown.embeds) != len(adapters):
        raise ValueError(
            f"ip_adapter_image_embeds lists {len(shown.embeds)} for {len(adapters)} IP-Adapters; give one tensor each."
        )
    if shown.masks is not None and len(shown.masks) != len(adapters):
        raise ValueError(f"ip_adapter_masks lists {len(shown.masks)} for {len(adapters)} IP-Adapters; give one each.")
    for adapter in adapters:
        if hasattr(adapter, "clip_embeds"):
            raise ValueError(
                f"{type(adapter).__name__} is shown two pictures at once, which serves drawing alone, without image=. "
                "An edit takes the other IP-Adapters."
            )
    if shown.embeds is not None and guided and any(len(one) % 2 for one in shown.embeds):
        raise ValueError(
            "ip_adapter_image_embeds must hold the unconditional pictures' rows before the others, as "
            "prepare_ip_adapter_image_embeds makes them: with guidance_scale above 1 both are needed."
        )
    with torch.no_grad():
        embeds = family.stock().prepare_ip_adapter_image_embeds(shown.image, shown.embeds, family.device, 1, guided)
    if shown.masks is None and any(one.shape[1] > 1 for one in embeds):
        raise ValueError(
            "An edit shows each IP-Adapter one picture, or several with a mask each: "
            "cross_attention_kwargs={'ip_adapter_masks': ...}."
        )
    halves = [one.chunk(2) if guided else (torch.zeros_like(one), one) for one in embeds]
    masks = None if shown.masks is None else tuple(mask.to(family.device) for mask in shown.masks)
    negative, positive = (
        PicturePrompt(tuple(pair[i].to(family.dtype) for pair in halves), (True,), masks) for i in (0, 1)
    )
    return positive, negative


def denoiser_arguments(unet: nn.Module, picture: PicturePrompt | None, x: torch.Tensor) -> tuple[Any, Any]:
    """``image_embeds`` and ``ip_adapter_masks`` for latents ``x`` (B, C, h, w); None where there is nothing to say."""
    adapters = loaded_adapters(unet)
    if not adapters:
        return None, None
    if picture is None:
        picture = PicturePrompt(tuple(_nothing(adapter, x) for adapter in adapters), (False,) * len(x))
    embeds = [one.to(x.device) for one in picture.embeds]
    if all(picture.shown):
        return embeds, None if picture.masks is None else list(picture.masks)
    rows = torch.tensor(picture.shown, device=x.device)[:, None, None, None]
    masks = picture.masks or [x.new_ones(1, one.shape[1], *x.shape[-2:]) for one in embeds]
    return embeds, [mask.to(x) * rows for mask in masks]


def _nothing(adapter: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A picture that stands for none, (B, 1, ...), as large as ``adapter`` reads: its first layer's width."""
    width = next(layer.in_features for layer in adapter.modules() if isinstance(layer, nn.Linear))
    dtype = next(adapter.parameters()).dtype
    return torch.zeros(len(x), 1, *_sequence(adapter), width, dtype=dtype, device=x.device)


def _sequence(adapter: nn.Module) -> tuple[int, ...]:
    """Resamplers read a picture's patches, one is enough here; the others its summary."""
    return (1,) if hasattr(adapter, "latents") or type(adapter).__name__ == "IPAdapterFullImageProjection" else ()
