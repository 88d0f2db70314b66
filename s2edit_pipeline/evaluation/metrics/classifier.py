"""Which named attributes a picture of an avatar shows: a small network for each kind of subject.

It reads what captions can say and nothing else, so it grades a generated or edited picture by its words.
The weights that come with the package were trained by :mod:`.classifier_training`, with its defaults.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ...avatars.captions import Caption
from ...avatars.world import CREATURE_ATTRIBUTES, IMAGE_SIZE, PERSON_ATTRIBUTES, Subject

ATTRIBUTES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "person": PERSON_ATTRIBUTES,
    "creature": CREATURE_ATTRIBUTES,
}
"""Kind of subject -> what captions can name of it."""


def weights_file(kind: str) -> Path:
    """The weights for ``kind`` ("person" or "creature") that come with the package."""
    return Path(__file__).parent / "weights" / f"{kind}_classifier.safetensors"


_WIDTHS = (24, 48, 96, 128)
_READ_CHANNELS = 24  # of the last map, for the heads to read


class AttributeClassifier(nn.Module):
    """Strided convolutions of the given ``widths``, and a softmax for each of ``attributes``.

    The heads read the last map cell by cell: avatars are aligned, and where a colour is tells whose it is.

    Args:
        attributes: name -> the values it can take.
    """

    def __init__(
        self, attributes: Mapping[str, Sequence[str]] = PERSON_ATTRIBUTES, widths: Sequence[int] = _WIDTHS
    ) -> None:
        super().__init__()
        self.attributes = {name: tuple(values) for name, values in attributes.items()}
        self.widths = tuple(widths)
        layers: list[nn.Module] = []
        for before, after in zip((3, *self.widths[:-1]), self.widths, strict=True):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.SiLU()]
        self.features = nn.Sequential(*layers, nn.Conv2d(self.widths[-1], _READ_CHANNELS, 1), nn.SiLU(), nn.Flatten())
        cells = (IMAGE_SIZE // 2 ** len(self.widths)) ** 2
        self.heads = nn.ModuleDict(
            {name: nn.Linear(_READ_CHANNELS * cells, len(values)) for name, values in self.attributes.items()}
        )

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Pictures (N, 3, 128, 128) in [0, 1] to logits (N, number of values) for each attribute."""
        features = self.features(2 * x - 1)
        return {name: head(features) for name, head in self.heads.items()}

    def feature_maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Pictures (N, 3, H, W) in [0, 1] to the activations (N, C, h, w) of each strided convolution."""
        x, maps = 2 * x - 1, []
        for layer in list(self.features)[: 3 * len(self.widths)]:
            x = layer(x)
            if isinstance(layer, nn.SiLU):
                maps.append(x)
        return maps

    @torch.no_grad()
    def predict(self, images: np.ndarray, batch_size: int = 64) -> list[dict[str, str]]:
        """The most likely value of each named attribute, for each of (N, 128, 128, 3) uint8 pictures.

        Every attribute gets a value, also one that the picture hides; see ``Subject.shows``.

        Raises:
            ValueError: another shape or dtype.
        """
        if images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3) or images.dtype != np.uint8:
            raise ValueError(
                f"images must be (N, {IMAGE_SIZE}, {IMAGE_SIZE}, 3) uint8, not {images.shape} {images.dtype}; "
                "put one picture in a batch with picture[None]."
            )
        device, was_training = next(self.parameters()).device, self.training
        self.eval()
        try:
            predicted: list[dict[str, str]] = []
            for start in range(0, len(images), batch_size):
                logits = self(to_tensor(images[start : start + batch_size]).to(device))
                indices = {name: values.argmax(-1).tolist() for name, values in logits.items()}
                for row in zip(*indices.values(), strict=True):
                    predicted.append({name: self.attributes[name][i] for name, i in zip(indices, row, strict=True)})
            return predicted
        finally:
            self.train(was_training)


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """(N, H, W, 3) uint8 to (N, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255


# ---------------------------------------------------------------------------- weights


def save_attribute_classifier(model: AttributeClassifier, path: str | Path) -> None:
    """Write the weights as float16 safetensors; the header says how the network is built and what it names."""
    state = {
        name: (t.half() if t.is_floating_point() else t).contiguous()  # trained as channels_last
        for name, t in model.state_dict().items()
    }
    config = {"widths": model.widths, "attributes": model.attributes}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(state, str(path), {"config": json.dumps(config)})


def load_attribute_classifier(kind: str = "person", path: str | Path | None = None) -> AttributeClassifier:
    """The trained classifier for ``kind`` ("person" or "creature"), in float32 and eval mode, on the CPU.

    Args:
        path: None takes the weights that come with the package.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of something else, or of a classifier for other attributes or values.
    """
    path, expected = weights_file(kind) if path is None else path, ATTRIBUTES[kind]
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{path} is missing; write it with train_attribute_classifier() and save_attribute_classifier()."
        )
    with safe_open(str(path), framework="pt") as opened:
        header = opened.metadata() or {}
        state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    if "config" not in header:
        raise ValueError(f"{path} has no config in its header, so save_attribute_classifier() did not write it.")
    config = json.loads(header["config"])
    attributes = {name: tuple(values) for name, values in config["attributes"].items()}
    if attributes != expected:
        other = sorted(n for n in {*attributes, *expected} if attributes.get(n) != expected.get(n))
        raise ValueError(f"{path} was trained for other values of {', '.join(other)}; train the classifier anew.")
    model = AttributeClassifier(attributes, config["widths"])
    model.load_state_dict(state)
    return model.eval()


# ---------------------------------------------------------------------------- measures


def accuracy_by_attribute(
    classifier: AttributeClassifier, subjects: Sequence[Subject], images: np.ndarray
) -> dict[str, float]:
    """Attribute -> share in [0, 1] of the subjects that show it whose value is found in their picture.

    Attributes that none of them shows are left out.

    Args:
        subjects: N, of the classifier's kind.
        images: (N, 128, 128, 3) uint8, a picture of each.

    Raises:
        ValueError: another number of pictures than subjects, or pictures of another shape or dtype.
    """
    _same_number(images, subjects, "subjects")
    hits: dict[str, list[bool]] = {name: [] for name in classifier.attributes}
    for predicted, subject in zip(classifier.predict(images), subjects, strict=True):
        for name in hits:
            if subject.shows(name):
                hits[name].append(predicted[name] == getattr(subject, name))
    return {name: float(np.mean(values)) for name, values in hits.items() if values}


def agreement_with_captions(
    classifier: AttributeClassifier, images: np.ndarray, captions: Sequence[Caption]
) -> tuple[float, dict[str, float]]:
    """How much of what the captions settle (``Caption.said``) is found in the pictures.

    Args:
        images: (N, 128, 128, 3) uint8.
        captions: N captions, one for each picture.

    Returns:
        The share in [0, 1] over everything said, and attribute -> share; attributes never said are left out.

    Raises:
        ValueError: another number of captions than pictures, captions that say nothing at all, or pictures of
            another shape or dtype.
    """
    _same_number(images, captions, "captions")
    if not any(caption.said for caption in captions):
        raise ValueError("The captions say nothing, so there is nothing to agree with.")
    hits: dict[str, list[bool]] = {name: [] for name in classifier.attributes}
    for predicted, caption in zip(classifier.predict(images), captions, strict=True):
        for name, value in caption.said.items():
            hits[name].append(predicted[name] == value)
    overall = float(np.mean([hit for values in hits.values() for hit in values]))
    return overall, {name: float(np.mean(values)) for name, values in hits.items() if values}


def _same_number(images: np.ndarray, others: Sequence[object], name: str) -> None:
    if len(images) != len(others):
        raise ValueError(f"{len(images)} pictures and {len(others)} {name}; give one of the {name} for each picture.")
