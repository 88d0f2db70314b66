"""``s2edit measure``: the tables in docs, each by one command with flags of its own."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..commands.shared import check_picture_place, checked_device, open_model

if TYPE_CHECKING:
    from .studies.base_model import BaseModelReport


class Report(Protocol):
    """What a measure returns: a dataclass."""

    def table(self) -> str:
        """As Markdown."""


@dataclass(frozen=True)
class Measure:
    """``add_arguments`` gives a parser the measure's own flags; ``run`` measures."""

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Report]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    measures = parser.add_subparsers(dest="what", metavar="MEASURE", required=True)
    for name, measure in MEASURES.items():
        subparser = measures.add_parser(name, help=measure.summary, description=measure.summary.capitalize() + ".")
        measure.add_arguments(subparser)
        subparser.add_argument(
            "--json", nargs="?", const="-", metavar="FILE",
            help="print what was measured as JSON instead of tables; with FILE, save it there besides",
        )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Print one measure's tables; returns the exit status."""
    for name in ("people", "creatures"):
        if getattr(args, name, None) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(args, name)}.")
    plot = getattr(args, "plot", None)
    if plot is not None:
        check_picture_place("--plot", plot)
    report = MEASURES[args.what].run(args)
    if args.json != "-":
        print(report.table())
    if args.json is not None:
        text = json.dumps(as_json(report), indent=2)
        print(text) if args.json == "-" else Path(args.json).write_text(text + "\n", "utf-8")
    return 0


def as_json(value: Any) -> Any:
    """A report as JSON has it: dataclasses as objects, without fields whose metadata say ``"json": False`` (pictures);
    arrays as lists; numbers that aren't finite as null."""
    if is_dataclass(value):
        shown = (field.name for field in fields(value) if field.metadata.get("json", True))
        return {name: as_json(getattr(value, name)) for name in shown}
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if hasattr(value, "tolist"):  # an array, or a number of numpy's
        return as_json(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [as_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------------------- flags that several measures have


def _model_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="a diffusers folder of the avatars family; the embedded model otherwise")
    parser.add_argument("--device", help="where to work (cpu)")


def _seed_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")


def _steps_flag(parser: argparse.ArgumentParser, default: int) -> None:
    parser.add_argument("--steps", type=int, default=default, help="inference steps (%(default)s)")


def _people_flag(parser: argparse.ArgumentParser, default: int, what: str = "held-out people") -> None:
    parser.add_argument("--people", type=int, default=default, help=f"how many {what} (%(default)s)")


def _repeats_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=5, help="of each run (%(default)s)")


def _load(args: argparse.Namespace) -> Any:
    device = checked_device(args.device) if args.device else None
    pipe = open_model(args.model)
    pipe.set_progress_bar_config(disable=True)
    return pipe if device is None else pipe.to(device)


# ---------------------------------------------------------------------------- the measures


def _base_model_flags(parser: argparse.ArgumentParser) -> None:
    _model_flag(parser)
    _seed_flag(parser)
    _steps_flag(parser, 30)
    parser.add_argument("--captions", type=int, default=256, help="pictures drawn (%(default)s)")
    parser.add_argument("--sheet", metavar="PNG", help="also save the first pictures")


def _base_model(args: argparse.Namespace) -> Report:
    from .studies.base_model import measure_base_model

    report = measure_base_model(
        _load(args),
        num_captions=args.captions,
        num_pairs=args.captions // 4,
        num_inference_steps=args.steps,
        seed=args.seed,
    )
    if args.sheet:
        _save_sheet(report, args.sheet)
    return report


def _save_sheet(report: BaseModelReport, path: str) -> None:
    """Sixteen people, sixteen creatures and eight unseen pairs of words, drawn."""
    import numpy as np
    from PIL import Image

    half = len(report.generated) // 2
    shown = [report.generated[:16], report.generated[half : half + 16], report.generated_pairs[:8]]
    lines = [np.concatenate(list(line), 1) for some in shown for line in np.split(some, len(some) // 8)]
    Image.fromarray(np.concatenate(lines)).save(path)


def _inversions_flags(parser: argparse.ArgumentParser) -> None:
    _model_flag(parser)
    _people_flag(parser, 4)
    _steps_flag(parser, 50)


def _inversions(args: argparse.Namespace) -> Report:
    from .studies.inversions import measure_inversions

    return measure_inversions(_load(args), people=range(args.people), num_inference_steps=args.steps)


def _edits_flags(parser: argparse.ArgumentParser) -> None:
    _model_flag(parser)
    _seed_flag(parser)
    _steps_flag(parser, 25)
    parser.add_argument("--setting", action="append", help="only these rows; give as many as you like")


def _edits(args: argparse.Namespace) -> Report:
    from .studies.edits import SETTINGS, measure_edits

    return measure_edits(_load(args), args.setting or list(SETTINGS), num_inference_steps=args.steps, seed=args.seed)


def _confinement_flags(parser: argparse.ArgumentParser) -> None:
    _model_flag(parser)
    _seed_flag(parser)
    _people_flag(parser, 4)
    _steps_flag(parser, 25)


def _confinement(args: argparse.Namespace) -> Report:
    from .metrics.counterfactual import varied_edits
    from .studies.edits import CONFINEMENT, measure_edits

    people = range(args.people)
    return measure_edits(
        _load(args), CONFINEMENT, people=people, edits_of=varied_edits, num_inference_steps=args.steps, seed=args.seed
    )


def _compositions_flags(parser: argparse.ArgumentParser) -> None:
    _model_flag(parser)
    _seed_flag(parser)
    _people_flag(parser, 24, "pairs of held-out people")
    _steps_flag(parser, 25)
    parser.add_argument("--sheet", metavar="PNG", help="also save the first compositions")


def _compositions(args: argparse.Namespace) -> Report:
    from .studies.compositions import composition_pairs, measure_compositions, sheet

    report = measure_compositions(
        _load(args), composition_pairs(args.people), num_inference_steps=args.steps, seed=args.seed
    )
    if args.sheet:
        sheet(report).save(args.sheet)
    return report


def _fits_flags(parser: argparse.ArgumentParser) -> None:
    _model_flag(parser)
    _seed_flag(parser)
    _people_flag(parser, 4)
    _steps_flag(parser, 25)
    parser.add_argument("--plot", metavar="PNG", help="also plot them")


def _fits(args: argparse.Namespace) -> Report:
    from .studies.fits import measure_fits, plot

    report = measure_fits(_load(args), range(args.people), num_inference_steps=args.steps, seed=args.seed)
    if args.plot:
        plot(report, args.plot)
    return report


def _prompts_flags(parser: argparse.ArgumentParser) -> None:
    _model_flag(parser)
    _seed_flag(parser)
    _steps_flag(parser, 25)
    _people_flag(parser, 8)
    parser.add_argument("--creatures", type=int, default=6, help="how many held-out creatures (%(default)s)")
    parser.add_argument("--first", type=int, default=200, help="number of the first of each (%(default)s)")
    parser.add_argument(
        "--prompts", nargs="+", default=["short", "complete"], metavar="CLASS",
        help="of complete, half, short and vague (short and complete)",
    )  # fmt: skip
    parser.add_argument("--fit", action="append", help="only these rows; give as many as you like")
    parser.add_argument(
        "--rows", default="s2edit-prompts.jsonl", metavar="FILE", help="where each row is kept; a rerun goes on"
    )


def _prompts(args: argparse.Namespace) -> Report:
    from .studies.prompts import chosen_fits, measure_prompts

    counts = {"person": args.people, "creature": args.creatures}
    subjects = [(kind, args.first + i) for kind, count in counts.items() for i in range(count)]
    return measure_prompts(
        _load(args), subjects, Path(args.rows), prompts=args.prompts, fits=chosen_fits(args.fit),
        num_inference_steps=args.steps, seed=args.seed,
    )  # fmt: skip


def _describe_flags(parser: argparse.ArgumentParser) -> None:
    _model_flag(parser)
    _people_flag(parser, 100)
    parser.add_argument("--creatures", type=int, default=100, help="how many held-out creatures (%(default)s)")


def _describe(args: argparse.Namespace) -> Report:
    from .studies.descriptions import measure_descriptions

    return measure_descriptions(_load(args), args.people, args.creatures)


def _photographs_flags(parser: argparse.ArgumentParser) -> None:
    _model_flag(parser)
    _seed_flag(parser)
    _steps_flag(parser, 25)
    parser.add_argument("--scenes", type=int, default=20, help="how many photographs (%(default)s)")
    parser.add_argument(
        "--way", action="append", help="how they are worked at; give as many as you like, all otherwise"
    )
    parser.add_argument(
        "--folder", help="keep rows and pictures there as they come; the same command goes on from them"
    )
    parser.add_argument("--sheet", metavar="PNG", help="with --folder: also save the first edits of six photographs")


def _photographs(args: argparse.Namespace) -> Report:
    from .studies.photographs import ALONE, WAYS, measure_photographs, sheet

    if args.sheet and not args.folder:
        raise ValueError("--sheet is drawn from the pictures that --folder FOLDER keeps; pass that too.")
    report = measure_photographs(
        _load(args), args.scenes, num_inference_steps=args.steps, seed=args.seed, folder=args.folder,
        ways=args.way or (*WAYS, ALONE),
    )  # fmt: skip
    if args.sheet:
        sheet(args.folder, range(min(6, args.scenes))).save(args.sheet)
    return report


def _steps_flags(parser: argparse.ArgumentParser) -> None:
    _model_flag(parser)
    _seed_flag(parser)
    _people_flag(parser, 4)


def _steps(args: argparse.Namespace) -> Report:
    from .studies.edits import measure_steps

    return measure_steps(_load(args), people=range(args.people), seed=args.seed)


def _memory_flags(parser: argparse.ArgumentParser) -> None:
    _model_flag(parser)
    _steps_flag(parser, 10)


def _memory(args: argparse.Namespace) -> Report:
    from .costs.memory import measure_memory

    return measure_memory(_load(args), args.steps)


def _costs_flags(parser: argparse.ArgumentParser) -> None:
    _model_flag(parser)
    parser.add_argument("--steps", type=int, help="inference steps (50; with --tiny 2)")
    _repeats_flag(parser)
    parser.add_argument(
        "--items", nargs="+", help="of stock, first, inverted_first, further, three, null_text; all otherwise"
    )
    parser.add_argument("--side", type=int, help="of the picture, in pixels (the model's own)")
    parser.add_argument(
        "--random", nargs="+", metavar="MODEL", help="instead, on a CUDA device: sd15, sd21, sdxl with random weights"
    )
    parser.add_argument("--sides", type=int, nargs="+", help="with --random: of the pictures (512, 768 and 1024)")
    parser.add_argument("--tiny", action="store_true", help="with --random: narrow models, on the CPU, as a trial")


def _costs(args: argparse.Namespace) -> Report:
    steps = args.steps if args.steps is not None else 2 if args.tiny else 50
    if args.random:
        _refuse(args, ("model", "device", "items", "side"), "doesn't go with --random")
        from .costs.cuda import measure_cuda_costs

        return measure_cuda_costs(
            args.random,
            tiny=args.tiny,
            sides=args.sides,
            num_inference_steps=steps,
            num_fit_steps=2 if args.tiny else None,
            repeats=args.repeats,
        )
    _refuse(args, ("sides", "tiny"), "is for --random MODEL")
    from .costs.edits import ITEMS, measure_edit_costs

    items = args.items or tuple(ITEMS)
    return measure_edit_costs(_load(args), steps, args.repeats, items=items, side=args.side)


def _refuse(args: argparse.Namespace, names: Sequence[str], why: str) -> None:
    for name in names:
        if getattr(args, name) not in (None, False):
            raise ValueError(f"--{name} {why}; leave it out.")


def _scaling_flags(parser: argparse.ArgumentParser) -> None:
    _model_flag(parser)
    _repeats_flag(parser)
    parser.add_argument("--plot", metavar="PNG", help="also plot what was measured, and the fitted law")


def _scaling(args: argparse.Namespace) -> Report:
    from .costs.scaling import measure_scaling, plot

    report = measure_scaling(_load(args), repeats=args.repeats)
    if args.plot:
        plot(report, args.plot)
    return report


MEASURES: Mapping[str, Measure] = {
    "base-model": Measure("how well the base model draws what captions say", _base_model_flags, _base_model),
    "inversions": Measure("what each inversion returns of the picture", _inversions_flags, _inversions),
    "edits": Measure("the demo's edits under many settings", _edits_flags, _edits),
    "confinement": Measure("edits that may change more or less of the picture", _confinement_flags, _confinement),
    "compositions": Measure("something of one person on another", _compositions_flags, _compositions),
    "fits": Measure("what fits are worth and cost", _fits_flags, _fits),
    "prompts": Measure("edits asked for in fewer words, after many fits", _prompts_flags, _prompts),
    "describe": Measure("how much of a picture's description is right", _describe_flags, _describe),
    "photographs": Measure("avatars edited in photographs, and alone", _photographs_flags, _photographs),
    "steps": Measure("edits at 10, 20 and 50 steps", _steps_flags, _steps),
    "memory": Measure("peaks of memory, of edits and of fits", _memory_flags, _memory),
    "costs": Measure("what edits cost beside drawing a picture", _costs_flags, _costs),
    "scaling": Measure("seconds against steps, side and edits, and their law", _scaling_flags, _scaling),
}
