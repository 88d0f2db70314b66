"""``s2edit measure``: the tables in docs, each by one command."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .studies.base_model import BaseModelReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=tuple(_MEASURES))
    parser.add_argument("--model", help="a diffusers folder of the avatars family; the embedded model otherwise")
    parser.add_argument("--captions", type=int, default=256, help="base-model: pictures drawn (%(default)s)")
    parser.add_argument("--people", type=int, help="how many, but for base-model and edits (4, compositions 24)")
    parser.add_argument(
        "--steps", type=int, help="inference steps (25; base-model 30, inversions and costs 50, memory 10)"
    )
    parser.add_argument("--setting", action="append", help="edits: only these rows; give as many as you like")
    parser.add_argument("--sheet", help="base-model, compositions: also save the first pictures, to this PNG")
    parser.add_argument("--repeats", type=int, default=5, help="costs, scaling: of each run (%(default)s)")
    parser.add_argument(
        "--items", nargs="+", help="costs: of stock, first, inverted_first, further, three, null_text; all otherwise"
    )
    parser.add_argument("--side", type=int, help="costs: of the picture, in pixels (the model's own)")
    parser.add_argument("--json", help="costs, steps, scaling: also save what was measured, to this file")
    parser.add_argument("--plot", help="fits, scaling: also plot them, to this PNG")
    parser.add_argument(
        "--random", nargs="+", metavar="MODEL", help="costs: on a CUDA device, of sd15, sd21, sdxl with random weights"
    )
    parser.add_argument("--sides", type=int, nargs="+", help="costs --random: of the pictures (512, 768 and 1024)")
    parser.add_argument("--tiny", action="store_true", help="costs --random: narrow models, on the CPU, as a trial")


def run(args: argparse.Namespace) -> int:
    """Print one table; returns the exit status, 2 for arguments that can't be used."""
    try:
        _MEASURES[args.what](args)
    except (ValueError, ImportError, OSError) as error:
        print(f"s2edit measure {args.what}: {error}", file=sys.stderr)
        return 2
    return 0


def _load(args: argparse.Namespace) -> Any:
    from ..avatars import load_avatars
    from ..pipeline import S2EditPipeline

    pipe = S2EditPipeline.from_pretrained(args.model) if args.model else load_avatars()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _base_model(args: argparse.Namespace) -> None:
    from .studies.base_model import measure_base_model

    report = measure_base_model(
        _load(args), num_captions=args.captions, num_pairs=args.captions // 4, num_inference_steps=args.steps or 30
    )
    print(report.table())
    if args.sheet:
        _save_sheet(report, args.sheet)


def _save_sheet(report: BaseModelReport, path: str) -> None:
    """Sixteen people, sixteen creatures and eight unseen pairs of words, drawn."""
    import numpy as np
    from PIL import Image

    half = len(report.generated) // 2
    shown = [report.generated[:16], report.generated[half : half + 16], report.generated_pairs[:8]]
    lines = [np.concatenate(list(line), 1) for some in shown for line in np.split(some, len(some) // 8)]
    Image.fromarray(np.concatenate(lines)).save(path)


def _inversions(args: argparse.Namespace) -> None:
    from .studies.inversions import measure_inversions, table

    print(table(measure_inversions(_load(args), people=range(args.people or 4), num_inference_steps=args.steps or 50)))


def _edits(args: argparse.Namespace) -> None:
    from .studies import edits as edit_table

    names = args.setting or list(edit_table.SETTINGS)
    print(edit_table.table(edit_table.measure_edits(_load(args), names, num_inference_steps=args.steps or 25)))


def _confinement(args: argparse.Namespace) -> None:
    from .metrics.counterfactual import varied_edits
    from .studies import edits as edit_table

    rows = edit_table.measure_edits(
        _load(args),
        ["the defaults", "drift left", "not confined"],
        people=range(args.people or 4),
        edits_of=varied_edits,
        num_inference_steps=args.steps or 25,
    )
    print(edit_table.table(rows))


def _compositions(args: argparse.Namespace) -> None:
    from .studies import compositions as composition

    composed = composition.measure_compositions(
        _load(args), composition.composition_pairs(args.people or 24), num_inference_steps=args.steps or 25
    )
    print(composition.table(composed))
    if args.sheet:
        composition.sheet(composed).save(args.sheet)


def _fits(args: argparse.Namespace) -> None:
    from .studies import fits as fit_curves

    points = fit_curves.measure_fits(_load(args), range(args.people or 4), num_inference_steps=args.steps or 25)
    print(fit_curves.table(points))
    if args.plot:
        fit_curves.plot(points, args.plot)


def _memory(args: argparse.Namespace) -> None:
    from .costs import memory as peak_memory

    pipe = _load(args)
    print(peak_memory.table(peak_memory.measure_memory(pipe, num_inference_steps=args.steps or 10)))
    print()
    print(peak_memory.fit_table(peak_memory.measure_fit_memory(pipe)))


def _costs(args: argparse.Namespace) -> None:
    if args.random:
        from .costs.cuda import measure_gpu_costs

        report: Any = measure_gpu_costs(
            args.random,
            tiny=args.tiny,
            sides=args.sides,
            num_inference_steps=args.steps or (2 if args.tiny else 50),
            num_fit_steps=2 if args.tiny else None,
            repeats=args.repeats,
        )
    else:
        from .costs.edits import ITEMS, measure_edit_costs

        items = args.items or tuple(ITEMS)
        report = measure_edit_costs(_load(args), args.steps or 50, args.repeats, items=items, side=args.side)
    _show(report, args.json)


def _steps(args: argparse.Namespace) -> None:
    from .studies.few_steps import measure_steps

    _show(measure_steps(_load(args), people=range(args.people or 4)), args.json)


def _scaling(args: argparse.Namespace) -> None:
    from .costs.scaling import measure_scaling, plot

    report = measure_scaling(_load(args), repeats=args.repeats)
    _show(report, args.json)
    if args.plot:
        plot(report, args.plot)


def _show(report: Any, path: str | None) -> None:
    print(report.table())
    if path:
        Path(path).write_text(json.dumps(asdict(report), indent=2) + "\n", "utf-8")


_MEASURES: dict[str, Callable[[argparse.Namespace], None]] = {
    "base-model": _base_model,
    "inversions": _inversions,
    "edits": _edits,
    "confinement": _confinement,
    "compositions": _compositions,
    "fits": _fits,
    "memory": _memory,
    "costs": _costs,
    "steps": _steps,
    "scaling": _scaling,
}
