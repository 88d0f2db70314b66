"""What the two training stages share: the learning-rate schedule, checkpoints, the log, the average."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch


def learning_rate_factor(step: int, num_steps: int, warmup: int) -> float:
    """Linear warm-up over ``warmup`` steps, then a half cosine down to zero at ``num_steps``."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, num_steps - warmup))))


def late_decay_factor(step: int, num_steps: int, warmup: int, decay: int) -> float:
    """Linear warm-up over ``warmup`` steps, then 1, then a line down to zero over the last ``decay`` steps.

    Until the decay begins the rate doesn't depend on ``num_steps``, so that a training can be made longer.
    """
    return max(0.0, min(1.0, (step + 1) / warmup, (num_steps - step) / decay))


class WeightAverage:
    """Exponential moving average of parameters; young averages forget faster (``(1+n)/(10+n)``)."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], decay: float) -> None:
        self.parameters = list(parameters)
        self.average = [p.detach().clone() for p in self.parameters]
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        keep = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - keep)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the parameters and their average; call again to undo."""
        for p, a in zip(self.parameters, self.average, strict=True):
            weight = p.detach().clone()
            p.copy_(a)
            a.copy_(weight)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for mine, theirs in zip(self.average, state["average"], strict=True):
            mine.copy_(theirs)
        self.updates = state["updates"]


class Checkpoint:
    """One file with all that a stage needs to go on, written whole or not at all."""

    def __init__(self, path: Path, every_seconds: float = 240.0) -> None:
        self.path, self.every_seconds, self._last = path, every_seconds, time.monotonic()

    def load(self) -> dict[str, Any] | None:
        return torch.load(self.path, weights_only=True, map_location="cpu") if self.path.exists() else None

    @property
    def due(self) -> bool:
        return time.monotonic() - self._last > self.every_seconds

    def save(self, state: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.path)
        self._last = time.monotonic()


class Log:
    """A JSON-lines log beside the checkpoints."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path

    def write(self, **record: float | int | str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
