"""S2EditPipeline: fit an identity to one picture, and edit the picture by words without losing it.

S2Edit: Text-Guided Image Editing with Precise Semantic and Spatial Control (2025). The formulas are in the modules
beside this one; here they are put in order.
"""

# no `from __future__ import annotations` here: diffusers' from_pipe reads the types of __init__'s parameters
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import (
    FromSingleFileMixin,
    IPAdapterMixin,
    StableDiffusionLoraLoaderMixin,
    TextualInversionLoaderMixin,
)
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from .atomic_folder import atomic_folder  # noqa: F401
from .attention_control import (
    AttentionController,
    Controllers,
    MapRecorder,
    PromptToPrompt,
    Reweighting,
    SpatialControl,
    attention_control,
    mask_at,
)
from .ddim_steps import NoiseSchedule, check_scheduler, noise_schedule
from .edit_plan import plan_edits
from .edit_sampling import BranchRows, EditSettings, check_share, sample_edits, sample_from_noise
from .identity_adapter import IdentityAdapter, LearnedAttribute, LoadedIdentities, check_base, fingerprint
from .identity_card import identity_card  # noqa: F401
from .identity_files import read_identity  # noqa: F401
from .identity_fitting import FitExample, FitProgress, FitSettings, fit_identity_weights
from .identity_losses import cosine  # noqa: F401  diffusers copies only the files that this one names
from .identity_token import initial_row, token_rows, with_tokens
from .latent_inversion import INVERSIONS, Inversion, check_method, num_inversion_steps
from .lora_format import lora_metadata  # noqa: F401
from .low_rank import compress  # noqa: F401
from .object_masks import feather, mask_to_picture, record_maps, threshold_map
from .picture_inputs import load_mask, load_picture, picture_to_tensor, working_size
from .pipeline_output import S2EditPipelineOutput
from .prompt_alignment import TokenizedPrompt, insert_token, split_words, tokenize

MASK_LEVELS = (0.2, 0.35, 0.5, 0.65)
"""Where the object is looked for: shares of the way from the picture to noise."""
MASK_THRESHOLD = 0.4


class S2EditPipeline(
    DiffusionPipeline,
    StableDiffusionMixin,
    TextualInversionLoaderMixin,
    StableDiffusionLoraLoaderMixin,
    IPAdapterMixin,
    FromSingleFileMixin,
):
    """Identity-preserving editing of real pictures with a Stable Diffusion model.

    Args:
        vae: autoencoder between pictures and latents.
        text_encoder, tokenizer: CLIP's.
        unet: conditional denoiser, epsilon- or v-prediction.
        scheduler: any with ``alphas_cumprod``; its noise levels are read and it is never changed.
        safety_checker, feature_extractor: Stable Diffusion's own, or None.
        image_encoder: for IP-Adapter, or None.
        requires_safety_checker: only kept, so that Stable Diffusion's folders load.
    """

    model_cpu_offload_seq = "text_encoder->image_encoder->unet->vae"
    _optional_components = ["safety_checker", "feature_extractor", "image_encoder"]  # noqa: RUF012 (diffusers' form)
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
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self.register_to_config(requires_safety_checker=requires_safety_checker)
        self._loaded = LoadedIdentities()
        self._plain_tokenizer: Any = None
        self._interrupt = False

    # -------------------------------------------------------------------- what callbacks read and set

    @property
    def interrupt(self) -> bool:
        """Set ``pipe._interrupt = True`` in a callback to stop after the step; what there is comes back."""
        return self._interrupt

    # -------------------------------------------------------------------- checks and encodings

    def _components_with_weights(self) -> dict[str, torch.nn.Module]:
        return {"unet": self.unet, "text_encoder": self.text_encoder}

    def _check_ready(self) -> None:
        for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler"):
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
        if self.unet.dtype != self.text_encoder.dtype:
            raise ValueError(
                f"The U-Net is {self.unet.dtype} and the text encoder {self.text_encoder.dtype}. "
                "Load with one type, from_pretrained(..., dtype=torch.float32), or call pipe.to(torch.float32)."
            )

    def _working_size(self, picture: PIL.Image.Image, height: int | None, width: int | None) -> tuple[int, int]:
        multiple = self.vae_scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        sample_size = self.unet.config.sample_size
        native = (sample_size if isinstance(sample_size, int) else min(sample_size)) * self.vae_scale_factor
        return working_size(picture.size, native, multiple, height, width)

    @staticmethod
    def _check_prompt(prompt: Any, name: str) -> None:
        if not isinstance(prompt, str):
            raise TypeError(f"{name} must be a string, not {type(prompt).__name__}.")
        if not prompt.strip():
            raise ValueError(f"{name} is empty; say what the picture shows, such as 'a photo of a lady with glasses'.")

    @torch.no_grad()
    def _encode_picture(self, picture: PIL.Image.Image, height: int, width: int) -> torch.Tensor:
        """(1, C, h, w) latents at noise level 0, in the U-Net's dtype."""
        pixels = picture_to_tensor(picture, height, width).to(self._execution_device, self.vae.dtype)
        encoded = self.vae.encode(pixels)
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        return ((latents - shift) * self.vae.config.scaling_factor).to(self.unet.dtype)

    @torch.no_grad()
    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in about [-1, 1]."""
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        latents = latents.to(self.vae.dtype) / self.vae.config.scaling_factor + shift
        return self.vae.decode(latents, return_dict=False)[0]

    def _tokenize(self, prompt: Any, tokenizer: Any = None) -> TokenizedPrompt:
        tokenizer = self.tokenizer if tokenizer is None else tokenizer
        return tokenize(tokenizer, self.maybe_convert_prompt(prompt, tokenizer))

    @torch.no_grad()
    def _encode_prompt(self, prompt: TokenizedPrompt, clip_skip: int | None = None) -> torch.Tensor:
        """(1, L, D), with the loaded identities' rows in place."""
        with self._identity_rows():
            ids = prompt.input_ids.to(self._execution_device)
            encoded = self.text_encoder(ids, output_hidden_states=clip_skip is not None)
            if clip_skip is None:
                return encoded.last_hidden_state
            text_model: Any = getattr(self.text_encoder, "text_model", self.text_encoder)  # transformers 4 nests it
            return text_model.final_layer_norm(encoded.hidden_states[-(clip_skip + 1)])

    @contextmanager
    def _identity_rows(self) -> Iterator[None]:
        rows = {
            self.tokenizer.convert_tokens_to_ids(token): rows["text_encoder"].to(self._execution_device)
            for adapter, _ in self._loaded.adapters.values()
            for token, (rows, _) in adapter.learned.items()
        }
        with token_rows(self.text_encoder, rows):
            yield

    # -------------------------------------------------------------------- identities

    @property
    def identities(self) -> tuple[str, ...]:
        """The tokens of the identities loaded now."""
        return tuple(self._loaded.adapters)

    def load_identity(
        self,
        identity: Any,
        token: str | None = None,
        scale: float = 1.0,
        *,
        mask: Any = None,
        reference_token: str | None = None,
        **kwargs: Any,
    ) -> str:
        """Load an identity into the pipeline; prompts can then say its token.

        Args:
            identity: an ``IdentityAdapter``, a folder, or a Hub repository's name.
            token: another name for it.
            scale: strength of its weights, 1 as fitted, 0 as if they weren't there.
            mask: where it is in the picture that will be edited, white inside; None: where it was in its own. Two
                people in one picture, each fitted to a picture of their own, need it.
            reference_token: another name for its reference attribute's token.
            kwargs: for ``IdentityAdapter.from_pretrained``.

        Returns:
            The token.

        Raises:
            ValueError: it belongs to another base model, or its token is taken; nothing is changed then.
        """
        if isinstance(identity, str) and identity[:1] in ("[", "<"):
            raise ValueError(
                f"No identity {identity!r} is loaded; loaded are: {', '.join(self.identities) or 'none'}. "
                "Pass the identity itself, its folder or its Hub repository."
            )
        adapter = (
            identity if hasattr(identity, "weight_differences") else IdentityAdapter.from_pretrained(identity, **kwargs)
        )
        if token is not None or reference_token is not None:
            adapter = adapter.renamed(token, reference_token)
        if mask is not None:
            adapter = replace(adapter, mask=load_mask(mask, None))
        if adapter.token in self._loaded.adapters:
            raise ValueError(
                f"An identity {adapter.token!r} is loaded already. Give this one another name, "
                f"load_identity(..., token='[{adapter.token.strip('[]<>')}2]'), or unload_identity({adapter.token!r})."
            )
        check_base(adapter, self._components_with_weights(), self._loaded)
        if not np.isfinite(scale):
            raise ValueError(f"scale must be a number, not {scale!r}.")
        taken = [name for name in adapter.learned if name in self._learned_tokens]
        if taken:
            raise ValueError(
                f"The token {taken[0]!r} of a reference attribute is loaded already; give this one another name: "
                f"load_identity(..., reference_token='[{taken[0].strip('[]<>')}2]')."
            )
        plain = self._plain_tokenizer if self._loaded.adapters else self.tokenizer
        tokenizer = _tokenizer_with(plain, [*self._learned_tokens, *adapter.learned])
        width = self.text_encoder.get_input_embeddings().weight.shape[1]
        for name, (rows, _) in adapter.learned.items():
            shapes = {part: tuple(row.shape) for part, row in rows.items()}
            if shapes != {"text_encoder": (width,)}:
                raise ValueError(f"The token {name!r} has rows of {shapes}; this model's text encoder has {width}.")
        self._loaded.add(adapter, scale, self._components_with_weights())
        self._plain_tokenizer, self.tokenizer = plain, tokenizer
        return adapter.token

    def unload_identity(self, token: str | None = None) -> None:
        """Take out one identity, or all. With the last one gone the pipeline is, to the bit, as before the first.

        Raises:
            ValueError: no identity of that token is loaded.
        """
        tokens = list(self._loaded.adapters) if token is None else [token]
        for name in tokens:
            if name not in self._loaded.adapters:
                raise ValueError(f"No identity {name!r} is loaded; loaded are: {', '.join(self.identities) or 'none'}.")
            self._loaded.remove(name, self._components_with_weights())
        if tokens:
            self.tokenizer = _tokenizer_with(self._plain_tokenizer, self._learned_tokens)

    @property
    def _learned_tokens(self) -> list[str]:
        """The tokens of the loaded identities and of their reference attributes."""
        return [name for adapter, _ in self._loaded.adapters.values() for name in adapter.learned]

    @contextmanager
    def _with_identity(self, identity: Any) -> Iterator[str | None]:
        """``identity`` loaded for the length of the context, unless it is None or loaded already; gives its token."""
        if identity is None:
            yield None
            return
        for token, (adapter, _) in self._loaded.adapters.items():
            if identity is adapter or (isinstance(identity, str) and identity == token):
                yield token
                return
        token = self.load_identity(identity)
        try:
            yield token
        finally:
            self.unload_identity(token)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As every pipeline's; loaded identities are left out, save them with their own ``save_pretrained``."""
        held = dict(self._loaded.adapters)
        self.unload_identity()
        try:
            super().save_pretrained(*args, **kwargs)
        finally:
            for adapter, scale in held.values():
                self.load_identity(adapter, scale=scale)

    def _refuse_while_loaded(self, what: str) -> None:
        if self._loaded.adapters:
            raise ValueError(
                f"{what} changes what the loaded identities ({', '.join(self.identities)}) were laid over. "
                "Call unload_identity() first, then this, and load them again."
            )

    def load_textual_inversion(self, *args: Any, **kwargs: Any) -> None:
        """As Stable Diffusion's; before identities are loaded.

        Raises:
            ValueError: identities are loaded.
        """
        self._refuse_while_loaded("load_textual_inversion")
        super().load_textual_inversion(*args, **kwargs)

    def fuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """As Stable Diffusion's; before identities are loaded.

        Raises:
            ValueError: identities are loaded.
        """
        self._refuse_while_loaded("fuse_lora")
        super().fuse_lora(*args, **kwargs)

    def unfuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """As Stable Diffusion's; before identities are loaded.

        Raises:
            ValueError: identities are loaded.
        """
        self._refuse_while_loaded("unfuse_lora")
        super().unfuse_lora(*args, **kwargs)

    def _spatial_control(self, rows: Sequence[TokenizedPrompt | None]) -> SpatialControl:
        """Each learned token's mask for each row of a batch; rows without a prompt (unconditional) have none."""
        masks, columns = {}, []
        switched: dict[str, list[str]] = {"renormalize": [], "mask_after": []}
        for adapter, _ in self._loaded.adapters.values():
            for token, (_, mask) in adapter.learned.items():
                if mask is not None:
                    masks[token] = mask
                    for switch, tokens in switched.items():
                        tokens += [token] if adapter.settings.get(switch) else []
        names = {token: self.tokenizer.convert_tokens_to_ids(token) for token in masks}
        for prompt in rows:
            found: dict[str, tuple[int, ...]] = {}
            for token in masks:
                at = () if prompt is None else torch.nonzero(prompt.input_ids[0] == names[token])[:, 0].tolist()
                if len(at):
                    found[token] = tuple(at)
            columns.append(found)
        return SpatialControl(masks, columns, renormalize=switched["renormalize"], mask_after=switched["mask_after"])

    # -------------------------------------------------------------------- the mask

    def _denoiser(self, schedule: NoiseSchedule) -> Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]:
        timesteps = schedule.timesteps.tolist()

        def denoise(x: torch.Tensor, level: int, prompt_embeds: torch.Tensor) -> torch.Tensor:
            return self.unet(x, timesteps[level - 1], encoder_hidden_states=prompt_embeds.to(x), return_dict=False)[0]

        return denoise

    def _map_queries(self, height: int, width: int, shallowest: int = 16) -> tuple[int, int]:
        """The most and the fewest queries a layer may have to tell where words look: those of 1/16 and 1/32 of the
        picture's side, or of the latents themselves and half of it where these are as small."""
        factor = 2 if min(height, width) > shallowest else 1
        most, fewest = (-(-height // f) * -(-width // f) for f in (factor, 2 * factor))
        return most, fewest

    @torch.no_grad()
    def _object_mask(
        self, latents: torch.Tensor, prompt: TokenizedPrompt, subject: str, threshold: float
    ) -> torch.Tensor:
        """(h, w) float32 of 0 and 1: where ``subject`` is, from the model as it is now."""
        height, width = latents.shape[-2:]
        schedule = noise_schedule(self.scheduler, min(50, self.scheduler.config.num_train_timesteps))
        levels = [max(1, round(share * schedule.num_steps)) for share in MASK_LEVELS]
        recorder = MapRecorder(*self._map_queries(height, width))
        embeds = self._encode_prompt(prompt)
        with attention_control(self.unet, recorder, height, width):
            # its own fixed noise: looking at the mask must not change what is drawn afterwards
            noise = torch.Generator().manual_seed(0)
            record_maps(self._denoiser(schedule), recorder, latents, embeds, schedule, levels, noise)
        return threshold_map(recorder.word_map(0, prompt.find(subject), height, width).cpu(), threshold)

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
        method: str = "lora",
        mask: Any = None,
        num_steps: int | None = None,
        learning_rate: float | None = None,
        semantic_weight: float = 0.1,
        spatial_control: bool = True,
        reference: Any = None,
        generator: torch.Generator | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        *,
        batch_size: int = 4,
        lora_rank: int = 4,
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
            method: "lora", "full" (the paper's) or "token".
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
            batch_size: noise levels a step.
            lora_rank: of the adapters.
            detach_sentence, renormalize, mask_after: see ``identity_fitting.FitSettings``.
            mask_threshold: of the automatic mask.
            height, width: work at another size than the model's own.

        Returns:
            The identity, to be saved, loaded, or passed to the pipeline.

        Raises:
            TypeError, ValueError: an input that can't be used; nothing has been done then.
            FloatingPointError: the loss ran away; the message names the step.
        """
        self._check_ready()
        self._check_can_train()
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be one torch.Generator for a fit, not {type(generator).__name__}.")
        settings = FitSettings(
            method=method,
            num_steps=num_steps,
            learning_rate=learning_rate,
            batch_size=batch_size,
            semantic_weight=semantic_weight,
            spatial_control=spatial_control,
            detach_sentence=detach_sentence,
            renormalize=renormalize,
            mask_after=mask_after,
            lora_rank=lora_rank,
        )
        check_share("mask_threshold", mask_threshold, open_ended=True)
        if reference is not None and not all(hasattr(reference, name) for name in ("image", "prompt", "subject")):
            raise TypeError(
                "reference must be a ReferenceAttribute(image, prompt='a lady with makeup', subject='makeup'), "
                f"not {type(reference).__name__}."
            )
        tokenizer = with_tokens(self.tokenizer, [token, *([reference.token] if reference is not None else [])])
        size = (height, width)
        asked = [self._fit_input("", image, prompt, subject, token, mask, tokenizer, size)]
        if reference is not None:
            r = reference
            asked.append(
                self._fit_input("reference.", r.image, r.prompt, r.subject, r.token, r.mask, tokenizer, (None, None))
            )
        if self._loaded.adapters:
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
            if spatial_control and one.mask is None:
                object_mask = self._object_mask(latents, one.prompt, one.subject, mask_threshold)
            elif spatial_control and one.mask is not None:
                object_mask = mask_at(one.mask, *latents.shape[-2:])
            token_id = tokenizer.convert_tokens_to_ids(one.token)
            examples.append(FitExample(latents, one.prompt, one.prompt_with_token, token_id, object_mask))
        rows = [{"text_encoder": initial_row(self.tokenizer, self.text_encoder, one.subject)} for one in asked]
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
                self.text_encoder,
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
            method=method,
            rows=result.rows[0],
            weights=result.weights,
            lora_metadata=result.lora_metadata,
            mask=masks[0],
            base_model=self._base_name(),
            base_fingerprint={name: fingerprint(m) for name, m in self._components_with_weights().items()},
            settings={
                "num_steps": len(result.progress),
                "learning_rate": settings.learning_rate,
                "batch_size": batch_size,
                "semantic_weight": semantic_weight,
                "spatial_control": spatial_control,
                "detach_sentence": detach_sentence,
                "renormalize": renormalize,
                "mask_after": mask_after,
                "lora_rank": lora_rank,
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
        tokenizer: Any,
        size: tuple[int | None, int | None],
    ) -> "_FitInput":
        """One picture to fit, checked; ``name`` goes before the arguments' names in messages."""
        self._check_prompt(prompt, f"{name}prompt")
        self._check_prompt(subject, f"{name}subject")
        picture = load_picture(image, f"{name}image")
        if token in split_words(prompt, [token]):
            raise ValueError(
                f"{name}prompt={prompt!r} holds the token {token!r} already; describe the picture without it."
            )
        return _FitInput(
            picture,
            subject,
            token,
            self._tokenize(prompt),
            self._tokenize(insert_token(prompt, subject, token), tokenizer),
            self._working_size(picture, *size),
            None if mask is None else load_mask(mask, picture.size, f"{name}mask"),
        )

    @staticmethod
    def _check_autograd() -> None:
        if torch.is_inference_mode_enabled():
            raise ValueError("This needs gradients: call it outside torch.inference_mode() (torch.no_grad() is fine).")

    def _check_can_train(self) -> None:
        self._check_autograd()
        for name, module in self._components_with_weights().items():
            if getattr(module, "_hf_hook", None) is not None:
                raise ValueError(
                    f"The {name} is offloaded, and a fit needs it where the work is done. Call "
                    "pipe.remove_all_hooks() and pipe.to('cuda') first, and enable offloading again afterwards."
                )

    def _base_name(self) -> str:
        """What the base model calls itself: a Hub name, or the last part of a folder's."""
        name = str(getattr(self, "name_or_path", "") or self.config.get("_name_or_path", ""))
        return name.rstrip("/").split("/")[-1] if name.startswith(("/", ".")) or name.count("/") > 1 else name

    # -------------------------------------------------------------------- stage two: inversion

    def _source_prompt(self, prompt: str, target_tokens: Sequence[str]) -> str:
        """``prompt`` with each loaded token that a target holds put before its subject."""
        for token in target_tokens:
            adapter, _ = self._loaded.adapters[token]
            if token not in split_words(prompt, [token]):
                prompt = insert_token(prompt, adapter.subject, token)
        return prompt

    def _fitting_tokens(self, prompt: str, asked: str | None) -> list[str]:
        """The tokens to put into a source prompt: the one asked for, or none where it says one itself, or those of
        the loaded identities whose subject it names."""
        if asked is not None:
            return [asked]
        if self._tokens_in([prompt]):
            return []
        words = f" {' '.join(split_words(prompt))} "
        fitting = {
            token: adapter.subject.lower()
            for token, (adapter, _) in self._loaded.adapters.items()
            if f" {' '.join(split_words(adapter.subject))} " in words
        }
        if len(set(fitting.values())) < len(fitting):
            raise ValueError(
                f"Several loaded identities stand before the same noun in {prompt!r}: {', '.join(fitting)}. "
                f"Say which, identity={next(iter(fitting))!r}, or write the tokens into the prompt."
            )
        return list(fitting)

    def _tokens_in(self, prompts: Sequence[str]) -> list[str]:
        return [t for t in self._loaded.adapters if any(t in split_words(p, [t]) for p in prompts)]

    def invert(
        self,
        image: Any,
        prompt: str,
        method: str = "direct",
        num_inference_steps: int = 50,
        *,
        identity: Any = None,
        guidance_scale: float = 4.5,
        negative_prompt: str = "",
        generator: torch.Generator | None = None,
        height: int | None = None,
        width: int | None = None,
        clip_skip: int | None = None,
    ) -> Inversion:
        """From a picture to the noise that leads back to it under ``prompt``.

        Args:
            image: the picture.
            prompt: the source prompt; of a loaded (or passed) identity the token is put before its subject by itself.
            method: "direct" (Ju et al. 2023), "ddim" (Song et al. 2021), "null_text" (Mokady et al. 2023),
                "negative_prompt" (Miyake et al. 2023) or "edit_friendly" (Huberman-Spiegelglas et al. 2024).
            num_inference_steps: of the inversion and of the edits that use it.
            identity: an identity to load for this call.
            guidance_scale: what "null_text" optimises for; the others serve any.
            generator: of "edit_friendly"'s noise; the others draw none.

        Raises:
            TypeError, ValueError: an input that can't be used; nothing has been done then.
        """
        self._check_ready()
        check_method(method)
        if method == "null_text":
            self._check_autograd()
        self._check_prompt(prompt, "prompt")
        EditSettings(guidance_scale=guidance_scale)
        schedule = noise_schedule(self.scheduler, num_inference_steps)
        picture = load_picture(image)
        size = self._working_size(picture, height, width)
        with self._with_identity(identity) as asked:
            prompt = self._source_prompt(prompt, self._fitting_tokens(prompt, asked))
            tokens, negative = self._tokenize(prompt), self._tokenize(negative_prompt)
            latents = self._encode_picture(picture, *size)
            found = self._invert(latents, tokens, method, schedule, guidance_scale, negative, generator, clip_skip)
        self.maybe_free_model_hooks()
        return found

    def _invert(
        self,
        latents: torch.Tensor,
        prompt: TokenizedPrompt,
        method: str,
        schedule: NoiseSchedule,
        guidance_scale: float,
        negative_prompt: TokenizedPrompt,
        generator: torch.Generator | None,
        clip_skip: int | None,
    ) -> Inversion:
        embeds = self._encode_prompt(prompt, clip_skip)
        negative = self._encode_prompt(negative_prompt, clip_skip)
        denoise = self._denoiser(schedule)
        controls = {True: self._spatial_control([prompt]), False: self._spatial_control([None])}
        # null-text also asks for the unconditional branch, which holds no token: nothing to mask there
        controlled = _ByPrompt(embeds, controls)

        def denoise_controlled(x: torch.Tensor, level: int, prompt_embeds: torch.Tensor) -> torch.Tensor:
            controlled.is_source = prompt_embeds is embeds
            return denoise(x, level, prompt_embeds)

        with (
            self._frozen_unet(),
            attention_control(self.unet, controlled, *latents.shape[-2:]),
            self.progress_bar(total=num_inversion_steps(method, schedule.num_steps)) as bar,
        ):
            found = INVERSIONS[method](
                denoise_controlled, latents, schedule, embeds, negative, guidance_scale, generator,
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

    # -------------------------------------------------------------------- stage two: the edit

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
        edit: str = "auto",
        blend_threshold: float = EditSettings.blend_threshold,
        guidance_rescale: float = 0.0,
        guidance_stop: float = EditSettings.guidance_stop,
        strength: float = 1.0,
        keep_words: Sequence[str] | None = None,
        keep_pixels: bool = False,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        clip_skip: int | None = None,
        return_attention_maps: bool = False,
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
            guidance_stop: share of the steps after which the edit goes on unguided (Kynkäänniemi et al. 2024);
                1 is prompt-to-prompt's own, guided to the end.
            cross_replace_steps: share of the steps in which words common to both prompts keep the source's
                cross-attention; or ``{"word": share, "default_": share}``.
            self_replace_steps: share of the steps in which the self-attention at 1/16 of the picture's side and
                below is the source's.
            reweight: word of the target -> factor on its attention.
            blend_words: None confines the edit to where the changed words look, a list to where these words look
                (in source or target), False lets it change the whole picture.
            edit_mask: where the edit may change the picture, white inside; replaces the words' own region.
            keep_words: words (of source or target) whose place is taken out of the words' region.
            keep_pixels: outside the region, return the picture's own pixels, not the autoencoder's; its border is
                feathered inwards.
            strength: share of the noise levels that the edit goes through; lower stays nearer to the picture
                ("edit_friendly" was published with 0.64).
            generator: of the noise, without ``image`` or with ``inversion="edit_friendly"``.
            output_type: "pil", "np", "pt" or "latent".
            callback_on_step_end: ``f(pipe, step, timestep, tensors)``; it may return ``{"latents": ...}`` and set
                ``pipe._interrupt = True`` to stop early.
            edit: "auto", "replace" or "refine", see ``prompt_alignment.align_prompts``.
            blend_threshold: of the words' maps, in (0, 1); lower lets the edit reach farther.
            negative_prompt: what to steer away from; without ``image`` also a list, one for each prompt.
            num_images_per_prompt, prompt_embeds, negative_prompt_embeds, latents: only without ``image``; an edit
                of a picture is deterministic and needs the words.
            return_attention_maps: also return where each word of the first target looked.

        Returns:
            ``S2EditPipelineOutput``, or with ``return_dict=False`` the tuple of its fields, images first, those that
            weren't asked for None.

        Raises:
            TypeError, ValueError: an input that can't be used; nothing has been done then.
        """
        self._check_ready()
        self._interrupt = False
        settings = EditSettings(
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            guidance_stop=guidance_stop,
            strength=strength,
            edit=edit,
            cross_replace_steps=cross_replace_steps,
            self_replace_steps=self_replace_steps,
            reweight=reweight,
            blend_words=blend_words,
            keep_words=keep_words,
            blend_threshold=blend_threshold,
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

        drawing = image is None and not hasattr(inversion, "trajectory")
        if drawing:
            for name, given in (
                ("source_prompt", source_prompt), ("inversion", inversion), ("reweight", reweight),
                ("edit_mask", edit_mask), ("keep_words", keep_words), ("return_attention_maps", return_attention_maps),
                ("keep_pixels", keep_pixels),
            ):  # fmt: skip
                if given is not None and given is not False:
                    raise ValueError(f"{name}= is for editing a picture: pass image= too.")
            if prompt is not None and prompt_embeds is not None:
                raise ValueError("prompt and prompt_embeds say the same twice; pass one of them.")
        else:
            for name, given in (
                ("prompt_embeds", prompt_embeds), ("negative_prompt_embeds", negative_prompt_embeds),
                ("latents", latents),
            ):  # fmt: skip
                if given is not None:
                    raise ValueError(f"{name} can't be combined with image: the edit is made from the words.")
            if num_images_per_prompt != 1:
                raise ValueError("num_images_per_prompt: an edit is deterministic, a second one would be the same.")
            if keep_pixels and (image is None or output_type == "latent"):
                raise ValueError("keep_pixels=True needs image=, and pictures for an output, not latents.")
        with self._with_identity(identity) as asked:
            if drawing:
                output = self._draw(
                    prompt, num_inference_steps, guidance_scale, guidance_rescale, generator, call_back,
                    negative_prompt, num_images_per_prompt, prompt_embeds, negative_prompt_embeds, latents, height,
                    width, clip_skip, output_type,
                )  # fmt: skip
            else:
                output = self._edit(
                    prompt, image, source_prompt, asked, inversion, num_inference_steps, settings, edit_mask,
                    keep_pixels, generator, call_back, "" if negative_prompt is None else negative_prompt, height,
                    width, clip_skip, return_attention_maps, output_type,
                )  # fmt: skip
        self.maybe_free_model_hooks()
        return output if return_dict else tuple(getattr(output, field.name) for field in fields(output))

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
        latents: torch.Tensor | None,
        height: int | None,
        width: int | None,
        clip_skip: int | None,
        output_type: str,
    ) -> S2EditPipelineOutput:
        """Draw from noise; a loaded identity's mask applies here too: it stays where it was in its picture."""
        schedule = noise_schedule(self.scheduler, 50 if num_inference_steps is None else num_inference_steps)
        listed = isinstance(negative_prompt, (list, tuple))
        negatives = [self._tokenize(text or "") for text in (negative_prompt or [] if listed else [negative_prompt])]
        count = len(prompt_embeds) if prompt_embeds is not None else 1 if isinstance(prompt, str) else len(prompt or [])
        if listed and len(negatives) != count:
            raise ValueError(f"negative_prompt lists {len(negatives)} for {count} prompts; give one for all, or each.")
        if not isinstance(num_images_per_prompt, int) or num_images_per_prompt < 1:
            raise ValueError(
                f"num_images_per_prompt must be a whole number of at least 1, not {num_images_per_prompt!r}."
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
            conditional = torch.cat([self._encode_prompt(t, clip_skip) for t in tokenized])
            prompts = [t for t in tokenized for _ in range(num_images_per_prompt)]
        else:
            conditional = prompt_embeds.to(self._execution_device, self.unet.dtype)
            prompts = [None] * (len(conditional) * num_images_per_prompt)
        conditional = conditional.repeat_interleave(num_images_per_prompt, 0)
        if negative_prompt_embeds is None:
            encoded = torch.cat([self._encode_prompt(tokens, clip_skip) for tokens in negatives])
            negative = encoded.repeat_interleave(len(conditional) // len(encoded), 0)
        else:
            negative = negative_prompt_embeds.to(conditional).repeat_interleave(
                len(conditional) // len(negative_prompt_embeds), 0
            )
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
        tensors = {"prompt_embeds": conditional, "negative_prompt_embeds": negative}
        with (
            attention_control(self.unet, control, h, w),
            self.progress_bar(total=schedule.num_steps) as bar,
        ):

            def on_step(step: int, level: int, x: torch.Tensor) -> torch.Tensor | None:
                bar.update()
                return call_back(step, int(schedule.timesteps[level - 1]), {"latents": x, **tensors})

            final = sample_from_noise(
                self._denoiser(schedule),
                schedule,
                latents.to(conditional),
                conditional,
                negative,
                guidance_scale,
                guidance_rescale,
                on_step,
            )
        images, flagged = self._finish(final, output_type)
        return S2EditPipelineOutput(images=images, nsfw_content_detected=flagged)

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
        negative_prompt: str | list[str],
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
        negative_tokens = self._tokenize(negative_prompt)
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
                found, source, method, schedule, settings.guidance_scale, negative_tokens, generator, clip_skip
            )
        negative = self._encode_prompt(negative_tokens, clip_skip)
        source_embeds = self._encode_prompt(source, clip_skip)
        target_embeds = torch.cat([self._encode_prompt(t, clip_skip) for t in targets])
        rows = BranchRows(len(targets), source_unconditional=not inversion.pinned)
        # negative-prompt inversion asks the unconditional branch with the source's words, [I] among them
        unconditional = source if inversion.method == "negative_prompt" else None
        plain = [unconditional] * (len(targets) + int(rows.source_unconditional))
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
        tensors = {"prompt_embeds": target_embeds, "negative_prompt_embeds": negative}
        with (
            attention_control(self.unet, control, *latent_size),
            self.progress_bar(total=settings.num_steps(schedule)) as bar,
        ):

            def on_step(step: int, level: int, x: torch.Tensor) -> torch.Tensor | None:
                bar.update()
                return call_back(step, int(schedule.timesteps[level - 1]), {"latents": x, **tensors})

            edited = sample_edits(
                self._denoiser(schedule), schedule, inversion, source_embeds, target_embeds, negative, settings,
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


def _tokenizer_with(plain: Any, tokens: list[str]) -> Any:
    """``plain`` itself without ``tokens``; else a copy that knows them and names them in ``s2edit_tokens``."""
    if not tokens:
        return plain
    tokenizer = with_tokens(plain, tokens)
    tokenizer.s2edit_tokens = tuple(tokens)
    return tokenizer


@dataclass(frozen=True)
class _FitInput:
    """A picture that ``fit_identity`` was given, and what is asked of it: prompts without and with the token, the
    (height, width) to work at, and the caller's own mask (H, W) or None."""

    picture: PIL.Image.Image
    subject: str
    token: str
    prompt: TokenizedPrompt
    prompt_with_token: TokenizedPrompt
    size: tuple[int, int]
    mask: torch.Tensor | None


class _ByPrompt:
    """One control for the source's branch, another for the unconditional one, by which of them asks."""

    def __init__(self, embeds: torch.Tensor, controls: Mapping[bool, AttentionController]) -> None:
        self.controls, self.is_source = controls, True

    def wants(self, site: Any) -> bool:
        return self.controls[self.is_source].wants(site)

    def __call__(self, probs: torch.Tensor, site: Any) -> torch.Tensor:
        return self.controls[self.is_source](probs, site)


def _map_picture(attention: torch.Tensor, size: tuple[int, int]) -> PIL.Image.Image:
    values = (attention / attention.max().clamp(min=1e-12) * 255).round().byte().cpu().numpy()
    return PIL.Image.fromarray(values).resize(size, PIL.Image.Resampling.BICUBIC)
