"""Which base model an identity belongs to: a fingerprint in which every weight counts, whatever type it is loaded in.

Pseudo-random projections of the weights. A tensor is laid out in rows of 4,096; a fixed pattern of signs takes each row
to one number (level one), a factor of the row's own adds the numbers up (level two)::

    s_b = sum over tensors t of bucket b and rows r:  c[t, r] * sum_k  e[k] * w[t, r, k],   e = +-1,  0.5 <= |c| <= 1.5

Changing any weight by ``d`` moves its bucket's sum by at least ``d / 2``. Rounding all of them to a smaller type moves
it by a sum of independent errors, whose variance is known: so the same model is recognised in another type, and another
model isn't. One pass over the weights, and no copy of them.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .identity_lora_names import pattern_name
from .offloaded_weights import stored, unreadable
from .packed_weights import is_packed, kind_of, stored_parts
from .prompt_tokens import embedding_modules

BUCKETS = 64
VECTOR_BUCKETS = 16
ROW_LENGTH = 4096
ROWS_AT_A_TIME = 64
"""On the CPU: what is read for the projections is still in the cache for the squares. Elsewhere more at a time."""
WORDS_OF_A_BLOCK = 4096
EXACT_TOLERANCE = 1e-6
"""Of a bucket's norm: what sums in float32 in another order differ by."""
ROUNDING_SIGMAS = 6.0


# ------------------------------------------------------------------------------ the weights that count


def base_parameters(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, parameter) of ``module``'s own weights: what PEFT has wrapped by its name without, and at its place;
    adapters attached to it, IP-Adapter's among them, are left out. A shared parameter comes once. Of those that
    accelerate has offloaded, the tensors that it keeps."""
    seen: set[Any] = set()
    for name, parameter in _walk(module, "", _is_ip_adapted(module)):
        if _itself(parameter) not in seen:
            seen.add(_itself(parameter))
            yield name, parameter


def _itself(tensor: torch.Tensor) -> Any:
    """The same for a parameter that is shared; what accelerate keeps are other tensors over the same memory."""
    if isinstance(tensor, nn.Parameter):
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape)


def _walk(module: nn.Module, prefix: str, skips_ip_adapter: bool) -> Iterator[tuple[str, torch.Tensor]]:
    while isinstance(module, BaseTunerLayer):
        module = module.base_layer
    for name in module._parameters:
        parameter = stored(module, name)
        if parameter is not None:
            yield prefix + name, parameter
    for name, child in module._modules.items():
        # an attention processor has weights only where an adapter gave it some
        if child is not None and name != "processor" and not (skips_ip_adapter and name == "encoder_hid_proj"):
            yield from _walk(child, f"{prefix}{name}.", False)


def _is_ip_adapted(module: nn.Module) -> bool:
    return getattr(getattr(module, "config", None), "encoder_hid_dim_type", None) == "ip_image_proj"


def _word_table(module: nn.Module) -> torch.Tensor | None:
    """A text encoder's token embedding."""
    return stored(embedding_modules(module)[0], "weight") if hasattr(module, "get_input_embeddings") else None


# ------------------------------------------------------------------------------ pseudo-random factors


def _hashed(numbers: np.ndarray) -> np.ndarray:
    """64 bits of each, without a pattern: the output function of SplitMix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        z = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@cache
def _signs() -> torch.Tensor:
    """e: (ROW_LENGTH,) float32 of +-1."""
    bits = _hashed(np.arange(ROW_LENGTH, dtype=np.uint64)) >> np.uint64(63)
    return torch.from_numpy(1 - 2 * bits.astype(np.float32))


@lru_cache(maxsize=4096)
def _factors(name: str, count: int) -> torch.Tensor:
    """c of the tensor ``name``: (count,) float64, of either sign, from 0.5 to 1.5."""
    start = np.frombuffer(hashlib.sha256(name.encode()).digest()[:8], dtype="<u8")[0]
    with np.errstate(over="ignore"):
        bits = _hashed(start + np.arange(count, dtype=np.uint64))
    size = 0.5 + (bits >> np.uint64(11)).astype(np.float64) / 2.0**53
    return torch.from_numpy(np.where(bits & np.uint64(1), size, -size))


# ------------------------------------------------------------------------------ one pass over the weights


class _Bucket:
    """Sums over the tensors that fell into it: the projection, the squares, and the variance of rounding errors."""

    def __init__(self) -> None:
        self.projections: list[torch.Tensor] = []
        self.squares: list[torch.Tensor] = []
        self.variances: list[torch.Tensor] = []

    def add(self, name: str, tensor: torch.Tensor, made_in: torch.dtype | None) -> None:
        """Take ``tensor`` in; ``made_in``: the type that the other fingerprint's weights were in, None where there is
        none and the squares are wanted instead."""
        flat = tensor.detach().reshape(-1)  # a view, but of channels-last convolutions
        device = _summing_device(flat)
        signs, factors = _signs().to(device), _factors(name, math.ceil(len(flat) / ROW_LENGTH)).to(device)
        rounding = _roundings(tensor.dtype, made_in)
        step = ROWS_AT_A_TIME if device.type == "cpu" else 256 * ROWS_AT_A_TIME
        for first in range(0, len(factors), step):
            part = flat[first * ROW_LENGTH : (first + step) * ROW_LENGTH].to(device).float()
            self.variances += [_rounding_variances(part, dtype).sum() for dtype in rounding]
            if made_in is None:
                self.squares.append(torch.dot(part, part).double())
            whole = len(part) // ROW_LENGTH
            rows, rest = part[: whole * ROW_LENGTH].view(whole, ROW_LENGTH), part[whole * ROW_LENGTH :]
            # tensor cores would round the weights: not a matrix product there
            projected = torch.mv(rows, signs) if device.type == "cpu" else (rows * signs).sum(1, dtype=torch.float64)
            self.projections.append(torch.dot(projected.double(), factors[first : first + whole]))
            if len(rest):
                tail = (rest * signs[: len(rest)]).sum(dtype=torch.float64)
                self.projections.append(tail * factors[first + whole])

    def agrees(self, projection: float, squares: float) -> bool:
        """Whether a bucket of these sums may have been of the same weights."""
        tolerance = EXACT_TOLERANCE * max(squares, 0.0) ** 0.5 + ROUNDING_SIGMAS * _total(self.variances) ** 0.5
        return abs(projection - _total(self.projections)) <= tolerance  # NaN agrees with nothing


def _total(parts: list[torch.Tensor]) -> float:
    return float(torch.stack(parts).sum()) if parts else 0.0


def _summing_device(tensor: torch.Tensor) -> torch.device:
    """Its own, where that has float64."""
    return tensor.device if tensor.device.type in ("cpu", "cuda") else torch.device("cpu")


def _roundings(dtype: torch.dtype, made_in: torch.dtype | None) -> set[torch.dtype]:
    """The types whose rounding tells weights of ``dtype`` from those that the other fingerprint was made of."""
    return {dtype, made_in} if dtype.is_floating_point and made_in is not None and made_in != dtype else set()


def _rounding_variances(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Of c times each rounding error: uniform within a step of ``dtype``'s numbers there, step^2 / 12."""
    info = torch.finfo(dtype)
    exponents = (values.view(torch.int32) & 0x7F800000).view(torch.float32)  # the power of two at or below each
    steps = info.eps * exponents.double().clamp_min(info.smallest_normal)
    return steps.square() / 12 * (13 / 12)  # the latter is the mean of c^2


_Member = tuple[int, str, torch.Tensor]
"""A tensor's bucket, its name, and the tensor."""


def _add_short(buckets: Sequence[_Bucket], members: Sequence[_Member], made_in: torch.dtype | None) -> None:
    """``_Bucket.add`` of each of ``members``, tensors of one row, which are many: at once of those stored alike."""
    alike: dict[tuple[torch.device, torch.dtype], list[_Member]] = {}
    for member in members:
        alike.setdefault((member[2].device, member[2].dtype), []).append(member)
    for (_, dtype), group in alike.items():
        places, names, tensors = zip(*group, strict=True)
        device = _summing_device(tensors[0])
        lengths = torch.tensor([tensor.numel() for tensor in tensors], device=device)
        starts = lengths.cumsum(0) - lengths
        columns = torch.arange(int(lengths.sum()), device=device) - starts.repeat_interleave(lengths)
        factors = torch.cat([_factors(name, 1) for name in names]).to(device).repeat_interleave(lengths)
        bucket_of = torch.tensor(places, device=device).repeat_interleave(lengths)
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).to(device).float()
        sums = torch.zeros(len(buckets), dtype=torch.float64, device=device)

        projections = sums.index_add(0, bucket_of, flat.double() * _signs().to(device)[columns] * factors).unbind()
        squares = sums.index_add(0, bucket_of, flat.double().square()).unbind() if made_in is None else ()
        variances = [
            sums.index_add(0, bucket_of, _rounding_variances(flat, one)).unbind() for one in _roundings(dtype, made_in)
        ]
        for place in set(places):
            buckets[place].projections.append(projections[place])
            buckets[place].squares += [squares[place]] if squares else []
            buckets[place].variances += [one[place] for one in variances]


@dataclass(frozen=True)
class _Reading:
    """What one pass over a module's weights gives.

    Attributes:
        dtype: the type that most of the weights are in, or where some are packed, what most of those are called.
        count: of the weights.
        buckets: BUCKETS of them; biases and norms, which no quantisation touches, fall into the first VECTOR_BUCKETS.
        word_rows: rows of the token embedding, which isn't in the buckets.
        words: a bucket for each WORDS_OF_A_BLOCK rows of it.
        is_packed: whether some are, see ``packed_weights``.
    """

    dtype: str
    count: int
    buckets: list[_Bucket]
    word_rows: int
    words: list[_Bucket]
    is_packed: bool


def _read(
    module: nn.Module, originals: Mapping[str, torch.Tensor] | None, made_in: torch.dtype | None
) -> _Reading | None:
    """None where the weights can't be read."""
    if unreadable(module):
        return None
    table, changed = _word_table(module), originals or {}
    parameters = list(base_parameters(module))
    buckets, counts, packed = [_Bucket() for _ in range(BUCKETS)], Counter[str](), Counter[str]()
    word_rows, words, short = 0, [], list[_Member]()
    for name, parameter in parameters:
        tensor = changed.get(name, parameter)
        if table is not None and _itself(parameter) == _itself(table):
            word_rows, blocks = len(tensor), tensor.split(WORDS_OF_A_BLOCK)
            words = [_Bucket() for _ in blocks]
            for i, block in enumerate(blocks):
                words[i].add(f"words {i}", block, made_in)
            continue
        # transformers 5 took a level out of CLIP's names
        published = pattern_name(name)
        place, packs = _place(published, tensor.ndim), is_packed(tensor)
        (packed if packs else counts)[kind_of(tensor)] += tensor.numel()
        for part_name, part in stored_parts(tensor).items() if packs else [("", tensor)]:
            if 0 < part.numel() <= ROW_LENGTH:
                short.append((place, published + part_name, part))
            else:
                buckets[place].add(published + part_name, part, made_in)
    _add_short(buckets, short, made_in)
    named = packed or counts
    dtype = max(named, key=lambda kind: named[kind], default="float32")
    return _Reading(dtype, sum(counts.values()) + sum(packed.values()), buckets, word_rows, words, bool(packed))


@lru_cache(maxsize=4096)
def _place(name: str, num_axes: int) -> int:
    """The bucket of the tensor ``name``."""
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[8:16], "little")
    if num_axes <= 1:
        return number % VECTOR_BUCKETS
    return VECTOR_BUCKETS + number % (BUCKETS - VECTOR_BUCKETS)


@torch.no_grad()
def fingerprint(module: nn.Module, originals: Mapping[str, torch.Tensor] | None = None) -> dict[str, Any] | None:
    """What tells ``module``'s weights from any others; JSON's kinds alone.

    Attached adapters don't count, nor do words that were added to a text encoder's table.

    Args:
        originals: parameter name -> its base value, of the parameters that are changed now.

    Returns:
        ``dtype`` that the weights are in; their ``count``; ``sums`` and ``squares``, the projections and sums of
        squares of 64 buckets of them; ``word_rows`` of the token embedding, ``word_sums`` and ``word_squares`` of each
        4,096 of them. None where the weights are offloaded and can't be read there, see ``offloaded_weights``.
    """
    reading = _read(module, originals, None)
    if reading is None:
        return None
    return {
        "dtype": reading.dtype,
        "count": reading.count,
        "sums": [_total(bucket.projections) for bucket in reading.buckets],
        "squares": [_total(bucket.squares) for bucket in reading.buckets],
        "word_rows": reading.word_rows,
        "word_sums": [_total(bucket.projections) for bucket in reading.words],
        "word_squares": [_total(bucket.squares) for bucket in reading.words],
    }


# ------------------------------------------------------------------------------ comparing


@torch.no_grad()
def is_same_base(
    wanted: Mapping[str, Any] | Sequence[float], module: nn.Module, originals: Mapping[str, torch.Tensor] | None = None
) -> bool:
    """Whether ``module`` has the weights that the fingerprint ``wanted`` was made of, in whatever type.

    In the same type a bucket's sum may differ by 1e-6 of its norm; in another by what rounding explains, 6 standard
    deviations of it. Of a module that is quantised otherwise, biases and norms alone are compared.

    Args:
        wanted: what :func:`fingerprint` gave, or the eight numbers of format version 2.
        originals: as :func:`fingerprint`'s.

    Raises:
        ValueError: the weights are offloaded, and can't be read there.
    """
    if not isinstance(wanted, Mapping):
        numbers = first_weights(module, originals)
        return len(wanted) == len(numbers) and bool(np.allclose(wanted, numbers, rtol=0.02, atol=1e-3))
    made_in = getattr(torch, wanted["dtype"], None)
    is_float = isinstance(made_in, torch.dtype) and made_in.is_floating_point
    reading = _read(module, originals, made_in if is_float else torch.float32)
    if reading is None:
        raise ValueError("The weights are offloaded where they can't be read. Call pipe.remove_all_hooks() first.")
    stored_alike = reading.dtype == wanted["dtype"] or not (reading.is_packed or not is_float)
    if stored_alike and wanted["count"] != reading.count:
        return False
    given = zip(reading.buckets, wanted["sums"], wanted["squares"], strict=True)
    comparable = [*given][: None if stored_alike else VECTOR_BUCKETS]
    words = zip(reading.words, wanted["word_sums"], wanted["word_squares"], strict=False)
    for i, block in enumerate(words):
        rows = [min(WORDS_OF_A_BLOCK, n - i * WORDS_OF_A_BLOCK) for n in (wanted["word_rows"], reading.word_rows)]
        if rows[0] == rows[1]:  # a block that ends elsewhere has learned words in it, or had them
            comparable.append(block)
    return all(bucket.agrees(projection, squares) for bucket, projection, squares in comparable)


def first_weights(module: nn.Module, originals: Mapping[str, torch.Tensor] | None = None) -> list[float]:
    """Format version 2's eight numbers: the number of weights, and the first weight of seven tensors spread over the
    module, without the token embedding."""
    changed = originals or {}
    tensors = sorted(
        (name, changed.get(name, parameter).detach())
        for name, parameter in base_parameters(module)
        if not name.endswith("token_embedding.weight")
    )
    chosen = [tensors[i * (len(tensors) - 1) // 6][1] for i in range(7)]
    return [float(sum(t.numel() for _, t in tensors)), *(float(t.flatten()[0]) for t in chosen)]


def check_base(adapter: Any, components: Mapping[str, nn.Module], originals: Mapping[str, Any] | None = None) -> None:
    """Whether the identity ``adapter`` was fitted to these ``components``.

    Args:
        adapter: an ``IdentityAdapter``.
        components: name -> module.
        originals: component's name -> its parameters' base values, of those that are changed now.

    Raises:
        ValueError: the identity was fitted to a base model with other components, or with other weights than
            ``components`` have; or these can't be read where they are offloaded.
    """
    base = adapter.base_model or "another base model"
    if not adapter.base_fingerprint:
        raise ValueError(
            f"The identity {adapter.token!r} doesn't say which weights it was fitted to: its base_fingerprint is "
            "empty. Fit it again, pipe.fit_identity(...), which writes it down."
        )
    if adapter.base_fingerprint.keys() != components.keys():
        raise ValueError(
            f"The identity {adapter.token!r} was fitted to {base!r}, of {' and '.join(adapter.base_fingerprint)}; this "
            f"pipeline has {' and '.join(components)}. Load that model, or fit the identity again here."
        )
    for name, wanted in adapter.base_fingerprint.items():
        if not is_same_base(wanted, components[name], (originals or {}).get(name)):
            raise ValueError(
                f"The identity {adapter.token!r} was fitted to {base!r}, whose {name} has other weights than this "
                "pipeline's. Load that model, or fit the identity again here."
            )
