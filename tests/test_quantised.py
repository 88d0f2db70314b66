"""Quantised models: a fit trains adapters over them, an identity fitted elsewhere lies over them, and what would be
lost to their coarse numbers is refused.

bitsandbytes, torchao and gguf are asked for by ``pip install -e ".[quantised]"``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.hooks import apply_layerwise_casting
from PIL import Image
from torch import nn

from s2edit_pipeline import IdentityAdapter
from s2edit_pipeline.identity_fingerprint import fingerprint, is_same_base
from s2edit_pipeline.packed_weights import is_packed, kind_of, stored_parts
from s2edit_pipeline.pipeline import S2EditPipeline

SOURCE = "a photo of a sad lady"
MOST_OFF = 0.2
"""How far an identity's effect may be from that over the plain model, as a share of it."""


def replace_linears(root: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    for name, layer in list(root.named_modules()):
        if type(layer) is nn.Linear and layer.in_features % 32 == 0:  # a block of GGUF's
            parent, _, child = name.rpartition(".")
            setattr(root.get_submodule(parent), child, make(layer))


def torchao_int8(root: nn.Module) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(root, quantization.Int8WeightOnlyConfig())


def bitsandbytes_8_bits(root: nn.Module) -> None:
    bnb = pytest.importorskip("bitsandbytes")

    def make(layer: nn.Linear) -> nn.Module:
        ends, has_bias = (layer.in_features, layer.out_features), layer.bias is not None
        made = bnb.nn.Linear8bitLt(*ends, has_bias, has_fp16_weights=False)
        made.load_state_dict(layer.state_dict())
        return made.to(layer.weight.device if layer.weight.is_cuda else "cpu")

    replace_linears(root, make)


def bitsandbytes_4_bits(root: nn.Module) -> None:
    bnb = pytest.importorskip("bitsandbytes")

    def make(layer: nn.Linear) -> nn.Module:
        ends, has_bias = (layer.in_features, layer.out_features), layer.bias is not None
        made = bnb.nn.Linear4bit(*ends, has_bias, compute_dtype=torch.float32, quant_type="nf4")
        made.load_state_dict(layer.state_dict())
        made.support_avx512bf16_for_cpu = False  # its kernel doesn't take layers as narrow as these
        return made.to(layer.weight.device if layer.weight.is_cuda else "cpu")

    replace_linears(root, make)


def gguf_q8(root: nn.Module) -> None:
    gguf = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = gguf.GGMLQuantizationType.Q8_0

    def make(layer: nn.Linear) -> nn.Module:
        made = GGUFLinear(layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=torch.float32)
        packed = torch.from_numpy(gguf.quants.quantize(layer.weight.detach().cpu().numpy(), kind))
        made.weight = GGUFParameter(packed.to(layer.weight.device), quant_type=kind)
        made.bias = layer.bias
        return made

    replace_linears(root, make)


def float8(root: nn.Module) -> None:
    apply_layerwise_casting(root, torch.float8_e4m3fn, torch.float32)


KINDS = [float8, torchao_int8, bitsandbytes_8_bits, bitsandbytes_4_bits, gguf_q8]


def fit(pipe: S2EditPipeline, picture: Image.Image, mask: np.ndarray, method: str = "lora") -> IdentityAdapter:
    return pipe.fit_identity(
        picture, SOURCE, "lady", mask=mask, method=method, num_steps=4, batch_size=2, learning_rate=5e-3, crop=None,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip


def edit(pipe: S2EditPipeline, picture: Image.Image, identity: Any = None) -> torch.Tensor:
    """Latents, of which the identity may change anything."""
    target = "a photo of a smiling [I] lady" if identity is not None else "a photo of a smiling lady"
    options = {"inversion": "ddim", "blend_words": False, "num_inference_steps": 2, "output_type": "latent"}
    return pipe(target, picture, SOURCE, identity, **options).images.float().cpu()


@pytest.fixture(scope="module")
def plain(_tiny: dict[str, Any], picture: Image.Image, half_mask: np.ndarray) -> tuple[IdentityAdapter, float]:
    """An identity of the model as it is, and how far it moves an edit."""
    pipe = S2EditPipeline(**copy.deepcopy(_tiny["epsilon"]))
    pipe.set_progress_bar_config(disable=True)
    identity = fit(pipe, picture, half_mask)
    return identity, float((edit(pipe, picture, identity) - edit(pipe, picture)).norm())


def is_served(
    pipe: S2EditPipeline,
    kind: Callable[[nn.Module], None],
    picture: Image.Image,
    mask: np.ndarray,
    plain: tuple[IdentityAdapter, float],
) -> None:
    identity, moved = plain
    for root in (pipe.unet, pipe.text_encoder):
        kind(root)
        root.eval()
    types = {name: (type(p), p.dtype) for name, p in pipe.unet.named_parameters()}
    bare = edit(pipe, picture)
    assert abs(float((edit(pipe, picture, identity) - bare).norm()) - moved) < MOST_OFF * moved
    own = fit(pipe, picture, mask)
    assert abs(float((edit(pipe, picture, own) - bare).norm()) - moved) < MOST_OFF * moved
    assert own.weights.keys() == identity.weights.keys()
    assert {name: (type(p), p.dtype) for name, p in pipe.unet.named_parameters()} == types
    assert torch.equal(edit(pipe, picture), bare)
    with pytest.raises(ValueError, match=r"method='full' trains all weights, .* quantised .*Take method='lora'"):
        fit(pipe, picture, mask, "full")
    # as a rough guess it is the same base, of whatever numbers
    assert is_same_base(own.base_fingerprint["unet"], pipe.unet)
    assert is_same_base(identity.base_fingerprint["unet"], pipe.unet)
    with torch.no_grad():
        pipe.unet.conv_norm_out.bias.data.add_(0.1)
    with pytest.raises(ValueError, match="whose unet has other weights"):
        pipe.load_identity(identity)


@pytest.mark.parametrize("kind", KINDS)
def test_an_identity_lies_over_it(
    pipe: S2EditPipeline,
    picture: Image.Image,
    half_mask: np.ndarray,
    plain: tuple[IdentityAdapter, float],
    kind: Callable[[nn.Module], None],
) -> None:
    is_served(pipe, kind, picture, half_mask, plain)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_an_identity_lies_over_it_on_a_gpu(
    pipe: S2EditPipeline,
    picture: Image.Image,
    half_mask: np.ndarray,
    plain: tuple[IdentityAdapter, float],
    kind: Callable[[nn.Module], None],
) -> None:
    is_served(pipe.to("cuda"), kind, picture, half_mask, plain)


def test_differences_of_whole_tensors_are_not_laid_over_float8(
    pipe: S2EditPipeline, picture: Image.Image, half_mask: np.ndarray
) -> None:
    """A difference of a hundredth is less than half a step of float8: it would be lost without a word."""
    identity = fit(pipe, picture, half_mask, "full")
    float8(pipe.unet)
    with pytest.raises(ValueError, match=r"as a whole, and it is quantised here \(float8_e4m3fn\).*method='lora'"):
        pipe.load_identity(identity)
    assert pipe.identities == ()


def test_null_text_inversion_over_float8(pipe: S2EditPipeline, picture: Image.Image) -> None:
    """Its gradients need the weights that the forward pass used; they are float8 again afterwards."""
    float8(pipe.unet)
    found = pipe.invert(picture, SOURCE, "null_text", num_inference_steps=1, guidance_scale=4.5)
    assert found.unconditional_embeds is not None and bool(torch.isfinite(found.unconditional_embeds).all())
    assert pipe.unet.conv_norm_out.weight.dtype == torch.float32  # casting leaves norms alone
    assert pipe.unet.mid_block.attentions[0].proj_in.weight.dtype == torch.float8_e4m3fn


class Pair(torch.Tensor):
    """A packed tensor of two, as torchao's are."""

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values", "scales"], None


def test_what_a_packed_tensor_is_stored_in() -> None:
    pair = torch.zeros(2).as_subclass(Pair)
    pair.values, pair.scales = torch.ones(3, dtype=torch.int8), torch.ones(1)
    assert is_packed(pair) and kind_of(pair) == "Pair"
    assert {name: tuple(part.shape) for name, part in stored_parts(pair).items()} == {".values": (3,), ".scales": (1,)}
    whole = torch.ones(4, dtype=torch.uint8)
    assert is_packed(whole) and kind_of(whole) == "uint8" and torch.equal(stored_parts(whole)[""], whole)
    assert not is_packed(torch.ones(2, dtype=torch.float8_e4m3fn))


def test_bytes_of_one_kind_are_compared_and_of_two_are_not() -> None:
    def layer(dtype: torch.dtype, value: int) -> nn.Module:
        made = nn.Linear(4, 4)
        made.weight = nn.Parameter(torch.full((4, 4), value, dtype=dtype), requires_grad=False)
        made.bias = nn.Parameter(torch.tensor([1.0, 2.0, 4.0, 8.0]))
        return made

    wanted = fingerprint(layer(torch.int8, 3))
    assert wanted is not None and wanted["dtype"] == "int8"
    assert is_same_base(wanted, layer(torch.int8, 3)) and not is_same_base(wanted, layer(torch.int8, 4))
    assert is_same_base(wanted, layer(torch.uint8, 9))
    plain = nn.Linear(4, 4)
    plain.bias = nn.Parameter(torch.tensor([1.0, 2.0, 4.0, 8.0]))
    assert is_same_base(wanted, plain)
    nn.init.zeros_(plain.bias)
    assert not is_same_base(wanted, plain)
