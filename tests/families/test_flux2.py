"""FLUX.2 klein, base and distilled, at tiny size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, Flux2KleinPipeline
from PIL import Image

from s2edit_pipeline import S2EditPipeline
from s2edit_pipeline.family_flux2 import Flux2KleinFamily
from s2edit_pipeline.inversion_record import INVERSIONS
from s2edit_pipeline.noise_guidance import guided

from . import transformer_checks as checks
from .tiny_transformers import flux2_parts, pipeline
from .transformer_checks import SOURCE, WIDE

pytestmark = pytest.mark.usefixtures("small_by_nature", "few_columns")
KINDS = {"base": False, "distilled": True}


FEW = 64


@pytest.fixture(scope="module")
def few_columns() -> Iterator[None]:
    """Through a deep language model 512 columns take their time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Flux2KleinFamily, "num_tokens", FEW)
        yield


@pytest.fixture
def all_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Flux2KleinFamily, "num_tokens", 512)


@pytest.fixture(scope="module")
def all_parts(small_tokenizers: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {kind: flux2_parts(small_tokenizers, is_distilled=switch) for kind, switch in KINDS.items()}


@pytest.fixture(scope="module")
def pipes(all_parts: dict[str, dict[str, Any]]) -> dict[str, S2EditPipeline]:
    return {kind: pipeline(parts) for kind, parts in all_parts.items()}


@pytest.fixture(scope="module")
def pipe(pipes: dict[str, S2EditPipeline]) -> S2EditPipeline:
    return pipes["base"]


def patched(latents: torch.Tensor) -> torch.Tensor:
    """As the stock pipeline takes them."""
    return Flux2KleinPipeline._patchify_latents(latents)


def packed(latents: torch.Tensor) -> torch.Tensor:
    """As its loop has them."""
    return Flux2KleinPipeline._pack_latents(patched(latents))


@pytest.mark.usefixtures("all_columns")
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_encoded_and_pictures_drawn_as_the_stock_pipeline_does(
    pipes: dict[str, S2EditPipeline], kind: str
) -> None:
    pipe = pipes[kind]
    with torch.no_grad():
        ours = pipe.family.encode([pipe.family.tokenize(SOURCE)])
        theirs, _ = pipe.family.stock().encode_prompt(SOURCE)
    assert torch.equal(ours.embeds, theirs) and ours.mask is None and theirs.shape == (1, 512, 48)
    checks.check_drawing_is_the_stock_pipelines(pipe, guidance_scale=1.0)
    if kind == "base":
        checks.check_drawing_is_the_stock_pipelines(pipe, guidance_scale=3.0)


@pytest.mark.parametrize(
    ("kind", "size", "dtype"), [("base", checks.WIDE, torch.float32), ("distilled", checks.SQUARE, torch.bfloat16)]
)
def test_the_whole_way(
    all_parts: dict[str, dict[str, Any]], wide_picture: Image.Image, tmp_path: Path, kind: str, size: Any, dtype: Any
) -> None:
    checks.check_the_whole_way(pipeline(all_parts[kind]).to(dtype), wide_picture, tmp_path, size, dtype)


def test_each_method_trains_what_it_promises(pipe: S2EditPipeline, wide_picture: Image.Image) -> None:
    assert pipe.family.text_encoders.keys() == pipe.family.fixed_components == {"text_encoder"}
    checks.check_methods(pipe, wide_picture)


def test_its_lora_in_the_stock_pipeline(
    all_parts: dict[str, dict[str, Any]], pipe: S2EditPipeline, wide_picture: Image.Image, tmp_path: Path
) -> None:
    stock = pipeline(all_parts["base"]).family.stock()
    stock.set_progress_bar_config(disable=True)
    checks.check_a_lora_in_the_stock_pipeline(pipe, stock, wide_picture, tmp_path, guidance_scale=3.0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_inversion_serves(pipes: dict[str, S2EditPipeline], wide_picture: Image.Image, kind: str) -> None:
    methods = tuple(INVERSIONS) if kind == "base" else ("direct", "flowedit")
    checks.check_inversions(pipes[kind], wide_picture, methods)
    assert pipes[kind].family.default_inversion(pipes[kind].family.default_steps) == (
        "direct" if kind == "base" else "flowedit"
    )


def test_flowedit_is_the_published_update(pipe: S2EditPipeline, wide_picture: Image.Image) -> None:
    checks.check_flowedit_is_the_published_update(pipe, wide_picture)


def test_nobody_but_the_object_looks_at_the_token(pipe: S2EditPipeline) -> None:
    """The prompt's columns first, then the picture; in blocks of two streams and of one."""
    columns, cells = FEW, 4 * 6
    checks.check_spatial_control(pipe, lambda keys: (slice(columns, columns + cells), slice(0, columns)))


def test_words_and_identities(pipe: S2EditPipeline, wide_picture: Image.Image) -> None:
    checks.check_words(pipe, wide_picture)
    checks.check_identities(pipe, wide_picture)


@pytest.mark.usefixtures("all_columns")
def test_a_token_is_masked_in_its_own_branch_alone(pipe: S2EditPipeline, wide_picture: Image.Image) -> None:
    noise = patched(torch.randn(1, 4, 8, 12, generator=checks.seeded(7)))
    said: tuple[dict[str, Any], dict[str, Any]] = ({"guidance_scale": 1.0}, {"guidance_scale": 3.0})
    pack = Flux2KleinPipeline._pack_latents
    checks.check_drawn_branches(pipe, wide_picture, guided, noise, pack, null="", said=said)


def test_errors_leave_all_as_found(pipe: S2EditPipeline, wide_picture: Image.Image) -> None:
    checks.check_errors_leave_all_as_found(pipe, wide_picture)


@pytest.mark.parametrize(("kind", "scale"), [("base", 3.0), ("distilled", None)])
def test_steps_are_the_stock_pipelines(pipes: dict[str, S2EditPipeline], kind: str, scale: float | None) -> None:
    """Its levels go by the number of cells, and of steps."""
    checks.check_steps_are_the_stock_pipelines(pipes[kind], scale, packed, patched, max_sequence_length=FEW)


def test_pictures_to_latents_and_back_as_the_stock_pipeline_has_them(pipe: S2EditPipeline) -> None:
    pixels = torch.rand(2, 3, 16, 24, generator=checks.seeded()) * 2 - 1
    latents = pipe.family.encode_pixels(pixels)
    torch.testing.assert_close(patched(latents), pipe.family.stock()._encode_vae_image(pixels, None))
    raw = pipe.vae.encode(pixels).latent_dist.mean
    torch.testing.assert_close(pipe.family.decode(latents), pipe.vae.decode(raw).sample, rtol=1e-4, atol=1e-5)


def test_what_guides_is_obeyed_or_refused(pipes: dict[str, S2EditPipeline], wide_picture: Image.Image) -> None:
    given = {"num_inference_steps": 1, "output_type": "latent", **WIDE}
    distilled = pipes["distilled"]
    with pytest.raises(ValueError, match="guidance_scale has no effect on this model"):
        distilled(SOURCE, guidance_scale=3.5, **given)
    with pytest.raises(ValueError, match="negative_prompt has no effect on this model"):
        checks.edited(distilled, wide_picture, negative_prompt="a hat")
    with pytest.raises(TypeError, match="has no argument 'negative_prompt'"):  # an edit's own, not the stock pipeline's
        pipes["base"](SOURCE, negative_prompt="a hat", **given)
    assert [pipe.family.default_steps for pipe in pipes.values()] == [50, 4]


def test_models_that_cannot_be_used_are_named(all_parts: dict[str, dict[str, Any]]) -> None:
    def refused(message: str, **changes: Any) -> None:
        pipe = pipeline({**all_parts["base"], **changes})
        with pytest.raises(ValueError, match=message):
            pipe("a lady", num_inference_steps=1)

    for name in ("vae", "text_encoder", "tokenizer", "scheduler"):
        refused(f"The pipeline has no {name}; load it whole", **{name: None})
    refused("its levels are read off a FlowMatchEuler.*; DDIMScheduler gives none", scheduler=DDIMScheduler())
    transformer = all_parts["base"]["transformer"]
    kind, config = type(transformer), transformer.config
    refused("it is FLUX.2 dev's, which isn't served", transformer=kind.from_config(config, guidance_embeds=True))
    refused("columns of 32 numbers and .* give 48", transformer=kind.from_config(config, joint_attention_dim=32))


@pytest.mark.parametrize("kind", KINDS)
def test_folders_and_pipelines_come_and_go(pipes: dict[str, S2EditPipeline], tmp_path: Path, kind: str) -> None:
    pipe = pipes[kind]
    checks.check_folders(pipe, Flux2KleinPipeline, tmp_path, guidance_scale=1.0)
    again = S2EditPipeline.from_pretrained(tmp_path)
    assert again.config.is_distilled is KINDS[kind] and again.family.stock().config.is_distilled is KINDS[kind]


@pytest.mark.slow
def test_a_fresh_process_serves_it(pipe: S2EditPipeline, tmp_path: Path) -> None:
    checks.check_a_fresh_process_serves_it(pipe, tmp_path)
