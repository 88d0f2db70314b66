"""A learned token: one token of its own in a copy, its row in place, nothing left behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

from s2edit_pipeline.pipeline import S2EditPipeline
from s2edit_pipeline.prompt_tokenizing import tokenize
from s2edit_pipeline.prompt_tokens import embedding_table, initial_row, lay_rows, token_rows, with_tokens


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


# ------------------------------------------------------------------------------ other families' text encoders


def encoders() -> dict[str, Any]:
    """Small ones of the classes that keep their table elsewhere, or scale what it gives."""
    sizes = {"vocab_size": 64, "num_hidden_layers": 1}
    torch.manual_seed(0)
    t5 = T5EncoderModel(T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4))
    language = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return {
        "t5": t5.eval(),
        "gemma": Gemma2Model(Gemma2Config(**sizes, **language, head_dim=8)).eval(),
        "qwen": Qwen3ForCausalLM(Qwen3Config(**sizes, **language, head_dim=8)).eval(),
    }


@pytest.mark.parametrize("family", ["t5", "gemma", "qwen"])
def test_the_row_reaches_the_module_that_is_called(family: str) -> None:
    """Against the same row in the table itself; ids inside it, where a missed hook would say nothing, and beyond."""
    encoder, scale = encoders()[family], 32**0.5 if family == "gemma" else 1.0
    row = torch.linspace(-1, 1, 32)
    longer = copy.deepcopy(encoder)
    table = longer.get_input_embeddings()
    with torch.no_grad():
        table.weight[9] = row / scale  # what the module makes of its table is the row
        wanted = longer(torch.tensor([[3, 9, 5]]))[0]
        for token_id in (9, 70):
            with token_rows(encoder, {token_id: row}):
                found = encoder(torch.tensor([[3, token_id, 5]]))[0]
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        assert float((encoder(torch.tensor([[3, 9, 5]]))[0] - wanted).abs().max()) > 1e-3
    called = []
    embedding_table(encoder).register_forward_hook(lambda *_: called.append(True))
    encoder(torch.tensor([[3]]))
    assert called


class Letters:
    """Stands for a tokenizer: a letter's number."""

    def __call__(self, text: str, **_: Any) -> Any:
        return type("Encoding", (), {"input_ids": torch.tensor([[ord(letter) - 96 for letter in text]])})


@pytest.mark.parametrize("family", ["t5", "gemma", "qwen"])
def test_the_row_starts_at_what_the_encoder_embeds(family: str) -> None:
    encoder = encoders()[family]
    embedded: list[torch.Tensor] = []
    embedding_table(encoder).register_forward_hook(lambda module, ids, output: embedded.append(output))
    found = initial_row(Letters(), encoder, "cab")
    encoder(torch.tensor([[3, 1, 2]]))
    torch.testing.assert_close(found, embedded[-1][0].mean(0))
    assert family != "gemma" or found.norm() > 2 * encoder.get_input_embeddings().weight[[3, 1, 2]].mean(0).norm()


def test_an_untied_stack_is_reached_too() -> None:
    encoder = encoders()["t5"]
    encoder.encoder.embed_tokens = copy.deepcopy(encoder.shared)
    row = torch.linspace(-1, 1, 32)
    with torch.no_grad(), token_rows(encoder, {9: row}):
        torch.testing.assert_close(encoder.encoder.embed_tokens(torch.tensor([9]))[0], row)


def made_of(model: Any, pre_tokenizer: Any) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("kind", ["metaspace", "bytes"])
def test_no_empty_token_stands_before_a_learned_one(kind: str) -> None:
    """T5's and Qwen's tokenizers make a token of the space before a word."""
    if kind == "metaspace":
        pieces = [("<unk>", 0.0), ("\u2581", -1.0), ("\u2581a", -1.0), ("\u2581man", -1.0)]
        plain = made_of(models.Unigram(pieces, unk_id=0), pre_tokenizers.Metaspace())
    else:
        vocabulary = {"<unk>": 0, "a": 1, "\u0120": 2, "m": 3, "n": 4}
        plain = made_of(models.BPE(vocabulary, [], unk_token="<unk>"), pre_tokenizers.ByteLevel(add_prefix_space=False))
    extended = with_tokens(plain, ["[I]", "[A]"])
    words, learned = plain("a man", add_special_tokens=False).input_ids, len(plain)
    before = plain("a", add_special_tokens=False).input_ids
    for text, ids in (("a [I] man", [learned]), ("a [I] [A] man", [learned, learned + 1])):
        found = extended(text, add_special_tokens=False).input_ids
        assert found == before + ids + words[len(before) :], (found, words)
    assert extended.s2edit_tokens == ("[I]", "[A]")


def test_laid_rows_stay_until_they_are_removed(pipe: S2EditPipeline) -> None:
    table = pipe.text_encoder.get_input_embeddings()
    ids = torch.tensor([[len(table.weight) + 1, 3]])
    handles = lay_rows(pipe.text_encoder, {len(table.weight) + 1: torch.ones(32)})
    assert torch.equal(table(ids)[0, 0], torch.ones(32))
    for handle in handles:
        handle.remove()
    assert not table._forward_hooks and not table._forward_pre_hooks and lay_rows(pipe.text_encoder, {}) == []


def test_a_table_that_was_replaced_is_refused(pipe: S2EditPipeline) -> None:
    pipe.text_encoder.set_input_embeddings(torch.nn.Sequential(pipe.text_encoder.get_input_embeddings()))
    with pytest.raises(ValueError, match=r"token embedding of CLIPTextModel is Sequential, not an nn\.Embedding"):
        lay_rows(pipe.text_encoder, {1: torch.ones(32)})
