"""The two terms of the fitting objective, ``L = L_recons + lambda L_semantic`` (S2Edit, method section)."""

from __future__ import annotations

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
