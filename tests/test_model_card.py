"""What is published beside the code is what the Hub takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from s2edit_pipeline import S2EditPipeline
from s2edit_pipeline.identity_adapter import IdentityAdapter

CARD = Path(__file__).parent.parent / "model_card" / "README.md"


def test_the_cards_front_matter_is_read_by_the_hubs_own_client() -> None:
    data = ModelCard.load(CARD).data
    assert (data.library_name, data.license, data.pipeline_tag) == ("diffusers", "apache-2.0", "image-to-image")
    assert "s2edit" in data.tags


def test_the_cards_example_calls_what_there_is() -> None:
    text = CARD.read_text("utf-8")
    called = set(re.findall(r"(?:pipe|identity)\.(\w+)\(", text))
    assert {"fit_identity", "push_to_hub", "load_identity"} <= called
    assert all(hasattr(S2EditPipeline, name) or hasattr(IdentityAdapter, name) for name in called)


@pytest.mark.parametrize("base", ["", "weights", "me/model"])
def test_an_identitys_card_is_read_too(base: str) -> None:
    import torch

    identity = IdentityAdapter(
        "[I]", "lady", 'a "lady": yes', "token", {"text_encoder": torch.zeros(4)}, base_model=base
    )
    data = ModelCard(identity._card()).data
    assert data.get("instance_prompt") == 'a "lady": yes'
    assert data.get("base_model") == (base if "/" in base else None)
