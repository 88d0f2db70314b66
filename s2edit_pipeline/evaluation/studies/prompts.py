"""Edits asked for in as many words as people write: what each fit, and each of its controls, is worth by how much the
prompts say.

Every row is written to a file as soon as it is measured, and a row that is there isn't measured again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ...avatars.world import render, sample
from ...prompt_words import insert_token
from ..benchmark.prompt_classes import check_prompt_class, edit_prompts
from ..methods.fit_cache import FitTask, fit_identity
from ..methods.pipeline_arguments import AS_THE_MODEL_GIVES_IT, PipelineArguments
from ..methods.protocol import weights_digest
from ..metrics.classifier import load_attribute_classifier
from ..metrics.counterfactual import demo_edits
from ..metrics.intervals import paired_difference
from ..tables import markdown_table, number
from .edits import edit_scores

NUM_EDITS = 3
"""Of the demo's edits, so many of each subject: something on the nose, another expression, hair, clothes or fur."""
KEPT: Mapping[str, Any] = {"response_loss_weight": 1.0}
FITS: Mapping[str, PipelineArguments] = {
    "no identity": PipelineArguments(fit=None),
    "20 steps": PipelineArguments(fit={"response_loss_weight": 0.0}),
    "20 steps, words kept": PipelineArguments(fit=KEPT),
    "60 steps": PipelineArguments(fit={"response_loss_weight": 0.0, "num_steps": 60}),
    "60 steps, words kept": PipelineArguments(fit={**KEPT, "num_steps": 60}),
    "60 steps, words kept, λ = 0": PipelineArguments(fit={**KEPT, "num_steps": 60, "semantic_weight": 0.0}),
    "60 steps, words kept, no mask": PipelineArguments(fit={**KEPT, "num_steps": 60, "spatial_control": False}),
}
"""Name -> how is fitted and edited."""
SCORES = ("whole", "inside", "outside", "done")


@dataclass(frozen=True)
class PromptRow:
    """One subject's edits in one class of prompts after one fit: the means of PSNR to the truth in dB, whole, inside
    the pixels that truly change and outside them, the share ``done``, and the fit's seconds. ``key`` is a digest of all
    that the row depends on, weights and arguments too."""

    subject: str
    prompts: str
    fit: str
    whole: float
    inside: float
    outside: float
    done: float
    seconds: float
    key: str


@dataclass(frozen=True)
class PromptReport:
    """The rows of every subject."""

    rows: tuple[PromptRow, ...]

    def table(self) -> str:
        """As Markdown, a table for each kind of subject; differences to the first fit but "no identity", by subject."""
        kinds = dict.fromkeys(row.subject.split("-")[0] for row in self.rows)
        return "\n\n".join(self._table(kind) for kind in kinds)

    def _table(self, kind: str) -> str:
        rows = [row for row in self.rows if row.subject.split("-")[0] == kind]
        head = ["prompts", "fit", "subjects", *SCORES, "seconds", "whole, less", "outside, less", "done, less"]
        lines = []
        for prompts in dict.fromkeys(row.prompts for row in rows):
            each = {
                fit: {row.subject: row for row in rows if (row.prompts, row.fit) == (prompts, fit)}
                for fit in dict.fromkeys(row.fit for row in rows)
            }
            reference = next((fit for fit in each if fit != "no identity"), None)
            for fit, of_subject in each.items():
                if not of_subject:
                    continue
                means = [number(float(np.mean([getattr(r, n) for r in of_subject.values()]))) for n in SCORES]
                seconds = number(float(np.median([row.seconds for row in of_subject.values()])), ".1f")
                less = [
                    None if fit == reference or reference is None else _difference(of_subject, each[reference], name)
                    for name in ("whole", "outside", "done")
                ]
                lines.append([prompts, fit, str(len(of_subject)), *means, seconds, *less])
        return f"{kind}\n\n{markdown_table(head, lines)}"


def _difference(rows: Mapping[str, PromptRow], reference: Mapping[str, PromptRow], name: str) -> str | None:
    """Mean and 95 % interval over the subjects that both have."""
    both = [subject for subject in rows if subject in reference]
    if not both:
        return None
    values, others = (np.array([getattr(side[one], name) for one in both]) for side in (rows, reference))
    return "{:+.2f} ({:+.2f} to {:+.2f})".format(*paired_difference(values, others))


def chosen_fits(names: Sequence[str] | None) -> dict[str, PipelineArguments]:
    """Those of ``FITS`` that are named; None: all.

    Raises:
        ValueError: a name that it hasn't.
    """
    if unknown := [name for name in names or () if name not in FITS]:
        raise ValueError(f"There is no fit {', '.join(unknown)}; choose from {', '.join(map(repr, FITS))}.")
    return {name: fit for name, fit in FITS.items() if names is None or name in names}


def measure_prompts(
    pipe: Any,
    subjects: Sequence[tuple[str, int]],
    out: Path,
    *,
    prompts: Sequence[str] = ("short", "complete"),
    fits: Mapping[str, PipelineArguments] = FITS,
    num_inference_steps: int = 25,
    seed: int = 0,
) -> PromptReport:
    """Edit each subject, kind and number among the held-out ones, in each class of ``prompts`` after each of ``fits``.

    Args:
        out: the file of rows, JSON lines; those that are there are taken as they are.

    Raises:
        ValueError: there is no such class of prompts.
    """
    for each in prompts:
        check_prompt_class(each)
    weights = weights_digest(pipe.components)
    asked = [_Asked(key, each, fit, num_inference_steps, seed) for key in subjects for each in prompts for fit in fits]
    keys = {one: one.digest(fits[one.fit], weights) for one in asked}
    lines = out.read_text("utf-8").splitlines() if out.exists() else []
    rows = {row.key: row for row in (PromptRow(**json.loads(line)) for line in lines)}
    for one in tqdm([one for one in asked if keys[one] not in rows], desc="edited", leave=False):
        row = one.row(pipe, fits[one.fit], keys[one])
        rows[row.key] = row
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
    return PromptReport(tuple(rows[keys[one]] for one in asked))


@dataclass(frozen=True)
class _Asked:
    """What a row is of."""

    subject: tuple[str, int]
    prompts: str
    fit: str
    num_inference_steps: int
    seed: int

    def digest(self, arguments: PipelineArguments, weights: str) -> str:
        facts = [*vars(self).values(), arguments.resolved(), weights]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def row(self, pipe: Any, arguments: PipelineArguments, key: str) -> PromptRow:
        """Fit, edit and grade."""
        kind, n = self.subject
        subject = sample(kind, n, "held_out")
        edits = demo_edits(subject)[:NUM_EDITS]
        said = edit_prompts(subject, edits, self.prompts, seed=n)
        picture = render(subject)
        identity = fit_identity(pipe, arguments, FitTask(picture, said.source, subject.noun, self.seed))
        targets = list(said.targets)
        if identity is not None:
            targets = [insert_token(target, subject.noun, identity.token) for target in targets]
        images = pipe(
            targets, image=picture, source_prompt=said.source, identity=identity, inversion=arguments.inversion,
            generator=torch.Generator().manual_seed(self.seed),
            **{"num_inference_steps": self.num_inference_steps, **AS_THE_MODEL_GIVES_IT, **arguments.edit},
        ).images  # fmt: skip
        whole, inside, outside, _, done = map(
            float, edit_scores(edits, images, load_attribute_classifier(kind)).mean(0)
        )
        seconds = 0.0 if identity is None else float(identity.measures["seconds"])
        return PromptRow(f"{kind}-{n}", self.prompts, self.fit, whole, inside, outside, done, seconds, key)
