"""What an edit returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput

from .picture_files import SourcePicture


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
        pictures: the edited pictures with all that is known of the source's file, to be saved with
            ``picture_saving.save_picture``: bit depth, profile, EXIF. None without an image, and of latents.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    attention_maps: dict[str, PIL.Image.Image] | None = None
    edit_masks: list[PIL.Image.Image | None] | None = None
    source: Any = None
    nsfw_content_detected: list[bool] | None = None
    interrupted: bool = False
    pictures: list[SourcePicture] | None = None
