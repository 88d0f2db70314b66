"""Each family through the whole method: fit, save, load, invert, edit; in each dtype; refused where it can't be."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from transformers import CLIPTokenizer

from s2edit_pipeline import IdentityAdapter, S2EditPipeline, inversion_null_text
from s2edit_pipeline.fit_loop import fit_weights
from s2edit_pipeline.fit_objective import FitExample
from s2edit_pipeline.fit_settings import FitSettings
from s2edit_pipeline.inversion_record import INVERSIONS, InversionTask
from s2edit_pipeline.noise_schedule import NoiseSchedule, gradient_scaler
from s2edit_pipeline.prompt_tokens import initial_row, with_tokens

from ..effective_weights import effective_weights

FAMILIES = ("sd1", "sd2_v", "sdxl")
METHODS = ("lora", "full", "token")
HALF = (torch.bfloat16, torch.float16)
SIZE = {"height": 16, "width": 24}
SOURCE = "a photograph of a sad, bespectacled grandmother!"
WITH = "a photograph of a smiling, bespectacled [I] grandmother!"


def state(pipe: S2EditPipeline) -> dict[str, torch.Tensor]:
    parts = {**pipe.family.tuned_components, "vae": pipe.vae}
    return {f"{part}.{n}": t.clone() for part, module in parts.items() for n, t in module.state_dict().items()}


def assert_same(now: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> None:
    assert now.keys() == before.keys()
    assert not [name for name in before if not torch.equal(now[name], before[name])]


def rows_of(pipe: S2EditPipeline, noun: str) -> dict[str, torch.Tensor]:
    family = pipe.family
    return {name: initial_row(family.tokenizers[name], encoder, noun) for name, encoder in family.text_encoders.items()}


def fit(pipe: S2EditPipeline, picture: Image.Image, method: str = "lora", **changes: Any) -> IdentityAdapter:
    settings = {"num_steps": 2, "batch_size": 2, "generator": torch.Generator().manual_seed(0), **SIZE, **changes}
    return pipe.fit_identity(picture, SOURCE, "grandmother", method=method, **settings)


def test_the_vocabulary_is_clips_own(clip_tokenizer: CLIPTokenizer) -> None:
    """49,408 words, and the ids that OpenAI's tokenizer gives."""
    if len(clip_tokenizer) < 49408:
        pytest.skip("CLIP's vocabulary isn't here: pip install --no-deps open_clip_torch")
    assert len(clip_tokenizer) == 49408
    assert clip_tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert len(clip_tokenizer("bespectacled").input_ids) > 3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_fit_save_load_invert_edit(
    make_family: Callable[..., S2EditPipeline], wide_picture: Image.Image, tmp_path: Path, family: str, method: str
) -> None:
    pipe = make_family(family)
    before = state(pipe)
    identity = fit(pipe, wide_picture, method)
    assert_same(state(pipe), before)
    assert identity.mask is not None and identity.mask.shape == (8, 12)
    start = rows_of(pipe, "grandmother")
    assert identity.rows.keys() == start.keys() == pipe.family.text_encoders.keys()
    assert all(float((identity.rows[name] - row).abs().max()) > 1e-4 for name, row in start.items())
    identity.save_pretrained(tmp_path / "ada")
    again = IdentityAdapter.from_pretrained(tmp_path / "ada")
    components = pipe.family.tuned_components
    bare = {name: effective_weights(component) for name, component in components.items()}
    pipe.load_identity(again)
    changed = {
        name
        for name, component in components.items()
        for weight, tensor in effective_weights(component).items()
        if not torch.equal(tensor, bare[name][weight])
    }
    assert changed == (set() if method == "token" else components.keys())
    inversions = [name for name, one in INVERSIONS.items() if not one.flows_only]
    for kind in inversions if method == "lora" else ("direct",):
        noise = {"generator": torch.Generator().manual_seed(0)} if kind == "edit_friendly" else {}
        inversion = pipe.invert(wide_picture, SOURCE, kind, 2, **noise, **SIZE)
        assert inversion.prompt == "a photograph of a sad, bespectacled [I] grandmother!"
        result = pipe(WITH, wide_picture, SOURCE, inversion=inversion, output_type="latent")
        assert result.images.shape == (1, 4, 8, 12) and bool(torch.isfinite(result.images).all())
        if kind == "direct":
            assert torch.equal(result.source, inversion.trajectory[:1])
    pipe.unload_identity()
    assert_same(state(pipe), before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision(
    make_family: Callable[..., S2EditPipeline], wide_picture: Image.Image, family: str, dtype: torch.dtype
) -> None:
    """What is trained is float32 and moves as it does in float32; the model stays what it was, to the bit."""
    exact = make_family(family)
    start = rows_of(exact, "grandmother")
    moved = {}
    for pipe in (exact, make_family(family, dtype)):
        before = state(pipe)
        for method in METHODS if pipe is not exact else ("token",):
            identity = fit(pipe, wide_picture, method, spatial_control=False, num_steps=1)
            saved = torch.float16 if method == "lora" else torch.float32
            assert all(t.dtype == torch.float32 for t in identity.rows.values())
            assert all(t.dtype == saved for t in identity.weights.values())
            assert all(bool(torch.isfinite(t).all()) for t in [*identity.rows.values(), *identity.weights.values()])
        assert_same(state(pipe), before)
        moved[pipe.unet.dtype] = torch.cat([row - start[n].to(row) for n, row in identity.rows.items()])
    # AdamW's first step is the gradient's sign
    agree = torch.sign(moved[dtype]) == torch.sign(moved[torch.float32])
    assert float(agree.float().mean()) > 0.8
    inversion = pipe.invert(wide_picture, SOURCE, "null_text", 2, identity=identity, **SIZE)
    assert inversion.trajectory.dtype == dtype
    assert inversion.unconditional_embeds is not None and inversion.unconditional_embeds.dtype == torch.float32
    assert float((inversion.unconditional_embeds[0] - inversion.unconditional_embeds[1]).abs().max()) > 1e-4
    assert pipe(WITH, wide_picture, SOURCE, identity, num_inference_steps=2, **SIZE).images[0].size == (24, 16)
    assert pipe("a lady", num_inference_steps=2).images
    assert_same(state(pipe), before)


@pytest.mark.parametrize(("family", "height", "width"), [("sdxl", 64, 96), ("sd2_v", 32, 48), ("sd1", 32, 48)])
def test_large_latents(make_family: Callable[..., S2EditPipeline], family: str, height: int, width: int) -> None:
    """Of more than 16 cells a side, where the layers at half of it tell where words look. Attention among 64 x 96
    cells is dear: SDXL has none at its first level."""
    pipe = make_family(family)
    size = {"height": 2 * height, "width": 2 * width}
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size.values(), 3), dtype=np.uint8))
    half = np.arange(size["width"])[None].repeat(size["height"], 0) < width
    identity = fit(pipe, picture, num_steps=1, batch_size=1, mask=half, **size)
    assert identity.mask is not None and identity.mask.shape == (height, width)
    result = pipe(WITH, picture, SOURCE, identity, num_inference_steps=1, **size)
    assert result.images[0].size == (size["width"], size["height"])


def test_both_encoders_take_part_in_sdxls_losses(make_family: Callable[..., S2EditPipeline]) -> None:
    """The first step's losses, with tables that really have the row: |cos| summed, sizes and summary passed."""
    pipe = make_family("sdxl")
    family = pipe.family
    tokenizers = {name: with_tokens(tokenizer, ["[I]"]) for name, tokenizer in family.tokenizers.items()}
    plain, with_token = (family.tokenize(text, tokenizers) for text in ("a sad lady", "a sad [I] lady"))
    latents = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(9))
    token_id = tokenizers["text_encoder"].convert_tokens_to_ids("[I]")
    example = FitExample(latents, plain, with_token, "[I]", None)
    rows = rows_of(pipe, "lady")
    settings = FitSettings(method="token", num_steps=1, batch_size=1)
    result = fit_weights(family, [example], [rows], settings, torch.Generator().manual_seed(0), lambda progress: True)
    generator = torch.Generator().manual_seed(0)
    torch.randint(2**31, (1,), generator=generator)  # the adapters' seed
    t = int(float(torch.rand(1, generator=generator)) * 1000)
    eps = torch.randn(1, 4, 8, 12, generator=generator)
    semantic, contexts = 0.0, []
    with torch.no_grad():
        for name, encoder in family.text_encoders.items():
            encoder.resize_token_embeddings(token_id + 1, mean_resizing=False)
            encoder.get_input_embeddings().weight[token_id] = rows[name]
            sentence = encoder(plain.ids[name]).last_hidden_state[0, 4]  # start, three words, end
            out = encoder(with_token.ids[name], output_hidden_states=True)
            token = out.last_hidden_state[0, 3]
            semantic += abs(float(sentence @ token / sentence.norm() / token.norm()))
            contexts.append(out.hidden_states[-2])
        summary = encoder.text_projection(out.last_hidden_state[:, 5])
        added = {"text_embeds": summary, "time_ids": torch.tensor([[16.0, 24, 0, 0, 16, 24]])}
        a = float(pipe.scheduler.alphas_cumprod[t])
        x = a**0.5 * latents + (1 - a) ** 0.5 * eps
        output = pipe.unet(x, t, torch.cat(contexts, -1), added_cond_kwargs=added).sample
    (step,) = result.progress
    assert step.semantic_loss == pytest.approx(semantic, rel=1e-4)
    assert step.reconstruction_loss == pytest.approx(float(((output - eps) ** 2).mean()), rel=1e-4)


def test_null_text_leaves_sdxls_summary_alone(
    make_family: Callable[..., S2EditPipeline], wide_picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The unconditional rows get the negative prompt's summary, the conditional ones the source's."""
    pipe, summaries, forward = make_family("sdxl"), [], UNet2DConditionModel.forward

    def remember(unet: Any, *args: Any, added_cond_kwargs: Any = None, **kwargs: Any) -> Any:
        summaries.append(added_cond_kwargs["text_embeds"].detach())
        return forward(unet, *args, added_cond_kwargs=added_cond_kwargs, **kwargs)

    with torch.no_grad():
        summary = pipe.family.encode([pipe.family.tokenize(SOURCE)]).pooled
    monkeypatch.setattr(UNet2DConditionModel, "forward", remember)
    inversion = pipe.invert(wide_picture, SOURCE, "null_text", 2)
    assert sum(torch.equal(pooled, summary) for pooled in summaries) == 4  # two up, and the pivot's side of two down
    assert all(torch.equal(p, summary) or float(p.abs().max()) == 0 for p in summaries) and len(summaries) > 6
    summaries.clear()
    pipe("a happy lady", wide_picture, SOURCE, inversion=inversion)
    source, targets = ([float(row.abs().max()) == 0 for row in batch] for batch in summaries[:2])
    assert (source, targets) == ([False, True], [True, False])


def test_sdxls_autoencoder_works_in_float32(
    make_family: Callable[..., S2EditPipeline], wide_picture: Image.Image
) -> None:
    pipe, dtypes = make_family("sdxl", torch.float16), []
    handles = [
        module.register_forward_pre_hook(lambda m, args: dtypes.append((args[0].dtype, m.weight.dtype)))
        for module in (pipe.vae.encoder.conv_in, pipe.vae.decoder.conv_in)
    ]
    before = {name: p.data_ptr() for name, p in pipe.vae.named_parameters()}
    pipe("a lady", wide_picture, "a sad lady", num_inference_steps=1)
    assert dtypes == [(torch.float32, torch.float32)] * len(dtypes) and len(dtypes) >= 2
    assert {name: p.data_ptr() for name, p in pipe.vae.named_parameters()} == before
    dtypes.clear()
    pipe.vae.register_to_config(force_upcast=False)
    pipe("a lady", wide_picture, "a sad lady", num_inference_steps=1)
    assert dtypes == [(torch.float16, torch.float16)] * len(dtypes)
    for handle in handles:
        handle.remove()


def test_two_drawings_at_once_do_not_cast_sdxls_autoencoder_from_under_each_other(
    make_family: Callable[..., S2EditPipeline],
) -> None:
    pipe = make_family("sdxl", torch.float16)
    settings = {"num_inference_steps": 1, "height": 16, "width": 16, "output_type": "np"}
    alone = pipe("a lady", generator=torch.Generator().manual_seed(0), **settings).images
    at_the_end, dtypes = threading.Barrier(2, timeout=60), []

    def look(module: Any, args: Any, output: Any = None) -> None:
        time.sleep(0.05)
        dtypes.append({parameter.dtype for parameter in pipe.vae.parameters()})

    handles = [pipe.vae.decoder.register_forward_pre_hook(look), pipe.vae.decoder.register_forward_hook(look)]
    before = {name: p.data_ptr() for name, p in pipe.vae.named_parameters()}

    def draw(_: int) -> np.ndarray:
        return pipe(
            "a lady", generator=torch.Generator().manual_seed(0), **settings,
            callback_on_step_end=lambda *_: at_the_end.wait() and {},
        ).images  # fmt: skip

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(draw, range(2)))
    for handle in handles:
        handle.remove()
    assert dtypes == [{torch.float32}] * 4
    assert all(np.array_equal(images, alone) for images in together)
    assert {name: p.data_ptr() for name, p in pipe.vae.named_parameters()} == before


def test_gradients_too_small_for_float16_still_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Null-text through a float16 denoiser whose slope is 1e-4: unscaled, the embedding never moves."""

    def denoise(x: torch.Tensor, level: int, embeds: torch.Tensor | None = None) -> torch.Tensor:
        embeds = torch.zeros(1, 8, 8) if embeds is None else embeds
        return (x.half() * 0.1 + 1e-4 * embeds.half().mean()).to(x)

    alphas_bar = torch.linspace(1, 0.1, 4).double()
    schedule = NoiseSchedule(alphas_bar.sqrt(), (1 - alphas_bar).sqrt(), torch.tensor([1, 300, 600]), "epsilon")
    x0 = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0)).half()
    embeds = torch.ones(1, 8, 8).half()
    task = InversionTask(x0, schedule, denoise, denoise, embeds, 0 * embeds, guidance_scale=4.5)

    def movement() -> float:
        with torch.enable_grad():
            unconditional = INVERSIONS["null_text"].run(task).unconditional_embeds
        assert unconditional is not None
        return float(unconditional.abs().max())

    assert movement() > 1e-3
    monkeypatch.setattr(
        inversion_null_text, "gradient_scaler", lambda device, dtype: gradient_scaler(device, torch.float32)
    )
    assert movement() == 0


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_numbers_that_run_away_are_named(
    make_family: Callable[..., S2EditPipeline], wide_picture: Image.Image, family: str
) -> None:
    pipe = make_family(family, torch.float16)

    def run_away(*_: Any) -> dict[str, Any]:
        with torch.no_grad():
            pipe.unet.conv_out.weight.fill_(6e4)
        return {}

    message = r"at step {} of the {}; the model works in torch.float\d+. Load it in float32.*dtype=torch.float32"
    with pytest.raises(FloatingPointError, match=message.format(1, "edit")):
        pipe(SOURCE, wide_picture, SOURCE, num_inference_steps=2, callback_on_step_end=run_away)
    with pytest.raises(FloatingPointError, match=message.format(0, "inversion")):
        pipe.invert(wide_picture, SOURCE, num_inference_steps=2)
    with pytest.raises(FloatingPointError, match=message.format(0, "drawing")):
        pipe("a lady", num_inference_steps=2)
    with pytest.raises(FloatingPointError, match=r"The loss is (nan|inf) at step 0; .*float32 \(or bfloat16\)"):
        fit(pipe, wide_picture, spatial_control=False)


def test_models_that_cannot_be_used_are_named(make_family: Callable[..., S2EditPipeline]) -> None:
    def refused(message: str, **changes: Any) -> None:
        pipe = make_family("sdxl")
        for name, value in changes.items():
            setattr(pipe, name, value)
        with pytest.raises(ValueError, match=message):
            pipe("a lady", num_inference_steps=1)

    refused("it is an SDXL refiner", text_encoder=None, tokenizer=None)
    refused("has no tokenizer_2", tokenizer_2=None)
    refused("addition_embed_type=None and the pipeline a second text", unet=make_family("sd1").unet)
    refused("'text_time' and the pipeline no second text", text_encoder_2=None, tokenizer_2=None)
    config = dict(make_family("sdxl").unet.config)
    wide = UNet2DConditionModel.from_config({**config, "projection_class_embeddings_input_dim": 5 * 8 + 24})
    refused("wants 64 numbers beside the prompt.* are 72: a refiner", unet=wide)
    inpainting = UNet2DConditionModel.from_config({**config, "in_channels": 9})
    refused("takes 9 channels and the autoencoder gives 4: an inpainting", unet=inpainting)


def test_an_sdxl_identity_needs_an_sdxl(make_family: Callable[..., S2EditPipeline], wide_picture: Image.Image) -> None:
    identity = fit(make_family("sdxl"), wide_picture, "token", num_steps=1)
    pipe = make_family("sd1")
    with pytest.raises(ValueError, match=r"was fitted to"):
        pipe.load_identity(identity)
    with pytest.raises(ValueError, match=r"was fitted to|has rows of"):
        make_family("sdxl").load_identity(fit(pipe, wide_picture, "token", num_steps=1))
