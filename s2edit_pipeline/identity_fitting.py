"""Stage one of S2Edit: fitting a token, and adapter or model weights, to one picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import peft
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from .attention_control import SpatialControl, attention_control
from .ddim_steps import add_noise, gradient_scaler, training_target
from .identity_losses import cosine, reconstruction_loss, semantic_loss
from .identity_token import embedding_table, token_rows
from .lora_format import lora_metadata, published_name
from .prompt_alignment import TokenizedPrompt
from .prompt_encoding import encode_prompts

_CLIP_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "out_proj"]
LORA_TARGETS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0"],
    "text_encoder": _CLIP_PROJECTIONS,
    "text_encoder_2": _CLIP_PROJECTIONS,
}
_DEFAULTS = {"full": (60, 2e-5), "lora": (60, 1e-3), "token": (100, 5e-3)}
"""method -> (num_steps, learning_rate)"""
TOKEN_LEARNING_RATE = 5e-3


@dataclass(frozen=True)
class FitSettings:
    """How to fit. Where it says *ours* the paper leaves it open or does without.

    Attributes:
        method: "full" tunes U-Net and text encoders (the paper's), "lora" low-rank adapters on both (ours),
            "token" the embedding row alone (textual inversion, Gal et al. 2022).
        num_steps, learning_rate: None takes the method's own.
        batch_size: noise levels a step, spread evenly over all of them.
        semantic_weight: lambda of the semantic loss; 0.1 is the paper's.
        spatial_control: mask ``[I]``'s cross-attention.
        detach_sentence: keep e_P out of the gradient (ours; off is the default reading).
        renormalize, mask_after: see ``attention_control.SpatialControl`` (ours).
        lora_rank: of every adapter.
    """

    method: str = "lora"
    num_steps: int | None = None
    learning_rate: float | None = None
    batch_size: int = 4
    semantic_weight: float = 0.1
    spatial_control: bool = True
    detach_sentence: bool = False
    renormalize: bool = False
    mask_after: bool = False
    lora_rank: int = 4

    def __post_init__(self) -> None:
        for name, value in list(vars(self).items()):
            if hasattr(value, "item"):  # numpy's and torch's numbers, which JSON doesn't know
                object.__setattr__(self, name, value.item())
        if self.method not in _DEFAULTS:
            raise ValueError(f"method={self.method!r} is unknown; choose 'full', 'lora' or 'token'.")
        steps, rate = _DEFAULTS[self.method]
        object.__setattr__(self, "num_steps", steps if self.num_steps is None else self.num_steps)
        object.__setattr__(self, "learning_rate", rate if self.learning_rate is None else self.learning_rate)
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


@contextmanager
def _frozen(components: Mapping[str, nn.Module]) -> Iterator[None]:
    """No parameter asks for a gradient; afterwards each is as before, its accumulated ``grad`` included."""
    held = [(p, p.requires_grad, p.grad) for module in components.values() for p in module.parameters()]
    modes = [(m, m.training) for module in components.values() for m in module.modules()]
    for module in components.values():
        module.requires_grad_(False)
        module.eval()
    try:
        yield
    finally:
        for parameter, required, gradient in held:
            parameter.requires_grad_(required)
            parameter.grad = gradient
        for submodule, mode in modes:
            submodule.training = mode


@contextmanager
def _full_weights(components: Mapping[str, nn.Module]) -> Iterator[tuple[list[nn.Parameter], Callable[[], Any]]]:
    """All weights, trained as float32 copies; the original tensors are put back, not written to."""
    tables = [embedding_table(module).weight for name, module in components.items() if name != "unet"]
    held = [
        (published_name(name, inner), p, p.data)
        for name, module in components.items()
        for inner, p in module.named_parameters()
        if not any(p is table for table in tables)  # [I]'s own row is trained; the words' rows stay
    ]
    words = [table.data for table in tables]

    def harvest() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        return {name: (p.data - original.float()).cpu() for name, p, original in held}, {}

    try:
        for _, parameter, original in held:
            parameter.data = original.float().clone()
            parameter.requires_grad_(True)
        for table in tables:
            table.data = table.data.float()
        yield [p for _, p, _ in held], harvest
    finally:
        for table, original in zip(tables, words, strict=True):
            table.data = original
        for _, parameter, original in held:
            parameter.data = original


@contextmanager
def _lora_weights(
    components: Mapping[str, nn.Module], rank: int, seed: int
) -> Iterator[tuple[list[nn.Parameter], Callable[[], Any]]]:
    """PEFT's LoRA in every attention projection; afterwards the very modules that were there are back."""
    adapter = "s2edit_fit"
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    attached: list[tuple[nn.Module, str]] = []
    configs = {name: peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS[name]) for name in components}

    def harvest() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        weights: dict[str, torch.Tensor] = {}
        metadata: dict[str, Any] = {}
        for name, module in components.items():
            state = peft.get_peft_model_state_dict(module, adapter_name=adapter, save_embedding_layers=False)
            weights |= {published_name(name, key): value.detach().float().cpu().clone() for key, value in state.items()}
            said = lora_metadata(rank, LORA_TARGETS[name])
            metadata |= {f"{name}.{key}": value for key, value in said.items()}
        return weights, metadata

    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for name, module in components.items():
                before = [(p, n, c) for p in module.modules() for n, c in p.named_children()]
                replaced += before
                attributes = set(vars(module))
                peft.inject_adapter_in_model(configs[name], module, adapter_name=adapter)
                attached += [(module, added) for added in set(vars(module)) - attributes]  # peft_config and the like
        trained = [p for module in components.values() for n, p in module.named_parameters() if f".{adapter}." in n]
        for parameter in trained:
            parameter.data = parameter.data.float()
        yield trained, harvest
    finally:
        for parent, child_name, child in replaced:
            if getattr(parent, child_name) is not child:
                setattr(parent, child_name, child)
        for module, added in attached:
            delattr(module, added)


@contextmanager
def _no_weights() -> Iterator[tuple[list[nn.Parameter], Callable[[], Any]]]:
    yield [], lambda: ({}, {})


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
    components: dict[str, nn.Module] = {"unet": unet, **text_encoders}
    device = examples[0].latents.device
    num_train, batch = len(alphas_cumprod), settings.batch_size
    draw_on = "cpu" if generator is None else generator.device
    seed = int(torch.randint(2**31, (1,), generator=generator, device=draw_on))
    settings_steps, rate = settings.num_steps, settings.learning_rate
    assert settings_steps is not None and rate is not None
    if settings.method == "full":
        tuned = _full_weights(components)
    elif settings.method == "lora":
        tuned = _lora_weights(components, settings.lora_rank, seed)
    else:
        tuned = _no_weights()

    learned = [
        {name: nn.Parameter(row.detach().clone().float().to(device)) for name, row in each.items()} for each in rows
    ]
    progress: list[FitProgress] = []
    with torch.enable_grad(), _frozen(components), tuned as (weights, harvest), ExitStack() as rows_in_place:
        for name, encoder in text_encoders.items():
            held = {e.token_ids[name]: each[name] for e, each in zip(examples, learned, strict=True)}
            rows_in_place.enter_context(token_rows(encoder, held))
        trained_rows = [row for each in learned for row in each.values()]
        groups = [{"params": trained_rows, "lr": rate if settings.method == "token" else TOKEN_LEARNING_RATE}]
        if weights:
            groups.append({"params": weights, "lr": rate})
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        scaler = gradient_scaler(device, unet.dtype)

        def losses(example: FitExample) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            """(L_recons, L_semantic, cosine) at ``batch`` noise levels."""
            # one draw in each of `batch` equal stretches of the noise levels
            u = (torch.arange(batch) + torch.rand(batch, generator=generator, device=draw_on).cpu()) / batch
            t = (u * num_train).long().clamp(max=num_train - 1)
            x0 = example.latents.float().expand(batch, -1, -1, -1)
            epsilon = torch.randn(x0.shape, generator=generator, device=draw_on).to(device)

            encoded = encode_prompts(text_encoders, [example.prompt, example.prompt_with_token], device)
            semantics, angles = [], []
            for output in encoded.outputs.values():
                sentence = output[0, example.prompt.eos]  # e_P: P's end token
                if settings.detach_sentence:
                    sentence = sentence.detach()
                token = output[1, list(example.token_positions)]  # e_[I]
                semantics.append(semantic_loss(sentence, token))
                angles.append(cosine(sentence, token).mean())
            alpha_bar = alphas_cumprod[t]
            noised = add_noise(x0, epsilon, alpha_bar).to(unet.dtype)
            context = encoded.embeds[1:].to(unet.dtype).expand(batch, -1, -1)
            added = None
            if encoded.pooled is not None:
                assert example.size_ids is not None
                both = encoded.pooled[1:].to(unet.dtype), example.size_ids.to(device, unet.dtype)
                added = dict(zip(("text_embeds", "time_ids"), (one.expand(batch, -1) for one in both), strict=True))
            output = unet(noised, t.to(device), encoder_hidden_states=context, added_cond_kwargs=added).sample
            reconstruction = reconstruction_loss(output, training_target(x0, epsilon, alpha_bar, prediction_type))
            return reconstruction, torch.stack(semantics).sum(), torch.stack(angles).mean()

        for step in range(settings_steps):
            optimizer.zero_grad(set_to_none=True)
            measured = []
            for example in examples:
                with attention_control(unet, _example_control(example, settings), *example.latents.shape[-2:]):
                    reconstruction, semantic, angle = losses(example)
                    loss = reconstruction + settings.semantic_weight * semantic
                    if not bool(torch.isfinite(loss)):
                        raise FloatingPointError(
                            f"The loss is {loss.item()} at step {step}; lower learning_rate (it is {rate:g}) or load "
                            "the model in float32 (or bfloat16): from_pretrained(..., dtype=torch.float32)."
                        )
                    scaler.scale(loss).backward()
                measured.append((reconstruction.item(), semantic.item(), angle.item()))
            scaler.step(optimizer)
            scaler.update()
            reconstructions, semantics, angles = zip(*measured, strict=True)
            n = len(examples)
            progress.append(FitProgress(step, sum(reconstructions) / n, sum(semantics) / n, angles))
            if on_step(progress[-1]) is False:
                break
        held_weights, metadata = harvest()
    fitted = tuple({name: row.detach().cpu() for name, row in each.items()} for each in learned)
    return FitResult(fitted, held_weights, metadata, tuple(progress))


def _example_control(example: FitExample, settings: FitSettings) -> SpatialControl:
    """The token's mask in every row of the example's batch, or nothing where it has none."""
    if example.mask is None:
        return SpatialControl({}, [{}] * settings.batch_size)
    return SpatialControl(
        {"token": example.mask},
        [{"token": example.token_positions}] * settings.batch_size,
        renormalize=settings.renormalize,
        mask_after=settings.mask_after,
    )
