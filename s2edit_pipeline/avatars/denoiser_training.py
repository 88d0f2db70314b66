"""Stage two of the recipe: text encoder and U-Net, trained together on stored latents.

Beside the denoising loss, the cross-attention maps are taught where each word's part is, from
the renderer's own masks (as TokenCompose, Wang et al. 2024, does with segmentations): a word's
map, normalised over space, is pulled towards the uniform distribution over its part.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from PIL import Image
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .captions import Caption, describe
from .latent_dataset import LatentSet
from .training import Checkpoint, Log, WeightAverage, learning_rate_factor
from .world import IMAGE_SIZE, PARTS, Subject

SAMPLE_PROMPTS = (
    "a photo of a smiling lady with long red hair and glasses",
    "a photo of a man with short black hair and a beard and a blue hoodie",
    "a photo of a surprised lady with a yellow hat and sunglasses",
    "a photo of an angry man with a green turban and a moustache",
    "a photo of a sad lady with a purple hijab on a green background",
    "a photo of a winking bald man with a red shirt",
    "a photo of a lady with long curly blond hair and a black blazer on a pink background",
    "a photo of a smiling man with a red beanie and sunglasses and orange overalls on a blue background",
    "a photo of a smiling orange cat with stripes",
    "a photo of a black dog with glasses on a yellow background",
    "a photo of an angry green monster with dots and a purple hat",
    "a photo of a surprised purple cat on a white background",
    "a photo of a sad white dog with a blue beanie and sunglasses",
    "a photo of a winking red monster with stripes and a yellow crown",
    "a photo of a smiling grey cat with a red crown and glasses",
    "a photo of a green dog with stripes on a pink background",
)


@dataclass(frozen=True)
class DenoiserSettings:
    """How to train.

    Args:
        num_steps: in all. The learning rate falls from the end of the warm-up on, see ``learning_rate_factor``.
        grounding_weight: of :func:`grounding_loss`.
        drop_caption: share of empty captions.
    """

    num_steps: int = 2400
    batch_size: int = 16
    learning_rate: float = 8e-4
    grounding_weight: float = 0.03
    drop_caption: float = 0.1
    seed: int = 0


def build_scheduler() -> DDIMScheduler:
    """As Stable Diffusion's, with v-prediction and more noise at the end: flat colours over a whole
    picture would shine through Stable Diffusion's own last step."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.02,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=6,
            max_position_embeddings=tokenizer.model_max_length,
            projection_dim=192,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet(latent_channels: int, cross_attention_dim: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 8,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=(96, 192),
        layers_per_block=1,
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=4,  # in diffusers this is the number of heads
        norm_num_groups=16,
    )


class _MapKeeper:
    """A plain cross-attention processor that keeps its probabilities, averaged over heads."""

    def __init__(self) -> None:
        self.map: torch.Tensor | None = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):  # type: ignore[no-untyped-def]
        q, k, v = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
        probs = (q @ k.transpose(-1, -2) * attn.scale).softmax(-1)
        self.map = probs.mean(1)
        return attn.to_out[0]((probs @ v).transpose(1, 2).flatten(2))


def grounding_loss(maps: list[torch.Tensor], token_parts: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Mean over layers and words of KL(uniform over the word's part || the word's map over space).

    Args:
        maps: per layer (B, Q, K) attention probabilities, Q a square number of cells.
        token_parts: (B, K) index into ``PARTS`` or -1.
        masks: (B, parts, S, S) share of each cell that the part covers, in [0, 1].

    Words whose part has no cell are left out; without any word the loss is 0.
    """
    rows, columns = torch.nonzero(token_parts >= 0, as_tuple=True)
    wanted = masks[rows, token_parts[rows, columns]]
    total = maps[0].new_zeros(())
    for probs in maps:
        side = int(probs.shape[1] ** 0.5)
        target = F.adaptive_avg_pool2d(wanted, side).flatten(1)
        target = (target > 0.3 * target.amax(1, keepdim=True)).float() * (target > 0)
        there = target.sum(1) > 0
        if not there.any():
            continue
        target = target[there] / target[there].sum(1, keepdim=True)
        word = probs[rows, :, columns][there] + 1e-8
        log_map = word.log() - word.sum(1, keepdim=True).log()
        total = total + (torch.xlogy(target, target) - target * log_map).sum(1).mean()
    return total / len(maps)


@dataclass(frozen=True)
class CaptionBatch:
    """Captions as ``input_ids`` (B, K) and, for each token, ``token_parts`` (B, K): an index into ``PARTS`` or -1."""

    input_ids: torch.Tensor
    token_parts: torch.Tensor


def tokenize_with_parts(tokenizer: CLIPTokenizer, caption: Caption) -> tuple[list[int], list[int]]:
    """(input ids, part index or -1 of each token), both padded to the tokenizer's length."""
    encoded = tokenizer([list(caption.words)], is_split_into_words=True, padding="max_length", truncation=True)
    parts = [
        -1 if word is None or caption.parts[word] is None else PARTS.index(caption.parts[word])
        for word in encoded.word_ids(0)
    ]
    return encoded.input_ids[0], parts


def draw_captions(
    tokenizer: CLIPTokenizer, subjects: Sequence[Subject], rng: random.Random, drop: float
) -> CaptionBatch:
    """A caption of each subject, or with probability ``drop`` an empty one."""
    ids, parts = [], []
    empty = tokenizer("", padding="max_length").input_ids
    for subject in subjects:
        if rng.random() < drop:
            ids.append(empty)
            parts.append([-1] * len(empty))
        else:
            words, where = tokenize_with_parts(tokenizer, describe(subject, rng))
            ids.append(words)
            parts.append(where)
    return CaptionBatch(torch.tensor(ids), torch.tensor(parts))


@torch.no_grad()
def sample_latents(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    scheduler: DDIMScheduler,
    prompts: list[str],
    *,
    num_inference_steps: int = 25,
    guidance_scale: float = 4.5,
    seed: int = 0,
) -> torch.Tensor:
    """Latents drawn for ``prompts`` from noise; (N, C, h, w)."""
    device = unet.device
    ids = tokenizer([""] * len(prompts) + list(prompts), padding="max_length", truncation=True, return_tensors="pt")
    context = text_encoder(ids.input_ids.to(device)).last_hidden_state
    side = unet.config.sample_size
    shape = (len(prompts), unet.config.in_channels, side, side)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    sampler = DDIMScheduler.from_config(scheduler.config)
    sampler.set_timesteps(num_inference_steps)
    for t in sampler.timesteps:
        plain, told = unet(torch.cat([x, x]), t, context).sample.chunk(2)
        x = sampler.step(plain + guidance_scale * (told - plain), t, x).prev_sample
    return x


def trained_parameters(unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> list[torch.nn.Parameter]:
    """What :func:`train_denoiser` trains, in the order of its checkpoints."""
    return [*unet.parameters(), *text_encoder.parameters()]


def clamped_snr_plus_one_weight(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """``min(1 + SNR, 5) / (1 + SNR)``: the weight of the squared error in v at noise levels ``alphas_cumprod``, of any
    shape, in (0, 1).

    An error e in the clean picture is an error of ``sqrt(1 + SNR) e`` in v, so that this weight makes its square count
    ``min(1 + SNR, 5)``. Min-SNR (Hang et al. 2023) is another weight, ``min(SNR, 5) / (1 + SNR)``: it goes to 0 where
    all is noise, this one to 1.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return (1 + snr).clamp(max=5) / (1 + snr)


def stratified_timesteps(batch_size: int, num_train: int, generator: torch.Generator) -> torch.Tensor:
    """(batch_size,) noise levels, one in each of as many equal stretches: every batch sees them all."""
    u = (torch.arange(batch_size) + torch.rand(batch_size, generator=generator)) / batch_size
    return (u * num_train).long().clamp(max=num_train - 1)


def denoising_loss(
    predicted: torch.Tensor, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, scheduler: DDIMScheduler
) -> torch.Tensor:
    """Mean squared error of ``predicted`` (B, C, h, w) against v, weighted by
    :func:`clamped_snr_plus_one_weight`."""
    error = (predicted - scheduler.get_velocity(x0, noise, t)).square().mean((1, 2, 3))
    return (clamped_snr_plus_one_weight(scheduler.alphas_cumprod.to(t.device)[t]) * error).mean()


def train_denoiser(
    data: LatentSet,
    tokenizer: CLIPTokenizer,
    decode: Callable[[torch.Tensor], np.ndarray],
    folder: Path,
    settings: DenoiserSettings,
    *,
    start_from: str | Path | None = None,
    device: str = "cpu",
    stop_at: int | None = None,
) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    """Train from nothing, or go on from ``folder/denoiser.ckpt``; returns the averaged weights.

    The loss is :func:`denoising_loss` plus ``settings.grounding_weight`` times :func:`grounding_loss`.

    Args:
        data: encoded pictures.
        decode: latents to (N, H, W, 3) uint8, for the sample sheet.
        start_from: a diffusers folder whose text encoder and U-Net, trained with the same latents and tokenizer, to
            start from instead of nothing.
        stop_at: leave at this step, checkpoint written, to go on later.
    """
    torch.manual_seed(settings.seed)
    text_encoder = build_text_encoder(tokenizer).to(device)
    unet = build_unet(data.latents.shape[1], text_encoder.config.hidden_size).to(device)
    if start_from is not None:
        folders = [str(Path(start_from) / name) for name in ("text_encoder", "unet")]
        text_encoder.load_state_dict(CLIPTextModel.from_pretrained(folders[0], dtype=torch.float32).state_dict())
        unet.load_state_dict(UNet2DConditionModel.from_pretrained(folders[1]).state_dict())
    scheduler = build_scheduler()
    keepers = {name: _MapKeeper() for name in unet.attn_processors if name.endswith("attn2.processor")}
    unet.set_attn_processor({name: keepers.get(name, plain) for name, plain in unet.attn_processors.items()})
    parameters = trained_parameters(unet, text_encoder)
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=1e-2)
    average = WeightAverage(parameters, 0.998)
    checkpoint, log = Checkpoint(folder / "denoiser.ckpt"), Log(folder / "denoiser.jsonl")
    first, spent = 0, 0.0
    if state := checkpoint.load():
        unet.load_state_dict(state["unet"])
        text_encoder.load_state_dict(state["text_encoder"])
        optimizer.load_state_dict(state["optimizers"][0])
        average.load_state_dict(state["average"])
        first, spent = state["step"], state["seconds"]
    start = time.time() - spent

    def save(step: int) -> None:
        checkpoint.save(
            {
                "unet": unet.state_dict(),
                "text_encoder": text_encoder.state_dict(),
                "optimizers": [optimizer.state_dict()],
                "average": average.state_dict(),
                "step": step,
                "seconds": time.time() - start,
            }
        )
        average.swap()
        z = sample_latents(unet, text_encoder, tokenizer, scheduler, list(SAMPLE_PROMPTS))
        average.swap()
        samples = list(decode(z))
        lines = [np.concatenate(samples[i : i + 8], 1) for i in range(0, len(samples), 8)]
        Image.fromarray(np.concatenate(lines)).save(folder / "denoiser.png")

    last = settings.num_steps if stop_at is None else min(stop_at, settings.num_steps)
    running: dict[str, float] = {}
    bar = tqdm(range(first, last), initial=first, total=settings.num_steps, desc="denoiser", mininterval=10)
    for step in bar:
        rng = random.Random(f"{settings.seed}-{step}")
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        index = np.array([rng.randrange(len(data.latents)) for _ in range(settings.batch_size)])
        batch = draw_captions(tokenizer, [data.subjects[i] for i in index], rng, settings.drop_caption)
        x0 = data.latents[index].float().to(device)
        noise = torch.randn(x0.shape, generator=generator).to(device)
        t = stratified_timesteps(len(index), scheduler.config.num_train_timesteps, generator).to(device)
        context = text_encoder(batch.input_ids.to(device)).last_hidden_state
        predicted = unet(scheduler.add_noise(x0, noise, t), t, context).sample
        denoising = denoising_loss(predicted, x0, noise, t, scheduler)
        masks = torch.from_numpy(data.masks[index]).to(device).float() / 255
        grounding = grounding_loss([k.map for k in keepers.values()], batch.token_parts.to(device), masks)  # type: ignore[misc]
        loss = denoising + settings.grounding_weight * grounding
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * learning_rate_factor(step, settings.num_steps, 50)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update()
        for name, value in (("denoising", denoising.item()), ("grounding", grounding.item())):
            running[name] = value if name not in running else 0.97 * running[name] + 0.03 * value
        if step % 10 == 0:
            bar.set_postfix({k: f"{v:.4f}" for k, v in running.items()}, refresh=False)
            log.write(step=step, seconds=time.time() - start, **running)
        if checkpoint.due or step == last - 1:
            save(step + 1)
    average.swap()
    unet.set_attn_processor(AttnProcessor2_0())
    return text_encoder.eval(), unet.eval()
