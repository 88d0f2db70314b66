"""Inversions against analytic models, exact algebra in float64, and a naive optimisation loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from PIL import Image

from s2edit_pipeline.inversion_ddim import ddim_trajectory
from s2edit_pipeline.inversion_record import INVERSIONS, Inversion, _fixed_point, guided, inversion_method, num_inversion_steps
from s2edit_pipeline.noise_schedule import NoiseSchedule, ddim_move
from s2edit_pipeline.pipeline import S2EditPipeline

KINDS = ("epsilon", "v_prediction")


def levels(n: int, kind: str = "epsilon") -> NoiseSchedule:
    """sigma = sqrt((1 - abar) / abar), in which DDIM is Euler's method, in equal steps from 0 to 4; float64."""
    sigma = torch.linspace(0, 4, n + 1, dtype=torch.float64)
    return NoiseSchedule(1 / (1 + sigma**2), torch.arange(n), kind)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian_denoiser(schedule: NoiseSchedule, mean: float, deviation: float) -> Callable[..., torch.Tensor]:
    """The perfect network for pictures distributed as N(mean, deviation^2): E[eps | x], or v."""

    def denoise(x: torch.Tensor, level: int, prompt_embeds: torch.Tensor) -> torch.Tensor:
        a = float(schedule.alphas_bar[level])
        variance = a * deviation**2 + 1 - a
        epsilon = math.sqrt(1 - a) * (x - math.sqrt(a) * mean) / variance
        if schedule.prediction_type == "epsilon":
            return epsilon
        x0 = (x - math.sqrt(1 - a) * epsilon) / math.sqrt(a)
        return math.sqrt(a) * epsilon - math.sqrt(1 - a) * x0

    return denoise


@pytest.mark.parametrize("kind", KINDS)
def test_the_trajectory_converges_to_the_probability_flow(kind: str) -> None:
    """For Gaussian pictures the flow is known: (x_t - sqrt(abar) m) / sqrt(abar s^2 + 1 - abar) stays. Order one."""
    mean, deviation, x0 = 0.7, 0.5, normal(1, 4, 3, 3)
    errors = []
    for n in (400, 800, 1600):
        schedule = levels(n, kind)
        path = ddim_trajectory(gaussian_denoiser(schedule, mean, deviation), x0, schedule, x0, lambda _: None)
        assert path.shape == (n + 1, 4, 3, 3)
        torch.testing.assert_close(path[:1], x0, rtol=0, atol=0)
        a0, a = float(schedule.alphas_bar[0]), float(schedule.alphas_bar[n])
        z = (x0 - math.sqrt(a0) * mean) / math.sqrt(a0 * deviation**2 + 1 - a0)
        wanted = math.sqrt(a) * mean + math.sqrt(a * deviation**2 + 1 - a) * z
        errors.append(float((path[-1:] - wanted).abs().max()))
    for coarse, fine in pairwise(errors):
        assert 1.85 < coarse / fine < 2.15, errors  # half the step, half the error


def curved_denoiser(x: torch.Tensor, level: int, prompt_embeds: torch.Tensor) -> torch.Tensor:
    """A network whose answer depends, nonlinearly, on everything."""
    return torch.tanh(x * 0.8 + prompt_embeds.mean() + 0.01 * level) + 0.3 * torch.sin(2 * x.roll(1, -1))


@pytest.mark.parametrize("kind", KINDS)
def test_the_walk_up_is_the_naive_loop(kind: str) -> None:
    schedule, x0, embeds = levels(6, kind), normal(1, 2, 3, 3), normal(1, 4, 5, seed=1)
    path = ddim_trajectory(curved_denoiser, x0, schedule, embeds, lambda _: None)
    x = x0
    for k in range(6):
        out = curved_denoiser(x, max(k, 1), embeds)
        a, b = float(schedule.alphas_bar[k]), float(schedule.alphas_bar[k + 1])
        eps = out if kind == "epsilon" else math.sqrt(a) * out + math.sqrt(1 - a) * x
        x = math.sqrt(b) * (x - math.sqrt(1 - a) * eps) / math.sqrt(a) + math.sqrt(1 - b) * eps
        torch.testing.assert_close(path[k + 1 : k + 2], x)


@pytest.mark.parametrize(("rescale", "scale"), [(0.0, 4.5), (0.7, 4.5), (1.0, 1.0), (0.0, 0.0)])
def test_guidance_is_the_formula(rescale: float, scale: float) -> None:
    unconditional, conditional = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1)
    found = guided(unconditional, conditional, scale, rescale)
    for i in range(2):
        plain = (1 - scale) * unconditional[i] + scale * conditional[i]
        matched = plain * conditional[i].std() / plain.std()
        torch.testing.assert_close(found[i], rescale * matched + (1 - rescale) * plain)


def way_back(found: torch.Tensor, nulls: torch.Tensor, schedule: NoiseSchedule, embeds: torch.Tensor) -> torch.Tensor:
    x = found[-1:]
    for k in range(schedule.num_steps, 0, -1):
        output = guided(curved_denoiser(x, k, nulls[k - 1 : k]), curved_denoiser(x, k, embeds), 4.5)
        x = ddim_move(x, output, schedule.alphas_bar[k], schedule.alphas_bar[k - 1], schedule.prediction_type)
    return x


@pytest.mark.parametrize("kind", KINDS)
def test_null_text_is_algorithm_1(kind: str) -> None:
    """Mokady et al. 2023, algorithm 1, written once more with its published settings."""
    n, x0 = 5, normal(1, 2, 3, 3)
    schedule, embeds, negative = levels(n, kind), normal(1, 4, 5, seed=1), normal(1, 4, 5, seed=2)
    calls: list[int] = []
    found = INVERSIONS["null_text"](curved_denoiser, x0, schedule, embeds, negative, 4.5, None, calls.append)
    path, nulls = found.trajectory, found.unconditional_embeds
    assert nulls is not None and nulls.shape == (n, 4, 5)
    assert calls == list(range(num_inversion_steps("null_text", n)))

    x, null = path[-1:], negative.float()
    for i in range(n):
        k = n - i
        null = null.detach().clone().requires_grad_()
        adam = torch.optim.Adam([null], lr=1e-2 * (1 - i / (2 * n)))
        for _ in range(10):
            output = curved_denoiser(x, k, null.double())
            output = output + 4.5 * (curved_denoiser(x, k, embeds) - output)
            reached = ddim_move(x, output, schedule.alphas_bar[k], schedule.alphas_bar[k - 1], kind)
            loss = ((reached - path[k - 1 : k]) ** 2).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            if loss.item() < 1e-5 + 2e-5 * i:
                break
        null = null.detach()
        torch.testing.assert_close(nulls[k - 1 : k], null, rtol=1e-4, atol=1e-5)
        output = guided(curved_denoiser(x, k, null.double()), curved_denoiser(x, k, embeds), 4.5)
        x = ddim_move(x, output, schedule.alphas_bar[k], schedule.alphas_bar[k - 1], kind)
    # and it serves its purpose
    plain = negative.expand(n, -1, -1)
    improved = (way_back(path, nulls.double(), schedule, embeds) - x0).abs().mean()
    assert improved < 0.8 * (way_back(path, plain, schedule, embeds) - x0).abs().mean()


@pytest.mark.parametrize("kind", KINDS)
def test_fixed_point_inverts_the_step_down_itself(kind: str) -> None:
    """What DDIM's steps down, unguided, lead back from; the published inversion is its first iterate."""
    schedule, embeds, x0 = levels(12, kind), normal(1, 4, 5, seed=1), normal(1, 2, 3, 3)

    def gentle(x: torch.Tensor, level: int, prompt_embeds: torch.Tensor) -> torch.Tensor:
        return 0.5 * curved_denoiser(x, level, prompt_embeds)

    def invert(num_iterations: int) -> torch.Tensor:
        asked: list[torch.Tensor] = []

        def denoise(x: torch.Tensor, level: int, prompt_embeds: torch.Tensor) -> torch.Tensor:
            asked.append(x)
            return gentle(x, level, prompt_embeds)

        path = _fixed_point(
            denoise, x0, schedule, embeds, embeds, 4.5, None, lambda _: None, num_iterations=num_iterations
        ).trajectory
        assert len(asked) == 12 * num_iterations
        # what is kept of the source's attention is of these very latents
        assert all(torch.equal(path[k : k + 1], asked[k * num_iterations - 1]) for k in range(1, 13))
        return path

    def way_down(path: torch.Tensor) -> float:
        x = path[-1:]
        for k in range(12, 0, -1):
            a, a_next = schedule.alphas_bar[k], schedule.alphas_bar[k - 1]
            x = ddim_move(x, gentle(x, k, embeds), a, a_next, kind)
        return float((x - x0).abs().max())

    errors = [way_down(invert(n)) for n in (2, 4, 8, 40)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2] and errors[3] < 1e-9, errors
    naive = ddim_trajectory(gentle, x0, schedule, embeds, lambda _: None)
    assert errors[1] < way_down(naive) / 3
    # naive: the second iterate at the first level
    a, b = (float(schedule.alphas_bar[k]) for k in (0, 1))
    out = gentle(x0, 1, embeds)
    eps = out if kind == "epsilon" else math.sqrt(b) * out + math.sqrt(1 - b) * x0
    wanted = math.sqrt(b) * (x0 - math.sqrt(1 - a) * eps) / math.sqrt(a) + math.sqrt(1 - b) * eps
    torch.testing.assert_close(invert(2)[1:2], wanted)


def test_negative_prompt_asks_with_the_sources_words() -> None:
    schedule, embeds, negative = levels(4), normal(1, 4, 5, seed=1), normal(1, 4, 5, seed=2)
    x0 = normal(1, 2, 3, 3)
    found = INVERSIONS["negative_prompt"](curved_denoiser, x0, schedule, embeds, negative, 4.5, None, lambda _: None)
    path, nulls = found.trajectory, found.unconditional_embeds
    assert nulls is not None
    torch.testing.assert_close(nulls, embeds.expand(4, -1, -1))
    # guidance then cancels, and the way back is DDIM's own at guidance 1
    x = path[-1:]
    for k in range(4, 0, -1):
        x = ddim_move(x, curved_denoiser(x, k, embeds), schedule.alphas_bar[k], schedule.alphas_bar[k - 1], "epsilon")
    torch.testing.assert_close(way_back(path, nulls, schedule, embeds), x)


def test_every_ddim_method_walks_the_same_path_up() -> None:
    schedule, embeds, x0 = levels(3), normal(1, 4, 5, seed=1), normal(1, 2, 3, 3)
    for method, invert in INVERSIONS.items():
        found = invert(curved_denoiser, x0, schedule, embeds, normal(1, 4, 5, seed=2), 4.5, _seeded(0), lambda _: None)
        path = found.trajectory
        if method not in ("edit_friendly", "fixed_point"):
            torch.testing.assert_close(path, ddim_trajectory(curved_denoiser, x0, schedule, embeds, lambda _: None))
        inversion = Inversion(method, "", path, found.unconditional_embeds, found.residuals)
        assert inversion.num_inference_steps == 3
        assert inversion.pinned is (method in ("direct", "fixed_point", "edit_friendly"))
        assert (inversion.residuals is not None) is (method == "edit_friendly")
    with pytest.raises(ValueError, match="'magic' is unknown; choose one of 'direct'"):
        check_method("magic")


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", KINDS)
def test_edit_friendly_is_algorithm_1(kind: str) -> None:
    """Huberman-Spiegelglas et al. 2024: each level noised by itself, z_t = (x_{t-1} - mu_t(x_t)) / sigma_t."""
    n, x0, embeds = 6, normal(1, 2, 3, 3), normal(1, 4, 5, seed=1)
    schedule, calls = levels(n, kind), []
    found = INVERSIONS["edit_friendly"](
        curved_denoiser, x0, schedule, embeds, normal(1, 4, 5, seed=2), 4.5, _seeded(3), calls.append
    )
    assert found.residuals is not None and calls == list(range(n))
    generator = _seeded(3)
    path = [x0]
    for k in range(1, n + 1):
        a = float(schedule.alphas_bar[k])
        path.append(math.sqrt(a) * x0 + math.sqrt(1 - a) * torch.randn(x0.shape, generator=generator).double())
    torch.testing.assert_close(found.trajectory, torch.cat(path))
    for k in range(1, n + 1):
        a, b = float(schedule.alphas_bar[k]), float(schedule.alphas_bar[k - 1])
        out = curved_denoiser(path[k], k, embeds)
        eps = out if kind == "epsilon" else math.sqrt(a) * out + math.sqrt(1 - a) * path[k]
        clean = (path[k] - math.sqrt(1 - a) * eps) / math.sqrt(a)
        sigma = math.sqrt((1 - b) / (1 - a) * (1 - a / b))
        mean = math.sqrt(b) * clean + math.sqrt(max(1 - b - sigma**2, 0)) * eps
        torch.testing.assert_close(found.residuals[k - 1 : k], path[k - 1] - mean)


@pytest.mark.parametrize("kind", KINDS)
def test_edit_friendly_comes_back_and_edits_in_the_pipeline(
    make_pipe: Callable[[str], S2EditPipeline], picture: Image.Image, kind: str
) -> None:
    pipe, prompt = make_pipe(kind), "a photo of a sad lady"
    one, same, other = (pipe.invert(picture, prompt, "edit_friendly", 6, generator=_seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(one.trajectory, same.trajectory) and not torch.equal(one.trajectory[1:], other.trajectory[1:])
    free: dict[str, Any] = {
        "image": picture, "source_prompt": prompt, "inversion": one, "guidance_scale": 1.0, "blend_words": False,
        "output_type": "latent",
    }  # fmt: skip
    # the same words, unguided and unconfined, follow the picture's own residuals home
    torch.testing.assert_close(pipe(prompt, **free).images, one.trajectory[:1], rtol=1e-3, atol=1e-3)
    edited = pipe("a photo of a smiling lady", **{**free, "guidance_scale": 4.5, "strength": 0.64}).images
    assert float((edited - one.trajectory[:1]).abs().max()) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_direct_inversion_comes_back_exactly_in_the_pipeline(
    make_pipe: Callable[[str], S2EditPipeline], picture: Image.Image, kind: str
) -> None:
    pipe = make_pipe(kind)
    prompt = "a photo of a sad lady"
    inversion = pipe.invert(picture, prompt, num_inference_steps=5)
    result: Any = pipe(
        [prompt, "a photo of a smiling lady"],
        image=picture,
        source_prompt=prompt,
        inversion=inversion,
        guidance_scale=4.5,
        output_type="latent",
    )
    torch.testing.assert_close(result.source, inversion.trajectory[:1], rtol=0, atol=0)
    # the same words again are confined to nothing: the picture itself, to the bit
    torch.testing.assert_close(result.images[:1], inversion.trajectory[:1], rtol=0, atol=0)
    assert float((result.images[1:] - inversion.trajectory[:1]).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_null_text_comes_nearer_than_ddim_in_the_pipeline(
    make_pipe: Callable[[str], S2EditPipeline], picture: Image.Image, kind: str
) -> None:
    pipe, prompt = make_pipe(kind), "a photo of a sad lady"
    states = {name: p.clone() for name, p in pipe.unet.named_parameters()}
    away = {}
    for method in ("ddim", "null_text"):
        inversion = pipe.invert(picture, prompt, method, 8, guidance_scale=7.5)
        result: Any = pipe(
            prompt, picture, prompt, inversion=inversion, guidance_scale=7.5, output_type="latent", blend_words=False,
            self_replace_steps=0.0, cross_replace_steps=0.0, guidance_stop=1.0,
        )  # fmt: skip
        away[method] = float((result.source - inversion.trajectory[:1]).abs().mean())
        # with nothing taken over, source and target are two runs of the same words
        torch.testing.assert_close(result.images, result.source, rtol=1e-4, atol=1e-4)
    assert away["null_text"] < 0.7 * away["ddim"], away
    for name, parameter in pipe.unet.named_parameters():
        assert torch.equal(parameter, states[name]) and parameter.grad is None and parameter.requires_grad, name
