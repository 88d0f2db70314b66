"""How large an identity of a Stable Diffusion 1.5-sized model is, and how long it takes: its real configurations."""

from __future__ import annotations

import copy
import itertools
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from s2edit_pipeline import S2EditPipeline
from s2edit_pipeline.avatars import load_avatars
from s2edit_pipeline.avatars.tokenizer import build_tokenizer
from s2edit_pipeline.avatars.world import render, sample_person
from s2edit_pipeline.family_unet import UNetFamily
from s2edit_pipeline.fit_settings import FitSettings
from s2edit_pipeline.identity_adapter import IdentityAdapter
from s2edit_pipeline.identity_fingerprint import fingerprint
from s2edit_pipeline.identity_lora_names import lora_metadata, published_name
from s2edit_pipeline.identity_overlay import IdentityOverlay


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


def of_every_layer(components: dict[str, torch.nn.Module]) -> IdentityAdapter:
    """A LoRA as fitted by default: every layer of the U-Net, in float16."""
    settings, family = FitSettings(), UNetFamily(SimpleNamespace(**components, text_encoder_2=None))
    weights: dict[str, torch.Tensor] = {}
    metadata: dict[str, object] = {}
    for component, module in components.items():
        targets = family.lora_targets(component, settings.lora_layers)
        for name, layer in module.named_modules():
            if any(name == t or name.endswith(f".{t}") for t in targets):
                path, out, first = published_name(component, name), len(layer.weight), layer.weight[0].shape
                weights[f"{path}.lora_A.weight"] = torch.randn(settings.lora_rank, *first).half()
                weights[f"{path}.lora_B.weight"] = torch.randn(out, settings.lora_rank, *[1] * (len(first) - 1)).half()
        metadata |= {f"{component}.{n}": v for n, v in lora_metadata(settings.lora_rank, targets).items()}
    return identity("lora", weights, metadata)


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def test_the_configurations_are_stable_diffusions(components: dict[str, torch.nn.Module]) -> None:
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in components.items()}
    assert counts == {"unet": 859_520_964, "text_encoder": 123_060_480}


def test_a_lora_identity_is_five_megabytes_at_most(components: dict[str, torch.nn.Module], tmp_path: Path) -> None:
    made = of_every_layer(components)
    assert len(made.weights) == 2 * (282 + 48)
    made.save_pretrained(tmp_path / "ada")
    print(f"{size(tmp_path / 'ada'):,} bytes")
    assert size(tmp_path / "ada") <= 5_000_000
    assert len(IdentityAdapter.from_pretrained(tmp_path / "ada").weights) == len(made.weights)


def numbers(components: dict[str, torch.nn.Module]) -> int:
    return sum(t.numel() for m in components.values() for t in (*m.parameters(), *m.buffers()))


def lay_and_lift(components: dict[str, torch.nn.Module], rounds: int) -> tuple[float, float, float, float]:
    """Seconds that laying, making sure and lifting take, the least of ``rounds``; and how many times as many numbers
    the components have meanwhile."""
    prints = {name: fingerprint(module) for name, module in components.items()}
    made = replace(of_every_layer(components), base_fingerprint=prints)
    overlay, before, took = IdentityOverlay(), numbers(components), []
    tokenizer = build_tokenizer(num_captions=10)
    width = components["text_encoder"].get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    made = replace(made, rows={"text_encoder": torch.zeros(width)})
    for _ in range(rounds):
        times = [time.perf_counter()]
        overlay.lay(made, 1.0, components, {"text_encoder": tokenizer})
        times.append(time.perf_counter())
        overlay.ensure(components)
        times.append(time.perf_counter())
        ratio = numbers(components) / before
        times.append(time.perf_counter())
        overlay.lift(None, components)
        times.append(time.perf_counter())
        took.append([b - a for a, b in itertools.pairwise(times)])
    assert numbers(components) == before
    lay, ensure, _, lift = (min(column) for column in zip(*took, strict=True))
    print(
        f"laid in {lay:.2f} s, made sure in {1e3 * ensure:.2f} ms, lifted in {lift:.2f} s, {ratio:.4f} times as large"
    )
    return lay, ensure, lift, ratio


def test_laying_and_lifting_a_small_models_identity_is_quick(pipe: S2EditPipeline) -> None:
    lay, _, lift, _ = lay_and_lift({"unet": pipe.unet, "text_encoder": pipe.text_encoder}, rounds=3)
    assert lay < 3 and lift < 3  # a tenth of that where nobody else works


@pytest.mark.slow
def test_laying_and_lifting_at_true_size(components: dict[str, torch.nn.Module]) -> None:
    """Run with ``-m slow`` on two idle cores; needs 5 GB of memory."""
    filled = {name: copy.deepcopy(module).to_empty(device="cpu") for name, module in components.items()}
    with torch.no_grad():
        for parameter in (p for module in filled.values() for p in module.parameters()):
            parameter.normal_(std=0.02)
    lay, ensure, lift, ratio = lay_and_lift(filled, rounds=3)
    assert lay <= 1 and lift <= 1 and ensure < 3e-3 and ratio <= 1.05


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
