"""Stable Diffusion 3 and 3.5, at tiny size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusion3Pipeline
from PIL import Image

from s2edit_pipeline import S2EditPipeline
from s2edit_pipeline.inversion_record import INVERSIONS
from s2edit_pipeline.prompt_tokens import initial_row

from . import transformer_checks as checks
from .tiny_transformers import autoencoder, pipeline, sd3_parts
from .transformer_checks import SOURCE, WIDE

KINDS: dict[str, dict[str, Any]] = {"SD3": {}, "SD3.5": {"dual": (0,)}, "without T5": {"with_t5": False}}


@pytest.fixture(scope="module")
def all_parts(small_tokenizers: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {kind: sd3_parts(small_tokenizers, **settings) for kind, settings in KINDS.items()}


@pytest.fixture(scope="module")
def pipes(all_parts: dict[str, dict[str, Any]]) -> dict[str, S2EditPipeline]:
    return {kind: pipeline(parts) for kind, parts in all_parts.items()}


@pytest.fixture(scope="module")
def pipe(pipes: dict[str, S2EditPipeline]) -> S2EditPipeline:
    return pipes["SD3.5"]


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_encoded_and_pictures_drawn_as_the_stock_pipeline_does(
    pipes: dict[str, S2EditPipeline], kind: str
) -> None:
    pipe = pipes[kind]
    stock = pipe.family.stock()
    for clip_skip in (None, 1):
        with torch.no_grad():
            ours = pipe.family.encode([pipe.family.tokenize(SOURCE)], clip_skip)
            null = pipe.family.encode_negative("a hat", ours, clip_skip)
            theirs = stock.encode_prompt(SOURCE, None, None, negative_prompt="a hat", clip_skip=clip_skip)
        for one, other in zip((ours.embeds, null.embeds, ours.pooled, null.pooled), theirs, strict=True):
            assert torch.equal(one, other)
    checks.check_drawing_is_the_stock_pipelines(pipe, guidance_scale=4.5, negative_prompt="a hat")


@pytest.mark.parametrize(
    ("kind", "size", "dtype"),
    [
        ("SD3", checks.WIDE, torch.float32),
        ("SD3.5", checks.SQUARE, torch.float32),
        ("SD3.5", checks.WIDE, torch.bfloat16),
        ("without T5", checks.SQUARE, torch.bfloat16),
    ],
)
def test_the_whole_way(
    all_parts: dict[str, dict[str, Any]], wide_picture: Image.Image, tmp_path: Path, kind: str, size: Any, dtype: Any
) -> None:
    checks.check_the_whole_way(pipeline(all_parts[kind]).to(dtype), wide_picture, tmp_path, size, dtype)


def test_each_method_trains_what_it_promises(pipe: S2EditPipeline, wide_picture: Image.Image) -> None:
    """T5's row too, though its weights stand still: the module that it calls isn't the one that it names."""
    assert pipe.family.fixed_components == {"text_encoder_3"}
    checks.check_methods(pipe, wide_picture)


def test_its_lora_in_the_stock_pipeline(
    all_parts: dict[str, dict[str, Any]], pipe: S2EditPipeline, wide_picture: Image.Image, tmp_path: Path
) -> None:
    stock = pipeline(all_parts["SD3.5"]).family.stock()
    stock.set_progress_bar_config(disable=True)
    checks.check_a_lora_in_the_stock_pipeline(pipe, stock, wide_picture, tmp_path, guidance_scale=3.0)


def test_every_inversion_serves(pipe: S2EditPipeline, wide_picture: Image.Image) -> None:
    checks.check_inversions(pipe, wide_picture, tuple(INVERSIONS))
    assert pipe.family.default_inversion(10) == "direct" and pipe.family.default_inversion(9) == "flowedit"
    few = pipe.invert(wide_picture, SOURCE, num_inference_steps=2, crop=None, **WIDE)
    assert few.method == "flowedit"


def test_flowedit_is_the_published_update(pipe: S2EditPipeline, wide_picture: Image.Image) -> None:
    checks.check_flowedit_is_the_published_update(pipe, wide_picture)


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_but_the_object_looks_at_the_token(pipes: dict[str, S2EditPipeline], kind: str) -> None:
    """Picture first, then CLIP's and T5's columns; 3.5 medium's second attention is of the picture alone."""
    cells, columns = 4 * 6, 77 + 256

    def layout(keys: int) -> Any:
        return (None, None) if keys == cells else (slice(0, cells), slice(cells, cells + columns))

    checks.check_spatial_control(pipes[kind], layout)


def test_words_and_identities(pipe: S2EditPipeline, wide_picture: Image.Image) -> None:
    checks.check_words(pipe, wide_picture)
    checks.check_identities(pipe, wide_picture)


def test_errors_leave_all_as_found(pipe: S2EditPipeline, wide_picture: Image.Image) -> None:
    checks.check_errors_leave_all_as_found(pipe, wide_picture)


def test_evaluations_a_step(pipe: S2EditPipeline, wide_picture: Image.Image) -> None:
    """N + 1 up; a further edit takes a row a step, a second while it is guided, and the source's while its attention is
    taken over. The stock pipeline draws in two rows a step."""
    n = 10
    inversions: list[Any] = []

    def invert() -> None:
        inversions.append(pipe.invert(wide_picture, SOURCE, "direct", n, crop=None, **WIDE))

    assert checks.count_rows(pipe, invert) == n + 1

    def edit() -> None:
        checks.edited(pipe, wide_picture, inversion=inversions[0], edit_mask=wide_picture.convert("L"))

    assert checks.count_rows(pipe, edit) == n + n // 2 + 4  # cross_replace_steps=0.4
    stock = pipe.family.stock()
    stock.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": n, "guidance_scale": 4.5, "output_type": "latent", **WIDE}
    assert checks.count_rows(pipe, lambda: stock(SOURCE, **given)) == 2 * n


def test_steps_are_the_stock_pipelines(pipe: S2EditPipeline) -> None:
    checks.check_steps_are_the_stock_pipelines(pipe, 3.0)


# ------------------------------------------------------------------------------ what is its own


def test_the_levels_are_the_schedulers_own(pipe: S2EditPipeline) -> None:
    """Shifted twice at their end, as diffusers' own."""
    for n in (1, 10, 28):
        scheduler = pipe.family.stock().scheduler
        scheduler.set_timesteps(n)
        schedule = pipe.family.schedule(n)
        torch.testing.assert_close(schedule.noise.flip(0).float(), scheduler.sigmas, rtol=0, atol=0)
        torch.testing.assert_close(schedule.timesteps.flip(0), scheduler.timesteps, rtol=0, atol=0)
    with pytest.raises(ValueError, match="num_inference_steps must be a whole number from 1 to 1000"):
        pipe.family.schedule(1001)


def test_the_summary_is_of_the_prompt_without_the_token(pipe: S2EditPipeline, wide_picture: Image.Image) -> None:
    """Also of a prompt in which CLIP would take ``[I]``, whose id is the highest, for the end."""
    with torch.no_grad():
        plain = pipe.family.encode([pipe.family.tokenize("a sad lady")])
        with checks.left_as_found(pipe):
            pipe.load_identity(checks.fit(pipe, wide_picture, "token", num_steps=1))
            prompt = pipe.family.tokenize("a sad [I] lady")
            said = pipe.family.encode([prompt, pipe.family.tokenize("a sad lady")])
            pipe.unload_identity()
    assert plain.pooled is not None and said.pooled is not None
    torch.testing.assert_close(said.pooled, plain.pooled.expand(2, -1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(said.embeds[1:], plain.embeds, rtol=1e-5, atol=1e-5)
    columns = prompt.columns("[I]")
    assert len(columns) == 2 and columns[0] < 77 <= columns[1]  # CLIP's, and T5's
    assert float((said.embeds[0, columns[0]] - plain.embeds[0, columns[0]]).abs().max()) > 1e-3


def test_t5s_row_starts_as_the_noun_and_is_embedded(pipe: S2EditPipeline, wide_picture: Image.Image) -> None:
    """What it calls is another module than ``get_input_embeddings`` names."""
    encoder = pipe.text_encoder_3
    start = initial_row(pipe.tokenizer_3, encoder, "lady")
    ids = pipe.tokenizer_3("lady", add_special_tokens=False).input_ids
    torch.testing.assert_close(start, encoder.encoder.embed_tokens.weight[ids].mean(0))
    identity = checks.fit(pipe, wide_picture, "token", num_steps=1, token_learning_rate=0.1)
    amount = float((identity.rows["text_encoder_3"] - start).abs().max())
    assert amount == pytest.approx(0.1, rel=0.01)  # AdamW's first step: a gradient has come through T5


def test_what_t5_reads_on_clip_may_cut_off(pipes: dict[str, S2EditPipeline]) -> None:
    long = "a photo of a lady with " + "a, " * 40 + "hat"
    prompt = pipes["SD3"].family.tokenize(long)
    assert prompt.segments[0].lost and not prompt.lost
    with pytest.raises(ValueError, match=r"tokens and the text encoder reads 77"):
        pipes["without T5"].family.tokenize(long)


def test_models_that_cannot_be_used_are_named(all_parts: dict[str, dict[str, Any]]) -> None:
    def refused(message: str, **changes: Any) -> None:
        pipe = pipeline({**all_parts["SD3"], **changes})
        with pytest.raises(ValueError, match=message):
            pipe("a lady", num_inference_steps=1)

    for name in ("vae", "text_encoder", "tokenizer", "scheduler"):
        refused(f"The pipeline has no {name}; load it whole", **{name: None})
    refused("text_encoder_3 and tokenizer_3 belong together", tokenizer_3=None)
    refused("wants a summary of 40 numbers and the CLIPs give 16", text_encoder_2=None, tokenizer_2=None)
    refused("takes 4 channels and the autoencoder gives 16", vae=autoencoder(16))
    refused("its levels are read off a FlowMatchEuler.*; DDIMScheduler gives none", scheduler=DDIMScheduler())
    half = pipeline(all_parts["SD3"])
    half.text_encoder.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"transformer is torch.float32 and the text_encoder torch.bfloat16"):
        half("a lady", num_inference_steps=1)


def test_one_clip_may_stand_in_both_places(small_tokenizers: dict[str, Any], wide_picture: Image.Image) -> None:
    """As in a model that was made so; its stock pipeline has the one twice."""
    parts = sd3_parts(small_tokenizers, with_t5=False)
    width = parts["text_encoder"].config.projection_dim
    config = {**parts["transformer"].config, "pooled_projection_dim": 2 * width}
    parts["transformer"] = type(parts["transformer"]).from_config(config).eval()
    del parts["text_encoder_2"], parts["tokenizer_2"]
    pipe = pipeline(parts)
    assert pipe.family.text_encoders.keys() == {"text_encoder"}
    stock = pipe.family.stock()
    assert isinstance(stock, StableDiffusion3Pipeline) and stock.text_encoder_2 is pipe.text_encoder
    checks.check_drawing_is_the_stock_pipelines(pipe, guidance_scale=4.5)
    with checks.left_as_found(pipe):
        identity = checks.fit(pipe, wide_picture, num_steps=1)
        assert identity.rows.keys() == {"text_encoder"}
        result = checks.edited(pipe, wide_picture, checks.WITH_TOKEN, identity=identity)
        assert bool(torch.isfinite(result.images).all())


def test_a_picture_too_large_for_its_positions_is_refused(pipe: S2EditPipeline, wide_picture: Image.Image) -> None:
    with pytest.raises(ValueError, match="works at 48 pixels a side or less, not at a height of 16 and a width of 52"):
        checks.edited(pipe, wide_picture, height=16, width=52)


def test_folders_and_pipelines_come_and_go(pipe: S2EditPipeline, tmp_path: Path) -> None:
    checks.check_folders(pipe, StableDiffusion3Pipeline, tmp_path, guidance_scale=4.5)
