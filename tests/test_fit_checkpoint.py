"""A fit that is killed goes on from where it was, to the same bits."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from s2edit_pipeline import IdentityAdapter, ReferenceAttribute, S2EditPipeline, fit_checkpoint
from s2edit_pipeline.fit_checkpoint import CHECKPOINT_FILE, FitCheckpoint

from .conftest import PROMPT

NUM_STEPS = 6


class Killed(BaseException):
    pass


def fit(pipe: S2EditPipeline, picture: Image.Image, folder: Path | None, **more: Any) -> IdentityAdapter:
    if "generator" not in more:
        more["generator"] = torch.Generator().manual_seed(3)
    return pipe.fit_identity(picture, PROMPT, "lady", num_steps=NUM_STEPS, checkpoint_folder=folder, **more)


def assert_same(one: IdentityAdapter, other: IdentityAdapter) -> None:
    assert one.fit_digest == other.fit_digest
    assert one.weights.keys() == other.weights.keys()
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)
    for (rows, _), (others, _) in zip(one.learned.values(), other.learned.values(), strict=True):
        assert all(torch.equal(rows[name], others[name]) for name in rows)
    for name in one.measures.keys() - {"seconds"}:
        assert one.measures[name] == other.measures[name], name


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"method": "full"},
        {"method": "token"},
        {"early_stop": True, "lr_scheduler": "constant"},
        {"lora_init": "random"},
        {"batch_size": 2, "timestep_sampling": "uniform"},
        {"response_loss_weight": 1.0},
    ],
    ids=["lora", "full", "token", "early stop", "random", "batch", "words kept"],
)
def test_a_killed_fit_goes_on_to_the_same_bits(
    more: dict[str, Any],
    pipe: S2EditPipeline,
    picture: Image.Image,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fit_checkpoint, "MOST_SHARE", 1e9)  # after every step
    whole = fit(pipe, picture, None, **more)

    def die(p: Any, step: int, num_steps: int, measures: Any) -> None:
        seen.append(step)
        if step in (1, 3):
            raise Killed

    seen: list[int] = []
    for _ in range(2):
        with pytest.raises(Killed):
            fit(pipe, picture, tmp_path, callback_on_step_end=die, **more)
    assert seen == [0, 1, 2, 3]
    assert_same(fit(pipe, picture, tmp_path, **more), whole)
    assert_same(fit(pipe, picture, tmp_path, **more), whole)  # it is done, and is taken as it is


def test_a_joint_fit_goes_on_too(pipe: S2EditPipeline, picture: Image.Image, tmp_path: Path) -> None:
    reference = ReferenceAttribute(picture, "a photo of a lady with a hat", "hat", "[A]")
    whole = fit(pipe, picture, None, reference=reference)

    def stop(p: S2EditPipeline, step: int, num_steps: int, measures: Any) -> None:
        p.interrupt = step == 2

    cut = fit(pipe, picture, tmp_path, reference=reference, callback_on_step_end=stop)
    assert cut.interrupted and cut.settings["num_steps"] == 3
    assert_same(fit(pipe, picture, tmp_path, reference=reference), whole)


def test_the_callers_generator_ends_where_it_would_have(
    pipe: S2EditPipeline, picture: Image.Image, tmp_path: Path
) -> None:
    plain, resumed = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    fit(pipe, picture, None, generator=plain)

    def die(p: Any, step: int, num_steps: int, measures: Any) -> None:
        if step == 2:
            raise Killed

    with pytest.raises(Killed):
        fit(pipe, picture, tmp_path, generator=torch.Generator().manual_seed(5), callback_on_step_end=die)
    fit(pipe, picture, tmp_path, generator=resumed)
    assert torch.equal(plain.get_state(), resumed.get_state())


def test_without_a_generator_it_goes_on_as_it_began(pipe: S2EditPipeline, picture: Image.Image, tmp_path: Path) -> None:
    losses: list[float] = []

    def die(p: Any, step: int, num_steps: int, measures: Any) -> None:
        losses.append(measures["reconstruction_loss"])
        if step == 2:
            raise Killed

    with pytest.raises(Killed):
        fit(pipe, picture, tmp_path, generator=None, callback_on_step_end=die)
    one = fit(pipe, picture, tmp_path, generator=None)
    assert one.measures["reconstruction_loss_first"] == losses[0]
    assert_same(fit(pipe, picture, tmp_path, generator=None), one)


@pytest.mark.parametrize(
    "other",
    [
        {"generator": torch.Generator().manual_seed(4)},
        {"learning_rate": 1e-4},
        {"token": "[J]"},
        {"mask": Image.new("L", (32, 32), "white")},
        {"picture": Image.new("RGB", (32, 32), "teal")},
        {"lora_rank": 3},
        {"response_loss_weight": 1.0},
    ],
    ids=lambda other: next(iter(other)),
)
def test_another_fits_checkpoint_is_refused(
    other: dict[str, Any], pipe: S2EditPipeline, picture: Image.Image, tmp_path: Path
) -> None:
    fit(pipe, picture, tmp_path)
    before = (tmp_path / CHECKPOINT_FILE).read_bytes()
    more = dict(other)
    with pytest.raises(ValueError, match="checkpoint_folder of its own"):
        fit(pipe, more.pop("picture", picture), tmp_path, **more)
    assert (tmp_path / CHECKPOINT_FILE).read_bytes() == before


def test_what_cannot_be_read_is_named(pipe: S2EditPipeline, picture: Image.Image, tmp_path: Path) -> None:
    (tmp_path / CHECKPOINT_FILE).write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"can't be read .* Delete it"):
        fit(pipe, picture, tmp_path)
    with pytest.raises(ValueError, match="is a file; give a folder"):
        fit(pipe, picture, tmp_path / CHECKPOINT_FILE)


def test_checkpoints_take_a_fiftieth_of_the_time(tmp_path: Path) -> None:
    checkpoint = FitCheckpoint(tmp_path, "key")
    state = {"weights": torch.zeros(2_000_000)}
    spent, save = [0.0], checkpoint.save

    def timed(state: Any) -> None:
        started = time.perf_counter()
        save(state)
        spent[0] += time.perf_counter() - started

    checkpoint.save = timed  # type: ignore[method-assign]
    started = time.perf_counter()
    while time.perf_counter() - started < 1.5:
        checkpoint.save_if_due(lambda: state)
        time.sleep(0.001)
    assert (tmp_path / CHECKPOINT_FILE).exists()
    assert spent[0] < 0.03 * 1.5 + max(0.05, spent[0] / 2)  # the first one is always written


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs fork")
def test_killed_at_25_random_moments_it_ends_in_the_same_bits(
    pipe: S2EditPipeline, picture: Image.Image, tmp_path: Path
) -> None:
    """By SIGKILL, in a process of its own each time."""
    whole = fit(pipe, picture, None)
    draw = random.Random(0)
    kills = 0
    for round_ in range(200):
        folder = tmp_path / f"{round_}"
        while True:
            child = os.fork()
            if child == 0:
                try:
                    fit(pipe, picture, folder).save_pretrained(folder / "identity")
                finally:
                    os._exit(0)
            time.sleep(draw.uniform(0.05, 1.2))
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if not os.WIFSIGNALED(status):
                break
            kills += 1
        assert_same(IdentityAdapter.from_pretrained(folder / "identity"), whole)
        if kills >= 25:
            break
    assert kills >= 25
