"""What the words of an edit ask for: whose attention is taken over until when, and where the picture may change."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .edit_sampling import Confinement
from .prompt_alignment import PromptAlignment, TokenizedPrompt, align_prompts, content_words


@dataclass(frozen=True)
class TargetPlan:
    """How one target is made from the source.

    Attributes:
        prompt: the target prompt.
        alignment: its correspondence with the source prompt.
        cross_until: (L,), the step up to which each token keeps the source's map.
        weights: (L,) factors on the tokens' attention, or None.
        confinement: where it may change, or None for everywhere.
    """

    prompt: TokenizedPrompt
    alignment: PromptAlignment
    cross_until: torch.Tensor
    weights: torch.Tensor | None
    confinement: Confinement | None


def plan_edits(
    source: TokenizedPrompt,
    targets: Sequence[TokenizedPrompt],
    *,
    num_steps: int,
    edit: str,
    cross_replace_steps: float | Mapping[str, float],
    reweight: Mapping[str, float] | None,
    blend_words: Sequence[str] | bool | None,
    region: torch.Tensor | None,
    blend_threshold: float,
    confine_from: float,
) -> list[TargetPlan]:
    """One plan for each target.

    Args:
        num_steps: of the edit.
        edit, cross_replace_steps, reweight, blend_words, blend_threshold: as in ``S2EditPipeline.__call__``.
        region: (h, w) of 0 and 1 where the caller says where the edit may reach.
        confine_from: the share of the steps after which the source is kept outside.

    Raises:
        ValueError: a number out of its range, or a word that no prompt holds.
    """
    for name in reweight or {}:
        _find_in_any(targets, name, "reweight")
    if isinstance(cross_replace_steps, Mapping):
        for name in cross_replace_steps:
            if name != "default_":
                _find_in_any(targets, name, "cross_replace_steps")
    if isinstance(blend_words, str):
        blend_words = [blend_words]
    plans = []
    for target in targets:
        alignment = align_prompts(source, target, edit)
        weights = _weights(target, reweight)
        confinement = None
        if region is not None or blend_words is not False:
            if isinstance(blend_words, (list, tuple)):
                looks = [tuple(_positions(prompt, word) for word in blend_words) for prompt in (source, target)]
                looks = [tuple(found for found in side if found) for side in looks]
                if not any(looks):
                    raise ValueError(
                        f"blend_words={list(blend_words)!r}: none is in {source.text!r} or {target.text!r}."
                    )
            else:
                changed = set(alignment.changed_target)
                if weights is not None:
                    changed |= set(torch.nonzero(weights != 1)[:, 0].tolist())
                looks = [content_words(source, set(alignment.changed_source)), content_words(target, changed)]
            confinement = Confinement(looks[0], looks[1], region, blend_threshold, confine_from)
        until = _cross_until(target, cross_replace_steps, num_steps)
        plans.append(TargetPlan(target, alignment, until, weights, confinement))
    return plans


def _positions(prompt: TokenizedPrompt, word: str) -> tuple[int, ...]:
    """Where ``word`` is in ``prompt``; nowhere is ()."""
    try:
        return prompt.find(word)
    except ValueError:
        return ()


def _find_in_any(prompts: Sequence[TokenizedPrompt], word: str, argument: str) -> None:
    if not any(_positions(prompt, word) for prompt in prompts):
        raise ValueError(
            f"{argument} names {word!r}, which is in none of the target prompts: {[p.text for p in prompts]}."
        )


def _weights(prompt: TokenizedPrompt, reweight: Mapping[str, float] | None) -> torch.Tensor | None:
    weights = torch.ones(prompt.input_ids.shape[1])
    for word, factor in (reweight or {}).items():
        if not isinstance(factor, (int, float)) or not math.isfinite(factor):
            raise ValueError(f"reweight[{word!r}] must be a number, not {factor!r}.")
        weights[list(_positions(prompt, word))] = float(factor)
    return weights if bool((weights != 1).any()) else None


def _cross_until(prompt: TokenizedPrompt, share: float | Mapping[str, float], num_steps: int) -> torch.Tensor:
    shares = share if isinstance(share, Mapping) else {"default_": share}
    for word, value in shares.items():
        if not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(f"cross_replace_steps must be from 0 to 1, not {value!r} (for {word!r}).")
    until = torch.full((prompt.input_ids.shape[1],), float(shares.get("default_", 0.4)))
    for word, value in shares.items():
        if word != "default_":
            until[list(_positions(prompt, word))] = float(value)
    return (until * num_steps).round()
