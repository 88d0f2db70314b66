"""``s2edit bench``: the benchmark, its tuning, the paper's figures, and the same methods on real pictures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

_QUICK = {"people": 4, "creatures": 2, "edits": 3}
_SMALL = {"people": 4, "creatures": 0, "edits": 6}
_FULL = {"people": 24, "creatures": 12, "edits": 8}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", default="s2edit-bench", help="folder of records and report; a rerun goes on (%(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="few subjects, edits and methods: some minutes")
    parser.add_argument("--people", type=int, help="held-out people (24; quick: 4; --tune and figures: 4)")
    parser.add_argument("--creatures", type=int, help="held-out creatures (12; quick: 2; else none)")
    parser.add_argument("--edits", type=int, help="at most so many of each subject (8; quick: 3; else 6)")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="only these; --list names them")
    parser.add_argument("--list", action="store_true", help="name the methods and stop")
    parser.add_argument("--baseline", default="S2Edit", help="what the others are compared with (%(default)s)")
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
    """Run the benchmark; returns the exit status, 2 for arguments that don't go together or can't be used."""
    try:
        _run(args)
    except (ValueError, OSError) as error:
        print(f"s2edit bench: {error}", file=sys.stderr)
        return 2
    return 0


def _run(args: argparse.Namespace) -> None:
    import torch
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    from .benchmark.runner import run_benchmark
    from .methods.registry import BENCHMARK_METHODS, QUICK_METHODS, SETTINGS_FILE, entrants

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()

    if args.list:
        print("\n".join(BENCHMARK_METHODS))
        return
    settings = Path(args.settings or SETTINGS_FILE)
    models = dict(_method_model(given) for given in args.method_model)
    shared = {
        "num_inference_steps": args.steps,
        "seed": args.seed,
        "device": args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        "model": args.model,
    }
    _check_together(args)
    if args.dataset:
        from .benchmark.dataset_run import DatasetRun, standard_measures, write_dataset_report
        from .benchmark.datasets import load_edit_dataset

        pictures = load_edit_dataset(args.dataset)[: args.limit]
        taking_part = entrants(args.methods or BENCHMARK_METHODS, settings, models)
        on_pictures = DatasetRun(Path(args.out), taking_part, tuple(pictures), **shared)
        unavailable = run_benchmark(on_pictures, args.jobs)
        measures = standard_measures(args.clip_model) if args.standard_metrics else {}
        report = write_dataset_report(on_pictures, unavailable, measures)
        print(f"{report.read_text('utf-8')}\nThe report is {report}")
        return

    from .benchmark.drawn_edits import BENCHMARK_FIRST
    from .benchmark.drawn_subjects import BenchmarkRun
    from .benchmark.report import write_report

    drawing = args.figures or args.figure
    sizes = dict(_QUICK if args.quick else _SMALL if args.tune or drawing else _FULL)
    sizes |= {name: value for name in sizes if (value := getattr(args, name)) is not None}
    shared["edits"] = sizes["edits"]
    if args.tune:
        from .benchmark.tuning import TUNING_FIRST, tune, tuned_methods

        subjects = _numbered(TUNING_FIRST, sizes["people"], sizes["creatures"])
        found = tune(args.methods or tuned_methods(), subjects, Path(args.out), settings, args.jobs, models, **shared)
        for scores in found.values():
            print("\n".join(f"{score:7.2f}  {name}" for name, score in scores.items()))
        print(f"The best are in {settings}")
        return
    subjects = _numbered(BENCHMARK_FIRST, sizes["people"], sizes["creatures"])

    def of(names: Sequence[str]) -> BenchmarkRun:
        return BenchmarkRun(Path(args.out), entrants(args.methods or names, settings, models), subjects, **shared)

    if drawing:
        from .benchmark.figures import METHODS_OF, draw_figure

        for number in (7, 8, 9) if args.figures else args.figure:
            print(f"Figure {number} is {draw_figure(number, of(METHODS_OF[number]), args.jobs)}")
        return
    bench = of(QUICK_METHODS if args.quick else BENCHMARK_METHODS)
    unavailable = run_benchmark(bench, args.jobs)
    report = write_report(bench, unavailable, args.baseline)
    print(f"{report.read_text('utf-8')}\nThe report is {report}")


def _check_together(args: argparse.Namespace) -> None:
    drawn = ("quick", "people", "creatures", "edits")
    real = ("limit", "standard_metrics", "clip_model")
    for name in drawn if args.dataset else real:
        if getattr(args, name) is not None and getattr(args, name) is not False:  # 0 is a number
            where = "not for --dataset" if args.dataset else "for --dataset PATH"
            raise ValueError(f"--{name.replace('_', '-')} is {where}; leave it out.")
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit must be at least 1, not {args.limit}.")


def _numbered(first: int, people: int, creatures: int) -> tuple[tuple[str, int], ...]:
    counts = {"person": people, "creature": creatures}
    return tuple((kind, first + i) for kind, count in counts.items() for i in range(count))


def _method_model(given: str) -> tuple[str, str]:
    name, found, folder = given.partition("=")
    if not found or not folder:
        raise ValueError(f"--method-model takes METHOD=FOLDER, not {given!r}.")
    return name, folder
