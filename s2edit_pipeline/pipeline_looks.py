"""What the pipeline finds in a picture before anything is done to it: words, and where the subject is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import PIL.Image

from .describe_stage import DescribeRequest, Description, describe_picture, words_for_fit
from .fit_settings import FitRequest, FitSettings, ReferenceAttribute
from .fit_stage import preview_mask
from .object_masks import MASK_THRESHOLD


class Looks:
    """The part of ``S2EditPipeline`` that looks at pictures."""

    _at_work: Callable[..., Any]
    _check_bare: Callable[[str], None]

    def describe(
        self,
        image: Any,
        *,
        prompt: str | None = None,
        vocabulary: str | Sequence[str] | None = None,
        captioner: Any = None,
        crop: Any = None,
        height: int | None = None,
        width: int | None = None,
    ) -> Description:
        """Say what a picture shows.

        Over a vocabulary the model itself is the judge: of all captions, the one under which it predicts the picture's
        noise best, see ``describe_judge``. A captioner is any image-to-text model.

        Args:
            image: the picture, see ``picture_inputs.load_picture``.
            prompt: words that are known of it already; they stay, and what is missing is added.
            vocabulary: captions with choices, "a photo of a [sad|smiling] {lady|man} [|with glasses]", see
                ``describe_vocabulary``; None: the model's own, ``pipe.config["_vocabulary"]``.
            captioner: a function from picture to text, a pipeline of transformers, or the name of a folder or a Hub
                repository. Of a model without a vocabulary None is BLIP, which is then loaded.
            crop: (left, top, right, bottom) of the part that is described; None: all of it.
            height, width: look at it at another size than the model's own.

        Raises:
            TypeError, ValueError: an input that can't be used; a captioner that can't be loaded.
        """
        request = DescribeRequest(image, prompt, vocabulary, captioner, (height, width), crop)
        with self._at_work(None, None, lambda call: None) as (work, _):
            return describe_picture(work, request)

    def preview_mask(
        self,
        image: Any,
        prompt: str | None = None,
        subject: str | None = None,
        *,
        threshold: float = MASK_THRESHOLD,
        crop: Any = "auto",
        height: int | None = None,
        width: int | None = None,
    ) -> PIL.Image.Image:
        """The object mask that ``fit_identity`` would use: a PIL "L" picture of the size of ``image``.

        The noun's cross-attention under ``prompt`` (None: what :meth:`describe` says), averaged over noise levels and
        over the layers of 1/16 to 1/32 of the picture's side, normalised, smoothed, thresholded, largest component kept
        (S2Edit, ``M_obj``). With ``crop="auto"`` a subject that is small in the picture is found coarse, then fine.

        Raises:
            TypeError, ValueError: as ``fit_identity``.
        """
        settings, size = FitSettings(mask_threshold=threshold), (height, width)
        known = DescribeRequest(image, prompt, size=size, crop=crop)
        with self._at_work(None, None, lambda call: None) as (work, _):
            self._check_bare("The mask is a fit's, and a fit is to the bare model")
            prompt, subject = words_for_fit(work, known, subject, complete=False)
            picture = ReferenceAttribute(image, prompt, subject, "[I]", crop=crop)
            return preview_mask(work, FitRequest(pictures=(picture,), settings=settings, size=size))
