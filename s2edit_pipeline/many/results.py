"""The folder of results: a result is there, whole, or it isn't, and that alone says whether its row is done.

``results/3f8/3f8a…`` is a row's result, named by the digest of the row and the settings; ``begun/3f8a…`` what is on its
way; ``failed.jsonl`` the rows set aside; ``results.jsonl`` what became of each row; ``report.json`` the last run's
counts.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_MARK = "many.json"
_FORMAT = 1


@dataclass(frozen=True)
class Outcome:
    """What became of a row.

    Attributes:
        number: the row's.
        digest: of the row and the settings.
        result: its place in the folder of results.
        status: "done"; "there", it was done already; or "failed".
        reason: why it failed.
        seconds: it took.
    """

    number: int
    digest: str
    result: str
    status: str
    reason: str = ""
    seconds: float = 0.0


def digest_of(cells: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """32 hexadecimal digits; ``id`` is the user's own and has no part in it."""
    own = {name: cell for name, cell in cells.items() if name != "id"}
    words = json.dumps([own, settings], sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(words.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


class Results:
    """A folder of results.

    Args:
        folder: absolute.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        self._root = str(self.folder)
        self.failed_file = self.folder / "failed.jsonl"

    @staticmethod
    def place(digest: str, suffix: str) -> str:
        """Where a result is, in the folder."""
        return f"results/{digest[:3]}/{digest}{suffix}"

    def has(self, place: str) -> bool:
        return os.path.exists(f"{self._root}/{place}")

    def path(self, place: str) -> Path:
        return self.folder / place

    def open(self, command: str) -> None:
        """Make the folder, or take up one that this command began.

        Raises:
            ValueError: it is a file, another command's, or has other things in it.
        """
        mark = self.folder / _MARK
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"--out {self.folder} is a file; give a folder.")
        if mark.exists():
            found = json.loads(mark.read_text("utf-8"))
            if found != {"format": _FORMAT, "command": command}:
                raise ValueError(f"--out {self.folder} holds results of {found.get('command')}; give another folder.")
            return
        if self.folder.is_dir() and any(not name.name.startswith(".") for name in self.folder.iterdir()):
            raise ValueError(f"--out {self.folder} has other things in it; give a new or an empty folder.")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(mark, [json.dumps({"format": _FORMAT, "command": command})])

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else's run is at work here meanwhile, where the system can tell.

        Raises:
            ValueError: one is.
        """
        with open(self.folder / ".lock", "ab") as file:
            if fcntl is not None:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise ValueError(f"another run is at work in {self.folder}; wait for its end.") from None
            yield

    # ------------------------------------------------------------------------ on its way

    def begin(self, digest: str) -> tuple[Path, int]:
        """The folder for what is on its way to this result, and how often it was begun before and not ended."""
        folder = self.folder / "begun" / digest
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "begun", "ab") as file:
            before = file.tell()
            file.write(b".")
        return folder, before

    def end(self, digest: str) -> None:
        """Clear away what was on its way."""
        shutil.rmtree(self.folder / "begun" / digest, ignore_errors=True)

    # ------------------------------------------------------------------------ set aside

    def set_aside(self, outcome: Outcome, cells: Mapping[str, Any]) -> None:
        """Keep why a row failed, one line in one write; a line that a killed process left half is closed first."""
        facts = {"row": outcome.number} | ({"id": cells["id"]} if "id" in cells else {})
        facts |= {"reason": outcome.reason, "digest": outcome.digest, "result": outcome.result}
        line = json.dumps(facts, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
        with open(self.failed_file, "a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else b"\n" + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def failures(self) -> Iterator[dict[str, Any]]:
        """What was set aside, the earliest first; half a line is passed over, its row is tried again."""
        if not self.failed_file.exists():
            return
        with open(self.failed_file, "rb") as file:
            for line in file:
                try:
                    facts = json.loads(line)
                except ValueError:
                    continue
                yield facts

    def tidy_failures(self, known: set[bytes]) -> None:
        """Keep of each row its last failure, and only of rows that are ``known`` (their digests) and still not done."""
        last = {bytes.fromhex(facts["digest"]): i for i, facts in enumerate(self.failures())}
        if not last:
            return
        kept = (
            json.dumps(facts, ensure_ascii=False)
            for i, facts in enumerate(self.failures())
            if last[key := bytes.fromhex(facts["digest"])] == i and key in known and not self.has(facts["result"])
        )
        write_whole(self.failed_file, kept)


def write_whole(path: Path, lines: Iterable[str]) -> None:
    """Write ``lines`` beside ``path``, on the disk; then they take its place."""
    descriptor, unfinished = tempfile.mkstemp(prefix=f".{path.name}-", suffix=".unfinished", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="surrogatepass") as file:
            for line in lines:
                file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise
