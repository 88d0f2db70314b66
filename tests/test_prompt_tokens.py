"""A learned token: one token of its own in a copy, its row in place, nothing left behind."""

from __future__ import annotations

import copy

import pytest
import torch

from s2edit_pipeline.pipeline import S2EditPipeline
from s2edit_pipeline.prompt_tokenizing import tokenize
from s2edit_pipeline.prompt_tokens import initial_row, token_rows, with_tokens


def test_the_token_is_one_token_only_in_the_copy(pipe: S2EditPipeline) -> None:
    before = len(pipe.tokenizer)
    extended = with_tokens(pipe.tokenizer, ["[I]"])
    assert (len(extended), len(pipe.tokenizer)) == (before + 1, before)
    assert extended.convert_tokens_to_ids("[I]") == before
    for text in ("a [I] man", "a [I]man", "[I]", "a,[I]."):
        assert extended(text).input_ids.count(before) == 1, text
    assert before not in extended("a [i] man").input_ids  # exactly as spelled
    assert before not in pipe.tokenizer("a [I] man").input_ids


@pytest.mark.parametrize(
    ("token", "error", "said"),
    [
        ("", ValueError, "one word"),
        ("[I am]", ValueError, "one word"),
        ("lady", ValueError, r"brackets, such as '\[lady\]'"),
        ("<|endoftext|>", ValueError, "in the tokenizer already"),
        (7, TypeError, "must be a string"),
    ],
)
def test_names_that_cannot_be_tokens(pipe: S2EditPipeline, token: object, error: type, said: str) -> None:
    with pytest.raises(error, match=said):
        with_tokens(pipe.tokenizer, [token])  # type: ignore[list-item]


def test_the_row_is_embedded_where_the_token_stands(pipe: S2EditPipeline) -> None:
    extended = with_tokens(pipe.tokenizer, ["[I]"])
    i = extended.convert_tokens_to_ids("[I]")
    ids = tokenize(extended, "a [I] man").input_ids
    row = torch.linspace(-1, 1, 32)
    # independent: a table that really has one row more
    reference = copy.deepcopy(pipe.text_encoder)
    reference.resize_token_embeddings(i + 1, mean_resizing=False)
    with torch.no_grad():
        reference.get_input_embeddings().weight[i] = row
        wanted = reference(ids).last_hidden_state
        with token_rows(pipe.text_encoder, {i: row}):
            found = pipe.text_encoder(ids).last_hidden_state
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_the_gradient_is_the_rows_alone_and_right(pipe: S2EditPipeline) -> None:
    extended = with_tokens(pipe.tokenizer, ["[I]"])
    i = extended.convert_tokens_to_ids("[I]")
    ids = tokenize(extended, "a [I] man").input_ids
    encoder = pipe.text_encoder.double()
    row = torch.linspace(-1, 1, 32, dtype=torch.float64).requires_grad_()
    weights = torch.randn(32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def value(row: torch.Tensor) -> torch.Tensor:
        with token_rows(encoder, {i: row}):
            return (encoder(ids).last_hidden_state[0, 4] * weights).sum()

    (slope,) = torch.autograd.grad(value(row), row)
    for k in (0, 13):
        step = torch.zeros(32, dtype=torch.float64)
        step[k] = 1e-5
        with torch.no_grad():
            wanted = (value(row + step) - value(row - step)) / 2e-5
        assert slope[k].item() == pytest.approx(wanted.item(), rel=1e-4)


def test_rows_nest_and_leave_nothing_also_after_an_error(pipe: S2EditPipeline) -> None:
    extended = with_tokens(pipe.tokenizer, ["[I]", "[A]"])
    i, a = (extended.convert_tokens_to_ids(t) for t in ("[I]", "[A]"))
    table = pipe.text_encoder.get_input_embeddings()
    rows = {i: torch.ones(32), a: torch.full((32,), 2.0)}
    with pytest.raises(RuntimeError), token_rows(pipe.text_encoder, {i: rows[i]}):
        with token_rows(pipe.text_encoder, {a: rows[a]}):
            embedded = table(torch.tensor([[a, 5]]))
        torch.testing.assert_close(embedded[0, 0], rows[a])
        torch.testing.assert_close(table(torch.tensor([[i]]))[0, 0], rows[i])
        raise RuntimeError
    assert not table._forward_hooks and not table._forward_pre_hooks
    with pytest.raises(IndexError):
        table(torch.tensor([[i]]))


def test_both_of_two_rows_in_one_prompt(pipe: S2EditPipeline) -> None:
    extended = with_tokens(pipe.tokenizer, ["[I]", "[A]"])
    i, a = (extended.convert_tokens_to_ids(t) for t in ("[I]", "[A]"))
    table = pipe.text_encoder.get_input_embeddings()
    with token_rows(pipe.text_encoder, {i: torch.ones(32)}), token_rows(pipe.text_encoder, {a: torch.zeros(32)}):
        embedded = table(torch.tensor([[i, a, 7]]))[0]
    torch.testing.assert_close(embedded, torch.stack([torch.ones(32), torch.zeros(32), table.weight[7].detach()]))


def test_the_row_starts_at_the_nouns_mean(pipe: S2EditPipeline) -> None:
    table = pipe.text_encoder.get_input_embeddings().weight
    for noun in ("man", "xylophonist"):
        ids = pipe.tokenizer(noun, add_special_tokens=False).input_ids
        torch.testing.assert_close(
            initial_row(pipe.tokenizer, pipe.text_encoder, noun), sum(table[k] for k in ids) / len(ids)
        )
