"""What is published beside the code is what the Hub takes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from s2edit_pipeline import S2EditPipeline
from s2edit_pipeline.identity_adapter import IdentityAdapter
from s2edit_pipeline.identity_card import TEMPLATE, identity_card

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
    prompt = 'a "lady": yes, ☂ $5\n---\nwith `ticks`'
    identity = IdentityAdapter(
        "[I]", "lady", prompt, "token", {"text_encoder": torch.zeros(4)}, base_model=base, mask=torch.ones(2, 2)
    )
    card = ModelCard(identity_card(identity, {"a [I] lady": "preview_1.png"}, "other"))
    assert card.data.get("instance_prompt") == " ".join(prompt.split())
    assert card.data.get("base_model") == (base if "/" in base else None)
    assert card.data.get("base_model_relation") == ("adapter" if "/" in base else None)
    assert (card.data.library_name, card.data.license) == ("diffusers", "other")
    assert card.data.pipeline_tag == "image-to-image"
    assert card.data.get("widget") == [{"text": "a [I] lady", "output": {"url": "preview_1.png"}}]
    assert "lora" not in card.data.tags and {"s2edit", "textual_inversion"} <= set(card.data.tags)
    for part in ("Intended use, consent and misuse", "Limits", "Credit", '"mask.png"', "(preview_1.png)"):
        assert part in card.text
    assert "$" not in card.text.replace("$5", "")


def test_the_template_that_is_shown_is_the_one_that_is_used() -> None:
    assert (CARD.parent / "identity.md").read_text("utf-8") == TEMPLATE.template


@pytest.mark.parametrize("method", ["lora", "token"])
def test_the_cards_example_runs(pipe: S2EditPipeline, picture: Any, tmp_path: Path, method: str) -> None:
    pipe.save_pretrained(tmp_path / "model")
    pipe = S2EditPipeline.from_pretrained(tmp_path / "model")
    identity = pipe.fit_identity(
        picture, "a sad lady", "lady", method=method, mask=np.ones((32, 32), bool), num_steps=1
    )
    assert identity.base_model == "model"
    identity.save_pretrained(tmp_path / "ada")
    card = (tmp_path / "ada" / "README.md").read_text()
    example = re.search(r"```text\n(.*?)```", card, flags=re.DOTALL)
    assert example is not None
    code = example[1].replace('"model"', repr(str(tmp_path / "model")))
    code = code.replace('"this folder or repository"', repr(str(tmp_path / "ada")))
    names: dict[str, Any] = {"image": picture}
    exec(compile(code, "card", "exec"), names)
    assert names["edited"].size == picture.size
    assert ("load_lora_weights" in card) is (method == "lora")
