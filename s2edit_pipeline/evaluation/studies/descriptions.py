"""How well a model describes avatars that it has never seen: attribute by attribute, and in what time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ...avatars.captions import describe, read_caption
from ...avatars.world import Subject, render, sample
from ..metrics.intervals import bootstrap_interval
from ..tables import markdown_table, number

FIRST = 2000
"""The first of the held-out subjects that are described: nothing was chosen on them."""


@dataclass(frozen=True)
class DescriptionReport:
    """What descriptions said.

    Attributes:
        right: kind of subject and attribute, "person: hair" -> 1 or 0 for each subject whose caption settles it; the
            noun of people is one of them.
        subjects: as ``right``, which subject each value is of.
        whole: for each subject, whether all of it was right.
        seconds, cpu_seconds: for each subject, on the clock and of the processor.
    """

    right: Mapping[str, Sequence[int]]
    subjects: Mapping[str, Sequence[str]]
    whole: Sequence[int]
    seconds: Sequence[float]
    cpu_seconds: Sequence[float]

    @property
    def share(self) -> tuple[float, float, float]:
        """The share of all named attributes that is right, and its 95 % interval over subjects."""
        values = np.concatenate([np.array(values) for values in self.right.values()])
        groups = [subject for each in self.subjects.values() for subject in each]
        return (float(values.mean()), *bootstrap_interval(values, groups))

    def table(self) -> str:
        """As Markdown."""
        rows: list[list[str | None]] = [
            [name, str(len(values)), number(float(np.mean(values)), ".3f")] for name, values in self.right.items()
        ]
        mean, low, high = self.share
        count = sum(len(values) for values in self.right.values())
        rows.append(["all", str(count), f"{mean:.3f} ({low:.3f} to {high:.3f})"])
        rows.append(["whole descriptions", str(len(self.whole)), number(float(np.mean(self.whole)), ".3f")])
        clock, processor = (f"{np.median(s):.1f}, {np.max(s):.1f}" for s in (self.seconds, self.cpu_seconds))
        timing = f"Seconds a picture, median and most: {clock} on the clock, {processor} of the processor."
        return f"{markdown_table(['attribute', 'pictures', 'right'], rows)}\n\n{timing}"


def named(subject: Subject) -> dict[str, str]:
    """What a complete caption settles of ``subject``, the noun of people among it."""
    return {**({"noun": subject.noun} if subject.PART == "person" else {}), **describe(subject).said}


def measure_descriptions(pipe: Any, people: int = 100, creatures: int = 100) -> DescriptionReport:
    """Describe so many held-out subjects of each kind and compare with their captions."""
    right: dict[str, list[int]] = {}
    subjects: dict[str, list[str]] = {}
    whole, seconds, processor = [], [], []
    keys = [(kind, FIRST + i) for kind, count in (("person", people), ("creature", creatures)) for i in range(count)]
    for kind, n in tqdm(keys, desc="described", leave=False):
        subject = sample(kind, n, "held_out")
        picture = render(subject)
        clock, cpu = time.perf_counter(), time.process_time()
        about = pipe.describe(picture)
        seconds.append(time.perf_counter() - clock)
        processor.append(time.process_time() - cpu)
        said = {"noun": about.subject, **read_caption(about.prompt)}
        hits = {name: int(said.get(name) == value) for name, value in named(subject).items()}
        for name, hit in hits.items():
            right.setdefault(f"{kind}: {name}", []).append(hit)
            subjects.setdefault(f"{kind}: {name}", []).append(f"{kind}-{n}")
        whole.append(int(all(hits.values())))
    return DescriptionReport(right, subjects, whole, seconds, processor)
