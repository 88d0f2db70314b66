import functools
import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from s2edit_pipeline.avatars import denoiser_training
from s2edit_pipeline.avatars.captions import Caption, describe
from s2edit_pipeline.avatars.denoiser_training import (
    DenoiserSettings,
    build_scheduler,
    build_text_encoder,
    build_unet,
    clamped_snr_plus_one_weight,
    grounding_loss,
    sample_latents,
    tokenize_with_parts,
    train_denoiser,
    trained_parameters,
)
from s2edit_pipeline.avatars.latent_dataset import LatentSet
from s2edit_pipeline.avatars.world import PARTS, sample_person


def _alphas_cumprod():
    """Stable Diffusion's "scaled linear" noise schedule, from its definition."""
    kept, product = [], 1.0
    for i in range(1000):
        beta = (math.sqrt(0.00085) + i / 999 * (math.sqrt(0.02) - math.sqrt(0.00085))) ** 2
        product *= 1 - beta
        kept.append(product)
    return kept


@pytest.fixture(scope="module")
def latents():
    return torch.randn(8, 16, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def models(tokenizer):
    torch.manual_seed(1)
    text_encoder = build_text_encoder(tokenizer)
    return text_encoder.eval(), build_unet(16, text_encoder.config.hidden_size).eval()


# ---------------------------------------------------------------------------- formulas


def test_the_noise_schedule_is_stable_diffusions():
    scheduler = build_scheduler()
    assert scheduler.alphas_cumprod.tolist() == pytest.approx(_alphas_cumprod(), rel=1e-4)
    scheduler.set_timesteps(50)
    assert scheduler.timesteps.tolist() == [20 * i + 1 for i in reversed(range(50))]
    assert scheduler.final_alpha_cumprod == scheduler.alphas_cumprod[0]


def test_the_weight_makes_an_error_of_the_picture_count_one_plus_snr_but_at_most_five():
    # for a network that is wrong by e about the picture, v = alpha eps - sigma x0 with
    # eps = (x_t - alpha x0) / sigma is wrong by (alpha^2 / sigma + sigma) e
    for abar in (0.9999, 0.95, 0.8, 0.7999, 0.5, 0.1, 0.005):
        alpha, sigma = math.sqrt(abar), math.sqrt(1 - abar)
        wrong = (alpha**2 / sigma + sigma) ** 2
        weight = clamped_snr_plus_one_weight(torch.tensor([abar], dtype=torch.float64)).item()
        assert weight * wrong == pytest.approx(min(1 + abar / (1 - abar), 5), rel=1e-9)


def _naive_grounding(maps, token_parts, masks):
    maps, masks = [m.double().tolist() for m in maps], masks.double().tolist()
    layers = []
    for probs in maps:
        side = math.isqrt(len(probs[0]))
        block = len(masks[0][0]) // side
        words = []
        for b, parts in enumerate(token_parts.tolist()):
            for k, part in enumerate(parts):
                if part < 0:
                    continue
                mask = masks[b][part]
                share = [
                    sum(mask[block * y + i][block * x + j] for i in range(block) for j in range(block)) / block**2
                    for y in range(side)
                    for x in range(side)
                ]
                cells = [c for c in range(side * side) if share[c] > 0 and share[c] > 0.3 * max(share)]
                if not cells:
                    continue
                word = [probs[b][q][k] + 1e-8 for q in range(side * side)]
                target = 1 / len(cells)
                words.append(sum(target * math.log(target / (word[c] / sum(word))) for c in cells))
        layers.append(sum(words) / len(words))
    return sum(layers) / len(layers)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_grounding_is_the_mean_divergence_from_the_parts(seed):
    generator = torch.Generator().manual_seed(seed)
    maps = [(3 * torch.randn(3, side * side, 6, generator=generator)).softmax(-1) for side in (8, 8, 4)]
    token_parts = torch.tensor([[-1, 0, 2, 2, -1, 1], [-1, 3, -1, 1, 4, -1], [-1] * 6])
    masks = (torch.rand(3, len(PARTS), 8, 8, generator=generator) - 0.6).clamp(min=0) * 2.5
    masks[1, 4] = 0  # a part that covers no cell
    expected = _naive_grounding(maps, token_parts, masks)
    assert grounding_loss(maps, token_parts, masks).item() == pytest.approx(expected, rel=1e-5)


def test_grounding_is_zero_where_the_map_is_its_part():
    masks = torch.zeros(1, len(PARTS), 4, 4)
    masks[0, 1, :2] = 1
    probs = torch.full((1, 16, 2), 1e-30)
    probs[0, :8, 0] = 0.37
    token_parts = torch.tensor([[1, -1]])
    assert grounding_loss([probs], token_parts, masks).item() == pytest.approx(0, abs=1e-6)
    probs[0, :16, 0] = 0.37  # spread over twice the room: one bit too much
    assert grounding_loss([probs], token_parts, masks).item() == pytest.approx(math.log(2), rel=1e-5)


def test_grounding_without_a_word_is_zero():
    maps, masks = [torch.full((2, 16, 5), 0.2)], torch.rand(2, len(PARTS), 4, 4)
    assert grounding_loss(maps, torch.full((2, 5), -1), masks).item() == 0
    assert grounding_loss(maps, torch.full((2, 5), 3), torch.zeros_like(masks)).item() == 0


def test_each_token_of_a_word_has_the_words_part(tokenizer):
    words = ("a", "zyxwv", "red", "hat", "on", "qqq")
    caption = Caption(words, (None, "person", "headwear", "headwear", None, "background"), {})
    ids, parts = tokenize_with_parts(tokenizer, caption)
    expected_ids, expected_parts = [tokenizer.bos_token_id], [-1]
    for word, part in zip(caption.words, caption.parts, strict=True):
        pieces = tokenizer(word, add_special_tokens=False).input_ids
        expected_ids += pieces
        expected_parts += [-1 if part is None else PARTS.index(part)] * len(pieces)
    rest = tokenizer.model_max_length - len(expected_ids)
    assert len(expected_ids) > len(words) + 1
    assert ids == expected_ids + [tokenizer.eos_token_id] * rest
    assert parts == expected_parts + [-1] * rest
    # the same numbers as the plain text's
    assert ids == tokenizer(caption.text, padding="max_length").input_ids


def test_keeping_the_maps_changes_nothing(models, tokenizer, latents):
    text_encoder, unet = models
    ids = torch.tensor(tokenizer(["a red hat", "a lady"], padding="max_length").input_ids)
    with torch.no_grad():
        context = text_encoder(ids).last_hidden_state
        plain = unet(latents[:2], 500, context).sample
        name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
        attention = unet.get_submodule(name)
        seen = []
        attention.register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True)
        keepers = {f"{name}.processor": denoiser_training._MapKeeper()}
        unet.set_attn_processor({n: keepers.get(n, plain) for n, plain in unet.attn_processors.items()})
        kept = unet(latents[:2], 500, context).sample
    assert (kept - plain).abs().max() < 1e-5
    # softmax(q k / sqrt(d)), head by head in float64
    q = seen[-1].double() @ attention.to_q.weight.double().T
    k = context.double() @ attention.to_k.weight.double().T
    size = q.shape[-1] // 4
    heads = [q[..., i : i + size] @ k[..., i : i + size].mT / size**0.5 for i in range(0, 4 * size, size)]
    expected = sum(head.softmax(-1) for head in heads) / 4
    assert (keepers[f"{name}.processor"].map - expected).abs().max() < 1e-6


def test_sampling_is_guided_ddim(models, tokenizer):
    text_encoder, unet = models
    prompts = ["a photo of a lady", "a red hat"]
    got = sample_latents(
        unet, text_encoder, tokenizer, build_scheduler(), prompts, num_inference_steps=3, guidance_scale=3.0, seed=4
    )
    abar = [*_alphas_cumprod()]
    x = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(4)).double()
    text_encoder, unet = text_encoder.double(), unet.double()
    with torch.no_grad():
        told, plain = (
            text_encoder(torch.tensor(tokenizer(texts, padding="max_length").input_ids)).last_hidden_state
            for texts in (prompts, ["", ""])
        )
        for t in (667, 334, 1):
            v = unet(x, t, plain).sample
            v = v + 3.0 * (unet(x, t, told).sample - v)
            now, after = abar[t], abar[max(t - 333, 0)]
            x0 = now**0.5 * x - (1 - now) ** 0.5 * v
            noise = now**0.5 * v + (1 - now) ** 0.5 * x
            x = after**0.5 * x0 + (1 - after) ** 0.5 * noise
    assert (got - x).abs().max() < 1e-3 * x.abs().max()


# ---------------------------------------------------------------------------- training


def small_unet(latent_channels, cross_attention_dim):
    """The embedded model's U-Net with a twelfth of its weights."""
    config = {**build_unet(latent_channels, cross_attention_dim).config, "block_out_channels": (32, 48)}
    return UNet2DConditionModel.from_config(config)


@pytest.fixture
def train(pictures, latents, tokenizer, monkeypatch):
    """Three steps of two pictures; the sample sheet is one picture of one step."""
    monkeypatch.setattr(denoiser_training, "build_unet", small_unet)
    monkeypatch.setattr(denoiser_training, "SAMPLE_PROMPTS", ("a photo of a lady",))
    monkeypatch.setattr(denoiser_training, "sample_latents", functools.partial(sample_latents, num_inference_steps=1))

    def decode(z):
        return np.zeros((len(z), 8, 8, 3), np.uint8)

    data = LatentSet(pictures.subjects, latents, pictures.masks)
    usual = DenoiserSettings(num_steps=3, batch_size=2)

    def run(folder, *, stop_at=None, **more):
        return train_denoiser(data, tokenizer, decode, folder, replace(usual, **more), stop_at=stop_at)

    return run


def _log(folder):
    return [json.loads(line) for line in (folder / "denoiser.jsonl").read_text().splitlines()]


def test_the_first_step_is_the_loss_of_its_formulas(train, pictures, latents, tokenizer, tmp_path):
    train(tmp_path, stop_at=1, batch_size=5, drop_caption=0.6, grounding_weight=10.0)
    rng, generator = random.Random("0-0"), torch.Generator().manual_seed(0)
    index = [rng.randrange(8) for _ in range(5)]
    captions = [None if rng.random() < 0.6 else describe(sample_person(i), rng) for i in index]
    assert any(captions) and None in captions
    noise = torch.randn(5, 16, 16, 16, generator=generator).double()
    # one noise level in each fifth of the schedule
    t = [int(1000 * (i + u) / 5) for i, u in enumerate(torch.rand(5, generator=generator).tolist())]

    torch.manual_seed(0)
    text_encoder = build_text_encoder(tokenizer)
    unet = small_unet(16, text_encoder.config.hidden_size)
    before = [p.detach().clone() for p in trained_parameters(unet, text_encoder)]
    text_encoder, unet = text_encoder.double(), unet.double()
    maps = []
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            module.register_forward_pre_hook(
                lambda m, args, kwargs: maps.append(_probabilities(m, args[0], kwargs["encoder_hidden_states"])),
                with_kwargs=True,
            )
    texts = ["" if caption is None else caption.text for caption in captions]
    ids = torch.tensor(tokenizer(texts, padding="max_length").input_ids)
    context = text_encoder(ids).last_hidden_state
    abar = torch.tensor([_alphas_cumprod()[i] for i in t]).double().view(5, 1, 1, 1)
    x0 = latents[index].double()
    velocity = abar.sqrt() * noise - (1 - abar).sqrt() * x0
    predicted = unet(abar.sqrt() * x0 + (1 - abar).sqrt() * noise, torch.tensor(t), context).sample
    snr = abar / (1 - abar)
    weight = torch.minimum(1 + snr, torch.tensor(5.0)) / (1 + snr)
    denoising = (weight * (predicted - velocity) ** 2).mean()

    parts = [[-1] * 48 if c is None else tokenize_with_parts(tokenizer, c)[1] for c in captions]
    masks = torch.from_numpy(pictures.masks[index]).double() / 255
    grounding = grounding_loss(maps, torch.tensor(parts), masks)
    record = _log(tmp_path)[0]
    assert record["denoising"] == pytest.approx(denoising.item(), rel=1e-4)
    assert record["grounding"] == pytest.approx(grounding.item(), rel=1e-4)

    parameters = trained_parameters(unet, text_encoder)
    gradients = torch.autograd.grad(denoising + 10 * grounding, parameters, allow_unused=True)
    state = torch.load(tmp_path / "denoiser.ckpt", weights_only=True)
    assert len(state["optimizers"]) == 1
    moments = state["optimizers"][0]["state"]
    used = [i for i, g in enumerate(gradients) if g is not None]
    wanted = torch.cat([gradients[i].flatten() for i in used])
    # a tenth of the gradient, which is clipped to norm 1
    assert wanted.norm() > 1
    wanted = wanted / wanted.norm() / 10
    got = torch.cat([moments[i]["exp_avg"].flatten() for i in used])
    assert (got - wanted).norm() < 1e-3 * wanted.norm()
    # the first of fifty steps of warm-up
    unet.load_state_dict(state["unet"])
    moved = max((p - b).abs().max().item() for p, b in zip(unet.parameters(), before, strict=False))
    assert moved == pytest.approx(8e-4 / 50, rel=0.02)


def _probabilities(attention, hidden, context):
    q, k = attention.to_q(hidden), attention.to_k(context)
    q, k = (x.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for x in (q, k))
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(1)


def test_a_batch_of_empty_captions_is_trained_on(train, tmp_path):
    train(tmp_path, stop_at=1, drop_caption=1.0)
    record = _log(tmp_path)[0]
    assert record["grounding"] == 0 and 0.1 < record["denoising"] < 10


def test_going_on_gives_the_same_as_going_through(train, tmp_path):
    whole = train(tmp_path / "whole")
    train(tmp_path / "parts", stop_at=1)
    parts = train(tmp_path / "parts")
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)
    states = [torch.load(tmp_path / f / "denoiser.ckpt", weights_only=True) for f in ("whole", "parts")]
    for part in ("unet", "text_encoder", "average", "optimizers", "step"):
        torch.testing.assert_close(states[0][part], states[1][part], rtol=0, atol=0)
    # what is returned is the average, with diffusers' own attention
    text_encoder, unet = whole
    for returned, average in zip(trained_parameters(unet, text_encoder), states[0]["average"]["average"], strict=True):
        assert torch.equal(returned, average)
    assert not any(isinstance(p, denoiser_training._MapKeeper) for p in unet.attn_processors.values())
