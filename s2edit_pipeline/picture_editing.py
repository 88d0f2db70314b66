"""Stage two in the pipeline: a picture's inversion, and the edits that start from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import PIL.Image
import torch

from .attention_control import (
    AttentionController,
    Controllers,
    PromptToPrompt,
    Reweighting,
    SpatialControl,
    attention_control,
    mask_at,
)
from .ddim_steps import NoiseSchedule, noise_schedule
from .edit_control import BranchRows, EditControl
from .edit_plan import plan_edits
from .edit_sampling import EditSettings, sample_edits
from .identity_loading import IdentityLoading
from .latent_inversion import INVERSIONS, PINNED, Inversion, check_method, num_inversion_steps
from .object_masks import feather, mask_to_picture
from .picture_inputs import load_mask, load_picture, picture_to_tensor
from .pipeline_output import S2EditPipelineOutput
from .pipeline_parts import Denoise
from .prompt_alignment import TokenizedPrompt
from .prompt_encoding import PromptEmbeds, join_pooled
from .source_attention import AttentionKeeper, KeepAttention, SourceAttention


class PictureEditing(IdentityLoading):
    """Mixed into the pipeline: inversion and edits."""

    def _invert(
        self,
        latents: torch.Tensor,
        prompt: TokenizedPrompt,
        encoded: PromptEmbeds,
        negative: PromptEmbeds,
        method: str,
        schedule: NoiseSchedule,
        guidance_scale: float,
        generator: torch.Generator | None,
        clip_skip: int | None,
        keep: KeepAttention,
    ) -> Inversion:
        """See ``S2EditPipeline.invert``; the picture's ``latents`` are (1, C, h, w), ``encoded`` is ``prompt``'s."""
        size = latents.shape[-2:]
        size_ids = self._size_ids(*size)
        pinned = method in PINNED
        keeper = None
        if pinned and keep.max_bytes:
            keeper = AttentionKeeper(keep, schedule.num_steps, self._map_queries(*size))
        # null-text also asks for the unconditional branch, which holds no token: nothing to mask there
        asks = _SourceOrNot(self._spatial_control([prompt]), keeper)
        denoisers = {
            True: self._denoiser(schedule, encoded.pooled, size_ids),
            False: self._denoiser(schedule, negative.pooled, size_ids),
        }

        def denoise(x: torch.Tensor, level: int, prompt_embeds: torch.Tensor) -> torch.Tensor:
            is_source = prompt_embeds is encoded.embeds
            asks.begin(is_source, level)
            return denoisers[is_source](x, level, prompt_embeds)

        with (
            self._frozen_unet(),
            attention_control(self.unet, asks, *size),
            self.progress_bar(total=num_inversion_steps(method, schedule.num_steps)) as bar,
        ):
            found = INVERSIONS[method](
                denoise, latents, schedule, encoded.embeds, negative.embeds, guidance_scale, generator,
                lambda _: bar.update(),
            )  # fmt: skip
            if keeper is not None and keeper.first_kept <= schedule.num_steps not in keeper.maps:
                # the walk up never asks at the noise that it ends in, where an edit begins
                with torch.no_grad():
                    denoise(found.trajectory[-1:], schedule.num_steps, encoded.embeds)
        tokens = self._tokens_in([prompt.text])
        return Inversion(
            method=method,
            prompt=prompt.text,
            trajectory=found.trajectory,
            unconditional_embeds=found.unconditional_embeds,
            residuals=found.residuals,
            guidance_scale=guidance_scale if method == "null_text" else None,
            identities={token: self._identity_state(token) for token in tokens},
            base_model=self._base_name(),
            clip_skip=clip_skip,
            attention=None if keeper is None else keeper.kept(self._model_state(schedule)),
        )

    def _model_state(self, schedule: NoiseSchedule) -> str:
        """What an evaluation of the U-Net depends on besides what goes in."""
        identities = {token: self._identity_state(token) for token in self._loaded.identities}
        adapters = sorted(getattr(self.unet, "peft_config", {}))
        return repr((self._base_name(), identities, adapters, schedule.timesteps.tolist()))

    @contextmanager
    def _frozen_unet(self) -> Iterator[None]:
        """Null-text differentiates through the U-Net, not with respect to it."""
        held = [(p, p.requires_grad) for p in self.unet.parameters()]
        self.unet.requires_grad_(False)
        try:
            yield
        finally:
            for parameter, required in held:
                parameter.requires_grad_(required)

    def _check_inversion(
        self, inversion: Any, source_prompt: str, steps: int | None, guidance_scale: float, clip_skip: int | None
    ) -> None:
        if not hasattr(inversion, "trajectory"):
            raise TypeError(
                f"inversion must be what pipe.invert(...) returns, or a method's name, not {type(inversion).__name__}."
            )
        if steps is not None and steps != inversion.num_inference_steps:
            raise ValueError(
                f"num_inference_steps={steps}, but the inversion was made in {inversion.num_inference_steps}; "
                f"leave it out, or call pipe.invert(..., num_inference_steps={steps})."
            )
        for token, state in inversion.identities.items():
            if token not in self._loaded.identities or self._identity_state(token) != state:
                loaded = "another identity, scale or mask is" if token in self._loaded.identities else "it isn't"
                raise ValueError(
                    f"The inversion was made with the identity {token!r}, and {loaded} loaded under that name. "
                    "Pass the same one, identity=..., or invert again without it."
                )
        if inversion.prompt != source_prompt:
            raise ValueError(
                f"The inversion was made under {inversion.prompt!r} and the edit's source prompt is {source_prompt!r}; "
                "invert under the same words, with the same identity loaded: pipe.invert(image, source_prompt, "
                "identity=identity)."
            )
        if inversion.guidance_scale is not None and inversion.guidance_scale != guidance_scale:
            raise ValueError(
                f"The null-text inversion was optimised for guidance_scale={inversion.guidance_scale:g}, not "
                f"{guidance_scale:g}; use that, or call pipe.invert(..., guidance_scale={guidance_scale:g})."
            )
        if inversion.clip_skip != clip_skip:
            raise ValueError(
                f"The inversion was made with clip_skip={inversion.clip_skip}, not {clip_skip}; use that, or invert "
                "again: pipe.invert(..., clip_skip=...)."
            )
        shape = inversion.trajectory.shape[1]
        if shape != self.unet.config.in_channels:
            raise ValueError(f"The inversion has {shape} latent channels, this model {self.unet.config.in_channels}.")

    def _edit(
        self,
        prompt: str | list[str] | None,
        image: Any,
        source_prompt: str | None,
        asked: str | None,
        inversion: Inversion | str | None,
        num_inference_steps: int | None,
        settings: EditSettings,
        edit_mask: Any,
        keep_pixels: bool,
        generator: torch.Generator | list[torch.Generator] | None,
        call_back: Callable[[int, int, dict[str, torch.Tensor]], torch.Tensor | None],
        negative_prompt: Any,
        height: int | None,
        width: int | None,
        clip_skip: int | None,
        return_attention_maps: bool,
        output_type: str,
        keep_attention: KeepAttention | None,
    ) -> S2EditPipelineOutput:
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
        if not prompts:
            raise ValueError("Pass the target prompt: pipe('a photo of a [I] lady', image=image, source_prompt=...).")
        for text in prompts:
            self._check_prompt(text, "prompt")
        inverted_prompt = str(getattr(inversion, "prompt", ""))
        present = self._tokens_in([*prompts, inverted_prompt])
        if source_prompt is None:
            known = [*present, *([asked] if asked is not None else [])]
            named = [inverted_prompt, *(self._loaded.identities[t].adapter.source_prompt for t in known)]
            source_prompt = next((text for text in named if text), None)
            if source_prompt is None:
                raise ValueError("Pass source_prompt=, what the picture shows now: 'a photo of a lady with glasses'.")
        self._check_prompt(source_prompt, "source_prompt")
        source_prompt = self._source_prompt(source_prompt, present)
        source, targets = self._tokenize(source_prompt), [self._tokenize(text) for text in prompts]
        self._tokenize(negative_prompt or "")  # refused here if it is too long
        picture = None if image is None else load_picture(image)
        latent_size: tuple[int, int]
        if inversion is None or isinstance(inversion, str):
            assert picture is not None  # else it would have been drawn from noise
            method = inversion or "direct"
            check_method(method)
            if method == "null_text":
                self._check_autograd()
            schedule = noise_schedule(self.scheduler, 50 if num_inference_steps is None else num_inference_steps)
            size = self._working_size(picture, height, width)
            latent_size = (size[0] // self.vae_scale_factor, size[1] // self.vae_scale_factor)
        else:
            self._check_inversion(inversion, source_prompt, num_inference_steps, settings.guidance_scale, clip_skip)
            schedule = noise_schedule(self.scheduler, inversion.num_inference_steps)
            latent_size = (inversion.trajectory.shape[-2], inversion.trajectory.shape[-1])
        out_height, out_width = (side * self.vae_scale_factor for side in latent_size)
        region = None
        if edit_mask is not None:
            shown_size = (out_width, out_height) if picture is None else picture.size
            region = mask_at(load_mask(edit_mask, shown_size, "edit_mask"), *latent_size).to(self._execution_device)
        plans = plan_edits(source, targets, settings, num_steps=schedule.num_steps, region=region)
        if isinstance(generator, (list, tuple)):
            raise ValueError(f"generator must be one for an edit, not {len(generator)}: all edits share one inversion.")

        prompt_to_prompt = PromptToPrompt(
            alignments=[plan.alignment for plan in plans],
            cross_until=[plan.cross_until for plan in plans],
            self_until=round(settings.self_replace_steps * schedule.num_steps),
            max_self_queries=self._map_queries(*latent_size)[0],
        )
        encoded_source = self._encode_prompts([source], clip_skip)
        encoded_targets = self._encode_prompts(targets, clip_skip)
        negative = self._encode_negative(negative_prompt, encoded_source, clip_skip)
        if inversion is None or isinstance(inversion, str):
            assert picture is not None
            found = self._encode_picture(picture, *size)
            needed = min(1.0, prompt_to_prompt.active_until / schedule.num_steps)
            # for one call it isn't worth the memory: each step's source is asked once, for all targets
            keep = KeepAttention(share=0.0) if keep_attention is None else replace(keep_attention, share=needed)
            inversion = self._invert(
                found, source, encoded_source, negative, method, schedule, settings.guidance_scale, generator,
                clip_skip, keep,
            )  # fmt: skip
        # negative-prompt inversion asks the unconditional branch with the source's words, [I] among them
        as_source = inversion.method == "negative_prompt"
        unconditional, encoded_unconditional = (source, encoded_source) if as_source else (None, negative)

        def spatial_control(rows: BranchRows) -> SpatialControl:
            plain = [unconditional] * rows.num_unconditional
            return self._spatial_control([*[source] * rows.source, *plain, *targets[: rows.num_targets]])

        @cache
        def denoiser(rows: BranchRows) -> Denoise:
            plain = [encoded_unconditional] * rows.num_unconditional
            asked = [encoded_targets] if rows.num_targets else []
            pooled = join_pooled([*[encoded_source] * rows.source, *plain, *asked])
            return self._denoiser(schedule, pooled, self._size_ids(*latent_size))

        def denoise(x: torch.Tensor, level: int, prompt_embeds: torch.Tensor, rows: BranchRows) -> torch.Tensor:
            return denoiser(rows)(x, level, prompt_embeds)

        control = EditControl(
            spatial_control,
            prompt_to_prompt,
            self._map_queries(*latent_size),
            Reweighting([plan.weights for plan in plans]),
            inversion.attention
            if inversion.attention is not None and inversion.attention.made_with == self._model_state(schedule)
            else None,
            maps=return_attention_maps
            or any(p.confinement is not None and p.confinement.region is None for p in plans),
        )
        tensors = {"prompt_embeds": encoded_targets.embeds, "negative_prompt_embeds": negative.embeds}
        with (
            attention_control(self.unet, control, *latent_size),
            self.progress_bar(total=settings.num_steps(schedule)) as bar,
        ):

            def on_step(step: int, level: int, x: torch.Tensor) -> torch.Tensor | None:
                bar.update()
                return call_back(step, int(schedule.timesteps[level - 1]), {"latents": x, **tensors})

            edited = sample_edits(
                denoise, schedule, inversion, encoded_source.embeds, encoded_targets.embeds, negative.embeds, settings,
                control, [plan.confinement for plan in plans], on_step,
            )  # fmt: skip
        control.kept = SourceAttention()  # before the autoencoder needs the room
        kept = None
        if keep_pixels:
            assert picture is not None
            everywhere = torch.ones(latent_size)
            weights = [
                feather(everywhere if r is None else r.cpu(), out_height, out_width, self.vae_scale_factor)
                for r in edited.regions
            ]
            kept = (picture_to_tensor(picture, out_height, out_width), torch.stack(weights)[:, None])
        images, flagged = self._finish(edited.targets, output_type, kept)
        # the source is the caller's own picture
        decoded = edited.source
        if output_type != "latent":
            decoded = self.image_processor.postprocess(self._decode(edited.source), output_type=output_type)
        size_of_output = (out_width, out_height)
        maps = None
        if return_attention_maps:
            words = targets[0].words
            looks = control.looks(0, (), [word.tokens for word in words], torch.Size(latent_size))
            maps = {word.text: _map_picture(look, size_of_output) for word, look in zip(words, looks, strict=True)}
        return S2EditPipelineOutput(
            images=images,
            attention_maps=maps,
            edit_masks=[None if r is None else mask_to_picture(r, size_of_output) for r in edited.regions],
            source=decoded[0] if output_type == "pil" else decoded,
            nsfw_content_detected=flagged,
        )


class _SourceOrNot(Controllers):
    """The source's controls where its branch is asked, none where the unconditional one is."""

    def __init__(self, spatial_control: SpatialControl, keeper: AttentionKeeper | None) -> None:
        super().__init__(())
        self.keeper = keeper
        self.of_source: list[AttentionController] = [spatial_control, *([] if keeper is None else [keeper])]

    def begin(self, is_source: bool, level: int) -> None:
        """Be told of the next evaluation."""
        self.controllers = tuple(self.of_source) if is_source else ()
        if is_source and self.keeper is not None:
            self.keeper.begin(level)


def _map_picture(attention: torch.Tensor, size: tuple[int, int]) -> PIL.Image.Image:
    values = (attention / attention.max().clamp(min=1e-12) * 255).round().byte().cpu().numpy()
    return PIL.Image.fromarray(values).resize(size, PIL.Image.Resampling.BICUBIC)
