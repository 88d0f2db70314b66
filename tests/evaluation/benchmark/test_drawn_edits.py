"""The benchmark's edits: many kinds, each another picture, none that uncovers what can't be known."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from s2edit_pipeline.avatars.world import Subject, changed_pixels, render_array, sample, sample_person
from s2edit_pipeline.evaluation.benchmark.drawn_edits import BENCHMARK_FIRST, drawn_edits

SUBJECTS = [sample(kind, BENCHMARK_FIRST + i, "held_out") for kind in ("person", "creature") for i in range(3)]


@pytest.mark.parametrize("subject", SUBJECTS, ids=[f"{s.noun}-{i}" for i, s in enumerate(SUBJECTS)])
def test_every_edit_is_another_picture_of_the_same_subject(subject: Subject) -> None:
    edits = drawn_edits(subject)
    assert len({edit.target for edit in edits} | {subject}) == len(edits) + 1 > 12
    assert len({edit.name for edit in edits}) == len(edits)
    assert sum(edit.category == "expression" for edit in edits) == 5
    for edit in edits:
        assert edit.source_prompt != edit.target_prompt and subject.noun in edit.target_prompt
        assert changed_pixels(subject, edit.target).any()
        assert getattr(edit.target, "mark") == getattr(subject, "mark")  # noqa: B009


def test_a_few_are_one_of_each_category_and_the_same_every_time() -> None:
    counted: Counter[str] = Counter()
    for number in range(12):
        person = sample_person(BENCHMARK_FIRST + number, "held_out")
        few = drawn_edits(person, 4, seed=number)
        assert len({edit.category for edit in few}) == 4
        assert few[:2] == drawn_edits(person, 2, seed=number)
        counted.update(edit.category for edit in few)
    # of a few of each, every kind comes up
    assert set(counted) == {
        "glasses", "sunglasses", "glasses off", "beard", "moustache", "shaved", "expression", "hair colour", "hat",
        "clothes colour", "background", "two at once",
    }  # fmt: skip


def test_creatures_have_kinds_of_their_own() -> None:
    categories = {edit.category for subject in SUBJECTS[3:] for edit in drawn_edits(subject, 8)}
    assert categories >= {"glasses", "fur colour", "pattern", "hat", "background", "two at once"}


def test_what_the_picture_hides_is_not_asked_for() -> None:
    man = next(p for p in (sample_person(n, "held_out") for n in range(100)) if p.noun == "man" and p.hair == "bald")
    man = replace(man, hair="short curly", facial_hair="none", glasses="none", mark="none")
    assert "beard" in {edit.category for edit in drawn_edits(man)}
    # the hair under a hat could have any colour, and so could the beard
    assert "beard" not in {edit.category for edit in drawn_edits(replace(man, headwear="turban"))}
    # behind sunglasses a creature's eyes could have any colour
    cat = replace(SUBJECTS[3], glasses="sunglasses", expression="smiling")  # type: ignore[type-var]
    other = replace(cat, eyes="#1f6a6a" if getattr(cat, "eyes") != "#1f6a6a" else "#5a2a5e")  # noqa: B009
    assert np.array_equal(render_array(cat), render_array(other))
    assert not {"glasses off", "glasses"} & {edit.category for edit in drawn_edits(cat)}
    assert "glasses off" in {edit.category for edit in drawn_edits(replace(cat, glasses="glasses"))}
