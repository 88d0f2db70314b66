"""From edited latents to the pictures that a call returns: the photograph itself but for the edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.image_processor import VaeImageProcessor
from torch.nn import functional as F

from .edit_loop import EditedLatents
from .edit_output import S2EditPipelineOutput
from .edit_settings import EditRequest
from .object_search import picture_mask
from .picture_compose import compose
from .picture_files import SourcePicture, read_picture
from .picture_marks import origin_here, with_origin
from .picture_modes import strips
from .picture_placement import PlacedPicture, Placement
from .pipeline_work import Work


def edited_pictures(
    work: Work,
    request: EditRequest,
    placed: PlacedPicture | None,
    edited: EditedLatents,
    mask: torch.Tensor | None,
    maps: Mapping[str, torch.Tensor] | None,
) -> S2EditPipelineOutput:
    """What a finished edit returns.

    Args:
        placed: the picture, and the part of it that was worked on; None: no picture is known, the canvas stands for it.
        mask: (H, W), the caller's own ``edit_mask``, of the picture's size.
        maps: word -> where it looked, (h, w).
    """
    shown = shown_as(work, request, placed, edited.targets)
    if request.output_type in ("np", "pt"):  # which aren't rounded to 8 bits
        shown = replace(shown, source=_in_16_bits(shown.source))
    placement = shown.placement
    looks = None if maps is None else {word: _map_picture(look, placement) for word, look in maps.items()}
    masks = [None if region is None else picture_mask(region.cpu(), placement) for region in edited.regions]
    if request.output_type == "latent":
        return S2EditPipelineOutput(edited.targets, looks, masks, edited.source, None, edited.interrupted)
    colors = _decoded(work, edited.targets, request)
    reconstruction = _decoded(work, edited.source, request)
    flagged = _flagged(work, colors)
    pictures = []
    for i, region in enumerate(edited.regions):
        picture, area = _painted(shown, colors[i]), masks[i]
        if request.keep_pixels and placed is not None:
            where: Any = region
            if region is not None:
                where = spread(region.cpu()) if mask is None else _mask_shown(mask, placed, placement)
            picture, composed = compose(shown.source, colors[i], reconstruction[0], where, placement)
            area = None if region is None and shown.is_whole else composed
        if flagged is not None and flagged[i]:
            picture, area = _blackened(picture), None
        pictures.append(_marked(work, request, i, picture))
        masks[i] = area
    source: Any = _in_form([_painted(shown, reconstruction[0])], request.output_type, work)
    return S2EditPipelineOutput(
        images=_in_form(pictures, request.output_type, work),
        attention_maps=looks,
        edit_masks=masks,
        source=source[0] if request.output_type == "pil" else source,
        nsfw_content_detected=flagged,
        interrupted=edited.interrupted,
        pictures=pictures if request.output_type == "pil" else None,
        before=None if placed is None else shown.source,
    )


def unedited_pictures(
    work: Work, request: EditRequest, placed: PlacedPicture | None, latents: torch.Tensor, num_targets: int
) -> S2EditPipelineOutput:
    """What a call returns that was stopped while it inverted: the picture of ``latents`` (1, C, h, w), and with
    ``keep_pixels`` the source itself."""
    images: Any = latents.expand(num_targets, -1, -1, -1)
    pictures = None
    if request.output_type != "latent":
        shown = shown_as(work, request, placed, latents)
        keeps = request.keep_pixels and placed is not None
        picture = shown.source if keeps else _painted(shown, _decoded(work, latents, request)[0])
        pictures = [picture] * num_targets
        images = _in_form(pictures, request.output_type, work)
    first = images[0] if request.output_type == "pil" else images[:1]
    return S2EditPipelineOutput(
        images=images, edit_masks=[None] * num_targets, source=first, interrupted=True, pictures=pictures
    )


def _marked(work: Work, request: EditRequest, i: int, picture: SourcePicture) -> SourcePicture:
    return with_origin(picture, origin_here(work.base_model, request.prompts[i]))


def shown_as(work: Work, request: EditRequest, placed: PlacedPicture | None, latents: torch.Tensor) -> PlacedPicture:
    """The picture as the call returns it, before the edit: itself, or with ``output_size="model"`` the part of it that
    was worked on, at the size that it was worked at. Without a picture it is a black one of the canvas's size."""
    if placed is not None and request.output_size == "picture":
        return placed
    height, width = work.family.pixel_size(latents)
    canvas, content = (width, height), (0, 0, width, height)
    picture = PIL.Image.new("RGB", canvas)
    if placed is not None:
        content = placed.placement.content
        picture = placed.canvas.crop(content)
    return PlacedPicture(read_picture(picture), Placement(picture.size, (0, 0, *picture.size), canvas, content))


def spread(region: torch.Tensor) -> torch.Tensor:
    """(h, w) of 0 and 1, a cell wider: the edit fades in within the border of what ``compose`` is given, and would be
    cut off half way inside the cells that changed; the decoder, too, carries a cell's change into the cells beside."""
    return F.max_pool2d(region[None, None].float(), 3, stride=1, padding=1)[0, 0]


def _mask_shown(mask: torch.Tensor, placed: PlacedPicture, placement: Placement) -> np.ndarray:
    """The caller's own mask of the picture as large as ``compose`` takes it: as the picture, or as the canvas."""
    values = mask.numpy()
    return values if placement is placed.placement else placed.placement.mask_to_canvas(values)


def _decoded(work: Work, latents: torch.Tensor, request: EditRequest) -> np.ndarray:
    """(n, H, W, 3) float32 in [0, 1]."""
    pixels = work.family.decode(latents, request.generator)
    return (pixels.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()


def _painted(shown: PlacedPicture, colors: np.ndarray) -> SourcePicture:
    """The picture with the canvas's ``colors`` (H, W, 3), in [0, 1], in its part."""
    source, placement = shown.source, shown.placement
    left, top, right, bottom = placement.box
    most = np.iinfo(source.color_type).max
    new = np.empty((bottom - top, right - left, 3), source.color_type)
    for strip in strips(placement.box):
        new[strip[1] - top : strip[3] - top] = np.rint(placement.from_canvas(colors, strip).clip(0, 1) * most)
    return source.with_colors(placement.box, new)


def _in_16_bits(source: SourcePicture) -> SourcePicture:
    """The same colours with room between them: v of 255 is 257 v of 65535."""
    if source.color_type == np.uint16:
        return source
    return replace(source, native=source.rgb, deep=np.asarray(source.rgb).astype(np.uint16) * 257, alpha=None)


def _blackened(picture: SourcePicture) -> SourcePicture:
    width, height = picture.size
    return picture.with_colors((0, 0, width, height), np.zeros((height, width, 3), picture.color_type))


def _flagged(work: Work, colors: np.ndarray) -> list[bool] | None:
    """Which of the edited pictures (n, H, W, 3) the safety checker, where there is one, says must not be shown."""
    pipe, checker = work.family.pipe, getattr(work.family.pipe, "safety_checker", None)
    if checker is None:
        return None
    shown = VaeImageProcessor.numpy_to_pil(colors)
    features = pipe.feature_extractor(shown, return_tensors="pt").to(work.family.device)
    _, flagged = checker(images=colors.copy(), clip_input=features.pixel_values.to(checker.dtype))
    return list(flagged)


def _in_form(pictures: Sequence[SourcePicture], output_type: str, work: Work) -> Any:
    if output_type == "pil":
        return [picture.native for picture in pictures]
    arrays = [
        picture.colors((0, 0, *picture.size)).astype(np.float32) / np.iinfo(picture.color_type).max
        for picture in pictures
    ]
    images = np.stack(arrays)
    if output_type == "np":
        return images
    return torch.from_numpy(images).permute(0, 3, 1, 2).to(work.family.device)


def _map_picture(attention: torch.Tensor, placement: Placement) -> PIL.Image.Image:
    values = (attention / attention.max().clamp(min=1e-12) * 255).round().byte().cpu().numpy()
    on_canvas = PIL.Image.fromarray(values).resize(placement.canvas_size, PIL.Image.Resampling.BICUBIC)
    return placement.mask_from_canvas(on_canvas)
