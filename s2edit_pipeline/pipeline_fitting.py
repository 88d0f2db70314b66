"""The pipeline's first stage, as callers see it: a fit's arguments become a request."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .describe_stage import DescribeRequest, words_for_fit
from .fit_settings import FitRequest, FitSettings, ReferenceAttribute
from .fit_stage import fit_picture
from .identity_adapter import IdentityAdapter
from .object_masks import MASK_THRESHOLD
from .pipeline_arguments import check_fit, generator_of


class IdentityFitting:
    """The part of ``S2EditPipeline`` that fits."""

    _at_work: Callable[..., Any]
    _check_bare: Callable[[str], None]

    def fit_identity(
        self,
        image: Any,
        prompt: str | None = None,
        subject: str | None = None,
        token: str = "[I]",
        method: str | None = None,
        mask: Any = None,
        num_steps: int | None = None,
        learning_rate: float | None = None,
        semantic_weight: float = 0.1,
        spatial_control: bool = True,
        reference: Any = None,
        generator: torch.Generator | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        *,
        checkpoint_folder: str | os.PathLike[str] | None = None,
        preset: str | None = None,
        batch_size: int | None = None,
        timestep_sampling: str | None = None,
        lr_scheduler: str | None = None,
        early_stop: bool | None = None,
        optimizer: str = "adamw",
        gradient_checkpointing: bool = False,
        lora_rank: int = FitSettings.lora_rank,
        lora_layers: str = FitSettings.lora_layers,
        lora_init: str = FitSettings.lora_init,
        detach_sentence: bool = False,
        renormalize: bool | None = None,
        mask_after: bool = False,
        mask_threshold: float = MASK_THRESHOLD,
        crop: Any = "auto",
        height: int | None = None,
        width: int | None = None,
        token_learning_rate: float | None = None,
        response_loss_weight: float = FitSettings.response_loss_weight,
        response_words: Sequence[str] | None = None,
        response_batch_size: int | None = None,
        complete_prompt: bool = False,
        stop: Any = None,
        seed: int | None = None,
    ) -> IdentityAdapter:
        """Fit ``token`` to the subject of one picture (S2Edit, stage one). The pipeline is left as it was found.

        Args:
            image: the picture, see ``picture_inputs.load_picture``.
            prompt: P, what it shows: "a photo of a lady with glasses"; None: what :meth:`describe` says.
            subject, token: the noun in it, "lady" (None: what it speaks of), and the word in brackets that will stand
                before it.
            method: "lora" (None), "full" (the paper's) or "token".
            mask: the subject's mask, white inside, the picture's shape; None finds it by itself.
            num_steps, learning_rate, token_learning_rate: None takes the method's own.
            semantic_weight: lambda; 0 leaves the semantic loss out.
            spatial_control: mask the token's cross-attention.
            reference: a ``ReferenceAttribute``: a second picture, whose attribute gets a token of its own. Both are
                tuned jointly, each with its own semantic and spatial control (S2Edit, composition); the edit's
                prompt then holds both, "a [I] lady with [A] makeup".
            generator: makes the fit repeatable.
            callback_on_step_end: ``f(pipe, step, num_steps, measures)``, ``measures`` a dict with
                ``reconstruction_loss``, ``semantic_loss``, ``cosine`` (and ``response_loss``, ``reference_cosine``).
            checkpoint_folder: the fit is kept there every so often. Killed, the same call goes on from there and ends
                in the same bits. Finished, it is taken as it is.
            preset: "paper" is the paper's reading in one word, see ``fit_settings.FIT_PRESETS``; what is passed beside
                it wins.
            batch_size, timestep_sampling, lr_scheduler, early_stop, optimizer, gradient_checkpointing, lora_rank,
                lora_layers, lora_init, detach_sentence, renormalize, mask_after, mask_threshold, token_learning_rate,
                response_loss_weight, response_words, response_batch_size:
                see ``fit_settings.FitSettings``; None takes the method's own.
            crop: what part of the picture to work at. "auto": close up at the subject where it fills little of a large
                picture; None: all of it; (left, top, right, bottom): that. The identity's settings tell.
            height, width: work at another size than the model's own.
            complete_prompt: add to ``prompt`` what :meth:`describe` says beside it.
            stop: a ``threading.Event``; its ``set()``, from any thread, stops this call after the step. What there is
                comes back and says ``interrupted``.
            seed: in place of ``generator`` a new one that begins there.

        Returns:
            The identity.

        Raises:
            TypeError, ValueError, ImportError: an input that can't be used; nothing has been done then.
            FloatingPointError: the loss ran away; the message names the step.
        """
        settings = FitSettings.of(locals())
        known = DescribeRequest(image, prompt, size=(height, width), crop=crop)
        generator = generator_of(generator, seed)
        references = check_fit(self, settings.method, generator, reference)

        def on_step(step: int, total: int, measures: Mapping[str, float]) -> None:
            if callback_on_step_end is not None:
                callback_on_step_end(self, step, total, measures)

        with self._at_work(None, stop, lambda call: None, alone="fit_identity") as (work, _):
            self._check_bare("A new identity is fitted to the bare model")
            prompt, subject = words_for_fit(work, known, subject, complete=complete_prompt)
            request = FitRequest(
                pictures=(ReferenceAttribute(image, prompt, subject, token, mask, crop), *references),
                settings=settings, generator=generator, size=known.size, checkpoint_folder=checkpoint_folder,
            )  # fmt: skip
            return fit_picture(work, request, on_step)
