"""A learned token: known to a copy of the tokenizer, its embedding row laid over the text encoder's table.

Neither the tokenizer nor the table is changed: the row is put in by a hook where the token's id
comes by. So taking a token out again leaves nothing behind, and the row can be trained while the
table stands still.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
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


def with_tokens(tokenizer: Any, tokens: list[str]) -> Any:
    """A copy of ``tokenizer`` that knows each of ``tokens`` as one token of its own, exactly as spelled.

    Raises:
        TypeError, ValueError: see :func:`check_token_name`.
    """
    extended = copy.deepcopy(tokenizer)
    for token in tokens:
        check_token_name(token, tokenizer)
        if tokens.count(token) > 1:
            raise ValueError(
                f"token={token!r} is the name of two tokens, an identity's and its reference attribute's; give the "
                f"latter another: ReferenceAttribute(..., token='[{token.strip('[]<>')}2]')."
            )
        extended.add_tokens([AddedToken(token, normalized=False, single_word=False)])
    return extended


def embedding_table(text_encoder: Any) -> nn.Embedding:
    """The token embedding of ``text_encoder``."""
    table = text_encoder.get_input_embeddings()
    assert isinstance(table, nn.Embedding)
    return table


def initial_row(tokenizer: Any, text_encoder: nn.Module, subject: str) -> torch.Tensor:
    """(D,) float32: the mean of the embedding rows of ``subject``'s tokens."""
    ids = tokenizer(subject, add_special_tokens=False, return_tensors="pt").input_ids[0]
    table = embedding_table(text_encoder)
    return table.weight.detach()[ids.to(table.weight.device)].float().mean(0)


@contextmanager
def token_rows(text_encoder: nn.Module, rows: Mapping[int, torch.Tensor]) -> Iterator[None]:
    """Within the context ``text_encoder`` embeds token id ``i`` as ``rows[i]``, (D,); gradients reach the rows.

    Ids beyond the table are fine. Nests, and leaves the text encoder as it was.
    """
    table = embedding_table(text_encoder)
    asked: list[torch.Tensor] = []

    def remember_ids(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        ids = arguments[0]
        asked.append(ids)
        for i in rows:
            ids = ids.masked_fill(ids == i, 0)  # any row that exists; it is overwritten below
        return (ids, *arguments[1:])

    def put_rows(module: nn.Module, arguments: tuple[torch.Tensor, ...], embedded: torch.Tensor) -> torch.Tensor:
        ids = asked.pop()
        for i, row in rows.items():
            embedded = torch.where((ids == i)[..., None], row.to(embedded), embedded)
        return embedded

    handles = [table.register_forward_pre_hook(remember_ids), table.register_forward_hook(put_rows)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
