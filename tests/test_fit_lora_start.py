"""Where a LoRA starts: along the first gradient, with nothing else of the model changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from s2edit_pipeline import fit_loop
from s2edit_pipeline.fit_lora_start import ROW_LENGTH, start_along_gradient
from s2edit_pipeline.fit_objective import FitExample, Objective
from s2edit_pipeline.fit_settings import FitSettings
from s2edit_pipeline.fit_weights import lora_weights
from s2edit_pipeline.identity_lora_names import published_name
from s2edit_pipeline.pipeline import S2EditPipeline
from s2edit_pipeline.prompt_tokens import token_rows

from .test_fit_loop import example_of, fit


def reach(rows: torch.Tensor) -> torch.Tensor:
    """The projection onto what ``rows`` (r, in, ...) span, float64."""
    q, _ = torch.linalg.qr(rows.double().flatten(1).mT)
    return q @ q.mT


def adapted(rank: int = 2) -> tuple[nn.Module, Callable[[int], Callable[[], None]]]:
    """A convolution and a linear layer with adapters, and backward passes of a loss that needs no model: by seed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Flatten(), nn.Linear(5 * 16, 7))
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["0", "2"]), model)

    def backward(seed: int) -> Callable[[], None]:
        x = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
        return lambda: model(x).square().sum().backward()

    return model, backward


def gradients(model: nn.Module, *backwards: Callable[[], None]) -> list[torch.Tensor]:
    """The base weights' own, (out, in * kh * kw), float64, by autograd alone."""
    weights = [layer.get_base_layer().weight for layer in (model[0], model[2])]
    for weight in weights:
        weight.requires_grad_(True)
    for backward in backwards:
        backward()
    matrices = [weight.grad.flatten(1).double() for weight in weights]
    for parameter in model.parameters():
        parameter.grad = None
    return matrices


def firsts(model: nn.Module) -> list[torch.Tensor]:
    return [layer.lora_A["default"].weight.data for layer in (model[0], model[2])]


@pytest.mark.parametrize("seeds", [(1,), (1, 2)])
def test_the_first_matrices_have_most_of_the_gradient_in_reach(seeds: tuple[int, ...]) -> None:
    """Eckart and Young: of what two rows can reach, as much as the two largest singular values say. Of several parts of
    a loss it is their sum's gradient."""
    model, backward = adapted()
    whole = gradients(model, *map(backward, seeds))
    model.requires_grad_(False)
    assert start_along_gradient({"unet": model}, [*map(backward, seeds)])
    for rows, gradient in zip(firsts(model), whole, strict=True):
        values = torch.linalg.svdvals(gradient)
        reached = (gradient @ reach(rows)).square().sum()
        assert float(reached) == pytest.approx(float(values[:2].square().sum()), rel=1e-5)
        assert float(reached) < float(values.square().sum()) * (1 - 1e-3)  # there is more than two rows can reach
        torch.testing.assert_close(rows.flatten(1).norm(dim=1), torch.full((2,), ROW_LENGTH))


def test_random_factors_are_as_pefts(pipe: S2EditPipeline) -> None:
    """A's entries are uniform within 1 / sqrt(in), B is 0; a seed decides A."""
    components = {"unet": pipe.unet}
    targets = {"unet": ["to_q", "conv1"]}

    def factors(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        with lora_weights(components, targets, 4, seed):
            layers = [m for m in pipe.unet.modules() if isinstance(m, LoraLayer)]
            return [tuple(next(iter(f.values())).weight.detach() for f in (m.lora_A, m.lora_B)) for m in layers]

    one, again, other = factors(1), factors(1), factors(2)
    assert len(one) > 4 and {a.ndim for a, _ in one} == {2, 4}
    for (a, b), (same, _), (different, _) in zip(one, again, other, strict=True):
        bound = a[0].numel() ** -0.5
        assert a.dtype == b.dtype == torch.float32 and not b.any()
        assert float(a.abs().max()) <= bound and float(a.std()) == pytest.approx(bound / 3**0.5, rel=0.2)
        assert torch.equal(a, same) and not torch.equal(a, different)


def test_rows_are_as_long_as_pefts_in_the_mean() -> None:
    lengths = [rows.flatten(1).norm(dim=1) for seed in range(3) for rows in firsts(adapted(rank=4)[0])]
    assert float(torch.cat(lengths).square().mean()) == pytest.approx(ROW_LENGTH**2, rel=0.1)


def test_more_rows_than_the_gradient_has_directions_stay_random() -> None:
    """Five channels come out of the convolution: eight rows are five directions and three of PEFT's own."""
    model, backward = adapted(rank=8)
    before = [rows.clone() for rows in firsts(model)]
    assert start_along_gradient({"unet": model}, [backward(1)])
    assert torch.equal(firsts(model)[0][5:], before[0][5:])
    assert not torch.isclose(firsts(model)[0][:5], before[0][:5]).all(1).any()


@pytest.mark.parametrize("fails", [False, True])
def test_all_else_stays(fails: bool) -> None:
    """Weights, who asks for gradients, gradients that were there; also where the backward pass fails."""
    model, backward = adapted()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
        parameter.grad = torch.full_like(parameter, number)
    first = {id(rows) for layer in (model[0], model[2]) for rows in layer.lora_A.parameters()}
    before = [(p.clone(), p.requires_grad, p.grad) for p in model.parameters()]

    def breaks() -> None:
        backward(1)()
        raise RuntimeError("out of memory")

    if fails:
        with pytest.raises(RuntimeError):
            start_along_gradient({"unet": model}, [breaks])
    else:
        start_along_gradient({"unet": model}, [backward(1)])
    for parameter, (value, required, gradient) in zip(model.parameters(), before, strict=True):
        assert id(parameter) in first or torch.equal(parameter, value)
        assert parameter.requires_grad is required and parameter.grad is gradient
        assert not parameter._post_accumulate_grad_hooks


def test_a_gradient_that_is_no_number_is_left_alone() -> None:
    model, backward = adapted()
    before = [rows.clone() for rows in firsts(model)]

    def overflows() -> None:
        (1e38 * model(torch.ones(1, 3, 4, 4)).square().sum() * 1e38).backward()

    assert not start_along_gradient({"unet": model}, [overflows])
    assert all(torch.equal(rows, b) for rows, b in zip(firsts(model), before, strict=True))
    assert start_along_gradient({"unet": model}, [backward(1)])


def base_gradients(
    pipe: S2EditPipeline, example: FitExample, rows: dict[str, torch.Tensor], settings: FitSettings
) -> dict[str, torch.Tensor]:
    """Of the model without adapters, at the noise that a fit of seed 0 draws first; (out, in * kh * kw) by the names
    that weights are saved under."""
    generator = torch.Generator().manual_seed(0)
    torch.randint(2**31, (1,), generator=generator)  # the adapters' seed
    objective = Objective(pipe.family, example, settings)
    components = pipe.family.tuned_components
    matrices = {}
    for module in components.values():
        module.requires_grad_(True)
    row = nn.Parameter(rows["text_encoder"].float())
    with token_rows(pipe.text_encoder, {example.token_id("text_encoder"): row}), objective.controlled():
        losses = objective.losses(objective.draw(generator, torch.device("cpu")))
        (losses.reconstruction + settings.semantic_weight * losses.semantic).backward()
    for component, module in components.items():
        weights = [(n, p) for n, p in module.named_parameters() if p.ndim > 1 and p.grad is not None]
        matrices |= {published_name(component, name): p.grad.flatten(1).double() for name, p in weights}
        module.requires_grad_(False)
        module.zero_grad(set_to_none=True)
    return matrices


@pytest.mark.parametrize("layers", ["all", "attention"])
def test_a_fit_starts_along_its_own_first_gradient(pipe: S2EditPipeline, half_mask: Any, layers: str) -> None:
    """In every layer; with rates that move nothing, what is fitted is where it started."""
    example, rows_at_start = example_of(pipe, half_mask)
    settings = {"num_steps": 1, "learning_rate": 1e-12, "semantic_weight": 10.0, "lora_layers": layers}
    gradient = base_gradients(pipe, example, rows_at_start, FitSettings(**settings))
    for init in ("gradient", "random"):
        weights = fit(pipe, example, rows_at_start, lora_init=init, **settings).weights
        shares, best = [], []
        for name, rows in weights.items():
            if ".lora_A." in name:
                g = gradient[name.replace(".lora_A", "")]
                values = torch.linalg.svdvals(g).square()
                shares.append(float((g @ reach(rows)).square().sum() / values.sum()))
                best.append(float(values[:2].sum() / values.sum()))
        # four projections in each layer of either attention
        attention = 4 * (len(pipe.unet.attn_processors) + pipe.text_encoder.config.num_hidden_layers)
        everywhere = sum(name.startswith("unet.") for name in gradient) - 4 * len(pipe.unet.attn_processors)
        assert len(shares) == attention + everywhere * (layers == "all")
        if init == "gradient":
            assert shares == pytest.approx(best, rel=0.02)  # a randomised SVD, rounded to float16
        else:
            assert sum(shares) < 0.5 * sum(best)


def test_float16_starts_along_it_too(pipe: S2EditPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that is scaled so far that every gradient overflows: the scale comes down until none does."""
    example, rows = example_of(pipe)
    settings = {"num_steps": 1, "learning_rate": 1e-12}
    exact = fit(pipe, example, rows, **settings).weights
    far = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    monkeypatch.setattr(fit_loop, "gradient_scaler", lambda device, dtype: far)
    rounded = fit(pipe.to(torch.float16), example, rows, **settings).weights
    distances = [
        float((reach(rounded[n]) - reach(exact[n])).square().sum().sqrt())
        for n in exact
        if n.startswith("unet.") and ".lora_A." in n
    ]
    assert sorted(distances)[len(distances) // 2] < 0.2
