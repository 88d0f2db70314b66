"""docs/method.md's tables are true: every module, function, argument and test that they name is there."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import fields
from functools import reduce
from pathlib import Path

import pytest

from s2edit_pipeline import S2EditPipeline
from s2edit_pipeline.edit_settings import EditSettings
from s2edit_pipeline.fit_settings import FitSettings

ROOT = Path(__file__).parent.parent
HEADER = ["the paper", "where", "switch", "test"]


def rows() -> Iterator[tuple[str, ...]]:
    """The cells of each line of each table with these four columns."""
    inside = False
    for line in (ROOT / "docs" / "method.md").read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if cells == HEADER:
            inside = True
        elif not cells:
            inside = False
        elif inside and set("".join(cells)) != {"-"}:
            yield tuple(cells)


ROWS = list(rows())


def named(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_the_tables_are_found() -> None:
    assert len(ROWS) >= 20 and all(len(row) == 4 for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_what_a_line_names_is_there(row: tuple[str, ...]) -> None:
    _, where, switch, test = row
    module = None
    for name in named(where):
        dotted, _, key = name.removesuffix('"]').partition('["')
        first, *inner = dotted.split(".")
        if (ROOT / "s2edit_pipeline" / f"{first}.py").exists():
            module = importlib.import_module(f"s2edit_pipeline.{first}")
        else:
            inner = [first, *inner]  # of the module that was named last
        assert module is not None, name
        entry = reduce(getattr, inner, module)
        assert not key or key in entry, name
    known: set[str] = set()
    for call in ("fit_identity", "invert", "__call__", "load_identity"):
        known |= set(inspect.signature(getattr(S2EditPipeline, call)).parameters)
    for settings in (FitSettings, EditSettings):
        known |= {field.name for field in fields(settings)}
    for name in named(switch):
        if "=" in name:
            assert name.split("=")[0] in known, name
    assert named(test), "no test is named"
    for name in named(test):
        file, _, function = name.partition("::")
        assert (ROOT / file).is_file(), name
        assert not function or f"def {function}(" in (ROOT / file).read_text("utf-8"), name


NO_READINGS = {"confine_from", "settle_from", "optimizer", "gradient_checkpointing"}
"""What no argument reaches, and what is about memory alone."""


def test_every_switch_of_ours_is_in_the_tables() -> None:
    """What the method leaves to turn; sizes, generators and the like are no readings of the paper."""
    switches = {name.split("=")[0] for _, _, switch, _ in ROWS for name in named(switch)}
    for settings in (FitSettings, EditSettings):
        missing = {field.name for field in fields(settings)} - switches - NO_READINGS
        assert not missing, f"docs/method.md says nothing of {sorted(missing)}"
