"""Held-out drawn subjects: every edit is scored against its drawing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache

from PIL import Image

from ...avatars.world import render, sample
from ..methods.protocol import Edit, Method
from ..methods.registry import MethodSpec
from ..metrics.classifier import load_attribute_classifier
from .drawn_edits import DrawnEdit, drawn_edits
from .prompt_classes import EditPrompts, check_prompt_class, edit_prompts
from .runner import BenchmarkRun, EditTask, Record
from .scoring import score_edit

SubjectKey = tuple[str, int]
"""Kind of subject, and its number among the held-out ones."""


@dataclass(frozen=True)
class DrawnRun(BenchmarkRun[SubjectKey]):
    """Drawn subjects; each one's seed is made of the run's and the subject's number.

    Attributes:
        edits: at most so many of each subject.
        prompts: how much they say, one of ``prompt_classes.PROMPT_CLASSES``.
    """

    edits: int = 8
    prompts: str = "complete"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_prompt_class(self.prompts)

    def label(self, subject: SubjectKey) -> str:
        kind, number = subject
        return f"{kind}-{number}"

    def settings(self, spec: MethodSpec, method: Method, weights: str) -> Record:
        return {"edits": self.edits, "prompts": self.prompts, **super().settings(spec, method, weights)}

    def task(self, subject: SubjectKey, method: Method) -> EditTask:
        avatar = sample(*subject, "held_out")
        said = self.said(subject)
        return EditTask(render(avatar), said.source, avatar.noun, subject_seed(self, subject), said.targets)

    def said(self, subject: SubjectKey) -> EditPrompts:
        """The prompts of its edits."""
        avatar = sample(*subject, "held_out")
        return edit_prompts(avatar, edits_of(self, subject), self.prompts, seed=subject[1])

    def score(self, subject: SubjectKey, task: EditTask, edit: Edit, images: Sequence[Image.Image]) -> Record:
        classifier = _classifier(subject[0])
        rows = [
            {"name": e.name, "category": e.category, "prompt": prompt} | asdict(score_edit(e, image, classifier))
            for e, prompt, image in zip(edits_of(self, subject), task.prompts, images, strict=True)
        ]
        return {"edits": rows}

    def same_edits(self, record: Record, subject: SubjectKey) -> bool:
        return [edit["prompt"] for edit in record["edits"]] == list(self.said(subject).targets)


_classifier = cache(load_attribute_classifier)


def subject_seed(run: DrawnRun, subject: SubjectKey) -> int:
    """Of everything random that is done with ``subject``."""
    return run.seed * 1_000_003 + subject[1]


def edits_of(run: DrawnRun, subject: SubjectKey) -> list[DrawnEdit]:
    """The edits that are graded, in the order in which the records have them."""
    kind, number = subject
    return drawn_edits(sample(kind, number, "held_out"), run.edits, seed=number)
