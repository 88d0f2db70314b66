"""From a picture and its words to an :class:`Inversion`, with the model as it is."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from .attention_chain import Controllers
from .attention_seam import AttentionController
from .attention_source import AttentionKeeper, KeepAttention
from .attention_spatial import SpatialControl
from .fit_weights import frozen
from .identity_prompts import (
    branches,
    check_negative,
    check_prompt,
    check_tokens,
    encode_each,
    fitting_identities,
    spatial_control,
    tokenize_alike,
    with_identities,
)
from .inversion_origin import made_with
from .inversion_record import (
    INVERSIONS,
    Inversion,
    InversionTask,
    MadeWith,
    check_keeping,
    check_served,
    inversion_method,
)
from .noise_guidance import Guidance
from .noise_schedule import NoiseSchedule
from .object_search import check_crop, close_up, place
from .picture_files import read_picture
from .picture_placement import PlacedPicture
from .pipeline_turns import CallState, Interrupted
from .pipeline_work import Work
from .prompt_embeds import Branch


@dataclass(frozen=True, kw_only=True)
class InversionRequest:
    """What is to be inverted, and how.

    Attributes:
        placed: the picture, and the part of it to invert.
        latents: (1, C, h, w), its own.
        source: the branch of the source prompt.
        null: the unconditional branch.
        method: its name.
        schedule: the noise levels.
        guidance_scale: that edits will be guided with; or the source's own, of a method that guides it.
        generator: of the methods that draw noise.
        clip_skip: how the prompts were encoded.
        keep: how much of the source's attention is kept.
        for_later: whether other calls may use it, which have to know what it was made with.
    """

    placed: PlacedPicture
    latents: torch.Tensor
    source: Branch
    null: Branch
    method: str
    schedule: NoiseSchedule
    guidance_scale: float
    generator: torch.Generator | None
    clip_skip: int | None
    keep: KeepAttention
    for_later: bool = True


@dataclass(frozen=True, kw_only=True)
class InversionCall:
    """One call's inversion, its arguments as they came; see ``S2EditPipeline.invert``."""

    image: Any
    prompt: str
    method: str
    identity_token: str | None
    num_inference_steps: int
    guidance_scale: float | None
    negative_prompt: str | None
    size: tuple[int | None, int | None]
    clip_skip: int | None
    generator: Any
    keep: KeepAttention | None
    crop: Any = "auto"


def invert_words(work: Work, call: InversionCall) -> Inversion:
    """Invert ``call.image`` under ``call.prompt``, with the identities put in whose subject it names.

    Raises:
        TypeError, ValueError: an input that can't be used; nothing has been done then.
    """
    family, method = work.family, inversion_method(call.method)
    family.check()
    _refuse_what_has_no_effect(call, family.guidance)
    check_keeping(call.method, call.keep)
    check_prompt(call.prompt, "prompt")
    check_tokens(call.prompt, family, work.overlay)
    placed = place(work, read_picture(call.image), check_crop(call.crop), call.size)
    schedule = family.schedule(call.num_inference_steps, placed.size)
    check_served(call.method, family.guidance, schedule.prediction)
    tokens = fitting_identities(call.prompt, call.identity_token, work.overlay)
    prompt, _ = tokenize_alike(with_identities(call.prompt, tokens, work.overlay), [], family, work.overlay)
    check_negative(call.negative_prompt, work.overlay)
    encoded = encode_each(family, [prompt], call.clip_skip)
    with torch.no_grad():
        null = Branch("unconditional", family.encode_negative(call.negative_prompt, encoded, call.clip_skip))
    (source,) = branches("source", [prompt], encoded)
    scale = call.guidance_scale
    if scale is None:
        scale = family.default_guidance_scale if method.binds_guidance else family.guidance.neutral
    if isinstance(call.crop, str):
        placed = close_up(work, placed, prompt, tokens, call.size)
        schedule = family.schedule(call.num_inference_steps, placed.size)
    request = InversionRequest(
        placed=placed,
        latents=family.encode_picture(placed.canvas),
        source=source,
        null=null,
        method=call.method,
        schedule=schedule,
        guidance_scale=scale,
        generator=call.generator,
        clip_skip=call.clip_skip,
        keep=call.keep or KeepAttention(share=family.kept_attention),
    )
    return invert_picture(work, request)


def _refuse_what_has_no_effect(call: InversionCall, guidance: Guidance) -> None:
    """Raises:
    ValueError: an argument that this method, with a model that is guided so, has no use for.
    """
    method = inversion_method(call.method)
    takes = {
        "guidance_scale": method.binds_guidance or (method.guides_source and guidance.form != "none"),
        "negative_prompt": method.binds_guidance,
    }
    for name, is_taken in takes.items():
        if getattr(call, name) is not None and not is_taken:
            raise ValueError(
                f"{name} has no effect on the inversion {call.method!r}, which serves any; leave it out here and pass "
                "it to the edit."
            )
    if call.generator is not None and not method.draws_noise:
        drawing = ", ".join(repr(name) for name, one in INVERSIONS.items() if one.draws_noise)
        raise ValueError(
            f"generator= or seed= has no effect on the inversion {call.method!r}, which draws no noise; leave it out, "
            f"or use {drawing}."
        )


def invert_picture(work: Work, request: InversionRequest) -> Inversion:
    """Run the method; where the call is stopped meanwhile, the inversion says that it was ``interrupted``."""
    assert request.source.prompt is not None
    family, schedule, method = work.family, request.schedule, inversion_method(request.method)
    size, dtype = request.latents.shape[-2:], family.dtype
    keeper = None
    if method.pinned and request.keep.max_bytes:
        keeper = AttentionKeeper(request.keep, schedule.num_steps, words=request.source.prompt.word_columns)
    # the unconditional branch says no token: nothing to mask there
    sides = _SourceOrNull(spatial_control([request.source.prompt], work.overlay, request.placed), keeper)
    scale, form, source = request.guidance_scale, family.guidance, request.source.embeds
    guides_source = method.guides_source and form.has_null(scale)
    if method.guides_source and form.form == "told":
        source = source.told(scale)

    def denoise(x: torch.Tensor, level: float) -> torch.Tensor:
        sides.begin(is_source=True, level=level)
        output = family.denoise(x, schedule.timestep(level), source, dtype)
        if not guides_source:
            return output
        return family.combine(denoise_null(x, level, request.null.embeds.embeds), output, scale)

    def denoise_null(x: torch.Tensor, level: float, embeds: torch.Tensor) -> torch.Tensor:
        sides.begin(is_source=False, level=level)
        return family.denoise(x, schedule.timestep(level), request.null.embeds.with_embeds(embeds), dtype)

    facts: dict[str, Any] = {
        "method": request.method,
        "prompt": request.source.prompt.text,
        "guidance_scale": request.guidance_scale if method.binds_guidance else None,
        "made_with": made_with(family, work.overlay, schedule) if request.for_later else MadeWith(),
        "picture_digest": request.placed.source.digest if request.for_later else "",
        "source": request.placed.source,
        "placement": request.placed.placement,
        "clip_skip": request.clip_skip,
    }
    num_steps = schedule.num_steps * method.num_passes
    work.call.state = CallState(num_timesteps=num_steps, clip_skip=request.clip_skip)
    with (
        torch.set_grad_enabled(method.needs_gradients),
        frozen({family.denoiser_name: family.denoiser}) if method.needs_gradients else nullcontext(),
        family.control_attention(sides, *size),
        work.progress_bar(total=num_steps) as bar,
    ):

        def on_step(step: int, latents: torch.Tensor) -> None:
            bar.update()
            # up, the noise grows with the steps; on a second pass it falls again
            level = step + 1 if step < schedule.num_steps else num_steps - step
            work.report(step, schedule.timestep(level), {"latents": latents.detach()})

        task = InversionTask(
            request.latents, schedule, denoise, denoise_null, request.source.embeds.embeds,
            request.null.embeds.embeds, request.guidance_scale, request.generator, on_step, family.combine,
        )  # fmt: skip
        try:
            path = method.run(task)
        except Interrupted:
            return Inversion(**facts, trajectory=request.latents, interrupted=True)
        if keeper is not None and keeper.first_kept <= schedule.num_steps and schedule.num_steps not in keeper.maps:
            # the walk up never asks at the noise that it ends in, where an edit begins
            with torch.no_grad():
                denoise(path.trajectory[-1:], schedule.num_steps)
    return Inversion(
        **facts,
        trajectory=path.trajectory,
        unconditional_embeds=path.unconditional_embeds,
        residuals=path.residuals,
        attention=None if keeper is None else keeper.kept(),
    )


class _SourceOrNull(Controllers):
    """The source's controls where its branch is asked, none where the unconditional one is."""

    def __init__(self, spatial: SpatialControl, keeper: AttentionKeeper | None) -> None:
        super().__init__(())
        self.keeper = keeper
        self.of_source: Sequence[AttentionController] = [spatial, *([] if keeper is None else [keeper])]

    def begin(self, *, is_source: bool, level: float) -> None:
        """Be told of the next evaluation; of one between two levels nothing is kept."""
        is_kept = self.keeper is not None and level == int(level) and level > 0
        self.controllers = tuple(one for one in self.of_source if is_source and (one is not self.keeper or is_kept))
        if is_source and is_kept and self.keeper is not None:
            self.keeper.begin(int(level))
