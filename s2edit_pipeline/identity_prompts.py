"""Prompts that say loaded identities' tokens: where these stand, what they are masked to, and how they are encoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.utils import logging

from .attention_spatial import SpatialControl
from .family_base import ModelFamily
from .identity_overlay import IdentityOverlay
from .object_search import mask_in
from .picture_placement import PlacedPicture
from .prompt_changes import prompt_warning
from .prompt_columns import TokenizedPrompt
from .prompt_embeds import Branch, PromptEmbeds, join
from .prompt_tokenizing import learned_tokens, unknown_words
from .prompt_words import insert_token, split_words, unknown_tokens

logger = logging.get_logger(__name__)

SMALL_VOCABULARY = 5000
"""A tokenizer of fewer words was made for one small world: what it doesn't know, its model has never seen."""


def check_prompt(prompt: Any, name: str) -> None:
    """Raises:
    TypeError, ValueError: ``prompt`` is no text, or an empty one; ``name`` is the argument it came as.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"{name} must be a string, not {type(prompt).__name__}.")
    if not prompt.strip():
        raise ValueError(f"{name} is empty; say what the picture shows, such as 'a photo of a lady with glasses'.")


def check_tokens(prompt: str, family: ModelFamily, overlay: IdentityOverlay) -> None:
    """Raises:
    ValueError: ``prompt`` says something that looks like a learned token, and nothing that is loaded stands for it.
    """
    known = [*overlay.tokens, *(name for one in family.tokenizers.values() for name in learned_tokens(one))]
    unknown = unknown_tokens(prompt, known)
    if unknown:
        loaded = ", ".join(overlay.identities) or "none"
        raise ValueError(
            f"{unknown[0]!r} in {prompt!r} looks like a learned token, and none of that name is loaded (identities "
            f"loaded: {loaded}). Load it first, pipe.load_identity(identity), pass identity=identity, or take the "
            "brackets out of the prompt."
        )


def check_negative(prompt: Any, overlay: IdentityOverlay) -> None:
    """Raises:
    TypeError, ValueError: a negative prompt that is no text, or that says a learned token: away from an identity nobody
        can steer.
    """
    if prompt is None:
        return
    if not isinstance(prompt, str):
        raise TypeError(f"negative_prompt must be one string, not {type(prompt).__name__}: all edits share it.")
    tokens = [token for token in overlay.tokens if token in split_words(prompt, [token])] or unknown_tokens(prompt)
    if tokens:
        raise ValueError(f"negative_prompt={prompt!r} says the learned token {tokens[0]!r}; leave it out there.")


def warn_of_words(source: str, targets: Sequence[str], family: ModelFamily) -> None:
    """Say what about the words will disappoint: a target that isn't the source prompt with some words changed, or words
    that a small vocabulary doesn't have."""
    warnings = [prompt_warning(source, target) for target in targets]
    for tokenizer in family.tokenizers.values():
        if len(tokenizer) < SMALL_VOCABULARY:
            for text in (source, *targets):
                warnings += [
                    f"This model doesn't know the word {word!r}{f' (did you mean {near[0]!r}?)' if near else ''}."
                    for word, near in unknown_words(text, tokenizer).items()
                ]
    for warning in dict.fromkeys(warnings):
        if warning is not None:
            logger.warning(warning)


def tokenize_alike(
    source: str, targets: Sequence[str], family: ModelFamily, overlay: IdentityOverlay
) -> tuple[TokenizedPrompt, list[TokenizedPrompt]]:
    """The source prompt and the targets. What is too long is cut off, with a warning, where source and target go on
    with the same words: nothing of the edit depends on these.

    Raises:
        ValueError: a word of the edit would be cut off.
    """
    before, after = family.tokenize_cut(source), [family.tokenize_cut(target) for target in targets]
    lost = [prompt.lost for prompt in (before, *after)]
    if len(set(lost)) > 1 or any(token in split_words(text, [token]) for text in lost for token in overlay.tokens):
        for prompt in (source, *targets):
            family.tokenize(prompt)  # refuses the first that is too long
    if lost[0]:
        logger.warning(f"The prompt is longer than the text encoder reads; cut off was: {lost[0]!r}.")
    return before, after


def tokenize_each(texts: Sequence[str], family: ModelFamily, overlay: IdentityOverlay) -> list[TokenizedPrompt]:
    """Prompts that are drawn from; what is too long is cut off, with a warning.

    Raises:
        ValueError: a learned token would be cut off.
    """
    return [tokenize_alike(text, [], family, overlay)[0] for text in texts]


def identities_in(prompts: Sequence[str], overlay: IdentityOverlay) -> list[str]:
    """The loaded identities that ``prompts`` say."""
    return [token for token in overlay.identities if any(token in split_words(prompt, [token]) for prompt in prompts)]


def check_takes_part(token: str | None, prompts: Sequence[str], overlay: IdentityOverlay) -> None:
    """Raises:
    ValueError: the identity ``token`` is passed for this call, has no weights, and no prompt has a token of it.
    """
    if token is None or (adapter := overlay.identities[token].adapter).weights:
        return
    if not any(name in split_words(prompt, [name]) for prompt in prompts for name in adapter.learned):
        raise ValueError(
            f"The identity {token!r} is a token alone, without weights, and no prompt has it: write {token} before "
            f"{adapter.subject!r}, or leave identity= out."
        )


def with_identities(prompt: str, tokens: Sequence[str], overlay: IdentityOverlay) -> str:
    """``prompt`` with each loaded identity of ``tokens`` put before its subject.

    Raises:
        ValueError: the subject isn't in it.
    """
    for token in tokens:
        prompt = insert_token(prompt, overlay.identities[token].adapter.subject, token, fitted=True)
    return prompt


def fitting_identities(prompt: str, chosen: str | None, overlay: IdentityOverlay) -> list[str]:
    """The identities to put into a source prompt: the chosen one, or none where it says one itself, or those of the
    loaded identities whose subject it names.

    Raises:
        ValueError: several stand before the same noun.
    """
    if chosen is not None:
        return [chosen]
    if identities_in([prompt], overlay):
        return []
    words = f" {' '.join(split_words(prompt))} "
    fitting = {
        token: loaded.adapter.subject.lower()
        for token, loaded in overlay.identities.items()
        if f" {' '.join(split_words(loaded.adapter.subject))} " in words
    }
    if len(set(fitting.values())) < len(fitting):
        raise ValueError(
            f"Several loaded identities stand before the same noun in {prompt!r}: {', '.join(fitting)}. "
            f"Say which, identity={next(iter(fitting))!r}, or write the tokens into the prompt."
        )
    return list(fitting)


def spatial_control(
    prompts: Sequence[TokenizedPrompt | None], overlay: IdentityOverlay, placed: PlacedPicture | None = None
) -> SpatialControl:
    """Each learned token's mask for each row of a batch, where ``placed`` shows what it is of; rows without a prompt
    (unconditional) have none."""
    masks, columns = {}, []
    switches: dict[str, list[str]] = {"renormalize": [], "mask_after": []}
    for loaded in overlay.identities.values():
        for token, (_, mask) in loaded.adapter.learned.items():
            if mask is not None:
                masks[token] = mask if placed is None else mask_in(placed, mask, loaded.adapter.settings)
                for switch, tokens in switches.items():
                    tokens += [token] if loaded.adapter.settings.get(switch) else []
    for prompt in prompts:
        said = () if prompt is None else [token for token in masks if prompt.says(token)]
        columns.append({token: prompt.columns(token) for token in said if prompt is not None})
    return SpatialControl(masks, columns, renormalize=switches["renormalize"], mask_after=switches["mask_after"])


@torch.no_grad()
def encode_each(family: ModelFamily, prompts: Sequence[TokenizedPrompt], clip_skip: int | None = None) -> PromptEmbeds:
    """Encoded one by one, so that a prompt's embeddings don't depend on those beside it, not even in rounding."""
    return join([family.encode([prompt], clip_skip) for prompt in prompts])


def branches(role: str, prompts: Sequence[TokenizedPrompt], embeds: PromptEmbeds) -> list[Branch]:
    """One branch for each prompt."""
    return [Branch(role, embeds.rows(slice(i, i + 1)), prompt) for i, prompt in enumerate(prompts)]
