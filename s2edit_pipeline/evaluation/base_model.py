"""How good the embedded base model is: its autoencoder, and whether it draws what captions say."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..avatars.autoencoder_training import mean_psnr, reconstruct
from ..avatars.captions import Caption, describe
from ..avatars.dataset import load_pictures
from ..avatars.world import sample_person
from .attribute_classifier import accuracy_by_attribute, agreement_with_captions, load_attribute_classifier

CAPTIONS_FIRST = 50_000
"""The first of the training split's people whose captions are drawn; none of them was trained on."""


@dataclass(frozen=True)
class BaseModelReport:
    """``autoencoder_psnr`` in dB, mean over held-out pictures; ``classifier_accuracy`` by attribute on the same
    pictures; ``agreement``, the share of named attributes that the classifier finds in the generated pictures, in
    all and by attribute; and the pictures (N, H, W, 3) uint8 with their captions."""

    autoencoder_psnr: float
    classifier_accuracy: dict[str, float]
    agreement: float
    agreement_by_attribute: dict[str, float]
    generated: np.ndarray
    captions: list[Caption]

    def table(self) -> str:
        """As Markdown."""
        lines = [
            f"Autoencoder: {self.autoencoder_psnr:.2f} dB PSNR. Agreement with captions: {self.agreement:.1%}.",
            "",
            "| attribute | classifier on held-out people | agreement of generated pictures |",
            "|---|---|---|",
        ]
        for name, accuracy in self.classifier_accuracy.items():
            found = self.agreement_by_attribute.get(name)
            lines.append(f"| {name} | {accuracy:.1%} | {'-' if found is None else f'{found:.1%}'} |")
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


def measure_base_model(
    pipe: Any,
    *,
    num_held_out: int = 500,
    num_captions: int = 256,
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
    return BaseModelReport(
        autoencoder_psnr=mean_psnr(held_out.images, reconstruct(pipe.vae, held_out.images)),
        classifier_accuracy=accuracy_by_attribute(classifier, held_out.people, held_out.images),
        agreement=agreement,
        agreement_by_attribute=by_attribute,
        generated=generated,
        captions=captions,
    )
