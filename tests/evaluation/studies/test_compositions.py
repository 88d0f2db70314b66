"""Pairs whose composition can be drawn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from s2edit_pipeline.avatars.captions import describe
from s2edit_pipeline.avatars.world import PERSON_ATTRIBUTES, changed_pixels, render
from s2edit_pipeline.evaluation.metrics.classifier import load_attribute_classifier
from s2edit_pipeline.evaluation.studies.compositions import (
    SETTINGS,
    CompositionPair,
    composition_pairs,
    measure_compositions,
    part_agreement,
    sheet,
)

PAIRS = composition_pairs(30)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: p.part)
def test_prompts_leave_to_the_token_what_it_has_to_carry(pair: CompositionPair) -> None:
    words, target = pair.reference_prompt.split(), pair.target_prompt.split()
    assert target[target.index(pair.noun) - 1] == "[A]" and target.count("[A]") == 1
    assert pair.source.noun in target and pair.source.noun in pair.source_prompt.split()
    if pair.part == "mark":  # no word says it: all others are said
        assert words == describe(pair.reference).text.split() and pair.noun in ("lady", "man")
    else:
        before = words[words.index(pair.noun) - 1]
        assert before in ("a", "an", "with", "and")
        assert target[target.index("[A]") - 1] in ("a", "an", "with", "and")
    if pair.part == "glasses":
        assert pair.noun == "glasses" and "sunglasses" not in (*words, *target)
    # but for the part's adjectives, the target says what the true picture's caption says, in its order
    articles = ("a", "an")
    words_of_truth = [word for word in describe(pair.truth).text.split() if word not in articles]
    if pair.part == "glasses":
        words_of_truth = [word.replace("sunglasses", "glasses") for word in words_of_truth]
    truth = iter(words_of_truth)
    assert all(word in truth for word in target if word not in ("[A]", *articles))


def test_the_truth_is_the_source_with_the_references_part() -> None:
    assert [pair.part for pair in PAIRS[:6]] == ["clothes", "headwear", "hair", "glasses", "facial_hair", "mark"]
    for pair in PAIRS:
        moved = {name for name in vars(pair.truth) if getattr(pair.truth, name) != getattr(pair.source, name)}
        assert moved and all(name.startswith((pair.part, "garment", "print", "cut")) for name in moved)
        assert all(getattr(pair.truth, name) == getattr(pair.reference, name) for name in moved)
        assert changed_pixels(pair.source, pair.truth).any()
    assert {pair.reference.glasses for pair in PAIRS if pair.part == "glasses"} == {"glasses", "sunglasses"}
    assert all(p.reference.hair_color == p.source.hair_color for p in PAIRS if p.part == "facial_hair")


def test_nobody_is_in_two_pairs_and_other_pairs_are_of_other_people() -> None:
    others = composition_pairs(6, sources_from=2_000, references_from=20_000)
    people = [person for pair in (*PAIRS, *others) for person in (pair.source, pair.reference)]
    assert len(set(people)) == len(people)


def test_a_mark_is_looked_for_where_it_is() -> None:
    for pair in PAIRS:
        if pair.part != "mark":
            assert pair.reference_mask is None
            continue
        mark = changed_pixels(pair.reference, replace(pair.reference, mark="none"))
        mask = pair.reference_mask
        assert mask is not None and mask.shape == (128, 128) and mask.sum() < 0.2 * mask.size
        rows, columns = np.nonzero(mark)
        near = np.zeros_like(mask)
        for row, column in zip(rows, columns, strict=True):
            near[row - 8 : row + 9, column - 8 : column + 9] = True
        assert np.array_equal(mask, near)


def test_agreement_is_of_the_parts_own_words() -> None:
    classifier = load_attribute_classifier()
    for pair in PAIRS[:6]:
        of_truth, of_source = (part_agreement(classifier, pair, render(p)) for p in (pair.truth, pair.source))
        if pair.part == "mark":
            assert np.isnan(of_truth)
        else:
            named = any(getattr(pair.truth, name) != getattr(pair.source, name) for name in PERSON_ATTRIBUTES)
            assert of_truth == 1.0 and (of_source < 1.0) is named


def test_measuring_makes_a_row_for_each_setting() -> None:
    from s2edit_pipeline import load_avatars

    pipe = load_avatars()
    pipe.set_progress_bar_config(disable=True)
    pairs, fits = [PAIRS[0], PAIRS[5]], []
    fit = pipe.fit_identity
    pipe.fit_identity = lambda *args, **changes: fits.append(changes) or fit(*args, **changes)
    settings = {
        "neither": SETTINGS["identity fine-tuning alone"],
        "neither, not confined": replace(SETTINGS["identity fine-tuning alone"], edit={"blend_words": False}),
    }
    report = measure_compositions(pipe, pairs, settings, num_steps=1, num_inference_steps=2)
    rows = report.rows
    assert [row.name for row in rows] == list(settings) and len(fits) == 2  # both fit alike
    assert all(len(row.whole) == len(row.pictures) == 2 and np.isfinite(row.inside).all() for row in rows)
    assert rows[0].outside[0] != rows[1].outside[0]
    assert np.isnan(rows[0].agreement).tolist() == [False, True]
    text = report.table()
    assert text.count("\n") == 1 + 3 * 3 and "| mark (1) | neither |" in text and "nan" not in text
    assert sheet(report).size == (5 * 128, 2 * 128)


def test_each_control_is_off_alone_and_both_are() -> None:
    off = {"semantic_weight": 0.0, "spatial_control": False}
    fits_of_settings = [dict(setting.fit) for setting in SETTINGS.values()]
    assert fits_of_settings == [{}, {"semantic_weight": 0.0}, {"spatial_control": False}, off]
