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
            held = p.detach().clone()
            p.copy_(a)
            a.copy_(held)

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


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz (Jordan et al. 2024), for weights of two or more axes.

    ``torch.optim.Muon`` refuses convolutions and iterates in bfloat16, which CPUs without matrix
    units emulate; this one flattens a kernel to (out, rest) and stays in float32. The update is
    scaled to AdamW's usual size, ``0.2 sqrt(max(out, rest))`` (Liu et al. 2025), so that one learning rate serves both.
    """

    def __init__(self, params: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                held = self.state[p]
                if not held:
                    held["momentum_buffer"] = torch.zeros_like(p.grad)
                buffer = held["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(p.grad.lerp(buffer, group["momentum"]).flatten(1))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.view_as(p), alpha=-group["lr"] * 0.2 * math.sqrt(max(update.shape)))


def orthogonalize(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest semi-orthogonal matrix, roughly: five quintic Newton-Schulz iterations."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x
