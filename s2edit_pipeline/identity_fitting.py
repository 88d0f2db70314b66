"""Stage one of S2Edit: fitting a token, and adapter or model weights, to one picture."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.optimization import get_scheduler
from torch import nn

from .attention_control import SpatialControl, attention_control
from .ddim_steps import add_noise, gradient_scaler, training_target
from .identity_losses import cosine, reconstruction_loss, semantic_loss
from .lora_start import start_along_gradient
from .prompt_alignment import TokenizedPrompt
from .prompt_encoding import PromptEmbeds, encode_prompts
from .prompt_tokens import token_rows
from .tuned_weights import LORA_LAYERS, checkpointed, frozen, full_weights, lora_weights, no_weights

TOKEN_LEARNING_RATE = 5e-3


@dataclass(frozen=True)
class Recipe:
    """How a method is fitted where nothing else is said; see ``FitSettings``."""

    num_steps: int
    learning_rate: float
    batch_size: int
    timestep_sampling: str
    lr_scheduler: str


RECIPES: Mapping[str, Recipe] = {
    "full": Recipe(60, 2e-5, 4, "uniform", "constant"),
    "lora": Recipe(20, 2.5e-3, 3, "uniform", "linear"),
    "token": Recipe(20, 2e-2, 4, "uniform", "constant"),
}

TIMESTEP_SAMPLING: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "uniform": lambda u: u,
    "low_noise": lambda u: 1 - (1 - u).sqrt(),
    "high_noise": lambda u: u.sqrt(),
    "logit_normal": lambda u: torch.special.ndtri(u).sigmoid(),
}
"""Name -> quantile function of the noise levels on [0, 1]: densities 1, 2 (1 - x), 2 x, and the logit-normal of Esser
et al. 2024."""


LR_SCHEDULERS = ("constant", "linear", "cosine")
"""How the rates go on from the first step's, diffusers' own of these names: the latter two come down to 0."""

LORA_INITS = ("gradient", "random")

OPTIMIZERS = ("adamw", "adamw_8bit")
FUSED_ON = ("cpu", "cuda")
"""Where PyTorch has AdamW in one kernel."""


def make_optimizer(name: str, groups: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
    """AdamW without decay; "adamw_8bit" is bitsandbytes'.

    Raises:
        ImportError: bitsandbytes isn't there.
    """
    if name == "adamw":
        return torch.optim.AdamW(groups, weight_decay=0.0, fused=device.type in FUSED_ON)
    adamw: torch.optim.Optimizer = _bitsandbytes().optim.AdamW8bit(groups, weight_decay=0.0)
    return adamw


def _bitsandbytes() -> Any:
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ImportError(
            "optimizer='adamw_8bit' needs bitsandbytes: pip install bitsandbytes. optimizer='adamw' needs nothing."
        ) from error


CHECK_EVERY, CHECK_LEVELS, CHECK_GAIN, CHECK_PATIENCE = 5, 4, 0.01, 2
"""Early stop: steps between two looks at the fixed-noise loss, its noise levels, the share by which a look has to beat
the best one, and how many may fail to before the fit ends."""


def _check_known(name: str, value: Any, known: Collection[str]) -> None:
    if value not in known:
        *others, last = map(repr, known)
        raise ValueError(f"{name}={value!r} is unknown; choose {', '.join(others)} or {last}.")


@dataclass(frozen=True)
class FitSettings:
    """How to fit. Where it says *ours* the paper leaves it open or does without.

    Attributes:
        method: "full" tunes U-Net and text encoders (the paper's), "lora" low-rank adapters on both (ours),
            "token" the embedding row alone (textual inversion, Gal et al. 2022).
        num_steps, learning_rate: None takes the method's own, see ``RECIPES``; so with the next two.
        batch_size: noise levels a step, one in each of as many equally likely stretches of them.
        timestep_sampling: which levels are drawn how often, see ``TIMESTEP_SAMPLING``; "uniform" is the base model's,
            the others are ours.
        lr_scheduler: of every rate, see ``LR_SCHEDULERS``; None takes the method's own.
        early_stop: end when the loss at fixed noise and levels has stopped falling (ours), see ``Plateau``; the last
            weights are kept.
        optimizer: "adamw", or "adamw_8bit", whose state takes a quarter of the memory (Dettmers et al. 2022).
        gradient_checkpointing: make the U-Net's activations again in the backward pass instead of keeping them.
        semantic_weight: lambda of the semantic loss; 0.1 is the paper's.
        spatial_control: mask ``[I]``'s cross-attention.
        detach_sentence: keep e_P out of the gradient (ours; off is the default reading).
        renormalize, mask_after: see ``attention_control.SpatialControl`` (ours).
        lora_rank: of every adapter.
        lora_layers: which layers of the U-Net have one, see ``tuned_weights.lora_targets``.
        lora_init: where their first matrices start: "gradient" turns them along the first gradient, see
            ``lora_start.start_along_gradient``, which costs about as much as a step; "random" is PEFT's.
    """

    method: str = "lora"
    num_steps: int | None = None
    learning_rate: float | None = None
    batch_size: int | None = None
    timestep_sampling: str | None = None
    lr_scheduler: str | None = None
    early_stop: bool = False
    optimizer: str = "adamw"
    gradient_checkpointing: bool = False
    semantic_weight: float = 0.1
    spatial_control: bool = True
    detach_sentence: bool = False
    renormalize: bool = False
    mask_after: bool = False
    lora_rank: int = 2
    lora_layers: str = "all"
    lora_init: str = "gradient"

    def __post_init__(self) -> None:
        for name, value in list(vars(self).items()):
            if hasattr(value, "item"):  # numpy's and torch's numbers, which JSON doesn't know
                object.__setattr__(self, name, value.item())
        _check_known("method", self.method, RECIPES)
        for name, own in vars(RECIPES[self.method]).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, own)
        _check_known("timestep_sampling", self.timestep_sampling, TIMESTEP_SAMPLING)
        _check_known("lr_scheduler", self.lr_scheduler, LR_SCHEDULERS)
        _check_known("lora_layers", self.lora_layers, LORA_LAYERS)
        _check_known("lora_init", self.lora_init, LORA_INITS)
        _check_known("optimizer", self.optimizer, OPTIMIZERS)
        if self.optimizer == "adamw_8bit":
            _bitsandbytes()
        for name in ("num_steps", "batch_size", "lora_rank"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}.")
        if not self.learning_rate > 0:  # type: ignore[operator]
            raise ValueError(f"learning_rate must be above 0, not {self.learning_rate!r}.")
        if not self.semantic_weight >= 0:
            raise ValueError(f"semantic_weight must be 0 or more, not {self.semantic_weight!r}.")


@dataclass(frozen=True)
class FitExample:
    """One picture and the token to fit to it.

    Attributes:
        latents: (1, C, h, w).
        prompt: P, without the token.
        prompt_with_token: P~, with it.
        token_id: the token's id in the first tokenizer that made the prompts.
        mask: (h, w) ``M_obj``, or None without spatial control.
        size_ids: (1, 6), what SDXL is told of the picture's size; others ignore it.
    """

    latents: torch.Tensor
    prompt: TokenizedPrompt
    prompt_with_token: TokenizedPrompt
    token_id: int
    mask: torch.Tensor | None
    size_ids: torch.Tensor | None = None

    @property
    def token_positions(self) -> tuple[int, ...]:
        return tuple(torch.nonzero(self.prompt_with_token.input_ids[0] == self.token_id)[:, 0].tolist())

    @property
    def token_ids(self) -> dict[str, int]:
        """Text encoder's name -> the token's id there."""
        at = self.token_positions[0]
        return {name: int(ids[0, at]) for name, ids in self.prompt_with_token.ids.items()}


@dataclass(frozen=True)
class ReferenceAttribute:
    """A second picture whose attribute gets a token of its own, to be mixed in: "a lady with [A] makeup".

    Attributes:
        image: the picture that has it.
        prompt: what that picture shows, without the token.
        subject: the noun that the token stands before.
        token: the token.
        mask: where it is, white inside; None finds it by itself.
    """

    image: Any
    prompt: str
    subject: str
    token: str = "[A]"
    mask: Any = None


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
    """(count,) of the ``num_train`` noise levels, one in each of ``count`` equally likely stretches of them."""
    u = (torch.arange(count) + torch.rand(count, generator=generator, device=device).cpu()) / count
    return (TIMESTEP_SAMPLING[sampling](u) * num_train).long().clamp(0, num_train - 1)


class Objective:
    """The loss of one example with the model as it is when asked; what no step changes is made once."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoders: Mapping[str, nn.Module],
        alphas_cumprod: torch.Tensor,
        prediction_type: str,
        example: FitExample,
        settings: FitSettings,
    ) -> None:
        assert settings.batch_size is not None and settings.timestep_sampling is not None
        self.unet, self.text_encoders, self.example, self.settings = unet, text_encoders, example, settings
        self.alphas_cumprod, self.prediction_type = alphas_cumprod, prediction_type
        self.batch, self.sampling = settings.batch_size, settings.timestep_sampling
        self.dtype = unet.dtype
        self.latents = example.latents.float().expand(self.batch, -1, -1, -1)
        tokens = {} if example.mask is None else {"token": example.token_positions}
        self.control = SpatialControl(
            {} if example.mask is None else {"token": example.mask},
            [tokens] * self.batch,
            renormalize=settings.renormalize,
            mask_after=settings.mask_after,
        )
        self.sentence: PromptEmbeds | None = None
        if settings.method == "token":  # P doesn't hold the token: nothing that is trained reaches its encoding
            with torch.no_grad():
                self.sentence = encode_prompts(text_encoders, [example.prompt], example.latents.device)

    def controlled(self) -> AbstractContextManager[None]:
        """The token's mask at the U-Net's attention."""
        return attention_control(self.unet, self.control, *self.latents.shape[-2:])

    def draw(self, generator: torch.Generator | None, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise levels (B,) on the CPU and noise (B, C, h, w), made by ``generator`` on its ``device``."""
        t = draw_levels(self.batch, self.sampling, len(self.alphas_cumprod), generator, device)
        return t, torch.randn(self.latents.shape, generator=generator, device=device).to(self.latents)

    def losses(self, t: torch.Tensor, epsilon: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(L_recons, L_semantic, cosine) at these noise levels, with this noise."""
        example, device = self.example, self.latents.device
        asked = (
            [example.prompt_with_token] if self.sentence is not None else [example.prompt, example.prompt_with_token]
        )
        encoded = encode_prompts(self.text_encoders, asked, device)
        semantics, angles = [], []
        for name, output in encoded.outputs.items():
            sentence = (output if self.sentence is None else self.sentence.outputs[name])[0, example.prompt.eos]  # e_P
            if self.settings.detach_sentence:
                sentence = sentence.detach()
            token = output[-1, list(example.token_positions)]  # e_[I]
            semantics.append(semantic_loss(sentence, token))
            angles.append(cosine(sentence, token).mean())
        return self.reconstruction(encoded, t, epsilon), torch.stack(semantics).sum(), torch.stack(angles).mean()

    def total(self, reconstruction: torch.Tensor, semantic: torch.Tensor) -> torch.Tensor:
        """L = L_recons + lambda L_semantic."""
        return reconstruction + self.settings.semantic_weight * semantic

    def reconstruction(self, encoded: PromptEmbeds, t: torch.Tensor, epsilon: torch.Tensor) -> torch.Tensor:
        """L_recons under the last of the ``encoded`` prompts, P~."""
        unet, device = self.unet, self.latents.device
        alpha_bar = self.alphas_cumprod[t]
        noised = add_noise(self.latents, epsilon, alpha_bar).to(self.dtype)
        context = encoded.embeds[-1:].to(self.dtype).expand(self.batch, -1, -1)
        added = None
        if encoded.pooled is not None:
            assert self.example.size_ids is not None
            both = encoded.pooled[-1:].to(self.dtype), self.example.size_ids.to(device, self.dtype)
            added = dict(zip(("text_embeds", "time_ids"), (one.expand(self.batch, -1) for one in both), strict=True))
        output = unet(noised, t.to(device), encoder_hidden_states=context, added_cond_kwargs=added).sample
        target = training_target(self.latents, epsilon, alpha_bar, self.prediction_type)
        return reconstruction_loss(output, target)


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
        found = []
        for objective, drawn in self.draws:
            encoded = encode_prompts(
                objective.text_encoders, [objective.example.prompt_with_token], objective.latents.device
            )
            with objective.controlled():
                found.append(objective.reconstruction(encoded, *drawn).item())
        return sum(found) / len(found)

    def reached(self, step: int) -> bool:
        """Whether to end after ``step``."""
        if (step + 1) % CHECK_EVERY:
            return False
        loss = self.loss()
        self.failed = 0 if loss < (1 - CHECK_GAIN) * self.best else self.failed + 1
        self.best = min(self.best, loss)
        return self.failed >= CHECK_PATIENCE


def fit_identity_weights(
    unet: UNet2DConditionModel,
    text_encoders: Mapping[str, nn.Module],
    alphas_cumprod: torch.Tensor,
    prediction_type: str,
    examples: Sequence[FitExample],
    rows: Sequence[Mapping[str, torch.Tensor]],
    settings: FitSettings,
    generator: torch.Generator | None,
    on_step: Callable[[FitProgress], bool],
) -> FitResult:
    """Minimise ``L = L_recons + lambda L_semantic`` over the tokens' rows and what ``settings.method`` tunes.

    Several examples, each with a token and a mask of its own, are tuned jointly: their losses are added
    (S2Edit, composition). Whatever happens, ``unet`` and ``text_encoders`` are afterwards as they were, to the bit.

    What is trained is float32, with its optimizer, whatever the model's own dtype; what is frozen stays as it is. In
    float16 the loss is scaled (Micikevicius et al. 2018, section 3.2), as its gradients would vanish below 6e-8.

    Args:
        text_encoders: "text_encoder", and with SDXL "text_encoder_2" -> the module.
        alphas_cumprod: (T,), the scheduler's.
        rows: for each example, text encoder's name -> (D,), where its token starts.
        on_step: called after each step; returning False ends the fit there.

    Raises:
        FloatingPointError: the loss is no number any more; the message names the step.
    """
    components = {"unet": unet, **text_encoders}
    components = {name: getattr(module, "_orig_mod", module) for name, module in components.items()}
    device = examples[0].latents.device
    draw_on = torch.device("cpu") if generator is None else generator.device
    seed = int(torch.randint(2**31, (1,), generator=generator, device=draw_on))
    num_steps, rate, batch = settings.num_steps, settings.learning_rate, settings.batch_size
    assert num_steps is not None and rate is not None and batch is not None
    if settings.method == "full":
        tuned = full_weights(components)
    elif settings.method == "lora":
        tuned = lora_weights(components, settings.lora_rank, settings.lora_layers, seed)
    else:
        tuned = no_weights()
    saving = checkpointed(unet) if settings.gradient_checkpointing else nullcontext()

    learned = [
        {name: nn.Parameter(row.detach().clone().float().to(device)) for name, row in each.items()} for each in rows
    ]
    progress: list[FitProgress] = []
    with torch.enable_grad(), frozen(components), tuned as (weights, harvest), saving, ExitStack() as rows_in_place:
        for name, encoder in text_encoders.items():
            held = {e.token_ids[name]: each[name] for e, each in zip(examples, learned, strict=True)}
            rows_in_place.enter_context(token_rows(encoder, held))
        objectives = [Objective(unet, text_encoders, alphas_cumprod, prediction_type, e, settings) for e in examples]
        trained_rows = [row for each in learned for row in each.values()]
        groups = [{"params": trained_rows, "lr": rate if settings.method == "token" else TOKEN_LEARNING_RATE}]
        if weights:
            groups.append({"params": weights, "lr": rate})
        optimizer = make_optimizer(settings.optimizer, groups, device)
        scaler = gradient_scaler(device, unet.dtype)
        falling = get_scheduler(settings.lr_scheduler, optimizer, num_warmup_steps=0, num_training_steps=num_steps)
        plateau = Plateau(objectives, seed) if settings.early_stop else None
        if settings.method == "lora" and settings.lora_init == "gradient":
            _turn_along_gradient(components, objectives, scaler.get_scale(), generator, draw_on)

        for step in range(num_steps):
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
            progress.append(FitProgress(step, sum(reconstructions) / n, sum(semantics) / n, angles))
            if on_step(progress[-1]) is False or (plateau is not None and plateau.reached(step)):
                break
        held_weights, metadata = harvest()
    fitted = tuple({name: row.detach().cpu() for name, row in each.items()} for each in learned)
    return FitResult(fitted, held_weights, metadata, tuple(progress))


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
