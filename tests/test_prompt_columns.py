"""Prompts as tokenizers of CLIP's, T5's and Qwen's classes cut them, alone and together."""

from __future__ import annotations

import copy
import unicodedata
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AddedToken, CLIPTokenizer, Qwen2Tokenizer, T5Tokenizer

from s2edit_pipeline.avatars.tokenizer import build_tokenizer
from s2edit_pipeline.prompt_columns import TokenizedPrompt, one_after_another, side_by_side, with_summary
from s2edit_pipeline.prompt_tokenizing import PromptTemplate, learned_tokens, tokenize, unknown_words
from s2edit_pipeline.prompt_tokens import with_tokens
from s2edit_pipeline.prompt_words import find_phrase, words_of

LIMIT = 40
PIECES = [*"a é女がผู้ลนि()\"'’-,. \n😀!", " [I] ", "man", "e\u0301", "<|endoftext|>", "</s>"]
ANY = st.lists(st.one_of(st.characters(exclude_categories=("Cs",)), st.sampled_from(PIECES)), max_size=12).map("".join)


@pytest.fixture(scope="module")
def clip(clip_tokenizer: CLIPTokenizer) -> CLIPTokenizer:
    return clip_tokenizer


@pytest.fixture(scope="module")
def learned_clip() -> Any:
    """A small vocabulary that knows [I]: copies of CLIP's own take seconds."""
    return with_tokens(build_tokenizer(num_captions=200), ["[I]"])


@pytest.fixture(scope="module")
def tokenizers(learned_clip: Any, t5_tokenizer: T5Tokenizer, qwen_tokenizer: Qwen2Tokenizer) -> dict[str, Any]:
    """Of each class; Qwen's knows [I] too, T5's doesn't."""
    return {"clip": learned_clip, "t5": t5_tokenizer, "qwen": with_tokens(qwen_tokenizer, ["[I]"])}


def together(tokenizers: dict[str, Any], text: str, **more: Any) -> TokenizedPrompt:
    """As an encoder of each class reads it, one after the other."""
    names = ["[I]"]
    return one_after_another(
        [tokenize(t, text, name=name, limit=LIMIT, learned=names, **more) for name, t in tokenizers.items()]
    )


# ---------------------------------------------------------------------------- ids


@pytest.mark.parametrize("text", ["a photo of a man, (smiling)", "", "  女性 \n", "man " * 60, "a <|endoftext|> man"])
@pytest.mark.parametrize("kind", ["clip", "t5", "qwen"])
def test_ids_are_those_that_diffusers_pipelines_ask_for(tokenizers: dict[str, Any], kind: str, text: str) -> None:
    tokenizer = tokenizers[kind]
    stock = tokenizer(text, padding="max_length", max_length=LIMIT, truncation=True, return_tensors="pt")
    prompt = tokenize(tokenizer, text, name=kind, limit=LIMIT, truncate=True)
    torch.testing.assert_close(prompt.ids[kind], stock.input_ids)
    torch.testing.assert_close(prompt.segments[0].masks[kind], stock.attention_mask)
    bare = tokenizer(text, max_length=LIMIT, truncation=True).input_ids
    assert tokenize(tokenizer, text, limit=LIMIT, truncate=True, pad=False).input_ids.tolist() == [bare]


def test_padding_on_the_left_is_counted(qwen_tokenizer: Qwen2Tokenizer) -> None:
    left = copy.deepcopy(qwen_tokenizer)
    left.padding_side = "left"
    prompt, bare = tokenize(left, "a man", limit=20), tokenize(qwen_tokenizer, "a man", limit=20)
    (segment,) = prompt.segments
    assert prompt.input_ids.tolist() == [left("a man", padding="max_length", max_length=20).input_ids]
    shift = 20 - bare.eos
    assert (segment.start, segment.eos) == (shift, 20)
    assert prompt.find("man") == tuple(shift + column for column in bare.find("man"))


def test_a_tokenizer_without_limit_is_asked_for_one(t5_tokenizer: T5Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"names no limit; .*limit=512"):
        tokenize(t5_tokenizer, "a man")
    assert tokenize(t5_tokenizer, "a man", limit=7).num_columns == 7


# ---------------------------------------------------------------------------- words and columns


def overlapping(prompt: TokenizedPrompt, start: int, end: int) -> list[int]:
    """Columns whose letters overlap ``[start, end)``, letter by letter."""
    letters = set(range(start, end))
    found, offset = [], 0
    for segment in prompt.segments:
        for i, span in enumerate(segment.spans):
            if span is not None and letters & set(range(*span)):
                found.append(offset + i)
        offset += segment.num_columns
    return found


@pytest.mark.parametrize(
    ("text", "phrase", "where"),
    [
        ("the man's glasses", "man", [(4, 7)]),
        ('he said (“hi"), ok', ",", [(14, 15)]),
        ("一个女人的照片", "女人", [(2, 4)]),
        ("a cafe\u0301 and a CAFÉ", "café", [(2, 7), (14, 18)]),
        ("नमस्ते दुनिया", "दुनिया", [(7, 13)]),
        ("a photo of a lady, (lady)", "lady", [(13, 17), (20, 24)]),
        ("a 😀🎉 man", "🎉 man", [(3, 8)]),
        ("ladies and an old lady", "old lady", [(14, 22)]),
    ],
)
def test_a_phrase_has_the_columns_of_its_letters(
    tokenizers: dict[str, Any], clip: Any, text: str, phrase: str, where: list[tuple[int, int]]
) -> None:
    for prompt in (together(tokenizers, text), tokenize(clip, text)):
        wanted = [column for start, end in where for column in overlapping(prompt, start, end)]
        found = prompt.columns(phrase)
        assert found == prompt.find(phrase) and wanted
        spans = [span for segment in prompt.segments for span in segment.spans]
        blank = [c for c in found if spans[c] is not None and not text[slice(*spans[c])].strip()]
        assert [c for c in found if c not in blank] == [c for c in wanted if c not in blank]
        assert all(column + 1 in found for column in blank)  # the space before a word, where it has a token of its own


def test_of_a_possessive_only_the_word_is_meant_where_tokens_end_there(clip: Any) -> None:
    prompt = tokenize(clip, "the man's glasses")
    whole, word = prompt.find("man's"), prompt.find("man")
    assert word == (2,) and set(word) < set(whole)


def test_columns_of_one_segment(tokenizers: dict[str, Any]) -> None:
    prompt = together(tokenizers, "a lady with glasses")
    parts = [prompt.columns("glasses", name) for name in tokenizers]
    assert prompt.columns("glasses") == tuple(column for part in parts for column in part)
    for part, segment in zip(parts, prompt.segments, strict=True):
        assert part and all(column in segment.columns for column in part)
    assert [segment.offset for segment in prompt.segments] == [0, LIMIT, 2 * LIMIT]
    assert prompt.num_columns == 3 * LIMIT
    with pytest.raises(ValueError, match="'vae' is none of clip, t5, qwen"):
        prompt.columns("glasses", "vae")


def test_marks_that_a_tokenizer_joins_are_one_word(clip: Any) -> None:
    prompt = tokenize(clip, 'he said ("hi"), ok')
    joined = [word for word in prompt.words if len(word.text) > 1 and not word.text.isalpha()]
    tokens = [t for word in prompt.words for t in word.tokens]
    assert sorted(tokens) == list(range(1, prompt.eos))
    if len(clip) > 40000:  # CLIP's own vocabulary
        assert [word.text for word in joined] == ['("', "),"]
        assert prompt.find(",") == joined[1].tokens


def test_a_mark_in_a_words_token_leaves_it_the_token(tokenizers: dict[str, Any]) -> None:
    qwen = copy.deepcopy(tokenizers["qwen"])
    qwen.add_tokens([AddedToken("(lady", normalized=False)])
    prompt = tokenize(qwen, "(lady)", limit=LIMIT)
    assert [word.text for word in prompt.words] == ["(lady", ")"]  # as it was added
    by_letters = TokenizedPrompt(prompt.text, prompt.segments)  # as if the vocabulary had had it all along
    assert [word.text for word in by_letters.words] == ["lady", ")"]
    assert by_letters.find("lady") == by_letters.find("(")


@settings(max_examples=150, deadline=None)
@given(ANY)
@example("女性の写真 [I]女性")
@example(" [I] [I] ")
@example('"),\n(')
@example("\u200b\u200d")
def test_words_share_out_the_columns_of_any_text(tokenizers: dict[str, Any], text: str) -> None:
    try:
        prompts = [together(tokenizers, text), together({"clip": tokenizers["clip"]}, text, truncate=True)]
    except ValueError as error:
        assert "tokens and the text encoder reads" in str(error)
        prompts = [together(tokenizers, text, truncate=True)]
    for prompt in prompts:
        tokens = [t for word in prompt.words for t in word.tokens]
        own = [
            segment.offset + i
            for segment in prompt.segments
            for i, span in enumerate(segment.spans)
            if span is not None
        ]
        assert len(set(tokens)) == len(tokens)
        # each column of the text is a word's, unless the text has no word
        assert sorted(tokens) == (own if words_of(text, ["[I]"]) else [])
        spans = [word.span for word in prompt.words]
        assert all(a[1] <= b[0] for a, b in pairwise(spans))
        for segment in prompt.segments:
            ids = next(iter(segment.ids.values()))
            assert ids.shape[1] == segment.num_columns
            assert all(span is None for span in (*segment.spans[: segment.start], *segment.spans[segment.eos :]))
        # letters and learned tokens are the columns that spell them
        for start, end in find_phrase(text, "[I]", ["[I]"]):
            assert set(overlapping(prompt, start, end)) <= set(prompt.find("[I]")) or prompt.lost


def test_blanks_go_with_the_next_word_but_never_with_a_learned_token(tokenizers: dict[str, Any]) -> None:
    prompt = tokenize(tokenizers["qwen"], "a [I] lady", limit=LIMIT)
    pieces = tokenizers["qwen"].convert_ids_to_tokens(prompt.input_ids[0, :4].tolist())
    assert pieces[:3] == ["a", "[I]", "Ġlady"]  # the blank before a learned token goes into it
    assert [word.tokens for word in prompt.words] == [(0,), (1,), (2,)]
    assert prompt.find("[I]") == (1,)


def test_half_a_character_and_no_string_are_refused(clip: Any) -> None:
    with pytest.raises(ValueError, match="half a character at 2"):
        tokenize(clip, "a \ud83d man")
    with pytest.raises(TypeError, match="string, not list"):
        tokenize(clip, ["a man"])  # type: ignore[arg-type]


# ---------------------------------------------------------------------------- what is cut off


@pytest.mark.parametrize("kind", ["clip", "t5", "qwen"])
def test_a_long_prompt_is_refused_or_cut(tokenizers: dict[str, Any], kind: str) -> None:
    text = "a lady and a xylophonist-like man and " * 6 + "glasses"
    with pytest.raises(ValueError, match=f"tokens and the text encoder reads {LIMIT} .*would be cut off"):
        tokenize(tokenizers[kind], text, limit=LIMIT)
    prompt = tokenize(tokenizers[kind], text, limit=LIMIT, truncate=True)
    assert prompt.lost and text.endswith(prompt.lost)
    read = text[: len(text) - len(prompt.lost)]
    # the words before the cut have all their tokens, the first one lost hasn't
    whole = tokenize(tokenizers[kind], text, limit=500)
    for cut, uncut in zip(prompt.words, whole.words, strict=False):
        assert (cut.tokens == uncut.tokens) == (uncut.span[1] <= len(read))
    with pytest.raises(ValueError, match=r"'glasses' is in the prompt .* it was cut off, with"):
        prompt.find("glasses")
    assert tokenize(tokenizers[kind], "a man", limit=LIMIT, truncate=True).lost == ""


def test_what_one_encoder_reads_is_not_lost(tokenizers: dict[str, Any]) -> None:
    text = "a lady " * 20 + "with glasses"
    short = tokenize(tokenizers["clip"], text, name="clip", limit=10, truncate=True)
    long = tokenize(tokenizers["t5"], text, name="t5", limit=200)
    prompt = one_after_another([short, long])
    assert (short.lost != "", prompt.lost) == (True, "")
    assert prompt.columns("glasses") == tuple(10 + column for column in long.columns("glasses"))


# ---------------------------------------------------------------------------- templates


def test_a_template_is_around_the_prompt_and_its_start_may_be_dropped(qwen_tokenizer: Qwen2Tokenizer) -> None:
    template = PromptTemplate("<|im_start|>user\n{}<|im_end|>\n")
    bare = tokenize(qwen_tokenizer, "a lady {}", limit=60, pad=False)
    count = len(qwen_tokenizer("<|im_start|>user\n").input_ids)
    whole = tokenize(qwen_tokenizer, "a lady {}", limit=60, template=template, pad=False)
    assert whole.input_ids.tolist() == [qwen_tokenizer("<|im_start|>user\na lady {}<|im_end|>\n").input_ids]
    assert whole.find("lady") == tuple(count + column for column in bare.find("lady"))
    part = tokenize(
        qwen_tokenizer, "a lady {}", limit=60, template=replace(template, dropped=range(count - 1)), pad=False
    )
    (segment,) = part.segments
    assert part.find("lady") == tuple(1 + column for column in bare.find("lady"))
    assert segment.kept == tuple(range(count - 1, whole.num_columns)) and segment.start == 1
    assert part.input_ids.tolist() == whole.input_ids.tolist()  # the encoder still reads all of it
    assert tokenize(qwen_tokenizer, "", limit=60, template=template).segments[0].start == count
    with pytest.raises(ValueError, match=r"has no '{}'"):
        tokenize(qwen_tokenizer, "a", limit=60, template=PromptTemplate("a photo"))


# ---------------------------------------------------------------------------- several encoders


def test_encoders_side_by_side_share_columns(clip: Any) -> None:
    first, second = (tokenize(clip, "a lady", name=name) for name in ("text_encoder", "text_encoder_2"))
    prompt = side_by_side([first, second])
    assert list(prompt.ids) == ["text_encoder", "text_encoder_2"] and prompt.num_columns == 77
    assert prompt.input_ids_2 is second.ids["text_encoder_2"] and first.input_ids_2 is None
    assert prompt.words == first.words


def test_an_encoder_may_give_a_summary_alone(tokenizers: dict[str, Any]) -> None:
    """FLUX's CLIP, which reads the beginning, while T5 gives the columns."""
    text = "a lady " * 20
    columns = tokenize(tokenizers["t5"], text, name="text_encoder_2", limit=200)
    clip = tokenize(tokenizers["clip"], text, name="text_encoder", limit=12, truncate=True)
    prompt = with_summary(columns, clip)
    assert prompt.words == columns.words and prompt.num_columns == 200 and prompt.lost == ""
    assert prompt.ids == {"text_encoder_2": columns.input_ids, "text_encoder": clip.input_ids}
    assert (prompt.read_by("text_encoder").eos, prompt.read_by("text_encoder_2").eos) == (11, columns.eos)
    with pytest.raises(ValueError, match=r"'vae' is none of .*: text_encoder_2, text_encoder"):
        prompt.read_by("vae")


def test_a_token_may_swallow_the_space_before_it(qwen_tokenizer: Qwen2Tokenizer) -> None:
    """Then what it is put into keeps its tokens (families whose tokens begin with their space)."""
    tokenizer = copy.deepcopy(qwen_tokenizer)
    tokenizer.add_tokens([AddedToken("[I]", normalized=False, lstrip=True)])
    plain, learned = (tokenize(tokenizer, text, limit=LIMIT) for text in ("a photo of a lady", "a photo of a [I] lady"))
    (column,) = learned.find("[I]")
    ids = learned.input_ids[0].tolist()
    assert ids[:column] + ids[column + 1 :] == plain.input_ids[0, :-1].tolist()
    assert [word.text for word in learned.words] == "a photo of a [I] lady".split()


def test_a_second_tokenizer_may_pad_with_a_mark(clip: Any) -> None:
    """As SDXL's: "!" is a special token there, and an ordinary mark of the prompt too."""
    other = copy.deepcopy(clip)
    other.add_special_tokens({"pad_token": AddedToken("!", special=True, normalized=False)})
    prompt = side_by_side([tokenize(t, "wow! a man", name=n) for t, n in ((clip, "one"), (other, "two"))])
    assert [word.text for word in prompt.words] == ["wow", "!", "a", "man"]


def test_tokenizers_that_cut_differently_cant_be_side_by_side(tokenizers: dict[str, Any]) -> None:
    other = build_tokenizer(num_captions=200)
    with pytest.raises(ValueError, match=r"cut 'a sad \[I\] lady' into different tokens at '\[I\]'"):
        side_by_side([tokenize(t, "a sad [I] lady", name=str(t is other)) for t in (tokenizers["clip"], other)])
    with pytest.raises(ValueError, match="of one prompt; these are 'a' and 'b'"):
        one_after_another([tokenize(tokenizers["clip"], text, limit=LIMIT) for text in "ab"])


def test_chinese_words_are_the_coarsest_tokens_of_all_encoders(tokenizers: dict[str, Any]) -> None:
    """Where each of the encoders ends a token, a word ends."""
    text = "一个女人的照片,女性"
    prompt = together(tokenizers, text)
    borders = set(range(len(text) + 1))
    for segment in prompt.segments:
        for span in segment.spans:
            if span is not None:
                borders -= set(range(span[0] + 1, span[1]))
    ends = sorted(borders)
    assert [word.span for word in prompt.words] == list(pairwise(ends))


# ---------------------------------------------------------------------------- learned tokens of several vectors


@pytest.fixture(scope="module")
def with_cat() -> Any:
    tokenizer = build_tokenizer(num_captions=200)
    tokenizer.add_tokens(["<cat>", "<cat>_1", "<cat>_2", "<dog>"])
    return tokenizer


def test_all_vectors_of_an_inversion_answer_to_its_name(with_cat: Any) -> None:
    """Written out by diffusers' ``maybe_convert_prompt`` or not, the ids and the words are the same."""
    from diffusers.loaders import TextualInversionLoaderMixin

    text = "a <cat> and a <dog>, <cat>"
    converted = TextualInversionLoaderMixin().maybe_convert_prompt(text, with_cat)
    assert converted != text
    plain, written = tokenize(with_cat, text), tokenize(with_cat, converted)
    torch.testing.assert_close(plain.input_ids, written.input_ids)
    for prompt in (plain, written):
        assert prompt.find("<cat>") == (2, 3, 4, 9, 10, 11)
        assert prompt.find("<dog>") == (7,)
        assert [word.text for word in prompt.words] == ["a", "<cat>", "and", "a", "<dog>", ",", "<cat>"]
    assert written.find("<cat>_2") == (4, 11)
    twice = tokenize(with_cat, "<cat> <cat>")
    assert [word.tokens for word in twice.words] == [(1, 2, 3), (4, 5, 6)]


def test_learned_tokens_are_added_and_not_special(with_cat: Any, t5_tokenizer: T5Tokenizer) -> None:
    assert learned_tokens(with_cat) == ["<cat>", "<cat>_1", "<cat>_2", "<dog>"]
    assert learned_tokens(t5_tokenizer) == []


# ---------------------------------------------------------------------------- vocabularies


def test_words_that_a_small_vocabulary_lacks_are_named_with_what_is_like_them() -> None:
    tokenizer = with_tokens(build_tokenizer(), ["[I]"])
    assert unknown_words("a photo of a [I] man's moustache, 3 isn't sunglasses", tokenizer) == {}
    found = unknown_words("a smilng lady with a blue swaeter, усами 😀 [J]", tokenizer, ["[J]"])
    assert list(found) == ["smilng", "swaeter", "усами", "😀"]
    assert (found["smilng"], found["swaeter"], found["😀"]) == (["smiling"], ["sweater"], [])


def test_every_word_of_the_captions_is_known() -> None:
    from s2edit_pipeline.avatars.captions import describe
    from s2edit_pipeline.avatars.world import sample

    tokenizer = build_tokenizer()
    captions = [describe(sample(kind, i)).text for kind in ("person", "creature") for i in range(60)]
    assert [caption for caption in captions if unknown_words(caption, tokenizer)] == []


def test_decomposed_text_has_the_composed_texts_ids(clip: Any) -> None:
    text = "a café lady é"
    composed, decomposed = (tokenize(clip, unicodedata.normalize(form, text)) for form in ("NFC", "NFD"))
    torch.testing.assert_close(composed.input_ids, decomposed.input_ids)
    assert [(w.text, w.tokens) for w in composed.words] == [(w.text, w.tokens) for w in decomposed.words]
    assert decomposed.words[1].span == (2, 7) and composed.words[1].span == (2, 6)
