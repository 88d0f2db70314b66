"""The fitting objective, against its formulas in float64 and against finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from s2edit_pipeline.fit_losses import cosine, reconstruction_loss, semantic_loss


def vectors(*shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2)]


def naive_cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def test_the_semantic_loss_is_the_cosines_size() -> None:
    a, b = vectors(3, 7)
    expected = [naive_cosine(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    torch.testing.assert_close(cosine(a, b), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert semantic_loss(a, b).item() == pytest.approx(sum(map(abs, expected)) / 3, rel=1e-5)
    assert min(expected) < 0 < max(expected)  # so that the absolute value is seen


def test_known_angles() -> None:
    e = torch.eye(3)
    assert semantic_loss(e[0], e[1]).item() == 0
    assert semantic_loss(e[0], -2 * e[0]).item() == pytest.approx(1)
    assert semantic_loss(e[0], e[0] + e[1]).item() == pytest.approx(math.sqrt(0.5))


def test_descending_the_semantic_loss_turns_the_token_square_to_the_sentence() -> None:
    sentence, token = (v[0].float() for v in vectors(1, 16))
    token = token + 2 * sentence
    token.requires_grad_()
    (slope,) = torch.autograd.grad(semantic_loss(sentence, token), token)
    for i in (0, 7):  # central differences
        step = torch.zeros(16)
        step[i] = 1e-3
        with torch.no_grad():
            expected = (semantic_loss(sentence, token + step) - semantic_loss(sentence, token - step)) / 2e-3
        assert slope[i].item() == pytest.approx(expected.item(), abs=2e-4)


def test_the_reconstruction_loss_is_the_mean_square() -> None:
    output, target = vectors(2, 3, 4, 5)
    flat = zip(output.flatten().tolist(), target.flatten().tolist(), strict=True)
    expected = sum((x - y) ** 2 for x, y in flat) / output.numel()
    assert reconstruction_loss(output, target).item() == pytest.approx(expected, rel=1e-5)
    # half-precision models lose nothing more in the loss itself
    assert reconstruction_loss(output.bfloat16(), target.bfloat16()).dtype == torch.float32
