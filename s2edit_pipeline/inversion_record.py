"""From a picture to the noise that leads back to it: what an inversion is given, what it returns, and which there are.

Each method is one function ``f(task) -> path`` and one entry of the registry; a new one is a file of its own that calls
:func:`register_inversion`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .attention_source import SourceAttention
from .edit_settings import check_choice
from .noise_schedule import NoiseSchedule
from .picture_files import SourcePicture
from .picture_placement import Placement


@dataclass(frozen=True)
class InversionTask:
    """What a method works on.

    Attributes:
        latents: (1, C, h, w), the picture's.
        schedule: the noise levels.
        denoise: ``denoise(x, level)``, the denoiser's output under the source prompt; x (B, C, h, w).
        denoise_null: ``denoise_null(x, level, embeds)``, the same under the unconditional ``embeds`` (1, L, D).
        source_embeds: (1, L, D), the source prompt's.
        null_embeds: (1, L, D), the negative or empty prompt's.
        guidance_scale: that the edit will be guided with.
        generator: of the methods that draw noise.
        on_step: called with (step, latents) after each; it may raise, to stop.
    """

    latents: torch.Tensor
    schedule: NoiseSchedule
    denoise: Callable[[torch.Tensor, int], torch.Tensor]
    denoise_null: Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]
    source_embeds: torch.Tensor
    null_embeds: torch.Tensor
    guidance_scale: float = 1.0
    generator: torch.Generator | None = None
    on_step: Callable[[int, torch.Tensor], None] = lambda step, latents: None


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
    """

    run: Callable[[InversionTask], InversionPath]
    pinned: bool = False
    needs_gradients: bool = False
    binds_guidance: bool = False
    null_is_source: bool = False
    num_passes: int = 1
    draws_noise: bool = False


INVERSIONS: dict[str, InversionMethod] = {}
"""Name -> method."""
DEFAULT_INVERSION = "direct"


def register_inversion(name: str, method: InversionMethod) -> None:
    """Make ``method`` known as ``name``."""
    INVERSIONS[name] = method


def inversion_method(name: Any) -> InversionMethod:
    """Raises:
    ValueError: there is no such inversion.
    """
    check_choice("inversion method", name, tuple(INVERSIONS))
    return INVERSIONS[name]


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
        residuals: (N, C, h, w), for noise level k at k - 1: what has to be added to the random step's mean there to
            arrive at the next latents ("edit_friendly"); or None: the steps are deterministic.
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


def guided(
    unconditional: torch.Tensor, conditional: torch.Tensor, guidance_scale: float, guidance_rescale: float = 0.0
) -> torch.Tensor:
    """Classifier-free guidance (Ho & Salimans 2021), in the form diffusers uses, (B, C, h, w).

    ``guidance_rescale`` brings the result's deviation that far back to the conditional's (Lin et al. 2024,
    section 3.4): guidance stretches it, which burns colours.
    """
    output = unconditional + guidance_scale * (conditional - unconditional)
    if guidance_rescale == 0:
        return output
    axes = list(range(1, output.ndim))
    matched = output * (conditional.std(axes, keepdim=True) / output.std(axes, keepdim=True))
    return torch.lerp(output, matched, guidance_rescale)
