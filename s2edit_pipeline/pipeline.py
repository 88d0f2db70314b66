"""S2EditPipeline: fit an identity to one picture, and edit the picture by words without losing it.

S2Edit: Text-Guided Image Editing with Precise Semantic and Spatial Control (2025). The formulas are in the modules
beside this one; here arguments become a request, which goes to its stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal, overload

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import (
    FromSingleFileMixin,
    IPAdapterMixin,
    StableDiffusionXLLoraLoaderMixin,
    TextualInversionLoaderMixin,
)
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin

# diffusers copies only the files that this one names, see publishing.unfollowed: so every module is named here
from .argument_checks import with_preset
from .attention_chain import Controllers  # noqa: F401
from .attention_maps import MapRecorder  # noqa: F401
from .attention_opaque import OpaqueLayer  # noqa: F401
from .attention_prompt_to_prompt import PromptToPrompt  # noqa: F401
from .attention_seam import attention_control  # noqa: F401
from .attention_source import KeepAttention
from .attention_spatial import SpatialControl  # noqa: F401
from .describe_captioner import caption_of  # noqa: F401
from .describe_completion import completed  # noqa: F401
from .describe_judge import DenoisingJudge  # noqa: F401
from .describe_stage import describe_picture  # noqa: F401
from .describe_vocabulary import read_vocabulary  # noqa: F401
from .edit_attention import EditControl  # noqa: F401
from .edit_loop import EDITS  # noqa: F401
from .edit_output import S2EditPipelineOutput
from .edit_pictures import edited_pictures  # noqa: F401
from .edit_settings import CROSS_REPLACE_STEPS, EDIT_PRESETS, EditRequest, EditSettings
from .edit_stage import edit_picture
from .edit_words import plan_edits  # noqa: F401
from .family_base import family_of  # noqa: F401
from .family_flow import FlowFamily  # noqa: F401
from .family_flux import FluxFamily  # noqa: F401
from .family_flux2 import Flux2KleinFamily  # noqa: F401
from .family_ip_adapter import loaded_adapters  # noqa: F401
from .family_language import LanguageModelFamily  # noqa: F401
from .family_qwen import QwenImageFamily  # noqa: F401
from .family_sd3 import StableDiffusion3Family  # noqa: F401
from .family_unet import UNetFamily  # noqa: F401
from .family_z_image import ZImageFamily  # noqa: F401
from .fit_checkpoint import FitCheckpoint  # noqa: F401
from .fit_loop import fit_weights  # noqa: F401
from .fit_lora_start import start_along_gradient  # noqa: F401
from .fit_losses import cosine  # noqa: F401
from .fit_objective import Objective  # noqa: F401
from .fit_settings import FitSettings  # noqa: F401
from .fit_stage import fit_picture  # noqa: F401
from .fit_weights import lora_weights  # noqa: F401
from .fit_words import sayings_of  # noqa: F401
from .identity_adapter import IdentityAdapter  # noqa: F401
from .identity_card import identity_card  # noqa: F401
from .identity_compression import compress  # noqa: F401
from .identity_files import read_identity  # noqa: F401
from .identity_fingerprint import fingerprint  # noqa: F401
from .identity_folder import atomic_folder  # noqa: F401
from .identity_lora_layers import LayerPlace  # noqa: F401
from .identity_lora_names import lora_metadata  # noqa: F401
from .identity_overlay import IdentityOverlay  # noqa: F401
from .identity_prompts import check_prompt  # noqa: F401
from .identity_schema import check_config  # noqa: F401
from .inversion_ddim import ddim_trajectory  # noqa: F401
from .inversion_edit_friendly import edit_friendly  # noqa: F401
from .inversion_files import read_inversion  # noqa: F401
from .inversion_null_text import null_text  # noqa: F401
from .inversion_origin import check_inversion  # noqa: F401
from .inversion_record import Inversion, is_finished
from .inversion_stage import InversionCall, invert_words
from .noise_guidance import guided  # noqa: F401
from .noise_schedule import NoiseSchedule  # noqa: F401
from .object_masks import mask_to_picture  # noqa: F401
from .object_search import object_mask  # noqa: F401
from .offloaded_weights import gathered  # noqa: F401
from .packed_weights import is_packed  # noqa: F401
from .picture_arrays import pixel_array  # noqa: F401
from .picture_compose import compose  # noqa: F401
from .picture_files import read_picture  # noqa: F401
from .picture_inputs import load_picture  # noqa: F401
from .picture_marks import with_origin  # noqa: F401
from .picture_metadata import exif_of  # noqa: F401
from .picture_modes import rgb_of  # noqa: F401
from .picture_placement import place_picture  # noqa: F401
from .picture_saving import save_picture  # noqa: F401
from .picture_sheet import picture_sheet  # noqa: F401
from .pipeline_adapters import AdapterLoaders
from .pipeline_arguments import (
    BOTH,
    DRAWING,
    arguments_of,
    check_adapters,
    check_call,
    check_drawing,
    check_editing,
    step_report,
    stock_names,
)
from .pipeline_components import PipelineComponents
from .pipeline_encoding import PromptEncoding
from .pipeline_facts import CallFacts
from .pipeline_fitting import IdentityFitting
from .pipeline_loaders import IdentityLoaders
from .pipeline_looks import Looks
from .pipeline_memory import memory_advice  # noqa: F401
from .pipeline_turns import Turns  # noqa: F401
from .pipeline_work import Work  # noqa: F401
from .prompt_alignment import align_prompts  # noqa: F401
from .prompt_changes import change_words  # noqa: F401
from .prompt_columns import TokenizedPrompt  # noqa: F401
from .prompt_embeds import PromptEmbeds  # noqa: F401
from .prompt_parts import pieces_of  # noqa: F401
from .prompt_tokenizing import tokenize  # noqa: F401
from .prompt_tokens import token_rows  # noqa: F401
from .prompt_words import insert_token  # noqa: F401
from .stock_drawing import draw


class S2EditPipeline(
    PipelineComponents,
    CallFacts,
    IdentityLoaders,
    AdapterLoaders,
    PromptEncoding,
    Looks,
    IdentityFitting,
    DiffusionPipeline,
    StableDiffusionMixin,
    TextualInversionLoaderMixin,
    StableDiffusionXLLoraLoaderMixin,  # without a second text encoder it is Stable Diffusion's own
    IPAdapterMixin,
    FromSingleFileMixin,
):
    """Identity-preserving editing of real pictures.

    Its components decide what kind of model it is, see ``family_base.family_of``; those it lacks are None.

    Args:
        vae: autoencoder between pictures and latents.
        text_encoder, tokenizer: the first text encoder.
        text_encoder_2, tokenizer_2, text_encoder_3, tokenizer_3: the others, where the model has them.
        unet, transformer: the denoiser, one of them, of a kind that is served.
        scheduler: its noise levels are read and it is never changed.
        safety_checker, feature_extractor: Stable Diffusion's own, or None.
        image_encoder: for IP-Adapter, or None.
        requires_safety_checker: only kept, so that Stable Diffusion's folders load.
        force_zeros_for_empty_prompt: whether SDXL is told zeros where there is no negative prompt.
        default_guidance_scale: what a call without ``guidance_scale=`` takes; None is S2Edit's 4.5.
        is_distilled: of FLUX.2 klein: whether it was distilled to few steps at one guidance; its folders say it.
        vocabulary: what :meth:`describe` puts descriptions together of, see ``describe_vocabulary``, or None.

    Raises:
        ValueError: a model that isn't served, or components that hold another pipeline's identities.
    """

    def invert(
        self,
        image: Any,
        prompt: str,
        method: str | None = None,
        num_inference_steps: int | None = None,
        *,
        identity: Any = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        generator: torch.Generator | None = None,
        crop: Any = "auto",
        height: int | None = None,
        width: int | None = None,
        clip_skip: int | None = None,
        keep_attention: KeepAttention | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        stop: Any = None,
        seed: int | None = None,
    ) -> Inversion:
        """From a picture to the noise that leads back to it under ``prompt``.

        Args:
            image: the picture.
            prompt: the source prompt; of a loaded (or passed) identity the token is put before its subject by itself.
            method: "direct" (Ju et al. 2023), "ddim" (Song et al. 2021), "null_text" (Mokady et al. 2023),
                "negative_prompt" (Miyake et al. 2023), "fixed_point" (Pan et al. 2023) or "edit_friendly"
                (Huberman-Spiegelglas et al. 2024); of flows also "midpoint" (RF-Solver, Wang et al. 2024) and
                "flowedit" (Kulikov et al. 2024). None is the model's best: "direct", of few steps of a flow
                "flowedit".
            num_inference_steps: of the inversion and of the edits that use it; None takes the model's own, 50 of a
                diffusion.
            identity: an identity to load for this call.
            guidance_scale, negative_prompt: what "null_text" optimises for and starts from; "flowedit" guides the
                source by the first; the others serve any, and refuse them.
            generator: of "edit_friendly"'s and "flowedit"'s noise; the others draw none, and refuse it.
            crop: as in :meth:`fit_identity`: "auto" works where an identity was fitted to this picture, else close up
                at the subject of ``prompt`` where that fills little of a large picture. The edits work there too.
            keep_attention: how much of the source's attention is kept, where the source is pinned to its trajectory
                ("direct", "fixed_point", "midpoint", "edit_friendly", "flowedit"), so that no edit has to ask for it
                again. None is ``KeepAttention()`` of a U-Net: of 40 % of the steps, at most 1 GiB; of a transformer
                with joint attention, whose layers are larger, where the words look alone.
            callback_on_step_end: ``f(pipe, step, timestep, {"latents": ...})``.
            stop: a ``threading.Event``; its ``set()``, from any thread, stops this call after the step. What there is
                comes back and says ``interrupted``.
            seed: in place of ``generator`` a new one that begins there.

        Raises:
            TypeError, ValueError: an input that can't be used; nothing has been done then.
        """
        given, family = arguments_of(_INVERT, locals()), self.family
        steps = family.default_steps if num_inference_steps is None else num_inference_steps
        method = family.default_inversion(steps) if method is None else method
        alone = check_call(given, "an inversion", method)
        report = step_report(self, callback_on_step_end, ("latents",))
        with self._at_work(identity, stop, report, alone) as (work, token):
            call = InversionCall(
                image=image, prompt=prompt, method=method, identity_token=token,
                num_inference_steps=steps, guidance_scale=guidance_scale,
                negative_prompt=negative_prompt, size=(height, width), clip_skip=clip_skip,
                generator=given["generator"], keep=keep_attention, crop=crop,
            )  # fmt: skip
            return invert_words(work, call)

    @overload
    def __call__(
        self,
        prompt: str | list[str] | None = ...,
        image: Any = ...,
        source_prompt: str | None = ...,
        identity: Any = ...,
        inversion: Inversion | str | None = ...,
        num_inference_steps: int | None = ...,
        guidance_scale: float | None = ...,
        cross_replace_steps: float | Mapping[str, float] = ...,
        self_replace_steps: float | None = ...,
        reweight: Mapping[str, float] | None = ...,
        blend_words: Sequence[str] | bool | None = ...,
        edit_mask: Any = ...,
        generator: torch.Generator | list[torch.Generator] | None = ...,
        output_type: str = ...,
        return_dict: Literal[True] = ...,
        callback_on_step_end: Callable[..., Any] | None = ...,
        *,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ...,
        preset: str | None = ...,
        edit: str = ...,
        edit_method: str = ...,
        blend_threshold: float = ...,
        change_threshold: float = ...,
        guidance_rescale: float = ...,
        guidance_stop: float | None = ...,
        residuals: bool = ...,
        strength: float = ...,
        keep_words: Sequence[str] | None = ...,
        keep_pixels: bool = ...,
        output_size: str = ...,
        crop: Any = ...,
        negative_prompt: str | list[str] | None = ...,
        num_images_per_prompt: int = ...,
        prompt_embeds: torch.Tensor | None = ...,
        negative_prompt_embeds: torch.Tensor | None = ...,
        pooled_prompt_embeds: torch.Tensor | None = ...,
        negative_pooled_prompt_embeds: torch.Tensor | None = ...,
        original_size: tuple[int, int] | None = ...,
        crops_coords_top_left: tuple[int, int] = ...,
        target_size: tuple[int, int] | None = ...,
        latents: torch.Tensor | None = ...,
        height: int | None = ...,
        width: int | None = ...,
        clip_skip: int | None = ...,
        return_attention_maps: bool = ...,
        keep_attention: KeepAttention | None = ...,
        ip_adapter_image: Any = ...,
        ip_adapter_image_embeds: list[torch.Tensor] | None = ...,
        cross_attention_kwargs: Mapping[str, Any] | None = ...,
        complete_prompt: bool | None = ...,
        stop: Any = ...,
        seed: int | Sequence[int] | None = ...,
        **stock_arguments: Any,
    ) -> S2EditPipelineOutput: ...

    @overload
    def __call__(
        self, prompt: Any = ..., image: Any = ..., source_prompt: Any = ..., *, return_dict: Literal[False], **more: Any
    ) -> tuple[Any, ...]: ...

    @overload
    def __call__(
        self, prompt: Any = ..., image: Any = ..., source_prompt: Any = ..., *, return_dict: bool, **more: Any
    ) -> S2EditPipelineOutput | tuple[Any, ...]: ...

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Any = None,
        source_prompt: str | None = None,
        identity: Any = None,
        inversion: Inversion | str | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        cross_replace_steps: float | Mapping[str, float] = CROSS_REPLACE_STEPS,
        self_replace_steps: float | None = None,
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
        edit_method: str = "prompt_to_prompt",
        blend_threshold: float = EditSettings.blend_threshold,
        change_threshold: float = EditSettings.change_threshold,
        guidance_rescale: float = 0.0,
        guidance_stop: float | None = None,
        residuals: bool = True,
        strength: float = 1.0,
        keep_words: Sequence[str] | None = None,
        keep_pixels: bool = True,
        output_size: str = "picture",
        crop: Any = "auto",
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
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        complete_prompt: bool | None = None,
        stop: Any = None,
        seed: int | Sequence[int] | None = None,
        **stock_arguments: Any,
    ) -> S2EditPipelineOutput | tuple[Any, ...]:
        """Edit a picture by words (S2Edit, stage two), or draw the identity anew where ``image`` is None.

        Args:
            prompt: the target prompt, or several: all edits share one inversion. ``[I]`` in it is put into
                ``source_prompt`` by itself, before the identity's subject.
            image: the picture to edit.
            source_prompt: what it shows; None takes the identity's own, or without one what :meth:`describe` says.
            identity: an identity to use for this call, or the token of a loaded one.
            inversion: what :meth:`invert` returned, or a method's name; None is the model's best: "direct", of few
                steps of a flow "flowedit".
            num_inference_steps: None takes the inversion's own, or the model's: 50 of a diffusion.
            guidance_scale, cross_replace_steps, self_replace_steps, reweight, blend_words, keep_words, edit,
                guidance_rescale, guidance_stop, blend_threshold, change_threshold, strength, residuals: how to edit,
                see ``edit_settings.EditSettings``; None takes the model's own, of ``guidance_scale`` 4.5 or its
                ``default_guidance_scale``.
            preset: "paper" is the paper's reading in one word (null-text inversion, guided to the end, not confined),
                see ``edit_settings.EDIT_PRESETS``; what is passed beside it wins, an inversion among it, and
                ``blend_words=True`` for None's confinement.
            edit_method: how the targets are made beside the source; ``edit_loop.register_edit`` makes others known.
            edit_mask: where the edit may change the picture, white inside; replaces the words' own region, so that
                ``keep_words`` doesn't go with it.
            keep_pixels: outside the region the picture's own pixels, to the bit, and what the autoencoder lost given
                back where the edit changed nothing, see ``picture_compose``; False: all as the autoencoder gives it.
            output_size: "picture": as large as ``image``, in its mode; "model": as large as it was worked at.
            crop: as in :meth:`invert`; "auto" works at all of the picture where the words change its background or
                place, and close up at ``edit_mask`` where one is given.
            generator: of the noise, without ``image`` or with ``inversion="edit_friendly"``.
            output_type: "pil", "np", "pt" or "latent".
            callback_on_step_end: ``f(pipe, step, timestep, tensors)``; it may return tensors by the names that it was
                shown, and set ``pipe._guidance_scale`` for the steps to come.
            negative_prompt: what to steer away from; without ``image`` also a list, one for each prompt.
            num_images_per_prompt, latents, prompt_embeds, negative_prompt_embeds, and SDXL's pooled_prompt_embeds,
                negative_pooled_prompt_embeds, original_size, crops_coords_top_left, target_size: only without
                ``image``; an edit of a picture is deterministic, needs the words, and is as large as it is.
            return_attention_maps: also return where each word of the first target looked.
            keep_attention: where the inversion is made here: how much of the source's attention is kept meanwhile, as
                in :meth:`invert`; its ``share`` is what the edit needs. None keeps only where its words look: the
                source is asked again at the steps that take its attention over, in the least memory.
            ip_adapter_image, ip_adapter_image_embeds: what a loaded IP-Adapter is shown; in an edit the targets alone
                are, the source stays the bare model's.
            cross_attention_kwargs: "scale" weighs the LoRAs that are loaded (not the identities), "ip_adapter_masks"
                says where each of IP-Adapter's pictures counts.
            complete_prompt: add to all prompts what :meth:`describe` says besides; None: where no source is known.
            stop: a ``threading.Event``; its ``set()``, from any thread, stops this call after the step. What there is
                comes back and says ``interrupted``.
            seed: in place of ``generator`` a new one that begins there; without ``image`` also a list, one for each
                picture.
            stock_arguments: only without ``image``: whatever else diffusers' own pipeline of this model takes.

        Returns:
            ``S2EditPipelineOutput``, or with ``return_dict=False`` the tuple of its fields, images first, those that
            weren't asked for None.

        Raises:
            TypeError, ValueError: an input that can't be used; nothing has been done then.
        """
        given = arguments_of(_CALL, locals())
        chosen = with_preset(
            preset, EDIT_PRESETS, given.only(("inversion", "guidance_scale", "guidance_stop", "blend_words"))
        )
        family = self.family
        defaults = {"guidance_scale": family.default_guidance_scale, **family.edit_defaults}
        settings = EditSettings.of(given.values, chosen, defaults)
        steps = family.default_steps if num_inference_steps is None else num_inference_steps
        lora_scale, shown = check_adapters(given)
        if image is None and not is_finished(inversion):
            names = check_drawing(given, stock_arguments)
            drawn = {
                **stock_arguments, **given.only((*BOTH, *DRAWING)), "guidance_scale": settings.guidance_scale,
                "num_inference_steps": steps, **stock_names(shown),
            }  # fmt: skip
            with self._at_work(identity, stop, lambda call: None, lora_scale=lora_scale) as (work, token):
                output = draw(work, drawn, callback_on_step_end, names, token)
        else:
            method = chosen.get("inversion") or family.default_inversion(steps)
            names = check_editing(given, stock_arguments)
            alone = check_call(given, "an edit", method)
            report = step_report(self, callback_on_step_end, names)
            with self._at_work(identity, stop, report, alone, lora_scale) as (work, token):
                request = EditRequest(
                    prompts=[prompt] if isinstance(prompt, str) else list(prompt or []), image=image,
                    source_prompt=source_prompt, identity_token=token, inversion=method, settings=settings,
                    num_inference_steps=num_inference_steps, negative_prompt=negative_prompt, edit_mask=edit_mask,
                    keep_pixels=keep_pixels, size=(height, width), clip_skip=clip_skip, generator=given["generator"],
                    keep_attention=keep_attention, output_type=output_type,
                    return_attention_maps=return_attention_maps, output_size=output_size, crop=crop, shown=shown,
                    complete_prompt=complete_prompt, method=edit_method,
                )  # fmt: skip
                output = edit_picture(work, request)
        return output if return_dict else tuple(getattr(output, field.name) for field in fields(output))


_CALL, _INVERT = S2EditPipeline.__call__, S2EditPipeline.invert  # whatever is put around them later
