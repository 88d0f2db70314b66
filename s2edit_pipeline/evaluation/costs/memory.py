"""How much memory an edit takes at its peak, against diffusers' own pipeline sampling the same batch; and a fit."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...attention_source import KeepAttention
from ..methods.pipeline_arguments import AS_THE_MODEL_GIVES_IT
from ..tables import markdown_table, number

SOURCE = "a photo of a surprised man with short curly black hair and a moustache and a green sweater"
TARGETS = (
    "a photo of a smiling man with short curly black hair and a moustache and a green sweater",
    "a photo of a surprised man with short curly black hair and a moustache and glasses and a green sweater",
    "a photo of a surprised man with short curly red hair and a moustache and a green sweater",
)


class _Allocations(TorchDispatchMode):
    """Adds up the storages that operators return for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self, func, types, args=(), kwargs=None
    ):
        # what goes in was there before: weights, or a tensor that was counted when it was made
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._known and key not in inputs:
                    self._known.add(key)
                    self.live += size
                    weakref.finalize(storage, self._release, key, size)
        self.peak = max(self.peak, self.live)
        return result


@contextmanager
def tracked_allocations(device: torch.device) -> Iterator[Callable[[], int]]:
    """Gives a function that tells the peak, in bytes, of what was allocated since the context began; on CUDA the
    allocator's own count, elsewhere that of the tensors that PyTorch's operators return."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: int(torch.cuda.max_memory_allocated(device)) - before
        return
    with _Allocations() as counted:
        yield lambda: counted.peak


@dataclass(frozen=True)
class MemoryRow:
    """``edit`` and ``stock`` are peaks in bytes, weights left out; ``attention``, of the edit, what the inversion keeps
    of the source's attention."""

    name: str
    edit: int
    stock: int
    attention: int

    @property
    def ratio(self) -> float:
        return self.edit / self.stock


def measure_edit_memory(
    pipe: Any,
    size: int | None = None,
    num_inference_steps: int = 10,
    numbers: Sequence[int] = (1, 3),
    output_type: str = "pil",
) -> list[MemoryRow]:
    """Peaks of a picture's first edit, its inversion included, beside stock sampling of as many guided pictures.

    With 1 and 3 targets; with the source's attention kept for its own step only, which is the default there, or for the
    edits to come, as ``pipe.invert`` keeps it; and for a source that runs free ("ddim").

    Args:
        size: of the picture in pixels; None takes the model's own.
        output_type: "latent" leaves the autoencoder out on both sides, "pil" doesn't.
    """
    stock = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    side = size or pipe.unet.config.sample_size * pipe.vae_scale_factor
    y, x = np.mgrid[0:side, 0:side] / side
    picture = Image.fromarray((np.stack([x, y, 1 - x * y], -1) * 255).astype(np.uint8))
    shape: dict[str, Any] = {"height": side, "width": side, "num_inference_steps": num_inference_steps}
    rows = []
    for n in numbers:
        with tracked_allocations(pipe.unet.device) as peak:
            stock([SOURCE] * n, output_type=output_type, guidance_scale=4.5, **shape)
            sampled = peak()
        for name, method, keep in (
            ("direct", "direct", None),
            ("direct, kept", "direct", KeepAttention()),
            ("DDIM", "ddim", None),
        ):
            with tracked_allocations(pipe.unet.device) as peak:
                pipe(
                    list(TARGETS[:n]), picture, SOURCE, inversion=method, guidance_stop=1.0, keep_attention=keep,
                    output_type=output_type, **shape, **AS_THE_MODEL_GIVES_IT,
                )  # fmt: skip
                edit = peak()
            attention = pipe.invert(picture, SOURCE, method, keep_attention=keep, **shape).attention
            size_of_it = 0 if keep is None else sum(layers.num_bytes for layers in attention.layers.values())
            rows.append(MemoryRow(f"{name}, {n} target{'s' * (n > 1)}", edit, sampled, size_of_it))
    return rows


FITS: Mapping[str, Mapping[str, Any]] = {
    "full": {"method": "full"},
    'preset="paper"': {"preset": "paper"},
    "the defaults, lora": {},
    "the defaults, checkpointed": {"gradient_checkpointing": True},
    "token": {"method": "token"},
    "full, batch of 1": {"method": "full", "batch_size": 1},
    "lora, batch of 1": {"batch_size": 1},
    "lora, attention alone": {"lora_layers": "attention"},
}
"""Name -> arguments of ``fit_identity``."""


@dataclass(frozen=True)
class FitMemoryRow:
    """``peak`` in bytes of a fit: activations, gradients, the optimizer's state, and what weights the fit makes itself
    (adapters, or the full fit's own copy of the model); the model's own weights, which were there, are left out."""

    name: str
    peak: int


def measure_fit_memory(pipe: Any, fits: Mapping[str, Mapping[str, Any]] = FITS) -> list[FitMemoryRow]:
    """Peaks of fits of three steps: by the second the optimizer has its state beside everything else."""
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8))
    rows = []
    for name, arguments in fits.items():
        with tracked_allocations(pipe.unet.device) as peak:
            pipe.fit_identity(
                picture, SOURCE, "man", mask=np.ones((side, side), bool), num_steps=3,
                generator=torch.Generator().manual_seed(0), **arguments,
            )  # fmt: skip
            rows.append(FitMemoryRow(name, peak()))
    return rows


@dataclass(frozen=True)
class MemoryReport:
    """Peaks of edits, and of fits."""

    edits: tuple[MemoryRow, ...]
    fits: tuple[FitMemoryRow, ...]

    def table(self) -> str:
        """As Markdown; each fit against the first."""
        edits = (
            [row.name, *(_megabytes(size) for size in (row.edit, row.attention, row.stock)), number(row.ratio)]
            for row in self.edits
        )
        fits = ([row.name, _megabytes(row.peak), number(row.peak / self.fits[0].peak)] for row in self.fits)
        return "\n\n".join(
            [
                markdown_table(["edit", "edit, MB", "of it kept, MB", "stock sampling, MB", "ratio"], edits),
                markdown_table(["fit", "peak, MB", "share"], fits),
            ]
        )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f}"


def measure_memory(pipe: Any, num_inference_steps: int = 10) -> MemoryReport:
    """Peaks of edits in ``num_inference_steps``, and of fits."""
    edits = measure_edit_memory(pipe, num_inference_steps=num_inference_steps)
    return MemoryReport(tuple(edits), tuple(measure_fit_memory(pipe)))
