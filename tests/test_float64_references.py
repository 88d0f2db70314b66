"""Each formula of the method in one place, against naive loops in float64: relative error at most 1e-5.

The other tests of the same functions ask for more than this (edges, switches, errors); these ask the same of them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.models.attention_processor import Attention
from torch import nn

from s2edit_pipeline.attention_chain import Controllers
from s2edit_pipeline.attention_prompt_to_prompt import PromptToPrompt, Reweighting
from s2edit_pipeline.attention_seam import AttentionSite, attention_control
from s2edit_pipeline.attention_source import AttentionKeeper, KeepAttention
from s2edit_pipeline.attention_spatial import SpatialControl
from s2edit_pipeline.avatars.tokenizer import build_tokenizer
from s2edit_pipeline.fit_losses import reconstruction_loss, semantic_loss
from s2edit_pipeline.inversion_null_text import null_text
from s2edit_pipeline.inversion_record import InversionTask
from s2edit_pipeline.noise_schedule import NoiseSchedule, diffusion_schedule
from s2edit_pipeline.prompt_alignment import align_prompts
from s2edit_pipeline.prompt_columns import TokenizedPrompt
from s2edit_pipeline.prompt_tokenizing import tokenize

DIFFUSIONS = ("epsilon", "v_prediction")
KINDS = (*DIFFUSIONS, "flow")
LIMIT = 1e-5


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    assert result.shape == reference.shape
    return float((result.double() - reference).abs().max() / reference.abs().max())


def levels(kind: str, *cleanest: float) -> NoiseSchedule:
    """Levels, cleanest first, of a diffusion by their abar, of a flow by their signal a."""
    a = torch.tensor(cleanest, dtype=torch.float64)
    signal, noise = (a, 1 - a) if kind == "flow" else (a.sqrt(), (1 - a).sqrt())
    return NoiseSchedule(signal, noise, torch.arange(len(a) - 1), kind)


# ------------------------------------------------------------------------------ attention, a whole layer

TOKENIZER = build_tokenizer(num_captions=200)
HEADS, DIM, HEIGHT, WIDTH = 2, 8, 2, 3
QUERIES = HEIGHT * WIDTH
MASK = torch.tensor([[1.0, 0, 1], [0, 0, 1]])
Probs = list[list[list[list[float]]]]
"""Rows, heads, queries, keys."""


def prompt(text: str) -> TokenizedPrompt:
    return tokenize(TOKENIZER, text)


SHORT, SAD, HAPPY = prompt("a photo of a lady"), prompt("a photo of a sad lady"), prompt("a photo of a angry lady")
NEW = SAD.find("sad")[0]  # start, a, photo, of, a, sad


def naive_layer(attn: Attention, hidden: torch.Tensor, context: torch.Tensor, change: Callable[[Probs], Probs]) -> Any:
    """``softmax(Q K^T / sqrt(d)) V`` number by number, ``change`` made to the probabilities."""
    q, k, v = attn.to_q(hidden).tolist(), attn.to_k(context).tolist(), attn.to_v(context).tolist()

    def head_of(vector: list[float], head: int) -> list[float]:
        return vector[head * DIM : (head + 1) * DIM]

    def row_of(scores: list[float]) -> list[float]:
        powers = [math.exp(s - max(scores)) for s in scores]
        return [p / sum(powers) for p in powers]

    probs = [
        [
            [
                row_of(
                    [
                        sum(a * b for a, b in zip(head_of(query, head), head_of(key, head), strict=True)) / DIM**0.5
                        for key in keys
                    ]
                )
                for query in queries
            ]
            for head in range(HEADS)
        ]
        for queries, keys in zip(q, k, strict=True)
    ]
    changed = change(probs)
    out = [
        [
            [
                sum(p * value[head * DIM + i] for p, value in zip(changed[row][head][query], v[row], strict=True))
                for head in range(HEADS)
                for i in range(DIM)
            ]
            for query in range(len(q[row]))
        ]
        for row in range(len(q))
    ]
    return attn.to_out[0](torch.tensor(out, dtype=torch.float64))


def of_target(change: Callable[[list[float], list[float], int], list[float]]) -> Callable[[Probs], Probs]:
    """A change of the last row's probabilities: from the first row's, its own, and the query."""

    def changed(probs: Probs) -> Probs:
        last = [
            [change(probs[0][head][query], probs[-1][head][query], query) for query in range(len(probs[-1][head]))]
            for head in range(HEADS)
        ]
        return [*probs[:-1], last]

    return changed


def refined(source: list[float], own: list[float], query: int) -> list[float]:
    """Section 3.2 of prompt-to-prompt: the new word keeps its own map, the others' are the source's."""
    return [own[j] if j == NEW else source[j if j < NEW else j - 1] for j in range(len(own))]


def masked(renormalize: bool, after: bool) -> Callable[[list[float], list[float], int], list[float]]:
    def change(source: list[float], own: list[float], query: int) -> list[float]:
        inside = float(MASK[query // WIDTH, query % WIDTH])
        cut = [p * inside if j == NEW or (after and j > NEW) else p for j, p in enumerate(own)]
        return [p / sum(cut) for p in cut] if renormalize else cut

    return change


def taken_over(source: TokenizedPrompt, target: TokenizedPrompt, edit: str) -> Controllers:
    """The first row's attention, kept as it comes by and taken over by the last row."""
    length = target.input_ids.shape[1]
    until = torch.full((length,), 9.0)
    controller = PromptToPrompt([align_prompts(source, target, edit)], [until], self_until=9)
    keeper = AttentionKeeper(KeepAttention(share=1.0), 1)
    keeper.begin(1)
    controller.begin(0, keeper.layers[1], target_rows=[2])
    return Controllers([keeper, controller])


def spatial(**switches: bool) -> SpatialControl:
    return SpatialControl({"[I]": MASK}, [{}, {}, {"[I]": (NEW,)}], **switches)


def reweighting() -> Reweighting:
    weights = torch.ones(TOKENIZER.model_max_length)
    weights[NEW] = 2.5
    return Reweighting([weights], rows=[2])


EDITS: dict[str, tuple[Callable[[], Any], bool, Callable[[Probs], Probs]]] = {
    "replace": (lambda: taken_over(SAD, HAPPY, "replace"), True, of_target(lambda source, own, _: source)),
    "refine": (lambda: taken_over(SHORT, SAD, "refine"), True, of_target(refined)),
    "reweight": (
        reweighting,
        True,
        of_target(lambda source, own, _: [2.5 * p if j == NEW else p for j, p in enumerate(own)]),
    ),
    "self-injection": (lambda: taken_over(SHORT, SAD, "refine"), False, of_target(lambda source, own, _: source)),
    "spatial": (spatial, True, of_target(masked(False, False))),
    "spatial, renormalized": (lambda: spatial(renormalize=True), True, of_target(masked(True, False))),
    "spatial, after it too": (lambda: spatial(mask_after=True), True, of_target(masked(False, True))),
    "spatial, both": (lambda: spatial(renormalize=True, mask_after=True), True, of_target(masked(True, True))),
}
"""Edit -> its controller, whether it is one of cross-attention, and the naive change of the last of three rows."""


def site_of(name: str, layer: nn.Module, hidden_states: torch.Tensor, text: Any) -> AttentionSite:
    kind = "self" if text is None else "cross"
    return AttentionSite("layer", kind, HEIGHT, WIDTH, tells_words=text is not None, holds_layout=text is None)


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_attention_edits(name: str, dtype: torch.dtype) -> None:
    make, is_cross, change = EDITS[name]
    torch.manual_seed(0)
    attn = Attention(query_dim=16, heads=HEADS, dim_head=DIM, cross_attention_dim=24 if is_cross else None).double()
    hidden = normal(3, QUERIES, 16)
    context = normal(3, TOKENIZER.model_max_length, 24, seed=1) if is_cross else hidden
    with torch.no_grad():
        reference = naive_layer(attn, hidden, context, change)
        unchanged = naive_layer(attn, hidden, context, lambda probs: probs)
        text = context.to(dtype) if is_cross else None
        with attention_control(attn.to(dtype), make(), site_of):
            output = attn(hidden.to(dtype), encoder_hidden_states=text)
    assert make().access_needed(site_of("layer", attn, hidden, text))
    assert relative_error(unchanged, reference) > 100 * LIMIT  # the edit is seen
    assert relative_error(output, reference) <= LIMIT


# ------------------------------------------------------------------------------ losses


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_losses(dtype: torch.dtype) -> None:
    output, target = normal(2, 4, 5, 6), normal(2, 4, 5, 6, seed=1)
    pairs = zip(output.flatten().tolist(), target.flatten().tolist(), strict=True)
    mean_square = sum((x - y) ** 2 for x, y in pairs) / output.numel()
    loss = reconstruction_loss(output.to(dtype), target.to(dtype))
    assert relative_error(loss, torch.tensor(mean_square, dtype=torch.float64)) <= LIMIT
    sentence, token = normal(24), normal(24, seed=1)
    dot, a, b = (
        sum(x * y for x, y in zip(left.tolist(), right.tolist(), strict=True))
        for left, right in ((sentence, token), (sentence, sentence), (token, token))
    )
    reference = torch.tensor(abs(dot) / math.sqrt(a * b), dtype=torch.float64)
    assert relative_error(semantic_loss(sentence.to(dtype), token.to(dtype)), reference) <= LIMIT


# ------------------------------------------------------------------------------ moves between noise levels


def naive_move(x: float, output: float, a: float, b: float, kind: str) -> float:
    """From abar ``a`` to ``b``; of a flow from signal to signal."""
    if kind == "flow":
        velocity = output  # Euler: x + (sigma' - sigma) v
        return x + ((1 - b) - (1 - a)) * velocity
    epsilon = output if kind == "epsilon" else math.sqrt(a) * output + math.sqrt(1 - a) * x
    clean = (x - math.sqrt(1 - a) * epsilon) / math.sqrt(a)
    return math.sqrt(b) * clean + math.sqrt(1 - b) * epsilon


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("a", "b"), [(0.3, 0.5), (0.5, 0.3), (0.9, 0.999)])
def test_moves(kind: str, dtype: torch.dtype, a: float, b: float) -> None:
    x, output = normal(2, 3, 4, 5), normal(2, 3, 4, 5, seed=1)
    pairs = zip(x.flatten().tolist(), output.flatten().tolist(), strict=True)
    reference = torch.tensor([naive_move(*pair, a, b, kind) for pair in pairs], dtype=torch.float64).view_as(x)
    moved = levels(kind, a, b).move(x.to(dtype), output.to(dtype), 0, 1)
    assert moved.dtype == dtype and relative_error(moved, reference) <= LIMIT


@pytest.mark.parametrize("kind", DIFFUSIONS)
def test_whole_walks_are_diffusers_own(kind: str) -> None:
    """Twenty steps up with ``DDIMInverseScheduler`` and down with ``DDIMScheduler``, their tables in float64."""
    down = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=kind,
    )  # fmt: skip
    up = DDIMInverseScheduler.from_config(down.config)
    schedule, outputs = diffusion_schedule(down, 20), normal(20, 1, 2, 3, 4)
    for scheduler in (up, down):
        scheduler.set_timesteps(20)
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    down.final_alpha_cumprod = down.final_alpha_cumprod.double()
    reference = x = normal(1, 2, 3, 4, seed=1)
    for k in range(1, 20):  # from level 1: below it the inverse scheduler takes another alpha for the picture's own
        x = schedule.move(x, outputs[k], k, k + 1)
        reference = up.step(outputs[k], int(schedule.timesteps[k]), reference).prev_sample
        assert relative_error(x, reference) <= LIMIT
    for k in range(20, 0, -1):
        x = schedule.move(x, outputs[k - 1], k, k - 1)
        reference = down.step(outputs[k - 1], schedule.timesteps[k - 1], reference, eta=0.0).prev_sample
        assert relative_error(x, reference) <= LIMIT


def test_a_whole_flow_is_diffusers_own() -> None:
    """Twenty steps down with ``FlowMatchEulerDiscreteScheduler``, and back up to where they began."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(20)
    sigmas, outputs = scheduler.sigmas.double().flip(0), normal(20, 1, 2, 3, 4)
    schedule = NoiseSchedule(1 - sigmas, sigmas, scheduler.timesteps.flip(0), "flow")
    start = reference = x = normal(1, 2, 3, 4, seed=1)
    for k in range(20, 0, -1):
        x = schedule.move(x, outputs[k - 1], k, k - 1)
        reference = scheduler.step(outputs[k - 1], schedule.timesteps[k - 1], reference).prev_sample
        assert relative_error(x, reference) <= LIMIT
    for k in range(20):
        x = schedule.move(x, outputs[k], k, k + 1)
    assert relative_error(x, start) <= LIMIT


# ------------------------------------------------------------------------------ null-text


WEIGHTS = normal(1, 4, 5, seed=8)


def denoise(x: torch.Tensor, level: int, embeds: torch.Tensor) -> torch.Tensor:
    words = (embeds.double() * WEIGHTS).sum((1, 2))[:, None, None, None]
    return torch.tanh(0.8 * x + 0.3 * words + 0.01 * level) + 0.3 * torch.sin(2 * x.roll(1, -1))


@pytest.mark.parametrize("kind", KINDS)
def test_null_text_steps(kind: str) -> None:
    """Mokady et al. 2023, algorithm 1: the gradient by central differences, Adam (Kingma & Ba 2015) written out."""
    n, scale, x0 = 4, 4.5, normal(1, 2, 3, 3)
    alphas = torch.linspace(0.999, 0.1, n + 1, dtype=torch.float64).tolist()
    embeds, null = normal(1, 4, 5, seed=1), normal(1, 4, 5, seed=2).float().double()
    result = null_text(
        InversionTask(x0, levels(kind, *alphas), lambda x, k: denoise(x, k, embeds), denoise, embeds, null, scale)
    )
    assert result.unconditional_embeds is not None
    x = result.trajectory[n:]
    for i, k in enumerate(range(n, 0, -1)):
        a, b = alphas[k], alphas[k - 1]
        conditional, pivot = denoise(x, k, embeds), result.trajectory[k - 1 : k]

        def arrival(null: torch.Tensor, x: torch.Tensor = x, k: int = k, c: torch.Tensor = conditional) -> torch.Tensor:
            u = denoise(x, k, null)
            output, a, b = u + scale * (c - u), alphas[k], alphas[k - 1]
            if kind == "flow":
                return x + (a - b) * output
            epsilon = output if kind == "epsilon" else math.sqrt(a) * output + math.sqrt(1 - a) * x
            return math.sqrt(b) * (x - math.sqrt(1 - a) * epsilon) / math.sqrt(a) + math.sqrt(1 - b) * epsilon

        def loss(null: torch.Tensor, pivot: torch.Tensor = pivot, arrival: Any = arrival) -> float:
            return float(((arrival(null) - pivot) ** 2).mean())

        m = v = torch.zeros_like(null)
        for t in range(1, 11):
            now, gradient = loss(null), torch.zeros_like(null)
            for at in range(null.numel()):
                step = torch.zeros(null.numel(), dtype=torch.float64)
                step[at] = 1e-5
                step = step.view_as(null)
                gradient.view(-1)[at] = (loss(null + step) - loss(null - step)) / 2e-5
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            rate = 1e-2 * (1 - i / (2 * n))
            null = null - rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
            if now < 1e-5 + i * 2e-5:
                break
        assert relative_error(result.unconditional_embeds[k - 1 : k], null) <= LIMIT
        x = arrival(null)
        assert 0 < a < b <= 1
