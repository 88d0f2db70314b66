"""An identity's folder: the one place where it is written, fetched and read.

Whoever publishes an identity isn't trusted. Only safetensors, JSON and PNG are opened, and only after their place, kind
and size were looked at; every value is checked against what may stand there; every data file against its SHA-256. So a
folder is read whole, or refused with a ``ValueError`` that names the file and what was expected.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import os
import re
import stat
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import safetensors.torch
import torch
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from PIL import Image

from .lora_format import pattern_name

FORMAT_VERSION = 2
CONFIG_FILE = "identity.json"
CARD_FILE = "README.md"
LORA_FILE = "pytorch_lora_weights.safetensors"
DIFFERENCES_FILE = "weight_differences.safetensors"
TOKEN_FILES = ("learned_embeds.safetensors", "reference_embeds.safetensors")
"""Of the identity's own token and of the reference attribute's: diffusers' loader takes files of one token alone."""
WEIGHT_FILES = (*TOKEN_FILES, LORA_FILE, DIFFERENCES_FILE)
MASK_FILES = ("mask.png", "reference_mask.png")
METHODS = ("full", "lora", "token")
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
ROW_KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
"""Text encoder -> its row's key in the file of a token that has several rows, as SDXL embeddings are published."""

_KIB, _MIB = 2**10, 2**20
_MOST_BYTES = {
    CONFIG_FILE: 512 * _KIB,
    LORA_FILE: 1024 * _MIB,
    DIFFERENCES_FILE: 16 * 1024 * _MIB,  # SDXL, exact, in float32
    **dict.fromkeys(TOKEN_FILES, _MIB),
    **dict.fromkeys(MASK_FILES, 4 * _MIB),
}
_MOST_HEADER_BYTES = 8 * _MIB
_MOST_MASK_SIDE = 4096
_MOST_FILES = 1000
_CAN_RUN_CODE = (
    ".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".joblib", ".dill", ".msgpack", ".h5", ".keras",
    ".py", ".pyc", ".so", ".dll", ".dylib", ".exe", ".sh", ".bat", ".jar",
)  # fmt: skip
_DTYPES = {"F32": (torch.float32, 4), "F16": (torch.float16, 2), "BF16": (torch.bfloat16, 2)}


@dataclass(frozen=True)
class IdentityFiles:
    """What the folder holds beside its card.

    Attributes:
        config: the JSON's fields, without those about the files themselves.
        rows: for the identity's token, then for the reference attribute's: text encoder -> (D,) float32.
        masks: for each of these (h, w) float32 in [0, 1], or None.
        lora: LoRA weights by diffusers' names, (r, in[, kh, kw]) and (out, r[, 1, 1]).
        lora_metadata: each component's rank, alpha and targets, as diffusers writes them.
        differences: parameter name -> difference to the base model.
    """

    config: Mapping[str, Any]
    rows: tuple[Mapping[str, torch.Tensor], ...]
    masks: tuple[torch.Tensor | None, ...]
    lora: Mapping[str, torch.Tensor]
    lora_metadata: Mapping[str, Any]
    differences: Mapping[str, torch.Tensor]


# ------------------------------------------------------------------------------ writing


def write_identity(folder: Path, files: IdentityFiles, card: str, previews: Mapping[str, Image.Image]) -> None:
    """Write ``files``, the card and the card's pictures (file name -> picture) into the empty ``folder``.

    Raises:
        ValueError: a field that :func:`read_identity` would refuse, or a file too large for it.
    """
    tokens = [files.config["token"]]
    if files.config["reference"] is not None:
        tokens.append(files.config["reference"]["token"])
    data: dict[str, bytes] = {}
    for file, token, rows in zip(TOKEN_FILES, tokens, files.rows, strict=False):
        data[file] = _tensors_to_bytes({_row_keys(rows, token)[name]: row for name, row in rows.items()})
    for file, mask in zip(MASK_FILES, files.masks, strict=False):
        if mask is not None:
            data[file] = _mask_to_bytes(mask)
    if files.lora:
        said = {"lora_adapter_metadata": json.dumps(dict(files.lora_metadata), sort_keys=True)}
        data[LORA_FILE] = _tensors_to_bytes(files.lora, said)
    if files.differences:
        data[DIFFERENCES_FILE] = _tensors_to_bytes(files.differences)
    listed = {name: {"bytes": len(held), "sha256": _sha256(held)} for name, held in data.items()}
    config = {"format_version": FORMAT_VERSION, **files.config, "files": listed}
    config["checksum"] = _checksum(config)
    _check_config(config, folder / CONFIG_FILE)
    data[CONFIG_FILE] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    for name, held in data.items():
        if len(held) > _MOST_BYTES[name]:
            raise ValueError(
                f"{name} would have {len(held):,} bytes, and no identity with more than {_MOST_BYTES[name]:,} there is "
                "loaded again. Nothing was saved; save it without exact=True, or fit it with a lower lora_rank."
            )
    for name, held in data.items():
        (folder / name).write_bytes(held)
    for name, picture in previews.items():
        picture.save(folder / name, format="PNG")
    (folder / CARD_FILE).write_text(card, "utf-8")


def _tensors_to_bytes(tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    return safetensors.torch.save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata)


def _mask_to_bytes(mask: torch.Tensor) -> bytes:
    held = io.BytesIO()
    Image.fromarray((mask.cpu().numpy() * 255).round().astype(np.uint8)).save(held, format="PNG")
    return held.getvalue()


def _row_keys(rows: Iterable[str], token: str) -> dict[str, str]:
    """Text encoder -> its row's key: the token itself where there is one row, as Stable Diffusion's learned words are
    published."""
    names = list(rows)
    return dict.fromkeys(names, token) if names == ["text_encoder"] else {name: ROW_KEYS[name] for name in names}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _checksum(config: Mapping[str, Any]) -> str:
    """Of all other fields, however the file is laid out."""
    others = {name: value for name, value in config.items() if name != "checksum"}
    return _sha256(json.dumps(others, sort_keys=True, ensure_ascii=True).encode())


# ------------------------------------------------------------------------------ fetching


def fetch_identity(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder ``name_or_path``, or where the Hub repository of that name was fetched to: an identity's own files
    alone, after a look at the names and sizes of all.

    Raises:
        ValueError: neither a folder nor a repository's name, or a repository with files that an identity can't have.
    """
    folder, name = Path(name_or_path), str(name_or_path)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise ValueError(f"{name} is not a folder; give an identity's folder or a Hub repository's name.")
    commit = None
    if not local_files_only and not constants.HF_HUB_OFFLINE:
        api = HfApi(token=token)
        try:
            # what is looked at and what is fetched are one commit, whatever is pushed meanwhile
            commit = api.model_info(name, revision=revision).sha
            tree = api.list_repo_tree(name, recursive=True, revision=commit)
            listed = {e.path: getattr(e, "size", None) for e in itertools.islice(tree, _MOST_FILES + 1)}
        except (RepositoryNotFoundError, RevisionNotFoundError, ValueError):
            raise  # no such repository, or not for this user
        except Exception:  # no Hub to be reached: what was fetched before will do, and is checked like any other
            commit, listed, local_files_only = None, {}, True
        _check_names(listed, name)
        for file, size in listed.items():
            if size is not None and size > _MOST_BYTES.get(file, math.inf):
                raise ValueError(_too_large(name, file, size))
    fetched = snapshot_download(
        name,
        revision=commit or revision,
        token=token,
        cache_dir=None if cache_dir is None else str(cache_dir),
        local_files_only=local_files_only,
        allow_patterns=list(_MOST_BYTES),
    )
    if commit is not None and commit != revision:
        # the Hub's cache notes which commit a branch's name stands for, so that it is found without a network too
        note = Path(fetched).parent.parent / "refs" / (revision or constants.DEFAULT_REVISION)
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(commit)
    return Path(fetched)


def _check_names(files: Iterable[str], where: object) -> None:
    names = list(itertools.islice(files, _MOST_FILES + 1))
    if len(names) > _MOST_FILES:
        raise ValueError(f"{where} holds more than {_MOST_FILES} files: it is no identity that save_pretrained wrote.")
    for name in names:
        if PurePosixPath(name.lower()).suffix in _CAN_RUN_CODE:
            raise ValueError(
                f"{where} holds {name}, of a kind that can run code when it is opened. An identity needs safetensors, "
                "JSON, PNG and Markdown alone: nothing was read. Don't use it, or take that file out."
            )


def _too_large(where: object, file: str, size: int) -> str:
    return f"{where}: {file} has {size:,} bytes; an identity's has at most {_MOST_BYTES[file]:,}. It was not read."


# ------------------------------------------------------------------------------ reading


def read_identity(folder: Path) -> IdentityFiles:
    """Everything in ``folder``, checked.

    Raises:
        ValueError: something is missing, damaged, too large, of a newer format or not what an identity may hold; the
            message says which file and what was expected.
    """
    folder = folder.resolve()
    _check_names(_names_within(folder), folder)
    if not (folder / CONFIG_FILE).exists():
        raise ValueError(f"{folder} holds no {CONFIG_FILE}: it is not an identity that save_pretrained wrote.")
    config = _read_config(folder)
    tokens = [config["token"], *([config["reference"]["token"]] if config["reference"] is not None else [])]
    data = {name: _read_listed(folder, name, said) for name, said in config["files"].items()}
    rows = tuple(_rows(folder / file, data[file], token) for file, token in zip(TOKEN_FILES, tokens, strict=False))
    if any(each.keys() != rows[0].keys() for each in rows):
        raise ValueError(f"{folder}: {TOKEN_FILES[1]} is for another family of models than {TOKEN_FILES[0]}.")
    masks = tuple(_mask(folder / f, data[f]) if f in data else None for f in MASK_FILES[: len(tokens)])
    lora: dict[str, torch.Tensor] = {}
    lora_metadata: dict[str, Any] = {}
    if LORA_FILE in data:
        lora, said = _tensors(folder / LORA_FILE, data[LORA_FILE])
        lora_metadata = _lora_metadata(folder / LORA_FILE, said, lora)
    differences: dict[str, torch.Tensor] = {}
    if DIFFERENCES_FILE in data:
        differences, _ = _tensors(folder / DIFFERENCES_FILE, data[DIFFERENCES_FILE])
        _check_tensor_names(folder / DIFFERENCES_FILE, differences, r"[\w.]+")
    about_files = ("format_version", "files", "checksum")
    said_of_it = {name: value for name, value in config.items() if name not in about_files}
    return IdentityFiles(said_of_it, rows, masks, lora, lora_metadata, differences)


def _names_within(folder: Path) -> Iterable[str]:
    for at, _, files in os.walk(folder):
        yield from (os.path.relpath(os.path.join(at, file), folder) for file in files)


def _read_bytes(folder: Path, name: str) -> bytes:
    """The bytes of ``folder``'s file ``name``: a regular file of a known size in that very folder."""
    real = Path(os.path.realpath(folder / name))
    # the Hub's cache lays links to its own blobs
    blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    if real.parent not in (folder, blobs):
        raise ValueError(f"{folder}: {name} is a link to {real}, outside the identity's folder. It was not read.")
    try:
        found = os.stat(real)
    except OSError as error:
        raise ValueError(f"{folder} lacks {name}: {error}. Fetch or save the identity again.") from error
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{folder}: {name} is no ordinary file. It was not read.")
    if found.st_size > _MOST_BYTES[name]:
        raise ValueError(_too_large(folder, name, found.st_size))
    return real.read_bytes()


def _read_listed(folder: Path, name: str, said: Mapping[str, Any]) -> bytes:
    data = _read_bytes(folder, name)
    if len(data) != said["bytes"]:
        raise ValueError(
            f"{folder}: {name} has {len(data):,} bytes and {CONFIG_FILE} says {said['bytes']:,}: it is cut short or "
            "another file. Fetch or save the identity again."
        )
    if _sha256(data) != said["sha256"]:
        raise ValueError(
            f"{folder}: {name} is damaged, its SHA-256 is not the one in {CONFIG_FILE}. "
            "Fetch or save the identity again."
        )
    return data


def _parse_json(text: str | bytes) -> Any:
    """Raises:
    ValueError, RecursionError: no JSON, or JSON with a name twice, with NaN or without an end to its depth.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a name stands there twice")
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number")

    return json.loads(text, object_pairs_hook=once, parse_constant=refuse)


# what may stand in identity.json


def _text(most: int, least: int = 1) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        return isinstance(value, str) and least <= len(value) <= most and not any(map(_is_control, value))

    return check


def _is_control(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs") and not character.isspace()


def _is_number(value: Any) -> bool:
    # compared, not converted: JSON's integers may be too large for a float
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 <= value <= 1e300


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, bool) or _is_number(value) or _text(200, 0)(value)


def _mapping(check: Callable[[Any], bool], most: int = 100) -> Callable[[Any], bool]:
    name = _text(100)
    return lambda v: isinstance(v, dict) and len(v) <= most and all(name(k) and check(held) for k, held in v.items())


def _record(**checks: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, dict) and v.keys() == checks.keys() and all(c(v[n]) for n, c in checks.items())


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**63


def _is_fingerprint(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 100 and all(map(_is_number, value))


_TOKEN_FIELDS = {"token": _text(100), "subject": _text(1000), "source_prompt": _text(10_000)}
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "token": (_TOKEN_FIELDS["token"], "a string of 1 to 100 characters"),
    "subject": (_TOKEN_FIELDS["subject"], "a string of 1 to 1,000 characters"),
    "source_prompt": (_TOKEN_FIELDS["source_prompt"], "a string of 1 to 10,000 characters"),
    "method": (lambda v: isinstance(v, str) and v in METHODS, f"one of {', '.join(METHODS)}"),
    "reference": (
        lambda v: v is None or _record(**_TOKEN_FIELDS)(v),
        "null, or a record of token, subject and source_prompt",
    ),
    "base_model": (_text(500, 0), "a string of at most 500 characters"),
    "base_fingerprint": (
        lambda v: _mapping(_is_fingerprint)(v) and v.keys() <= set(COMPONENTS),
        "at most 100 numbers for each component",
    ),
    "settings": (_mapping(_is_scalar), "at most 100 strings, numbers and truth values"),
    "measures": (_mapping(_is_number), "at most 100 numbers"),
    "library_versions": (_mapping(_text(100)), "at most 100 strings"),
    "files": (_mapping(_record(bytes=_is_size, sha256=_is_hash)), "bytes and sha256 of each file"),
    "checksum": (_is_hash, "a SHA-256"),
}


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    data = _read_bytes(folder, CONFIG_FILE)
    try:
        config = _parse_json(data.decode("utf-8"))
        version = config["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error!r}). Fetch or save the identity again.") from error
    if version != FORMAT_VERSION or isinstance(version, bool):
        newer = isinstance(version, int) and version > FORMAT_VERSION
        call = "pip install --upgrade s2edit-pipeline" if newer else "fit the identity again"
        raise ValueError(f"{file} has format version {version!r} and this release reads {FORMAT_VERSION}: {call}.")
    _check_config(config, file)
    if _checksum(config) != config["checksum"]:
        raise ValueError(
            f"{file} is damaged or was changed by hand: its checksum is another. Fetch the identity again; to rename "
            "one, load it and call renamed(...)."
        )
    return dict(config)


def _check_config(config: Mapping[str, Any], file: Path) -> None:
    """The fields one by one, and whether the files listed are those that such an identity has."""
    missing, unknown = _FIELDS.keys() - config.keys(), config.keys() - _FIELDS.keys() - {"format_version"}
    if missing or unknown:
        said = [f"lacks {', '.join(sorted(missing))}"] if missing else []
        said += [f"has the unknown {', '.join(sorted(repr(str(u)[:50]) for u in unknown))}"] if unknown else []
        raise ValueError(
            f"{file} {' and '.join(said)}. If a later release wrote it: pip install --upgrade s2edit-pipeline."
        )
    for name, (check, wanted) in _FIELDS.items():
        if not check(config[name]):
            raise ValueError(f"{file}: {name} must be {wanted}, not {str(config[name])[:80]!r}.")
    if config["reference"] is not None and config["reference"]["token"] == config["token"]:
        raise ValueError(f"{file}: the identity and its reference attribute are both {config['token']!r}.")
    count = 1 if config["reference"] is None else 2
    needed = {*TOKEN_FILES[:count], *([LORA_FILE] if config["method"] == "lora" else [])}
    possible = {*needed, *MASK_FILES[:count], *([LORA_FILE, DIFFERENCES_FILE] if config["method"] == "full" else [])}
    listed = set(config["files"])
    outside = sorted(name for name in listed - possible if "/" in name or "\\" in name or name.startswith("."))
    if outside:
        raise ValueError(f"{file} lists {outside[0]!r}, a path outside the identity's folder. Nothing was read.")
    if not needed <= listed <= possible:
        raise ValueError(
            f"{file} lists the files {', '.join(sorted(listed))}; an identity of method {config['method']!r} has "
            f"{', '.join(sorted(needed))} and may have {', '.join(sorted(possible - needed))}."
        )


# what may stand in the tensors' files


def _tensors(file: Path, data: bytes) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a safetensors file and its metadata; the header is checked before anything is made of it."""
    length = int.from_bytes(data[:8], "little") if len(data) >= 8 else -1
    if not 0 < length <= min(len(data) - 8, _MOST_HEADER_BYTES):
        raise ValueError(f"{file} declares a header of {length:,} bytes and has {len(data):,} in all: it is damaged.")
    try:
        header = _parse_json(data[8 : 8 + length].decode("utf-8"))
        metadata = header.pop("__metadata__", {})
        spans = {name: (e["dtype"], e["shape"], e["data_offsets"]) for name, e in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} has a damaged header ({error!r}). Fetch or save the identity again.") from error
    expected = 0
    for name, (dtype, shape, offsets) in sorted(spans.items(), key=lambda item: _start(item[1][2])):
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise ValueError(f"{file}: {name!r} is {dtype!r}; an identity's tensors are {', '.join(_DTYPES)}.")
        if not isinstance(shape, list) or not all(map(_is_size, shape)) or not 1 <= len(shape) <= 4:
            raise ValueError(
                f"{file}: {name!r} has the shape {str(shape)[:80]}; expected 1 to 4 whole numbers above 0."
            )
        size = math.prod(shape) * _DTYPES[dtype][1]
        if offsets != [expected, expected + size]:
            raise ValueError(
                f"{file}: {name!r} declares {size:,} bytes and the place {str(offsets)[:80]}; "
                f"expected [{expected}, {expected + size}]."
            )
        expected += size
    if expected != len(data) - 8 - length:
        raise ValueError(f"{file} declares {expected:,} bytes of numbers and has {len(data) - 8 - length:,}.")
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{file}: its metadata must be strings.")
    try:
        tensors = safetensors.torch.load(data)
    except Exception as error:  # its own reader is stricter still
        raise ValueError(f"{file} is damaged: {error}. Fetch or save the identity again.") from error
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{file}: {name!r} holds values that are no numbers (NaN or infinity).")
    return tensors, metadata


def _start(offsets: Any) -> int:
    return offsets[0] if isinstance(offsets, list) and offsets and isinstance(offsets[0], int) else -1


def _rows(file: Path, data: bytes, token: str) -> dict[str, torch.Tensor]:
    held, _ = _tensors(file, data)
    names = tuple(ROW_KEYS) if set(held) == set(ROW_KEYS.values()) else ("text_encoder",)
    keys = _row_keys(names, token)
    if set(held) != set(keys.values()):
        raise ValueError(
            f"{file} holds {', '.join(sorted(held))}; expected {token}, or {' and '.join(ROW_KEYS.values())}."
        )
    for key, row in held.items():
        if row.numel() != row.shape[-1] or row.dtype != torch.float32:
            raise ValueError(f"{file}: {key!r} is {row.dtype} of {tuple(row.shape)}; expected one float32 row.")
    return {name: held[key].reshape(-1) for name, key in keys.items()}


def _mask(file: Path, data: bytes) -> torch.Tensor:
    """(h, w) float32 in [0, 1]."""
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            if max(picture.size) > _MOST_MASK_SIDE:
                raise ValueError(f"it is {picture.width} x {picture.height}, at most {_MOST_MASK_SIDE} a side may be")
            if picture.mode != "L":
                raise ValueError(f"it is of mode {picture.mode!r}, expected 'L'")
            return torch.from_numpy(np.asarray(picture) / np.float32(255))
    except Exception as error:  # whatever a decoder comes upon
        raise ValueError(f"{file} can't be read as a mask: {error}. Fetch or save the identity again.") from error


def _check_tensor_names(file: Path, tensors: Iterable[str], pattern: str) -> None:
    wanted = rf"({'|'.join(COMPONENTS)})\.{pattern}"
    for name in tensors:
        if not re.fullmatch(wanted, name, flags=re.ASCII):
            raise ValueError(f"{file} holds {name[:80]!r}, which is no name of a weight that an identity changes.")


def _is_rank(value: Any) -> bool:
    return _is_size(value) and value <= 2**16


def _is_alpha(value: Any) -> bool:
    return _is_number(value) and 0 < value <= 2**16


_LORA_FIELDS: dict[str, Callable[[Any], bool]] = {
    "r": _is_rank,
    "lora_alpha": _is_alpha,
    "target_modules": lambda v: isinstance(v, list) and all(map(_text(500), v)),
    "rank_pattern": lambda v: isinstance(v, dict) and all(map(_is_rank, v.values())),
    "alpha_pattern": lambda v: isinstance(v, dict) and all(map(_is_alpha, v.values())),
    "lora_dropout": _is_number,
    # these would make another formula of it
    "bias": lambda v: v == "none",
    "use_dora": lambda v: v is False,
    "use_rslora": lambda v: v is False,
    "lora_bias": lambda v: v is False,
}


def _lora_metadata(file: Path, metadata: Mapping[str, str], weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    _check_tensor_names(file, weights, r"[\w.]+\.lora_[AB]\.weight")
    try:
        said = _parse_json(metadata["lora_adapter_metadata"])
    except (KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} lacks the LoRA's metadata or has it damaged ({error!r}).") from error
    components = {name.split(".")[0] for name in weights}
    wanted = {f"{component}.{name}": check for component in components for name, check in _LORA_FIELDS.items()}
    wrong = wanted.keys() ^ said.keys() if isinstance(said, dict) else {"lora_adapter_metadata"}
    wrong = wrong or {name for name, check in wanted.items() if not check(said[name])}
    if wrong:
        raise ValueError(f"{file}: the LoRA's metadata lacks {sorted(wrong)[0][:80]!r}, or has it as none it may be.")
    for layer in {name.rsplit(".lora_", 1)[0] for name in weights}:
        component, _, inner = layer.partition(".")
        rank = said[f"{component}.rank_pattern"].get(pattern_name(inner), said[f"{component}.r"])
        down, up = (weights.get(f"{layer}.lora_{part}.weight") for part in "AB")
        if down is None or up is None:
            raise ValueError(f"{file}: {layer} has one factor of its LoRA and lacks the other.")
        fits = down.shape[0] == up.shape[1] == rank if up.ndim == down.ndim and up.ndim in (2, 4) else False
        if not fits or (up.ndim == 4 and tuple(up.shape[2:]) != (1, 1)):
            raise ValueError(
                f"{file}: {layer} has factors of {tuple(down.shape)} and {tuple(up.shape)}, which don't make a LoRA of "
                f"the rank {rank} that its metadata says."
            )
    return dict(said)
