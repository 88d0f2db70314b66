"""The command line, ``s2edit``: ``commands`` hold what works on pictures; the others are their modules' own."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

from . import __version__
from .commands.shared import check_folder_place, told


def _of(module: str) -> Callable[[argparse.ArgumentParser], None]:
    """The arguments of a module's command; only the command that is run is imported: ``--help`` needs no torch."""

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        command = import_module(f".{module}", __package__)
        command.add_arguments(parser)
        if parser.get_default("run") is None and hasattr(command, "run"):
            parser.set_defaults(run=command.run)

    return add_arguments


def _train_avatars(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, help="folder of pictures, checkpoints and, in the end, model/")
    parser.add_argument(
        "--family", choices=("unet", "flow"), default="unet", help="what to train (default: %(default)s)"
    )
    parser.add_argument("--pictures", type=int, help="training people (default: 16000, for flow 9000)")
    parser.add_argument("--creatures", type=int, help="training creatures (default: 12000, for flow 6000)")
    parser.add_argument("--model", help="flow: the U-Net model's folder to share its autoencoder and text encoder")
    parser.add_argument("--flow-steps", type=int, default=20000, help="flow: (default: %(default)s)")
    parser.add_argument("--no-grounding", action="store_true", help="flow: don't teach the words' maps from masks")
    parser.add_argument("--sheet", help="flow: draw a sheet of captions to this PNG instead of training")
    parser.add_argument("--start-from", help="a model folder whose weights to start from (default: nothing)")
    parser.add_argument("--autoencoder-steps", type=int, default=2400, help="(default: %(default)s)")
    parser.add_argument("--denoiser-steps", type=int, default=3800, help="(default: %(default)s)")
    parser.add_argument("--device", help="where to train (default: a CUDA device if there is one)")
    parser.add_argument("--curves", help="plot the logs of --out to this PNG instead of training")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")

    def run(args: argparse.Namespace) -> int:
        if args.curves:
            from .avatars.training_curves import plot_training

            plot_training(args.out, args.curves)
            return 0
        check_folder_place("--out", args.out)
        if args.family == "flow":
            return _train_flow(args)
        from .avatars.recipe import AUTOENCODER, DENOISER, train_avatars

        model = train_avatars(
            args.out,
            num_pictures=args.pictures or 16000,
            num_creatures=12000 if args.creatures is None else args.creatures,
            autoencoder=replace(AUTOENCODER, num_steps=args.autoencoder_steps, seed=args.seed),
            denoiser=replace(DENOISER, num_steps=args.denoiser_steps, seed=args.seed),
            start_from=args.start_from,
            device=args.device,
        )
        print(f"The model is in {model}")
        return 0

    parser.set_defaults(run=run)


def _train_flow(args: argparse.Namespace) -> int:
    from .avatars import MODEL_FOLDER
    from .avatars.flow_training import FlowSettings
    from .avatars.recipe import draw_flow_sheet, train_flow_avatars

    shared = args.model or MODEL_FOLDER
    if args.sheet:
        draw_flow_sheet(args.out, shared, args.sheet, device=args.device)
        return 0
    settings = FlowSettings(num_steps=args.flow_steps, seed=args.seed)
    model = train_flow_avatars(
        args.out,
        shared,
        num_pictures=args.pictures or 9000,
        num_creatures=6000 if args.creatures is None else args.creatures,
        settings=replace(settings, grounding_weight=0.0) if args.no_grounding else settings,
        device=args.device,
    )
    print(f"The model is in {model}")
    return 0


def _train_instruct(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, help="folder of pairs, checkpoints and model/")
    parser.add_argument("--model", help="a diffusers folder of the avatars family to start from (the embedded)")
    parser.add_argument("--people", type=int, default=8000, help="training people, edited once (default: %(default)s)")
    parser.add_argument("--creatures", type=int, default=6000, help="as many of them (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1600, help="(default: %(default)s)")
    parser.add_argument("--device", help="where to train (default: a CUDA device if there is one)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")

    def run(args: argparse.Namespace) -> int:
        from .avatars import MODEL_FOLDER
        from .avatars.instruct_training import InstructSettings, train_instruct

        check_folder_place("--out", args.out)
        model = train_instruct(
            args.out,
            model=args.model or MODEL_FOLDER,
            num_people=args.people,
            num_creatures=args.creatures,
            settings=InstructSettings(num_steps=args.steps, seed=args.seed),
            device=args.device,
        )
        print(f"The model is in {model}")
        return 0

    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Command:
    """A command of ``s2edit``: what adds its arguments, what it does in one line, and an example of its use."""

    add_arguments: Callable[[argparse.ArgumentParser], None]
    summary: str
    example: str


COMMANDS: dict[str, Command] = {
    "describe": Command(_of("commands.describe"), "say what a picture shows", "s2edit describe ada.jpg"),
    "mask": Command(
        _of("commands.mask"), "show where the subject of a picture is", "s2edit mask ada.jpg --out mask.png"
    ),
    "fit": Command(
        _of("commands.fit"),
        "fit an identity to one picture",
        "s2edit fit ada.jpg --prompt 'a photo of a lady with glasses' --subject lady --out ada",
    ),
    "edit": Command(
        _of("commands.edit"),
        "edit a picture by words, and keep who is in it",
        "s2edit edit ada.jpg --add glasses --out ada-glasses.jpg",
    ),
    "identity": Command(
        _of("commands.identity"), "show, share or fetch an identity", "s2edit identity push ada me/ada"
    ),
    "fit-many": Command(
        _of("many.fits"), "fit an identity for each row of a manifest", "s2edit fit-many people.csv --out identities"
    ),
    "edit-many": Command(
        _of("many.edits"), "edit a picture for each row of a manifest", "s2edit edit-many edits.csv --out edited"
    ),
    "app": Command(_of("app.command"), "edit on a web page", "s2edit app"),
    "demo": Command(_of("demo"), "fit an identity to a drawn face and edit it", "s2edit demo --out demo"),
    "bench": Command(
        _of("evaluation.benchmark_command"),
        "compare methods on edits whose true result is known",
        "s2edit bench --quick",
    ),
    "measure": Command(
        _of("evaluation.measure_command"),
        "measure the base model, inversions, edits, compositions, memory, costs and more",
        "s2edit measure costs",
    ),
    "publish": Command(
        _of("publishing"),
        "push the pipeline to the Hub, where any diffusers script loads it from",
        "s2edit publish --repo-id me/s2edit",
    ),
    "train-avatars": Command(
        _train_avatars, "train the embedded model again, or go on with it", "s2edit train-avatars --out run"
    ),
    "train-instruct": Command(
        _train_instruct,
        "train an InstructPix2Pix of the embedded model, to compare with",
        "s2edit train-instruct --out run",
    ),
}


def make_parser(commands: Container[str]) -> argparse.ArgumentParser:
    """The parser of ``s2edit``; of ``commands`` alone it knows the arguments."""
    parser = argparse.ArgumentParser(
        prog="s2edit",
        description="Edit a picture by words, and keep who or what is in it.",
        epilog="example: " + COMMANDS["edit"].example,
    )
    parser.add_argument(
        "--print-completion", choices=("bash", "zsh", "tcsh"), metavar="SHELL", help="print a completion script"
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="command")
    for name, one in COMMANDS.items():
        command = subparsers.add_parser(
            name,
            help=one.summary,
            description=one.summary.capitalize() + ".",
            epilog="example: " + one.example,
            allow_abbrev=False,
        )
        if name in commands:
            one.add_arguments(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``s2edit``; returns the exit status.

    Args:
        argv: the arguments after the program's name; None takes them from ``sys.argv``.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser(argv[:1])
    args = parser.parse_args(argv)
    if args.print_completion:
        return _print_completion(args.print_completion)
    if args.command is None:
        parser.error("say a command; see s2edit --help")
    name = " ".join(filter(None, (args.command, getattr(args, "what", None))))
    with _logging_put_back():
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # what it says as it is imported is not for users
        return told(args.run, name)(args)


@contextmanager
def _logging_put_back() -> Iterator[None]:
    """Leave the libraries' logging as found: a command silences it, and its caller may be a program."""
    variable = os.environ.get("TRANSFORMERS_VERBOSITY")
    loaded = (sys.modules.get(f"{library}.utils.logging") for library in ("diffusers", "transformers"))
    found = [(module, module.get_verbosity(), module.is_progress_bar_enabled()) for module in loaded if module]
    try:
        yield
    finally:
        if variable is None:
            os.environ.pop("TRANSFORMERS_VERBOSITY", None)
        for module, verbosity, has_bars in found:
            module.set_verbosity(verbosity)
            (module.enable_progress_bar if has_bars else module.disable_progress_bar)()


def _print_completion(shell: str) -> int:
    try:
        shtab: Any = import_module("shtab")
    except ImportError:
        print('s2edit: completion needs one more package: pip install "s2edit-pipeline[cli]".', file=sys.stderr)
        return 1
    print(shtab.complete(make_parser(COMMANDS), shell=shell))
    return 0
