"""What an edit returns."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import PIL.Image
from diffusers.utils import BaseOutput

from .picture_files import SourcePicture
from .picture_marks import origin_of, with_origin
from .picture_saving import save_picture
from .picture_sheet import Captioned, difference_picture, picture_sheet


@dataclass
class S2EditPipelineOutput(BaseOutput):
    """Edited pictures.

    Attributes:
        images: one for each prompt (and each of ``num_images_per_prompt``): a list of PIL pictures, an array
            (n, H, W, 3) in [0, 1], or a tensor, after ``output_type``. An edit's are as large as the picture and of its
            mode (a picture with 16 bits a colour has its upper 8 here), with ``output_size="model"`` RGB and as large
            as it was worked at.
        attention_maps: word -> PIL "L" picture of where it looked in the first target, when asked for.
        edit_masks: for each picture, a PIL "L" picture of its size: 0 where it was not allowed to change; None where
            it was everywhere.
        source: what the source branch ends at, decoded, in the same form as ``images``: what the inversion
            itself returns of the part of the picture that was worked on. None without an image.
        nsfw_content_detected: for each picture, where the pipeline has a safety checker.
        interrupted: whether the call was stopped before its end; the pictures are then what there was.
        pictures: the pictures with all that is known of the source's file (bit depth, profile, EXIF), and with the
            mark of how they were made; :meth:`save` writes them. Of ``output_type="pil"`` alone.
        before: the picture that was edited, in the same form.
    """

    images: list[PIL.Image.Image] | Any  # or an array or a tensor, as the caller's output_type says
    attention_maps: dict[str, PIL.Image.Image] | None = None
    edit_masks: list[PIL.Image.Image | None] | None = None
    source: Any = None
    nsfw_content_detected: list[bool] | None = None
    interrupted: bool = False
    pictures: list[SourcePicture] | None = None
    before: SourcePicture | None = None

    def save(
        self,
        paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        prompt_in_metadata: bool = True,
        quality: int | None = None,
    ) -> list[Path]:
        """Write the pictures, each in the format that its path's suffix names, with what the source's file said of it
        and the mark of how they were made (``picture_marks``).

        Args:
            paths: one for each picture; a single one for a single picture.
            prompt_in_metadata: False leaves the prompt out of the mark.
            quality: 1 to 100, of lossy formats; None: a JPEG's own tables where the source was one, else 95.

        Returns:
            The paths written.

        Raises:
            ValueError: another number of paths; latents, which are no pictures; a suffix that is no picture's.
        """
        files = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
        pictures = self._shown("save")
        if len(files) != len(pictures):
            raise ValueError(f"There are {len(pictures)} pictures and {len(files)} paths; give one for each.")
        if not prompt_in_metadata:
            pictures = [with_origin(one, replace(origin_of(one.xmp), prompt=None)) for one in pictures]
        return [save_picture(picture, file, quality) for picture, file in zip(pictures, files, strict=True)]

    def visualize(self, side: int = 256) -> PIL.Image.Image:
        """One picture of all: a row for each edit with before, after, where it could change and what changed (gray is
        nothing, four times as strong), and a row of where the words looked, if that was asked for.

        Args:
            side: of each picture in it, in pixels.

        Raises:
            ValueError: latents, which are no pictures.
        """
        masks = self.edit_masks or []
        rows: list[list[Captioned]] = []
        for i, picture in enumerate(self._shown("visualize")):
            row: list[Captioned] = [(origin_of(picture.xmp).prompt or "after", picture.rgb)]
            if self.before is not None:
                difference = difference_picture(self.before.rgb, picture.rgb)
                mask = masks[i] if i < len(masks) else None
                row = [("before", self.before.rgb), *row, ("may change", mask), ("difference x 4", difference)]
            rows.append(row)
        looks: list[Captioned] = [
            (f"where {word!r} looked", look) for word, look in (self.attention_maps or {}).items()
        ]
        width = max(map(len, rows), default=1)
        rows += [looks[i : i + width] for i in range(0, len(looks), width)]
        return picture_sheet(rows, side)

    def _shown(self, what: str) -> list[SourcePicture]:
        if self.pictures is None:
            raise ValueError(f"{what}() needs pictures, and these are {type(self.images).__name__}: output_type='pil'.")
        return list(self.pictures)
