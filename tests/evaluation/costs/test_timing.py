"""Runs in turns, on a clock that the test winds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from s2edit_pipeline.evaluation.costs import timing
from s2edit_pipeline.evaluation.costs.timing import take_turns


class Echo(nn.Linear):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:  # type: ignore[override]
        return (super().forward(x),)


def test_turns_are_taken_and_ratios_are_of_one_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order, unet = [0.0], [], Echo(2, 2)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    # the machine is busy in the second turn, and falls asleep once in the third
    took = {"a": [1.0, 10.0, 1.0], "b": [2.0, 20.0, 50.0]}

    def run(name: str, rows: int) -> str:
        now[0] += took[name][order.count(name)]
        order.append(name)
        unet(torch.zeros(rows, 2))
        return f"{name}{len(order)}"

    timings = take_turns({"a": lambda: run("a", 1), "b": lambda: run("b", 3)}, unet, 3)
    assert order == ["a", "b", "a", "b", "a", "b"]
    assert timings["a"].seconds == (1.0, 10.0, 1.0) and timings["a"].median == 1.0
    assert timings["b"].median == 20.0 and timings["b"].times(timings["a"]) == 2.0
    assert [t.counts.evaluations for t in timings.values()] == [1, 3] and timings["b"].result == "b6"
    with pytest.raises(ValueError, match="repeats must be at least 1, not 0"):
        take_turns({}, unet, 0)
