"""Moves between noise levels: the noise schedule of a call, and the deterministic DDIM step in both directions.

Symbols as in DDIM (Song et al. 2021): ``x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps``; v-prediction
(Salimans & Ho 2022): ``v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler


@dataclass(frozen=True)
class NoiseSchedule:
    """The noise levels of one call, cleanest first.

    Attributes:
        alphas_bar: (N + 1,) float64; level 0 is the picture itself, level N the noisiest.
        timesteps: (N,) int64; ``timesteps[k - 1]`` is what the U-Net is told at level ``k``.
        prediction_type: what the U-Net returns: "epsilon" or "v_prediction".
    """

    alphas_bar: torch.Tensor
    timesteps: torch.Tensor
    prediction_type: str

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)


def check_scheduler(scheduler: Any) -> None:
    """Raises:
    ValueError: ``scheduler`` doesn't describe a variance-preserving diffusion with discrete timesteps.
    """
    name, config = type(scheduler).__name__, scheduler.config
    why = None
    if getattr(scheduler, "alphas_cumprod", None) is None or not hasattr(config, "num_train_timesteps"):
        why = f"{name} has no alphas_cumprod: it is not a discrete diffusion schedule"
    elif config.get("timestep_type", "discrete") != "discrete":
        why = f"{name} has timestep_type={config['timestep_type']!r}: its noise levels are not the discrete timesteps'"
    elif config.get("use_flow_sigmas"):
        why = f"{name} has use_flow_sigmas=True: it is made for flow matching"
    if why is not None:
        raise ValueError(
            f"{why}, so DDIM inversion has no meaning there. Load one that has: "
            "pipe.scheduler = DDIMScheduler.from_pretrained(model, subfolder='scheduler')."
        )
    prediction_type = scheduler.config.get("prediction_type", "epsilon")
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"{name} has prediction_type={prediction_type!r}; 'epsilon' and 'v_prediction' can be inverted."
        )


def noise_schedule(scheduler: Any, num_inference_steps: int) -> NoiseSchedule:
    """The levels that DDIM visits in ``num_inference_steps`` steps with ``scheduler``'s own settings.

    ``scheduler`` (any with ``alphas_cumprod``) is read, never changed.

    Raises:
        ValueError: the scheduler can't serve, or the number of steps is out of its range.
    """
    check_scheduler(scheduler)
    num_train = scheduler.config.num_train_timesteps
    if not isinstance(num_inference_steps, int) or not 1 <= num_inference_steps <= num_train:
        raise ValueError(
            f"num_inference_steps must be a whole number from 1 to {num_train}, not {num_inference_steps!r}."
        )
    known = {key: value for key, value in scheduler.config.items() if key in DDIMScheduler().config}
    ddim = DDIMScheduler.from_config({**known, "clip_sample": False, "thresholding": False})
    ddim.set_timesteps(num_inference_steps)
    timesteps = ddim.timesteps.flip(0).cpu()
    if int(timesteps[-1]) >= num_train:  # steps_offset and "leading" spacing leave no room for all of them
        raise ValueError(
            f"num_inference_steps={num_inference_steps} is too many for this scheduler's timestep_spacing and "
            f"steps_offset: it would start at {int(timesteps[-1])} of {num_train - 1}. Take fewer."
        )
    alphas = torch.cat([ddim.final_alpha_cumprod.reshape(1).double(), ddim.alphas_cumprod[timesteps].double()])
    return NoiseSchedule(alphas, timesteps, scheduler.config.get("prediction_type", "epsilon"))


def check_finite(latents: torch.Tensor, doing: str, step: int) -> None:
    """Raises:
    FloatingPointError: ``latents`` hold NaN or infinity; the message names what was being done, and the step.
    """
    if not bool(torch.isfinite(latents).all()):
        fix = "float32 (or bfloat16)" if latents.dtype == torch.float16 else "float32"
        raise FloatingPointError(
            f"The latents are no numbers any more (NaN or infinity) at step {step} of {doing}; the model works in "
            f"{latents.dtype}. Load it in {fix}: from_pretrained(..., dtype=torch.float32)."
        )


def gradient_scaler(device: torch.device, dtype: torch.dtype) -> torch.amp.GradScaler:
    """Loss scaling for what is differentiated through a model of ``dtype``: float16 has no gradients below 6e-8;
    other dtypes need none. A step whose scaled gradients overflow is left out, and the scale halved."""
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def _roots(alpha_bar: torch.Tensor | float, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(sqrt(abar), sqrt(1 - abar)) in ``x``'s dtype, shaped to multiply it (a number, or one for each picture)."""
    a = torch.as_tensor(alpha_bar, dtype=torch.float64, device="cpu").reshape(-1, *[1] * (x.ndim - 1))
    return a.sqrt().to(x), (1 - a).sqrt().to(x)


def split_prediction(
    output: torch.Tensor, x: torch.Tensor, alpha_bar: torch.Tensor | float, prediction_type: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``(x_0, epsilon)`` that the U-Net's ``output`` at ``x`` stands for; all (B, C, H, W)."""
    root_a, root_1a = _roots(alpha_bar, x)
    if prediction_type == "epsilon":
        return (x - root_1a * output) / root_a, output
    return root_a * x - root_1a * output, root_a * output + root_1a * x


def add_noise(x0: torch.Tensor, epsilon: torch.Tensor, alpha_bar: torch.Tensor | float) -> torch.Tensor:
    """``x_t`` of the picture ``x0`` and the noise ``epsilon``, (B, C, H, W)."""
    root_a, root_1a = _roots(alpha_bar, x0)
    return root_a * x0 + root_1a * epsilon


def training_target(
    x0: torch.Tensor, epsilon: torch.Tensor, alpha_bar: torch.Tensor | float, prediction_type: str
) -> torch.Tensor:
    """What the U-Net should return at ``add_noise(x0, epsilon, alpha_bar)``."""
    if prediction_type == "epsilon":
        return epsilon
    root_a, root_1a = _roots(alpha_bar, x0)
    return root_a * epsilon - root_1a * x0


def ddpm_mean(
    x: torch.Tensor,
    output: torch.Tensor,
    alpha_bar: torch.Tensor | float,
    alpha_bar_next: torch.Tensor | float,
    prediction_type: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean (B, C, H, W) and the deviation sigma of the DDPM step down from ``alpha_bar`` (DDIM, equations 12
    and 16 with eta 1): the next latents are ``mean + sigma z``, z normal."""
    x0, epsilon = split_prediction(output, x, alpha_bar, prediction_type)
    a, a_next = (torch.as_tensor(v, dtype=torch.float64, device="cpu") for v in (alpha_bar, alpha_bar_next))
    variance = (1 - a_next) / (1 - a) * (1 - a / a_next)
    mean = a_next.sqrt().to(x) * x0 + (1 - a_next - variance).clamp(min=0).sqrt().to(x) * epsilon
    return mean, variance.sqrt().to(x)


def ddim_move(
    x: torch.Tensor,
    output: torch.Tensor,
    alpha_bar: torch.Tensor | float,
    alpha_bar_next: torch.Tensor | float,
    prediction_type: str,
) -> torch.Tensor:
    """From noise level ``alpha_bar`` to ``alpha_bar_next``, cleaner or noisier (DDIM, equation 12 with sigma 0).

    ``output`` is the U-Net's, at ``x``; with it held fixed the move back is the exact inverse.
    """
    x0, epsilon = split_prediction(output, x, alpha_bar, prediction_type)
    return add_noise(x0, epsilon, alpha_bar_next)
