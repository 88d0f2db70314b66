"""What differs between kinds of models, behind one interface: a kind of model is one class in one file.

The stages (fit, invert, edit, draw) ask a :class:`ModelFamily` and never a model. A new kind subclasses it, says in
``serves`` which pipelines it is for, and is made known by :func:`register_family`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from typing import Any, ClassVar

import PIL.Image
import torch
from torch import nn

from .attention_seam import AttentionController, AttentionSite, attention_control
from .noise_guidance import PLAIN_GUIDANCE, Guidance, guided
from .noise_schedule import NoiseSchedule
from .offloaded_weights import is_offloaded
from .picture_files import SourcePicture
from .picture_inputs import picture_to_tensor
from .picture_modes import Box
from .picture_placement import PlacedPicture, place_picture
from .prompt_columns import Segment, TokenizedPrompt
from .prompt_embeds import PicturePrompt, PromptEmbeds, ShownPicture

DEFAULT_INVERSION = "direct"


class ModelFamily(ABC):
    """One kind of model, at work in one pipeline; it holds nothing of its own and reads the pipeline's components.

    Args:
        pipe: the pipeline, or anything with its components as attributes.
    """

    name: ClassVar[str]
    """What users call it."""
    denoiser_name: ClassVar[str]
    """The component that predicts the noise: "unet" or "transformer"."""
    denoiser_classes: ClassVar[tuple[str, ...]]
    """Its classes, by name."""

    edit_defaults: ClassVar[Mapping[str, Any]] = {}
    """What of ``EditSettings`` is another where the caller says nothing."""
    takes_picture_adapters: ClassVar[bool] = False
    """Whether IP-Adapters can be loaded."""
    kept_attention: ClassVar[float] = 0.4
    """The share of an inversion's steps at which the source's attention is kept where the caller says nothing."""
    drawn_branches: ClassVar[str] = "null first"
    """How the stock pipeline asks the branches of a guided drawing: as rows of one batch, "null first" or "null last",
    or "apart", the prompts' before."""
    renormalizes: ClassVar[bool] = False
    """Whether spatial control is renormalised where the caller says nothing, see ``attention_spatial``."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    @classmethod
    def serves(cls, pipe: Any) -> bool:
        """Whether ``pipe`` holds a model of this kind."""
        denoiser = getattr(pipe, cls.denoiser_name, None)
        return type(getattr(denoiser, "_orig_mod", denoiser)).__name__ in cls.denoiser_classes

    @classmethod
    def encodes_for(cls, pipe: Any) -> bool:
        """Whether the text encoders of ``pipe``, which has no denoiser, are a model's of this kind."""
        return False

    # -------------------------------------------------------------------- components

    @property
    def denoiser(self) -> Any:
        """The component that predicts the noise."""
        return getattr(self.pipe, self.denoiser_name)

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        """Name -> each text encoder that has a row for a learned token."""
        return self._numbered("text_encoder")

    @property
    def tokenizers(self) -> dict[str, Any]:
        """Text encoder's name -> its tokenizer."""
        numbered = self._numbered("tokenizer")
        return {name.replace("tokenizer", "text_encoder"): tokenizer for name, tokenizer in numbered.items()}

    def _numbered(self, name: str) -> dict[str, Any]:
        each = {part: getattr(self.pipe, part, None) for part in (name, f"{name}_2", f"{name}_3")}
        return {part: component for part, component in each.items() if component is not None}

    @property
    def tuned_components(self) -> dict[str, nn.Module]:
        """Name -> the modules that an identity may change, by their own parameters' names: behind ``torch.compile``,
        what it wraps."""
        components = {self.denoiser_name: self.denoiser, **self.text_encoders}
        return {name: getattr(module, "_orig_mod", module) for name, module in components.items()}

    @cached_property
    def device(self) -> torch.device:
        """Where the work is done: where the denoiser is, or is brought to. diffusers walks through all modules to
        answer, so a call asks once."""
        denoiser = self.denoiser  # None where there are text encoders alone
        if denoiser is not None and not is_offloaded(
            denoiser
        ):  # of a pipeline that is offloaded in part diffusers names another place
            return next(denoiser.parameters()).device
        device: torch.device = self.pipe._execution_device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The denoiser's. diffusers walks through all modules to answer: ask once a call."""
        dtype: torch.dtype = self.denoiser.dtype
        return dtype

    @property
    def default_steps(self) -> int:
        """``num_inference_steps`` where the caller says none."""
        return 50

    @property
    def default_guidance_scale(self) -> float:
        """How strongly words pull where the caller doesn't say: the pipeline's ``default_guidance_scale``, which the
        model's folder may set, else S2Edit's."""
        scale = getattr(self.pipe, "config", {}).get("_default_guidance_scale")
        return self.guidance.default if scale is None else float(scale)

    @property
    def latent_channels(self) -> int:
        """C of the latents."""
        channels: int = self.denoiser.config.in_channels
        return channels

    @property
    def pixels_per_latent(self) -> int:
        """A latent's side in pixels."""
        scale: int = self.pipe.vae_scale_factor
        return scale

    @property
    def fixed_components(self) -> frozenset[str]:
        """Those of :attr:`tuned_components` whose weights stay as they are: only rows are laid over them."""
        return frozenset()

    def pixel_size(self, latents: torch.Tensor) -> tuple[int, int]:
        """(height, width) of the pictures that ``latents`` (B, C, h, w) stand for."""
        return latents.shape[-2] * self.pixels_per_latent, latents.shape[-1] * self.pixels_per_latent

    @abstractmethod
    def check(self) -> None:
        """Raises:
        ValueError: a component is missing, or they don't belong together; the message says what to load.
        """

    def check_drawing(self, *, reads_words: bool) -> None:
        """As :meth:`check`, for drawing from noise: any scheduler serves there, and embeddings in the words' place may
        need no text encoders.

        Raises:
            ValueError: as there.
        """
        self.check()

    # -------------------------------------------------------------------- prompts

    @abstractmethod
    def tokenize(self, prompt: str, tokenizers: Mapping[str, Any] | None = None) -> TokenizedPrompt:
        """``prompt``'s tokens and words, by the pipeline's own tokenizers or the given ones."""

    def tokenize_cut(self, prompt: str) -> TokenizedPrompt:
        """As :meth:`tokenize`, but that a prompt which is too long is cut; its ``lost`` is what was cut off. A kind of
        model that can't do that refuses it."""
        return self.tokenize(prompt)

    @abstractmethod
    def encode(self, prompts: Sequence[TokenizedPrompt], clip_skip: int | None = None) -> PromptEmbeds:
        """Encoded ``prompts``, in one batch; differentiable."""

    def encode_negative(self, prompt: str | None, like: PromptEmbeds, clip_skip: int | None = None) -> PromptEmbeds:
        """One row: the negative prompt, or without one the empty prompt; ``like`` is an encoded prompt's form."""
        return self.encode([self.tokenize(prompt or "")], clip_skip)

    @property
    def num_picture_adapters(self) -> int:
        """How many IP-Adapters are loaded."""
        return 0

    def encode_pictures(self, shown: ShownPicture, *, guided: bool) -> tuple[PicturePrompt, PicturePrompt]:
        """What the loaded IP-Adapters' prompts are shown, and the unconditional rows.

        Raises:
            ValueError: this can't be shown to them, or to no model of this kind.
        """
        raise ValueError(f"An edit with {self.name} takes no IP-Adapter; leave ip_adapter_image= out.")

    def sentence(self, output: torch.Tensor, segment: Segment) -> torch.Tensor:
        """(D,), ``e_P`` of the semantic loss: what stands for a whole prompt in a text encoder's output.

        A causal encoder has read all of the prompt at what follows it, for CLIP its end token.

        Args:
            output: (L, D), of the columns of ``segment``.
        """
        return output[segment.eos]

    # -------------------------------------------------------------------- pictures and latents

    @property
    @abstractmethod
    def native_size(self) -> int:
        """The side, in pixels, of the square pictures that the model was made for."""

    @property
    @abstractmethod
    def size_multiple(self) -> int:
        """Every side of a picture is a multiple of this, in pixels."""

    def place(
        self, source: SourcePicture, box: Box | None = None, size: tuple[int | None, int | None] = (None, None)
    ) -> PlacedPicture:
        """``source``, or its ``box``, on a canvas of the (height, width) that is wished, or else the model's own.

        Raises:
            ValueError: as ``picture_placement.place_picture``.
        """
        height, width = size
        placement = place_picture(source.size, self.native_size, self.size_multiple, box, height, width)
        return PlacedPicture(source, placement)

    def encode_picture(self, canvas: PIL.Image.Image) -> torch.Tensor:
        """(1, C, h, w) latents of level 0, in the denoiser's dtype, of an RGB picture of a size to work at."""
        return self.encode_pixels(picture_to_tensor(canvas))

    def autoencoder_in_range(self) -> AbstractContextManager[None]:
        """Within the context the autoencoder's numbers don't overflow; it may be of another dtype there."""
        return nullcontext()

    @torch.no_grad()
    def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) latents of level 0 of ``pixels`` (B, 3, H, W) in [-1, 1]."""
        vae = self.pipe.vae
        with self.autoencoder_in_range():
            encoded = vae.encode(pixels.to(self.device, vae.dtype))
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        return ((latents - self._latent_shift) * vae.config.scaling_factor).to(self.dtype)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """(B, 3, H, W) in about [-1, 1]."""
        vae = self.pipe.vae
        with self.autoencoder_in_range():
            latents = latents.to(vae.dtype) / vae.config.scaling_factor + self._latent_shift
            pixels: torch.Tensor = vae.decode(latents, return_dict=False, generator=generator)[0]
            return pixels

    @property
    def _latent_shift(self) -> float:
        return getattr(self.pipe.vae.config, "shift_factor", None) or 0.0

    # -------------------------------------------------------------------- noise

    @abstractmethod
    def schedule(self, num_inference_steps: int, size: tuple[int, int] | None = None) -> NoiseSchedule:
        """The noise levels of one call; ``size`` is the picture's (height, width), which flows may depend on.

        Raises:
            ValueError: the scheduler can't serve, or the number of steps is out of its range.
        """

    @abstractmethod
    def training_schedule(self, size: tuple[int, int] | None = None) -> NoiseSchedule:
        """Every level that the model was trained at."""

    def guides(self, guidance_scale: float) -> bool:
        """Whether this scale asks for the unconditional branch, as diffusers' pipelines have it."""
        return self.guidance.has_null(guidance_scale)

    @abstractmethod
    def denoise(self, x: torch.Tensor, timestep: Any, embeds: PromptEmbeds, dtype: torch.dtype) -> torch.Tensor:
        """The denoiser's output for latents ``x`` (B, C, h, w), in ``x``'s dtype; it works in ``dtype``, its own.

        Args:
            timestep: one of the schedule's, or (B,) of them.
            embeds: B rows.
        """

    @property
    def guidance(self) -> Guidance:
        """What guidance is in this model."""
        return PLAIN_GUIDANCE

    def combine(self, unconditional: torch.Tensor, conditional: torch.Tensor, scale: float) -> torch.Tensor:
        """The guided output of both branches', (B, C, h, w) each."""
        return guided(unconditional, conditional, scale)

    def default_inversion(self, num_inference_steps: int) -> str:
        """The inversion of an edit where the caller says none."""
        return DEFAULT_INVERSION

    # -------------------------------------------------------------------- attention and adapters

    @abstractmethod
    def attention_site(
        self, grids: Mapping[int, tuple[int, int]], name: str, layer: nn.Module, hidden_states: torch.Tensor, text: Any
    ) -> AttentionSite | None:
        """What the layer ``name`` is in this call; ``grids`` is :meth:`attention_grids`' answer for its latents."""

    @abstractmethod
    def attention_grids(self, height: int, width: int) -> dict[int, tuple[int, int]]:
        """Number of picture cells -> (height, width) of each grid in which layers attend, for latents of this size."""

    def control_attention(
        self, controller: AttentionController, height: int, width: int
    ) -> AbstractContextManager[None]:
        """``controller`` at the denoiser's attention, for latents of ``height`` x ``width``; see ``attention_seam``."""
        grids = self.attention_grids(height, width)
        return attention_control(self.denoiser, controller, partial(self.attention_site, grids))

    @abstractmethod
    def lora_targets(self, component: str, layers: str) -> list[str]:
        """What PEFT is to adapt in ``component``: ends of its layers' names. ``layers``: "all" or "attention"."""

    # -------------------------------------------------------------------- diffusers' own pipeline

    @property
    def lora_components(self) -> tuple[str, ...]:
        """What diffusers' own pipeline loads LoRAs into, where this is another's than Stable Diffusion's; else ()."""
        return ()

    def drawing_arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """``given`` as the stock pipeline's call names it; what is this pipeline's own has the names that Stable
        Diffusion's has."""
        return dict(given)

    def drawn_size(self, given: Mapping[str, Any]) -> tuple[int, int]:
        """(h, w) of the latents that the stock pipeline draws, called with ``given``."""
        latents = given.get("latents")
        if latents is not None:
            return tuple(latents.shape[-2:])
        return given["height"] // self.pixels_per_latent, given["width"] // self.pixels_per_latent

    def draws_null(self, given: Mapping[str, Any]) -> bool:
        """Whether the stock pipeline, called with ``given``, asks an unconditional branch."""
        return self.guidance.has_null(given.get("guidance_scale", 0.0))

    def drawn_embeddings(self, embeds: PromptEmbeds, prefix: str = "") -> dict[str, Any]:
        """``embeds`` as the stock pipeline's call names them; ``prefix`` is "negative_" of the unconditional ones."""
        named = {f"{prefix}prompt_embeds": embeds.embeds, f"{prefix}pooled_prompt_embeds": embeds.pooled}
        return {name: value for name, value in named.items() if value is not None}

    @property
    @abstractmethod
    def stock_components(self) -> frozenset[str]:
        """The names of the components that it has."""

    @abstractmethod
    def stock(self) -> Any:
        """diffusers' own text-to-image pipeline over the same modules, with a scheduler of its own."""


_FAMILIES: list[type[ModelFamily]] = []


def register_family(family: type[ModelFamily]) -> type[ModelFamily]:
    """Make ``family`` known; one that is registered later is asked first."""
    _FAMILIES.insert(0, family)
    return family


def unregister_family(family: type[ModelFamily]) -> None:
    """Forget ``family``."""
    _FAMILIES.remove(family)


def registered_families() -> tuple[type[ModelFamily], ...]:
    """In the order in which they were registered."""
    return tuple(reversed(_FAMILIES))


def known_family(pipe: Any) -> ModelFamily | None:
    """The family that serves ``pipe``, or None."""
    return next((family(pipe) for family in _FAMILIES if family.serves(pipe)), None)


def encoding_family(pipe: Any) -> ModelFamily:
    """The family that encodes ``pipe``'s prompts; text encoders alone are enough to tell.

    Raises:
        ValueError: none does.
    """
    found = known_family(pipe) or next((family(pipe) for family in _FAMILIES if family.encodes_for(pipe)), None)
    return found or family_of(pipe)


def family_of(pipe: Any) -> ModelFamily:
    """The family that serves ``pipe``.

    Raises:
        ValueError: none does; the message lists those that there are.
    """
    family = known_family(pipe)
    if family is not None:
        return family
    denoiser = next((part for name in ("unet", "transformer") if (part := getattr(pipe, name, None)) is not None), None)
    served = "; ".join(f"{one.name} ({', '.join(one.denoiser_classes)})" for one in registered_families())
    if denoiser is None:
        raise ValueError(
            "The pipeline has no unet; load it whole, or pass unet= to from_pretrained, of a transformer model "
            f"transformer=. Served are: {served}."
        )
    raise ValueError(
        f"{type(denoiser).__name__} is a model that isn't served yet. Served are: {served}. Load one of these: "
        "S2EditPipeline.from_pretrained('stable-diffusion-v1-5/stable-diffusion-v1-5')."
    )
