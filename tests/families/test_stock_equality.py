"""What is drawn is what diffusers' own pipeline of the same family draws, and what is saved is what it loads."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file

from s2edit_pipeline import S2EditPipeline
from s2edit_pipeline.prompt_embeds import tokenize_for

FAMILIES = ("sd1", "sd2_v", "sdxl")
STOCK: dict[str, Any] = {
    "sd1": StableDiffusionPipeline, "sd2_v": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline,
}  # fmt: skip
# words of several tokens, punctuation, a repetition
PROMPT = "a photograph of a bespectacled, red-haired grandmother (smiling); the cat's whiskers & a very very big hat!"


def stock_of(pipe: S2EditPipeline, family: str) -> Any:
    extra: dict[str, Any] = {"requires_safety_checker": False} if family != "sdxl" else {"add_watermarker": False}
    stock = STOCK[family](**pipe.components, **extra)
    stock.set_progress_bar_config(disable=True)
    return stock


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("negative", [None, "", "an umbrella, blurred"])
def test_drawing_is_stock(make_family: Callable[..., S2EditPipeline], family: str, negative: str | None) -> None:
    pipe = make_family(family)
    latents = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    arguments: dict[str, Any] = {
        "prompt": [PROMPT, "a lady"], "num_inference_steps": 4, "guidance_scale": 4.5, "height": 16, "width": 24,
        "latents": latents, "output_type": "pt",
    }  # fmt: skip
    wanted = stock_of(pipe, family)(negative_prompt=None if negative is None else [negative] * 2, **arguments).images
    found = pipe(negative_prompt=negative, **arguments).images
    assert float((found - wanted).abs().max()) <= 1e-5
    assert float((found[0] - found[1]).abs().max()) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_clip_skip_and_given_embeddings_are_stock(make_family: Callable[..., S2EditPipeline], family: str) -> None:
    pipe = make_family(family)
    stock = stock_of(pipe, family)
    arguments: dict[str, Any] = {
        "num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent",
        "latents": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
    }  # fmt: skip
    if family == "sdxl":  # Stable Diffusion's own clip_skip breaks on transformers 5
        arguments |= {"original_size": (40, 30), "crops_coords_top_left": (3, 5), "target_size": (16, 32)}
        wanted = stock(PROMPT, negative_prompt="a hat", clip_skip=1, **arguments).images
        # its negative prompt is encoded without the skip, which is not meant: give ours the same
        embeds, _, pooled, _ = stock.encode_prompt(PROMPT, clip_skip=1, do_classifier_free_guidance=False)
        _, negative, _, negative_pooled = stock.encode_prompt(PROMPT, negative_prompt="a hat")
        given = {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": negative_pooled}
        torch.testing.assert_close(pipe._encode_prompts([pipe._tokenize(PROMPT)], 1).embeds, embeds)
        with pytest.raises(ValueError, match="pooled_prompt_embeds is needed too"):
            pipe(prompt_embeds=embeds, negative_prompt_embeds=negative)
    else:
        embeds, negative = stock.encode_prompt(PROMPT, "cpu", 1, True, "a hat")
        given = {}
        wanted = stock(prompt_embeds=embeds, negative_prompt_embeds=negative, **arguments).images
        with pytest.raises(ValueError, match="pooled_prompt_embeds goes with SDXL"):
            pipe(prompt_embeds=embeds, negative_prompt_embeds=negative, pooled_prompt_embeds=torch.zeros(1, 3))
    found = pipe(prompt_embeds=embeds, negative_prompt_embeds=negative, **given, **arguments).images
    assert float((found - wanted).abs().max()) <= 1e-5


def test_the_prompts_summary_is_read_at_its_end_not_at_the_token(make_family: Callable[..., S2EditPipeline]) -> None:
    """SDXL's config has eos_token_id 2: CLIP then takes the highest id for the end, and [I]'s is higher."""
    pipe = make_family("sdxl")
    tokens = pipe._tokenize("a sad lady")
    wanted = pipe.text_encoder_2(tokens.input_ids_2).text_embeds
    torch.testing.assert_close(pipe._encode_prompts([tokens]).pooled, wanted)
    identity = pipe.fit_identity(Image.new("RGB", (16, 16), "teal"), "a sad lady", "lady", num_steps=1, method="token")
    pipe.load_identity(identity)
    tokens = pipe._tokenize("a sad [I] lady")
    i = pipe.tokenizer_2.convert_tokens_to_ids("[I]")
    assert i in tokens.input_ids_2[0]
    pipe.text_encoder_2.resize_token_embeddings(i + 1, mean_resizing=False)
    with torch.no_grad():
        pipe.text_encoder_2.get_input_embeddings().weight[i] = identity.rows["text_encoder_2"]
        last = pipe.text_encoder_2(tokens.input_ids_2).last_hidden_state
    wanted = last[0, 5] @ pipe.text_encoder_2.text_projection.weight.T  # start, three words, [I], end
    torch.testing.assert_close(pipe._encode_prompts([tokens]).pooled[0], wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_identity_through_diffusers_own_loaders(
    make_family: Callable[..., S2EditPipeline], wide_picture: Image.Image, tmp_path: Path, family: str
) -> None:
    """load_lora_weights and load_textual_inversion of the stock pipeline, against ours with the identity loaded."""
    pipe, other = make_family(family), make_family(family)
    identity = pipe.fit_identity(
        wide_picture, "a sad lady", "lady", num_steps=2, learning_rate=1e-2, spatial_control=False,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    for i, tensor in enumerate(identity.weights.values()):
        tensor.add_(0.02 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(i)))
    identity.save_pretrained(tmp_path / "ada")
    for name in other.components.keys() & {"tokenizer", "tokenizer_2"}:  # learned words are added to them
        setattr(other, name, copy.deepcopy(getattr(other, name)))
    stock = stock_of(other, family)
    if family == "sdxl":
        state = load_file(str(tmp_path / "ada" / "learned_embeds.safetensors"))
        for key, encoder, tokenizer in (
            ("clip_l", "text_encoder", "tokenizer"),
            ("clip_g", "text_encoder_2", "tokenizer_2"),
        ):
            stock.load_textual_inversion(
                state[key], token="[I]", text_encoder=getattr(stock, encoder), tokenizer=getattr(stock, tokenizer)
            )
        stock.text_encoder_2.config.eos_token_id = stock.text_encoder_2.text_model.eos_token_id = (
            stock.tokenizer_2.eos_token_id  # or CLIP takes [I] for the end
        )
    else:
        stock.load_textual_inversion(str(tmp_path / "ada"), weight_name="learned_embeds.safetensors")
    stock.load_lora_weights(str(tmp_path / "ada"), weight_name="pytorch_lora_weights.safetensors")
    arguments: dict[str, Any] = {
        "num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent",
        "latents": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
    }  # fmt: skip
    plain = pipe("a sad lady", **arguments).images
    pipe.load_identity(identity)
    found = pipe("a sad [I] lady", **arguments).images
    torch.testing.assert_close(found, stock("a sad [I] lady", **arguments).images, rtol=1e-4, atol=1e-4)
    assert float((found - plain).abs().max()) > 1e-2
    if family == "sdxl":
        assert any(name.startswith("text_encoder_2.") for name in identity.weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_folders_and_pipelines_come_and_go(
    make_family: Callable[..., S2EditPipeline], tmp_path: Path, family: str
) -> None:
    pipe = make_family(family)
    arguments: dict[str, Any] = {"prompt": "a lady", "num_inference_steps": 2, "output_type": "latent"}
    arguments["latents"] = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    wanted = pipe(**arguments).images
    stock_of(pipe, family).save_pretrained(tmp_path / "stock")
    pipe.save_pretrained(tmp_path / "ours")
    loaded = [
        S2EditPipeline.from_pretrained(tmp_path / "stock"),
        S2EditPipeline.from_pretrained(tmp_path / "ours"),
        S2EditPipeline.from_pipe(STOCK[family].from_pretrained(tmp_path / "ours")),
        S2EditPipeline.from_pipe(STOCK[family].from_pipe(pipe)),
    ]
    for again in loaded:
        again.set_progress_bar_config(disable=True)
        # the same weights at other addresses may be summed in another order
        torch.testing.assert_close(again(**arguments).images, wanted, rtol=1e-4, atol=1e-4)


def test_tokenizers_that_disagree_are_refused(make_family: Callable[..., S2EditPipeline]) -> None:
    pipe = make_family("sdxl")
    pipe.tokenizer_2 = copy.deepcopy(pipe.tokenizer_2)
    pipe.tokenizer_2.add_tokens(["lady with"])
    with pytest.raises(ValueError, match="cut 'a lady with a hat' into different tokens"):
        tokenize_for(pipe._tokenizers, dict.fromkeys(pipe._tokenizers, "a lady with a hat"))
