"""The training logs' picture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from s2edit_pipeline.avatars.training_curves import CURVES, plot_training, read_curve


def _write(folder: Path, stages: tuple[str, ...], scale: float) -> None:
    for stage in stages:
        names = CURVES[stage]
        lines = [{"step": s, **{n: scale * (i + 1) / (s + 1) for i, n in enumerate(names)}} for s in range(20)]
        (folder / f"{stage}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


def test_a_curve_is_its_log_in_order_and_the_last_word_counts(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(
        '{"step": 2, "loss": 0.5}\n{"step": 3, "psnr": 20}\n{"step": 1, "loss": 0.7}\n{"step": 2, "loss": 0.4}\n'
    )
    assert read_curve(log, "loss") == ([1, 2], [0.7, 0.4])
    assert read_curve(log, "psnr") == ([3], [20])


@pytest.mark.parametrize("stages", [("autoencoder", "denoiser"), ("flow",)])
def test_the_picture_shows_the_logs(tmp_path: Path, stages: tuple[str, ...]) -> None:
    pictures = []
    for scale in (1.0, 40.0):
        _write(tmp_path, stages, scale)
        plot_training(tmp_path, tmp_path / "curves.png")
        pictures.append(np.asarray(Image.open(tmp_path / "curves.png").convert("RGB")).astype(int))
    assert pictures[0].shape == pictures[1].shape and np.abs(pictures[0] - pictures[1]).max() > 100
    (tmp_path / f"{stages[-1]}.jsonl").unlink()
    with pytest.raises(FileNotFoundError):
        plot_training(tmp_path, tmp_path / "curves.png")
