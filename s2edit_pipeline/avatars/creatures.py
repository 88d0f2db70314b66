"""Creatures of the avatars world: cats, dogs and monsters, drawn by this module itself.

What a caption may say (:data:`CREATURE_ATTRIBUTES`) is kept apart from what it never says (the ears, the eyes' colour,
the shape of the head, where the pattern lies, marks in the fur): the latter is *identity*. Training creatures leave
out the pairs of words in :data:`UNSEEN_PAIRS`, so that what the model makes of new combinations can be measured.
"""

from __future__ import annotations

import colorsys
import functools
import random
from dataclasses import dataclass, replace
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
    rgb,
    shade,
    where_any_differ,
)

SPECIES = ("cat", "dog", "monster")
PATTERNS = ("none", "stripes", "dots")
CREATURE_HEADWEAR = ("none", "hat", "beanie", "crown")

CREATURE_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "species": SPECIES,
    "fur_color": COLORS,
    "pattern": PATTERNS,
    "headwear": CREATURE_HEADWEAR,
    "headwear_color": COLORS,
    "glasses": GLASSES,
    "expression": EXPRESSIONS,
    "background": BACKGROUNDS,
}
"""What a caption can name of a creature, and the values it can take."""

UNSEEN_PAIRS: tuple[dict[str, str], ...] = (
    {"species": "cat", "fur_color": "purple"},
    {"species": "dog", "fur_color": "green"},
    {"species": "monster", "fur_color": "white"},
    {"species": "cat", "headwear": "crown"},
    {"species": "dog", "pattern": "stripes"},
    {"headwear": "beanie", "glasses": "sunglasses"},
)
"""Pairs of named values that no training creature has, and no training caption says."""

CREATURE_MARKS = ("none", "patch", "blaze", "socks")
_TRAIN_EYES = ("#3a2a20", "#2f5d3a", "#2b4a7a")
HELD_OUT_EYES = ("#6b4a1e", "#5a2a5e", "#1f6a6a")
NUM_EARS, NUM_LAYOUTS, NUM_HEADS = 3, 3, 2


@dataclass(frozen=True)
class Creature(Subject):
    """One creature. Attributes in :data:`CREATURE_ATTRIBUTES` may be said; all others are identity."""

    ATTRIBUTES: ClassVar = CREATURE_ATTRIBUTES
    PART: ClassVar = "creature"

    species: str
    fur_color: str
    pattern: str
    headwear: str
    headwear_color: str
    glasses: str
    expression: str
    background: str
    # never named
    eyes: str
    ears: int = 0
    head: int = 0
    layout: int = 0
    mark: str = "none"
    fur_shade: Shade = 0
    headwear_shade: Shade = 0
    background_shade: Shade = 0

    @property
    def noun(self) -> str:  # type: ignore[override]
        return self.species

    def shows(self, attribute: str) -> bool:
        """Only headwear that is there has a colour."""
        return attribute in self.ATTRIBUTES and (attribute != "headwear_color" or self.headwear != "none")

    def parts(self) -> tuple[str, ...]:
        return tuple(part for part in ("headwear", "glasses", "pattern") if getattr(self, part) != "none")

    def draw(self, size: int, hidden: str | None = None) -> np.ndarray:
        left_out: dict[str, Any] = {} if hidden is None else {hidden: "none"}
        return rasterize(_svg(replace(self, **left_out)), size)

    def expression_region(self, size: int) -> np.ndarray:
        return _expression_region(self.species, size)


def has_unseen_pair(creature: Creature) -> bool:
    """Whether ``creature`` has a pair of :data:`UNSEEN_PAIRS`."""
    return any(all(getattr(creature, name) == value for name, value in pair.items()) for pair in UNSEEN_PAIRS)


def _eye_color(rng: random.Random, split: str) -> str:
    """A varied creature's are of any colour, not too light."""
    if split == "varied":
        return hex_color(rng.random(), rng.uniform(0.3, 0.8), rng.uniform(0.2, 0.55))
    return rng.choice(HELD_OUT_EYES if split == "held_out" else _TRAIN_EYES)


def sample_creature(seed: int, split: str = "train") -> Creature:
    """Creature number ``seed`` of ``split``; the same one on every machine.

    Training creatures have none of :data:`UNSEEN_PAIRS`, and colours in a few shades a word. Varied creatures are
    training creatures in colours of all kinds. Held-out ones have fur, eyes and backgrounds in colours that no
    training creature has, and three in four have a mark in the fur, which no training or varied creature has.

    Raises:
        ValueError: ``split`` is not "train", "varied" or "held_out".
    """
    check_split(split)
    rng = random.Random(f"creature-{split}-{seed}")
    held_out = split == "held_out"
    while True:
        creature = Creature(
            species=rng.choice(SPECIES),
            fur_color=rng.choice(COLORS),
            pattern=rng.choices(PATTERNS, (2, 1, 1))[0],
            headwear=rng.choices(CREATURE_HEADWEAR, (6, 1, 1, 1))[0],
            headwear_color=rng.choice(COLORS),
            glasses=rng.choices(GLASSES, (5, 3, 3))[0],
            expression=rng.choice(EXPRESSIONS),
            background=rng.choice(BACKGROUNDS),
            eyes=_eye_color(rng, split),
            ears=rng.randrange(NUM_EARS),
            head=rng.randrange(NUM_HEADS),
            layout=rng.randrange(NUM_LAYOUTS),
            mark=rng.choice(CREATURE_MARKS) if held_out else "none",
            fur_shade=draw_shade(rng, split),
            headwear_shade=draw_shade(rng, split),
            background_shade=draw_shade(rng, split),
        )
        if held_out or not has_unseen_pair(creature):
            return creature


# ---------------------------------------------------------------------------- drawing, in a box of 280 x 280

_DARK = "#262e33"
_EYE_X, _EYE_Y = (108, 172), 128
_HEADS = ((76, 66), (84, 60))  # half axes of the head about (140, 134)


def _tone(color: str, factor: float) -> str:
    """``color`` darker (factor below 1) or, by the rest of the way to white, lighter."""
    h, s, v = colorsys.rgb_to_hsv(*(c / 255 for c in rgb(color)))
    v, s = (v * factor, s) if factor <= 1 else (v + (1 - v) * (factor - 1), s * (2 - factor))
    return hex_color(h, s, v)


def _second_color(fur: str) -> str:
    """The pattern's: darker than the fur, or lighter where the fur is dark."""
    return _tone(fur, 0.58) if max(rgb(fur)) > 110 else _tone(fur, 1.45)


def _ellipse(x: float, y: float, rx: float, ry: float, fill: str, more: str = "") -> str:
    return f'<ellipse cx="{x}" cy="{y}" rx="{rx}" ry="{ry}" fill="{fill}" {more}/>'


def _path(d: str, fill: str = "none", stroke: str = "none", width: float = 0) -> str:
    return (
        f'<path d="{d}" fill="{fill}" stroke="{stroke}" stroke-width="{width}" stroke-linecap="round" '
        'stroke-linejoin="round"/>'
    )


def _mirrored(shape: str) -> str:
    """``shape`` and its mirror image about the middle, x = 140."""
    return shape + f'<g transform="translate(280 0) scale(-1 1)">{shape}</g>'


def _ears(creature: Creature, fur: str) -> str:
    inner, dark = _tone(fur, 1.35) if max(rgb(fur)) > 110 else _tone(fur, 1.6), _tone(fur, 0.8)
    if creature.species == "cat":
        tip = ((74, 34), (64, 52), (86, 28))[creature.ears]
        outer = _path(f"M62 122L{tip[0]} {tip[1]}L122 76Z", fur, fur, 6)
        return _mirrored(outer + _path(f"M76 104L{tip[0] + 5} {tip[1] + 18}L106 80Z", inner))
    if creature.species == "dog":
        return _mirrored(
            (
                _path("M88 80C52 66 34 96 40 138C44 166 68 166 74 140C78 118 84 104 96 92Z", dark),
                _path("M92 78C56 44 30 66 34 92C38 112 62 104 78 106Z", dark),
                _path("M88 82C56 74 46 110 50 160C52 190 76 188 80 160C82 126 88 104 98 92Z", dark),
            )[creature.ears]
        )
    return _mirrored(
        (
            _path("M96 84C84 66 82 48 86 34", "none", dark, 8) + _ellipse(86, 32, 12, 12, inner),
            _path("M84 94C62 84 52 62 56 40C70 60 88 66 106 74Z", inner),
            _path("M74 104L46 84L70 80L58 54L86 68L92 44L106 74Z", dark),
        )[creature.ears]
    )


# one row a layout
_STRIPES = (
    (
        "M140 60V98", "M112 64L118 92", "M168 64L162 92", "M58 132H88", "M222 132H192", "M60 154H86",
        "M220 154H194",
    ),
    (
        "M124 60L128 96", "M156 60L152 96", "M64 104L92 116", "M216 104L188 116", "M58 140H84", "M222 140H196",
    ),
    (
        "M140 60V90", "M100 70L110 94", "M180 70L170 94", "M70 172L96 160", "M210 172L184 160", "M56 140H82",
        "M224 140H198",
    ),
)  # fmt: skip
_DOTS = (  # x, y, radius
    (
        (104, 84, 10), (170, 80, 12), (140, 74, 7), (72, 142, 10), (206, 150, 11), (92, 178, 7),
        (110, 236, 13), (166, 250, 12), (140, 272, 9), (186, 224, 8), (84, 262, 9),
    ),
    (
        (140, 82, 13), (92, 92, 8), (190, 94, 9), (70, 158, 11), (212, 136, 8), (90, 232, 10), (140, 240, 13),
        (190, 250, 10), (114, 266, 8), (168, 272, 9),
    ),
    (
        (120, 78, 9), (158, 86, 11), (82, 110, 9), (200, 108, 7), (76, 168, 8), (204, 166, 11), (128, 224, 9),
        (98, 252, 12), (160, 262, 12), (190, 236, 9),
    ),
)  # fmt: skip


def _pattern(creature: Creature, color: str) -> str:
    """Clipped to the fur by its caller."""
    if creature.pattern == "stripes":
        body = [f"M{x} {y}Q140 {y + 14} {280 - x} {y}" for x, y in ((60, 222), (54, 246), (52, 270))]
        return "".join(_path(d, "none", color, 9) for d in (*_STRIPES[creature.layout], *body))
    return "".join(_ellipse(x, y, r, r, color) for x, y, r in _DOTS[creature.layout])


def _muzzle(creature: Creature, fur: str) -> str:
    light = _tone(fur, 1.55)
    if creature.species == "cat":
        whiskers = _path("M84 162L56 156M84 170L56 174", "none", _DARK if max(rgb(fur)) > 110 else "#dddddd", 3)
        return (
            _ellipse(125, 164, 17, 13, light)
            + _ellipse(155, 164, 17, 13, light)
            + _mirrored(whiskers)
            + _path("M131 146H149L140 157Z", "#e0708a", "#e0708a", 4)
        )
    if creature.species == "dog":
        return _ellipse(140, 170, 36, 28, light) + _ellipse(140, 150, 15, 10, _DARK)
    return ""


def _mouth(expression: str) -> str:
    dark, tongue = "#5b1f24", "#ef6a75"
    if expression == "smiling":
        return _path("M116 170H164C164 194 116 194 116 170Z", dark) + _path("M124 170H156V176H124Z", "#ffffff")
    if expression == "sad":
        return _path("M120 190C124 170 156 170 160 190", "none", dark, 7)
    if expression == "angry":
        return _path("M116 172H164V188H116Z", "#ffffff", dark, 5) + _path("M132 172V188M148 172V188", "none", dark, 4)
    if expression == "surprised":
        return _ellipse(140, 182, 13, 16, dark) + _ellipse(140, 191, 8, 6, tongue)
    if expression == "winking":
        return _path("M118 172C122 192 158 192 162 172", "none", dark, 7) + _path(
            "M142 186H158C160 204 142 204 142 186Z", tongue
        )
    return _path("M120 180H160", "none", dark, 7)


def _eyes(creature: Creature, fur: str) -> str:
    brow = _DARK if max(rgb(fur)) > 110 else "#c9c9c9"
    iris, mood = creature.eyes, creature.expression
    left, right = _EYE_X
    parts = []
    for x in (left, right):
        if mood == "winking" and x == right:
            parts.append(
                _path(
                    f"M{x - 15} {_EYE_Y + 3}C{x - 8} {_EYE_Y - 10} {x + 8} {_EYE_Y - 10} {x + 15} {_EYE_Y + 3}",
                    "none",
                    brow,
                    7,
                )
            )
            continue
        radius, pupil = (19, 7) if mood == "surprised" else (16, 10)
        parts.append(_ellipse(x, _EYE_Y, radius, radius, "#ffffff") + _ellipse(x, _EYE_Y, pupil, pupil, iris))
        parts.append(_ellipse(x + 3, _EYE_Y - 4, 3, 3, "#ffffff"))
    y = _EYE_Y
    brows = {
        "sad": f"M{left - 18} {y - 17}L{left + 14} {y - 30}",
        "angry": f"M{left - 18} {y - 29}L{left + 16} {y - 13}",
        "surprised": f"M{left - 16} {y - 28}C{left - 8} {y - 38} {left + 8} {y - 38} {left + 16} {y - 28}",
    }
    if mood in brows:
        parts.append(_mirrored(_path(brows[mood], "none", brow, 7)))
    return "".join(parts)


def _glasses(kind: str) -> str:
    bridge = _path(f"M{_EYE_X[0] + 25} {_EYE_Y - 4}Q140 {_EYE_Y - 12} {_EYE_X[1] - 25} {_EYE_Y - 4}", "none", _DARK, 7)
    arms = _mirrored(_path(f"M{_EYE_X[0] - 25} {_EYE_Y - 4}L62 {_EYE_Y - 8}", "none", _DARK, 7))
    fill = "#3a4248" if kind == "sunglasses" else "none"
    lens = f'<circle cx="{_EYE_X[0]}" cy="{_EYE_Y}" r="25" fill="{fill}" stroke="{_DARK}" stroke-width="7"/>'
    shine = _path(f"M{_EYE_X[0] - 10} {_EYE_Y + 8}L{_EYE_X[0] + 6} {_EYE_Y - 12}", "none", "#7b858c", 5)
    return bridge + arms + _mirrored(lens + (shine if kind == "sunglasses" else ""))


def _headwear(kind: str, color: str, top: float) -> str:
    """``top``: the height of the head's top."""
    dark = _tone(color, 0.7) if max(rgb(color)) > 110 else _tone(color, 1.3)
    y = top + 14
    if kind == "hat":
        return (
            _path(f"M98 {y}V{y - 46}C98 {y - 56} 182 {y - 56} 182 {y - 46}V{y}Z", color)
            + _path(f"M98 {y - 14}H182V{y}H98Z", dark)
            + _ellipse(140, y + 2, 74, 11, color)
        )
    if kind == "beanie":
        return (
            _path(f"M84 {y + 8}C84 {y - 56} 196 {y - 56} 196 {y + 8}Z", color)
            + _path(f"M82 {y - 2}H198V{y + 16}H82Z", dark, dark, 6)
            + _ellipse(140, y - 46, 13, 13, dark)
        )
    points = f"M94 {y + 6}L86 {y - 40}L114 {y - 18}L140 {y - 48}L166 {y - 18}L194 {y - 40}L186 {y + 6}Z"
    return (
        _path(points, color, color, 4)
        + _path(f"M94 {y - 4}H186V{y + 8}H94Z", dark)
        + "".join(_ellipse(x, y - h, 6, 6, dark) for x, h in ((86, 40), (140, 48), (194, 40)))
    )  # fmt: skip


def _svg(creature: Creature) -> str:
    fur = shade(COLOR_BASE[creature.fur_color], creature.fur_shade)
    rx, ry = _HEADS[creature.head]
    head = f'<ellipse cx="140" cy="134" rx="{rx}" ry="{ry}"/>'
    body = '<path d="M46 290C46 226 92 196 140 196C188 196 234 226 234 290Z"/>'
    inside = '<g clip-path="url(#fur)">'
    marks = {
        "none": "",
        "patch": _ellipse(_EYE_X[1] + 6, _EYE_Y - 2, 34, 36, _tone(_second_color(fur), 0.9)),
        "blaze": _path("M126 64H154L150 150H130Z", _tone(fur, 1.8)),
        "socks": _path("M100 230H180L200 290H80Z", _tone(fur, 1.8)),
    }
    layers = [
        f'<clipPath id="fur">{head}{body}</clipPath>',
        f'<g fill="{_tone(fur, 0.88)}">{body}</g>',
        _ears(creature, fur),
        f'<g fill="{fur}">{head}</g>',
        f"{inside}{marks[creature.mark]}</g>",
    ]
    if creature.pattern != "none":
        layers.append(f"{inside}{_pattern(creature, _second_color(fur))}</g>")
    layers += [_muzzle(creature, fur), _mouth(creature.expression), _eyes(creature, fur)]
    if creature.glasses != "none":
        layers.append(_glasses(creature.glasses))
    if creature.headwear != "none":
        color = shade(COLOR_BASE[creature.headwear_color], creature.headwear_shade)
        layers.append(_headwear(creature.headwear, color, 134 - ry))
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 280 280">{"".join(layers)}</svg>'


@functools.lru_cache(maxsize=16)
def _expression_region(species: str, size: int) -> np.ndarray:
    """(size, size) bool: the same on every creature of a species, whatever it wears."""
    bare = replace(
        sample_creature(0), species=species, fur_color="grey", glasses="none", headwear="none", pattern="none"
    )
    return where_any_differ([replace(bare, expression=e).draw(size) for e in EXPRESSIONS])
