"""Training pictures as latents: drawn and encoded once, kept beside the masks of their parts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from tqdm.auto import tqdm

from .autoencoder_training import to_tensor
from .dataset import load_pictures
from .world import Subject, sample

CHUNK = 500
"""Pictures that one file holds."""


@dataclass(frozen=True)
class LatentSet:
    """Encoded pictures of ``subjects``: ``latents`` (N, C, 16, 16) as the encoder gives them, float16 or float32, and
    ``masks`` (N, parts, 16, 16) uint8 as those of a ``PictureSet``."""

    subjects: list[Subject]
    latents: torch.Tensor
    masks: np.ndarray

    def __add__(self, other: LatentSet) -> LatentSet:
        """Both, one after the other."""
        return LatentSet(
            self.subjects + other.subjects,
            torch.cat([self.latents, other.latents]),
            np.concatenate([self.masks, other.masks]),
        )


@torch.no_grad()
def _encode(vae: AutoencoderKL, images: np.ndarray, batch_size: int = 20) -> np.ndarray:
    """The latents' means of (N, H, W, 3) uint8 pictures, (N, C, H/8, W/8) float16."""
    batches = [to_tensor(images[i : i + batch_size]).to(vae.device) for i in range(0, len(images), batch_size)]
    latents: np.ndarray = torch.cat([vae.encode(x).latent_dist.mode() for x in batches]).half().cpu().numpy()
    return latents


def load_latents(
    vae: AutoencoderKL, count: int, cache: str | Path, *, kind: str = "person", split: str = "varied"
) -> LatentSet:
    """Subjects 0 to ``count - 1`` of a kind and split, encoded by ``vae``; what isn't in ``cache`` yet is drawn.

    Raises:
        ValueError: ``count`` is no multiple of :data:`CHUNK`, the pictures that one file holds.
    """
    if count % CHUNK:
        raise ValueError(f"{count} pictures don't fill files of {CHUNK}; ask for {CHUNK * round(count / CHUNK + 0.5)}.")
    folder = Path(cache)
    folder.mkdir(parents=True, exist_ok=True)
    latents, masks = [], []
    for first in tqdm(range(0, count, CHUNK), desc=f"encoding {split} pictures of the kind {kind}", leave=False):
        file = folder / f"{kind}-{split}-{first}-{CHUNK}.npz"
        if not file.exists():
            pictures = load_pictures(CHUNK, split, kind=kind, masks=True, first=first)
            assert pictures.masks is not None
            partial = file.with_suffix(".partial.npz")
            np.savez(partial, latents=_encode(vae, pictures.images), masks=pictures.masks)
            partial.replace(file)
        with np.load(file) as arrays:
            latents.append(torch.from_numpy(arrays["latents"]))
            masks.append(arrays["masks"])
    return LatentSet([sample(kind, seed, split) for seed in range(count)], torch.cat(latents), np.concatenate(masks))
