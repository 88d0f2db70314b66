"""The recipe's other denoiser: an SD3 transformer, trained by flow matching on stored latents.

Rectified flow with logit-normal noise levels (Esser et al. 2024). The text encoder stays as the U-Net's training left
it. The words' attention maps are taught from the renderer's own masks, as the U-Net's are; that can be switched off.
"""

from __future__ import annotations

import functools
import math
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.training_utils import EMAModel
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from .denoiser_training import draw_captions, grounding_loss
from .flow_model import build_transformer, encode_captions
from .latent_dataset import LatentSet
from .training import Checkpoint, Log, late_decay_factor

GROUNDED_LAYERS = (1, 2, 3, 4)
"""Whose maps are taught. The first has seen one cell at a time, and the last only paints."""
MAX_ZERO_COLUMNS = 256
"""Stock ``max_sequence_length``: how many columns of zeros stand in T5's place unless the caller says otherwise."""


@dataclass(frozen=True)
class FlowSettings:
    """How to train.

    Args:
        num_steps: in all. The learning rate falls over the last fifth, see ``late_decay_factor``.
        grounding_weight: of :func:`grounding_loss`; 0 teaches no maps.
        drop_caption: share of empty captions.
        level_mean: of the noise level's logit. What the picture shows is decided between the levels 0.85 and 0.98
            (see docs/avatars.md), which get 26 % of the batch so, and 4 % at mean 0 and deviation 1.
        level_deviation: of the noise level's logit.
        average_decay: the most that the weights' average keeps in a step.
        mixed_precision: matrix products in bfloat16.
    """

    num_steps: int = 20000
    batch_size: int = 32
    learning_rate: float = 6e-4
    grounding_weight: float = 0.1
    drop_caption: float = 0.1
    level_mean: float = 1.0
    level_deviation: float = 1.2
    average_decay: float = 0.9995
    mixed_precision: bool = True
    seed: int = 0


# ---------------------------------------------------------------------------- formulas


def interpolate(x0: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """``(1 - sigma) x0 + sigma n`` for (B, C, h, w) pictures and noise at (B,) levels (Esser et al. 2024, eq. 13)."""
    sigma = sigma.view(-1, 1, 1, 1)
    return (1 - sigma) * x0 + sigma * noise


def flow_target(x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """``v = n - x0``: the derivative of :func:`interpolate` by the level."""
    return noise - x0


def draw_levels(batch_size: int, mean: float, deviation: float, generator: torch.Generator) -> torch.Tensor:
    """(batch_size,) noise levels in (0, 1) whose logits are normal, one from each of as many equal shares of the
    probability (Esser et al. 2024, eq. 19, stratified)."""
    u = (torch.arange(batch_size) + torch.rand(batch_size, generator=generator)) / batch_size
    return torch.sigmoid(mean + deviation * torch.special.ndtri(u))


def draw_zero_columns(batch_size: int, generator: torch.Generator) -> torch.Tensor:
    """(batch_size,) log numbers of columns of zeros, uniform from log 1 to log ``MAX_ZERO_COLUMNS``."""
    return torch.rand(batch_size, generator=generator) * math.log(MAX_ZERO_COLUMNS)


def picture_order(step: int, batch_size: int, num_pictures: int, seed: int) -> list[int]:
    """The pictures of training step ``step``: each epoch takes every picture once, in an order of its own."""
    places = range(step * batch_size, (step + 1) * batch_size)
    return [int(_epoch(seed, place // num_pictures, num_pictures)[place % num_pictures]) for place in places]


@functools.lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, num_pictures: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(num_pictures)


class GroundedJointProcessor(JointAttnProcessor2_0):
    """``JointAttnProcessor2_0`` with two more arguments, given through ``joint_attention_kwargs``.

    The model's text is K tokens and one column that stands for several equal ones. Equal columns stay equal through
    all layers; as keys, m of them weigh as much as one whose score is higher by log m.
    """

    def __call__(  # type: ignore[no-untyped-def]
        self,
        attn,
        hidden_states,
        encoder_hidden_states=None,
        attention_mask=None,
        last_column_weight: torch.Tensor | None = None,
        words: torch.Tensor | None = None,
        maps: list[torch.Tensor] | None = None,
    ):
        """As in the class it extends.

        Args:
            last_column_weight: (B,) log numbers of columns that the last text column stands for.
            words: (B, K) bool, which text columns are words.
            maps: gets one more item, (B, Q, K): the softmax over words of the image queries' scores, averaged over
                heads.
        """
        num_cells = hidden_states.shape[1]

        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        q = attn.norm_q(heads(attn.to_q(hidden_states)))
        k = attn.norm_k(heads(attn.to_k(hidden_states)))
        text_q = attn.norm_added_q(heads(attn.add_q_proj(encoder_hidden_states)))
        text_k = attn.norm_added_k(heads(attn.add_k_proj(encoder_hidden_states)))
        if maps is not None:
            assert words is not None
            maps.append(word_maps(q, text_k[:, :, : words.shape[1]], words))
        q, k = torch.cat([q, text_q], 2), torch.cat([k, text_k], 2)
        v = heads(torch.cat([attn.to_v(hidden_states), attn.add_v_proj(encoder_hidden_states)], 1))
        bias = None
        if last_column_weight is not None:
            bias = F.pad(last_column_weight[:, None, None, None], (k.shape[2] - 1, 0)).to(q.dtype)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
        image, text = attended[:, :num_cells], attended[:, num_cells:]
        return attn.to_out[0](image), text if attn.context_pre_only else attn.to_add_out(text)


def word_maps(queries: torch.Tensor, keys: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """The softmax over words of the scores of image queries (B, H, Q, d) and text keys (B, H, K, d), averaged over
    heads: (B, Q, K). Columns that aren't ``words`` (B, K) get 0; without any word all columns are alike."""
    scores = (queries @ keys.mT).float() * queries.shape[-1] ** -0.5
    scores = scores.masked_fill(~words[:, None, None, :], torch.finfo(torch.float32).min)
    return scores.softmax(-1).mean(1)


# ---------------------------------------------------------------------------- training


@dataclass(frozen=True)
class FlowBatch:
    """One step's inputs: ``x0``, ``noise`` (B, C, h, w); ``sigma``, ``zero_columns`` (B,); text embeds (B, K + 1, D),
    ``pooled`` (B, D), ``words`` (B, K) bool, ``token_parts`` (B, K); ``masks`` (B, parts, S, S) in [0, 1]."""

    x0: torch.Tensor
    noise: torch.Tensor
    sigma: torch.Tensor
    zero_columns: torch.Tensor
    prompt_embeds: torch.Tensor
    pooled: torch.Tensor
    words: torch.Tensor
    token_parts: torch.Tensor
    masks: torch.Tensor


def draw_batch(
    data: LatentSet,
    text_encoder: CLIPTextModelWithProjection,
    tokenizer: CLIPTokenizer,
    settings: FlowSettings,
    step: int,
) -> FlowBatch:
    """All that step ``step`` trains on; the same whenever it is drawn, on the text encoder's device."""
    device = text_encoder.device
    rng = random.Random(f"{settings.seed}-{step}")
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    index = picture_order(step, settings.batch_size, len(data.latents), settings.seed)
    captions = draw_captions(tokenizer, [data.subjects[i] for i in index], rng, settings.drop_caption)
    x0 = data.latents[index].float()
    noise = torch.randn(x0.shape, generator=generator)
    sigma = draw_levels(len(index), settings.level_mean, settings.level_deviation, generator)
    # levels rise along the batch, and pictures lie in no order
    zero_columns = draw_zero_columns(len(index), generator)
    input_ids = captions.input_ids.to(device)
    prompt_embeds, pooled = encode_captions(text_encoder, input_ids)
    return FlowBatch(
        x0=x0.to(device),
        noise=noise.to(device),
        sigma=sigma.to(device),
        zero_columns=zero_columns.to(device),
        prompt_embeds=prompt_embeds,
        pooled=pooled,
        words=(input_ids != tokenizer.bos_token_id) & (input_ids != tokenizer.eos_token_id),
        token_parts=captions.token_parts.to(device),
        masks=torch.from_numpy(data.masks[index]).to(device).float() / 255,
    )


def flow_losses(
    transformer: SD3Transformer2DModel, batch: FlowBatch, grounded: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean squared error in v, :func:`grounding_loss` of the maps or zero), numbers that gradients go through.

    Args:
        transformer: with :class:`GroundedJointProcessor` in its layers.
        grounded: whether the maps are needed.
    """
    maps: list[torch.Tensor] = []
    predicted = transformer(
        interpolate(batch.x0, batch.noise, batch.sigma),
        encoder_hidden_states=batch.prompt_embeds,
        pooled_projections=batch.pooled,
        timestep=1000 * batch.sigma,
        joint_attention_kwargs={
            "last_column_weight": batch.zero_columns,
            "words": batch.words,
            "maps": maps if grounded else None,
        },
    ).sample
    flow = (predicted.float() - flow_target(batch.x0, batch.noise)).square().mean()
    if not grounded:
        return flow, flow.new_zeros(())
    return flow, grounding_loss([maps[layer] for layer in GROUNDED_LAYERS], batch.token_parts, batch.masks)


def train_flow(
    data: LatentSet,
    text_encoder: CLIPTextModelWithProjection,
    tokenizer: CLIPTokenizer,
    folder: str | Path,
    settings: FlowSettings,
    *,
    device: str = "cpu",
    stop_at: int | None = None,
) -> SD3Transformer2DModel:
    """Train from nothing, or go on from ``folder/flow.ckpt``; returns the averaged weights.

    The loss is the mean squared error in v plus ``settings.grounding_weight`` times the grounding loss. A step
    depends on nothing but its number, the data and the weights, so that going on gives what going through would.

    Args:
        data: encoded pictures.
        text_encoder: stays as it is; both of the pipeline's CLIPs.
        stop_at: leave at this step, checkpoint written, to go on later.

    Raises:
        ValueError: the checkpoint was trained in another way. More steps than it was meant for are no other way.
    """
    folder = Path(folder)
    torch.manual_seed(settings.seed)
    text_encoder = text_encoder.to(device)
    transformer = build_transformer(data.latents.shape[1], text_encoder.config.hidden_size, data.latents.shape[-1])
    transformer.to(device).set_attn_processor(GroundedJointProcessor())
    optimizer = torch.optim.AdamW(
        transformer.parameters(), lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    average = EMAModel(
        transformer.parameters(), decay=settings.average_decay, use_ema_warmup=True, power=0.75, foreach=True
    )
    checkpoint, log = Checkpoint(folder / "flow.ckpt", every_seconds=180), Log(folder / "flow.jsonl")
    way = {name: value for name, value in asdict(settings).items() if name != "num_steps"}
    first, spent = 0, 0.0
    if state := checkpoint.load():
        if state["settings"] != way:
            raise ValueError(
                f"{checkpoint.path} was trained with {state['settings']}, not with {way}; choose another folder."
            )
        transformer.load_state_dict(state["transformer"])
        optimizer.load_state_dict(state["optimizer"])
        average.load_state_dict(state["average"])
        average.to(device=torch.device(device))
        first, spent = state["step"], state["seconds"]
    start = time.time() - spent

    def save(step: int) -> None:
        checkpoint.save(
            {
                "transformer": transformer.state_dict(),
                "optimizer": optimizer.state_dict(),
                "average": average.state_dict(),
                "settings": way,
                "step": step,
                "seconds": time.time() - start,
            }
        )

    last = settings.num_steps if stop_at is None else min(stop_at, settings.num_steps)
    recent: list[tuple[float, float]] = []
    transformer.train()
    for step in tqdm(range(first, last), initial=first, total=settings.num_steps, desc="flow", mininterval=30):
        batch = draw_batch(data, text_encoder, tokenizer, settings, step)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=settings.mixed_precision):
            flow, grounding = flow_losses(transformer, batch, settings.grounding_weight > 0)
        factor = late_decay_factor(step, settings.num_steps, 500, max(1, settings.num_steps // 5))
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * factor
        optimizer.zero_grad(set_to_none=True)
        (flow + settings.grounding_weight * grounding).backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        average.step(transformer.parameters())
        recent.append((flow.item(), grounding.item()))
        if step % 10 == 9 or step == last - 1:
            means = np.mean(recent, 0).tolist()
            log.write(step=step, seconds=time.time() - start, flow=means[0], grounding=means[1])
            recent.clear()
        if checkpoint.due or step == last - 1:
            save(step + 1)
    average.copy_to(transformer.parameters())
    transformer.set_attn_processor(JointAttnProcessor2_0())
    return transformer.eval()
