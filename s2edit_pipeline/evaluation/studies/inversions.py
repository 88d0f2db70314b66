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
from ..metrics.pixels import psnr


@contextmanager
def seen_as(pipe: Any, prediction_type: str) -> Iterator[Any]:
    """``pipe`` with its U-Net's output, and its scheduler's ``prediction_type``, turned into the other one.

    The same model in the other parametrisation: ``eps = sqrt(abar) v + sqrt(1 - abar) x`` and
    ``v = (eps - sqrt(1 - abar) x) / sqrt(abar)`` are exact, so every difference is the arithmetic's.
    """
    held = pipe.scheduler
    own = held.config.prediction_type
    if own == prediction_type:
        yield pipe
        return
    alphas = held.alphas_cumprod.double()

    def convert(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x, t = args[0], int(torch.as_tensor(args[1]).flatten()[0])
        a, s = float(alphas[t].sqrt()), float((1 - alphas[t]).sqrt())
        sample = output[0]
        changed = a * sample + s * x if own == "v_prediction" else (sample - s * x) / a
        return (changed, *output[1:]) if isinstance(output, tuple) else type(output)(sample=changed)

    handle = pipe.unet.register_forward_hook(convert, with_kwargs=True)
    pipe.scheduler = type(held).from_config(held.config, prediction_type=prediction_type)
    try:
        yield pipe
    finally:
        handle.remove()
        pipe.scheduler = held


@dataclass(frozen=True)
class InversionRow:
    """Mean over pictures: PSNR in dB of the reconstruction under guidance, the autoencoder's own, and seconds."""

    prediction_type: str
    method: str
    psnr: float
    autoencoder_psnr: float
    seconds: float


def measure_inversions(
    pipe: Any,
    *,
    people: Sequence[int] = range(4),
    methods: Sequence[str] = ("direct", "null_text", "negative_prompt", "ddim"),
    prediction_types: Sequence[str] = ("v_prediction", "epsilon"),
    num_inference_steps: int = 50,
    guidance_scale: float = 4.5,
) -> list[InversionRow]:
    """Invert held-out people under their own captions and come back under the same words, with guidance."""
    rows = []
    for prediction_type in prediction_types:
        for method in methods:
            found, own, seconds = [], [], []
            for seed in people:
                person = sample_person(seed, "held_out")
                picture, prompt = render(person), describe(person).text
                with seen_as(pipe, prediction_type), torch.no_grad():
                    started = time.perf_counter()
                    inversion = pipe.invert(picture, prompt, method, num_inference_steps, guidance_scale=guidance_scale)
                    result = pipe(prompt, image=picture, inversion=inversion, guidance_scale=guidance_scale)
                    seconds.append(time.perf_counter() - started)
                    pixels = pipe.vae.decode(inversion.trajectory[:1] / pipe.vae.config.scaling_factor).sample
                bare = pipe.image_processor.postprocess(pixels, output_type="pil")[0]
                truth = np.asarray(picture)
                found.append(_psnr(truth, result.images[0]))
                own.append(_psnr(truth, bare))
            rows.append(
                InversionRow(
                    prediction_type, method, float(np.mean(found)), float(np.mean(own)), float(np.median(seconds))
                )
            )
    return rows


def _psnr(truth: np.ndarray, picture: Image.Image) -> float:
    return psnr(np.asarray(picture), truth)


def table(rows: Sequence[InversionRow]) -> str:
    """As Markdown."""
    lines = [
        "| prediction | inversion | PSNR, dB | below the autoencoder's own, dB | seconds |",
        "|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r.prediction_type} | {r.method} | {r.psnr:.2f} | {r.autoencoder_psnr - r.psnr:.2f} | {r.seconds:.1f} |"
        )
    return "\n".join(lines)
