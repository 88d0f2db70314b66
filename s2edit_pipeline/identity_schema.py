"""What may stand in an identity's files: the fields of its JSON, the tensors' headers, the LoRA's metadata.

Whoever publishes an identity isn't trusted: every value is checked against what may stand there before anything is
made of it, and refused with a ``ValueError`` that names the file and what was expected.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from .identity_lora_names import pattern_name

FORMAT_VERSION = 3
READABLE_VERSIONS = (2, 3)
"""2 knows seven weights of each of its base model's components; 3 has a fingerprint of all of them."""
CONFIG_FILE = "identity.json"
CARD_FILE = "README.md"
LORA_FILE = "pytorch_lora_weights.safetensors"
DIFFERENCES_FILE = "weight_differences.safetensors"
TOKEN_FILES = ("learned_embeds.safetensors", "reference_embeds.safetensors")
"""Of the identity's own token and of the reference attribute's: diffusers' loader takes files of one token alone."""
WEIGHT_FILES = (*TOKEN_FILES, LORA_FILE, DIFFERENCES_FILE)
MASK_FILES = ("mask.png", "reference_mask.png")
METHODS = ("full", "lora", "token")
DENOISERS = ("unet", "transformer")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
COMPONENTS = (*DENOISERS, *TEXT_ENCODERS)
ROW_KEYS = {
    ("text_encoder", "text_encoder_2"): ("clip_l", "clip_g"),
    ("text_encoder", "text_encoder_2", "text_encoder_3"): ("clip_l", "clip_g", "t5"),
    ("text_encoder_2",): ("t5",),
}
"""Text encoders that a token has rows for -> the rows' keys in its file, as embeddings are published: of SDXL, of
Stable Diffusion 3, and of FLUX, whose CLIP gives no columns."""

_KIB, _MIB = 2**10, 2**20
MOST_BYTES = {
    CONFIG_FILE: 512 * _KIB,
    LORA_FILE: 1024 * _MIB,
    DIFFERENCES_FILE: 16 * 1024 * _MIB,  # SDXL, exact, in float32
    **dict.fromkeys(TOKEN_FILES, _MIB),
    **dict.fromkeys(MASK_FILES, 4 * _MIB),
}
_MOST_HEADER_BYTES = 8 * _MIB
_DTYPES = {"F32": (torch.float32, 4), "F16": (torch.float16, 2), "BF16": (torch.bfloat16, 2)}


def row_keys(rows: Iterable[str], token: str) -> dict[str, str]:
    """Text encoder -> its row's key: the token itself where the first text encoder alone has a row, as Stable
    Diffusion's learned words are published; a set of encoders that no other program knows goes by their names."""
    names = tuple(sorted(rows))
    if names == ("text_encoder",):
        return {"text_encoder": token}
    return dict(zip(names, ROW_KEYS.get(names, names), strict=True))


def rows_of_keys(keys: Iterable[str], token: str) -> dict[str, str] | None:
    """Text encoder -> its row's key, of a file that has just these ``keys``; None where no identity's file has."""
    wanted = set(keys)
    known = [("text_encoder",), *ROW_KEYS, *([tuple(wanted)] if wanted and wanted <= set(TEXT_ENCODERS) else [])]
    return next((keys_there for names in known if set((keys_there := row_keys(names, token)).values()) == wanted), None)


# ------------------------------------------------------------------------------ identity.json


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def checksum_of(config: Mapping[str, Any]) -> str:
    """Of all other fields, however the file is laid out."""
    others = {name: value for name, value in config.items() if name != "checksum"}
    return sha256_of(json.dumps(others, sort_keys=True, ensure_ascii=True).encode())


def parse_json(text: str | bytes) -> Any:
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


def text_check(most: int, least: int = 1) -> Callable[[Any], bool]:
    """Whether a value is a string of so many characters, without control characters."""

    def check(value: Any) -> bool:
        return isinstance(value, str) and least <= len(value) <= most and not any(map(_is_control, value))

    return check


def _is_control(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs") and not character.isspace()


def is_number(value: Any) -> bool:
    """Whether it is a number that a float can hold."""
    # compared, not converted: JSON's integers may be too large for a float
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 <= value <= 1e300


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, bool) or is_number(value) or text_check(200, 0)(value)


def mapping_check(check: Callable[[Any], bool], most: int = 100) -> Callable[[Any], bool]:
    """Whether a value is an object of at most so many fields, each of which passes ``check``."""
    name = text_check(100)
    return lambda v: isinstance(v, dict) and len(v) <= most and all(name(k) and check(value) for k, value in v.items())


def record_check(**checks: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Whether a value is an object of just these fields, each of which passes its own check."""
    return lambda v: isinstance(v, dict) and v.keys() == checks.keys() and all(c(v[n]) for n, c in checks.items())


def is_hash(value: Any) -> bool:
    """Whether it is a SHA-256."""
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def is_size(value: Any) -> bool:
    """Whether it is a whole number above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**63


def _numbers(most: int) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, list) and len(v) <= most and all(map(is_number, v))


def _is_count(value: Any) -> bool:
    return (value == 0 and type(value) is int) or is_size(value)


_is_full_fingerprint = record_check(
    dtype=text_check(30),
    count=_is_count,
    squares=_numbers(64),
    sums=_numbers(64),
    word_rows=_is_count,
    word_sums=_numbers(1000),
    word_squares=_numbers(1000),
)


def is_fingerprint(value: Any) -> bool:
    """Whether it is what ``identity_fingerprint.fingerprint`` gives, or a list of numbers as version 2 had it."""
    return _numbers(100)(value) or _is_full_fingerprint(value)


_TOKEN_FIELDS = {"token": text_check(100), "subject": text_check(1000), "source_prompt": text_check(10_000)}
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "token": (_TOKEN_FIELDS["token"], "a string of 1 to 100 characters"),
    "subject": (_TOKEN_FIELDS["subject"], "a string of 1 to 1,000 characters"),
    "source_prompt": (_TOKEN_FIELDS["source_prompt"], "a string of 1 to 10,000 characters"),
    "method": (lambda v: isinstance(v, str) and v in METHODS, f"one of {', '.join(METHODS)}"),
    "reference": (
        lambda v: v is None or record_check(**_TOKEN_FIELDS)(v),
        "null, or a record of token, subject and source_prompt",
    ),
    "base_model": (text_check(500, 0), "a string of at most 500 characters"),
    "base_fingerprint": (
        lambda v: mapping_check(is_fingerprint)(v) and v.keys() <= set(COMPONENTS),
        "a fingerprint of each component, or at most 100 numbers",
    ),
    "settings": (mapping_check(_is_scalar), "at most 100 strings, numbers and truth values"),
    "measures": (mapping_check(is_number), "at most 100 numbers"),
    "library_versions": (mapping_check(text_check(100)), "at most 100 strings"),
    "files": (mapping_check(record_check(bytes=is_size, sha256=is_hash)), "bytes and sha256 of each file"),
    "checksum": (is_hash, "a SHA-256"),
}


def check_config(config: Mapping[str, Any], file: Path) -> None:
    """The fields one by one, and whether the files listed are those that such an identity has."""
    missing, unknown = _FIELDS.keys() - config.keys(), config.keys() - _FIELDS.keys() - {"format_version"}
    if missing or unknown:
        faults = [f"lacks {', '.join(sorted(missing))}"] if missing else []
        faults += [f"has the unknown {', '.join(sorted(repr(str(u)[:50]) for u in unknown))}"] if unknown else []
        raise ValueError(
            f"{file} {' and '.join(faults)}. If a later release wrote it: pip install --upgrade s2edit-pipeline."
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


# ------------------------------------------------------------------------------ the tensors' files


def tensors_of(file: Path, data: bytes) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a safetensors file and its metadata; the header is checked before anything is made of it."""
    length = int.from_bytes(data[:8], "little") if len(data) >= 8 else -1
    if not 0 < length <= min(len(data) - 8, _MOST_HEADER_BYTES):
        raise ValueError(f"{file} declares a header of {length:,} bytes and has {len(data):,} in all: it is damaged.")
    try:
        header = parse_json(data[8 : 8 + length].decode("utf-8"))
        metadata = header.pop("__metadata__", {})
        spans = {name: (e["dtype"], e["shape"], e["data_offsets"]) for name, e in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} has a damaged header ({error!r}). Fetch or save it again.") from error
    expected = 0
    for name, (dtype, shape, offsets) in sorted(spans.items(), key=lambda item: _start(item[1][2])):
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise ValueError(f"{file}: {name!r} is {dtype!r}; expected are {', '.join(_DTYPES)}.")
        if not isinstance(shape, list) or not all(map(is_size, shape)) or not 1 <= len(shape) <= 4:
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
        raise ValueError(f"{file} is damaged: {error}. Fetch or save it again.") from error
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{file}: {name!r} holds values that are no numbers (NaN or infinity).")
    return tensors, metadata


def _start(offsets: Any) -> int:
    return offsets[0] if isinstance(offsets, list) and offsets and isinstance(offsets[0], int) else -1


def check_tensor_names(file: Path, tensors: Iterable[str], pattern: str) -> None:
    wanted = rf"({'|'.join(COMPONENTS)})\.{pattern}"
    for name in tensors:
        if not re.fullmatch(wanted, name, flags=re.ASCII):
            raise ValueError(f"{file} holds {name[:80]!r}, which is no name of a weight that an identity changes.")


def _is_rank(value: Any) -> bool:
    return is_size(value) and value <= 2**16


def _is_alpha(value: Any) -> bool:
    return is_number(value) and 0 < value <= 2**16


_LORA_FIELDS: dict[str, Callable[[Any], bool]] = {
    "r": _is_rank,
    "lora_alpha": _is_alpha,
    "target_modules": lambda v: isinstance(v, list) and all(map(text_check(500), v)),
    "rank_pattern": lambda v: isinstance(v, dict) and all(map(_is_rank, v.values())),
    "alpha_pattern": lambda v: isinstance(v, dict) and all(map(_is_alpha, v.values())),
    "lora_dropout": is_number,
    # these would make another formula of it
    "bias": lambda v: v == "none",
    "use_dora": lambda v: v is False,
    "use_rslora": lambda v: v is False,
    "lora_bias": lambda v: v is False,
}


def lora_metadata_of(file: Path, metadata: Mapping[str, str], weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    check_tensor_names(file, weights, r"[\w.]+\.lora_[AB]\.weight")
    try:
        fields = parse_json(metadata["lora_adapter_metadata"])
    except (KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} lacks the LoRA's metadata or has it damaged ({error!r}).") from error
    components = {name.split(".")[0] for name in weights}
    wanted = {f"{component}.{name}": check for component in components for name, check in _LORA_FIELDS.items()}
    wrong = wanted.keys() ^ fields.keys() if isinstance(fields, dict) else {"lora_adapter_metadata"}
    wrong = wrong or {name for name, check in wanted.items() if not check(fields[name])}
    if wrong:
        raise ValueError(f"{file}: the LoRA's metadata lacks {sorted(wrong)[0][:80]!r}, or has it as none it may be.")
    for layer in {name.rsplit(".lora_", 1)[0] for name in weights}:
        component, _, inner = layer.partition(".")
        rank = fields[f"{component}.rank_pattern"].get(pattern_name(inner), fields[f"{component}.r"])
        down, up = (weights.get(f"{layer}.lora_{part}.weight") for part in "AB")
        if down is None or up is None:
            raise ValueError(f"{file}: {layer} has one factor of its LoRA and lacks the other.")
        fits = down.shape[0] == up.shape[1] == rank if up.ndim == down.ndim and up.ndim in (2, 4) else False
        if not fits or (up.ndim == 4 and tuple(up.shape[2:]) != (1, 1)):
            raise ValueError(
                f"{file}: {layer} has factors of {tuple(down.shape)} and {tuple(up.shape)}, which don't make a LoRA of "
                f"the rank {rank} that its metadata says."
            )
    return dict(fields)
