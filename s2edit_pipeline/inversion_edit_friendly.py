"""Edit-friendly DDPM inversion (Huberman-Spiegelglas et al. 2024)."""

from __future__ import annotations

import torch
from diffusers.utils.torch_utils import randn_tensor

from .inversion_record import InversionMethod, InversionPath, InversionTask, register_inversion
from .noise_schedule import check_finite


@torch.no_grad()
def edit_friendly(task: InversionTask) -> InversionPath:
    """Algorithm 1 there, the source unguided.

    Every level is noised from the picture itself, independently of the others (equation 5); what the random step
    from each then misses of the next, ``sigma_t z_t`` (equation 6), is the picture's noise space.
    """
    latents, schedule, path = task.latents, task.schedule, [task.latents]
    for k in range(1, schedule.num_steps + 1):
        noise = randn_tensor(latents.shape, generator=task.generator, device=latents.device, dtype=torch.float32)
        path.append(schedule.noised(latents, noise.to(latents), k))
    residuals = []
    for k in range(1, schedule.num_steps + 1):
        mean, _ = schedule.posterior(path[k], task.denoise(path[k], k), k, k - 1)
        check_finite(mean, "the inversion", k - 1)
        residuals.append(path[k - 1] - mean)
        task.on_step(k - 1, path[k])
    return InversionPath(torch.cat(path), residuals=torch.cat(residuals))


register_inversion("edit_friendly", InversionMethod(edit_friendly, pinned=True, draws_noise=True))
