"""What a caller may ask of an edit: each setting, and the check of it, once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from .argument_checks import check_choice, check_guidance, check_share, check_words, is_number
from .noise_guidance import DEFAULT_GUIDANCE
from .noise_schedule import NoiseSchedule
from .prompt_embeds import ShownPicture

CROSS_REPLACE_STEPS = 0.4
"""The share of the steps in which words keep the source's maps, where nothing else is said."""


@dataclass(frozen=True)
class EditSettings:
    """How to edit: what ``S2EditPipeline.__call__`` takes by these names.

    Attributes:
        guidance_scale: how strongly the target's words pull; 3.5 to 5.5 are S2Edit's, a call without one takes the
            model's own. At 1 and below, as everywhere in diffusers, nothing is guided.
        guidance_rescale: from 0 to 1, against colours burnt by guidance (Lin et al. 2024).
        guidance_stop: share of the steps after which the edit goes on unguided (Kynkäänniemi et al. 2024), half of
            them by default; 1 is prompt-to-prompt's own, guided to the end.
        strength: share of the noise levels that the edit goes through; lower stays nearer to the picture
            ("edit_friendly" was published with 0.64). The other shares count from the full noise all the same: at
            0.5 an edit with the defaults is neither guided nor given the source's attention.
        edit: "auto", "replace" or "refine", see ``prompt_alignment.align_prompts``.
        cross_replace_steps: share of the steps in which words common to both prompts keep the source's
            cross-attention; or ``{"word": share, "default_": share}``.
        self_replace_steps: share of the steps in which the self-attention at 1/16 of the picture's side and
            below is the source's.
        reweight: word of the target -> factor on its attention.
        blend_words: None confines the edit to where the changed words look, a list to where these words look
            (in source or target), False lets it change the whole picture.
        keep_words: words (of source or target) whose place is taken out of the words' region.
        blend_threshold: of the words' maps, in (0, 1); lower lets the edit reach farther.
        confine_from: share of the steps after which the source is kept outside the region.
        change_threshold: after ``settle_from``, cells of the words' region that changed by less than this share of the
            most changed one are the source's again: that is drift, not edit. 0 lets it be.
        settle_from: share of the steps.
        residuals: where the inversion has found what the source's own steps miss of its latents, add it to the
            targets' steps: in a flow unguided and unchanged words come back exactly. With "edit_friendly" and
            "flowedit" that is the method itself.

    Raises:
        ValueError: a number out of its range, or options that don't go together.
    """

    guidance_scale: float = DEFAULT_GUIDANCE
    guidance_rescale: float = 0.0
    guidance_stop: float = 0.5
    strength: float = 1.0
    edit: str = "auto"
    cross_replace_steps: float | Mapping[str, float] = CROSS_REPLACE_STEPS
    self_replace_steps: float = 0.4
    reweight: Mapping[str, float] | None = None
    blend_words: Sequence[str] | str | bool | None = None
    keep_words: Sequence[str] | str | None = None
    blend_threshold: float = 0.4
    confine_from: float = 0.2
    change_threshold: float = 0.2
    settle_from: float = 0.8
    residuals: bool = True

    def __post_init__(self) -> None:
        check_guidance(self.guidance_scale)
        for name in ("guidance_rescale", "guidance_stop", "self_replace_steps", "confine_from", "settle_from"):
            check_share(name, getattr(self, name))
        check_share("change_threshold", self.change_threshold)
        check_share("blend_threshold", self.blend_threshold, open_ended=True)
        check_choice("edit", self.edit, ("auto", "replace", "refine"))
        for name in ("blend_words", "keep_words"):
            check_words(name, getattr(self, name))
        if not is_number(self.strength) or not 0 < self.strength <= 1:
            raise ValueError(f"strength must be above 0 and at most 1, not {self.strength!r}.")
        if self.blend_words is False:
            self.check_region("with blend_words=False, which has none")

    def check_region(self, why: str) -> None:
        """For an edit that looks for no region of its own.

        Raises:
            ValueError: a threshold of that region is changed all the same.
        """
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name in ("blend_threshold", "change_threshold") and value != one.default:
                raise ValueError(f"{one.name}={value!r} is of the words' region and has no effect {why}; leave it out.")

    @classmethod
    def of(
        cls, arguments: Mapping[str, Any], preset: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
    ) -> EditSettings:
        """From a call's arguments, those of ``preset`` in place of what wasn't said, and then a model's own
        ``defaults``."""
        said = {name: value for name, value in {**arguments, **preset}.items() if value is not None}
        chosen = {**(defaults or {}), **said}
        names = [one.name for one in fields(cls) if chosen.get(one.name) is not None]
        return cls(**{name: chosen[name] for name in names})

    def num_steps(self, schedule: NoiseSchedule) -> int:
        """The steps that an edit of this strength makes."""
        return max(1, round(self.strength * schedule.num_steps))


EDIT_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {
        "inversion": "null_text",
        "guidance_scale": DEFAULT_GUIDANCE,
        "guidance_stop": 1.0,
        "blend_words": False,
    },
}
"""What ``preset=`` stands for in a call: "paper" is S2Edit's own reading of the edit."""


@dataclass(frozen=True, kw_only=True)
class EditRequest:
    """One call's edit of a picture, its arguments as they came.

    Attributes:
        prompts: the target prompts.
        image: the picture, or None where ``inversion`` is one that was made before.
        source_prompt: what it shows, or None for the identity's own words.
        identity_token: the identity that was asked for by name, or None.
        inversion: an ``Inversion``, or a method's name.
        settings: how to edit.
        num_inference_steps: or None for the inversion's own, or 50.
        negative_prompt: or None.
        edit_mask: where the picture may change, or None.
        keep_pixels: outside of it, the picture's own pixels.
        size: (height, width) to work at; None is the model's own.
        clip_skip: layers of the text encoder to leave out.
        generator: of the random inversions' noise.
        keep_attention: how much of the source's attention is kept, or None.
        output_type: "pil", "np", "pt" or "latent".
        return_attention_maps: whether to say where words looked.
        output_size: "picture" or "model".
        crop: "auto", None or (left, top, right, bottom).
        shown: what IP-Adapters are shown, or None.
        method: of the edit, a name in ``edit_loop.EDITS``.
        complete_prompt: whether the picture's description completes the prompts; None: where there is no source prompt.
    """

    prompts: Sequence[str]
    image: Any
    source_prompt: str | None
    identity_token: str | None
    inversion: Any
    settings: EditSettings = field(default_factory=EditSettings)
    num_inference_steps: int | None = None
    negative_prompt: Any = None
    edit_mask: Any = None
    keep_pixels: bool = True
    size: tuple[int | None, int | None] = (None, None)
    clip_skip: int | None = None
    generator: Any = None
    keep_attention: Any = None
    output_type: str = "pil"
    return_attention_maps: bool = False
    output_size: str = "picture"
    crop: Any = "auto"
    shown: ShownPicture | None = None
    method: str = "prompt_to_prompt"
    complete_prompt: bool | None = None
