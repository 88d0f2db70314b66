import colorsys
import dataclasses
import itertools
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2edit_pipeline.avatars import drawing, people
from s2edit_pipeline.avatars.world import (
    IMAGE_SIZE,
    PARTS,
    PERSON_ATTRIBUTES,
    changed_pixels,
    part_masks,
    render,
    render_array,
    sample_person,
    shade,
)

NEVER_NAMED = ("noun", "skin", "natural_brows", "mark")


def _difference(before, after):
    """(H, W) largest change of a channel."""
    return np.abs(render_array(before).astype(int) - render_array(after)).max(-1)


def _hex(color):
    return tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))


# ---------------------------------------------------------------------------- people


@pytest.mark.parametrize("split", ["train", "varied", "held_out"])
def test_a_seed_is_one_person_in_every_process(split):
    code = (
        f"from s2edit_pipeline.avatars.world import sample_person; print([sample_person(i, {split!r}) for i in (0, 7)])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == repr([sample_person(i, split) for i in (0, 7)])


def test_another_seed_is_another_person():
    people = [sample_person(i) for i in range(300)]
    assert len({repr(p) for p in people}) > 295


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'train', 'varied', 'held_out', not 'test'"):
        sample_person(0, "test")


def test_held_out_people_have_what_no_training_person_has():
    train = [sample_person(i) for i in range(3000)]
    held_out = [sample_person(i, "held_out") for i in range(300)]
    assert {p.print for p in train} == {"none"}
    assert {p.mark for p in train} == {"none"}
    assert not {p.skin for p in train} & {p.skin for p in held_out}
    bases = {
        "hair": people.HAIR_BASE,
        "headwear": drawing.COLOR_BASE,
        "clothes": drawing.COLOR_BASE,
        "background": drawing.BACKGROUND_BASE,
    }
    for thing, base in bases.items():
        word = "background" if thing == "background" else f"{thing}_color"
        seen = {shade(base[getattr(p, word)], getattr(p, f"{thing}_shade")) for p in train}
        new = {shade(base[getattr(p, word)], getattr(p, f"{thing}_shade")) for p in held_out}
        assert not seen & new, thing
    plain = [p for p in held_out if p.print == "none" and p.mark == "none"]
    shirts = [p for p in held_out if p.clothes == "shirt"]
    assert 0.1 < len(plain) / len(held_out) < 0.3
    assert 0.5 < sum(p.print != "none" for p in shirts) / len(shirts) < 0.9
    assert all(p.clothes == "shirt" for p in held_out if p.print != "none")


@pytest.mark.parametrize("split", ["train", "varied", "held_out"])
def test_every_sampled_value_can_be_said(split):
    for person in (sample_person(i, split) for i in range(500)):
        for name, values in PERSON_ATTRIBUTES.items():
            assert getattr(person, name) in values
        assert person.noun == "man" or person.facial_hair == "none"
        assert person.hair != "bald" or person.headwear == "none"


def test_varied_people_have_held_out_colours_but_not_their_prints_and_marks():
    varied = [sample_person(i, "varied") for i in range(3000)]
    held_out = [sample_person(i, "held_out") for i in range(300)]
    assert {p.print for p in varied} == {"none"} and {p.mark for p in varied} == {"none"}
    assert not {p.skin for p in varied} & {p.skin for p in held_out}
    skins = np.array([_hex(p.skin) for p in varied])
    for color in {p.skin for p in held_out}:  # among thousands, one that the eye can't tell from it
        assert np.abs(skins - _hex(color)).max(1).min() < 12
    # of all hues, and four in five as people's
    hues = np.array([colorsys.rgb_to_hsv(*_hex(p.skin))[0] for p in varied])
    assert ((hues > 0.02) & (hues < 0.15)).mean() == pytest.approx(0.8 + 0.2 * 0.12, abs=0.03)
    assert (np.histogram(hues, 10, (0, 1))[0] > 20).all()
    for thing in ("hair", "headwear", "clothes", "background"):
        shades = np.array([getattr(p, f"{thing}_shade") for p in varied])
        assert len({tuple(row) for row in shades}) == len(varied)
        for row in drawing.SHADES:
            assert (shades.min(0) < row).all() and (row < shades.max(0)).all()


# ---------------------------------------------------------------------------- edits

# what a new value resets beside the attribute itself, since a word can't say it
RESET = {
    "hair": {"cut": 0},
    "clothes": {"garment": 0, "print": "none"},
    "background": {"background_shade": 0},
    "hair_color": {"hair_shade": 0},
    "headwear_color": {"headwear_shade": 0},
    "clothes_color": {"clothes_shade": 0},
}


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 10**6), split=st.sampled_from(["train", "held_out"]), data=st.data())
def test_an_edit_changes_what_it_names_and_nothing_else(seed, split, data):
    person = sample_person(seed, split)
    name = data.draw(st.sampled_from(sorted(PERSON_ATTRIBUTES)))
    value = data.draw(st.sampled_from(PERSON_ATTRIBUTES[name]))
    wanted = dataclasses.asdict(person)
    if wanted[name] != value:
        wanted.update({name: value, **RESET.get(name, {})})
    edited = person.edited(**{name: value})
    assert dataclasses.asdict(edited) == wanted
    assert all(getattr(edited, kept) == getattr(person, kept) for kept in NEVER_NAMED)


def test_two_edits_at_once_are_both_made():
    person = sample_person(3, "held_out")
    both = person.edited(glasses="sunglasses", background="green")
    assert both == person.edited(glasses="sunglasses").edited(background="green")


@pytest.mark.parametrize("name", ["skin", "print", "hair_shade", "hat"])
def test_what_captions_do_not_name_cannot_be_edited(name):
    with pytest.raises(ValueError, match=f"'{name}' is not a named attribute; choose from hair, "):
        sample_person(0).edited(**{name: "red"})


def test_a_value_that_an_attribute_cannot_take_is_refused():
    with pytest.raises(ValueError, match="glasses can't be 'monocle'; choose from none, glasses, sunglasses"):
        sample_person(0).edited(glasses="monocle")


# ---------------------------------------------------------------------------- colours


@pytest.mark.parametrize("index", range(6))
def test_a_shade_turns_the_hue_and_scales_saturation_and_value(index):
    turn, saturation, value = drawing.SHADES[index]
    for base in ("#e0393e", "#3f7fd6", "#724133", "#a9d3f5", "#f4f4f4"):
        r, g, b = _hex(base)
        # hue, saturation and value from their definitions, not from colorsys
        top, low = max(r, g, b), min(r, g, b)
        new = _hex(shade(base, index))
        assert max(new) == pytest.approx(top * value, abs=0.51)
        if top == low:
            assert max(new) == min(new)
            continue
        assert 1 - min(new) / max(new) == pytest.approx((1 - low / top) * saturation, abs=0.01)
        turned = colorsys.rgb_to_hsv(*new)[0] - colorsys.rgb_to_hsv(r, g, b)[0]
        assert (turned - turn + 0.5) % 1 - 0.5 == pytest.approx(0, abs=0.006)


def test_shade_0_is_the_words_own_colour():
    for base in (*drawing.COLOR_BASE.values(), *people.HAIR_BASE.values(), *drawing.BACKGROUND_BASE.values()):
        assert shade(base, 0) == base


# ---------------------------------------------------------------------------- drawing


def test_the_same_person_is_drawn_the_same_twice():
    person = sample_person(5, "held_out")
    assert np.array_equal(render_array(person), render_array(person))
    assert np.array_equal(np.asarray(render(person)), render_array(person))
    assert render(person, 96).size == (96, 96)
    assert not changed_pixels(person, person).any()


def test_the_drawing_lies_over_the_ground_by_its_opacity():
    # a picture is c + (1 - alpha) * ground: two grounds give alpha, whatever drew it
    person = sample_person(11).edited(background="white")
    over_white, over_blue = (render_array(p).astype(float) for p in (person, person.edited(background="blue")))
    white, blue = (np.array(_hex(drawing.BACKGROUND_BASE[c]), float) for c in ("white", "blue"))
    # sRGB red differs most between these two grounds
    alpha = 1 - ((over_white - over_blue) / (white - blue))[..., 0]
    clear = np.abs(alpha - 0.5) > 0.03
    masks = part_masks(person)
    assert np.array_equal(masks["person"][clear], alpha[clear] > 0.5)
    assert np.array_equal(masks["background"], ~masks["person"])
    assert np.abs(over_white[alpha < 0.004] - white).max() <= 1
    assert np.array_equal(over_white[0, 0], white)


@pytest.mark.parametrize("seed", [0, 4, 9])
@pytest.mark.parametrize(
    ("attribute", "value", "part"),
    [
        ("glasses", "glasses", "glasses"),
        ("glasses", "sunglasses", "glasses"),
        ("facial_hair", "beard", "facial_hair"),
        ("facial_hair", "moustache", "facial_hair"),
    ],
)
def test_a_thing_put_on_changes_its_own_mask_alone(seed, attribute, value, part):
    bare = sample_person(seed, "held_out").edited(glasses="none", facial_hair="none", headwear="none")
    worn = bare.edited(**{attribute: value})
    mask, difference = part_masks(worn)[part], _difference(bare, worn)
    # 12 is the masks' own threshold, against the faint rim of an edge
    assert not (difference[~mask] > 12).any()
    assert (difference[mask] > 0).all() and (difference[mask] > 12).mean() > 0.97
    assert part not in part_masks(bare)
    assert np.array_equal(changed_pixels(bare, worn), difference > 0)
    assert mask.any()


@pytest.mark.parametrize("seed", [1, 6, 8])
def test_a_new_colour_changes_the_mask_of_what_has_it(seed):
    person = sample_person(seed, "held_out").edited(
        hair="long straight", headwear="none", facial_hair="none", clothes_color="blue", hair_color="black"
    )
    masks = part_masks(person)
    red_hair, red_clothes = person.edited(hair_color="red"), person.edited(clothes_color="red")
    for part, recoloured in (("hair", red_hair), ("clothes", red_clothes)):
        changed = _difference(person, recoloured) > 12
        # at a shared edge two colours may mix: one pixel of tolerance
        assert not (changed & ~_grown(masks[part])).any()
        assert changed[masks[part]].mean() > 0.97
    opaque = person.draw(IMAGE_SIZE)[..., 3] == 255
    ground = changed_pixels(person, person.edited(background="green" if person.background != "green" else "pink"))
    assert not (ground & opaque).any()
    assert ground[masks["background"]].all()


def _grown(mask):
    """``mask`` and the eight neighbours of its pixels."""
    padded = np.pad(mask, 1)
    size = len(mask)
    return np.any([padded[y : y + size, x : x + size] for y in range(3) for x in range(3)], axis=0)


def test_expressions_change_the_expression_region_alone():
    bald = sample_person(6).edited(glasses="none", facial_hair="none", headwear="none", hair="bald")
    person = dataclasses.replace(bald, natural_brows=False)
    region = part_masks(person)["expression"]
    changed = np.zeros_like(region)
    for one, other in itertools.combinations(PERSON_ATTRIBUTES["expression"], 2):
        changed |= _difference(person.edited(expression=one), person.edited(expression=other)) > 12
    assert not (changed & ~_grown(region)).any()
    assert (changed & region).sum() > 0.97 * region.sum()


def test_each_part_that_is_there_has_a_mask_and_no_other():
    for person in (sample_person(i) for i in range(20)):
        worn = {p for p in ("glasses", "facial_hair", "headwear") if getattr(person, p) != "none"}
        hair = {"hair"} if person.headwear == "none" and person.hair != "bald" else set()
        masks = part_masks(person, 64)
        assert set(masks) == {"person", "background", "clothes", "expression"} | worn | hair
        assert set(masks) <= set(PARTS)
        assert all(m.shape == (64, 64) and m.dtype == bool for m in masks.values())


def test_a_mark_is_drawn_on_the_face():
    person = dataclasses.replace(sample_person(2).edited(headwear="none", hair="bald"), mark="none")
    face = part_masks(person)["person"] & ~part_masks(person)["clothes"]
    for mark in ("freckles", "mole", "scar"):
        marked = changed_pixels(person, dataclasses.replace(person, mark=mark))
        assert marked.any() and not (marked & ~face).any()


def test_a_print_is_drawn_on_the_shirt():
    shirt = dataclasses.replace(sample_person(2).edited(clothes="shirt"), print="bat")
    base = part_masks(shirt)["person"]
    rng = random.Random(0)
    for other in rng.sample([p for p in people.PRINTS if p != "bat"], 3):
        changed = changed_pixels(shirt, dataclasses.replace(shirt, print=other))
        assert changed.any() and not (changed & ~base).any() and not changed[:80].any()
