"""What ``s2edit fit-many`` and ``edit-many`` share: the manifest checked, what is open done, what became of it told."""

from __future__ import annotations

import argparse
import json
import sys
import time
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..commands.shared import FAILED, Answer, BadArguments, add_model, load_model, run_command
from .results import Outcome, write_whole
from .work import Desk


def add_many(parser: argparse.ArgumentParser) -> None:
    """The arguments that both commands take."""
    parser.add_argument("manifest", help="a .csv, .jsonl or .parquet file, a row for each result")
    parser.add_argument("--out", required=True, help="the folder of results; the same command goes on in it")
    parser.add_argument("--retry-failed", action="store_true", help="try the rows again that were set aside")
    many = parser.add_argument_group("several at once, with Ray")
    many.add_argument("--workers", type=int, default=1, help="pipelines at work (default: %(default)s, without Ray)")
    many.add_argument("--address", help="a Ray cluster's; its machines share the files (default: this machine)")
    add_model(parser)


@dataclass
class Plan:
    """What a manifest's rows come to.

    Attributes:
        numbers, places: of the rows to do, eight bytes each.
        rows, done: all, and those whose result is there.
        set_aside: that failed before.
        repeated: that ask for the same as a row before them, and share its result.
        failed: digests of all rows set aside, before and in this run.
    """

    numbers: array[int] = field(default_factory=lambda: array("q"))
    places: array[int] = field(default_factory=lambda: array("q"))
    rows: int = 0
    done: int = 0
    set_aside: int = 0
    repeated: int = 0
    failed: set[bytes] = field(default_factory=set)


def plan(desk: Desk, retry_failed: bool) -> Plan:
    """Read the manifest through; nothing is done before all of it is known to be good.

    Raises:
        ValueError: a row that can't be used, by number and column.
    """
    failed = {bytes.fromhex(facts["digest"]) for facts in desk.results.failures()}
    made, open_digests = Plan(), set[bytes]()
    for row in desk.manifest:
        _, digest, place = desk.located(row)
        made.rows += 1
        if desk.results.has(place):
            made.done += 1
            continue
        key = bytes.fromhex(digest)
        if key in failed:
            made.failed.add(key)
        if key in failed and not retry_failed:
            made.set_aside += 1
        elif key in open_digests:
            made.repeated += 1
        else:
            open_digests.add(key)
            made.numbers.append(row.number)
            made.places.append(row.place)
    return made


def run_many(args: argparse.Namespace) -> int:
    """Run the command; the status is 1 where rows are set aside."""
    reports: list[dict[str, Any]] = []

    def command(args: argparse.Namespace) -> Answer:
        report = _run(args)
        reports.append(report)
        words = f"{report['done']} of {report['rows']} rows are done, {report['done_now']} of them now"
        lines = [f"{words}, in {report['seconds']:.0f} s; see {args.out}/results.jsonl"]
        if report["set_aside"]:
            lines.append(f"{report['set_aside']} are set aside, see {args.out}/failed.jsonl and --retry-failed")
        return Answer(tuple(lines), report)

    status = run_command(command, args.command)(args)
    return status or (FAILED if reports and reports[0]["set_aside"] else 0)


def _run(args: argparse.Namespace) -> dict[str, Any]:
    if args.workers < 1:
        raise BadArguments(f"--workers must be at least 1, not {args.workers}.")
    with_ray = args.workers > 1 or args.address is not None
    if with_ray:
        from .ray_recipe import check_installed

        check_installed()
    started = time.perf_counter()
    desk = Desk(args)
    desk.results.open(args.command)
    with desk.results.alone():
        planned = plan(desk, args.retry_failed)
        known = time.perf_counter()
        took: list[float] = []
        if planned.numbers:
            if with_ray:
                from .ray_recipe import outcomes

                told = outcomes(args, planned.numbers, planned.places)
            else:
                told = _one_by_one(args, desk, planned)
            for outcome in _shown(told, args, len(planned.numbers)):
                if outcome.status == "failed":
                    row = desk.manifest.row_at(outcome.number, _place(planned, outcome))
                    desk.results.set_aside(outcome, row.cells)
                    planned.failed.add(bytes.fromhex(outcome.digest))
                elif outcome.status == "done":
                    took.append(outcome.seconds)
        ended = time.perf_counter()
        counts = _tell_rows(desk, planned.failed)
        desk.results.tidy_failures(planned.failed)
        report = {
            "command": args.command, "manifest": str(desk.manifest.path), "out": str(desk.results.folder),
            **counts, "done_before": planned.done, "done_now": len(took),
            "repeated": planned.repeated, "settings": dict(desk.work.settings),
            "workers": args.workers, "seconds": round(time.perf_counter() - started, 2),
            "seconds_to_read_the_manifest": round(known - started, 2), "seconds_of_work": round(ended - known, 2),
            "seconds_a_row": round(sum(took) / len(took), 3) if took else None,
        }  # fmt: skip
        write_whole(desk.results.folder / "report.json", [json.dumps(report, ensure_ascii=False, indent=2)])
    return report


def _place(planned: Plan, outcome: Outcome) -> int:
    return planned.places[bisect_left(planned.numbers, outcome.number)]  # numbers only grow


def _one_by_one(args: argparse.Namespace, desk: Desk, planned: Plan) -> Iterator[Outcome]:
    pipe = load_model(args)
    pipe.set_progress_bar_config(disable=True)  # the rows have one
    for number, place in zip(planned.numbers, planned.places, strict=True):
        yield desk.do(pipe, desk.manifest.row_at(number, place))


def _shown(told: Iterator[Outcome], args: argparse.Namespace, total: int) -> Iterator[Outcome]:
    from tqdm import tqdm

    is_seen = sys.stderr.isatty() and not args.json
    yield from tqdm(told, total=total, unit="row", file=sys.stderr, disable=not is_seen, leave=False)


def _tell_rows(desk: Desk, failed: set[bytes]) -> dict[str, int]:
    """Write ``results.jsonl``, a line for each row of the manifest, and count."""
    counts = {"rows": 0, "done": 0, "set_aside": 0, "open": 0}

    def lines() -> Iterator[str]:
        for row in desk.manifest:
            _, digest, place = desk.located(row)
            missing = "set_aside" if bytes.fromhex(digest) in failed else "open"
            status = "done" if desk.results.has(place) else missing
            counts["rows"] += 1
            counts[status] += 1
            own = {"id": row.cells["id"]} if "id" in row.cells else {}
            yield json.dumps({"row": row.number, **own, "status": status, "result": place}, ensure_ascii=False)

    write_whole(desk.results.folder / "results.jsonl", lines())
    return counts
