"""The words for a picture: as they are given, or found by the model."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .shared import BadArguments, load_model, task

if TYPE_CHECKING:
    from ..describe_stage import Description
    from ..pipeline import S2EditPipeline


@dataclass(frozen=True)
class PictureWords:
    """What a picture shows, and the noun of its subject; and where the model found them, its description."""

    prompt: str
    subject: str
    about: Description | None = None


def add_words(parser: argparse._ActionsContainer) -> None:
    """``--prompt`` and ``--subject``."""
    parser.add_argument("--prompt", help="what the picture shows: 'a photo of a lady with glasses' (default: found)")
    parser.add_argument("--subject", help="the noun in it that is kept: 'lady' (default: the first it speaks of)")


def opened(args: argparse.Namespace) -> tuple[S2EditPipeline, Any, PictureWords]:
    """The pipeline, ``args.picture`` as a PIL picture, and its words."""
    from ..picture_files import read_picture

    picture = read_picture(args.picture).native  # before the model: what can't be read is said at once
    pipe = load_model(args)
    return pipe, picture, words_for(pipe, picture, args)


def words_for(pipe: S2EditPipeline, picture: Any, args: argparse.Namespace) -> PictureWords:
    """The words of ``args``; what they don't say is found.

    Raises:
        BadArguments: a subject without the prompt that it is in, or a prompt that speaks of nothing.
    """
    from ..prompt_parts import noun_of, parts_of, pieces_of, subject_part

    if args.prompt is None:
        if args.subject is not None:
            raise BadArguments(f"--subject {args.subject!r} is a word of the prompt: give --prompt too.")
        task(pipe, "describing")
        about = pipe.describe(picture)
        return PictureWords(about.prompt, about.subject, about)
    if args.subject is not None:
        return PictureWords(args.prompt, args.subject)
    parts = parts_of(pieces_of(args.prompt))
    noun = noun_of(parts[subject_part(parts, None)].body) if parts else None
    if noun is None:
        raise BadArguments(f"--prompt {args.prompt!r} speaks of nothing: name the subject with --subject.")
    return PictureWords(args.prompt, noun.text)
