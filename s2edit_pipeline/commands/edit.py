"""``s2edit edit``: a picture edited by words, with the identity of who is in it."""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .fit import add_fit, fit_words
from .identity_cache import identity_folder, load_kept
from .picture_words import PictureWords, add_words, words_for
from .shared import (
    Answer,
    BadArguments,
    add_model,
    check_folder_place,
    check_mask,
    check_picture_place,
    load_model,
    run_command,
    task,
)

if TYPE_CHECKING:
    from ..identity_adapter import IdentityAdapter
    from ..picture_files import SourcePicture
    from ..pipeline import S2EditPipeline
    from .content_credentials import Certificate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("picture", help="a file or an address")
    parser.add_argument("--out", required=True, help="a file, or for several edits a folder")
    change = parser.add_argument_group("what to change")
    change.add_argument(
        "--to", action="append", default=[], metavar="PROMPT", help="a target prompt; repeat it for another edit"
    )
    change.add_argument("--replace", action="append", default=[], metavar="A=B", help="B in the place of A")
    change.add_argument("--add", action="append", default=[], metavar="WORDS", help="such as glasses, 'a red hat'")
    change.add_argument("--remove", action="append", default=[], metavar="WORDS", help="such as beard")
    change.add_argument("--edit-mask", help="where the picture may change, white inside (default: where words look)")
    change.add_argument("--strength", type=float, default=1.0, help="of the edit, above 0 to 1 (default: %(default)s)")
    change.add_argument("--guidance", type=float, help="how strongly words pull (default: the model's own)")
    change.add_argument("--inference-steps", type=int, default=50, help="(default: %(default)s)")
    who = parser.add_argument_group("who is in it")
    who.add_argument("--identity", help="a folder or Hub name (default: fitted here, and kept for the next edit)")
    who.add_argument("--no-cache", action="store_true", help="neither look for a kept identity nor keep this one")
    add_words(who)
    add_fit(who)
    result = parser.add_argument_group("result")
    result.add_argument("--sheet", help="also one picture of before, after, mask and difference")
    result.add_argument("--no-prompt-in-metadata", action="store_true", help="leave the prompt out of the file")
    result.add_argument(
        "--sign", nargs=2, metavar=("CHAIN", "KEY"), help="add Content Credentials (C2PA), signed with these PEM files"
    )
    result.add_argument("--sign-for-tests", action="store_true", help="the same with a self-made certificate")
    add_model(parser)
    parser.set_defaults(run=run_command(edit, "edit"))


def edit(args: argparse.Namespace) -> Answer:
    from ..describe_stage import own_vocabulary
    from ..picture_files import read_picture
    from ..prompt_words import insert_token

    _check(args)
    source = read_picture(args.picture)
    if args.prompt is not None and not args.to:
        changed(args.prompt, args)  # a word that isn't there is found before the model is loaded
    certificate = _certificate(args)
    pipe = load_model(args)
    words, kept = _words(pipe, source, args)
    targets = _targets(words, args)
    started = time.perf_counter()
    identity = kept or _fitted(pipe, source, words, args)
    fitted = time.perf_counter()
    prompts = [insert_token(target, words.subject, identity.token) for target in targets]
    # targets beside an identity's own words, which nobody has described the picture by yet
    completes = bool(args.to and args.identity) and args.prompt is None and own_vocabulary(pipe) is not None
    task(pipe, "editing")
    out: Any = pipe(
        prompts,
        image=source.native,
        source_prompt=None if completes else words.prompt,  # the identity's own, which are these words
        identity=identity,
        num_inference_steps=args.inference_steps,
        guidance_scale=args.guidance,
        strength=args.strength,
        edit_mask=args.edit_mask,
        complete_prompt=completes,
    )
    edited = time.perf_counter()
    paths = _paths(Path(args.out), targets, Path(args.picture).suffix)
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    out.save(paths, prompt_in_metadata=not args.no_prompt_in_metadata)
    if certificate is not None:
        _sign(paths, certificate, args.picture)
    if args.sheet:
        out.visualize().save(args.sheet)
    results = [{"out": str(path), "prompt": prompt} for path, prompt in zip(paths, prompts, strict=True)]
    facts = {
        "prompt": words.prompt, "subject": words.subject, "results": results, "sheet": args.sheet,
        "seconds": {"fit": round(fitted - started, 2), "edit": round(edited - fitted, 2)},
    }  # fmt: skip
    return Answer(tuple(f'{one["out"]}: "{one["prompt"]}"' for one in results), facts)


def _check(args: argparse.Namespace) -> None:
    """Raises:
    BadArguments: what is asked for doesn't go together.
    """
    if not (args.to or args.replace or args.add or args.remove):
        raise BadArguments("say what to change: --add glasses, --replace sad=smiling, --remove beard, or --to PROMPT.")
    if args.to and (args.replace or args.add or args.remove):
        raise BadArguments("--to is the whole target prompt; leave --replace, --add and --remove out beside it.")
    for change in args.replace:
        if not all(part.strip() for part in change.partition("=")[::2]):
            raise BadArguments(f"--replace {change!r} must be A=B, such as sad=smiling.")
    if args.inference_steps < 1:
        raise BadArguments(f"--inference-steps must be at least 1, not {args.inference_steps}.")
    if not 0 < args.strength <= 1:
        raise BadArguments(f"--strength must be above 0 and at most 1, not {args.strength:g}.")
    if len(args.to) > 1 and Path(args.out).suffix:
        raise BadArguments(f"--out {args.out} is one file and there are {len(args.to)} edits: give a folder.")
    (check_picture_place if Path(args.out).suffix else check_folder_place)("--out", args.out)
    check_picture_place("--sheet", args.sheet)
    check_mask("--mask", args.mask)
    check_mask("--edit-mask", args.edit_mask)


def _certificate(args: argparse.Namespace) -> Certificate | None:
    """Read or made before any work."""
    if args.sign is None and not args.sign_for_tests:
        return None
    from .content_credentials import check_installed, read_certificate, self_made_certificate

    check_installed()
    if args.sign is None:
        return self_made_certificate()
    if args.sign_for_tests:
        raise BadArguments("--sign and --sign-for-tests are two certificates; leave one out.")
    return read_certificate(*args.sign)


def _sign(paths: list[Path], certificate: Certificate, before: str) -> None:
    from ..picture_files import read_picture
    from ..picture_marks import origin_of
    from .content_credentials import sign_picture

    for path in paths:
        is_file = Path(before).is_file()
        sign_picture(path, origin_of(read_picture(path).xmp), certificate, before if is_file else None)


def _words(
    pipe: S2EditPipeline, source: SourcePicture, args: argparse.Namespace
) -> tuple[PictureWords, IdentityAdapter | None]:
    """What the picture shows, and the identity that was asked for by name, whose own words are the default."""
    from ..identity_adapter import IdentityAdapter

    if args.identity is None:
        return words_for(pipe, source.native, args), None
    identity = IdentityAdapter.from_pretrained(args.identity)
    prompt = identity.source_prompt if args.prompt is None else args.prompt
    return PictureWords(prompt, args.subject or identity.subject), identity


def _targets(words: PictureWords, args: argparse.Namespace) -> list[str]:
    if not args.to:
        return [changed(words.prompt, args, words.subject)]
    return [target if words.about is None else words.about.complete(target) for target in args.to]


def changed(prompt: str, args: argparse.Namespace, subject: str | None = None) -> str:
    """``prompt`` as --replace, --add and --remove say."""
    from ..prompt_changes import change_words

    replace = {a.strip(): b.strip() for a, _, b in (change.partition("=") for change in args.replace)}
    return change_words(prompt, replace=replace, add=args.add, remove=args.remove, subject=subject)


def _fitted(
    pipe: S2EditPipeline, source: SourcePicture, words: PictureWords, args: argparse.Namespace
) -> IdentityAdapter:
    from ..picture_files import read_picture

    facts = {"model": args.model, "dtype": args.dtype, "prompt": words.prompt, "subject": words.subject}
    facts |= {"method": args.method, "steps": args.steps, "seed": args.seed}
    if args.mask:
        facts["mask"] = read_picture(args.mask).digest
    folder = identity_folder(source.digest, facts)
    kept = None if args.no_cache else load_kept(pipe, folder)
    if kept is not None:
        return kept
    identity = fit_words(pipe, source.native, words, args)
    if not args.no_cache:
        identity.save_pretrained(str(folder))
    return identity


def _paths(out: Path, targets: list[str], suffix: str) -> list[Path]:
    """Where each edit goes; what has no suffix is a folder."""
    if out.suffix:
        return [out]
    out.mkdir(parents=True, exist_ok=True)
    names = [re.sub(r"[^\w]+", "-", target).strip("-")[:60] or "edit" for target in targets]
    return [out / f"{i}-{name}{suffix or '.png'}" for i, name in enumerate(names, start=1)]
