"""Tables as Markdown: the one place that writes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

MISSING = "-"
"""A cell's text where there is no value."""


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str | int | None]]) -> str:
    """Lines of a Markdown table.

    Args:
        head: the columns' titles.
        rows: a cell for each column. None becomes ``MISSING``; a ``|`` within a cell is escaped, and a line break
            becomes a space.

    Raises:
        ValueError: a row with another number of cells than ``head``.
    """
    lines = [_line(head), _line(["---"] * len(head))]
    for row in rows:
        if len(row) != len(head):
            raise ValueError(f"The row {list(row)} has {len(row)} cells for {len(head)} columns: {', '.join(head)}.")
        lines.append(_line(row))
    return "\n".join(lines)


def _line(cells: Iterable[str | int | None]) -> str:
    texts = (MISSING if cell is None else " ".join(str(cell).split()).replace("|", "\\|") for cell in cells)
    return "| " + " | ".join(texts) + " |"


def number(value: float | None, spec: str = ".2f") -> str | None:
    """``value`` by the format ``spec``; None stays None, which a table shows as ``MISSING``."""
    return None if value is None else format(value, spec)


def with_interval(values: Mapping[str, float] | None, spec: str = ".2f") -> str | None:
    """``mean [low, high]`` of a mapping with these keys; None stays None."""
    if values is None:
        return None
    mean, low, high = (format(values[key], spec) for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"
