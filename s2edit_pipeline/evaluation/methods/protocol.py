"""What every system looks like to the benchmark."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Protocol

import torch
from PIL import Image

from ...prompt_words import split_words

Edit = Callable[[Sequence[str]], list[Image.Image]]
"""``edit(target_prompts)``: one edited picture for each prompt, of the source picture's size.

A system with a learned token may say, by ``edit.without_token(target_prompts)``, which of them it can't put it into.
"""


class Method(Protocol):
    """A system that edits a picture by words.

    Prompts never hold a learned token: a system that has one puts it before the subject by itself. One that was trained
    on instructions says so by ``takes_instructions = True``, and is given "make her smile", where somebody wrote it,
    for the target prompt.
    """

    @property
    def name(self) -> str:
        """What tables call it."""

    def resolved(self) -> Mapping[str, Any]:
        """What decides its pictures beside the model, the inference steps and the seed, each default filled in, as JSON
        has it: two systems whose answers differ can't share records."""

    def prepare(self, picture: Image.Image, source_prompt: str, subject: str, seed: int) -> Edit:
        """Whatever is done once a picture (fits, inversions), and the edits that share it.

        Args:
            picture: RGB.
            source_prompt: what it shows.
            subject: the noun in it that names who or what is to stay the same.
            seed: of everything random; the same seed gives the same pictures.
        """


def plain_fields(method: Any) -> dict[str, Any]:
    """The fields of the dataclass ``method`` that are numbers and words, without its name and inference steps."""
    values = {field.name: getattr(method, field.name) for field in fields(method)}
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, (bool, int, float, str)) and name not in ("name", "num_inference_steps")
    }


def weights_digest(components: Mapping[str, Any]) -> str:
    """Of all the weights in a pipeline's ``components``."""
    digest = hashlib.sha256()
    for name, component in sorted(components.items()):
        if isinstance(component, torch.nn.Module):
            for key, tensor in component.state_dict().items():
                digest.update(f"{name}.{key}".encode())
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def contains_phrase(prompt: str, phrase: str) -> bool:
    """Whether the words of ``phrase`` are in ``prompt``, in a row."""
    return f" {' '.join(split_words(phrase))} " in f" {' '.join(split_words(prompt))} "
