"""Fits of identities that several methods or settings share."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from ...fit_settings import ReferenceAttribute
from ...identity_adapter import IdentityAdapter
from .pipeline_arguments import PipelineArguments


@dataclass(frozen=True)
class FitTask:
    """Whom to fit: ``subject``, the noun in ``source_prompt``, in ``picture``, with the noise of ``seed``; from
    ``reference``, where there is one, another attribute."""

    picture: Image.Image
    source_prompt: str
    subject: str
    seed: int
    reference: ReferenceAttribute | None = None


def fit_identity(pipe: Any, arguments: PipelineArguments, task: FitTask) -> IdentityAdapter | None:
    """The identity that ``arguments`` fit, or None where they fit none."""
    if arguments.fit is None:
        return None
    identity: IdentityAdapter = pipe.fit_identity(
        task.picture, task.source_prompt, task.subject, reference=task.reference,
        generator=torch.Generator().manual_seed(task.seed), **{"crop": None, **arguments.fit},
    )  # fmt: skip
    return identity


class FitCache:
    """The identities of the latest task, by what they were fitted with: one fit for all arguments whose fits are equal.

    Earlier tasks' identities are dropped, so a caller takes one picture with all arguments before the next picture.
    """

    def __init__(self) -> None:
        self._task: tuple[Any, ...] = ()
        self._identities: dict[str, IdentityAdapter | None] = {}

    def identity(self, pipe: Any, arguments: PipelineArguments, task: FitTask) -> IdentityAdapter | None:
        """As :func:`fit_identity`, fitted anew only where no equal fit of this task is there."""
        contents = _contents(task)
        if contents != self._task:
            self._task, self._identities = contents, {}
        key = json.dumps(arguments.resolved()["fit"], sort_keys=True)
        if key not in self._identities:
            self._identities[key] = fit_identity(pipe, arguments, task)
        return self._identities[key]


def _contents(record: Any) -> tuple[Any, ...]:
    """The fields of a task or a reference; a picture or a mask as its shape and bytes."""
    contents: list[Any] = []
    for name, value in vars(record).items():
        if isinstance(value, ReferenceAttribute):
            contents += _contents(value)
        elif isinstance(value, (Image.Image, np.ndarray, torch.Tensor)):
            array = np.asarray(value)
            contents += [name, array.shape, array.dtype.str, array.tobytes()]
        else:
            contents += [name, value]
    return tuple(contents)
