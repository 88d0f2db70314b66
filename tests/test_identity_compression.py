"""Low-rank factors against the full singular value decomposition, by name, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from s2edit_pipeline.identity_compression import LowRankDifferences, compress, is_projection, leading_triples


def decaying(*shape: int, seed: int, decay: float = 0.7, scale: float = 1e-2) -> torch.Tensor:
    """Of singular values ``scale * decay^i``, as a fit's differences have."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape[0], math.prod(shape[1:])
    k = min(rows, columns)
    u, v = (torch.linalg.qr(torch.randn(n, k, generator=generator))[0] for n in (rows, columns))
    return (scale * u @ torch.diag(decay ** torch.arange(k)) @ v.mT).reshape(shape)


def restored(found: LowRankDifferences, shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    tensors = {name: value.double() for name, value in found.plain.items()}
    for layer, (down, up) in found.factors.items():
        product = sum(
            up.double().flatten(1)[:, r, None] * down.double().flatten(1)[None, r] for r in range(down.shape[0])
        )
        tensors[f"{layer}.weight"] = product.reshape(shapes[f"{layer}.weight"])
    return {name: tensors.get(name, torch.zeros(shape).double()) for name, shape in shapes.items()}


@pytest.fixture
def differences() -> dict[str, torch.Tensor]:
    return {
        "unet.conv_in.weight": decaying(32, 4, 3, 3, seed=0),
        "unet.attn.to_q.weight": decaying(96, 64, seed=1, scale=3e-2),
        "unet.wide.weight": decaying(200, 160, seed=2, decay=0.9),
        "unet.attn.to_q.bias": decaying(1, 96, seed=3, decay=1.0)[0],
        "text_encoder.embeddings.position_embedding.weight": decaying(48, 32, seed=4, scale=1e-3),
        "unet.still.weight": torch.zeros(32, 32),
    }


def energy(tensors: dict[str, torch.Tensor]) -> float:
    return sum(float(t.double().square().sum()) for t in tensors.values())


@pytest.mark.parametrize("kept", [0.5, 0.9, 0.99])
def test_the_kept_energy_is_what_was_asked_for(differences: dict[str, torch.Tensor], kept: float) -> None:
    before = {name: d.clone() for name, d in differences.items()}
    found = compress(differences, kept, max_bytes=10**9)
    shapes = {name: d.shape for name, d in differences.items()}
    again = restored(found, shapes)
    lost = energy({n: again[n] - d.double() for n, d in differences.items()}) / energy(differences)
    assert found.kept_energy == pytest.approx(1 - lost, abs=1e-6)
    assert kept - 1e-4 <= found.kept_energy < kept + 0.15
    assert all(torch.equal(differences[n], before[n]) for n in before)


def test_each_matrix_gets_its_best_approximation(differences: dict[str, torch.Tensor]) -> None:
    """Eckart-Young: the error is what the singular values left out sum up to."""
    found = compress(differences, 0.95, max_bytes=10**9)
    assert set(found.factors) == {"unet.conv_in", "unet.attn.to_q", "unet.wide"}
    for layer, (down, up) in found.factors.items():
        exact = differences[f"{layer}.weight"].double().flatten(1)
        rank = down.shape[0]
        values = torch.linalg.svdvals(exact)
        error = float((exact - up.double().flatten(1) @ down.double().flatten(1)).square().sum())
        left_out = float(values[rank:].square().sum())
        assert left_out <= error * (1 + 1e-9)
        assert error <= left_out * 1.01 + 1e-5 * float(exact.square().sum())  # float16


def test_sampled_triples_are_nearly_the_best() -> None:
    """So few of so many that the matrix isn't decomposed in full (Halko et al. 2011)."""
    differences = {"unet.wide.weight": decaying(400, 300, seed=2, decay=0.9)}
    down, up = compress(differences, 1.0, max_bytes=8_000).factors["unet.wide"]
    exact = differences["unet.wide.weight"].double()
    left_out = float(torch.linalg.svdvals(exact)[len(down) :].square().sum())
    error = float((exact - up.double() @ down.double()).square().sum())
    assert 4 <= len(down) <= 5 and left_out <= error <= 1.01 * left_out


def test_shapes_are_loras(differences: dict[str, torch.Tensor]) -> None:
    found = compress(differences, 0.9, max_bytes=10**9)
    down, up = found.factors["unet.conv_in"]
    rank = down.shape[0]
    assert (down.shape, up.shape) == ((rank, 4, 3, 3), (32, rank, 1, 1))
    down, up = found.factors["unet.attn.to_q"]
    assert (down.shape[1:], up.shape[0]) == ((64,), 96) and down.dtype == up.dtype == torch.float16
    assert not is_projection("text_encoder.embeddings.position_embedding.weight", torch.zeros(4, 4))
    assert not is_projection("unet.norm.weight", torch.zeros(4))


def test_the_bytes_are_a_limit_and_go_where_the_energy_is(differences: dict[str, torch.Tensor]) -> None:
    sizes, kept = [], []
    for limit in (2_000, 5_000, 20_000):
        found = compress(differences, 1.0, max_bytes=limit)
        tensors = [*found.plain.values(), *(t for pair in found.factors.values() for t in pair)]
        sizes.append(sum(2 * t.numel() for t in tensors))
        kept.append(found.kept_energy)
        assert sizes[-1] <= limit
    assert kept == sorted(kept) and kept[0] > 0.2
    assert "unet.attn.to_q" in compress(differences, 1.0, max_bytes=2_000).factors  # the strongest
    assert compress(differences, 1.0, max_bytes=10).kept_energy == 0.0


def test_the_most_energy_a_byte_comes_first() -> None:
    small, large = decaying(16, 16, seed=0, decay=0.01), decaying(512, 512, seed=1, decay=0.01, scale=1.2e-2)
    found = compress({"unet.small.weight": small, "unet.large.weight": large}, 1.0, max_bytes=2_500)
    assert set(found.factors) == {"unet.small"}  # the larger one's energy is more, and costs 32 times as much


def test_no_random_number_is_taken_from_the_caller(differences: dict[str, torch.Tensor]) -> None:
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    first = compress(differences, 0.9, max_bytes=4_000)  # so few triples that they are sampled for
    assert torch.equal(torch.rand(2), wanted)
    second = compress(differences, 0.9, max_bytes=4_000)
    for layer in first.factors:
        assert all(torch.equal(a, b) for a, b in zip(first.factors[layer], second.factors[layer], strict=True))


def test_differences_that_are_none() -> None:
    found = compress({"unet.a.weight": torch.zeros(4, 4)}, 0.99, 1000)
    assert (found.factors, found.plain, found.kept_energy) == ({}, {}, 1.0)


@pytest.mark.gpu
def test_no_random_number_is_taken_on_a_gpu(differences: dict[str, torch.Tensor]) -> None:
    state = torch.cuda.get_rng_state()
    found = compress({name: d.cuda() for name, d in differences.items()}, 0.9, max_bytes=4_000)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    on_the_cpu = compress(differences, 0.9, max_bytes=4_000)
    assert found.factors.keys() == on_the_cpu.factors.keys()


@pytest.mark.parametrize("shape", [(200, 160), (100, 300), (20, 30)])
def test_the_triples_are_the_singular_values_decomposition(shape: tuple[int, int]) -> None:
    matrix = decaying(*shape, seed=0)
    u, s, v = leading_triples(matrix, 4)
    wanted = torch.linalg.svd(matrix.double())
    torch.testing.assert_close(s.double(), wanted.S[:4], rtol=1e-4, atol=1e-8)
    for found, exact in ((u, wanted.U), (v, wanted.Vh.mT)):
        torch.testing.assert_close((found.double().mT @ exact[:, :4]).abs(), torch.eye(4).double(), rtol=0, atol=1e-3)
