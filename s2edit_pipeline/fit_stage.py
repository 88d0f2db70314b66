"""Stage one of S2Edit: from a picture and its words to an :class:`IdentityAdapter`."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.utils import logging

from .describe_stage import own_vocabulary
from .fit_checkpoint import FitCheckpoint
from .fit_loop import FitProgress, FitResult, fit_weights
from .fit_objective import FitExample
from .fit_settings import FitRequest, FitSettings, ReferenceAttribute
from .fit_words import ResponseWords, ToldOtherwise, sayings_of
from .identity_adapter import IdentityAdapter, LearnedAttribute
from .identity_fingerprint import fingerprint
from .identity_prompts import check_prompt
from .object_search import Search, Size, cells_of, check_crop, close_up_at, picture_mask, place, seen_in
from .picture_compose import mask_warning
from .picture_files import read_picture
from .picture_inputs import load_mask
from .picture_placement import PlacedPicture
from .pipeline_turns import Interrupted
from .pipeline_work import Work
from .prompt_columns import TokenizedPrompt
from .prompt_tokens import initial_row, with_tokens
from .prompt_words import insert_token, split_words

logger = logging.get_logger(__name__)

NOISE_SQUARE = 1.0
"""The mean square of noise: what a model that predicts 0 in its place loses."""

OnFitStep = Callable[[int, int, Mapping[str, float]], None]
"""``on_step(step, num_steps, measures)``, the caller's own."""


@dataclass(frozen=True)
class FitInput:
    """A picture that is to be fitted, checked: prompts without and with the token, the (height, width) that the caller
    wishes to work at, his own mask (H, W) or None, and whether a close-up within ``placed`` may be worked at."""

    placed: PlacedPicture
    subject: str
    token: str
    prompt: TokenizedPrompt
    prompt_with_token: TokenizedPrompt
    size: Size
    mask: torch.Tensor | None
    closer: bool

    def search(self, settings: FitSettings) -> Search:
        return Search(self.prompt, self.subject, settings.mask_threshold, self.size)


def preview_mask(work: Work, request: FitRequest) -> PIL.Image.Image:
    """The automatic mask of a fit's picture, as a PIL "L" picture of its size.

    Raises:
        TypeError, ValueError: as :func:`fit_picture`.
    """
    work.family.check()
    (picture,) = request.pictures
    one = fit_input(work, picture, "", None, request.size)
    found = one.search(request.settings).find(work, one.placed, closer=one.closer)
    return picture_mask(found.mask, found.placed.placement)


def fit_input(
    work: Work,
    picture: ReferenceAttribute,
    name: str,
    tokenizers: Mapping[str, Any] | None,
    size: Size,
) -> FitInput:
    """One picture to fit, checked.

    Args:
        name: goes before the arguments' names in messages.
        tokenizers: those that know the token; None where it isn't needed.

    Raises:
        TypeError, ValueError: it can't be used.
    """
    family, prompt, subject, token = work.family, picture.prompt, picture.subject, picture.token
    check_prompt(prompt, f"{name}prompt")
    check_prompt(subject, f"{name}subject")
    source = read_picture(picture.image, f"{name}image")
    if token in split_words(prompt, [token]):
        raise ValueError(f"{name}prompt={prompt!r} holds the token {token!r} already; describe the picture without it.")
    with_token = insert_token(prompt, subject, token)
    mask = None if picture.mask is None else load_mask(picture.mask, source.size, f"{name}mask")
    placed = place(work, source, check_crop(picture.crop, f"{name}crop"), size)
    closer = isinstance(picture.crop, str)
    if closer and mask is not None:
        placed, closer = close_up_at(work, placed, mask, size), False
    return FitInput(
        placed,
        subject,
        token,
        family.tokenize(prompt),
        family.tokenize(prompt if tokenizers is None else with_token, tokenizers),
        size,
        mask,
        closer,
    )


def fit_picture(work: Work, request: FitRequest, on_step: OnFitStep) -> IdentityAdapter:
    """Fit as ``request`` says; the model is left as it was found.

    Raises:
        TypeError, ValueError: an input that can't be used; nothing has been done then.
        FloatingPointError: the loss ran away.
    """
    family, settings = work.family, request.settings
    family.check()
    if settings.spatial_control and settings.renormalize is None:
        settings = replace(settings, renormalize=family.renormalizes)
        request = replace(request, settings=settings)
    tokenizers = {
        name: with_tokens(tokenizer, [picture.token for picture in request.pictures])
        for name, tokenizer in family.tokenizers.items()
    }
    inputs = [
        fit_input(work, picture, "" if i == 0 else "reference.", tokenizers, request.size if i == 0 else (None, None))
        for i, picture in enumerate(request.pictures)
    ]
    words = [_response_words(work, one, settings, tokenizers) for one in inputs]
    started = time.perf_counter()
    examples, placed = zip(*(_example(work, one, settings) for one in inputs), strict=True)
    examples = tuple(replace(example, words=each) for example, each in zip(examples, words, strict=True))
    rows = [
        {n: initial_row(family.tokenizers[n], encoder, one.subject) for n, encoder in family.text_encoders.items()}
        for one in inputs
    ]
    with work.progress_bar(total=settings.num_steps) as bar:
        report = _reporter(work, bar, settings, on_step)
        checkpoint = _checkpoint(work, request, examples)
        result = fit_weights(family, list(examples), rows, settings, request.generator, report, checkpoint)
    masks = [None if example.mask is None else example.mask.cpu() for example in examples]
    return _adapter(work, request, placed[0], masks, result, time.perf_counter() - started)


def _response_words(
    work: Work, one: FitInput, settings: FitSettings, tokenizers: Mapping[str, Any]
) -> ResponseWords | None:
    """The words whose effect is kept, or None where none is.

    Raises:
        ValueError: none of the caller's can be drawn.
    """
    if settings.response_loss_weight == 0:
        return None
    family, prompt = work.family, one.prompt.text

    def tokenize(text: str) -> ToldOtherwise:
        return ToldOtherwise(
            family.tokenize(text), family.tokenize(insert_token(text, one.subject, one.token), tokenizers)
        )

    sayings = sayings_of(prompt, one.subject, settings.response_words, own_vocabulary(family.pipe))
    words = ResponseWords.of(sayings, tokenize)
    if words.sayings:
        return words
    if settings.response_words is not None:
        raise ValueError(f"prompt={prompt!r} is too long to say more: shorten it, or leave response_words= out.")
    logger.warning(f"prompt={prompt!r} is too long to say more: this fit keeps no word's effect. Shorten it.")
    return None


def _example(work: Work, one: FitInput, settings: FitSettings) -> tuple[FitExample, PlacedPicture]:
    """What is learnt from, and where in the picture it is."""
    placed, latents, mask = one.placed, None, None
    if settings.spatial_control and one.mask is None:
        found = one.search(settings).find(work, placed, closer=one.closer)
        placed, latents, mask = found.placed, found.latents, found.mask
    elif one.closer:
        placed, _ = one.search(settings).closer(work, placed)
    if latents is None:
        latents = work.family.encode_picture(placed.canvas)
    if one.mask is not None:
        mask = cells_of(one.mask, placed.placement, latents.shape[-2:])
    if mask is not None:
        warn_of_mask(mask, f"The mask of {one.subject!r}")
    return FitExample(latents, one.prompt, one.prompt_with_token, one.token, mask), placed


def warn_of_mask(mask: torch.Tensor, name: str) -> None:
    """Say where a mask (h, w) of what is worked on is seldom what was meant."""
    warning = mask_warning(mask, name)
    if warning is not None:
        logger.warning(warning)


def _checkpoint(work: Work, request: FitRequest, examples: Sequence[FitExample]) -> FitCheckpoint | None:
    """Of the folder that ``request`` names, for this fit alone."""
    if request.checkpoint_folder is None:
        return None
    key = hashlib.sha256()
    for example in examples:
        for tensor in (example.latents, example.mask):
            key.update(b"none" if tensor is None else tensor.detach().float().cpu().numpy().tobytes())
        key.update(repr((example.prompt.text, example.prompt_with_token.text)).encode())
        key.update(repr(None if example.words is None else example.words.sayings).encode())
    generator = request.generator
    key.update(b"own" if generator is None else generator.get_state().numpy().tobytes())
    components = work.family.tuned_components
    facts = (asdict(request.settings), {name: fingerprint(module) for name, module in components.items()})
    key.update(repr(facts).encode())
    return FitCheckpoint(request.checkpoint_folder, key.hexdigest())


def _reporter(work: Work, bar: Any, settings: FitSettings, on_step: OnFitStep) -> Callable[[FitProgress], bool]:
    assert settings.num_steps is not None
    num_steps = settings.num_steps
    # a flow's target is n - x_0, and the latents are scaled to a mean square of about 1 too
    of_nothing = 2 * NOISE_SQUARE if work.family.training_schedule().prediction == "flow" else NOISE_SQUARE

    def report(progress: FitProgress) -> bool:
        bar.set_postfix(loss=f"{progress.reconstruction_loss:.4f}", cos=f"{progress.cosine:+.3f}", refresh=False)
        bar.update()
        if progress.step == 0 and progress.reconstruction_loss > of_nothing:
            logger.warning(
                "This model doesn't know such pictures: its loss at the first step is "
                f"{progress.reconstruction_loss:.2f}, and one that predicts nothing at all has about {of_nothing:g}. "
                "What is fitted will be of no use. Load a model for it: "
                "S2EditPipeline.from_pretrained('stable-diffusion-v1-5/stable-diffusion-v1-5')."
            )
        measures = {
            "reconstruction_loss": progress.reconstruction_loss,
            "semantic_loss": progress.semantic_loss,
            "cosine": progress.cosine,
        }
        if settings.response_loss_weight:
            measures["response_loss"] = progress.response_loss
        if len(progress.cosines) > 1:
            measures["reference_cosine"] = progress.cosines[1]
        on_step(progress.step, num_steps, measures)
        try:
            work.call.check()
        except Interrupted:
            return False
        return True

    return report


def _adapter(
    work: Work,
    request: FitRequest,
    placed: PlacedPicture,
    masks: list[torch.Tensor | None],
    result: FitResult,
    seconds: float,
) -> IdentityAdapter:
    settings, first, last = request.settings, result.progress[0], result.progress[-1]
    tail = result.progress[-max(1, len(result.progress) // 5) :]
    measures = {
        "cosine_first": first.cosine,
        "cosine_last": last.cosine,
        "reconstruction_loss_first": first.reconstruction_loss,
        "reconstruction_loss_last": float(np.mean([p.reconstruction_loss for p in tail])),
        "seconds": round(seconds, 2),
    }
    if settings.response_loss_weight:
        measures["response_loss_last"] = float(np.mean([p.response_loss for p in tail]))
    attribute = None
    if len(request.pictures) > 1:
        reference = request.pictures[1]
        attribute = LearnedAttribute(reference.token, reference.subject, reference.prompt, result.rows[1], masks[1])
        measures |= {"reference_cosine_first": first.cosines[1], "reference_cosine_last": last.cosines[1]}
    facts = asdict(settings)
    del facts["method"], facts["gradient_checkpointing"]
    facts |= {
        "num_steps": len(result.progress),
        "response_words": None if settings.response_words is None else ", ".join(settings.response_words),
        "automatic_mask": request.pictures[0].mask is None,
        "height": placed.size[0],
        "width": placed.size[1],
        **seen_in(placed),
    }
    if work.call.interrupted:
        facts["interrupted"] = True
    picture, components = request.pictures[0], work.family.tuned_components
    return IdentityAdapter(
        token=picture.token,
        subject=picture.subject,
        source_prompt=picture.prompt,
        method=settings.method,
        rows=result.rows[0],
        weights=result.weights,
        lora_metadata=result.lora_metadata,
        mask=masks[0],
        base_model=work.base_model,
        base_fingerprint={name: fingerprint(module) for name, module in components.items()},
        settings=facts,
        measures=measures,
        reference=attribute,
    )
