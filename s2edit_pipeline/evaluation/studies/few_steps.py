"""How much of an edit's quality is left at few steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..methods.pipeline_methods import Setting
from ..targets import Target, at_most, target_table
from . import edits as edit_table
from .edits import EditRow

FEW, MANY = 20, 50


@dataclass(frozen=True)
class StepsReport:
    """A row for each number of steps, and how far ``FEW`` of them are below ``MANY``."""

    people: tuple[int, ...]
    rows: tuple[EditRow, ...]
    targets: tuple[Target, ...]

    def table(self) -> str:
        """As Markdown."""
        return "\n".join([edit_table.table(self.rows), "", target_table(self.targets)])


def measure_steps(
    pipe: Any,
    steps: Sequence[int] = (10, FEW, MANY),
    *,
    people: Sequence[int] = range(4),
    num_steps: int | None = None,
    seed: int = 0,
) -> StepsReport:
    """The demo's edits of held-out ``people`` with their default identities, which all numbers of ``steps`` share; from
    direct inversion, and below ``MANY`` steps from fixed-point inversion too.

    Args:
        num_steps: of the fits; None takes the method's own.
    """
    settings = {f"{number} steps": Setting(edit={"num_inference_steps": number}) for number in steps}
    settings |= {
        f"{number} steps, fixed point": Setting(inversion="fixed_point", edit={"num_inference_steps": number})
        for number in steps
        if number < MANY
    }
    rows = edit_table.measure_edits(
        pipe, list(settings), settings=settings, people=people, num_steps=num_steps, seed=seed
    )
    measured = dict(zip(steps, rows, strict=False))
    few, many = measured.get(FEW), measured.get(MANY)
    targets = [
        at_most(
            f"{FEW} steps below {MANY}, {where}, dB",
            0.5,
            None if few is None or many is None else getattr(many, where) - getattr(few, where),
        )
        for where in ("whole", "inside", "outside")
    ]
    return StepsReport(tuple(people), tuple(rows), tuple(targets))
