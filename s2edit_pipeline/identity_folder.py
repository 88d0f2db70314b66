"""A folder that is written whole or not at all, whenever the process may be killed."""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_UNFINISHED = ".unfinished"


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside ``target`` to write into; at the end of the context it takes ``target``'s place.

    Killed at any moment, ``target`` is the old folder, whole, or the new one, whole, on Linux and macOS, whose kernels
    exchange two names in one step. Where the system or the file system can't, ``target`` is missing for an instant
    between two renames. What killed processes left behind is cleared away by the next one.

    Args:
        target: absolute; a folder, whose files are replaced all, or nothing yet.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(target)
    made, lock = _make_locked(target)
    try:
        yield made
        made.chmod(stat.S_IMODE(target.stat().st_mode) if target.is_dir() else 0o777 & ~_umask())
        for entry in [*made.rglob("*"), made]:
            _flush(entry)
        if target.is_dir():
            _exchange(made, target)
        else:
            os.rename(made, target)
        _flush(target.parent)
    finally:
        shutil.rmtree(made, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _umask() -> int:
    mask = os.umask(0o077)  # there is no asking without setting
    os.umask(mask)
    return mask


def _make_locked(target: Path) -> tuple[Path, int | None]:
    """A new folder, and a descriptor whose lock says that somebody is at work there."""
    while True:
        made = Path(tempfile.mkdtemp(prefix=f".{target.name}-", suffix=_UNFINISHED, dir=target.parent))
        if fcntl is None:
            return made, None
        lock = os.open(made, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if made.is_dir():
            return made, lock
        os.close(lock)  # another process saw it before it was locked, and cleared it away


def _clear_leftovers(target: Path) -> None:
    if fcntl is None:
        return  # no telling whether its process still lives
    for left in target.parent.glob(f".{glob.escape(target.name)}-*{_UNFINISHED}"):
        with suppress(OSError):
            lock = os.open(left, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(lock)


def _flush(path: Path) -> None:
    """On the disk before the names change: a power cut must not leave the new name on empty files."""
    is_folder = path.is_dir()
    if is_folder and fcntl is None:
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(made: Path, target: Path) -> None:
    """The two folders swap names."""
    try:
        _exchange_in_one_step(made, target)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
            raise
        old = made.with_suffix(".old" + _UNFINISHED)
        os.rename(target, old)
        try:
            os.rename(made, target)
        except OSError:
            os.rename(old, target)
            raise
        os.rename(old, made)


def _exchange_in_one_step(a: Path, b: Path) -> None:
    """Raises:
    OSError: ENOSYS, EINVAL or ENOTSUP where that isn't possible.
    """
    libc: Any = ctypes.CDLL(None, use_errno=True) if sys.platform in ("linux", "darwin") else None
    if sys.platform == "linux" and hasattr(libc, "renameat2"):
        at_cwd, rename_exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        failed = libc.renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), rename_exchange)
    elif sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        rename_swap = 2
        failed = libc.renamex_np(os.fsencode(a), os.fsencode(b), rename_swap)
    else:
        raise OSError(errno.ENOSYS, "no exchange of names here")
    if failed:
        raise OSError(ctypes.get_errno(), f"{a} and {b} can't be exchanged")
