"""``s2edit mask``: where a picture's subject is."""

from __future__ import annotations

import argparse
from pathlib import Path

from .picture_words import add_words, opened
from .shared import Answer, add_model, check_picture_place, run_command, task


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("picture", help="a file or an address")
    parser.add_argument("--out", required=True, help="the mask, such as mask.png: white where the subject is")
    add_words(parser)
    add_model(parser)
    parser.set_defaults(run=run_command(mask, "mask"))


def mask(args: argparse.Namespace) -> Answer:
    from ..picture_files import read_picture
    from ..picture_saving import save_picture

    check_picture_place("--out", args.out)
    pipe, picture, words = opened(args)
    task(pipe, "looking")
    found = pipe.preview_mask(picture, words.prompt, words.subject)
    out = Path(args.out)
    save_picture(read_picture(found), out)
    share = sum(found.histogram()[128:]) / (found.width * found.height)
    facts = {"out": str(out), "share": round(share, 4), "prompt": words.prompt, "subject": words.subject}
    return Answer((f"{out}: the {words.subject} fills {share:.0%} of the picture",), facts)
