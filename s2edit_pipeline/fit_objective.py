"""The loss that a fit minimises, of one example."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from .attention_spatial import SpatialControl
from .family_base import ModelFamily
from .fit_losses import cosine, reconstruction_loss, response_loss, semantic_loss
from .fit_settings import TIMESTEP_SAMPLING, FitSettings
from .fit_words import ResponseWords, ToldOtherwise
from .prompt_columns import TokenizedPrompt
from .prompt_embeds import PromptEmbeds, join


@dataclass(frozen=True)
class FitExample:
    """One picture and the token to fit to it.

    Attributes:
        latents: (1, C, h, w).
        prompt: P, without the token.
        prompt_with_token: P~, with it.
        token: the token, as it is spelled.
        mask: (h, w) ``M_obj``, or None without spatial control.
        words: prompts whose effect is kept, or None where none is.
    """

    latents: torch.Tensor
    prompt: TokenizedPrompt
    prompt_with_token: TokenizedPrompt
    token: str
    mask: torch.Tensor | None
    words: ResponseWords | None = None

    @property
    def token_columns(self) -> tuple[int, ...]:
        """The denoiser's, in all segments."""
        return self.prompt_with_token.columns(self.token)

    def token_positions(self, encoder: str) -> list[int]:
        """Among the columns of the segment that the text encoder ``encoder`` reads."""
        segment = self.prompt_with_token.read_by(encoder)
        return [column - segment.offset for column in self.prompt_with_token.columns(self.token, segment.name)]

    def token_id(self, encoder: str) -> int:
        """The token's, in the text encoder ``encoder``."""
        segment = self.prompt_with_token.read_by(encoder)
        return int(segment.ids[encoder][0, segment.kept[self.token_positions(encoder)[0]]])


def draw_levels(
    count: int, sampling: str, num_train: int, generator: torch.Generator | None, device: torch.device
) -> torch.Tensor:
    """(count,) of the noise levels 1 to ``num_train``, one in each of ``count`` equally likely stretches of them."""
    u = (torch.arange(count) + torch.rand(count, generator=generator, device=device).cpu()) / count
    return (TIMESTEP_SAMPLING[sampling](u) * num_train).long().clamp(0, num_train - 1) + 1


@dataclass(frozen=True, eq=False)
class Draw:
    """What chance decides of a step: noise ``levels`` (B,) on the CPU, noise ``epsilon`` (B, C, h, w), and which K
    ``rows`` of these are denoised a second time, under the K prompts that they are ``told``."""

    levels: torch.Tensor
    epsilon: torch.Tensor
    rows: tuple[int, ...] = ()
    told: tuple[ToldOtherwise, ...] = ()


@dataclass(frozen=True, eq=False)
class Losses:
    """The terms at one :class:`Draw`, and cos(e_P, e_[I]) with its sign; ``response`` is 0 where no words are told."""

    reconstruction: torch.Tensor
    semantic: torch.Tensor
    cosine: torch.Tensor
    response: torch.Tensor


class Objective:
    """The loss of one example with the model as it is when asked; what no step changes is made once.

    Args:
        untuned: within it the model is as before the fit.
    """

    def __init__(
        self,
        family: ModelFamily,
        example: FitExample,
        settings: FitSettings,
        untuned: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        assert settings.batch_size is not None and settings.timestep_sampling is not None
        self.family, self.example, self.settings, self.untuned = family, example, settings, untuned
        self.schedule = family.training_schedule(family.pixel_size(example.latents))
        self.batch, self.sampling = settings.batch_size, settings.timestep_sampling
        self.dtype = family.dtype
        self.latents = example.latents.float().expand(self.batch, -1, -1, -1)
        self._controls: dict[tuple[tuple[int, ...], ...], SpatialControl] = {}
        self.sentence: PromptEmbeds | None = None
        if settings.method == "token":  # P doesn't hold the token: nothing that is trained reaches its encoding
            with torch.no_grad():
                self.sentence = family.encode([example.prompt])

    def controlled(self, draw: Draw | None = None) -> AbstractContextManager[None]:
        """The token's mask at the denoiser's attention, for the rows that :meth:`losses` has at ``draw``."""
        example = self.example
        told = () if draw is None else draw.told
        columns = (*[example.token_columns] * self.batch, *(o.prompt_with_token.columns(example.token) for o in told))
        if columns not in self._controls:  # its gates are made once
            masked = example.mask is not None
            self._controls[columns] = SpatialControl(
                {} if example.mask is None else {"token": example.mask},
                [{"token": each} if masked else {} for each in columns],
                renormalize=bool(self.settings.renormalize),
                mask_after=self.settings.mask_after,
            )
        return self.family.control_attention(self._controls[columns], *self.latents.shape[-2:])

    def draw(self, generator: torch.Generator | None, device: torch.device, *, words: bool = True) -> Draw:
        """Made by ``generator`` on its ``device``; without ``words`` nothing is told otherwise."""
        levels = draw_levels(self.batch, self.sampling, self.schedule.num_steps, generator, device)
        epsilon = torch.randn(self.latents.shape, generator=generator, device=device).to(self.latents)
        if self.example.words is None or not words:
            return Draw(levels, epsilon)
        count = self.settings.response_batch_size or self.batch
        rows = torch.randperm(self.batch, generator=generator, device=device)[:count].tolist()
        return Draw(levels, epsilon, tuple(rows), tuple(self.example.words.drawn(count, generator, device)))

    @torch.no_grad()
    def base_response(self, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
        """f_base(x_t, P + w) and f_base(x_t, P), (K, C, h, w) each: the model's before the fit, without the token."""
        with self.untuned():
            told = self.family.encode([*(one.prompt for one in draw.told), self.example.prompt])
            embeds = join([told.rows(slice(0, -1)), *[told.rows(slice(-1, None))] * len(draw.told)])
            rows = list(draw.rows)
            output = self._output(draw.levels[rows].repeat(2), self._noised(draw)[rows].repeat(2, 1, 1, 1), embeds)
        with_word, without = output.chunk(2)
        return with_word, without

    def losses(self, draw: Draw, base: tuple[torch.Tensor, torch.Tensor] | None = None) -> Losses:
        """At what was drawn; ``base``, what :meth:`base_response` gave, where words are told otherwise."""
        example = self.example
        sentence_prompts = [example.prompt] if self.sentence is None else []
        told = [one.prompt_with_token for one in draw.told]
        encoded = self.family.encode([*sentence_prompts, example.prompt_with_token, *told])  # P, and P~ with [I]
        own = len(sentence_prompts)  # the row of P~
        semantics, angles = [], []
        for name, output in encoded.outputs.items():
            of_sentence = output if self.sentence is None else self.sentence.outputs[name]
            sentence = self.family.sentence(of_sentence[0], example.prompt.read_by(name))  # e_P
            if self.settings.detach_sentence:
                sentence = sentence.detach()
            token = output[own, example.token_positions(name)]  # e_[I]
            semantics.append(semantic_loss(sentence, token))  # L_semantic = |cos(e_P, e_[I])|
            angles.append(cosine(sentence, token).mean())
        embeds = encoded.rows(slice(own, own + 1)).expand(self.batch)
        levels, noised, rows = draw.levels, self._noised(draw), list(draw.rows)
        if rows:
            embeds = join([embeds, encoded.rows(slice(own + 1, None))])
            levels, noised = torch.cat([levels, levels[rows]]), torch.cat([noised, noised[rows]])
        output = self._output(levels, noised, embeds)
        response = output.new_zeros((), dtype=torch.float32)
        if rows:
            assert base is not None
            response = response_loss((output[self.batch :], output[rows]), base)
        reconstruction = reconstruction_loss(output[: self.batch], self._target(draw))  # L_recons, under P~
        return Losses(reconstruction, torch.stack(semantics).sum(), torch.stack(angles).mean(), response)

    def total(self, losses: Losses) -> torch.Tensor:
        """L = L_recons + lambda L_semantic, and ours beside them."""
        total = losses.reconstruction + self.settings.semantic_weight * losses.semantic
        return total if self.example.words is None else total + self.settings.response_loss_weight * losses.response

    def reconstruction(self, draw: Draw) -> torch.Tensor:
        """L_recons alone."""
        encoded = self.family.encode([self.example.prompt_with_token])
        return reconstruction_loss(
            self._output(draw.levels, self._noised(draw), encoded.expand(self.batch)), self._target(draw)
        )

    def _noised(self, draw: Draw) -> torch.Tensor:
        return self.schedule.noised(self.latents, draw.epsilon, draw.levels).to(self.dtype)

    def _target(self, draw: Draw) -> torch.Tensor:
        return self.schedule.target(self.latents, draw.epsilon, draw.levels)

    def _output(self, levels: torch.Tensor, noised: torch.Tensor, embeds: PromptEmbeds) -> torch.Tensor:
        return self.family.denoise(noised, self.schedule.timesteps[levels - 1], embeds, self.dtype)
