"""Systems that are settings of this pipeline: S2Edit, its ablations, and what came before it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from PIL import Image

from ...edit_sampling import EditSettings
from ...identity_adapter import IdentityAdapter
from ...identity_fitting import FitSettings
from ...latent_inversion import Inversion
from ...presets import PRESETS, with_preset
from ...prompt_alignment import insert_token
from .protocol import at_size_of, holds


@dataclass(frozen=True)
class Setting:
    """``fit``: arguments of ``fit_identity``, or None for no identity; ``inversion``: a method; ``edit``: arguments
    of the call."""

    fit: Mapping[str, Any] | None = field(default_factory=dict)
    inversion: str = "direct"
    edit: Mapping[str, Any] = field(default_factory=dict)

    def with_changes(self, fit: Mapping[str, Any] | None = None, edit: Mapping[str, Any] | None = None) -> Setting:
        """The same with other, or more, arguments.

        Raises:
            ValueError: arguments of a fit where there is none.
        """
        if fit and self.fit is None:
            raise ValueError(f"This setting fits no identity, so {', '.join(fit)} can't be set for its fit.")
        changed = None if self.fit is None else {**self.fit, **(fit or {})}
        return replace(self, fit=changed, edit={**self.edit, **(edit or {})})

    def resolved(self) -> dict[str, Any]:
        """All of it, the package's own defaults filled in."""
        fit = None
        if self.fit is not None:
            given = {name: value for name, value in self.fit.items() if name != "preset"}
            chosen = FitSettings(**with_preset(self.fit.get("preset"), "fit", given))
            fit = {**given, **asdict(chosen)}
        known = {f.name for f in fields(EditSettings)}
        chosen_edit = asdict(EditSettings(**{name: value for name, value in self.edit.items() if name in known}))
        return {"fit": fit, "inversion": self.inversion, "edit": {**self.edit, **chosen_edit}}

    def fit_identity(
        self, pipe: Any, picture: Image.Image, prompt: str, subject: str, seed: int
    ) -> IdentityAdapter | None:
        if self.fit is None:
            return None
        identity: IdentityAdapter = pipe.fit_identity(
            picture, prompt, subject, generator=torch.Generator().manual_seed(seed), **self.fit
        )
        return identity


_PUBLISHED: Mapping[str, Any] = {n: v for n, v in PRESETS["paper"].edit.items() if n != "inversion"}
"""Prompt-to-prompt without what this package adds: guided to the end, and free to change the whole picture."""

_UNCONTROLLED: Mapping[str, Any] = {"semantic_weight": 0.0, "spatial_control": False}

PAPER = Setting({"preset": "paper"}, PRESETS["paper"].edit["inversion"], _PUBLISHED)
"""S2Edit as the paper has it."""

SETTINGS: Mapping[str, Setting] = {
    "S2Edit": Setting(),
    "S2Edit, the paper's": PAPER,
    "null-text + P2P": Setting(None, "null_text", _PUBLISHED),
    "DDIM + P2P": Setting(None, "ddim", _PUBLISHED),
    "direct + P2P": Setting(None, "direct", _PUBLISHED),
    "null-text + P2P, confined": Setting(None, "null_text"),
    "DDIM + P2P, confined": Setting(None, "ddim"),
    "direct + P2P, confined": Setting(None, "direct"),
    "edit-friendly + P2P": Setting(None, "edit_friendly", {**_PUBLISHED, "strength": 0.64}),
    "DreamBooth": Setting({"preset": "paper", **_UNCONTROLLED}, "direct", _PUBLISHED),
    "textual inversion": Setting({"method": "token", **_UNCONTROLLED}, "direct", _PUBLISHED),
}
"""Name in the benchmark -> setting."""

ABLATION: Mapping[str, Setting] = {
    "null-text": SETTINGS["null-text + P2P"],
    "+ IFT": PAPER.with_changes(fit=_UNCONTROLLED),
    "+ SeC": PAPER.with_changes(fit={"spatial_control": False}),
    "+ SpC": PAPER,
}
"""The paper's: identity fine-tuning, then its semantic and its spatial control, one after the other."""


@dataclass(frozen=True)
class PreparedPicture:
    """A picture fitted and inverted: called with target prompts, it edits.

    The identity's token goes before the subject; a target that lacks the subject (a dog for a cat) goes without.
    """

    pipe: Any
    picture: Image.Image
    subject: str
    identity: IdentityAdapter | None
    inversion: Inversion
    edit_arguments: Mapping[str, Any]

    def __call__(self, targets: Sequence[str]) -> list[Image.Image]:
        return at_size_of(self.picture, self._edit(targets).images)

    def without_token(self, targets: Sequence[str]) -> list[str]:
        """Those that lack the subject, of a picture that has an identity."""
        return [] if self.identity is None else [target for target in targets if not holds(target, self.subject)]

    def attention_maps(self, target: str) -> dict[str, Image.Image]:
        """Word of ``target``, the token among them, -> where it looked, a PIL "L" picture."""
        maps: dict[str, Image.Image] = self._edit([target], return_attention_maps=True).attention_maps
        return maps

    def _edit(self, targets: Sequence[str], **more: Any) -> Any:
        if self.identity is not None:
            bare = self.without_token(targets)
            targets = [t if t in bare else insert_token(t, self.subject, self.identity.token) for t in targets]
        arguments = {**self.edit_arguments, **more}
        return self.pipe(list(targets), self.picture, None, self.identity, self.inversion, **arguments)


class FitsOfOnePicture:
    """The identities of the latest picture, by what they were fitted with."""

    def __init__(self) -> None:
        self._task: tuple[Any, ...] = ()
        self._identities: dict[str, IdentityAdapter | None] = {}

    def fit(
        self, setting: Setting, pipe: Any, picture: Image.Image, prompt: str, subject: str, seed: int
    ) -> IdentityAdapter | None:
        """As ``setting.fit_identity``, made anew only where nothing like it was made of this picture."""
        task = (picture.size, picture.tobytes(), prompt, subject, seed)
        if task != self._task:
            self._task, self._identities = task, {}
        made_with = json.dumps(setting.resolved()["fit"])
        if made_with not in self._identities:
            self._identities[made_with] = setting.fit_identity(pipe, picture, prompt, subject, seed)
        return self._identities[made_with]


@dataclass(frozen=True)
class PipelineMethod:
    """``setting`` of ``pipe`` as a system of the benchmark, see ``edit_methods.EditMethod``.

    Attributes:
        fits: shared with other settings whose fit is the same; None fits for itself.
    """

    name: str
    pipe: Any
    setting: Setting
    num_inference_steps: int = 50
    fits: FitsOfOnePicture | None = None

    def resolved(self) -> dict[str, Any]:
        return self.setting.resolved()

    def prepare(self, picture: Image.Image, source_prompt: str, subject: str, seed: int) -> PreparedPicture:
        task = (self.pipe, picture, source_prompt, subject, seed)
        identity = self.setting.fit_identity(*task) if self.fits is None else self.fits.fit(self.setting, *task)
        scale = {k: v for k, v in self.setting.edit.items() if k == "guidance_scale"}
        inversion = self.pipe.invert(
            picture,
            source_prompt,
            self.setting.inversion,
            self.num_inference_steps,
            identity=identity,
            generator=torch.Generator().manual_seed(seed),
            **scale,
        )
        return PreparedPicture(self.pipe, picture, subject, identity, inversion, self.setting.edit)


@dataclass(frozen=True)
class Unedited:
    """The picture as it is: what doing nothing scores."""

    name: str
    pipe: Any

    def resolved(self) -> dict[str, Any]:
        return {}

    def prepare(self, picture: Image.Image, source_prompt: str, subject: str, seed: int) -> Any:
        return lambda targets: [picture] * len(targets)


@dataclass(frozen=True)
class AutoencoderAlone:
    """The picture as the autoencoder returns it: no edit through latents keeps more of it."""

    name: str
    pipe: Any

    def resolved(self) -> dict[str, Any]:
        return {}

    def prepare(self, picture: Image.Image, source_prompt: str, subject: str, seed: int) -> Any:
        size = self.pipe._working_size(picture, None, None)
        pixels = self.pipe.image_processor.preprocess(picture, *size).to(self.pipe.device)
        with torch.no_grad():
            decoded = self.pipe.vae.decode(self.pipe.vae.encode(pixels).latent_dist.mode()).sample
        returned = at_size_of(picture, self.pipe.image_processor.postprocess(decoded, output_type="pil"))
        return lambda targets: returned * len(targets)
