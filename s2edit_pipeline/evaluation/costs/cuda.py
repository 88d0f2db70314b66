"""What fits and edits take of a CUDA device, on models of the published shapes with random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ...avatars.captions import describe
from ...avatars.world import render, sample_person
from ...prompt_words import insert_token
from ..methods.pipeline_arguments import AS_THE_MODEL_GIVES_IT
from ..metrics.counterfactual import demo_edits
from ..tables import markdown_table
from .edits import PERSON
from .memory import tracked_allocations
from .random_models import FAMILIES, TINY_FAMILIES, random_pipeline
from .timing import Timing, machine, take_turns, timed

SIDES, TINY_SIDES = (512, 768, 1024), (64, 128, 192)


@dataclass(frozen=True)
class CudaRow:
    """One model at one picture's side. What is None wasn't measured, or found no room on the device.

    Attributes:
        weights: bytes.
        fit_seconds: of a fit with the default recipe.
        fit_peak, edit_peak: bytes, weights left out; of an edit with its inversion.
        first_seconds, further_seconds: of an edit with its inversion, and of another one with the same.
        flops: of one U-Net evaluation.
        unet_share: what the U-Net alone reaches, for two rows, of the device's rate of matrix products.
        edit_share: what the U-Net's operations in a further edit come to, over all of its seconds, of that rate.
    """

    family: str
    side: int
    weights: int | None = None
    fit_seconds: float | None = None
    fit_peak: int | None = None
    first_seconds: float | None = None
    further_seconds: float | None = None
    edit_peak: int | None = None
    flops: int | None = None
    unet_share: float | None = None
    edit_share: float | None = None


@dataclass(frozen=True)
class CudaCosts:
    """``matmul_rate``: operations a second of a large product of matrices of ``dtype``, which the models have too."""

    machine: Mapping[str, str | int]
    num_inference_steps: int
    dtype: str
    matmul_rate: float
    rows: tuple[CudaRow, ...]

    def table(self) -> str:
        """As Markdown: what wasn't measured says so."""
        columns: dict[str, tuple[str, Callable[[Any], str]]] = {
            "weights": ("weights, GiB", _gibibytes),
            "fit_seconds": ("fit, s", _seconds),
            "fit_peak": ("fit's peak, GiB", _gibibytes),
            "first_seconds": ("first edit, s", _seconds),
            "further_seconds": ("further edit, s", _seconds),
            "edit_peak": ("edit's peak, GiB", _gibibytes),
            "flops": ("TFLOP an evaluation", lambda flops: f"{flops / 1e12:.3f}"),
            "unet_share": ("U-Net's share of the rate", "{:.0%}".format),
            "edit_share": ("whole edit's", "{:.0%}".format),
        }
        rows: list[list[str | int]] = []
        for row in self.rows:
            values = asdict(row)
            cells = (
                "not measured" if values[name] is None else show(values[name]) for name, (_, show) in columns.items()
            )
            rows.append([row.family, row.side, *cells])
        summary = (
            f"{self.machine['device']}, {self.num_inference_steps} steps, {self.dtype}; "
            f"{self.matmul_rate / 1e12:.3g} TFLOP/s in matrix products."
        )
        titles = (title for title, _ in columns.values())
        return f"{summary}\n\n{markdown_table(['model', 'side', *titles], rows)}"


def _gibibytes(size: int) -> str:
    return f"{size / 2**30:.2f}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f}"


def measure_cuda_costs(
    names: Sequence[str],
    *,
    tiny: bool = False,
    sides: Sequence[int] | None = None,
    num_inference_steps: int = 50,
    num_fit_steps: int | None = None,
    repeats: int = 5,
) -> CudaCosts:
    """A row for each of ``FAMILIES`` and each of ``SIDES``, measured for those in ``names`` and ``sides``.

    Args:
        tiny: narrow float32 models on small pictures, on the CPU: to try the measurement, not the machine.
        num_fit_steps: None takes the default recipe's.

    Raises:
        ValueError: no CUDA device, and not ``tiny``; a family that there isn't.
    """
    if not tiny and not torch.cuda.is_available():
        raise ValueError(
            "Models of the published sizes are measured on a CUDA device, and PyTorch sees none here. With --tiny "
            "(tiny=True) narrow ones are measured on the CPU, by the same steps."
        )
    families, all_sides = (TINY_FAMILIES, TINY_SIDES) if tiny else (FAMILIES, SIDES)
    for name in names:
        if name not in families:
            raise ValueError(f"The model {name!r} is unknown; choose from {', '.join(families)}.")
    sides = all_sides if sides is None else sides
    # bfloat16 convolutions are slow on many CPUs
    device, dtype, size = (
        (torch.device("cpu"), torch.float32, 256) if tiny else (torch.device("cuda"), torch.bfloat16, 8192)
    )
    rate = matmul_rate(device, dtype, size, repeats)
    rows = {(name, side): CudaRow(name, side) for name in families for side in sorted({*all_sides, *sides})}
    for name in names:
        pipe = random_pipeline(families[name], device, dtype)
        measurement = _Measurement(pipe, num_inference_steps, num_fit_steps, repeats, rate)
        rows |= {(name, side): measurement.row(name, side) for side in sorted(sides)}
    name_of_dtype = str(dtype).removeprefix("torch.")
    return CudaCosts(machine(device), num_inference_steps, name_of_dtype, rate, tuple(rows.values()))


class _Measurement:
    """Fits and edits of one held-out person with one model, whose device reaches ``rate`` operations a second."""

    def __init__(
        self, pipe: Any, num_inference_steps: int, num_fit_steps: int | None, repeats: int, rate: float
    ) -> None:
        self.pipe, self.num_inference_steps, self.num_fit_steps = pipe, num_inference_steps, num_fit_steps
        self.repeats, self.rate = repeats, rate
        person = sample_person(PERSON, "held_out")
        self.picture, self.prompt, self.noun = render(person), describe(person).text, person.noun
        self.targets = [insert_token(edit.target_prompt, person.noun, "[I]") for edit in demo_edits(person)[:2]]
        self._identity: Any = None

    def row(self, name: str, side: int) -> CudaRow:
        """All of it at one picture's side."""
        pipe, device = self.pipe, self.pipe.unet.device
        modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
        weights = sum(p.nbytes for module in modules for p in module.parameters())
        flops = unet_flops(pipe, side)
        if self._identity is None:
            self._identity = self._fit(side, 1)  # any will do for the edits: what they cost isn't in its weights
        # the runs that tell the peaks are the ones that do what only the first of a size has to; by a fit's second
        # step the optimizer has its state
        fit_peak = if_it_fits(lambda: _peak(lambda: self._fit(side, 2), device))
        fits = if_it_fits(lambda: self._turns({"fit": lambda: self._fit(side, self.num_fit_steps)}))
        pair = if_it_fits(lambda: _pair_seconds(pipe, side, self.repeats))
        pipe.load_identity(self._identity)
        edit_peak = if_it_fits(lambda: _peak(lambda: self._edit(side, self.targets[0]), device))
        edits = if_it_fits(lambda: self._edit_timings(side))
        pipe.unload_identity()
        row = CudaRow(
            name,
            side,
            weights=weights,
            fit_seconds=None if fits is None else fits["fit"].median,
            fit_peak=fit_peak,
            edit_peak=edit_peak,
            flops=flops,
            unet_share=None if pair is None else 2 * flops / pair / self.rate,
        )
        if edits is None:
            return row
        seconds, evaluations = edits["further"].median, edits["further"].counts.evaluations
        return replace(
            row,
            first_seconds=edits["first"].median,
            further_seconds=seconds,
            edit_share=evaluations * flops / seconds / self.rate,
        )

    def _fit(self, side: int, num_steps: int | None) -> Any:
        return self.pipe.fit_identity(
            self.picture, self.prompt, self.noun, num_steps=num_steps, height=side, width=side,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip

    def _edit(self, side: int, target: str, **changes: Any) -> Any:
        return self.pipe(
            target, image=self.picture, source_prompt=self.prompt, num_inference_steps=self.num_inference_steps,
            height=side, width=side, **AS_THE_MODEL_GIVES_IT, **changes,
        )  # fmt: skip

    def _edit_timings(self, side: int) -> dict[str, Timing]:
        inversion = self.pipe.invert(
            self.picture, self.prompt, num_inference_steps=self.num_inference_steps, height=side, width=side
        )
        first, further = self.targets
        self._edit(side, further, inversion=inversion)
        runs = {
            "first": lambda: self._edit(side, first),
            "further": lambda: self._edit(side, further, inversion=inversion),
        }
        return self._turns(runs)

    def _turns(self, runs: Mapping[str, Callable[[], Any]]) -> dict[str, Timing]:
        return take_turns(runs, self.pipe.unet, self.repeats)


def _peak(run: Callable[[], Any], device: torch.device) -> int:
    with tracked_allocations(device) as peak:
        run()
        return peak()


def if_it_fits(run: Callable[[], Any]) -> Any:
    """What ``run`` returns, or None where the device's memory is too small for it."""
    try:
        return run()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int, repeats: int) -> float:
    """Operations a second in products of ``size`` x ``size`` matrices, ten after one another; the median."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def products() -> None:
        for _ in range(10):
            a @ b

    products()
    seconds = [timed(products, device)[0] for _ in range(repeats)]
    return 10 * 2 * size**3 / float(np.median(seconds))


def unet_flops(pipe: Any, side: int) -> int:
    """Floating-point operations of one evaluation of the U-Net, a multiplication and an addition counted as two."""
    with torch.device("meta"):
        unet = type(pipe.unet).from_config(pipe.unet.config)
    # attention written out: its matrix products are counted whatever kernel the device would have for it
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        unet(**_unet_inputs(pipe, side, 1, torch.device("meta"), torch.float32))
    return int(counter.get_total_flops())


def _pair_seconds(pipe: Any, side: int, repeats: int) -> float:
    """Of the U-Net's evaluation of two rows, as guidance needs them."""
    inputs = _unet_inputs(pipe, side, 2, pipe.unet.device, pipe.unet.dtype)

    @torch.no_grad()
    def evaluate() -> None:
        pipe.unet(**inputs)

    evaluate()
    return float(np.median([timed(evaluate, pipe.unet.device)[0] for _ in range(repeats)]))


def _unet_inputs(pipe: Any, side: int, rows: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    config = pipe.unet.config
    latent_side = side // pipe.vae_scale_factor

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(rows, *shape, device=device, dtype=dtype)

    inputs: dict[str, Any] = {
        "sample": random(config.in_channels, latent_side, latent_side),
        "timestep": 500,
        "encoder_hidden_states": random(pipe.tokenizer.model_max_length, config.cross_attention_dim),
    }
    if pipe.text_encoder_2 is not None:
        projected = pipe.text_encoder_2.config.projection_dim
        inputs["added_cond_kwargs"] = {"text_embeds": random(projected), "time_ids": random(6)}
    return inputs
