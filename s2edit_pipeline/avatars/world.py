"""The avatars world: people drawn from named options, where every edit has a true answer.

The drawings are the *avataaars* style by Pablo Stanley ("free for personal and commercial
use"), assembled by DiceBear and rasterised by resvg. A :class:`Person` is a frozen record;
:meth:`Person.edited` changes one thing and nothing else, so rendering it gives the pixel-true
counterfactual of an edit. What a caption may say (:data:`NAMED_ATTRIBUTES`) is kept apart from
what it never says (skin tone, cut, brows, print, marks): the latter is *identity*.
"""

from __future__ import annotations

import colorsys
import functools
import io
import json
import random
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

import numpy as np
from PIL import Image

IMAGE_SIZE = 128
"""Side of a rendered picture, in pixels."""

NOUNS = ("lady", "man")
HAIR_KINDS = ("short straight", "short curly", "long straight", "long curly", "bald")
HAIR_COLORS = ("black", "brown", "blond", "red", "grey", "pink")
HEADWEAR = ("none", "hat", "beanie", "hijab", "turban")
GLASSES = ("none", "glasses", "sunglasses")
FACIAL_HAIR = ("none", "beard", "moustache")
EXPRESSIONS = ("neutral", "smiling", "sad", "angry", "surprised", "winking")
CLOTHES = ("shirt", "hoodie", "blazer", "overalls", "sweater")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white", "grey", "black")
BACKGROUNDS = ("white", "grey", "blue", "green", "yellow", "pink", "purple", "orange")

NAMED_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "hair": HAIR_KINDS,
    "hair_color": HAIR_COLORS,
    "headwear": HEADWEAR,
    "headwear_color": COLORS,
    "glasses": GLASSES,
    "facial_hair": FACIAL_HAIR,
    "expression": EXPRESSIONS,
    "clothes": CLOTHES,
    "clothes_color": COLORS,
    "background": BACKGROUNDS,
}
"""What a caption can name, and the values it can take."""

PARTS = ("person", "hair", "headwear", "glasses", "facial_hair", "expression", "clothes", "background")
"""Regions of a picture that words refer to; see :func:`part_masks`."""

_CUTS = {
    "short straight": ("shortFlat", "shortRound", "theCaesar", "theCaesarAndSidePart", "shortWaved"),
    "short curly": ("shortCurly", "dreads01", "dreads02"),
    "long straight": ("straight02", "straight01", "straightAndStrand", "miaWallace", "bob", "longButNotTooLong"),
    "long curly": ("curly", "curvy", "dreads", "bigHair"),
    "bald": ("sides",),
}
_HEADWEAR_VARIANT = {"hat": "hat", "beanie": "winterHat03", "hijab": "hijab", "turban": "turban"}
_GLASSES_VARIANT = {"glasses": "prescription02", "sunglasses": "wayfarers"}
_FACIAL_HAIR_VARIANT = {"beard": "beardMedium", "moustache": "moustacheFancy"}
_CLOTHES_VARIANTS = {
    "shirt": ("shirtCrewNeck", "shirtScoopNeck", "shirtVNeck"),
    "hoodie": ("hoodie",),
    "blazer": ("blazerAndShirt", "blazerAndSweater"),
    "overalls": ("overall",),
    "sweater": ("collarAndSweater",),
}
_EXPRESSION = {  # eyes, brows, mouth
    "neutral": ("default", "default", "serious"),
    "smiling": ("default", "default", "smile"),
    "sad": ("default", "sadConcerned", "sad"),
    "angry": ("squint", "angry", "grimace"),
    "surprised": ("surprised", "raisedExcited", "disbelief"),
    "winking": ("wink", "default", "twinkle"),
}
PRINTS = ("bat", "bear", "cumbia", "deer", "diamond", "hola", "pizza", "resist", "skull", "skullOutline")
MARKS = ("none", "freckles", "mole", "scar")

_TRAIN_SKIN = ("#614335", "#d08b5b", "#ae5d29", "#edb98a", "#ffdbb4", "#fd9841", "#f8d25c")
_HELD_OUT_SKIN = ("#7a523c", "#c47a4a", "#8d4a26", "#e3a878", "#f7c9a9", "#f0b070", "#d9a066", "#f4d7c5")

_GARMENT_BASE = {
    "red": "#e0393e", "orange": "#f08a2c", "yellow": "#f6d44c", "green": "#3fa65a", "blue": "#3f7fd6",
    "purple": "#8a4fbf", "pink": "#f48fb8", "white": "#f4f4f4", "grey": "#929598", "black": "#2a2d33",
}  # fmt: skip
_BACKGROUND_BASE = {
    "white": "#fafafa", "grey": "#c4c8cc", "blue": "#a9d3f5", "green": "#b4e3b8", "yellow": "#fbeea2",
    "pink": "#fbcfdc", "purple": "#d5c4f0", "orange": "#fbcf9e",
}  # fmt: skip
_HAIR_BASE = {
    "black": "#2c1b18", "brown": "#724133", "blond": "#d6b370", "red": "#c9430f", "grey": "#a9a9ad",
    "pink": "#f08ba5",
}  # fmt: skip
TRAIN_SHADES = (0, 1, 2)
HELD_OUT_SHADES = (3, 4, 5)
# hue offset (turns), factor on saturation, factor on value: one row a shade
_SHADES = (
    (0.0, 1.0, 1.0), (0.014, 0.88, 0.93), (-0.014, 1.0, 0.86),
    (0.007, 0.94, 0.90), (-0.010, 0.86, 0.97), (0.020, 1.0, 0.90),
)  # fmt: skip

CAPTION_PREFIX = "a photo of"


def shade(base: str, index: int) -> str:
    """Shade ``index`` (0 is the word's own colour) of the hex colour ``base``, as ``"#rrggbb"``."""
    r, g, b = (int(base[i : i + 2], 16) / 255 for i in (1, 3, 5))
    h, s, v = colorsys.rgb_to_hsv(r, g, b)
    dh, fs, fv = _SHADES[index]
    r, g, b = colorsys.hsv_to_rgb((h + dh) % 1.0, min(1.0, s * fs), v * fv)
    return "#" + "".join(f"{round(255 * c):02x}" for c in (r, g, b))


@dataclass(frozen=True)
class Person:
    """One person. Attributes in :data:`NAMED_ATTRIBUTES` may be said; all others are identity."""

    noun: str
    hair: str
    hair_color: str
    headwear: str
    headwear_color: str
    glasses: str
    facial_hair: str
    expression: str
    clothes: str
    clothes_color: str
    background: str
    # never named
    skin: str
    cut: int = 0
    natural_brows: bool = True
    garment: int = 0
    print: str = "none"
    mark: str = "none"
    hair_shade: int = 0
    headwear_shade: int = 0
    clothes_shade: int = 0
    background_shade: int = 0

    @property
    def hair_visible(self) -> bool:
        return self.headwear == "none"

    def edited(self, **changes: str) -> Person:
        """The same person with the named attributes changed: the truth of an edit.

        A new hair kind takes that kind's plainest cut, a new colour its plainest shade and a
        new garment its plainest make, since a word can't say more.

        Raises:
            ValueError: an attribute that captions don't name, or a value it can't take.
        """
        fresh: dict[str, Any] = dict(changes)
        for name, value in changes.items():
            if name not in NAMED_ATTRIBUTES:
                raise ValueError(f"{name!r} is not a named attribute; choose from {', '.join(NAMED_ATTRIBUTES)}.")
            if value not in NAMED_ATTRIBUTES[name]:
                raise ValueError(f"{name} can't be {value!r}; choose from {', '.join(NAMED_ATTRIBUTES[name])}.")
            if getattr(self, name) == value:
                continue
            if name == "hair":
                fresh["cut"] = 0
            elif name == "clothes":
                fresh.update(garment=0, print="none")
            elif name == "background":
                fresh["background_shade"] = 0
            elif name.endswith("_color"):
                fresh[name.removesuffix("_color") + "_shade"] = 0
        return replace(self, **fresh)


def sample_person(seed: int, split: str = "train") -> Person:
    """Person number ``seed`` of ``split``; the same one on every machine.

    Held-out people have skin, hair, clothes and backgrounds in colours that no training picture
    has, three in four wear a printed shirt or have a mark on the face, which no training person has.

    Raises:
        ValueError: ``split`` is neither "train" nor "held_out".
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split is 'train' or 'held_out', not {split!r}.")
    rng = random.Random(f"{split}-{seed}")
    held_out = split == "held_out"
    shades = HELD_OUT_SHADES if held_out else TRAIN_SHADES
    noun = rng.choice(NOUNS)
    lady = noun == "lady"
    hair = rng.choices(HAIR_KINDS, (1, 1, 3.5, 3.5, 0) if lady else (3.5, 3, 0.8, 0.8, 1))[0]
    headwear = "none"
    if hair != "bald" and rng.random() < 0.3:
        headwear = rng.choices(HEADWEAR[1:], (2, 1, 2, 0) if lady else (1, 2, 0, 2))[0]
    clothes = rng.choices(CLOTHES, (2, 1, 1, 1, 1))[0]
    person = Person(
        noun=noun,
        hair=hair,
        hair_color=rng.choice(HAIR_COLORS),
        headwear=headwear,
        headwear_color=rng.choice(COLORS),
        glasses=rng.choices(GLASSES, (5, 3, 3))[0],
        facial_hair="none" if lady else rng.choices(FACIAL_HAIR, (5, 3, 3))[0],
        expression=rng.choice(EXPRESSIONS),
        clothes=clothes,
        clothes_color=rng.choice(COLORS),
        background=rng.choice(BACKGROUNDS),
        skin=rng.choice(_HELD_OUT_SKIN if held_out else _TRAIN_SKIN),
        cut=rng.randrange(len(_CUTS[hair])),
        natural_brows=rng.random() < 0.5,
        garment=rng.randrange(len(_CLOTHES_VARIANTS[clothes])),
        hair_shade=rng.choice(shades),
        headwear_shade=rng.choice(shades),
        clothes_shade=rng.choice(shades),
        background_shade=rng.choice(shades),
    )
    if held_out:
        person = replace(person, mark=rng.choice(MARKS))
        if person.clothes == "shirt" and rng.random() < 0.7:
            person = replace(person, print=rng.choice(PRINTS))
    return person


# ---------------------------------------------------------------------------- drawing


_MARK_SHAPES = {
    "freckles": [(102, 128), (110, 132), (116, 127), (106, 137), (178, 128), (170, 132), (164, 127), (174, 137)],
    "mole": [(170, 140)],
}


@functools.lru_cache(maxsize=1)
def _style() -> Any:
    """The avataaars definition with one more component, ``mark``, under the nose. Validated once."""
    from dicebear import Style

    definition = json.loads(files("dicebear_styles").joinpath("avataaars.json").read_text("utf-8"))
    radius = {"freckles": "3.2", "mole": "5"}
    variants = {
        name: {
            "elements": [
                {
                    "type": "element",
                    "name": "circle",
                    "attributes": {"cx": str(x), "cy": str(y), "r": radius[name], "fill": "#5a2d16"},
                }
                for x, y in spots
            ]
        }
        for name, spots in _MARK_SHAPES.items()
    }
    scar = {"d": "M158 120l16 22m-17-12l8-5m-1 14l9-5", "stroke": "#b4483c", "stroke-width": "3.4", "fill": "none"}
    variants["scar"] = {"elements": [{"type": "element", "name": "path", "attributes": scar}]}
    definition["components"]["mark"] = {"width": 280, "height": 280, "variants": variants}
    elements = definition["canvas"]["elements"]
    nose = next(i for i, e in enumerate(elements) if e["name"] == "nose")
    elements.insert(nose, {"name": "mark", "type": "component", "attributes": {}})
    return Style(definition)


def _options(person: Person, hidden: str | None) -> dict[str, Any]:
    eyes, brows, mouth = _EXPRESSION[person.expression]
    top = _HEADWEAR_VARIANT[person.headwear] if person.headwear != "none" else _CUTS[person.hair][person.cut]
    garment = "graphicShirt" if person.print != "none" else _CLOTHES_VARIANTS[person.clothes][person.garment]
    hair = shade(_HAIR_BASE[person.hair_color], person.hair_shade)
    shown = {
        "top": hidden not in ("hair", "headwear"),
        "accessories": person.glasses != "none" and hidden != "glasses",
        "facialHair": person.facial_hair != "none" and hidden != "facial_hair",
        "mark": person.mark != "none",
    }
    return {
        "seed": "s2edit",
        "topVariant": top,
        "accessoriesVariant": _GLASSES_VARIANT.get(person.glasses, "prescription02"),
        "facialHairVariant": _FACIAL_HAIR_VARIANT.get(person.facial_hair, "beardMedium"),
        "markVariant": person.mark if shown["mark"] else "mole",
        **{f"{name}Probability": 100 if there else 0 for name, there in shown.items()},
        "eyesVariant": eyes,
        "eyebrowsVariant": brows + ("Natural" if person.natural_brows else ""),
        "mouthVariant": mouth,
        "noseVariant": "default",
        "clothesVariant": garment,
        "clothesGraphicVariant": person.print if person.print != "none" else "bat",
        "skinColor": person.skin,
        "hairColor": hair,
        "facialHairColor": hair,
        "hatColor": shade(_GARMENT_BASE[person.headwear_color], person.headwear_shade),
        "clothesColor": shade(_GARMENT_BASE[person.clothes_color], person.clothes_shade),
        "accessoriesColor": "#262e33",
    }


def _rgba(person: Person, size: int, hidden: str | None = None) -> np.ndarray:
    """(size, size, 4) uint8 drawing on a transparent ground."""
    import resvg_py
    from dicebear import Avatar

    svg = Avatar(_style(), _options(person, hidden)).to_string()
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def render_array(person: Person, size: int = IMAGE_SIZE) -> np.ndarray:
    """The picture of ``person`` as a (size, size, 3) uint8 array."""
    rgba = _rgba(person, size).astype(np.float32)
    alpha = rgba[..., 3:] / 255
    base = shade(_BACKGROUND_BASE[person.background], person.background_shade)
    ground = np.array([int(base[i : i + 2], 16) for i in (1, 3, 5)], np.float32)
    return (rgba[..., :3] * alpha + ground * (1 - alpha)).round().astype(np.uint8)


def render(person: Person, size: int = IMAGE_SIZE) -> Image.Image:
    """The picture of ``person`` as an RGB image of ``size`` x ``size`` pixels."""
    return Image.fromarray(render_array(person, size))


def part_masks(person: Person, size: int = IMAGE_SIZE) -> dict[str, np.ndarray]:
    """Where each part is, as (size, size) bool arrays: drawn with and without it, and compared.

    Keys are those of :data:`PARTS` that the picture has ("person" and "background" always).
    "expression" is where the face would change with the expression.
    """
    shown = _rgba(person, size)
    person_mask = shown[..., 3] > 127

    def differs(other: np.ndarray) -> np.ndarray:
        return np.abs(shown.astype(np.int16) - other).max(-1) > 12

    masks = {"person": person_mask, "background": ~person_mask}
    if person.headwear != "none":
        masks["headwear"] = differs(_rgba(person, size, "headwear"))
    elif person.hair != "bald":
        masks["hair"] = differs(_rgba(person, size, "hair"))
    for part in ("glasses", "facial_hair"):
        if getattr(person, part) != "none":
            masks[part] = differs(_rgba(person, size, part))
    other_color = "green" if person.clothes_color in ("pink", "purple", "red", "black") else "purple"
    masks["clothes"] = differs(_rgba(replace(person, clothes_color=other_color, clothes_shade=0), size))
    masks["expression"] = _expression_region(size)
    return masks


@functools.lru_cache(maxsize=4)
def _expression_region(size: int) -> np.ndarray:
    """(size, size) bool: where any two expressions differ; the same on every face."""
    bare = replace(sample_person(0), hair="bald", cut=0, headwear="none", glasses="none", facial_hair="none")
    faces = [_rgba(replace(bare, expression=e), size).astype(np.int16) for e in EXPRESSIONS]
    region = np.any([np.abs(face - faces[0]).max(-1) > 12 for face in faces], axis=0)
    region.setflags(write=False)
    return region


def changed_pixels(before: Person, after: Person, size: int = IMAGE_SIZE) -> np.ndarray:
    """(size, size) bool: the pixels in which the two people's pictures differ."""
    a, b = render_array(before, size).astype(np.int16), render_array(after, size)
    return np.abs(a - b).max(-1) > 0
