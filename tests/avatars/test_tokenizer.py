import itertools
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2edit_pipeline.avatars.captions import describe
from s2edit_pipeline.avatars.people import NOUNS
from s2edit_pipeline.avatars.tokenizer import MAX_LENGTH, build_tokenizer, save_tokenizer
from s2edit_pipeline.avatars.world import PARTS, PERSON_ATTRIBUTES, sample_person


def _merge(word, ranks):
    """Byte-pair encoding as published: join the pair of lowest rank, everywhere, until none is left."""
    symbols = [*word[:-1], word[-1] + "</w>"]
    while len(symbols) > 1:
        best = min(itertools.pairwise(symbols), key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        joined, i = [], 0
        while i < len(symbols):
            if tuple(symbols[i : i + 2]) == best:
                joined.append("".join(best))
                i += 2
            else:
                joined.append(symbols[i])
                i += 1
        symbols = joined
    return symbols


def test_each_word_of_a_caption_is_one_token(tokenizer):
    rng = random.Random(1)
    words = {w for i in range(1000) for w in describe(sample_person(i, "held_out"), rng).words}
    words |= {*NOUNS, *(w for values in PERSON_ATTRIBUTES.values() for value in values for w in value.split())}
    words |= {p for p in PARTS if "_" not in p} - {"pattern"}  # which nobody says: stripes and dots are named
    ids = {word: tokenizer(word, add_special_tokens=False).input_ids for word in sorted(words)}
    assert {word: len(i) for word, i in ids.items() if len(i) != 1} == {}
    assert len({i[0] for i in ids.values()}) == len(words)


def test_captions_are_wrapped_padded_and_cut(tokenizer):
    rng = random.Random(2)
    for i in range(200):
        caption = describe(sample_person(i), rng)
        ids = tokenizer(caption.text, padding="max_length", truncation=True).input_ids
        used = len(caption.words) + 2
        assert len(ids) == MAX_LENGTH == tokenizer.model_max_length
        assert ids[0] == tokenizer.bos_token_id
        assert ids[used - 1 :] == [tokenizer.eos_token_id] * (MAX_LENGTH - used + 1)
        assert tokenizer.decode(ids, skip_special_tokens=True) == caption.text
    long = tokenizer("hat " * 100, truncation=True).input_ids
    assert len(long) == MAX_LENGTH and long[-1] == tokenizer.eos_token_id


@pytest.fixture(scope="module")
def ranks(tokenizer):
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return {tuple(pair): rank for rank, pair in enumerate(merges)}


@settings(max_examples=200, deadline=None)
@given(word=st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=12))
def test_any_word_is_split_by_the_learned_merges(tokenizer, ranks, word):
    assert tokenizer.tokenize(word) == _merge(word, ranks)


@settings(max_examples=100, deadline=None)
@given(text=st.text(min_size=1, max_size=20))
def test_nothing_is_unknown(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.unk_token_id not in ids
    if not text.isspace():
        assert ids or not tokenizer.backend_tokenizer.normalizer.normalize_str(text).strip()


def test_an_unknown_word_costs_more_tokens_and_comes_back(tokenizer):
    ids = tokenizer("a photo of a Zebra with 3 wings", add_special_tokens=False).input_ids
    assert len(ids) > 8
    assert tokenizer.decode(ids) == "a photo of a zebra with 3 wings"


def test_the_vocabulary_is_in_clips_order(tokenizer):
    symbols = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    assert [len(s) for s in symbols[:256]] == [1] * 256
    assert symbols[256:512] == [s + "</w>" for s in symbols[:256]]
    assert symbols[-2:] == ["<|startoftext|>", "<|endoftext|>"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (len(symbols) - 2, len(symbols) - 1)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_it_is_built_the_same_twice_and_kept_the_same(tokenizer, tmp_path):
    assert build_tokenizer().backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    kept = save_tokenizer(tmp_path)
    text = ["a photo of a SMILING lady, with sunglasses!", "", "hat " * 60]
    assert kept(text, padding="max_length", truncation=True) == tokenizer(text, padding="max_length", truncation=True)
    assert type(kept) is type(tokenizer)
