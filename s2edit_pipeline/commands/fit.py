"""``s2edit fit``: an identity from one picture."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .picture_words import PictureWords, add_words, opened
from .shared import Answer, add_model, check_folder_place, check_mask, run_command, task

if TYPE_CHECKING:
    from ..identity_adapter import IdentityAdapter
    from ..pipeline import S2EditPipeline


def add_fit(parser: argparse._ActionsContainer) -> None:
    """How an identity is fitted."""
    parser.add_argument("--mask", help="your own mask of the subject, white inside (default: found)")
    parser.add_argument("--method", default="lora", choices=("lora", "full", "token"), help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, help="of the fit (default: the method's own)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("picture", help="a file or an address")
    parser.add_argument("--out", required=True, help="the identity's folder")
    parser.add_argument("--token", default="[I]", help="the word that will stand for it (default: %(default)s)")
    add_words(parser)
    add_fit(parser)
    add_model(parser)
    parser.set_defaults(run=run_command(fit, "fit"))


def fit(args: argparse.Namespace) -> Answer:
    check_folder_place("--out", args.out)
    check_mask("--mask", args.mask)
    pipe, picture, words = opened(args)
    started = time.perf_counter()
    identity = fit_words(pipe, picture, words, args, token=args.token)
    seconds = time.perf_counter() - started
    identity.save_pretrained(args.out)
    size = sum(file.stat().st_size for file in Path(args.out).rglob("*") if file.is_file())
    facts = {
        "out": str(args.out), "token": identity.token, "prompt": words.prompt, "subject": words.subject,
        "method": args.method, "steps": identity.settings["num_steps"], "seconds": round(seconds, 2), "bytes": size,
        "measures": dict(identity.measures),
    }  # fmt: skip
    lines = (
        f'{identity.token} is the {words.subject} of "{words.prompt}"',
        f"{args.out}: {size / 1e6:.2f} MB, fitted in {seconds:.0f} s",
    )
    return Answer(lines, facts)


def fit_words(
    pipe: S2EditPipeline, picture: Any, words: PictureWords, args: argparse.Namespace, token: str = "[I]"
) -> IdentityAdapter:
    """Fit as ``args`` say."""
    task(pipe, "fitting")
    return pipe.fit_identity(
        picture,
        words.prompt,
        words.subject,
        token,
        method=args.method,
        mask=args.mask,
        num_steps=args.steps,
        seed=args.seed,
    )
