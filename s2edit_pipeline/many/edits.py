"""``s2edit edit-many``: an edited picture for each row."""

from __future__ import annotations

import argparse
import inspect
import os
import tempfile
from collections.abc import Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from .command import add_many, run_many
from .manifest import Column, text, value, whole_number

MOST_IDENTITIES = 8
"""Kept in memory by a worker; rows of one identity that follow each other read it once."""

_TEXTS = ("id", "image", "identity", "source_prompt", "prompt", "edit_mask")
_NOT_OF_A_ROW = {
    "self", "generator", "output_type", "return_dict", "callback_on_step_end", "callback_on_step_end_tensor_inputs",
    "num_images_per_prompt", "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds", "original_size", "crops_coords_top_left", "target_size", "latents",
    "return_attention_maps", "keep_attention", "ip_adapter_image", "ip_adapter_image_embeds",
    "cross_attention_kwargs", "stop", "stock_arguments",
}  # fmt: skip
"""Arguments of an edit that a row has no cell for: tensors, objects, what is drawn without a picture."""


class Edits:
    """The work of a row: an edit, written as a picture of the kind that the source is."""

    command = "edit-many"

    def __init__(self, args: argparse.Namespace) -> None:
        self.settings = {
            "command": self.command, "model": args.model, "dtype": args.dtype,
            "prompt_in_metadata": not args.no_prompt_in_metadata, "seed": args.seed,
        }  # fmt: skip
        given = {"num_inference_steps": args.inference_steps, "guidance_scale": args.guidance}
        self._given = {name: one for name, one in given.items() if one is not None}
        self._identity = lru_cache(maxsize=MOST_IDENTITIES)(_read_identity)

    @cached_property
    def columns(self) -> dict[str, Column]:
        from ..pipeline import S2EditPipeline

        arguments = inspect.signature(S2EditPipeline.__call__).parameters.keys() - _NOT_OF_A_ROW - {*_TEXTS}
        return {
            **{name: Column(text, required=name in ("image", "prompt")) for name in _TEXTS},
            "seed": Column(whole_number),
            **{name: Column(value) for name in sorted(arguments)},
        }

    def full(self, cells: Mapping[str, Any]) -> dict[str, Any]:
        cells = {**self._given, **cells}
        if cells.keys() - {*_TEXTS, "seed", "num_inference_steps"}:
            self._check_settings(cells)
        steps = cells.get("num_inference_steps")
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise ValueError(f"'num_inference_steps': must be a whole number of at least 1, not {steps!r}.")
        name = _named_inversion(cells)
        if name is not None:
            _check_seed(name, cells)
        return cells

    def _check_settings(self, cells: Mapping[str, Any]) -> None:
        """Each column by itself, so that the error can name it, then all together."""
        from ..argument_checks import check_choice, with_preset
        from ..edit_settings import EDIT_PRESETS, EditSettings

        if "inversion" in cells:
            _check("inversion", lambda: _inversion_method(cells["inversion"]))
        if "output_size" in cells:
            _check("output_size", lambda: check_choice("output_size", cells["output_size"], ("picture", "model")))
        preset = cells.get("preset")
        chosen: dict[str, Any] = {}
        if preset is not None:
            _check("preset", lambda: with_preset(preset, EDIT_PRESETS, {}))
            chosen = dict(EDIT_PRESETS[preset])
        for name in cells:
            if name in EditSettings.__dataclass_fields__:
                _check(name, lambda name=name: EditSettings.of({name: cells[name]}, {}))
        _check(", ".join(sorted(cells.keys() - {*_TEXTS})), lambda: EditSettings.of({**chosen, **cells}, {}))

    def suffix(self, cells: Mapping[str, Any]) -> str:
        from ..picture_saving import SUFFIXES

        suffix = Path(cells["image"]).suffix.lower()
        return suffix if suffix in SUFFIXES else ".png"

    def do(self, pipe: Any, cells: Mapping[str, Any], begun: Path, target: Path) -> None:
        from ..picture_files import read_picture

        arguments = {name: cell for name, cell in cells.items() if name not in ("id", "image", "identity", "seed")}
        out = pipe(
            image=read_picture(cells["image"]).native,
            identity=self._identity(cells["identity"]) if "identity" in cells else None,
            generator=self._generator(pipe, cells),
            **arguments,
        )
        descriptor, unfinished = tempfile.mkstemp(suffix=target.suffix, dir=begun)
        os.close(descriptor)
        out.save(unfinished, prompt_in_metadata=self.settings["prompt_in_metadata"])
        os.chmod(unfinished, 0o666 & ~_UMASK)
        with open(unfinished, "r+b") as file:
            os.fsync(file.fileno())
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(unfinished, target)

    def _generator(self, pipe: Any, cells: Mapping[str, Any]) -> Any:
        """Of the inversions that draw noise; the others refuse one."""
        import torch

        steps = cells.get("num_inference_steps") or pipe.family.default_steps
        name = _named_inversion(cells) or pipe.family.default_inversion(steps)
        _check_seed(name, cells)
        seed = cells.get("seed", self.settings["seed"])
        return torch.Generator().manual_seed(seed) if _inversion_method(name).draws_noise else None


_UMASK = os.umask(0o077)  # there is no asking without setting
os.umask(_UMASK)


def _named_inversion(cells: Mapping[str, Any]) -> str | None:
    from ..edit_settings import EDIT_PRESETS

    preset: dict[str, Any] = {} if cells.get("preset") is None else dict(EDIT_PRESETS[cells["preset"]])
    name: str | None = cells.get("inversion", preset.get("inversion"))
    return name


def _inversion_method(name: Any) -> Any:
    """Raises:
    ValueError: there is no such inversion.
    """
    from .. import pipeline  # noqa: F401  (it makes the inversions known)
    from ..inversion_record import inversion_method

    return inversion_method(name)


def _check_seed(inversion: str, cells: Mapping[str, Any]) -> None:
    if "seed" in cells and not _inversion_method(inversion).draws_noise:
        raise ValueError(f"'seed': the inversion {inversion!r} draws no noise; leave the cell empty.")


def _check(name: str, check: Any) -> None:
    try:
        check()
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name!r}: {error}") from error


def _read_identity(name: str) -> Any:
    from ..identity_adapter import IdentityAdapter

    return IdentityAdapter.from_pretrained(name)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_many(parser)
    edit = parser.add_argument_group("edit, where a row has no cell of its own for it")
    edit.add_argument("--inference-steps", type=int, help="(default: the model's own)")
    edit.add_argument("--guidance", type=float, help="how strongly words pull (default: the model's own)")
    parser.add_argument("--no-prompt-in-metadata", action="store_true", help="leave the prompts out of the files")
    parser.set_defaults(run=run_many, make_work=Edits)
