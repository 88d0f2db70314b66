"""The measurement of published shapes: the shapes themselves, the arithmetic, and the whole script at tiny size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from s2edit_pipeline.cli import main
from s2edit_pipeline.evaluation.costs.cuda import CudaRow, if_it_fits, measure_cuda_costs, unet_flops
from s2edit_pipeline.evaluation.costs.random_models import FAMILIES, TINY_FAMILIES, random_pipeline


@pytest.mark.parametrize(
    ("family", "unet", "text_encoder", "text_encoder_2"),
    [
        # as counted on the published weights
        ("sd15", 859_520_964, 123_060_480, None),
        ("sd21", 865_910_724, 340_387_840, None),
        ("sdxl", 2_567_463_684, 123_060_480, 694_659_840),
    ],
)
def test_shapes_are_the_published_ones(family: str, unet: int, text_encoder: int, text_encoder_2: int | None) -> None:
    def count(module: nn.Module | None) -> int | None:
        return None if module is None else sum(p.numel() for p in module.parameters())

    pipe = random_pipeline(FAMILIES[family], "meta")
    assert (count(pipe.unet), count(pipe.text_encoder), count(pipe.text_encoder_2)) == (
        unet, text_encoder, text_encoder_2,
    )  # fmt: skip
    assert count(pipe.vae) == 83_653_863 and pipe.vae_scale_factor == 8
    assert pipe.scheduler.config.prediction_type == ("v_prediction" if family == "sd21" else "epsilon")


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_operations_are_those_of_its_layers(family: str) -> None:
    """Convolutions, linear layers and the two products of attention, counted layer by layer."""
    pipe = random_pipeline(TINY_FAMILIES[family], dtype=torch.float32)
    total = 0

    def conv(module: Any, args: Any, output: torch.Tensor) -> None:
        nonlocal total
        total += 2 * output.numel() * module.weight[0].numel()

    def linear(module: Any, args: Any, output: torch.Tensor) -> None:
        nonlocal total
        total += 2 * output.numel() * module.in_features

    def attention(module: Any, args: Any, kwargs: Any, output: torch.Tensor) -> None:
        nonlocal total
        context = kwargs.get("encoder_hidden_states")
        keys = args[0].shape[1] if context is None else context.shape[1]
        total += 2 * 2 * len(output) * output.shape[1] * keys * module.inner_dim

    for module in pipe.unet.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(conv)
        elif isinstance(module, nn.Linear):
            module.register_forward_hook(linear)
        elif type(module).__name__ == "Attention":
            module.register_forward_hook(attention, with_kwargs=True)
    added = None
    if pipe.text_encoder_2 is not None:
        added = {"text_embeds": torch.zeros(1, 24), "time_ids": torch.zeros(1, 6)}
    words = torch.zeros(1, 77, pipe.unet.config.cross_attention_dim)
    with torch.no_grad():
        pipe.unet(torch.zeros(1, 4, 8, 8), 5, encoder_hidden_states=words, added_cond_kwargs=added)
    assert unet_flops(pipe, 64) == total > 0


def test_the_whole_script_at_tiny_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "costs.json"
    options = ["--random", "sd21", "sdxl", "--tiny", "--sides", "64", "--repeats", "1", "--steps", "1"]
    assert main(["measure", "costs", *options, "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    rows = [CudaRow(**row) for row in json.loads(out.read_text("utf-8"))["rows"]]
    assert [(row.family, row.side) for row in rows] == [(f, s) for f in TINY_FAMILIES for s in (64, 128, 192)]
    for row in rows:
        values = [value for name, value in vars(row).items() if name not in ("family", "side")]
        measured = row.side == 64 and row.family != "sd15"
        assert all(v > 0 for v in values) if measured else all(v is None for v in values), row
    assert shown.count("not measured") == (3 + 2 + 2) * 9 and "TFLOP/s in matrix products" in shown


def test_no_device_and_no_room(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["measure", "costs", "--random", "sd15"]) == 2
    assert "CUDA device, and PyTorch sees none" in capsys.readouterr().err
    with pytest.raises(ValueError, match="'sd3' is unknown; choose from sd15, sd21, sdxl"):
        measure_cuda_costs(["sd3"], tiny=True)

    def too_much() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert if_it_fits(too_much) is None and if_it_fits(lambda: 3) == 3
