"""The edit: source and target branches side by side from the inverted noise down to the pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from .ddim_steps import NoiseSchedule, check_finite, ddim_move, ddpm_mean
from .edit_control import BranchRows, EditControl
from .latent_inversion import Inversion, guided
from .object_masks import changed_cells, edit_region

Denoise = Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]
DenoiseBranches = Callable[[torch.Tensor, int, torch.Tensor, BranchRows], torch.Tensor]


@dataclass(frozen=True)
class EditSettings:
    """What a caller asks of an edit; the fields are the arguments of ``S2EditPipeline.__call__``, and two shares of the
    steps: after ``confine_from`` the source is kept outside the edit, after ``settle_from`` also where the edit changed
    nothing much.

    Raises:
        ValueError: a number out of its range, or options that don't go together.
    """

    guidance_scale: float = 4.5
    guidance_rescale: float = 0.0
    guidance_stop: float = 0.5
    strength: float = 1.0
    edit: str = "auto"
    cross_replace_steps: float | Mapping[str, float] = 0.4
    self_replace_steps: float = 0.4
    reweight: Mapping[str, float] | None = None
    blend_words: Sequence[str] | str | bool | None = None
    keep_words: Sequence[str] | str | None = None
    blend_threshold: float = 0.4
    confine_from: float = 0.2
    change_threshold: float = 0.2
    settle_from: float = 0.8

    def __post_init__(self) -> None:
        scale = self.guidance_scale
        if not isinstance(scale, (int, float)) or not math.isfinite(scale) or scale < 0:
            raise ValueError(f"guidance_scale must be a number of at least 0, not {scale!r}.")
        for name in ("guidance_rescale", "guidance_stop", "self_replace_steps", "confine_from", "settle_from"):
            check_share(name, getattr(self, name))
        check_share("change_threshold", self.change_threshold)
        check_share("blend_threshold", self.blend_threshold, open_ended=True)
        if not isinstance(self.strength, (int, float)) or not 0 < self.strength <= 1:
            raise ValueError(f"strength must be above 0 and at most 1, not {self.strength!r}.")

    def num_steps(self, schedule: NoiseSchedule) -> int:
        """The steps that an edit of this strength makes."""
        return max(1, round(self.strength * schedule.num_steps))


def check_share(name: str, value: object, *, open_ended: bool = False) -> None:
    """Raises:
    ValueError: ``value`` isn't a number in [0, 1], or with ``open_ended`` in (0, 1).
    """
    if not isinstance(value, (int, float)) or not (0 < value < 1 if open_ended else 0 <= value <= 1):
        wanted = "above 0 and below 1" if open_ended else "from 0 to 1"
        raise ValueError(f"{name} must be {wanted}, not {value!r}.")


@dataclass(frozen=True)
class Confinement:
    """Where one target may differ from the source.

    Attributes:
        source_tokens, target_tokens: positions of the words whose maps show it, a tuple for each word.
        kept_source, kept_target: likewise, of words whose place is taken out of it.
        region: (h, w) of 0 and 1, given from outside; then no map is looked at.
        threshold: see ``object_masks.edit_region``.
        start: the share of the steps after which the source is kept outside.
        change_threshold: in the end, cells that changed by less than this share of the most changed one are kept too.
    """

    source_tokens: tuple[tuple[int, ...], ...]
    target_tokens: tuple[tuple[int, ...], ...]
    region: torch.Tensor | None
    threshold: float
    start: float
    kept_source: tuple[tuple[int, ...], ...] = ()
    kept_target: tuple[tuple[int, ...], ...] = ()
    change_threshold: float = 0.0


@dataclass(frozen=True)
class EditedLatents:
    """``targets`` (n, C, h, w), the source branch's own end ``source`` (1, C, h, w), and for each target the
    ``regions`` (h, w) in which it could change, or None where it was free."""

    targets: torch.Tensor
    source: torch.Tensor
    regions: tuple[torch.Tensor | None, ...]


def _region(confinement: Confinement, control: EditControl, target: int, size: torch.Size) -> torch.Tensor:
    if confinement.region is not None:
        return confinement.region

    def looks(source: tuple[tuple[int, ...], ...], target_tokens: tuple[tuple[int, ...], ...]) -> torch.Tensor:
        maps = control.looks(target, source, target_tokens, size)
        return edit_region(maps, confinement.threshold) if maps else torch.zeros(size)

    # where no word changed, nothing may
    region = looks(confinement.source_tokens, confinement.target_tokens)
    return region * (1 - looks(confinement.kept_source, confinement.kept_target).to(region))


@torch.no_grad()
def sample_edits(
    denoise: DenoiseBranches,
    schedule: NoiseSchedule,
    inversion: Inversion,
    source_embeds: torch.Tensor,
    target_embeds: torch.Tensor,
    negative_embeds: torch.Tensor,
    settings: EditSettings,
    control: EditControl,
    confinements: Sequence[Confinement | None],
    on_step: Callable[[int, int, torch.Tensor], torch.Tensor | None],
) -> EditedLatents:
    """Prompt-to-prompt (Hertz et al. 2022, algorithm 1) from an inverted picture, all targets in one batch.

    A branch is asked only where it counts: the targets' unconditional ones while they are guided, a pinned source
    while its attention is taken over and wasn't kept, as one row more of their batch. A free source's two branches go
    before the targets, so that the batch doesn't double.

    Args:
        denoise: ``denoise(x, level, prompt_embeds, rows)``, under ``control``.
        source_embeds: (1, L, D); target_embeds: (n, L, D); negative_embeds: (1, L, D).
        settings: ``guidance_rescale`` and ``guidance_stop`` are of the targets' branches; the source's comes back
            by plain guidance. From the share ``guidance_stop`` of the steps on, the targets go unguided
            (Kynkäänniemi et al. 2024: at low noise guidance only burns colours). ``strength`` is the share of the
            noise levels that the edit goes through; it starts from the trajectory's latents there.
        confinements: one for each target; None lets it change everywhere. Where a region's cells came out nearly as
            they were, they are at last the source's again.
        on_step: called with (step, noise level, target latents) after each; may return other latents, and
            stops the edit by raising ``StopIteration``.
    """
    n, size = len(target_embeds), inversion.trajectory.shape[-2:]
    guidance_scale, free = settings.guidance_scale, not inversion.pinned
    looks_at_source = any(
        c is not None and c.region is None and (c.source_tokens or c.kept_source) for c in confinements
    )
    first = settings.num_steps(schedule)
    source = inversion.trajectory[first : first + 1].to(target_embeds)
    x = source.expand(n, -1, -1, -1)
    regions: list[torch.Tensor | None] = [None] * n
    for k in range(first, 0, -1):
        step = schedule.num_steps - k
        null = negative_embeds
        if inversion.unconditional_embeds is not None:
            null = inversion.unconditional_embeds[k - 1 : k].to(target_embeds)
        if free:
            rows = BranchRows(source=True, source_unconditional=guidance_scale != 1)
            control.begin_source(step, k, rows)
            embeds = [source_embeds, *[null] * rows.num_unconditional]
            source_output = denoise(source.expand(rows.total, -1, -1, -1), k, torch.cat(embeds), rows)
        is_guided = step < settings.guidance_stop * schedule.num_steps and guidance_scale != 1
        asks_source = not free and control.needs_source(step, k, maps=looks_at_source)
        rows = BranchRows(source=asks_source, num_targets=n, guided=is_guided)
        control.begin(step, k, rows)
        latents = [*[source] * asks_source, *[x] * (1 + is_guided)]
        embeds = [*[source_embeds] * asks_source, *[null] * rows.num_unconditional, target_embeds]
        output = denoise(torch.cat(latents), k, torch.cat(embeds), rows)
        control.end(k)

        a, a_next = schedule.alphas_bar[k], schedule.alphas_bar[k - 1]
        target_output = output[rows.conditional]
        if is_guided:
            unconditional = output[rows.unconditional]
            target_output = guided(unconditional, target_output, guidance_scale, settings.guidance_rescale)
        if inversion.residuals is not None:
            mean, _ = ddpm_mean(x, target_output, a, a_next, schedule.prediction_type)
            x = mean + inversion.residuals[k - 1 : k].to(mean)
        else:
            x = ddim_move(x, target_output, a, a_next, schedule.prediction_type)
        if inversion.pinned:
            source = inversion.trajectory[k - 1 : k].to(x)
        else:
            if guidance_scale != 1:
                source_output = guided(source_output[1:], source_output[:1], guidance_scale)
            source = ddim_move(source, source_output, a, a_next, schedule.prediction_type)

        check_finite(x, "the edit", first - k)
        for i, confinement in enumerate(confinements):
            if confinement is None or step + 1 < confinement.start * schedule.num_steps:
                continue
            region = _region(confinement, control, i, size).to(x)
            if step + 1 >= settings.settle_from * schedule.num_steps:
                inside = torch.where(region > 0.5, x[i], source[0])
                region = region * changed_cells(inside, source[0], confinement.change_threshold)
            regions[i] = region
            x = torch.cat([x[:i], torch.where(region > 0.5, x[i : i + 1], source), x[i + 1 :]])
        try:
            replaced = on_step(first - k, k, x)
        except StopIteration:
            break
        x = x if replaced is None else replaced
    return EditedLatents(x, source, tuple(regions))


@torch.no_grad()
def sample_from_noise(
    denoise: Denoise,
    schedule: NoiseSchedule,
    latents: torch.Tensor,
    prompt_embeds: torch.Tensor,
    negative_embeds: torch.Tensor,
    guidance_scale: float,
    guidance_rescale: float,
    on_step: Callable[[int, int, torch.Tensor], torch.Tensor | None],
) -> torch.Tensor:
    """Guided DDIM sampling of ``latents`` (B, C, h, w) under ``prompt_embeds`` (B, L, D)."""
    x = latents
    for step, k in enumerate(range(schedule.num_steps, 0, -1)):
        output = denoise(torch.cat([x, x]), k, torch.cat([negative_embeds, prompt_embeds]))
        unconditional, conditional = output.chunk(2)
        output = guided(unconditional, conditional, guidance_scale, guidance_rescale)
        x = ddim_move(x, output, schedule.alphas_bar[k], schedule.alphas_bar[k - 1], schedule.prediction_type)
        check_finite(x, "the drawing", step)
        try:
            replaced = on_step(step, k, x)
        except StopIteration:
            break
        x = x if replaced is None else replaced
    return x
