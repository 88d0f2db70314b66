"""A manifest, read row by row: CSV, JSON lines or Parquet. A row's place lets it be read again without the others."""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO


@dataclass(frozen=True)
class Column:
    """One column: ``read`` makes a cell's value of what stands there, or raises ValueError with what was expected."""

    read: Callable[[Any], Any]
    required: bool = False


def text(cell: Any) -> str:
    if not isinstance(cell, str):
        raise ValueError("must be text")
    return cell


def whole_number(cell: Any) -> int:
    if isinstance(cell, str):
        try:
            return int(cell)
        except ValueError:
            raise ValueError("must be a whole number") from None
    if isinstance(cell, bool) or not isinstance(cell, (int, float)) or int(cell) != cell:
        raise ValueError("must be a whole number")
    return int(cell)


def value(cell: Any) -> Any:
    """Any argument's value: text is read as JSON where it is JSON (0.5, true, {"smiling": 2}), else taken as it is."""
    if not isinstance(cell, str):
        return cell
    try:
        return json.loads(cell)
    except json.JSONDecodeError:
        return cell


@dataclass(frozen=True)
class Row:
    """A row: its number, counted from 1; its place, see :meth:`Manifest.row_at`; and its cells that aren't empty."""

    number: int
    place: int
    cells: Mapping[str, Any]


class Manifest:
    """The rows of one file.

    Args:
        path: ends in .csv, .jsonl or .parquet. Text is UTF-8; the first line of a CSV names the columns.
        columns: those that a row may have.

    Raises:
        ValueError: another ending, a file that can't be read, or a column that isn't known.
    """

    def __init__(self, path: str | Path, columns: Mapping[str, Column]) -> None:
        self.path, self.columns = Path(path).absolute(), dict(columns)
        suffix = self.path.suffix.lower()
        if suffix not in _FORMATS:
            raise ValueError(f"{path} must be a .csv, .jsonl or .parquet file.")
        if not self.path.is_file():
            raise ValueError(f"{path}: there is no such file.")
        with self._named():
            self._file = _FORMATS[suffix](self.path)
            for name in self._file.names:
                self._check_name(name)
            for name in self._file.names if len(set(self._file.names)) < len(self._file.names) else ():
                if self._file.names.count(name) > 1:
                    raise ValueError(f"column {name!r} stands there twice.")
            missing = [name for name, one in self.columns.items() if one.required and name not in self._file.names]
            if self._file.has_header and missing:
                raise ValueError(f"the column {missing[0]!r} is missing.")

    def __iter__(self) -> Iterator[Row]:
        """All rows, checked.

        Raises:
            ValueError: a cell that can't be used; the message names the row and the column.
        """
        number = 0
        try:
            for number, (place, cells) in enumerate(self._file.rows(), start=1):
                yield Row(number, place, self._read(cells))
        except _BadCell as error:
            raise ValueError(f"{self.path.name}, row {number}, {error}") from error
        except _UNREADABLE as error:
            raise ValueError(f"{self.path.name}, row {number + 1}: {error}") from error

    def row_at(self, number: int, place: int) -> Row:
        """The row whose number and place iteration gave."""
        return Row(number, place, self._read(self._file.at(place)))

    def file(self, name: str) -> str:
        """A file's name in a cell, relative to the manifest's folder; addresses stay as they are."""
        return name if "://" in name else str(self.path.parent / name)

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except _UNREADABLE as error:
            raise ValueError(f"{self.path.name}, row 0 (the columns' names): {error}") from error

    def _check_name(self, name: Any) -> None:
        if name not in self.columns:
            close = difflib.get_close_matches(str(name), self.columns, 1)
            mend = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(self.columns)}."
            raise _BadCell(f"column {name!r} is unknown: {mend}")

    def _read(self, cells: Mapping[str, Any]) -> dict[str, Any]:
        read: dict[str, Any] = {}
        for name, cell in cells.items():
            column = self.columns.get(name)
            if column is None:
                self._check_name(name)
            elif cell is not None and cell != "":
                try:
                    read[name] = column.read(cell)
                except (ValueError, OverflowError) as error:
                    raise _BadCell(f"column {name!r}: {error}, not {cell!r}.") from None
        for name, column in self.columns.items():
            if column.required and name not in read:
                raise _BadCell(f"column {name!r}: is empty.")
        return read


class _BadCell(ValueError):
    """What is wrong in one column of one row."""


_UNREADABLE = (ValueError, OSError, csv.Error)  # not UTF-8, not JSON, not Parquet, cut short


class _Lines:
    """A file's lines as text, and where the next one begins."""

    def __init__(self, file: BinaryIO, start: int = 0) -> None:
        self.file, self.place = file, start
        file.seek(start)

    def __iter__(self) -> Iterator[str]:
        for line in self.file:
            begins, self.place = self.place, self.place + len(line)
            yield line.decode("utf-8-sig" if begins == 0 else "utf-8")


class _CsvFile:
    has_header = True

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            lines = _Lines(file)
            self.names: list[str] = next(csv.reader(lines, strict=True), [])
            self._first = lines.place
        if not self.names:
            raise ValueError("the file is empty; its first line must name them.")

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        with open(self.path, "rb") as file:
            yield from self._rows(file, self._first)

    def at(self, place: int) -> dict[str, Any]:
        with open(self.path, "rb") as file:
            return next(self._rows(file, place))[1]

    def _rows(self, file: BinaryIO, start: int) -> Iterator[tuple[int, dict[str, Any]]]:
        lines = _Lines(file, start)
        place = start
        for cells in csv.reader(lines, strict=True):
            if cells:
                if len(cells) > len(self.names):
                    raise ValueError(f"has {len(cells)} cells, and there are {len(self.names)} columns.")
                yield place, dict(zip(self.names, cells, strict=False))
            place = lines.place


class _JsonLinesFile:
    has_header = False
    names: Sequence[str] = ()

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        with open(self.path, "rb") as file:
            lines = _Lines(file)
            place = 0
            for line in lines:
                if line.strip():
                    yield place, self._record(line)
                place = lines.place

    def at(self, place: int) -> dict[str, Any]:
        with open(self.path, "rb") as file:
            return self._record(next(iter(_Lines(file, place))))

    @staticmethod
    def _record(line: str) -> dict[str, Any]:
        record = json.loads(line)
        if not isinstance(record, dict):
            raise ValueError('must be a JSON object, such as {"image": "ada.jpg"}.')
        return record


class _ParquetFile:
    has_header = True

    def __init__(self, path: Path) -> None:
        try:
            parquet: Any = import_module("pyarrow.parquet")
        except ImportError:
            raise ValueError(
                'Parquet needs PyArrow: pip install "s2edit-pipeline[ray]", or write it as .jsonl.'
            ) from None
        self._open = lambda: parquet.ParquetFile(path)
        with self._open() as file:
            self.names: list[str] = list(file.schema_arrow.names)
        self._kept: tuple[int, int, list[dict[str, Any]]] = (0, 0, [])

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        place = 0
        with self._open() as file:
            for batch in file.iter_batches(batch_size=_BATCH):
                for record in batch.to_pylist():
                    yield place, record
                    place += 1

    def at(self, place: int) -> dict[str, Any]:
        first, end, records = self._kept
        if not first <= place < end:
            self._kept = first, end, records = self._batch_with(place)
        return records[place - first]

    def _batch_with(self, place: int) -> tuple[int, int, list[dict[str, Any]]]:
        """The batch that a row is in, its row group found without reading those before it."""
        with self._open() as file:
            start = 0
            for group in range(file.num_row_groups):
                length = file.metadata.row_group(group).num_rows
                if place < start + length:
                    for batch in file.iter_batches(batch_size=_BATCH, row_groups=[group]):
                        if place < start + batch.num_rows:
                            return start, start + batch.num_rows, batch.to_pylist()
                        start += batch.num_rows
                start += length
        raise ValueError(f"has no row {place + 1} any more.")


_BATCH = 1024
_FORMATS: Mapping[str, Callable[[Path], Any]] = {".csv": _CsvFile, ".jsonl": _JsonLinesFile, ".parquet": _ParquetFile}
