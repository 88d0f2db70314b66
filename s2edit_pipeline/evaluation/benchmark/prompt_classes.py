"""How much a prompt says: the complete caption, half of it, what people write, or a caption with a fault."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ...avatars.captions import describe
from ...avatars.world import Subject
from ..metrics.counterfactual import CounterfactualEdit

PROMPT_CLASSES = ("complete", "half", "short", "vague")
"""In all of them the target says what is asked for, and the source what is to be taken away.

- complete: all that captions can say.
- half: a random half of that, for a source and all its targets the same.
- short: nothing but the noun.
- vague: all but for one thing that no edit changes, which is left out, or for every other subject said wrongly.
"""

_MAY_BE_WRONG = ("background", "clothes", "clothes_color", "fur_color", "expression", "pattern", "headwear_color")
_GOES_WITH = {"clothes_color": "clothes", "headwear_color": "headwear"}
"""A colour that can't be said without its thing; "red hair" can."""


@dataclass(frozen=True)
class EditPrompts:
    """A source prompt, and a target prompt for each edit."""

    source: str
    targets: tuple[str, ...]


def check_prompt_class(prompt_class: str) -> None:
    """Raises:
    ValueError: there is no such class.
    """
    if prompt_class not in PROMPT_CLASSES:
        raise ValueError(f"prompts are one of {', '.join(PROMPT_CLASSES)}, not {prompt_class!r}.")


def edit_prompts(
    subject: Subject, edits: Sequence[CounterfactualEdit], prompt_class: str = "complete", *, seed: int = 0
) -> EditPrompts:
    """What is said of ``subject`` and of its ``edits``, of one of :data:`PROMPT_CLASSES`; ``seed`` decides what is left
    out or wrong.

    Raises:
        ValueError: there is no such class.
    """
    check_prompt_class(prompt_class)
    rng = random.Random(f"prompts-{seed}")
    changed = [_changed(edit) for edit in edits]
    named = [name for name, value in describe(subject).said.items() if value != "none"]
    kept = [name for name in named if not any({name, f"{name}_color"} & names for names in changed)]
    removed = {name for e, names in zip(edits, changed, strict=True) for name in names if _is_removed(e, name)}
    fault: dict[str, str] = {}
    if prompt_class == "short":
        said = removed
    elif prompt_class == "half":
        said = removed | set(rng.sample(named, len(named) // 2))
    else:
        said = set(subject.ATTRIBUTES)
        open_to_fault = [name for name in kept if name in _MAY_BE_WRONG]
        if prompt_class == "vague" and open_to_fault:
            name = rng.choice(open_to_fault)
            others = [v for v in subject.ATTRIBUTES[name] if v not in (getattr(subject, name), "none")]
            if seed % 2:
                fault = {name: rng.choice(others)}
            else:
                said -= {name, f"{name}_color"}
    return EditPrompts(
        _caption(subject, said, fault),
        tuple(_caption(e.target, said | names, fault) for e, names in zip(edits, changed, strict=True)),
    )


def _changed(edit: CounterfactualEdit) -> set[str]:
    names = edit.subject.ATTRIBUTES
    return {name for name in names if getattr(edit.subject, name) != getattr(edit.target, name)}


def _is_removed(edit: CounterfactualEdit, name: str) -> bool:
    return getattr(edit.target, name) == "none"


def _caption(subject: Subject, said: set[str], fault: dict[str, str]) -> str:
    only = said | {_GOES_WITH[name] for name in said if name in _GOES_WITH}
    return describe(subject.edited(**fault) if fault else subject, only=only).text
