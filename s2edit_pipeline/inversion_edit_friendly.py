"""Edit-friendly DDPM inversion (Huberman-Spiegelglas et al. 2024), and FlowEdit, which is its flow form."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers.utils.torch_utils import randn_tensor

from .inversion_record import InversionMethod, InversionPath, InversionTask, register_inversion
from .noise_schedule import check_finite


def edit_friendly(task: InversionTask) -> InversionPath:
    """Algorithm 1 there, the source unguided.

    Every level is noised from the picture itself, independently of the others (equation 5); what the random step
    from each then misses of the next, ``sigma_t z_t`` (equation 6), is the picture's noise space.
    """
    return _noise_space(task, lambda x, output, k: task.schedule.posterior_mean(x, output, k, k - 1))


def flowedit(task: InversionTask) -> InversionPath:
    """FlowEdit (Kulikov et al. 2024, algorithm 1, one noise a step).

    There ``z_{k-1} = z_k + (s_{k-1} - s_k) (v_target(z_k + x_k - x_0) - v_source(x_k))``, x_k the picture x_0 noised
    anew at each level and z_N = x_0. With ``y_k = z_k + x_k - x_0`` that is Euler's step of y_k under the target's
    words, and what the source's Euler step from x_k misses of x_{k-1} added: edit-friendly inversion with Euler's step
    as the mean.
    """
    return _noise_space(task, lambda x, output, k: task.schedule.move(x, output, k, k - 1))


@torch.no_grad()
def _noise_space(task: InversionTask, mean: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]) -> InversionPath:
    """The picture at independently noised levels, and what ``mean(x, output, k)`` misses of the one below."""
    latents, schedule, path = task.latents, task.schedule, [task.latents]
    for k in range(1, schedule.num_steps + 1):
        noise = randn_tensor(latents.shape, generator=task.generator, device=latents.device, dtype=torch.float32)
        path.append(schedule.noised(latents, noise.to(latents), k))  # equation 5
    residuals = []
    for k in range(1, schedule.num_steps + 1):
        step = mean(path[k], task.denoise(path[k], k), k)
        check_finite(step, "the inversion", k - 1)
        residuals.append(path[k - 1] - step)  # equation 6
        task.on_step(k - 1, path[k])
    return InversionPath(torch.cat(path), residuals=torch.cat(residuals))


register_inversion(
    "edit_friendly",
    InversionMethod(edit_friendly, pinned=True, draws_noise=True, random_steps=True, residuals="own"),
)
register_inversion(
    "flowedit",
    InversionMethod(flowedit, pinned=True, draws_noise=True, residuals="own", guides_source=True, flows_only=True),
)
