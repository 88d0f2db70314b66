"""The command line: ``s2edit demo``, ``bench``, ``measure``, ``publish``, ``train-avatars``, ``train-instruct``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace


def _demo(parser: argparse.ArgumentParser) -> None:
    from . import demo

    demo.add_arguments(parser)
    parser.set_defaults(run=demo.run)


def _bench(parser: argparse.ArgumentParser) -> None:
    from .evaluation import benchmark_command

    benchmark_command.add_arguments(parser)
    parser.set_defaults(run=benchmark_command.run)


def _publish(parser: argparse.ArgumentParser) -> None:
    from . import publishing

    publishing.add_arguments(parser)
    parser.set_defaults(run=publishing.run)


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


def _measure(parser: argparse.ArgumentParser) -> None:
    from .evaluation import measure_command

    measure_command.add_arguments(parser)
    parser.set_defaults(run=measure_command.run)


_COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], str]] = {
    "demo": (_demo, "fit an identity to a drawn face and edit it"),
    "bench": (_bench, "compare methods on edits whose true result is known"),
    "measure": (_measure, "measure the base model, inversions, edits, compositions, memory, costs and more"),
    "publish": (_publish, "push the pipeline to the Hub, where any diffusers script loads it from"),
    "train-avatars": (_train_avatars, "train the embedded model again, or go on with it"),
    "train-instruct": (_train_instruct, "train an InstructPix2Pix of the embedded model, to compare with"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``s2edit``; returns the exit status.

    Args:
        argv: the arguments after the program's name; None takes them from ``sys.argv``.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="s2edit", description="Edit a person in one picture, and keep the person.")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, (add_arguments, summary) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary.capitalize() + ".")
        # only the command that is run is imported: --help needs no torch
        if name in argv[:1]:
            add_arguments(command)
    args = parser.parse_args(argv)
    status: int = args.run(args)
    return status
