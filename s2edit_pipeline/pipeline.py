"""S2EditPipeline: fit an identity to one picture, and edit the picture by words without losing it.

S2Edit: Text-Guided Image Editing with Precise Semantic and Spatial Control (2025). The formulas are in the modules
beside this one; here they are put in order.
"""

# no `from __future__ import annotations` here: diffusers' from_pipe reads the types of __init__'s parameters
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import PIL.Image
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import (
    FromSingleFileMixin,
    IPAdapterMixin,
    StableDiffusionXLLoraLoaderMixin,
    TextualInversionLoaderMixin,
)
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from .attention_control import attention_control  # noqa: F401
from .ddim_steps import noise_schedule
from .edit_control import EditControl  # noqa: F401
from .edit_plan import plan_edits  # noqa: F401
from .edit_sampling import EditSettings, check_share
from .identity_adapter import IdentityAdapter
from .identity_card import identity_card  # noqa: F401
from .identity_compression import compress  # noqa: F401
from .identity_files import read_identity  # noqa: F401
from .identity_fingerprint import fingerprint  # noqa: F401
from .identity_fitting import FitSettings

# diffusers copies only the files that this one names, so the stages' own modules are named here as well; in what is
# published this is the only list that its loader follows, see publishing.unfollowed
from .identity_folder import atomic_folder  # noqa: F401
from .identity_loading import IdentityLoading  # noqa: F401
from .identity_lora_layers import AdaptedLayer  # noqa: F401
from .identity_lora_names import lora_metadata  # noqa: F401
from .identity_losses import cosine  # noqa: F401
from .identity_overlay import IdentityOverlay
from .identity_schema import check_config  # noqa: F401
from .latent_inversion import Inversion, check_method
from .lora_start import start_along_gradient  # noqa: F401
from .noise_drawing import NoiseDrawing
from .object_masks import mask_to_picture
from .picture_editing import PictureEditing
from .picture_fitting import MASK_THRESHOLD, PictureFitting
from .picture_inputs import load_picture
from .pipeline_output import S2EditPipelineOutput
from .pipeline_parts import PipelineParts  # noqa: F401
from .presets import with_preset
from .prompt_alignment import tokenize  # noqa: F401
from .prompt_encoding import encode_prompts  # noqa: F401
from .prompt_tokens import token_rows  # noqa: F401
from .source_attention import KeepAttention
from .tuned_weights import lora_weights  # noqa: F401


class S2EditPipeline(
    PictureFitting,
    PictureEditing,
    NoiseDrawing,
    DiffusionPipeline,
    StableDiffusionMixin,
    TextualInversionLoaderMixin,
    StableDiffusionXLLoraLoaderMixin,  # without a second text encoder it is Stable Diffusion's own
    IPAdapterMixin,
    FromSingleFileMixin,
):
    """Identity-preserving editing of real pictures with a Stable Diffusion 1, 2 or XL model.

    Args:
        vae: autoencoder between pictures and latents.
        text_encoder, tokenizer: CLIP's.
        text_encoder_2, tokenizer_2: SDXL's second ones, or None.
        unet: conditional denoiser, epsilon- or v-prediction.
        scheduler: any with ``alphas_cumprod``; its noise levels are read and it is never changed.
        safety_checker, feature_extractor: Stable Diffusion's own, or None.
        image_encoder: for IP-Adapter, or None.
        requires_safety_checker: only kept, so that Stable Diffusion's folders load.
        force_zeros_for_empty_prompt: whether SDXL is told zeros where there is no negative prompt.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->image_encoder->unet->vae"
    _optional_components = [  # noqa: RUF012 (diffusers' form)
        "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "safety_checker", "feature_extractor",
        "image_encoder",
    ]  # fmt: skip
    _exclude_from_cpu_offload = ["safety_checker"]  # noqa: RUF012
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]  # noqa: RUF012
    tokenizer: Any

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        safety_checker: StableDiffusionSafetyChecker = None,
        feature_extractor: CLIPImageProcessor = None,
        image_encoder: CLIPVisionModelWithProjection = None,
        requires_safety_checker: bool = False,
        text_encoder_2: CLIPTextModelWithProjection = None,
        tokenizer_2: CLIPTokenizer = None,
        force_zeros_for_empty_prompt: bool = True,
    ) -> None:
        super().__init__()
        if getattr(tokenizer, "s2edit_tokens", ()):
            held = ", ".join(tokenizer.s2edit_tokens)
            raise ValueError(
                f"These components hold identities that another pipeline has loaded ({held}). "
                "Call unload_identity() there first, and load them here again."
            )
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self.register_to_config(requires_safety_checker=requires_safety_checker)
        if text_encoder_2 is not None:
            self.register_to_config(force_zeros_for_empty_prompt=force_zeros_for_empty_prompt)
        self._loaded = IdentityOverlay()
        self._interrupt = False

    @property
    def components(self) -> dict[str, Any]:
        """As every pipeline's, to make others of: what the stock pipeline of the other family alone knows is left out
        where it is None, so that ``StableDiffusionPipeline(**pipe.components)`` works, or SDXL's."""
        held: dict[str, Any] = super().components
        others = ("text_encoder_2", "tokenizer_2") if self.text_encoder_2 is None else ("safety_checker",)
        return {name: one for name, one in held.items() if one is not None or name not in others}

    # -------------------------------------------------------------------- what callbacks read and set

    @property
    def interrupt(self) -> bool:
        """Set ``pipe._interrupt = True`` in a callback to stop after the step; what there is comes back."""
        return self._interrupt

    def preview_mask(
        self,
        image: Any,
        prompt: str,
        subject: str,
        *,
        threshold: float = MASK_THRESHOLD,
        height: int | None = None,
        width: int | None = None,
    ) -> PIL.Image.Image:
        """The object mask that ``fit_identity`` would use: a PIL "L" picture of the size of ``image``.

        The noun's cross-attention under ``prompt``, averaged over noise levels and over the layers of 1/16 to 1/32
        of the picture's side, normalised, smoothed, thresholded, largest component kept (S2Edit, ``M_obj``).

        Raises:
            TypeError, ValueError: as :meth:`fit_identity`.
        """
        self._check_ready()
        check_share("threshold", threshold, open_ended=True)
        picture = load_picture(image)
        self._check_prompt(prompt, "prompt")
        tokens = self._tokenize(prompt)
        tokens.find(subject)
        latents = self._encode_picture(picture, *self._working_size(picture, height, width))
        mask = self._object_mask(latents, tokens, subject, threshold)
        self.maybe_free_model_hooks()
        return mask_to_picture(mask, picture.size)

    # -------------------------------------------------------------------- stage one: fitting

    def fit_identity(
        self,
        image: Any,
        prompt: str,
        subject: str,
        token: str = "[I]",
        method: str | None = None,
        mask: Any = None,
        num_steps: int | None = None,
        learning_rate: float | None = None,
        semantic_weight: float = 0.1,
        spatial_control: bool = True,
        reference: Any = None,
        generator: torch.Generator | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        *,
        preset: str | None = None,
        batch_size: int | None = None,
        timestep_sampling: str | None = None,
        lr_scheduler: str | None = None,
        early_stop: bool | None = None,
        optimizer: str = "adamw",
        gradient_checkpointing: bool = False,
        lora_rank: int = FitSettings.lora_rank,
        lora_layers: str = FitSettings.lora_layers,
        lora_init: str = FitSettings.lora_init,
        detach_sentence: bool = False,
        renormalize: bool = False,
        mask_after: bool = False,
        mask_threshold: float = MASK_THRESHOLD,
        height: int | None = None,
        width: int | None = None,
    ) -> IdentityAdapter:
        """Fit ``token`` to the subject of one picture (S2Edit, stage one). The pipeline is left as it was found.

        Args:
            image: the picture, see ``picture_inputs.load_picture``.
            prompt: P, what it shows: "a photo of a lady with glasses".
            subject: the noun in it that ``token`` will stand before: "lady".
            token: one word in brackets.
            method: "lora" (None), "full" (the paper's) or "token".
            mask: the subject's mask, white inside, the picture's shape; None finds it by itself.
            num_steps, learning_rate: None takes the method's own.
            semantic_weight: lambda; 0 leaves the semantic loss out.
            spatial_control: mask the token's cross-attention.
            reference: a ``ReferenceAttribute``: a second picture, whose attribute gets a token of its own. Both are
                tuned jointly, each with its own semantic and spatial control (S2Edit, composition); the edit's
                prompt then holds both, "a [I] lady with [A] makeup".
            generator: makes the fit repeatable.
            callback_on_step_end: ``f(pipe, step, num_steps, measures)``, ``measures`` a dict with
                ``reconstruction_loss``, ``semantic_loss``, ``cosine`` (and ``reference_cosine``); set
                ``pipe._interrupt = True`` to stop early.
            preset: "paper" is the paper's reading in one word, see ``presets.PRESETS``; what is passed beside it wins.
            batch_size: noise levels a step; None takes the method's own.
            timestep_sampling: which noise levels are drawn how often, "uniform", "low_noise", "high_noise" or
                "logit_normal"; None takes the method's own.
            lr_scheduler: of the rates: "constant", or "linear" or "cosine" down to 0; None takes the method's own.
            early_stop: end when the loss at fixed noise stops falling; off unless asked for.
            optimizer: "adamw", or "adamw_8bit" with bitsandbytes.
            gradient_checkpointing: less memory for activations, a third more time.
            lora_rank: of the adapters.
            lora_layers: "all" adapts every linear layer and convolution of the U-Net, "attention" its attention
                projections; of the text encoders these alone are.
            lora_init: "gradient" turns the adapters to where the loss falls fastest before the first step, for one
                step's time; "random" is PEFT's own start.
            detach_sentence, renormalize, mask_after: see ``identity_fitting.FitSettings``.
            mask_threshold: of the automatic mask.
            height, width: work at another size than the model's own.

        Returns:
            The identity, to be saved, loaded, or passed to the pipeline.

        Raises:
            TypeError, ValueError: an input that can't be used; nothing has been done then.
            ImportError: the optimizer's package is missing.
            FloatingPointError: the loss ran away; the message names the step.
        """
        self._check_ready()
        chosen = {
            "method": method, "num_steps": num_steps, "learning_rate": learning_rate, "batch_size": batch_size,
            "timestep_sampling": timestep_sampling, "lr_scheduler": lr_scheduler, "early_stop": early_stop,
        }  # fmt: skip
        settings = FitSettings(
            **with_preset(preset, "fit", chosen),
            optimizer=optimizer,
            gradient_checkpointing=gradient_checkpointing,
            semantic_weight=semantic_weight,
            spatial_control=spatial_control,
            detach_sentence=detach_sentence,
            renormalize=renormalize,
            mask_after=mask_after,
            lora_rank=lora_rank,
            lora_layers=lora_layers,
            lora_init=lora_init,
        )
        check_share("mask_threshold", mask_threshold, open_ended=True)
        return self._fit(
            image, prompt, subject, token, mask, settings, reference, generator, callback_on_step_end, mask_threshold,
            (height, width),
        )  # fmt: skip

    def invert(
        self,
        image: Any,
        prompt: str,
        method: str = "direct",
        num_inference_steps: int = 50,
        *,
        identity: Any = None,
        guidance_scale: float = 4.5,
        negative_prompt: str | None = None,
        generator: torch.Generator | None = None,
        height: int | None = None,
        width: int | None = None,
        clip_skip: int | None = None,
        keep_attention: KeepAttention | None = None,
    ) -> Inversion:
        """From a picture to the noise that leads back to it under ``prompt``.

        Args:
            image: the picture.
            prompt: the source prompt; of a loaded (or passed) identity the token is put before its subject by itself.
            method: "direct" (Ju et al. 2023), "ddim" (Song et al. 2021), "null_text" (Mokady et al. 2023),
                "negative_prompt" (Miyake et al. 2023), "fixed_point" (Pan et al. 2023) or "edit_friendly"
                (Huberman-Spiegelglas et al. 2024).
            num_inference_steps: of the inversion and of the edits that use it.
            identity: an identity to load for this call.
            guidance_scale: what "null_text" optimises for; the others serve any.
            generator: of "edit_friendly"'s noise; the others draw none.
            keep_attention: how much of the source's attention is kept, where the source is pinned to its trajectory
                ("direct", "fixed_point", "edit_friendly"), so that no edit has to ask for it again; None is
                ``KeepAttention()``: of 40 % of the steps, at most 1 GiB.

        Raises:
            TypeError, ValueError: an input that can't be used; nothing has been done then.
        """
        self._check_ready()
        check_method(method)
        _check_keep(keep_attention)
        if method == "null_text":
            self._check_autograd()
        self._check_prompt(prompt, "prompt")
        EditSettings(guidance_scale=guidance_scale)
        schedule = noise_schedule(self.scheduler, num_inference_steps)
        picture = load_picture(image)
        size = self._working_size(picture, height, width)
        with self._with_identity(identity) as asked:
            prompt = self._source_prompt(prompt, self._fitting_tokens(prompt, asked))
            tokens = self._tokenize(prompt)
            self._tokenize(negative_prompt or "")  # refused here if it is too long
            encoded = self._encode_prompts([tokens], clip_skip)
            negative = self._encode_negative(negative_prompt, encoded, clip_skip)
            found = self._invert(
                self._encode_picture(picture, *size), tokens, encoded, negative, method, schedule, guidance_scale,
                generator, clip_skip, keep_attention or KeepAttention(),
            )  # fmt: skip
        self.maybe_free_model_hooks()
        return found

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Any = None,
        source_prompt: str | None = None,
        identity: Any = None,
        inversion: Inversion | str | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 4.5,
        cross_replace_steps: float | Mapping[str, float] = 0.4,
        self_replace_steps: float = 0.4,
        reweight: Mapping[str, float] | None = None,
        blend_words: Sequence[str] | bool | None = None,
        edit_mask: Any = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Any] | None = None,
        *,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",),
        preset: str | None = None,
        edit: str = "auto",
        blend_threshold: float = EditSettings.blend_threshold,
        change_threshold: float = EditSettings.change_threshold,
        guidance_rescale: float = 0.0,
        guidance_stop: float | None = None,
        strength: float = 1.0,
        keep_words: Sequence[str] | None = None,
        keep_pixels: bool = False,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
        latents: torch.Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        clip_skip: int | None = None,
        return_attention_maps: bool = False,
        keep_attention: KeepAttention | None = None,
    ) -> S2EditPipelineOutput | tuple[Any, ...]:
        """Edit a picture by words (S2Edit, stage two), or draw the identity anew where ``image`` is None.

        Args:
            prompt: the target prompt, or several: all edits share one inversion. ``[I]`` in it is put into
                ``source_prompt`` by itself, before the identity's subject.
            image: the picture to edit.
            source_prompt: what it shows; None takes the identity's own.
            identity: an identity to use for this call, or the token of a loaded one.
            inversion: what :meth:`invert` returned, or a method's name; None is "direct".
            num_inference_steps: 50, or the inversion's own.
            guidance_scale: 3.5 to 5.5 are S2Edit's.
            guidance_rescale: from 0 to 1, against colours burnt by guidance (Lin et al. 2024).
            preset: "paper" is the paper's reading in one word (null-text inversion, guided to the end, not confined),
                see ``presets.PRESETS``; what is passed beside it wins, an inversion among it, and
                ``blend_words=True`` for None's confinement.
            guidance_stop: share of the steps after which the edit goes on unguided (Kynkäänniemi et al. 2024), half of
                them by default; 1 is prompt-to-prompt's own, guided to the end.
            cross_replace_steps: share of the steps in which words common to both prompts keep the source's
                cross-attention; or ``{"word": share, "default_": share}``.
            self_replace_steps: share of the steps in which the self-attention at 1/16 of the picture's side and
                below is the source's.
            reweight: word of the target -> factor on its attention.
            blend_words: None confines the edit to where the changed words look, a list to where these words look
                (in source or target), False lets it change the whole picture.
            edit_mask: where the edit may change the picture, white inside; replaces the words' own region, so that
                ``keep_words`` doesn't go with it.
            keep_words: words (of source or target) whose place is taken out of the words' region.
            keep_pixels: outside the region, return the picture's own pixels, not the autoencoder's; its border is
                feathered inwards.
            strength: share of the noise levels that the edit goes through; lower stays nearer to the picture
                ("edit_friendly" was published with 0.64). The other shares count from the full noise all the same: at
                0.5 an edit with the defaults is neither guided nor given the source's attention.
            generator: of the noise, without ``image`` or with ``inversion="edit_friendly"``.
            output_type: "pil", "np", "pt" or "latent".
            callback_on_step_end: ``f(pipe, step, timestep, tensors)``; it may return ``{"latents": ...}`` and set
                ``pipe._interrupt = True`` to stop early.
            edit: "auto", "replace" or "refine", see ``prompt_alignment.align_prompts``.
            blend_threshold: of the words' maps, in (0, 1); lower lets the edit reach farther.
            change_threshold: in the last fifth of the steps, cells of the words' region that changed by less than this
                share of the most changed one are the source's again: that is drift, not edit. 0 lets it be.
            negative_prompt: what to steer away from; without ``image`` also a list, one for each prompt.
            num_images_per_prompt, latents, prompt_embeds, negative_prompt_embeds, and SDXL's pooled_prompt_embeds,
                negative_pooled_prompt_embeds, original_size, crops_coords_top_left, target_size: only without
                ``image``; an edit of a picture is deterministic, needs the words, and is as large as it is.
            return_attention_maps: also return where each word of the first target looked.
            keep_attention: where the inversion is made here: how much of the source's attention is kept meanwhile, as
                in :meth:`invert`; its ``share`` is what the edit needs. None keeps only where its words look: the
                source is asked again at the steps that take its attention over, in the least memory.

        Returns:
            ``S2EditPipelineOutput``, or with ``return_dict=False`` the tuple of its fields, images first, those that
            weren't asked for None.

        Raises:
            TypeError, ValueError: an input that can't be used; nothing has been done then.
        """
        self._check_ready()
        _check_keep(keep_attention)
        self._interrupt = False
        drawing = image is None and not hasattr(inversion, "trajectory")
        asked_for = {"inversion": inversion, "guidance_stop": guidance_stop, "blend_words": blend_words}
        chosen = with_preset(preset, "edit", asked_for)
        if not drawing:
            inversion = chosen.get("inversion")
        settings = EditSettings(
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            guidance_stop=chosen.get("guidance_stop", EditSettings.guidance_stop),
            strength=strength,
            edit=edit,
            cross_replace_steps=cross_replace_steps,
            self_replace_steps=self_replace_steps,
            reweight=reweight,
            blend_words=chosen.get("blend_words"),
            keep_words=keep_words,
            blend_threshold=blend_threshold,
            change_threshold=change_threshold,
        )
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            raise TypeError(
                f"{type(callback_on_step_end).__name__} steers Stable Diffusion's own loop, which this one isn't. "
                "To stop guidance early pass guidance_stop=; other callbacks are functions (pipe, step, timestep, "
                "tensors)."
            )
        callback_on_step_end_tensor_inputs = callback_on_step_end_tensor_inputs or ("latents",)
        for name in callback_on_step_end_tensor_inputs:
            if name not in self._callback_tensor_inputs:
                raise ValueError(f"{name!r} can't be handed to callbacks; choose from {self._callback_tensor_inputs}.")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type={output_type!r} is unknown; choose 'pil', 'np', 'pt' or 'latent'.")

        def call_back(step: int, timestep: int, tensors: dict[str, torch.Tensor]) -> torch.Tensor | None:
            result = None
            if callback_on_step_end is not None:
                shown = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                changed = callback_on_step_end(self, step, timestep, shown) or {}
                if set(changed) - {"latents"}:
                    raise ValueError(f"A callback may change 'latents'; it returned {', '.join(map(repr, changed))}.")
                result = changed.get("latents")
            if self._interrupt:
                raise StopIteration
            return result

        if drawing:
            for name, given in (
                ("source_prompt", source_prompt), ("inversion", inversion), ("reweight", reweight),
                ("edit_mask", edit_mask), ("keep_words", keep_words), ("return_attention_maps", return_attention_maps),
                ("keep_pixels", keep_pixels), ("blend_words", blend_words), ("guidance_stop", guidance_stop),
                ("strength", None if strength == 1 else strength), ("edit", None if edit == "auto" else edit),
            ):  # fmt: skip
                if given is not None and given is not False:
                    raise ValueError(f"{name}= is for editing a picture: pass image= too.")
            if prompt is not None and prompt_embeds is not None:
                raise ValueError("prompt and prompt_embeds say the same twice; pass one of them.")
        else:
            for name, given in (
                ("prompt_embeds", prompt_embeds), ("negative_prompt_embeds", negative_prompt_embeds),
                ("latents", latents), ("pooled_prompt_embeds", pooled_prompt_embeds),
                ("negative_pooled_prompt_embeds", negative_pooled_prompt_embeds),
            ):  # fmt: skip
                if given is not None:
                    raise ValueError(f"{name} can't be combined with image: the edit is made from the words.")
            if original_size is not None or target_size is not None or tuple(crops_coords_top_left) != (0, 0):
                raise ValueError("original_size, crops_coords_top_left and target_size can't be combined with image.")
            if num_images_per_prompt != 1:
                raise ValueError("num_images_per_prompt: an edit is deterministic, a second one would be the same.")
            if keep_pixels and (image is None or output_type == "latent"):
                raise ValueError("keep_pixels=True needs image=, and pictures for an output, not latents.")
        with self._with_identity(identity) as asked:
            if drawing:
                sizes = {"original_size": original_size, "crop": crops_coords_top_left, "target_size": target_size}
                output = self._draw(
                    prompt, num_inference_steps, guidance_scale, guidance_rescale, generator, call_back,
                    negative_prompt, num_images_per_prompt, prompt_embeds, negative_prompt_embeds,
                    pooled_prompt_embeds, negative_pooled_prompt_embeds, sizes, latents, height, width, clip_skip,
                    output_type,
                )  # fmt: skip
            else:
                output = self._edit(
                    prompt, image, source_prompt, asked, inversion, num_inference_steps, settings, edit_mask,
                    keep_pixels, generator, call_back, negative_prompt, height, width, clip_skip,
                    return_attention_maps, output_type, keep_attention,
                )  # fmt: skip
        self.maybe_free_model_hooks()
        return output if return_dict else tuple(getattr(output, field.name) for field in fields(output))


def _check_keep(keep_attention: Any) -> None:
    if keep_attention is not None and not hasattr(keep_attention, "max_bytes"):
        raise TypeError(
            f"keep_attention must be a KeepAttention, not {keep_attention!r}; KeepAttention(max_bytes=0) keeps nothing."
        )
