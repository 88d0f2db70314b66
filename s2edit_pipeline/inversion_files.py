"""An inversion's folder: safetensors and JSON, each value checked before anything is made of it.

Whoever hands one on isn't trusted, as with identities. What it was made with is in it, so that a loaded inversion is
refused by another model, scheduler, identity or picture as one that was just made.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from .identity_folder import atomic_folder
from .identity_schema import (
    checksum_of,
    is_fingerprint,
    is_hash,
    is_number,
    is_size,
    mapping_check,
    parse_json,
    record_check,
    sha256_of,
    tensors_of,
    text_check,
)

FORMAT_VERSION = 1
CONFIG_FILE = "inversion.json"
TENSORS_FILE = "inversion.safetensors"
MOST_BYTES = {CONFIG_FILE: 2**20, TENSORS_FILE: 2**33}

_TENSORS = ("trajectory", "unconditional_embeds", "residuals")
_AGAIN = "Invert again, pipe.invert(image, prompt), or fetch it again."


def _or_none(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _numbers(count: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) == count and all(map(is_number, value))


_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "method": (text_check(100), "an inversion's name"),
    "prompt": (text_check(10_000), "a string of 1 to 10,000 characters"),
    "guidance_scale": (_or_none(is_number), "a number or null"),
    "clip_skip": (_or_none(lambda v: v == 0 or is_size(v)), "a whole number or null"),
    "picture_digest": (text_check(64, 0), "a hash"),
    "placement": (
        _or_none(record_check(picture_size=_numbers(2), box=_numbers(4), canvas_size=_numbers(2), content=_numbers(4))),
        "null, or a record of picture_size, box, canvas_size and content",
    ),
    "made_with": (
        record_check(
            schedule=text_check(100_000, 0), family=text_check(200, 0), weights=mapping_check(_or_none(is_fingerprint)),
            loras=text_check(10_000, 0), identities=mapping_check(text_check(1000, 0)),
        ),
        "a record of schedule, family, weights, loras and identities",
    ),
    "tensors": (record_check(bytes=is_size, sha256=is_hash), "bytes and sha256 of the tensors"),
    "checksum": (is_hash, "a SHA-256"),
}  # fmt: skip


def write_inversion(save_directory: str | os.PathLike[str], inversion: Any) -> None:
    """Write ``inversion`` to a folder, which takes its place whole or not at all.

    Raises:
        ValueError: it was stopped before its end, its numbers are of a type that isn't saved, or the folder holds other
            things.
    """
    if inversion.interrupted:
        raise ValueError("This inversion was stopped before its end, so that nothing can be edited with it. " + _AGAIN)
    target = Path(save_directory).resolve()
    present = {entry.name for entry in target.iterdir()} if target.is_dir() else set()
    foreign = present if CONFIG_FILE not in present else present - MOST_BYTES.keys()
    if foreign or (target.exists() and not target.is_dir()):
        what = f"holds other files ({min(foreign)})" if foreign else "is a file"
        raise ValueError(f"{target} {what}; give a new folder for the inversion, or an inversion's.")
    held = {name: getattr(inversion, name) for name in _TENSORS}
    tensors = {name: one.detach().cpu().contiguous() for name, one in held.items() if one is not None}
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"The inversion's {name} is {tensor.dtype}; saved are float32, float16 and bfloat16.")
    data = safetensors.torch.save(tensors)
    made_with, placement = inversion.made_with, inversion.placement
    config: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "method": inversion.method,
        "prompt": inversion.prompt,
        "guidance_scale": inversion.guidance_scale,
        "clip_skip": inversion.clip_skip,
        "picture_digest": inversion.picture_digest,
        "placement": None if placement is None else {name: list(value) for name, value in asdict(placement).items()},
        "made_with": {
            "schedule": made_with.schedule,
            "family": made_with.family,
            "weights": dict(made_with.weights),
            "loras": made_with.loras,
            "identities": dict(made_with.identities),
        },
        "tensors": {"bytes": len(data), "sha256": sha256_of(data)},
    }
    config["checksum"] = checksum_of(config)
    _check_config(config, target / CONFIG_FILE)
    with atomic_folder(target) as folder:
        (folder / TENSORS_FILE).write_bytes(data)
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")


def read_inversion(folder: str | os.PathLike[str]) -> tuple[Mapping[str, Any], Mapping[str, torch.Tensor]]:
    """The fields of its JSON, and its tensors.

    Raises:
        ValueError: something is missing, damaged, too large, of a newer format or not what an inversion may hold.
    """
    folder = Path(folder).resolve()
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise ValueError(f"{folder} holds no {CONFIG_FILE}: it is no inversion that save_pretrained wrote.")
    try:
        config = parse_json(_read(file).decode("utf-8"))
        version = config["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error!r}). {_AGAIN}") from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format version {version!r} and this release reads {FORMAT_VERSION}: "
            "pip install --upgrade s2edit-pipeline, or invert again."
        )
    _check_config(config, file)
    if checksum_of(config) != config["checksum"]:
        raise ValueError(f"{file} is damaged or was changed by hand: its checksum is another. {_AGAIN}")
    data = _read(folder / TENSORS_FILE)
    if sha256_of(data) != config["tensors"]["sha256"]:
        raise ValueError(f"{folder / TENSORS_FILE} is damaged or another file: its SHA-256 isn't noted. {_AGAIN}")
    tensors, _ = tensors_of(folder / TENSORS_FILE, data)
    _check_tensors(tensors, folder / TENSORS_FILE)
    return config, tensors


def _read(file: Path) -> bytes:
    real = Path(os.path.realpath(file))
    if not real.is_file() or not stat.S_ISREG(real.stat().st_mode) or real.parent != file.parent:
        raise ValueError(f"{file} isn't there as an ordinary file. {_AGAIN}")
    size, most = real.stat().st_size, MOST_BYTES[file.name]
    if size > most:
        raise ValueError(f"{file} has {size:,} bytes; an inversion's has at most {most:,}. It was not read.")
    return real.read_bytes()


def _check_config(config: Any, file: Path) -> None:
    if config.keys() != _FIELDS.keys() | {"format_version"}:
        wrong = sorted(str(name)[:50] for name in config.keys() ^ (_FIELDS.keys() | {"format_version"}))
        raise ValueError(f"{file} lacks {wrong[0]!r}, or has it and shouldn't. {_AGAIN}")
    for name, (check, wanted) in _FIELDS.items():
        if not check(config[name]):
            raise ValueError(f"{file}: {name} must be {wanted}, not {str(config[name])[:80]!r}.")


def _check_tensors(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    """Whether they are a walk: as many embeddings and residuals as there are steps."""
    if "trajectory" not in tensors or not tensors.keys() <= set(_TENSORS):
        raise ValueError(f"{file} holds {', '.join(sorted(tensors))}; expected trajectory, and perhaps {_TENSORS[1:]}.")
    shape = tensors["trajectory"].shape
    wanted = {"residuals": (shape[0] - 1, *shape[1:])}
    if "unconditional_embeds" in tensors:
        wanted["unconditional_embeds"] = (shape[0] - 1, *tensors["unconditional_embeds"].shape[1:])
    if len(shape) != 4 or shape[0] < 2:
        raise ValueError(f"{file}: trajectory has the shape {tuple(shape)}; expected (N + 1, C, h, w).")
    for name, tensor in tensors.items():
        if name != "trajectory" and (tuple(tensor.shape) != wanted[name] or (name != "residuals" and tensor.ndim != 3)):
            raise ValueError(f"{file}: {name} has the shape {tuple(tensor.shape)} for a trajectory of {tuple(shape)}.")
