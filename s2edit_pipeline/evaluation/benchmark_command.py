"""``s2edit bench``: the benchmark, its tuning, the paper's figures, and the same methods on real pictures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..commands.shared import FAILED, check_folder_place, checked_device

if TYPE_CHECKING:
    from .benchmark.drawn_subjects import DrawnRun

_QUICK = {"people": 4, "creatures": 2, "edits": 3}
_SMALL = {"people": 4, "creatures": 0, "edits": 6}
_FULL = {"people": 24, "creatures": 12, "edits": 8}
_BASELINE = "S2Edit"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", default="s2edit-bench", help="folder of records and report; a rerun goes on (%(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="few subjects, edits and methods: some minutes")
    parser.add_argument("--people", type=int, help="held-out people (24; quick: 4; --tune and figures: 4)")
    parser.add_argument("--creatures", type=int, help="held-out creatures (12; quick: 2; else none)")
    parser.add_argument("--edits", type=int, help="at most so many of each subject (8; quick: 3; else 6)")
    parser.add_argument(
        "--prompts", choices=("complete", "half", "short", "vague"),
        help="how much they say: all that captions can, half of it, the noun alone, or with one fault (complete)",
    )  # fmt: skip
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="only these; --list names them")
    parser.add_argument("--list", action="store_true", help="name the methods and stop")
    parser.add_argument("--baseline", help=f"what the others are compared with ({_BASELINE})")
    parser.add_argument("--settings", help="JSON of each method's arguments (default: as tuned for this package)")
    parser.add_argument("--method-model", action="append", default=[], metavar="METHOD=FOLDER", help="its own weights")
    parser.add_argument(
        "--model",
        help="a diffusers folder of the avatars family, with --dataset any or a name on the Hub (the embedded model)",
    )
    parser.add_argument("--device", help="where to work (default: a CUDA device if there is one)")
    parser.add_argument("--steps", type=int, default=25, help="inference steps (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread, a subject each (%(default)s)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--tune", action="store_true", help="find each method's best arguments, and write them to --settings"
    )
    what.add_argument("--figure", type=int, choices=(7, 8, 9), action="append", help="draw the paper's figure instead")
    what.add_argument("--figures", action="store_true", help="draw all three")
    what.add_argument("--dataset", metavar="PATH", help="edit these real pictures instead: captions, or PIE-Bench")
    parser.add_argument("--limit", type=int, metavar="N", help="with --dataset: only its first N pictures")
    parser.add_argument(
        "--standard-metrics",
        action="store_true",
        help="with --dataset: CLIP score, LPIPS, FID; they fetch weights",
    )
    parser.add_argument("--clip-model", metavar="FOLDER", help="with --dataset: CLIP score's model (CLIP ViT-L/14)")


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; returns the exit status."""
    import torch
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    from .methods.registry import BENCHMARK_METHODS, SETTINGS_FILE

    check_folder_place("--out", args.out)
    if args.steps < 1:
        raise ValueError(f"--steps must be at least 1, not {args.steps}.")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()

    if args.list:
        print("\n".join(BENCHMARK_METHODS))
        return 0
    _check_together(args)
    args.settings = Path(args.settings or SETTINGS_FILE)
    args.models = dict(_method_model(text) for text in args.method_model)
    shared = {
        "num_inference_steps": args.steps,
        "seed": args.seed,
        "device": checked_device(args.device) if args.device else "cuda" if torch.cuda.is_available() else "cpu",
        "model": args.model,
    }
    if args.dataset:
        _run_on_dataset(args, shared)
        return 0
    sizes = dict(_QUICK if args.quick else _SMALL if args.tune or _figures(args) else _FULL)
    sizes |= {name: value for name in sizes if (value := getattr(args, name)) is not None}
    shared["edits"] = sizes.pop("edits")
    if args.tune:
        _tune(args, sizes, shared)
    elif figures := _figures(args):
        _draw(args, figures, sizes, shared)
    else:
        return _run_on_drawn_subjects(args, sizes, shared)
    return 0


def _run_on_dataset(args: argparse.Namespace, shared: Mapping[str, Any]) -> None:
    from .benchmark.dataset_report import standard_measures, write_dataset_report
    from .benchmark.dataset_run import DatasetRun
    from .benchmark.datasets import load_edit_dataset
    from .benchmark.runner import run_benchmark
    from .methods.registry import BENCHMARK_METHODS, method_specs

    pictures = load_edit_dataset(args.dataset)[: args.limit]
    specs = method_specs(args.methods or BENCHMARK_METHODS, args.settings, args.models)
    bench = DatasetRun(Path(args.out), specs, tuple(pictures), **shared)
    unavailable = run_benchmark(bench, args.jobs)
    measures = standard_measures(args.clip_model) if args.standard_metrics else {}
    _show(write_dataset_report(bench, unavailable, measures))


def _tune(args: argparse.Namespace, sizes: Mapping[str, int], shared: Mapping[str, Any]) -> None:
    from .benchmark.tuning import TUNING_FIRST, tune, tuned_methods

    names, subjects = args.methods or tuned_methods(), _numbered(TUNING_FIRST, **sizes)
    for scores in tune(names, subjects, Path(args.out), args.settings, args.jobs, args.models, **shared).values():
        print("\n".join(f"{score:7.2f}  {name}" for name, score in scores.items()))
    print(f"The best are in {args.settings}")


def _draw(
    args: argparse.Namespace, figures: Sequence[int], sizes: Mapping[str, int], shared: Mapping[str, Any]
) -> None:
    from .benchmark.figures import METHODS_OF, draw_figure

    for number in figures:
        bench = _drawn_run(args, METHODS_OF[number], sizes, shared)
        print(f"Figure {number} is {draw_figure(number, bench, args.jobs)}")


def _run_on_drawn_subjects(args: argparse.Namespace, sizes: Mapping[str, int], shared: Mapping[str, Any]) -> int:
    """The exit status: 1 where nothing at all could be made."""
    from .benchmark.report import write_report
    from .benchmark.runner import run_benchmark
    from .methods.registry import BENCHMARK_METHODS, QUICK_METHODS

    bench = _drawn_run(args, QUICK_METHODS if args.quick else BENCHMARK_METHODS, sizes, shared)
    names = [spec.name for spec in bench.methods]
    if args.baseline is not None and args.baseline not in names:
        raise ValueError(f"--baseline {args.baseline!r} takes no part; choose from {', '.join(names)}.")
    unavailable = run_benchmark(bench, args.jobs)
    _show(write_report(bench, unavailable, args.baseline or _BASELINE))
    errors = [record["error"] for *_, record in bench.records()]
    if None in errors:
        return 0
    print(
        f"s2edit bench: nothing could be made; the first error: {next(iter(errors), 'no method is there')}",
        file=sys.stderr,
    )
    return FAILED


def _drawn_run(
    args: argparse.Namespace, names: Sequence[str], sizes: Mapping[str, int], shared: Mapping[str, Any]
) -> DrawnRun:
    from .benchmark.drawn_edits import BENCHMARK_FIRST
    from .benchmark.drawn_subjects import DrawnRun
    from .methods.registry import method_specs

    specs = method_specs(args.methods or names, args.settings, args.models)
    prompts = args.prompts or "complete"
    return DrawnRun(Path(args.out), specs, _numbered(BENCHMARK_FIRST, **sizes), prompts=prompts, **shared)


def _figures(args: argparse.Namespace) -> Sequence[int]:
    return (7, 8, 9) if args.figures else args.figure or ()


def _show(report: Path) -> None:
    print(f"{report.read_text('utf-8')}\nThe report is {report}")


def _check_together(args: argparse.Namespace) -> None:
    """Refuse flags that the chosen kind of run would ignore."""
    drawn = ("quick", "people", "creatures", "edits", "baseline", "prompts")
    real = ("limit", "standard_metrics", "clip_model")
    for name in drawn if args.dataset else real:
        if getattr(args, name) is not None and getattr(args, name) is not False:  # 0 is a number
            where = "not for --dataset" if args.dataset else "for --dataset PATH"
            raise ValueError(f"--{name.replace('_', '-')} is {where}; leave it out.")
    if args.baseline is not None and (args.tune or _figures(args)):
        raise ValueError("--baseline is for the report, which --tune and figures don't write; leave it out.")
    if args.prompts is not None and (args.tune or _figures(args)):
        raise ValueError("--prompts is for the report: --tune and figures say all that captions can; leave it out.")
    if args.clip_model is not None and not args.standard_metrics:
        raise ValueError("--clip-model is for --standard-metrics; give both, or neither.")
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit must be at least 1, not {args.limit}.")


def _numbered(first: int, *, people: int, creatures: int) -> tuple[tuple[str, int], ...]:
    counts = {"person": people, "creature": creatures}
    return tuple((kind, first + i) for kind, count in counts.items() for i in range(count))


def _method_model(text: str) -> tuple[str, str]:
    name, _, folder = text.partition("=")
    if not folder:
        raise ValueError(f"--method-model takes METHOD=FOLDER, not {text!r}.")
    return name, folder
