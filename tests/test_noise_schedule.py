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
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from s2edit_pipeline.family_flow import dynamic_mu, word_mean
from s2edit_pipeline.noise_schedule import (
    PREDICTIONS,
    FlowTime,
    NoiseSchedule,
    diffusion_schedule,
    diffusion_training_schedule,
    flow_training_schedule,
)
from s2edit_pipeline.prompt_columns import Segment

KINDS = ("epsilon", "v_prediction")


def ddim(kind: str, **changes: object) -> DDIMScheduler:
    settings = dict(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=kind,
    )  # fmt: skip
    return DDIMScheduler(**{**settings, **changes})


def levels(prediction: str, *alphas_bar: float) -> NoiseSchedule:
    """Variance-preserving levels, cleanest first."""
    a = torch.tensor(alphas_bar, dtype=torch.float64)
    return NoiseSchedule(a.sqrt(), (1 - a).sqrt(), torch.arange(len(a) - 1), prediction)


def flow_levels(*sigmas: float, prediction: str = "flow") -> NoiseSchedule:
    """A flow's levels, cleanest first."""
    s = torch.tensor(sigmas, dtype=torch.float64)
    return NoiseSchedule(1 - s, s, s[1:], prediction)


def tensors(n: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 4, 5, 6, generator=generator, dtype=torch.float64) for _ in range(n)]


# ------------------------------------------------------------------------------ diffusion, beside diffusers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changes", [{}, {"set_alpha_to_one": True}, {"timestep_spacing": "trailing", "steps_offset": 0}]
)
def test_a_step_down_is_diffusers_step(kind: str, changes: dict[str, object]) -> None:
    scheduler = ddim(kind, **changes)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    schedule = diffusion_schedule(scheduler, 20)
    scheduler.set_timesteps(20)
    assert schedule.timesteps.flip(0).tolist() == scheduler.timesteps.tolist()
    assert schedule.prediction == kind and schedule.num_steps == 20
    x, output = tensors()
    for k in (20, 7, 1):
        reference = scheduler.step(output, schedule.timesteps[k - 1], x, eta=0.0).prev_sample
        torch.testing.assert_close(schedule.move(x, output, k, k - 1), reference.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_random_step_down_is_diffusers_step(kind: str) -> None:
    scheduler = ddim(kind)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    schedule = diffusion_schedule(scheduler, 20)
    scheduler.set_timesteps(20)
    x, output = tensors()
    for k in (20, 7, 2):
        mean = schedule.posterior_mean(x, output, k, k - 1)
        nothing = torch.zeros_like(x)
        reference = scheduler.step(output, schedule.timesteps[k - 1], x, eta=1.0, variance_noise=nothing).prev_sample
        torch.testing.assert_close(mean, reference.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_up_is_diffusers_step(kind: str) -> None:
    scheduler = ddim(kind)
    schedule = diffusion_schedule(scheduler, 20)
    inverse = DDIMInverseScheduler.from_config(scheduler.config, timestep_spacing="leading")
    inverse.set_timesteps(20)
    x, output = tensors()
    for k in (3, 10, 19):  # from level k to k + 1; diffusers names the move by where it arrives
        reference = inverse.step(output, int(schedule.timesteps[k]), x).prev_sample
        torch.testing.assert_close(schedule.move(x, output, k, k + 1), reference.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_training_targets_and_noise_are_diffusers_formulas(kind: str) -> None:
    """At three levels in one batch, each picture its own."""
    scheduler = ddim(kind)
    schedule = diffusion_training_schedule(scheduler)
    x0, epsilon = tensors()
    t = torch.tensor([0, 500, 999])
    assert schedule.timesteps[t].tolist() == t.tolist() and schedule.num_steps == 1000
    x = schedule.noised(x0, epsilon, t + 1)
    torch.testing.assert_close(x, scheduler.add_noise(x0, epsilon, t), rtol=1e-5, atol=1e-5)
    reference = epsilon if kind == "epsilon" else scheduler.get_velocity(x0, epsilon, t)
    target = schedule.target(x0, epsilon, t + 1)
    torch.testing.assert_close(target, reference, rtol=1e-5, atol=1e-5)
    for whole, picture in zip(schedule.split(target, x, t + 1), (x0, epsilon), strict=True):
        torch.testing.assert_close(whole, picture)
    assert (float(schedule.signal[0]), float(schedule.noise[0])) == (1.0, 0.0)  # level 0 is the picture itself


def test_v_by_hand() -> None:
    x0, epsilon, schedule = torch.tensor([[[[2.0]]]]), torch.tensor([[[[3.0]]]]), levels("v_prediction", 1.0, 0.36)
    v = 0.6 * 3 - 0.8 * 2
    assert schedule.target(x0, epsilon, 1).item() == pytest.approx(v, rel=1e-6)
    assert schedule.noised(x0, epsilon, 1).item() == pytest.approx(0.6 * 2 + math.sqrt(0.64) * 3, rel=1e-6)


@pytest.mark.parametrize("kind", [PNDMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_any_diffusion_scheduler_serves_and_stays_as_it_is(kind: type) -> None:
    other = kind.from_config(ddim("epsilon").config)
    before = dict(other.config)
    schedule, reference = diffusion_schedule(other, 10), diffusion_schedule(ddim("epsilon"), 10)
    assert dict(other.config) == before
    torch.testing.assert_close(schedule.signal, reference.signal)
    torch.testing.assert_close(schedule.noise, reference.noise)
    assert schedule.signature == reference.signature


def test_the_signature_tells_levels_timesteps_and_predictions_apart() -> None:
    schedules = [
        diffusion_schedule(ddim("epsilon"), 10),
        diffusion_schedule(ddim("v_prediction"), 10),
        diffusion_schedule(ddim("epsilon"), 11),
        diffusion_schedule(ddim("epsilon", set_alpha_to_one=True), 10),
        diffusion_schedule(ddim("epsilon", steps_offset=0), 10),
        diffusion_schedule(ddim("epsilon", beta_end=0.0121), 10),
    ]
    assert len({schedule.signature for schedule in schedules}) == len(schedules)
    assert diffusion_schedule(ddim("epsilon"), 10).signature == schedules[0].signature


# ------------------------------------------------------------------------------ flows, beside diffusers


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flows_step_down_is_eulers(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(12)
    sigmas = scheduler.sigmas.double().flip(0)
    schedule = NoiseSchedule(1 - sigmas, sigmas, scheduler.timesteps.flip(0), "flow")
    x, *outputs = (tensor.float() for tensor in tensors(13))
    for k in range(12, 0, -1):
        output = outputs[k - 1]
        moved = schedule.move(x, output, k, k - 1)
        x = scheduler.step(output, schedule.timesteps[k - 1], x).prev_sample
        torch.testing.assert_close(moved, x, rtol=1e-6, atol=1e-6)


def test_a_flow_is_noised_and_trained_as_diffusers_does() -> None:
    """``scale_noise`` of the pipelines; the target of the training scripts is noise minus picture."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    sigmas = torch.cat([torch.zeros(1), scheduler.sigmas.flip(0)]).double()
    schedule = NoiseSchedule(1 - sigmas, sigmas, scheduler.timesteps.flip(0), "flow")
    x0, epsilon = tensors()
    level = torch.tensor([3, 500, 1000])
    reference = scheduler.scale_noise(x0, schedule.timesteps[level - 1], epsilon)
    torch.testing.assert_close(schedule.noised(x0, epsilon, level), reference, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(schedule.target(x0, epsilon, level), epsilon - x0)


# ------------------------------------------------------------------------------ algebra


SCHEDULES = {
    "epsilon": levels("epsilon", 0.99, 0.9, 0.4),
    "v_prediction": levels("v_prediction", 0.99, 0.9, 0.4),
    "flow": flow_levels(0.0, 0.3, 0.8),
    "epsilon along a flow": flow_levels(0.01, 0.3, 0.8, prediction="epsilon"),
    "flow along a diffusion": levels("flow", 0.99, 0.9, 0.4),
}
"""v is a rotation only where a^2 + s^2 = 1; the other predictions serve any pair of signal and noise."""


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_a_perfect_answer_stands_for_is_what_was_noised(name: str) -> None:
    schedule, (x0, epsilon) = SCHEDULES[name], tensors()
    for level in (1, 2, torch.tensor([2, 1, 2])):
        x, target = schedule.noised(x0, epsilon, level), schedule.target(x0, epsilon, level)
        picture, noise = schedule.split(target, x, level)
        torch.testing.assert_close(picture, x0, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(noise, epsilon, rtol=1e-12, atol=1e-12)
        if isinstance(level, int):
            torch.testing.assert_close(x, float(schedule.signal[level]) * x0 + float(schedule.noise[level]) * epsilon)
    assert {schedule.prediction for schedule in SCHEDULES.values()} == set(PREDICTIONS)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_batch_of_levels_is_each_picture_alone(name: str) -> None:
    schedule, (x, output) = SCHEDULES[name], tensors()
    level, next_level = torch.tensor([2, 1, 2]), torch.tensor([1, 2, 0])
    moved = schedule.move(x, output, level, next_level)
    for i in range(3):
        alone = schedule.move(x[i : i + 1], output[i : i + 1], int(level[i]), int(next_level[i]))
        torch.testing.assert_close(moved[i : i + 1], alone)


@pytest.mark.parametrize("name", SCHEDULES)
def test_there_and_back_is_the_identity(name: str) -> None:
    schedule, (x, output) = SCHEDULES[name], tensors()
    up = schedule.move(x, output, 1, 2)
    x0, epsilon = schedule.split(output, x, 1)
    # what the denoiser would have to answer up there for the same picture and noise
    output_up = schedule.target(x0, epsilon, 2)
    torch.testing.assert_close(schedule.move(up, output_up, 2, 1), x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(schedule.move_by_noise(x, epsilon, 1, 2), up, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("k", "j"), [(2, 1), (2, 0), (1, 0)])
def test_the_random_step_is_the_gaussian_posterior(name: str, k: int, j: int) -> None:
    """Naive: x_k is ``r x_j`` and noise of its own, so that what is known of x_j from x_0 and from x_k is weighed by
    the precision of each."""
    schedule, (x, output) = SCHEDULES[name], tensors()
    mean = schedule.posterior_mean(x, output, k, j)
    x0, _ = schedule.split(output, x, k)
    a, s = float(schedule.signal[k]), float(schedule.noise[k])
    a_next, s_next = float(schedule.signal[j]), float(schedule.noise[j])
    if s_next == 0:  # nothing is unknown about the picture itself
        torch.testing.assert_close(mean, x0 * a_next)
        return
    r = a / a_next
    variance_between = s**2 - r**2 * s_next**2
    precision = 1 / s_next**2 + r**2 / variance_between
    reference = (a_next * x0 / s_next**2 + r * x / variance_between) / precision
    torch.testing.assert_close(mean, reference, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------ what cannot serve


def test_what_cannot_serve_is_named() -> None:
    with pytest.raises(ValueError, match=r"FlowMatchEulerDiscreteScheduler.*alphas_cumprod.*DDIMScheduler"):
        diffusion_schedule(FlowMatchEulerDiscreteScheduler(), 10)
    with pytest.raises(ValueError, match="prediction_type='sample'"):
        diffusion_schedule(ddim("sample"), 10)
    with pytest.raises(ValueError, match=r"timestep_type='continuous'.*not the discrete timesteps'"):
        diffusion_schedule(EulerDiscreteScheduler(timestep_type="continuous"), 10)
    with pytest.raises(ValueError, match=r"use_flow_sigmas=True.*made for flow matching"):
        diffusion_schedule(DPMSolverMultistepScheduler(use_flow_sigmas=True), 10)


@pytest.mark.parametrize("steps", [0, -3, 1001, 10.0, "50"])
def test_impossible_numbers_of_steps(steps: object) -> None:
    with pytest.raises(ValueError, match="num_inference_steps must be a whole number from 1 to 1000"):
        diffusion_schedule(ddim("epsilon"), steps)  # type: ignore[arg-type]


def test_steps_that_leave_no_room_for_the_offset() -> None:
    with pytest.raises(ValueError, match=r"num_inference_steps=1000 is too many.*start at 1000 of 999. Take fewer"):
        diffusion_schedule(ddim("epsilon", timestep_spacing="leading"), 1000)


def test_pure_noise_tells_nothing_from_epsilon_and_everything_from_v() -> None:
    """Zero terminal SNR (Lin et al. 2024): a = 0, and the picture is x_0 = (x - n) / 0; v is minus the picture."""
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "steps_offset": 0}
    scheduler = ddim("epsilon", **zero)
    advice = (
        r"DDIMScheduler ends in pure noise \(rescale_betas_zero_snr=True\) and the model predicts epsilon.*"
        r"pipe.scheduler = DDIMScheduler.from_config\(pipe.scheduler.config, rescale_betas_zero_snr=False\)"
    )
    for call in (lambda: diffusion_schedule(scheduler, 10), lambda: diffusion_training_schedule(scheduler)):
        with pytest.raises(ValueError, match=advice):
            call()
    mended = DDIMScheduler.from_config(scheduler.config, rescale_betas_zero_snr=False)
    assert float(diffusion_schedule(mended, 10).signal.min()) > 0
    assert float(diffusion_training_schedule(mended).signal.min()) > 0

    schedule, (x, output) = diffusion_schedule(ddim("v_prediction", **zero), 10), tensors()
    assert float(schedule.signal[10]) == 0 and float(schedule.noise[10]) == 1
    picture, noise = schedule.split(output, x, 10)
    assert torch.equal(picture, -output) and torch.equal(noise, x)
    a, s = float(schedule.signal[9]), float(schedule.noise[9])
    torch.testing.assert_close(schedule.move(x, output, 10, 9), -a * output + s * x)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flows_training_levels_are_its_schedulers_own(shift: float) -> None:
    """Before ``set_timesteps`` diffusers' scheduler holds the levels of training, and what the model is told there."""
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=50, shift=shift)
    levels = flow_training_schedule(scheduler, FlowTime(at_one=50.0))
    torch.testing.assert_close(levels.noise[1:].float(), scheduler.sigmas.flip(0), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(levels.timesteps, scheduler.timesteps.flip(0), rtol=1e-6, atol=1e-5)
    assert levels.noise[0] == 0 and levels.num_steps == 50
    torch.testing.assert_close(levels.signal + levels.noise, torch.ones(51, dtype=torch.float64))


@pytest.mark.parametrize("cells", [256, 1024, 4096])
def test_a_flows_training_levels_are_shifted_by_the_pictures_size(cells: int) -> None:
    """``s -> e^mu / (e^mu + 1 / s - 1)`` (Esser et al. 2024, section 5.3.2), mu as FLUX's own pipeline has it."""
    scheduler = FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=20, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
    )
    mu = dynamic_mu(scheduler, cells)
    assert mu is not None
    assert mu == pytest.approx(calculate_shift(cells, 256, 4096, 0.5, 1.15), abs=1e-12)
    levels = flow_training_schedule(scheduler, FlowTime(mu=mu))
    for k in range(1, 21):
        wanted = math.exp(mu) / (math.exp(mu) + 20 / k - 1)
        assert float(levels.noise[k]) == pytest.approx(wanted, abs=1e-6)
    assert dynamic_mu(FlowMatchEulerDiscreteScheduler(shift=3.0), cells) is None


def test_a_prompts_mean_is_over_its_words_alone() -> None:
    output = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    words = Segment("t5", {}, {}, spans=(None,) * 6, start=1, eos=4, kept=tuple(range(6)))
    wanted = [sum(float(output[row, column]) for row in (1, 2, 3)) / 3 for column in range(5)]
    torch.testing.assert_close(word_mean(output, words), torch.tensor(wanted, dtype=torch.float64))
    empty = Segment("t5", {}, {}, spans=(None,) * 6, start=0, eos=0, kept=tuple(range(6)))
    assert torch.equal(word_mean(output, empty), output[0])  # of an empty prompt: what follows it
