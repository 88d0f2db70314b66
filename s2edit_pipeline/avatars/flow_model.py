"""The embedded flow-matching transformer: its layout, what it shares with the U-Net model, and its folder.

``StableDiffusion3Pipeline`` wants two CLIP text encoders with a projection, and takes none for T5. Both of its CLIPs
are the embedded text encoder here, and the projection is the identity, so that nothing is shipped twice. In T5's place
the pipeline puts ``max_sequence_length`` columns of zeros.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

SHARED = (
    "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3",
)  # fmt: skip
"""The pipeline's components that the flow transformer's folder leaves out."""


def build_transformer(latent_channels: int = 16, text_width: int = 192, side: int = 16) -> SD3Transformer2DModel:
    """The transformer with fresh weights: 6 layers of width 256, a token for each cell of the latents.

    It starts as DiT does (Peebles & Xie 2023): every block is the identity and the output is zero.

    Args:
        text_width: of one text encoder's hidden states and of its pooled output; the pipeline joins two.
        side: of the latents.
    """
    transformer = SD3Transformer2DModel(
        sample_size=side,
        patch_size=1,
        in_channels=latent_channels,
        out_channels=latent_channels,
        num_layers=6,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=2 * text_width,
        caption_projection_dim=256,
        pooled_projection_dim=2 * text_width,
        pos_embed_max_size=side,
        qk_norm="rms_norm",
    )
    start_as_identity(transformer)
    return transformer


@torch.no_grad()
def start_as_identity(transformer: SD3Transformer2DModel) -> None:
    """Initialise in place as DiT: Xavier's uniform weights, gates and output at zero."""
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                module.bias.zero_()
    patches = transformer.pos_embed.proj
    nn.init.xavier_uniform_(patches.weight.view(patches.weight.shape[0], -1))
    patches.bias.zero_()
    for linear in (
        transformer.time_text_embed.timestep_embedder.linear_1,
        transformer.time_text_embed.timestep_embedder.linear_2,
    ):
        nn.init.normal_(linear.weight, std=0.02)
    silent = [transformer.norm_out.linear, transformer.proj_out]
    for block in transformer.transformer_blocks:
        silent += [block.norm1.linear, block.norm1_context.linear]
    for linear in silent:
        linear.weight.zero_()


def build_flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Stable Diffusion 3's own, whose shift of 3 spends a third of the steps above the level 0.85, where what the
    picture shows is decided."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)


def load_text_encoder(folder: str | Path) -> CLIPTextModelWithProjection:
    """The text encoder of a ``CLIPTextModel``'s folder, in float32, with the identity for a projection."""
    config = CLIPTextConfig.from_pretrained(str(folder))
    config.projection_dim = config.hidden_size
    weights = load_file(Path(folder) / "model.safetensors")
    weights["text_projection.weight"] = torch.eye(config.hidden_size)
    text_encoder = CLIPTextModelWithProjection(config)
    text_encoder.load_state_dict(weights)
    return text_encoder.eval().requires_grad_(False)


def shared_parts(folder: str | Path, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What ``StableDiffusion3Pipeline`` takes from the U-Net model's ``folder``: :data:`SHARED`.

    The second text encoder and tokenizer are copies of the first, and the third are None.
    """
    folder = Path(folder)
    vae = AutoencoderKL.from_pretrained(str(folder / "vae"), torch_dtype=dtype)
    vae.register_to_config(shift_factor=0.0)  # the pipeline adds it
    text_encoder = load_text_encoder(folder / "text_encoder").to(dtype)
    tokenizer = CLIPTokenizer.from_pretrained(str(folder / "tokenizer"))
    return {
        "vae": vae,
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "text_encoder_2": copy.deepcopy(text_encoder),
        "tokenizer_2": copy.deepcopy(tokenizer),
        "text_encoder_3": None,
        "tokenizer_3": None,
    }


@torch.no_grad()
def encode_captions(
    text_encoder: CLIPTextModelWithProjection, input_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``StableDiffusion3Pipeline.encode_prompt`` makes of (B, K) tokens when both encoders are ``text_encoder``,
    with a single one of T5's zero columns.

    Returns:
        prompt embeds (B, K + 1, 2 D), the last column zero, and pooled embeds (B, 2 D).
    """
    encoded = text_encoder(input_ids, output_hidden_states=True)
    columns = nn.functional.pad(encoded.hidden_states[-2], (0, 0, 0, 1))
    return torch.cat([columns, columns], -1), torch.cat([encoded.text_embeds, encoded.text_embeds], -1)


def save_flow_folder(transformer: SD3Transformer2DModel, folder: str | Path) -> None:
    """Write ``transformer`` as float16 safetensors, with its scheduler and a ``model_index.json``, to ``folder``.

    ``StableDiffusion3Pipeline.from_pretrained(folder, **shared_parts(...))`` loads it.
    """
    folder = Path(folder)
    scheduler, absent = build_flow_scheduler(), dict.fromkeys(SHARED)
    halves = copy.deepcopy(transformer).half()
    halves.save_pretrained(str(folder / "transformer"), safe_serialization=True)
    scheduler.save_pretrained(str(folder / "scheduler"))
    StableDiffusion3Pipeline(transformer=halves, scheduler=scheduler, **absent).save_config(str(folder))
