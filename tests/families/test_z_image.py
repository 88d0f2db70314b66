"""Z-Image, base and Turbo, at tiny size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, ZImagePipeline
from PIL import Image

from s2edit_pipeline import S2EditPipeline
from s2edit_pipeline.attention_seam import attention_layers
from s2edit_pipeline.inversion_record import INVERSIONS

from . import transformer_checks as checks
from .tiny_transformers import pipeline, z_image_parts
from .transformer_checks import SOURCE

pytestmark = pytest.mark.usefixtures("small_by_nature")


@pytest.fixture(scope="module")
def parts(small_tokenizers: dict[str, Any]) -> dict[str, Any]:
    return z_image_parts(small_tokenizers)


@pytest.fixture(scope="module")
def pipe(parts: dict[str, Any]) -> S2EditPipeline:
    return pipeline(parts)


def test_prompts_are_encoded_and_pictures_drawn_as_the_stock_pipeline_does(pipe: S2EditPipeline) -> None:
    """The stock pipeline encodes among padding, which rounds in another way."""
    family, texts = pipe.family, [SOURCE, "a hat"]
    with torch.no_grad():
        ours = family.drawn_embeddings(family.encode([family.tokenize(text) for text in texts]))["prompt_embeds"]
        theirs, nulls = family.stock().encode_prompt(list(texts))
        null = family.drawn_embeddings(family.encode_negative(None, ours), "negative_")["negative_prompt_embeds"]
    for one, other in zip([*ours, *null], [*theirs, nulls[0]], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    checks.check_drawing_is_the_stock_pipelines(pipe, guidance_scale=2.0, negative_prompt="a hat")
    checks.check_drawing_is_the_stock_pipelines(pipe, guidance_scale=0.0)


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
    checks.check_a_lora_in_the_stock_pipeline(pipe, stock, wide_picture, tmp_path, guidance_scale=2.0)


def test_every_inversion_serves(pipe: S2EditPipeline, wide_picture: Image.Image) -> None:
    checks.check_inversions(pipe, wide_picture, tuple(INVERSIONS))


def test_flowedit_is_the_published_update(pipe: S2EditPipeline, wide_picture: Image.Image) -> None:
    checks.check_flowedit_is_the_published_update(pipe, wide_picture, scale=3.0)


def test_nobody_but_the_object_looks_at_the_token(pipe: S2EditPipeline) -> None:
    """Where the picture's 24 cells are alone, filled up to 32; where the text is; where the one follows the other."""
    long = f"{SOURCE} and a red hat and a beard"
    assert 32 < pipe.family.tokenize(long).num_columns <= 64
    layouts = {32: (None, None), 64: (None, slice(0, 64)), 96: (slice(0, 24), slice(32, 96))}
    checks.check_spatial_control(pipe, lambda keys: layouts[keys], long)


def test_words_and_identities(pipe: S2EditPipeline, wide_picture: Image.Image) -> None:
    checks.check_words(pipe, wide_picture)
    checks.check_identities(pipe, wide_picture)


def test_prompts_of_any_length_are_drawn_together(pipe: S2EditPipeline, wide_picture: Image.Image) -> None:
    noise = torch.randn(1, 4, 8, 12, generator=checks.seeded(7))
    checks.check_prompts_of_any_length_are_drawn_together(pipe, wide_picture, noise, guidance_scale=2.0)


def test_errors_leave_all_as_found(pipe: S2EditPipeline, wide_picture: Image.Image) -> None:
    checks.check_errors_leave_all_as_found(pipe, wide_picture)


def test_steps_are_the_stock_pipelines(pipe: S2EditPipeline) -> None:
    """Time counted from the noise, the flow turned round, guidance counted from 0."""
    checks.check_steps_are_the_stock_pipelines(pipe, 2.0)


def test_it_has_no_processors_of_its_own_to_set(pipe: S2EditPipeline) -> None:
    """The seam goes by its layers."""
    assert not hasattr(pipe.transformer, "attn_processors")
    assert sorted(attention_layers(pipe.transformer)) == [
        "context_refiner.0.attention", "layers.0.attention", "layers.1.attention", "noise_refiner.0.attention",
    ]  # fmt: skip


def test_turbo_is_told_by_its_name(parts: dict[str, Any]) -> None:
    pipe = pipeline(parts)
    assert (pipe.family.default_guidance_scale, pipe.family.default_steps) == (5.0, 50)
    pipe.register_to_config(_name_or_path="Tongyi-MAI/Z-Image-Turbo")
    assert (pipe.family.default_guidance_scale, pipe.family.default_steps) == (0.0, 9)
    assert pipe.family.default_inversion(pipe.family.default_steps) == "flowedit"


def test_models_that_cannot_be_used_are_named(parts: dict[str, Any]) -> None:
    def refused(message: str, **changes: Any) -> None:
        pipe = pipeline({**parts, **changes})
        with pytest.raises(ValueError, match=message):
            pipe("a lady", num_inference_steps=1)

    for name in ("vae", "text_encoder", "tokenizer", "scheduler"):
        refused(f"The pipeline has no {name}; load it whole", **{name: None})
    refused("its levels are read off a FlowMatchEuler.*; DDIMScheduler gives none", scheduler=DDIMScheduler())
    omni = type(parts["transformer"]).from_config(parts["transformer"].config, siglip_feat_dim=8)
    refused("it is Z-Image-Omni's", transformer=omni)
    with pytest.raises(ValueError, match="Z-Image takes no IP-Adapter here"):
        pipeline(parts).load_ip_adapter("h94/IP-Adapter", subfolder="models", weight_name="ip-adapter_sd15.bin")


def test_folders_and_pipelines_come_and_go(pipe: S2EditPipeline, tmp_path: Path) -> None:
    checks.check_folders(pipe, ZImagePipeline, tmp_path, guidance_scale=2.0)


@pytest.mark.slow
def test_a_fresh_process_serves_it(pipe: S2EditPipeline, tmp_path: Path) -> None:
    checks.check_a_fresh_process_serves_it(pipe, tmp_path)
