"""Every weight counts, whatever type it is loaded in: against a naive sum, and on the shipped model."""

from __future__ import annotations

import copy
import hashlib
import json
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from s2edit_pipeline import load_avatars
from s2edit_pipeline.identity_fingerprint import base_parameters, fingerprint, is_same_base

HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def avatars() -> dict[str, nn.Module]:
    pipe = load_avatars()
    return {"unet": pipe.unet, "text_encoder": pipe.text_encoder}


@pytest.fixture(scope="module")
def prints(avatars: dict[str, nn.Module]) -> dict[str, Any]:
    return {name: fingerprint(module) for name, module in avatars.items()}


def loaded_in(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    twin = copy.deepcopy(module)
    for parameter in twin.parameters():
        parameter.data = parameter.data.to(dtype)
    return twin


def moved(module: nn.Module, deviation: float, seed: int = 0) -> nn.Module:
    twin, generator = copy.deepcopy(module), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(deviation * torch.randn(parameter.shape, generator=generator))
    return twin


# ------------------------------------------------------------------------------ the formula


def splitmix(number: int) -> int:
    """Steele, Lea and Flood (2014), in whole numbers."""
    z = (number + 1) * 0x9E3779B97F4A7C15 % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def naive_projection(name: str, values: list[float]) -> float:
    start, total = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"), 0.0
    for k, value in enumerate(values):
        row = splitmix((start + k // 4096) % 2**64)
        factor = (0.5 + (row >> 11) / 2**53) * (1 if row & 1 else -1)
        total += factor * (-1 if splitmix(k % 4096) >> 63 else 1) * value
    return total


def test_the_sums_are_the_formula_written_out() -> None:
    module = nn.Sequential(nn.Linear(90, 100), nn.Conv2d(3, 4, 3))
    found = fingerprint(module)
    wanted = [0.0] * 64
    for name, parameter in module.named_parameters():
        place = int.from_bytes(hashlib.sha256(name.encode()).digest()[8:16], "little")
        bucket = place % 16 if parameter.ndim == 1 else 16 + place % 48
        wanted[bucket] += naive_projection(name, parameter.flatten().tolist())
    assert found is not None and found["count"] == 90 * 100 + 100 + 4 * 27 + 4
    np.testing.assert_allclose(found["sums"], wanted, rtol=0, atol=1e-5)
    assert sum(found["squares"]) == pytest.approx(
        sum(float(p.detach().double().square().sum()) for p in module.parameters())
    )
    assert json.loads(json.dumps(found)) == found


def test_a_layout_in_memory_is_no_other_model() -> None:
    module = nn.Sequential(nn.Conv2d(70, 70, 3), nn.Conv2d(8, 8, 3))
    found = fingerprint(module)
    assert found is not None and is_same_base(found, module.to(memory_format=torch.channels_last))


# ------------------------------------------------------------------------------ the shipped model


@pytest.mark.parametrize("name", ["unet", "text_encoder"])
def test_the_same_weights_in_every_type(avatars: Any, prints: Any, name: str) -> None:
    """The shipped weights are float16 files: made in one type and compared in each other."""
    twins = {dtype: loaded_in(avatars[name], dtype) for dtype in (torch.float32, *HALVES)}
    made = {dtype: fingerprint(twin) for dtype, twin in twins.items()}
    assert made[torch.float32] == prints[name]
    for first in made:
        for second in twins:
            assert is_same_base(made[first], twins[second]), (first, second)


@pytest.mark.parametrize("name", ["unet", "text_encoder"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_little_noise_on_every_weight_is_another_model(avatars: Any, prints: Any, name: str, dtype: Any) -> None:
    for seed in range(2):
        assert not is_same_base(prints[name], loaded_in(moved(avatars[name], 3e-4, seed), dtype))
    if dtype == torch.float32:
        assert not is_same_base(prints[name], moved(avatars[name], 1e-6))


@pytest.mark.parametrize("name", ["unet", "text_encoder"])
def test_a_single_weight_is_another_model(avatars: Any, prints: Any, name: str) -> None:
    module = copy.deepcopy(avatars[name])
    parameters = list(module.named_parameters())
    for i in np.random.default_rng(0).choice(len(parameters), 24, replace=False):
        flat = parameters[i][1].data.view(-1)
        place = len(flat) * 2 // 3
        original = flat[place].clone()
        flat[place] += 1e-2
        assert not is_same_base(prints[name], module), parameters[i][0]
        flat[place] = original
    assert is_same_base(prints[name], module)


def test_the_same_weights_in_other_places_are_another_model(avatars: Any, prints: Any) -> None:
    module = copy.deepcopy(avatars["unet"])
    weight = module.mid_block.attentions[0].transformer_blocks[0].ff.net[0].proj.weight.data
    weight[[0, 100]] = weight[[100, 0]]
    assert not is_same_base(prints["unet"], module)


def test_rounding_explains_no_more_than_rounding(avatars: Any, prints: Any) -> None:
    """In bfloat16, whose steps are 0.4 % of a weight: errors three times as large as rounding's are seen."""
    rounded, generator = loaded_in(avatars["unet"], torch.bfloat16), torch.Generator().manual_seed(0)
    for plain, parameter in zip(avatars["unet"].parameters(), rounded.parameters(), strict=True):
        step = 2 ** torch.floor(torch.log2(plain.detach().abs().clamp_min(1e-30))) * 2**-7
        error = 3 * step * (torch.rand(plain.shape, generator=generator) - 0.5)
        parameter.data = (plain.detach() + error).bfloat16()
    assert not is_same_base(prints["unet"], rounded)


# ------------------------------------------------------------------------------ what doesn't count


def test_attached_adapters_do_not_count(avatars: Any, prints: Any) -> None:
    unet = copy.deepcopy(avatars["unet"])
    for name in ("style", "other"):
        inject_adapter_in_model(LoraConfig(target_modules=["to_q", "conv1"], init_lora_weights=False), unet, name)
    assert any("base_layer" in name for name, _ in unet.named_parameters())
    assert fingerprint(unet) == prints["unet"]
    assert [n for n, _ in base_parameters(unet)] == [n for n, _ in avatars["unet"].named_parameters()]
    unet.mid_block.resnets[0].conv1.base_layer.weight.data[0, 0, 0, 0] += 1e-2
    assert not is_same_base(prints["unet"], unet)


def test_what_is_laid_over_is_read_at_its_base_value(avatars: Any, prints: Any) -> None:
    encoder = copy.deepcopy(avatars["text_encoder"])
    name = "final_layer_norm.weight"
    originals = {name: encoder.final_layer_norm.weight.data.clone()}
    encoder.final_layer_norm.weight.data.add_(1)
    assert fingerprint(encoder, originals) == prints["text_encoder"]
    assert not is_same_base(prints["text_encoder"], encoder)


def test_learned_words_do_not_count_and_the_others_do(avatars: Any, prints: Any) -> None:
    encoder = copy.deepcopy(avatars["text_encoder"])
    words = len(encoder.get_input_embeddings().weight)
    encoder.resize_token_embeddings(words + 3, mean_resizing=False)
    assert is_same_base(prints["text_encoder"], encoder)
    encoder = copy.deepcopy(avatars["text_encoder"])
    encoder.get_input_embeddings().weight.data[7, 3] += 1e-2
    assert not is_same_base(prints["text_encoder"], encoder)


class Words(nn.Module):
    """A text encoder with a long table."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, 2)
        self.table.weight.data = torch.arange(2.0 * rows).reshape(rows, 2).sin()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.table


def test_a_long_table_is_compared_block_by_block() -> None:
    found = fingerprint(Words(10_000))
    assert found is not None and (found["word_rows"], len(found["word_sums"])) == (10_000, 3)
    longer = Words(10_010)
    assert is_same_base(found, longer)  # the last block has learned words in it
    longer.table.weight.data[8191, 1] += 1e-2
    assert not is_same_base(found, longer)


def test_an_ip_adapter_does_not_count(avatars: Any, prints: Any) -> None:
    unet = copy.deepcopy(avatars["unet"])
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn2
    layer.processor = nn.Linear(3, 3)
    unet.encoder_hid_proj = nn.Linear(3, 3)
    unet.config.encoder_hid_dim_type = "ip_image_proj"
    assert fingerprint(unet) == prints["unet"]


def test_offloaded_weights_have_none(prints: Any, avatars: Any) -> None:
    module = copy.deepcopy(avatars["text_encoder"]).to("meta")
    assert fingerprint(module) is None
    with pytest.raises(ValueError, match=r"offloaded .*pipe.remove_all_hooks\(\)"):
        is_same_base(prints["text_encoder"], module)


def test_of_quantised_weights_biases_and_norms_are_compared() -> None:
    module = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
    found = fingerprint(module)
    quantised = copy.deepcopy(module)
    packed = (module[0].weight.detach() * 127).round().to(torch.int8)
    quantised[0].weight = nn.Parameter(packed, requires_grad=False)
    assert found is not None and is_same_base(found, quantised)
    quantised[0].bias.data[5] += 1e-2
    assert not is_same_base(found, quantised)
