"""The benchmark's methods on real pictures, where no truth is known: what is preserved, what it costs, and, asked for,
the metrics that need fetched weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image

from ..methods.protocol import Edit, EditMethod
from ..methods.registry import Entrant
from ..metrics import learned
from ..metrics.intervals import bootstrap_interval
from ..metrics.pixels import psnr, ssim
from .datasets import DatasetEdit
from .runner import MethodsRun, Record, Task, mean_costs, read_record
from .scoring import PSNR_CEILING

Pictures = Sequence[Image.Image]
Measure = Callable[[Pictures, Pictures, Sequence[str]], float]
"""``measure(before, after, target_prompts)``, one of each for an edit."""

_PRESERVED = {"psnr_outside": ("PSNR outside ↑", 2), "ssim_outside": ("SSIM outside ↑", 4)}
_COSTS = {
    "cost_prepare": "U-Net, once", "cost_edit": "U-Net, an edit",
    "seconds_prepare": "seconds, once", "seconds_edit": "seconds, an edit",
}  # fmt: skip


@dataclass(frozen=True)
class DatasetRun(MethodsRun[DatasetEdit]):
    """Real pictures, every one with the run's own seed."""

    def label(self, subject: DatasetEdit) -> str:
        return quote(subject.name, safe="")  # no two names become one, as they would without "/"

    def task(self, subject: DatasetEdit, method: EditMethod) -> Task:
        asked = list(subject.target_prompts)
        # an instruction is of one edit
        if getattr(method, "takes_instructions", False) and subject.instruction and len(asked) == 1:
            asked = [subject.instruction]
        return Task(subject.picture(), subject.source_prompt, subject.subject, self.seed, asked)

    def score(self, subject: DatasetEdit, task: Task, edit: Edit, images: Sequence[Image.Image]) -> Record:
        left_out = getattr(edit, "without_token", None)
        bare: Sequence[str] = left_out(task.asked) if left_out else ()
        rows = [
            {"prompt": target, "told": told, "token_left_out": told in bare}
            | preservation(task.picture, image, subject.mask)
            for target, told, image in zip(subject.target_prompts, task.asked, images, strict=True)
        ]
        return {"entry": _entry(subject), "edits": rows}

    def same_edits(self, record: Record, subject: DatasetEdit) -> bool:
        return bool(record["entry"] == _entry(subject))


def _entry(subject: DatasetEdit) -> Record:
    """All that an edit depends on."""
    return {
        "picture": hashlib.sha256(subject.file.read_bytes()).hexdigest()[:16],
        "mask": None if subject.mask is None else hashlib.sha256(subject.mask.tobytes()).hexdigest()[:16],
        "source_prompt": subject.source_prompt,
        "target_prompts": list(subject.target_prompts),
        "subject": subject.subject,
        "instruction": subject.instruction,
    }


def preservation(source: Image.Image, edited: Image.Image, mask: np.ndarray | None) -> dict[str, float | None]:
    """``psnr_outside`` and ``ssim_outside``, of both pictures blackened where ``mask`` (H, W) lets them change, as
    PIE-Bench has it; None without a mask, or where it leaves nothing. Equal pictures are ``PSNR_CEILING`` dB apart.

    Raises:
        ValueError: the mask is of another size than the picture, or the pictures differ in size.
    """
    if mask is None or mask.all():
        return dict.fromkeys(_PRESERVED)
    if mask.shape != source.size[::-1]:
        raise ValueError(f"the mask is {mask.shape[::-1]} and the picture {source.size}; they must be equal.")
    before, after = (_blackened(picture, mask) for picture in (source, edited))
    return {"psnr_outside": min(psnr(before, after), PSNR_CEILING), "ssim_outside": ssim(before, after)}


def _blackened(picture: Image.Image, mask: np.ndarray) -> Image.Image:
    return Image.composite(Image.new("RGB", picture.size), picture.convert("RGB"), Image.fromarray(mask))


def standard_measures(clip_model: str | None = None) -> dict[str, Measure]:
    """Those of ``metrics.learned`` that ask for no truth.

    Args:
        clip_model: CLIP score's, on the Hub or a folder; None takes the usual one.
    """
    clip = clip_model or learned.CLIP_MODEL
    return {
        "CLIP score ↑": lambda before, after, prompts: learned.clip_score(after, prompts, model=clip),
        "LPIPS ↓": lambda before, after, prompts: learned.lpips(before, after),
        "FID ↓": lambda before, after, prompts: learned.fid(before, after),
    }


# ---------------------------------------------------------------------------- the report


def dataset_report(
    run: DatasetRun, unavailable: Mapping[str, str], measures: Mapping[str, Measure] | None = None
) -> dict[str, Any]:
    """Everything that the tables say, as JSON holds it.

    Args:
        unavailable: entrants that couldn't be made, with the reason.
        measures: what is asked besides; each gives a number, or a text: not measured, and why.
    """
    methods: dict[str, dict[str, Any]] = {}
    for entrant in run.entrants:
        row = methods[entrant.name] = {"arguments": dict(entrant.arguments), "pictures": 0, "failures": []}
        if entrant.name in unavailable:
            row["unavailable"] = unavailable[entrant.name]
        made: list[tuple[DatasetEdit, Record]] = []
        for subject in run.subjects:
            record = read_record(run.folder(entrant, subject))
            if record is None:
                continue
            if record["error"] is None:
                made.append((subject, record))
            else:
                row["failures"].append({"picture": subject.name, "error": record["error"]})
        if made:
            row |= _summary(made)
            if measures:
                pictures = _pictures(run, entrant, made)
                row["standard_metrics"] = {name: _value(measure, *pictures) for name, measure in measures.items()}
    settings = {
        "pictures": [subject.name for subject in run.subjects], "num_inference_steps": run.num_inference_steps,
        "seed": run.seed, "device": run.device, "model": run.model,
    }  # fmt: skip
    return {"settings": settings, "methods": methods}


def _summary(made: Sequence[tuple[DatasetEdit, Record]]) -> dict[str, Any]:
    rows = [(subject.name, edit) for subject, record in made for edit in record["edits"]]
    found: dict[str, Any] = {
        "pictures": len(made),
        "edits": len(rows),
        "edits_with_mask": sum(edit["psnr_outside"] is not None for _, edit in rows),
        "told_instructions": sum(edit["told"] != edit["prompt"] for _, edit in rows),
        "token_left_out": [
            {"picture": name, "prompt": edit["prompt"]} for name, edit in rows if edit["token_left_out"]
        ],
        "cost": mean_costs([record for _, record in made]),
    }
    for measure in _PRESERVED:
        values = {i: edit[measure] for i, (_, edit) in enumerate(rows) if edit[measure] is not None}
        found[measure] = None
        if values:
            low, high = bootstrap_interval(np.array(list(values.values())), [rows[i][0] for i in values])
            found[measure] = {"mean": float(np.mean(list(values.values()))), "low": low, "high": high}
    return found


def _pictures(
    run: DatasetRun, entrant: Entrant, made: Sequence[tuple[DatasetEdit, Record]]
) -> tuple[list[Image.Image], list[Image.Image], list[str]]:
    """Of each edit: the source, what became of it, and the target prompt."""
    before, after, prompts = [], [], []
    for subject, _ in made:
        source = subject.picture()
        with Image.open(run.folder(entrant, subject) / "edits.png") as strip:
            for i, prompt in enumerate(subject.target_prompts):
                before.append(source)
                after.append(strip.crop((i * source.width, 0, (i + 1) * source.width, source.height)))
                prompts.append(prompt)
    return before, after, prompts


def _value(measure: Measure, before: Pictures, after: Pictures, prompts: Sequence[str]) -> float | str:
    try:
        return measure(before, after, prompts)
    except (ImportError, OSError, ValueError) as error:
        return f"not measured: {error}"


def markdown(report: Mapping[str, Any]) -> str:
    """The tables."""
    settings, methods = report["settings"], report["methods"]
    made = {name: row for name, row in methods.items() if row["pictures"]}
    parts = [
        f"{len(settings['pictures'])} pictures, {settings['num_inference_steps']} steps, seed {settings['seed']}, "
        f"{settings['device']}, {settings['model'] or 'the embedded model'}. Means over edits, with 95 % bootstrap "
        "intervals over pictures; U-Net evaluations count a backward pass 2.",
        _table(
            ["method", "edits", "with a mask", *(title for title, _ in _PRESERVED.values()), *_COSTS.values()],
            [
                [
                    name, str(row["edits"]), str(row["edits_with_mask"]),
                    *(_interval(row[measure], digits) for measure, (_, digits) in _PRESERVED.items()),
                    *(f"{row['cost'][cost]:.1f}" for cost in _COSTS),
                ]
                for name, row in made.items()
            ],
        ),
    ]  # fmt: skip
    standard = {name: row["standard_metrics"] for name, row in made.items() if "standard_metrics" in row}
    if standard:
        titles = list(dict.fromkeys(title for values in standard.values() for title in values))
        rows = [[name, *(_shown(values[title]) for title in titles)] for name, values in standard.items()]
        parts.append(_table(["method", *titles], rows))
    return "\n\n".join([*parts, *_remarks(methods)]) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))


def _interval(values: Mapping[str, float] | None, digits: int) -> str:
    if values is None:
        return "-"
    mean, low, high = (f"{values[key]:.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _shown(value: float | str) -> str:
    return " ".join(value.split()).replace("|", "/") if isinstance(value, str) else f"{value:.4g}"


def _remarks(methods: Mapping[str, Any]) -> list[str]:
    """What went otherwise than asked."""
    lines = []
    for name, row in methods.items():
        if "unavailable" in row:
            lines.append(f"- {name} could not be made. {row['unavailable']}")
        lines += [f"- {name} failed on {failure['picture']}: {failure['error']}" for failure in row["failures"]]
        if row.get("told_instructions"):
            lines.append(f"- {name} was given the dataset's instruction for {row['told_instructions']} target prompts.")
        lines += [
            f"- {name} left its token out of {left['prompt']!r} ({left['picture']}), which lacks the subject."
            for left in row.get("token_left_out", ())
        ]
    return ["\n".join(lines)] if lines else []


def write_dataset_report(
    run: DatasetRun, unavailable: Mapping[str, str], measures: Mapping[str, Measure] | None = None
) -> Path:
    """Write ``report.md`` and ``report.json``, see :func:`dataset_report`, into ``run.out``; the first's path."""
    report = dataset_report(run, unavailable, measures)
    run.out.mkdir(parents=True, exist_ok=True)
    (run.out / "report.json").write_text(json.dumps(report, indent=1), "utf-8")
    path = run.out / "report.md"
    path.write_text(markdown(report), "utf-8")
    return path
