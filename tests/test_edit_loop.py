"""The edit's loop, branch by branch, against naive ones; and what callbacks see of it and change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from PIL import Image

from s2edit_pipeline.attention_prompt_to_prompt import PromptToPrompt, Reweighting
from s2edit_pipeline.attention_spatial import SpatialControl
from s2edit_pipeline.edit_attention import EditControl
from s2edit_pipeline.edit_loop import EDITS, EditedLatents, EditTask
from s2edit_pipeline.edit_settings import EditSettings
from s2edit_pipeline.edit_words import Confinement
from s2edit_pipeline.inversion_ddim import ddim_trajectory
from s2edit_pipeline.inversion_record import Inversion, InversionTask
from s2edit_pipeline.noise_schedule import NoiseSchedule
from s2edit_pipeline.pipeline import S2EditPipeline
from s2edit_pipeline.pipeline_turns import Interrupted
from s2edit_pipeline.prompt_embeds import Batch, Branch, PromptEmbeds

N = 6
ALPHAS_BAR = torch.linspace(0.999, 0.05, N + 1, dtype=torch.float64)
SIGMAS = torch.linspace(0, 0.9, N + 1, dtype=torch.float64)
DIFFUSION = NoiseSchedule(ALPHAS_BAR.sqrt(), (1 - ALPHAS_BAR).sqrt(), torch.arange(N), "epsilon")
FLOW = NoiseSchedule(1 - SIGMAS, SIGMAS, SIGMAS[1:], "flow")
SCALE = 3.0


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def answer(x: torch.Tensor, level: int, embeds: torch.Tensor) -> torch.Tensor:
    """The denoiser: each row for itself."""
    assert len(x) == len(embeds)
    return torch.tanh(x + embeds.mean((1, 2))[:, None, None, None] + 0.02 * level)


def answer_batch(x: torch.Tensor, level: int, batch: Batch) -> torch.Tensor:
    assert len(x) == len(batch)
    return answer(x, level, batch.embeds.embeds)


def split(x: torch.Tensor, output: torch.Tensor, k: int, schedule: NoiseSchedule) -> tuple[torch.Tensor, torch.Tensor]:
    a, s = float(schedule.signal[k]), float(schedule.noise[k])
    epsilon = output if schedule.prediction == "epsilon" else x + a * output
    return (x - s * epsilon) / a, epsilon


def move(x: torch.Tensor, output: torch.Tensor, k: int, schedule: NoiseSchedule = DIFFUSION) -> torch.Tensor:
    x0, epsilon = split(x, output, k, schedule)
    return float(schedule.signal[k - 1]) * x0 + float(schedule.noise[k - 1]) * epsilon


def guided_answer(x: torch.Tensor, k: int, embeds: torch.Tensor, null: torch.Tensor, scale: float) -> torch.Tensor:
    u, c = answer(x, k, null), answer(x, k, embeds)
    return u + scale * (c - u)


EMBEDS, TARGETS, NULL = normal(1, 4, 5), normal(2, 4, 5, seed=1) + 0.5, normal(1, 4, 5, seed=2)


def alone(
    x: torch.Tensor, embeds: torch.Tensor, nulls: list[torch.Tensor], schedule: NoiseSchedule = DIFFUSION
) -> list[torch.Tensor]:
    """One prompt's guided way down without others, all its levels, noisiest first."""
    path = [x]
    for k in range(N, 0, -1):
        path.append(move(path[-1], guided_answer(path[-1], k, embeds, nulls[k - 1], SCALE), k, schedule))
    return path


def edit(
    inversion: Inversion,
    confinements: list[Confinement | None],
    on_step: Any = lambda *_: {},
    guidance_stop: float = 1.0,
    **settings: Any,
) -> EditedLatents:
    schedule, denoise = settings.pop("schedule", DIFFUSION), settings.pop("denoise", answer_batch)
    guidance = settings.pop("guidance", lambda: SCALE)
    nothing = EditControl(
        lambda batch: SpatialControl({}, [{}] * len(batch)), PromptToPrompt([], [], 0), Reweighting([None] * 2)
    )
    task = EditTask(
        denoise=denoise,
        schedule=schedule,
        inversion=inversion,
        source=Branch("source", PromptEmbeds(EMBEDS)),
        null=Branch("unconditional", PromptEmbeds(NULL)),
        targets=[Branch("target", PromptEmbeds(TARGETS[i : i + 1])) for i in range(2)],
        settings=EditSettings(guidance_scale=SCALE, guidance_stop=guidance_stop, **settings),
        control=nothing,
        confinements=confinements,
        guidance=guidance,
        on_step=on_step,
    )
    return EDITS["prompt_to_prompt"].run(task)


def inverted(method: str, schedule: NoiseSchedule = DIFFUSION, **extra: Any) -> Inversion:
    path = ddim_trajectory(
        InversionTask(
            latents=normal(1, 2, 4, 4, seed=3),
            schedule=schedule,
            denoise=lambda x, level: answer(x, level, EMBEDS),
            denoise_null=answer,
            source_embeds=EMBEDS,
            null_embeds=NULL,
        )
    )
    return Inversion(method, "", path, **extra)


# ------------------------------------------------------------------------------ the loop


@pytest.mark.parametrize("schedule", [DIFFUSION, FLOW], ids=["diffusion", "flow"])
@pytest.mark.parametrize("method", ["direct", "ddim"])
def test_free_targets_are_each_a_run_alone(method: str, schedule: NoiseSchedule) -> None:
    inversion = inverted(method, schedule)
    result = edit(inversion, [None, None], schedule=schedule)
    start = inversion.trajectory[-1:]
    for i in range(2):
        reference = alone(start, TARGETS[i : i + 1], [NULL] * N, schedule)[-1]
        torch.testing.assert_close(result.targets[i : i + 1], reference)
    source = inversion.trajectory[:1] if method == "direct" else alone(start, EMBEDS, [NULL] * N, schedule)[-1]
    torch.testing.assert_close(result.source, source)
    assert result.regions == (None, None) and not result.interrupted


def test_the_steps_own_unconditional_embedding_is_used() -> None:
    nulls = normal(N, 4, 5, seed=4)
    inversion = inverted("null_text", unconditional_embeds=nulls)
    result, each = edit(inversion, [None, None]), [nulls[k : k + 1] for k in range(N)]
    torch.testing.assert_close(result.source, alone(inversion.trajectory[-1:], EMBEDS, each)[-1])
    torch.testing.assert_close(result.targets[:1], alone(inversion.trajectory[-1:], TARGETS[:1], each)[-1])


@pytest.mark.parametrize("stop", [0.0, 0.5, 0.6])
def test_guidance_stops_for_the_targets_alone(stop: float) -> None:
    inversion = inverted("ddim")
    result = edit(inversion, [None, None], guidance_stop=stop)
    torch.testing.assert_close(result.source, alone(inversion.trajectory[-1:], EMBEDS, [NULL] * N)[-1])
    x = inversion.trajectory[-1:]
    for step, k in enumerate(range(N, 0, -1)):
        scale = SCALE if step / N < stop else 1.0
        x = move(x, guided_answer(x, k, TARGETS[:1], NULL, max(scale, 1.0)), k)
    torch.testing.assert_close(result.targets[:1], x)


def test_outside_its_region_a_target_is_the_source_to_the_bit() -> None:
    region = torch.zeros(4, 4)
    region[1:3, 1:3] = 1
    inversion = inverted("direct")
    confined = Confinement((), (), region, 0.4, start=0.5)
    result = edit(inversion, [confined, None])
    outside = region == 0
    assert torch.equal(result.targets[0][:, outside], inversion.trajectory[0][:, outside])
    assert float((result.targets[0] - inversion.trajectory[0])[:, ~outside].abs().min()) > 1e-6
    # naive: the same run, the source laid over it after each of the last steps
    x = inversion.trajectory[-1:]
    for step, k in enumerate(range(N, 0, -1)):
        x = move(x, guided_answer(x, k, TARGETS[:1], NULL, SCALE), k)
        if step + 1 >= 0.5 * N:
            x = x * region + inversion.trajectory[k - 1] * (1 - region)
    torch.testing.assert_close(result.targets[:1], x)
    torch.testing.assert_close(result.targets[1:], alone(inversion.trajectory[-1:], TARGETS[1:], [NULL] * N)[-1])


def test_at_last_what_drifted_a_little_is_the_source_again() -> None:
    """Naive: from ``settle_from`` of the steps on, cells that changed less than the share ``change_threshold`` of the
    most changed one are laid over with the source too."""
    region = torch.zeros(4, 4)
    region[:3] = 1
    inversion, confined = inverted("direct"), Confinement((), (), region, 0.4, start=0.5, change_threshold=0.5)
    result = edit(inversion, [confined, None], settle_from=0.8)
    x, allowed = inversion.trajectory[-1:], region
    for step, k in enumerate(range(N, 0, -1)):
        x = move(x, guided_answer(x, k, TARGETS[:1], NULL, SCALE), k)
        source = inversion.trajectory[k - 1 : k]
        if step + 1 >= 0.8 * N:
            change = ((x - source) * region).square().mean((0, 1)).sqrt()
            allowed = region * (change >= 0.5 * change.max())
        if step + 1 >= 0.5 * N:
            x = torch.where(allowed > 0, x, source)
    torch.testing.assert_close(result.targets[:1], x)
    assert result.regions[0] is not None and 0 < result.regions[0].sum() < 12
    assert torch.equal(result.regions[0], allowed.double())
    torch.testing.assert_close(result.targets[1:], alone(inversion.trajectory[-1:], TARGETS[1:], [NULL] * N)[-1])


def test_strength_starts_from_the_trajectory_further_down() -> None:
    inversion, calls = inverted("direct"), []

    def on_step(step: int, level: int, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        calls.append((step, level))
        return {}

    result = edit(inversion, [None, None], on_step, strength=0.5)
    assert calls == [(0, 3), (1, 2), (2, 1)]
    x = inversion.trajectory[3:4]
    for k in (3, 2, 1):
        x = move(x, guided_answer(x, k, TARGETS[:1], NULL, SCALE), k)
    torch.testing.assert_close(result.targets[:1], x)


@pytest.mark.parametrize(("stop", "guided_levels"), [(0.5, ()), (0.75, (3, 2)), (1.0, (3, 2, 1))])
def test_shares_of_the_steps_are_counted_from_the_full_noise(stop: float, guided_levels: tuple[int, ...]) -> None:
    """Also where ``strength`` leaves the first ones out."""
    assert N == 6
    inversion = inverted("direct")
    result = edit(inversion, [None, None], guidance_stop=stop, strength=0.5)
    x = inversion.trajectory[3:4]
    for k in (3, 2, 1):
        is_guided = k in guided_levels
        output = guided_answer(x, k, TARGETS[:1], NULL, SCALE) if is_guided else answer(x, k, TARGETS[:1])
        x = move(x, output, k)
    torch.testing.assert_close(result.targets[:1], x)


def test_guidance_is_rescaled_towards_the_words_own_deviation() -> None:
    """Lin et al. 2024, equations 15 and 16, one target at a time."""
    inversion = inverted("direct")
    result = edit(inversion, [None, None], guidance_rescale=0.7)
    for i in range(2):
        x = inversion.trajectory[-1:]
        for k in range(N, 0, -1):
            u, c = answer(x, k, NULL), answer(x, k, TARGETS[i : i + 1])
            g = u + SCALE * (c - u)
            x = move(x, 0.7 * g * (c.std() / g.std()) + 0.3 * g, k)
        torch.testing.assert_close(result.targets[i : i + 1], x)


@pytest.mark.parametrize("schedule", [DIFFUSION, FLOW], ids=["diffusion", "flow"])
def test_stored_residuals_are_added_to_the_random_steps_mean(schedule: NoiseSchedule) -> None:
    """Edit-friendly: x_{k-1} = mu(x_k, target) + sigma_k z_k, with the source's own sigma_k z_k."""
    residuals = normal(N, 2, 4, 4, seed=9)
    inversion = inverted("edit_friendly", schedule, residuals=residuals)
    result = edit(inversion, [None, None], schedule=schedule)
    x = inversion.trajectory[-1:]
    for k in range(N, 0, -1):
        (a, s), (a_next, s_next) = ((float(schedule.signal[j]), float(schedule.noise[j])) for j in (k, k - 1))
        x0, _ = split(x, guided_answer(x, k, TARGETS[:1], NULL, SCALE), k, schedule)
        # the posterior mean in Ho et al. 2020's own form (equation 7), for any signal and noise
        r = a / a_next
        between = s**2 - r**2 * s_next**2
        mean = a_next * between / s**2 * x0 + r * s_next**2 / s**2 * x
        x = mean + residuals[k - 1]
    torch.testing.assert_close(result.targets[:1], x)
    torch.testing.assert_close(result.source, inversion.trajectory[:1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_scale": -1.0}, "guidance_scale must be a number of at least 0"),
        ({"guidance_scale": None}, "guidance_scale"),
        ({"strength": 0.0}, "strength must be above 0 and at most 1"),
        ({"strength": 1.5}, "strength"),
        ({"guidance_stop": 2}, "guidance_stop must be from 0 to 1"),
        ({"blend_threshold": 1.0}, "blend_threshold must be above 0 and below 1"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EditSettings(**settings)


@pytest.mark.parametrize("method", ["direct", "ddim"])
@pytest.mark.parametrize("is_guided", [False, True])
def test_a_batch_holds_the_branches_that_count_each_with_its_words(method: str, is_guided: bool) -> None:
    """A pinned source isn't asked where nobody wants its attention; a free one goes before the targets."""
    batches: list[list[str]] = []

    def denoise(x: torch.Tensor, level: int, batch: Batch) -> torch.Tensor:
        batches.append([branch.role for branch in batch.branches])
        rows = {"source": EMBEDS, "unconditional": NULL, "target": TARGETS}
        for role, embeds in rows.items():
            of_role = batch.embeds.embeds[batch.rows(role)]
            assert torch.equal(
                of_role, embeds.expand(len(of_role), -1, -1) if len(embeds) == 1 else embeds[: len(of_role)]
            )
        return answer_batch(x, level, batch)

    scale = SCALE if is_guided else 1.0
    edit(inverted(method), [None, None], guidance=lambda: scale, denoise=denoise)
    targets = [*["unconditional"] * (2 * is_guided), "target", "target"]
    # the free source's guidance is the settings', whatever becomes of the targets'
    assert batches == ([targets] if method == "direct" else [["source", "unconditional"], targets]) * N


def test_a_pinned_source_that_is_looked_at_is_one_row_more() -> None:
    """Where its words say where the edit may reach: the region isn't given, and its maps weren't kept."""
    batches: list[list[str]] = []

    def denoise(x: torch.Tensor, level: int, batch: Batch) -> torch.Tensor:
        batches.append([branch.role for branch in batch.branches])
        assert torch.equal(x[batch.rows("source")], inversion.trajectory[level : level + 1])
        return answer_batch(x, level, batch)

    inversion = inverted("direct")
    confined = Confinement(((1,),), (), None, 0.4, start=1.0)
    with pytest.raises(ValueError, match=r"At 4 x 4 cells no layer .*edit_mask="):  # this denoiser has no attention
        edit(inversion, [confined, None], denoise=denoise)
    assert batches == [["source", "unconditional", "unconditional", "target", "target"]] * N


# ------------------------------------------------------------------------------ callbacks


def test_a_callback_may_change_the_latents_and_stop() -> None:
    inversion = inverted("direct")

    def zero_at_last(step: int, level: int, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert level == N - step
        return {"latents": torch.zeros_like(tensors["latents"])} if step == N - 1 else {}

    assert float(edit(inversion, [None, None], zero_at_last).targets.abs().max()) == 0

    def stop(step: int, level: int, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if step == 2:
            raise Interrupted
        return {}

    half = edit(inversion, [None, None], stop)
    assert half.interrupted
    for i in range(2):
        reference = alone(inversion.trajectory[-1:], TARGETS[i : i + 1], [NULL] * N)[3]
        torch.testing.assert_close(half.targets[i : i + 1], reference)


@pytest.mark.parametrize("name", ["prompt_embeds", "negative_prompt_embeds"])
def test_changed_embeddings_count_from_the_next_step_on(name: str) -> None:
    inversion, other = inverted("direct"), normal(2, 4, 5, seed=11)

    def on_step(step: int, level: int, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert set(tensors) == {"latents", "prompt_embeds", "negative_prompt_embeds"}
        if step == 0:
            assert torch.equal(tensors["prompt_embeds"], TARGETS)
            assert torch.equal(tensors["negative_prompt_embeds"], NULL)
        return {name: other[: len(tensors[name])]} if step == 1 else {}

    result = edit(inversion, [None, None], on_step)
    for i in range(2):
        x = inversion.trajectory[-1:]
        for step, k in enumerate(range(N, 0, -1)):
            embeds, null = TARGETS[i : i + 1], NULL
            if step > 1:
                embeds, null = (other[i : i + 1], NULL) if name == "prompt_embeds" else (embeds, other[:1])
            x = move(x, guided_answer(x, k, embeds, null, SCALE), k)
        torch.testing.assert_close(result.targets[i : i + 1], x)


def test_the_guidance_is_that_of_the_moment() -> None:
    """At 1 and below there is none."""
    inversion, scales = inverted("direct"), iter([3.0, 7.0, 7.0, 1.0, 0.0, 2.0])
    result = edit(inversion, [None, None], guidance=lambda: next(scales))
    x = inversion.trajectory[-1:]
    for k, scale in zip(range(N, 0, -1), (3.0, 7.0, 7.0, 1.0, 0.0, 2.0), strict=True):
        x = move(x, guided_answer(x, k, TARGETS[:1], NULL, max(scale, 1.0)), k)
    torch.testing.assert_close(result.targets[:1], x)


SOURCE_PROMPT, TARGET_PROMPT = "a photo of a sad lady", "a photo of a smiling lady"
FREE: dict[str, Any] = {
    "source_prompt": SOURCE_PROMPT, "num_inference_steps": 5, "guidance_stop": 1.0, "blend_words": False,
    "cross_replace_steps": 0.0, "self_replace_steps": 0.0, "output_type": "latent",
}  # fmt: skip
"""An edit in which nothing is taken over: each target is a run of its own."""
EVERYTHING = ("latents", "prompt_embeds", "negative_prompt_embeds")


def naive_run(
    pipe: S2EditPipeline, start: torch.Tensor, schedule_of: Callable[[int], tuple[str, str, float]]
) -> torch.Tensor:
    """Guided DDIM from ``start``, each step with the prompt, negative prompt and scale that ``schedule_of`` gives."""
    family = pipe.family
    levels, x, dtype = family.schedule(5), start, family.dtype
    embeds = {
        text: family.encode([family.tokenize(text)]) for text in {t for i in range(5) for t in schedule_of(i)[:2]}
    }
    for step, k in enumerate(range(5, 0, -1)):
        prompt, negative, scale = schedule_of(step)
        t = int(levels.timesteps[k - 1])
        u, c = (family.denoise(x, t, embeds[text], dtype) for text in (negative, prompt))
        x = move(x, u + scale * (c - u), k, levels)
    return x


@torch.no_grad()
def test_a_callback_changes_the_guidance_of_the_steps_to_come(pipe: S2EditPipeline, picture: Image.Image) -> None:
    """At 1 and below, diffusers' own sign for it, nothing is guided."""
    pipe.to(dtype=torch.float64)
    scales, inversion = [4.0, 4.0, 9.0, 0.0, 1.0], pipe.invert(picture, SOURCE_PROMPT, num_inference_steps=5)
    facts: list[tuple[Any, ...]] = []

    def callback(pipe: S2EditPipeline, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        facts.append((pipe.guidance_scale, pipe.do_classifier_free_guidance, pipe.num_timesteps, pipe.interrupt))
        if step + 1 < 5:
            pipe._guidance_scale = scales[step + 1]
        return tensors

    result = pipe(TARGET_PROMPT, inversion=inversion, guidance_scale=4.0, callback_on_step_end=callback, **FREE)
    reference = naive_run(pipe, inversion.trajectory[-1:], lambda step: (TARGET_PROMPT, "", max(scales[step], 1.0)))
    torch.testing.assert_close(result.images, reference, rtol=1e-9, atol=1e-9)
    assert facts == [(scale, scale > 1, 5, False) for scale in scales]
    assert (pipe.guidance_scale, pipe.num_timesteps, pipe.do_classifier_free_guidance) == (1.0, 5, False)
    plain = pipe(TARGET_PROMPT, inversion=inversion, guidance_scale=4.0, **FREE).images
    assert float((result.images - plain).abs().max()) > 1e-3  # it is seen at all


def test_what_callbacks_read_of_the_call(pipe: S2EditPipeline, picture: Image.Image) -> None:
    facts: list[dict[str, Any]] = []

    def callback(pipe: S2EditPipeline, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        names = ("guidance_scale", "_guidance_scale", "guidance_rescale", "clip_skip", "num_timesteps", "interrupt")
        facts.append({name: getattr(pipe, name) for name in names} | {"timestep": int(timestep)})
        return {}

    pipe(
        TARGET_PROMPT, picture, guidance_scale=3.5, guidance_rescale=0.25, clip_skip=1, strength=0.6,
        callback_on_step_end=callback, **FREE,
    )  # fmt: skip
    timesteps = pipe.family.schedule(5).timesteps.tolist()
    assert facts == [
        {
            "guidance_scale": 3.5, "_guidance_scale": 3.5, "guidance_rescale": 0.25, "clip_skip": 1,
            "num_timesteps": 3, "interrupt": False, "timestep": timestep,
        }
        for timestep in timesteps[2::-1]
    ]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", ["prompt_embeds", "negative_prompt_embeds"])
def test_a_callback_that_changes_the_prompt_is_obeyed(pipe: S2EditPipeline, picture: Image.Image, name: str) -> None:
    """Also for the steps after: the change stays."""
    pipe.to(dtype=torch.float64)
    inversion, other = pipe.invert(picture, SOURCE_PROMPT, num_inference_steps=5), "a drawing of a man with a beard"
    other_embeds = pipe.family.encode([pipe.family.tokenize(other)]).embeds

    def callback(pipe: S2EditPipeline, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        assert set(tensors) == set(EVERYTHING)
        return {**tensors, name: other_embeds} if step == 1 else {}

    result = pipe(
        TARGET_PROMPT, inversion=inversion, guidance_scale=4.0, callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=EVERYTHING, **FREE,
    )  # fmt: skip
    late = (other, "", 4.0) if name == "prompt_embeds" else (TARGET_PROMPT, other, 4.0)
    reference = naive_run(pipe, inversion.trajectory[-1:], lambda step: late if step > 1 else (TARGET_PROMPT, "", 4.0))
    torch.testing.assert_close(result.images, reference, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("inversion", ["direct", "null_text"])
def test_a_callback_that_returns_all_that_it_was_shown_changes_nothing(
    pipe: S2EditPipeline, picture: Image.Image, inversion: str
) -> None:
    """Null-text's own embedding of each step stays in place."""
    arguments: dict[str, Any] = {"source_prompt": SOURCE_PROMPT, "num_inference_steps": 2, "output_type": "latent"}
    plain = pipe(TARGET_PROMPT, picture, inversion=inversion, **arguments).images
    calls: list[int] = []

    def callback(pipe: S2EditPipeline, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        calls.append(step)
        return tensors

    result = pipe(
        TARGET_PROMPT, picture, inversion=inversion, callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=EVERYTHING, **arguments,
    )  # fmt: skip
    assert torch.equal(result.images, plain) and calls == [0, 1] and not result.interrupted


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_change_in_place_is_a_change(pipe: S2EditPipeline, picture: Image.Image, name: str) -> None:
    inversion = pipe.invert(picture, SOURCE_PROMPT, num_inference_steps=5)
    images = []
    for in_place in (False, True):

        def callback(
            pipe: S2EditPipeline, step: int, timestep: Any, tensors: dict[str, Any], in_place: bool = in_place
        ) -> dict[str, Any]:
            if step == 1:
                change = tensors[name].mul_ if in_place else tensors[name].mul
                tensors[name] = change(1.5)
            return tensors

        images.append(
            pipe(
                TARGET_PROMPT, inversion=inversion, callback_on_step_end=callback,
                callback_on_step_end_tensor_inputs=EVERYTHING, **FREE,
            ).images
        )  # fmt: skip
    assert torch.equal(*images)
    assert float((images[0] - pipe(TARGET_PROMPT, inversion=inversion, **FREE).images).abs().max()) > 1e-4


def test_what_callbacks_of_inversions_and_drawings_read(pipe: S2EditPipeline, picture: Image.Image) -> None:
    facts: list[tuple[Any, ...]] = []

    def callback(pipe: S2EditPipeline, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        facts.append((pipe.num_timesteps, pipe.clip_skip, pipe.guidance_scale, pipe.guidance_rescale))
        return tensors

    pipe.invert(picture, SOURCE_PROMPT, num_inference_steps=2, clip_skip=1, callback_on_step_end=callback)
    pipe.invert(picture, SOURCE_PROMPT, "null_text", 2, callback_on_step_end=callback)
    assert facts == [(2, 1, None, None)] * 2 + [(4, None, None, None)] * 4  # null-text walks down again
    facts.clear()
    pipe(
        TARGET_PROMPT, num_inference_steps=3, guidance_scale=2.5, guidance_rescale=0.25, callback_on_step_end=callback
    )  # fmt: skip
    assert facts == [(3, None, 2.5, 0.25)] * 3


def test_a_tensor_that_was_not_shown_is_refused(pipe: S2EditPipeline, picture: Image.Image) -> None:
    message = r"may change 'latents', which it was shown; it returned 'prompt_embeds'.*tensor_inputs"
    with pytest.raises(ValueError, match=message):
        pipe(
            TARGET_PROMPT, picture, SOURCE_PROMPT, num_inference_steps=2,
            callback_on_step_end=lambda pipe, step, t, tensors: {"prompt_embeds": torch.zeros(1, 16, 32)},
        )  # fmt: skip


@pytest.mark.parametrize("error", [StopIteration, RuntimeError])
@pytest.mark.parametrize("call", ["edit", "invert", "null_text", "fit", "draw"])
def test_an_error_of_the_callers_own_comes_out_and_leaves_the_pipeline_free(
    pipe: S2EditPipeline, picture: Image.Image, half_mask: Any, call: str, error: type[Exception]
) -> None:
    """A StopIteration among them: it is no sign of ours, and never ends a call as if it were done."""

    def callback(*_: Any) -> None:
        raise error("the caller's own")

    calls: dict[str, Callable[[], Any]] = {
        "edit": lambda: pipe(TARGET_PROMPT, picture, callback_on_step_end=callback, **FREE),
        "invert": lambda: pipe.invert(picture, SOURCE_PROMPT, num_inference_steps=2, callback_on_step_end=callback),
        "null_text": lambda: pipe.invert(picture, SOURCE_PROMPT, "null_text", 2, callback_on_step_end=callback),
        "fit": lambda: pipe.fit_identity(
            picture, SOURCE_PROMPT, "lady", mask=half_mask, num_steps=2, callback_on_step_end=callback
        ),
        "draw": lambda: pipe(TARGET_PROMPT, num_inference_steps=2, callback_on_step_end=callback),
    }
    processors = dict(pipe.unet.attn_processors)
    with pytest.raises(error, match="the caller's own"):
        calls[call]()
    assert all(processor is processors[name] for name, processor in pipe.unet.attn_processors.items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in pipe.unet.parameters())
    assert pipe.interrupt is False
    assert not pipe(TARGET_PROMPT, picture, **FREE).interrupted


# ------------------------------------------------------------------------------ drawing


@torch.no_grad()
def test_drawing_from_noise_is_guided_ddim(pipe: S2EditPipeline) -> None:
    x, prompts = normal(2, 4, 16, 16, seed=7).float(), [TARGET_PROMPT, "a drawing of a man with a beard"]
    result = pipe(prompts, latents=x, num_inference_steps=5, guidance_scale=SCALE, output_type="latent").images
    for i in range(2):
        reference = naive_run(pipe, x[i : i + 1], lambda step, text=prompts[i]: (text, "", SCALE))  # type: ignore[misc]
        torch.testing.assert_close(result[i : i + 1], reference, rtol=1e-4, atol=1e-5)
