"""How two prompts' words correspond, against written-out tables and against segments aligned alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import CLIPTokenizer

from s2edit_pipeline.avatars.tokenizer import build_tokenizer
from s2edit_pipeline.prompt_alignment import align_prompts, content_words
from s2edit_pipeline.prompt_columns import TokenizedPrompt, one_after_another
from s2edit_pipeline.prompt_tokenizing import PromptTemplate, tokenize
from s2edit_pipeline.prompt_tokens import with_tokens


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


def test_words_of_a_negation_are_looked_at(tokenizer: CLIPTokenizer) -> None:
    """ "with" once "without" changes where the glasses are, and "no" where the beard is."""

    def looked_at(source: str, target: str) -> list[list[str]]:
        prompts = [tokenize(tokenizer, text) for text in (source, target)]
        alignment = align_prompts(*prompts)
        sides = zip(prompts, (alignment.changed_source, alignment.changed_target), strict=True)
        texts = [{word.tokens: word.text for word in prompt.words} for prompt in prompts]
        found = [content_words(prompt, set(changed)) for prompt, changed in sides]
        return [[text[tokens] for tokens in words] for text, words in zip(texts, found, strict=True)]

    assert looked_at("a man with glasses", "a man without glasses") == [["glasses"], ["glasses"]]
    assert looked_at("a man with a beard", "a man with no beard") == [["beard"], ["beard"]]
    assert looked_at("a man with a red hat", "a man without a red hat or glasses, here") == [
        ["red", "hat"], ["red", "hat", "glasses", "here"],
    ]  # fmt: skip
    assert looked_at("a sad man with glasses", "a happy man without glasses") == [["sad"], ["happy", "glasses"]]
    assert looked_at("a man and a lady", "a man or a lady") == [["lady"], ["lady"]]
    assert looked_at("a man", "a man, without") == [[], [",", "without"]]


# ---------------------------------------------------------------------------- several encoders

LIMITS = {"clip": 28, "t5": 30, "qwen": 26}
PAIRS = [
    ("a sad man", "a smiling man"),
    ("a man", "a xylophonist with a beard"),
    ("a lady with glasses, here", "a lady"),
    ("", "a lady"),
    ("一个女人的照片", "一个男人的照片"),
    ("a 女性 man", "a 女性の写真 man"),
]


@pytest.fixture(scope="module")
def reads(tokenizer: CLIPTokenizer, t5_tokenizer: Any, qwen_tokenizer: Any) -> Any:
    """A prompt as encoders of three classes read it: one after the other, or one of them alone."""
    tokenizers = {"clip": tokenizer, "t5": t5_tokenizer, "qwen": qwen_tokenizer}

    def read(text: str, *names: str, **more: Any) -> TokenizedPrompt:
        parts = [tokenize(tokenizers[n], text, name=n, limit=LIMITS[n], **more) for n in names]
        return one_after_another(parts)

    return read


@pytest.mark.parametrize(("source", "target"), PAIRS)
@pytest.mark.parametrize("edit", ["auto", "refine"])
def test_segments_are_aligned_each_in_itself(reads: Any, source: str, target: str, edit: str) -> None:
    """The joint mapping's blocks are those of each encoder alone, wherever all of them see the same words."""
    a, b = (reads(text, *LIMITS) for text in (source, target))
    joint = align_prompts(a, b, edit)
    assert joint.mapping.shape == (sum(LIMITS.values()), sum(LIMITS.values()))
    same_words = source.isascii()
    offset = 0
    outside = joint.mapping.clone()
    for name, size in LIMITS.items():
        alone = align_prompts(reads(source, name), reads(target, name), edit)
        block = slice(offset, offset + size)
        if same_words:
            torch.testing.assert_close(joint.mapping[block, block], alone.mapping)
            torch.testing.assert_close(joint.share[block], alone.share)
            changed = [tuple(i - offset for i in all_of if i in range(offset, offset + size)) for all_of in (
                joint.changed_source, joint.changed_target)]  # fmt: skip
            assert changed == [alone.changed_source, alone.changed_target]
        outside[block, block] = 0
        offset += size
    assert float(outside.abs().sum()) == 0
    # a column either keeps its own map or takes that of source columns of its own segment
    taken = joint.mapping.sum(0)
    assert bool(((taken > 0) == (joint.share == 1)).all())


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_what_is_around_the_prompt_is_tied_by_its_distance(reads: Any, source: str, target: str) -> None:
    template = PromptTemplate("<|im_start|>user\n{}<|im_end|>\n")
    a, b = (reads(text, "qwen", template=template) for text in (source, target))
    mapping = align_prompts(a, b).mapping
    (here,), (there,) = a.segments, b.segments
    assert here.start == there.start > 1
    for j in range(there.start):
        assert mapping[:, j].nonzero().tolist() == [[j]]
    for j in range(there.eos, there.num_columns):
        assert mapping[:, j].nonzero().tolist() == [[min(here.eos + j - there.eos, here.num_columns - 1)]]


def test_padding_on_the_left_is_tied_from_the_prompts_start(qwen_tokenizer: Any) -> None:
    left = copy.deepcopy(qwen_tokenizer)
    left.padding_side = "left"
    a, b = (tokenize(left, text, limit=12) for text in ("a man here", "a man"))
    mapping = align_prompts(a, b).mapping
    (here,), (there,) = a.segments, b.segments
    assert (here.eos, there.eos) == (12, 12) and here.start < there.start
    for j in range(there.start):
        assert mapping[:, j].nonzero().tolist() == [[max(here.start - (there.start - j), 0)]]


def test_prompts_of_different_lengths_and_encoders(reads: Any) -> None:
    a, b = (reads(text, "qwen", pad=False) for text in ("a sad man", "a sad man with glasses"))
    alignment = align_prompts(a, b)
    assert alignment.mapping.shape == (a.num_columns, b.num_columns)
    assert alignment.mapping[: a.num_columns, : a.num_columns].diagonal().tolist() == [1.0] * a.num_columns
    with pytest.raises(ValueError, match=r"different text encoders, \['qwen'\] and \['t5'\]"):
        align_prompts(a, reads("a man", "t5"))


def test_a_word_that_one_encoder_cut_off_is_aligned_in_the_other(reads: Any) -> None:
    text = "a lady and a man and a lady with a beard here and there"
    a, b = (reads(words, "clip", "t5", truncate=True) for words in (text, text.replace("beard", "hat")))
    assert a.segments[1].lost and not a.segments[0].lost and a.lost == ""
    alignment = align_prompts(a, b)
    there = [i for i in b.columns("there")]
    assert there and all(alignment.share[i] == 1 for i in there)


def test_chinese_prompts_share_what_they_have_in_common(tokenizer: CLIPTokenizer) -> None:
    assert by_word(tokenizer, "悲的女性", "笑的女性", "refine") == [(c, (c,)) for c in "的女性"]
    assert by_word(tokenizer, "女性", "女性の写真") == [(c, (c,)) for c in "女性"]
