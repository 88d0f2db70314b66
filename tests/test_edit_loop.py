"""The edit's loop, branch by branch, against naive ones."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from s2edit_pipeline.attention_controls import PromptToPrompt, Reweighting, SpatialControl
from s2edit_pipeline.edit_attention import BranchRows, EditControl
from s2edit_pipeline.edit_loop import sample_edits, sample_from_noise
from s2edit_pipeline.edit_settings import EditSettings
from s2edit_pipeline.edit_words import Confinement
from s2edit_pipeline.inversion_ddim import ddim_trajectory
from s2edit_pipeline.inversion_record import Inversion
from s2edit_pipeline.noise_schedule import NoiseSchedule

N = 6
SCHEDULE = NoiseSchedule(torch.linspace(0.999, 0.05, N + 1, dtype=torch.float64), torch.arange(N), "epsilon")
SCALE = 3.0


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def denoise(x: torch.Tensor, level: int, embeds: torch.Tensor, rows: BranchRows | None = None) -> torch.Tensor:
    """Each row for itself."""
    assert len(x) == len(embeds) and (rows is None or len(x) == rows.total)
    return torch.tanh(x + embeds.mean((1, 2))[:, None, None, None] + 0.02 * level)


def move(x: torch.Tensor, eps: torch.Tensor, k: int) -> torch.Tensor:
    a, b = float(SCHEDULE.alphas_bar[k]), float(SCHEDULE.alphas_bar[k - 1])
    return math.sqrt(b) * (x - math.sqrt(1 - a) * eps) / math.sqrt(a) + math.sqrt(1 - b) * eps


def alone(x: torch.Tensor, embeds: torch.Tensor, nulls: list[torch.Tensor]) -> list[torch.Tensor]:
    """One prompt's own guided way down, all its levels, noisiest first."""
    path = [x]
    for k in range(N, 0, -1):
        u, c = denoise(path[-1], k, nulls[k - 1]), denoise(path[-1], k, embeds)
        path.append(move(path[-1], u + SCALE * (c - u), k))
    return path


EMBEDS, TARGETS, NULL = normal(1, 4, 5), normal(2, 4, 5, seed=1) + 0.5, normal(1, 4, 5, seed=2)


def edit(
    inversion: Inversion,
    confinements: list[Confinement | None],
    on_step: Any = lambda *_: None,
    guidance_stop: float = 1.0,
    **settings: Any,
) -> Any:
    nothing = EditControl(
        lambda rows: SpatialControl({}, [{}] * rows.total),
        PromptToPrompt([], [], 0, 0),
        (99, 1),
        Reweighting([None] * 2),
    )
    chosen = EditSettings(guidance_scale=SCALE, guidance_stop=guidance_stop, **settings)
    return sample_edits(
        denoise, SCHEDULE, inversion, EMBEDS, TARGETS, NULL, chosen, nothing, confinements, on_step
    )  # fmt: skip


def inverted(method: str, **extra: Any) -> Inversion:
    path = ddim_trajectory(denoise, normal(1, 2, 4, 4, seed=3), SCHEDULE, EMBEDS, lambda _: None)
    return Inversion(method, "", path, **extra)


@pytest.mark.parametrize("method", ["direct", "ddim"])
def test_free_targets_are_each_their_own_run(method: str) -> None:
    inversion = inverted(method)
    found = edit(inversion, [None, None])
    for i in range(2):
        wanted = alone(inversion.trajectory[-1:], TARGETS[i : i + 1], [NULL] * N)[-1]
        torch.testing.assert_close(found.targets[i : i + 1], wanted)
    own = inversion.trajectory[:1] if method == "direct" else alone(inversion.trajectory[-1:], EMBEDS, [NULL] * N)[-1]
    torch.testing.assert_close(found.source, own)
    assert found.regions == (None, None)


def test_the_steps_own_unconditional_embedding_is_used() -> None:
    nulls = normal(N, 4, 5, seed=4)
    inversion = inverted("null_text", unconditional_embeds=nulls)
    found, each = edit(inversion, [None, None]), [nulls[k : k + 1] for k in range(N)]
    torch.testing.assert_close(found.source, alone(inversion.trajectory[-1:], EMBEDS, each)[-1])
    torch.testing.assert_close(found.targets[:1], alone(inversion.trajectory[-1:], TARGETS[:1], each)[-1])


@pytest.mark.parametrize("stop", [0.0, 0.5, 0.6])
def test_guidance_stops_for_the_targets_alone(stop: float) -> None:
    inversion = inverted("ddim")
    found = edit(inversion, [None, None], guidance_stop=stop)
    torch.testing.assert_close(found.source, alone(inversion.trajectory[-1:], EMBEDS, [NULL] * N)[-1])
    x = inversion.trajectory[-1:]
    for step, k in enumerate(range(N, 0, -1)):
        u, c = denoise(x, k, NULL), denoise(x, k, TARGETS[:1])
        x = move(x, u + SCALE * (c - u) if step / N < stop else c, k)
    torch.testing.assert_close(found.targets[:1], x)


def test_outside_its_region_a_target_is_the_source_to_the_bit() -> None:
    region = torch.zeros(4, 4)
    region[1:3, 1:3] = 1
    inversion = inverted("direct")
    confined = Confinement((), (), region, 0.4, start=0.5)
    found = edit(inversion, [confined, None])
    outside = region == 0
    assert torch.equal(found.targets[0][:, outside], inversion.trajectory[0][:, outside])
    assert float((found.targets[0] - inversion.trajectory[0])[:, ~outside].abs().min()) > 1e-6
    # naive: the same run, the source laid over it after each of the last steps
    x = inversion.trajectory[-1:]
    for step, k in enumerate(range(N, 0, -1)):
        u, c = denoise(x, k, NULL), denoise(x, k, TARGETS[:1])
        x = move(x, u + SCALE * (c - u), k)
        if step + 1 >= 0.5 * N:
            x = x * region + inversion.trajectory[k - 1] * (1 - region)
    torch.testing.assert_close(found.targets[:1], x)
    torch.testing.assert_close(found.targets[1:], alone(inversion.trajectory[-1:], TARGETS[1:], [NULL] * N)[-1])


def test_at_last_what_drifted_a_little_is_the_source_again() -> None:
    """Naive: from ``settle_from`` of the steps on, cells that changed less than the share ``change_threshold`` of the
    most changed one are laid over with the source too."""
    region = torch.zeros(4, 4)
    region[:3] = 1
    inversion, confined = inverted("direct"), Confinement((), (), region, 0.4, start=0.5, change_threshold=0.5)
    found = edit(inversion, [confined, None], settle_from=0.8)
    x, allowed = inversion.trajectory[-1:], region
    for step, k in enumerate(range(N, 0, -1)):
        u, c = denoise(x, k, NULL), denoise(x, k, TARGETS[:1])
        x = move(x, u + SCALE * (c - u), k)
        source = inversion.trajectory[k - 1 : k]
        if step + 1 >= 0.8 * N:
            change = ((x - source) * region).square().mean((0, 1)).sqrt()
            allowed = region * (change >= 0.5 * change.max())
        if step + 1 >= 0.5 * N:
            x = torch.where(allowed > 0, x, source)
    torch.testing.assert_close(found.targets[:1], x)
    assert found.regions[0] is not None and 0 < found.regions[0].sum() < 12
    assert torch.equal(found.regions[0], allowed.double())
    torch.testing.assert_close(found.targets[1:], alone(inversion.trajectory[-1:], TARGETS[1:], [NULL] * N)[-1])


def test_strength_starts_from_the_trajectory_further_down() -> None:
    inversion, seen = inverted("direct"), []
    found = edit(inversion, [None, None], lambda *call: seen.append(call[:2]), strength=0.5)
    assert seen == [(0, 3), (1, 2), (2, 1)]
    x = inversion.trajectory[3:4]
    for k in (3, 2, 1):
        u, c = denoise(x, k, NULL), denoise(x, k, TARGETS[:1])
        x = move(x, u + SCALE * (c - u), k)
    torch.testing.assert_close(found.targets[:1], x)


def test_stored_residuals_are_added_to_the_ddpm_mean() -> None:
    """Edit-friendly: x_{k-1} = mu(x_k, target) + sigma_k z_k, with the source's own sigma_k z_k."""
    residuals = normal(N, 2, 4, 4, seed=9)
    inversion = inverted("edit_friendly", residuals=residuals)
    found = edit(inversion, [None, None])
    x = inversion.trajectory[-1:]
    for k in range(N, 0, -1):
        a, b = float(SCHEDULE.alphas_bar[k]), float(SCHEDULE.alphas_bar[k - 1])
        u, c = denoise(x, k, NULL), denoise(x, k, TARGETS[:1])
        eps = u + SCALE * (c - u)
        x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
        # DDPM's posterior mean in Ho et al. 2020's own form (equation 7)
        beta = 1 - a / b
        mean = math.sqrt(b) * beta / (1 - a) * x0 + math.sqrt(a / b) * (1 - b) / (1 - a) * x
        x = mean + residuals[k - 1]
    torch.testing.assert_close(found.targets[:1], x)
    torch.testing.assert_close(found.source, inversion.trajectory[:1])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"guidance_scale": -1.0}, "guidance_scale must be a number of at least 0"),
        ({"guidance_scale": None}, "guidance_scale"),
        ({"strength": 0.0}, "strength must be above 0 and at most 1"),
        ({"strength": 1.5}, "strength"),
        ({"guidance_stop": 2}, "guidance_stop must be from 0 to 1"),
        ({"blend_threshold": 1.0}, "blend_threshold must be above 0 and below 1"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        EditSettings(**settings)


def test_a_callback_may_change_the_latents_and_stop() -> None:
    inversion = inverted("direct")

    def zero_at_last(step: int, level: int, x: torch.Tensor) -> torch.Tensor | None:
        assert level == N - step
        return torch.zeros_like(x) if step == N - 1 else None

    assert float(edit(inversion, [None, None], zero_at_last).targets.abs().max()) == 0

    def stop(step: int, level: int, x: torch.Tensor) -> None:
        if step == 2:
            raise StopIteration

    stopped = edit(inversion, [None, None], stop)
    for i in range(2):
        wanted = alone(inversion.trajectory[-1:], TARGETS[i : i + 1], [NULL] * N)[3]
        torch.testing.assert_close(stopped.targets[i : i + 1], wanted)


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("guided", [False, True])
def test_rows_are_all_there_and_apart(free: bool, guided: bool) -> None:
    source, targets = BranchRows(source=True, source_unconditional=free), BranchRows(num_targets=3, guided=guided)
    every = [*range(99)[targets.unconditional], *range(99)[targets.conditional]]
    assert every == list(range(targets.total)) and list(targets.conditional_rows) == every[-3:]
    assert (targets.total, targets.num_unconditional) == ((6, 3) if guided else (3, 0))
    assert (source.total, source.num_unconditional) == ((2, 1) if free else (1, 0))
    both = BranchRows(source=True, num_targets=3, guided=guided)
    every = [*range(99)[both.unconditional], *range(99)[both.conditional]]
    assert [0, *every] == list(range(both.total)) and list(both.conditional_rows) == every[-3:]
    assert (both.total, both.num_unconditional) == ((7, 3) if guided else (4, 0))


def test_drawing_from_noise_is_guided_ddim() -> None:
    x = normal(2, 2, 4, 4, seed=7)
    found = sample_from_noise(denoise, SCHEDULE, x, TARGETS, NULL.expand(2, -1, -1), SCALE, 0.0, lambda *_: None)
    for i in range(2):
        torch.testing.assert_close(found[i : i + 1], alone(x[i : i + 1], TARGETS[i : i + 1], [NULL] * N)[-1])
