"""A fit on its way, kept in a folder: killed at any moment, the same call goes on from there to the same bits."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

CHECKPOINT_FILE = "fit_checkpoint.pt"

MOST_SHARE = 0.02
"""Of a fit's time that is spent on writing checkpoints, the last one aside."""

_FORMAT = 1


class FitCheckpoint:
    """The checkpoint of one fit.

    Args:
        folder: made where it isn't there.
        key: what tells this fit from any other: model, picture, words, settings, generator.
    """

    def __init__(self, folder: str | os.PathLike[str], key: str) -> None:
        self.file, self.key = Path(folder) / CHECKPOINT_FILE, key
        self._next = 0.0

    def load(self) -> dict[str, Any] | None:
        """What was kept; None where nothing was.

        Raises:
            ValueError: the folder is a file, or holds another fit's checkpoint, or one that can't be read.
        """
        if not self.file.parent.exists():
            return None
        if not self.file.parent.is_dir():
            raise ValueError(f"checkpoint_folder={str(self.file.parent)!r} is a file; give a folder.")
        if not self.file.exists():
            return None
        try:
            kept: dict[str, Any] = torch.load(self.file, map_location="cpu", weights_only=True)
            is_same, state = (kept["format"], kept["key"]) == (_FORMAT, self.key), dict(kept["state"])
        except Exception as error:  # whatever a damaged file makes of the reader
            raise ValueError(f"{self.file} can't be read ({error}). Delete it, and the fit begins anew.") from error
        if not is_same:
            raise ValueError(
                f"{self.file} is of another fit: another picture, prompt, setting, generator or model. Give this one a "
                "checkpoint_folder of its own, or delete the file."
            )
        return state

    def save(self, state: Mapping[str, Any]) -> None:
        """Keep ``state``, tensors and plain values, in place of what was kept: the old one or the new one is there,
        whole, whenever the process is killed."""
        started = time.perf_counter()
        stream = io.BytesIO()
        torch.save({"format": _FORMAT, "key": self.key, "state": dict(state)}, stream)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.file.with_suffix(f".{os.getpid()}.unfinished")
        try:
            with open(unfinished, "wb") as file:
                file.write(stream.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, self.file)
        finally:
            unfinished.unlink(missing_ok=True)
        now = time.perf_counter()
        self._next = now + (now - started) / MOST_SHARE

    def save_if_due(self, state: Callable[[], Mapping[str, Any]]) -> None:
        """:meth:`save`, as often as costs at most :data:`MOST_SHARE` of the time."""
        if time.perf_counter() >= self._next:
            self.save(state())
