"""What a picture shows, by the model's own judgement: of two captions, the better one lets it predict the noise better.

A denoiser is a classifier (Li et al. 2023, "Your Diffusion Model is Secretly a Zero-Shot Classifier"): the same noises
are laid over the picture, and each caption's denoising error is measured. A vocabulary has far too many captions to ask
about each. So one choice after the other is made with all others as they stand (coordinate ascent), and the worse half
of the choices is dropped before the better one is measured under more noise (successive halving).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from .describe_vocabulary import Template, Wording
from .family_base import ModelFamily
from .prompt_embeds import PromptEmbeds, join

LEVELS = (0.5, 0.3, 0.7)
"""Noise levels that phrases are compared at: shares of the way from the picture to noise."""
NOUN_LEVELS = (0.8, 0.6, 0.9, 0.7)
"""Those that nouns are compared at, where the whole figure is still open."""
NOISES = 2
"""Noises at each level; every caption meets the same ones."""
ROUNDS = 2
"""How often each choice is made: the second time all others are there."""


class DenoisingJudge:
    """Denoising errors of one picture under captions; each is measured once.

    Args:
        latents: (1, C, h, w), the picture's.
    """

    def __init__(self, family: ModelFamily, latents: torch.Tensor) -> None:
        self.family, self.latents, self.dtype = family, latents, family.dtype
        self.schedule = family.training_schedule(family.pixel_size(latents))
        self.rows = max(1, min(32, 2**15 // latents.shape[-2:].numel()))  # in one pass, by what a card holds
        generator = torch.Generator().manual_seed(0)  # its own: looking must not change what is drawn after it
        noises = torch.randn((NOISES, *latents.shape[1:]), generator=generator, dtype=torch.float32)
        self.noises = noises.to(latents).split(1)
        self._embeds: dict[str, PromptEmbeds] = {}
        self._errors: dict[tuple[str, float, int], float] = {}

    @torch.no_grad()
    def errors(self, captions: Sequence[str], share: float, k: int) -> list[float]:
        """The logarithm of the mean squared error under each caption, at the level ``share``, under the noise ``k``."""
        missing = [caption for caption in dict.fromkeys(captions) if (caption, share, k) not in self._errors]
        level, noise = max(1, round(share * self.schedule.num_steps)), self.noises[k]
        x = self.schedule.noised(self.latents, noise, level)
        target = self.schedule.target(self.latents, noise, level)
        timestep = self.schedule.timesteps[level - 1].item()
        for start in range(0, len(missing), self.rows):
            batch = missing[start : start + self.rows]
            embeds = self._encoded(batch)
            output = self.family.denoise(x.expand(len(batch), -1, -1, -1), timestep, embeds, self.dtype)
            each = (output.float() - target.float()).square().mean((1, 2, 3))
            for caption, error in zip(batch, each.tolist(), strict=True):
                self._errors[caption, share, k] = math.log(max(error, 1e-30))
        return [self._errors[caption, share, k] for caption in captions]

    def _encoded(self, captions: Sequence[str]) -> PromptEmbeds:
        new = [caption for caption in captions if caption not in self._embeds]
        if new:
            encoded = self.family.encode([self.family.tokenize(caption) for caption in new])
            self._embeds |= {caption: encoded.rows(slice(i, i + 1)) for i, caption in enumerate(new)}
        return join([self._embeds[caption] for caption in captions])

    def best(self, captions: Sequence[str], levels: Sequence[float] = LEVELS) -> tuple[int, float]:
        """Which caption fits best, and how sure that is: by what share the error grows under the second best. 0 where
        there is only one."""
        alive, totals = list(range(len(captions))), [0.0] * len(captions)
        draws = [(share, k) for k in range(NOISES) for share in levels]
        for n, draw in enumerate(draws, 1):
            for i, error in zip(alive, self.errors([captions[i] for i in alive], *draw), strict=True):
                totals[i] += error
            alive.sort(key=lambda i: totals[i])
            if n % 2 == 0:
                alive = alive[: max(2, math.ceil(len(alive) / 2))]
        if len(alive) == 1:
            return 0, 0.0
        return alive[0], math.expm1((totals[alive[1]] - totals[alive[0]]) / len(draws))


Allowed = Mapping[int, Sequence[Wording]]
"""Group -> the wordings that it may have; a group that isn't there may have any."""


@dataclass
class Choices:
    """A caption of ``template`` in the making: ``chosen`` has a wording for each group, or None where nothing is said
    yet, ``scores`` how sure each is: the least sure of the choices that were made for it."""

    template: Template
    chosen: list[Wording | None]
    scores: dict[int, float]

    def said(self) -> list[str]:
        """What each group says."""
        return [self.template.saying(g, wording) for g, wording in enumerate(self.chosen)]

    def caption(self, g: int | None = None, wording: Wording | None = None) -> str:
        """The caption; with ``wording`` in the group ``g``, where that is given."""
        said = self.said()
        if g is not None:
            said[g] = self.template.saying(g, wording)
        return self.template.caption(said)


def choose_noun(judge: DenoisingJudge, templates: Sequence[Template], nouns: Sequence[str]) -> Choices:
    """A caption that says only what the subject is: one of ``nouns``, or where none of them is known, any.

    It is asked before all else, and not again: beside "long hair" and "a moustache" hardly anything is left that
    would tell a lady from a man."""
    starts = []
    for template in templates:
        for phrase in range(len(template.groups[template.subject].phrases)):
            choices = Choices(template, [None] * len(template.groups), {})
            choices.chosen[template.subject] = Wording(phrase)
            starts.append(choices)
    known = [one for one in starts if one.said()[one.template.subject] in nouns]
    starts = known or starts
    best, score = judge.best([choices.caption() for choices in starts], NOUN_LEVELS)
    starts[best].scores[starts[best].template.subject] = score
    return starts[best]


def choose_all(
    judge: DenoisingJudge, choices: Choices, allowed: Allowed, on_choice: Callable[[], object] = lambda: None
) -> None:
    """Choose what each group says, the last ones, which tell of the largest things, first. Called twice as often as
    there are groups: ``on_choice``."""
    groups = [g for g in reversed(range(len(choices.template.groups))) if g != choices.template.subject]
    for _ in range(ROUNDS):
        for g in groups:
            _choose(judge, choices, g, allowed.get(g))
            on_choice()


def _choose(judge: DenoisingJudge, choices: Choices, g: int, allowed: Sequence[Wording] | None) -> None:
    """The phrase of the group ``g``, then word by word what is in its slots."""
    group, now = choices.template.groups[g], choices.chosen[g]
    firsts = []
    for k, phrase in enumerate(group.phrases):
        ways = phrase.wordings(k) if allowed is None else [wording for wording in allowed if wording.phrase == k]
        if ways and now is not None and group.phrases[now.phrase].slots == phrase.slots and now.words:
            # a colour stays where the thing is exchanged
            firsts.append(next((way for way in ways if way.words == now.words), ways[0]))
        elif ways:
            firsts.append(Wording(k, phrase.blank) if allowed is None else _common(ways))
    best, score = judge.best([choices.caption(g, wording) for wording in firsts])
    chosen, sure = firsts[best], [score] if len(firsts) > 1 else []
    open_ways = [way for way in allowed or () if way.phrase == chosen.phrase]
    for slot, words in enumerate(group.phrases[chosen.phrase].slots):
        open_words = [w for w in words if allowed is None or any(way.words[slot] == w for way in open_ways)]
        wordings = [Wording(chosen.phrase, (*chosen.words[:slot], w, *chosen.words[slot + 1 :])) for w in open_words]
        best, score = judge.best([choices.caption(g, wording) for wording in wordings])
        chosen, sure = wordings[best], [*sure, score] if len(wordings) > 1 else sure
    choices.chosen[g], choices.scores[g] = chosen, min(sure, default=0.0)


def _common(ways: Sequence[Wording]) -> Wording:
    """What all of ``ways``, wordings of one phrase, say; slots in which they differ are empty."""
    words = [each[0] if len(set(each)) == 1 else "" for each in zip(*(way.words for way in ways), strict=True)]
    return Wording(ways[0].phrase, tuple(words))
