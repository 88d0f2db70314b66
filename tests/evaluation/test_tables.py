"""The renderer of tables: read back by a reader of its own."""

from __future__ import annotations

import re

import pytest

from s2edit_pipeline.evaluation.tables import markdown_table, number, with_interval


def _read(text: str) -> list[list[str]]:
    """Cells as a Markdown reader takes them: split at bars that no backslash stands before."""
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines()]
    return [[cell.strip().replace("\\|", "|") for cell in line] for line in lines]


def test_every_cell_comes_back_from_the_table() -> None:
    head, rows = ["|cos|", "n"], [["a | b", 3], ["two\nlines", None], ["", "0.5"]]
    assert _read(markdown_table(head, rows)) == [
        ["|cos|", "n"], ["---", "---"], ["a | b", "3"], ["two lines", "-"], ["", "0.5"],
    ]  # fmt: skip
    assert _read(markdown_table(head, [])) == [["|cos|", "n"], ["---", "---"]]


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has 1 cells for 2 columns: a, b"):
        markdown_table(["a", "b"], [["x", "y"], ["x"]])


def test_numbers_and_intervals() -> None:
    assert (number(1.005, ".1f"), number(None)) == ("1.0", None)
    assert with_interval({"mean": 1.234, "low": -0.5, "high": 2.0}, "+.1f") == "+1.2 [-0.5, +2.0]"
    assert with_interval(None) is None
