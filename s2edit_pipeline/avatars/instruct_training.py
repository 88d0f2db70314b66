"""InstructPix2Pix (Brooks et al. 2023) of the avatars family, trained on true pairs of pictures.

Its U-Net takes the picture to be edited as further channels beside the noisy latents. It starts from the embedded U-Net
with weights of zero on these channels, and goes on by the denoiser's own recipe, the text encoder frozen as published.

An instruction is the caption of the result. The text encoder has read captions alone: "make", "remove" or "change" are
no words of its vocabulary, but fall into letters.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm

from ..identity_folder import atomic_folder
from . import MODEL_FOLDER
from .autoencoder_training import LinearCode, fit_linear_code, to_tensor
from .captions import Caption, describe
from .creatures import Creature, has_unseen_pair
from .dataset import load_pictures
from .denoiser_training import denoising_loss, stratified_timesteps
from .people import Person
from .recipe import export_model
from .training import Checkpoint, Log, WeightAverage, learning_rate_factor
from .world import Subject, render_array, sample

DROP_RATE = 0.05
"""Share of the examples without their text, as many without their picture, and as many without either."""
_CHUNK = 250  # pairs drawn and encoded at a time
_WORN = ("glasses", "facial_hair", "headwear", "pattern")


@dataclass(frozen=True)
class EditPairs:
    """``subjects[i]`` and what an edit made of it, ``targets[i]``; latents of their pictures, (N, C, h, w) float16."""

    subjects: list[Subject]
    targets: list[Subject]
    source_latents: torch.Tensor
    target_latents: torch.Tensor


@dataclass(frozen=True)
class InstructSettings:
    """How to train.

    Args:
        num_steps: in all. The learning rate falls from the end of the warm-up on, see ``learning_rate_factor``.
        seed: of the pairs too, see :func:`load_pairs`.
    """

    num_steps: int = 1600
    batch_size: int = 8
    learning_rate: float = 4e-4
    seed: int = 0


# ---------------------------------------------------------------------------- edits and their instructions


def sample_edit(subject: Subject, donors: Sequence[Subject], rng: random.Random) -> Subject:
    """``subject`` with one named attribute changed, or two in three cases of ten.

    New values are those of one of ``donors``, training subjects of the same kind, so that nobody gets what nobody of
    their noun has in training. Nothing that the picture hides is uncovered, and no unseen pair of words comes about.
    """
    while True:
        donor = rng.choice(donors)
        if isinstance(subject, Person) and donor.noun != subject.noun:
            continue
        names = rng.sample(list(subject.ATTRIBUTES), 2 if rng.random() < 0.3 else 1)
        target = subject.edited(**{name: getattr(donor, name) for name in names})
        changes = all(target.shows(name) and getattr(target, name) != getattr(subject, name) for name in names)
        unseen = isinstance(target, Creature) and has_unseen_pair(target)
        if changes and not unseen and not _uncovers(subject, target):
            return target


def _uncovers(subject: Subject, target: Subject) -> bool:
    """Whether ``target`` shows a cut or a colour of hair that ``subject`` hides under its headwear."""
    if not (isinstance(subject, Person) and isinstance(target, Person)) or subject.hair_visible:
        return False
    return target.hair_visible or subject.facial_hair == "none" != target.facial_hair


def instruct(subject: Subject, target: Subject, rng: random.Random) -> Caption:
    """A caption of ``target`` that says all in which it differs from ``subject``, and all that is worn; of the rest
    some is left out at random, which is then to be taken from the picture."""
    needed = {
        name
        for name in target.ATTRIBUTES
        if target.shows(name)
        and (name in _WORN or not subject.shows(name) or getattr(target, name) != getattr(subject, name))
    }
    while True:
        caption = describe(target, rng)
        if needed <= caption.said.keys():
            return caption


def load_pairs(num_people: int, num_creatures: int, vae: AutoencoderKL, cache: Path, seed: int = 0) -> EditPairs:
    """One edit of each of the first training people and creatures; pictures drawn and encoded once, to ``cache``.

    Raises:
        ValueError: ``vae`` isn't the recipe's, whose encoder is the linear code of the first training people.
    """
    subjects = [sample(kind, i) for kind, n in (("person", num_people), ("creature", num_creatures)) for i in range(n)]
    kinds = {Person: subjects[:num_people], Creature: subjects[num_people:]}
    rngs = [random.Random(f"edit-{seed}-{i}") for i in range(len(subjects))]
    targets = [sample_edit(subject, kinds[type(subject)], rng) for subject, rng in zip(subjects, rngs, strict=True)]
    file = cache / f"pairs-{num_people}-{num_creatures}-{seed}.safetensors"
    if not file.exists():
        code = _code_of(vae, load_pictures(min(2000, num_people), cache=cache).images)
        latents = {"source": _draw_latents(subjects, code), "target": _draw_latents(targets, code)}
        save_file(latents, file)
    latents = load_file(file)
    return EditPairs(subjects, targets, latents["source"], latents["target"])


@torch.no_grad()
def _code_of(vae: AutoencoderKL, images: np.ndarray) -> LinearCode:
    """The linear code that ``vae``'s encoder is: a matrix product instead of a network."""
    code = fit_linear_code(images)
    wanted = vae.encode(to_tensor(images[:4])).latent_dist.mode()
    error = (code.encode(to_tensor(images[:4])) - wanted).square().mean().sqrt() / wanted.std()
    if error > 0.02:
        raise ValueError(
            f"The model's encoder is {float(error):.0%} off the linear code of these {len(images)} pictures: it was "
            "not made by train-avatars, or of fewer people. Give the model's own number of people, at least 2,000."
        )
    return code


def _draw_latents(subjects: Sequence[Subject], code: LinearCode) -> torch.Tensor:
    chunks = []
    for i in tqdm(range(0, len(subjects), _CHUNK), desc="drawing pairs"):
        images = np.stack([render_array(subject) for subject in subjects[i : i + _CHUNK]])
        chunks.append(code.encode(to_tensor(images)).half().contiguous())
    return torch.cat(chunks)


# ---------------------------------------------------------------------------- the model


def widen_unet(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """``unet`` with as many input channels again, for the picture to be edited, whose weights are zero."""
    channels = unet.config.in_channels
    wide = UNet2DConditionModel.from_config({**unet.config, "in_channels": 2 * channels})
    state = unet.state_dict()
    first = state["conv_in.weight"]
    wide.load_state_dict({**state, "conv_in.weight": torch.cat([first, torch.zeros_like(first)], 1)})
    return wide


def dropped(u: torch.Tensor, rate: float = DROP_RATE) -> tuple[torch.Tensor, torch.Tensor]:
    """Whose text and whose picture is left out, bool like ``u``, which is uniform in [0, 1): the first ``rate`` have no
    text, the next neither, the next no picture."""
    return u < 2 * rate, (u >= rate) & (u < 3 * rate)


def train_instruct(
    folder: str | Path,
    *,
    model: str | Path = MODEL_FOLDER,
    num_people: int = 8000,
    num_creatures: int = 6000,
    settings: InstructSettings | None = None,
    device: str | None = None,
    stop_at: int | None = None,
) -> Path:
    """Train from ``model``, or go on from ``folder/instruct.ckpt``.

    The loss is :func:`denoiser_training.denoising_loss` of the edited picture, given the picture before and the
    instruction, either or both left out at ``DROP_RATE``.

    Args:
        model: a diffusers folder that the avatars' recipe wrote.
        num_people: training people, each edited once.
        num_creatures: training creatures beside them.
        settings: None takes the defaults.
        device: None takes a CUDA device where there is one.
        stop_at: leave at this step, checkpoint written, to go on later.

    Returns:
        ``folder/model``, rewritten with each checkpoint: a diffusers folder of averaged weights in float16, for
        ``StableDiffusionInstructPix2PixPipeline.from_pretrained``.

    Raises:
        ValueError: ``model``'s autoencoder isn't the recipe's.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = settings or InstructSettings()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    parts = StableDiffusionPipeline.from_pretrained(str(model)).components
    tokenizer, scheduler = parts["tokenizer"], parts["scheduler"]
    pairs = load_pairs(num_people, num_creatures, parts["vae"], folder, settings.seed)
    text_encoder: nn.Module = parts["text_encoder"].to(device).eval().requires_grad_(False)
    unet = widen_unet(parts["unet"]).to(device)
    parameters = list(unet.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=1e-2)
    average = WeightAverage(parameters, 0.998)
    checkpoint, log = Checkpoint(folder / "instruct.ckpt"), Log(folder / "instruct.jsonl")
    first, spent, running = 0, 0.0, None
    if state := checkpoint.load():
        unet.load_state_dict(state["unet"])
        optimizer.load_state_dict(state["optimizer"])
        average.load_state_dict(state["average"])
        first, spent, running = state["step"], state["seconds"], state["running"]
    start = time.time() - spent

    def save(step: int) -> None:
        checkpoint.save(
            {
                "unet": unet.state_dict(),
                "optimizer": optimizer.state_dict(),
                "average": average.state_dict(),
                "step": step,
                "seconds": time.time() - start,
                "running": running,
            }
        )
        average.swap()
        others = {name: parts[name] for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
        with atomic_folder((folder / "model").absolute()) as target:  # somebody may be reading the last one
            export_model(target, unet=unet, pipeline_class=StableDiffusionInstructPix2PixPipeline, **others)
        average.swap()

    last = settings.num_steps if stop_at is None else min(stop_at, settings.num_steps)
    bar = tqdm(range(first, last), initial=first, total=settings.num_steps, desc="instruct", mininterval=10)
    for step in bar:
        rng = random.Random(f"{settings.seed}-{step}")
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        index = [rng.randrange(len(pairs.subjects)) for _ in range(settings.batch_size)]
        no_text, no_picture = dropped(torch.rand(len(index), generator=generator))
        instructions = [
            "" if bare else instruct(pairs.subjects[i], pairs.targets[i], rng).text
            for i, bare in zip(index, no_text.tolist(), strict=True)
        ]
        ids = tokenizer(instructions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        x0, picture = (z[index].float().to(device) for z in (pairs.target_latents, pairs.source_latents))
        picture = picture * ~no_picture.to(device)[:, None, None, None]
        noise = torch.randn(x0.shape, generator=generator).to(device)
        t = stratified_timesteps(len(index), scheduler.config.num_train_timesteps, generator).to(device)
        with torch.no_grad():
            context = text_encoder(ids.to(device)).last_hidden_state
        predicted = unet(torch.cat([scheduler.add_noise(x0, noise, t), picture], 1), t, context).sample
        loss = denoising_loss(predicted, x0, noise, t, scheduler)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * learning_rate_factor(step, settings.num_steps, 50)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update()
        running = loss.item() if running is None else 0.97 * running + 0.03 * loss.item()
        if step % 10 == 0:
            bar.set_postfix({"loss": f"{running:.4f}"}, refresh=False)
            log.write(step=step, seconds=time.time() - start, loss=running)
        if checkpoint.due or step == last - 1:
            save(step + 1)
    return folder / "model"
