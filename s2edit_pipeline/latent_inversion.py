"""From a picture to the noise that leads back to it. Each method has the same signature and returns an Inversion.

``denoise(x, level, prompt_embeds)`` is the U-Net's output for latents ``x`` (B, C, h, w) at noise level
``level`` of the schedule; attention control, if any, is its own affair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch.nn import functional as F

from .ddim_steps import NoiseSchedule, add_noise, check_finite, ddim_move, ddpm_mean, gradient_scaler
from .source_attention import SourceAttention

Denoise = Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]
OnStep = Callable[[int], None]

PINNED = ("direct", "edit_friendly")
"""The methods whose source branch is held to the stored trajectory."""


@dataclass(frozen=True)
class Inversion:
    """A picture on its way to noise.

    Attributes:
        method: "ddim", "null_text", "negative_prompt", "direct" or "edit_friendly".
        prompt: the source prompt, with the identity's token where there is one.
        trajectory: (N + 1, C, h, w), the latents at each noise level, the picture itself first.
        unconditional_embeds: (N, L, D), for noise level k at k - 1; or None: the empty (or negative) prompt's.
        residuals: (N, C, h, w), for noise level k at k - 1: what has to be added to the DDPM step's mean there to
            arrive at the next latents ("edit_friendly"); or None: the steps are DDIM's.
        guidance_scale: that the unconditional embeddings were made for, or None where any will do.
        identities: the fitted tokens that took part -> which fit each stood for, see ``IdentityAdapter.digest``.
        base_model: what the model calls itself.
        clip_skip: how the prompts were encoded.
        attention: what the source attended to, for the edits to come; or None, and they ask for it again.
    """

    method: str
    prompt: str
    trajectory: torch.Tensor
    unconditional_embeds: torch.Tensor | None = None
    residuals: torch.Tensor | None = None
    guidance_scale: float | None = None
    identities: Mapping[str, str] = field(default_factory=dict)
    base_model: str = ""
    clip_skip: int | None = None
    attention: SourceAttention | None = None

    @property
    def num_inference_steps(self) -> int:
        return len(self.trajectory) - 1

    @property
    def pinned(self) -> bool:
        """Whether the source branch is held to the stored trajectory."""
        return self.method in PINNED


@dataclass(frozen=True)
class WayUp:
    """What a method finds: the fields of the same names of :class:`Inversion`."""

    trajectory: torch.Tensor
    unconditional_embeds: torch.Tensor | None = None
    residuals: torch.Tensor | None = None


def guided(
    unconditional: torch.Tensor, conditional: torch.Tensor, guidance_scale: float, guidance_rescale: float = 0.0
) -> torch.Tensor:
    """Classifier-free guidance (Ho & Salimans 2021), in the form diffusers uses, (B, C, h, w).

    ``guidance_rescale`` brings the result's deviation that far back to the conditional's (Lin et al. 2024,
    section 3.4): guidance stretches it, which burns colours.
    """
    output = unconditional + guidance_scale * (conditional - unconditional)
    if guidance_rescale == 0:
        return output
    axes = list(range(1, output.ndim))
    matched = output * (conditional.std(axes, keepdim=True) / output.std(axes, keepdim=True))
    return torch.lerp(output, matched, guidance_rescale)


@torch.no_grad()
def ddim_trajectory(
    denoise: Denoise, latents: torch.Tensor, schedule: NoiseSchedule, prompt_embeds: torch.Tensor, on_step: OnStep
) -> torch.Tensor:
    """DDIM run backwards at guidance 1 (Song et al. 2021, section 4.3); (N + 1, C, h, w).

    The U-Net is asked at the latents' own noise level, so that the evaluation that leads from level k up to
    k + 1 is the one that leads from k down to k - 1 on the way back.
    """
    path = [latents]
    for k in range(schedule.num_steps):
        output = denoise(path[-1], max(k, 1), prompt_embeds)
        a, a_next = schedule.alphas_bar[k], schedule.alphas_bar[k + 1]
        path.append(ddim_move(path[-1], output, a, a_next, schedule.prediction_type))
        check_finite(path[-1], "the inversion", k)
        on_step(k)
    return torch.cat(path)


def _bare(
    denoise: Denoise,
    latents: torch.Tensor,
    schedule: NoiseSchedule,
    prompt_embeds: torch.Tensor,
    negative_embeds: torch.Tensor,
    guidance_scale: float,
    generator: torch.Generator | None,
    on_step: OnStep,
) -> WayUp:
    """DDIM inversion alone. Whether the source is pinned to it ("direct") or runs free ("ddim") is the edit's affair:
    the offset of Ju et al. 2023 (PnP Inversion, algorithm 1) is, written out, "use the stored latents"."""
    return WayUp(ddim_trajectory(denoise, latents, schedule, prompt_embeds, on_step))


def _negative_prompt(
    denoise: Denoise,
    latents: torch.Tensor,
    schedule: NoiseSchedule,
    prompt_embeds: torch.Tensor,
    negative_embeds: torch.Tensor,
    guidance_scale: float,
    generator: torch.Generator | None,
    on_step: OnStep,
) -> WayUp:
    """Negative-prompt inversion (Miyake et al. 2023): the source prompt stands in for the optimised embedding."""
    trajectory = ddim_trajectory(denoise, latents, schedule, prompt_embeds, on_step)
    return WayUp(trajectory, prompt_embeds.expand(schedule.num_steps, -1, -1).clone())


def _null_text(
    denoise: Denoise,
    latents: torch.Tensor,
    schedule: NoiseSchedule,
    prompt_embeds: torch.Tensor,
    negative_embeds: torch.Tensor,
    guidance_scale: float,
    generator: torch.Generator | None,
    on_step: OnStep,
    *,
    num_inner_steps: int = 10,
) -> WayUp:
    """Null-text inversion (Mokady et al. 2023, algorithm 1), with its published settings.

    The pivot is the DDIM trajectory at guidance 1; from the noise down, the unconditional embedding of each
    step is optimised until the guided step meets the pivot, and is the next step's start. The embedding, its
    optimizer and the latents on the way down are float32 at least; the U-Net keeps its own dtype, and in float16 the
    loss is scaled.
    """
    pivot = ddim_trajectory(denoise, latents, schedule, prompt_embeds, on_step)
    n, precise = schedule.num_steps, torch.promote_types(pivot.dtype, torch.float32)
    x, null, found = pivot[n:].to(precise), negative_embeds.detach().float(), []
    scaler = gradient_scaler(pivot.device, pivot.dtype)
    for i, k in enumerate(range(n, 0, -1)):
        a, a_next = schedule.alphas_bar[k], schedule.alphas_bar[k - 1]
        wanted = pivot[k - 1 : k].to(precise)
        with torch.no_grad():
            conditional = denoise(x, k, prompt_embeds)

        def step_down(
            null: torch.Tensor,
            x: torch.Tensor = x,
            k: int = k,
            conditional: torch.Tensor = conditional,
            a: torch.Tensor = a,
            a_next: torch.Tensor = a_next,
        ) -> torch.Tensor:
            output = guided(denoise(x, k, null.to(prompt_embeds)), conditional, guidance_scale)
            return ddim_move(x, output, a, a_next, schedule.prediction_type)

        with torch.enable_grad():
            null = null.clone().requires_grad_()
            optimizer = torch.optim.Adam([null], lr=1e-2 * (1 - i / (2 * n)))
            for _ in range(num_inner_steps):
                loss = F.mse_loss(step_down(null).float(), wanted.float())
                (null.grad,) = torch.autograd.grad(scaler.scale(loss), [null])
                scaler.step(optimizer)
                scaler.update()
                if loss.item() < 1e-5 + i * 2e-5:
                    break
        null = null.detach()
        found.append(null)
        with torch.no_grad():
            x = step_down(null)
        check_finite(x, "null-text inversion's way down", i)
        on_step(n + i)
    return WayUp(pivot, torch.cat(found[::-1]))


@torch.no_grad()
def _edit_friendly(
    denoise: Denoise,
    latents: torch.Tensor,
    schedule: NoiseSchedule,
    prompt_embeds: torch.Tensor,
    negative_embeds: torch.Tensor,
    guidance_scale: float,
    generator: torch.Generator | None,
    on_step: OnStep,
) -> WayUp:
    """Edit-friendly DDPM inversion (Huberman-Spiegelglas et al. 2024, algorithm 1), the source unguided.

    Every level is noised from the picture itself, independently of the others (equation 5); what the DDPM step
    from each then misses of the next, ``sigma_t z_t`` (equation 6), is the picture's noise space.
    """
    path = [latents]
    for k in range(1, schedule.num_steps + 1):
        noise = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=torch.float32)
        noise = noise.to(latents)
        path.append(add_noise(latents, noise, schedule.alphas_bar[k]))
    residuals = []
    for k in range(1, schedule.num_steps + 1):
        output = denoise(path[k], k, prompt_embeds)
        a, a_next = schedule.alphas_bar[k], schedule.alphas_bar[k - 1]
        mean, _ = ddpm_mean(path[k], output, a, a_next, schedule.prediction_type)
        check_finite(mean, "the inversion", k - 1)
        residuals.append(path[k - 1] - mean)
        on_step(k - 1)
    return WayUp(torch.cat(path), residuals=torch.cat(residuals))


INVERSIONS = {
    "direct": _bare,
    "ddim": _bare,
    "negative_prompt": _negative_prompt,
    "null_text": _null_text,
    "edit_friendly": _edit_friendly,
}
"""Method name -> ``f(denoise, latents, schedule, prompt_embeds, negative_embeds, guidance_scale, generator, on_step)``;
only "edit_friendly" draws anything from ``generator``."""


def num_inversion_steps(method: str, num_inference_steps: int) -> int:
    """How often ``on_step`` will be called."""
    return num_inference_steps * (2 if method == "null_text" else 1)


def check_method(method: str) -> None:
    """Raises:
    ValueError: there is no such inversion.
    """
    if method not in INVERSIONS:
        raise ValueError(f"inversion method {method!r} is unknown; choose one of {', '.join(map(repr, INVERSIONS))}.")
