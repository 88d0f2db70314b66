"""The systems that the benchmark knows, what tuning tries for each, and their strengths for curves."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from .edit_methods import EditMethod
from .own_methods import ABLATION, SETTINGS, AutoencoderAlone, PipelineMethod, Setting, Unedited

Arguments = Mapping[str, Any]

SETTINGS_FILE = Path(__file__).parent / "benchmark_settings.json"
"""Each method's best arguments as ``s2edit bench --tune`` found them."""


@dataclass(frozen=True)
class Contender:
    """A system that can be made.

    Attributes:
        make: ``make(name, pipe, num_inference_steps, **arguments)``; raises what says why it can't.
        grid: the arguments that tuning tries; none: it stays as it is.
        curve: arguments from its weakest edit to its strongest.
    """

    make: Callable[..., EditMethod]
    grid: tuple[Arguments, ...] = ()
    curve: tuple[Arguments, ...] = ()


@dataclass(frozen=True)
class Entrant:
    """A row of the benchmark: ``method``, one of ``METHODS``, with ``arguments``, under the name ``name``."""

    name: str
    method: str
    arguments: Arguments = field(default_factory=dict)

    def make(self, pipe: Any, num_inference_steps: int) -> EditMethod:
        return METHODS[self.method].make(self.name, pipe, num_inference_steps, **self.arguments)


def _from_setting(
    setting: Setting,
    name: str,
    pipe: Any,
    num_inference_steps: int,
    fit: Arguments | None = None,
    edit: Arguments | None = None,
) -> EditMethod:
    return PipelineMethod(name, pipe, setting.with_changes(fit, edit), num_inference_steps)


def _reference(kind: Callable[[str, Any], EditMethod], name: str, pipe: Any, num_inference_steps: int) -> EditMethod:
    return kind(name, pipe)


_GUIDANCE = tuple({"edit": {"guidance_scale": scale}} for scale in (2.0, 3.5, 5.0, 7.5, 10.0))
_EDIT_GRID = tuple(
    {"edit": {"guidance_scale": scale, "cross_replace_steps": cross, "self_replace_steps": own}}
    for scale in (4.5, 7.5)
    for cross, own in ((0.4, 0.4), (0.8, 0.4), (0.8, 0.6))
)
_FIT_GRID = tuple(
    {"fit": {"num_steps": steps}, "edit": {"guidance_scale": scale}} for steps in (30, 60, 120) for scale in (3.5, 5.5)
)
_GRIDS: Mapping[str, tuple[Arguments, ...]] = {
    "S2Edit, the paper's": _FIT_GRID,
    "null-text + P2P": _EDIT_GRID,
    "DDIM + P2P": _EDIT_GRID,
    "direct + P2P": _EDIT_GRID,
    "edit-friendly + P2P": _EDIT_GRID,
    "DreamBooth": _FIT_GRID,
    "textual inversion": _FIT_GRID,
}
"""S2Edit's defaults were chosen on other people, and its confined ablations have to share its arguments."""

ABLATION_PREFIX = "ablation: "

METHODS: Mapping[str, Contender] = {
    "unedited": Contender(partial(_reference, Unedited)),
    "autoencoder alone": Contender(partial(_reference, AutoencoderAlone)),
    **{
        name: Contender(partial(_from_setting, setting), _GRIDS.get(name, ()), _GUIDANCE)
        for name, setting in SETTINGS.items()
    },
    **{f"{ABLATION_PREFIX}{name}": Contender(partial(_from_setting, setting)) for name, setting in ABLATION.items()},
}

ABLATION_METHODS = tuple(name for name in METHODS if name.startswith(ABLATION_PREFIX))
BENCHMARK_METHODS = tuple(name for name in METHODS if name not in ABLATION_METHODS)
QUICK_METHODS = ("unedited", "autoencoder alone", "S2Edit", "DDIM + P2P", "direct + P2P", "DreamBooth")


def entrants(
    names: Sequence[str], settings: str | Path = SETTINGS_FILE, models: Mapping[str, str] | None = None
) -> tuple[Entrant, ...]:
    """These methods with their best arguments, as the file ``settings`` has them.

    Args:
        models: method -> a model folder of its own, for those that take one as ``model``.

    Raises:
        ValueError: an unknown method, here or in ``models``, or one named twice.
        FileNotFoundError: no such file.
    """
    models = models or {}
    if unknown := [name for name in (*names, *models) if name not in METHODS]:
        raise ValueError(f"There is no method {', '.join(unknown)}; choose from {', '.join(METHODS)}.")
    if len(set(names)) != len(names):
        raise ValueError(f"A method is named twice: {', '.join(names)}.")
    best = json.loads(Path(settings).read_text("utf-8"))["methods"]
    folders = {name: {"model": folder} for name, folder in models.items()}
    return tuple(Entrant(name, name, {**best.get(name, {}), **folders.get(name, {})}) for name in names)


def variants(entrant: Entrant, all_arguments: Sequence[Arguments]) -> tuple[Entrant, ...]:
    """The entrant once for each of ``all_arguments``, laid over its own."""
    return tuple(
        Entrant(f"{entrant.name} ({_said(arguments)})", entrant.method, _over(entrant.arguments, arguments))
        for arguments in all_arguments
    )


def _over(arguments: Arguments, others: Arguments) -> Arguments:
    """``others`` over ``arguments``, dicts in them likewise."""
    merged = dict(arguments)
    for name, value in others.items():
        held = merged.get(name)
        merged[name] = _over(held, value) if isinstance(held, Mapping) and isinstance(value, Mapping) else value
    return merged


def _said(arguments: Arguments) -> str:
    flat = (_said(value) if isinstance(value, Mapping) else f"{name}={value}" for name, value in arguments.items())
    return ", ".join(flat)
