"""What the words of an edit ask for: whose attention is taken over until when, and where the picture may change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .argument_checks import check_share, is_number
from .edit_settings import CROSS_REPLACE_STEPS, EditSettings
from .prompt_alignment import PromptAlignment, align_prompts, content_words
from .prompt_columns import TokenizedPrompt


@dataclass(frozen=True)
class Confinement:
    """Where one target may differ from the source.

    Attributes:
        source_tokens, target_tokens: positions of the words whose maps show it, a tuple for each word.
        kept_source, kept_target: likewise, of words whose place is taken out of it.
        region: (h, w) of 0 and 1, given from outside; then no map is looked at.
        threshold: see ``object_masks.edit_region``.
        start: the share of the steps after which the source is kept outside.
        change_threshold: in the end, cells that changed by less than this share of the most changed one are kept too.
    """

    source_tokens: tuple[tuple[int, ...], ...]
    target_tokens: tuple[tuple[int, ...], ...]
    region: torch.Tensor | None
    threshold: float
    start: float
    kept_source: tuple[tuple[int, ...], ...] = ()
    kept_target: tuple[tuple[int, ...], ...] = ()
    change_threshold: float = 0.0


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
    settings: EditSettings,
    *,
    num_steps: int,
    region: torch.Tensor | None,
    weights: Sequence[Mapping[str, float]] = (),
) -> list[TargetPlan]:
    """One plan for each target.

    Args:
        num_steps: of the edit.
        region: (h, w) of 0 and 1 where the caller says where the edit may reach.
        weights: for each target, word -> factor, as ``settings.reweight`` has it for all of them; these win.

    Raises:
        ValueError: a number out of its range, or a word that no prompt holds.
    """
    reweight, blend_words = settings.reweight, settings.blend_words
    cross_replace_steps, keep_words = settings.cross_replace_steps, settings.keep_words
    for name in reweight or {}:
        _find_in_any(targets, name, "reweight")
    if isinstance(cross_replace_steps, Mapping):
        for name in cross_replace_steps:
            if name != "default_":
                _find_in_any(targets, name, "cross_replace_steps")
    if isinstance(blend_words, str):
        blend_words = [blend_words]
    keep_words = [keep_words] if isinstance(keep_words, str) else list(keep_words or [])
    if keep_words and region is not None:
        raise ValueError(
            f"keep_words={keep_words!r} takes words out of the words' region, and edit_mask is taken as it is: leave "
            "their place out of it yourself."
        )
    if region is not None:
        settings.check_region("beside edit_mask, which is taken as it is")
        if blend_words not in (None, False):
            raise ValueError(
                f"blend_words={blend_words!r} says where the edit may reach, and so does edit_mask; leave one out."
            )
    if keep_words and blend_words is False:
        raise ValueError(f"keep_words={keep_words!r} takes words out of the edit's region; blend_words=False has none.")
    for name in keep_words:
        _find_in_any([source, *targets], name, "keep_words")
    plans = []
    for i, target in enumerate(targets):
        alignment = align_prompts(source, target, settings.edit)
        factors = _weights(target, {**(reweight or {}), **(weights[i] if weights else {})})
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
                if factors is not None:
                    changed |= set(torch.nonzero(factors != 1)[:, 0].tolist())
                looks = [content_words(source, set(alignment.changed_source)), content_words(target, changed)]
            kept = [tuple(_positions(prompt, word) for word in keep_words) for prompt in (source, target)]
            kept_source, kept_target = (tuple(found for found in side if found) for side in kept)
            confinement = Confinement(
                looks[0],
                looks[1],
                region,
                settings.blend_threshold,
                settings.confine_from,
                kept_source,
                kept_target,
                settings.change_threshold if region is None else 0.0,  # a caller's own region is taken as it is
            )
        until = _cross_until(target, cross_replace_steps, num_steps)
        plans.append(TargetPlan(target, alignment, until, factors, confinement))
    return plans


def _positions(prompt: TokenizedPrompt, word: str) -> tuple[int, ...]:
    """Where ``word`` is in ``prompt``; nowhere is ()."""
    try:
        return prompt.find(word)
    except ValueError:
        return ()


def _find_in_any(prompts: Sequence[TokenizedPrompt], word: str, argument: str) -> None:
    if not any(_positions(prompt, word) for prompt in prompts):
        raise ValueError(f"{argument} names {word!r}, which is in none of the prompts: {[p.text for p in prompts]}.")


def _weights(prompt: TokenizedPrompt, reweight: Mapping[str, float] | None) -> torch.Tensor | None:
    weights = torch.ones(prompt.num_columns)
    for word, factor in (reweight or {}).items():
        if not is_number(factor):
            raise ValueError(f"reweight[{word!r}] must be a number, not {factor!r}.")
        weights[list(_positions(prompt, word))] = float(factor)
    return weights if bool((weights != 1).any()) else None


def _cross_until(prompt: TokenizedPrompt, share: float | Mapping[str, float], num_steps: int) -> torch.Tensor:
    shares = share if isinstance(share, Mapping) else {"default_": share}
    for word, value in shares.items():
        check_share("cross_replace_steps" + (f" of {word!r}" if isinstance(share, Mapping) else ""), value)
    until = torch.full((prompt.num_columns,), float(shares.get("default_", CROSS_REPLACE_STEPS)))
    for word, value in shares.items():
        if word != "default_":
            until[list(_positions(prompt, word))] = float(value)
    return (until * num_steps).round()
