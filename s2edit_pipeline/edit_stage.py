"""Stage two of S2Edit: from a picture and words to edited pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.utils import logging

from .attention_prompt_to_prompt import PromptToPrompt, Reweighting
from .attention_source import KeepAttention
from .attention_spatial import mask_at
from .describe_stage import words_for_edit
from .edit_attention import EditControl
from .edit_loop import EditTask, edit_method, warn_of_outcome
from .edit_output import S2EditPipelineOutput
from .edit_pictures import edited_pictures, unedited_pictures
from .edit_settings import EditRequest
from .edit_words import TargetPlan, plan_edits
from .identity_prompts import (
    branches,
    check_negative,
    check_prompt,
    check_takes_part,
    check_tokens,
    encode_each,
    identities_in,
    spatial_control,
    tokenize_alike,
    warn_of_words,
    with_identities,
)
from .inversion_origin import check_inversion
from .inversion_record import (
    INVERSIONS,
    Inversion,
    check_keeping,
    check_residuals,
    check_served,
    inversion_method,
    is_finished,
)
from .inversion_stage import InversionRequest, invert_picture
from .noise_schedule import NoiseSchedule
from .object_search import cells_of, check_crop, close_up, close_up_at, place
from .picture_files import SourcePicture, read_picture
from .picture_inputs import load_mask
from .picture_placement import PlacedPicture
from .pipeline_turns import CallState
from .pipeline_work import Work
from .prompt_columns import TokenizedPrompt
from .prompt_embeds import Batch, Branch
from .prompt_parts import changes_only_the_subject
from .prompt_words import parse_weights

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class EditWords:
    """The prompts of an edit, with the identities' tokens in their places, and for each target the weights that were
    written into it, "(smiling:1.4)"."""

    source: TokenizedPrompt
    targets: Sequence[TokenizedPrompt]
    weights: Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Canvas:
    """What an edit works on: the picture and the part of it (None where an inversion stands for it that keeps none),
    the size of its latents and the noise levels."""

    placed: PlacedPicture | None
    height: int
    width: int
    schedule: NoiseSchedule

    @property
    def latent_size(self) -> torch.Size:
        return torch.Size((self.height, self.width))


def edit_picture(work: Work, request: EditRequest) -> S2EditPipelineOutput:
    """Edit as ``request`` says.

    Raises:
        TypeError, ValueError: an input that can't be used; nothing has been done then.
    """
    family, settings = work.family, request.settings
    family.check()
    words = edit_words(work, request)  # P~ and P*~: [I] before the noun
    canvas = edit_canvas(work, request, words)
    mask = _given_mask(work, request, canvas)
    plans = plan_edits(
        words.source, words.targets, settings, num_steps=canvas.schedule.num_steps, region=mask, weights=words.weights
    )
    canvas = _closer(work, request, words, canvas, mask)
    if mask is not None:
        plans = _confined_to(plans, _cells(mask, canvas).to(family.device))

    encoded_source = encode_each(family, [words.source], request.clip_skip)
    encoded_targets = encode_each(family, words.targets, request.clip_skip)
    (source,) = branches("source", [words.source], encoded_source)
    targets = branches("target", words.targets, encoded_targets)
    with torch.no_grad():
        null = Branch(
            "unconditional", family.encode_negative(request.negative_prompt, encoded_source, request.clip_skip)
        )
    pictures = None
    if request.shown is not None:
        pictures = family.encode_pictures(request.shown, guided=family.guides(settings.guidance_scale))
    prompt_to_prompt = PromptToPrompt(
        alignments=[plan.alignment for plan in plans],
        cross_until=[plan.cross_until for plan in plans],
        self_until=round(settings.self_replace_steps * canvas.schedule.num_steps),
    )
    inversion = request.inversion
    if not is_finished(inversion):
        # S2Edit, stage two: the picture inverted under P~, with the mask at [I]'s attention
        inversion = _invert_first(work, request, canvas, source, null, prompt_to_prompt)
        if inversion.interrupted:
            return unedited_pictures(work, request, canvas.placed, inversion.trajectory[:1], len(targets))
    # prompt-to-prompt from its noise, A*_[I] = A_[I] * M_obj at every step of source and target
    control = EditControl(
        lambda batch: spatial_control([branch.prompt for branch in batch.branches], work.overlay, canvas.placed),
        prompt_to_prompt,
        Reweighting([plan.weights for plan in plans]),
        inversion.attention,
        maps=request.return_attention_maps
        or any(plan.confinement is not None and plan.confinement.region is None for plan in plans),
    )
    # negative-prompt inversion asks the unconditional branch with the source's words, [I] among them
    if INVERSIONS[inversion.method].null_is_source:
        null = replace(null, embeds=source.embeds, prompt=source.prompt)
    if pictures is not None:  # the source stays the bare model's
        targets, null = [target.with_picture(pictures[0]) for target in targets], null.with_picture(pictures[1])
    task = _edit_task(work, request, canvas, (source, null, targets), inversion, control, plans)
    with (
        work.progress_bar(total=settings.num_steps(canvas.schedule)) as bar,
        family.control_attention(control, canvas.height, canvas.width),
    ):
        edited = edit_method(request.method).run(replace(task, on_step=_counted(task.on_step, bar)))
    control.forget_source()  # before the autoencoder needs the room
    warn_of_outcome(edited)
    maps = None
    if request.return_attention_maps:
        prompt = words.targets[0]
        looks = control.looks(0, (), [word.tokens for word in prompt.words], canvas.latent_size)
        maps = {word.text: look for word, look in zip(prompt.words, looks, strict=True)}
    return edited_pictures(work, request, canvas.placed, edited, mask, maps)


# ------------------------------------------------------------------------------ before the work


def edit_words(work: Work, request: EditRequest) -> EditWords:
    """The prompts, each learned token of a target put into the source prompt as well.

    Raises:
        TypeError, ValueError: a prompt is missing, empty or too long.
    """
    overlay, family = work.overlay, work.family
    if not request.prompts:
        raise ValueError("Pass the target prompt: pipe('a photo of a [I] lady', image=image, source_prompt=...).")
    for text in request.prompts:
        check_prompt(text, "prompt")
        check_tokens(text, family, overlay)
    parsed = [parse_weights(text) for text in request.prompts]
    prompts, weights = [text for text, _ in parsed], [factors for _, factors in parsed]
    inverted_prompt = str(getattr(request.inversion, "prompt", ""))
    present = identities_in([*prompts, inverted_prompt], overlay)
    source_prompt = request.source_prompt
    if source_prompt is None:
        chosen = [] if request.identity_token is None else [request.identity_token]
        known = [overlay.identities[token].adapter.source_prompt for token in [*present, *chosen]]
        source_prompt = next((text for text in [inverted_prompt, *known] if text), None)
    if source_prompt is not None:
        check_prompt(source_prompt, "source_prompt")
    source_prompt, prompts = words_for_edit(work, request, source_prompt, prompts)
    check_tokens(source_prompt, family, overlay)
    if parse_weights(source_prompt)[1]:
        raise ValueError(f"source_prompt={source_prompt!r} holds weights; they belong in the target prompt.")
    check_takes_part(request.identity_token, [*prompts, source_prompt], overlay)
    warn_of_words(source_prompt, prompts, family)
    source, targets = tokenize_alike(with_identities(source_prompt, present, overlay), prompts, family, overlay)
    check_negative(request.negative_prompt, overlay)
    return EditWords(source, targets, weights)


def edit_canvas(work: Work, request: EditRequest, words: EditWords) -> Canvas:
    """The picture, and the size and the noise levels to work at.

    Raises:
        TypeError, ValueError: a picture, a crop or a size that can't be used, or an inversion that isn't this edit's.
    """
    family, inversion = work.family, request.inversion
    check_crop(request.crop)
    source = None if request.image is None else read_picture(request.image)
    if is_finished(inversion):
        height, width = inversion.trajectory.shape[-2:]
        size = family.pixel_size(inversion.trajectory)
        _check_request_against(inversion, words.source.text, request, size)
        schedule = family.schedule(inversion.num_inference_steps, size)
        check_inversion(inversion, family, work.overlay, schedule, source)
        check_residuals(request.settings.residuals, inversion.method, schedule.prediction)
        return Canvas(_placed_as_inverted(work, request, source, size), height, width, schedule)
    assert source is not None  # else it would have been drawn from noise
    method = inversion_method(inversion)
    check_keeping(inversion, request.keep_attention)
    if method.null_is_source and request.negative_prompt is not None:
        raise ValueError(
            f"negative_prompt has no effect with inversion={inversion!r}, which takes the source prompt in its place; "
            "leave it out, or use inversion='direct'."
        )
    canvas = _canvas_of(work, request, place(work, source, request.crop, request.size))
    check_served(inversion, family.guidance, canvas.schedule.prediction)
    check_residuals(request.settings.residuals, inversion, canvas.schedule.prediction)
    return canvas


def _canvas_of(work: Work, request: EditRequest, placed: PlacedPicture) -> Canvas:
    family, steps = work.family, request.num_inference_steps
    schedule = family.schedule(family.default_steps if steps is None else steps, placed.size)
    height, width = placed.size
    return Canvas(placed, height // family.pixels_per_latent, width // family.pixels_per_latent, schedule)


def _placed_as_inverted(
    work: Work, request: EditRequest, source: SourcePicture | None, size: tuple[int, int]
) -> PlacedPicture | None:
    """The part of the picture that was inverted at ``size`` (height, width); None where no picture is known.

    Raises:
        ValueError: the call wishes another part.
    """
    inversion, crop = request.inversion, request.crop
    source = inversion.source if source is None else source
    if source is None:
        placed = None
    elif inversion.placement is None:
        placed = work.family.place(source, None, size)
    else:
        placed = PlacedPicture(source, inversion.placement)
    if not isinstance(crop, str):
        wished = None if source is None else work.family.place(source, crop, size)
        if placed is None or wished is None or wished.placement.box != placed.placement.box:
            of = "a picture that isn't known" if placed is None else f"{placed.placement.box} of its picture"
            raise ValueError(
                f"crop={crop!r}, but the inversion was made of {of}; leave crop= out, or pass it to "
                f"pipe.invert(..., crop={crop!r})."
            )
    return placed


def _check_request_against(inversion: Any, source_prompt: str, request: EditRequest, size: tuple[int, int]) -> None:
    """``size`` is the inversion's (height, width).

    Raises:
    ValueError: the inversion was stopped before its end, or the call says other things than it was made with.
    """
    if inversion.interrupted:
        raise ValueError("This inversion was stopped before its end; invert again: pipe.invert(image, prompt).")
    steps = request.num_inference_steps
    if steps is not None and steps != inversion.num_inference_steps:
        raise ValueError(
            f"num_inference_steps={steps}, but the inversion was made in {inversion.num_inference_steps}; "
            f"leave it out, or call pipe.invert(..., num_inference_steps={steps})."
        )
    if inversion.prompt != source_prompt:
        raise ValueError(
            f"The inversion was made under {inversion.prompt!r} and the edit's source prompt is {source_prompt!r}; "
            "invert under the same words, with the same identity loaded: pipe.invert(image, source_prompt, "
            "identity=identity)."
        )
    scale = request.settings.guidance_scale
    if inversion.guidance_scale is not None and inversion.guidance_scale != scale:
        raise ValueError(
            f"The inversion {inversion.method!r} was optimised for guidance_scale={inversion.guidance_scale:g}, not "
            f"{scale:g}; use that, or call pipe.invert(..., guidance_scale={scale:g})."
        )
    if inversion.clip_skip != request.clip_skip:
        raise ValueError(
            f"The inversion was made with clip_skip={inversion.clip_skip}, not {request.clip_skip}; use that, or "
            "invert again: pipe.invert(..., clip_skip=...)."
        )
    if request.negative_prompt is not None and inversion.unconditional_embeds is not None:
        raise ValueError(
            f"negative_prompt has no effect with this inversion ({inversion.method!r}), which holds unconditional "
            "embeddings of its own; pass it to pipe.invert, or leave it out."
        )
    sides = zip(("height", "width"), request.size, size, strict=True)
    others = [(name, f" of {side}") for name, value, side in sides if value not in (None, side)]
    if request.keep_attention is not None:
        others.append(("keep_attention", ""))
    for name, made in others:
        raise ValueError(
            f"{name}= has no effect beside a finished inversion{made}; pass it to pipe.invert(..., {name}=...)."
        )


def _given_mask(work: Work, request: EditRequest, canvas: Canvas) -> torch.Tensor | None:
    """(H, W) in [0, 1]: the caller's own ``edit_mask``, as large as the picture, or without one as the canvas."""
    if request.edit_mask is None:
        return None
    scale = work.family.pixels_per_latent
    size = (canvas.width * scale, canvas.height * scale) if canvas.placed is None else canvas.placed.source.size
    return load_mask(request.edit_mask, size, "edit_mask")


def _cells(mask: torch.Tensor, canvas: Canvas) -> torch.Tensor:
    if canvas.placed is None:
        return mask_at(mask, *canvas.latent_size)
    return cells_of(mask, canvas.placed.placement, canvas.latent_size)


def _confined_to(plans: Sequence[TargetPlan], region: torch.Tensor) -> list[TargetPlan]:
    """``plans`` with ``region`` (h, w), of 0 and 1, in place of the mask that it was made from."""
    return [
        plan if plan.confinement is None else replace(plan, confinement=replace(plan.confinement, region=region))
        for plan in plans
    ]


def _closer(work: Work, request: EditRequest, words: EditWords, canvas: Canvas, mask: torch.Tensor | None) -> Canvas:
    """The close-up that ``crop="auto"`` goes to: of the caller's own mask, else of the subject, if the words change
    nothing but it."""
    placed = canvas.placed
    source, targets = words.source.text, [target.text for target in words.targets]
    only_the_subject = all(changes_only_the_subject(source, target) for target in targets)
    if is_finished(request.inversion):
        if placed is not None and not placed.is_whole and mask is None and not only_the_subject:
            logger.warning(
                f"The inversion is a close-up of {placed.placement.box}, and the words change more than its subject; "
                "nothing else of the picture will change. For that invert with pipe.invert(..., crop=None)."
            )
        return canvas
    if placed is None or not isinstance(request.crop, str):
        return canvas
    if mask is not None:
        closer = close_up_at(work, placed, mask, request.size)
    elif only_the_subject:
        tokens = identities_in([source], work.overlay)
        chosen = request.identity_token
        closer = close_up(work, placed, words.source, tokens if tokens or chosen is None else [chosen], request.size)
    else:
        closer = placed
    return canvas if closer is placed else _canvas_of(work, request, closer)


# ------------------------------------------------------------------------------ the work


def _invert_first(
    work: Work,
    request: EditRequest,
    canvas: Canvas,
    source: Branch,
    null: Branch,
    prompt_to_prompt: PromptToPrompt,
) -> Inversion:
    """The inversion of a call that brings none. For one call the source's attention isn't worth the memory, unless the
    caller says so: each step's source is asked once, for all targets."""
    assert canvas.placed is not None
    needed = min(1.0, prompt_to_prompt.active_until / canvas.schedule.num_steps)
    keep, guides_source = request.keep_attention, inversion_method(request.inversion).guides_source
    inverting = InversionRequest(
        placed=canvas.placed,
        latents=work.family.encode_picture(canvas.placed.canvas),
        source=source,
        null=null,
        method=request.inversion,
        schedule=canvas.schedule,
        guidance_scale=work.family.guidance.neutral if guides_source else request.settings.guidance_scale,
        generator=request.generator,
        clip_skip=request.clip_skip,
        keep=KeepAttention(share=0.0) if keep is None else replace(keep, share=needed),
        for_later=False,
    )
    # the call's own callback hears of the edit's steps alone; a stop is heeded here too
    return invert_picture(replace(work, report=_check_only(work)), inverting)


def _check_only(work: Work) -> Any:
    def report(step: int, timestep: Any, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        work.call.check()
        return {}

    return report


def _edit_task(
    work: Work,
    request: EditRequest,
    canvas: Canvas,
    rows: tuple[Branch, Branch, Sequence[Branch]],
    inversion: Inversion,
    control: EditControl,
    plans: Sequence[TargetPlan],
) -> EditTask:
    family, schedule, settings, dtype = work.family, canvas.schedule, request.settings, work.family.dtype
    source, null, targets = rows
    state = work.call.state = CallState(
        guidance_scale=settings.guidance_scale, guidance_rescale=settings.guidance_rescale,
        clip_skip=request.clip_skip, num_timesteps=settings.num_steps(schedule),
    )  # fmt: skip

    def denoise(x: torch.Tensor, level: int, batch: Batch) -> torch.Tensor:
        return family.denoise(x, schedule.timestep(level), batch.embeds, dtype)

    def on_step(step: int, level: int, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        return work.report(step, schedule.timestep(level), tensors)

    return EditTask(
        denoise=denoise,
        schedule=schedule,
        inversion=inversion,
        source=source,
        null=null,
        targets=targets,
        settings=settings,
        control=control,
        confinements=[plan.confinement for plan in plans],
        guidance=lambda: float(state.guidance_scale or 0.0),
        on_step=on_step,
        combine=family.combine,
        form=family.guidance,
    )


def _counted(on_step: Any, bar: Any) -> Any:
    """``on_step``, its calls counted by the progress bar."""

    def counting(step: int, level: int, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        bar.update()
        changed: Mapping[str, torch.Tensor] = on_step(step, level, tensors)
        return changed

    return counting
