"""Descriptions are graded attribute by attribute against the captions that the drawings have."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from s2edit_pipeline.avatars.captions import describe
from s2edit_pipeline.avatars.world import render, sample
from s2edit_pipeline.evaluation.studies.descriptions import FIRST, measure_descriptions, named

PEOPLE, CREATURES = 3, 2


class Describer:
    """Says the truth, but for the background of people and one person's noun."""

    def __init__(self) -> None:
        keys = [("person", FIRST + i) for i in range(PEOPLE)] + [("creature", FIRST + i) for i in range(CREATURES)]
        self.subjects = [sample(*key, "held_out") for key in keys]

    def describe(self, picture: Image.Image) -> Any:
        (subject,) = (one for one in self.subjects if render(one).tobytes() == picture.tobytes())
        text, noun = describe(subject).text, subject.noun
        if subject.PART == "person":
            text = text.replace(f"{subject.background} background", "no background")
        if subject is self.subjects[0]:
            noun = {"lady": "man", "man": "lady"}[noun]
        return SimpleNamespace(prompt=text, subject=noun)


def test_what_is_wrong_counts_once_where_it_belongs() -> None:
    describer = Describer()
    report = measure_descriptions(describer, PEOPLE, CREATURES)
    wrong = {name: list(values) for name, values in report.right.items() if not all(values)}
    assert wrong == {"person: noun": [0, 1, 1], "person: background": [0, 0, 0]}
    assert report.whole == [0, 0, 0, 1, 1]
    total = sum(len(named(subject)) for subject in describer.subjects)
    assert sum(len(values) for values in report.right.values()) == total
    assert report.share[0] == pytest.approx((total - 4) / total)
    assert report.subjects["person: noun"] == [f"person-{FIRST + i}" for i in range(PEOPLE)]
    table = report.table()
    assert "| person: noun | 3 | 0.667 |" in table and "| whole descriptions | 5 | 0.400 |" in table
    assert "Seconds a picture, median and most" in table
