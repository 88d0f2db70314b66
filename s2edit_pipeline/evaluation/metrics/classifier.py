"""Which named attributes a picture of an avatar shows: a small network a kind of subject, trained on drawings alone.

It reads what captions can say and nothing else, so it grades a generated or edited picture by its words.
The weights that come with the package were trained with the defaults of :func:`train_attribute_classifier`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ...avatars.captions import Caption
from ...avatars.dataset import load_pictures
from ...avatars.training import Checkpoint, learning_rate_factor
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
_NOT_SHOWN = -100  # the label that cross_entropy skips


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


# ---------------------------------------------------------------------------- training


def attribute_labels(subjects: Sequence[Subject]) -> dict[str, torch.Tensor]:
    """Attribute -> (N,) int64: which of its values each of the subjects, all of one kind, has; -100 where the picture
    doesn't tell."""
    return {
        name: torch.tensor([values.index(getattr(p, name)) if p.shows(name) else _NOT_SHOWN for p in subjects])
        for name, values in subjects[0].ATTRIBUTES.items()
    }


def attribute_loss(logits: Mapping[str, torch.Tensor], labels: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Mean over attributes of the mean cross-entropy over the pictures that show the attribute."""
    losses = []
    for name in logits:
        shown = (labels[name] != _NOT_SHOWN).sum().clamp(min=1)  # a batch may hold no headwear at all
        losses.append(F.cross_entropy(logits[name], labels[name], ignore_index=_NOT_SHOWN, reduction="sum") / shown)
    return torch.stack(losses).mean()


def augment(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """(N, 3, H, W) in [0, 1], changed as little as a new person or a generated picture is unlike the drawings."""
    n = len(x)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return (low + (high - low) * torch.rand(n, *shape, generator=generator)).to(x)

    # white on half of the chests: held-out people wear prints, training people don't
    blot = F.interpolate(uniform(0, 1, 1, 6, 8), scale_factor=4, mode="bilinear") > uniform(0.5, 1.5, 1, 1, 1)
    chest = x[..., 100:124, 48:80]
    x = x.clone()
    x[..., 100:124, 48:80] = torch.where(blot, uniform(0.9, 1, 1, 1, 1), chest)
    # other shades: hue turned about the grey axis, saturation and value scaled. The words' own shades differ by
    # 0.014 turns; red and orange are 0.09 apart, so no colour becomes another
    angle = 2 * math.pi * uniform(-0.012, 0.012, 1, 1)
    grey = torch.full((3, 3), 1 / 3).to(x)
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]).to(x) / math.sqrt(3)
    turn = grey + angle.cos() * (torch.eye(3).to(x) - grey) + angle.sin() * cross
    shades = uniform(0.96, 1.03, 1, 1) * torch.lerp(grey.expand(n, 3, 3), turn, uniform(0.92, 1.06, 1, 1))
    x = torch.einsum("nij,njhw->nihw", shades, x) + uniform(-0.015, 0.015, 3, 1, 1)
    # soft and noisy, as decoded latents are
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    x = torch.lerp(x, blurred, uniform(0, 1, 1, 1, 1))
    x = x + uniform(0, 0.05, 1, 1, 1) * torch.randn(x.shape, generator=generator).to(x)
    # a little out of place
    down, right = (int(v) for v in torch.randint(0, 5, (2,), generator=generator))
    height, width = x.shape[-2:]
    return F.pad(x, (2, 2, 2, 2), mode="replicate")[..., down : down + height, right : right + width].clamp(0, 1)


def train_attribute_classifier(
    folder: str | Path,
    num_steps: int = 1000,
    device: str | None = None,
    seed: int = 0,
    *,
    kind: str = "person",
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    num_pictures: int = 16000,
    cache: str | Path | None = None,
    stop_at: int | None = None,
) -> AttributeClassifier:
    """Train on training pictures of ``kind``, from nothing or from ``folder/classifier.ckpt``; returns it in eval mode.

    Args:
        device: None takes a CUDA device where there is one.
        num_pictures: of the training split, drawn once.
        cache: where the pictures are kept, ``folder/pictures`` unless told (50 kB each).
        stop_at: leave at this step, checkpoint written, to go on later.
    """
    folder = Path(folder)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    pictures = load_pictures(num_pictures, kind=kind, cache=folder / "pictures" if cache is None else cache)
    labels = attribute_labels(pictures.subjects)
    model = AttributeClassifier(ATTRIBUTES[kind]).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=5e-2)
    checkpoint, first = Checkpoint(folder / "classifier.ckpt"), 0
    if state := checkpoint.load():
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    last = num_steps if stop_at is None else min(stop_at, num_steps)
    bar = tqdm(range(first, last), initial=first, total=num_steps, desc="classifier", mininterval=10)
    for step in bar:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)  # so that going on is going through
        index = torch.randint(num_pictures, (batch_size,), generator=generator)
        x = augment(to_tensor(pictures.images[index.numpy()]).to(device), generator)
        x = x.contiguous(memory_format=torch.channels_last)  # half the time on a CPU
        loss = attribute_loss(model(x), {name: values[index].to(device) for name, values in labels.items()})
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * learning_rate_factor(step, num_steps, 50)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if checkpoint.due or step == last - 1:
            checkpoint.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1})
    return model.eval()


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
        raise FileNotFoundError(f"{path} is missing; write it with train_ and save_attribute_classifier().")
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
