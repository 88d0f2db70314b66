"""The systems that the benchmark knows, what tuning tries for each, and their strengths for curves."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from .pipeline_arguments import ABLATION, PIPELINE_METHODS, PipelineArguments
from .pipeline_method import AutoencoderAlone, PipelineMethod, Unedited
from .protocol import Method
from .rivals import SINE, InstructPix2Pix, SDEdit

Arguments = Mapping[str, Any]

SETTINGS_FILE = Path(__file__).parent / "settings.json"
"""Each method's best arguments as ``s2edit bench --tune`` chose them."""


@dataclass(frozen=True)
class MethodFactory:
    """How to make a system.

    Attributes:
        make: ``make(name, pipe, num_inference_steps, **arguments)``; its error says why it can't.
        grid: the arguments that tuning tries; none: it stays as it is.
        curve: arguments from its weakest edit to its strongest.
    """

    make: Callable[..., Method]
    grid: tuple[Arguments, ...] = ()
    curve: tuple[Arguments, ...] = ()


@dataclass(frozen=True)
class MethodSpec:
    """A row of the benchmark: ``method``, one of ``METHODS``, with ``arguments``, under the name ``name``."""

    name: str
    method: str
    arguments: Arguments = field(default_factory=dict)

    def make(self, pipe: Any, num_inference_steps: int) -> Method:
        return METHODS[self.method].make(self.name, pipe, num_inference_steps, **self.arguments)


def _make_pipeline_method(
    base: PipelineArguments,
    name: str,
    pipe: Any,
    num_inference_steps: int,
    fit: Arguments | None = None,
    edit: Arguments | None = None,
) -> Method:
    return PipelineMethod(name, pipe, base.with_changes(fit, edit), num_inference_steps)


def _make_reference(kind: Callable[[str, Any], Method], name: str, pipe: Any, num_inference_steps: int) -> Method:
    return kind(name, pipe)


def _make_rival(
    kind: Callable[..., Method], name: str, pipe: Any, num_inference_steps: int, **arguments: Any
) -> Method:
    return kind(pipe, num_inference_steps=num_inference_steps, name=name, **arguments)


def _make_instruct(
    name: str, pipe: Any, num_inference_steps: int, model: str | None = None, **arguments: Any
) -> Method:
    if model is None:
        raise FileNotFoundError(
            f"Its weights aren't part of the package. Train them, s2edit train-instruct --out OUT, and pass "
            f"--method-model {name}=OUT/model."
        )
    method = InstructPix2Pix.from_folder(model, num_inference_steps=num_inference_steps, name=name, **arguments)
    method.model.to(pipe.device)
    return method


_GUIDANCE = tuple({"edit": {"guidance_scale": scale}} for scale in (2.0, 3.5, 5.0, 7.5, 10.0))
_SHORTER = {"cross_replace_steps": 0.4, "self_replace_steps": 0.4}
"""As long as this package takes attention over, which is shorter than published."""
_EDIT_GRID = (
    {"edit": {"guidance_scale": 2.5}},
    {"edit": {"guidance_scale": 7.5}},
    {"edit": {"guidance_scale": 2.5, **_SHORTER}},
)
_FIT_GRID = (
    {"edit": {"guidance_scale": 2.5}},
    {"edit": {"guidance_scale": 2.5, **_SHORTER}},
    {"fit": {"num_steps": 100}, "edit": {"guidance_scale": 2.5, **_SHORTER}},
)
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

_RIVALS: Mapping[str, MethodFactory] = {
    "SDEdit": MethodFactory(
        partial(_make_rival, SDEdit),
        ({"strength": 0.4}, {"strength": 0.5}, {"strength": 0.5, "guidance_scale": 7.5}),
        tuple({"strength": strength} for strength in (0.2, 0.35, 0.5, 0.65, 0.8)),
    ),
    "SINE": MethodFactory(
        partial(_make_rival, SINE),
        ({"fine_tuned_weight": 0.4}, {"fine_tuned_weight": 0.8}, {"fine_tuned_weight": 0.8, "mixed_share": 0.8}),
        tuple({"fine_tuned_weight": weight} for weight in (0.9, 0.7, 0.5, 0.3, 0.1)),
    ),
    "InstructPix2Pix": MethodFactory(
        _make_instruct,
        ({"guidance_scale": 2.0}, {"guidance_scale": 2.0, "image_guidance_scale": 1.0}, {"image_guidance_scale": 2.0}),
        tuple({"guidance_scale": scale} for scale in (1.5, 2.5, 4.5, 7.5, 10.0)),
    ),
}

ABLATION_PREFIX = "ablation: "

METHODS: Mapping[str, MethodFactory] = {
    "unedited": MethodFactory(partial(_make_reference, Unedited)),
    "autoencoder alone": MethodFactory(partial(_make_reference, AutoencoderAlone)),
    **{
        name: MethodFactory(partial(_make_pipeline_method, arguments), _GRIDS.get(name, ()), _GUIDANCE)
        for name, arguments in PIPELINE_METHODS.items()
    },
    **_RIVALS,
    **{
        f"{ABLATION_PREFIX}{name}": MethodFactory(partial(_make_pipeline_method, arguments))
        for name, arguments in ABLATION.items()
    },
}

ABLATION_METHODS = tuple(name for name in METHODS if name.startswith(ABLATION_PREFIX))
BENCHMARK_METHODS = tuple(name for name in METHODS if name not in ABLATION_METHODS)
QUICK_METHODS = ("unedited", "autoencoder alone", "S2Edit", "null-text + P2P", "DDIM + P2P", "direct + P2P", "SDEdit")


def method_specs(
    names: Sequence[str], settings: str | Path = SETTINGS_FILE, models: Mapping[str, str] | None = None
) -> tuple[MethodSpec, ...]:
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
    return tuple(MethodSpec(name, name, {**best.get(name, {}), **folders.get(name, {})}) for name in names)


def variants(spec: MethodSpec, all_arguments: Sequence[Arguments]) -> tuple[MethodSpec, ...]:
    """The method once for each of ``all_arguments``, laid over its own."""
    return tuple(
        MethodSpec(f"{spec.name} ({_in_words(arguments)})", spec.method, _merged(spec.arguments, arguments))
        for arguments in all_arguments
    )


def _merged(arguments: Arguments, changes: Arguments) -> Arguments:
    """``arguments`` with ``changes``; mappings in them are merged likewise."""
    merged = dict(arguments)
    for name, value in changes.items():
        before = merged.get(name)
        merged[name] = _merged(before, value) if isinstance(before, Mapping) and isinstance(value, Mapping) else value
    return merged


def _in_words(arguments: Arguments) -> str:
    flat = (_in_words(value) if isinstance(value, Mapping) else f"{name}={value}" for name, value in arguments.items())
    return ", ".join(flat)
