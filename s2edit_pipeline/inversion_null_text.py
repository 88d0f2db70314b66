"""Null-text inversion (Mokady et al. 2023), the paper's own."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional as F

from .inversion_ddim import ddim_trajectory
from .inversion_record import InversionMethod, InversionPath, InversionTask, register_inversion
from .noise_schedule import check_finite, gradient_scaler


def null_text(task: InversionTask, *, num_inner_steps: int = 10) -> InversionPath:
    """Algorithm 1 there, with its published settings.

    The pivot is the DDIM trajectory at guidance 1; from the noise down, the unconditional embedding of each
    step is optimised until the guided step meets the pivot, and is the next step's start. The embedding, its
    optimizer and the latents on the way down are float32 at least; the denoiser keeps its own dtype, and in float16 the
    loss is scaled.
    """
    pivot, n = ddim_trajectory(task), task.schedule.num_steps  # z*_0 ... z*_T, at guidance 1
    precise = torch.promote_types(pivot.dtype, torch.float32)
    x, null, optimised = pivot[n:].to(precise), task.null_embeds.detach().float(), []  # z_T <- z*_T, null_T <- psi("")
    scaler = gradient_scaler(pivot.device, pivot.dtype)
    for i, k in enumerate(range(n, 0, -1)):  # "for t = T, T - 1, ..., 1"
        wanted = pivot[k - 1 : k].to(precise)
        with torch.no_grad():
            conditional = task.denoise(x, k)
        step_down = partial(_step_down, task, x, k, conditional)
        with torch.enable_grad():
            null = null.clone().requires_grad_()
            optimizer = torch.optim.Adam([null], lr=1e-2 * (1 - i / (2 * n)))
            for _ in range(num_inner_steps):  # null_t <- null_t - eta grad || z*_(t-1) - z_(t-1)(z_t, null_t, C) ||^2
                loss = F.mse_loss(step_down(null).float(), wanted.float())
                (null.grad,) = torch.autograd.grad(scaler.scale(loss), [null])
                scaler.step(optimizer)
                scaler.update()
                if loss.item() < 1e-5 + i * 2e-5:
                    break
        null = null.detach()
        optimised.append(null)
        with torch.no_grad():
            x = step_down(null)  # z_(t-1) <- z_(t-1)(z_t, null_t, C); null_(t-1) starts from null_t
        check_finite(x, "null-text inversion's way down", i)
        task.on_step(n + i, x)
    return InversionPath(pivot, torch.cat(optimised[::-1]))


def _step_down(
    task: InversionTask, x: torch.Tensor, k: int, conditional: torch.Tensor, null: torch.Tensor
) -> torch.Tensor:
    """The guided step from ``x`` at level k to k - 1."""
    unconditional = task.denoise_null(x, k, null.to(task.source_embeds))
    return task.schedule.move(x, task.combine(unconditional, conditional, task.guidance_scale), k, k - 1)


register_inversion(
    "null_text",
    InversionMethod(null_text, needs_gradients=True, binds_guidance=True, num_passes=2),
)
