"""Distances that networks have learned, as papers report them on real pictures: FID and LPIPS as torchmetrics computes
them, and CLIP score by transformers' CLIP alone (torchmetrics' own can't yet read what transformers 5 returns).

They need no true picture: they compare the pictures before and after an edit. FID compares two sets of pictures; LPIPS
(a pair) and CLIP score (a picture and its prompt) are means. Each gives a number or raises an error that says what is
missing; none is left out in silence.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import cosine_similarity
from transformers import CLIPModel, CLIPProcessor

CLIP_MODEL = "openai/clip-vit-large-patch14"
_TORCHVISION = (
    "torchvision from where your torch came from, for the CPU build: pip install torchvision --index-url "
    "https://download.pytorch.org/whl/cpu (another build's doesn't load)"
)
_WEIGHTS = "With no network, put them into torch.hub.get_dir() + '/checkpoints', or copy that folder from a machine"

Made = TypeVar("Made")


def _tensors(pictures: Sequence[Image.Image], name: str) -> list[torch.Tensor]:
    """Each (1, 3, H, W) uint8."""
    if len(pictures) == 0:
        raise ValueError(f"{name} is empty: there is no picture to measure.")
    return [torch.from_numpy(np.array(one.convert("RGB"))).permute(2, 0, 1)[None] for one in pictures]


def _pairs(before: Sequence[Image.Image], after: Sequence[Image.Image]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    if len(before) != len(after):
        raise ValueError(f"before and after must hold as many pictures; they hold {len(before)} and {len(after)}.")
    pairs = list(zip(_tensors(before, "before"), _tensors(after, "after"), strict=True))
    for i, (a, b) in enumerate(pairs):
        if a.shape != b.shape:
            sizes = [f"{x.shape[3]} x {x.shape[2]}" for x in (a, b)]
            raise ValueError(f"Pair {i} differs in size: {' and '.join(sizes)}; resize one of the two.")
    return pairs


def _metric(module: str, name: str) -> Any:
    """torchmetrics' class ``name``."""
    try:
        return getattr(importlib.import_module(f"torchmetrics.{module}"), name)
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another build than torch's
        raise ImportError(
            f"{name} could not be imported: {error}. Install torchmetrics, "
            'pip install "s2edit-pipeline[metrics]"; if it is there, mend or remove torchvision and torch-fidelity: it '
            f"takes {_TORCHVISION}."
        ) from error


def _ready(make: Callable[[], Made], what: str, packages: str, weights: str) -> Made:
    """What ``make`` gives, or an error that says what to do."""
    try:
        return make()
    except ImportError as error:
        raise ImportError(f"{what} needs {packages}.") from error
    except OSError as error:  # URLError is one
        raise OSError(f"{what} could not get its network's weights: {error}. {weights}.") from error


def fid(before: Sequence[Image.Image], after: Sequence[Image.Image], *, features: nn.Module | None = None) -> float:
    """Fréchet inception distance (Heusel et al. 2017) of two sets, of at least 2 pictures each; lower is nearer.

    It says little below thousands of pictures: compare numbers of as many pictures alone.

    Args:
        features: from (1, 3, H, W) uint8 to (1, D) instead of Inception's 2048 numbers.

    Raises:
        ValueError: fewer than 2 pictures.
        ImportError, OSError: torchmetrics, torch-fidelity, torchvision or Inception's weights are missing.
    """
    if min(len(before), len(after)) < 2:
        raise ValueError(f"FID needs at least 2 pictures each; there are {len(before)} and {len(after)}.")
    cls = _metric("image.fid", "FrechetInceptionDistance")
    metric = _ready(
        lambda: cls(feature=2048 if features is None else features),
        "FID",
        f"torch-fidelity, pip install torch-fidelity, and {_TORCHVISION}",
        f"{_WEIGHTS} that has measured a FID once",
    )
    for pictures, name, real in ((before, "before", True), (after, "after", False)):
        for tensor in _tensors(pictures, name):
            metric.update(tensor, real=real)
    return float(metric.compute())


def lpips(before: Sequence[Image.Image], after: Sequence[Image.Image], *, network: str = "alex") -> float:
    """Learned perceptual distance (Zhang et al. 2018), mean over the pairs; 0 for equal pictures.

    Args:
        network: "alex", "vgg" or "squeeze".

    Raises:
        ValueError: other numbers or sizes of pictures.
        ImportError, OSError: torchmetrics, torchvision or the network's weights are missing.
    """
    pairs = _pairs(before, after)
    cls = _metric("image.lpip", "LearnedPerceptualImagePatchSimilarity")
    metric = _ready(
        lambda: cls(net_type=network, normalize=True),
        "LPIPS",
        _TORCHVISION,
        f"{_WEIGHTS} that has measured an LPIPS once",
    )
    with torch.no_grad():
        for a, b in pairs:
            metric.update(a / 255, b / 255)
    return float(metric.compute())


def clip_score(pictures: Sequence[Image.Image], prompts: Sequence[str], *, model: str = CLIP_MODEL) -> float:
    """100 times the cosine of a picture's and its prompt's CLIP embeddings, at least 0 (Hessel et al. 2021), mean.

    Args:
        model: a CLIP model on the Hub, or its folder.

    Raises:
        ValueError: another number of prompts than of pictures.
        OSError: the model is missing.
    """
    if len(pictures) != len(prompts):
        raise ValueError(f"There are {len(pictures)} pictures and {len(prompts)} prompts; give one for each.")
    if len(pictures) == 0:
        raise ValueError("pictures is empty: there is no picture to measure.")
    try:
        clip, processor = CLIPModel.from_pretrained(model).eval(), CLIPProcessor.from_pretrained(model)
    except OSError as error:
        raise OSError(
            f"CLIP score could not get its model: {error}. With no network, pass the folder of one: "
            "model='clip-vit-large-patch14/'."
        ) from error
    scores = []
    for picture, prompt in zip(pictures, prompts, strict=True):
        inputs = processor(text=[prompt], images=[picture.convert("RGB")], return_tensors="pt", truncation=True)
        with torch.no_grad():
            out = clip(**inputs)
        scores.append(100 * cosine_similarity(out.image_embeds, out.text_embeds).clamp(min=0))
    return float(torch.cat(scores).mean())
