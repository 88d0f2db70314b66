"""Words, spans and alignments, against the tokenizers' own pieces and against written-out tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from s2edit_pipeline.avatars.tokenizer import build_tokenizer
from s2edit_pipeline.prompt_alignment import align_prompts, content_words
from s2edit_pipeline.prompt_columns import TokenizedPrompt
from s2edit_pipeline.prompt_tokenizing import tokenize
from s2edit_pipeline.prompt_tokens import with_tokens
from s2edit_pipeline.prompt_words import insert_token, split_words


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return with_tokens(build_tokenizer(num_captions=200), ["[I]", "[A]"])


def pieces(tokenizer: Any, prompt: TokenizedPrompt, positions: tuple[int, ...]) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(prompt.input_ids[0, list(positions)].tolist()))


def test_every_word_is_the_tokens_that_spell_it(tokenizer: CLIPTokenizer) -> None:
    prompt = tokenize(tokenizer, "A photo of a [I] lady-friend with Sunglasses, isn't she?")
    assert [w.text for w in prompt.words] == [
        "a", "photo", "of", "a", "[I]", "lady-friend", "with", "sunglasses", ",", "isn't", "she", "?",
    ]  # fmt: skip
    for word in prompt.words:
        assert pieces(tokenizer, prompt, word.tokens).replace("</w>", "") == word.text
    positions = [t for word in prompt.words for t in word.tokens]
    assert positions == list(range(1, prompt.eos))  # each once, in order, none of the special ones
    assert prompt.input_ids[0, prompt.eos] == tokenizer.eos_token_id
    assert prompt.input_ids.shape == (1, tokenizer.model_max_length)


def test_a_word_of_many_tokens_is_one_word(tokenizer: CLIPTokenizer) -> None:
    prompt = tokenize(tokenizer, "a xylophonist with glasses")
    (found,) = [w for w in prompt.words if w.text == "xylophonist"]
    assert len(found.tokens) > 2
    assert prompt.find("xylophonist") == found.tokens
    assert prompt.find("xylophonist with") == (*found.tokens, found.tokens[-1] + 1)


def test_find_gives_every_occurrence_and_names_the_words_otherwise(tokenizer: CLIPTokenizer) -> None:
    prompt = tokenize(tokenizer, "a man with a beard")
    assert prompt.find("a") == (1, 4)
    with pytest.raises(ValueError, match=r"'lady' is not in the prompt .*: a, man, with, beard"):
        prompt.find("lady")


def test_a_prompt_that_is_too_long_says_what_would_be_lost(tokenizer: CLIPTokenizer) -> None:
    room = tokenizer.model_max_length - 2
    assert tokenize(tokenizer, " ".join(["man"] * room)).eos == room + 1
    with pytest.raises(ValueError, match=f"{room + 3} tokens and the text encoder reads {room + 2}.*would be cut off"):
        tokenize(tokenizer, " ".join(["man"] * (room + 1)))
    with pytest.raises(TypeError, match="string, not list"):
        tokenize(tokenizer, ["a man"])  # type: ignore[arg-type]


def test_the_token_goes_before_the_subject() -> None:
    assert insert_token("a photo of a lady with glasses", "lady", "[I]") == "a photo of a [I] lady with glasses"
    assert insert_token("A Lady, lady-like", "lady", "[I]") == "A [I] Lady, lady-like"  # the word, not a part of one
    assert insert_token("an old lady", "old lady", "[I]") == "an [I] old lady"
    assert insert_token("a [I] lady and a lady", "lady", "[I]") == "a [I] lady and a lady"  # holds it already
    assert insert_token("a lady and a lady", "lady", "[I]") == "a [I] lady and a [I] lady"


def test_a_subject_that_is_not_there_is_refused() -> None:
    for subject in ("man", "", "lady photo", "lad"):
        with pytest.raises(ValueError, match=r"is not in the prompt 'photo lady'.*one of: photo, lady"):
            insert_token("photo lady", subject, "[I]")
    with pytest.raises(ValueError, match="the prompt is empty"):
        insert_token("", "lady", "[I]")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from("a lady with glasses [I] , man's beard smiling".split()), min_size=1, max_size=12))
def test_splitting_is_what_joining_made(words: list[str]) -> None:
    assert split_words(" ".join(words), ["[I]"]) == words


def by_word(tokenizer: Any, source: str, target: str, edit: str = "auto") -> list[tuple[str, tuple[str, ...]]]:
    """For each target word that takes the source's attention: the source words that it takes."""
    a, b = tokenize(tokenizer, source), tokenize(tokenizer, target)
    alignment = align_prompts(a, b, edit)
    taken = []
    for word in b.words:
        shares = alignment.share[list(word.tokens)]
        assert bool((shares == shares[0]).all())
        if shares[0] == 1:
            rows = alignment.mapping[:, list(word.tokens)].sum(1).nonzero()[:, 0].tolist()
            taken.append((word.text, tuple(w.text for w in a.words if set(w.tokens) & set(rows))))
        else:
            assert float(alignment.mapping[:, list(word.tokens)].abs().sum()) == 0
    return taken


def test_replacement_ties_the_new_word_to_the_old_one(tokenizer: CLIPTokenizer) -> None:
    assert by_word(tokenizer, "a sad [I] man", "a smiling [I] man") == [
        ("a", ("a",)), ("smiling", ("sad",)), ("[I]", ("[I]",)), ("man", ("man",)),
    ]  # fmt: skip
    assert ("smiling", ("sad",)) not in by_word(tokenizer, "a sad man", "a smiling man", "refine")


def test_refinement_leaves_new_words_their_own_maps(tokenizer: CLIPTokenizer) -> None:
    assert by_word(tokenizer, "a man in red", "a man with a hat in red") == [
        ("a", ("a",)), ("man", ("man",)), ("in", ("in",)), ("red", ("red",)),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="one for one"):
        by_word(tokenizer, "a man", "a man with a hat", "replace")
    with pytest.raises(ValueError, match="'swap' is unknown"):
        by_word(tokenizer, "a man", "a man", "swap")


def test_changed_words_are_those_of_one_side_alone(tokenizer: CLIPTokenizer) -> None:
    a, b = tokenize(tokenizer, "a sad man with glasses"), tokenize(tokenizer, "a smiling man with a beard")
    alignment = align_prompts(a, b)
    assert alignment.changed_source == (*a.find("sad"), *a.find("glasses"))
    assert set(alignment.changed_target) == {*b.find("smiling"), b.find("a")[1], *b.find("beard")}
    assert content_words(b, set(alignment.changed_target)) == (b.find("smiling"), b.find("beard"))  # not "a"
    assert content_words(b, set(b.find("with"))) == (b.find("beard"),)  # what it speaks of
    only_function_words = tokenize(tokenizer, "with or without")
    with_alone = only_function_words.find("with")
    assert content_words(only_function_words, set(with_alone)) == (with_alone,)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("a sad man", "a smiling man"),
        ("a man", "a xylophonist"),
        ("a xylophonist", "a man"),
        ("a man with a beard", "a man"),
        ("a man", "a man with a beard and glasses"),
        ("man", "man"),
    ],
)
def test_attention_taken_over_is_still_a_distribution(tokenizer: CLIPTokenizer, source: str, target: str) -> None:
    """Prompt-to-prompt, section 3.2: what replacement hands on are probabilities, nothing lost where lengths agree."""
    a, b = tokenize(tokenizer, source), tokenize(tokenizer, target)
    alignment = align_prompts(a, b, "auto")
    # a source token hands its whole map on, once, unless its word is gone or it is padding beyond the target's
    handed = alignment.mapping.sum(1)
    tied = [t for w in a.words if not set(w.tokens) & set(alignment.changed_source) for t in w.tokens]
    torch.testing.assert_close(handed[[0, *tied, a.eos]], torch.ones(2 + len(tied)))
    # naive: word by word
    length = a.input_ids.shape[1]
    for j in range(b.eos, length):
        wanted = torch.zeros(length)
        wanted[min(a.eos + (j - b.eos), length - 1)] = 1
        torch.testing.assert_close(alignment.mapping[:, j], wanted)


def test_a_word_of_more_tokens_shares_out_the_old_words_attention(tokenizer: CLIPTokenizer) -> None:
    a, b = tokenize(tokenizer, "a man here"), tokenize(tokenizer, "a xylophonist here")
    alignment = align_prompts(a, b)
    new = b.find("xylophonist")
    attention = torch.zeros(a.input_ids.shape[1])
    attention[list(a.find("man"))] = 0.6
    torch.testing.assert_close((attention @ alignment.mapping)[list(new)], torch.full((len(new),), 0.6 / len(new)))
