"""This pipeline as a system of the benchmark, and the two references that edit nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ...identity_adapter import IdentityAdapter
from ...inversion_record import Inversion, inversion_method
from ...picture_files import read_picture
from ...picture_inputs import picture_to_tensor
from ...prompt_words import insert_token
from .fit_cache import FitCache, FitTask, fit_identity
from .pipeline_arguments import AS_THE_MODEL_GIVES_IT, PipelineArguments
from .protocol import contains_phrase


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

    def __call__(self, target_prompts: Sequence[str]) -> list[Image.Image]:
        edited: list[Image.Image] = self._edit(target_prompts).images
        return edited

    def without_token(self, target_prompts: Sequence[str]) -> list[str]:
        """Those that lack the subject, of a picture that has an identity."""
        if self.identity is None:
            return []
        return [prompt for prompt in target_prompts if not contains_phrase(prompt, self.subject)]

    def attention_maps(self, target_prompt: str) -> dict[str, Image.Image]:
        """Word of ``target_prompt``, the token among them, -> where it looked, a PIL "L" picture."""
        maps: dict[str, Image.Image] = self._edit([target_prompt], return_attention_maps=True).attention_maps
        return maps

    def _edit(self, target_prompts: Sequence[str], **more: Any) -> Any:
        prompts = list(target_prompts)
        if self.identity is not None:
            bare, token = self.without_token(prompts), self.identity.token
            prompts = [p if p in bare else insert_token(p, self.subject, token) for p in prompts]
        arguments = {**AS_THE_MODEL_GIVES_IT, **self.edit_arguments, **more}
        return self.pipe(prompts, self.picture, None, self.identity, self.inversion, **arguments)


@dataclass(frozen=True)
class PipelineMethod:
    """``pipe`` with some ``arguments``, see ``protocol.Method``.

    Attributes:
        fits: shared with methods whose fit is the same; None fits for itself.
    """

    name: str
    pipe: Any
    arguments: PipelineArguments
    num_inference_steps: int = 50
    fits: FitCache | None = None

    def resolved(self) -> dict[str, Any]:
        return self.arguments.resolved(self.pipe.family.default_guidance_scale)

    def prepare(self, picture: Image.Image, source_prompt: str, subject: str, seed: int) -> PreparedPicture:
        task = FitTask(picture, source_prompt, subject, seed)
        fit = fit_identity if self.fits is None else self.fits.identity
        identity = fit(self.pipe, self.arguments, task)
        method = inversion_method(self.arguments.inversion)
        more = {k: v for k, v in self.arguments.edit.items() if k == "guidance_scale" and method.binds_guidance}
        if method.draws_noise:
            more["generator"] = torch.Generator().manual_seed(seed)
        inversion = self.pipe.invert(
            picture, source_prompt, self.arguments.inversion, self.num_inference_steps,
            identity=identity, crop=self.arguments.edit.get("crop", AS_THE_MODEL_GIVES_IT["crop"]), **more,
        )  # fmt: skip
        return PreparedPicture(self.pipe, picture, subject, identity, inversion, self.arguments.edit)


@dataclass(frozen=True)
class Unedited:
    """The picture as it is: what doing nothing scores."""

    name: str
    pipe: Any

    def resolved(self) -> dict[str, Any]:
        return {}

    def prepare(self, picture: Image.Image, source_prompt: str, subject: str, seed: int) -> Any:
        return lambda target_prompts: [picture] * len(target_prompts)


@dataclass(frozen=True)
class AutoencoderAlone:
    """The picture as the autoencoder returns it: no edit through latents alone preserves more of it."""

    name: str
    pipe: Any

    def resolved(self) -> dict[str, Any]:
        return {}

    def prepare(self, picture: Image.Image, source_prompt: str, subject: str, seed: int) -> Any:
        returned = [_through_autoencoder(self.pipe, picture)]
        return lambda target_prompts: returned * len(target_prompts)


@torch.no_grad()
def _through_autoencoder(pipe: Any, picture: Image.Image) -> Image.Image:
    """``picture`` encoded and decoded at the size that the model works at."""
    placed = pipe.family.place(read_picture(picture))
    pixels = picture_to_tensor(placed.canvas).to(pipe.device)
    decoded = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mode()).sample
    image: Image.Image = pipe.image_processor.postprocess(decoded, output_type="pil")[0]
    return placed.placement.from_canvas(image)
