"""Stage one of S2Edit: fitting a token, and adapter or model weights, to one picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import nn

from .attention_spatial import SpatialControl
from .family_base import ModelFamily
from .fit_checkpoint import FitCheckpoint
from .fit_lora_start import start_along_gradient
from .fit_losses import cosine, reconstruction_loss, semantic_loss
from .fit_settings import TIMESTEP_SAMPLING, FitSettings, bitsandbytes
from .fit_weights import TunedWeights, checkpointed, frozen, full_weights, lora_weights, no_weights
from .noise_schedule import gradient_scaler
from .prompt_columns import TokenizedPrompt
from .prompt_embeds import PromptEmbeds
from .prompt_tokens import token_rows

FUSED_ON = ("cpu", "cuda")
"""Where PyTorch has AdamW in one kernel."""

CHECK_EVERY, CHECK_LEVELS, CHECK_GAIN, CHECK_PATIENCE = 5, 4, 0.01, 2
"""Early stop: steps between two looks at the fixed-noise loss, its noise levels, the share by which a look has to beat
the best one, and how many may fail to before the fit ends."""


def make_optimizer(name: str, groups: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
    """AdamW without decay; "adamw_8bit" is bitsandbytes'.

    Raises:
        ImportError: bitsandbytes isn't there.
    """
    if name == "adamw":
        return torch.optim.AdamW(groups, weight_decay=0.0, fused=device.type in FUSED_ON)
    adamw: torch.optim.Optimizer = bitsandbytes().optim.AdamW8bit(groups, weight_decay=0.0)
    return adamw


@dataclass(frozen=True)
class FitExample:
    """One picture and the token to fit to it.

    Attributes:
        latents: (1, C, h, w).
        prompt: P, without the token.
        prompt_with_token: P~, with it.
        token: the token, as it is spelled.
        mask: (h, w) ``M_obj``, or None without spatial control.
    """

    latents: torch.Tensor
    prompt: TokenizedPrompt
    prompt_with_token: TokenizedPrompt
    token: str
    mask: torch.Tensor | None

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


@dataclass(frozen=True)
class FitProgress:
    """What a step measured: the loss's two terms, means over the examples, and for each example the cosine
    of its sentence and its token, with its sign (the mean over text encoders)."""

    step: int
    reconstruction_loss: float
    semantic_loss: float
    cosines: tuple[float, ...]

    @property
    def cosine(self) -> float:
        """cos(e_P, e_[I]), of the first example."""
        return self.cosines[0]


@dataclass(frozen=True)
class FitResult:
    """``rows``, one mapping of text encoder's name to (D,) for each example, ``weights`` and ``lora_metadata`` as in
    ``IdentityAdapter``, and the steps' ``progress``."""

    rows: tuple[Mapping[str, torch.Tensor], ...]
    weights: Mapping[str, torch.Tensor]
    lora_metadata: Mapping[str, Any]
    progress: tuple[FitProgress, ...]


def draw_levels(
    count: int, sampling: str, num_train: int, generator: torch.Generator | None, device: torch.device
) -> torch.Tensor:
    """(count,) of the noise levels 1 to ``num_train``, one in each of ``count`` equally likely stretches of them."""
    u = (torch.arange(count) + torch.rand(count, generator=generator, device=device).cpu()) / count
    return (TIMESTEP_SAMPLING[sampling](u) * num_train).long().clamp(0, num_train - 1) + 1


class Objective:
    """The loss of one example with the model as it is when asked; what no step changes is made once."""

    def __init__(self, family: ModelFamily, example: FitExample, settings: FitSettings) -> None:
        assert settings.batch_size is not None and settings.timestep_sampling is not None
        self.family, self.example, self.settings = family, example, settings
        self.schedule = family.training_schedule(family.pixel_size(example.latents))
        self.batch, self.sampling = settings.batch_size, settings.timestep_sampling
        self.dtype = family.dtype
        self.latents = example.latents.float().expand(self.batch, -1, -1, -1)
        tokens = {} if example.mask is None else {"token": example.token_columns}
        self.control = SpatialControl(
            {} if example.mask is None else {"token": example.mask},
            [tokens] * self.batch,
            renormalize=bool(settings.renormalize),
            mask_after=settings.mask_after,
        )
        self.sentence: PromptEmbeds | None = None
        if settings.method == "token":  # P doesn't hold the token: nothing that is trained reaches its encoding
            with torch.no_grad():
                self.sentence = family.encode([example.prompt])

    def controlled(self) -> AbstractContextManager[None]:
        """The token's mask at the denoiser's attention."""
        return self.family.control_attention(self.control, *self.latents.shape[-2:])

    def draw(self, generator: torch.Generator | None, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise levels (B,) on the CPU and noise (B, C, h, w), made by ``generator`` on its ``device``."""
        levels = draw_levels(self.batch, self.sampling, self.schedule.num_steps, generator, device)
        return levels, torch.randn(self.latents.shape, generator=generator, device=device).to(self.latents)

    def losses(self, levels: torch.Tensor, epsilon: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(L_recons, L_semantic, cosine) at these noise levels, with this noise."""
        example = self.example
        sentence_prompts = [example.prompt] if self.sentence is None else []
        encoded = self.family.encode([*sentence_prompts, example.prompt_with_token])
        semantics, angles = [], []
        for name, output in encoded.outputs.items():
            of_sentence = output if self.sentence is None else self.sentence.outputs[name]
            sentence = self.family.sentence(of_sentence[0], example.prompt.read_by(name))  # e_P
            if self.settings.detach_sentence:
                sentence = sentence.detach()
            token = output[-1, example.token_positions(name)]  # e_[I]
            semantics.append(semantic_loss(sentence, token))
            angles.append(cosine(sentence, token).mean())
        reconstruction = self.reconstruction(encoded.rows(slice(-1, None)), levels, epsilon)
        return reconstruction, torch.stack(semantics).sum(), torch.stack(angles).mean()

    def total(self, reconstruction: torch.Tensor, semantic: torch.Tensor) -> torch.Tensor:
        """L = L_recons + lambda L_semantic."""
        return reconstruction + self.settings.semantic_weight * semantic

    def reconstruction(self, encoded: PromptEmbeds, levels: torch.Tensor, epsilon: torch.Tensor) -> torch.Tensor:
        """L_recons under the one encoded prompt, P~."""
        noised = self.schedule.noised(self.latents, epsilon, levels).to(self.dtype)
        timesteps = self.schedule.timesteps[levels - 1]
        output = self.family.denoise(noised, timesteps, encoded.expand(self.batch), self.dtype)
        return reconstruction_loss(output, self.schedule.target(self.latents, epsilon, levels))


class Plateau:
    """When a fit has stopped gaining: its reconstruction loss at the same noise and levels, looked at every
    ``CHECK_EVERY`` steps, has not come ``CHECK_GAIN`` below its best for ``CHECK_PATIENCE`` looks.

    The noise of training changes from step to step and hides what a step gained; with fixed noise it shows. A look
    costs ``CHECK_LEVELS`` forward passes (or the batch, if that is more), and moves no generator but its own.
    """

    def __init__(self, objectives: Sequence[Objective], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.draws = [
            (objective, objective.draw(generator, torch.device("cpu")))
            for objective in objectives
            for _ in range(-(-CHECK_LEVELS // objective.batch))
        ]
        self.best, self.failed = float("inf"), 0

    @torch.no_grad()
    def loss(self) -> float:
        """Mean over the fixed draws."""
        losses = []
        for objective, draw in self.draws:
            encoded = objective.family.encode([objective.example.prompt_with_token])
            with objective.controlled():
                losses.append(objective.reconstruction(encoded, *draw).item())
        return sum(losses) / len(losses)

    def reached(self, step: int) -> bool:
        """Whether to end after ``step``."""
        if (step + 1) % CHECK_EVERY:
            return False
        loss = self.loss()
        self.failed = 0 if loss < (1 - CHECK_GAIN) * self.best else self.failed + 1
        self.best = min(self.best, loss)
        return self.failed >= CHECK_PATIENCE


@dataclass
class Training:
    """What a fit changes from step to step, and all that decides the steps to come."""

    seed: int
    parameters: Sequence[nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    falling: torch.optim.lr_scheduler.LRScheduler
    plateau: Plateau | None
    generator: torch.Generator | None
    progress: list[FitProgress] = field(default_factory=list)
    finished: bool = False

    def state(self) -> dict[str, Any]:
        """For a checkpoint: tensors and plain values."""
        return {
            "seed": self.seed,
            "parameters": [parameter.detach() for parameter in self.parameters],
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "falling": self.falling.state_dict(),
            "plateau": None if self.plateau is None else (self.plateau.best, self.plateau.failed),
            "generator": None if self.generator is None else self.generator.get_state(),
            "progress": [(p.step, p.reconstruction_loss, p.semantic_loss, p.cosines) for p in self.progress],
            "finished": self.finished,
        }

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any]) -> None:
        """Be as when ``state`` was taken."""
        for parameter, value in zip(self.parameters, state["parameters"], strict=True):
            parameter.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.falling.load_state_dict(state["falling"])
        if self.plateau is not None:
            self.plateau.best, self.plateau.failed = state["plateau"]
        if self.generator is not None:
            self.generator.set_state(state["generator"])
        self.progress = [FitProgress(*one) for one in state["progress"]]
        self.finished = state["finished"]


def fit_weights(
    family: ModelFamily,
    examples: Sequence[FitExample],
    rows: Sequence[Mapping[str, torch.Tensor]],
    settings: FitSettings,
    generator: torch.Generator | None,
    on_step: Callable[[FitProgress], bool],
    checkpoint: FitCheckpoint | None = None,
) -> FitResult:
    """Minimise ``L = L_recons + lambda L_semantic`` over the tokens' rows and what ``settings.method`` tunes.

    Several examples, each with a token and a mask of its own, are tuned jointly: their losses are added
    (S2Edit, composition). Whatever happens, the model's components are afterwards as they were, to the bit.

    What is trained is float32, with its optimizer, whatever the model's own dtype; what is frozen stays as it is. In
    float16 the loss is scaled (Micikevicius et al. 2018, section 3.2), as its gradients would vanish below 6e-8.

    Args:
        rows: for each example, text encoder's name -> (D,), where its token starts.
        on_step: called after each step; returning False ends the fit there.
        checkpoint: where the fit is kept on its way, and goes on from.

    Raises:
        FloatingPointError: the loss is no number any more; the message names the step.
        ValueError: the checkpoint can't be used.
    """
    kept = None if checkpoint is None else checkpoint.load()
    components = family.tuned_components
    device = examples[0].latents.device
    draw_on = torch.device("cpu") if generator is None else generator.device
    seed = kept["seed"] if kept else int(torch.randint(2**31, (1,), generator=generator, device=draw_on))
    if checkpoint is not None and generator is None:  # the process's own can't be put back to where it was
        generator = torch.Generator().manual_seed(seed)
    num_steps, rate = settings.num_steps, settings.learning_rate
    assert num_steps is not None and rate is not None and settings.token_learning_rate is not None
    saving = checkpointed(family.denoiser) if settings.gradient_checkpointing else nullcontext()

    learned = [
        {name: nn.Parameter(row.detach().clone().float().to(device)) for name, row in each.items()} for each in rows
    ]
    tuned = _tuned(family, settings, seed)
    with torch.enable_grad(), frozen(components), tuned as (weights, harvest), saving, ExitStack() as rows_in_place:
        for name, encoder in family.text_encoders.items():
            laid = {e.token_id(name): each[name] for e, each in zip(examples, learned, strict=True)}
            rows_in_place.enter_context(token_rows(encoder, laid))
        objectives = [Objective(family, example, settings) for example in examples]
        trained_rows = [row for each in learned for row in each.values()]
        groups = [{"params": trained_rows, "lr": settings.token_learning_rate}]
        if weights:
            groups.append({"params": weights, "lr": rate})
        optimizer = make_optimizer(settings.optimizer, groups, device)
        scaler = gradient_scaler(device, family.dtype)
        falling = get_scheduler(settings.lr_scheduler, optimizer, num_warmup_steps=0, num_training_steps=num_steps)
        plateau = Plateau(objectives, seed) if settings.early_stop else None
        training = Training(seed, [*trained_rows, *weights], optimizer, scaler, falling, plateau, generator)
        if kept:
            training.restore(kept)
        elif settings.method == "lora" and settings.lora_init == "gradient":
            _turn_along_gradient(components, objectives, scaler.get_scale(), generator, draw_on)

        for step in range(num_steps if training.finished else len(training.progress), num_steps):
            optimizer.zero_grad(set_to_none=True)
            measured = []
            for objective in objectives:
                with objective.controlled():
                    reconstruction, semantic, angle = objective.losses(*objective.draw(generator, draw_on))
                    loss = objective.total(reconstruction, semantic)
                    if not bool(torch.isfinite(loss)):
                        raise FloatingPointError(
                            f"The loss is {loss.item()} at step {step}; lower learning_rate (it is {rate:g}) or load "
                            "the model in float32 (or bfloat16): from_pretrained(..., dtype=torch.float32)."
                        )
                    scaler.scale(loss).backward()
                measured.append((reconstruction.item(), semantic.item(), angle.item()))
            scaler.step(optimizer)
            scaler.update()
            falling.step()
            reconstructions, semantics, angles = zip(*measured, strict=True)
            n = len(examples)
            training.progress.append(FitProgress(step, sum(reconstructions) / n, sum(semantics) / n, angles))
            training.finished = (plateau is not None and plateau.reached(step)) or step + 1 == num_steps
            if checkpoint is not None:
                checkpoint.save_if_due(training.state)
            if on_step(training.progress[-1]) is False or training.finished:
                break
        if checkpoint is not None:
            checkpoint.save(training.state())
        fitted_weights, metadata = harvest()
    fitted = tuple({name: row.detach().cpu() for name, row in each.items()} for each in learned)
    return FitResult(fitted, fitted_weights, metadata, tuple(training.progress))


def _tuned(family: ModelFamily, settings: FitSettings, seed: int) -> AbstractContextManager[TunedWeights]:
    """The weights that ``settings.method`` trains."""
    fixed = family.fixed_components
    components = {name: module for name, module in family.tuned_components.items() if name not in fixed}
    if settings.method == "full":
        return full_weights(components)
    if settings.method == "token":
        return no_weights()
    targets = {name: family.lora_targets(name, settings.lora_layers) for name in components}
    return lora_weights(components, targets, settings.lora_rank, seed)


def _turn_along_gradient(
    components: Mapping[str, nn.Module],
    objectives: Sequence[Objective],
    scale: float,
    generator: torch.Generator | None,
    draw_on: torch.device,
) -> None:
    """The adapters' first matrices along the gradient of a batch of its own; ``scale``, of the loss, comes down until
    float16 holds it."""

    def backward(objective: Objective, drawn: tuple[torch.Tensor, torch.Tensor]) -> None:
        with objective.controlled():
            reconstruction, semantic, _ = objective.losses(*drawn)
            (scale * objective.total(reconstruction, semantic)).backward()

    parts = [partial(backward, objective, objective.draw(generator, draw_on)) for objective in objectives]
    while not start_along_gradient(components, parts) and scale > 1:
        scale /= 16
