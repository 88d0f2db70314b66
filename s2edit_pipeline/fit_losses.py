"""The terms of the fitting objective, ``L_recons + lambda L_semantic`` (S2Edit, method section) and our ``L_keep``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """``L_recons``: the base model's own denoising loss, the mean squared error in float32.

    Args:
        output: (B, C, H, W), what the denoiser returned.
        target: (B, C, H, W), what it should have returned (see ``NoiseSchedule.target``).
    """
    return F.mse_loss(output.float(), target.float())


def cosine(sentence: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """``cos(e_P, e_[I])`` of two (..., D) embeddings, in float32."""
    return F.cosine_similarity(sentence.float(), token.float(), dim=-1)


def semantic_loss(sentence: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """``L_semantic = |cos(e_P, e_[I])|``: 0 when the identity says nothing that the source prompt says.

    Args:
        sentence: (..., D), the text encoder's output at the end token of P.
        token: (..., D), its output at ``[I]``'s place in P~.
    """
    return cosine(sentence, token).abs().mean()


def response_loss(tuned: Sequence[torch.Tensor], base: Sequence[torch.Tensor]) -> torch.Tensor:
    """``L_keep = || (f_tuned(x_t, P~ + w) - f_tuned(x_t, P~)) - (f_base(x_t, P + w) - f_base(x_t, P)) ||^2``, the mean
    square in float32: 0 when a word ``w`` changes the prediction as it did before the fit (ours).

    Args:
        tuned, base: two (B, C, H, W) each, what the denoiser returned with the word and without it.
    """
    (tuned_with, tuned_without), (base_with, base_without) = ([one.float() for one in pair] for pair in (tuned, base))
    return F.mse_loss(tuned_with - tuned_without, base_with - base_without)
