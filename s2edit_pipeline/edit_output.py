"""What an edit returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput


@dataclass
class S2EditPipelineOutput(BaseOutput):
    """Edited pictures.

    Attributes:
        images: one for each prompt (and each of ``num_images_per_prompt``): a list of PIL pictures, an array
            (n, H, W, 3) in [0, 1], or a tensor, after ``output_type``.
        attention_maps: word -> PIL "L" picture of where it looked in the first target, when asked for.
        edit_masks: for each picture, a PIL "L" picture of where it was allowed to change, or None where everywhere.
        source: what the source branch ends at, decoded, in the same form as ``images``: what the inversion
            itself returns of the picture. None without an image.
        nsfw_content_detected: for each picture, where the pipeline has a safety checker.
        interrupted: whether the call was stopped before its end; the pictures are then what there was.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    attention_maps: dict[str, PIL.Image.Image] | None = None
    edit_masks: list[PIL.Image.Image | None] | None = None
    source: Any = None
    nsfw_content_detected: list[bool] | None = None
    interrupted: bool = False
