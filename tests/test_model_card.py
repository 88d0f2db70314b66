"""What is published beside the code is what the Hub takes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from s2edit_pipeline import S2EditPipeline, load_avatars
from s2edit_pipeline.avatars.world import render, sample_person
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


def run_the_example(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The card's snippet as it is written, beside the identity's folder; its names."""
    card = (folder / "README.md").read_text()
    example = re.search(r"```text\n(.*?)```", card, flags=re.DOTALL)
    assert example is not None
    monkeypatch.chdir(folder.parent)
    names: dict[str, Any] = {}
    exec(compile(example[1], "card", "exec"), names)
    return {**names, "card": card}


@pytest.mark.parametrize("method", ["lora", "token"])
def test_the_cards_example_runs(
    pipe: S2EditPipeline, picture: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    pipe.save_pretrained(tmp_path / "model")
    pipe = S2EditPipeline.from_pretrained(tmp_path / "model")
    identity = pipe.fit_identity(
        picture, "a sad lady", "lady", method=method, mask=np.ones((32, 32), bool), num_steps=1
    )
    assert identity.base_model == "model"
    identity.save_pretrained(tmp_path / "ada")
    picture.save(tmp_path / "picture.png")
    names = run_the_example(tmp_path / "ada", monkeypatch)
    assert names["edited"].size == picture.size and names["edited"] != picture
    assert ("load_lora_weights" in names["card"]) is (method == "lora")
    assert 'pipe("a sad [I] lady with a hat", image=image' in names["card"]


def test_an_identity_of_the_embedded_model_says_how_that_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture, prompt = render(sample_person(3, "held_out")), "a photo of a surprised man with short curly black hair"
    pipe = load_avatars()
    identity = pipe.fit_identity(picture, prompt, "man", method="token", num_steps=1, mask=np.ones((128, 128), bool))
    assert identity.base_model == "the embedded avatars"
    identity.save_pretrained(tmp_path / "bob")
    picture.save(tmp_path / "picture.png")
    names = run_the_example(tmp_path / "bob", monkeypatch)
    assert "pipe = load_avatars()\n" in names["card"] and names["edited"].size == picture.size


@pytest.mark.parametrize(
    ("name", "loading"), [("the embedded flow avatars", 'load_avatars("flow")'), ("me/a", 'from_pretrained("me/a")')]
)
def test_a_card_names_its_repository(name: str, loading: str) -> None:
    identity = IdentityAdapter(
        "[I]", "lady", "a lady with a hat", "token", {"text_encoder": torch.zeros(4)}, base_model=name
    )
    text = identity_card(identity, repository="me/ada")
    assert loading in text and 'load_identity("me/ada")' in text
    assert 'pipe("a [I] lady with a hat and glasses"' in text
