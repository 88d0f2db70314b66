"""What every system in the benchmark looks like to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from PIL import Image

from ..prompt_alignment import split_words

Edit = Callable[[Sequence[str]], list[Image.Image]]
"""``edit(target_prompts)``: one edited picture for each prompt, of the source picture's size.

A system with a learned token may say, by ``edit.without_token(target_prompts)``, which of them it can't put it into.
"""


class EditMethod(Protocol):
    """A system that edits a picture by words.

    Prompts never hold a learned token: a system that has one puts it before the subject by itself. One that was trained
    on instructions says so by ``takes_instructions = True``, and is given "make her smile", where somebody wrote it,
    for the target prompt.
    """

    @property
    def name(self) -> str:
        """What tables call it."""

    def prepare(self, picture: Image.Image, source_prompt: str, subject: str, seed: int) -> Edit:
        """Whatever is done once a picture (fits, inversions), and the edits that share it.

        Args:
            picture: RGB.
            source_prompt: what it shows.
            subject: the noun in it that names who or what is to be kept.
            seed: of everything random; the same seed gives the same pictures.
        """


def holds(prompt: str, phrase: str) -> bool:
    """Whether the words of ``phrase`` are in ``prompt``, in a row."""
    return f" {' '.join(split_words(phrase))} " in f" {' '.join(split_words(prompt))} "


def at_size_of(picture: Image.Image, edited: Sequence[Image.Image]) -> list[Image.Image]:
    size = picture.size
    return [one if one.size == size else one.resize(size, Image.Resampling.LANCZOS) for one in edited]
