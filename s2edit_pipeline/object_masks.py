"""Attention maps to object masks, and to the region an edit may change."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

MASK_THRESHOLD = 0.4
"""How far a map must rise from its smallest to its largest value for a cell to be the object's."""


def gaussian_smooth(values: torch.Tensor, sigma: float) -> torch.Tensor:
    """(H, W) blurred by a Gaussian of ``sigma`` cells, edges repeated."""
    radius = max(1, round(3 * sigma))
    x = torch.arange(-radius, radius + 1, device=values.device, dtype=values.dtype)
    kernel = torch.exp(-0.5 * (x / sigma) ** 2)
    kernel = kernel / kernel.sum()
    padded = F.pad(values[None, None], (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))[0, 0]


def largest_component(mask: torch.Tensor) -> torch.Tensor:
    """(H, W) bool: the largest 4-connected region of ``mask``."""
    cells = mask.cpu().numpy()
    labels = np.zeros(cells.shape, np.int64)
    best, best_size, label = 0, 0, 0
    for start in zip(*np.nonzero(cells), strict=True):
        if labels[start]:
            continue
        label += 1
        labels[start] = label
        stack, size = [start], 0
        while stack:
            y, x = stack.pop()
            size += 1
            for ny, nx in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                inside = 0 <= ny < cells.shape[0] and 0 <= nx < cells.shape[1]
                if inside and cells[ny, nx] and not labels[ny, nx]:
                    labels[ny, nx] = label
                    stack.append((ny, nx))
        if size > best_size:
            best, best_size = label, size
    return torch.from_numpy((labels == best) & cells).to(mask.device)


def threshold_map(attention: torch.Tensor, threshold: float, sigma: float = 0.7) -> torch.Tensor:
    """S2Edit's ``M_obj`` from a word's averaged map: normalised, smoothed, thresholded, largest component kept.

    Args:
        attention: (H, W), any scale.
        threshold: in (0, 1), of the way from the map's smallest to its largest value.
        sigma: of the smoothing, in cells.

    Returns:
        (H, W) float32 of 0 and 1.

    Raises:
        ValueError: the map is the same everywhere, so the word looks nowhere.
    """
    smooth = gaussian_smooth(attention.float(), sigma)
    low, high = smooth.min(), smooth.max()
    if not bool(high > low):
        raise ValueError("The word's attention is the same everywhere: no object can be found. Pass mask= yourself.")
    return largest_component((smooth - low) / (high - low) >= threshold).float()


def edit_region(word_maps: Sequence[torch.Tensor], threshold: float) -> torch.Tensor:
    """Where an edit may change the picture: prompt-to-prompt's local blend mask (Hertz et al. 2022, section 3.2).

    Each word's (h, w) map is spread by one cell, divided by its largest value and thresholded; the region
    is the union over words.

    Returns:
        (h, w) float32 of 0 and 1.
    """
    region = torch.zeros_like(word_maps[0])
    for attention in word_maps:
        spread = F.max_pool2d(attention[None, None], 3, stride=1, padding=1)[0, 0]
        region = torch.maximum(region, ((spread >= threshold * spread.max()) & (spread > 0)).to(region))
    return region


def changed_cells(edited: torch.Tensor, source: torch.Tensor, threshold: float) -> torch.Tensor:
    """(h, w) of 0 and 1: the cells of ``edited`` (C, h, w) that differ from ``source`` by at least the share
    ``threshold`` of the most that any does. An edit changes some cells much; a drift of the tone many a little."""
    change = (edited - source).square().mean(0).sqrt()
    return (change >= threshold * change.max()).to(edited)


def mask_to_picture(mask: torch.Tensor, size: tuple[int, int]) -> Image.Image:
    """A (h, w) mask in [0, 1] as a PIL "L" picture of ``size`` (width, height), its border smooth."""
    picture = Image.fromarray((mask.float().cpu().numpy() * 255).round().astype(np.uint8))
    if picture.size == size:
        return picture
    return picture.resize(size, Image.Resampling.BICUBIC).point(lambda value: 255 if value > 127 else 0)
