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

from .family_base import ModelFamily
from .fit_checkpoint import FitCheckpoint
from .fit_lora_start import start_along_gradient
from .fit_objective import Draw, FitExample, Objective
from .fit_settings import FitSettings, bitsandbytes
from .fit_weights import TunedWeights, checkpointed, frozen, full_weights, lora_weights, no_weights
from .noise_schedule import gradient_scaler
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
class FitProgress:
    """What a step measured: the loss's terms, means over the examples, and for each example the cosine
    of its sentence and its token, with its sign (the mean over text encoders)."""

    step: int
    reconstruction_loss: float
    semantic_loss: float
    cosines: tuple[float, ...]
    response_loss: float = 0.0

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


class Plateau:
    """When a fit has stopped gaining: its reconstruction loss at the same noise and levels, looked at every
    ``CHECK_EVERY`` steps, has not come ``CHECK_GAIN`` below its best for ``CHECK_PATIENCE`` looks.

    The noise of training changes from step to step and hides what a step gained; with fixed noise it shows. A look
    costs ``CHECK_LEVELS`` forward passes (or the batch, if that is more), and moves no generator but its own.
    """

    def __init__(self, objectives: Sequence[Objective], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.draws = [
            (objective, objective.draw(generator, torch.device("cpu"), words=False))
            for objective in objectives
            for _ in range(-(-CHECK_LEVELS // objective.batch))
        ]
        self.best, self.failed = float("inf"), 0

    @torch.no_grad()
    def loss(self) -> float:
        """Mean over the fixed draws."""
        losses = []
        for objective, draw in self.draws:
            with objective.controlled():
                losses.append(objective.reconstruction(draw).item())
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
    num_steps: int
    parameters: Sequence[nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    falling: torch.optim.lr_scheduler.LRScheduler
    plateau: Plateau | None
    generator: torch.Generator | None
    draw_on: torch.device
    progress: list[FitProgress] = field(default_factory=list)
    finished: bool = False

    def one_step(self, objectives: Sequence[Objective]) -> None:
        """One step down ``L = L_recons + lambda L_semantic`` (S2Edit, method section), added up over the examples.

        Raises:
            FloatingPointError: the loss is no number any more.
        """
        step, measured = len(self.progress), []
        self.optimizer.zero_grad(set_to_none=True)
        for objective in objectives:
            draw = objective.draw(self.generator, self.draw_on)  # t and epsilon
            base = objective.base_response(draw) if draw.told else None
            with objective.controlled(draw):  # A*_[I] = A_[I] * M_obj
                losses = objective.losses(draw, base)
                loss = objective.total(losses)
                if not bool(torch.isfinite(loss)):
                    raise FloatingPointError(
                        f"The loss is {loss.item()} at step {step}; lower learning_rate (it is "
                        f"{self.optimizer.param_groups[-1]['initial_lr']:g}) or load the model in float32 (or "
                        "bfloat16): from_pretrained(..., dtype=torch.float32)."
                    )
                self.scaler.scale(loss).backward()
            parts = (losses.reconstruction, losses.semantic, losses.response, losses.cosine)
            measured.append([part.item() for part in parts])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.falling.step()
        *terms, angles = zip(*measured, strict=True)
        reconstruction, semantic, response = (sum(term) / len(objectives) for term in terms)
        self.progress.append(FitProgress(step, reconstruction, semantic, tuple(angles), response))
        gains_nothing = self.plateau is not None and self.plateau.reached(step)
        self.finished = gains_nothing or step + 1 == self.num_steps

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
            "progress": [tuple(vars(one).values()) for one in self.progress],
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
    """Minimise ``L = L_recons + lambda L_semantic`` over the tokens' rows and what ``settings.method`` tunes; where an
    example has words whose effect is to be kept, with ``L_keep`` beside them.

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
    num_steps = settings.num_steps
    assert num_steps is not None and settings.token_learning_rate is not None
    saving = checkpointed(family.denoiser) if settings.gradient_checkpointing else nullcontext()

    learned = [
        {name: nn.Parameter(row.detach().clone().float().to(device)) for name, row in each.items()} for each in rows
    ]
    tuned = _tuned(family, settings, seed)
    with torch.enable_grad(), frozen(components), tuned as tuning, saving, ExitStack() as rows_in_place:
        for name, encoder in family.text_encoders.items():
            laid = {e.token_id(name): each[name] for e, each in zip(examples, learned, strict=True)}
            rows_in_place.enter_context(token_rows(encoder, laid))
        weights = tuning.parameters
        objectives = [Objective(family, example, settings, tuning.untuned) for example in examples]
        trained_rows = [row for each in learned for row in each.values()]
        groups = [{"params": trained_rows, "lr": settings.token_learning_rate}]
        if weights:
            groups.append({"params": weights, "lr": settings.learning_rate})
        optimizer = make_optimizer(settings.optimizer, groups, device)
        scaler = gradient_scaler(device, family.dtype)
        falling = get_scheduler(settings.lr_scheduler, optimizer, num_warmup_steps=0, num_training_steps=num_steps)
        plateau = Plateau(objectives, seed) if settings.early_stop else None
        parameters = [*trained_rows, *weights]
        training = Training(seed, num_steps, parameters, optimizer, scaler, falling, plateau, generator, draw_on)
        if kept:
            training.restore(kept)
        elif settings.method == "lora" and settings.lora_init == "gradient":
            _turn_along_gradient(components, objectives, scaler.get_scale(), generator, draw_on)

        while not training.finished:
            training.one_step(objectives)
            if checkpoint is not None:
                checkpoint.save_if_due(training.state)
            if on_step(training.progress[-1]) is False:
                break
        if checkpoint is not None:
            checkpoint.save(training.state())
        fitted_weights, metadata = tuning.harvest()
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

    def backward(objective: Objective, draw: Draw) -> None:
        with objective.controlled(draw):
            (scale * objective.total(objective.losses(draw))).backward()

    parts = [partial(backward, objective, objective.draw(generator, draw_on, words=False)) for objective in objectives]
    while not start_along_gradient(components, parts) and scale > 1:
        scale /= 16
