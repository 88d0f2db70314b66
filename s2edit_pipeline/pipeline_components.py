"""The components of the pipeline: which there may be, and what is refused among them."""

# no `from __future__ import annotations` here: diffusers' from_pipe reads the types of __init__'s parameters
import inspect
from collections.abc import Callable
from typing import Any

from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedModel,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5EncoderModel,
    T5Tokenizer,
)

from .argument_checks import check_guidance
from .describe_vocabulary import read_vocabulary
from .family_base import family_of
from .identity_overlay import IdentityOverlay

OPTIONS = (
    "requires_safety_checker", "force_zeros_for_empty_prompt", "default_guidance_scale", "vocabulary", "is_distilled",
)  # fmt: skip
"""What ``__init__`` takes beside the components, and a folder's ``model_index.json`` keeps."""


def without_component_defaults(initialiser: Callable[..., None]) -> inspect.Signature:
    """The signature of a pipeline's ``__init__``, its components without their defaults: what has a default, diffusers'
    loader takes from the folder, whatever was passed to it."""
    signature = inspect.signature(initialiser)
    parameters = signature.parameters.values()
    return signature.replace(parameters=[p if p.name in OPTIONS else p.replace(default=p.empty) for p in parameters])


class PipelineComponents:
    """The part of ``S2EditPipeline`` that holds its components; they decide what kind of model it is, see
    ``family_base.family_of``, and those it lacks are None."""

    register_modules: Callable[..., None]
    register_to_config: Callable[..., None]

    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->image_encoder->unet->transformer->vae"
    _optional_components = [  # noqa: RUF012 (diffusers' form)
        "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3", "unet",
        "transformer", "safety_checker", "feature_extractor", "image_encoder",
    ]  # fmt: skip
    _exclude_from_cpu_offload = ["safety_checker"]  # noqa: RUF012
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]  # noqa: RUF012
    tokenizer: Any

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderKLQwenImage | AutoencoderKLFlux2 = None,
        text_encoder: CLIPTextModel
        | CLIPTextModelWithProjection
        | Qwen2_5_VLForConditionalGeneration
        | Qwen3Model
        | Qwen3ForCausalLM = None,
        tokenizer: CLIPTokenizer | Qwen2Tokenizer = None,
        unet: UNet2DConditionModel = None,
        scheduler: KarrasDiffusionSchedulers | FlowMatchEulerDiscreteScheduler = None,
        safety_checker: StableDiffusionSafetyChecker = None,
        feature_extractor: CLIPImageProcessor = None,
        image_encoder: PreTrainedModel = None,
        text_encoder_2: CLIPTextModelWithProjection | T5EncoderModel = None,
        tokenizer_2: CLIPTokenizer | T5Tokenizer = None,
        transformer: SD3Transformer2DModel
        | FluxTransformer2DModel
        | QwenImageTransformer2DModel
        | ZImageTransformer2DModel
        | Flux2Transformer2DModel = None,
        text_encoder_3: T5EncoderModel = None,
        tokenizer_3: T5Tokenizer = None,
        requires_safety_checker: bool = False,
        force_zeros_for_empty_prompt: bool = True,
        default_guidance_scale: float | None = None,
        vocabulary: str | list[str] | None = None,
        is_distilled: bool | None = None,
    ) -> None:
        super().__init__()
        held = [getattr(one, "s2edit_tokens", ()) for one in (tokenizer, tokenizer_2, tokenizer_3)]
        if any(held):
            tokens = ", ".join(dict.fromkeys(token for each in held for token in each))
            raise ValueError(
                f"These components hold identities that another pipeline has loaded ({tokens}). "
                "Call unload_identity() there first, and load them here again."
            )
        self.register_modules(
            vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2, text_encoder_3=text_encoder_3, tokenizer_3=tokenizer_3, unet=unet,
            transformer=transformer, scheduler=scheduler, safety_checker=safety_checker,
            feature_extractor=feature_extractor, image_encoder=image_encoder,
        )  # fmt: skip
        if transformer is not None:
            family_of(self)  # refused here if nothing serves it
        block_out_channels = getattr(getattr(vae, "config", None), "block_out_channels", None)
        self.vae_scale_factor = 2 ** (len(block_out_channels) - 1) if block_out_channels else 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self.register_to_config(requires_safety_checker=requires_safety_checker)
        if text_encoder_2 is not None:
            self.register_to_config(force_zeros_for_empty_prompt=force_zeros_for_empty_prompt)
        if is_distilled is not None:
            self.register_to_config(is_distilled=bool(is_distilled))
        if default_guidance_scale is not None:
            check_guidance(default_guidance_scale, "default_guidance_scale")
            self.register_to_config(_default_guidance_scale=float(default_guidance_scale))
        if vocabulary is not None:
            read_vocabulary(vocabulary)  # refused here if it is none
            # one text: of a list in its index diffusers' loader thinks that it is a component
            self.register_to_config(_vocabulary=vocabulary if isinstance(vocabulary, str) else "\n".join(vocabulary))
        if text_encoder_2 is not None:  # with several, diffusers' loops show callbacks no negative embeddings
            self._callback_tensor_inputs = ["latents", "prompt_embeds"]
        # of all that the class may lack, what this pipeline's own model may
        absent = {name for name in type(self)._optional_components if getattr(self, name) is None}
        self._optional_components = sorted(absent | {"safety_checker", "feature_extractor", "image_encoder"})
        self._overlay = IdentityOverlay()

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """diffusers' own. What is of this pipeline alone is kept with an underscore before its name, in a folder as in
        ``config``: other pipelines pass over that without a word, and ``from_pipe`` brings it back."""
        ours = {name: config_dict[f"_{name}"] for name in OPTIONS if f"_{name}" in config_dict}
        return super().extract_init_dict({**ours, **config_dict}, **kwargs)  # type: ignore[misc]


PipelineComponents.__init__.__signature__ = without_component_defaults(PipelineComponents.__init__)  # type: ignore[attr-defined]
