"""A folder that is whole at every moment, checked by killing the process that writes it."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from s2edit_pipeline import identity_folder as module
from s2edit_pipeline.identity_folder import atomic_folder


def write(target: Path, text: str) -> None:
    with atomic_folder(target) as folder:
        for name in ("a", "b"):
            (folder / name).write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.mark.parametrize("exchanges", [True, False])
def test_the_new_folder_takes_the_old_ones_place(
    tmp_path: Path, exchanges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(a: Path, b: Path) -> None:
        raise OSError(errno.EINVAL, "this file system exchanges nothing")

    if not exchanges:
        monkeypatch.setattr(module, "_exchange_in_one_step", refuse)
    target = tmp_path / "deep" / "ada"
    for text in ("one", "two", "three"):
        write(target, text)
        assert contents(target) == {"a": text, "b": text}
        assert [path.name for path in target.parent.iterdir()] == ["ada"]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    write(tmp_path / "ada", "one")
    with pytest.raises(RuntimeError, match="half way"), atomic_folder(tmp_path / "ada") as folder:
        (folder / "a").write_text("two")
        raise RuntimeError("half way")
    assert contents(tmp_path / "ada") == {"a": "one", "b": "one"}
    assert [path.name for path in tmp_path.iterdir()] == ["ada"]


def test_an_exchange_that_fails_for_good_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(a: Path, b: Path) -> None:
        raise OSError(errno.EACCES, "not yours")

    write(tmp_path / "ada", "one")
    monkeypatch.setattr(module, "_exchange_in_one_step", refuse)
    with pytest.raises(OSError, match="not yours"):
        write(tmp_path / "ada", "two")
    assert contents(tmp_path / "ada") == {"a": "one", "b": "one"}


def test_two_writers_leave_each_other_alone_and_the_dead_are_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".ada-dead.unfinished").mkdir()
    (tmp_path / ".ada-dead.unfinished" / "a").write_text("half")
    (tmp_path / ".adam-other.unfinished").mkdir()
    with atomic_folder(tmp_path / "ada") as first:
        (first / "a").write_text("one")
        write(tmp_path / "ada", "two")  # as another process would
        assert (first / "a").read_text() == "one"
    assert contents(tmp_path / "ada") == {"a": "one"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [".adam-other.unfinished", "ada"]


KILLED = """
import os, signal, sys
from pathlib import Path
from s2edit_pipeline.identity_folder import atomic_folder
target, n = Path(sys.argv[1]), 1 + int(sys.argv[2])
me, events = os.getpid(), 0

def count(event, arguments):
    global events
    if not event.startswith(("object", "import", "compile", "exec", "marshal", "sys", "os.kill")):
        events += 1
        if events == n:
            os.kill(me, signal.SIGKILL)

for round in range(2):  # the second over the first
    if round == 1:
        sys.addaudithook(count)
    with atomic_folder(target) as folder:
        for name in ("a", "b"):
            (folder / name).write_text(str(round))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="audit hooks and one-step exchange as Linux has them")
def test_killed_at_each_call_in_turn_it_is_the_old_or_the_new(tmp_path: Path) -> None:
    """SIGKILL before the n-th thing that the process asks of the system, for every n."""
    outcomes = []
    for n in range(1000):
        target = tmp_path / str(n) / "ada"
        done = subprocess.run([sys.executable, "-c", KILLED, str(target), str(n)], capture_output=True, text=True)
        found = contents(target)
        assert found in ({"a": "0", "b": "0"}, {"a": "1", "b": "1"}), (n, found)
        outcomes.append(found["a"])
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert outcomes == sorted(outcomes) and set(outcomes) == {"0", "1"}
    assert outcomes.count("0") > 10 and outcomes.count("1") > 1  # and killed after the exchange too
