"""A row's work, whatever the command: begun, done once or set aside with its reason."""

from __future__ import annotations

import argparse
import errno
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from .manifest import Column, Manifest, Row
from .results import Outcome, Results, digest_of

MOST_DEATHS = 5
"""A row at which the process was killed so often is set aside: it may be the row that kills it."""

_NOT_THE_ROWS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""No room, or no right to write: so every row would fail, and the run ends instead."""


class Work(Protocol):
    """What one command does with a row."""

    command: str
    columns: Mapping[str, Column]
    settings: Mapping[str, Any]
    """What the results depend on beside the rows."""

    def full(self, cells: Mapping[str, Any]) -> dict[str, Any]:
        """The cells, with defaults in place of what the row leaves open.

        Raises:
            ValueError: cells that don't go together; the message begins with the column.
        """

    def suffix(self, cells: Mapping[str, Any]) -> str:
        """Of the result's file; "" where it is a folder."""

    def do(self, pipe: Any, cells: Mapping[str, Any], begun: Path, target: Path) -> None:
        """Make the result and put it at ``target`` in one step; ``begun`` holds what is on its way."""


class Desk:
    """A command's work on one manifest, into one folder.

    Args:
        args: the command line's.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.work = args.make_work(args)
        self.manifest = Manifest(args.manifest, self.work.columns)
        self.results = Results(args.out)

    def located(self, row: Row) -> tuple[dict[str, Any], str, str]:
        """A row's cells, its digest and its result's place.

        Raises:
            ValueError: see :meth:`Work.full`.
        """
        try:
            cells = self.work.full(row.cells)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.manifest.path.name}, row {row.number}, column {error}") from error
        digest = digest_of(cells, self.work.settings)
        return cells, digest, self.results.place(digest, self.work.suffix(cells))

    def do(self, pipe: Any, row: Row) -> Outcome:
        """Do one row, unless it is done.

        Raises:
            OSError: nothing can be written any more.
        """
        cells, digest, place = self.located(row)
        if self.results.has(place):
            self.results.end(digest)  # killed after the result was there, before this
            return Outcome(row.number, digest, place, "there")
        begun, deaths = self.results.begin(digest)
        started, reason = time.perf_counter(), ""
        if deaths >= MOST_DEATHS:
            reason = f"the process was killed {deaths} times while it was at this row"
        else:
            try:
                self.work.do(pipe, self._files(cells), begun, self.results.path(place))
            except Exception as error:
                if isinstance(error, OSError) and error.errno in _NOT_THE_ROWS:
                    raise
                if not self.results.has(place):  # else another worker was quicker, and cleared this one's things away
                    reason = " ".join(str(error).split()) or type(error).__name__
                    if not isinstance(error, (ValueError, TypeError, OSError)):
                        reason = f"{type(error).__name__}: {reason}"
        self.results.end(digest)
        seconds = time.perf_counter() - started
        return Outcome(row.number, digest, place, "failed" if reason else "done", reason, seconds)

    def _files(self, cells: Mapping[str, Any]) -> dict[str, Any]:
        """The cells, those that name files with the files' places."""
        named = {name: self.manifest.file(cells[name]) for name in ("image", "mask", "edit_mask") if name in cells}
        if "identity" in cells and Path(self.manifest.file(cells["identity"])).is_dir():
            named["identity"] = self.manifest.file(cells["identity"])
        return {**cells, **named}
