"""Which named attributes a picture of an avatar shows: a small network, trained on drawings alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..avatars.captions import Caption
from ..avatars.dataset import load_pictures
from ..avatars.training import Checkpoint, learning_rate_factor
from ..avatars.world import NAMED_ATTRIBUTES, Person

WEIGHTS_FILE = Path(__file__).parent / "weights" / "attribute_classifier.safetensors"
_WIDTHS = (24, 48, 96, 128)


class AttributeClassifier(nn.Module):
    """Four strided convolutions and a softmax for each of ``NAMED_ATTRIBUTES``.

    The heads read the last map cell by cell: avatars are aligned, and where a colour is tells whose it is.
    """

    def __init__(self, widths: Sequence[int] = _WIDTHS) -> None:
        super().__init__()
        self.widths = tuple(widths)
        layers: list[nn.Module] = []
        for before, after in zip((3, *self.widths[:-1]), self.widths, strict=True):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.SiLU()]
        self.features = nn.Sequential(*layers, nn.Conv2d(self.widths[-1], 24, 1), nn.SiLU(), nn.Flatten())
        self.heads = nn.ModuleDict({name: nn.Linear(24 * 64, len(v)) for name, v in NAMED_ATTRIBUTES.items()})

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Pictures (N, 3, 128, 128) in [-1, 1] to logits (N, values) for each attribute."""
        features = self.features(x)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def predict(self, images: np.ndarray, batch_size: int = 64) -> list[dict[str, str]]:
        """The most likely value of each named attribute in each of (N, 128, 128, 3) uint8 pictures.

        Raises:
            ValueError: another shape or dtype.
        """
        if images.ndim != 4 or images.shape[1:] != (128, 128, 3) or images.dtype != np.uint8:
            raise ValueError(f"images must be (N, 128, 128, 3) uint8, not {images.shape} {images.dtype}.")
        found: list[dict[str, str]] = []
        for i in range(0, len(images), batch_size):
            chosen = {name: logits.argmax(-1) for name, logits in self(_to_tensor(images[i : i + batch_size])).items()}
            found += [
                {name: NAMED_ATTRIBUTES[name][int(values[j])] for name, values in chosen.items()}
                for j in range(len(images[i : i + batch_size]))
            ]
        return found


def _to_tensor(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def is_visible(person: Person, attribute: str) -> bool:
    """Whether a picture of ``person`` shows its ``attribute`` at all: a hat hides the hair."""
    if attribute == "hair":
        return person.hair_visible
    if attribute == "hair_color":
        return person.hair_visible and person.hair != "bald"
    if attribute == "headwear_color":
        return person.headwear in ("hat", "hijab", "turban", "beanie")
    return True


def _labels(people: Sequence[Person]) -> dict[str, torch.Tensor]:
    """Attribute -> (N,) index of the value, -100 where the picture doesn't show it."""
    return {
        name: torch.tensor([values.index(getattr(p, name)) if is_visible(p, name) else -100 for p in people])
        for name, values in NAMED_ATTRIBUTES.items()
    }


def _augment(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Small changes that generated pictures have too: tint, noise, blur, a shift of a pixel or two."""
    n = len(x)
    gain = 1 + 0.06 * (torch.rand(n, 3, 1, 1, generator=generator) * 2 - 1)
    offset = 0.06 * (torch.rand(n, 3, 1, 1, generator=generator) * 2 - 1)
    x = x * gain + offset
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    x = torch.lerp(x, blurred, torch.rand(n, 1, 1, 1, generator=generator))
    x = x + 0.08 * torch.rand(n, 1, 1, 1, generator=generator) * torch.randn(x.shape, generator=generator)
    dy, dx = (int(v) for v in torch.randint(-2, 3, (2,), generator=generator))
    return torch.roll(x, (dy, dx), (2, 3))


def train_attribute_classifier(
    folder: str | Path,
    *,
    num_steps: int = 1500,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    num_pictures: int = 16000,
    cache: str | Path | None = None,
    seed: int = 0,
) -> AttributeClassifier:
    """Train on training people, from nothing or from ``folder/classifier.ckpt``."""
    torch.manual_seed(seed)
    pictures = load_pictures(num_pictures, masks=True, cache=cache)
    labels = _labels(pictures.people)
    model = AttributeClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=5e-2)
    checkpoint, first = Checkpoint(Path(folder) / "classifier.ckpt"), 0
    if state := checkpoint.load():
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    bar = tqdm(range(first, num_steps), initial=first, total=num_steps, desc="classifier", mininterval=10)
    for step in bar:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        index = torch.randint(len(pictures.images), (batch_size,), generator=generator).numpy()
        logits = model(_augment(_to_tensor(pictures.images[index]), generator))
        losses = [F.cross_entropy(logits[name], labels[name][index], ignore_index=-100) for name in NAMED_ATTRIBUTES]
        loss = torch.stack(losses).nan_to_num().mean()  # a batch may show no value of an attribute
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * learning_rate_factor(step, num_steps, 50)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if checkpoint.due or step == num_steps - 1:
            checkpoint.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1})
    return model.eval()


def save_attribute_classifier(model: AttributeClassifier, path: str | Path = WEIGHTS_FILE) -> None:
    """Write the weights as float16 safetensors; the header says how the network is built."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_file(state, str(path), {"config": json.dumps({"widths": model.widths})})


def load_attribute_classifier(path: str | Path = WEIGHTS_FILE) -> AttributeClassifier:
    """The trained classifier, in float32 and eval mode."""
    with safe_open(str(path), framework="pt") as opened:
        config = json.loads(opened.metadata()["config"])
        state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    model = AttributeClassifier(config["widths"])
    model.load_state_dict(state)
    return model.float().eval()


def accuracy_by_attribute(
    classifier: AttributeClassifier, people: Sequence[Person], images: np.ndarray
) -> dict[str, float]:
    """Attribute -> share of the ``people`` who show it whose value is found in their picture."""
    found = classifier.predict(images)
    return {
        name: float(
            np.mean([f[name] == getattr(p, name) for f, p in zip(found, people, strict=True) if is_visible(p, name)])
        )
        for name in NAMED_ATTRIBUTES
    }


def agreement_with_captions(
    classifier: AttributeClassifier, images: np.ndarray, captions: Sequence[Caption]
) -> tuple[float, dict[str, float]]:
    """The share of what the captions say that the classifier finds in the pictures: in all, and by attribute."""
    hits: dict[str, list[bool]] = {}
    for found, caption in zip(classifier.predict(images), captions, strict=True):
        for name, value in caption.said.items():
            hits.setdefault(name, []).append(found[name] == value)
    every = [hit for values in hits.values() for hit in values]
    return float(np.mean(every)), {name: float(np.mean(values)) for name, values in hits.items()}
