"""Drawing from noise: diffusers' own pipeline of the model, with the identities' masks at its attention.

Nothing of the sampling is done here. Every scheduler and every argument is the stock pipeline's; where no identity
takes part, so is the picture, to the bit.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch

from .attention_seam import AttentionAccess, AttentionController, AttentionSite, Cuts
from .attention_spatial import SpatialControl
from .edit_output import S2EditPipelineOutput
from .family_base import ModelFamily
from .identity_prompts import (
    check_prompt,
    check_takes_part,
    check_tokens,
    encode_each,
    spatial_control,
    tokenize_each,
)
from .noise_schedule import check_finite
from .picture_files import read_picture
from .picture_marks import origin_here, with_origin
from .pipeline_work import Work
from .prompt_columns import TokenizedPrompt
from .prompt_embeds import join
from .prompt_tokenizing import TOKENIZING
from .prompt_words import split_words

EMBEDDINGS = (
    "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds",
)  # fmt: skip


def draw(
    work: Work,
    arguments: Mapping[str, Any],
    callback: Callable[..., Any] | None,
    callback_tensors: Sequence[str],
    identity_token: str | None = None,
) -> S2EditPipelineOutput:
    """Draw as the stock pipeline would with ``arguments``.

    Args:
        arguments: of the stock pipeline's call, by its names; a None is left to its default.
        callback: ``f(pipe, step, timestep, tensors)``, shown the tensors ``callback_tensors``.
        identity_token: the identity that the call was made with, or None.

    Raises:
        TypeError: the stock pipeline has no such argument.
        ValueError: as it raises, or a learned token where it can't be served.
        FloatingPointError: the latents are no numbers any more; the message names the step.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    check_drawn(work.family, given)
    given = work.family.drawing_arguments(given)
    stock = work.family.stock()
    stock.encode_prompt = _one_at_a_time(stock.encode_prompt)
    stock.set_progress_bar_config(**getattr(work.family.pipe, "_progress_bar_config", {}))
    unknown = sorted(given.keys() - inspect.signature(stock.__call__).parameters.keys())
    if unknown:
        raise TypeError(f"{type(stock).__name__}, which draws this model's pictures, has no argument {unknown[0]!r}.")
    texts = _prompts(given)
    for text in texts:
        check_tokens(text, work.family, work.overlay)
    check_takes_part(identity_token, texts, work.overlay)
    names_token = any(token in split_words(text, [token]) for text in texts for token in work.overlay.tokens)
    if names_token or given.get("height") or given.get("width"):
        # of a single side Stable Diffusion's pipeline takes no notice
        given |= {name: given.get(name) or work.family.native_size for name in ("height", "width")}
    seam: AbstractContextManager[None] = nullcontext()
    if names_token:
        given, prompts = _with_own_embeddings(work, given)
        rows = [prompt for prompt in prompts for _ in range(given.get("num_images_per_prompt", 1))]
        apart = work.family.drawn_branches == "apart" and work.family.draws_null(given)
        seam = work.family.control_attention(_DrawnRows(work, rows, apart=apart), *work.family.drawn_size(given))

    state = work.call.state
    state.guidance_rescale, state.clip_skip = arguments.get("guidance_rescale", 0.0), arguments.get("clip_skip")

    def on_step(stock: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        now = given.get("true_cfg_scale") if stock._guidance_scale is None else stock._guidance_scale
        state.guidance_scale, state.num_timesteps = now, stock.num_timesteps
        check_finite(tensors["latents"], "the drawing", step)
        named = {name: tensors[name] for name in callback_tensors}
        changed = (callback(work.family.pipe, step, timestep, named) if callback is not None else None) or {}
        stock._guidance_scale = state.guidance_scale
        stock._interrupt = work.call.should_stop
        if step + 1 == stock.num_timesteps and given.get("output_type") != "latent":
            decoding.enter_context(work.family.autoencoder_in_range())
            latents = changed.get("latents", tensors["latents"])
            return {**changed, "latents": latents.to(work.family.pipe.vae.dtype)}
        return dict(changed)

    with seam, ExitStack() as decoding:
        names = list(dict.fromkeys(["latents", *callback_tensors]))
        output = stock(**given, callback_on_step_end=on_step, callback_on_step_end_tensor_inputs=names)
    pictures = None
    if given.get("output_type", "pil") == "pil":
        words = [given.get("prompt")] if isinstance(given.get("prompt"), str) else list(given.get("prompt") or texts)
        each = given.get("num_images_per_prompt", 1)
        marks = [origin_here(work.base_model, text, drawn=True) for text in words for _ in range(each)]
        pictures = [with_origin(read_picture(image), mark) for image, mark in zip(output.images, marks, strict=False)]
    return S2EditPipelineOutput(
        images=output.images,
        pictures=pictures,
        nsfw_content_detected=getattr(output, "nsfw_content_detected", None),
        interrupted=work.call.interrupted,
    )


def check_drawn(family: ModelFamily, arguments: Mapping[str, Any]) -> None:
    """Raises:
    ValueError: a component is missing that the drawing needs; from embeddings alone no text encoder is.
    """
    words = ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2")
    has_words = any(arguments.get(name) is not None for name in words)
    family.check_drawing(reads_words=has_words or arguments.get("prompt_embeds") is None)
    pictures = (arguments.get("ip_adapter_image"), arguments.get("ip_adapter_image_embeds"))
    if family.num_picture_adapters and all(picture is None for picture in pictures):
        raise ValueError(
            "An IP-Adapter is loaded: show it something, ip_adapter_image=, or call pipe.unload_ip_adapter() first."
        )


def _one_at_a_time(encode_prompt: Callable[..., Any]) -> Callable[..., Any]:
    """The stock pipeline's way to embeddings, which tokenizes."""

    @functools.wraps(encode_prompt)
    def encode(*args: Any, **kwargs: Any) -> Any:
        with TOKENIZING:
            return encode_prompt(*args, **kwargs)

    return encode


def _prompts(given: Mapping[str, Any]) -> list[str]:
    """All of them; what is no text the stock pipeline refuses."""
    prompts = [given.get(name) for name in ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2")]
    texts = [text for one in prompts for text in (one if isinstance(one, (list, tuple)) else [one])]
    return [text for text in texts if isinstance(text, str)]


def _with_own_embeddings(work: Work, given: dict[str, Any]) -> tuple[dict[str, Any], list[TokenizedPrompt]]:
    """``given`` with embeddings in the words' place: the stock pipeline would take ``[I]``, the token that was added
    last, for the end of the prompt (SDXL pools at the highest id)."""
    family, clip_skip = work.family, given.pop("clip_skip", None)
    texts = given.pop("prompt", None)
    if any(given.get(name) is not None for name in (*EMBEDDINGS, "prompt_2", "negative_prompt_2")):
        raise ValueError(
            "A learned token in a prompt can't be combined with embeddings or a second prompt: leave these out."
        )
    if "max_sequence_length" in given:
        raise ValueError("A learned token's prompt is read at the model's own length: leave max_sequence_length out.")
    texts = list(texts) if isinstance(texts, (list, tuple)) else [texts]
    for text in texts:
        check_prompt(text, "prompt")
    prompts = tokenize_each(texts, family, work.overlay)
    encoded = encode_each(family, prompts, clip_skip)
    negative = given.pop("negative_prompt", None)
    negatives = list(negative) if isinstance(negative, (list, tuple)) else [negative] * len(texts)
    if len(negatives) != len(texts):
        raise ValueError(f"negative_prompt lists {len(negatives)} for {len(texts)} prompts; give one for all, or each.")
    named = {**given, **family.drawn_embeddings(encoded)}
    if family.guidance.form == "branch" or family.draws_null(given):
        with torch.no_grad():
            nulls = join([family.encode_negative(text, encoded, clip_skip) for text in negatives])
        named |= family.drawn_embeddings(nulls, "negative_")
    return named, prompts


class _DrawnRows(AttentionController):
    """The tokens' masks in the stock pipeline's batches: the prompts' rows, and as many unconditional ones where it
    guides, which have none; in the same batch, or by themselves.

    Args:
        apart: it guides, and asks the prompts' rows and the unconditional ones in turn.
    """

    def __init__(self, work: Work, prompts: Sequence[TokenizedPrompt], *, apart: bool) -> None:
        nulls: list[TokenizedPrompt | None] = [None] * len(prompts)
        batches: list[list[TokenizedPrompt | None]] = [[*prompts]]
        if work.family.drawn_branches != "apart":
            batches.append([*prompts, *nulls] if work.family.drawn_branches == "null last" else [*nulls, *prompts])
        self.by_rows: dict[int, SpatialControl] = {len(rows): spatial_control(rows, work.overlay) for rows in batches}
        self.now = self.by_rows[len(prompts)]
        self.apart, self.num_seen, self.is_null = apart, Counter[tuple[str, str]](), False

    def access_needed(self, site: AttentionSite) -> AttentionAccess:
        return self.now.access_needed(site)

    def exchange(
        self, query: torch.Tensor, key: torch.Tensor, site: AttentionSite
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if len(query) not in self.by_rows:
            raise ValueError(
                f"The batch has {len(query)} rows, and {' or '.join(map(str, self.by_rows))} were expected: an "
                "identity can't be drawn with what makes other rows. Leave it out of the prompt, or that argument out."
            )
        self.now = self.by_rows[len(query)]
        self.is_null = self.apart and self.num_seen[site.name, site.kind] % 2 == 1
        self.num_seen[site.name, site.kind] += 1
        return query, key

    def cuts(self, site: AttentionSite, keys: int, device: torch.device) -> Cuts | None:
        return None if self.is_null else self.now.cuts(site, keys, device)

    def __call__(self, probs: torch.Tensor, site: AttentionSite) -> torch.Tensor:
        return probs if self.is_null else self.now(probs, site)
