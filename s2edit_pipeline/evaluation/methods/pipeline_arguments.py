"""Arguments of this pipeline that make it S2Edit, its ablations, or what came before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ...edit_settings import EDIT_PRESETS, EditSettings
from ...fit_settings import FitSettings
from ...noise_guidance import DEFAULT_GUIDANCE


@dataclass(frozen=True)
class PipelineArguments:
    """One way to fit, invert and edit.

    Attributes:
        fit: arguments of ``fit_identity``, or None for no identity.
        inversion: a method's name.
        edit: arguments of the call.
    """

    fit: Mapping[str, Any] | None = field(default_factory=dict)
    inversion: str = "direct"
    edit: Mapping[str, Any] = field(default_factory=dict)

    def with_changes(
        self, fit: Mapping[str, Any] | None = None, edit: Mapping[str, Any] | None = None
    ) -> PipelineArguments:
        """The same with other, or more, arguments.

        Raises:
            ValueError: arguments of a fit where there is none.
        """
        if fit and self.fit is None:
            raise ValueError(f"Nothing is fitted here, so a fit can't take {', '.join(fit)}; leave them out.")
        changed = None if self.fit is None else {**self.fit, **(fit or {})}
        return replace(self, fit=changed, edit={**self.edit, **(edit or {})})

    def resolved(self, guidance_scale: float = DEFAULT_GUIDANCE) -> dict[str, Any]:
        """All of it, the package's own defaults filled in; ``guidance_scale`` is the model's."""
        fit = None
        if self.fit is not None:
            arguments = {name: value for name, value in self.fit.items() if name != "preset"}
            fit = {**arguments, **asdict(FitSettings.of(self.fit))}
        edit = asdict(EditSettings.of({"guidance_scale": guidance_scale, **self.edit}, {}))
        return {"fit": fit, "inversion": self.inversion, "edit": {**self.edit, **edit}}


AS_THE_MODEL_GIVES_IT: Mapping[str, Any] = {"keep_pixels": False, "crop": None}
"""Arguments of a call whose pictures are to show the model's work, not the picture's own pixels around it: what the
benchmark and the studies measure unless their arguments say otherwise."""

PROMPT_TO_PROMPT: Mapping[str, Any] = {
    "cross_replace_steps": 0.8,
    "self_replace_steps": 0.5,
    "guidance_scale": DEFAULT_GUIDANCE,
    "guidance_stop": 1.0,
    "blend_words": False,
}
"""Prompt-to-prompt as published, wherever that is said: the first edit of a real picture in its authors' notebook of
null-text inversion (``null_text_w_ptp.ipynb`` of github.com/google/prompt-to-prompt) takes cross-attention over in 0.8
of the steps and self-attention in 0.5. It has nothing of what this package adds: it is guided to the end, and free to
change the whole picture."""

_WITHOUT_CONTROLS: Mapping[str, Any] = {"semantic_weight": 0.0, "spatial_control": False}
_PAPER_EDIT: Mapping[str, Any] = {n: v for n, v in EDIT_PRESETS["paper"].items() if n != "inversion"}

PAPER = PipelineArguments({"preset": "paper"}, EDIT_PRESETS["paper"]["inversion"], _PAPER_EDIT)
"""S2Edit as its paper has it. In what share of the steps it takes attention over isn't in what we know of it: the
package's own defaults are used."""

PIPELINE_METHODS: Mapping[str, PipelineArguments] = {
    "S2Edit": PipelineArguments(),
    "S2Edit, the paper's": PAPER,
    "null-text + P2P": PipelineArguments(None, "null_text", PROMPT_TO_PROMPT),
    "DDIM + P2P": PipelineArguments(None, "ddim", PROMPT_TO_PROMPT),
    "direct + P2P": PipelineArguments(None, "direct", PROMPT_TO_PROMPT),
    "null-text + P2P, confined": PipelineArguments(None, "null_text"),
    "DDIM + P2P, confined": PipelineArguments(None, "ddim"),
    "direct + P2P, confined": PipelineArguments(None, "direct"),
    "edit-friendly + P2P": PipelineArguments(None, "edit_friendly", {**PROMPT_TO_PROMPT, "strength": 0.64}),
    "DreamBooth": PipelineArguments({"preset": "paper", **_WITHOUT_CONTROLS}, "direct", PROMPT_TO_PROMPT),
    "textual inversion": PipelineArguments({"method": "token", **_WITHOUT_CONTROLS}, "direct", PROMPT_TO_PROMPT),
}
"""Name in the benchmark -> arguments."""

ABLATION: Mapping[str, PipelineArguments] = {
    "null-text": replace(PAPER, fit=None),
    "+ IFT": PAPER.with_changes(fit=_WITHOUT_CONTROLS),
    "+ SeC": PAPER.with_changes(fit={"spatial_control": False}),
    "+ SpC": PAPER,
}
"""The paper's: identity fine-tuning, then its semantic and its spatial control, one after the other. All four edit
alike."""
