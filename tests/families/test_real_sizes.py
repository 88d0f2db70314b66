"""Transformers of the published sizes, without weights: what is trained of them is there, and as large as
docs/families.md says."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import init_empty_weights
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from torch import nn

from s2edit_pipeline.family_base import family_of
from s2edit_pipeline.fit_settings import FitSettings

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
PUBLISHED: dict[str, Callable[[], Any]] = {
    "SD 3.5 medium": lambda: SD3Transformer2DModel(
        sample_size=128, in_channels=16, out_channels=16, num_layers=24, attention_head_dim=64, num_attention_heads=24,
        joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048, qk_norm="rms_norm",
        dual_attention_layers=tuple(range(13)), pos_embed_max_size=8,  # positions are no weights, and take their time
    ),
    "FLUX.1 dev": lambda: FluxTransformer2DModel(guidance_embeds=True),
    "Qwen-Image": QwenImageTransformer2DModel,
    "Z-Image": ZImageTransformer2DModel,
    "FLUX.2 klein 4B": lambda: Flux2Transformer2DModel(
        num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_layer_that_is_adapted_is_there(name: str) -> None:
    with init_empty_weights():
        transformer = PUBLISHED[name]()
    family, rank = family_of(SimpleNamespace(transformer=transformer, unet=None)), FitSettings().lora_rank
    sizes = []
    for layers in ("attention", "all"):
        targets = family.lora_targets("transformer", layers)
        ends = {
            target: [n for n, _ in transformer.named_modules() if f".{n}".endswith(f".{target}")] for target in targets
        }
        assert all(ends[target] for target in targets), [target for target in targets if not ends[target]]
        adapted = [transformer.get_submodule(n) for n in {n for found in ends.values() for n in found}]
        assert all(isinstance(layer, nn.Linear) for layer in adapted)
        sizes.append(2 * rank * sum(layer.in_features + layer.out_features for layer in adapted) / 1e6)
    billions = sum(parameter.numel() for parameter in transformer.parameters()) / 1e9
    (written,) = re.findall(rf"^\| {re.escape(name)} \| ([\d. |]+) \|$", PAGE.read_text("utf-8"), re.M)
    assert written == f"{billions:.2f} | {sizes[0]:.1f} | {sizes[1]:.1f}"
