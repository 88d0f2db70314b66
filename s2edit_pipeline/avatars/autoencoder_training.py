"""Stage one of the recipe: a linear code for the encoder, and a decoder trained to read it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from PIL import Image
from torch.nn import functional as F
from tqdm.auto import tqdm

from .dataset import PictureSet
from .training import Checkpoint, Log, WeightAverage, learning_rate_factor
from .world import IMAGE_SIZE

LATENT_CHANNELS = 16
PATCH = 8
"""Pixels a latent cell, each way."""


@dataclass(frozen=True)
class AutoencoderSettings:
    """How to train.

    Args:
        num_steps: in all. The learning rate falls from the end of the warm-up on, see ``learning_rate_factor``.
        whole_picture_steps: the last of them, which see whole pictures; those before see crops.
        batch_size: crops in a step. Of whole pictures it's a quarter as many, at least two.
        latent_noise: deviation of the noise on the latents, which makes the decoder forgiving.
        ssim_weight: of 1 - SSIM, which flattens flat colours; 0 leaves it out of the sum.
    """

    num_steps: int = 3000
    whole_picture_steps: int = 300
    batch_size: int = 16
    learning_rate: float = 2e-3
    latent_noise: float = 0.03
    ssim_weight: float = 0.1
    seed: int = 0


def build_autoencoder() -> AutoencoderKL:
    """The embedded model's autoencoder: 8 pixels a latent cell, 16 channels."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(24, 48, 96, 128),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """(N, H, W, 3) uint8 to (N, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def _batch(images: np.ndarray, count: int, side: int, rng: np.random.Generator) -> torch.Tensor:
    """``count`` random ``side`` x ``side`` crops, three in four on the latents' own grid; half of them in other
    colours, so that the decoder learns pictures and not the palette of the training people."""
    crops = np.empty((count, side, side, 3), np.uint8)
    for i in range(count):
        picture = images[rng.integers(len(images))]
        y, x = rng.integers(0, IMAGE_SIZE - side + 1, 2)
        if rng.random() < 0.75:
            y, x = y // PATCH * PATCH, x // PATCH * PATCH
        crops[i] = picture[y : y + side, x : x + side]
    batch = to_tensor(crops)
    for i in range(count):
        if rng.random() < 0.5:
            batch[i] = batch[i, rng.permutation(3)]
            gain, offset = rng.uniform(0.8, 1.0, (3, 1, 1)), rng.uniform(-0.2, 0.2, (3, 1, 1))
            batch[i] = (batch[i] * torch.from_numpy(gain) + torch.from_numpy(offset)).clamp_(-1, 1)
    return batch


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: np.ndarray, batch_size: int = 16) -> np.ndarray:
    """What the autoencoder returns for (N, H, W, 3) uint8 pictures, in the same form."""
    out = np.empty_like(images)
    device = next(vae.parameters()).device
    for i in range(0, len(images), batch_size):
        x = to_tensor(images[i : i + batch_size]).to(device)
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample
        out[i : i + batch_size] = y.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return out


def mean_psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over pictures of the PSNR in dB between two (N, H, W, 3) uint8 arrays."""
    error = ((a.astype(np.float64) - b) ** 2).mean((1, 2, 3))
    return float(np.mean(10 * np.log10(255**2 / np.maximum(error, 1e-12))))


@dataclass(frozen=True)
class LinearCode:
    """A linear code of 8 x 8 pixel patches: ``z = (patch - mean) @ analysis``, patches flattened (y, x, rgb).

    The leading principal components, each divided by the root of its deviation (half way to whitening:
    fine detail stays small beside flat colour, but is not drowned by the first noise), and all by one number
    so that the latents have deviation 1.
    """

    mean: torch.Tensor  # (192,)
    analysis: torch.Tensor  # (192, channels)
    synthesis: torch.Tensor  # (channels, 192)

    def to(self, device: str) -> LinearCode:
        return LinearCode(self.mean.to(device), self.analysis.to(device), self.synthesis.to(device))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) in [-1, 1] to (N, channels, H/8, W/8)."""
        patches = F.pixel_unshuffle(x, PATCH).unflatten(1, (3, PATCH, PATCH)).permute(0, 4, 5, 2, 3, 1).flatten(3)
        return ((patches - self.mean) @ self.analysis).permute(0, 3, 1, 2)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """The linear reconstruction, (N, 3, H, W)."""
        patches = z.permute(0, 2, 3, 1) @ self.synthesis + self.mean
        return F.pixel_shuffle(patches.unflatten(3, (PATCH, PATCH, 3)).permute(0, 5, 3, 4, 1, 2).flatten(1, 3), PATCH)


def fit_linear_code(images: np.ndarray, channels: int = LATENT_CHANNELS) -> LinearCode:
    """Principal components of the patches of (N, H, W, 3) uint8 pictures."""
    identity = LinearCode(torch.zeros(3 * PATCH**2), torch.eye(3 * PATCH**2), torch.eye(3 * PATCH**2))
    patches = identity.encode(to_tensor(images)).permute(0, 2, 3, 1).flatten(0, 2).double()
    mean = patches.mean(0)
    variance, vectors = torch.linalg.eigh(torch.cov((patches - mean).T))
    variance, vectors = variance.flip(0)[:channels], vectors.flip(1)[:, :channels]
    scale = variance.pow(-0.25)
    scale = scale / (variance * scale.square()).mean().sqrt()
    return LinearCode(mean.float(), (vectors * scale).float(), (vectors / scale).T.contiguous().float())


@torch.no_grad()
def install_linear_encoder(vae: AutoencoderKL, code: LinearCode) -> None:
    """Set the encoder's weights so that it IS ``code``, to about 0.1%, and can be trained on from there.

    Strided convolutions move each patch's pixels into channels; the residual branches start at zero;
    GroupNorm is held still by constant channels that dwarf the signal, and SiLU is undone by pairs,
    ``silu(x) - silu(-x) = x``.
    """
    encoder = vae.encoder
    for name, module in encoder.named_modules():
        if isinstance(module, torch.nn.Conv2d) and not name.endswith("conv1"):
            for parameter in module.parameters():
                parameter.zero_()
    for i in range(3):
        encoder.conv_in.weight[i, i, 1, 1] = 1.0

    def widen(resnet: ResnetBlock2D, channels: int) -> None:
        for i in range(channels if resnet.conv_shortcut is not None else 0):
            resnet.conv_shortcut.weight[i, i, 0, 0] = 1.0

    carried = 3
    for block in encoder.down_blocks[:2]:  # 3 -> 12 -> 48: (row, column, channel before)
        widen(block.resnets[0], carried)
        for y in range(2):
            for x in range(2):
                for i in range(carried):
                    block.downsamplers[0].conv.weight[(2 * y + x) * carried + i, i, y, x] = 1.0
        carried *= 4
    # the third halving projects onto the components at once
    last = encoder.down_blocks[2]
    widen(last.resnets[0], carried)
    channels = code.analysis.shape[1]
    analysis = code.analysis.view(2, 2, 2, 2, 2, 2, 3, channels)  # y4 y2 y1 x4 x2 x1 rgb
    for y4 in range(2):
        for x4 in range(2):
            # finest halving first: (y1, x1) was moved by the first block, (y2, x2) by the second
            block = analysis[y4, :, :, x4].permute(0, 2, 1, 3, 4, 5).reshape(carried, channels)
            last.downsamplers[0].conv.weight[:channels, :carried, y4, x4] = block.T
    last.downsamplers[0].conv.bias[:channels] = -(code.mean @ code.analysis)
    # pairs (+z, -z) and constants (+c, -c), one of each in every group of the last normalisation
    final = encoder.down_blocks[3].resnets[0]
    groups, width = encoder.conv_norm_out.num_groups, encoder.conv_norm_out.num_channels
    per_group, each = width // groups, channels // groups
    constant = 16.0 * 3.0
    deviation = constant * math.sqrt(2 / per_group)
    for g in range(groups):
        start = g * per_group
        for j in range(each):
            component = g * each + j
            final.conv_shortcut.weight[start + 2 * j, component, 0, 0] = 1.0
            final.conv_shortcut.weight[start + 2 * j + 1, component, 0, 0] = -1.0
            encoder.conv_out.weight[component, start + 2 * j, 1, 1] = 1.0
            encoder.conv_out.weight[component, start + 2 * j + 1, 1, 1] = -1.0
        final.conv_shortcut.bias[start + 2 * each] = constant
        final.conv_shortcut.bias[start + 2 * each + 1] = -constant
    encoder.conv_norm_out.weight.fill_(deviation)
    encoder.conv_norm_out.bias.zero_()
    vae.quant_conv.weight.zero_()
    vae.quant_conv.bias.zero_()
    for i in range(channels):
        vae.quant_conv.weight[i, i, 0, 0] = 1.0
    vae.quant_conv.bias[channels:] = -30.0  # no variance: sample() and mode() agree


def structural_similarity(a: torch.Tensor, b: torch.Tensor, data_range: float = 2.0) -> torch.Tensor:
    """SSIM (Wang et al. 2004) of two batches (N, C, H, W) from 0 to ``data_range``, a number that gradients go
    through: windows of 7 x 7 all counting alike, sample covariances, the mean over windows that lie inside, as
    scikit-image's default."""

    def mean(x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(x, 7, stride=1)

    unbiased = 49 / 48
    mean_a, mean_b = mean(a), mean(b)
    var_a = unbiased * (mean(a * a) - mean_a.square())
    var_b = unbiased * (mean(b * b) - mean_b.square())
    covariance = unbiased * (mean(a * b) - mean_a * mean_b)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a.square() + mean_b.square() + c1)
    return (luminance * (2 * covariance + c2) / (var_a + var_b + c2)).mean()


def trained_parameters(vae: AutoencoderKL) -> list[torch.nn.Parameter]:
    """What :func:`train_autoencoder` trains, in the order of its checkpoints."""
    return [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]


def train_autoencoder(
    pictures: PictureSet,
    validation: PictureSet,
    folder: Path,
    settings: AutoencoderSettings,
    *,
    start_from: str | Path | None = None,
    device: str = "cpu",
    stop_at: int | None = None,
) -> AutoencoderKL:
    """Train from nothing, or go on from ``folder/autoencoder.ckpt``; returns the averaged weights.

    The encoder is set to the pictures' linear code and stays there, so the latents are known before the
    first step and the denoiser never has to be trained again for a better decoder. The decoder learns
    from crops of 64 x 64 pixels, then from whole pictures, under MSE + 0.2 L1 +
    ``settings.ssim_weight`` (1 - SSIM).

    Args:
        start_from: an autoencoder's folder whose decoder to start from instead of nothing.
        stop_at: leave at this step, checkpoint written, to go on later.
    """
    torch.manual_seed(settings.seed)
    code = fit_linear_code(pictures.images[:2000])
    vae = build_autoencoder().to(device)
    install_linear_encoder(vae, code)
    if start_from is not None:
        initial = AutoencoderKL.from_pretrained(str(start_from))
        for name in ("decoder", "post_quant_conv"):
            getattr(vae, name).load_state_dict(getattr(initial, name).state_dict())
    code = code.to(device)
    parameters = trained_parameters(vae)
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=1e-4)
    average = WeightAverage(parameters, 0.998)
    checkpoint, log = Checkpoint(folder / "autoencoder.ckpt"), Log(folder / "autoencoder.jsonl")
    first, spent = 0, 0.0
    if state := checkpoint.load():
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.load_state_dict(state["average"])
        first, spent = state["step"], state["seconds"]
    start, running = time.time() - spent, 0.0

    def save(step: int) -> None:
        state = {"model": vae.state_dict(), "optimizer": optimizer.state_dict(), "average": average.state_dict()}
        checkpoint.save({**state, "step": step, "seconds": time.time() - start})
        average.swap()
        images = validation.images[:: max(1, len(validation.images) // 32)][:32]
        result = reconstruct(vae, images)
        average.swap()
        log.write(step=step, psnr=mean_psnr(images, result), seconds=time.time() - start)
        sheet = np.concatenate([np.concatenate(list(rows[::4][:8]), 1) for rows in (images, result)], 0)
        Image.fromarray(sheet).save(folder / "autoencoder.png")

    last = settings.num_steps if stop_at is None else min(stop_at, settings.num_steps)
    bar = tqdm(range(first, last), initial=first, total=settings.num_steps, desc="autoencoder", mininterval=10)
    for step in bar:
        side, count = IMAGE_SIZE // 2, settings.batch_size
        if step >= settings.num_steps - settings.whole_picture_steps:
            side, count = IMAGE_SIZE, max(2, settings.batch_size // 4)
        x = _batch(pictures.images, count, side, np.random.default_rng((settings.seed, step))).to(device)
        z = code.encode(x)
        z = z + settings.latent_noise * torch.randn(z.shape, generator=torch.Generator().manual_seed(step)).to(device)
        decoded = vae.decode(z).sample
        error = decoded - x
        loss = error.square().mean() + 0.2 * error.abs().mean()
        loss = loss + settings.ssim_weight * (1 - structural_similarity(decoded + 1, x + 1))
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * learning_rate_factor(step, settings.num_steps, 100)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update()
        running = loss.item() if running == 0 else 0.98 * running + 0.02 * loss.item()
        if step % 25 == 0:
            bar.set_postfix(loss=f"{running:.4f}", refresh=False)
            log.write(step=step, loss=running, seconds=time.time() - start)
        if checkpoint.due or step == last - 1:
            save(step + 1)
    average.swap()
    return vae.eval()
