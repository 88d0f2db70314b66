"""One fit for everybody whose fit is equal, and no other's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from s2edit_pipeline.evaluation.methods.fit_cache import FitCache, FitTask, fit_identity
from s2edit_pipeline.evaluation.methods.pipeline_arguments import PipelineArguments
from s2edit_pipeline.fit_settings import ReferenceAttribute

SOURCE, OTHER = "a photo of a smiling lady", "a photo of a sad lady"


class Fitter:
    """A pipeline that writes down what it fits; each fit is another object."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def fit_identity(self, image: Image.Image, prompt: str, subject: str, *, generator: torch.Generator, **more: Any):
        self.calls.append(
            {"image": image, "prompt": prompt, "subject": subject, "seed": generator.initial_seed(), **more}
        )
        return object()


@pytest.fixture
def task(picture: Image.Image) -> FitTask:
    return FitTask(picture, SOURCE, "lady", 3)


def test_a_fit_is_the_call_with_its_arguments(task: FitTask) -> None:
    pipe, reference = Fitter(), ReferenceAttribute(None, OTHER, "lady")
    fit_identity(pipe, PipelineArguments({"num_steps": 2}), replace(task, reference=reference))
    expected = {"image": task.picture, "prompt": SOURCE, "subject": "lady", "seed": 3, "reference": reference}
    assert pipe.calls == [{**expected, "num_steps": 2, "crop": None}]
    assert fit_identity(pipe, PipelineArguments(fit=None), task) is None and len(pipe.calls) == 1


def test_fits_that_are_equal_are_made_once(task: FitTask) -> None:
    pipe, fits = Fitter(), FitCache()
    strong, weak = (PipelineArguments(edit={"guidance_scale": scale}) for scale in (9.0, 2.0))
    first = fits.identity(pipe, strong, task)
    again = replace(task, picture=task.picture.copy())
    assert fits.identity(pipe, weak, again) is first and len(pipe.calls) == 1
    # a default that is written out is the same fit
    steps = strong.resolved()["fit"]["num_steps"]
    assert fits.identity(pipe, PipelineArguments({"num_steps": steps}), task) is first
    other = fits.identity(pipe, PipelineArguments({"num_steps": steps + 1}), task)
    assert other is not first and fits.identity(pipe, strong, task) is first and len(pipe.calls) == 2
    assert fits.identity(pipe, PipelineArguments(fit=None), task) is None and len(pipe.calls) == 2


def test_another_task_is_another_fit(task: FitTask) -> None:
    mask, arguments = np.zeros((4, 4), bool), PipelineArguments()
    reference = ReferenceAttribute(task.picture, SOURCE, "lady", mask=mask)
    tasks = [
        task, replace(task, picture=task.picture.rotate(90)), replace(task, source_prompt=OTHER),
        replace(task, subject="photo"), replace(task, seed=4), replace(task, reference=reference),
        replace(task, reference=replace(reference, mask=~mask)),
        replace(task, reference=replace(reference, prompt=OTHER)),
        replace(task, reference=replace(reference, image=task.picture.rotate(90))),
    ]  # fmt: skip
    pipe, fits = Fitter(), FitCache()
    identities = [fits.identity(pipe, arguments, one) for one in tasks]
    assert len({id(identity) for identity in identities}) == len(pipe.calls) == len(tasks)
    # equal masks are one mask, whoever made them
    last = replace(task, reference=replace(reference, mask=mask.copy()))
    assert fits.identity(pipe, arguments, replace(task, reference=reference)) is fits.identity(pipe, arguments, last)
    # only the latest task's are there
    fits.identity(pipe, arguments, task)
    assert len(pipe.calls) == len(tasks) + 2
