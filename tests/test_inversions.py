"""Inversions against analytic models, exact algebra in float64, and a naive optimisation loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from PIL import Image

from s2edit_pipeline.inversion_ddim import ddim_trajectory, fixed_point
from s2edit_pipeline.inversion_record import (
    INVERSIONS,
    Inversion,
    InversionPath,
    InversionTask,
    check_residuals,
    check_served,
    inversion_method,
)
from s2edit_pipeline.noise_guidance import Guidance, guided, rescaled
from s2edit_pipeline.noise_schedule import NoiseSchedule
from s2edit_pipeline.pipeline import S2EditPipeline

DIFFUSIONS = ("epsilon", "v_prediction")
KINDS = (*DIFFUSIONS, "flow")

OF_DIFFUSIONS = [name for name, method in INVERSIONS.items() if not method.flows_only]
SERVED = [(name, kind) for name in INVERSIONS for kind in KINDS if kind == "flow" or name in OF_DIFFUSIONS]

Denoise = Callable[[torch.Tensor, float, torch.Tensor], torch.Tensor]
"""``denoise(x, level, embeds)``."""


def levels(n: int, kind: str = "epsilon") -> NoiseSchedule:
    """A diffusion in equal steps of s / a from 0 to 4, in which DDIM is Euler's method; a flow in equal steps of its
    sigma; float64."""
    if kind == "flow":
        sigma = torch.linspace(0, 0.8, n + 1, dtype=torch.float64)
        return NoiseSchedule(1 - sigma, sigma, sigma[1:], kind)
    sigma = torch.linspace(0, 4, n + 1, dtype=torch.float64)
    a = 1 / (1 + sigma**2).sqrt()
    return NoiseSchedule(a, sigma * a, torch.arange(n), kind)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors(schedule: NoiseSchedule, level: float) -> tuple[float, float]:
    """Half way between two levels, the mean of theirs."""
    places = [int(level), math.ceil(level)]
    return float(schedule.signal[places].mean()), float(schedule.noise[places].mean())


def naive_split(output: torch.Tensor, x: torch.Tensor, schedule: NoiseSchedule, k: int) -> Any:
    """(x_0, n) by what each prediction means: n; a n - s x_0; n - x_0."""
    a, s = factors(schedule, k)
    noise = {"epsilon": output, "v_prediction": a * output + s * x, "flow": x + a * output}[schedule.prediction]
    return (x - s * noise) / a, noise


def naive_move(x: torch.Tensor, output: torch.Tensor, schedule: NoiseSchedule, k: int, j: int) -> torch.Tensor:
    x0, noise = naive_split(output, x, schedule, k)
    a, s = factors(schedule, j)
    return a * x0 + s * noise


def curved_denoiser(x: torch.Tensor, level: float, embeds: torch.Tensor) -> torch.Tensor:
    """A network whose answer depends, nonlinearly, on everything."""
    return torch.tanh(x * 0.8 + embeds.mean() + 0.01 * level) + 0.3 * torch.sin(2 * x.roll(1, -1))


X0, SOURCE, NEGATIVE = normal(1, 2, 3, 3), normal(1, 4, 5, seed=1), normal(1, 4, 5, seed=2)


def task(schedule: NoiseSchedule, denoise: Denoise = curved_denoiser, **changes: Any) -> InversionTask:
    facts: dict[str, Any] = {
        "latents": X0, "schedule": schedule, "denoise": lambda x, level: denoise(x, level, SOURCE),
        "denoise_null": denoise, "source_embeds": SOURCE, "null_embeds": NEGATIVE, "guidance_scale": 4.5,
    }  # fmt: skip
    return InversionTask(**{**facts, **changes})


def invert(method: str, schedule: NoiseSchedule, **changes: Any) -> InversionPath:
    return inversion_method(method).run(task(schedule, **changes))


# ------------------------------------------------------------------------------ the walk up


def gaussian_denoiser(schedule: NoiseSchedule, mean: float, deviation: float) -> Denoise:
    """The perfect network for pictures distributed as N(mean, deviation^2): what is expected of n, a n - s x_0 or
    n - x_0 where x is seen."""

    def denoise(x: torch.Tensor, level: float, embeds: torch.Tensor) -> torch.Tensor:
        a, s = factors(schedule, level)
        per_variance = (x - a * mean) / (a**2 * deviation**2 + s**2)
        noise, picture = s * per_variance, mean + a * deviation**2 * per_variance
        answers = {"epsilon": noise, "v_prediction": a * noise - s * picture, "flow": noise - picture}
        return answers[schedule.prediction]

    return denoise


@pytest.mark.parametrize("kind", KINDS)
def test_the_trajectory_converges_to_the_probability_flow(kind: str) -> None:
    """For Gaussian pictures the flow is known: (x_t - a m) / sqrt(a^2 d^2 + s^2) stays. Order one."""
    mean, deviation, x0 = 0.7, 0.5, normal(1, 4, 3, 3)
    errors = []
    for n in (400, 800, 1600):
        schedule = levels(n, kind)
        path = ddim_trajectory(task(schedule, gaussian_denoiser(schedule, mean, deviation), latents=x0))
        assert path.shape == (n + 1, 4, 3, 3)
        torch.testing.assert_close(path[:1], x0, rtol=0, atol=0)
        (a0, s0), (a, s) = factors(schedule, 0), factors(schedule, n)
        z = (x0 - a0 * mean) / math.sqrt(a0**2 * deviation**2 + s0**2)
        reference = a * mean + math.sqrt(a**2 * deviation**2 + s**2) * z
        errors.append(float((path[-1:] - reference).abs().max()))
    for coarse, fine in pairwise(errors):
        assert 1.85 < coarse / fine < 2.15, errors  # half the step, half the error


def test_the_midpoint_rule_is_of_order_two_where_euler_is_of_order_one() -> None:
    """Along dx = x cos(3 s) ds, which leads from x_0 to x_0 exp(sin(3 s) / 3). (Between Gaussians midpoint is of order
    three, which says nothing.)"""
    for method, factor in (("midpoint", 4), ("ddim", 2)):
        errors = []
        for n in (20, 40, 80):
            schedule = levels(n, "flow")

            def denoise(x: torch.Tensor, level: float, embeds: torch.Tensor, of: NoiseSchedule = schedule) -> Any:
                return x * math.cos(3 * factors(of, level)[1])

            path = invert(method, schedule, denoise=denoise).trajectory
            reference = X0 * math.exp(math.sin(3 * factors(schedule, n)[1]) / 3)
            errors.append(float((path[-1:] - reference).abs().max()))
        for coarse, fine in pairwise(errors):
            assert 0.85 * factor < coarse / fine < 1.15 * factor, (method, errors)


def test_the_midpoint_rule_is_rf_solvers_step() -> None:
    """x + h v + h^2 / 2 v', with v' = (v(x + h / 2 v, s + h / 2) - v(x, s)) / (h / 2) (Wang et al. 2024)."""
    schedule = levels(5, "flow")
    path = invert("midpoint", schedule).trajectory
    x = X0
    for k in range(5):
        h = float(schedule.noise[k + 1] - schedule.noise[k])
        v = curved_denoiser(x, k, SOURCE)
        slope = (curved_denoiser(x + h / 2 * v, k + 0.5, SOURCE) - v) / (h / 2)
        x = x + h * v + h**2 / 2 * slope
        torch.testing.assert_close(path[k + 1 : k + 2], x)


@pytest.mark.parametrize("method", ["direct", "midpoint"])
def test_in_a_flow_what_the_sources_steps_miss_is_found(method: str) -> None:
    """With it Euler's way back under the source's words is the way up, to rounding; it costs one evaluation."""
    asked: list[float] = []

    def denoise(x: torch.Tensor, level: float, embeds: torch.Tensor) -> torch.Tensor:
        asked.append(level)
        return curved_denoiser(x, level, embeds)

    schedule = levels(6, "flow")
    path = invert(method, schedule, denoise=denoise)
    assert len(asked) == {"direct": 7, "midpoint": 13}[method] and asked[-1] == 6
    assert path.residuals is not None
    x, free = path.trajectory[-1:], path.trajectory[-1:]
    for k in range(6, 0, -1):
        (_, s), (_, s_next) = factors(schedule, k), factors(schedule, k - 1)
        x = x + (s_next - s) * curved_denoiser(x, k, SOURCE) + path.residuals[k - 1 : k]
        free = free + (s_next - s) * curved_denoiser(free, k, SOURCE)
        torch.testing.assert_close(x, path.trajectory[k - 1 : k], rtol=1e-12, atol=1e-12)
    assert float((free - X0).abs().max()) > 1e-2
    assert invert("direct", levels(6)).residuals is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_walk_up_is_the_naive_loop(kind: str) -> None:
    schedule = levels(6, kind)
    path = ddim_trajectory(task(schedule))
    x = X0
    for k in range(6):
        x = naive_move(x, curved_denoiser(x, max(k, 1), SOURCE), schedule, k, k + 1)
        torch.testing.assert_close(path[k + 1 : k + 2], x)


@pytest.mark.parametrize(("rescale", "scale"), [(0.0, 4.5), (0.7, 4.5), (1.0, 1.0), (0.0, 0.0)])
def test_guidance_is_the_formula(rescale: float, scale: float) -> None:
    unconditional, conditional = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1)
    output = rescaled(guided(unconditional, conditional, scale), conditional, rescale)
    for i in range(2):
        plain = (1 - scale) * unconditional[i] + scale * conditional[i]
        matched = plain * conditional[i].std() / plain.std()
        torch.testing.assert_close(output[i], rescale * matched + (1 - rescale) * plain)


@pytest.mark.parametrize(("method", "kind"), SERVED)
def test_each_step_is_reported_with_its_latents(method: str, kind: str) -> None:
    """The walk up's own latents; on null-text's way down those that it arrived at."""
    reports: list[tuple[int, torch.Tensor]] = []
    schedule = levels(4, kind)
    path = invert(method, schedule, generator=_seeded(0), on_step=lambda step, x: reports.append((step, x)))
    assert [step for step, _ in reports] == list(range(4 * inversion_method(method).num_passes))
    for step, x in reports[:4]:
        assert torch.equal(x, path.trajectory[step + 1 : step + 2])
    if method == "null_text":
        assert path.unconditional_embeds is not None
        x = path.trajectory[-1:]
        for step, reported in reports[4:]:
            k = 8 - step
            null = path.unconditional_embeds[k - 1 : k].double()
            x = naive_move(
                x, guided(curved_denoiser(x, k, null), curved_denoiser(x, k, SOURCE), 4.5), schedule, k, k - 1
            )
            torch.testing.assert_close(reported, x)


# ------------------------------------------------------------------------------ null-text


def way_back(path: torch.Tensor, nulls: torch.Tensor, schedule: NoiseSchedule) -> torch.Tensor:
    x = path[-1:]
    for k in range(schedule.num_steps, 0, -1):
        output = guided(curved_denoiser(x, k, nulls[k - 1 : k]), curved_denoiser(x, k, SOURCE), 4.5)
        x = naive_move(x, output, schedule, k, k - 1)
    return x


@pytest.mark.parametrize("kind", KINDS)
def test_null_text_is_algorithm_1(kind: str) -> None:
    """Mokady et al. 2023, algorithm 1, written once more with its published settings."""
    n, schedule = 5, levels(5, kind)
    result = invert("null_text", schedule)
    path, nulls = result.trajectory, result.unconditional_embeds
    assert nulls is not None and nulls.shape == (n, 4, 5)

    x, null = path[-1:], NEGATIVE.float()
    for i in range(n):
        k = n - i
        null = null.detach().clone().requires_grad_()
        adam = torch.optim.Adam([null], lr=1e-2 * (1 - i / (2 * n)))
        for _ in range(10):
            output = curved_denoiser(x, k, null.double())
            output = output + 4.5 * (curved_denoiser(x, k, SOURCE) - output)
            loss = ((naive_move(x, output, schedule, k, k - 1) - path[k - 1 : k]) ** 2).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            if loss.item() < 1e-5 + 2e-5 * i:
                break
        null = null.detach()
        torch.testing.assert_close(nulls[k - 1 : k], null, rtol=1e-4, atol=1e-5)
        output = guided(curved_denoiser(x, k, null.double()), curved_denoiser(x, k, SOURCE), 4.5)
        x = naive_move(x, output, schedule, k, k - 1)
    # and it serves its purpose
    plain = NEGATIVE.expand(n, -1, -1)
    improved = (way_back(path, nulls.double(), schedule) - X0).abs().mean()
    assert improved < 0.8 * (way_back(path, plain, schedule) - X0).abs().mean()


# ------------------------------------------------------------------------------ fixed points, the prompt as its null


@pytest.mark.parametrize("kind", KINDS)
def test_fixed_point_inverts_the_step_down_itself(kind: str) -> None:
    """What DDIM's steps down, unguided, lead back from; the published inversion is its first iterate."""
    schedule = levels(12, kind)

    def gentle(x: torch.Tensor, level: int, embeds: torch.Tensor) -> torch.Tensor:
        return 0.5 * curved_denoiser(x, level, embeds)

    def trajectory(num_iterations: int) -> torch.Tensor:
        inputs: list[torch.Tensor] = []

        def denoise(x: torch.Tensor, level: int, embeds: torch.Tensor) -> torch.Tensor:
            inputs.append(x)
            return gentle(x, level, embeds)

        path = fixed_point(task(schedule, denoise), num_iterations=num_iterations).trajectory
        assert len(inputs) == 12 * num_iterations
        # what is kept of the source's attention is of these very latents
        assert all(torch.equal(path[k : k + 1], inputs[k * num_iterations - 1]) for k in range(1, 13))
        return path

    def error_of_the_way_down(path: torch.Tensor) -> float:
        x = path[-1:]
        for k in range(12, 0, -1):
            x = naive_move(x, gentle(x, k, SOURCE), schedule, k, k - 1)
        return float((x - X0).abs().max())

    errors = [error_of_the_way_down(trajectory(n)) for n in (2, 4, 8, 40)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2] and errors[3] < 1e-9, errors
    assert errors[1] < error_of_the_way_down(ddim_trajectory(task(schedule, gentle))) / 3
    # naive: the second iterate at the first level
    _, noise = naive_split(gentle(X0, 1, SOURCE), X0, schedule, 1)
    (a, s), (a_next, s_next) = factors(schedule, 0), factors(schedule, 1)
    torch.testing.assert_close(trajectory(2)[1:2], a_next * (X0 - s * noise) / a + s_next * noise)


@pytest.mark.parametrize("kind", KINDS)
def test_negative_prompt_takes_the_sources_words(kind: str) -> None:
    schedule = levels(4, kind)
    result = invert("negative_prompt", schedule)
    path, nulls = result.trajectory, result.unconditional_embeds
    assert nulls is not None
    torch.testing.assert_close(nulls, SOURCE.expand(4, -1, -1))
    # guidance then cancels, and the way back is DDIM's own at guidance 1
    x = path[-1:]
    for k in range(4, 0, -1):
        x = naive_move(x, curved_denoiser(x, k, SOURCE), schedule, k, k - 1)
    torch.testing.assert_close(way_back(path, nulls, schedule), x)


def test_every_ddim_method_walks_the_same_path_up() -> None:
    schedule = levels(3)
    ours = {"direct", "fixed_point", "ddim", "negative_prompt", "null_text", "edit_friendly"}
    assert set(INVERSIONS) == ours | {"midpoint", "flowedit"} and set(OF_DIFFUSIONS) == ours
    for method in OF_DIFFUSIONS:
        result = invert(method, schedule, generator=_seeded(0))
        if method not in ("edit_friendly", "fixed_point"):
            torch.testing.assert_close(result.trajectory, ddim_trajectory(task(schedule)))
        inversion = Inversion(method, "", result.trajectory, result.unconditional_embeds, result.residuals)
        assert inversion.num_inference_steps == 3
        assert inversion.pinned is (method in ("direct", "fixed_point", "edit_friendly"))
        assert (inversion.residuals is not None) is (method == "edit_friendly")
    with pytest.raises(ValueError, match=r"inversion method='magic' is unknown; choose .*'direct'"):
        inversion_method("magic")


# ------------------------------------------------------------------------------ edit-friendly


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("scales", [(1.0, 1.0), (3.5, 13.5)])
def test_flowedit_is_the_published_update(scales: tuple[float, float]) -> None:
    """Kulikov et al. 2024, algorithm 1: z <- z + ds (v_target(z + x_k - x_0) - v_source(x_k)), a new noise each step;
    ours: Euler's steps of y = z + x_k - x_0, the residuals added."""
    n, schedule, target = 7, levels(7, "flow"), normal(1, 4, 5, seed=5)
    of_source, of_target = scales

    def velocity(x: torch.Tensor, k: float, words: torch.Tensor, scale: float) -> torch.Tensor:
        return guided(curved_denoiser(x, k, NEGATIVE), curved_denoiser(x, k, words), scale)

    def of_words(x: torch.Tensor, k: float, words: torch.Tensor) -> torch.Tensor:
        return velocity(x, k, words, of_source)

    path = invert("flowedit", schedule, generator=_seeded(3), denoise=of_words)
    assert path.residuals is not None
    generator = _seeded(3)
    noises = [torch.randn(X0.shape, generator=generator).double() for _ in range(n)]
    z, y = X0, path.trajectory[-1:]
    for k in range(n, 0, -1):
        (a, s), (_, s_next) = factors(schedule, k), factors(schedule, k - 1)
        x_source = a * X0 + s * noises[k - 1]
        step = velocity(z + x_source - X0, k, target, of_target) - velocity(x_source, k, SOURCE, of_source)
        z = z + (s_next - s) * step
        y = schedule.move(y, velocity(y, k, target, of_target), k, k - 1) + path.residuals[k - 1 : k]
    torch.testing.assert_close(y, z, rtol=1e-9, atol=1e-9)
    assert float((z - X0).abs().max()) > 1e-2


def test_what_an_inversion_cannot_serve_is_refused() -> None:
    for method in ("midpoint", "flowedit"):
        check_served(method, Guidance(), "flow")
        with pytest.raises(ValueError, match=f"'{method}' is for flow matching, and this model predicts 'epsilon'"):
            check_served(method, Guidance(), "epsilon")
    for form in ("told", "none"):
        check_served("direct", Guidance(form), "flow")
        for method in ("null_text", "negative_prompt"):
            with pytest.raises(ValueError, match=f"'{method}' is about the unconditional branch .* has none"):
                check_served(method, Guidance(form), "flow")
    check_residuals(False, "direct", "flow")
    for method, prediction, why in (
        ("direct", "epsilon", "aren't there"),
        ("ddim", "flow", "aren't there"),
        ("flowedit", "flow", "the method itself"),
    ):
        check_residuals(True, method, prediction)
        with pytest.raises(ValueError, match=f"residuals=False has no effect with the inversion '{method}'.*{why}"):
            check_residuals(False, method, prediction)


@pytest.mark.parametrize("kind", KINDS)
def test_edit_friendly_is_algorithm_1(kind: str) -> None:
    """Huberman-Spiegelglas et al. 2024: each level noised by itself, z_t = (x_{t-1} - mu_t(x_t)) / sigma_t."""
    n, schedule = 6, levels(6, kind)
    result = invert("edit_friendly", schedule, generator=_seeded(3))
    assert result.residuals is not None
    generator = _seeded(3)
    path = [X0]
    for k in range(1, n + 1):
        a, s = factors(schedule, k)
        path.append(a * X0 + s * torch.randn(X0.shape, generator=generator).double())
    torch.testing.assert_close(result.trajectory, torch.cat(path))
    for k in range(1, n + 1):
        (a, s), (a_next, s_next) = factors(schedule, k), factors(schedule, k - 1)
        x0, noise = naive_split(curved_denoiser(path[k], k, SOURCE), path[k], schedule, k)
        sigma = s_next / s * math.sqrt(s**2 - (a / a_next) ** 2 * s_next**2)
        mean = a_next * x0 + math.sqrt(max(s_next**2 - sigma**2, 0)) * noise
        torch.testing.assert_close(result.residuals[k - 1 : k], path[k - 1] - mean)


@pytest.mark.parametrize("method", ["direct", "ddim", "fixed_point", "negative_prompt", "null_text"])
def test_a_generator_is_refused_where_no_noise_is_drawn(
    make_pipe: Callable[[str], S2EditPipeline], picture: Image.Image, method: str
) -> None:
    with pytest.raises(
        ValueError, match=f"generator= or seed= has no effect on the inversion '{method}'.*'edit_friendly'"
    ):
        make_pipe("epsilon").invert(picture, "a photo of a sad lady", method, generator=_seeded(0))


@pytest.mark.parametrize("kind", DIFFUSIONS)
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


@pytest.mark.parametrize("kind", DIFFUSIONS)
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


@pytest.mark.parametrize("kind", DIFFUSIONS)
def test_null_text_comes_nearer_than_ddim_in_the_pipeline(
    make_pipe: Callable[[str], S2EditPipeline], picture: Image.Image, kind: str
) -> None:
    pipe, prompt = make_pipe(kind), "a photo of a sad lady"
    states = {name: p.clone() for name, p in pipe.unet.named_parameters()}
    away = {}
    for method in ("ddim", "null_text"):
        scale = {"guidance_scale": 7.5} if method == "null_text" else {}  # DDIM's own walk serves any
        inversion = pipe.invert(picture, prompt, method, 8, **scale)
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
