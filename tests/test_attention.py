"""The attention seam and its controllers, against diffusers' own attention and naive loops in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

from s2edit_pipeline.attention_controls import ControlledAttnProcessor, Controllers, LayerAttention, MapRecorder, PromptToPrompt, Reweighting, SpatialControl, layer_sizes, mask_at
from s2edit_pipeline.attention_seam import AttentionController, AttentionSite, attention_control
from s2edit_pipeline.inversion_record import INVERSIONS
from s2edit_pipeline.pipeline import S2EditPipeline
from s2edit_pipeline.prompt_alignment import PromptAlignment


class Everything(AttentionController):
    """Wants every layer, changes nothing, remembers what came."""

    def __init__(self, look: Look = Look.PROBABILITIES) -> None:
        self.look = look
        self.seen: list[tuple[AttentionSite, torch.Tensor]] = []

    def wants(self, site: AttentionSite) -> Look:
        return self.look

    def exchange(
        self, query: torch.Tensor, key: torch.Tensor, site: AttentionSite
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.look is Look.LAYER:
            scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
            self.seen.append((site, scores.softmax(-1).detach()))
        return query, key

    def __call__(self, probs: torch.Tensor, site: AttentionSite) -> torch.Tensor:
        self.seen.append((site, probs.detach()))
        return probs


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def probabilities(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64).softmax(-1)


# ------------------------------------------------------------------------------ the seam


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cross_attention_dim": 24},
        {"cross_attention_dim": 24, "qk_norm": "layer_norm"},
        {"norm_num_groups": 4, "residual_connection": True, "rescale_output_factor": 2.0},
        {"cross_attention_dim": 24, "cross_attention_norm": "layer_norm"},
    ],
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("look", [Look.LAYER, Look.PROBABILITIES])
def test_an_unchanged_layer_is_diffusers_own(settings: dict[str, Any], masked: bool, look: Look) -> None:
    torch.manual_seed(0)
    attn = Attention(query_dim=16, heads=2, dim_head=8, **settings).double()
    attn.set_processor(AttnProcessor2_0())
    hidden = torch.randn(3, 12, 16, dtype=torch.float64)
    context = torch.randn(3, 5, 24, dtype=torch.float64) if "cross_attention_dim" in settings else None
    mask = None
    if masked:
        mask = torch.zeros(3, 1, 5 if context is not None else 12, dtype=torch.float64)
        mask[1, :, 2:] = -1e4
    wanted = attn(hidden, encoder_hidden_states=context, attention_mask=mask)
    held, everything = attn.processor, Everything(look)
    attn.set_processor(ControlledAttnProcessor("layer", held, everything, {12: (3, 4)}))
    found = attn(hidden, encoder_hidden_states=context, attention_mask=mask)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    ((site, probs),) = everything.seen
    assert (site.is_cross, site.height, site.width) == (context is not None, 3, 4)
    torch.testing.assert_close(probs.sum(-1), torch.ones_like(probs[..., 0]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("look", [Look.LAYER, Look.PROBABILITIES])
def test_a_picture_shaped_layer_is_diffusers_own(look: Look) -> None:
    torch.manual_seed(0)
    attn = Attention(query_dim=16, heads=2, dim_head=8, norm_num_groups=4, residual_connection=True).double()
    attn.set_processor(AttnProcessor2_0())
    hidden = torch.randn(2, 16, 3, 4, dtype=torch.float64)
    wanted = attn(hidden)
    attn.set_processor(ControlledAttnProcessor("layer", attn.processor, Everything(look), {12: (3, 4)}))
    torch.testing.assert_close(attn(hidden), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
@pytest.mark.parametrize("look", [Look.LAYER, Look.PROBABILITIES])
def test_a_whole_unet_under_control_is_the_unet(pipe: S2EditPipeline, size: tuple[int, int], look: Look) -> None:
    x, context = torch.randn(2, 4, *size), torch.randn(2, 9, 32)
    with torch.no_grad():
        wanted = pipe.unet(x, 500, context).sample
        everything = Everything(look)
        with attention_control(pipe.unet, everything, *size):
            found = pipe.unet(x, 500, context).sample
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert len(everything.seen) == len(pipe.unet.attn_processors)
    for site, probs in everything.seen:
        assert probs.shape[-2] == site.height * site.width
        assert (site.height, site.width) in (size, (size[0] // 2, size[1] // 2))  # true heights, none transposed


def test_sizes_are_the_units_own_also_for_odd_latents() -> None:
    class Config:
        block_out_channels = (1, 2, 3)

    class Unet:
        config = Config()

    assert layer_sizes(Unet(), 13, 21) == {13 * 21: (13, 21), 7 * 11: (7, 11), 4 * 6: (4, 6)}


def test_processors_are_put_back_also_after_an_error(pipe: S2EditPipeline) -> None:
    before = dict(pipe.unet.attn_processors)
    with pytest.raises(RuntimeError), attention_control(pipe.unet, Everything(), 16, 16):
        assert all(isinstance(p, ControlledAttnProcessor) for p in pipe.unet.attn_processors.values())
        raise RuntimeError
    after = pipe.unet.attn_processors
    assert before.keys() == after.keys() and all(before[name] is after[name] for name in before)


def test_attention_that_cannot_be_taken_over_is_refused(pipe: S2EditPipeline) -> None:
    class IPAdapterAttnProcessor(AttnProcessor):
        pass

    processors = {name: IPAdapterAttnProcessor() for name in pipe.unet.attn_processors}
    pipe.unet.set_attn_processor(dict(processors))
    with (
        pytest.raises(ValueError, match=r"holds IPAdapterAttnProcessor.*unload_ip_adapter"),
        attention_control(pipe.unet, Everything(), 16, 16),
    ):
        pass
    assert all(p is processors[name] for name, p in pipe.unet.attn_processors.items())


def test_layers_nobody_wants_run_as_installed(pipe: S2EditPipeline) -> None:
    x, context = torch.randn(1, 4, 16, 16), torch.randn(1, 9, 32)
    with torch.no_grad():
        wanted = pipe.unet(x, 500, context).sample
        with attention_control(pipe.unet, Everything(Look.AWAY), 16, 16):
            found = pipe.unet(x, 500, context).sample
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


# ------------------------------------------------------------------------------ spatial control

MASK = torch.tensor([[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("mask_after", [False, True])
def test_spatial_control_is_the_formula(renormalize: bool, mask_after: bool) -> None:
    """``A*_[I] = A_[I] ⊙ M_obj``, cell by cell, with both of our switches."""
    probs, site = probabilities(2, 3, 16, 6), AttentionSite("x", True, 4, 4)
    control = SpatialControl({"[I]": MASK}, [{"[I]": (2,)}, {}], renormalize=renormalize, mask_after=mask_after)
    assert control.wants(site) and not control.wants(AttentionSite("x", False, 4, 4))
    found = control(probs, site)
    for head in range(3):
        for query in range(16):
            row = probs[0, head, query].tolist()
            for key in range(6):
                if key == 2 or (mask_after and key > 2):
                    row[key] *= MASK.flatten()[query].item()
            if renormalize:
                total = sum(row)
                row = [value / total for value in row]
            torch.testing.assert_close(found[0, head, query], torch.tensor(row, dtype=torch.float64))
    torch.testing.assert_close(found[1], probs[1], rtol=1e-12, atol=0)  # a row without the token is left alone


def test_two_tokens_have_two_masks() -> None:
    probs, site = probabilities(1, 1, 16, 6), AttentionSite("x", True, 4, 4)
    found = SpatialControl({"[I]": MASK, "[A]": 1 - MASK}, [{"[I]": (1, 3), "[A]": (4,)}])(probs, site)
    gate = torch.ones(16, 6, dtype=torch.float64)
    for key, mask in ((1, MASK), (3, MASK), (4, 1 - MASK)):
        gate[:, key] = mask.flatten().double()
    torch.testing.assert_close(found[0, 0], probs[0, 0] * gate)


class Explicitly(AttentionController):
    """Wants every cross-attention layer's probabilities, and changes none."""

    def wants(self, site: AttentionSite) -> Look:
        return Look.PROBABILITIES if site.is_cross else Look.AWAY


@pytest.mark.parametrize("mask_after", [False, True])
def test_without_probabilities_the_token_is_masked_all_the_same(pipe: S2EditPipeline, mask_after: bool) -> None:
    """The fused kernel on values from which the token is missing, against ``A * M_obj`` made explicitly; with the
    gradients, in rows that hold the token elsewhere, or not at all, and for masks that overlap."""
    unet = copy.deepcopy(pipe.unet).double()
    other = torch.zeros(4, 4)
    other[1:3, 1:3] = 1
    columns = [{"[I]": (2,)}, {}, {"[I]": (4,), "[A]": (1, 2)}]
    context = torch.randn(3, 9, 32, dtype=torch.float64, generator=seeded(1)).requires_grad_()
    x = torch.randn(3, 4, 16, 16, dtype=torch.float64, generator=seeded(2))
    found = []
    for others in ([], [Explicitly()]):
        masks = SpatialControl({"[I]": MASK, "[A]": other}, columns, mask_after=mask_after)
        assert masks.wants(AttentionSite("x", True, 4, 4)) is Look.LAYER
        with attention_control(unet, Controllers([masks, *others]), 16, 16):
            output = unet(x, 500, context).sample
        (gradient,) = torch.autograd.grad(output.square().sum(), [context])
        found.append((output, gradient))
    plain = unet(x, 500, context.detach()).sample.detach()
    for fused, explicit in zip(*found, strict=True):
        torch.testing.assert_close(fused, explicit, rtol=1e-9, atol=1e-11)
    changed = (found[0][0].detach() - plain).abs().amax((1, 2, 3))
    assert float(changed[0]) > 1e-4 and float(changed[2]) > 1e-4 and float(changed[1]) < 1e-11


def test_renormalised_masks_need_the_probabilities() -> None:
    site = AttentionSite("x", True, 4, 4)
    assert SpatialControl({"[I]": MASK}, [{"[I]": (2,)}], renormalize=True).wants(site) is Look.PROBABILITIES


@pytest.mark.parametrize("size", [(8, 8), (3, 5), (16, 24), (1, 1)])
def test_a_mask_at_a_layers_size_is_the_area_it_covers(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    mask = (torch.rand(16, 24, generator=generator) > 0.6).float()
    found = mask_at(mask, *size)
    shares = torch.zeros(size)
    for i in range(size[0]):
        for j in range(size[1]):
            top, bottom = i * 16 // size[0], -(-(i + 1) * 16 // size[0])
            left, right = j * 24 // size[1], -(-(j + 1) * 24 // size[1])
            shares[i, j] = mask[top:bottom, left:right].mean()
    wanted = shares >= min(0.5, shares.max().item())
    assert torch.equal(found.bool(), wanted)
    assert found.sum() > 0


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
    probs, site, tied = probabilities(4, 2, 6, 5), AttentionSite("x", True, 2, 3), alignment()
    until = torch.tensor([6.0, 3, 6, 6, 2])
    weights = torch.tensor([1.0, 1, 2.5, 1, -1])
    controller = PromptToPrompt([tied, tied], [until, until], 4, 99)
    controller.begin(step, LayerAttention({"x": probs[1]}), [2, 3])
    reweighting = Reweighting([weights, None], [2, 3])
    assert reweighting.wants(site) and not reweighting.wants(AttentionSite("x", False, 2, 3))
    assert not Reweighting([None], [2]).wants(site)
    before = probs.clone()
    taken = controller(probs, site)
    found = reweighting(taken, site)
    assert torch.equal(probs, before) and torch.equal(found[3], taken[3])  # arguments are left alone
    for row, factors in ((2, weights), (3, torch.ones(5))):
        for head in range(2):
            for query in range(6):
                for key in range(5):
                    value = probs[row, head, query, key].item()
                    if tied.share[key] == 1 and step < until[key]:
                        value = sum(probs[1, head, query, s].item() * tied.mapping[s, key].item() for s in range(5))
                    assert found[row, head, query, key].item() == pytest.approx(value * factors[key].item())
    torch.testing.assert_close(found[:2], probs[:2], rtol=0, atol=0)  # source and unconditional rows


@pytest.mark.parametrize("step", [3, 4])
def test_self_attention_is_the_sources_in_small_layers_at_first(step: int) -> None:
    """``A_target <- A_source``, row by row: what is exchanged are the queries and keys that it is made of."""
    query, key = (torch.randn(3, 2, 6, 4, dtype=torch.float64, generator=seeded(seed)) for seed in (1, 2))
    controller = PromptToPrompt([alignment()], [torch.zeros(5)], 4, max_self_queries=6)
    controller.begin(step, LayerAttention({}, {"x": (query[0], key[0])}), [2])
    site = AttentionSite("x", False, 2, 3)
    assert controller.wants(site) is (Look.LAYER if step < 4 else Look.AWAY)
    assert controller.wants(AttentionSite("x", False, 4, 6)) is Look.AWAY
    assert controller.wants(AttentionSite("x", True, 2, 3)) is Look.AWAY  # nothing crosses over at all
    if step < 4:
        before = query.clone(), key.clone()
        found = controller.exchange(query, key, site)
        assert torch.equal(query, before[0]) and torch.equal(key, before[1])  # arguments are left alone
        attention = [(q @ k.transpose(-1, -2) / 2).softmax(-1) for q, k in ((query, key), found)]
        torch.testing.assert_close(attention[1], attention[0][[0, 1, 0]], rtol=0, atol=0)


def test_a_source_is_its_own_target() -> None:
    """Editing nothing changes nothing: the identity mapping leaves what the source has."""
    probs = probabilities(2, 2, 6, 5)
    plain = PromptAlignment(torch.eye(5), torch.ones(5), (), ())
    controller = PromptToPrompt([plain], [torch.full((5,), 9.0)], 9, 99)
    controller.begin(0, LayerAttention({"x": probs[0]}), [1])
    found = controller(probs, AttentionSite("x", True, 2, 3))
    torch.testing.assert_close(found[1], probs[0])


def test_attention_is_taken_over_until_the_last_word_lets_go() -> None:
    until = [torch.tensor([1.0, 3]), torch.tensor([2.0, 2])]
    assert PromptToPrompt([alignment()] * 2, until, 2, 99).active_until == 3
    assert PromptToPrompt([alignment()] * 2, until, 7, 99).active_until == 7
    assert PromptToPrompt([], [], 7, 99).active_until == 0


# ------------------------------------------------------------------------------ recording


def test_recorded_maps_are_the_mean_over_heads_layers_and_calls() -> None:
    recorder = MapRecorder(max_queries=8)
    small, large = AttentionSite("a", True, 2, 4), AttentionSite("b", True, 4, 4)
    assert recorder.wants(small) and not recorder.wants(large)
    assert not recorder.wants(AttentionSite("c", False, 2, 4))
    seen = [probabilities(2, 3, 8, 5, seed=i) for i in range(4)]
    for probs in seen:
        assert recorder(probs, small) is probs
    wanted = torch.stack(seen).mean(0).mean(1).float()
    torch.testing.assert_close(recorder.maps[(2, 4)], wanted)
    word = recorder.word_map(1, (2, 3), 2, 4)
    torch.testing.assert_close(word, wanted[1][:, 2:4].mean(-1).view(2, 4))


def test_some_rows_are_recorded_and_what_another_saw_is_added() -> None:
    site, seen = AttentionSite("a", True, 2, 4), [probabilities(3, 2, 8, 5, seed=i) for i in range(3)]
    recorder, other = MapRecorder(8, rows=[2, 0]), MapRecorder(8)
    recorder(seen[0], site)
    other(seen[1][[2, 0]], site)
    other(seen[2][[2, 0]], site)
    recorder.add(other)
    wanted = torch.stack([probs[[2, 0]] for probs in seen]).mean(0).mean(1).float()
    torch.testing.assert_close(recorder.maps[(2, 4)], wanted)
    recorder.rows = []
    assert recorder.wants(site) is Look.AWAY


def test_layers_that_are_too_small_are_left_out() -> None:
    """S2Edit's M_obj: the layers at 1/16 to 1/32 of the picture's side, not the one below them."""
    recorder = MapRecorder(32 * 32, 16 * 16)
    sizes = {side: bool(recorder.wants(AttentionSite("x", True, side, side))) for side in (64, 32, 16, 8)}
    assert sizes == {64: False, 32: True, 16: True, 8: False}


def test_the_pipeline_looks_at_those_layers(pipe: S2EditPipeline) -> None:
    assert pipe._map_queries(64, 64) == (32 * 32, 16 * 16)  # Stable Diffusion at 512 x 512
    assert pipe._map_queries(64, 96) == (32 * 48, 16 * 24)
    assert pipe._map_queries(16, 16) == (16 * 16, 8 * 8)  # as small as a 1/16 layer themselves


def test_switches_hold_for_the_tokens_that_asked() -> None:
    probs, site = probabilities(2, 1, 16, 6), AttentionSite("x", True, 4, 4)
    columns = [{"[I]": (2,)}, {"[J]": (2,)}]
    masks = {"[I]": MASK, "[J]": MASK}
    found = SpatialControl(masks, columns, mask_after=["[I]"], renormalize=["[J]"])(probs, site)
    for row, switches in ((0, {"mask_after": True}), (1, {"renormalize": True})):
        alone = SpatialControl(masks, [columns[row]], **switches)(probs[row : row + 1], site)
        torch.testing.assert_close(found[row : row + 1], alone)


def test_sliced_attention_runs_where_nothing_is_controlled(pipe: S2EditPipeline) -> None:
    x, context = torch.randn(1, 4, 16, 16), torch.randn(1, 9, 32)
    with torch.no_grad():
        wanted = pipe.unet(x, 500, context).sample
        pipe.enable_attention_slicing()
        with attention_control(pipe.unet, MapRecorder(64), 16, 16):
            torch.testing.assert_close(pipe.unet(x, 500, context).sample, wanted, rtol=1e-4, atol=1e-5)


def test_maps_of_two_sizes_weigh_the_same() -> None:
    recorder = MapRecorder(max_queries=8)
    one = torch.zeros(1, 1, 8, 2)
    one[..., 0] = 0.2
    for _ in range(3):
        recorder(one, AttentionSite("a", True, 2, 4))
    half = torch.zeros(1, 1, 2, 2)
    half[..., 0] = 0.6
    recorder(half, AttentionSite("b", True, 1, 2))
    torch.testing.assert_close(recorder.word_map(0, (0,), 4, 8), torch.full((4, 8), 0.4))


def test_controllers_come_one_after_the_other() -> None:
    site, probs = AttentionSite("x", True, 4, 4), probabilities(1, 1, 16, 6)
    recorder = MapRecorder(99)
    chain = Controllers([SpatialControl({"[I]": MASK}, [{"[I]": (2,)}]), recorder])
    assert chain.wants(site) and not chain.wants(AttentionSite("x", False, 4, 4))
    chain(probs, site)
    seen = recorder.maps[(4, 4)][0, :, 2]
    assert bool((seen[MASK.flatten() == 0] == 0).all()) and bool((seen[MASK.flatten() == 1] > 0).all())


# ------------------------------------------------------------------------------ in the pipeline


class Watch(AttentionController):
    """Keeps, for each call, what a cross-attention layer makes of its probabilities in the end."""

    def __init__(self, seen: list[tuple[str, int, torch.Tensor]]) -> None:
        self.seen = seen

    def wants(self, site: AttentionSite) -> Look:
        return Look.PROBABILITIES if site.is_cross else Look.AWAY

    def __call__(self, probs: torch.Tensor, site: AttentionSite) -> torch.Tensor:
        self.seen.append((site.name, site.height, probs.detach().clone()))
        return probs


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, torch.Tensor]]:
    """What every cross-attention layer makes of its probabilities, wherever the package controls attention."""
    from s2edit_pipeline import attention_control as seam
    from s2edit_pipeline import identity_fitting, picture_editing, pipeline

    seen: list[tuple[str, int, torch.Tensor]] = []
    for module in (identity_fitting, picture_editing, pipeline):
        monkeypatch.setattr(
            module,
            "attention_control",
            lambda unet, controller, h, w: seam.attention_control(unet, Controllers([controller, Watch(seen)]), h, w),
        )
    return seen


def outside(probs: torch.Tensor, mask: torch.Tensor, height: int) -> torch.Tensor:
    """(rows, heads, cells outside, keys)."""
    cells = mask_at(mask, height, height).flatten() == 0
    assert bool(cells.any())
    return probs[:, :, cells]


@pytest.mark.parametrize("method", ["lora", "token", "full"])
def test_the_token_is_exactly_nothing_outside_its_mask_at_every_step_of_fit_and_edit(
    pipe: S2EditPipeline, picture: Any, half_mask: Any, watched: list[tuple[str, int, torch.Tensor]], method: str
) -> None:
    layers = [name for name in pipe.unet.attn_processors if "attn2" in name]
    source, target = "a photo of a sad lady with glasses", "a photo of a smiling [I] lady with glasses"
    column = 6  # start, a, photo, of, a, sad, [I]
    identity = pipe.fit_identity(picture, source, "lady", method=method, mask=half_mask, num_steps=2)
    assert identity.mask is not None
    evaluations = 2 + (method == "lora")  # whose adapters look at a gradient before the first step
    assert len(watched) == evaluations * len(layers) and {name for name, _, _ in watched} == set(layers)
    for _, height, probs in watched:
        assert float(outside(probs, identity.mask, height)[..., column].abs().max()) == 0
        assert float(outside(probs, identity.mask, height)[..., column + 1].min()) > 0  # the noun looks everywhere
    watched.clear()
    for inversion in INVERSIONS:
        pipe(target, picture, source, identity, inversion, num_inference_steps=4)
        assert len(watched) >= (4 + 4) * len(layers) and {name for name, _, _ in watched} == set(layers)
        for _, height, probs in watched:
            values = outside(probs, identity.mask, height)[..., column].abs().amax((1, 2))
            if inversion == "negative_prompt":
                assert float(values.max()) == 0  # the unconditional branches say the source's words
            elif inversion != "null_text" or len(probs) > 1:  # alone there, it may be one that holds no token
                assert float(values.min()) == 0
        watched.clear()


def test_without_spatial_control_it_looks_everywhere(
    pipe: S2EditPipeline, picture: Any, half_mask: Any, watched: list[tuple[str, int, torch.Tensor]]
) -> None:
    pipe.fit_identity(picture, "a photo of a sad lady", "lady", spatial_control=False, num_steps=1)
    mask = torch.from_numpy(half_mask).float()
    assert watched and all(float(outside(p, mask, h)[..., 6].min()) > 0 for _, h, p in watched)


def test_perturbed_controls_are_seen_by_these_tests(pipe: S2EditPipeline) -> None:
    """The U-Net's answer depends on the seam at all: zeroing the token's column changes it."""
    x, context = torch.randn(1, 4, 16, 16), torch.randn(1, 9, 32)
    unet = copy.deepcopy(pipe.unet)
    with torch.no_grad():
        wanted = unet(x, 500, context).sample
        with attention_control(unet, SpatialControl({"[I]": torch.zeros(4, 4)}, [{"[I]": (2,)}]), 16, 16):
            assert float((unet(x, 500, context).sample - wanted).abs().max()) > 1e-4
