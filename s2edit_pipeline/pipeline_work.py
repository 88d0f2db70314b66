"""What a stage works with: the model, the identities laid over it, and the call that it is part of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .family_base import ModelFamily
from .identity_overlay import IdentityOverlay
from .pipeline_turns import Call

Report = Callable[[int, Any, Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]
"""``report(step, timestep, tensors)`` after each step: calls the caller's own callback and gives back the tensors that
it changed; raises ``Interrupted`` where the call was stopped."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """One call's workplace.

    Attributes:
        family: the model.
        overlay: the identities laid over it.
        call: the call, which may be stopped.
        progress_bar: ``progress_bar(total=...)``, a context as diffusers' pipelines have it.
        report: after each step.
        base_model: what the model calls itself.
    """

    family: ModelFamily
    overlay: IdentityOverlay
    call: Call
    progress_bar: Callable[..., Any]
    report: Report
    base_model: str = ""
