"""What each inversion returns of the picture, and what it costs; with the model as epsilon- and as v-prediction."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from ...avatars.captions import describe
from ...avatars.world import render, sample_person
from ...inversion_record import inversion_method
from ..metrics.pixels import psnr
from ..tables import markdown_table, number


@contextmanager
def seen_as(pipe: Any, prediction_type: str) -> Iterator[Any]:
    """``pipe`` with its U-Net's output, and its scheduler's ``prediction_type``, turned into the other one.

    The same model in the other parametrisation: ``eps = sqrt(abar) v + sqrt(1 - abar) x`` and
    ``v = (eps - sqrt(1 - abar) x) / sqrt(abar)`` are exact, so every difference is the arithmetic's.
    """
    scheduler = pipe.scheduler
    model_type = scheduler.config.prediction_type
    if model_type == prediction_type:
        yield pipe
        return
    alphas = scheduler.alphas_cumprod.double()

    def convert(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x, t = args[0], int(torch.as_tensor(args[1]).flatten()[0])
        a, s = float(alphas[t].sqrt()), float((1 - alphas[t]).sqrt())
        sample = output[0]
        changed = a * sample + s * x if model_type == "v_prediction" else (sample - s * x) / a
        return (changed, *output[1:]) if isinstance(output, tuple) else type(output)(sample=changed)

    handle = pipe.unet.register_forward_hook(convert, with_kwargs=True)
    pipe.scheduler = type(scheduler).from_config(scheduler.config, prediction_type=prediction_type)
    try:
        yield pipe
    finally:
        handle.remove()
        pipe.scheduler = scheduler


@dataclass(frozen=True)
class InversionRow:
    """Mean over pictures: PSNR in dB of the reconstruction under guidance, the autoencoder's own, and seconds."""

    prediction_type: str
    method: str
    psnr: float
    autoencoder_psnr: float
    seconds: float


@dataclass(frozen=True)
class InversionReport:
    """A row for each parametrisation and method."""

    rows: tuple[InversionRow, ...]

    def table(self) -> str:
        """As Markdown."""
        rows = (
            [r.prediction_type, r.method, number(r.psnr), number(r.autoencoder_psnr - r.psnr), number(r.seconds, ".1f")]
            for r in self.rows
        )
        head = ["prediction", "inversion", "PSNR, dB", "below the autoencoder's own, dB", "seconds"]
        return markdown_table(head, rows)


def measure_inversions(
    pipe: Any,
    *,
    people: Sequence[int] = range(4),
    methods: Sequence[str] = ("direct", "null_text", "negative_prompt", "ddim"),
    prediction_types: Sequence[str] = ("v_prediction", "epsilon"),
    num_inference_steps: int = 50,
    guidance_scale: float = 4.5,
) -> InversionReport:
    """Invert held-out people under their own captions and come back under the same words, with guidance."""
    rows = []
    for prediction_type in prediction_types:
        for method in methods:
            reconstructions, references, seconds = [], [], []
            for seed in people:
                person = sample_person(seed, "held_out")
                picture, prompt = render(person), describe(person).text
                with seen_as(pipe, prediction_type), torch.no_grad():
                    start = time.perf_counter()
                    bound = {"guidance_scale": guidance_scale} if inversion_method(method).binds_guidance else {}
                    inversion = pipe.invert(picture, prompt, method, num_inference_steps, **bound)
                    result = pipe(
                        prompt, image=picture, inversion=inversion, guidance_scale=guidance_scale, keep_pixels=False
                    )
                    seconds.append(time.perf_counter() - start)
                    reference = _decoded(pipe, inversion.trajectory[:1])
                reconstructions.append(psnr(result.images[0], picture))
                references.append(psnr(reference, picture))
            mean, reference_mean = float(np.mean(reconstructions)), float(np.mean(references))
            rows.append(InversionRow(prediction_type, method, mean, reference_mean, float(np.median(seconds))))
    return InversionReport(tuple(rows))


def _decoded(pipe: Any, latents: torch.Tensor) -> Image.Image:
    """The picture of ``latents`` (1, C, h, w)."""
    pixels = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    image: Image.Image = pipe.image_processor.postprocess(pixels, output_type="pil")[0]
    return image
