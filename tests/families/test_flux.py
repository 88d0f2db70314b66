"""FLUX.1, dev and schnell, at tiny size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FluxPipeline
from PIL import Image

from s2edit_pipeline import S2EditPipeline
from s2edit_pipeline.noise_guidance import guided

from . import transformer_checks as checks
from .tiny_transformers import autoencoder, flux_parts, pipeline
from .transformer_checks import SOURCE, WIDE

pytestmark = pytest.mark.usefixtures("small_by_nature")

KINDS: dict[str, dict[str, Any]] = {"dev": {}, "schnell": {"guidance": False}}
INVERSIONS = ("direct", "ddim", "fixed_point", "midpoint", "edit_friendly", "flowedit")


@pytest.fixture(scope="module")
def all_parts(small_tokenizers: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {kind: flux_parts(small_tokenizers, **settings) for kind, settings in KINDS.items()}


@pytest.fixture(scope="module")
def pipes(all_parts: dict[str, dict[str, Any]]) -> dict[str, S2EditPipeline]:
    return {kind: pipeline(parts) for kind, parts in all_parts.items()}


@pytest.fixture(scope="module")
def pipe(pipes: dict[str, S2EditPipeline]) -> S2EditPipeline:
    return pipes["dev"]


@pytest.mark.parametrize(("kind", "num_columns"), [("dev", 512), ("schnell", 256)])
def test_prompts_are_encoded_and_pictures_drawn_as_the_stock_pipeline_does(
    pipes: dict[str, S2EditPipeline], kind: str, num_columns: int
) -> None:
    pipe = pipes[kind]
    with torch.no_grad():
        ours = pipe.family.encode([pipe.family.tokenize(SOURCE)])
        columns, summary, _ = pipe.family.stock().encode_prompt(SOURCE, max_sequence_length=num_columns)
    assert torch.equal(ours.embeds, columns) and torch.equal(ours.pooled, summary)
    assert columns.shape[1] == num_columns
    checks.check_drawing_is_the_stock_pipelines(pipe, **({"guidance_scale": 4.5} if kind == "dev" else {}))


@pytest.mark.parametrize(
    ("kind", "size", "dtype"),
    [
        ("dev", checks.WIDE, torch.float32),
        ("dev", checks.SQUARE, torch.bfloat16),
        ("schnell", checks.SQUARE, torch.float32),
        ("schnell", checks.WIDE, torch.bfloat16),
    ],
)
def test_the_whole_way(
    all_parts: dict[str, dict[str, Any]], wide_picture: Image.Image, tmp_path: Path, kind: str, size: Any, dtype: Any
) -> None:
    checks.check_the_whole_way(pipeline(all_parts[kind]).to(dtype), wide_picture, tmp_path, size, dtype)


def test_each_method_trains_what_it_promises(pipe: S2EditPipeline, wide_picture: Image.Image) -> None:
    assert pipe.family.text_encoders.keys() == pipe.family.fixed_components == {"text_encoder_2"}
    checks.check_methods(pipe, wide_picture)


def test_its_lora_in_the_stock_pipeline(
    all_parts: dict[str, dict[str, Any]], pipe: S2EditPipeline, wide_picture: Image.Image, tmp_path: Path
) -> None:
    stock = pipeline(all_parts["dev"]).family.stock()
    stock.set_progress_bar_config(disable=True)
    checks.check_a_lora_in_the_stock_pipeline(pipe, stock, wide_picture, tmp_path, guidance_scale=3.0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_inversion_serves(pipes: dict[str, S2EditPipeline], wide_picture: Image.Image, kind: str) -> None:
    pipe = pipes[kind]
    checks.check_inversions(pipe, wide_picture, INVERSIONS)
    few = pipe.invert(wide_picture, SOURCE, num_inference_steps=2, crop=None, **WIDE)
    assert few.method == "flowedit"
    for method in ("null_text", "negative_prompt"):
        with pytest.raises(ValueError, match="unconditional branch"):
            pipe.invert(wide_picture, SOURCE, method, 2, crop=None, **WIDE)


@pytest.mark.parametrize("kind", KINDS)
def test_flowedit_is_the_published_update(
    pipes: dict[str, S2EditPipeline], wide_picture: Image.Image, kind: str
) -> None:
    checks.check_flowedit_is_the_published_update(pipes[kind], wide_picture)


def test_nobody_but_the_object_looks_at_the_token(pipe: S2EditPipeline) -> None:
    """T5's columns first, then the picture; in blocks of two streams and of one."""
    columns, cells = 512, 4 * 6
    checks.check_spatial_control(pipe, lambda keys: (slice(columns, columns + cells), slice(0, columns)))


def test_words_and_identities(pipe: S2EditPipeline, wide_picture: Image.Image) -> None:
    checks.check_words(pipe, wide_picture)
    checks.check_identities(pipe, wide_picture)


def test_errors_leave_all_as_found(pipe: S2EditPipeline, wide_picture: Image.Image) -> None:
    checks.check_errors_leave_all_as_found(pipe, wide_picture)


def test_evaluations_a_step(pipe: S2EditPipeline, wide_picture: Image.Image) -> None:
    """N + 1 up; a further edit takes one row a step, guided or not, and the source's while its attention is taken over.
    The stock pipeline draws in one row a step."""
    n = 10
    inversions: list[Any] = []
    assert checks.count_rows(
        pipe, lambda: inversions.append(pipe.invert(wide_picture, SOURCE, "direct", n, crop=None, **WIDE))
    ) == n + 1  # fmt: skip

    def edit() -> None:
        checks.edited(pipe, wide_picture, inversion=inversions[0], edit_mask=wide_picture.convert("L"))

    assert checks.count_rows(pipe, edit) == n + 4  # cross_replace_steps=0.4
    stock = pipe.family.stock()
    stock.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": n, "output_type": "latent", **WIDE}
    assert checks.count_rows(pipe, lambda: stock(SOURCE, **given)) == n


# ------------------------------------------------------------------------------ what is its own


@pytest.mark.parametrize("kind", KINDS)
def test_the_levels_are_the_stock_pipelines(pipes: dict[str, S2EditPipeline], kind: str) -> None:
    """By the number of cells: shifted further for a larger picture, but schnell's."""
    pipe = pipes[kind]
    stock = pipe.family.stock()
    stock.set_progress_bar_config(disable=True)
    schedules = {}
    for height, width in ((16, 24), (64, 96)):
        stock(SOURCE, height=height, width=width, num_inference_steps=3, output_type="latent")
        schedules[height] = schedule = pipe.family.schedule(3, (height, width))
        torch.testing.assert_close(schedule.noise.flip(0).float(), stock.scheduler.sigmas, rtol=0, atol=0)
        torch.testing.assert_close(schedule.timesteps.flip(0) * 1000, stock.scheduler.timesteps)
    apart = float((schedules[16].noise - schedules[64].noise).abs().max())
    assert (apart > 1e-3) == (kind == "dev")
    assert pipe.family.default_steps == (28 if kind == "dev" else 4)


@pytest.mark.parametrize(("kind", "scale"), [("dev", 1.0), ("dev", 5.0), ("schnell", None)])
def test_steps_are_the_stock_pipelines(pipes: dict[str, S2EditPipeline], kind: str, scale: float | None) -> None:
    """Of schnell with as many columns as it was distilled with: the stock pipeline's own padding is longer."""
    pipe = pipes[kind]
    checks.check_steps_are_the_stock_pipelines(
        pipe,
        scale,
        lambda x: FluxPipeline._pack_latents(x, *x.shape[:2], *x.shape[2:]),
        max_sequence_length=pipe.family.num_columns,
    )


def test_the_summary_is_of_the_prompt_without_the_token(pipe: S2EditPipeline, wide_picture: Image.Image) -> None:
    with torch.no_grad():
        plain = pipe.family.encode([pipe.family.tokenize("a sad lady")])
        with checks.left_as_found(pipe):
            pipe.load_identity(checks.fit(pipe, wide_picture, "token", num_steps=1))
            prompt = pipe.family.tokenize("a sad [I] lady")
            said = pipe.family.encode([prompt])
            pipe.unload_identity()
    assert torch.equal(said.pooled, plain.pooled)
    (column,) = prompt.columns("[I]")
    assert float((said.embeds[0, column] - plain.embeds[0, column]).abs().max()) > 1e-3


def test_what_t5_reads_on_clip_may_cut_off(pipe: S2EditPipeline) -> None:
    long = "a photo of a lady with " + "a, " * 40 + "hat"
    prompt = pipe.family.tokenize(long)
    assert prompt.summaries[0].lost and not prompt.lost
    with pytest.raises(ValueError, match="tokens and the text encoder reads 512"):
        pipe.family.tokenize(long * 8)


def test_what_guides_is_obeyed_or_refused(pipes: dict[str, S2EditPipeline], wide_picture: Image.Image) -> None:
    given = {"num_inference_steps": 1, "output_type": "latent", **WIDE}
    for pipe in pipes.values():
        with pytest.raises(ValueError, match="negative_prompt has no effect on this model"):
            pipe(SOURCE, negative_prompt="a hat", **given)
        with pytest.raises(ValueError, match="negative_prompt has no effect on this model"):
            checks.edited(pipe, wide_picture, negative_prompt="a hat")
    dev, schnell = pipes.values()
    drawn = [
        dev(SOURCE, generator=checks.seeded(), **more, **given).images
        for more in ({}, {"guidance_scale": 1.0}, {"negative_prompt": "a hat", "true_cfg_scale": 3.0})
    ]
    assert all(float((drawn[0] - other).abs().max()) > 1e-4 for other in drawn[1:])
    with pytest.raises(ValueError, match="guidance_scale has no effect on this model"):
        schnell(SOURCE, guidance_scale=3.5, **given)
    assert schnell(SOURCE, guidance_scale=0.0, **given).images.shape == drawn[0].shape
    with checks.left_as_found(dev):
        dev.load_identity(checks.fit(dev, wide_picture, "token", num_steps=1))
        with pytest.raises(ValueError, match="leave max_sequence_length out"):
            dev("a [I] lady", max_sequence_length=256, **given)
        dev.unload_identity()
    noise = torch.randn(1, 24, 16, generator=checks.seeded(7))
    checks.check_drawn_branches(dev, wide_picture, guided, noise)


def test_models_that_cannot_be_used_are_named(all_parts: dict[str, dict[str, Any]]) -> None:
    def refused(message: str, **changes: Any) -> None:
        pipe = pipeline({**all_parts["dev"], **changes})
        with pytest.raises(ValueError, match=message):
            pipe("a lady", num_inference_steps=1)

    for name in ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler"):
        refused(f"The pipeline has no {name}; load it whole", **{name: None})
    refused("takes 4 channels and the autoencoder gives 16", vae=autoencoder(16))
    refused("its levels are read off a FlowMatchEuler.*; DDIMScheduler gives none", scheduler=DDIMScheduler())
    pipe = pipeline(all_parts["dev"])
    with pytest.raises(ValueError, match="told CLIP's summary alone"):
        pipe.encode_prompt(SOURCE, clip_skip=1)


def test_folders_and_pipelines_come_and_go(pipe: S2EditPipeline, tmp_path: Path) -> None:
    checks.check_folders(pipe, FluxPipeline, tmp_path)


def test_a_fresh_process_serves_it(pipe: S2EditPipeline, tmp_path: Path) -> None:
    checks.check_a_fresh_process_serves_it(pipe, tmp_path)
