"""Inversions along the deterministic path: DDIM's, which is a flow's Euler, pinned or free, by fixed points or
midpoints, and with the prompt as its null."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from .inversion_record import InversionMethod, InversionPath, InversionTask, register_inversion
from .noise_schedule import check_finite


@torch.no_grad()
def ddim_walk(task: InversionTask) -> tuple[list[torch.Tensor], dict[int, torch.Tensor]]:
    """DDIM run backwards at guidance 1 (Song et al. 2021, section 4.3): the N + 1 latents (1, C, h, w), and level ->
    what the denoiser returned at its latents, for all but the first and the last.

    The denoiser is asked at the latents' own noise level, so that the evaluation that leads from level k up to
    k + 1 is the one that leads from k down to k - 1 on the way back.
    """
    path, outputs = [task.latents], {}
    for k in range(task.schedule.num_steps):
        output = task.denoise(path[-1], max(k, 1))
        if k:
            outputs[k] = output
        path.append(task.schedule.move(path[-1], output, k, k + 1))
        check_finite(path[-1], "the inversion", k)
        task.on_step(k, path[-1])
    return path, outputs


def ddim_trajectory(task: InversionTask) -> torch.Tensor:
    """(N + 1, C, h, w), the latents of :func:`ddim_walk`."""
    return torch.cat(ddim_walk(task)[0])


def trajectory_alone(task: InversionTask) -> InversionPath:
    """Plain DDIM: the walk is all there is."""
    return InversionPath(ddim_trajectory(task))


def direct(task: InversionTask) -> InversionPath:
    """Direct inversion (Ju et al. 2023, "PnP Inversion", algorithm 1): its offset is, written out, "use the stored
    latents", so that pinning the source branch is the method.

    In a flow the targets may take what the source's steps miss of the stored latents too (ours): it costs an
    evaluation at the last level.
    """
    path, outputs = ddim_walk(task)
    return _with_residuals(task, path, outputs)


@torch.no_grad()
def _with_residuals(
    task: InversionTask, path: Sequence[torch.Tensor], outputs: Mapping[int, torch.Tensor]
) -> InversionPath:
    """``x_{k-1} - move(x_k; v(x_k, k))`` of a flow's path, N of them; ``outputs`` lack the last level's."""
    schedule, n = task.schedule, task.schedule.num_steps
    if schedule.prediction != "flow":
        return InversionPath(torch.cat(list(path)))
    every = {**outputs, n: task.denoise(path[n], n)}
    steps = [schedule.move(path[k], every[k], k, k - 1) for k in range(1, n + 1)]
    residuals = [before - step for before, step in zip(path, steps, strict=False)]
    return InversionPath(torch.cat(list(path)), residuals=torch.cat(residuals))


@torch.no_grad()
def midpoint(task: InversionTask) -> InversionPath:
    """A flow's path by the explicit midpoint rule, of second order: RF-Solver's step (Wang et al. 2024),
    whose derivative by a difference over half a step makes it this one.

    ``x_{k+1} = x_k + (s_{k+1} - s_k) v(x_k + (s_{k+1} - s_k) / 2 v(x_k, k), k + 1/2)``, s the noise of a level.
    """
    schedule, path, outputs = task.schedule, [task.latents], {}
    for k in range(schedule.num_steps):
        step = (schedule.noise[k + 1] - schedule.noise[k]).to(path[-1])
        output = outputs[k] = task.denoise(path[-1], k)
        path.append(path[-1] + step * task.denoise(path[-1] + step / 2 * output, k + 0.5))
        check_finite(path[-1], "the inversion", k)
        task.on_step(k, path[-1])
    return _with_residuals(task, path, outputs)


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


register_inversion("direct", InversionMethod(direct, pinned=True, residuals="flows"))
register_inversion("midpoint", InversionMethod(midpoint, pinned=True, residuals="flows", flows_only=True))
register_inversion("fixed_point", InversionMethod(fixed_point, pinned=True))
register_inversion("ddim", InversionMethod(trajectory_alone))
register_inversion("negative_prompt", InversionMethod(negative_prompt, null_is_source=True))
