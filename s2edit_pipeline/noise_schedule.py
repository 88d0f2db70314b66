"""The noise levels of one call, and every formula that moves between them.

A picture x_0 and noise n make the latents of a level, ``x = a x_0 + s n``: ``a`` is the level's signal, ``s`` its
noise. A variance-preserving diffusion has ``a = sqrt(abar)``, ``s = sqrt(1 - abar)`` (DDIM, Song et al. 2021); flow
matching has ``a = 1 - sigma``, ``s = sigma`` (Lipman et al. 2023). The same moves serve both: with a flow's levels
DDIM's step is Euler's.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

PREDICTIONS = ("epsilon", "v_prediction", "flow")
"""What a denoiser may return: the noise n, ``a n - s x_0`` (Salimans & Ho 2022), or ``n - x_0``."""

Level = int | torch.Tensor
"""One level's number, or (B,) int64, one for each picture."""


@dataclass(frozen=True)
class NoiseSchedule:
    """The noise levels of one call, cleanest first.

    Attributes:
        signal, noise: (N + 1,) float64, a and s of each level; level 0 is the picture itself, level N the noisiest.
        timesteps: (N,), what the denoiser is told at level ``k`` is ``timesteps[k - 1]``.
        prediction: what the denoiser returns, one of ``PREDICTIONS``.
        clean_timestep: of a flow: what the denoiser would be told at level 0.
    """

    signal: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    prediction: str
    clean_timestep: float = 0.0

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    @property
    def signature(self) -> str:
        """Equal for schedules with the same levels, timesteps and prediction."""
        levels = [f"{value:.9g}" for value in (*self.signal.tolist(), *self.noise.tolist(), *self.timesteps.tolist())]
        return f"{self.prediction}: {' '.join(levels)}"

    def timestep(self, level: float) -> float:
        """What the denoiser is told at ``level``; half way between two levels of a flow, which is told its noise, the
        mean of theirs."""
        lower = int(level)
        if lower != level:
            return (self.timestep(lower) + self.timestep(lower + 1)) / 2
        told: float = self.timesteps[lower - 1].item() if lower else self.clean_timestep
        return told

    def noised(self, x0: torch.Tensor, epsilon: torch.Tensor, level: Level) -> torch.Tensor:
        """``a x_0 + s n`` of the picture ``x0`` and the noise ``epsilon``, (B, C, H, W) each."""
        a, s = self._factors(level, x0)
        return a * x0 + s * epsilon

    def split(self, output: torch.Tensor, x: torch.Tensor, level: Level) -> tuple[torch.Tensor, torch.Tensor]:
        """The ``(x_0, n)`` that the denoiser's ``output`` at ``x`` stands for; all (B, C, H, W)."""
        a, s = self._factors(level, x)
        if self.prediction == "epsilon":
            return (x - s * output) / a, output
        if self.prediction == "v_prediction":
            return a * x - s * output, a * output + s * x
        return (x - s * output) / (a + s), (x + a * output) / (a + s)

    def target(self, x0: torch.Tensor, epsilon: torch.Tensor, level: Level) -> torch.Tensor:
        """What the denoiser should return at ``noised(x0, epsilon, level)``."""
        if self.prediction == "epsilon":
            return epsilon
        if self.prediction == "v_prediction":
            a, s = self._factors(level, x0)
            return a * epsilon - s * x0
        return epsilon - x0

    def move(self, x: torch.Tensor, output: torch.Tensor, level: Level, next_level: Level) -> torch.Tensor:
        """From ``level`` to ``next_level``, cleaner or noisier (DDIM, equation 12 with sigma 0; a flow's Euler step).

        ``output`` is the denoiser's, at ``x``; with it unchanged the move back is the exact inverse.
        """
        x0, epsilon = self.split(output, x, level)
        return self.noised(x0, epsilon, next_level)

    def move_by_noise(self, x: torch.Tensor, epsilon: torch.Tensor, level: Level, next_level: Level) -> torch.Tensor:
        """:meth:`move`, given the noise that the denoiser predicted somewhere else."""
        a, s = self._factors(level, x)
        return self.noised((x - s * epsilon) / a, epsilon, next_level)

    def posterior_mean(self, x: torch.Tensor, output: torch.Tensor, level: int, next_level: int) -> torch.Tensor:
        """(B, C, H, W), the mean of the random step down to ``next_level`` (DDIM, equations 12 and 16 with eta 1:
        DDPM's step)."""
        x0, epsilon = self.split(output, x, level)
        a, s = self.signal[level], self.noise[level]
        a_next, s_next = self.signal[next_level], self.noise[next_level]
        variance = s_next**2 * (1 - (a * s_next / (a_next * s)) ** 2)
        return a_next.to(x) * x0 + (s_next**2 - variance).clamp(min=0).sqrt().to(x) * epsilon

    def _factors(self, level: Level, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(a, s) in ``x``'s dtype, shaped to multiply it."""
        levels = torch.as_tensor(level, device="cpu").reshape(-1, *[1] * (x.ndim - 1))
        return self.signal[levels].to(x), self.noise[levels].to(x)


def diffusion_schedule(scheduler: Any, num_inference_steps: int) -> NoiseSchedule:
    """The levels that DDIM visits in ``num_inference_steps`` steps with ``scheduler``'s own settings.

    ``scheduler`` (any with ``alphas_cumprod``) is read, never changed.

    Raises:
        ValueError: the scheduler can't serve, or the number of steps is out of its range.
    """
    check_diffusion_scheduler(scheduler)
    num_train = _checked_steps(scheduler, num_inference_steps)
    known = {key: value for key, value in scheduler.config.items() if key in DDIMScheduler().config}
    ddim = DDIMScheduler.from_config({**known, "clip_sample": False, "thresholding": False})
    ddim.set_timesteps(num_inference_steps)
    timesteps = ddim.timesteps.flip(0).cpu()
    if int(timesteps[-1]) >= num_train:  # steps_offset and "leading" spacing leave no room for all of them
        raise ValueError(
            f"num_inference_steps={num_inference_steps} is too many for this scheduler's timestep_spacing and "
            f"steps_offset: it would start at {int(timesteps[-1])} of {num_train - 1}. Take fewer."
        )
    alphas_bar = torch.cat([ddim.final_alpha_cumprod.reshape(1).double(), ddim.alphas_cumprod[timesteps].double()])
    return _variance_preserving(alphas_bar, timesteps, scheduler)


def _checked_steps(scheduler: Any, num_inference_steps: Any) -> int:
    """How many levels ``scheduler`` was trained at, which is the most steps that can be made.

    Raises:
        ValueError: more are asked for, or what is no number of steps.
    """
    num_train: int = scheduler.config.num_train_timesteps
    if not isinstance(num_inference_steps, int) or not 1 <= num_inference_steps <= num_train:
        raise ValueError(
            f"num_inference_steps must be a whole number from 1 to {num_train}, not {num_inference_steps!r}."
        )
    return num_train


def diffusion_training_schedule(scheduler: Any) -> NoiseSchedule:
    """Every level that the model was trained at: level ``k`` is timestep ``k - 1``, level 0 the picture itself."""
    check_diffusion_scheduler(scheduler)
    alphas_bar = torch.cat([torch.ones(1, dtype=torch.float64), scheduler.alphas_cumprod.cpu().double()])
    return _variance_preserving(alphas_bar, torch.arange(len(alphas_bar) - 1), scheduler)


def _variance_preserving(alphas_bar: torch.Tensor, timesteps: torch.Tensor, scheduler: Any) -> NoiseSchedule:
    prediction = scheduler.config.get("prediction_type", "epsilon")
    if prediction == "epsilon" and float(alphas_bar[1:].min()) == 0:
        raise ValueError(
            f"{type(scheduler).__name__} ends in pure noise (rescale_betas_zero_snr=True) and the model predicts "
            "epsilon: where there is no signal, the picture can't be told from a prediction of the noise. Load the "
            "scheduler without it: pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, "
            "rescale_betas_zero_snr=False)."
        )
    return NoiseSchedule(alphas_bar.sqrt(), (1 - alphas_bar).sqrt(), timesteps, prediction)


def check_diffusion_scheduler(scheduler: Any) -> None:
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
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise ValueError(f"{name} has prediction_type={prediction!r}; 'epsilon' and 'v_prediction' can be inverted.")


# ------------------------------------------------------------------------------ flows


@dataclass(frozen=True)
class FlowTime:
    """What a flow's denoiser is told at the noise ``sigma``: ``at_zero + (at_one - at_zero) sigma``; and how its
    scheduler is asked for the levels.

    Attributes:
        at_zero, at_one: what it is told of a picture, and of noise.
        mu: of a scheduler that shifts its levels by the picture's size (``use_dynamic_shifting``).
        sigmas: (N,) the noises that the scheduler shifts, noisiest first; None: its own.
    """

    at_zero: float = 0.0
    at_one: float = 1.0
    mu: float | None = None
    sigmas: Any = None

    def told(self, sigmas: torch.Tensor) -> torch.Tensor:
        return self.at_zero + (self.at_one - self.at_zero) * sigmas


def flow_schedule(scheduler: Any, num_inference_steps: int, time: FlowTime) -> NoiseSchedule:
    """The levels that ``scheduler`` (read, never changed) visits in ``num_inference_steps`` steps.

    Raises:
        ValueError: the scheduler can't serve, or the number of steps is out of its range.
    """
    check_flow_scheduler(scheduler)
    _checked_steps(scheduler, num_inference_steps)
    asked = copy.deepcopy(scheduler)
    shifted = {"mu": time.mu} if scheduler.config.use_dynamic_shifting else {}
    if time.sigmas is None:
        asked.set_timesteps(num_inference_steps, **shifted)
    else:
        asked.set_timesteps(sigmas=time.sigmas, **shifted)
    if not bool(torch.isfinite(asked.sigmas).all()):
        raise ValueError(
            f"num_inference_steps={num_inference_steps} is too few for this scheduler, which stretches its levels to "
            "shift_terminal. Take 2 or more."
        )
    return _straight(asked.sigmas.flip(0).cpu(), time)


def flow_training_schedule(scheduler: Any, time: FlowTime) -> NoiseSchedule:
    """Every level that the model was trained at, shifted as the scheduler shifts them (Esser et al. 2024, section
    5.3.2)."""
    check_flow_scheduler(scheduler)
    config = scheduler.config
    sigmas = torch.arange(1, config.num_train_timesteps + 1, dtype=torch.float32) / config.num_train_timesteps
    if config.use_dynamic_shifting:
        sigmas = scheduler.time_shift(time.mu, 1.0, sigmas)
    else:
        sigmas = config.shift * sigmas / (1 + (config.shift - 1) * sigmas)
    return _straight(torch.cat([torch.zeros(1), sigmas]), time)


def _straight(sigmas: torch.Tensor, time: FlowTime) -> NoiseSchedule:
    """Of (N + 1,) noises, cleanest first."""
    noise = sigmas.double()
    return NoiseSchedule(1 - noise, noise, time.told(sigmas[1:]), "flow", time.at_zero)


def check_flow_scheduler(scheduler: Any) -> None:
    """Raises:
    ValueError: ``scheduler`` doesn't give a flow's levels.
    """
    name = type(scheduler).__name__
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) and not scheduler.config.invert_sigmas:
        return
    why = f"{name} counts its noise levels the other way" if hasattr(scheduler, "time_shift") else f"{name} gives none"
    raise ValueError(
        f"This model is a flow, and its levels are read off a FlowMatchEulerDiscreteScheduler; {why}. Load the "
        "model's own: pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(model, subfolder='scheduler')."
    )


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
