"""Real pictures, whose true edits nobody knows: a run's record says what each edit preserves."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote

import numpy as np
from PIL import Image

from ..methods.protocol import Edit, Method
from ..metrics.pixels import psnr, ssim
from .datasets import DatasetEdit
from .runner import BenchmarkRun, EditTask, Record
from .scoring import PSNR_CEILING


@dataclass(frozen=True)
class DatasetRun(BenchmarkRun[DatasetEdit]):
    """Real pictures, every one with the run's own seed."""

    def label(self, subject: DatasetEdit) -> str:
        return quote(subject.name, safe="")  # no two names become one, as they would without "/"

    def task(self, subject: DatasetEdit, method: Method) -> EditTask:
        prompts = list(subject.target_prompts)
        # an instruction is of one edit
        if getattr(method, "takes_instructions", False) and subject.instruction and len(prompts) == 1:
            prompts = [subject.instruction]
        return EditTask(subject.picture(), subject.source_prompt, subject.subject, self.seed, prompts)

    def score(self, subject: DatasetEdit, task: EditTask, edit: Edit, images: Sequence[Image.Image]) -> Record:
        without_token = getattr(edit, "without_token", None)
        bare: Sequence[str] = without_token(task.prompts) if without_token else ()
        rows = [
            {"prompt": target, "told": prompt, "token_left_out": prompt in bare}
            | preservation(task.picture, image, subject.mask)
            for target, prompt, image in zip(subject.target_prompts, task.prompts, images, strict=True)
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
        return {"psnr_outside": None, "ssim_outside": None}
    if mask.shape != source.size[::-1]:
        raise ValueError(f"the mask is {mask.shape[::-1]} and the picture {source.size}; they must be equal.")
    before, after = (_blackened(picture, mask) for picture in (source, edited))
    return {"psnr_outside": min(psnr(before, after), PSNR_CEILING), "ssim_outside": ssim(before, after)}


def _blackened(picture: Image.Image, mask: np.ndarray) -> Image.Image:
    return Image.composite(Image.new("RGB", picture.size), picture.convert("RGB"), Image.fromarray(mask))
