import dataclasses
import itertools
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2edit_pipeline.avatars import creatures, drawing
from s2edit_pipeline.avatars.captions import describe
from s2edit_pipeline.avatars.creatures import HELD_OUT_EYES, UNSEEN_PAIRS, has_unseen_pair
from s2edit_pipeline.avatars.drawing import rgb
from s2edit_pipeline.avatars.world import (
    CREATURE_ATTRIBUTES,
    PARTS,
    Creature,
    changed_pixels,
    part_masks,
    render_array,
    sample,
    sample_creature,
    sample_person,
    shade,
)

CAT = Creature(
    species="cat",
    fur_color="orange",
    pattern="stripes",
    headwear="none",
    headwear_color="blue",
    glasses="glasses",
    expression="smiling",
    background="pink",
    eyes="#2f5d3a",
)
IDENTITY = ("eyes", "ears", "head", "layout", "mark")
seeds = st.integers(0, 10**6)
splits = st.sampled_from(["train", "held_out"])


def _difference(before, after):
    """(H, W) largest change of a channel."""
    return np.abs(render_array(before).astype(int) - render_array(after)).max(-1)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_a_seed_is_one_creature_in_every_process(split):
    code = (
        f"from s2edit_pipeline.avatars.world import sample; print([sample('creature', i, {split!r}) for i in (0, 7)])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == repr([sample_creature(i, split) for i in (0, 7)])


def test_kinds_and_splits_are_told_apart():
    assert sample("person", 3, "held_out") == sample_person(3, "held_out")
    with pytest.raises(ValueError, match="person, creature, not 'robot'"):
        sample("robot", 0)
    with pytest.raises(ValueError, match="'train', 'varied', 'held_out', not 'test'"):
        sample_creature(0, "test")


def test_held_out_creatures_have_what_no_training_creature_has():
    train = [sample_creature(i) for i in range(3000)]
    held_out = [sample_creature(i, "held_out") for i in range(400)]
    assert {c.mark for c in train} == {"none"} and len({c.mark for c in held_out}) > 1
    assert not {c.eyes for c in train} & {c.eyes for c in held_out}
    for word, base in (("fur", drawing.COLOR_BASE), ("background", drawing.BACKGROUND_BASE)):
        name = word if word == "background" else f"{word}_color"
        seen = {shade(base[getattr(c, name)], getattr(c, f"{word}_shade")) for c in train}
        assert not seen & {shade(base[getattr(c, name)], getattr(c, f"{word}_shade")) for c in held_out}
    # every single value is trained on, the listed pairs never
    for name, values in CREATURE_ATTRIBUTES.items():
        assert {getattr(c, name) for c in train} == set(values)
    for pair in UNSEEN_PAIRS:
        assert not any(all(getattr(c, n) == v for n, v in pair.items()) for c in train)
        assert any(all(getattr(c, n) == v for n, v in pair.items()) for c in held_out)
    assert sum(map(has_unseen_pair, held_out)) == sum(
        any(pair.items() <= dataclasses.asdict(c).items() for pair in UNSEEN_PAIRS) for c in held_out
    )


def test_varied_creatures_have_held_out_colours_but_not_their_pairs_and_marks():
    varied = [sample_creature(i, "varied") for i in range(2000)]
    assert {c.mark for c in varied} == {"none"} and not any(has_unseen_pair(c) for c in varied)
    eyes = np.array([rgb(c.eyes) for c in varied])
    for color in HELD_OUT_EYES:
        assert color not in {c.eyes for c in varied}
        assert np.abs(eyes - rgb(color)).max(1).min() < 16
    for thing in ("fur", "headwear", "background"):
        shades = np.array([getattr(c, f"{thing}_shade") for c in varied])
        for row in drawing.SHADES:
            assert (shades.min(0) < row).all() and (row < shades.max(0)).all()


@settings(max_examples=200, deadline=None)
@given(seed=seeds, split=splits, data=st.data())
def test_an_edit_changes_what_it_names_and_nothing_else(seed, split, data):
    creature = sample_creature(seed, split)
    name = data.draw(st.sampled_from(sorted(CREATURE_ATTRIBUTES)))
    value = data.draw(st.sampled_from(CREATURE_ATTRIBUTES[name]))
    wanted = dataclasses.asdict(creature)
    resets = {"fur_color": "fur_shade", "headwear_color": "headwear_shade", "background": "background_shade"}
    if wanted[name] != value:
        wanted |= {name: value} | ({resets[name]: 0} if name in resets else {})
    edited = creature.edited(**{name: value})
    assert dataclasses.asdict(edited) == wanted
    assert all(getattr(edited, kept) == getattr(creature, kept) for kept in IDENTITY)


def test_what_captions_do_not_name_cannot_be_edited():
    for name in IDENTITY:
        with pytest.raises(ValueError, match=f"'{name}' is not a named attribute; choose from species, "):
            CAT.edited(**{name: "red"})
    with pytest.raises(ValueError, match="headwear can't be 'turban'; choose from none, hat, beanie, crown"):
        CAT.edited(headwear="turban")


def test_every_attribute_shows_in_the_picture():
    for seed, (name, values) in itertools.product(range(4), CREATURE_ATTRIBUTES.items()):
        creature = sample_creature(seed)
        other = next(v for v in reversed(values) if v != getattr(creature, name))
        changed = changed_pixels(creature, dataclasses.replace(creature, **{name: other}))
        assert changed.any() == creature.shows(name), name
    assert not CAT.shows("headwear_color") and CAT.edited(headwear="crown").shows("headwear_color")
    assert not CAT.shows("hair") and not CAT.shows("eyes")


@pytest.mark.parametrize("name", IDENTITY)
def test_identity_shows_in_the_picture_and_is_never_said(name):
    other = {"eyes": "#6b4a1e", "ears": 1, "head": 1, "layout": 1, "mark": "patch"}[name]
    marked = dataclasses.replace(CAT, **{name: other})
    assert changed_pixels(CAT, marked).any()
    assert describe(CAT) == describe(marked)
    assert describe(CAT, random.Random(3)) == describe(marked, random.Random(3))


@pytest.mark.parametrize("seed", [0, 5, 9])
@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("glasses", "glasses"),
        ("glasses", "sunglasses"),
        ("headwear", "hat"),
        ("headwear", "crown"),
        ("pattern", "dots"),
    ],
)
def test_a_thing_put_on_changes_its_own_mask_alone(seed, part, value):
    bare = sample_creature(seed, "held_out").edited(glasses="none", headwear="none", pattern="none")
    worn = bare.edited(**{part: value})
    mask, difference = part_masks(worn)[part], _difference(bare, worn)
    inside = part_masks(bare)["creature"] | part_masks(worn)["creature"]
    assert not (difference[~mask & inside] > 12).any()
    assert mask.any() and (difference[mask] > 0).all()
    assert part not in part_masks(bare)


def test_each_part_that_is_there_has_a_mask_and_no_other():
    for creature in (sample_creature(i) for i in range(20)):
        worn = {p for p in ("glasses", "headwear", "pattern") if getattr(creature, p) != "none"}
        masks = part_masks(creature, 64)
        assert set(masks) == {"creature", "background", "expression"} | worn <= set(PARTS)
        assert all(m.shape == (64, 64) and m.dtype == bool for m in masks.values())
        assert np.array_equal(masks["background"], ~masks["creature"])
        assert {part for part in describe(creature).parts if part} <= set(masks)


@pytest.mark.parametrize("species", creatures.SPECIES)
def test_expressions_change_the_expression_region_alone(species):
    creature = CAT.edited(species=species, glasses="none", pattern="none", fur_color="green")
    region = part_masks(creature)["expression"]
    changed = np.zeros_like(region)
    for one, other in itertools.combinations(CREATURE_ATTRIBUTES["expression"], 2):
        changed |= _difference(creature.edited(expression=one), creature.edited(expression=other)) > 12
    # another fur blends otherwise at the rim of a brow
    assert (changed & region).sum() > 0.95 * changed.sum() and (changed & region).sum() > 0.95 * region.sum()


# ---------------------------------------------------------------------------- captions


@pytest.mark.parametrize(
    ("creature", "text"),
    [
        (CAT, "a photo of a smiling orange cat with stripes and glasses on a pink background"),
        (
            CAT.edited(species="monster", expression="angry", headwear="crown", pattern="none", background="orange"),
            "a photo of an angry orange monster with glasses and a blue crown on an orange background",
        ),
        (CAT.edited(pattern="none", glasses="none"), "a photo of a smiling orange cat on a pink background"),
    ],
)
def test_everything_is_said_in_order(creature, text):
    assert describe(creature).text == text


@settings(max_examples=200, deadline=None)
@given(seed=seeds, split=splits, order=st.none() | seeds)
def test_what_is_said_is_true_and_settled(seed, split, order):
    creature = sample_creature(seed, split)
    caption = describe(creature, None if order is None else random.Random(order))
    assert "species" in caption.said and set(caption.said) <= set(CREATURE_ATTRIBUTES)
    for name, value in caption.said.items():
        assert getattr(creature, name) == value
        assert value == "none" or value in caption.words
    said = {word for value in caption.said.values() for word in value.split()}
    assert {word for word, part in zip(caption.words, caption.parts, strict=True) if part} <= said | {"background"}
    for article, word in itertools.pairwise(caption.words):
        if article in ("a", "an"):
            assert (article == "an") == (word[0] in "aeiou")


def test_each_word_of_a_caption_is_one_token(tokenizer):
    words = {w for values in CREATURE_ATTRIBUTES.values() for w in values}
    assert {w: tokenizer.tokenize(w) for w in words if len(tokenizer.tokenize(w)) != 1} == {}
