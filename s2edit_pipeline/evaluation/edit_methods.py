"""What every system in the benchmark looks like to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from PIL import Image

Edit = Callable[[Sequence[str]], list[Image.Image]]
"""``edit(target_prompts)``: one edited picture for each prompt, of the source picture's size."""


class EditMethod(Protocol):
    """A system that edits a picture by words.

    Prompts never hold a learned token: a system that has one puts it before the subject by itself.
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
