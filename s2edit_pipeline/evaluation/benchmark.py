"""Methods × held-out subjects: every edit scored against its drawing, one record for each method and subject.

A record is a folder that is written whole or not at all, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ..atomic_folder import atomic_folder
from ..avatars.captions import describe
from ..avatars.world import render, sample
from .attribute_classifier import AttributeClassifier, load_attribute_classifier
from .benchmark_edits import BenchmarkEdit, benchmark_edits
from .benchmark_methods import Entrant
from .benchmark_metrics import score_edit
from .edit_methods import EditMethod
from .unet_counts import UNetCounts, count_unet

SubjectKey = tuple[str, int]
"""Kind of subject, and its number among the held-out ones."""

Record = dict[str, Any]
Result = TypeVar("Result")


@dataclass(frozen=True)
class BenchmarkRun:
    """What is run, and where its records are kept.

    Attributes:
        subjects: each edited by each of ``entrants``.
        edits: at most so many of each subject.
        seed: of fits and noises; each subject's own is made of it and the subject's number.
        model: a diffusers folder of the avatars family; None takes the embedded model.
    """

    out: Path
    entrants: tuple[Entrant, ...]
    subjects: tuple[SubjectKey, ...]
    edits: int = 8
    num_inference_steps: int = 25
    seed: int = 0
    device: str = "cpu"
    model: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", Path(self.out).absolute())
        if len({file_name(entrant.name) for entrant in self.entrants}) != len(self.entrants):
            raise ValueError(f"Two entrants have one name: {', '.join(e.name for e in self.entrants)}.")

    def folder(self, entrant: Entrant, subject: SubjectKey) -> Path:
        """Of the record: ``record.json``, and the edited pictures side by side, ``edits.png``."""
        kind, number = subject
        return self.out / "records" / file_name(entrant.name) / f"{kind}-{number}"

    def settings(self, entrant: Entrant, weights: str) -> Record:
        """What a record was made with: records that differ in it can't be compared."""
        return {
            "method": entrant.method,
            "arguments": json.loads(json.dumps(entrant.arguments)),  # tuples as JSON has them
            "edits": self.edits,
            "num_inference_steps": self.num_inference_steps,
            "seed": self.seed,
            "device": torch.device(self.device).type,
            "weights": weights,
        }

    def records(self) -> Iterator[tuple[Entrant, SubjectKey, Record]]:
        """Those that there are, failures among them."""
        for entrant in self.entrants:
            for subject in self.subjects:
                if (record := read_record(self.folder(entrant, subject))) is not None:
                    yield entrant, subject, record


def file_name(name: str) -> str:
    return re.sub(r"[^0-9A-Za-z.]+", "-", name).strip("-")


def subject_seed(run: BenchmarkRun, subject: SubjectKey) -> int:
    """Of everything random that is done with ``subject``."""
    return run.seed * 1_000_003 + subject[1]


def edits_of(run: BenchmarkRun, subject: SubjectKey) -> list[BenchmarkEdit]:
    """The edits that are graded, in the order in which the records have them."""
    kind, number = subject
    return benchmark_edits(sample(kind, number, "held_out"), run.edits, seed=number)


def read_record(folder: Path) -> Record | None:
    path = folder / "record.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def load_model(run: BenchmarkRun) -> Any:
    from ..avatars import load_avatars
    from ..pipeline import S2EditPipeline

    pipe = (S2EditPipeline.from_pretrained(run.model) if run.model else load_avatars()).to(run.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def fingerprint(pipe: Any) -> str:
    """Of all the weights that ``pipe`` holds."""
    digest = hashlib.sha256()
    for name, component in sorted(pipe.components.items()):
        if isinstance(component, torch.nn.Module):
            for key, tensor in component.state_dict().items():
                digest.update(f"{name}.{key}".encode())
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def run_benchmark(run: BenchmarkRun, jobs: int = 1) -> dict[str, str]:
    """Make the records that are missing; those that failed are tried once more.

    Args:
        jobs: processes, each with one thread, that take a subject each; 1 works in this one.

    Returns:
        The entrants that couldn't be made, each with the reason.

    Raises:
        ValueError: records made with other settings, or of other edits, are there.
    """
    workplace = _Workplace(run)
    to_do: dict[SubjectKey, list[Entrant]] = {}
    prompts = cache(lambda subject: [edit.target_prompt for edit in edits_of(run, subject)])
    for entrant in (e for e in run.entrants if e.name in workplace.methods):
        for subject in run.subjects:
            record = read_record(run.folder(entrant, subject))
            if record is not None:
                _check_same(run, entrant, record, workplace.weights)
            if record is None or record["error"] is not None:
                to_do.setdefault(subject, []).append(entrant)
            elif [edit["prompt"] for edit in record["edits"]] != prompts(subject):
                raise ValueError(f"{run.out} holds records of {entrant.name!r} with other edits; give another --out.")
    with tqdm(total=sum(map(len, to_do.values())), desc="bench", unit="record") as bar:
        if jobs == 1:
            for subject, left in to_do.items():
                for entrant in left:
                    bar.set_postfix_str(f"{entrant.name}, {subject[0]} {subject[1]}", refresh=True)
                    workplace.work(entrant, subject)
                    bar.update()
        else:
            with ProcessPoolExecutor(
                jobs, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(run,)
            ) as pool:
                for done in as_completed([pool.submit(_work, subject, left) for subject, left in to_do.items()]):
                    bar.update(done.result())
    return workplace.unavailable


def _check_same(run: BenchmarkRun, entrant: Entrant, record: Record, weights: str) -> None:
    held, wanted = record["settings"], run.settings(entrant, weights)
    if differing := [name for name in wanted if held.get(name) != wanted[name]]:
        shown = "; ".join(f"{name} {held.get(name)!r}, not {wanted[name]!r}" for name in differing)
        raise ValueError(
            f"{run.out} holds records of {entrant.name!r} made with {shown}. Give the settings of those records, or "
            "another --out."
        )


class _Workplace:
    """The model and the methods made of it; both are made anew after a failure, which may have left anything."""

    def __init__(self, run: BenchmarkRun) -> None:
        self.run = run
        self.classifiers: dict[str, AttributeClassifier] = {}
        self.unavailable: dict[str, str] = {}
        self.set_up()
        self.weights = fingerprint(self.pipe)

    def set_up(self) -> None:
        self.pipe = load_model(self.run)
        self.methods: dict[str, EditMethod] = {}
        for entrant in self.run.entrants:
            try:
                self.methods[entrant.name] = entrant.make(self.pipe, self.run.num_inference_steps)
            except Exception as error:
                self.unavailable[entrant.name] = _said(error)

    def work(self, entrant: Entrant, subject: SubjectKey) -> None:
        """Make and write one record."""
        strip = None
        settings = self.run.settings(entrant, self.weights)
        record: Record = {"name": entrant.name, "subject": subject, "settings": settings}
        try:
            found, images = self._edit(self.methods[entrant.name], subject)
            if fingerprint(self.pipe) != self.weights:
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

    def _edit(self, method: EditMethod, subject: SubjectKey) -> tuple[Record, list[Image.Image]]:
        kind, number = subject
        if kind not in self.classifiers:
            self.classifiers[kind] = load_attribute_classifier(kind)
        avatar, edits = sample(kind, number, "held_out"), edits_of(self.run, subject)
        seed = subject_seed(self.run, subject)
        # a system may have a model of its own
        unet = next((held.unet for held in vars(method).values() if hasattr(held, "unet")), self.pipe.unet)
        torch.manual_seed(seed)  # for what takes no generator
        picture, prompt = render(avatar), describe(avatar).text
        edit, prepared = _measured(unet, partial(method.prepare, picture, prompt, avatar.noun, seed))
        images, edited = _measured(unet, partial(edit, [e.target_prompt for e in edits]))
        if len(images) != len(edits):
            raise RuntimeError(f"{method.name} returned {len(images)} pictures for {len(edits)} prompts.")
        rows = [
            {"name": e.name, "category": e.category, "prompt": e.target_prompt}
            | asdict(score_edit(e, image, self.classifiers[kind]))
            for e, image in zip(edits, images, strict=True)
        ]
        return {"prepare": prepared, "edit": edited, "edits": rows}, images


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


def _start_worker(run: BenchmarkRun) -> None:
    torch.set_num_threads(1)
    _workplaces.append(_Workplace(run))


def _work(subject: SubjectKey, left: list[Entrant]) -> int:
    (workplace,) = _workplaces
    for entrant in left:
        workplace.work(entrant, subject)
    return len(left)
