"""The recipe's logs as a picture: what each stage's losses did over its steps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

CURVES: Mapping[str, tuple[str, ...]] = {
    "autoencoder": ("loss", "psnr"),
    "denoiser": ("denoising", "grounding"),
    "flow": ("flow", "grounding"),
}
"""Stage -> what its log holds: running means (of "flow", means of ten steps), and for the autoencoder the PSNR in dB of
held-out pictures."""


def read_curve(log: Path, name: str) -> tuple[list[int], list[float]]:
    """The steps at which ``log``, JSON lines, holds ``name``, and its values there."""
    records = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    values = {record["step"]: record[name] for record in records if name in record}  # a step done again counts once
    return sorted(values), [values[step] for step in sorted(values)]


def plot_training(folder: str | Path, out: str | Path) -> None:
    """Plot the logs in ``folder`` into the picture file ``out``: ``flow.jsonl`` where it is there, or
    ``autoencoder.jsonl`` and ``denoiser.jsonl``.

    Raises:
        FileNotFoundError: a log is missing.
        ImportError: matplotlib isn't there: ``pip install "s2edit-pipeline[evaluation]"``.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "s2edit-pipeline[evaluation]".') from error
    stages = ("flow",) if (Path(folder) / "flow.jsonl").exists() else ("autoencoder", "denoiser")
    curves = [(stage, name) for stage in stages for name in CURVES[stage]]
    figure = Figure(figsize=(2.75 * len(curves), 2.8), layout="constrained")
    axes = figure.subplots(1, len(curves))
    for axis, (stage, name) in zip(axes, curves, strict=True):
        steps, values = read_curve(Path(folder) / f"{stage}.jsonl", name)
        axis.plot(steps, values, linewidth=1)
        axis.set(title=f"{stage}: {name}", xlabel="step", yscale="linear" if name == "psnr" else "log")
    figure.savefig(str(out), dpi=80)
