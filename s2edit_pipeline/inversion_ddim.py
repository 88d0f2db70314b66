"""Inversions along the deterministic path: DDIM's, pinned or free, by fixed points, and with the prompt as its null."""

from __future__ import annotations

import torch

from .inversion_record import InversionMethod, InversionPath, InversionTask, register_inversion
from .noise_schedule import check_finite


@torch.no_grad()
def ddim_trajectory(task: InversionTask) -> torch.Tensor:
    """DDIM run backwards at guidance 1 (Song et al. 2021, section 4.3); (N + 1, C, h, w).

    The denoiser is asked at the latents' own noise level, so that the evaluation that leads from level k up to
    k + 1 is the one that leads from k down to k - 1 on the way back.
    """
    path = [task.latents]
    for k in range(task.schedule.num_steps):
        output = task.denoise(path[-1], max(k, 1))
        path.append(task.schedule.move(path[-1], output, k, k + 1))
        check_finite(path[-1], "the inversion", k)
        task.on_step(k, path[-1])
    return torch.cat(path)


def trajectory_alone(task: InversionTask) -> InversionPath:
    """Direct inversion (Ju et al. 2023, "PnP Inversion", algorithm 1), or plain DDIM: the walk is all there is. Direct
    inversion's offset is, written out, "use the stored latents", so that pinning the source branch is the method."""
    return InversionPath(ddim_trajectory(task))


@torch.no_grad()
def fixed_point(task: InversionTask, *, num_iterations: int = 4) -> InversionPath:
    """DDIM's exact inverse by fixed-point iteration (Pan et al. 2023, AIDI, section 3.2, without its acceleration), for
    few steps.

    The latents wanted at level k are those from which the step down leads to what there is at k - 1:
    ``x_k = move(x_{k-1}; epsilon(x_k, k))``, begun at ``x_k = x_{k-1}``, which is the published DDIM inversion's step.
    The last latents that the denoiser was asked at are kept, so that its answer is the source branch's on the way back.
    """
    path, schedule = [task.latents], task.schedule
    for k in range(1, schedule.num_steps + 1):
        x = path[-1]
        for iteration in range(num_iterations):
            _, epsilon = schedule.split(task.denoise(x, k), x, k)
            if iteration + 1 < num_iterations:
                x = schedule.move_by_noise(path[-1], epsilon, k - 1, k)
        path.append(x)
        check_finite(x, "the inversion", k - 1)
        task.on_step(k - 1, x)
    return InversionPath(torch.cat(path))


def negative_prompt(task: InversionTask) -> InversionPath:
    """Negative-prompt inversion (Miyake et al. 2023): the source prompt stands in for the optimised embedding."""
    trajectory = ddim_trajectory(task)
    return InversionPath(trajectory, task.source_embeds.expand(task.schedule.num_steps, -1, -1).clone())


register_inversion("direct", InversionMethod(trajectory_alone, pinned=True))
register_inversion("fixed_point", InversionMethod(fixed_point, pinned=True))
register_inversion("ddim", InversionMethod(trajectory_alone))
register_inversion("negative_prompt", InversionMethod(negative_prompt, null_is_source=True))
