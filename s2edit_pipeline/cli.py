"""The command line: ``s2edit demo``, ``s2edit measure``, ``s2edit publish``, ``s2edit train-avatars``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .evaluation.base_model import BaseModelReport


def _demo(parser: argparse.ArgumentParser) -> None:
    from . import demo

    demo.add_arguments(parser)
    parser.set_defaults(run=demo.run)


def _publish(parser: argparse.ArgumentParser) -> None:
    from . import publishing

    publishing.add_arguments(parser)
    parser.set_defaults(run=publishing.run)


def _train_avatars(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, help="folder of pictures, checkpoints and, in the end, model/")
    parser.add_argument("--pictures", type=int, default=16000, help="training people (default: %(default)s)")
    parser.add_argument("--creatures", type=int, default=12000, help="training creatures (default: %(default)s)")
    parser.add_argument("--start-from", help="a model folder whose weights to start from (default: nothing)")
    parser.add_argument("--autoencoder-steps", type=int, default=2400, help="(default: %(default)s)")
    parser.add_argument("--denoiser-steps", type=int, default=3800, help="(default: %(default)s)")
    parser.add_argument("--device", help="where to train (default: a CUDA device if there is one)")
    parser.add_argument("--curves", help="plot the logs of --out to this PNG instead of training")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")

    def run(args: argparse.Namespace) -> int:
        if args.curves:
            from .evaluation.training_curves import plot_training

            plot_training(args.out, args.curves)
            return 0
        from .avatars.recipe import train_avatars

        model = train_avatars(
            args.out,
            num_pictures=args.pictures,
            num_creatures=args.creatures,
            start_from=args.start_from,
            autoencoder_steps=args.autoencoder_steps,
            denoiser_steps=args.denoiser_steps,
            device=args.device,
            seed=args.seed,
        )
        print(f"The model is in {model}")
        return 0

    parser.set_defaults(run=run)


def _measure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        choices=(
            "base-model", "inversions", "edits", "confinement", "compositions", "memory", "costs", "steps", "scaling",
        ),
    )  # fmt: skip
    parser.add_argument("--model", help="a diffusers folder of the avatars family; the embedded model otherwise")
    parser.add_argument("--captions", type=int, default=256, help="base-model: pictures drawn (%(default)s)")
    parser.add_argument("--people", type=int, default=4, help="how many, but for base-model and edits (%(default)s)")
    parser.add_argument("--steps", type=int, help="inference steps (30, 50, 25, 25, 25, 4 and 50)")
    parser.add_argument("--setting", action="append", help="edits: only these rows; give as many as you like")
    parser.add_argument("--sheet", help="base-model, compositions: also save the first pictures, to this PNG")
    parser.add_argument("--repeats", type=int, default=5, help="costs, scaling: of each run (%(default)s)")
    parser.add_argument("--items", nargs="+", help="costs: of stock, first, further, three, null_text; all otherwise")
    parser.add_argument("--json", help="costs, steps, scaling: also save what was measured, to this file")
    parser.add_argument("--plot", help="scaling: also plot it, to this PNG")
    parser.add_argument(
        "--random", nargs="+", metavar="MODEL", help="costs: on a CUDA device, of sd15, sd21, sdxl with random weights"
    )
    parser.add_argument("--sides", type=int, nargs="+", help="costs --random: of the pictures (512, 768 and 1024)")
    parser.add_argument("--tiny", action="store_true", help="costs --random: narrow models, on the CPU, as a trial")

    def run(args: argparse.Namespace) -> int:
        if args.what in ("costs", "steps", "scaling"):
            try:
                return _measure_costs(args)
            except ValueError as error:
                print(f"s2edit measure {args.what}: {error}", file=sys.stderr)
                return 2
        from .avatars import load_avatars
        from .pipeline import S2EditPipeline

        pipe = S2EditPipeline.from_pretrained(args.model) if args.model else load_avatars()
        pipe.set_progress_bar_config(disable=True)
        if args.what == "inversions":
            from .evaluation.inversion_table import measure_inversions, table

            print(table(measure_inversions(pipe, people=range(args.people), num_inference_steps=args.steps or 50)))
            return 0
        if args.what == "edits":
            from .evaluation import edit_table

            names = args.setting or list(edit_table.SETTINGS)
            print(edit_table.table(edit_table.measure_edits(pipe, names, num_inference_steps=args.steps or 25)))
            return 0
        if args.what == "confinement":
            from .evaluation import edit_table
            from .evaluation.counterfactual import varied_edits

            rows = edit_table.measure_edits(
                pipe,
                ["the defaults", "not confined"],
                people=range(args.people),
                edits_of=varied_edits,
                num_inference_steps=args.steps or 25,
            )
            print(edit_table.table(rows))
            return 0
        if args.what == "memory":
            from .evaluation import peak_memory

            print(peak_memory.table(peak_memory.measure_memory(pipe, num_inference_steps=args.steps or 4)))
            return 0
        if args.what == "compositions":
            from .evaluation import composition

            composed = composition.measure_compositions(
                pipe, composition.composition_pairs(args.people), num_inference_steps=args.steps or 25
            )
            print(composition.table(composed))
            if args.sheet:
                composition.sheet(composed).save(args.sheet)
            return 0
        from .evaluation.base_model import measure_base_model

        report = measure_base_model(
            pipe, num_captions=args.captions, num_pairs=args.captions // 4, num_inference_steps=args.steps or 30
        )
        print(report.table())
        if args.sheet:
            _save_sheet(report, args.sheet)
        return 0

    parser.set_defaults(run=run)


def _measure_costs(args: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict
    from pathlib import Path

    from .avatars import load_avatars
    from .pipeline import S2EditPipeline

    report: Any
    if args.random:
        from .evaluation.gpu_costs import measure_gpu_costs

        report = measure_gpu_costs(
            args.random,
            tiny=args.tiny,
            sides=args.sides,
            num_inference_steps=args.steps or (2 if args.tiny else 50),
            num_fit_steps=2 if args.tiny else None,
            repeats=args.repeats,
        )
    else:
        pipe = S2EditPipeline.from_pretrained(args.model) if args.model else load_avatars()
        pipe.set_progress_bar_config(disable=True)
        if args.what == "costs":
            from .evaluation.edit_costs import ITEMS, measure_edit_costs

            report = measure_edit_costs(pipe, args.steps or 50, args.repeats, items=args.items or tuple(ITEMS))
        elif args.what == "steps":
            from .evaluation.few_steps import measure_steps

            report = measure_steps(pipe, people=range(args.people or 4))
        else:
            from .evaluation.cost_scaling import measure_scaling, plot

            report = measure_scaling(pipe, repeats=args.repeats)
            if args.plot:
                plot(report, args.plot)
    print(report.table())
    if args.json:
        Path(args.json).write_text(json.dumps(asdict(report), indent=2) + "\n", "utf-8")
    return 0


def _save_sheet(report: BaseModelReport, path: str) -> None:
    """Sixteen people, sixteen creatures and eight unseen pairs of words, drawn."""
    import numpy as np
    from PIL import Image

    half = len(report.generated) // 2
    shown = [report.generated[:16], report.generated[half : half + 16], report.generated_pairs[:8]]
    lines = [np.concatenate(list(line), 1) for some in shown for line in np.split(some, len(some) // 8)]
    Image.fromarray(np.concatenate(lines)).save(path)


_COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], str]] = {
    "demo": (_demo, "fit an identity to a drawn face and edit it"),
    "measure": (_measure, "measure the base model, inversions, edits, compositions, memory, costs and more"),
    "publish": (_publish, "push the pipeline to the Hub, where any diffusers script loads it from"),
    "train-avatars": (_train_avatars, "train the embedded model again, or go on with it"),
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
