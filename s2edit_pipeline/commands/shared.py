"""What every command shares: its model, its answer as text or JSON, and errors in one line."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..pipeline import S2EditPipeline

FAILED, BAD_ARGUMENTS = 1, 2
"""Exit statuses beside 0."""

DTYPES = ("float32", "bfloat16", "float16")
SHOW_TRACEBACK = "S2EDIT_TRACEBACK"
"""The environment variable that has errors shown whole."""


class BadArguments(Exception):
    """Arguments that can't be used, found before any work."""


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
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    from ..avatars import load_avatars
    from ..pipeline import S2EditPipeline

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable_progress_bar()
    device = args.device or _best_device()
    if device.split(":")[0] == "cuda" and not torch.cuda.is_available():
        raise BadArguments(f"--device {device}: PyTorch finds no CUDA device here; leave it out, or take cpu.")
    on_gpu = device.split(":")[0] in ("cuda", "xpu", "mps")
    dtype = getattr(torch, args.dtype or ("bfloat16" if args.model and on_gpu else "float32"))
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # of the loader's remarks; the pipeline's own warnings are for the user
    try:
        pipe = S2EditPipeline.from_pretrained(args.model, dtype=dtype) if args.model else load_avatars(dtype=dtype)
        pipe = pipe.to(device)
    finally:
        logging.set_verbosity(level)
    is_seen = sys.stderr.isatty() and not args.json
    pipe.set_progress_bar_config(disable=not is_seen, leave=False, file=sys.stderr)
    return pipe


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
        try:
            answer = command(args)
        except (BadArguments, ValueError, TypeError, FileNotFoundError) as error:
            return _failed(args, name, error, BAD_ARGUMENTS)
        except (Exception, KeyboardInterrupt) as error:
            return _failed(args, name, error, FAILED)
        print(json.dumps(answer.facts, ensure_ascii=False) if args.json else "\n".join(answer.lines))
        return 0

    return run


def _failed(args: argparse.Namespace, name: str, error: BaseException, status: int) -> int:
    if os.environ.get(SHOW_TRACEBACK):
        traceback.print_exception(error)
    words = " ".join(str(error).split()) or (
        "stopped" if isinstance(error, KeyboardInterrupt) else type(error).__name__
    )
    if not isinstance(error, (BadArguments, ValueError, TypeError, OSError, KeyboardInterrupt)):
        words = f"{type(error).__name__}: {words} ({SHOW_TRACEBACK}=1 shows where)"
    print(f"s2edit {name}: {words}", file=sys.stderr)
    if args.json:
        print(json.dumps({"error": words}, ensure_ascii=False))
    return status
