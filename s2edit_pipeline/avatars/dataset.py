"""Training pictures, rendered once and kept as arrays beside the masks of their parts."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from .world import IMAGE_SIZE, PARTS, Subject, part_masks, render_array, sample

MASK_SIZE = 16
"""Side of the stored part masks: that of the latents."""


@dataclass(frozen=True)
class PictureSet:
    """Pictures of ``subjects``: ``images`` (N, 128, 128, 3) uint8, ``masks`` (N, parts, 16, 16) uint8
    or None, each mask the share (0 to 255) of a cell that the part covers, in the order of ``PARTS``."""

    subjects: list[Subject]
    images: np.ndarray
    masks: np.ndarray | None

    def __add__(self, other: PictureSet) -> PictureSet:
        """Both, one after the other; with masks where both have them."""
        masks = None
        if self.masks is not None and other.masks is not None:
            masks = np.concatenate([self.masks, other.masks])
        return PictureSet(self.subjects + other.subjects, np.concatenate([self.images, other.images]), masks)


def _draw(job: tuple[str, int, str, bool]) -> tuple[np.ndarray, np.ndarray | None]:
    kind, seed, split, with_masks = job
    subject = sample(kind, seed, split)
    image = render_array(subject)
    if not with_masks:
        return image, None
    size, cell = 4 * MASK_SIZE, 4
    masks = np.zeros((len(PARTS), MASK_SIZE, MASK_SIZE), np.uint8)
    for name, mask in part_masks(subject, size).items():
        share = mask.reshape(MASK_SIZE, cell, MASK_SIZE, cell).mean((1, 3))
        masks[PARTS.index(name)] = np.round(255 * share)
    return image, masks


def load_pictures(
    count: int,
    split: str = "train",
    *,
    kind: str = "person",
    masks: bool = False,
    cache: str | Path | None = None,
    first: int = 0,
) -> PictureSet:
    """Pictures ``first`` to ``first + count - 1`` of a kind and split, drawn on all cores, cached in ``cache``."""
    subjects = [sample(kind, seed, split) for seed in range(first, first + count)]
    folder = None if cache is None else Path(cache)
    stem = f"{kind}-{split}-{first}-{count}-{IMAGE_SIZE}"
    if folder is not None:
        images_file, masks_file = folder / f"{stem}-images.npy", folder / f"{stem}-masks.npy"
        if images_file.exists() and (not masks or masks_file.exists()):
            return PictureSet(subjects, np.load(images_file), np.load(masks_file) if masks else None)
    jobs = [(kind, seed, split, masks) for seed in range(first, first + count)]
    images = np.empty((count, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    parts = np.empty((count, len(PARTS), MASK_SIZE, MASK_SIZE), np.uint8) if masks else None

    def keep(results: Iterable[tuple[np.ndarray, np.ndarray | None]]) -> None:
        for i, (image, mask) in enumerate(tqdm(results, total=count, desc=f"drawing {split} pictures", leave=False)):
            images[i] = image
            if parts is not None:
                parts[i] = mask

    if count < 64:  # not worth a process
        keep(map(_draw, jobs))
    else:
        with multiprocessing.get_context("spawn").Pool() as pool:
            keep(pool.imap(_draw, jobs, chunksize=16))
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        np.save(images_file, images)
        if parts is not None:
            np.save(masks_file, parts)
    return PictureSet(subjects, images, parts)
