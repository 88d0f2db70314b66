"""Training the attribute classifier, on drawings alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from ...avatars.dataset import load_pictures
from ...avatars.training import Checkpoint, learning_rate_factor
from ...avatars.world import Subject
from .classifier import ATTRIBUTES, AttributeClassifier, to_tensor

_NOT_SHOWN = -100  # the label that cross_entropy skips


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


@dataclass(frozen=True)
class ClassifierRecipe:
    """``num_pictures``: of the training split, drawn once."""

    num_steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 2e-3
    num_pictures: int = 16000
    seed: int = 0


RECIPE = ClassifierRecipe()
"""The one that the package's weights were trained with."""


def train_attribute_classifier(
    folder: str | Path,
    kind: str = "person",
    recipe: ClassifierRecipe = RECIPE,
    *,
    device: str | None = None,
    cache: str | Path | None = None,
    stop_at: int | None = None,
) -> AttributeClassifier:
    """Train on training pictures of ``kind``, from nothing or from ``folder/classifier.ckpt``; returns it in eval mode.

    Args:
        device: None takes a CUDA device where there is one.
        cache: where the pictures lie, ``folder/pictures`` without it (50 kB each).
        stop_at: leave at this step, checkpoint written, to go on later.
    """
    folder = Path(folder)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(recipe.seed)
    pictures = load_pictures(recipe.num_pictures, kind=kind, cache=folder / "pictures" if cache is None else cache)
    labels = attribute_labels(pictures.subjects)
    model = AttributeClassifier(ATTRIBUTES[kind]).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=5e-2)
    checkpoint, first = Checkpoint(folder / "classifier.ckpt"), 0
    if state := checkpoint.load():
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    num_steps = recipe.num_steps
    last = num_steps if stop_at is None else min(stop_at, num_steps)
    bar = tqdm(range(first, last), initial=first, total=num_steps, desc="classifier", mininterval=10)
    for step in bar:
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)  # so that going on is going through
        index = torch.randint(recipe.num_pictures, (recipe.batch_size,), generator=generator)
        x = augment(to_tensor(pictures.images[index.numpy()]).to(device), generator)
        x = x.contiguous(memory_format=torch.channels_last)  # half the time on a CPU
        loss = attribute_loss(model(x), {name: values[index].to(device) for name, values in labels.items()})
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * learning_rate_factor(step, num_steps, 50)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if checkpoint.due or step == last - 1:
            checkpoint.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1})
    return model.eval()
