"""The systems that the benchmark knows, what tuning tries for each, and their strengths for curves."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from .pipeline_methods import ABLATION, SETTINGS, AutoencoderAlone, PipelineMethod, Setting, Unedited
from .protocol import EditMethod
from .rivals import SINE, InstructPix2Pix, SDEdit

Arguments = Mapping[str, Any]

SETTINGS_FILE = Path(__file__).parent / "settings.json"
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


def _from_class(
    kind: Callable[..., EditMethod], name: str, pipe: Any, num_inference_steps: int, **arguments: Any
) -> EditMethod:
    return kind(pipe, num_inference_steps=num_inference_steps, name=name, **arguments)


def _instruct(name: str, pipe: Any, num_inference_steps: int, model: str | None = None, **arguments: Any) -> EditMethod:
    if model is None:
        raise FileNotFoundError(
            f"Its weights aren't part of the package. Train them, s2edit train-instruct --out OUT, and pass "
            f"--method-model {name}=OUT/model."
        )
    made = InstructPix2Pix.from_folder(model, num_inference_steps=num_inference_steps, name=name, **arguments)
    made.model.to(pipe.device)
    return made


_GUIDANCE = tuple({"edit": {"guidance_scale": scale}} for scale in (2.0, 3.5, 5.0, 7.5, 10.0))
_EDIT_GRID = (
    {"edit": {"guidance_scale": 2.5}},
    {"edit": {"guidance_scale": 7.5}},
    {"edit": {"guidance_scale": 2.5, "cross_replace_steps": 0.8, "self_replace_steps": 0.6}},
)
_FIT_GRID = ({"edit": {"guidance_scale": 2.5}}, {"fit": {"num_steps": 100}, "edit": {"guidance_scale": 2.5}})
_GRIDS: Mapping[str, tuple[Arguments, ...]] = {
    "null-text + P2P": _EDIT_GRID,
    "DDIM + P2P": _EDIT_GRID,
    "direct + P2P": _EDIT_GRID,
    "edit-friendly + P2P": _EDIT_GRID,
    "DreamBooth": _FIT_GRID,
    "textual inversion": _FIT_GRID,
}
"""S2Edit's defaults were chosen on other people, the paper's are the paper's, and the confined ablations have to share
S2Edit's arguments."""

_RIVALS: Mapping[str, Contender] = {
    "SDEdit": Contender(
        partial(_from_class, SDEdit),
        ({"strength": 0.4}, {"strength": 0.5}, {"strength": 0.5, "guidance_scale": 7.5}),
        tuple({"strength": strength} for strength in (0.2, 0.35, 0.5, 0.65, 0.8)),
    ),
    "SINE": Contender(
        partial(_from_class, SINE),
        ({"fine_tuned_weight": 0.4}, {"fine_tuned_weight": 0.8}, {"fine_tuned_weight": 0.8, "mixed_share": 0.8}),
        tuple({"fine_tuned_weight": weight} for weight in (0.9, 0.7, 0.5, 0.3, 0.1)),
    ),
    "InstructPix2Pix": Contender(
        _instruct,
        ({"guidance_scale": 2.0}, {"guidance_scale": 2.0, "image_guidance_scale": 1.0}, {"image_guidance_scale": 2.0}),
        tuple({"guidance_scale": scale} for scale in (1.5, 2.5, 4.5, 7.5, 10.0)),
    ),
}

ABLATION_PREFIX = "ablation: "

METHODS: Mapping[str, Contender] = {
    "unedited": Contender(partial(_reference, Unedited)),
    "autoencoder alone": Contender(partial(_reference, AutoencoderAlone)),
    **{
        name: Contender(partial(_from_setting, setting), _GRIDS.get(name, ()), _GUIDANCE)
        for name, setting in SETTINGS.items()
    },
    **_RIVALS,
    **{f"{ABLATION_PREFIX}{name}": Contender(partial(_from_setting, setting)) for name, setting in ABLATION.items()},
}

ABLATION_METHODS = tuple(name for name in METHODS if name.startswith(ABLATION_PREFIX))
BENCHMARK_METHODS = tuple(name for name in METHODS if name not in ABLATION_METHODS)
QUICK_METHODS = ("unedited", "autoencoder alone", "S2Edit", "null-text + P2P", "DDIM + P2P", "direct + P2P", "SDEdit")


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
