"""The demo's edits of several people under several settings, each graded against its drawing; and at few steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ...avatars.autoencoder_training import reconstruct
from ...avatars.captions import describe
from ...avatars.world import Subject, changed_pixels, render, sample_person
from ...prompt_words import insert_token
from ..methods.fit_cache import FitCache, FitTask
from ..methods.pipeline_arguments import AS_THE_MODEL_GIVES_IT, PipelineArguments
from ..metrics.classifier import AttributeClassifier, load_attribute_classifier
from ..metrics.counterfactual import CounterfactualEdit, demo_edits, grade
from ..metrics.pixels import psnr
from ..tables import markdown_table, number

PEOPLE = (3, 12, 5, 18, 9, 21)
"""Held-out people, on whom the defaults were chosen too."""

SETTINGS: Mapping[str, PipelineArguments] = {
    "the defaults": PipelineArguments(),
    "no identity": PipelineArguments(fit=None),
    "guided to the end": PipelineArguments(edit={"guidance_stop": 1.0}),
    "no identity, guided to the end": PipelineArguments(fit=None, edit={"guidance_stop": 1.0}),
    "λ = 0": PipelineArguments(fit={"semantic_weight": 0.0}),
    "no spatial control": PipelineArguments(fit={"spatial_control": False}),
    "positions behind `[I]` masked too": PipelineArguments(fit={"mask_after": True}),
    "full": PipelineArguments(fit={"method": "full"}),
    "the paper's fit": PipelineArguments(fit={"preset": "paper"}),
    "token alone": PipelineArguments(fit={"method": "token"}),
    "null-text": PipelineArguments(inversion="null_text"),
    "negative prompt": PipelineArguments(inversion="negative_prompt"),
    "edit-friendly": PipelineArguments(inversion="edit_friendly"),
    "edit-friendly, strength 0.64": PipelineArguments(inversion="edit_friendly", edit={"strength": 0.64}),
    "DDIM": PipelineArguments(inversion="ddim"),
    "drift left": PipelineArguments(edit={"change_threshold": 0.0}),
    "not confined": PipelineArguments(edit={"blend_words": False}),
    "the picture's own pixels kept": PipelineArguments(edit={"keep_pixels": True}),
}
CONFINEMENT = ("the defaults", "drift left", "not confined")
"""Of ``SETTINGS``, those that differ in what an edit may change."""


@dataclass(frozen=True)
class EditRow:
    """Means over the edits: PSNR to the truth in dB, whole, inside the pixels that truly change and outside them, where
    the truth is the picture itself; ``autoencoder_outside``, what the autoencoder alone would score there; the
    share ``done`` of edits whose attribute the classifier then reads; |cos(e_P, e_[I])| at the fit's ends, or None;
    the median ``seconds`` of one person's inversion and edits."""

    name: str
    whole: float
    inside: float
    outside: float
    unedited_inside: float
    autoencoder_outside: float
    done: float
    cosines: tuple[float, float] | None
    seconds: float


@dataclass(frozen=True)
class EditReport:
    """A row for each setting."""

    rows: tuple[EditRow, ...]

    def table(self) -> str:
        """As Markdown; the last two rows are references."""
        head = ["setting", "whole", "inside", "outside", "done", "|cos| before, after", "seconds"]
        rows: list[list[str | None]] = []
        for row in self.rows:
            scores = (number(score) for score in (row.whole, row.inside, row.outside, row.done))
            cosines = None if row.cosines is None else f"{row.cosines[0]:.3f}, {row.cosines[1]:.3f}"
            rows.append([row.name, *scores, cosines, number(row.seconds, ".1f")])
        first = self.rows[0]
        rows.append(["(the picture as it was)", "", number(first.unedited_inside), "", "0.00", "", ""])
        rows.append(["(the autoencoder alone)", "", "", number(first.autoencoder_outside), "", "", ""])
        return markdown_table(head, rows)


def edit_scores(
    edits: Sequence[CounterfactualEdit], images: Sequence[Image.Image], classifier: AttributeClassifier
) -> np.ndarray:
    """(number of edits, 5): PSNR to the truth in dB, whole, inside, outside and, of the unedited picture, inside; and
    1 where the classifier reads all that the edit changes, else 0."""
    predictions = classifier.predict(np.stack([np.asarray(image) for image in images]))
    rows = []
    for edit, image, predicted in zip(edits, images, predictions, strict=True):
        g = grade(edit, image)
        rows.append((g.whole, g.inside, g.outside, g.unedited_inside, float(edit.is_read_in(predicted))))
    return np.array(rows)


def measure_edits(
    pipe: Any,
    names: Sequence[str] = tuple(SETTINGS),
    *,
    settings: Mapping[str, PipelineArguments] = SETTINGS,
    people: Sequence[int] = PEOPLE,
    edits_of: Callable[[Subject], list[CounterfactualEdit]] = demo_edits,
    num_inference_steps: int = 25,
    seed: int = 0,
    num_steps: int | None = None,
) -> EditReport:
    """One row for each of the ``settings`` named; identities that several rows share are fitted once.

    Args:
        num_inference_steps: of the settings that don't name their own.
        num_steps: of the fits; None takes each method's own.

    Raises:
        ValueError: a name that is in no setting.
    """
    if unknown := [name for name in names if name not in settings]:
        raise ValueError(f"There is no setting {', '.join(unknown)}; choose from {', '.join(settings)}.")
    classifier, fits = load_attribute_classifier(), FitCache()
    measured: dict[str, list[_PersonEdits]] = {name: [] for name in names}
    for person_number in tqdm(people, desc="people", leave=False):
        person = sample_person(person_number, "held_out")
        picture, edits = render(person), edits_of(person)
        task = FitTask(picture, describe(person).text, person.noun, seed)
        returned = reconstruct(pipe.vae, np.array(picture)[None])[0]
        autoencoder = [psnr(returned, picture, ~changed_pixels(person, edit.target)) for edit in edits]
        for name in names:
            arguments = settings[name]
            if arguments.fit is not None and num_steps is not None:
                arguments = arguments.with_changes(fit={"num_steps": num_steps})
            identity = fits.identity(pipe, arguments, task)
            targets = [edit.target_prompt for edit in edits]
            if identity is not None:
                targets = [insert_token(target, person.noun, identity.token) for target in targets]
            start = time.perf_counter()
            result = pipe(
                targets,
                image=picture,
                source_prompt=task.source_prompt,
                identity=identity,
                inversion=arguments.inversion,
                generator=torch.Generator().manual_seed(seed),
                **{"num_inference_steps": num_inference_steps, **AS_THE_MODEL_GIVES_IT, **arguments.edit},
            )
            seconds = time.perf_counter() - start
            cosines = None if identity is None else [abs(identity.measures[f"cosine_{e}"]) for e in ("first", "last")]
            scores = np.column_stack([edit_scores(edits, result.images, classifier), autoencoder])
            measured[name].append(_PersonEdits(scores, cosines, seconds))
    return EditReport(tuple(_mean_row(name, of_people) for name, of_people in measured.items()))


@dataclass(frozen=True)
class _PersonEdits:
    """One person's edits under one setting; ``scores``: :func:`edit_scores` and the autoencoder's outside, by edit."""

    scores: np.ndarray
    cosines: list[float] | None
    seconds: float


def _mean_row(name: str, of_people: Sequence[_PersonEdits]) -> EditRow:
    scores = np.concatenate([person.scores for person in of_people])
    whole, inside, outside, unedited_inside, done, autoencoder = map(float, scores.mean(0))
    ends = [person.cosines for person in of_people if person.cosines is not None]
    cosines = None
    if ends:
        first, last = map(float, np.mean(ends, 0))
        cosines = (first, last)
    seconds = float(np.median([person.seconds for person in of_people]))
    return EditRow(name, whole, inside, outside, unedited_inside, autoencoder, done, cosines, seconds)


# ---------------------------------------------------------------------------- few steps


@dataclass(frozen=True)
class StepsReport:
    """A row for each number of steps; ``losses``, name -> how far the fewer of two numbers of steps is below the
    other, in dB of whole, inside and outside, or None where one of the two wasn't measured."""

    people: tuple[int, ...]
    rows: tuple[EditRow, ...]
    losses: Mapping[str, tuple[float, float, float] | None]

    def table(self) -> str:
        """As Markdown."""
        losses = (
            [name, *(number(value) for value in values or (None, None, None))] for name, values in self.losses.items()
        )
        return f"{EditReport(self.rows).table()}\n\n{markdown_table(['dB', 'whole', 'inside', 'outside'], losses)}"


def measure_steps(
    pipe: Any,
    steps: Sequence[int] = (10, 20, 50),
    *,
    few: int = 20,
    many: int = 50,
    people: Sequence[int] = range(4),
    num_steps: int | None = None,
    seed: int = 0,
) -> StepsReport:
    """The demo's edits of held-out ``people`` with their default identities, which all numbers of ``steps`` share; from
    direct inversion, and below ``many`` steps from fixed-point inversion too.

    Args:
        few, many: the two numbers of steps that are compared.
        num_steps: of the fits; None takes the method's own.
    """
    settings = {f"{n} steps": PipelineArguments(edit={"num_inference_steps": n}) for n in steps}
    settings |= {
        f"{n} steps, fixed point": PipelineArguments(inversion="fixed_point", edit={"num_inference_steps": n})
        for n in steps
        if n < many
    }
    rows = measure_edits(pipe, list(settings), settings=settings, people=people, num_steps=num_steps, seed=seed).rows
    by_steps = dict(zip(steps, rows, strict=False))
    loss = None
    if few in by_steps and many in by_steps:
        a, b = by_steps[few], by_steps[many]
        loss = (b.whole - a.whole, b.inside - a.inside, b.outside - a.outside)
    return StepsReport(tuple(people), rows, {f"{few} steps below {many}": loss})
