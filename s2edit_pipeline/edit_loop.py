"""The edit: source and target branches side by side from the inverted noise down to the pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.utils import logging

from .argument_checks import check_choice
from .edit_attention import EditControl
from .edit_settings import EditSettings
from .edit_words import Confinement
from .inversion_record import INVERSIONS, Combine, Inversion
from .noise_guidance import PLAIN_GUIDANCE, Guidance, guided, rescaled
from .noise_schedule import NoiseSchedule, check_finite
from .object_masks import changed_cells, edit_region
from .pipeline_turns import Interrupted
from .prompt_embeds import Batch, Branch, PromptEmbeds

logger = logging.get_logger(__name__)

UNSEEN = 0.05
"""The largest change of the latents, in their deviations, that isn't seen in a picture."""


@dataclass(frozen=True, kw_only=True)
class EditTask:
    """What an edit method works on.

    Attributes:
        denoise: ``denoise(x, level, batch)``, the denoiser's output for x (B, C, h, w), under ``control``.
        schedule: the inversion's noise levels.
        inversion: of the source picture.
        source: its branch.
        null: the unconditional branch.
        targets: one branch for each target prompt.
        settings: ``guidance_rescale`` and ``guidance_stop`` are of the targets' branches; the source's comes back
            by plain guidance. From the share ``guidance_stop`` of the steps on, the targets go unguided
            (Kynkäänniemi et al. 2024: at low noise guidance only burns colours). ``strength`` is the share of the
            noise levels that the edit goes through; it starts from the trajectory's latents there.
        control: of the branches' attention.
        confinements: one for each target; None lets it change everywhere. Where a region's cells came out nearly as
            they were, they are at last the source's again.
        guidance: the guidance scale of now, which a callback may change.
        combine: ``combine(unconditional, conditional, scale)``, the model's own guidance.
        form: what guidance is in this model.
        on_step: called with (step, noise level, tensors) after each; it may return other tensors by the names it got,
            and stops the edit by raising ``Interrupted``.
    """

    denoise: Callable[[torch.Tensor, int, Batch], torch.Tensor]
    schedule: NoiseSchedule
    inversion: Inversion
    source: Branch
    null: Branch
    targets: Sequence[Branch]
    settings: EditSettings
    control: EditControl
    confinements: Sequence[Confinement | None]
    guidance: Callable[[], float]
    on_step: Callable[[int, int, Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]
    combine: Combine = guided
    form: Guidance = PLAIN_GUIDANCE


@dataclass(frozen=True)
class EditedLatents:
    """``targets`` (n, C, h, w), the source branch's own end ``source`` (1, C, h, w), for each target the ``regions``
    (h, w) in which it could change, or None where it was free, and whether it was ``interrupted``."""

    targets: torch.Tensor
    source: torch.Tensor
    regions: tuple[torch.Tensor | None, ...]
    interrupted: bool = False


@dataclass(frozen=True)
class EditMethod:
    """One way to edit: ``run`` takes a task to edited latents."""

    run: Callable[[EditTask], EditedLatents]


EDITS: dict[str, EditMethod] = {}
"""Name -> method."""


def register_edit(name: str, method: EditMethod) -> None:
    """Make ``method`` known as ``name``."""
    EDITS[name] = method


def edit_method(name: Any) -> EditMethod:
    """Raises:
    ValueError: there is no such edit method.
    """
    check_choice("edit_method", name, tuple(EDITS))
    return EDITS[name]


@torch.no_grad()
def prompt_to_prompt(task: EditTask) -> EditedLatents:
    """Prompt-to-prompt (Hertz et al. 2022, algorithm 1) from an inverted picture, all targets in one batch.

    A branch is asked only where it counts: the targets' unconditional ones while they are guided, a pinned source
    while its attention is taken over and wasn't kept, as one row more of their batch. A free source's two branches go
    before the targets, so that the batch doesn't double.
    """
    schedule, inversion, settings, control = task.schedule, task.inversion, task.settings, task.control
    targets, null = list(task.targets), task.null
    n = len(targets)
    looks_at_source = any(
        c is not None and c.region is None and (c.source_tokens or c.kept_source) for c in task.confinements
    )
    first = settings.num_steps(schedule)
    source = inversion.trajectory[first : first + 1].to(targets[0].embeds.embeds)
    x = source.expand(n, -1, -1, -1)
    regions: list[torch.Tensor | None] = [None] * n
    for k in range(first, 0, -1):  # algorithm 1, "for t = T, T - 1, ..., 1"
        step, scale = schedule.num_steps - k, task.guidance()
        level_null = null
        if inversion.unconditional_embeds is not None:
            stored = inversion.unconditional_embeds[k - 1 : k].to(null.embeds.embeds)
            level_null = replace(null, embeds=null.embeds.with_embeds(stored))
        if not inversion.pinned:
            source_output = _ask_free_source(task, source, k, level_null)
        before_stop = step < settings.guidance_stop * schedule.num_steps
        has_nulls = before_stop and task.form.has_null(scale)
        asked = targets
        if task.form.form == "told":
            asked = [target.told(scale if before_stop else task.form.neutral) for target in targets]
        asks_source = inversion.pinned and control.needs_source(step, k, maps=looks_at_source)
        # M_t of the source, M*_t of the target, and Edit(M_t, M*_t, t) in its place, are ``control``'s
        batch = Batch((*[task.source] * asks_source, *[level_null] * (n * has_nulls), *asked))
        control.begin(step, k, batch)
        output = task.denoise(torch.cat([*[source] * asks_source, *[x] * (1 + has_nulls)]), k, batch)
        control.end(k)

        target_output = output[batch.rows("target")]
        if has_nulls:  # e(null) + w (e(P*) - e(null)) (Ho and Salimans 2022)
            combined = task.combine(output[batch.rows("unconditional")], target_output, scale)
            target_output = rescaled(combined, target_output, settings.guidance_rescale)
        x = _stepped(task, x, target_output, k)  # z*_{t-1} = DM(z*_t, P*, t) with Edit(M_t, M*_t, t) for M
        if inversion.pinned:  # the source's z_{t-1} is the inversion's own (Ju et al. 2023)
            source = inversion.trajectory[k - 1 : k].to(x)
        else:
            source = schedule.move(source, source_output, k, k - 1)

        check_finite(x, "the edit", first - k)
        # local blend: z*_{t-1} = (1 - alpha) z_{t-1} + alpha z*_{t-1}, alpha the words' region
        x, regions = confined(task, step, x, source, regions)
        try:
            changed = task.on_step(first - k, k, _tensors(x, targets, null))
        except Interrupted:
            return EditedLatents(x, source, tuple(regions), interrupted=True)
        x = changed.get("latents", x)
        targets = [_with_row(target, changed.get("prompt_embeds"), i) for i, target in enumerate(targets)]
        null = _with_row(null, changed.get("negative_prompt_embeds"), 0)
    return EditedLatents(x, source, tuple(regions))


register_edit("prompt_to_prompt", EditMethod(prompt_to_prompt))


def _stepped(task: EditTask, x: torch.Tensor, output: torch.Tensor, k: int) -> torch.Tensor:
    """The targets at level k - 1: the step down, and what the source's own misses there of its latents, ``mu + r_t``
    (of a random step Huberman-Spiegelglas et al. 2024)."""
    schedule, inversion = task.schedule, task.inversion
    is_random = INVERSIONS[inversion.method].random_steps
    mean = schedule.posterior_mean(x, output, k, k - 1) if is_random else schedule.move(x, output, k, k - 1)
    if inversion.residuals is None or not task.settings.residuals:
        return mean
    return mean + inversion.residuals[k - 1 : k].to(mean)


def _ask_free_source(task: EditTask, source: torch.Tensor, k: int, null: Branch) -> torch.Tensor:
    """The source's own guided output, in a batch before the targets'; pictures are shown to these alone."""
    scale = task.settings.guidance_scale
    is_guided = task.form.has_null(scale)
    batch = Batch((task.source, *[null.with_picture(None)] * is_guided))
    task.control.begin(task.schedule.num_steps - k, k, batch)
    output = task.denoise(source.expand(len(batch), -1, -1, -1), k, batch)
    return task.combine(output[1:], output[:1], scale) if is_guided else output


def confined(
    task: EditTask, step: int, x: torch.Tensor, source: torch.Tensor, regions: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Targets ``x`` with the source's latents outside their regions, and the regions as they are now."""
    num_steps, settings = task.schedule.num_steps, task.settings
    now, targets = list(regions), list(x.unbind(0))
    for i, confinement in enumerate(task.confinements):
        if confinement is None or step + 1 < confinement.start * num_steps:
            continue
        region = _region(confinement, task.control, i, x.shape[-2:]).to(x)
        if step + 1 >= settings.settle_from * num_steps:
            inside = torch.where(region > 0.5, x[i], source[0])
            region = region * changed_cells(inside, source[0], confinement.change_threshold)
        now[i] = region
        targets[i] = torch.where(region > 0.5, x[i], source[0])
    return torch.stack(targets), now


def _region(confinement: Confinement, control: EditControl, target: int, size: torch.Size) -> torch.Tensor:
    if confinement.region is not None:
        return confinement.region

    def looks(source: tuple[tuple[int, ...], ...], target_tokens: tuple[tuple[int, ...], ...]) -> torch.Tensor:
        maps = control.looks(target, source, target_tokens, size)
        return edit_region(maps, confinement.threshold) if maps else torch.zeros(size)

    # where no word changed, nothing may
    region = looks(confinement.source_tokens, confinement.target_tokens)
    return region * (1 - looks(confinement.kept_source, confinement.kept_target).to(region))


def _tensors(x: torch.Tensor, targets: Sequence[Branch], null: Branch) -> dict[str, torch.Tensor]:
    """What callbacks are shown."""
    return {
        "latents": x,
        "prompt_embeds": torch.cat([target.embeds.embeds for target in targets]),
        "negative_prompt_embeds": null.embeds.embeds,
    }


def _with_row(branch: Branch, embeds: torch.Tensor | None, row: int) -> Branch:
    """``branch`` with another row of ``embeds`` than its own, where a callback gave one."""
    if embeds is None:
        return branch
    encoded: PromptEmbeds = branch.embeds.with_embeds(embeds[row : row + 1].to(branch.embeds.embeds))
    return replace(branch, embeds=encoded)


def warn_of_outcome(edited: EditedLatents) -> None:
    """Say where an edit changed nothing, or nothing that can be seen."""
    for i, target in enumerate(edited.targets):
        source = edited.source[0].to(target)
        change = float((target - source).abs().max() / source.std().clamp(min=1e-6))
        which = f"Edit {i + 1} of {len(edited.targets)}"
        if edited.interrupted or change > UNSEEN:
            continue
        if change == 0:
            logger.warning(
                f"{which} is the picture itself: no word that differs from the source prompt's had a place to change. "
                "Change a word, take more steps or a higher strength, or pass edit_mask= or blend_words=False."
            )
        else:
            logger.warning(
                f"{which} can't be told from the picture: too little noise was edited in. Take more steps "
                "(num_inference_steps=50) or a higher strength."
            )
