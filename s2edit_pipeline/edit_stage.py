"""Stage two of S2Edit: from a picture and words to edited pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import PIL.Image
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging

from .attention_controls import PromptToPrompt, Reweighting, mask_at
from .attention_source import KeepAttention
from .edit_attention import EditControl
from .edit_loop import EDITS, EditedLatents, EditTask
from .edit_output import S2EditPipelineOutput
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
)
from .inversion_stage import InversionRequest, invert_picture
from .noise_schedule import NoiseSchedule
from .object_masks import feather, mask_to_picture
from .picture_inputs import load_mask, load_picture, picture_to_tensor
from .pipeline_work import Work
from .prompt_columns import TokenizedPrompt
from .prompt_embeds import Batch, Branch
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
    """What an edit works on: the picture (None where an inversion stands for it), the size of its latents and the
    noise levels."""

    picture: PIL.Image.Image | None
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
    words = edit_words(work, request)
    canvas = edit_canvas(work, request, words)
    region = _given_region(work, request, canvas)
    plans = plan_edits(
        words.source, words.targets, settings, num_steps=canvas.schedule.num_steps, region=region, weights=words.weights
    )

    encoded_source = encode_each(family, [words.source], request.clip_skip)
    encoded_targets = encode_each(family, words.targets, request.clip_skip)
    (source,) = branches("source", [words.source], encoded_source)
    targets = branches("target", words.targets, encoded_targets)
    with torch.no_grad():
        null = Branch(
            "unconditional", family.encode_negative(request.negative_prompt, encoded_source, request.clip_skip)
        )
    prompt_to_prompt = PromptToPrompt(
        alignments=[plan.alignment for plan in plans],
        cross_until=[plan.cross_until for plan in plans],
        self_until=round(settings.self_replace_steps * canvas.schedule.num_steps),
    )
    inversion = request.inversion
    if not hasattr(inversion, "trajectory"):
        inversion = _invert_first(work, request, canvas, source, null, prompt_to_prompt)
        if inversion.interrupted:
            return _unedited(work, request, canvas, inversion, len(targets))
    control = EditControl(
        lambda batch: spatial_control([branch.prompt for branch in batch.branches], work.overlay),
        prompt_to_prompt,
        Reweighting([plan.weights for plan in plans]),
        inversion.attention,
        maps=request.return_attention_maps
        or any(plan.confinement is not None and plan.confinement.region is None for plan in plans),
    )
    # negative-prompt inversion asks the unconditional branch with the source's words, [I] among them
    if INVERSIONS[inversion.method].null_is_source:
        null = replace(null, embeds=source.embeds, prompt=source.prompt)
    task = _edit_task(work, request, canvas, (source, null, targets), inversion, control, plans)
    with (
        work.progress_bar(total=settings.num_steps(canvas.schedule)) as bar,
        family.control_attention(control, canvas.height, canvas.width),
    ):
        edited = EDITS[request.method].run(replace(task, on_step=_counted(task.on_step, bar)))
    control.forget_source()  # before the autoencoder needs the room
    return _finished(work, request, canvas, words, control, edited)


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
    prompts, weights = zip(*(parse_weights(text) for text in request.prompts), strict=True)
    inverted_prompt = str(getattr(request.inversion, "prompt", ""))
    present = identities_in([*prompts, inverted_prompt], overlay)
    source_prompt = request.source_prompt
    if source_prompt is None:
        chosen = [] if request.identity_token is None else [request.identity_token]
        known = [overlay.identities[token].adapter.source_prompt for token in [*present, *chosen]]
        source_prompt = next((text for text in [inverted_prompt, *known] if text), None)
        if source_prompt is None:
            raise ValueError("Pass source_prompt=, what the picture shows now: 'a photo of a lady with glasses'.")
    check_prompt(source_prompt, "source_prompt")
    check_tokens(source_prompt, family, overlay)
    if parse_weights(source_prompt)[1]:
        raise ValueError(f"source_prompt={source_prompt!r} holds weights; they belong in the target prompt.")
    check_takes_part(request.identity_token, [*prompts, source_prompt], overlay)
    warn_of_words(source_prompt, prompts, family)
    source = family.tokenize(with_identities(source_prompt, present, overlay))
    targets = [family.tokenize(text) for text in prompts]
    check_negative(request.negative_prompt, overlay)
    return EditWords(source, targets, weights)


def edit_canvas(work: Work, request: EditRequest, words: EditWords) -> Canvas:
    """The picture, and the size and the noise levels to work at.

    Raises:
        TypeError, ValueError: a picture or a size that can't be used, or an inversion that isn't this edit's.
    """
    family, inversion = work.family, request.inversion
    picture = None if request.image is None else load_picture(request.image)
    if hasattr(inversion, "trajectory"):
        height, width = inversion.trajectory.shape[-2:]
        size = family.pixel_size(inversion.trajectory)
        _check_request_against(inversion, words.source.text, request, size)
        schedule = family.schedule(inversion.num_inference_steps, size)
        check_inversion(inversion, family, work.overlay, schedule, picture)
        check_residuals(request.settings.residuals, inversion.method, schedule.prediction)
        return Canvas(picture, height, width, schedule)
    assert picture is not None  # else it would have been drawn from noise
    method = inversion_method(inversion)
    check_keeping(inversion, request.keep_attention)
    if method.null_is_source and request.negative_prompt is not None:
        raise ValueError(
            f"negative_prompt has no effect with inversion={inversion!r}, which takes the source prompt in its place; "
            "leave it out, or use inversion='direct'."
        )
    size = family.working_size(picture, *request.size)
    steps = family.default_steps if request.num_inference_steps is None else request.num_inference_steps
    scale, schedule = family.pixels_per_latent, family.schedule(steps, size)
    check_served(inversion, family.guidance, schedule.prediction)
    check_residuals(request.settings.residuals, inversion, schedule.prediction)
    return Canvas(picture, size[0] // scale, size[1] // scale, schedule)


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
            f"The null-text inversion was optimised for guidance_scale={inversion.guidance_scale:g}, not "
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


def _given_region(work: Work, request: EditRequest, canvas: Canvas) -> torch.Tensor | None:
    """(h, w) of 0 and 1: the caller's own ``edit_mask``."""
    if request.edit_mask is None:
        return None
    scale = work.family.pixels_per_latent
    size = (canvas.width * scale, canvas.height * scale) if canvas.picture is None else canvas.picture.size
    return mask_at(load_mask(request.edit_mask, size, "edit_mask"), canvas.height, canvas.width).to(work.family.device)


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
    assert canvas.picture is not None
    needed = min(1.0, prompt_to_prompt.active_until / canvas.schedule.num_steps)
    keep, guides_source = request.keep_attention, inversion_method(request.inversion).guides_source
    scale = work.family.pixels_per_latent
    latents = work.family.encode_picture(canvas.picture, canvas.height * scale, canvas.width * scale)
    inverting = InversionRequest(
        picture=canvas.picture,
        latents=latents,
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
    facts = work.call.facts
    facts |= {
        "guidance_scale": settings.guidance_scale, "guidance_rescale": settings.guidance_rescale,
        "clip_skip": request.clip_skip, "num_timesteps": settings.num_steps(schedule),
    }  # fmt: skip

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
        guidance=lambda: float(facts["guidance_scale"]),
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


# ------------------------------------------------------------------------------ after the work


def _finished(
    work: Work,
    request: EditRequest,
    canvas: Canvas,
    words: EditWords,
    control: EditControl,
    edited: EditedLatents,
) -> S2EditPipelineOutput:
    family, scale = work.family, work.family.pixels_per_latent
    out_height, out_width = canvas.height * scale, canvas.width * scale
    own_pixels = None
    if request.keep_pixels:
        assert canvas.picture is not None
        everywhere = torch.ones(canvas.latent_size)
        weights = [feather(everywhere if r is None else r.cpu(), out_height, out_width, scale) for r in edited.regions]
        own_pixels = (picture_to_tensor(canvas.picture, out_height, out_width), torch.stack(weights)[:, None])
    warn_of_outcome(edited)
    images, flagged = decoded_pictures(work, edited.targets, request, own_pixels)
    source = edited.source  # the caller's own picture: no safety checker looks at it
    if request.output_type != "latent":
        pixels = family.decode(source, request.generator)
        source = VaeImageProcessor().postprocess(pixels, output_type=request.output_type)
    maps = None
    if request.return_attention_maps:
        prompt = words.targets[0]
        looks = control.looks(0, (), [word.tokens for word in prompt.words], canvas.latent_size)
        maps = {
            word.text: _map_picture(look, (out_width, out_height))
            for word, look in zip(prompt.words, looks, strict=True)
        }
    return S2EditPipelineOutput(
        images=images,
        attention_maps=maps,
        edit_masks=[None if r is None else mask_to_picture(r, (out_width, out_height)) for r in edited.regions],
        source=source[0] if request.output_type == "pil" else source,
        nsfw_content_detected=flagged,
        interrupted=edited.interrupted,
    )


def warn_of_outcome(edited: EditedLatents) -> None:
    """Say where an edit changed nothing."""
    for i, target in enumerate(edited.targets):
        if not edited.interrupted and torch.equal(target, edited.source[0].to(target)):
            logger.warning(
                f"Edit {i + 1} of {len(edited.targets)} is the picture itself: no word that differs from the source "
                "prompt's had a place to change. Change a word, take more steps or a higher strength, or pass "
                "edit_mask= or blend_words=False."
            )


def _unedited(
    work: Work, request: EditRequest, canvas: Canvas, inversion: Inversion, num_targets: int
) -> S2EditPipelineOutput:
    """What a call returns that was stopped while it inverted: the source itself, which says that it was interrupted."""
    latents = inversion.trajectory[:1]
    images, _ = decoded_pictures(work, latents.expand(num_targets, -1, -1, -1), request, None)
    first = images[0] if request.output_type == "pil" else images[:1]
    return S2EditPipelineOutput(images=images, edit_masks=[None] * num_targets, source=first, interrupted=True)


def decoded_pictures(
    work: Work, latents: torch.Tensor, request: EditRequest, own_pixels: tuple[torch.Tensor, torch.Tensor] | None
) -> tuple[Any, list[bool] | None]:
    """Decoded pictures, and which a safety checker flagged. ``own_pixels`` is a picture (1, 3, H, W) and weights
    (n, 1, H, W): where these are 0 it stays."""
    if request.output_type == "latent":
        return latents, None
    pipe = work.family.pipe
    pixels = work.family.decode(latents, request.generator)
    if own_pixels is not None:
        source, weights = (tensor.to(pixels.device, torch.float32) for tensor in own_pixels)
        pixels = torch.where(weights == 0, source, torch.lerp(source, pixels.float(), weights))
    flagged = None
    processor, checker = VaeImageProcessor(), getattr(pipe, "safety_checker", None)
    if checker is not None:
        shown = processor.postprocess(pixels, output_type="pil")
        features = pipe.feature_extractor(shown, return_tensors="pt").to(work.family.device)
        _, flagged = checker(images=pixels.clone(), clip_input=features.pixel_values.to(checker.dtype))
        black = torch.tensor(flagged, device=pixels.device)[:, None, None, None]
        pixels = torch.where(black, -torch.ones_like(pixels), pixels)
    return processor.postprocess(pixels, output_type=request.output_type), flagged


def _map_picture(attention: torch.Tensor, size: tuple[int, int]) -> PIL.Image.Image:
    values = (attention / attention.max().clamp(min=1e-12) * 255).round().byte().cpu().numpy()
    return PIL.Image.fromarray(values).resize(size, PIL.Image.Resampling.BICUBIC)
