"""Differences of whole weights as low-rank factors: a full fine-tuning in the size, and the form, of a LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

OVERSAMPLING = 8
POWER_ITERATIONS = 2
RANK_HEADROOM = 8
"""A layer may get this many times the rank that the budget allows every layer."""


@dataclass(frozen=True)
class LowRankDifferences:
    """What is left of the differences.

    Attributes:
        factors: layer -> (down, up), (r, in[, kh, kw]) and (out, r[, 1, 1]) float16: LoRA's A and B.
        plain: parameter name -> difference, float16, of what is no projection (biases, norms, tables).
        kept_energy: share of the differences' sum of squares that these have, their rounding included.
    """

    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    plain: Mapping[str, torch.Tensor]
    kept_energy: float


def is_projection(name: str, difference: torch.Tensor) -> bool:
    """Whether LoRA can hold it: the weight of a linear layer or a convolution, and no embedding table."""
    return difference.ndim in (2, 4) and name.endswith(".weight") and "position_embedding" not in name


def compress(differences: Mapping[str, torch.Tensor], kept_energy: float, max_bytes: int) -> LowRankDifferences:
    """Low-rank factors of ``differences`` with the share ``kept_energy`` of their sum of squares, or as much of it
    as ``max_bytes`` hold.

    Eckart and Young (1936): a matrix's best approximation of rank r is its first r singular triples. Triples of all
    layers compete for the bytes, and so do the tensors that are no matrix: the most energy a byte first. The triples
    are found by randomised subspace iteration (Halko et al. 2011), so nothing here takes the time of a full SVD.

    Args:
        differences: parameter name -> tensor, float32; not changed.
        kept_energy: in (0, 1].
        max_bytes: of the tensors in float16 and of their names in the files.
    """
    energies = {name: float(d.double().square().sum()) for name, d in differences.items()}
    total = sum(energies.values())
    if total == 0:
        return LowRankDifferences({}, {}, 1.0)
    matrices = {n: d.flatten(1) for n, d in differences.items() if energies[n] and is_projection(n, d)}
    one_everywhere = sum(2 * sum(m.shape) for m in matrices.values())
    limit = max(4, RANK_HEADROOM * max_bytes // max(1, one_everywhere))
    triples = {name: leading_triples(matrix, min(limit, *matrix.shape)) for name, matrix in matrices.items()}

    # (energy, bytes, name): a triple of a matrix, or all of another tensor
    offers = [
        (float(value) ** 2, 2 * sum(matrices[name].shape), name)
        for name, (_, values, _) in triples.items()
        for value in values
    ]
    offers += [(energies[n], 2 * d.numel(), n) for n, d in differences.items() if energies[n] and n not in matrices]
    ranks: dict[str, int] = {}
    kept, used = 0.0, 0
    for energy, size, name in sorted(offers, key=lambda offer: -offer[0] / offer[1]):
        size += 0 if name in ranks else _bytes_of_names(name)
        if used + size > max_bytes:
            continue
        ranks[name] = ranks.get(name, 0) + 1
        used += size
        kept += energy
        if kept >= kept_energy * total:
            break

    factors, plain, lost = {}, {}, total
    for name, rank in ranks.items():
        difference = differences[name]
        if name in matrices:
            down, up = _factors(*triples[name], rank, difference.shape)
            factors[name.removesuffix(".weight")] = (down, up)
            approximation = up.float().flatten(1) @ down.float().flatten(1)
        else:
            approximation = plain[name] = difference.half()
        error = difference.flatten(1) - approximation if name in matrices else difference - approximation.float()
        lost += float(error.double().square().sum()) - energies[name]
    return LowRankDifferences(factors, plain, 1 - lost / total)


def leading_triples(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U (m, rank), S (rank,), V (n, rank) of ``matrix`` (m, n) with ``matrix`` about U diag(S) V^T.

    Algorithm 4.4 and 5.1 of Halko et al. (2011), or the full decomposition where that costs no more. Its random numbers
    come from a generator of its own, on the CPU: none is taken from the caller on any device.
    """
    matrix = matrix.float()
    sampled = min(rank + OVERSAMPLING, *matrix.shape)
    if 2 * sampled >= min(matrix.shape):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vh.mT[:, :rank]
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
    omega = torch.randn(tall.shape[1], sampled, generator=torch.Generator().manual_seed(0), device="cpu")
    q = torch.linalg.qr(tall @ omega.to(matrix.device))[0]
    for _ in range(POWER_ITERATIONS):
        q = torch.linalg.qr(tall.mT @ q)[0]
        q = torch.linalg.qr(tall @ q)[0]
    inner, s, vh = torch.linalg.svd(q.mT @ tall, full_matrices=False)
    u, v = (q @ inner)[:, :rank], vh.mT[:, :rank]
    return (u, s[:rank], v) if tall is matrix else (v, s[:rank], u)


def _factors(
    u: torch.Tensor, s: torch.Tensor, v: torch.Tensor, rank: int, shape: torch.Size
) -> tuple[torch.Tensor, torch.Tensor]:
    root = s[:rank].sqrt()  # shared by both, so that float16 holds them
    down, up = (v[:, :rank] * root).mT.half(), (u[:, :rank] * root).half()
    if len(shape) == 4:
        return down.reshape(rank, *shape[1:]).contiguous(), up[..., None, None].contiguous()
    return down.contiguous(), up.contiguous()


def _bytes_of_names(name: str) -> int:
    """What a tensor's entries in a safetensors header and in the LoRA's metadata take, rounded up."""
    return 5 * len(name) + 250
