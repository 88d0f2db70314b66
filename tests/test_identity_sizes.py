"""How large an identity of a Stable Diffusion 1.5-sized model is: its real configurations, without its weights."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from s2edit_pipeline.avatars import load_avatars
from s2edit_pipeline.avatars.world import render, sample_person
from s2edit_pipeline.fit_settings import FitSettings
from s2edit_pipeline.fit_weights import lora_targets
from s2edit_pipeline.identity_adapter import IdentityAdapter
from s2edit_pipeline.identity_lora_names import lora_metadata, published_name


@pytest.fixture(scope="module")
def components() -> dict[str, torch.nn.Module]:
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)
        text = CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
            max_position_embeddings=77, vocab_size=49408,
        )  # fmt: skip
        return {"unet": unet, "text_encoder": CLIPTextModel(text)}


def identity(method: str, weights: dict[str, torch.Tensor], metadata: dict[str, object]) -> IdentityAdapter:
    return IdentityAdapter(
        "[I]", "lady", "a photo of a lady with glasses", method, {"text_encoder": torch.randn(768)}, weights, metadata,
        torch.ones(64, 64), "stable-diffusion-v1-5/stable-diffusion-v1-5",
    )  # fmt: skip


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def test_the_configurations_are_stable_diffusions(components: dict[str, torch.nn.Module]) -> None:
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in components.items()}
    assert counts == {"unet": 859_520_964, "text_encoder": 123_060_480}


def test_a_lora_identity_is_five_megabytes_at_most(components: dict[str, torch.nn.Module], tmp_path: Path) -> None:
    """As fitted by default: every layer of the U-Net, in float16."""
    settings = FitSettings()
    weights: dict[str, torch.Tensor] = {}
    metadata: dict[str, object] = {}
    for component, module in components.items():
        targets = lora_targets(component, module, settings.lora_layers)
        for name, layer in module.named_modules():
            if any(name == t or name.endswith(f".{t}") for t in targets):
                path, out, first = published_name(component, name), len(layer.weight), layer.weight[0].shape
                weights[f"{path}.lora_A.weight"] = torch.randn(settings.lora_rank, *first).half()
                weights[f"{path}.lora_B.weight"] = torch.randn(out, settings.lora_rank, *[1] * (len(first) - 1)).half()
        metadata |= {f"{component}.{n}": v for n, v in lora_metadata(settings.lora_rank, targets).items()}
    assert len(weights) == 2 * (282 + 48)
    identity("lora", weights, metadata).save_pretrained(tmp_path / "ada")
    print(f"{size(tmp_path / 'ada'):,} bytes")
    assert size(tmp_path / "ada") <= 5_000_000
    assert len(IdentityAdapter.from_pretrained(tmp_path / "ada").weights) == len(weights)


@pytest.mark.slow
def test_a_full_fine_tuning_is_five_megabytes_at_most(components: dict[str, torch.nn.Module], tmp_path: Path) -> None:
    """Run with ``-m slow``; needs 8 GB of memory. Its differences fall off as 1/i, a fit's own spectrum is steeper."""
    weights = {}
    torch.manual_seed(0)
    for component, module in components.items():
        for name, parameter in module.named_parameters():
            if name.endswith("token_embedding.weight"):
                continue
            difference = 1e-5 * torch.randn(parameter.shape)
            if parameter.ndim > 1:
                for i in range(1, 9):
                    up, down = torch.randn(parameter.shape[0], 1), torch.randn(1, difference[0].numel())
                    difference += (3e-4 / i * up @ down).reshape(parameter.shape)
            weights[published_name(component, name)] = difference
    started = time.perf_counter()
    identity("full", weights, {}).save_pretrained(tmp_path / "ada")
    seconds = time.perf_counter() - started
    found = IdentityAdapter.from_pretrained(tmp_path / "ada")
    print(f"{size(tmp_path / 'ada'):,} bytes, {seconds:.0f} s, kept energy {found.measures['kept_energy']:.3f}")
    assert 4_000_000 < size(tmp_path / "ada") <= 5_000_000
    assert seconds < 120


@pytest.mark.slow
def test_a_compressed_fine_tuning_edits_as_the_exact_one(tmp_path: Path) -> None:
    """Run with ``-m slow``: a held-out person, the method's own settings; how far apart the two edits are."""
    pipe = load_avatars()
    pipe.set_progress_bar_config(disable=True)
    picture = render(sample_person(3, "held_out"))
    prompt = "a photo of a surprised man with short curly black hair and a moustache and a green sweater"
    fitted = pipe.fit_identity(picture, prompt, "man", method="full", generator=torch.Generator().manual_seed(0))
    edits = {}
    for name, exact in (("exact", True), ("compressed", False)):
        fitted.save_pretrained(tmp_path / name, exact=exact)
        identity = IdentityAdapter.from_pretrained(tmp_path / name)
        target = prompt.replace("surprised", "smiling [I]")
        edits[name] = pipe(target, picture, identity=identity, num_inference_steps=25, output_type="np").images
        print(f"{name}: {size(tmp_path / name):,} bytes, kept energy {identity.measures.get('kept_energy', 1)}")
    error = np.square(edits["exact"] - edits["compressed"]).mean()
    print(f"PSNR between the edits {-10 * np.log10(error):.1f} dB")
    assert size(tmp_path / "compressed") <= 1_000_000
    assert -10 * np.log10(error) > 30
