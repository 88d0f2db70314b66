"""Noise levels and moves, against diffusers' own schedulers and against algebra in float64."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)

from s2edit_pipeline.noise_schedule import add_noise, ddim_move, ddpm_mean, diffusion_schedule, split_prediction, training_target

KINDS = ("epsilon", "v_prediction")


def scheduler(kind: str, **changes: object) -> DDIMScheduler:
    settings = dict(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=kind,
    )  # fmt: skip
    return DDIMScheduler(**{**settings, **changes})


def tensors(n: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 4, 5, 6, generator=generator, dtype=torch.float64) for _ in range(n)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changes", [{}, {"set_alpha_to_one": True}, {"timestep_spacing": "trailing", "steps_offset": 0}]
)
def test_a_step_down_is_diffusers_own(kind: str, changes: dict[str, object]) -> None:
    theirs = scheduler(kind, **changes)
    theirs.alphas_cumprod = theirs.alphas_cumprod.double()
    schedule = noise_schedule(theirs, 20)
    theirs.set_timesteps(20)
    assert schedule.timesteps.flip(0).tolist() == theirs.timesteps.tolist()
    x, output = tensors()
    for k in (20, 7, 1):
        mine = ddim_move(x, output, schedule.alphas_bar[k], schedule.alphas_bar[k - 1], kind)
        wanted = theirs.step(output, schedule.timesteps[k - 1], x, eta=0.0).prev_sample
        torch.testing.assert_close(mine, wanted.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stochastic_step_down_is_diffusers_own(kind: str) -> None:
    theirs = scheduler(kind)
    theirs.alphas_cumprod = theirs.alphas_cumprod.double()
    schedule = noise_schedule(theirs, 20)
    theirs.set_timesteps(20)
    x, output = tensors()
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for k in (20, 7, 2):
        mean, sigma = ddpm_mean(x, output, schedule.alphas_bar[k], schedule.alphas_bar[k - 1], kind)
        wanted = theirs.step(output, schedule.timesteps[k - 1], x, eta=1.0, variance_noise=z).prev_sample
        torch.testing.assert_close(mean + sigma * z, wanted.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_up_is_diffusers_own(kind: str) -> None:
    own = scheduler(kind)
    schedule = noise_schedule(own, 20)
    inverse = DDIMInverseScheduler.from_config(own.config, timestep_spacing="leading")
    inverse.set_timesteps(20)
    x, output = tensors()
    for k in (3, 10, 19):  # from level k to k + 1
        mine = ddim_move(x, output, schedule.alphas_bar[k], schedule.alphas_bar[k + 1], kind)
        t = schedule.timesteps[k]  # diffusers names the move by where it arrives
        wanted = inverse.step(output, int(t), x).prev_sample
        torch.testing.assert_close(mine, wanted.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_is_the_identity(kind: str) -> None:
    x, output = tensors()
    up = ddim_move(x, output, 0.9, 0.4, kind)
    x0, epsilon = split_prediction(output, x, 0.9, kind)
    # what the U-Net would have to say up there for the same x_0 and epsilon
    output_up = training_target(x0, epsilon, 0.4, kind)
    torch.testing.assert_close(ddim_move(up, output_up, 0.4, 0.9, kind), x)


@pytest.mark.parametrize("kind", KINDS)
def test_targets_and_noise_are_diffusers_own(kind: str) -> None:
    own = scheduler(kind)
    x0, epsilon = tensors()
    t = torch.tensor([0, 500, 999])
    alpha_bar = own.alphas_cumprod.double()[t]
    torch.testing.assert_close(add_noise(x0, epsilon, alpha_bar), own.add_noise(x0, epsilon, t), rtol=1e-5, atol=1e-5)
    wanted = epsilon if kind == "epsilon" else own.get_velocity(x0, epsilon, t)
    target = training_target(x0, epsilon, alpha_bar, kind)
    torch.testing.assert_close(target, wanted, rtol=1e-5, atol=1e-5)
    found = split_prediction(target, add_noise(x0, epsilon, alpha_bar), alpha_bar, kind)
    torch.testing.assert_close(found[0], x0)
    torch.testing.assert_close(found[1], epsilon)


def test_v_by_hand() -> None:
    x0, epsilon, a = torch.tensor([[[[2.0]]]]), torch.tensor([[[[3.0]]]]), 0.36
    v = 0.6 * 3 - 0.8 * 2
    assert training_target(x0, epsilon, a, "v_prediction").item() == pytest.approx(v, rel=1e-6)
    assert add_noise(x0, epsilon, a).item() == pytest.approx(0.6 * 2 + math.sqrt(0.64) * 3, rel=1e-6)


@pytest.mark.parametrize("kind", [PNDMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_any_diffusion_scheduler_serves_and_stays_as_it_is(kind: type) -> None:
    other = kind.from_config(scheduler("epsilon").config)
    before = dict(other.config)
    schedule = noise_schedule(other, 10)
    assert dict(other.config) == before
    torch.testing.assert_close(schedule.alphas_bar, noise_schedule(scheduler("epsilon"), 10).alphas_bar)


def test_what_cannot_serve_is_named() -> None:
    with pytest.raises(ValueError, match=r"FlowMatchEulerDiscreteScheduler.*alphas_cumprod.*DDIMScheduler"):
        noise_schedule(FlowMatchEulerDiscreteScheduler(), 10)
    with pytest.raises(ValueError, match="prediction_type='sample'"):
        noise_schedule(scheduler("sample"), 10)


@pytest.mark.parametrize("steps", [0, -3, 1001, 10.0, "50"])
def test_impossible_numbers_of_steps(steps: object) -> None:
    with pytest.raises(ValueError, match="num_inference_steps must be a whole number from 1 to 1000"):
        noise_schedule(scheduler("epsilon"), steps)  # type: ignore[arg-type]
