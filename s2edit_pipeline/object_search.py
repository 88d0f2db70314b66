"""Where a call works: all of the picture, a part that the caller names, or close up at the object that it is about,
which is found coarse on the whole picture and then, nearer and nearer, within what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging
from PIL import Image

from .attention_maps import MapRecorder
from .attention_spatial import mask_at
from .describe_judge import LEVELS, DenoisingJudge
from .object_masks import MASK_THRESHOLD, mask_to_picture, threshold_map
from .picture_files import SourcePicture
from .picture_modes import Box
from .picture_placement import CLOSE_UP_SHARE, PlacedPicture, Placement, close_up_box, mask_values, place_picture
from .pipeline_work import Work
from .prompt_columns import TokenizedPrompt
from .prompt_parts import subject_noun

logger = logging.get_logger(__name__)

MASK_LEVELS = (0.2, 0.35, 0.5, 0.65)
"""Where the object is looked for: shares of the way from the picture to noise."""

MOST_CLOSER = 2
"""So often it is gone closer."""

Size = tuple[int | None, int | None]
"""(height, width) to work at, None where the model's own will do."""


@torch.no_grad()
def object_mask(
    work: Work, latents: torch.Tensor, prompt: TokenizedPrompt, subject: str, threshold: float
) -> torch.Tensor:
    """(h, w) float32 of 0 and 1: where ``subject`` is in the picture of ``latents`` (1, C, h, w), from the model as it
    is now (S2Edit, ``M_obj``)."""
    family = work.family
    height, width = latents.shape[-2:]
    schedule = family.schedule(min(50, family.training_schedule().num_steps), family.pixel_size(latents))
    recorder, encoded, dtype = MapRecorder(columns=[prompt.word_columns]), family.encode([prompt]), family.dtype
    generator = torch.Generator().manual_seed(0)  # its own: looking at the mask must not change what is drawn after it
    with family.control_attention(recorder, height, width):
        for share in MASK_LEVELS:
            level = max(1, round(share * schedule.num_steps))
            noise = torch.randn(latents.shape, generator=generator, dtype=torch.float32).to(latents)
            family.denoise(schedule.noised(latents, noise, level), schedule.timesteps[level - 1].item(), encoded, dtype)
    return threshold_map(recorder.word_map(0, prompt.find(subject), height, width).cpu(), threshold)


def place(work: Work, source: SourcePicture, crop: Any, size: Size = (None, None)) -> PlacedPicture:
    """``source`` as a call with this ``crop`` begins with it: all of it for None and "auto", else the caller's box.

    Raises:
        ValueError: as ``ModelFamily.place``.
    """
    box = None if crop is None or isinstance(crop, str) else crop
    return work.family.place(source, box, size)


@dataclass(frozen=True)
class Found:
    """What a look found: the part of the picture that was looked at, its latents (1, C, h, w), and the object in it,
    (h, w) of 0 and 1."""

    placed: PlacedPicture
    latents: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class Search:
    """For ``subject``, a word of ``prompt``, in a picture.

    Attributes:
        threshold: of its map, see ``object_masks.threshold_map``.
        size: that the caller wishes to work at.
    """

    prompt: TokenizedPrompt
    subject: str
    threshold: float = MASK_THRESHOLD
    size: Size = (None, None)

    def look(self, work: Work, placed: PlacedPicture) -> Found:
        """Raises:
        ValueError: the word looks nowhere.
        """
        latents = work.family.encode_picture(placed.canvas)
        return Found(placed, latents, object_mask(work, latents, self.prompt, self.subject, self.threshold))

    def closer(self, work: Work, placed: PlacedPicture) -> tuple[PlacedPicture, Found | None]:
        """``placed`` or a close-up within it, and what was found there; None where nobody has looked there yet. The
        model isn't asked where a close-up would show nothing more.

        Raises:
            ValueError: the word looks nowhere.
        """
        found, is_sought = None, shows_more(placed)
        for _ in range(MOST_CLOSER):
            if not shows_more(placed):
                break
            found = self.look(work, placed)
            box = nearer_box(placed, picture_mask(found.mask, placed.placement))
            if box is None:
                break
            placed, found = work.family.place(placed.source, box, self.size), None
        if is_sought:
            self._warn_where_words_explain_nothing(work, placed)
        return placed, found

    def _warn_where_words_explain_nothing(self, work: Work, placed: PlacedPicture) -> None:
        """Attention points somewhere, whatever the picture; where the subject is, its words also help to tell the
        picture from noise."""
        judge = DenoisingJudge(work.family, work.family.encode_picture(placed.canvas))
        errors = [judge.errors([self.prompt.text, ""], share, 0) for share in LEVELS]
        if sum(with_words - without for with_words, without in errors) >= 0:
            logger.warning(
                f"{self.subject!r} was looked for and may have been found in the wrong place: the prompt explains what "
                f"is at {placed.placement.box} no better than no words do. Look at it with pipe.preview_mask(...), and "
                "pass crop=(left, top, right, bottom) or mask= where it is elsewhere."
            )

    def find(self, work: Work, placed: PlacedPicture, *, closer: bool) -> Found:
        """The object in ``placed``, or with ``closer`` in the close-up that is worth it.

        Raises:
            ValueError: the word looks nowhere.
        """
        found = None
        if closer:
            placed, found = self.closer(work, placed)
        return self.look(work, placed) if found is None else found


def shows_more(placed: PlacedPicture) -> bool:
    """Whether a close-up could show what the canvas can't: the part that is worked on has so many more pixels than the
    canvas that even one that is worth it fills the canvas."""
    (across, down), (width, height) = placed.placement.box_size, placed.placement.canvas_size
    return CLOSE_UP_SHARE * across * down >= width * height


def nearer_box(placed: PlacedPicture, mask: Any) -> Box | None:
    """The close-up of a ``mask`` of the whole picture, where it is much less than what ``placed`` shows."""
    across, down = placed.placement.box_size
    width, height = placed.source.size
    share = CLOSE_UP_SHARE * across * down / (width * height)
    return close_up_box(mask, placed.source.size, share)


def close_up_at(work: Work, placed: PlacedPicture, mask: Any, size: Size) -> PlacedPicture:
    """``placed``, or a close-up of the ``mask`` (H, W) of the whole picture, where that is worth it."""
    if not shows_more(placed):
        return placed
    box = nearer_box(placed, mask)
    return placed if box is None else work.family.place(placed.source, box, size)


def picture_mask(mask: torch.Tensor, placement: Placement) -> Image.Image:
    """A mask (h, w) of the canvas, in [0, 1], as "L" of the whole picture: 0 or 255, the border smooth."""
    on_canvas = mask_to_picture(mask, placement.canvas_size)
    if placement.picture_size == placement.canvas_size and placement.content == placement.box:
        return on_canvas
    whole = Image.new("L", placement.picture_size)
    part = placement.from_canvas(on_canvas, resample=Image.Resampling.BILINEAR)
    whole.paste(part.point(lambda value: 255 if value > 127 else 0), placement.box[:2])
    return whole


def cells_of(mask: Any, placement: Placement, latent_size: Sequence[int]) -> torch.Tensor:
    """A mask (H, W) of the whole picture at the latents of its canvas: (h, w) of 0 and 1."""
    values = np.asarray(mask, np.float32)
    return mask_at(torch.from_numpy(placement.mask_to_canvas(values)), *latent_size)


def close_up(
    work: Work, placed: PlacedPicture, prompt: TokenizedPrompt, tokens: Sequence[str], size: Size
) -> PlacedPicture:
    """``placed``, or the close-up within it that an edit or an inversion under ``prompt`` works at.

    Of a picture that the loaded identities ``tokens`` were fitted to it is the part that they were fitted to. Else it
    is what holds their subjects, or without any the noun that the prompt is about.
    """
    identities = [work.overlay.identities[token].adapter for token in tokens]
    boxes = [box_of(one.settings, placed.source) for one in identities]
    if len(boxes) == 1 and boxes[0] is not None:
        fitted = identities[0].settings
        own = (fitted.get("height"), fitted.get("width")) if size == (None, None) else size
        return placed if boxes[0] == placed.placement.box else work.family.place(placed.source, boxes[0], own)
    if not shows_more(placed):
        return placed
    subjects = [one.subject for one in identities] or [subject_noun(prompt.text)]
    around = [
        _box_around(work, placed, prompt, subject, size) if box is None else box
        for subject, box in zip(subjects, boxes or [None], strict=True)
    ]
    left, top = (min(box[axis] for box in around) for axis in (0, 1))
    right, bottom = (max(box[axis] for box in around) for axis in (2, 3))
    return work.family.place(placed.source, (left, top, right, bottom), size)


def _box_around(work: Work, placed: PlacedPicture, prompt: TokenizedPrompt, subject: str | None, size: Size) -> Box:
    """All of ``placed`` where the subject can't be found."""
    try:
        found, _ = Search(prompt, subject or "", size=size).closer(work, placed)
    except ValueError:  # no such word, or it looks nowhere
        return placed.placement.box
    return found.placement.box


# ------------------------------------------------------------------------------ what the caller says


def check_crop(crop: Any, name: str = "crop") -> Any:
    """``crop``, where it may be one; a box is checked against its picture by ``picture_placement.place_picture``.

    Raises:
        ValueError: another word than "auto".
    """
    if isinstance(crop, str) and crop != "auto":
        raise ValueError(
            f"{name}={crop!r} is unknown; choose 'auto' (close up where the subject is small), None (all of the "
            "picture) or (left, top, right, bottom) in pixels."
        )
    return crop


# ------------------------------------------------------------------------------ what an identity knows of it

PLACED_MASK: Mapping[str, Any] = {"picture": None, "placed_mask": True}
"""An identity's settings where a caller said where in the picture it is."""


def seen_in(placed: PlacedPicture) -> dict[str, Any]:
    """What an identity's settings say of the picture and of the part of it that it was fitted to."""
    width, height = placed.source.size
    box = None if placed.is_whole else ",".join(map(str, placed.placement.box))
    return {"picture": placed.source.digest, "picture_width": width, "picture_height": height, "crop": box}


def box_of(settings: Mapping[str, Any], source: SourcePicture) -> Box | None:
    """The part of ``source`` that an identity with these settings was fitted to; None where that was another picture.

    Raises:
        ValueError: settings that no fit writes.
    """
    if settings.get("picture") is None or settings["picture"] != source.digest:
        return None
    crop = settings.get("crop")
    if crop is None:
        return 0, 0, *source.size
    left, top, right, bottom = map(int, str(crop).split(","))
    return left, top, right, bottom


def mask_in(placed: PlacedPicture, mask: torch.Tensor, settings: Mapping[str, Any]) -> torch.Tensor:
    """An identity's mask (h, w), in [0, 1], where ``placed`` shows what it is of: moved with the part of the picture
    that is worked on. In another picture than its own it is as it was fitted."""
    placement = placed.placement
    if settings.get("placed_mask"):
        if placed.is_whole and placement.content == (0, 0, *placement.canvas_size):
            return mask
        image = Image.fromarray(np.ascontiguousarray(mask.cpu().numpy(), np.float32))
        of_all = np.asarray(image.resize(placement.picture_size, Image.Resampling.BILINEAR))
        return torch.from_numpy(placement.mask_to_canvas(of_all))
    box, height, width = box_of(settings, placed.source), settings.get("height"), settings.get("width")
    if box is None or (box == placement.box and (width, height) == placement.canvas_size):
        return mask
    made = place_picture(placement.picture_size, 1, 1, box, height, width, extend=False)
    return torch.from_numpy(placement.mask_to_canvas(mask_values(picture_mask(mask, made))))
