"""What a picture shows, by an image-to-text model of transformers."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import PIL.Image
import torch

from .prompt_parts import DETERMINERS, PICTURES, parts_of, pieces_of

DEFAULT_CAPTIONER = "Salesforce/blip-image-captioning-base"
"""BLIP (Li et al. 2022): where a model brings no vocabulary of its own."""

MOST_TOKENS = 40


@lru_cache(maxsize=1)
def load_captioner(name: str, device: torch.device) -> Callable[[PIL.Image.Image], str]:
    """The captioner in the folder or Hub repository ``name``; the last one that was asked for is kept.

    Raises:
        ValueError: it can't be loaded.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    try:
        config = AutoConfig.from_pretrained(name)  # first: where it fails, nothing else is tried
        processor = AutoProcessor.from_pretrained(name)
        model = AutoModelForImageTextToText.from_pretrained(name, config=config).to(device).eval()
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(
            f"The captioner {name!r} can't be loaded ({str(error).splitlines()[0]}). Say yourself what the picture "
            "shows (prompt=, source_prompt=), or pass a captioner that is here: describe(image, captioner=folder, or "
            "a function from picture to text)."
        ) from error

    @torch.no_grad()
    def caption(picture: PIL.Image.Image) -> str:
        inputs = processor(images=picture, return_tensors="pt").to(device)
        tokens = model.generate(**inputs, max_new_tokens=MOST_TOKENS)
        return str(processor.batch_decode(tokens, skip_special_tokens=True)[0])

    return caption


def caption_of(picture: PIL.Image.Image, captioner: Any, device: torch.device) -> str:
    """A caption in the form of a prompt: "a photo of a lady with glasses".

    Args:
        captioner: a function from picture to text, a pipeline of transformers, or the name of a folder or a Hub
            repository.

    Raises:
        TypeError, ValueError: the captioner can't be used, or says nothing.
    """
    if isinstance(captioner, str):
        captioner = load_captioner(captioner, device)
    if not callable(captioner):
        raise TypeError(
            f"captioner must be a function from picture to text or a model's name, not {type(captioner).__name__}."
        )
    is_pipeline = getattr(captioner, "task", None) == "image-text-to-text"  # which wants a text to go on from
    said = captioner(picture, text="a photo of") if is_pipeline else captioner(picture)
    return as_prompt(_text_of(said))


def _text_of(said: Any) -> str:
    """The text in what a captioner returned: a string, or what pipelines of transformers return."""
    if isinstance(said, (list, tuple)) and said:
        return _text_of(said[-1])
    if isinstance(said, dict):
        return _text_of(said.get("generated_text", said.get("content")))
    if not isinstance(said, str) or not said.strip():
        raise ValueError(f"The captioner returned {said!r}; a caption such as 'a lady with glasses' was expected.")
    return said


def as_prompt(caption: str) -> str:
    """``caption`` as a prompt, which says that it is a photo."""
    text = " ".join(caption.split()).rstrip(".")
    first = parts_of(pieces_of(text))[0].body
    if first and first[-1].text in PICTURES:
        return text
    if first and first[0].text in DETERMINERS:
        text = text[0].lower() + text[1:]
    return f"a photo of {text}"
