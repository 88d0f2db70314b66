import functools
import json
import math
import random
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.models.attention_processor import JointAttnProcessor2_0
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from s2edit_pipeline.avatars import flow_training
from s2edit_pipeline.avatars.captions import describe
from s2edit_pipeline.avatars.denoiser_training import grounding_loss, tokenize_with_parts
from s2edit_pipeline.avatars.flow_model import encode_captions, start_as_identity
from s2edit_pipeline.avatars.flow_training import (
    GROUNDED_LAYERS,
    FlowSettings,
    GroundedJointProcessor,
    draw_levels,
    draw_zero_columns,
    flow_target,
    interpolate,
    picture_order,
    train_flow,
    word_maps,
)
from s2edit_pipeline.avatars.latent_dataset import LatentSet


def small_transformer(latent_channels=16, text_width=32, side=16):
    """The embedded transformer, an eighth as wide."""
    transformer = SD3Transformer2DModel(
        sample_size=side,
        patch_size=1,
        in_channels=latent_channels,
        out_channels=latent_channels,
        num_layers=6,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=2 * text_width,
        caption_projection_dim=32,
        pooled_projection_dim=2 * text_width,
        pos_embed_max_size=side,
        qk_norm="rms_norm",
    )
    start_as_identity(transformer)
    with torch.no_grad():  # with all gates shut nothing would tell one formula from another
        for parameter in transformer.parameters():
            if parameter.ndim > 1 and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
    return transformer


@pytest.fixture(scope="module")
def text_encoder(tokenizer):
    torch.manual_seed(5)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    encoder = CLIPTextModelWithProjection(config).eval().requires_grad_(False)
    encoder.get_input_embeddings().weight.mul_(50)  # fresh ones tell prompts apart by hundredths only
    return encoder


@pytest.fixture(scope="module")
def data(pictures):
    latents = torch.randn(8, 16, 16, 16, generator=torch.Generator().manual_seed(0)).half()
    return LatentSet(pictures.subjects, latents, pictures.masks)


# ---------------------------------------------------------------------------- formulas


def test_the_target_is_the_paths_derivative():
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 3, 2, 4, 4, generator=generator, dtype=torch.float64)
    sigma, h = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64), 1e-4
    slope = (interpolate(x0, noise, sigma + h) - interpolate(x0, noise, sigma - h)) / (2 * h)
    assert (flow_target(x0, noise) - slope).abs().max() < 1e-9


def test_a_step_of_the_stock_scheduler_along_the_target_stays_on_the_path():
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 1, 2, 4, 4, generator=generator)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(5)
    first, second = scheduler.sigmas[1:3]
    x = interpolate(x0, noise, first[None])
    moved = scheduler.step(flow_target(x0, noise), scheduler.timesteps[1], x).prev_sample
    assert (moved - interpolate(x0, noise, second[None])).abs().max() < 1e-6
    assert scheduler.timesteps[1].item() == pytest.approx(1000 * first.item())


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (1.0, 1.2)])
def test_levels_are_logit_normal_one_in_each_share(mean, deviation):
    levels = draw_levels(64, mean, deviation, torch.Generator().manual_seed(0)).double().tolist()
    normal = NormalDist(mean, deviation)
    shares = [64 * normal.cdf(math.log(level / (1 - level))) for level in levels]
    assert all(i - 1e-3 < share < i + 1 + 1e-3 for i, share in enumerate(shares))
    places = [share - i for i, share in enumerate(shares)]
    assert 0.4 < np.mean(places) < 0.6 and 0.2 < np.std(places) < 0.4


def test_the_default_levels_dwell_where_the_picture_is_decided():
    settings = FlowSettings()
    draw = functools.partial(draw_levels, 10_000, generator=torch.Generator().manual_seed(0))
    shares = [
        ((levels > 0.85) & (levels < 0.98)).float().mean().item()
        for levels in (draw(settings.level_mean, settings.level_deviation), draw(0.0, 1.0))
    ]
    assert shares == pytest.approx([0.26, 0.04], abs=0.005)


def test_numbers_of_zero_columns_are_uniform_in_the_logarithm():
    logs = draw_zero_columns(20_000, torch.Generator().manual_seed(0))
    for number in (1, 2, 16, 100, 256):
        share = (logs.exp() <= number).float().mean().item()
        assert share == pytest.approx(math.log2(number) / 8, abs=0.02)


def test_every_epoch_takes_every_picture_once_in_its_own_order():
    places = [i for step in range(15) for i in picture_order(step, 4, 20, seed=1)]
    epochs = [places[i : i + 20] for i in (0, 20, 40)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(20))
    assert picture_order(0, 20, 20, seed=2) != epochs[0] == picture_order(0, 20, 20, seed=1)


def _naive_map(q, k, words):
    """(Q, K) of one picture: heads, queries and words in loops."""
    heads, cells, width = q.shape
    out = np.zeros((cells, k.shape[1]))
    for h in range(heads):
        for i in range(cells):
            scores = {
                j: sum(float(q[h, i, c]) * float(k[h, j, c]) for c in range(width)) / math.sqrt(width)
                for j in range(k.shape[1])
                if words[j]
            }
            total = sum(math.exp(s) for s in scores.values())
            for j, score in scores.items():
                out[i, j] += math.exp(score) / total / heads
    return out


def test_a_words_map_is_its_share_of_the_words_scores():
    generator = torch.Generator().manual_seed(0)
    q, k = 2 * torch.randn(2, 3, 4, 4, generator=generator), torch.randn(2, 3, 5, 4, generator=generator)
    words = torch.tensor([[False, True, True, True, False], [False, True, False, True, True]])
    got = word_maps(q, k, words)
    for b in range(2):
        assert abs(got[b].double().numpy() - _naive_map(q[b], k[b], words[b].tolist())).max() < 1e-6
    nothing = word_maps(q, k, torch.zeros(2, 5, dtype=torch.bool))
    assert (nothing - 0.2).abs().max() < 1e-6


@pytest.mark.parametrize("number", [1, 3, 256])
def test_one_weighted_column_is_as_many_equal_ones(number):
    torch.manual_seed(1)
    transformer = small_transformer().eval()
    x, text, pooled = torch.randn(2, 16, 16, 16), torch.randn(2, 6, 64), torch.randn(2, 64)
    time = torch.tensor([200.0, 950.0])
    text[:, -1] = 0
    with torch.no_grad():
        repeated = torch.cat([text, text[:, -1:].expand(2, number - 1, 64)], 1)
        expected = transformer(x, repeated, pooled, time).sample
        transformer.set_attn_processor(GroundedJointProcessor())
        weight = torch.full((2,), math.log(number))
        got = transformer(x, text, pooled, time, joint_attention_kwargs={"last_column_weight": weight}).sample
        plain = transformer(x, text, pooled, time).sample
    assert (got - expected).abs().max() < 1e-5
    assert number == 1 or (plain - expected).abs().max() > 1e-3


# ---------------------------------------------------------------------------- training


@pytest.fixture
def train(data, text_encoder, tokenizer, monkeypatch):
    """Three steps of two pictures, in full precision."""
    monkeypatch.setattr(flow_training, "build_transformer", small_transformer)
    usual = FlowSettings(num_steps=3, batch_size=2, mixed_precision=False)

    def run(folder, *, stop_at=None, **more):
        return train_flow(data, text_encoder, tokenizer, folder, replace(usual, **more), stop_at=stop_at)

    return run


def _log(folder):
    return [json.loads(line) for line in (folder / "flow.jsonl").read_text().splitlines()]


def _state(folder):
    return torch.load(folder / "flow.ckpt", weights_only=True)


def _heads(x):
    return x.unflatten(-1, (2, 16)).transpose(1, 2)


def _normalised(x, norm):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight


def test_the_first_step_is_the_loss_of_its_formulas(train, data, text_encoder, tokenizer, tmp_path):
    train(tmp_path, stop_at=1, batch_size=5, drop_caption=0.4, grounding_weight=10.0)
    rng, generator = random.Random("0-0"), torch.Generator().manual_seed(0)
    index = picture_order(0, 5, 8, seed=0)
    captions = [None if rng.random() < 0.4 else describe(data.subjects[i], rng) for i in index]
    assert any(captions) and None in captions
    noise = torch.randn(5, 16, 16, 16, generator=generator).double()
    sigma = draw_levels(5, 1.0, 1.2, generator).double()
    numbers = draw_zero_columns(5, generator).double()
    texts = ["" if caption is None else caption.text for caption in captions]
    ids = torch.tensor(tokenizer(texts, padding="max_length").input_ids)
    columns, pooled = encode_captions(text_encoder, ids)

    torch.manual_seed(0)
    transformer = small_transformer().double()
    words = (ids != tokenizer.bos_token_id) & (ids != tokenizer.eos_token_id)
    maps = {}

    def keep(layer, attn, kwargs):
        q = _normalised(_heads(attn.to_q(kwargs["hidden_states"])), attn.norm_q)
        k = _normalised(_heads(attn.add_k_proj(kwargs["encoder_hidden_states"])), attn.norm_added_k)
        scores = q @ k[:, :, :-1].mT / 4
        maps[layer] = scores.masked_fill(~words[:, None, None], -1e9).softmax(-1).mean(1)

    for i, block in enumerate(transformer.transformer_blocks):
        block.attn.register_forward_pre_hook(
            lambda attn, _, kwargs, i=i: keep(i, attn, kwargs) if i in (1, 2, 3, 4) else None, with_kwargs=True
        )
    transformer.set_attn_processor(GroundedJointProcessor())
    x0 = data.latents[index].double()
    level = sigma.view(5, 1, 1, 1)
    predicted = transformer(
        (1 - level) * x0 + level * noise,
        columns.double(),
        pooled.double(),
        1000 * sigma,
        joint_attention_kwargs={"last_column_weight": numbers},
    ).sample
    flow = (predicted - (noise - x0)).square().mean()
    parts = [[-1] * 48 if c is None else tokenize_with_parts(tokenizer, c)[1] for c in captions]
    masks = torch.from_numpy(data.masks[index]).double() / 255
    grounding = grounding_loss([maps[i] for i in (1, 2, 3, 4)], torch.tensor(parts), masks)
    assert GROUNDED_LAYERS == (1, 2, 3, 4)

    record = _log(tmp_path)[0]
    assert record["flow"] == pytest.approx(flow.item(), rel=1e-4)
    assert record["grounding"] == pytest.approx(grounding.item(), rel=1e-4)

    parameters = list(transformer.parameters())
    gradients = torch.autograd.grad(flow + 10 * grounding, parameters, allow_unused=True)
    moments = _state(tmp_path)["optimizer"]["state"]
    used = [i for i, g in enumerate(gradients) if g is not None]
    wanted = torch.cat([gradients[i].flatten() for i in used])
    # a tenth of the gradient, which is clipped to norm 1
    assert wanted.norm() > 1
    wanted = wanted / wanted.norm() / 10
    got = torch.cat([moments[i]["exp_avg"].flatten() for i in used])
    assert (got - wanted).norm() < 1e-3 * wanted.norm()


def test_without_grounding_the_maps_are_not_taught(train, tmp_path):
    train(tmp_path / "with", stop_at=1)
    train(tmp_path / "without", stop_at=1, grounding_weight=0.0)
    taught, free = _log(tmp_path / "with")[0], _log(tmp_path / "without")[0]
    assert taught["flow"] == pytest.approx(free["flow"], rel=1e-6)
    assert taught["grounding"] > 0.1 and free["grounding"] == 0
    moments = [_state(tmp_path / f)["optimizer"]["state"] for f in ("with", "without")]
    assert any(not torch.equal(moments[0][i]["exp_avg"], m["exp_avg"]) for i, m in moments[1].items())


def test_a_batch_of_empty_captions_is_trained_on(train, tmp_path):
    train(tmp_path, stop_at=1, drop_caption=1.0)
    record = _log(tmp_path)[0]
    assert record["grounding"] == 0 and 0.1 < record["flow"] < 10


def test_going_on_gives_the_same_as_going_through(train, tmp_path):
    whole = train(tmp_path / "whole")
    train(tmp_path / "parts", stop_at=1)
    parts = train(tmp_path / "parts")
    torch.testing.assert_close(whole.state_dict(), parts.state_dict(), rtol=0, atol=0)
    states = [_state(tmp_path / f) for f in ("whole", "parts")]
    for part in ("transformer", "average", "optimizer", "step", "settings"):
        torch.testing.assert_close(states[0][part], states[1][part], rtol=0, atol=0)
    # what is returned is the average, with diffusers' own attention
    for returned, average in zip(whole.parameters(), states[0]["average"]["shadow_params"], strict=True):
        assert torch.equal(returned, average)
    assert {type(p) for p in whole.attn_processors.values()} == {JointAttnProcessor2_0}
    assert not whole.training


def test_the_average_forgets_its_youth(train, tmp_path):
    averages, weights = [], []
    for stop in (1, 2, 3):
        train(tmp_path, stop_at=stop, learning_rate=0.3)  # of which the warm-up leaves little
        state = _state(tmp_path)
        averages.append([p.clone() for p in state["average"]["shadow_params"]])
        weights.append(list(state["transformer"][n] for n, _ in small_transformer().named_parameters()))
    kept = 0.0
    for i in range(3):  # 1 - (1 + n)^(-3/4), from nothing at first
        kept = 1 - (1 + i) ** -0.75
        for before, after, new in zip(averages[max(i - 1, 0)], averages[i], weights[i], strict=True):
            assert (after - (kept * before + (1 - kept) * new)).abs().max() < 1e-6
    assert kept > 0.5
    assert any((a - w).abs().max() > 1e-4 for a, w in zip(averages[2], weights[2], strict=True))


def test_more_steps_are_no_other_way_but_other_settings_are(train, tmp_path):
    train(tmp_path, num_steps=1)
    train(tmp_path, num_steps=2)
    assert _state(tmp_path)["step"] == 2
    with pytest.raises(ValueError, match=r"flow\.ckpt was trained with .*'grounding_weight': 0\.1.* choose another"):
        train(tmp_path, grounding_weight=0.0)


def test_half_products_learn_too(train, tmp_path):
    train(tmp_path / "half", stop_at=1, mixed_precision=True)
    train(tmp_path / "full", stop_at=1)
    half, full = _log(tmp_path / "half")[0], _log(tmp_path / "full")[0]
    assert half["flow"] == pytest.approx(full["flow"], rel=0.02) and half["flow"] != full["flow"]
    assert all(w.dtype == torch.float32 for w in _state(tmp_path / "half")["transformer"].values())
