"""Composition with SDXL's two text encoders: both tokens in both, each with its own mask; nothing left behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from s2edit_pipeline import IdentityAdapter, ReferenceAttribute, S2EditPipeline
from s2edit_pipeline.attention_chain import Controllers
from s2edit_pipeline.attention_seam import AttentionAccess, AttentionController, AttentionSite
from s2edit_pipeline.attention_spatial import mask_at
from s2edit_pipeline.family_unet import UNetFamily
from s2edit_pipeline.prompt_tokens import initial_row

SOURCE = "a photo of a sad grandmother"
TARGET = "a photo of a smiling [I] grandmother with a [A] hat"


def state(pipe: S2EditPipeline) -> dict[str, torch.Tensor]:
    parts = {**pipe.family.tuned_components, "vae": pipe.vae}
    return {f"{part}.{n}": t.clone() for part, module in parts.items() for n, t in module.state_dict().items()}


def assert_same(now: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> None:
    assert now.keys() == before.keys()
    assert not [name for name in before if not torch.equal(now[name], before[name])]


@torch.no_grad()
def with_factors(encoder: torch.nn.Module, identity: IdentityAdapter, component: str) -> None:
    """Add what the identity changes to the weights themselves."""
    parameters = dict(encoder.named_parameters())
    for name, difference in identity.weight_differences(component).items():
        own = name if name in parameters else name.removeprefix("text_model.")
        parameters[own].add_(difference)


class Watch(AttentionController):
    """Remembers what every cross-attention layer goes on with."""

    def __init__(self, records: list[tuple[AttentionSite, torch.Tensor]]) -> None:
        self.records = records

    def access_needed(self, site: AttentionSite) -> AttentionAccess:
        return AttentionAccess.PROBABILITIES if site.kind == "cross" else AttentionAccess.NONE

    def __call__(self, probs: torch.Tensor, site: AttentionSite) -> torch.Tensor:
        self.records.append((site, probs))
        return probs


@pytest.mark.parametrize("method", ["lora", "token"])
def test_both_tokens_in_both_text_encoders(
    make_family: Callable[..., S2EditPipeline],
    wide_picture: Image.Image,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    pipe, left = make_family("sdxl"), np.arange(24)[None].repeat(16, 0) < 12
    before, tokenizers = state(pipe), pipe.family.tokenizers
    fitted = pipe.fit_identity(
        wide_picture, SOURCE, "grandmother", mask=left, method=method, num_steps=2, batch_size=1,
        reference=ReferenceAttribute(wide_picture.rotate(180), "a photo of a man with a hat", "hat", mask=~left),
        generator=torch.Generator().manual_seed(0), height=16, width=24,
    )  # fmt: skip
    assert_same(state(pipe), before)
    fitted.save_pretrained(tmp_path / "both")
    identity = IdentityAdapter.from_pretrained(tmp_path / "both")
    assert identity.reference is not None and identity.mask is not None and identity.reference.mask is not None
    for rows, noun in ((identity.rows, "grandmother"), (identity.reference.rows, "hat")):
        assert rows.keys() == {"text_encoder", "text_encoder_2"}
        for name, encoder in pipe.family.text_encoders.items():
            assert float((rows[name] - initial_row(tokenizers[name], encoder, noun)).abs().max()) > 1e-4

    bare = {name: copy.deepcopy(encoder) for name, encoder in pipe.family.text_encoders.items()}
    pipe.load_identity(identity)
    prompt = pipe.family.tokenize(TARGET)
    contexts = []
    with torch.no_grad():  # the same rows in tables that are really longer
        for name, encoder in bare.items():
            with_factors(encoder, identity, name)
            ids = pipe.family.tokenizers[name].convert_tokens_to_ids(["[I]", "[A]"])
            encoder.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
            for token_id, rows in zip(ids, (identity.rows, identity.reference.rows), strict=True):
                encoder.get_input_embeddings().weight[token_id] = rows[name]
            contexts.append(encoder(prompt.ids[name], output_hidden_states=True).hidden_states[-2])
        encoded = pipe.family.encode([prompt]).embeds
    torch.testing.assert_close(encoded, torch.cat(contexts, -1), rtol=1e-4, atol=1e-5)

    inversion = pipe.invert(wide_picture, SOURCE, num_inference_steps=2, height=16, width=24)
    records: list[tuple[AttentionSite, torch.Tensor]] = []
    control_attention = UNetFamily.control_attention
    monkeypatch.setattr(
        UNetFamily,
        "control_attention",
        lambda family, control, *size: control_attention(family, Controllers([control, Watch(records)]), *size),
    )
    result = pipe(TARGET, wide_picture, SOURCE, inversion=inversion, output_type="latent")
    assert bool(torch.isfinite(result.images).all())
    assert len(records) == 2 * sum("attn2" in name for name in pipe.unet.attn_processors)
    for site, (*_, probs) in records:  # the target's row is the last one
        for token, mask, noun in (
            ("[I]", identity.mask, "grandmother"),
            ("[A]", identity.reference.mask, "hat"),
        ):
            outside = mask_at(mask, site.height, site.width).flatten() == 0
            assert 0 < int(outside.sum()) < len(outside)
            (column,), (beside, *_) = prompt.find(token), prompt.find(noun)
            assert float(probs[:, outside, column].abs().max()) == 0 < float(probs[:, ~outside, column].min())
            assert float(probs[:, outside, beside].min()) > 0  # the noun looks everywhere
    pipe.unload_identity()
    assert_same(state(pipe), before)
    assert all(pipe.family.tokenizers[name] is tokenizer for name, tokenizer in tokenizers.items())


def test_its_card_names_the_setting_that_stock_sdxl_needs(
    make_family: Callable[..., S2EditPipeline], wide_picture: Image.Image, tmp_path: Path
) -> None:
    for family, has_note in (("sdxl", True), ("sd1", False)):
        pipe = make_family(family)
        half = np.arange(24)[None].repeat(16, 0) < 12
        identity = pipe.fit_identity(wide_picture, SOURCE, "grandmother", method="token", mask=half, num_steps=1)
        identity.save_pretrained(tmp_path / family)
        card = (tmp_path / family / "README.md").read_text("utf-8")
        assert ("text_encoder_2.config.eos_token_id" in card) is has_note
        assert "load_textual_inversion" in card
