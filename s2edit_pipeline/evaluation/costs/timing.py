"""Seconds that can be compared: of one process, its runs taking turns, each beside what it asked of the U-Net."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from .counts import UNetCounts, count_unet


@dataclass(frozen=True)
class Timing:
    """``seconds`` of each run; ``counts`` and ``result`` of the last one."""

    seconds: tuple[float, ...]
    counts: UNetCounts
    result: Any

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    def times(self, other: Timing) -> float:
        """How many times as long as ``other``: the median over turns of the ratio within a turn, in which a busy moment
        of the machine meets both."""
        return float(np.median([a / b for a, b in zip(self.seconds, other.seconds, strict=True)]))


def timed(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds of one run, what it left to do on ``device`` included, and its result."""
    _finish(device)
    started = time.perf_counter()
    result = run()
    _finish(device)
    return time.perf_counter() - started, result


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(runs: Mapping[str, Callable[[], Any]], unet: nn.Module, repeats: int) -> dict[str, Timing]:
    """Each of ``runs`` once, in order, and that ``repeats`` times over.

    Raises:
        ValueError: ``repeats`` is below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, not {repeats}.")
    device = next(unet.parameters()).device
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    last: dict[str, tuple[UNetCounts, Any]] = {}
    for _ in range(repeats):
        for name, run in runs.items():
            with count_unet(unet) as counts:
                took, result = timed(run, device)
            seconds[name].append(took)
            last[name] = counts, result
    return {name: Timing(tuple(seconds[name]), *last[name]) for name in runs}


def machine(device: torch.device) -> dict[str, str | int]:
    """What seconds depend on: the device, PyTorch's version and its number of threads."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"device": name, "torch": torch.__version__, "threads": torch.get_num_threads()}
