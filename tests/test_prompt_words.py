"""Words of a text in any script, phrases in it, and what is written around words: weights, token-like words."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2edit_pipeline.prompt_words import (
    close_words,
    find_phrase,
    insert_token,
    names_something,
    parse_weights,
    split_words,
    unknown_tokens,
    vector_names,
    words_of,
)

# letters of many scripts, accents, emoji with joiners, blanks with and without width, brackets, half characters aside
ANY = st.text(
    st.one_of(
        st.characters(exclude_categories=("Cs",)),
        st.sampled_from(
            "aé e\u0301女が\u304b\u3099กำ한\u1112\u1161\u11ab न\u093f\u094d[]<>I_1'’-(): \u200b\u200d\u00ad👩👧🏽🇩🇪\n"
        ),
    ),
    max_size=30,
)


# ---------------------------------------------------------------------------- words


@settings(max_examples=300, deadline=None)
@given(ANY)
def test_words_are_the_text_but_for_its_blanks(text: str) -> None:
    words = words_of(text, ["[I]"])
    end = 0
    for word in words:
        assert end <= word.start < word.end
        between, end = text[end : word.start], word.end
        for c in between:  # blanks, and what has no shape beside them
            assert c.isspace() or unicodedata.category(c) in ("Cc", "Cf", "Zs", "Zl", "Zp"), (between, text)
        assert word.text
    assert all(c.isspace() or unicodedata.category(c)[0] in "CZ" for c in text[end:])


@settings(max_examples=300, deadline=None)
@given(ANY)
def test_composed_and_decomposed_spellings_have_the_same_words(text: str) -> None:
    composed, decomposed = (split_words(unicodedata.normalize(form, text)) for form in ("NFC", "NFD"))
    assert composed == decomposed


@settings(max_examples=200, deadline=None)
@given(st.text("abC 'z-_,.9?!", max_size=30))
def test_english_words_are_runs_of_letters_and_single_marks(text: str) -> None:
    naive = [word.lower() for word in re.findall(r"\w+(?:['-]\w+)*|[^\w\s]", text)]
    assert split_words(text) == naive


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from("a lady with glasses [I] , man's beard smiling नमस्ते".split()), min_size=1, max_size=12))
def test_splitting_is_what_joining_made(words: list[str]) -> None:
    assert split_words(" ".join(words), ["[I]"]) == words


def test_accents_and_vowel_signs_stay_with_their_letter() -> None:
    assert split_words("नमस्ते दुनिया") == ["नमस्ते", "दुनिया"]  # Hindi: virama and vowel signs are no letters
    assert split_words("cafe\u0301 CAFÉ") == ["café", "café"]
    assert split_words("STRASSE Straße") == ["strasse", "strasse"]
    assert split_words("می\u200cخواهم") == ["میخواهم"]  # a joiner without width, of Persian
    assert split_words("ខ្មែរ") == ["ខ្មែ", "រ"]  # Khmer: the sign under the first consonant takes the second
    assert split_words("α\u0345\u0301") == split_words("\u1fb4")  # accents in another order
    (word,) = words_of("e\u0301te\u0301")
    assert (word.start, word.end) == (0, 5)  # as it was written


def test_marks_and_emoji_are_words_of_their_own() -> None:
    assert split_words('(hi"),') == ["(", "hi", '"', ")", ","]
    family = "👩\u200d👩\u200d👧"
    assert [word.end - word.start for word in words_of(f"{family}👍🏽🇩🇪❤\ufe0f")] == [5, 2, 2, 2]
    assert find_phrase(f"a {family} b", family) == [(2, 7)]
    assert split_words("❤\ufe0f") == split_words("❤")


def test_learned_names_are_whole_and_exact() -> None:
    assert split_words("a [I] [i] <Ada>man", ["[I]", "<Ada>"]) == ["a", "[I]", "[", "i", "]", "<Ada>", "man"]
    assert split_words("[I]2", ["[I]", "[I]2"]) == ["[I]2"]  # the longest


# ---------------------------------------------------------------------------- phrases


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from("a b man Man's".split()), max_size=8),
    st.lists(st.sampled_from("a b man".split()), max_size=3),
)
def test_phrases_are_found_wherever_their_words_are_in_a_row(words: list[str], phrase: list[str]) -> None:
    text = " ".join(words)
    naive = []
    for i in range(len(words) - len(phrase) + 1):
        row = [word.lower() for word in words[i : i + len(phrase)]]
        whole, owned = row == phrase, phrase and row == [*phrase[:-1], phrase[-1] + "'s"]
        if phrase and (whole or owned):
            start = len(" ".join([*words[:i], ""])) if i else 0
            length = len(" ".join(words[i : i + len(phrase)])) - (2 if owned else 0)
            naive.append((start, start + length))
    assert find_phrase(text, " ".join(phrase)) == naive


@pytest.mark.parametrize(
    ("text", "phrase", "found"),
    [
        ("一个女人的照片", "女人", ["女人"]),
        ("悲しい女性の写真、女性", "女性", ["女性", "女性"]),
        ("ภาพถ่ายของผู้หญิงยิ้ม", "ผู้หญิง", ["ผู้หญิง"]),
        ("웃는 여자의 사진", "여자", ["여자"]),
        (unicodedata.normalize("NFD", "웃는 여자의 사진"), "여자", [unicodedata.normalize("NFD", "여자")]),
        ("フォトが写真", "か", []),  # か with a voicing sign is another character
        (unicodedata.normalize("NFD", "が写真"), "が", [unicodedata.normalize("NFD", "が")]),
        ("a Café", "cafe\u0301", ["Café"]),
        ("the man’s glasses", "man", ["man"]),
        ("the MAN'S glasses", "man", ["MAN"]),
        ("the man’s glasses", "man's", ["man’s"]),
        ("a lady-like lady", "lady", ["lady"]),
        ("a well‑known man", "well-known", ["well‑known"]),
        ('he said "hi"), ok', ",", [","]),
        ("a 😀🎉 b", "🎉", ["🎉"]),
        ("isn't it", "isn", []),
        ("a man", "", []),
    ],
)
def test_a_phrase_is_found_as_people_write_it(text: str, phrase: str, found: list[str]) -> None:
    assert [text[start:end] for start, end in find_phrase(text, phrase)] == found


def test_an_inversion_of_several_vectors_is_found_whole() -> None:
    learned = ["<cat>", "<cat>_1", "<cat>_2", "<dog>", "<cat>_4"]
    assert vector_names("<cat>", learned) == ["<cat>", "<cat>_1", "<cat>_2"]
    text = "a <cat> <cat>_1 <cat>_2 and a <dog> on a <cat>"
    assert [text[a:b] for a, b in find_phrase(text, "a <cat>", learned)] == ["a <cat> <cat>_1 <cat>_2", "a <cat>"]
    assert [text[a:b] for a, b in find_phrase(text, "<cat>_1", learned)] == ["<cat>_1"]


# ---------------------------------------------------------------------------- the subject


def test_the_token_goes_before_the_subject() -> None:
    assert insert_token("a photo of a lady with glasses", "lady", "[I]") == "a photo of a [I] lady with glasses"
    assert insert_token("A Lady, lady-like", "lady", "[I]") == "A [I] Lady, lady-like"  # the word, not a part of one
    assert insert_token("an old lady", "old lady", "[I]") == "an [I] old lady"
    assert insert_token("a [I] lady and a lady", "lady", "[I]") == "a [I] lady and a lady"  # holds it already
    assert insert_token("a lady and a lady", "lady", "[I]") == "a [I] lady and a [I] lady"
    assert insert_token("the man's glasses", "man", "[I]") == "the [I] man's glasses"
    assert insert_token("一个女人的照片", "女人", "[I]") == "一个[I]女人的照片"


def test_a_subject_that_is_not_there_is_refused() -> None:
    for subject in ("man", "", "lady photo", "lad"):
        with pytest.raises(ValueError, match=r"is not in the prompt 'photo lady'.*one of: photo, lady"):
            insert_token("photo lady", subject, "[I]")
    with pytest.raises(ValueError, match="the prompt is empty"):
        insert_token("", "lady", "[I]")
    with pytest.raises(
        ValueError, match=r"The identity \[I\] was fitted to 'man', which is not in the prompt 'a lady'"
    ):
        insert_token("a lady", "man", "[I]", fitted=True)


@pytest.mark.parametrize(
    ("subject", "word"),
    [
        ("lady", "ladies"), ("man", "men"), ("woman", "women"), ("wolf", "wolves"), ("box", "boxes"), ("dogs", "dog"),
        ("old lady", "old ladies"), ("person", "people"), ("smiling", "smilling"), ("fireman", "firemen"),
    ],
)  # fmt: skip
def test_a_plural_or_a_slip_is_pointed_out(subject: str, word: str) -> None:
    assert close_words(subject, f"a photo of the {word} here")[0] == word
    with pytest.raises(ValueError, match=f"'{word}' is in the prompt; pass subject='{word}'"):
        insert_token(f"a photo of the {word} here", subject, "[I]")


def test_unlike_words_are_not_pointed_out() -> None:
    assert close_words("man", "a photo of a lady with glasses") == []
    with pytest.raises(ValueError, match=r"one of: 女人, a\.$"):  # characters in a row are shown as one word
        insert_token("女人 a", "man", "[I]")


def test_function_words_and_marks_name_nothing() -> None:
    named = [word for word in split_words("a man without the glasses, and no beard 😀 女 — 3") if names_something(word)]
    assert named == ["man", "glasses", "beard", "😀", "女", "3"]


# ---------------------------------------------------------------------------- token-like words


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("a [I] man", []),
        ("a [i] man with [l] and [ada]", ["[i]", "[l]", "[ada]"]),
        ("an <ada> and an <ada> and <cat-toy>", ["<ada>", "<cat-toy>"]),
        ("[I]man <I>", ["<I>"]),
        ("[a photo] of a man <3 and > that, a < b, [], [ I ]", []),
        ("<*> <s1><s2>", ["<*>", "<s1>", "<s2>"]),
        ("<lora:style:0.8>", ["<lora:style:0.8>"]),
        ("[[I]2]", []),
        ("a [女人]", ["[女人]"]),
    ],
)
def test_token_like_words_that_nothing_stands_for(prompt: str, unknown: list[str]) -> None:
    assert unknown_tokens(prompt, ["[I]"]) == unknown


@settings(max_examples=200, deadline=None)
@given(ANY)
def test_what_is_known_is_never_unknown(text: str) -> None:
    unknown = unknown_tokens(text)
    assert all(text.count(name) and name[0] in "[<" and not any(c.isspace() for c in name) for name in unknown)
    assert not set(unknown_tokens(text, unknown)) & set(unknown)


# ---------------------------------------------------------------------------- weights


@pytest.mark.parametrize(
    ("prompt", "plain", "weights"),
    [
        ("a (smiling:1.4) man", "a smiling man", {"smiling": 1.4}),
        ("a (smiling) ((man))", "a (smiling) ((man))", {}),
        ("a [smiling] [I] man", "a [smiling] [I] man", {}),
        ("a ([I] old man:1.2)", "a [I] old man", {"[I] old man": 1.2}),
        ("( a hat : .5 ) on", "a hat on", {"a hat": 0.5}),
        ("(a:-1),(b:+2.)", "a,b", {"a": -1.0, "b": 2.0}),
        ("((a hat:1.5) on a man:2)", "a hat on a man", {"a hat": 3.0, "on a man": 2.0}),
        ("(man:1)", "man", {}),
        (r"\(man:1.4\) \(b\)", "(man:1.4) (b)", {}),
        (r"(a smiley \(hat\):1.3)", "a smiley (hat)", {"a smiley (hat)": 1.3}),
        ("C++ smiling++ hat-- (hat)1.2", "C++ smiling++ hat-- (hat)1.2", {}),
        ("(16:9) (at 5:30) (a ratio of 3 : 2)", "(16:9) (at 5:30) (a ratio of 3 : 2)", {}),
        ("(man:x) (:1.2) (man:1.4", "(man:x) (:1.2) (man:1.4", {}),
        ("(man:1.4))", "man)", {"man": 1.4}),
        ("(一个女人:1.4)的", "一个女人的", {"一个女人": 1.4}),
    ],
)
def test_weights_written_into_a_prompt(prompt: str, plain: str, weights: dict[str, float]) -> None:
    assert parse_weights(prompt)[0] == plain
    assert parse_weights(prompt)[1] == pytest.approx(weights)


def test_a_phrase_has_one_weight_wherever_it_is() -> None:
    assert parse_weights("(red:2) hat, (red:2) shirt")[1] == {"red": 2.0}
    with pytest.raises(ValueError, match=r"'red' has two weights, 2 and 3"):
        parse_weights("(red:2) hat, (red:3) shirt")
    with pytest.raises(ValueError, match=r"'red' is in 'red hat, red shirt' with the weight 2 and without"):
        parse_weights("(red:2) hat, red shirt")
    for prompt in ("(a:1.2)(b:1.3)", "(sun:1.2)glasses", "sun(glasses:1.2)"):
        with pytest.raises(ValueError, match=r"it ends within '\w+'"):
            parse_weights(prompt)


@settings(max_examples=200, deadline=None)
@given(st.text("ab (:1.)\\", max_size=20))
def test_weighted_phrases_are_in_the_plain_prompt(prompt: str) -> None:
    try:
        plain, weights = parse_weights(prompt)
    except ValueError as error:
        assert "weight" in str(error)
        return
    assert all(find_phrase(plain, phrase) for phrase in weights)
    assert sum(map(len, plain.split())) <= sum(map(len, prompt.split()))
    if "\\" not in prompt and ":" not in prompt:
        assert (plain, weights) == (prompt, {})
