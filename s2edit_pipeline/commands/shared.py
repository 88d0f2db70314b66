"""What every command shares: its model, its answer as text or JSON, and errors in one line."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..pipeline import S2EditPipeline

FAILED, BAD_ARGUMENTS = 1, 2
"""Exit statuses beside 0."""

DTYPES = ("float32", "bfloat16", "float16")
SHOW_TRACEBACK = "S2EDIT_TRACEBACK"
"""The environment variable that has errors shown whole."""

EXTRAS = {
    "dicebear": "avatars", "dicebear_core": "avatars", "resvg_py": "avatars", "gradio": "app", "shtab": "cli",
    "c2pa": "c2pa", "matplotlib": "evaluation", "skimage": "evaluation",
}  # fmt: skip
"""Packages that aren't installed with this one -> the extra that brings them."""


class BadArguments(Exception):
    """Arguments that can't be used, found before any work."""


FAULTS = (
    BadArguments, ValueError, TypeError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError,
    PermissionError,
)  # fmt: skip
"""Errors whose mend is another argument."""


@dataclass(frozen=True)
class Answer:
    """What a command has done: ``lines`` for people, ``facts`` for programs."""

    lines: tuple[str, ...]
    facts: Mapping[str, Any]


def add_answer(parser: argparse.ArgumentParser) -> None:
    """``--json``."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def add_model(parser: argparse.ArgumentParser) -> None:
    """``--model``, ``--device``, ``--dtype``, ``--seed``, ``--json``."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", help="a diffusers folder or Hub name (default: the embedded model of drawn avatars)")
    group.add_argument("--device", help="where to work, such as cuda or cpu (default: a GPU if there is one)")
    group.add_argument("--dtype", choices=DTYPES, help="(default: bfloat16 on a GPU with --model, else float32)")
    group.add_argument("--seed", type=int, default=0, help="makes a fit repeatable (default: %(default)s)")
    add_answer(parser)


def load_model(args: argparse.Namespace) -> S2EditPipeline:
    """The pipeline that ``args`` name, on its device, quiet but for its progress bars on stderr."""
    import torch

    device = checked_device(args.device) if args.device else _best_device()
    on_gpu = device.split(":")[0] in ("cuda", "xpu", "mps")
    dtype = getattr(torch, args.dtype or ("bfloat16" if args.model and on_gpu else "float32"))
    pipe = open_model(args.model, dtype=dtype).to(device)
    is_seen = sys.stderr.isatty() and not args.json
    pipe.set_progress_bar_config(disable=not is_seen, leave=False, file=sys.stderr)
    return pipe


def open_model(model: str | None, **options: Any) -> S2EditPipeline:
    """The pipeline of ``--model``, the embedded one's of None, loaded in silence.

    Args:
        options: for ``from_pretrained``, such as ``dtype``.

    Raises:
        BadArguments: no such model, or none that can be edited with.
    """
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    from ..avatars import load_avatars
    from ..pipeline import S2EditPipeline

    if model is not None:
        _check_model(model)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable_progress_bar()
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # of the loader's remarks; the pipeline's own warnings are for the user
    try:
        return load_avatars(**options) if model is None else S2EditPipeline.from_pretrained(model, **options)
    except OSError as error:
        if model is None or Path(model).is_dir():
            raise
        raise BadArguments(
            f"--model {model}: there is no folder of that name here, and {_hubs_answer(error)}."
        ) from error
    finally:
        logging.set_verbosity(level)


def _check_model(model: str) -> None:
    """Raises:
    BadArguments: what ``model`` names is no model that can be edited with.
    """
    folder, index = Path(model), Path(model) / "model_index.json"
    if folder.is_file():
        raise BadArguments(f"--model {model} is a file; give a diffusers folder, with a model_index.json in it.")
    if not folder.is_dir():
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", model):
            raise BadArguments(f"--model {model}: there is no such folder, and no model on the Hub is called so.")
        return
    if (folder / "identity.json").is_file():
        raise BadArguments(f"--model {model} is an identity; its model is named in it: s2edit identity show {model}.")
    if not index.is_file():
        raise BadArguments(f"--model {model} is no diffusers folder: it holds no model_index.json.")
    try:
        named = json.loads(index.read_text("utf-8"))
    except ValueError as error:
        raise BadArguments(f"--model {model}: its model_index.json is damaged ({error}).") from error
    if not isinstance(named, dict) or not named.keys() & {"unet", "transformer"}:
        raise BadArguments(f"--model {model}: its model_index.json names no unet and no transformer to edit with.")


def _hubs_answer(error: BaseException | None) -> str:
    from huggingface_hub.errors import RepositoryNotFoundError

    while error is not None:
        if isinstance(error, RepositoryNotFoundError):
            return "the Hub has none that may be read from here (of a private one: hf auth login)"
        error = error.__cause__ or error.__context__
    return "the Hub didn't give it: it can't be reached, or what is there is no diffusers model"


def checked_device(device: str) -> str:
    """``device``, where PyTorch has it.

    Raises:
        BadArguments: it hasn't.
    """
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise BadArguments(
            f"--device {device!r} is none that PyTorch knows; such as cuda, cuda:1, mps or cpu."
        ) from error
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(kind, True):
        raise BadArguments(
            f"--device {device}: PyTorch finds no {kind.upper()} device here; leave it out, or take cpu."
        )
    return device


def check_picture_place(flag: str, path: str | None) -> None:
    """Look before any work whether a picture can be written to ``path``; its folder is made.

    Args:
        flag: as it is called in errors.

    Raises:
        BadArguments: it can't.
    """
    from ..picture_saving import SUFFIXES

    if path is None:
        return
    place = Path(path)
    if place.is_dir():
        raise BadArguments(f"{flag} {path} is a folder; give a file in it, such as {place / 'picture.png'}.")
    if place.suffix.lower() not in SUFFIXES:
        raise BadArguments(f"{flag} {path}: pictures are written as {', '.join(sorted(SUFFIXES))}.")
    check_folder_place(flag, str(place.parent))
    place.parent.mkdir(parents=True, exist_ok=True)


def check_folder_place(flag: str, path: str) -> None:
    """Look before any work whether the folder ``path`` is there or can be made, and can be written into.

    Raises:
        BadArguments: it can't.
    """
    folder = Path(path).absolute()
    existing = next(one for one in (folder, *folder.parents) if one.exists())
    if not existing.is_dir():
        raise BadArguments(f"{flag} {path}: {existing} is a file; give a folder.")
    if not os.access(existing, os.W_OK):
        raise BadArguments(f"{flag} {path}: nothing can be written into {existing}.")


def check_mask(flag: str, mask: str | None) -> None:
    """Look before any work whether ``mask`` is a picture with something inside.

    Raises:
        ValueError: it isn't; the message calls it ``flag``.
    """
    from ..picture_inputs import load_mask

    if mask is not None:
        load_mask(mask, None, flag)


def _best_device() -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def task(pipe: S2EditPipeline, words: str) -> None:
    """Name the work that the pipeline's progress bars show from here on."""
    pipe.set_progress_bar_config(**{**getattr(pipe, "_progress_bar_config", {}), "desc": words})


def run_command(command: Callable[[argparse.Namespace], Answer], name: str) -> Callable[[argparse.Namespace], int]:
    """``command`` as the command line runs it: its answer on stdout, its error as one line on stderr.

    Args:
        name: of the command, for the error.
    """

    def run(args: argparse.Namespace) -> int:
        answer = command(args)
        print(json.dumps(answer.facts, ensure_ascii=False) if args.json else "\n".join(answer.lines))
        return 0

    return told(run, name)


def told(run: Callable[[argparse.Namespace], int], name: str) -> Callable[[argparse.Namespace], int]:
    """``run``, whose errors become one line on stderr and a status; so does Ctrl-C."""

    def running(args: argparse.Namespace) -> int:
        try:
            return run(args)
        except FAULTS as error:
            return _failed(args, name, error, BAD_ARGUMENTS)
        except (Exception, KeyboardInterrupt) as error:
            return _failed(args, name, error, FAILED)

    return running


def _failed(args: argparse.Namespace, name: str, error: BaseException, status: int) -> int:
    if os.environ.get(SHOW_TRACEBACK):
        traceback.print_exception(error)
    words = " ".join(_words(error).split()) or (
        "stopped" if isinstance(error, KeyboardInterrupt) else type(error).__name__
    )
    if not isinstance(error, (*FAULTS, OSError, ImportError, KeyboardInterrupt)):
        words = f"{type(error).__name__}: {words} ({SHOW_TRACEBACK}=1 shows where)"
    print(f"s2edit {name}: {words}", file=sys.stderr)
    if getattr(args, "json", None) in (True, "-"):
        print(json.dumps({"error": words}, ensure_ascii=False))
    return status


def _words(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"  # without Python's number
    package = (getattr(error, "name", None) or "").split(".")[0]
    if isinstance(error, ModuleNotFoundError) and package in EXTRAS:
        return f'{package} is needed: pip install "s2edit-pipeline[{EXTRAS[package]}]"'
    return str(error)
