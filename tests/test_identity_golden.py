"""Identities that the last release saved are read, and fit the model that they were fitted to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from s2edit_pipeline import IdentityAdapter, load_avatars
from s2edit_pipeline.identity_schema import FORMAT_VERSION

from .effective_weights import effective_weights

GOLDEN = Path(__file__).parent / "golden"


def test_a_lora_with_a_reference_of_version_2(tmp_path: Path) -> None:
    folder = GOLDEN / "identity_v2_lora"
    assert json.loads((folder / "identity.json").read_text())["format_version"] == 2
    identity = IdentityAdapter.from_pretrained(folder)
    tensors = load_file(str(folder / "pytorch_lora_weights.safetensors"))
    assert identity.weights.keys() == tensors.keys()
    assert all(torch.equal(identity.weights[name], tensor) for name, tensor in tensors.items())
    assert torch.equal(identity.rows["text_encoder"], load_file(str(folder / "learned_embeds.safetensors"))["[I]"])
    assert identity.reference is not None and identity.reference.token == "[A]"
    assert not identity.interrupted

    pipe = load_avatars()
    bare = effective_weights(pipe.unet)
    assert pipe.load_identity(folder) == "[I]"
    found = effective_weights(pipe.unet)
    for name in ("conv_in", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"):
        up, down = (tensors[f"unet.{name}.lora_{part}.weight"].double().flatten(1) for part in "BA")
        wanted = bare[f"{name}.weight"].double() + (up @ down).reshape(bare[f"{name}.weight"].shape)
        torch.testing.assert_close(found[f"{name}.weight"].double(), wanted, rtol=1e-5, atol=1e-7)
    pipe.unload_identity()

    identity.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "identity.json").read_text())["format_version"] == FORMAT_VERSION == 3
    again = IdentityAdapter.from_pretrained(tmp_path / "again")
    assert again.digest == identity.digest and again.base_fingerprint == identity.base_fingerprint
    pipe.load_identity(again)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_token_alone_of_version_2(dtype: torch.dtype) -> None:
    folder = GOLDEN / "identity_v2_token"
    pipe = load_avatars(dtype=dtype)
    assert pipe.load_identity(folder) == "[I]"
    assert pipe.tokenizer.tokenize("a [I] man").count("[I]") == 1
    pipe.unload_identity()
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            parameter.add_(0.05)
    with pytest.raises(ValueError, match="unet has other weights"):
        pipe.load_identity(folder)
