"""A learned token: known to a copy of the tokenizer, its embedding row laid over the text encoder's table.

Neither the tokenizer nor the table is changed: the row is put in by a hook where the token's id
comes by. So taking a token out again leaves nothing behind, and the row can be trained while the
table stands still.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import AddedToken


def check_token_name(token: str, tokenizer: Any) -> None:
    """Raises:
    TypeError: ``token`` is no string.
    ValueError: it is empty, has spaces, or is an ordinary word that a prompt may hold anyway.
    """
    if not isinstance(token, str):
        raise TypeError(f"token must be a string such as '[I]', not {type(token).__name__}.")
    if not token or any(c.isspace() for c in token):
        raise ValueError(f"token={token!r} must be one word without spaces, such as '[I]' or '<ada>'.")
    if token.isalnum():
        raise ValueError(
            f"token={token!r} could be an ordinary word of a prompt; put it in brackets, such as '[{token}]'."
        )
    if token in tokenizer.get_added_vocab():
        raise ValueError(f"token={token!r} is in the tokenizer already; choose another name, such as '[{token}2]'.")


def with_tokens(tokenizer: Any, tokens: Sequence[str]) -> Any:
    """A copy of ``tokenizer`` that knows each of ``tokens`` as one token of its own, exactly as spelled.

    The copy's ``s2edit_tokens`` are the tokens. Where the tokenizer makes a token of the space before a word (T5,
    Qwen), the space belongs to the learned token, so that no empty token comes before it.

    Raises:
        TypeError, ValueError: see :func:`check_token_name`; or two tokens have the same name.
    """
    for token in tokens:
        check_token_name(token, tokenizer)
        if list(tokens).count(token) > 1:
            raise ValueError(
                f"token={token!r} is the name of two tokens, an identity's and its reference attribute's; give the "
                f"latter another: ReferenceAttribute(..., token='[{token.strip('[]<>')}2]')."
            )
    extended = copy.deepcopy(tokenizer)
    without, behind = (len(tokenizer(text, add_special_tokens=False).input_ids) for text in ("a", "a "))
    for token in tokens:
        extended.add_tokens([AddedToken(token, normalized=False, single_word=False, lstrip=behind > without)])
    extended.s2edit_tokens = tuple(tokens)
    return extended


# ------------------------------------------------------------------------------ the embedding table


def embedding_modules(text_encoder: nn.Module) -> list[nn.Module]:
    """The modules that may embed ids for ``text_encoder``: what ``get_input_embeddings`` names, and every other that
    shares its table. T5 names ``shared`` and calls ``encoder.embed_tokens``.

    Raises:
        ValueError: the table isn't an ``nn.Embedding``.
    """
    named = text_encoder.get_input_embeddings()  # type: ignore[operator]
    if not isinstance(named, nn.Embedding):
        raise ValueError(
            f"The token embedding of {type(text_encoder).__name__} is {type(named).__name__}, not an nn.Embedding: "
            "learned tokens can't be laid over it. Unload what has replaced it, such as PEFT's trainable tokens."
        )
    return [
        module
        for name, module in text_encoder.named_modules()
        if isinstance(module, nn.Embedding)
        and (module is named or module.weight is named.weight or _is_the_stacks(name, module, named))
    ]


def _is_the_stacks(name: str, module: nn.Embedding, named: nn.Embedding) -> bool:
    """Untied, as after a load without tying, T5's stack has a table of its own that it calls."""
    return name.endswith("encoder.embed_tokens") and module.weight.shape == named.weight.shape


def embedding_table(text_encoder: Any) -> nn.Embedding:
    """The token embedding that ``text_encoder`` calls: of :func:`embedding_modules` the innermost.

    Raises:
        ValueError: the table isn't an ``nn.Embedding``.
    """
    table = embedding_modules(text_encoder)[-1]
    assert isinstance(table, nn.Embedding)
    return table


@torch.no_grad()
def initial_row(tokenizer: Any, text_encoder: nn.Module, subject: str) -> torch.Tensor:
    """(D,) float32: the mean of what ``text_encoder`` embeds ``subject``'s tokens as, its scaling included (Gemma's
    is by the square root of D)."""
    ids = tokenizer(subject, add_special_tokens=False, return_tensors="pt").input_ids[0]
    table = embedding_table(text_encoder)
    embedded: torch.Tensor = table(ids.to(table.weight.device))
    return embedded.float().mean(0)


# ------------------------------------------------------------------------------ rows laid over it


class _HideTokens:
    """Before the table: the learned tokens' ids, which it doesn't know, become 0; the ids as they came go along as an
    attribute of the tensor. Nothing is kept here, so that threads don't meet."""

    def __init__(self, rows: Mapping[int, torch.Tensor]) -> None:
        self.rows = rows

    def __call__(self, module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        given = arguments[0]
        hidden = given
        for token_id in self.rows:
            hidden = hidden.masked_fill(hidden == token_id, 0)
        if hidden is not given:
            hidden.s2edit_ids = getattr(given, "s2edit_ids", given)  # type: ignore[attr-defined]
        return (hidden, *arguments[1:])


class _PutRows:
    """After the table: where a learned token was, its row."""

    def __init__(self, rows: Mapping[int, torch.Tensor]) -> None:
        self.rows = rows

    def __call__(self, module: nn.Module, arguments: tuple[torch.Tensor, ...], embedded: torch.Tensor) -> torch.Tensor:
        ids = getattr(arguments[0], "s2edit_ids", arguments[0]).to(embedded.device)
        for token_id, row in self.rows.items():
            embedded = torch.where((ids == token_id)[..., None], row.to(embedded), embedded)
        return embedded


def lay_rows(text_encoder: nn.Module, rows: Mapping[int, torch.Tensor]) -> list[RemovableHandle]:
    """From now on ``text_encoder`` embeds token id ``i`` as ``rows[i]``, (D,); gradients reach the rows.

    Ids beyond the table are fine. Rows laid later win. The hooks hold no state of a call: they serve several threads,
    and a copied or pickled text encoder takes them along.

    Returns:
        What removes them again: ``for handle in handles: handle.remove()``.
    """
    return [
        handle
        for table in (embedding_modules(text_encoder) if rows else [])
        for handle in (
            table.register_forward_pre_hook(_HideTokens(rows)),
            table.register_forward_hook(_PutRows(rows)),
        )
    ]


@contextmanager
def token_rows(text_encoder: nn.Module, rows: Mapping[int, torch.Tensor]) -> Iterator[None]:
    """Within the context the rows are laid as :func:`lay_rows` does. Nests, and leaves the text encoder as it was."""
    handles = lay_rows(text_encoder, rows)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
