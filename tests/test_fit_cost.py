"""What makes a fit cheap changes nothing that it shouldn't: each switch against the plain way."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from s2edit_pipeline import ReferenceAttribute, fit_loop
from s2edit_pipeline.fit_loop import CHECK_EVERY, Plateau
from s2edit_pipeline.fit_objective import draw_levels
from s2edit_pipeline.fit_settings import LR_SCHEDULERS, RECIPES, TIMESTEP_SAMPLING
from s2edit_pipeline.fit_weights import checkpointed
from s2edit_pipeline.pipeline import S2EditPipeline

PROMPT = "a photo of a sad lady with glasses"
METHODS = ("lora", "full", "token")


def fit(pipe: S2EditPipeline, picture: Image.Image, **arguments: Any) -> Any:
    arguments = {"num_steps": 3, "batch_size": 2, "generator": torch.Generator().manual_seed(0), **arguments}
    return pipe.fit_identity(picture, PROMPT, "lady", **arguments)


def tensors(identity: Any) -> dict[str, torch.Tensor]:
    return {**identity.weights, **identity.rows}


# ------------------------------------------------------------------------------ what is computed


@pytest.mark.parametrize(("method", "rows"), [("token", [1] + [1] * 3), ("lora", [2] + [2] * 3), ("full", [2] * 3)])
def test_the_sentence_is_encoded_once_where_no_text_weight_is_trained(
    pipe: S2EditPipeline, picture: Image.Image, half_mask: np.ndarray, method: str, rows: list[int]
) -> None:
    batches: list[int] = []
    handle = pipe.text_encoder.register_forward_pre_hook(lambda module, ids: batches.append(len(ids[0])))
    fit(pipe, picture, method=method, mask=half_mask)
    handle.remove()
    assert batches == rows


FALLING: dict[str, Callable[[float], float]] = {  # the share of the steps made -> the share of the rate
    "constant": lambda x: 1.0,
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
}


@pytest.mark.parametrize("name", LR_SCHEDULERS)
def test_the_rates_fall_as_their_names_promise(
    pipe: S2EditPipeline, picture: Image.Image, half_mask: np.ndarray, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The token's and the weights' alike, from the first step's on."""
    rates: list[list[float]] = []
    step = torch.optim.AdamW.step

    def look(optimizer: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        rates.append([group["lr"] for group in optimizer.param_groups])
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", look)
    shares = [FALLING[name](k / 5) for k in range(5)]
    for changes, of_token in (({}, RECIPES["lora"].token_learning_rate), ({"token_learning_rate": 7e-4}, 7e-4)):
        rates.clear()
        fit(pipe, picture, mask=half_mask, num_steps=5, learning_rate=1e-3, lr_scheduler=name, **changes)
        assert np.array(rates) == pytest.approx(np.outer(shares, [of_token, 1e-3]))


def test_only_what_is_trained_gets_gradients(
    pipe: S2EditPipeline, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters: dict[str, tuple[set[int], set[int]]] = {}
    step = torch.optim.AdamW.step

    def look(optimizer: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        models = [*pipe.unet.parameters(), *pipe.text_encoder.parameters()]
        rows = [p for p in optimizer.param_groups[0]["params"] if p.grad is not None]
        parameters[method] = trained, {id(p) for p in [*models, *rows] if p.grad is not None}
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", look)
    for method in METHODS:
        fit(pipe, picture, method=method, num_steps=2)
        trained, graded = parameters[method]
        assert graded == trained, method
    assert len(parameters["token"][0]) == 1


# ------------------------------------------------------------------------------ noise levels

DENSITIES: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # the distribution functions, written out
    "uniform": lambda x: x,
    "low_noise": lambda x: 2 * x - x**2,
    "high_noise": lambda x: x**2,
    "logit_normal": lambda x: stats.norm.cdf(np.log(x / (1 - x))),
}


@pytest.mark.parametrize("name", TIMESTEP_SAMPLING)
@pytest.mark.parametrize("batch", [1, 4])
def test_noise_levels_follow_their_density(name: str, batch: int) -> None:
    generator, cpu = torch.Generator().manual_seed(1), torch.device("cpu")
    levels = torch.stack([draw_levels(batch, name, 1000, generator, cpu) for _ in range(8000 // batch)])
    assert levels.shape == (8000 // batch, batch) and int(levels.min()) >= 1 and int(levels.max()) <= 1000
    timesteps = levels - 1
    edges = np.arange(1, 20) / 20
    shares = np.mean(timesteps.flatten().numpy()[:, None] < 1000 * edges, 0)
    assert np.abs(shares - DENSITIES[name](edges)).max() < 0.02
    # one in each of as many equally likely stretches
    stretches = np.floor(batch * DENSITIES[name](np.clip((timesteps.numpy() + 0.5) / 1000, 1e-6, 1 - 1e-6)))
    assert np.mean(stretches == np.arange(batch)) > 0.99


# ------------------------------------------------------------------------------ gradient checkpointing


@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_makes_the_same_gradients(
    pipe: S2EditPipeline, picture: Image.Image, monkeypatch: pytest.MonkeyPatch, half_mask: np.ndarray, method: str
) -> None:
    gradients: list[list[torch.Tensor]] = []

    def look(optimizer: torch.optim.AdamW, *args: Any, **kwargs: Any) -> None:
        gradients.append([p.grad.clone() for g in optimizer.param_groups for p in g["params"]])

    evaluations: list[int] = []
    block = pipe.unet.up_blocks[0].resnets[0]
    handle = block.register_forward_pre_hook(lambda *_: evaluations.append(1))
    monkeypatch.setattr(torch.optim.AdamW, "step", look)
    for on in (False, True):
        fit(pipe, picture, method=method, mask=half_mask, num_steps=1, gradient_checkpointing=on)
        evaluations.append(0)
    handle.remove()
    once, again = {"lora": ([1] * 2, [1] * 4)}.get(method, ([1], [1] * 2))  # a LoRA looks at a gradient before its step
    assert evaluations == [*once, 0, *again, 0]  # made again
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-7)
        assert float(plain.abs().max()) > 0 or method == "lora"  # its A's gradient begins at 0


def test_checkpointing_is_put_back(pipe: S2EditPipeline) -> None:
    def switches() -> list[dict[str, Any]]:
        return [{n: v for n, v in vars(m).items() if "checkpointing" in n} for m in pipe.unet.modules()]

    pipe.unet.down_blocks[0].gradient_checkpointing = True  # someone's own choice
    before = switches()
    with pytest.raises(RuntimeError, match="stop"), checkpointed(pipe.unet):
        assert all(switch["gradient_checkpointing"] for switch in switches() if "gradient_checkpointing" in switch)
        raise RuntimeError("stop")
    assert switches() == before


# ------------------------------------------------------------------------------ optimizers


def test_the_fused_optimizer_makes_the_same_steps(
    pipe: S2EditPipeline, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, adamw = [], torch.optim.AdamW

    def remember(groups: Any, **arguments: Any) -> Any:
        made.append(arguments["fused"])
        return adamw(groups, **arguments)

    monkeypatch.setattr(torch.optim, "AdamW", remember)
    fused = tensors(fit(pipe, picture, method="full", num_steps=4))
    monkeypatch.setattr(fit_loop, "FUSED_ON", ())
    plain = tensors(fit(pipe, picture, method="full", num_steps=4))
    assert made == [True, False]
    # all at once: a bias of a key has no true gradient, and AdamW makes steps of its rounding
    one, other = (torch.cat([tensor.flatten() for _, tensor in sorted(each.items())]) for each in (fused, plain))
    assert float((one - other).norm()) < 0.01 * float(other.norm())


def test_eight_bits_need_bitsandbytes(
    pipe: S2EditPipeline, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match="optimizer='adamw_8bit' needs bitsandbytes: pip install bitsandbytes"):
        fit(pipe, picture, optimizer="adamw_8bit")
    with pytest.raises(ValueError, match="optimizer='sgd' is unknown; choose 'adamw' or 'adamw_8bit'"):
        fit(pipe, picture, optimizer="sgd")
    made: list[dict[str, Any]] = []

    class AdamW8bit(torch.optim.AdamW):  # stands in for it: the name and the arguments are what is ours
        def __init__(self, groups: Any, **arguments: Any) -> None:
            made.append(arguments)
            super().__init__(groups, **arguments)

    package = types.SimpleNamespace(optim=types.SimpleNamespace(AdamW8bit=AdamW8bit))
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    identity = fit(pipe, picture, optimizer="adamw_8bit")
    assert made == [{"weight_decay": 0.0}] and identity.settings["optimizer"] == "adamw_8bit"


# ------------------------------------------------------------------------------ early stop


@pytest.mark.parametrize(
    ("losses", "ends_after"),
    [
        ([1.0, 0.9, 0.8, 0.795, 0.79, 0.5], 25),  # two looks that gain less than a hundredth
        ([1.0, 0.995, 0.9, 0.9, 0.8, 0.8, 0.8], 35),  # one bad look is forgiven
        ([1.0, 1.1, 1.05], 15),
    ],
)
def test_a_plateau_is_two_looks_without_gain(
    losses: list[float], ends_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = iter(losses)
    monkeypatch.setattr(Plateau, "loss", lambda self: next(looks))
    plateau = Plateau([], 0)
    assert next(step + 1 for step in range(99) if plateau.reached(step)) == ends_after
    assert CHECK_EVERY == 5


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_look_is_at_the_same_noise_each_time_and_leaves_the_fit_alone(
    pipe: S2EditPipeline, picture: Image.Image, half_mask: np.ndarray, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: list[float] = []
    loss = Plateau.loss

    def look(plateau: Plateau) -> float:
        values.append(loss(plateau))
        assert loss(plateau) == values[-1]
        assert sum(len(draw.levels) for _, draw in plateau.draws) >= 4 * 2
        return values[-1]

    monkeypatch.setattr(Plateau, "loss", look)
    reference = ReferenceAttribute(picture.rotate(90), "a lady with a hat", "hat", mask=half_mask)
    common: dict[str, Any] = {
        "mask": half_mask, "reference": reference, "num_steps": 10, "batch_size": batch_size, "learning_rate": 1e-2,
    }  # fmt: skip
    watched, alone = fit(pipe, picture, early_stop=True, **common), fit(pipe, picture, **common)
    assert len(values) == 2 and values[1] < values[0]
    assert all(torch.equal(tensors(watched)[name], tensor) for name, tensor in tensors(alone).items())


def test_a_fit_that_gains_nothing_ends(pipe: S2EditPipeline, picture: Image.Image) -> None:
    identity = fit(pipe, picture, method="token", learning_rate=1e-9, num_steps=40, early_stop=True)
    assert identity.settings["num_steps"] == 15  # the first look, and two that gained nothing
    assert fit(pipe, picture, method="token", learning_rate=1e-9, num_steps=16).settings["num_steps"] == 16
