"""The whole recipe of the embedded models: pictures, the training stages, the diffusers folders.

All stages write checkpoints and go on from them. The autoencoder's and the U-Net's don't wait for each other: the
encoder is a linear code of the pictures, known before any training. The flow transformer comes later: it takes over
the autoencoder and the text encoder of a finished U-Net model.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from . import autoencoder_training, denoiser_training
from .autoencoder_training import (
    AutoencoderSettings,
    build_autoencoder,
    fit_linear_code,
    to_tensor,
    train_autoencoder,
)
from .captions import vocabulary
from .dataset import PictureSet, load_pictures
from .denoiser_training import (
    SAMPLE_PROMPTS,
    DenoiserSettings,
    build_scheduler,
    build_text_encoder,
    build_unet,
    train_denoiser,
)
from .flow_model import build_flow_scheduler, build_transformer, save_flow_folder, shared_parts
from .flow_training import FlowSettings, train_flow
from .latent_dataset import LatentSet, load_latents
from .tokenizer import save_tokenizer
from .training import Checkpoint

STAGES = ("autoencoder", "denoiser")
AUTOENCODER, DENOISER = AutoencoderSettings(num_steps=2400), DenoiserSettings(num_steps=3800)
"""How the stages are trained where nothing else is given."""
_VALIDATION_FIRST, _VALIDATION_COUNT = 100_000, 60
_CHUNK = 500  # pictures encoded at a time: as floats they are four times as large


def train_avatars(
    folder: str | Path,
    *,
    num_pictures: int = 16000,
    num_creatures: int = 12000,
    autoencoder: AutoencoderSettings = AUTOENCODER,
    denoiser: DenoiserSettings = DENOISER,
    start_from: str | Path | None = None,
    device: str | None = None,
    stages: Iterable[str] = STAGES,
) -> Path | None:
    """Train the embedded model in ``folder``, from nothing or from the checkpoints that lie there.

    The pictures are drawn once, to ``folder/pictures`` (50 kB each), and so is the tokenizer. With both
    stages' checkpoints in ``folder``, the model is written to ``folder/model``.

    Args:
        num_pictures: training people; the linear code is fitted to the first 2,000 pictures.
        num_creatures: training creatures beside them.
        autoencoder: how to train that stage.
        denoiser: how to train the other.
        start_from: a diffusers folder that this recipe wrote, whose weights and tokenizer to start from instead of
            nothing. The learning rates are then half as high as the settings'.
        device: None takes a CUDA device where there is one.
        stages: some of "autoencoder", "denoiser". Each is trained by itself, so that two processes
            can share the work.

    Returns:
        ``folder/model``, or None while the other stage's checkpoint is missing.

    Raises:
        ValueError: a stage of another name.
        FileNotFoundError: a denoiser's checkpoint without the tokenizer it was trained with.
    """
    stages = tuple(stages)
    if unknown := sorted(set(stages) - set(STAGES)):
        raise ValueError(f"stages are {', '.join(STAGES)}, not {', '.join(unknown)}.")
    folder = Path(folder)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    cache, masks = folder / "pictures", "denoiser" in stages
    pictures = _both_kinds(num_pictures, num_creatures, masks=masks, cache=cache)
    base, rate_factor = (None, 1.0) if start_from is None else (Path(start_from), 0.5)
    if "autoencoder" in stages:
        creatures = _VALIDATION_COUNT if num_creatures else 0
        train_autoencoder(
            pictures,
            _both_kinds(_VALIDATION_COUNT, creatures, split="held_out", first=_VALIDATION_FIRST, cache=cache),
            folder,
            replace(autoencoder, learning_rate=rate_factor * autoencoder.learning_rate),
            start_from=None if base is None else base / "vae",
            device=device,
        )
    if "denoiser" in stages:
        code = fit_linear_code(pictures.images[:2000])
        chunks = [pictures.images[i : i + _CHUNK] for i in range(0, len(pictures.images), _CHUNK)]
        latents = torch.cat([code.encode(to_tensor(chunk)) for chunk in chunks])

        def decode(z: torch.Tensor) -> np.ndarray:
            pixels = code.decode(z.cpu()).clamp(-1, 1).add(1).mul(127.5).round().byte()
            return pixels.permute(0, 2, 3, 1).numpy()

        if not any((folder / name).exists() for name in ("tokenizer", "denoiser.ckpt")):
            if base is None:
                save_tokenizer(folder / "tokenizer")
            else:
                shutil.copytree(base / "tokenizer", folder / "tokenizer")
        assert pictures.masks is not None
        train_denoiser(
            LatentSet(pictures.subjects, latents, pictures.masks),
            _tokenizer(folder),
            decode,
            folder,
            replace(denoiser, learning_rate=rate_factor * denoiser.learning_rate),
            start_from=base,
            device=device,
        )
    if not all((folder / f"{stage}.ckpt").exists() for stage in STAGES):
        return None
    export_checkpoint(folder, folder / "model")
    return folder / "model"


def train_flow_avatars(
    folder: str | Path,
    model: str | Path,
    *,
    num_pictures: int = 9000,
    num_creatures: int = 6000,
    settings: FlowSettings | None = None,
    device: str | None = None,
) -> Path:
    """Train the flow transformer in ``folder``, from nothing or from the checkpoint that lies there.

    The pictures are drawn and encoded once, to ``folder/latents``.

    Args:
        model: a diffusers folder that :func:`train_avatars` wrote, whose autoencoder and text encoder to take over.
        num_pictures: training people of the split "varied", in files of 500.
        num_creatures: training creatures beside them.
        settings: None takes the defaults.
        device: None takes a CUDA device where there is one.

    Returns:
        ``folder/model``, which ``StableDiffusion3Pipeline.from_pretrained(..., **shared_parts(model))`` loads.

    Raises:
        ValueError: numbers that don't fill files, or a checkpoint that was trained with other settings.
    """
    folder = Path(folder)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    shared = shared_parts(model)
    vae = shared["vae"].to(device)
    data = load_latents(vae, num_pictures, folder / "latents")
    if num_creatures:
        data += load_latents(vae, num_creatures, folder / "latents", kind="creature")
    transformer = train_flow(
        data, shared["text_encoder"], shared["tokenizer"], folder, settings or FlowSettings(), device=device
    )
    save_flow_folder(transformer.cpu(), folder / "model")
    return folder / "model"


def load_flow_checkpoint(folder: str | Path) -> SD3Transformer2DModel:
    """The flow transformer as trained so far in ``folder``, with averaged weights, in float32 and eval mode.

    Raises:
        FileNotFoundError: the training has written no checkpoint yet.
    """
    state = Checkpoint(Path(folder) / "flow.ckpt").load()
    if state is None:
        raise FileNotFoundError(f"{folder} holds no flow.ckpt; run train_flow_avatars({str(folder)!r}, ...) first.")
    weights = state["transformer"]
    channels, width = weights["proj_out.weight"].shape[0], weights["context_embedder.weight"].shape[1] // 2
    transformer = build_transformer(channels, width, round(weights["pos_embed.pos_embed"].shape[1] ** 0.5))
    transformer.load_state_dict(weights)
    for parameter, average in zip(transformer.parameters(), state["average"]["shadow_params"], strict=True):
        parameter.data.copy_(average)
    return transformer.eval()


def export_flow(run: str | Path, folder: str | Path) -> None:
    """Write the flow transformer as trained so far in ``run`` to ``folder``, see ``save_flow_folder``.

    Raises:
        FileNotFoundError: the training has written no checkpoint yet.
    """
    save_flow_folder(load_flow_checkpoint(run), folder)


def draw_flow_sheet(
    run: str | Path,
    model: str | Path,
    file: str | Path,
    *,
    prompts: Sequence[str] = SAMPLE_PROMPTS,
    num_inference_steps: int = 28,
    guidance_scale: float = 4.5,
    device: str | None = None,
) -> None:
    """Draw ``prompts`` with ``StableDiffusion3Pipeline``, eight a row, by the transformer as trained so far in ``run``.

    Args:
        model: the folder whose autoencoder and text encoder the training shares.
        file: a picture file.

    Raises:
        FileNotFoundError: the training has written no checkpoint yet.
    """
    pipeline = StableDiffusion3Pipeline(
        transformer=load_flow_checkpoint(run), scheduler=build_flow_scheduler(), **shared_parts(model)
    ).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    drawn = pipeline(
        list(prompts),
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(0),
        max_sequence_length=1,
        output_type="np",
    ).images
    blank = [np.ones_like(drawn[0])] * (-len(drawn) % 8)
    pictures = [*drawn, *blank] if len(drawn) > 8 else list(drawn)
    rows = [np.concatenate(pictures[i : i + 8], 1) for i in range(0, len(pictures), 8)]
    Image.fromarray((255 * np.concatenate(rows)).round().astype(np.uint8)).save(file)


def _both_kinds(people: int, creatures: int, **settings: Any) -> PictureSet:
    """People, and creatures behind them if there are any; ``settings`` as ``load_pictures`` takes them."""
    pictures = load_pictures(people, **settings)
    return pictures + load_pictures(creatures, kind="creature", **settings) if creatures else pictures


def _tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer kept in ``folder``; never another, since the weights know words by their numbers."""
    kept = folder / "tokenizer"
    if not kept.exists():
        raise FileNotFoundError(
            f"{kept} is missing; put there the tokenizer that {folder / 'denoiser.ckpt'} was trained with."
        )
    return CLIPTokenizer.from_pretrained(str(kept))


def load_checkpoints(folder: str | Path) -> dict[str, Any]:
    """The model as trained so far in ``folder``, with averaged weights, in float32 and eval mode.

    Returns:
        "vae", "text_encoder", "tokenizer", "unet" and "scheduler".

    Raises:
        FileNotFoundError: a stage has written no checkpoint yet, or the tokenizer is missing.
    """
    folder = Path(folder)
    states = {}
    for stage in STAGES:
        state = Checkpoint(folder / f"{stage}.ckpt").load()
        if state is None:
            raise FileNotFoundError(
                f"{folder} holds no {stage}.ckpt; run train_avatars({str(folder)!r}, stages=[{stage!r}]) first."
            )
        states[stage] = state

    vae = build_autoencoder()
    vae.load_state_dict(states["autoencoder"]["model"])
    _copy_average(autoencoder_training.trained_parameters(vae), states["autoencoder"]["average"])

    tokenizer = _tokenizer(folder)
    text_encoder = build_text_encoder(tokenizer)
    text_encoder.load_state_dict(states["denoiser"]["text_encoder"])
    unet = build_unet(vae.config.latent_channels, text_encoder.config.hidden_size)
    unet.load_state_dict(states["denoiser"]["unet"])
    _copy_average(denoiser_training.trained_parameters(unet, text_encoder), states["denoiser"]["average"])
    return {
        "vae": vae.eval(),
        "text_encoder": text_encoder.eval(),
        "tokenizer": tokenizer,
        "unet": unet.eval(),
        "scheduler": build_scheduler(),
    }


@torch.no_grad()
def _copy_average(parameters: list[torch.nn.Parameter], state: dict[str, Any]) -> None:
    for parameter, average in zip(parameters, state["average"], strict=True):
        parameter.copy_(average)


OPTIONS: Mapping[str, Any] = {"default_guidance_scale": 2.0, "vocabulary": "\n".join(vocabulary())}
"""What the model's folder says to ``S2EditPipeline`` alone, see ``pipeline_components.PipelineComponents``."""


def export_model(
    out: str | Path,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
    pipeline_class: type[StableDiffusionPipeline] = StableDiffusionPipeline,
) -> None:
    """Write a standard diffusers folder, weights as float16 safetensors; the arguments stay as they are.

    It loads with ``pipeline_class.from_pretrained(out)``, in float32 unless told otherwise.
    """
    out = Path(out)
    halves = {
        name: copy.deepcopy(m).half() for name, m in (("vae", vae), ("text_encoder", text_encoder), ("unet", unet))
    }
    pipeline = pipeline_class(
        **halves,
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(str(out), safe_serialization=True)
    index_file = out / "model_index.json"
    index = {**json.loads(index_file.read_text("utf-8")), **{f"_{name}": value for name, value in OPTIONS.items()}}
    index_file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")
    # transformers takes the saved dtype for the wanted one, diffusers float32: without this the two would not fit
    config_file = out / "text_encoder" / "config.json"
    config = json.loads(config_file.read_text("utf-8"))
    for key in {"dtype", "torch_dtype"} & config.keys():
        config[key] = "float32"
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    # transformers 4 knows the weights by their old names alone, and CLIP's tokenizer by its two old files;
    # transformers 5 reads both
    weights_file = out / "text_encoder" / "model.safetensors"
    weights = {f"text_model.{name.removeprefix('text_model.')}": w for name, w in load_file(weights_file).items()}
    save_file(weights, weights_file, metadata={"format": "pt"})
    tokenizer.backend_tokenizer.model.save(str(out / "tokenizer"))


def export_checkpoint(folder: str | Path, out: str | Path) -> None:
    """Write the model as trained so far in ``folder`` to the diffusers folder ``out``.

    Raises:
        FileNotFoundError: a stage has written no checkpoint yet, or the tokenizer is missing.
    """
    export_model(out, **load_checkpoints(folder))
