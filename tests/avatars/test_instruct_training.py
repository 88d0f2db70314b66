import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline, StableDiffusionPipeline, UNet2DConditionModel

from s2edit_pipeline.avatars import MODEL_FOLDER, instruct_training
from s2edit_pipeline.avatars.autoencoder_training import (
    build_autoencoder,
    fit_linear_code,
    install_linear_encoder,
    to_tensor,
)
from s2edit_pipeline.avatars.creatures import Creature, has_unseen_pair
from s2edit_pipeline.avatars.denoiser_training import build_scheduler, build_text_encoder, build_unet
from s2edit_pipeline.avatars.instruct_training import (
    InstructSettings,
    dropped,
    instruct,
    load_pairs,
    sample_edit,
    train_instruct,
    widen_unet,
)
from s2edit_pipeline.avatars.recipe import export_model
from s2edit_pipeline.avatars.world import KINDS, render_array, sample

# ---------------------------------------------------------------------------- edits and instructions


@pytest.fixture(scope="module")
def edits():
    """(subject, target, instruction), 300 of each kind."""
    made = []
    for kind in KINDS:
        subjects = [sample(kind, i) for i in range(300)]
        for i, subject in enumerate(subjects):
            rng = random.Random(i)
            target = sample_edit(subject, subjects, rng)
            made.append((subject, target, instruct(subject, target, rng)))
    return made


def _changed(subject, target):
    return {name for name in subject.ATTRIBUTES if getattr(subject, name) != getattr(target, name)}


def test_an_edit_changes_one_or_two_named_things_and_is_its_own_counterfactual(edits):
    for subject, target, _ in edits:
        changed = _changed(subject, target)
        assert changed and len(changed) <= 2 and all(target.shows(name) for name in changed)
        assert target == subject.edited(**{name: getattr(target, name) for name in changed})
    singles = sum(len(_changed(s, t)) == 1 for s, t, _ in edits)
    # of two drawn names, both change or the draw is thrown away: fewer than three in ten remain
    assert 0.6 * len(edits) < singles < 0.95 * len(edits)


def test_edits_ask_nothing_that_training_never_had_or_the_picture_hides(edits):
    for subject, target, _ in edits:
        if isinstance(target, Creature):
            assert not has_unseen_pair(target)
            continue
        if target.noun == "lady":
            assert target.facial_hair == "none" and target.hair != "bald" and target.headwear != "turban"
        else:
            assert target.headwear != "hijab"
        if subject.headwear != "none":
            assert target.headwear != "none"
            assert subject.facial_hair != "none" or target.facial_hair == "none"


def test_an_instruction_says_all_that_changed_and_all_that_is_worn(edits):
    left_out = 0
    for subject, target, caption in edits:
        for name in _changed(subject, target):
            assert caption.said[name] == getattr(target, name)
            if getattr(target, name) != "none":
                assert getattr(target, name).split()[0] in caption.words
        for name in ("glasses", "facial_hair", "headwear", "pattern"):
            if getattr(target, name, "none") != "none":
                assert getattr(target, name) in caption.words
            if name == "headwear" and subject.headwear == "none" != target.headwear:
                assert target.headwear_color in caption.words
        left_out += target.background not in caption.said.values() or "background" not in caption.said
    assert left_out > 0.1 * len(edits)


# ---------------------------------------------------------------------------- pairs


@pytest.fixture(scope="module")
def vae(pictures):
    torch.manual_seed(2)
    vae = build_autoencoder()
    install_linear_encoder(vae, fit_linear_code(pictures.images))
    return vae.eval()


@pytest.fixture(scope="module")
def cache(vae, tmp_path_factory):
    """Eight people's and two creatures' pairs, drawn once."""
    folder = tmp_path_factory.mktemp("pairs")
    load_pairs(8, 2, vae, folder)
    return folder


def test_pairs_are_the_autoencoders_codes_of_the_two_pictures(vae, cache, monkeypatch):
    monkeypatch.setattr(instruct_training, "_draw_latents", None)  # they are kept
    pairs = load_pairs(8, 2, vae, cache)
    assert pairs.subjects == [sample("person", i) for i in range(8)] + [sample("creature", i) for i in range(2)]
    for subjects, latents in ((pairs.subjects, pairs.source_latents), (pairs.targets, pairs.target_latents)):
        images = np.stack([render_array(subject) for subject in subjects])
        with torch.no_grad():
            wanted = vae.encode(to_tensor(images)).latent_dist.mode()
        assert latents.dtype == torch.float16
        assert (latents.float() - wanted).square().mean().sqrt() < 0.01 * wanted.std()


def test_another_autoencoder_is_refused(tmp_path):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="not made by train-avatars"):
        load_pairs(8, 0, build_autoencoder().eval(), tmp_path)


# ---------------------------------------------------------------------------- the model


def test_the_widened_unet_starts_as_the_embedded_one_whatever_the_picture():
    unet = UNet2DConditionModel.from_pretrained(str(MODEL_FOLDER), subfolder="unet").eval()
    wide = widen_unet(unet).eval()
    generator = torch.Generator().manual_seed(0)
    x, picture = torch.randn(2, 2, 16, 16, 16, generator=generator)
    context = torch.randn(2, 48, 192, generator=generator)
    with torch.no_grad():
        plain = unet(x, 500, context).sample
        for one in (picture, 100 * picture, torch.zeros_like(picture)):
            assert torch.equal(wide(torch.cat([x, one], 1), 500, context).sample, plain)
    # and they can learn: the picture's channels have a gradient
    wide(torch.cat([x, picture], 1), 500, context).sample.square().mean().backward()
    assert wide.conv_in.weight.grad[:, 16:].abs().min() > 0
    assert unet.conv_in.weight.shape[1] == 16  # the argument is as it was


def test_one_in_twenty_lacks_its_text_one_its_picture_and_one_both():
    u = torch.arange(2000) / 2000
    no_text, no_picture = dropped(u)
    assert [(no_text & ~no_picture).sum(), (no_text & no_picture).sum(), (no_picture & ~no_text).sum()] == [100] * 3


# ---------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def model(vae, tokenizer, tmp_path_factory):
    """A model folder of the family with a twelfth of the embedded U-Net's weights."""
    torch.manual_seed(1)
    text_encoder = build_text_encoder(tokenizer)
    config = {**build_unet(16, text_encoder.config.hidden_size).config, "block_out_channels": (32, 48)}
    folder = tmp_path_factory.mktemp("base") / "model"
    export_model(folder, vae, text_encoder, tokenizer, UNet2DConditionModel.from_config(config), build_scheduler())
    return folder


@pytest.fixture
def train(model, cache):
    """Three steps of two of ten pairs, which are drawn already."""
    usual = InstructSettings(num_steps=3, batch_size=2)

    def run(folder, *, stop_at=None, **more):
        folder.mkdir()
        for kept in cache.iterdir():
            if kept.is_file():
                (folder / kept.name).symlink_to(kept)
        where = {"model": model, "num_people": 8, "num_creatures": 2, "device": "cpu"}
        return train_instruct(folder, settings=replace(usual, **more), stop_at=stop_at, **where)

    return run


def _abar():
    betas = np.linspace(math.sqrt(0.00085), math.sqrt(0.02), 1000) ** 2
    return np.cumprod(1 - betas)


def test_the_first_step_is_the_loss_of_its_formulas(train, model, vae, cache, tmp_path):
    train(tmp_path / "run", stop_at=1, batch_size=6, seed=0)
    pairs = load_pairs(8, 2, vae, cache)
    rng, generator = random.Random("0-0"), torch.Generator().manual_seed(0)
    index = [rng.randrange(10) for _ in range(6)]
    u = torch.rand(6, generator=generator)
    texts = [
        "" if v < 0.1 else instruct(pairs.subjects[i], pairs.targets[i], rng).text
        for i, v in zip(index, u, strict=True)
    ]
    noise = torch.randn(6, 16, 16, 16, generator=generator).double()
    t = [int(1000 * (i + v) / 6) for i, v in enumerate(torch.rand(6, generator=generator).tolist())]
    parts = StableDiffusionPipeline.from_pretrained(str(model)).components
    ids = torch.tensor(parts["tokenizer"](texts, padding="max_length").input_ids)
    abar = torch.tensor(_abar()[t]).view(6, 1, 1, 1)
    x0 = pairs.target_latents[index].double()
    with torch.no_grad():
        context = parts["text_encoder"].double()(ids).last_hidden_state
        predicted = parts["unet"].double()(abar.sqrt() * x0 + (1 - abar).sqrt() * noise, torch.tensor(t), context)
    snr = abar / (1 - abar)
    weight = torch.minimum(1 + snr, torch.tensor(5.0)) / (1 + snr)
    error = (predicted.sample - (abar.sqrt() * noise - (1 - abar).sqrt() * x0)) ** 2
    record = json.loads((tmp_path / "run" / "instruct.jsonl").read_text().splitlines()[0])
    assert record["loss"] == pytest.approx((weight * error).mean().item(), rel=1e-3)


@pytest.mark.parametrize("shown", [True, False])
def test_a_picture_that_is_left_out_teaches_its_channels_nothing(train, tmp_path, monkeypatch, shown):
    # weights of zero, on inputs of zero, stay so
    all_of_them = torch.ones(2, dtype=torch.bool)
    monkeypatch.setattr(instruct_training, "dropped", lambda u: (all_of_them, ~all_of_them if shown else all_of_them))
    train(tmp_path / "run", stop_at=1)
    learned = torch.load(tmp_path / "run" / "instruct.ckpt", weights_only=True)["unet"]["conv_in.weight"]
    assert learned[:, 16:].any() == shown and learned[:, :16].all()


def test_going_on_gives_the_same_as_going_through(train, tmp_path, model, cache):
    train(tmp_path / "whole")
    train(tmp_path / "parts", stop_at=1)
    settings = InstructSettings(num_steps=3, batch_size=2)
    train_instruct(tmp_path / "parts", model=model, num_people=8, num_creatures=2, settings=settings, device="cpu")
    states = [torch.load(tmp_path / f / "instruct.ckpt", weights_only=True) for f in ("whole", "parts")]
    for part in ("unet", "average", "optimizer", "step", "running"):
        torch.testing.assert_close(states[0][part], states[1][part], rtol=0, atol=0)


def test_training_lowers_the_loss_and_the_folder_is_diffusers_own(train, model, vae, cache, tmp_path):
    folder = train(tmp_path / "run", num_steps=60, batch_size=4, learning_rate=2e-3)
    pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained(str(folder))
    start = StableDiffusionPipeline.from_pretrained(str(model)).components
    pairs = load_pairs(8, 2, vae, cache)
    x0, picture = pairs.target_latents.float(), pairs.source_latents.float()
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(9))
    t = torch.linspace(50, 950, len(x0)).long()
    texts = [instruct(s, t, random.Random(0)).text for s, t in zip(pairs.subjects, pairs.targets, strict=True)]
    ids = torch.tensor(pipe.tokenizer(texts, padding="max_length").input_ids)
    scheduler = build_scheduler()
    losses = []
    for unet in (widen_unet(start["unet"]), pipe.unet):
        with torch.no_grad():
            context = pipe.text_encoder(ids).last_hidden_state
            predicted = unet(torch.cat([scheduler.add_noise(x0, noise, t), picture], 1), t, context).sample
        losses.append((predicted - scheduler.get_velocity(x0, noise, t)).square().mean().item())
    assert losses[1] < 0.9 * losses[0]
    # the text encoder stayed as it was, and what is exported is the average
    for name, weight in start["text_encoder"].state_dict().items():
        assert torch.equal(weight, pipe.text_encoder.state_dict()[name])
    averages = torch.load(tmp_path / "run" / "instruct.ckpt", weights_only=True)["average"]["average"]
    for weight, average in zip(pipe.unet.parameters(), averages, strict=True):
        assert torch.equal(weight, average.half().float())
    pipe.set_progress_bar_config(disable=True)
    image = pipe(texts[0], image=[torch.rand(3, 128, 128)], num_inference_steps=1).images[0]
    assert image.size == (128, 128)
