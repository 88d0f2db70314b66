"""Methods × pictures: one record for each method and picture, made where it is missing.

A record is a folder that is written whole or not at all, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ...identity_folder import atomic_folder
from ..costs.counts import UNetCounts, count_unet
from ..methods.fit_cache import FitCache
from ..methods.pipeline_method import PipelineMethod
from ..methods.protocol import Edit, Method, weights_digest
from ..methods.registry import MethodSpec

Record = dict[str, Any]
Subject = TypeVar("Subject")
"""Whatever names a picture to a kind of run."""
Result = TypeVar("Result")


@dataclass(frozen=True)
class EditTask:
    """What a method is given: ``picture``, the prompt that says what it shows, in it the noun ``subject`` of whom is to
    stay the same, a seed, and a prompt for each edit."""

    picture: Image.Image
    source_prompt: str
    subject: str
    seed: int
    prompts: Sequence[str]


@dataclass(frozen=True)
class BenchmarkRun(ABC, Generic[Subject]):
    """What is run, and where its records lie.

    Attributes:
        methods: the benchmark's rows.
        subjects: each edited by each of ``methods``.
        seed: of fits and noises.
        model: a diffusers folder or a name on the Hub; None takes the embedded model.
        share_fits: methods whose fits are the same share them; then records don't say what preparing cost.
    """

    out: Path
    methods: tuple[MethodSpec, ...]
    subjects: tuple[Subject, ...]
    num_inference_steps: int = 25
    seed: int = 0
    device: str = "cpu"
    model: str | None = None
    share_fits: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", Path(self.out).absolute())
        if len({file_name(spec.name) for spec in self.methods}) != len(self.methods):
            raise ValueError(f"Two methods have one name: {', '.join(spec.name for spec in self.methods)}.")

    @abstractmethod
    def label(self, subject: Subject) -> str:
        """How messages and folders name it, no other one so."""

    @abstractmethod
    def task(self, subject: Subject, method: Method) -> EditTask:
        """What ``method`` is given."""

    @abstractmethod
    def score(self, subject: Subject, task: EditTask, edit: Edit, images: Sequence[Image.Image]) -> Record:
        """What the record says of ``images``, among it a list ``edits``, an object for each."""

    @abstractmethod
    def same_edits(self, record: Record, subject: Subject) -> bool:
        """Whether a record that has edits has those that would be made now."""

    def folder(self, spec: MethodSpec, subject: Subject) -> Path:
        """Of the record: ``record.json``, and the edited pictures side by side, ``edits.png``."""
        return self.out / "records" / file_name(spec.name) / self.label(subject)

    def settings(self, spec: MethodSpec, method: Method, weights: str) -> Record:
        """What a record of ``spec``, made as ``method``, is made with: records that differ in it can't be compared."""
        return {
            "method": spec.method,
            "arguments": json.loads(json.dumps(spec.arguments)),  # tuples as JSON has them
            "resolved": json.loads(json.dumps(method.resolved())),
            "num_inference_steps": self.num_inference_steps,
            "seed": self.seed,
            "device": torch.device(self.device).type,
            "weights": weights,
        }

    def records(self) -> Iterator[tuple[MethodSpec, Subject, Record]]:
        """Those that there are, failures among them."""
        for spec in self.methods:
            for subject in self.subjects:
                if (record := read_record(self.folder(spec, subject))) is not None:
                    yield spec, subject, record


def file_name(name: str) -> str:
    return re.sub(r"[^0-9A-Za-z.]+", "-", name).strip("-")


def read_record(folder: Path) -> Record | None:
    path = folder / "record.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def mean_costs(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over pictures: U-Net evaluations (a backward pass counts 2) and seconds, once a picture and an edit."""
    means = {}
    for what in ("cost", "seconds"):
        means[f"{what}_prepare"] = float(np.mean([r["prepare"][what] for r in records]))
        means[f"{what}_edit"] = float(np.mean([r["edit"][what] / len(r["edits"]) for r in records]))
    return means


def load_model(run: BenchmarkRun[Any]) -> Any:
    from ...avatars import load_avatars
    from ...pipeline import S2EditPipeline

    pipe = (S2EditPipeline.from_pretrained(run.model) if run.model else load_avatars()).to(run.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_benchmark(run: BenchmarkRun[Any], jobs: int = 1) -> dict[str, str]:
    """Make the records that are missing; those that failed are tried once more.

    Args:
        jobs: processes, each with one thread, that take a subject each; 1 works in this one.

    Returns:
        The methods that couldn't be made, each with the reason.

    Raises:
        ValueError: records made with other settings, or of other edits, are there.
    """
    workplace = _Workplace(run)
    missing = [(subject, _missing(run, workplace.settings, subject)) for subject in run.subjects]
    with tqdm(total=sum(len(specs) for _, specs in missing), desc="bench", unit="record") as bar:
        if jobs == 1:
            for subject, specs in missing:
                for spec in specs:
                    bar.set_postfix_str(f"{spec.name}, {run.label(subject)}", refresh=True)
                    workplace.work(spec, subject)
                    bar.update()
        else:
            with ProcessPoolExecutor(
                jobs, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(run,)
            ) as pool:
                futures = [pool.submit(_work, subject, specs) for subject, specs in missing if specs]
                for future in as_completed(futures):
                    bar.update(future.result())
    return workplace.unavailable


def _missing(run: BenchmarkRun[Any], settings: Mapping[str, Record], subject: Any) -> list[MethodSpec]:
    """The methods that can be made, which ``settings`` has, without a record of ``subject``, or with a failed one."""
    missing = []
    for spec in run.methods:
        if spec.name not in settings:
            continue
        record = read_record(run.folder(spec, subject))
        if record is not None:
            _check_same(run, spec, record, settings[spec.name])
        if record is None or record["error"] is not None:
            missing.append(spec)
        elif not run.same_edits(record, subject):
            raise ValueError(f"{run.out} holds records of {spec.name!r} with other edits; give another --out.")
    return missing


def _check_same(run: BenchmarkRun[Any], spec: MethodSpec, record: Record, wanted: Record) -> None:
    recorded = record["settings"]
    if differing := [name for name in wanted if recorded.get(name) != wanted[name]]:
        shown = "; ".join(f"{name} {recorded.get(name)!r}, not {wanted[name]!r}" for name in differing)
        raise ValueError(
            f"{run.out} holds records of {spec.name!r} made with {shown}. Give the settings of those records, or "
            "another --out."
        )


class _Workplace:
    """The model and the methods made of it; both are made anew after a failure, which may have left anything."""

    def __init__(self, run: BenchmarkRun[Any]) -> None:
        self.run = run
        self.unavailable: dict[str, str] = {}
        self.set_up()
        self.weights = weights_digest(self.pipe.components)
        self.settings = {
            spec.name: run.settings(spec, self.methods[spec.name], self.weights)
            for spec in run.methods
            if spec.name in self.methods
        }

    def set_up(self) -> None:
        self.pipe = load_model(self.run)
        self.methods: dict[str, Method] = {}
        fits = FitCache()
        for spec in self.run.methods:
            try:
                method = spec.make(self.pipe, self.run.num_inference_steps)
                if self.run.share_fits and isinstance(method, PipelineMethod):
                    method = replace(method, fits=fits)
                self.methods[spec.name] = method
            except Exception as error:
                self.unavailable[spec.name] = _in_words(error)

    def work(self, spec: MethodSpec, subject: Any) -> None:
        """Make and write one record."""
        strip = None
        settings = self.settings[spec.name]
        record: Record = {"name": spec.name, "subject": self.run.label(subject), "settings": settings}
        try:
            results, images = self._edit(self.methods[spec.name], subject)
            if weights_digest(self.pipe.components) != self.weights:
                raise RuntimeError(f"{spec.name} left the model with other weights than it had.")
            strip = Image.fromarray(np.concatenate([np.asarray(image) for image in images], 1))
            record |= {"error": None, **results}
        except Exception as error:
            record["error"] = _in_words(error)
            self.set_up()
        with atomic_folder(self.run.folder(spec, subject)) as folder:
            (folder / "record.json").write_text(json.dumps(record, indent=1), "utf-8")
            if strip is not None:
                strip.save(folder / "edits.png")

    def _edit(self, method: Method, subject: Any) -> tuple[Record, list[Image.Image]]:
        task = self.run.task(subject, method)
        # a system may have a model of its own
        unet = next((value.unet for value in vars(method).values() if hasattr(value, "unet")), self.pipe.unet)
        torch.manual_seed(task.seed)  # for what takes no generator
        prepare = partial(method.prepare, task.picture, task.source_prompt, task.subject, task.seed)
        edit, preparation_cost = _measured(unet, prepare)
        images, edit_cost = _measured(unet, partial(edit, task.prompts))
        if len(images) != len(task.prompts):
            raise RuntimeError(f"{method.name} returned {len(images)} pictures for {len(task.prompts)} prompts.")
        return {
            "prepare": None if self.run.share_fits else preparation_cost,
            "edit": edit_cost,
            **self.run.score(subject, task, edit, images),
        }, images


def _measured(unet: torch.nn.Module, function: Callable[[], Result]) -> tuple[Result, Record]:
    start = time.perf_counter()
    counts: UNetCounts
    with count_unet(unet) as counts:
        result = function()
    return result, {**asdict(counts), "cost": counts.cost, "seconds": round(time.perf_counter() - start, 3)}


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


# ---------------------------------------------------------------------------- one process of several


_workplaces: list[_Workplace] = []
"""This process's own, once it is a worker."""


def _start_worker(run: BenchmarkRun[Any]) -> None:
    torch.set_num_threads(1)
    _workplaces.append(_Workplace(run))


def _work(subject: Any, specs: list[MethodSpec]) -> int:
    (workplace,) = _workplaces
    for spec in specs:
        workplace.work(spec, subject)
    return len(specs)
