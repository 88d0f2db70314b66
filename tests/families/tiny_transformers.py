"""Tiny random transformers of the real classes, with their own kinds of text encoders over small vocabularies."""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from s2edit_pipeline import S2EditPipeline


@torch.no_grad()
def randomized(model: Any, seed: int = 0) -> Any:
    """``model`` with weights of a usual size: fresh ones are nearly zero in places, and say little."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
        parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)
    return model.eval()


@torch.no_grad()
def telling(encoder: Any) -> Any:
    """``encoder`` with larger rows: a fresh one tells prompts apart by hundredths only."""
    encoder.get_input_embeddings().weight.mul_(50)
    return encoder.eval()


def clip(tokenizer: Any, width: int, kind: Any = CLIPTextModelWithProjection, **changes: Any) -> nn.Module:
    """CLIP, its projection as wide as itself; ``eos_token_id=2`` as the published configurations have it, so that
    transformers takes the highest id for the end."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id, eos_token_id=2,
        pad_token_id=tokenizer.pad_token_id, projection_dim=width, **changes,
    )  # fmt: skip
    encoder: nn.Module = telling(kind(config))
    return encoder


def t5(tokenizer: Any, width: int) -> nn.Module:
    """T5 with 28 rows more than words, as the published one."""
    config = T5Config(
        vocab_size=len(tokenizer) + 28, d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False,
    )  # fmt: skip
    encoder: nn.Module = T5EncoderModel(config).eval()
    return encoder


def autoencoder(channels: int = 4, **changes: Any) -> nn.Module:
    vae: nn.Module = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16), layers_per_block=1, latent_channels=channels, norm_num_groups=4, sample_size=16,
        use_quant_conv=False, use_post_quant_conv=False, **changes,
    ).eval()  # fmt: skip
    return vae


def sd3_parts(tokenizers: dict[str, Any], *, dual: tuple[int, ...] = (), with_t5: bool = True) -> dict[str, Any]:
    """Stable Diffusion 3's, with ``dual`` blocks 3.5 medium's."""
    torch.manual_seed(0)
    second = copy.deepcopy(tokenizers["clip"])
    second.pad_token = "!"
    parts = {
        "transformer": randomized(
            SD3Transformer2DModel(
                sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
                num_attention_heads=2, joint_attention_dim=56, caption_projection_dim=16, pooled_projection_dim=40,
                pos_embed_max_size=12, dual_attention_layers=dual, qk_norm="rms_norm",
            )
        ),
        "vae": autoencoder(shift_factor=0.0609, scaling_factor=1.5305),
        "text_encoder": clip(tokenizers["clip"], 16), "tokenizer": tokenizers["clip"],
        "text_encoder_2": clip(second, 24, hidden_act="gelu"), "tokenizer_2": second,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }  # fmt: skip
    if with_t5:
        parts |= {"text_encoder_3": t5(tokenizers["t5"], 56), "tokenizer_3": tokenizers["t5"]}
    return parts


def flux_parts(tokenizers: dict[str, Any], *, guidance: bool = True) -> dict[str, Any]:
    """FLUX.1's: dev's, which is told its guidance, or schnell's."""
    torch.manual_seed(0)
    shifts = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
    return {
        "transformer": randomized(
            FluxTransformer2DModel(
                in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=12, num_attention_heads=2,
                joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 4), guidance_embeds=guidance,
            )
        ),
        "vae": autoencoder(shift_factor=0.1159, scaling_factor=0.3611),
        "text_encoder": clip(tokenizers["clip"], 16, CLIPTextModel), "tokenizer": tokenizers["clip"],
        "text_encoder_2": t5(tokenizers["t5"], 32), "tokenizer_2": tokenizers["t5"],
        "scheduler": FlowMatchEulerDiscreteScheduler(**({**shifts, "shift": 3.0} if guidance else {"shift": 1.0})),
    }  # fmt: skip


def qwen_parts(tokenizers: dict[str, Any]) -> dict[str, Any]:
    """Qwen-Image's."""
    torch.manual_seed(0)
    tokenizer = tokenizers["qwen"]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = {**sizes, "num_hidden_layers": 2, "vocab_size": len(tokenizer) + 20, "rope_parameters": rope}
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
        "fullatt_block_indexes": [0],
    }  # fmt: skip
    special = {f"{name}_token_id": len(tokenizer) + 10 + i for i, name in enumerate(("image", "video", "vision_start"))}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **special)
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 2.0, 0.8, 1.0],
    )  # fmt: skip
    return {
        "transformer": randomized(
            QwenImageTransformer2DModel(
                patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=12,
                num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 4, 4),
            )
        ),
        "vae": vae.eval(),
        "text_encoder": telling(Qwen2_5_VLForConditionalGeneration(config)), "tokenizer": tokenizer,
        "scheduler": FlowMatchEulerDiscreteScheduler(
            shift=1.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192,
            shift_terminal=0.02, time_shift_type="exponential",
        ),
    }  # fmt: skip


def chatting(tokenizer: Any) -> Any:
    """``tokenizer`` with Qwen3's way to chat, which shuts its thoughts where it isn't to think."""
    copied = copy.deepcopy(tokenizer)
    copied.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    )
    return copied


def flux2_parts(tokenizers: dict[str, Any], *, is_distilled: bool = False) -> dict[str, Any]:
    """FLUX.2 klein's: the language model is deep enough for the three layers that are read."""
    torch.manual_seed(0)
    tokenizer = chatting(tokenizers["qwen"])
    config = Qwen3Config(
        hidden_size=16, intermediate_size=16, num_hidden_layers=28, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, vocab_size=len(tokenizer) + 20,
    )  # fmt: skip
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=16,
    ).eval()  # fmt: skip
    with torch.no_grad():
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2)
    return {
        "transformer": randomized(
            Flux2Transformer2DModel(
                in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
                joint_attention_dim=48, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
                guidance_embeds=False,
            )
        ),
        "vae": vae, "text_encoder": telling(Qwen3ForCausalLM(config)), "tokenizer": tokenizer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        "is_distilled": is_distilled,
    }  # fmt: skip


def z_image_parts(tokenizers: dict[str, Any]) -> dict[str, Any]:
    """Z-Image's."""
    torch.manual_seed(0)
    tokenizer = chatting(tokenizers["qwen"])
    config = Qwen3Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=len(tokenizer) + 20,
    )  # fmt: skip
    return {
        "transformer": randomized(
            ZImageTransformer2DModel(
                in_channels=4, dim=24, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32,
                axes_dims=[4, 4, 4], axes_lens=[1024, 64, 64],
            )
        ),
        "vae": autoencoder(shift_factor=0.1159, scaling_factor=0.3611),
        "text_encoder": telling(Qwen3Model(config)), "tokenizer": tokenizer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=6.0),
    }  # fmt: skip


def pipeline(parts: dict[str, Any]) -> S2EditPipeline:
    """Of copies of the modules; tokenizers are shared, copies of them are slow."""
    modules = {n: copy.deepcopy(p) if isinstance(p, nn.Module) else p for n, p in parts.items()}
    pipe = S2EditPipeline(**modules)
    pipe.set_progress_bar_config(disable=True)
    return pipe
