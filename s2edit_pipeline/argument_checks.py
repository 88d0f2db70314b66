"""Checks of numbers, names and words that callers pass, each with its message."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard


def is_number(value: object) -> TypeGuard[float]:
    """Whether ``value`` is a finite number; numpy's are, and True isn't."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def check_share(name: str, value: object, *, open_ended: bool = False) -> None:
    """Raises:
    ValueError: ``value`` isn't a number in [0, 1], or with ``open_ended`` in (0, 1).
    """
    if not is_number(value) or not (0 < value < 1 if open_ended else 0 <= value <= 1):
        wanted = "above 0 and below 1" if open_ended else "from 0 to 1"
        raise ValueError(f"{name} must be {wanted}, not {value!r}.")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raises:
    ValueError: ``value`` is none of ``choices``.
    """
    if value not in choices:
        *others, last = map(repr, choices)
        listed = f"{', '.join(others)} or {last}" if others else last
        raise ValueError(f"{name}={value!r} is unknown; choose {listed}.")


def check_words(name: str, words: Any) -> None:
    """Raises:
    TypeError: ``words`` are no words.
    """
    several = isinstance(words, (list, tuple)) and all(isinstance(word, str) for word in words)
    if not (words is None or isinstance(words, (bool, str)) or several):
        raise TypeError(f"{name} must be a word, a list of words, False or None, not {words!r}.")


def check_guidance(scale: Any, name: str = "guidance_scale") -> None:
    """Raises:
    ValueError: ``scale`` is no guidance scale.
    """
    if not is_number(scale) or scale < 0:
        raise ValueError(f"{name} must be a number of at least 0, not {scale!r}.")


def with_preset(
    preset: str | None, presets: Mapping[str, Mapping[str, Any]], given: Mapping[str, Any]
) -> dict[str, Any]:
    """``given`` without its Nones, and in place of these what ``preset`` says.

    Raises:
        ValueError: there is no such preset.
    """
    if preset is not None and preset not in presets:
        raise ValueError(f"preset={preset!r} is unknown; choose {' or '.join(map(repr, presets))}, or None for ours.")
    chosen = {} if preset is None else dict(presets[preset])
    return {**chosen, **{name: value for name, value in given.items() if value is not None}}
