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

from ..identity_folder import atomic_folder
from .benchmark_methods import Entrant
from .edit_methods import Edit, EditMethod, weights_digest
from .own_methods import FitsOfOnePicture, PipelineMethod
from .unet_counts import UNetCounts, count_unet

Record = dict[str, Any]
Subject = TypeVar("Subject")
"""Whatever names a picture to a kind of run."""
Result = TypeVar("Result")


@dataclass(frozen=True)
class Task:
    """What a method is given: a picture, what it shows, the noun of whom is kept, a seed, and what is asked for."""

    picture: Image.Image
    source_prompt: str
    noun: str
    seed: int
    asked: Sequence[str]


@dataclass(frozen=True)
class MethodsRun(ABC, Generic[Subject]):
    """What is run, and where its records are kept.

    Attributes:
        subjects: each edited by each of ``entrants``.
        seed: of fits and noises.
        model: a diffusers folder or a name on the Hub; None takes the embedded model.
        share_fits: entrants whose fits are the same share them; then records don't say what preparing cost.
    """

    out: Path
    entrants: tuple[Entrant, ...]
    subjects: tuple[Subject, ...]
    num_inference_steps: int = 25
    seed: int = 0
    device: str = "cpu"
    model: str | None = None
    share_fits: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", Path(self.out).absolute())
        if len({file_name(entrant.name) for entrant in self.entrants}) != len(self.entrants):
            raise ValueError(f"Two entrants have one name: {', '.join(e.name for e in self.entrants)}.")

    @abstractmethod
    def label(self, subject: Subject) -> str:
        """How messages and folders name it, no other one so."""

    @abstractmethod
    def task(self, subject: Subject, method: EditMethod) -> Task:
        """What ``method`` is given."""

    @abstractmethod
    def score(self, subject: Subject, task: Task, edit: Edit, images: Sequence[Image.Image]) -> Record:
        """What the record says of ``images``, among it a list ``edits``, an object for each."""

    @abstractmethod
    def same_edits(self, record: Record, subject: Subject) -> bool:
        """Whether a record that holds edits holds those that would be made now."""

    def folder(self, entrant: Entrant, subject: Subject) -> Path:
        """Of the record: ``record.json``, and the edited pictures side by side, ``edits.png``."""
        return self.out / "records" / file_name(entrant.name) / self.label(subject)

    def settings(self, entrant: Entrant, method: EditMethod, weights: str) -> Record:
        """What a record of ``entrant``, made as ``method``, is made with: records that differ in it can't be
        compared."""
        return {
            "method": entrant.method,
            "arguments": json.loads(json.dumps(entrant.arguments)),  # tuples as JSON has them
            "resolved": json.loads(json.dumps(method.resolved())),
            "num_inference_steps": self.num_inference_steps,
            "seed": self.seed,
            "device": torch.device(self.device).type,
            "weights": weights,
        }

    def records(self) -> Iterator[tuple[Entrant, Subject, Record]]:
        """Those that there are, failures among them."""
        for entrant in self.entrants:
            for subject in self.subjects:
                if (record := read_record(self.folder(entrant, subject))) is not None:
                    yield entrant, subject, record


def file_name(name: str) -> str:
    return re.sub(r"[^0-9A-Za-z.]+", "-", name).strip("-")


def read_record(folder: Path) -> Record | None:
    path = folder / "record.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def mean_costs(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over pictures: U-Net evaluations (a backward pass counts 2) and seconds, once a picture and an edit."""
    found = {}
    for what in ("cost", "seconds"):
        found[f"{what}_prepare"] = float(np.mean([r["prepare"][what] for r in records]))
        found[f"{what}_edit"] = float(np.mean([r["edit"][what] / len(r["edits"]) for r in records]))
    return found


def load_model(run: MethodsRun[Any]) -> Any:
    from ..avatars import load_avatars
    from ..pipeline import S2EditPipeline

    pipe = (S2EditPipeline.from_pretrained(run.model) if run.model else load_avatars()).to(run.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_benchmark(run: MethodsRun[Any], jobs: int = 1) -> dict[str, str]:
    """Make the records that are missing; those that failed are tried once more.

    Args:
        jobs: processes, each with one thread, that take a subject each; 1 works in this one.

    Returns:
        The entrants that couldn't be made, each with the reason.

    Raises:
        ValueError: records made with other settings, or of other edits, are there.
    """
    workplace = _Workplace(run)
    to_do = [(subject, _missing(run, workplace.settings, subject)) for subject in run.subjects]
    with tqdm(total=sum(len(left) for _, left in to_do), desc="bench", unit="record") as bar:
        if jobs == 1:
            for subject, left in to_do:
                for entrant in left:
                    bar.set_postfix_str(f"{entrant.name}, {run.label(subject)}", refresh=True)
                    workplace.work(entrant, subject)
                    bar.update()
        else:
            with ProcessPoolExecutor(
                jobs, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(run,)
            ) as pool:
                for done in as_completed([pool.submit(_work, subject, left) for subject, left in to_do if left]):
                    bar.update(done.result())
    return workplace.unavailable


def _missing(run: MethodsRun[Any], settings: Mapping[str, Record], subject: Any) -> list[Entrant]:
    """Those that can be made, which ``settings`` has, without a record of ``subject``, or with a failed one."""
    left = []
    for entrant in run.entrants:
        if entrant.name not in settings:
            continue
        record = read_record(run.folder(entrant, subject))
        if record is not None:
            _check_same(run, entrant, record, settings[entrant.name])
        if record is None or record["error"] is not None:
            left.append(entrant)
        elif not run.same_edits(record, subject):
            raise ValueError(f"{run.out} holds records of {entrant.name!r} with other edits; give another --out.")
    return left


def _check_same(run: MethodsRun[Any], entrant: Entrant, record: Record, wanted: Record) -> None:
    held = record["settings"]
    if differing := [name for name in wanted if held.get(name) != wanted[name]]:
        shown = "; ".join(f"{name} {held.get(name)!r}, not {wanted[name]!r}" for name in differing)
        raise ValueError(
            f"{run.out} holds records of {entrant.name!r} made with {shown}. Give the settings of those records, or "
            "another --out."
        )


class _Workplace:
    """The model and the methods made of it; both are made anew after a failure, which may have left anything."""

    def __init__(self, run: MethodsRun[Any]) -> None:
        self.run = run
        self.unavailable: dict[str, str] = {}
        self.set_up()
        self.weights = weights_digest(self.pipe.components)
        self.settings = {
            entrant.name: run.settings(entrant, self.methods[entrant.name], self.weights)
            for entrant in run.entrants
            if entrant.name in self.methods
        }

    def set_up(self) -> None:
        self.pipe = load_model(self.run)
        self.methods: dict[str, EditMethod] = {}
        fits = FitsOfOnePicture()
        for entrant in self.run.entrants:
            try:
                made = entrant.make(self.pipe, self.run.num_inference_steps)
                if self.run.share_fits and isinstance(made, PipelineMethod):
                    made = replace(made, fits=fits)
                self.methods[entrant.name] = made
            except Exception as error:
                self.unavailable[entrant.name] = _said(error)

    def work(self, entrant: Entrant, subject: Any) -> None:
        """Make and write one record."""
        strip = None
        settings = self.settings[entrant.name]
        record: Record = {"name": entrant.name, "subject": self.run.label(subject), "settings": settings}
        try:
            found, images = self._edit(self.methods[entrant.name], subject)
            if weights_digest(self.pipe.components) != self.weights:
                raise RuntimeError(f"{entrant.name} left the model with other weights than it had.")
            strip = Image.fromarray(np.concatenate([np.asarray(image) for image in images], 1))
            record |= {"error": None, **found}
        except Exception as error:
            record["error"] = _said(error)
            self.set_up()
        with atomic_folder(self.run.folder(entrant, subject)) as folder:
            (folder / "record.json").write_text(json.dumps(record, indent=1), "utf-8")
            if strip is not None:
                strip.save(folder / "edits.png")

    def _edit(self, method: EditMethod, subject: Any) -> tuple[Record, list[Image.Image]]:
        task = self.run.task(subject, method)
        # a system may have a model of its own
        unet = next((held.unet for held in vars(method).values() if hasattr(held, "unet")), self.pipe.unet)
        torch.manual_seed(task.seed)  # for what takes no generator
        prepare = partial(method.prepare, task.picture, task.source_prompt, task.noun, task.seed)
        edit, prepared = _measured(unet, prepare)
        images, edited = _measured(unet, partial(edit, task.asked))
        if len(images) != len(task.asked):
            raise RuntimeError(f"{method.name} returned {len(images)} pictures for {len(task.asked)} prompts.")
        return {
            "prepare": None if self.run.share_fits else prepared,
            "edit": edited,
            **self.run.score(subject, task, edit, images),
        }, images


def _measured(unet: torch.nn.Module, function: Callable[[], Result]) -> tuple[Result, Record]:
    started = time.perf_counter()
    counts: UNetCounts
    with count_unet(unet) as counts:
        result = function()
    return result, {**asdict(counts), "cost": counts.cost, "seconds": round(time.perf_counter() - started, 3)}


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


# ---------------------------------------------------------------------------- one process of several


_workplaces: list[_Workplace] = []
"""This process's own, once it is a worker."""


def _start_worker(run: MethodsRun[Any]) -> None:
    torch.set_num_threads(1)
    _workplaces.append(_Workplace(run))


def _work(subject: Any, left: list[Entrant]) -> int:
    (workplace,) = _workplaces
    for entrant in left:
        workplace.work(entrant, subject)
    return len(left)
