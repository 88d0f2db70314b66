"""An identity's folder: the one place where it is written, fetched and read.

Whoever publishes an identity isn't trusted. Only safetensors, JSON and PNG are opened, and only after their place, kind
and size were looked at; every value is checked against what may stand there; every data file against its SHA-256. So a
folder is read whole, or refused with a ``ValueError`` that names the file and what was expected.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import safetensors.torch
import torch
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from PIL import Image

from .identity_schema import (
    CARD_FILE,
    CONFIG_FILE,
    DIFFERENCES_FILE,
    FORMAT_VERSION,
    LORA_FILE,
    MASK_FILES,
    MOST_BYTES,
    READABLE_VERSIONS,
    ROW_KEYS,
    TOKEN_FILES,
    check_config,
    check_tensor_names,
    checksum_of,
    lora_metadata_of,
    parse_json,
    row_keys,
    rows_of_keys,
    sha256_of,
    tensors_of,
)

_MOST_MASK_SIDE = 4096
_MOST_FILES = 1000
_CAN_RUN_CODE = (
    ".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".joblib", ".dill", ".msgpack", ".h5", ".keras",
    ".py", ".pyc", ".so", ".dll", ".dylib", ".exe", ".sh", ".bat", ".jar",
)  # fmt: skip


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
        data[file] = _tensors_to_bytes({row_keys(rows, token)[name]: row for name, row in rows.items()})
    for file, mask in zip(MASK_FILES, files.masks, strict=False):
        if mask is not None:
            data[file] = _mask_to_bytes(mask)
    if files.lora:
        header = {"lora_adapter_metadata": json.dumps(dict(files.lora_metadata), sort_keys=True)}
        data[LORA_FILE] = _tensors_to_bytes(files.lora, header)
    if files.differences:
        data[DIFFERENCES_FILE] = _tensors_to_bytes(files.differences)
    listed = {name: {"bytes": len(content), "sha256": sha256_of(content)} for name, content in data.items()}
    config = {"format_version": FORMAT_VERSION, **files.config, "files": listed}
    config["checksum"] = checksum_of(config)
    check_config(config, folder / CONFIG_FILE)
    data[CONFIG_FILE] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    for name, content in data.items():
        if len(content) > MOST_BYTES[name]:
            raise ValueError(
                f"{name} would have {len(content):,} bytes, and no identity with more than {MOST_BYTES[name]:,} there "
                "is loaded again. Nothing was saved; save it without exact=True, or fit it with a lower lora_rank."
            )
    for name, content in data.items():
        (folder / name).write_bytes(content)
    for name, picture in previews.items():
        picture.save(folder / name, format="PNG")
    (folder / CARD_FILE).write_text(card, "utf-8")


def _tensors_to_bytes(tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    return safetensors.torch.save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata)


def _mask_to_bytes(mask: torch.Tensor) -> bytes:
    file = io.BytesIO()
    Image.fromarray((mask.cpu().numpy() * 255).round().astype(np.uint8)).save(file, format="PNG")
    return file.getvalue()


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
    if folder.is_file():
        raise ValueError(f"{name} is a file; give the identity's folder, {folder.parent}.")
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
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
            if size is not None and size > MOST_BYTES.get(file, math.inf):
                raise ValueError(_too_large(name, file, size))
    try:
        fetched = snapshot_download(
            name,
            revision=commit or revision,
            token=token,
            cache_dir=None if cache_dir is None else str(cache_dir),
            local_files_only=local_files_only,
            allow_patterns=list(MOST_BYTES),
        )
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{name!r} is no folder here, and the Hub, which can't be reached or isn't to be asked, gave none of that "
            "name before; look at the spelling."
        ) from error
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
    return f"{where}: {file} has {size:,} bytes; an identity's has at most {MOST_BYTES[file]:,}. It was not read."


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
    data = {name: _read_listed(folder, name, listed) for name, listed in config["files"].items()}
    rows = tuple(_rows(folder / file, data[file], token) for file, token in zip(TOKEN_FILES, tokens, strict=False))
    if any(each.keys() != rows[0].keys() for each in rows):
        raise ValueError(f"{folder}: {TOKEN_FILES[1]} is for another family of models than {TOKEN_FILES[0]}.")
    masks = tuple(_mask(folder / f, data[f]) if f in data else None for f in MASK_FILES[: len(tokens)])
    lora: dict[str, torch.Tensor] = {}
    lora_metadata: dict[str, Any] = {}
    if LORA_FILE in data:
        lora, header = tensors_of(folder / LORA_FILE, data[LORA_FILE])
        lora_metadata = lora_metadata_of(folder / LORA_FILE, header, lora)
    differences: dict[str, torch.Tensor] = {}
    if DIFFERENCES_FILE in data:
        differences, _ = tensors_of(folder / DIFFERENCES_FILE, data[DIFFERENCES_FILE])
        check_tensor_names(folder / DIFFERENCES_FILE, differences, r"[\w.]+")
    about_files = ("format_version", "files", "checksum")
    fields = {name: value for name, value in config.items() if name not in about_files}
    return IdentityFiles(fields, rows, masks, lora, lora_metadata, differences)


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
        status = os.stat(real)
    except OSError as error:
        raise ValueError(f"{folder} lacks {name}: {error}. Fetch or save the identity again.") from error
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{folder}: {name} is no ordinary file. It was not read.")
    if status.st_size > MOST_BYTES[name]:
        raise ValueError(_too_large(folder, name, status.st_size))
    return real.read_bytes()


def _read_listed(folder: Path, name: str, listed: Mapping[str, Any]) -> bytes:
    data = _read_bytes(folder, name)
    if len(data) != listed["bytes"]:
        raise ValueError(
            f"{folder}: {name} has {len(data):,} bytes and {CONFIG_FILE} says {listed['bytes']:,}: it is cut short or "
            "another file. Fetch or save the identity again."
        )
    if sha256_of(data) != listed["sha256"]:
        raise ValueError(
            f"{folder}: {name} is damaged, its SHA-256 is not the one in {CONFIG_FILE}. "
            "Fetch or save the identity again."
        )
    return data


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    data = _read_bytes(folder, CONFIG_FILE)
    try:
        config = parse_json(data.decode("utf-8"))
        version = config["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error!r}). Fetch or save the identity again.") from error
    if type(version) is not int or version not in READABLE_VERSIONS:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        call = "pip install --upgrade s2edit-pipeline" if newer else "fit the identity again"
        readable = " and ".join(map(str, READABLE_VERSIONS))
        raise ValueError(f"{file} has format version {version!r} and this release reads {readable}: {call}.")
    check_config(config, file)
    if checksum_of(config) != config["checksum"]:
        raise ValueError(
            f"{file} is damaged or was changed by hand: its checksum is another. Fetch the identity again; to rename "
            "one, load it and call renamed(...)."
        )
    return dict(config)


def _rows(file: Path, data: bytes, token: str) -> dict[str, torch.Tensor]:
    """Text encoder -> (D,) float32."""
    tensors, _ = tensors_of(file, data)
    keys = rows_of_keys(tensors, token)
    if keys is None:
        families = "; ".join(" and ".join(each) for each in ROW_KEYS.values())
        raise ValueError(f"{file} holds {', '.join(sorted(tensors))}; expected {token}, or one of: {families}.")
    for key, row in tensors.items():
        if row.numel() != row.shape[-1] or row.dtype != torch.float32:
            raise ValueError(f"{file}: {key!r} is {row.dtype} of {tuple(row.shape)}; expected one float32 row.")
    return {name: tensors[key].reshape(-1) for name, key in keys.items()}


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
