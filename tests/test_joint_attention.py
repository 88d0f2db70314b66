"""What is done to joint attention, query by query, against naive loops in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from s2edit_pipeline.attention_chain import Controllers
from s2edit_pipeline.attention_maps import MapRecorder
from s2edit_pipeline.attention_prompt_to_prompt import LayerAttention, PromptToPrompt, Reweighting
from s2edit_pipeline.attention_seam import AttentionAccess, AttentionController, AttentionSite, attention_control
from s2edit_pipeline.attention_source import AttentionKeeper, KeepAttention
from s2edit_pipeline.attention_spatial import SpatialControl
from s2edit_pipeline.prompt_alignment import PromptAlignment

from .bare_attention import BareLayer

HEIGHT, WIDTH, WORDS, HEADS, CHANNELS = 2, 3, 5, 2, 4
CELLS = HEIGHT * WIDTH
MASK = torch.tensor([[1.0, 0, 0], [1, 1, 0]])
LAYOUTS = {
    "the picture first": (slice(0, 6), slice(6, 11), 11),  # SD3
    "the text first": (slice(5, 11), slice(0, 5), 11),  # FLUX
    "with padding": (slice(0, 6), slice(8, 13), 16),  # Z-Image
}


def site_of(layout: str, **facts: bool) -> AttentionSite:
    picture, text, _ = LAYOUTS[layout]
    return AttentionSite("layer", "joint", HEIGHT, WIDTH, text=text, picture=picture, **facts)


class Inputs:
    """Random queries, keys and values of ``rows`` prompts, in float64."""

    def __init__(self, layout: str, rows: int, key_heads: int = HEADS) -> None:
        generator = torch.Generator().manual_seed(0)
        length = LAYOUTS[layout][2]
        self.query, self.key, self.value = (
            torch.randn(rows, heads, length, CHANNELS, generator=generator, dtype=torch.float64)
            for heads in (HEADS, key_heads, key_heads)
        )
        self.grouped = key_heads != HEADS

    def attend(self, controller: AttentionController, site: AttentionSite, **arguments: Any) -> torch.Tensor:
        layer = BareLayer()
        with attention_control(layer, controller, lambda *_: site):
            return layer(self.query, key=self.key, value=self.value, enable_gqa=self.grouped, **arguments)


def naively(
    inputs: Inputs,
    factor: Callable[[int, int, int], float] = lambda row, i, j: 1.0,
    *,
    renormalized: bool = True,
    keys: Callable[[int, int, int, int], torch.Tensor] | None = None,
    queries: Callable[[int, int, int], torch.Tensor] | None = None,
    weight: Callable[[int, int, int], float] = lambda row, i, j: 1.0,
) -> torch.Tensor:
    """Attention written out: query i looks at key j with ``factor`` of what it would, ``renormalized`` or not, and sees
    its value ``weight`` times."""
    output = torch.zeros_like(inputs.query)
    rows, heads, length, _ = inputs.query.shape
    shared = heads // inputs.key.shape[1]
    for row in range(rows):
        for head in range(heads):
            for i in range(length):
                query = inputs.query[row, head, i] if queries is None else queries(row, head, i)
                exponents = []
                for j in range(length):
                    key = inputs.key[row, head // shared, j] if keys is None else keys(row, head, i, j)
                    exponents.append(math.exp(float(query @ key) / math.sqrt(CHANNELS)))
                gated = [e * factor(row, i, j) for j, e in enumerate(exponents)]
                total = sum(gated if renormalized else exponents)
                for j in range(length):
                    output[row, head, i] += gated[j] / total * weight(row, i, j) * inputs.value[row, head // shared, j]
    return output


class Explicitly(AttentionController):
    """Needs the probabilities, and changes none."""

    def access_needed(self, site: AttentionSite) -> AttentionAccess:
        return AttentionAccess.PROBABILITIES


# ------------------------------------------------------------------------------ spatial control


def gate_of(layout: str, columns: list[tuple[int, ...]], after: bool = False) -> Callable[[int, int, int], float]:
    """Nobody but the token itself and the object's cells looks at it."""
    picture, text, _ = LAYOUTS[layout]

    def gate(row: int, i: int, j: int) -> float:
        own = {text.start + column for column in columns[row]}
        is_cell = picture.start <= i < picture.stop
        if is_cell:
            behind = after and columns[row] and min(own) <= j < text.stop
            inside = MASK.flatten()[i - picture.start] == 1
            return 1.0 if inside or not (j in own or behind) else 0.0
        return 1.0 if j not in own or i in own else 0.0

    return gate


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("mask_after", [False, True])
def test_nobody_but_the_object_looks_at_the_token(layout: str, renormalize: bool, mask_after: bool) -> None:
    inputs, columns = Inputs(layout, 2), [(1, 3), ()]
    expected = naively(inputs, gate_of(layout, columns, mask_after), renormalized=renormalize)
    said = [{"[I]": one} if one else {} for one in columns]
    control = SpatialControl({"[I]": MASK}, said, renormalize=renormalize, mask_after=mask_after)
    fused = inputs.attend(control, site_of(layout))
    torch.testing.assert_close(fused, expected, rtol=1e-9, atol=1e-11)
    explicit = inputs.attend(Controllers([control, Explicitly()]), site_of(layout))
    torch.testing.assert_close(explicit, expected, rtol=1e-9, atol=1e-11)
    assert float((fused - naively(inputs))[0].abs().max()) > 1e-2
    torch.testing.assert_close(fused[1], naively(inputs)[1], rtol=1e-9, atol=1e-11)


def test_masks_and_fewer_heads_of_keys_are_heeded() -> None:
    """The kernel's own mask narrows with the token's; grouped heads stay grouped."""
    layout = "the text first"
    inputs = Inputs(layout, 2, key_heads=1)
    seen = torch.ones(2, 1, 1, 11, dtype=torch.bool)
    seen[1, ..., 3:5] = False  # padding
    gate = gate_of(layout, [(1,), (1,)])
    expected = naively(inputs, lambda row, i, j: gate(row, i, j) * float(seen[row, 0, 0, j]))
    control = SpatialControl({"[I]": MASK}, [{"[I]": (1,)}] * 2, renormalize=True)
    numbers = torch.zeros(2, 1, 1, 11, dtype=torch.float64).masked_fill(~seen, float("-inf"))
    for mask in (seen, seen.expand(2, 1, 11, 11), numbers):
        fused = inputs.attend(control, site_of(layout), attn_mask=mask)
        torch.testing.assert_close(fused, expected, rtol=1e-9, atol=1e-11)


def test_in_layers_of_the_text_alone_no_other_word_looks_at_the_token() -> None:
    inputs = Inputs("the text first", 1)
    text = AttentionSite("layer", "text", 0, 0, text=slice(0, 5))
    control = SpatialControl({"[I]": MASK}, [{"[I]": (1, 3)}], renormalize=True)
    expected = naively(inputs, lambda row, i, j: 1.0 if j not in (1, 3) or i in (1, 3) else 0.0)
    torch.testing.assert_close(inputs.attend(control, text), expected, rtol=1e-9, atol=1e-11)


def test_a_token_that_is_all_there_is_leaves_no_nan() -> None:
    """Whoever is cut off from everything sees nothing."""
    site, query = AttentionSite("layer", "cross", HEIGHT, WIDTH), torch.ones(1, 1, CELLS, 2)
    control = SpatialControl({"[I]": MASK}, [{"[I]": (0, 1)}], renormalize=True)
    layer = BareLayer()
    with attention_control(layer, control, lambda *_: site):
        output = layer(query, key=torch.ones(1, 1, 2, 2), value=torch.ones(1, 1, 2, 2))
    assert torch.equal(output[0, 0, :, 0], MASK.flatten())


# ------------------------------------------------------------------------------ prompt-to-prompt


def alignment() -> tuple[PromptAlignment, torch.Tensor]:
    """Target tokens 0, 1, 4 take source tokens 0, the mean of 1 and 2, and 4; 2 and 3 are new. And up to which step."""
    mapping = torch.zeros(WORDS, WORDS)
    mapping[0, 0] = mapping[4, 4] = 1
    mapping[1, 1] = mapping[2, 1] = 0.5
    return PromptAlignment(mapping, torch.tensor([1.0, 1, 0, 0, 1]), (), (2, 3)), torch.tensor([6.0, 3, 6, 6, 2])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("step", [0, 2, 4, 6])
def test_targets_take_the_sources_layout_and_words(layout: str, step: int) -> None:
    """Row 0 is the source, 2 the target. Its cells ask with the source's queries, everybody sees the source's cells'
    keys, and its cells see the source's words' keys."""
    inputs = Inputs(layout, 3)
    picture, text, _ = LAYOUTS[layout]
    tied, until = alignment()
    self_until = 2
    source = LayerAttention(
        {},
        {"layer": (inputs.query[0, :, picture], inputs.key[0, :, picture])},
        {"layer": inputs.key[0, :, text]},
    )
    controller = PromptToPrompt([tied], [until], self_until)
    controller.begin(step, source, [2])

    def is_cell(i: int) -> bool:
        return picture.start <= i < picture.stop

    def query_of(row: int, head: int, i: int) -> torch.Tensor:
        return inputs.query[0 if row == 2 and is_cell(i) and step < self_until else row, head, i]

    def key_of(row: int, head: int, i: int, j: int) -> torch.Tensor:
        if row == 2 and is_cell(j) and step < self_until:
            return inputs.key[0, head, j]
        column = j - text.start
        if row == 2 and is_cell(i) and text.start <= j < text.stop and tied.share[column] and step < until[column]:
            of_source = [s for s in range(WORDS) if tied.mapping[s, column] > 0]
            return sum(inputs.key[0, head, text.start + s] for s in of_source) / len(of_source)
        return inputs.key[row, head, j]

    before = inputs.key.clone()
    output = inputs.attend(controller, site_of(layout, holds_layout=True))
    torch.testing.assert_close(output, naively(inputs, queries=query_of, keys=key_of), rtol=1e-9, atol=1e-11)
    assert torch.equal(inputs.key, before)  # arguments are left alone
    changed = float((output - naively(inputs))[2].abs().max())
    assert (changed > 1e-3) == (step < 6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weighed_words_are_seen_by_the_pictures_cells_alone(layout: str) -> None:
    inputs, weights = Inputs(layout, 2), torch.tensor([1.0, 1, 2.5, 1, -1])
    picture, text, _ = LAYOUTS[layout]

    def weight(row: int, i: int, j: int) -> float:
        sees = row == 1 and picture.start <= i < picture.stop and text.start <= j < text.stop
        return float(weights[j - text.start]) if sees else 1.0

    output = inputs.attend(Reweighting([weights], [1]), site_of(layout))
    torch.testing.assert_close(output, naively(inputs, weight=weight), rtol=1e-9, atol=1e-11)


# ------------------------------------------------------------------------------ where words look


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("key_heads", [1, 2])
def test_a_words_map_is_its_share_among_the_words(layout: str, key_heads: int) -> None:
    inputs, words = Inputs(layout, 2, key_heads), [1, 2, 4]
    picture, text, _ = LAYOUTS[layout]
    recorder = MapRecorder([1], [words])
    output = inputs.attend(recorder, site_of(layout, tells_words=True))
    torch.testing.assert_close(output, naively(inputs), rtol=1e-9, atol=1e-11)  # it only looks
    (maps,) = recorder.maps.values()
    expected = torch.zeros(CELLS, WORDS, dtype=torch.float64)
    for cell in range(CELLS):
        for head in range(HEADS):
            query = inputs.query[1, head, picture.start + cell]
            keys = inputs.key[1, head * key_heads // HEADS, text]
            exponents = [math.exp(float(query @ keys[w]) / 2) for w in words]
            for w, exponent in zip(words, exponents, strict=True):
                expected[cell, w] += exponent / sum(exponents) / HEADS
    torch.testing.assert_close(maps[0].double(), expected, rtol=1e-5, atol=1e-6)
    silent = MapRecorder([1], [words])
    inputs.attend(silent, site_of(layout))
    assert silent.maps == {}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_kept_of_a_source_is_what_targets_take(layout: str) -> None:
    inputs, site = Inputs(layout, 2), site_of(layout, holds_layout=True, tells_words=True)
    picture, text, _ = LAYOUTS[layout]
    keeper = AttentionKeeper(KeepAttention(share=0.5), 4, words=[1, 2])
    for level in (2, 3):
        keeper.begin(level)
        inputs.attend(keeper, site)
    kept = keeper.kept()
    assert kept.layers.keys() == {3} and kept.maps.keys() == {2, 3}
    query, key = kept.layers[3].queries_keys["layer"]
    assert torch.equal(query, inputs.query[0, :, picture]) and torch.equal(key, inputs.key[0, :, picture])
    assert torch.equal(kept.layers[3].word_keys["layer"], inputs.key[0, :, text])
    assert kept.layers[3].num_bytes == 8 * HEADS * CHANNELS * (2 * CELLS + WORDS)
    alone = MapRecorder([0], [[1, 2]])
    inputs.attend(alone, site)
    for maps in kept.maps.values():
        assert torch.equal(maps.maps[HEIGHT, WIDTH], alone.maps[HEIGHT, WIDTH])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_controllers_that_need_nothing_leave_the_layer_alone(layout: str) -> None:
    inputs = Inputs(layout, 1)
    nothing = Controllers([SpatialControl({}, [{}]), PromptToPrompt([], [], 0), Reweighting([None])])
    layer = BareLayer()
    bare = layer(inputs.query, key=inputs.key, value=inputs.value)
    assert torch.equal(inputs.attend(nothing, site_of(layout, holds_layout=True, tells_words=True)), bare)
