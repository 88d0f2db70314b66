"""Scores of an edited picture against the drawn truth."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from ...avatars.creatures import NUM_LAYOUTS
from ...avatars.world import Creature, Subject, changed_pixels, render_array
from ..metrics.classifier import AttributeClassifier, to_tensor
from ..metrics.counterfactual import CounterfactualEdit
from ..metrics.pixels import psnr, ssim

PSNR_CEILING = 60.0
"""Equal pictures are infinitely near; in means they count as this many dB."""


@torch.no_grad()
def feature_distance(classifier: AttributeClassifier, a: np.ndarray, b: np.ndarray) -> float:
    """LPIPS as Zhang et al. (2018) define it, but for its network and its learned weights: 0 for equal pictures.

    The maps of the attribute classifier's four convolutions stand for VGG's, and every channel counts 1. So it has to
    be compared with itself alone.

    Args:
        classifier: in eval mode.
        a, b: (128, 128, 3) uint8.
    """
    device = next(classifier.parameters()).device
    total = 0.0
    for maps in classifier.feature_maps(to_tensor(np.stack([a, b])).to(device)):
        # eq. (1): unit length over the channels, squared difference, mean over space, sum over layers
        unit = maps / maps.norm(dim=1, keepdim=True).clamp(min=1e-10)
        total += float((unit[0] - unit[1]).square().sum(0).mean())
    return total


def identity_regions(subject: Subject, target: Subject) -> dict[str, np.ndarray]:
    """What no caption says of ``subject`` -> (128, 128) bool, the pixels that tell it and that the edit to ``target``
    leaves alone; what has no such pixel is left out.

    Where a trait lies is where the picture changes with it.
    """
    others = _other_creature(subject) if isinstance(subject, Creature) else _other_person(subject)
    unchanged = ~changed_pixels(subject, target)
    regions = {
        name: changed_pixels(subject, replace(subject, **{name: value})) & unchanged  # type: ignore[type-var]
        for name, value in others.items()
        if value != getattr(subject, name)
    }
    return {name: region for name, region in regions.items() if region.any()}


def _other_person(person: Subject) -> dict[str, Any]:
    skin, other = "#614335", "#ffdbb4"
    return {
        "skin": other if getattr(person, "skin") == skin else skin,  # noqa: B009
        "mark": "none",
        "print": "none",
        **{f"{part}_shade": 0 for part in ("hair", "headwear", "clothes")},
    }


def _other_creature(creature: Creature) -> dict[str, Any]:
    return {
        "eyes": "#ffffff",
        "mark": "none",
        "layout": (creature.layout + 1) % NUM_LAYOUTS,
        **{f"{part}_shade": 0 for part in ("fur", "headwear")},
    }


def identity_distance(edit: CounterfactualEdit, picture: np.ndarray, truth: np.ndarray) -> float | None:
    """Colour difference ΔE (CIEDE2000) to the truth where identity lies, or None where the picture shows none.

    The mean over traits (:func:`identity_regions`) of the mean over their pixels: a mole counts as much as a shirt.

    Raises:
        ImportError: scikit-image isn't there: ``pip install "s2edit-pipeline[evaluation]"``.
    """
    try:
        from skimage.color import deltaE_ciede2000, rgb2lab
    except ImportError as error:
        raise ImportError('identity_distance needs scikit-image: pip install "s2edit-pipeline[evaluation]".') from error
    regions = identity_regions(edit.subject, edit.target)
    if not regions:
        return None
    difference = deltaE_ciede2000(rgb2lab(picture), rgb2lab(truth))
    return float(np.mean([difference[region].mean() for region in regions.values()]))


@dataclass(frozen=True)
class Score:
    """One edited picture against its truth.

    Attributes:
        psnr, ssim, feature_distance: over the whole picture.
        inside, outside: PSNR in dB over the pixels that truly change, and over the others, where source and truth
            agree.
        identity: see :func:`identity_distance`.
        aligned: share of the changed attributes that the classifier reads as asked for.
        agreement: the same share of all attributes that the truth shows.
        done: whether all of the changed attributes are read as asked for.
        unchanged: whether the picture is nearer to the source than to the truth where they differ.
    """

    psnr: float
    ssim: float
    feature_distance: float
    inside: float
    outside: float
    identity: float | None
    aligned: float
    agreement: float
    done: bool
    unchanged: bool


def score_edit(edit: CounterfactualEdit, edited: Image.Image, classifier: AttributeClassifier) -> Score:
    """Score ``edited``, a picture of the size of the truth, with the classifier for its kind of subject.

    Raises:
        ValueError: the sizes differ.
    """
    picture, truth, source = np.array(edited.convert("RGB")), render_array(edit.target), render_array(edit.subject)
    changed = changed_pixels(edit.subject, edit.target)

    def near(other: np.ndarray, region: np.ndarray | None = None) -> float:
        return min(psnr(picture, other, region), PSNR_CEILING)

    whole = near(truth)
    (predicted,) = classifier.predict(picture[None])
    hits = {name: value == getattr(edit.target, name) for name, value in predicted.items() if edit.target.shows(name)}
    requested = [hit for name, hit in hits.items() if _is_requested(edit, name)]
    return Score(
        psnr=whole,
        ssim=ssim(picture, truth),
        feature_distance=feature_distance(classifier, picture, truth),
        inside=near(truth, changed),
        outside=near(truth, ~changed) if not changed.all() else PSNR_CEILING,
        identity=identity_distance(edit, picture, truth),
        aligned=float(np.mean(requested)),
        agreement=float(np.mean(list(hits.values()))),
        done=all(requested),
        unchanged=near(source, changed) > near(truth, changed),
    )


def _is_requested(edit: CounterfactualEdit, name: str) -> bool:
    """Whether the edit asks for this attribute; what is new in the picture counts too: a hat's colour with the hat."""
    return not edit.subject.shows(name) or getattr(edit.subject, name) != getattr(edit.target, name)
