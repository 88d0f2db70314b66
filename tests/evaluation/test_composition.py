"""Pairs whose composition can be drawn."""

from __future__ import annotations

import numpy as np
import pytest

from s2edit_pipeline.avatars.captions import describe
from s2edit_pipeline.avatars.world import changed_pixels, render_array
from s2edit_pipeline.evaluation.composition import (
    CompositionPair,
    composition_pairs,
    measure_compositions,
    sheet,
    table,
)

PAIRS = composition_pairs(30)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: p.part)
def test_prompts_leave_to_the_token_what_it_has_to_carry(pair: CompositionPair) -> None:
    own = getattr(pair.reference, "hair_color" if pair.part == "hair" else f"{pair.part}_color")
    words = pair.reference_prompt.split()
    before = words[words.index(pair.noun) - 1]
    assert before in ("a", "an", "with", "and") and before != own
    target = pair.target_prompt.split()
    assert target[target.index(pair.noun) - 1] == "[A]" and target.count("[A]") == 1
    assert pair.source.noun in target and pair.source.noun in pair.source_prompt.split()
    # but for the part's adjectives, the target says what the true picture's caption says, in its order
    articles = ("a", "an")
    truth = iter([w for w in describe(pair.truth).text.split() if w not in articles])
    assert all(word in truth for word in target if word not in ("[A]", *articles))


def test_the_truth_is_the_source_with_the_references_part() -> None:
    assert {pair.part for pair in PAIRS} == {"clothes", "headwear", "hair"}
    for pair in PAIRS:
        truth = pair.truth
        assert (truth.skin, truth.mark, truth.expression) == (
            pair.source.skin,
            pair.source.mark,
            pair.source.expression,
        )
        if pair.part == "clothes":  # the lower quarter is the reference's own, where neither hair nor beard hangs in
            assert (truth.print, truth.clothes_shade) == (pair.reference.print, pair.reference.clothes_shade)
        assert changed_pixels(pair.source, truth).any()
        assert not np.array_equal(render_array(truth), render_array(pair.source))


def test_measuring_makes_a_row_for_each_setting() -> None:
    from s2edit_pipeline import load_avatars

    pipe = load_avatars()
    pipe.set_progress_bar_config(disable=True)
    rows = measure_compositions(pipe, PAIRS[:2], num_steps=1, num_inference_steps=2)
    assert [row.name for row in rows] == ["both controls", "identity fine-tuning alone"]
    assert all(len(row.whole) == len(row.pictures) == 2 and np.isfinite(row.inside).all() for row in rows)
    assert table(rows).count("\n") == 4 and sheet(rows).size == (5 * 128, 2 * 128)
