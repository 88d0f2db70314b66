"""Two people in one picture: each with a token, a mask and a strength of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from s2edit_pipeline import S2EditPipeline
from s2edit_pipeline.attention_seam import AttentionAccess, AttentionSite
from s2edit_pipeline.attention_spatial import SpatialControl, mask_at
from s2edit_pipeline.identity_adapter import IdentityAdapter

from .effective_weights import effective_weights

SOURCE = "a photo of a sad lady and a man"
BOTH = "a photo of a smiling [I] lady and a [J] man"


@pytest.fixture
def masks(half_mask: np.ndarray) -> dict[str, np.ndarray]:
    return {"[I]": half_mask, "[J]": ~half_mask}


def fit(pipe: S2EditPipeline, picture: Image.Image, token: str, mask: np.ndarray, **changes: Any) -> IdentityAdapter:
    said = {"prompt": SOURCE, "subject": "lady" if token == "[I]" else "man", **changes}
    identity = pipe.fit_identity(
        picture, token=token, mask=mask, num_steps=2, learning_rate=1e-2,
        generator=torch.Generator().manual_seed(len(token)), **said,
    )  # fmt: skip
    for i, tensor in enumerate(identity.weights.values()):
        tensor.add_(0.02 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(i + ord(token[1]))))
    return identity


@pytest.fixture
def people(pipe: S2EditPipeline, picture: Image.Image, masks: dict[str, np.ndarray]) -> list[IdentityAdapter]:
    """Both fitted to the same picture, each under a mask of its own."""
    return [fit(pipe, picture, token, mask) for token, mask in masks.items()]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[SpatialControl, torch.Tensor, AttentionSite]]]:
    """What spatial control let through, at every layer and step."""
    records: list[tuple[SpatialControl, torch.Tensor, AttentionSite]] = []
    plain, needed = SpatialControl.__call__, SpatialControl.access_needed

    def record(self: SpatialControl, probs: torch.Tensor, site: AttentionSite) -> torch.Tensor:
        masked = plain(self, probs, site)
        records.append((self, masked.clone(), site))
        return masked

    def with_probabilities(self: SpatialControl, site: AttentionSite) -> AttentionAccess:
        return AttentionAccess.PROBABILITIES if needed(self, site) else AttentionAccess.NONE

    monkeypatch.setattr(SpatialControl, "__call__", record)
    # the fused kernel makes nothing to look at
    monkeypatch.setattr(SpatialControl, "access_needed", with_probabilities)
    yield records


def assert_each_looks_at_its_own(
    pipe: S2EditPipeline, seen: list[Any], masks: dict[str, np.ndarray], rows: dict[str, int]
) -> None:
    """In every cross-attention layer, each token's column is 0 wherever its own mask is, and not elsewhere.

    ``rows``: prompt -> how many rows of a batch hold it, at least once.
    """
    layers = {name for name, _ in pipe.unet.named_modules() if name.endswith("attn2")}
    looked: dict[str, set[str]] = {token: set() for token in masks}
    for control, probs, site in seen:
        for row, columns in enumerate(control.columns):
            for token, positions in columns.items():
                inside = mask_at(torch.from_numpy(masks[token]).float(), site.height, site.width).flatten().bool()
                column = probs[row, :, :, list(positions)]
                assert float(column[:, ~inside].abs().max()) == 0
                assert float(column[:, inside].min()) > 0
                looked[token].add(site.name)
    assert all(names == layers for names in looked.values())
    assert {sum(bool(columns) for columns in control.columns) for control, _, _ in seen} == set(rows.values())


def test_each_token_looks_at_its_own_person(
    pipe: S2EditPipeline, picture: Image.Image, people: list[IdentityAdapter], masks: Any, seen: list[Any]
) -> None:
    for identity in people:
        pipe.load_identity(identity)
    assert pipe.identities == ("[I]", "[J]")
    seen.clear()
    result = pipe(BOTH, picture, SOURCE, num_inference_steps=2)
    # the inversion's only row; the target's, and with it the source's when it is asked again
    assert_each_looks_at_its_own(pipe, seen, masks, {"inversion": 1, "edit": 2})
    assert len(result.images) == 1
    inversion = pipe.invert(picture, SOURCE, num_inference_steps=2)
    assert inversion.prompt == "a photo of a sad [I] lady and a [J] man"
    assert [(token, state.split(" x ")[0]) for token, state in inversion.made_with.identities.items()] == [
        (identity.token, identity.digest) for identity in people
    ]
    seen.clear()
    pipe(BOTH, num_inference_steps=2, generator=torch.Generator().manual_seed(0))  # drawn anew, where they were
    assert_each_looks_at_its_own(pipe, seen, masks, {"drawing": 1})


def test_people_of_two_pictures_are_put_where_they_are_in_a_third(
    pipe: S2EditPipeline, picture: Image.Image, masks: Any, seen: list[Any]
) -> None:
    everywhere = np.ones((32, 32), bool)
    ada = fit(pipe, picture, "[I]", everywhere, prompt="a photo of a sad lady")
    bob = fit(pipe, picture.rotate(90), "[I]", everywhere, prompt="a man with a hat", subject="man")
    pipe.load_identity(ada, mask=masks["[I]"])
    with pytest.raises(ValueError, match=r"'\[I\]' is loaded already.*token='\[I2\]'"):
        pipe.load_identity(bob, mask=masks["[J]"])
    assert pipe.load_identity(bob, token="[J]", mask=Image.fromarray(masks["[J]"])) == "[J]"
    seen.clear()
    pipe(BOTH, picture, SOURCE, num_inference_steps=2)
    assert_each_looks_at_its_own(pipe, seen, masks, {"inversion": 1, "edit": 2})
    assert bool((ada.mask == 1).all())  # the identity itself is as it was
    with pytest.raises(ValueError, match="mask has nothing inside"):
        pipe.load_identity(ada, token="[K]", mask=np.zeros((8, 8), bool))
    assert pipe.identities == ("[I]", "[J]")


def test_each_has_its_own_strength(pipe: S2EditPipeline, people: list[IdentityAdapter], picture: Image.Image) -> None:
    bare = effective_weights(pipe.unet)
    scales = (0.75, -0.5)
    for identity, scale in zip(people, scales, strict=True):
        pipe.load_identity(identity, scale=scale)
    differences = [identity.weight_differences("unet") for identity in people]
    for name, weight in effective_weights(pipe.unet).items():
        wanted = bare[name].double()
        for difference, scale in zip(differences, scales, strict=True):
            wanted = wanted + scale * difference.get(name, torch.zeros(())).double()
        torch.testing.assert_close(weight.double(), wanted, rtol=1e-5, atol=1e-6)
    pipe.unload_identity()
    plain = pipe(SOURCE, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
    for identity in people:
        pipe.load_identity(identity, scale=0.0)
    assert all(torch.equal(weight, bare[name]) for name, weight in effective_weights(pipe.unet).items())
    drawn = pipe(SOURCE, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert np.array_equal(drawn, plain)


def test_an_inversion_knows_both(
    pipe: S2EditPipeline, picture: Image.Image, people: list[IdentityAdapter], masks: Any
) -> None:
    for identity in people:
        pipe.load_identity(identity)
    inversion = pipe.invert(picture, SOURCE, num_inference_steps=2)
    pipe.unload_identity("[J]")
    with pytest.raises(ValueError, match=r"'\[J\]' in .* looks like a learned token, and none of that name is loaded"):
        pipe(BOTH, picture, inversion=inversion)
    with pytest.raises(ValueError, match=r"made under .*\[J\].* and the edit's source prompt is"):
        pipe(BOTH.replace("[J] ", ""), picture, inversion=inversion, source_prompt=inversion.prompt.replace("[J] ", ""))
    first = people[0]
    pipe.unload_identity()
    other = fit(pipe, picture.rotate(90), "[J]", masks["[J]"])
    pipe.load_identity(first)
    pipe.load_identity(other)
    with pytest.raises(
        ValueError, match=r"made with the identity '\[J\]', and another identity, scale or mask is loaded"
    ):
        pipe(BOTH, picture, inversion=inversion)
