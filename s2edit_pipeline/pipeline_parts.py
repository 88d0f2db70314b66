"""What every stage does with the pipeline's components: checks, prompts, pictures and latents, the denoiser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import PIL.Image
import torch
from torch import nn

from .ddim_steps import NoiseSchedule, check_scheduler
from .picture_inputs import picture_to_tensor, working_size
from .prompt_columns import TokenizedPrompt
from .prompt_encoding import tokenize_for

Denoise = Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]


class PipelineParts:
    """Mixed into the pipeline, under its stages; ``text_encoder_2`` and ``tokenizer_2`` are None but in SDXL."""

    vae: Any
    text_encoder: Any
    text_encoder_2: Any
    tokenizer: Any
    tokenizer_2: Any
    unet: Any
    scheduler: Any
    safety_checker: Any
    feature_extractor: Any
    image_processor: Any
    vae_scale_factor: int
    config: Any
    progress_bar: Any
    maybe_convert_prompt: Any
    maybe_free_model_hooks: Any
    _execution_device: Any
    _interrupt: bool

    @property
    def _text_encoders(self) -> dict[str, nn.Module]:
        both = {"text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}
        return {name: encoder for name, encoder in both.items() if encoder is not None}

    @property
    def _tokenizers(self) -> dict[str, Any]:
        """Text encoder's name -> its tokenizer."""
        both = {"text_encoder": self.tokenizer, "text_encoder_2": self.tokenizer_2}
        return {name: tokenizer for name, tokenizer in both.items() if tokenizer is not None}

    def _components_with_weights(self) -> dict[str, nn.Module]:
        """Name -> the module whose parameters' names are the model's own: behind ``torch.compile``, what it wraps."""
        components = {"unet": self.unet, **self._text_encoders}
        return {name: getattr(module, "_orig_mod", module) for name, module in components.items()}

    def _check_ready(self) -> None:
        needed = ["vae", "text_encoder", "tokenizer", "unet", "scheduler"]
        if self.text_encoder_2 is not None or self.tokenizer_2 is not None:
            needed += ["text_encoder_2", "tokenizer_2"]
        if self.text_encoder is None and self.text_encoder_2 is not None:
            raise ValueError(
                "This model has the second text encoder alone: it is an SDXL refiner, which can't draw alone. "
                "Load its base, such as stabilityai/stable-diffusion-xl-base-1.0."
            )
        for name in needed:
            if getattr(self, name) is None:
                raise ValueError(f"The pipeline has no {name}; load it whole, or pass {name}= to from_pretrained.")
        check_scheduler(self.scheduler)
        if self.safety_checker is not None and self.feature_extractor is None:
            raise ValueError(
                "The safety checker needs the feature_extractor: load it too, or pass safety_checker=None."
            )
        if self.unet.config.in_channels != self.vae.config.latent_channels:
            raise ValueError(
                f"The U-Net takes {self.unet.config.in_channels} channels and the autoencoder gives "
                f"{self.vae.config.latent_channels}: an inpainting or instruction model can't be used; load its base."
            )
        self._check_conditions()
        for encoder in self._text_encoders.values():
            if self.unet.dtype != encoder.dtype:
                raise ValueError(
                    f"The U-Net is {self.unet.dtype} and the text encoder {encoder.dtype}. "
                    "Load with one type, from_pretrained(..., dtype=torch.float32), or call pipe.to(torch.float32)."
                )

    def _check_conditions(self) -> None:
        """Raises:
        ValueError: the U-Net wants to be told other things than this family's text encoders and sizes.
        """
        kind = self.unet.config.addition_embed_type
        if kind is None and self.text_encoder_2 is None:
            return
        if kind != "text_time" or self.text_encoder_2 is None:
            raise ValueError(
                f"The U-Net has addition_embed_type={kind!r} and the pipeline "
                f"{'no' if self.text_encoder_2 is None else 'a'} second text encoder. Stable Diffusion has neither; "
                "SDXL has 'text_time' and both text encoders: load all components from one model."
            )
        wanted = self.unet.add_embedding.linear_1.in_features
        given = 6 * self.unet.config.addition_time_embed_dim + self.text_encoder_2.config.projection_dim
        if wanted != given:
            raise ValueError(
                f"The U-Net wants {wanted} numbers beside the prompt, and SDXL's prompt summary and six sizes are "
                f"{given}: a refiner (which asks for an aesthetics score) or another model's U-Net can't be used; load "
                "SDXL's base."
            )

    @staticmethod
    def _check_autograd() -> None:
        if torch.is_inference_mode_enabled():
            raise ValueError("This needs gradients: call it outside torch.inference_mode() (torch.no_grad() is fine).")

    @staticmethod
    def _check_prompt(prompt: Any, name: str) -> None:
        if not isinstance(prompt, str):
            raise TypeError(f"{name} must be a string, not {type(prompt).__name__}.")
        if not prompt.strip():
            raise ValueError(f"{name} is empty; say what the picture shows, such as 'a photo of a lady with glasses'.")

    def _base_name(self) -> str:
        """What the base model calls itself: a Hub name, or the last part of a folder's."""
        name = str(getattr(self, "name_or_path", "") or self.config.get("_name_or_path", ""))
        return name.rstrip("/").split("/")[-1] if name.startswith(("/", ".")) or name.count("/") > 1 else name

    # -------------------------------------------------------------------- prompts

    def _tokenize(self, prompt: Any, tokenizers: Any = None) -> TokenizedPrompt:
        tokenizers = self._tokenizers if tokenizers is None else tokenizers
        return tokenize_for(tokenizers, {name: self.maybe_convert_prompt(prompt, t) for name, t in tokenizers.items()})

    # -------------------------------------------------------------------- pictures and latents

    def _working_size(self, picture: PIL.Image.Image, height: int | None, width: int | None) -> tuple[int, int]:
        multiple = self.vae_scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        sample_size = self.unet.config.sample_size
        native = (sample_size if isinstance(sample_size, int) else min(sample_size)) * self.vae_scale_factor
        return working_size(picture.size, native, multiple, height, width)

    @contextmanager
    def _vae_in_range(self) -> Iterator[None]:
        """SDXL's autoencoder overflows in float16 and says so (``force_upcast``): float32 for the length of the
        context, as diffusers' own pipeline does; then its weights are, to the bit, as before."""
        upcast = self.text_encoder_2 is not None and self.vae.dtype == torch.float16 and self.vae.config.force_upcast
        held = [(p, p.data) for p in self.vae.parameters()] if upcast else []
        for parameter, half in held:
            parameter.data = half.float()
        try:
            yield
        finally:
            for parameter, half in held:
                parameter.data = half

    @torch.no_grad()
    def _encode_picture(self, picture: PIL.Image.Image, height: int, width: int) -> torch.Tensor:
        """(1, C, h, w) latents at noise level 0, in the U-Net's dtype."""
        with self._vae_in_range():
            pixels = picture_to_tensor(picture, height, width).to(self._execution_device, self.vae.dtype)
            encoded = self.vae.encode(pixels)
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        return ((latents - shift) * self.vae.config.scaling_factor).to(self.unet.dtype)

    @torch.no_grad()
    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in about [-1, 1]."""
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        with self._vae_in_range():
            latents = latents.to(self.vae.dtype) / self.vae.config.scaling_factor + shift
            return self.vae.decode(latents, return_dict=False)[0]

    def _finish(
        self, latents: torch.Tensor, output_type: str, kept: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[Any, list[bool] | None]:
        """Decoded pictures; ``kept`` is a picture (1, 3, H, W) and weights (n, 1, H, W): where these are 0 it stays."""
        if output_type == "latent":
            return latents, None
        pixels = self._decode(latents)
        if kept is not None:
            source, weights = (tensor.to(pixels.device, torch.float32) for tensor in kept)
            pixels = torch.where(weights == 0, source, torch.lerp(source, pixels.float(), weights))
        flagged = None
        if self.safety_checker is not None:
            shown = self.image_processor.postprocess(pixels, output_type="pil")
            features = self.feature_extractor(shown, return_tensors="pt").to(self._execution_device)
            _, flagged = self.safety_checker(
                images=pixels.clone(), clip_input=features.pixel_values.to(self.safety_checker.dtype)
            )
            black = torch.tensor(flagged, device=pixels.device)[:, None, None, None]
            pixels = torch.where(black, -torch.ones_like(pixels), pixels)
        return self.image_processor.postprocess(pixels, output_type=output_type), flagged

    # -------------------------------------------------------------------- the denoiser

    def _size_ids(
        self,
        height: int,
        width: int,
        original_size: tuple[int, int] | None = None,
        crop: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """(1, 6), what SDXL is told of a picture's size: as it was, where it was cut, as it is to be; in pixels, of
        latents ``height`` x ``width`` where nothing else is said."""
        own = (height * self.vae_scale_factor, width * self.vae_scale_factor)
        return torch.tensor([[*(original_size or own), *crop, *(target_size or own)]], dtype=torch.float32)

    def _denoiser(
        self, schedule: NoiseSchedule, pooled: torch.Tensor | None = None, size_ids: torch.Tensor | None = None
    ) -> Denoise:
        """The U-Net at the schedule's levels. It works in its own dtype, whatever the latents' is.

        Args:
            pooled, size_ids: (B, P) and (1, 6) or (B, 6), SDXL's, of the batch's rows; None without.
        """
        timesteps = schedule.timesteps.tolist()
        dtype = self.unet.dtype  # asked once: diffusers walks through all modules for it, milliseconds each time
        added = None
        if pooled is not None and size_ids is not None:
            ids = size_ids.expand(len(pooled), -1).to(pooled)
            added = {"text_embeds": pooled, "time_ids": ids}

        def denoise(x: torch.Tensor, level: int, prompt_embeds: torch.Tensor) -> torch.Tensor:
            output = self.unet(
                x.to(dtype),
                timesteps[level - 1],
                encoder_hidden_states=prompt_embeds.to(dtype),
                added_cond_kwargs=added,
                return_dict=False,
            )[0]
            return output.to(x)

        return denoise

    def _map_queries(self, height: int, width: int, shallowest: int = 16) -> tuple[int, int]:
        """The most and the fewest queries a layer may have to tell where words look: those of 1/16 and 1/32 of the
        picture's side, or of the latents themselves and half of it where these are as small."""
        factor = 2 if min(height, width) > shallowest else 1
        most, fewest = (-(-height // f) * -(-width // f) for f in (factor, 2 * factor))
        return most, fewest
