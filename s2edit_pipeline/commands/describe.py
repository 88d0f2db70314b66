"""``s2edit describe``: words for a picture."""

from __future__ import annotations

import argparse

from .shared import Answer, add_model, load_model, run_command, task


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("picture", help="a file or an address")
    add_model(parser)
    parser.set_defaults(run=run_command(describe, "describe"))


def describe(args: argparse.Namespace) -> Answer:
    from ..picture_files import read_picture

    picture = read_picture(args.picture)
    pipe = load_model(args)
    task(pipe, "describing")
    about = pipe.describe(picture.native)
    facts = {"prompt": about.prompt, "subject": about.subject, "scores": dict(about.scores)}
    return Answer((about.prompt, f"subject: {about.subject}"), facts)
