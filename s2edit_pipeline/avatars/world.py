"""The avatars world: people and creatures drawn from named options, where every edit has a true answer.

A subject is a frozen record; ``edited`` changes one thing and nothing else, so that rendering it gives the pixel-true
counterfactual of an edit. The parts are in :mod:`drawing`, :mod:`people` and :mod:`creatures`; here they are together.
"""

from __future__ import annotations

from .creatures import CREATURE_ATTRIBUTES, Creature, sample_creature
from .drawing import (
    CAPTION_PREFIX,
    IMAGE_SIZE,
    PARTS,
    Subject,
    changed_pixels,
    part_masks,
    render,
    render_array,
    shade,
)
from .people import PERSON_ATTRIBUTES, Person, sample_person

__all__ = [
    "CAPTION_PREFIX",
    "CREATURE_ATTRIBUTES",
    "IMAGE_SIZE",
    "KINDS",
    "PARTS",
    "PERSON_ATTRIBUTES",
    "Creature",
    "Person",
    "Subject",
    "changed_pixels",
    "part_masks",
    "render",
    "render_array",
    "sample",
    "sample_creature",
    "sample_person",
    "shade",
]

_SAMPLERS = {"person": sample_person, "creature": sample_creature}
KINDS = tuple(_SAMPLERS)
"""The kinds of subject."""


def sample(kind: str, seed: int, split: str = "train") -> Subject:
    """Subject number ``seed`` of one of :data:`drawing.SPLITS`, of one of :data:`KINDS`; the same everywhere.

    Raises:
        ValueError: an unknown kind or split.
    """
    if kind not in _SAMPLERS:
        raise ValueError(f"kind is one of {', '.join(KINDS)}, not {kind!r}.")
    return _SAMPLERS[kind](seed, split)
