"""The attention seam: every kind of model under control is the model itself, and each call's control is its own."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import (
    Attention,
    AttnAddedKVProcessor2_0,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    IPAdapterXFormersAttnProcessor,
    SlicedAttnProcessor,
)
from torch import nn
from torch.nn import functional as F

from s2edit_pipeline.attention_chain import Controllers
from s2edit_pipeline.attention_seam import (
    AttentionAccess,
    AttentionController,
    AttentionSite,
    ControlledProcessor,
    attention_control,
    attention_layers,
)
from s2edit_pipeline.attention_spatial import SpatialControl
from s2edit_pipeline.family_unet import UNetFamily
from s2edit_pipeline.pipeline import S2EditPipeline

from .bare_attention import BareLayer

NONE, INPUTS, PROBABILITIES = AttentionAccess


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


class Watcher(AttentionController):
    """Needs every layer, changes nothing, notes the probabilities of what comes by."""

    def __init__(self, access: AttentionAccess = PROBABILITIES) -> None:
        self.access = access
        self.notes: list[tuple[AttentionSite, torch.Tensor]] = []

    def access_needed(self, site: AttentionSite) -> AttentionAccess:
        return self.access

    def exchange(
        self, query: torch.Tensor, key: torch.Tensor, site: AttentionSite
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.access is INPUTS:
            scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
            self.notes.append((site, scores.softmax(-1).detach()))
        return query, key

    def __call__(self, probs: torch.Tensor, site: AttentionSite) -> torch.Tensor:
        self.notes.append((site, probs.detach()))
        return probs


class Damper(AttentionController):
    """Halves what every query sees of one key."""

    def __init__(self, key: int) -> None:
        self.key, self.num_calls = key, 0

    def access_needed(self, site: AttentionSite) -> AttentionAccess:
        return PROBABILITIES

    def __call__(self, probs: torch.Tensor, site: AttentionSite) -> torch.Tensor:
        self.num_calls += 1
        factors = torch.ones(probs.shape[-1], dtype=probs.dtype)
        factors[self.key] = 0.5
        return probs * factors


def anywhere(name: str, layer: nn.Module, hidden_states: torch.Tensor, text: Any) -> AttentionSite:
    """A site for every layer, whatever it is."""
    return AttentionSite(name, "self" if text is None else "cross", 1, hidden_states.shape[1])


# ------------------------------------------------------------------------------ tiny models of the real classes


@dataclass
class Tiny:
    """A model with random weights, and inputs for it by name; ``words`` is the input that gradients are asked of."""

    model: Any
    inputs: dict[str, Any]
    words: str = "encoder_hidden_states"

    def __call__(self, **changes: Any) -> torch.Tensor:
        output: torch.Tensor = self.model(**{**self.inputs, **changes}, return_dict=False)[0]
        return output


def unet() -> Tiny:
    model = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24, attention_head_dim=4, norm_num_groups=8,
    )  # fmt: skip
    return Tiny(model, {"sample": normal(2, 4, 8, 8), "timestep": 500, "encoder_hidden_states": normal(2, 5, 24)})


def stable_diffusion_3(**settings: Any) -> Tiny:
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=24, caption_projection_dim=16, pooled_projection_dim=12,
        pos_embed_max_size=8, qk_norm="rms_norm", **settings,
    )  # fmt: skip
    inputs = {
        "hidden_states": normal(2, 4, 8, 8), "encoder_hidden_states": normal(2, 5, 24),
        "pooled_projections": normal(2, 12), "timestep": torch.full((2,), 500.0),
    }  # fmt: skip
    return Tiny(model, inputs)


def flux() -> Tiny:
    model = FluxTransformer2DModel(
        in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=12, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=12, axes_dims_rope=(4, 4, 4), guidance_embeds=True,
    )  # fmt: skip
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    cells = torch.stack([torch.zeros(4, 4), rows, columns], -1)
    inputs = {
        "hidden_states": normal(2, 16, 8), "encoder_hidden_states": normal(2, 5, 24),
        "pooled_projections": normal(2, 12), "timestep": torch.full((2,), 0.5), "guidance": torch.full((2,), 3.5),
        "img_ids": cells.flatten(0, 1), "txt_ids": torch.zeros(5, 3),
    }  # fmt: skip
    return Tiny(model, inputs)


def qwen_image(*, padded: bool = False) -> Tiny:
    model = QwenImageTransformer2DModel(
        patch_size=2, in_channels=8, out_channels=2, num_layers=2, attention_head_dim=12, num_attention_heads=2,
        joint_attention_dim=24, axes_dims_rope=(4, 4, 4),
    )  # fmt: skip
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = not padded
    inputs = {
        "hidden_states": normal(2, 16, 8), "encoder_hidden_states": normal(2, 5, 24), "timestep": torch.full((2,), 0.5),
        "encoder_hidden_states_mask": mask if padded else None, "img_shapes": [[(1, 4, 4)]] * 2,
    }  # fmt: skip
    return Tiny(model, inputs)


MODELS: dict[str, Callable[[], Tiny]] = {
    "U-Net": unet,
    "SD3": stable_diffusion_3,
    "SD3.5": lambda: stable_diffusion_3(dual_attention_layers=(0, 1)),
    "FLUX": flux,
    "Qwen-Image": qwen_image,
    "Qwen-Image, padded": lambda: qwen_image(padded=True),
}


@pytest.fixture(params=MODELS)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    """A model of each kind in float64, its weights no longer the near zeros of a fresh one."""
    torch.manual_seed(0)
    made = MODELS[request.param]()
    with torch.no_grad():
        for parameter in made.model.parameters():
            spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.add_(torch.randn_like(parameter) * spread)
    made.model.double().eval()
    return made


# ------------------------------------------------------------------------------ a whole model


@torch.no_grad()
@pytest.mark.parametrize("access", [NONE, INPUTS])
def test_a_control_that_changes_nothing_is_the_bare_model_to_the_bit(tiny: Tiny, access: AttentionAccess) -> None:
    bare, layers = tiny(), attention_layers(tiny.model)
    watcher = Watcher(access)
    with attention_control(tiny.model, watcher, anywhere):
        controlled = tiny()
    assert torch.equal(controlled, bare) and torch.equal(tiny(), bare)
    assert sorted(site.name for site, _ in watcher.notes) == ([] if access is NONE else sorted(layers))
    with attention_control(tiny.model, Watcher(), lambda *_: None):  # nothing to be seen anywhere
        assert torch.equal(tiny(), bare)


@torch.no_grad()
def test_explicit_probabilities_are_the_fused_kernel(tiny: Tiny) -> None:
    bare, layers, watcher = tiny(), attention_layers(tiny.model), Watcher()
    assert float(bare.std()) > 1e-2 and len(layers) >= 2
    with attention_control(tiny.model, watcher, anywhere):
        controlled = tiny()
    torch.testing.assert_close(controlled, bare, rtol=1e-6, atol=1e-6)
    assert sorted(site.name for site, _ in watcher.notes) == sorted(layers)  # each once
    for _, probs in watcher.notes:
        torch.testing.assert_close(probs.sum(-1), torch.ones_like(probs[..., 0]), rtol=0, atol=1e-6)
    # and it is these probabilities that the model goes on with
    with attention_control(tiny.model, Damper(0), anywhere):
        assert float((tiny() - bare).abs().max()) > 1e-4


def gradients(tiny: Tiny, controller: AttentionController | None, backward: Callable[[torch.Tensor], None]) -> Any:
    """Of the weights and of the words."""
    words = tiny.inputs[tiny.words].clone().requires_grad_()
    tiny.model.zero_grad(set_to_none=True)
    with nullcontext() if controller is None else attention_control(tiny.model, controller, anywhere):
        backward(tiny(**{tiny.words: words}).square().mean())
    return [words.grad, *[p.grad for p in tiny.model.parameters() if p.grad is not None]]


def on_another_thread(loss: torch.Tensor) -> None:
    """As autograd does on a GPU: a thread that knows nothing of the context that the loss was made in."""
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()


@pytest.mark.parametrize("backward", [torch.Tensor.backward, on_another_thread], ids=["here", "on another thread"])
def test_gradients_are_those_of_the_control_with_checkpointing_and_without(
    tiny: Tiny, backward: Callable[[torch.Tensor], None]
) -> None:
    """Checkpointing runs the layers again in the backward pass: what they then see is what they saw."""
    tiny.model.train()
    bare = gradients(tiny, None, torch.Tensor.backward)
    for reference, controller in ((bare, Watcher()), (None, Damper(0))):
        plain = gradients(tiny, controller, backward)
        tiny.model.enable_gradient_checkpointing()
        checkpointed = gradients(tiny, controller, backward)
        tiny.model.disable_gradient_checkpointing()
        assert len(plain) == len(checkpointed) == len(bare)
        for one, other in zip(plain, checkpointed, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12)
        for one, other in zip(plain, reference or (), strict=reference is not None):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    largest = max(float((one - other).abs().max()) for one, other in zip(plain, bare, strict=True))
    assert largest > 1e-6  # the damped layers' gradients are others


@torch.no_grad()
@pytest.mark.parametrize("make", [flux, qwen_image])
def test_rotary_positions_reach_the_controlled_layers(make: Callable[[], Tiny]) -> None:
    """They are arguments of the processor, which diffusers hands on by the names in its signature."""
    torch.manual_seed(0)
    tiny = make()
    tiny.model.double().eval()
    processors = {name: layer.processor for name, layer in attention_layers(tiny.model).items()}
    positions: list[Any] = []
    with attention_control(tiny.model, Watcher(), anywhere):
        for name, layer in attention_layers(tiny.model).items():
            wrapper, installed = layer.processor, processors[name]
            assert isinstance(wrapper, ControlledProcessor) and wrapper.installed is installed
            assert inspect.signature(wrapper.__call__) == inspect.signature(installed.__call__)
            assert "image_rotary_emb" in inspect.signature(wrapper.__call__).parameters

            def note(attn: Any, *args: Any, kept: Any = wrapper.attend, **kwargs: Any) -> Any:
                positions.append(kwargs.get("image_rotary_emb", args[3] if len(args) > 3 else None))
                return kept(attn, *args, **kwargs)

            wrapper.attend = note
        controlled = tiny()
        assert len(positions) == len(processors) and all(position is not None for position in positions)
    torch.testing.assert_close(controlled, tiny(), rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------ one layer


def controlled(attn: Attention, controller: AttentionController, height: int, width: int) -> Any:
    def site_of(name: str, layer: nn.Module, hidden_states: torch.Tensor, text: Any) -> AttentionSite:
        return AttentionSite("layer", "self" if text is None else "cross", height, width)

    return attention_control(attn, controller, site_of)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cross_attention_dim": 24},
        {"cross_attention_dim": 24, "qk_norm": "layer_norm"},
        {"norm_num_groups": 4, "residual_connection": True, "rescale_output_factor": 2.0},
        {"cross_attention_dim": 24, "cross_attention_norm": "layer_norm"},
    ],
)
@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("access", [INPUTS, PROBABILITIES])
def test_an_unchanged_layer_is_diffusers_layer(
    settings: dict[str, Any], is_masked: bool, access: AttentionAccess
) -> None:
    torch.manual_seed(0)
    attn = Attention(query_dim=16, heads=2, dim_head=8, **settings).double()
    attn.set_processor(AttnProcessor2_0())
    hidden = torch.randn(3, 12, 16, dtype=torch.float64)
    context = torch.randn(3, 5, 24, dtype=torch.float64) if "cross_attention_dim" in settings else None
    mask = None
    if is_masked:
        mask = torch.zeros(3, 1, 5 if context is not None else 12, dtype=torch.float64)
        mask[1, :, 2:] = -1e4
    bare = attn(hidden, encoder_hidden_states=context, attention_mask=mask)
    watcher = Watcher(access)
    with controlled(attn, watcher, 3, 4):
        output = attn(hidden, encoder_hidden_states=context, attention_mask=mask)
    torch.testing.assert_close(output, bare, rtol=1e-9, atol=1e-12)
    ((site, probs),) = watcher.notes
    assert (site.kind, site.height, site.width) == ("self" if context is None else "cross", 3, 4)
    torch.testing.assert_close(probs.sum(-1), torch.ones_like(probs[..., 0]), rtol=0, atol=1e-6)
    if is_masked and access is PROBABILITIES:
        assert float(probs[1, ..., 2:].max()) == 0 < float(probs[0].min())


@pytest.mark.parametrize("access", [INPUTS, PROBABILITIES])
def test_a_picture_shaped_layer_is_diffusers_layer(access: AttentionAccess) -> None:
    torch.manual_seed(0)
    attn = Attention(query_dim=16, heads=2, dim_head=8, norm_num_groups=4, residual_connection=True).double()
    attn.set_processor(AttnProcessor2_0())
    hidden = torch.randn(2, 16, 3, 4, dtype=torch.float64)
    bare, watcher = attn(hidden), Watcher(access)
    with controlled(attn, watcher, 3, 4):
        torch.testing.assert_close(attn(hidden), bare, rtol=1e-9, atol=1e-12)
    assert len(watcher.notes) == 1


def test_scores_that_overflow_are_made_in_float32_where_the_layer_says_so() -> None:
    """Stable Diffusion 2's ``upcast_attention``: a score beyond 65504 is no number in float16."""
    torch.manual_seed(0)
    attn = Attention(query_dim=16, heads=1, dim_head=16, upcast_attention=True).double()
    with torch.no_grad():
        for layer in (attn.to_q, attn.to_k):
            layer.weight.copy_(torch.eye(16) * 60)
    hidden = (normal(1, 6, 16) * 4).half()
    with torch.no_grad():
        reference = attn(hidden.double())
        scores = attn.to_q(hidden.double()) @ attn.to_k(hidden.double()).transpose(-1, -2) / 4
        assert float(scores.abs().max()) > 65504
        with controlled(attn.half(), Watcher(), 2, 3):
            output = attn(hidden)
    torch.testing.assert_close(output.double(), reference, rtol=1e-2, atol=1e-2)


ARGUMENTS: dict[str, dict[str, Any]] = {
    "a mask of booleans for each key": {"attn_mask": torch.tensor([1, 1, 0, 1, 1]).bool().expand(2, 1, 1, 5)},
    "a mask of booleans for each query": {"attn_mask": normal(2, 1, 6, 5, seed=5) > -1},
    "a mask of numbers for each query": {"attn_mask": normal(2, 4, 6, 5, seed=5)},
    "a scale": {"scale": 0.1},
    "grouped heads": {"enable_gqa": True},
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_kernels_arguments_are_heeded(name: str) -> None:
    """By the explicit probabilities, and by the fused kernel over cut values."""
    layer, query, extra = BareLayer(), normal(2, 4, 6, 8), ARGUMENTS[name]
    key, value = (normal(2, 2 if "enable_gqa" in extra else 4, 5, 8, seed=seed) for seed in (1, 2))
    arguments = {"key": key, "value": value, **extra}
    bare = layer(query, **arguments)
    with attention_control(layer, Watcher(), anywhere):
        torch.testing.assert_close(layer(query, **arguments), bare, rtol=1e-9, atol=1e-12)

    mask = torch.tensor([[1.0, 0, 1], [0, 0, 1]])
    spatial = SpatialControl({"[I]": mask}, [{"[I]": (2,)}, {"[I]": (0, 4)}])
    outputs = []
    for controllers in ([spatial], [spatial, Watcher()]):
        with attention_control(layer, Controllers(controllers), lambda *_: AttentionSite("layer", "cross", 2, 3)):
            outputs.append(layer(query, **arguments))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-9, atol=1e-12)
    assert float((outputs[0] - bare).abs().max()) > 1e-3


# ------------------------------------------------------------------------------ other processors


@torch.no_grad()
@pytest.mark.parametrize("kind", [FusedAttnProcessor2_0, AttnProcessor, SlicedAttnProcessor])
def test_other_processors_of_diffusers_are_served(pipe: S2EditPipeline, kind: type) -> None:
    """Controlled, they give what they give alone; where nobody looks they run themselves."""
    model = pipe.unet.double()
    x, context = normal(2, 4, 16, 16), normal(2, 9, 32, seed=1)
    plain = model(x, 500, context).sample
    if kind is FusedAttnProcessor2_0:
        model.fuse_qkv_projections()
    elif kind is SlicedAttnProcessor:
        pipe.enable_attention_slicing()
    else:
        model.set_attn_processor(AttnProcessor())
    assert {type(processor) for processor in model.attn_processors.values()} == {kind}
    bare = model(x, 500, context).sample
    torch.testing.assert_close(bare, plain, rtol=1e-9, atol=1e-9)
    for access in AttentionAccess:
        watcher = Watcher(access)
        with attention_control(model, watcher, anywhere):
            output = model(x, 500, context).sample
        torch.testing.assert_close(output, bare, rtol=1e-9, atol=1e-9)
        assert len(watcher.notes) == (0 if access is NONE else len(attention_layers(model)))
        assert access is not NONE or torch.equal(output, bare)
    with attention_control(model, Damper(0), anywhere):
        assert float((model(x, 500, context).sample - bare).abs().max()) > 1e-4


@torch.no_grad()
def test_fused_projections_of_a_transformer_are_served() -> None:
    torch.manual_seed(0)
    for make in (flux, stable_diffusion_3):
        tiny = make()
        tiny.model.double().eval()
        tiny.model.fuse_qkv_projections()
        bare, layers, watcher = tiny(), attention_layers(tiny.model), Watcher()
        with attention_control(tiny.model, watcher, anywhere):
            torch.testing.assert_close(tiny(), bare, rtol=1e-6, atol=1e-6)
        assert sorted(site.name for site, _ in watcher.notes) == sorted(layers)
        assert all(hasattr(layer, "to_qkv") for layer in layers.values())


@torch.no_grad()
def test_an_attention_backend_with_torchs_kernel_is_served() -> None:
    """diffusers' switch for transformers: what goes to PyTorch passes the seam."""
    torch.manual_seed(0)
    tiny = flux()
    tiny.model.double().eval()
    bare, watcher = tiny(), Watcher()
    tiny.model.set_attention_backend("_native_math")
    try:
        with attention_control(tiny.model, watcher, anywhere):
            torch.testing.assert_close(tiny(), bare, rtol=1e-6, atol=1e-6)
        assert len(watcher.notes) == len(attention_layers(tiny.model))
    finally:
        tiny.model.reset_attention_backend()


class NoAttention:
    """A processor of somebody's own, with other arithmetic."""

    def __call__(self, attn: Any, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        return hidden_states


@pytest.mark.parametrize(
    "make",
    [
        lambda: IPAdapterXFormersAttnProcessor(hidden_size=32, cross_attention_dim=32),
        lambda: AttnAddedKVProcessor2_0(),
        lambda: NoAttention(),
    ],
    ids=["IP-Adapter", "added keys", "no attention"],
)
def test_attention_that_cannot_be_taken_over_is_refused(pipe: S2EditPipeline, make: Callable[[], Any]) -> None:
    processors = {name: make() for name in pipe.unet.attn_processors}
    pipe.unet.set_attn_processor(dict(processors))
    message = rf"attn1 holds {type(make()).__name__}, whose attention can't be edited.*unload_ip_adapter\(\)"
    with pytest.raises(ValueError, match=message), attention_control(pipe.unet, Watcher(), anywhere):
        pass
    assert all(p is processors[name] for name, p in pipe.unet.attn_processors.items())


def test_a_processor_that_attends_twice_is_refused_when_it_does(pipe: S2EditPipeline) -> None:
    class Twice:
        def __call__(self, attn: Any, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
            x = hidden_states[:, None]
            once = F.scaled_dot_product_attention(x, x, x)
            return F.scaled_dot_product_attention(once, once, once)[:, 0]

    layer = BareLayer()
    layer.set_processor(Twice())
    message = (
        r"holds Twice, which made 2 attentions where one was expected.*set_default_attn_processor\(\).*_backend\(\)"
    )
    with pytest.raises(ValueError, match=message), attention_control(layer, Watcher(), anywhere):
        layer(normal(1, 6, 8))
    assert isinstance(layer.processor, Twice)


# ------------------------------------------------------------------------------ putting back, nesting, threads


def processors_of(pipe: S2EditPipeline) -> dict[str, int]:
    return {name: id(processor) for name, processor in pipe.unet.attn_processors.items()}


def test_processors_are_put_back_also_after_an_error(pipe: S2EditPipeline) -> None:
    """The very ones, each its own; also where an error comes from within the model."""
    pipe.unet.set_attn_processor({name: AttnProcessor2_0() for name in pipe.unet.attn_processors})
    before = processors_of(pipe)
    with pytest.raises(RuntimeError), attention_control(pipe.unet, Watcher(), anywhere):
        assert all(isinstance(p, ControlledProcessor) for p in pipe.unet.attn_processors.values())
        raise RuntimeError
    assert processors_of(pipe) == before

    class Broken(Watcher):
        def __call__(self, probs: torch.Tensor, site: AttentionSite) -> torch.Tensor:
            raise KeyError(site.name)

    x, context = torch.randn(1, 4, 16, 16), torch.randn(1, 9, 32)
    with pytest.raises(KeyError), attention_control(pipe.unet, Broken(), anywhere):
        pipe.unet(x, 500, context)
    assert processors_of(pipe) == before
    with attention_control(pipe.unet, watcher := Watcher(), anywhere):  # nothing of the broken call is left
        pipe.unet(x, 500, context)
    assert len(watcher.notes) == len(before)


@torch.no_grad()
def test_contexts_nest_and_the_inner_one_counts(pipe: S2EditPipeline) -> None:
    x, context = torch.randn(1, 4, 16, 16), torch.randn(1, 9, 32)
    before, references = processors_of(pipe), {}
    for key in (0, 1):
        with attention_control(pipe.unet, Damper(key), anywhere):
            references[key] = pipe.unet(x, 500, context).sample
    outer, inner = Damper(0), Damper(1)
    with attention_control(pipe.unet, outer, anywhere):
        assert torch.equal(pipe.unet(x, 500, context).sample, references[0])
        calls = outer.num_calls
        with attention_control(pipe.unet, inner, anywhere):
            assert torch.equal(pipe.unet(x, 500, context).sample, references[1])
        assert (outer.num_calls, inner.num_calls) == (calls, calls)
        with pytest.raises(RuntimeError), attention_control(pipe.unet, inner, anywhere):
            raise RuntimeError
        assert torch.equal(pipe.unet(x, 500, context).sample, references[0])
        assert processors_of(pipe) != before
    assert processors_of(pipe) == before
    assert not torch.equal(references[0], references[1])


@torch.no_grad()
def test_another_model_in_the_context_is_left_alone(pipe: S2EditPipeline) -> None:
    x, context, other = torch.randn(1, 4, 16, 16), torch.randn(1, 9, 32), copy.deepcopy(pipe.unet)
    bare, damper = other(x, 500, context).sample, Damper(0)
    with attention_control(pipe.unet, damper, anywhere):
        assert torch.equal(other(x, 500, context).sample, bare) and damper.num_calls == 0
        with attention_control(other, Watcher(NONE), anywhere):
            pass
        assert not torch.equal(pipe.unet(x, 500, context).sample, bare)


@torch.no_grad()
def test_threads_with_controllers_of_their_own_do_not_see_each_other(pipe: S2EditPipeline) -> None:
    """In the middle of each other's evaluations, one of them without any control; the last to leave puts back."""
    x, context, before = torch.randn(1, 4, 16, 16), torch.randn(1, 9, 32), processors_of(pipe)

    class Meeting(Damper):
        def __call__(self, probs: torch.Tensor, site: AttentionSite) -> torch.Tensor:
            if self.num_calls < 3:
                together.wait()  # all are inside a layer at once
            return super().__call__(probs, site)

    def run(controller: Damper | None) -> torch.Tensor:
        control = nullcontext() if controller is None else attention_control(pipe.unet, controller, anywhere)
        with torch.no_grad(), control:
            return torch.cat([pipe.unet(x, t, context).sample for t in (900, 500, 100)])

    bare, references = run(None), [run(Damper(key)) for key in (0, 1, 2)]
    together = threading.Barrier(3, timeout=60)
    meetings = [Meeting(key) for key in (0, 1, 2)]
    with ThreadPoolExecutor(4) as pool:
        uncontrolled = pool.submit(run, None)
        results = list(pool.map(run, meetings))
        assert torch.equal(uncontrolled.result(), bare)
    for result, reference in zip(results, references, strict=True):
        assert torch.equal(result, reference)
    assert len({meeting.num_calls for meeting in meetings}) == 1 and processors_of(pipe) == before
    assert not any(torch.equal(one, bare) for one in references)


# ------------------------------------------------------------------------------ Stable Diffusion's layers


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
@pytest.mark.parametrize("access", [INPUTS, PROBABILITIES])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_a_whole_unet_under_control_is_the_unet(
    pipe: S2EditPipeline, size: tuple[int, int], access: AttentionAccess, dtype: torch.dtype, limit: float
) -> None:
    pipe.to(dtype=dtype)
    x, context, watcher = normal(2, 4, *size).to(dtype), normal(2, 9, 32).to(dtype), Watcher(access)
    bare = pipe.unet(x, 500, context).sample
    with pipe.family.control_attention(watcher, *size):
        output = pipe.unet(x, 500, context).sample
    torch.testing.assert_close(output, bare, rtol=10 * limit, atol=limit)
    assert len(watcher.notes) == len(pipe.unet.attn_processors)
    for site, probs in watcher.notes:
        assert site.kind == ("cross" if "attn2" in site.name else "self")
        assert probs.shape[-2] == site.height * site.width
        assert (site.height, site.width) in (size, (size[0] // 2, size[1] // 2))  # true heights, none transposed


def family_of_sides(*block_out_channels: int) -> UNetFamily:
    config = SimpleNamespace(block_out_channels=block_out_channels)
    return UNetFamily(SimpleNamespace(unet=SimpleNamespace(config=config)))


def test_sizes_are_the_units_own_also_for_odd_latents() -> None:
    grids = family_of_sides(1, 2, 3).attention_grids(13, 21)
    assert grids == {13 * 21: (13, 21), 7 * 11: (7, 11), 4 * 6: (4, 6)}


@pytest.mark.parametrize(
    ("size", "telling", "laid_out"),
    [
        ((64, 64), {32 * 32, 16 * 16}, {32 * 32, 16 * 16, 8 * 8}),  # Stable Diffusion at 512 x 512
        ((64, 96), {32 * 48, 16 * 24}, {32 * 48, 16 * 24, 8 * 12}),
        ((16, 16), {16 * 16, 8 * 8}, {16 * 16, 8 * 8, 4 * 4, 2 * 2}),  # as small as a 1/16 layer themselves
    ],
)
def test_which_layers_tell_where_words_look_and_which_hold_the_layout(
    size: tuple[int, int], telling: set[int], laid_out: set[int]
) -> None:
    """S2Edit's M_obj: the layers at 1/16 to 1/32 of the picture's side, not the one below; prompt-to-prompt's
    self-attention: at 1/16 and below."""
    family = family_of_sides(1, 2, 3, 4)
    grids = family.attention_grids(*size)
    tells, holds = set(), set()
    for cells, grid in grids.items():
        for hidden in (torch.empty(1, cells, 1), torch.empty(1, 1, *grid)):  # rows of cells, or picture-shaped
            cross = family.attention_site(grids, "x", nn.Identity(), hidden, torch.empty(1, 7, 1))
            alone = family.attention_site(grids, "x", nn.Identity(), hidden, None)
            assert cross is not None and alone is not None
            assert (cross.kind, alone.kind) == ("cross", "self") and (cross.height, cross.width) == grid
            assert not cross.holds_layout and not alone.tells_words
            tells |= {cells} if cross.tells_words else set()
            holds |= {cells} if alone.holds_layout else set()
    assert (tells, holds) == (telling, laid_out)
    assert family.attention_site(grids, "x", nn.Identity(), torch.empty(1, 77, 1), None) is None  # no grid of this call
