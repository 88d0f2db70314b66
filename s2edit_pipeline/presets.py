"""What one word, ``preset=``, stands for in ``fit_identity`` and in the call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Preset:
    """``fit``: arguments of ``fit_identity``; ``edit``: of the call."""

    fit: Mapping[str, Any] = field(default_factory=dict)
    edit: Mapping[str, Any] = field(default_factory=dict)


PRESETS: Mapping[str, Preset] = {
    "paper": Preset(
        fit={
            "method": "full",
            "num_steps": 400,
            "learning_rate": 5e-6,
            "batch_size": 1,
            "timestep_sampling": "uniform",
            "lr_scheduler": "constant",
            "early_stop": False,
        },
        edit={"inversion": "null_text", "guidance_stop": 1.0, "blend_words": False},
    ),
}
"""Name -> the reading. "paper" is S2Edit's own. How many steps it takes and at what rate isn't in what we know of it
(95 s a picture, on some GPU). These are DreamBooth's (Ruiz et al. 2023) as diffusers' example has them: the method that
stage one adds its two controls to."""


def with_preset(preset: str | None, stage: Literal["fit", "edit"], given: Mapping[str, Any]) -> dict[str, Any]:
    """``given``, and in place of its Nones what ``preset`` says; a None that it says nothing of is left out.

    A preset's steps, rates and batch are its method's: with another method they are that one's own.

    Raises:
        ValueError: there is no such preset.
    """
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset={preset!r} is unknown; choose {' or '.join(map(repr, PRESETS))}, or None for ours.")
    said = {} if preset is None else dict(getattr(PRESETS[preset], stage))
    if given.get("method") not in (None, said.get("method")):
        own = ("num_steps", "learning_rate", "lr_scheduler", "batch_size")
        said = {name: value for name, value in said.items() if name not in own}
    return {**said, **{name: value for name, value in given.items() if value is not None}}
