"""The truth of an edit, and the grades that pictures get against it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from s2edit_pipeline.avatars.world import changed_pixels, render, sample_creature, sample_person
from s2edit_pipeline.evaluation.metrics.counterfactual import counterfactual, demo_edits, grade, varied_edits


def test_demo_edits_make_sense_for_everyone() -> None:
    for seed in range(60):
        person = sample_person(seed, "held_out")
        edits = demo_edits(person)
        assert len(edits) >= 3 or not person.hair_visible
        for edit in edits:
            assert edit.source_prompt != edit.target_prompt
            assert changed_pixels(edit.subject, edit.target).any()
            assert person.noun in edit.target_prompt
            # what no word names stays
            assert (edit.target.skin, edit.target.print, edit.target.mark) == (person.skin, person.print, person.mark)


def test_demo_edits_make_sense_for_every_creature() -> None:
    for seed in range(60):
        creature = sample_creature(seed, "held_out")
        edits = demo_edits(creature)
        assert len({edit.target for edit in edits} | {creature}) == 5
        for edit in edits:
            assert changed_pixels(creature, edit.target).any() and creature.noun in edit.target_prompt
            assert (edit.target.mark, edit.target.eyes, edit.target.ears) == (
                creature.mark, creature.eyes, creature.ears,
            )  # fmt: skip


def test_an_edit_that_changes_nothing_is_refused() -> None:
    person = sample_person(0, "held_out")
    with pytest.raises(ValueError, match="changes nothing"):
        counterfactual(person, "same", expression=person.expression)


def test_grades_come_out_in_the_right_order() -> None:
    person = sample_person(3, "held_out")
    edit = counterfactual(person, "smile", expression="smiling")
    truth = edit.truth()
    blurred, unedited = truth.filter(ImageFilter.GaussianBlur(1)), render(person)
    someone_else = render(sample_person(4, "held_out"))
    perfect, soft, none, wrong = (grade(edit, p) for p in (truth, blurred, unedited, someone_else))
    assert perfect.whole == perfect.inside == perfect.outside == float("inf")
    assert soft.inside > none.inside and none.outside == float("inf")
    assert wrong.outside < soft.outside and wrong.whole < none.whole
    assert none.inside == pytest.approx(none.unedited_inside)


def test_inside_and_outside_are_the_changed_pixels_and_the_rest() -> None:
    person = sample_person(3, "held_out")
    edit = counterfactual(person, "smile", expression="smiling")
    truth = np.asarray(edit.truth()).astype(int)
    changed = changed_pixels(edit.subject, edit.target)
    spoiled = truth.copy()
    spoiled[~changed] = np.where(spoiled[~changed] > 127, spoiled[~changed] - 10, spoiled[~changed] + 10)
    got = grade(edit, Image.fromarray(spoiled.astype(np.uint8)))
    assert got.inside == float("inf")
    assert got.outside == pytest.approx(20 * np.log10(255 / 10))


def test_varied_edits_are_six_or_more_and_each_another() -> None:
    for seed in range(40):
        person = sample_person(seed, "held_out")
        edits = varied_edits(person)
        assert 6 <= len(edits) <= 8
        assert len({edit.target for edit in edits} | {person}) == len(edits) + 1
        assert all(changed_pixels(person, edit.target).any() for edit in edits)
