"""What is done to attention, cell by cell, against naive loops in float64; then at each step of fit, edit, drawing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from s2edit_pipeline import attention_seam, family_base
from s2edit_pipeline.attention_chain import Controllers
from s2edit_pipeline.attention_maps import MapRecorder
from s2edit_pipeline.attention_prompt_to_prompt import LayerAttention, PromptToPrompt, Reweighting
from s2edit_pipeline.attention_seam import AttentionAccess, AttentionController, AttentionSite
from s2edit_pipeline.attention_spatial import SpatialControl, mask_at
from s2edit_pipeline.inversion_record import INVERSIONS
from s2edit_pipeline.pipeline import S2EditPipeline
from s2edit_pipeline.prompt_alignment import PromptAlignment

NONE, INPUTS, PROBABILITIES = AttentionAccess


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def probabilities(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64).softmax(-1)


def cross(height: int, width: int, name: str = "x", **facts: bool) -> AttentionSite:
    return AttentionSite(name, "cross", height, width, **facts)


def alone(height: int, width: int, name: str = "x", **facts: bool) -> AttentionSite:
    return AttentionSite(name, "self", height, width, **facts)


# ------------------------------------------------------------------------------ spatial control

MASK = torch.tensor([[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("mask_after", [False, True])
def test_spatial_control_is_the_formula(renormalize: bool, mask_after: bool) -> None:
    """``A*_[I] = A_[I] ⊙ M_obj``, cell by cell, with both of our switches."""
    probs, site = probabilities(2, 3, 16, 6), cross(4, 4)
    control = SpatialControl({"[I]": MASK}, [{"[I]": (2,)}, {}], renormalize=renormalize, mask_after=mask_after)
    assert control.access_needed(site) is INPUTS
    assert control.access_needed(alone(4, 4)) is NONE
    gated = control(probs, site)
    for head in range(3):
        for query in range(16):
            row = probs[0, head, query].tolist()
            for key in range(6):
                if key == 2 or (mask_after and key > 2):
                    row[key] *= MASK.flatten()[query].item()
            if renormalize:
                total = sum(row)
                row = [value / total for value in row]
            torch.testing.assert_close(gated[0, head, query], torch.tensor(row, dtype=torch.float64))
    torch.testing.assert_close(gated[1], probs[1], rtol=1e-12, atol=0)  # a row without the token is left alone


def test_two_tokens_have_two_masks() -> None:
    probs, site = probabilities(1, 1, 16, 6), cross(4, 4)
    gated = SpatialControl({"[I]": MASK, "[A]": 1 - MASK}, [{"[I]": (1, 3), "[A]": (4,)}])(probs, site)
    gate = torch.ones(16, 6, dtype=torch.float64)
    for key, mask in ((1, MASK), (3, MASK), (4, 1 - MASK)):
        gate[:, key] = mask.flatten().double()
    torch.testing.assert_close(gated[0, 0], probs[0, 0] * gate)


class Explicitly(AttentionController):
    """Needs every cross-attention layer's probabilities, and changes none."""

    def access_needed(self, site: AttentionSite) -> AttentionAccess:
        return PROBABILITIES if site.kind == "cross" else NONE


@pytest.mark.parametrize("mask_after", [False, True])
@pytest.mark.parametrize("renormalize", [False, True, ["[A]"]])
def test_without_probabilities_the_token_is_masked_all_the_same(
    pipe: S2EditPipeline, mask_after: bool, renormalize: Any
) -> None:
    """The fused kernel on values from which the token is missing, against ``A * M_obj`` made explicitly; with the
    gradients, in rows that hold the token elsewhere, or not at all, and for masks that overlap."""
    pipe.unet.double()
    other = torch.zeros(4, 4)
    other[1:3, 1:3] = 1
    columns = [{"[I]": (2,)}, {}, {"[I]": (4,), "[A]": (1, 2)}]
    context = torch.randn(3, 9, 32, dtype=torch.float64, generator=seeded(1)).requires_grad_()
    x = torch.randn(3, 4, 16, 16, dtype=torch.float64, generator=seeded(2))
    results = []
    for others in ([], [Explicitly()]):
        masks = SpatialControl({"[I]": MASK, "[A]": other}, columns, mask_after=mask_after, renormalize=renormalize)
        assert masks.access_needed(cross(4, 4)) is INPUTS
        with pipe.family.control_attention(Controllers([masks, *others]), 16, 16):
            output = pipe.unet(x, 500, context).sample
        (gradient,) = torch.autograd.grad(output.square().sum(), [context])
        results.append((output, gradient))
    plain = pipe.unet(x, 500, context.detach()).sample.detach()
    for fused, explicit in zip(*results, strict=True):
        torch.testing.assert_close(fused, explicit, rtol=1e-9, atol=1e-11)
    changed = (results[0][0].detach() - plain).abs().amax((1, 2, 3))
    assert float(changed[0]) > 1e-4 and float(changed[2]) > 1e-4 and float(changed[1]) < 1e-11


def test_where_no_prompt_says_the_token_nothing_is_needed() -> None:
    assert SpatialControl({"[I]": MASK}, [{"[I]": (2,)}]).access_needed(cross(4, 4)) is INPUTS
    assert SpatialControl({"[I]": MASK}, [{}, {}]).access_needed(cross(4, 4)) is NONE


@pytest.mark.parametrize("size", [(8, 8), (3, 5), (16, 24), (1, 1)])
def test_a_mask_at_a_layers_size_is_the_area_it_covers(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    mask = (torch.rand(16, 24, generator=generator) > 0.6).float()
    cells = mask_at(mask, *size)
    shares = torch.zeros(size)
    for i in range(size[0]):
        for j in range(size[1]):
            top, bottom = i * 16 // size[0], -(-(i + 1) * 16 // size[0])
            left, right = j * 24 // size[1], -(-(j + 1) * 24 // size[1])
            shares[i, j] = mask[top:bottom, left:right].mean()
    assert torch.equal(cells.bool(), shares >= min(0.5, shares.max().item()))
    assert cells.sum() > 0


def test_masking_twice_is_masking_once_and_nothing_is_nothing() -> None:
    once = mask_at(MASK, 2, 2)
    assert torch.equal(mask_at(once, 2, 2), once)
    assert mask_at(torch.zeros(8, 8), 4, 4).sum() == 0
    speck = torch.zeros(16, 16)
    speck[5, 9] = 1
    assert mask_at(speck, 2, 2).tolist() == [[0, 1], [0, 0]]  # smaller than half a cell, and still somewhere


# ------------------------------------------------------------------------------ prompt-to-prompt


def alignment(keys: int = 5) -> PromptAlignment:
    """Target tokens 0, 1, 4 take source tokens 0, 2, 4 (half of 1 as well for 1); 2 and 3 are new."""
    mapping = torch.zeros(keys, keys)
    mapping[0, 0] = mapping[4, 4] = 1
    mapping[1, 1] = mapping[2, 1] = 0.5
    share = torch.tensor([1.0, 1, 0, 0, 1])
    return PromptAlignment(mapping, share, (), (2, 3))


@pytest.mark.parametrize("step", [0, 2, 3, 6])
def test_cross_attention_is_taken_over_word_by_word(step: int) -> None:
    """Section 3.2: replacement, refinement and re-weighting, element by element."""
    probs, site, tied = probabilities(4, 2, 6, 5), cross(2, 3), alignment()
    until = torch.tensor([6.0, 3, 6, 6, 2])
    weights = torch.tensor([1.0, 1, 2.5, 1, -1])
    controller = PromptToPrompt([tied, tied], [until, until], 4)
    controller.begin(step, LayerAttention({"x": probs[1]}), [2, 3])
    reweighting = Reweighting([weights, None], [2, 3])
    assert controller.access_needed(site) is (PROBABILITIES if step < 6 else NONE)
    assert reweighting.access_needed(site) is PROBABILITIES and reweighting.access_needed(alone(2, 3)) is NONE
    assert Reweighting([None], [2]).access_needed(site) is NONE
    before = probs.clone()
    edited = controller(probs, site)
    weighed = reweighting(edited, site)
    assert torch.equal(probs, before) and torch.equal(weighed[3], edited[3])  # arguments are left alone
    for row, factors in ((2, weights), (3, torch.ones(5))):
        for head in range(2):
            for query in range(6):
                for key in range(5):
                    value = probs[row, head, query, key].item()
                    if tied.share[key] == 1 and step < until[key]:
                        value = sum(probs[1, head, query, s].item() * tied.mapping[s, key].item() for s in range(5))
                    assert weighed[row, head, query, key].item() == pytest.approx(value * factors[key].item())
    torch.testing.assert_close(weighed[:2], probs[:2], rtol=0, atol=0)  # source and unconditional rows


@pytest.mark.parametrize("step", [3, 4])
def test_self_attention_is_the_sources_in_small_layers_at_first(step: int) -> None:
    """``A_target <- A_source``, row by row: what is exchanged are the queries and keys that it is made of."""
    query, key = (torch.randn(3, 2, 6, 4, dtype=torch.float64, generator=seeded(seed)) for seed in (1, 2))
    controller = PromptToPrompt([alignment()], [torch.zeros(5)], 4)
    controller.begin(step, LayerAttention({}, {"x": (query[0], key[0])}), [2])
    site = alone(2, 3, holds_layout=True)
    assert controller.access_needed(site) is (INPUTS if step < 4 else NONE)
    assert controller.access_needed(alone(4, 6)) is NONE
    assert controller.access_needed(cross(2, 3)) is NONE  # nothing crosses over at all
    if step < 4:
        before = query.clone(), key.clone()
        exchanged = controller.exchange(query, key, site)
        assert torch.equal(query, before[0]) and torch.equal(key, before[1])  # arguments are left alone
        attention = [(q @ k.transpose(-1, -2) / 2).softmax(-1) for q, k in ((query, key), exchanged)]
        torch.testing.assert_close(attention[1], attention[0][[0, 1, 0]], rtol=0, atol=0)


def test_a_source_is_its_own_target() -> None:
    """Editing nothing changes nothing: the identity mapping leaves what the source has."""
    probs = probabilities(2, 2, 6, 5)
    plain = PromptAlignment(torch.eye(5), torch.ones(5), (), ())
    controller = PromptToPrompt([plain], [torch.full((5,), 9.0)], 9)
    controller.begin(0, LayerAttention({"x": probs[0]}), [1])
    torch.testing.assert_close(controller(probs, cross(2, 3))[1], probs[0])


def test_attention_is_taken_over_until_the_last_word_lets_go() -> None:
    until = [torch.tensor([1.0, 3]), torch.tensor([2.0, 2])]
    assert PromptToPrompt([alignment()] * 2, until, 2).active_until == 3
    assert PromptToPrompt([alignment()] * 2, until, 7).active_until == 7
    assert PromptToPrompt([], [], 7).active_until == 0


# ------------------------------------------------------------------------------ recording


def test_recorded_maps_are_the_mean_over_heads_layers_and_calls() -> None:
    recorder = MapRecorder()
    site = cross(2, 4, "a", tells_words=True)
    assert recorder.access_needed(site) is PROBABILITIES and recorder.access_needed(cross(4, 4, "b")) is NONE
    assert recorder.access_needed(alone(2, 4, "c", tells_words=True)) is NONE
    each = [probabilities(2, 3, 8, 5, seed=i) for i in range(4)]
    for probs in each:
        assert recorder(probs, site) is probs
    mean = torch.stack(each).mean(0).mean(1).float()
    torch.testing.assert_close(recorder.maps[(2, 4)], mean)
    word = recorder.word_map(1, (2, 3), 2, 4)
    torch.testing.assert_close(word, mean[1][:, 2:4].mean(-1).view(2, 4))


def test_some_rows_are_recorded_and_what_another_saw_is_added() -> None:
    site, each = cross(2, 4, "a", tells_words=True), [probabilities(3, 2, 8, 5, seed=i) for i in range(3)]
    recorder, other = MapRecorder([2, 0]), MapRecorder()
    recorder(each[0], site)
    other(each[1][[2, 0]], site)
    other(each[2][[2, 0]], site)
    recorder.add(other)
    mean = torch.stack([probs[[2, 0]] for probs in each]).mean(0).mean(1).float()
    torch.testing.assert_close(recorder.maps[(2, 4)], mean)
    recorder.rows = []
    assert recorder.access_needed(site) is NONE


def test_switches_are_each_tokens_own() -> None:
    probs, site = probabilities(2, 1, 16, 6), cross(4, 4)
    columns = [{"[I]": (2,)}, {"[J]": (2,)}]
    masks = {"[I]": MASK, "[J]": MASK}
    gated = SpatialControl(masks, columns, mask_after=["[I]"], renormalize=["[J]"])(probs, site)
    for row, switches in ((0, {"mask_after": True}), (1, {"renormalize": True})):
        reference = SpatialControl(masks, [columns[row]], **switches)(probs[row : row + 1], site)
        torch.testing.assert_close(gated[row : row + 1], reference)


def test_maps_of_two_sizes_weigh_the_same() -> None:
    recorder = MapRecorder()
    one = torch.zeros(1, 1, 8, 2)
    one[..., 0] = 0.2
    for _ in range(3):
        recorder(one, cross(2, 4, "a"))
    half = torch.zeros(1, 1, 2, 2)
    half[..., 0] = 0.6
    recorder(half, cross(1, 2, "b"))
    torch.testing.assert_close(recorder.word_map(0, (0,), 4, 8), torch.full((4, 8), 0.4))


def test_controllers_come_one_after_the_other() -> None:
    site, probs = cross(4, 4, tells_words=True), probabilities(1, 1, 16, 6)
    recorder = MapRecorder()
    chain = Controllers([SpatialControl({"[I]": MASK}, [{"[I]": (2,)}]), recorder])
    assert chain.access_needed(site) is PROBABILITIES and chain.access_needed(alone(4, 4)) is NONE
    assert chain.access_needed(cross(4, 4)) is INPUTS  # where nobody records, the fused kernel runs on cut values
    chain(probs, site)
    looks = recorder.maps[(4, 4)][0, :, 2]
    assert bool((looks[MASK.flatten() == 0] == 0).all()) and bool((looks[MASK.flatten() == 1] > 0).all())


# ------------------------------------------------------------------------------ in the pipeline


class Watch(AttentionController):
    """Keeps, for each call, what a cross-attention layer makes of its probabilities in the end."""

    def __init__(self, notes: list[tuple[str, int, torch.Tensor]]) -> None:
        self.notes = notes

    def access_needed(self, site: AttentionSite) -> AttentionAccess:
        return PROBABILITIES if site.kind == "cross" else NONE

    def __call__(self, probs: torch.Tensor, site: AttentionSite) -> torch.Tensor:
        self.notes.append((site.name, site.height, probs.detach().clone()))
        return probs


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, torch.Tensor]]:
    """What every cross-attention layer makes of its probabilities, wherever the package controls attention."""
    notes: list[tuple[str, int, torch.Tensor]] = []
    control = attention_seam.attention_control
    monkeypatch.setattr(
        family_base,
        "attention_control",
        lambda denoiser, controller, site_of: control(denoiser, Controllers([controller, Watch(notes)]), site_of),
    )
    return notes


def outside(probs: torch.Tensor, mask: torch.Tensor, height: int) -> torch.Tensor:
    """(rows, heads, cells outside, keys)."""
    cells = mask_at(mask, height, height).flatten() == 0
    assert bool(cells.any())
    return probs[:, :, cells]


@pytest.mark.parametrize("method", ["lora", "token", "full"])
def test_the_token_is_exactly_nothing_outside_its_mask_at_every_step_of_fit_edit_and_drawing(
    pipe: S2EditPipeline, picture: Any, half_mask: Any, notes: list[tuple[str, int, torch.Tensor]], method: str
) -> None:
    layers = [name for name, _ in pipe.unet.named_modules() if name.endswith("attn2")]
    source, target = "a photo of a sad lady with glasses", "a photo of a smiling [I] lady with glasses"
    column = 6  # start, a, photo, of, a, sad, [I]
    identity = pipe.fit_identity(picture, source, "lady", method=method, mask=half_mask, num_steps=2)
    assert identity.mask is not None
    evaluations = 2 + (method == "lora")  # whose adapters look at a gradient before the first step
    assert len(notes) == evaluations * len(layers) and {name for name, _, _ in notes} == set(layers)
    for _, height, probs in notes:
        assert float(outside(probs, identity.mask, height)[..., column].abs().max()) == 0
        assert float(outside(probs, identity.mask, height)[..., column + 1].min()) > 0  # the noun looks everywhere
    notes.clear()
    for inversion in (name for name, method in INVERSIONS.items() if not method.flows_only):
        pipe(target, picture, source, identity, inversion, num_inference_steps=4)
        assert len(notes) >= (4 + 4) * len(layers) and {name for name, _, _ in notes} == set(layers)
        for _, height, probs in notes:
            values = outside(probs, identity.mask, height)[..., column].abs().amax((1, 2))
            if inversion == "negative_prompt":
                assert float(values.max()) == 0  # the unconditional branches say the source's words
            elif inversion != "null_text" or len(probs) > 1:  # alone there, it may be one that holds no token
                assert float(values.min()) == 0
        notes.clear()
    pipe(target, identity=identity, num_inference_steps=2, num_images_per_prompt=2)
    assert len(notes) == 2 * len(layers)
    for _, height, probs in notes:
        values = outside(probs, identity.mask, height)[..., column].abs().amax((1, 2))
        assert len(values) == 4 and float(values[2:].max()) == 0 < float(values[:2].min())  # the unconditional first


def test_without_spatial_control_it_looks_everywhere(
    pipe: S2EditPipeline, picture: Any, half_mask: Any, notes: list[tuple[str, int, torch.Tensor]]
) -> None:
    pipe.fit_identity(picture, "a photo of a sad lady", "lady", spatial_control=False, num_steps=1)
    mask = torch.from_numpy(half_mask).float()
    assert notes and all(float(outside(p, mask, h)[..., 6].min()) > 0 for _, h, p in notes)


def test_perturbed_controls_are_seen_by_these_tests(pipe: S2EditPipeline) -> None:
    """The U-Net's answer depends on the seam at all: zeroing the token's column changes it."""
    x, context = torch.randn(1, 4, 16, 16), torch.randn(1, 9, 32)
    control = SpatialControl({"[I]": torch.zeros(4, 4)}, [{"[I]": (2,)}])
    with torch.no_grad():
        bare = pipe.unet(x, 500, context).sample
        with pipe.family.control_attention(control, 16, 16):
            assert float((pipe.unet(x, 500, context).sample - bare).abs().max()) > 1e-4
