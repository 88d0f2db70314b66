"""Qwen-Image, at tiny size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, QwenImagePipeline
from PIL import Image

from s2edit_pipeline import S2EditPipeline
from s2edit_pipeline.inversion_record import INVERSIONS

from . import transformer_checks as checks
from .tiny_transformers import pipeline, qwen_parts
from .transformer_checks import SOURCE, WIDE

pytestmark = pytest.mark.usefixtures("small_by_nature")


@pytest.fixture(scope="module")
def parts(small_tokenizers: dict[str, Any]) -> dict[str, Any]:
    return qwen_parts(small_tokenizers)


@pytest.fixture(scope="module")
def pipe(parts: dict[str, Any]) -> S2EditPipeline:
    return pipeline(parts)


def rescaled_to_the_conditionals(null: torch.Tensor, words: torch.Tensor, scale: float) -> torch.Tensor:
    """The stock pipeline's guidance of packed latents (B, cells, channels), cell by cell."""
    both = null + scale * (words - null)
    for row in range(len(both)):
        for cell in range(both.shape[1]):
            both[row, cell] *= words[row, cell].square().sum().sqrt() / both[row, cell].square().sum().sqrt()
    return both


def test_prompts_are_encoded_and_pictures_drawn_as_the_stock_pipeline_does(pipe: S2EditPipeline) -> None:
    family, texts = pipe.family, [SOURCE, "a hat"]
    prompts = [family.tokenize(text) for text in texts]
    with torch.no_grad():
        ours, both = family.encode(prompts[:1]), family.encode(prompts)
        theirs, mask = family.stock().encode_prompt(SOURCE)
        two, two_mask = family.stock().encode_prompt(texts)
    assert torch.equal(ours.embeds, theirs) and mask is ours.mask is None
    assert torch.equal(both.embeds, two) and torch.equal(both.mask, two_mask.bool())
    assert theirs.shape[1] == prompts[0].num_columns
    stock = family.stock()
    stock.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 2, "output_type": "latent", **WIDE}
    for ours_said, theirs_said in (
        ({"guidance_scale": 3.0, "negative_prompt": "a hat"}, {"true_cfg_scale": 3.0, "negative_prompt": "a hat"}),
        ({"true_cfg_scale": 3.0, "negative_prompt": "a hat"}, {"true_cfg_scale": 3.0, "negative_prompt": "a hat"}),
        ({}, {"true_cfg_scale": 4.0, "negative_prompt": " "}),
        ({"guidance_scale": 1.0}, {"true_cfg_scale": 1.0}),
    ):
        drawn = pipe(SOURCE, generator=checks.seeded(1), **ours_said, **given).images
        assert torch.equal(drawn, stock(SOURCE, generator=checks.seeded(1), **theirs_said, **given).images)
    with pytest.raises(ValueError, match="guidance_scale and true_cfg_scale are one thing"):
        pipe(SOURCE, guidance_scale=3.0, true_cfg_scale=3.0, **given)
    checks.check_drawing_is_the_stock_pipelines(pipe, true_cfg_scale=3.0, negative_prompt="a hat")


@pytest.mark.parametrize(("size", "dtype"), [(checks.WIDE, torch.float32), (checks.SQUARE, torch.bfloat16)])
def test_the_whole_way(
    parts: dict[str, Any], wide_picture: Image.Image, tmp_path: Path, size: Any, dtype: torch.dtype
) -> None:
    checks.check_the_whole_way(pipeline(parts).to(dtype), wide_picture, tmp_path, size, dtype)


def test_each_method_trains_what_it_promises(pipe: S2EditPipeline, wide_picture: Image.Image) -> None:
    assert pipe.family.text_encoders.keys() == pipe.family.fixed_components == {"text_encoder"}
    checks.check_methods(pipe, wide_picture)


def test_its_lora_in_the_stock_pipeline(
    parts: dict[str, Any], pipe: S2EditPipeline, wide_picture: Image.Image, tmp_path: Path
) -> None:
    stock = pipeline(parts).family.stock()
    stock.set_progress_bar_config(disable=True)
    said = {"true_cfg_scale": 3.0, "negative_prompt": "a hat"}
    checks.check_a_lora_in_the_stock_pipeline(pipe, stock, wide_picture, tmp_path, **said)


def test_every_inversion_serves(pipe: S2EditPipeline, wide_picture: Image.Image) -> None:
    checks.check_inversions(pipe, wide_picture, tuple(INVERSIONS))


def test_flowedit_is_the_published_update(pipe: S2EditPipeline, wide_picture: Image.Image) -> None:
    checks.check_flowedit_is_the_published_update(pipe, wide_picture)


def test_nobody_but_the_object_looks_at_the_token(pipe: S2EditPipeline) -> None:
    """The prompt's columns first, then the picture."""
    columns, cells = pipe.family.tokenize(SOURCE).num_columns, 4 * 6
    checks.check_spatial_control(pipe, lambda keys: (slice(columns, columns + cells), slice(0, columns)))


def test_words_and_identities(pipe: S2EditPipeline, wide_picture: Image.Image) -> None:
    checks.check_words(pipe, wide_picture)
    checks.check_identities(pipe, wide_picture)
    noise = torch.randn(1, 24, 16, generator=checks.seeded(7))
    checks.check_drawn_branches(pipe, wide_picture, rescaled_to_the_conditionals, noise)


def test_prompts_of_any_length_are_drawn_together(pipe: S2EditPipeline, wide_picture: Image.Image) -> None:
    noise = torch.randn(1, 24, 16, generator=checks.seeded(7))
    checks.check_prompts_of_any_length_are_drawn_together(pipe, wide_picture, noise, guidance_scale=3.0)
    with pytest.raises(ValueError, match="each as many as it needs: encode them one by one"):
        pipe.encode_prompt([SOURCE, "a hat"])


def test_errors_leave_all_as_found(pipe: S2EditPipeline, wide_picture: Image.Image) -> None:
    checks.check_errors_leave_all_as_found(pipe, wide_picture)


def test_guidance_keeps_each_cells_norm(pipe: S2EditPipeline) -> None:
    null, words = (torch.randn(2, 4, 8, 12, generator=checks.seeded(seed)) for seed in (1, 2))
    pack = QwenImagePipeline._pack_latents
    packed = [pack(x, 2, 4, 8, 12) for x in (null, words)]
    expected = rescaled_to_the_conditionals(*packed, 4.0)
    torch.testing.assert_close(pack(pipe.family.combine(null, words, 4.0), 2, 4, 8, 12), expected)


def test_pictures_to_latents_and_back_as_the_stock_pipeline_has_them(pipe: S2EditPipeline) -> None:
    pixels = torch.rand(2, 3, 16, 24, generator=checks.seeded()) * 2 - 1
    latents = pipe.family.encode_pixels(pixels)
    raw = pipe.vae.encode(pixels[:, :, None]).latent_dist.mean
    config = pipe.vae.config
    for channel in range(4):
        expected = (raw[:, channel, 0] - config.latents_mean[channel]) / config.latents_std[channel]
        torch.testing.assert_close(latents[:, channel], expected)
    torch.testing.assert_close(pipe.family.decode(latents), pipe.vae.decode(raw).sample[:, :, 0], rtol=1e-4, atol=1e-5)


def test_the_levels_are_the_stock_pipelines(pipe: S2EditPipeline) -> None:
    stock = pipe.family.stock()
    stock.set_progress_bar_config(disable=True)
    for height, width in ((16, 24), (64, 96)):
        stock(SOURCE, height=height, width=width, num_inference_steps=3, output_type="latent")
        schedule = pipe.family.schedule(3, (height, width))
        torch.testing.assert_close(schedule.noise.flip(0).float(), stock.scheduler.sigmas, rtol=0, atol=0)
        torch.testing.assert_close(schedule.timesteps.flip(0) * 1000, stock.scheduler.timesteps)
    with pytest.raises(ValueError, match="num_inference_steps=1 is too few for this scheduler"):
        pipe.family.schedule(1)


def test_steps_are_the_stock_pipelines(pipe: S2EditPipeline) -> None:
    checks.check_steps_are_the_stock_pipelines(pipe, 3.0, lambda x: QwenImagePipeline._pack_latents(x, *x.shape))


def test_columns_behind_the_token_know_of_it_and_those_before_do_not(
    pipe: S2EditPipeline, wide_picture: Image.Image
) -> None:
    family = pipe.family
    with checks.left_as_found(pipe), torch.no_grad():
        encoded = []
        for shift in (0.0, 1.0):
            identity = checks.fit(pipe, wide_picture, "token", num_steps=1)
            rows = {name: row + shift for name, row in identity.rows.items()}
            pipe.load_identity(checks.replaced(identity, rows=rows))
            prompt = family.tokenize("a sad [I] lady")
            encoded.append(family.encode([prompt]).embeds[0])
            pipe.unload_identity()
    moved = (encoded[0] - encoded[1]).abs().amax(-1)
    (column,) = prompt.columns("[I]")
    assert float(moved[:column].max()) == 0 < 1e-5 < float(moved[column:].min())
    end = prompt.segments[0].eos  # what the semantic loss compares has read all of the prompt
    assert max(prompt.columns("lady")) < end and torch.equal(
        family.sentence(encoded[0], prompt.segments[0]), encoded[0][end]
    )


def test_models_that_cannot_be_used_are_named(parts: dict[str, Any]) -> None:
    def refused(message: str, **changes: Any) -> None:
        pipe = pipeline({**parts, **changes})
        with pytest.raises(ValueError, match=message):
            pipe("a lady", num_inference_steps=2)

    for name in ("vae", "text_encoder", "tokenizer", "scheduler"):
        refused(f"The pipeline has no {name}; load it whole", **{name: None})
    refused("its levels are read off a FlowMatchEuler.*; DDIMScheduler gives none", scheduler=DDIMScheduler())
    edits = type(parts["transformer"]).from_config(parts["transformer"].config, zero_cond_t=True)
    refused("it is Qwen-Image-Edit's or -Layered's", transformer=edits)
    pipe = pipeline(parts)
    with pytest.raises(ValueError, match="leave clip_skip= out"):
        pipe.encode_prompt(SOURCE, clip_skip=1)
    with pytest.raises(ValueError, match="tokens and the text encoder reads 546"):
        pipe.family.tokenize("a lady with glasses and " * 200)


def test_folders_and_pipelines_come_and_go(pipe: S2EditPipeline, tmp_path: Path) -> None:
    checks.check_folders(pipe, QwenImagePipeline, tmp_path, true_cfg_scale=1.0)


@pytest.mark.slow
def test_a_fresh_process_serves_it(pipe: S2EditPipeline, tmp_path: Path) -> None:
    checks.check_a_fresh_process_serves_it(pipe, tmp_path)
