"""Stage two in the pipeline: a picture's inversion, and the edits that start from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import PIL.Image
import torch

from .attention_control import (
    AttentionController,
    Controllers,
    MapRecorder,
    PromptToPrompt,
    Reweighting,
    attention_control,
    mask_at,
)
from .ddim_steps import NoiseSchedule, noise_schedule
from .edit_plan import plan_edits
from .edit_sampling import BranchRows, EditSettings, sample_edits
from .identity_loading import IdentityLoading
from .latent_inversion import INVERSIONS, Inversion, check_method, num_inversion_steps
from .object_masks import feather, mask_to_picture
from .picture_inputs import load_mask, load_picture, picture_to_tensor
from .pipeline_output import S2EditPipelineOutput
from .prompt_alignment import TokenizedPrompt
from .prompt_encoding import join_pooled


class PictureEditing(IdentityLoading):
    """Mixed into the pipeline: inversion and edits."""

    def _invert(
        self,
        latents: torch.Tensor,
        prompt: TokenizedPrompt,
        method: str,
        schedule: NoiseSchedule,
        guidance_scale: float,
        negative_prompt: str | None,
        generator: torch.Generator | None,
        clip_skip: int | None,
    ) -> Inversion:
        """See ``S2EditPipeline.invert``; the picture's ``latents`` are (1, C, h, w)."""
        encoded = self._encode_prompts([prompt], clip_skip)
        negative = self._encode_negative(negative_prompt, encoded, clip_skip)
        embeds, size_ids = encoded.embeds, self._size_ids(*latents.shape[-2:])
        denoisers = {
            True: self._denoiser(schedule, encoded.pooled, size_ids),
            False: self._denoiser(schedule, negative.pooled, size_ids),
        }
        controls = {True: self._spatial_control([prompt]), False: self._spatial_control([None])}
        # null-text also asks for the unconditional branch, which holds no token: nothing to mask there
        controlled = _ByPrompt(controls)

        def denoise_controlled(x: torch.Tensor, level: int, prompt_embeds: torch.Tensor) -> torch.Tensor:
            controlled.is_source = prompt_embeds is embeds
            return denoisers[controlled.is_source](x, level, prompt_embeds)

        with (
            self._frozen_unet(),
            attention_control(self.unet, controlled, *latents.shape[-2:]),
            self.progress_bar(total=num_inversion_steps(method, schedule.num_steps)) as bar,
        ):
            found = INVERSIONS[method](
                denoise_controlled, latents, schedule, embeds, negative.embeds, guidance_scale, generator,
                lambda _: bar.update(),
            )  # fmt: skip
        tokens = self._tokens_in([prompt.text])
        return Inversion(
            method=method,
            prompt=prompt.text,
            trajectory=found.trajectory,
            unconditional_embeds=found.unconditional_embeds,
            residuals=found.residuals,
            guidance_scale=guidance_scale if method == "null_text" else None,
            identities={token: self._loaded.adapters[token][0].digest for token in tokens},
            base_model=self._base_name(),
        )

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

    def _check_inversion(self, inversion: Any, source_prompt: str, steps: int | None, guidance_scale: float) -> None:
        if not hasattr(inversion, "trajectory"):
            raise TypeError(
                f"inversion must be what pipe.invert(...) returns, or a method's name, not {type(inversion).__name__}."
            )
        if steps is not None and steps != inversion.num_inference_steps:
            raise ValueError(
                f"num_inference_steps={steps}, but the inversion was made in {inversion.num_inference_steps}; "
                f"leave it out, or call pipe.invert(..., num_inference_steps={steps})."
            )
        for token, digest in inversion.identities.items():
            adapter, _ = self._loaded.adapters.get(token, (None, 1.0))
            if adapter is None or adapter.digest != digest:
                loaded = "another identity is" if adapter is not None else "it isn't"
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
            named = [inverted_prompt, *(self._loaded.adapters[t][0].source_prompt for t in known)]
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
            self._check_inversion(inversion, source_prompt, num_inference_steps, settings.guidance_scale)
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

        if inversion is None or isinstance(inversion, str):
            assert picture is not None
            found = self._encode_picture(picture, *size)
            inversion = self._invert(
                found, source, method, schedule, settings.guidance_scale, negative_prompt, generator, clip_skip
            )
        encoded_source = self._encode_prompts([source], clip_skip)
        encoded_targets = self._encode_prompts(targets, clip_skip)
        negative = self._encode_negative(negative_prompt, encoded_source, clip_skip)
        rows = BranchRows(len(targets), source_unconditional=not inversion.pinned)
        # negative-prompt inversion asks the unconditional branch with the source's words, [I] among them
        unconditional = source if inversion.method == "negative_prompt" else None
        num_plain = len(targets) + int(rows.source_unconditional)
        plain = [unconditional] * num_plain
        encoded_plain = (negative if unconditional is None else encoded_source).repeat(num_plain)
        pooled = join_pooled([encoded_source, encoded_plain, encoded_targets])
        denoise = self._denoiser(schedule, pooled, self._size_ids(*latent_size))
        prompt_to_prompt = PromptToPrompt(
            source_row=0,
            target_rows=rows.conditional_rows,
            alignments=[plan.alignment for plan in plans],
            cross_until=[plan.cross_until for plan in plans],
            self_until=round(settings.self_replace_steps * schedule.num_steps),
            max_self_queries=self._map_queries(*latent_size)[0],
        )
        recorder = MapRecorder(*self._map_queries(*latent_size))
        reweighting = Reweighting(rows.conditional_rows, [plan.weights for plan in plans])
        # the source is masked before its maps are taken over; the targets' own columns are masked with it, and a
        # column that was taken over is 0 already wherever the mask is. Where a word looks is read before it is weighed
        masks = self._spatial_control([source, *plain, *targets])
        control = Controllers([masks, prompt_to_prompt, recorder, reweighting])
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
                prompt_to_prompt, recorder, [plan.confinement for plan in plans], on_step,
            )  # fmt: skip
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
            maps = {
                word.text: _map_picture(
                    recorder.word_map(rows.conditional_rows[0], word.tokens, *latent_size), size_of_output
                )
                for word in targets[0].words
            }
        return S2EditPipelineOutput(
            images=images,
            attention_maps=maps,
            edit_masks=[None if r is None else mask_to_picture(r, size_of_output) for r in edited.regions],
            source=decoded[0] if output_type == "pil" else decoded,
            nsfw_content_detected=flagged,
        )


class _ByPrompt:
    """One control for the source's branch, another for the unconditional one, by which of them asks."""

    def __init__(self, controls: Mapping[bool, AttentionController]) -> None:
        self.controls, self.is_source = controls, True

    def wants(self, site: Any) -> bool:
        return self.controls[self.is_source].wants(site)

    def __call__(self, probs: torch.Tensor, site: Any) -> torch.Tensor:
        return self.controls[self.is_source](probs, site)


def _map_picture(attention: torch.Tensor, size: tuple[int, int]) -> PIL.Image.Image:
    values = (attention / attention.max().clamp(min=1e-12) * 255).round().byte().cpu().numpy()
    return PIL.Image.fromarray(values).resize(size, PIL.Image.Resampling.BICUBIC)
