"""What a measurement should come to, and whether it did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """``met`` and ``value`` are None where nothing was measured."""

    name: str
    wanted: str
    value: float | None
    met: bool | None


def at_most(name: str, bound: float, value: float | None) -> Target:
    return Target(name, f"≤ {bound:g}", value, None if value is None else value <= bound)


def at_least(name: str, bound: float, value: float | None) -> Target:
    return Target(name, f"≥ {bound:g}", value, None if value is None else value >= bound)


_VERDICTS = {True: "met", False: "**missed**", None: "not measured"}


def target_table(targets: Sequence[Target]) -> str:
    """As Markdown."""
    lines = ["| target | wanted | measured | |", "|---|---|---|---|"]
    for t in targets:
        lines.append(f"| {t.name} | {t.wanted} | {'-' if t.value is None else f'{t.value:.2f}'} | {_VERDICTS[t.met]} |")
    return "\n".join(lines)
