"""From a picture to the noise that leads back to it: what an inversion is given, what it returns, and which there are.

Each method is one function ``f(task) -> path`` and one entry of the registry; a new one is a file of its own that calls
:func:`register_inversion`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .argument_checks import check_choice
from .attention_source import SourceAttention
from .inversion_files import read_inversion, write_inversion
from .noise_guidance import Guidance, guided
from .noise_schedule import NoiseSchedule
from .picture_files import SourcePicture
from .picture_placement import Placement

Combine = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


@dataclass(frozen=True)
class InversionTask:
    """What a method works on.

    Attributes:
        latents: (1, C, h, w), the picture's.
        schedule: the noise levels.
        denoise: ``denoise(x, level)``, the denoiser's output under the source prompt; x (B, C, h, w). In a flow the
            level may be half way between two.
        denoise_null: ``denoise_null(x, level, embeds)``, the same under the unconditional ``embeds`` (1, L, D).
        source_embeds: (1, L, D), the source prompt's.
        null_embeds: (1, L, D), the negative or empty prompt's.
        guidance_scale: that the edit will be guided with.
        generator: of the methods that draw noise.
        on_step: called with (step, latents) after each; it may raise, to stop.
        combine: ``combine(unconditional, conditional, scale)``, the model's own guidance.
    """

    latents: torch.Tensor
    schedule: NoiseSchedule
    denoise: Callable[[torch.Tensor, float], torch.Tensor]
    denoise_null: Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]
    source_embeds: torch.Tensor
    null_embeds: torch.Tensor
    guidance_scale: float = 1.0
    generator: torch.Generator | None = None
    on_step: Callable[[int, torch.Tensor], None] = lambda step, latents: None
    combine: Combine = guided


@dataclass(frozen=True)
class InversionPath:
    """What a method finds: the fields of the same names of :class:`Inversion`."""

    trajectory: torch.Tensor
    unconditional_embeds: torch.Tensor | None = None
    residuals: torch.Tensor | None = None


@dataclass(frozen=True)
class InversionMethod:
    """One way to invert.

    Attributes:
        run: from a task to a path.
        pinned: whether an edit's source branch is held to the stored trajectory.
        needs_gradients: whether the denoiser is differentiated; such a method has the model to itself.
        binds_guidance: whether what it finds serves one guidance scale alone.
        null_is_source: whether the unconditional branch is asked with the source's words, its tokens among them.
        num_passes: over the steps, for the progress bar.
        draws_noise: whether the generator is used.
        random_steps: whether its residuals are what the random step's mean misses (DDPM's), and not the deterministic
            step's (DDIM's, or Euler's).
        residuals: which it finds: "none", "flows" (in a flow) or "own" (they are the method itself).
        guides_source: whether the source may be guided, by a scale of its own.
        flows_only: whether it has a meaning for flows alone.
    """

    run: Callable[[InversionTask], InversionPath]
    pinned: bool = False
    needs_gradients: bool = False
    binds_guidance: bool = False
    null_is_source: bool = False
    num_passes: int = 1
    draws_noise: bool = False
    random_steps: bool = False
    residuals: str = "none"
    guides_source: bool = False
    flows_only: bool = False


INVERSIONS: dict[str, InversionMethod] = {}
"""Name -> method."""


def register_inversion(name: str, method: InversionMethod) -> None:
    """Make ``method`` known as ``name``."""
    INVERSIONS[name] = method


def is_finished(inversion: Any) -> bool:
    """Whether it is an ``Inversion``, of this copy of the package or another, and no method's name."""
    return hasattr(inversion, "trajectory")


def inversion_method(name: Any) -> InversionMethod:
    """Raises:
    ValueError: there is no such inversion.
    """
    check_choice("inversion method", name, tuple(INVERSIONS))
    return INVERSIONS[name]


def check_served(name: str, guidance: Guidance, prediction: str) -> None:
    """Raises:
    ValueError: the inversion has no meaning for models of this ``prediction`` that are guided so.
    """
    method = inversion_method(name)
    if method.flows_only and prediction != "flow":
        raise ValueError(
            f"The inversion {name!r} is for flow matching, and this model predicts {prediction!r}; use 'direct', or "
            "'edit_friendly'."
        )
    if guidance.form != "branch" and (method.binds_guidance or method.null_is_source):
        raise ValueError(
            f"The inversion {name!r} is about the unconditional branch of classifier-free guidance, and this model "
            "has none: its guidance is distilled into it. Use 'direct'."
        )


def check_residuals(is_wanted: bool, name: str, prediction: str) -> None:
    """Raises:
    ValueError: residuals are declined where there are none, or where they are the method itself.
    """
    kind = inversion_method(name).residuals
    if is_wanted or (kind == "flows" and prediction == "flow"):
        return
    why = "are the method itself" if kind == "own" else "aren't there"
    raise ValueError(f"residuals=False has no effect with the inversion {name!r}, whose residuals {why}; leave it out.")


def check_keeping(name: str, keep_attention: Any) -> None:
    """Raises:
    ValueError: an inversion of this kind keeps no attention.
    """
    if keep_attention is not None and not inversion_method(name).pinned:
        pinned = ", ".join(repr(other) for other, method in INVERSIONS.items() if method.pinned)
        raise ValueError(
            f"keep_attention has no effect with the inversion {name!r}, whose edits ask for the source anew at every "
            f"step; leave it out, or use one of {pinned}."
        )


@dataclass(frozen=True)
class MadeWith:
    """What an inversion's latents depend on besides the picture and the words; with another it isn't the same walk.

    Attributes:
        schedule: the noise levels' signature.
        family: the kind of model.
        weights: component -> the fingerprint of its base weights, or None where they can't be read.
        loras: the user's own LoRAs that were at work.
        identities: loaded identity's token -> which fit, how strong, held where.
    """

    schedule: str = ""
    family: str = ""
    weights: Mapping[str, Any] = field(default_factory=dict)
    loras: str = ""
    identities: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Inversion:
    """A picture on its way to noise.

    Attributes:
        method: its name in ``INVERSIONS``.
        prompt: the source prompt, with the identity's token where there is one.
        trajectory: (N + 1, C, h, w), the latents at each noise level, the picture itself first.
        unconditional_embeds: (N, L, D), for noise level k at k - 1; or None: the empty (or negative) prompt's.
        residuals: (N, C, h, w), for noise level k at k - 1: what has to be added to the source's step from there to
            arrive at the next latents; or None: nothing is added.
        guidance_scale: that the unconditional embeddings were made for, or None where any will do.
        made_with: the model, its adapters and its noise levels.
        picture_digest: a hash of the picture's pixels.
        source, placement: the picture, and the part of it that was inverted; None where they aren't known.
        clip_skip: how the prompts were encoded.
        attention: what the source attended to, for the edits to come; or None, and they ask for it again.
        interrupted: whether it was stopped before its end; then nothing can be edited with it.
    """

    method: str
    prompt: str
    trajectory: torch.Tensor
    unconditional_embeds: torch.Tensor | None = None
    residuals: torch.Tensor | None = None
    guidance_scale: float | None = None
    made_with: MadeWith = field(default_factory=MadeWith)
    picture_digest: str = ""
    source: SourcePicture | None = field(default=None, repr=False)
    placement: Placement | None = None
    clip_skip: int | None = None
    attention: SourceAttention | None = None
    interrupted: bool = False

    @property
    def num_inference_steps(self) -> int:
        return len(self.trajectory) - 1

    @property
    def pinned(self) -> bool:
        """Whether the source branch is held to the stored trajectory."""
        return INVERSIONS[self.method].pinned

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write it to a folder, safetensors and JSON. Left out are the picture itself, which an edit is handed again
        (``image=``, to paste the edit into it), and the kept attention, for which it asks again.

        Raises:
            ValueError: it was stopped before its end, or the folder holds other things.
        """
        write_inversion(save_directory, self)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Inversion:
        """What :meth:`save_pretrained` wrote. An edit checks it as one that was just made: model, scheduler,
        identities, LoRAs, picture and words have to be the same.

        Raises:
            ValueError: a file is missing, damaged, or none that an inversion has.
        """
        config, tensors = read_inversion(folder)
        check_choice("inversion method", config["method"], tuple(INVERSIONS))
        place, stored = config["placement"], dict[str, Any](tensors)
        return cls(
            method=config["method"],
            prompt=config["prompt"],
            guidance_scale=config["guidance_scale"],
            clip_skip=config["clip_skip"],
            picture_digest=config["picture_digest"],
            placement=None if place is None else Placement(**{name: tuple(value) for name, value in place.items()}),
            made_with=MadeWith(**config["made_with"]),
            **stored,
        )
