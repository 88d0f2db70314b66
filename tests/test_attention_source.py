"""The source's attention, kept while inverting: an edit that takes it from there is the edit that asks for it again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from s2edit_pipeline import KeepAttention
from s2edit_pipeline.attention_seam import AttentionAccess, AttentionSite
from s2edit_pipeline.attention_source import AttentionKeeper
from s2edit_pipeline.evaluation.costs.counts import count_unet
from s2edit_pipeline.pipeline import S2EditPipeline

SOURCE = "a photo of a sad lady with glasses"
TARGETS = ["a photo of a smiling lady with glasses", "a photo of a sad lady with red hair and sunglasses"]
STEPS = 5


def edited(pipe: S2EditPipeline, inversion: Any, **arguments: Any) -> torch.Tensor:
    latents: torch.Tensor = pipe(
        TARGETS, source_prompt=SOURCE, inversion=inversion, output_type="latent", **arguments
    ).images
    return latents


@pytest.mark.parametrize("method", ["direct", "fixed_point", "edit_friendly"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"cross_replace_steps": 0.8, "self_replace_steps": 0.2, "guidance_stop": 1.0},
        {"cross_replace_steps": 1.0, "self_replace_steps": 1.0, "reweight": {"smiling": 2.0}},
        {"cross_replace_steps": 0.0, "self_replace_steps": 0.6, "blend_words": False},
        {"strength": 0.6, "keep_words": ["glasses"]},
    ],
)
def test_what_was_kept_is_what_the_source_branch_says(
    pipe: S2EditPipeline, picture: Any, method: str, arguments: dict[str, Any]
) -> None:
    """Kept whole, in part, or not at all: the same latents."""
    pipe.to(dtype=torch.float64)

    def invert(**keep: Any) -> Any:
        drawn = {"generator": torch.Generator().manual_seed(1)} if method == "edit_friendly" else {}
        return pipe.invert(picture, SOURCE, method, STEPS, keep_attention=KeepAttention(**keep), **drawn)

    whole = invert(share=1.0)
    assert len(whole.attention.layers) == len(whole.attention.maps) == STEPS
    reference = edited(pipe, replace(whole, attention=None), **arguments)
    torch.testing.assert_close(edited(pipe, whole, **arguments), reference, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(edited(pipe, invert(share=0.4), **arguments), reference, rtol=1e-9, atol=1e-10)
    assert invert(max_bytes=0).attention is None


def test_it_is_what_was_kept_that_is_looked_at(pipe: S2EditPipeline, picture: Any) -> None:
    inversion, other = (pipe.invert(picture, prompt, num_inference_steps=STEPS) for prompt in (SOURCE, "a red hat"))
    changed = edited(pipe, replace(inversion, attention=other.attention)) - edited(pipe, inversion)
    assert float(changed.abs().max()) > 1e-3


def test_no_evaluation_is_made_twice(pipe: S2EditPipeline, picture: Any) -> None:
    """One evaluation a step to invert, and one for the noise; two a target and step while guided, then one."""
    with count_unet(pipe.unet) as counts:
        inversion = pipe.invert(picture, SOURCE, num_inference_steps=10)
        assert counts.evaluations == 10 + 1
        edited(pipe, inversion, guidance_stop=1.0)
        assert counts.evaluations == 11 + 2 * 2 * 10
        edited(pipe, inversion, guidance_stop=0.5)
        assert counts.evaluations == 51 + 2 * (2 * 5 + 5)
        edited(pipe, replace(inversion, attention=None), guidance_stop=0.5)  # asked again, for where its words look
        assert counts.evaluations == 81 + 2 * (2 * 5 + 5) + 10
        edited(pipe, replace(inversion, attention=None), blend_words=False)  # only while it is taken over
        assert counts.evaluations == 121 + 2 * (2 * 5 + 5) + 4
        # for one call: kept as far as this edit needs it, or asked again, where the walk up begins to come down too
        pipe(TARGETS, picture, SOURCE, num_inference_steps=10, cross_replace_steps=0.8, keep_attention=KeepAttention())
        assert counts.evaluations == 155 + 11 + 2 * (2 * 5 + 5)
        pipe(TARGETS, picture, SOURCE, num_inference_steps=10)
        assert counts.evaluations == 196 + 10 + 4 + 2 * (2 * 5 + 5)
        pipe(TARGETS, picture, SOURCE, num_inference_steps=10, inversion="ddim")
        assert counts.evaluations == 240 + 10 + 2 * 10 + 2 * (2 * 5 + 5)
    assert counts.backward_evaluations == 0


def test_it_stays_within_the_limit_and_keeps_the_noise_longest(pipe: S2EditPipeline, picture: Any) -> None:
    whole = pipe.invert(picture, SOURCE, num_inference_steps=STEPS, keep_attention=KeepAttention(share=1.0))
    each = whole.attention.layers[STEPS].num_bytes
    layers = whole.attention.layers[STEPS]
    naive = sum(4 * x.numel() for x in layers.probabilities.values())
    assert each == naive + sum(4 * x.numel() for both in layers.queries_keys.values() for x in both) > 10_000
    limit = 2 * each + 7
    some = pipe.invert(
        picture, SOURCE, num_inference_steps=STEPS, keep_attention=KeepAttention(share=1.0, max_bytes=limit)
    )
    assert sorted(some.attention.layers) == [STEPS - 1, STEPS] and sorted(some.attention.maps) == [1, 2, 3, 4, 5]
    half = pipe.invert(
        picture, SOURCE, num_inference_steps=STEPS,
        keep_attention=KeepAttention(share=1.0, max_bytes=limit, dtype=torch.float16),
    )  # fmt: skip
    assert len(half.attention.layers) == 4 and 2 * half.attention.layers[STEPS].num_bytes == each
    exact = edited(pipe, whole)
    torch.testing.assert_close(edited(pipe, half), exact, rtol=0, atol=2e-2)
    none = pipe.invert(picture, SOURCE, num_inference_steps=STEPS, keep_attention=KeepAttention(max_bytes=1))
    assert not none.attention.layers
    torch.testing.assert_close(edited(pipe, none), exact, rtol=1e-3, atol=1e-4)


def test_a_level_asked_again_takes_the_place_of_the_first() -> None:
    keeper = AttentionKeeper(KeepAttention(share=1.0), 3)
    site = AttentionSite("x", "cross", 2, 2, tells_words=True)
    for value in (0.25, 0.75):
        keeper.begin(1)
        assert keeper.access_needed(site) is AttentionAccess.PROBABILITIES
        keeper(torch.full((1, 2, 4, 3), value), site)
    kept = keeper.kept()
    assert float(kept.layers[1].probabilities["x"].mean()) == 0.75
    assert float(kept.maps[1].maps[(2, 2)].mean()) == 0.75


def test_where_nobody_looks_only_what_is_kept_is_needed() -> None:
    """Below the kept share only where words look; self-attention only where it holds the layout."""
    keeper = AttentionKeeper(KeepAttention(share=0.5), 4)
    telling, cross = (AttentionSite("x", "cross", 2, 2, tells_words=tells) for tells in (True, False))
    layout, other = (AttentionSite("y", "self", 2, 2, holds_layout=holds) for holds in (True, False))
    access = {}
    for level in (2, 3):
        keeper.begin(level)
        access[level] = [keeper.access_needed(site) for site in (telling, cross, layout, other)]
    none, inputs, probabilities = AttentionAccess
    assert access == {2: [probabilities, none, none, none], 3: [probabilities, probabilities, inputs, none]}


@pytest.mark.parametrize("switch", [{}, {"mask_after": True}, {"renormalize": True}])
def test_a_masked_token_is_kept_masked(pipe: S2EditPipeline, picture: Any, half_mask: Any, switch: Any) -> None:
    pipe.to(dtype=torch.float64)
    identity = pipe.fit_identity(picture, SOURCE, "lady", method="token", mask=half_mask, num_steps=1, **switch)
    pipe.load_identity(identity)
    inversion = pipe.invert(picture, SOURCE, num_inference_steps=STEPS, keep_attention=KeepAttention(device="cpu"))
    assert "[I]" in inversion.prompt and inversion.attention is not None
    target, settings = "a photo of a smiling [I] lady with glasses", {"output_type": "latent"}
    from_inversion = pipe(target, inversion=inversion, **settings).images
    from_source = pipe(target, inversion=replace(inversion, attention=None), **settings).images
    torch.testing.assert_close(from_inversion, from_source, rtol=1e-9, atol=1e-10)


def test_what_is_no_limit_is_refused(pipe: S2EditPipeline, picture: Any) -> None:
    for call in (
        lambda: pipe.invert(picture, SOURCE, keep_attention=0),
        lambda: pipe(TARGETS, picture, SOURCE, keep_attention=0.4),
    ):
        with pytest.raises(
            TypeError, match=r"must be a KeepAttention, not .*KeepAttention\(max_bytes=0\) keeps nothing"
        ):
            call()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 1.5}, "share must be from 0 to 1"),
        ({"max_bytes": -1}, "max_bytes must be a whole number"),
        ({"max_bytes": 1e9}, "max_bytes"),
        ({"dtype": torch.int8}, "dtype must be a floating point type"),
        ({"device": "gpu"}, "device='gpu' is none"),
    ],
)
def test_limits_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KeepAttention(**settings)
