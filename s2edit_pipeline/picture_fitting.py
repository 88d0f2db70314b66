"""Stage one in the pipeline: from the pictures that a caller hands in to an IdentityAdapter."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch

from .attention_control import MapRecorder, attention_control, mask_at
from .ddim_steps import noise_schedule
from .edit_sampling import check_share
from .identity_adapter import IdentityAdapter, LearnedAttribute
from .identity_fingerprint import fingerprint
from .identity_fitting import FitExample, FitProgress, FitSettings, fit_identity_weights
from .identity_loading import IdentityLoading
from .object_masks import record_maps, threshold_map
from .picture_inputs import load_mask, load_picture
from .prompt_alignment import TokenizedPrompt, insert_token, split_words
from .prompt_tokens import initial_row, with_tokens

MASK_LEVELS = (0.2, 0.35, 0.5, 0.65)
"""Where the object is looked for: shares of the way from the picture to noise."""
MASK_THRESHOLD = 0.4


@dataclass(frozen=True)
class FitInput:
    """A picture that ``fit_identity`` was given, and what is asked of it: prompts without and with the token, the
    (height, width) to work at, and the caller's own mask (H, W) or None."""

    picture: PIL.Image.Image
    subject: str
    token: str
    prompt: TokenizedPrompt
    prompt_with_token: TokenizedPrompt
    size: tuple[int, int]
    mask: torch.Tensor | None


class PictureFitting(IdentityLoading):
    """Mixed into the pipeline: the automatic mask, and the fit."""

    @torch.no_grad()
    def _object_mask(
        self, latents: torch.Tensor, prompt: TokenizedPrompt, subject: str, threshold: float
    ) -> torch.Tensor:
        """(h, w) float32 of 0 and 1: where ``subject`` is, from the model as it is now."""
        height, width = latents.shape[-2:]
        schedule = noise_schedule(self.scheduler, min(50, self.scheduler.config.num_train_timesteps))
        levels = [max(1, round(share * schedule.num_steps)) for share in MASK_LEVELS]
        recorder = MapRecorder(*self._map_queries(height, width))
        encoded = self._encode_prompts([prompt])
        denoise = self._denoiser(schedule, encoded.pooled, self._size_ids(height, width))
        with attention_control(self.unet, recorder, height, width):
            # its own fixed noise: looking at the mask must not change what is drawn afterwards
            noise = torch.Generator().manual_seed(0)
            record_maps(denoise, recorder, latents, encoded.embeds, schedule, levels, noise)
        return threshold_map(recorder.word_map(0, prompt.find(subject), height, width).cpu(), threshold)

    def _fit(
        self,
        image: Any,
        prompt: str,
        subject: str,
        token: str,
        mask: Any,
        settings: FitSettings,
        reference: Any,
        generator: torch.Generator | None,
        callback_on_step_end: Callable[..., Any] | None,
        mask_threshold: float,
        size: tuple[int | None, int | None],
    ) -> IdentityAdapter:
        """See ``S2EditPipeline.fit_identity``."""
        self._check_can_train()
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be one torch.Generator for a fit, not {type(generator).__name__}.")
        check_share("mask_threshold", mask_threshold, open_ended=True)
        if reference is not None and not all(hasattr(reference, name) for name in ("image", "prompt", "subject")):
            raise TypeError(
                "reference must be a ReferenceAttribute(image, prompt='a lady with makeup', subject='makeup'), "
                f"not {type(reference).__name__}."
            )
        names = [token, *([reference.token] if reference is not None else [])]
        tokenizers = {name: with_tokens(tokenizer, names) for name, tokenizer in self._tokenizers.items()}
        asked = [self._fit_input("", image, prompt, subject, token, mask, tokenizers, size)]
        if reference is not None:
            r = reference
            asked.append(
                self._fit_input("reference.", r.image, r.prompt, r.subject, r.token, r.mask, tokenizers, (None, None))
            )
        if self._loaded.identities:
            raise ValueError(
                f"Identities are loaded ({', '.join(self.identities)}); a new one is fitted to the bare model. "
                "Call pipe.unload_identity() first."
            )
        for component in self._components_with_weights().values():
            if getattr(component, "peft_config", None):
                raise ValueError(
                    "Other LoRA weights are attached. Merge them, pipe.fuse_lora() then pipe.unload_lora_weights(), "
                    "or only unload them, and fit again."
                )

        started = time.perf_counter()
        self._interrupt = False
        examples = []
        for one in asked:
            latents, object_mask = self._encode_picture(one.picture, *one.size), None
            if settings.spatial_control and one.mask is None:
                object_mask = self._object_mask(latents, one.prompt, one.subject, mask_threshold)
            elif settings.spatial_control and one.mask is not None:
                object_mask = mask_at(one.mask, *latents.shape[-2:])
            token_id = tokenizers["text_encoder"].convert_tokens_to_ids(one.token)
            size_ids = self._size_ids(*latents.shape[-2:])
            examples.append(FitExample(latents, one.prompt, one.prompt_with_token, token_id, object_mask, size_ids))
        encoders = self._text_encoders
        rows = [
            {name: initial_row(self._tokenizers[name], encoder, one.subject) for name, encoder in encoders.items()}
            for one in asked
        ]
        assert settings.num_steps is not None

        with self.progress_bar(total=settings.num_steps) as bar:

            def on_step(progress: FitProgress) -> bool:
                bar.set_postfix(
                    loss=f"{progress.reconstruction_loss:.4f}", cos=f"{progress.cosine:+.3f}", refresh=False
                )
                bar.update()
                if callback_on_step_end is not None:
                    measures = {
                        "reconstruction_loss": progress.reconstruction_loss,
                        "semantic_loss": progress.semantic_loss,
                        "cosine": progress.cosine,
                    }
                    if reference is not None:
                        measures["reference_cosine"] = progress.cosines[1]
                    callback_on_step_end(self, progress.step, settings.num_steps, measures)
                return not self._interrupt

            result = fit_identity_weights(
                self.unet,
                encoders,
                self.scheduler.alphas_cumprod.cpu(),
                self.scheduler.config.get("prediction_type", "epsilon"),
                examples,
                rows,
                settings,
                generator,
                on_step,
            )
        self.maybe_free_model_hooks()
        first, last = result.progress[0], result.progress[-1]
        tail = result.progress[-max(1, len(result.progress) // 5) :]
        masks = [None if example.mask is None else example.mask.cpu() for example in examples]
        attribute = None
        measures = {
            "cosine_first": first.cosine,
            "cosine_last": last.cosine,
            "reconstruction_loss_first": first.reconstruction_loss,
            "reconstruction_loss_last": float(np.mean([p.reconstruction_loss for p in tail])),
            "seconds": round(time.perf_counter() - started, 2),
        }
        if reference is not None:
            attribute = LearnedAttribute(r.token, r.subject, r.prompt, result.rows[1], masks[1])
            measures |= {"reference_cosine_first": first.cosines[1], "reference_cosine_last": last.cosines[1]}
        return IdentityAdapter(
            token=token,
            subject=subject,
            source_prompt=prompt,
            method=settings.method,
            rows=result.rows[0],
            weights=result.weights,
            lora_metadata=result.lora_metadata,
            mask=masks[0],
            base_model=self._base_name(),
            base_fingerprint={name: fingerprint(m) for name, m in self._components_with_weights().items()},
            settings={
                "num_steps": len(result.progress),
                "learning_rate": settings.learning_rate,
                "batch_size": settings.batch_size,
                "timestep_sampling": settings.timestep_sampling,
                "lr_scheduler": settings.lr_scheduler,
                "early_stop": settings.early_stop,
                "optimizer": settings.optimizer,
                "semantic_weight": settings.semantic_weight,
                "spatial_control": settings.spatial_control,
                "detach_sentence": settings.detach_sentence,
                "renormalize": settings.renormalize,
                "mask_after": settings.mask_after,
                "lora_rank": settings.lora_rank,
                "lora_layers": settings.lora_layers,
                "lora_init": settings.lora_init,
                "automatic_mask": mask is None,
                "height": asked[0].size[0],
                "width": asked[0].size[1],
            },
            measures=measures,
            reference=attribute,
        )

    def _fit_input(
        self,
        name: str,
        image: Any,
        prompt: Any,
        subject: Any,
        token: str,
        mask: Any,
        tokenizers: dict[str, Any],
        size: tuple[int | None, int | None],
    ) -> FitInput:
        """One picture to fit, checked; ``name`` goes before the arguments' names in messages."""
        self._check_prompt(prompt, f"{name}prompt")
        self._check_prompt(subject, f"{name}subject")
        picture = load_picture(image, f"{name}image")
        if token in split_words(prompt, [token]):
            raise ValueError(
                f"{name}prompt={prompt!r} holds the token {token!r} already; describe the picture without it."
            )
        return FitInput(
            picture,
            subject,
            token,
            self._tokenize(prompt),
            self._tokenize(insert_token(prompt, subject, token), tokenizers),
            self._working_size(picture, *size),
            None if mask is None else load_mask(mask, picture.size, f"{name}mask"),
        )

    def _check_can_train(self) -> None:
        self._check_autograd()
        for name, module in self._components_with_weights().items():
            if getattr(module, "_hf_hook", None) is not None:
                raise ValueError(
                    f"The {name} is offloaded, and a fit needs it where the work is done. Call "
                    "pipe.remove_all_hooks() and pipe.to('cuda') first, and enable offloading again afterwards."
                )
