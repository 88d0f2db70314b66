"""``s2edit identity``: what an identity, or an edited picture, says of itself; to the Hub and from it."""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .shared import Answer, BadArguments, add_answer, run_command

CONSENT = "--yes-i-have-consent"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="action", required=True)
    show_parser = actions.add_parser("show", help="what an identity, or an edited picture, says of itself")
    show_parser.add_argument("what", help="an identity's folder or Hub name, or a picture")
    add_answer(show_parser)
    show_parser.set_defaults(run=run_command(show, "identity show"))

    push_parser = actions.add_parser("push", help="share an identity on the Hub")
    push_parser.add_argument("folder", help="the identity's folder")
    push_parser.add_argument("repo_id", help="the Hub repository, such as me/ada")
    push_parser.add_argument("--private", action="store_true", help="make the repository private if it is new")
    push_parser.add_argument(
        CONSENT, action="store_true", dest="consent", help="whom it shows has agreed to its being shared"
    )
    add_answer(push_parser)
    push_parser.set_defaults(run=run_command(push, "identity push"))

    pull_parser = actions.add_parser("pull", help="an identity from the Hub into a folder")
    pull_parser.add_argument("repo_id", help="the Hub repository, such as me/ada")
    pull_parser.add_argument("--out", required=True, help="the folder")
    pull_parser.add_argument("--revision", help="a branch, tag or commit")
    add_answer(pull_parser)
    pull_parser.set_defaults(run=run_command(pull, "identity pull"))


def show(args: argparse.Namespace) -> Answer:
    if Path(args.what).is_file() and Path(args.what).suffix.lower() not in (".json", ".safetensors", ".md"):
        return _show_picture(args.what)
    from ..identity_adapter import IdentityAdapter

    identity = IdentityAdapter.from_pretrained(args.what)
    facts: dict[str, Any] = {
        "token": identity.token, "subject": identity.subject, "source_prompt": identity.source_prompt,
        "base_model": identity.base_model, "method": identity.method,
        "learned": list(identity.learned), "digest": identity.digest, "measures": dict(identity.measures),
    }  # fmt: skip
    return Answer(tuple(f"{name.replace('_', ' ')}: {value}" for name, value in facts.items()), facts)


def _show_picture(path: str) -> Answer:
    from ..picture_files import read_picture
    from ..picture_marks import origin_of

    facts: dict[str, Any] = asdict(origin_of(read_picture(path).xmp))
    with suppress(ImportError):  # it looks there too where it can
        from .content_credentials import credentials_of

        credentials = credentials_of(path)
        facts["content_credentials"] = None if credentials is None else asdict(credentials)
    said = tuple(f"{name.replace('_', ' ')}: {value}" for name, value in facts.items() if value is not None)
    return Answer(said or ("This picture doesn't say how it was made.",), facts)


def push(args: argparse.Namespace) -> Answer:
    from ..identity_adapter import IdentityAdapter

    if not Path(args.folder).is_dir():
        raise BadArguments(f"{args.folder} is no folder; make an identity first: s2edit fit PICTURE --out FOLDER.")
    identity = IdentityAdapter.from_pretrained(args.folder)
    _check_consent(args, identity.subject)
    url = str(identity.push_to_hub(args.repo_id, private=args.private or None))
    return Answer((url,), {"repo_id": args.repo_id, "url": url})


def _check_consent(args: argparse.Namespace, subject: str) -> None:
    """Raises:
    BadArguments: nobody says that the person agreed.
    """
    if args.consent:
        return
    asked = f"This identity is of a {subject}. Has whom it shows agreed to its being shared?"
    if sys.stdin.isatty() and not args.json:
        print(f"{asked} [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() in ("y", "yes"):
            return
    raise BadArguments(f"{asked} Then say so: {CONSENT}.")


def pull(args: argparse.Namespace) -> Answer:
    from ..identity_adapter import IdentityAdapter

    more = {} if args.revision is None else {"revision": args.revision}
    identity = IdentityAdapter.from_pretrained(args.repo_id, **more)
    identity.save_pretrained(args.out)
    facts = {"out": args.out, "token": identity.token, "subject": identity.subject}
    return Answer((f"{args.out}: {identity.token}, a {identity.subject}",), facts)
