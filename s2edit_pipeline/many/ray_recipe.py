"""The same work by several pipelines, on this machine or a cluster: a recipe over Ray Data, which does the scheduling.

What Ray carries are the rows' numbers and places; each worker reads its rows from the manifest and writes its results
where one process would. So a worker that dies, or Ray, or all of it, loses no result, and nothing is done again.
"""

from __future__ import annotations

import argparse
import sys
from array import array
from collections.abc import Iterator
from dataclasses import asdict, fields
from importlib import import_module
from pathlib import Path
from typing import Any

from ..commands.shared import BadArguments
from .results import Outcome

MOST_BLOCKS = 4000
"""Shares that the rows are dealt out in; Ray gives a share whose worker died to another."""


def check_installed() -> None:
    """Raises:
    BadArguments: Ray isn't there.
    """
    try:
        import_module("ray.data")
    except ImportError:
        raise BadArguments(
            'several workers need Ray: pip install "s2edit-pipeline[ray]". --workers 1 needs nothing.'
        ) from None


class Worker:
    """One pipeline, loaded once, and the rows that it is given."""

    def __init__(self, args: argparse.Namespace) -> None:
        from ..commands.shared import load_model
        from .work import Desk

        self._desk, self._pipe = Desk(args), load_model(args)
        self._pipe.set_progress_bar_config(disable=True)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        rows = zip(batch["number"].tolist(), batch["place"].tolist(), strict=True)
        told = [asdict(self._desk.do(self._pipe, self._desk.manifest.row_at(*row))) for row in rows]
        return {one.name: [facts[one.name] for facts in told] for one in fields(Outcome)}


def outcomes(args: argparse.Namespace, numbers: array[int], places: array[int]) -> Iterator[Outcome]:
    """What becomes of the rows, in any order."""
    ray: Any = import_module("ray")
    data: Any = import_module("ray.data")
    pyarrow: Any = import_module("pyarrow")
    args = argparse.Namespace(**{**vars(args), "manifest": str(Path(args.manifest).absolute())})
    args.out = str(Path(args.out).absolute())
    was_there = ray.is_initialized()
    if not was_there:
        # one more than work, so that Ray's own tasks find room beside them
        here = {} if args.address else {"num_cpus": args.workers + 1, "include_dashboard": False}
        ray.init(address=args.address or "local", logging_level="ERROR", log_to_driver=False, **here)
    context = data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    try:
        wants_gpu = (args.device or "cuda").startswith("cuda") and ray.cluster_resources().get("GPU", 0) >= 1
        share = -(-len(numbers) // MOST_BLOCKS)
        tables = [
            pyarrow.table({"number": list(numbers[i : i + share]), "place": list(places[i : i + share])})
            for i in range(0, len(numbers), share)
        ]
        done = data.from_arrow(tables).map_batches(
            Worker,
            fn_constructor_args=(args,),
            batch_size=None,
            compute=data.ActorPoolStrategy(size=args.workers),
            num_cpus=1,
            num_gpus=1 if wants_gpu else 0,
        )
        for facts in done.iter_rows():
            yield Outcome(**facts)
    finally:
        if not was_there:
            ray.shutdown()
    sys.stderr.flush()
