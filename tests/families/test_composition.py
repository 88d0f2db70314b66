"""Composition with SDXL's two text encoders: both tokens in both, each with its own mask; nothing left behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from s2edit_pipeline import IdentityAdapter, ReferenceAttribute, S2EditPipeline, attention_control, picture_editing
from s2edit_pipeline.attention_controls import Controllers, mask_at
from s2edit_pipeline.attention_seam import AttentionAccess, AttentionController, AttentionSite
from s2edit_pipeline.prompt_tokens import initial_row

SOURCE = "a photo of a sad grandmother"
TARGET = "a photo of a smiling [I] grandmother with a [A] hat"


def state(pipe: S2EditPipeline) -> dict[str, torch.Tensor]:
    parts = {**pipe._components_with_weights(), "vae": pipe.vae}
    return {f"{part}.{n}": t.clone() for part, module in parts.items() for n, t in module.state_dict().items()}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert not [name for name in wanted if not torch.equal(found[name], wanted[name])]


class Watch(AttentionController):
    """Remembers what every cross-attention layer goes on with."""

    def __init__(self, seen: list[tuple[AttentionSite, torch.Tensor]]) -> None:
        self.seen = seen

    def wants(self, site: AttentionSite) -> Look:
        return Look.PROBABILITIES if site.is_cross else Look.AWAY

    def __call__(self, probs: torch.Tensor, site: AttentionSite) -> torch.Tensor:
        self.seen.append((site, probs))
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
    before, tokenizers = state(pipe), dict(pipe._tokenizers)
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
        for name, encoder in pipe._text_encoders.items():
            assert float((rows[name] - initial_row(pipe._tokenizers[name], encoder, noun)).abs().max()) > 1e-4

    pipe.load_identity(identity)
    prompt = pipe._tokenize(TARGET)
    contexts = []
    with torch.no_grad():  # the same rows in tables that are really longer
        for name, encoder in pipe._text_encoders.items():
            longer, ids = copy.deepcopy(encoder), pipe._tokenizers[name].convert_tokens_to_ids(["[I]", "[A]"])
            longer.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
            for token_id, rows in zip(ids, (identity.rows, identity.reference.rows), strict=True):
                longer.get_input_embeddings().weight[token_id] = rows[name]
            contexts.append(longer(prompt.ids[name], output_hidden_states=True).hidden_states[-2])
    torch.testing.assert_close(pipe._encode_prompts([prompt]).embeds, torch.cat(contexts, -1), rtol=1e-4, atol=1e-5)

    inversion = pipe.invert(wide_picture, SOURCE, num_inference_steps=2, height=16, width=24)
    seen: list[tuple[AttentionSite, torch.Tensor]] = []
    monkeypatch.setattr(
        picture_editing,
        "attention_control",
        lambda unet, controls, *size: attention_control.attention_control(
            unet, Controllers([controls, Watch(seen)]), *size
        ),
    )
    result = pipe(TARGET, wide_picture, SOURCE, inversion=inversion, output_type="latent")
    assert bool(torch.isfinite(result.images).all())
    assert len(seen) == 2 * sum("attn2" in name for name in pipe.unet.attn_processors)
    for site, (*_, probs) in seen:  # the target's row is the last one
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
    assert all(pipe._tokenizers[name] is tokenizer for name, tokenizer in tokenizers.items())


def test_its_card_says_what_stock_sdxl_has_to_be_told(
    make_family: Callable[..., S2EditPipeline], wide_picture: Image.Image, tmp_path: Path
) -> None:
    for family, told in (("sdxl", True), ("sd1", False)):
        pipe = make_family(family)
        half = np.arange(24)[None].repeat(16, 0) < 12
        identity = pipe.fit_identity(wide_picture, SOURCE, "grandmother", method="token", mask=half, num_steps=1)
        identity.save_pretrained(tmp_path / family)
        card = (tmp_path / family / "README.md").read_text("utf-8")
        assert ("text_encoder_2.config.eos_token_id" in card) is told
        assert "load_textual_inversion" in card
