"""People of the avatars world, in the *avataaars* style by Pablo Stanley ("free for personal and commercial use"),
assembled by DiceBear and rasterised by resvg.

What a caption may say (:data:`PERSON_ATTRIBUTES`) is kept apart from what it never says (skin tone, cut, brows, print,
marks): the latter is *identity*.
"""

from __future__ import annotations

import functools
import json
import random
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any, ClassVar

import numpy as np

from .drawing import (
    BACKGROUNDS,
    COLOR_BASE,
    COLORS,
    EXPRESSIONS,
    GLASSES,
    Shade,
    Subject,
    check_split,
    draw_shade,
    hex_color,
    rasterize,
    shade,
    where_any_differ,
)

NOUNS = ("lady", "man")
HAIR_KINDS = ("short straight", "short curly", "long straight", "long curly", "bald")
HAIR_COLORS = ("black", "brown", "blond", "red", "grey", "pink")
HEADWEAR = ("none", "hat", "beanie", "hijab", "turban")
FACIAL_HAIR = ("none", "beard", "moustache")
CLOTHES = ("shirt", "hoodie", "blazer", "overalls", "sweater")

PERSON_ATTRIBUTES: dict[str, tuple[str, ...]] = {
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
"""What a caption can name of a person, and the values it can take."""

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

HAIR_BASE = {
    "black": "#2c1b18", "brown": "#724133", "blond": "#d6b370", "red": "#c9430f", "grey": "#a9a9ad",
    "pink": "#f08ba5",
}  # fmt: skip


@dataclass(frozen=True)
class Person(Subject):
    """One person. Attributes in :data:`PERSON_ATTRIBUTES` may be said; all others are identity."""

    ATTRIBUTES: ClassVar = PERSON_ATTRIBUTES
    PART: ClassVar = "person"

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
    hair_shade: Shade = 0
    headwear_shade: Shade = 0
    clothes_shade: Shade = 0
    background_shade: Shade = 0

    @property
    def hair_visible(self) -> bool:
        return self.headwear == "none"

    def plain(self, attribute: str) -> dict[str, Any]:
        if attribute == "hair":
            return {"cut": 0}
        if attribute == "clothes":
            return {"garment": 0, "print": "none"}
        return super().plain(attribute)

    def shows(self, attribute: str) -> bool:
        """Headwear hides hair, and only hair and headwear that are there have a colour."""
        if attribute == "hair":
            return self.hair_visible
        if attribute == "hair_color":
            return self.hair_visible and self.hair != "bald"
        if attribute == "headwear_color":
            return self.headwear != "none"
        return attribute in self.ATTRIBUTES

    def parts(self) -> tuple[str, ...]:
        top = ("headwear",) if self.headwear != "none" else ("hair",) if self.hair != "bald" else ()
        return (*top, *(part for part in ("glasses", "facial_hair") if getattr(self, part) != "none"), "clothes")

    def draw(self, size: int, hidden: str | None = None) -> np.ndarray:
        """As :meth:`Subject.draw`; nobody is drawn without clothes, theirs are then in another colour."""
        from dicebear import Avatar

        person = self
        if hidden == "clothes":
            other = "green" if self.clothes_color in ("pink", "purple", "red", "black") else "purple"
            person = replace(self, clothes_color=other, clothes_shade=0)
        return rasterize(Avatar(_style(), _options(person, hidden)).to_string(), size)

    def expression_region(self, size: int) -> np.ndarray:
        return _expression_region(size)


def _skin(rng: random.Random, split: str) -> str:
    """A varied person's skin is like people's in four of five, or of any colour at all."""
    if split != "varied":
        return rng.choice(_HELD_OUT_SKIN if split == "held_out" else _TRAIN_SKIN)
    if rng.random() < 0.8:
        return hex_color(rng.uniform(0.03, 0.14), rng.uniform(0.1, 0.75), rng.uniform(0.3, 1.0))
    return hex_color(rng.random(), rng.uniform(0.0, 0.8), rng.uniform(0.25, 1.0))


def sample_person(seed: int, split: str = "train") -> Person:
    """Person number ``seed`` of ``split``; the same one on every machine.

    Training people have one of a few skins, and hair, clothes and backgrounds in a few shades a word. Varied people
    are training people in colours of all kinds. Held-out people have colours that no training person has; three in
    four wear a printed shirt or have a mark on the face, which no training or varied person has.

    Raises:
        ValueError: ``split`` is not "train", "varied" or "held_out".
    """
    check_split(split)
    rng = random.Random(f"{split}-{seed}")
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
        skin=_skin(rng, split),
        cut=rng.randrange(len(_CUTS[hair])),
        natural_brows=rng.random() < 0.5,
        garment=rng.randrange(len(_CLOTHES_VARIANTS[clothes])),
        hair_shade=draw_shade(rng, split),
        headwear_shade=draw_shade(rng, split),
        clothes_shade=draw_shade(rng, split),
        background_shade=draw_shade(rng, split),
    )
    if split == "held_out":
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
    hair = shade(HAIR_BASE[person.hair_color], person.hair_shade)
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
        "hatColor": shade(COLOR_BASE[person.headwear_color], person.headwear_shade),
        "clothesColor": shade(COLOR_BASE[person.clothes_color], person.clothes_shade),
        "accessoriesColor": "#262e33",
    }


@functools.lru_cache(maxsize=4)
def _expression_region(size: int) -> np.ndarray:
    """(size, size) bool: where any two expressions differ; the same on every face."""
    bare = replace(sample_person(0), hair="bald", cut=0, headwear="none", glasses="none", facial_hair="none")
    return where_any_differ([replace(bare, expression=e).draw(size) for e in EXPRESSIONS])
