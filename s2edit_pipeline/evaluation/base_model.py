"""How good the embedded base model is: its autoencoder, and whether it draws what captions say."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..avatars.autoencoder_training import mean_psnr, reconstruct
from ..avatars.captions import Caption, describe
from ..avatars.dataset import load_pictures
from ..avatars.world import Person, part_masks, render, sample_person
from .attribute_classifier import accuracy_by_attribute, agreement_with_captions, load_attribute_classifier
from .picture_metrics import ssim

CAPTIONS_FIRST = 50_000
"""The first of the training split's people whose captions are drawn; none of them was trained on."""


@dataclass(frozen=True)
class BaseModelReport:
    """``autoencoder_psnr`` in dB, ``autoencoder_ssim`` and ``autoencoder_delta_e`` (CIE 2000, mean over pixels), means
    over held-out pictures; ``classifier_accuracy`` by attribute on the same pictures; ``grounding``, part -> mean
    intersection over union of its word's mask and its true pixels; ``seconds``, the median to draw one picture in
    50 steps; ``agreement``, the share of named attributes that the classifier finds in the generated pictures, in
    all and by attribute; and the pictures (N, H, W, 3) uint8 with their captions."""

    autoencoder_psnr: float
    autoencoder_ssim: float
    autoencoder_delta_e: float
    classifier_accuracy: dict[str, float]
    grounding: dict[str, float]
    seconds: float
    agreement: float
    agreement_by_attribute: dict[str, float]
    generated: np.ndarray
    captions: list[Caption]

    def table(self) -> str:
        """As Markdown."""
        lines = [
            f"Autoencoder: {self.autoencoder_psnr:.2f} dB PSNR, {self.autoencoder_ssim:.4f} SSIM, "
            f"{self.autoencoder_delta_e:.2f} CIE ΔE2000.",
            f"Agreement of {len(self.captions)} pictures with their captions: {self.agreement:.1%}.",
            f"One picture, 50 steps, guided: {self.seconds:.1f} s.",
            "",
            "| attribute | classifier on held-out people | agreement of generated pictures |",
            "|---|---|---|",
        ]
        for name, accuracy in self.classifier_accuracy.items():
            found = self.agreement_by_attribute.get(name)
            lines.append(f"| {name} | {accuracy:.1%} | {'-' if found is None else f'{found:.1%}'} |")
        lines += ["", "| part | IoU of its word's mask |", "|---|---|"]
        lines += [f"| {part} | {value:.2f} |" for part, value in self.grounding.items()]
        return "\n".join(lines)


def draw_captions(
    pipe: Any, captions: list[str], *, num_inference_steps: int, guidance_scale: float, seed: int, batch_size: int = 16
) -> np.ndarray:
    """(N, H, W, 3) uint8: one picture for each caption, the same for the same seed."""
    pictures = []
    for i in tqdm(range(0, len(captions), batch_size), desc="drawing captions"):
        batch = captions[i : i + batch_size]
        generators = [torch.Generator().manual_seed(seed * 1_000_003 + i + j) for j in range(len(batch))]
        out = pipe(
            batch,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=generators,
            output_type="np",
        )
        pictures.append((out.images * 255).round().astype(np.uint8))
    return np.concatenate(pictures)


def grounding_overlaps(pipe: Any, people: Sequence[Person]) -> dict[str, float]:
    """Part -> mean over the people who show it of the intersection over union of the mask of the word that names it
    (``preview_mask``) and the renderer's own pixels of it."""
    overlaps: dict[str, list[float]] = {}
    for person in people:
        caption, truth, picture = describe(person), part_masks(person), render(person)
        nouns = {"person": person.noun, "hair": "hair", "glasses": person.glasses, "facial_hair": person.facial_hair}
        nouns |= {"headwear": person.headwear, "clothes": person.clothes}
        for part, noun in nouns.items():
            if part not in truth or noun not in caption.words:
                continue
            found = np.asarray(pipe.preview_mask(picture, caption.text, noun)) > 127
            overlaps.setdefault(part, []).append(float((found & truth[part]).sum() / (found | truth[part]).sum()))
    return {part: float(np.mean(values)) for part, values in sorted(overlaps.items())}


def mean_delta_e(a: np.ndarray, b: np.ndarray) -> float:
    """Mean CIE ΔE2000 over the pixels of two arrays of pictures (N, H, W, 3) uint8."""
    from skimage.color import deltaE_ciede2000, rgb2lab

    return float(np.mean([deltaE_ciede2000(rgb2lab(x), rgb2lab(y)).mean() for x, y in zip(a, b, strict=True)]))


def _seconds(pipe: Any, runs: int = 3) -> float:
    """The median of ``runs`` pictures in 50 guided steps."""
    taken = []
    for _ in range(runs):
        started = time.perf_counter()
        pipe("a photo of a smiling lady", num_inference_steps=50, guidance_scale=4.5)
        taken.append(time.perf_counter() - started)
    return float(np.median(taken))


def measure_base_model(
    pipe: Any,
    *,
    num_held_out: int = 500,
    num_captions: int = 256,
    num_grounded: int = 60,
    num_inference_steps: int = 30,
    guidance_scale: float = 4.5,
    seed: int = 0,
    cache: str | None = None,
) -> BaseModelReport:
    """Measure the model in ``pipe`` on held-out people (seeds 0 and up) and on captions that it wasn't trained on."""
    held_out = load_pictures(num_held_out, "held_out", cache=cache)
    classifier = load_attribute_classifier()
    rng = random.Random(seed)
    captions = [describe(sample_person(CAPTIONS_FIRST + i), rng) for i in range(num_captions)]
    generated = draw_captions(
        pipe,
        [c.text for c in captions],
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        seed=seed,
    )
    agreement, by_attribute = agreement_with_captions(classifier, generated, captions)
    decoded = reconstruct(pipe.vae, held_out.images)
    return BaseModelReport(
        autoencoder_psnr=mean_psnr(held_out.images, decoded),
        autoencoder_ssim=float(np.mean([ssim(x, y) for x, y in zip(held_out.images, decoded, strict=True)])),
        autoencoder_delta_e=mean_delta_e(held_out.images, decoded),
        grounding=grounding_overlaps(pipe, held_out.people[:num_grounded]),
        seconds=_seconds(pipe),
        classifier_accuracy=accuracy_by_attribute(classifier, held_out.people, held_out.images),
        agreement=agreement,
        agreement_by_attribute=by_attribute,
        generated=generated,
        captions=captions,
    )
