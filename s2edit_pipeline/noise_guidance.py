"""How strongly words pull: guidance, and the forms in which kinds of models have it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DEFAULT_GUIDANCE = 4.5
"""Where neither the caller nor the model says otherwise; S2Edit recommends 3.5 to 5.5."""
GUIDANCE_FORMS = ("branch", "told", "none")


@dataclass(frozen=True)
class Guidance:
    """What guidance is in one model.

    Attributes:
        form: "branch": an unconditional branch is asked beside the conditional one (Ho & Salimans 2021). "told": the
            denoiser is told the scale, which was distilled into it (Meng et al. 2023). "none": the model was distilled
            at one scale, and there is nothing to set.
        default: the scale where the caller says none.
        neutral: the scale at which the words pull as the model has learned them; an unconditional branch is asked above
            it alone, as diffusers does.
    """

    form: str = "branch"
    default: float = DEFAULT_GUIDANCE
    neutral: float = 1.0

    def __post_init__(self) -> None:
        assert self.form in GUIDANCE_FORMS

    def has_null(self, scale: float) -> bool:
        """Whether an unconditional branch is asked at ``scale``."""
        return self.form == "branch" and scale > self.neutral


PLAIN_GUIDANCE = Guidance()
"""Classifier-free guidance (Ho & Salimans 2021)."""


def guided(unconditional: torch.Tensor, conditional: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """Classifier-free guidance (Ho & Salimans 2021), in the form diffusers uses, (B, C, h, w)."""
    return unconditional + guidance_scale * (conditional - unconditional)


def rescaled(output: torch.Tensor, conditional: torch.Tensor, guidance_rescale: float) -> torch.Tensor:
    """The guided ``output`` with its deviation brought back to the ``conditional``'s by the share
    ``guidance_rescale`` (Lin et al. 2024, section 3.4): guidance stretches it, which burns colours."""
    if guidance_rescale == 0:
        return output
    axes = list(range(1, output.ndim))
    matched = output * (conditional.std(axes, keepdim=True) / output.std(axes, keepdim=True))
    return torch.lerp(output, matched, guidance_rescale)
