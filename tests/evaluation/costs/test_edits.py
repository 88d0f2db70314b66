"""What edits cost: against counts by hand, and ratios of made-up seconds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from s2edit_pipeline import load_avatars
from s2edit_pipeline.evaluation.costs.counts import UNetCounts
from s2edit_pipeline.evaluation.costs.edits import ITEMS, measure_edit_costs, null_text_ratios
from s2edit_pipeline.evaluation.costs.timing import Timing


@pytest.fixture(scope="module")
def avatars() -> Any:
    pipe = load_avatars()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_every_item_beside_the_stock_pipeline(avatars: Any) -> None:
    costs = measure_edit_costs(avatars, 3, repeats=1)
    rows = {row.item: row for row in costs.rows}
    assert list(rows) == list(ITEMS)
    # guided: two branches a step; edited: 3 up, the source once more, and down 2 guided steps of 2 rows and one of one
    evaluations = {"stock": 6, "first": 3 + 1 + 5, "inverted_first": 4 + 5, "further": 5, "three": 3 + 1 + 3 * 5}
    assert {item: rows[item].evaluations for item in evaluations} == evaluations
    null_text = rows["null_text"]
    assert 3 * (1 + 1 + 1 + 1) + 12 < null_text.evaluations <= 3 * 13 + 12
    assert 3 <= null_text.backward_evaluations <= 30 and rows["first"].backward_evaluations == 0
    assert null_text.cost == null_text.evaluations + 2 * null_text.backward_evaluations <= costs.null_text_cost
    assert costs.null_text_cost == 3 * 13 + 12 + 2 * 30
    assert all(row.times_stock == row.seconds[0] / rows["stock"].seconds[0] for row in costs.rows)
    # pinned, the source is the autoencoder's own picture
    assert rows["first"].psnr == rows["further"].psnr == rows["three"].psnr
    assert rows["first"].psnr > null_text.psnr > 15 and rows["stock"].psnr is None
    assert costs.table().count("not measured") == 0


def test_what_is_left_out_says_so(avatars: Any) -> None:
    costs = measure_edit_costs(avatars, 1, repeats=2, items=["further"])
    assert [(row.item, len(row.seconds)) for row in costs.rows] == [("stock", 2), ("further", 2)]
    assert set(costs.ratios.values()) == {None}
    assert costs.table().count("not measured") == 4 + 3
    assert costs.side is None
    with pytest.raises(ValueError, match="'edit' is unknown; choose from stock, first"):
        measure_edit_costs(avatars, items=["edit"])


def test_the_side_is_that_of_all_of_them(avatars: Any) -> None:
    seen: list[tuple[int, ...]] = []
    handle = avatars.unet.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape[2:])))
    items = ["first", "inverted_first", "further"]
    assert measure_edit_costs(avatars, 1, repeats=1, items=items, side=64).side == 64
    handle.remove()
    assert set(seen) == {(8, 8)} and len(seen) > 8


def test_ratios_to_null_text_are_within_a_turn() -> None:
    def timing(seconds: float, evaluations: int, backward: int = 0) -> Timing:
        return Timing((seconds, 3 * seconds, seconds), UNetCounts(evaluations, backward), None)

    timings = {"first": timing(1.7, 145), "inverted_first": timing(1.5, 126), "null_text": timing(13.6, 700, 280)}
    assert list(null_text_ratios(timings).values()) == pytest.approx([(700 + 2 * 280) / 145, 13.6 / 1.7, 13.6 / 1.5])
    # a busy moment meets both
    busy = replace(timings["first"], seconds=(1.7, 1.7, 1.7))
    ratio = null_text_ratios({**timings, "first": busy})["the first edit in one call, seconds"]
    assert ratio == pytest.approx(13.6 / 1.7)
    del timings["first"]
    assert list(null_text_ratios(timings).values()) == [None, None, pytest.approx(13.6 / 1.5)]


@pytest.mark.slow
def test_edits_cost_what_they_may(avatars: Any) -> None:
    """Of pictures large enough for the layers to take the time, against drawing one; null-text at the model's size."""
    items = ["first", "inverted_first", "further"]
    costs = measure_edit_costs(avatars, 25, repeats=3, items=items, side=256)
    times = {row.item: row.times_stock for row in costs.rows}
    assert times["first"] <= 1.7 and times["inverted_first"] <= 1.7 and times["further"] <= 1.15, times
    ratios = measure_edit_costs(avatars, 50, repeats=1, items=["first", "inverted_first", "null_text"]).ratios
    cost, *seconds = ratios.values()
    assert cost is not None and cost >= 10 and all(s is not None and s >= 8 for s in seconds), ratios
