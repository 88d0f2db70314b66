"""Drawing from noise, as diffusers' own pipelines do, with what is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from .attention_control import attention_control
from .ddim_steps import noise_schedule
from .edit_sampling import sample_from_noise
from .identity_loading import IdentityLoading
from .pipeline_output import S2EditPipelineOutput
from .prompt_columns import TokenizedPrompt
from .prompt_encoding import PromptEmbeds, join, join_pooled


class NoiseDrawing(IdentityLoading):
    """Mixed into the pipeline: what it does without a picture."""

    def _draw(
        self,
        prompt: str | list[str] | None,
        num_inference_steps: int | None,
        guidance_scale: float,
        guidance_rescale: float,
        generator: torch.Generator | list[torch.Generator] | None,
        call_back: Callable[[int, int, dict[str, torch.Tensor]], torch.Tensor | None],
        negative_prompt: str | list[str] | None,
        num_images_per_prompt: int,
        prompt_embeds: torch.Tensor | None,
        negative_prompt_embeds: torch.Tensor | None,
        pooled_prompt_embeds: torch.Tensor | None,
        negative_pooled_prompt_embeds: torch.Tensor | None,
        sizes: Mapping[str, Any],
        latents: torch.Tensor | None,
        height: int | None,
        width: int | None,
        clip_skip: int | None,
        output_type: str,
    ) -> S2EditPipelineOutput:
        """See ``S2EditPipeline.__call__``; ``sizes`` as :meth:`_size_ids` takes them.

        Draw from noise; a loaded identity's mask applies here too: it stays where it was in its picture.
        """
        schedule = noise_schedule(self.scheduler, 50 if num_inference_steps is None else num_inference_steps)
        listed = isinstance(negative_prompt, (list, tuple))
        negatives: list[Any] = list(negative_prompt or []) if listed else [negative_prompt]
        count = len(prompt_embeds) if prompt_embeds is not None else 1 if isinstance(prompt, str) else len(prompt or [])
        if listed and len(negatives) != count:
            raise ValueError(f"negative_prompt lists {len(negatives)} for {count} prompts; give one for all, or each.")
        if not isinstance(num_images_per_prompt, int) or num_images_per_prompt < 1:
            raise ValueError(
                f"num_images_per_prompt must be a whole number of at least 1, not {num_images_per_prompt!r}."
            )
        for name, given, pooled in (
            ("prompt_embeds", prompt_embeds, pooled_prompt_embeds),
            ("negative_prompt_embeds", negative_prompt_embeds, negative_pooled_prompt_embeds),
        ):
            if pooled is not None and given is None:
                raise ValueError(f"{_pooled(name)} goes with {name}: pass both, or the words instead of either.")
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError("negative_prompt and negative_prompt_embeds say the same twice; pass one of them.")
        if negative_prompt_embeds is not None and len(negative_prompt_embeds) not in (1, count):
            raise ValueError(
                f"negative_prompt_embeds has {len(negative_prompt_embeds)} rows for {count} prompts; give one for all, "
                "or each."
            )
        for name, side in (("height", height), ("width", width)):
            if side is not None and (not isinstance(side, int) or side < 1 or side % self.vae_scale_factor):
                raise ValueError(f"{name} must be a positive multiple of {self.vae_scale_factor}, not {side!r}.")
        prompts: list[TokenizedPrompt | None]
        if prompt_embeds is None:
            texts = [prompt] if isinstance(prompt, str) else list(prompt or [])
            if not texts:
                raise ValueError("Pass prompt= (or prompt_embeds=); with image= as well to edit a picture.")
            tokenized = [self._tokenize(text) for text in texts]
            conditional = self._encode_prompts(tokenized, clip_skip)
            prompts = [t for t in tokenized for _ in range(num_images_per_prompt)]
        else:
            conditional = self._given("prompt_embeds", prompt_embeds, pooled_prompt_embeds)
            prompts = [None] * (len(conditional) * num_images_per_prompt)
        conditional = conditional.repeat(num_images_per_prompt)
        if negative_prompt_embeds is None:
            negative = join([self._encode_negative(text, conditional, clip_skip) for text in negatives])
        else:
            negative = self._given("negative_prompt_embeds", negative_prompt_embeds, negative_pooled_prompt_embeds)
        negative = negative.repeat(len(conditional) // len(negative))
        sample_size = self.unet.config.sample_size
        native = (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)
        h, w = (native[i] if side is None else side // self.vae_scale_factor for i, side in enumerate((height, width)))
        shape = (len(conditional), self.unet.config.in_channels, h, w)
        if isinstance(generator, (list, tuple)) and len(generator) != len(conditional):
            raise ValueError(
                f"generator lists {len(generator)} for {len(conditional)} pictures; give one, or one for each."
            )
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=self.unet.dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents must be {shape}, not {tuple(latents.shape)}.")
        control = self._spatial_control([*[None] * len(prompts), *prompts])
        tensors = {"prompt_embeds": conditional.embeds, "negative_prompt_embeds": negative.embeds}
        denoise = self._denoiser(schedule, join_pooled([negative, conditional]), self._size_ids(h, w, **sizes))
        with (
            attention_control(self.unet, control, h, w),
            self.progress_bar(total=schedule.num_steps) as bar,
        ):

            def on_step(step: int, level: int, x: torch.Tensor) -> torch.Tensor | None:
                bar.update()
                return call_back(step, int(schedule.timesteps[level - 1]), {"latents": x, **tensors})

            final = sample_from_noise(
                denoise,
                schedule,
                latents.to(conditional.embeds),
                conditional.embeds,
                negative.embeds,
                guidance_scale,
                guidance_rescale,
                on_step,
            )
        images, flagged = self._finish(final, output_type)
        return S2EditPipelineOutput(images=images, nsfw_content_detected=flagged)

    def _given(self, name: str, embeds: torch.Tensor, pooled: torch.Tensor | None) -> PromptEmbeds:
        """The caller's own embeddings."""
        if (pooled is None) is not (self.text_encoder_2 is None):
            wanted = "goes with SDXL models alone" if pooled is not None else "is needed too: this model is an SDXL"
            raise ValueError(f"{_pooled(name)} {wanted}.")
        if pooled is not None and len(pooled) != len(embeds):
            raise ValueError(f"{_pooled(name)} has {len(pooled)} rows and {name} {len(embeds)}; give as many.")
        embeds = embeds.to(self._execution_device, self.unet.dtype)
        return PromptEmbeds(embeds, None if pooled is None else pooled.to(embeds))


def _pooled(name: str) -> str:
    """The argument that goes with the argument ``name`` where the model is an SDXL."""
    return name.replace("prompt_embeds", "pooled_prompt_embeds")
