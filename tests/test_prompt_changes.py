"""Target prompts made from source prompts: against the captioner's own captions, and sentence by sentence."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2edit_pipeline.avatars.captions import describe
from s2edit_pipeline.avatars.world import Subject, sample
from s2edit_pipeline.prompt_changes import change_words, prompt_warning, shared_words
from s2edit_pipeline.prompt_parts import parts_of, pieces_of
from s2edit_pipeline.prompt_words import insert_token

SAD = "a photo of a sad lady with long hair and a blue hat on a grey background"


# ---------------------------------------------------------------------------- the captioner's captions

Change = dict[str, Any]


def _thing(subject: Any, name: str) -> str:
    return f"{getattr(subject, name + '_color')} {getattr(subject, name)}"


def _hair(subject: Any) -> str:
    return f"{subject.hair.replace(' straight', '')} {subject.hair_color} hair"


def _changes(before: Any, after: Any) -> Change:
    """What to ask of ``change_words`` to come from one caption to the other, attribute by attribute."""
    replace: dict[str, str] = {}
    add: list[str] = []
    remove: list[str] = []

    def differs(old: str | None, new: str | None, named: str | None = None) -> None:
        if old == new:
            return
        if old is not None and new is not None:
            replace[old] = new
        elif new is not None:
            add.append(new)
        elif old is not None:
            remove.append(named or old)

    for name in ("glasses", "facial_hair", "pattern"):
        if name in before.ATTRIBUTES:
            old, new = (None if getattr(one, name) == "none" else getattr(one, name) for one in (before, after))
            differs(old, new)
    wears = [one.headwear != "none" for one in (before, after)]
    differs(*(_thing(one, "headwear") if worn else None for one, worn in zip((before, after), wears, strict=True)))
    differs(before.expression, after.expression)
    differs(f"{before.background} background", f"{after.background} background")
    if "hair" in before.ATTRIBUTES:
        bald = [one.hair == "bald" and not worn for one, worn in zip((before, after), wears, strict=True)]
        shown = [not worn and one.hair != "bald" for one, worn in zip((before, after), wears, strict=True)]
        differs(*("bald" if is_so else None for is_so in bald))
        differs(*(_hair(one) if is_so else None for one, is_so in zip((before, after), shown, strict=True)), "hair")
        differs(_thing(before, "clothes"), _thing(after, "clothes"))
    else:
        differs(f"{before.fur_color} {before.species}", f"{after.fur_color} {after.species}")
    return {"replace": replace, "add": add, "remove": remove}


@functools.cache
def _edits() -> list[tuple[Subject, Subject]]:
    edits = []
    for kind in ("person", "creature"):
        for seed in range(60):
            subject = sample(kind, seed)
            for name, values in subject.ATTRIBUTES.items():
                if subject.shows(name):
                    value = values[seed % len(values)]
                    edits.append((subject, subject.edited(**{name: value})))
    return edits


def test_changed_captions_are_what_the_captioner_says_of_the_changed_subject() -> None:
    edits = _edits()
    assert len(edits) > 800
    kinds = {"replace": 0, "add": 0, "remove": 0}
    for before, after in edits:
        source, wanted = describe(before).text, describe(after).text
        changes = _changes(before, after)
        made = change_words(source, **changes)
        if changes["add"] or changes["remove"]:  # things are added at the list's end
            assert sorted(made.split()) == sorted(wanted.split()), (source, changes, made, wanted)
            assert made.split(" with ")[0].split(" on ")[0] == wanted.split(" with ")[0].split(" on ")[0]
            assert made.split(" on ")[1:] == wanted.split(" on ")[1:]
        else:
            assert made == wanted, (source, changes)
        for name in kinds:
            kinds[name] += bool(changes[name])
    assert min(kinds.values()) > 50, kinds


def test_the_learned_token_stays_where_it_is() -> None:
    for before, after in _edits()[::7]:
        source, noun = describe(before).text, before.noun
        changes = _changes(before, after)
        if any(noun in phrase for phrase in changes["replace"]):  # "orange cat" is no two words in a row then
            continue
        with_token = change_words(insert_token(source, noun, "[I]"), **changes)
        assert with_token == insert_token(change_words(source, **changes), noun, "[I]")


# ---------------------------------------------------------------------------- sentences


@pytest.mark.parametrize(
    ("source", "replace", "target"),
    [
        (SAD, {"sad": "angry"}, SAD.replace("a sad", "an angry")),
        (SAD, {"Sad": "smiling", "grey": "orange"}, SAD.replace("sad", "smiling").replace("a grey", "an orange")),
        (SAD, {"long hair": "short red hair", "hair": "x"}, SAD.replace("long", "short red")),  # the longer phrase
        ("sad sad man", {"sad": "angry", "angry": "x"}, None),
        ("a cat and a dog", {"cat": "dog", "dog": "cat"}, "a dog and a cat"),  # at once
        ("an old [I] lady", {"old": "young"}, "a young [I] lady"),
        ("a [I] lady", {"lady": "old lady"}, "an [I] old lady"),
        ("the man's hat", {"man": "woman"}, "the woman's hat"),
        ("Sad man, sad dog", {"sad": "angry"}, "Angry man, angry dog"),
        ("A photo of a man", {"a photo": "an oil painting"}, "An oil painting of a man"),
        ("a man with a hat", {"hat": "a crown"}, "a man with a crown"),
        ("a man with a hat", {"hat": "glasses"}, "a man with glasses"),
        ("a man with red overalls", {"overalls": "shirt"}, "a man with a red shirt"),
        ("a man with glasses", {"glasses": "sunglasses"}, "a man with sunglasses"),
        ("a photo of James", {"James": "Tom"}, "a photo of Tom"),
        ("an hour before", {"hour": "week"}, "a week before"),
        ("a man", {"man": "unicorn"}, "a unicorn"),
        ("a man", {"man": "8-year-old"}, "an 8-year-old"),
        ("a man", {"man": "umbrella"}, "an umbrella"),
        ("a man", {"man": "user"}, "a user"),
        ("一个女人的照片", {"女人": "男人"}, "一个男人的照片"),
        ("ein Foto einer Frau mit Brille", {"Brille": "Hut"}, "ein Foto einer Frau mit Hut"),
        ("  a cat\n", {"cat": "dog"}, "  a dog\n"),
    ],
)
def test_words_are_exchanged(source: str, replace: dict[str, str], target: str | None) -> None:
    if target is None:
        with pytest.raises(ValueError, match="is not in the prompt"):
            change_words(source, replace=replace)
    else:
        assert change_words(source, replace=replace) == target


@pytest.mark.parametrize(
    ("source", "remove", "target"),
    [
        (SAD, ["hat"], "a photo of a sad lady with long hair on a grey background"),
        (SAD, ["long hair"], "a photo of a sad lady with a blue hat on a grey background"),
        (SAD, ["hat", "hair"], "a photo of a sad lady on a grey background"),
        (SAD, ["long hair and a blue hat"], "a photo of a sad lady on a grey background"),
        (SAD, ["background"], "a photo of a sad lady with long hair and a blue hat"),
        (SAD, ["blue", "sad"], "a photo of a lady with long hair and a hat on a grey background"),
        ("an orange cat", ["orange"], "a cat"),
        ("an [I] old lady", ["old"], "a [I] lady"),
        ("a man with a beard and glasses", ["beard"], "a man with glasses"),
        ("a man with a beard", ["beard"], "a man"),
        ("a man with a beard.", ["beard"], "a man."),
        ("a man with a beard, glasses and a hat", ["hat"], "a man with a beard and glasses"),
        ("a man with a beard, glasses and a hat", ["glasses"], "a man with a beard and a hat"),
        ("a man with a beard, glasses, and a hat", ["beard"], "a man with glasses and a hat"),
        ("a man with a beard, glasses, a scarf, and a hat", ["scarf"], "a man with a beard, glasses, and a hat"),
        ("a man wearing a hat and glasses", ["hat"], "a man wearing glasses"),
        ("a man wearing a hat", ["hat"], "a man"),
        ("a woman standing in a park", ["park"], "a woman standing"),
        ("a man smiling", ["smiling"], "a man"),
        ("a man with a red hat on his head and a scarf", ["hat"], "a man with a scarf"),
        ("a man holding a cup of tea", ["cup"], "a man"),
        ("a man with a beard, smiling, studio light", ["beard"], "a man, smiling, studio light"),
        ("portrait of a man, beard, smiling", ["beard"], "portrait of a man, smiling"),
        ("a man with no beard", ["beard"], "a man"),
        ("a lady with glasses and glasses", ["glasses"], "a lady"),
        ("a dog and a cat with a ball", ["cat"], "a dog with a ball"),
        ("a man with a beard (studio)", ["beard"], "a man (studio)"),
        ("a man with the lady's hat", ["hat"], "a man"),
    ],
)  # fmt: skip
def test_words_are_taken_away_with_what_joins_them(source: str, remove: list[str], target: str) -> None:
    assert change_words(source, remove=remove) == target


@pytest.mark.parametrize(
    ("source", "add", "target"),
    [
        (SAD, ["glasses"], SAD.replace(" on a", " and glasses on a")),
        (SAD, ["beard", "a red umbrella"], SAD.replace(" on a", " and a beard and a red umbrella on a")),
        (SAD, ["smiling"], SAD.replace("a sad", "a smiling sad")),
        (SAD, ["orange"], SAD.replace("a sad", "a sad orange")),
        ("a photo of a lady with long hair", ["glasses"], "a photo of a lady with long hair and glasses"),
        ("a photo of a man", ["glasses"], "a photo of a man with glasses"),
        ("a photo of a [I] man", ["angry", "old", "hat"], "a photo of an angry old [I] man with a hat"),
        ("a woman standing in a park", ["glasses"], "a woman with glasses standing in a park"),
        ("a woman standing in a park", ["an orange hat"], "a woman with an orange hat standing in a park"),
        ("portrait of a man, studio light", ["orange hat"], "portrait of a man with an orange hat, studio light"),
        ("portrait of a man with a beard, 4k", ["hat"], "portrait of a man with a beard and a hat, 4k"),
        ("a man wearing a hat", ["glasses"], "a man with glasses wearing a hat"),
        ("a man without glasses", ["glasses"], "a man with glasses"),
        ("a man with no beard", ["a beard"], "a man with a beard"),
        ("a man without glasses or a beard", ["beard"], "a man with a beard without glasses"),
        ("a dog and a cat", ["ball"], "a dog and a cat with a ball"),
        ("a man", ["red overalls", "long hair", "dress"], "a man with red overalls and long hair and a dress"),
        ("a man with a hat.", ["smiling", "glasses"], "a smiling man with a hat and glasses."),
        ("man", ["smiling"], "smiling man"),
    ],
)
def test_things_join_the_list_and_states_go_before_the_subject(source: str, add: list[str], target: str) -> None:
    assert change_words(source, add=add) == target


def test_all_three_at_once_and_one_word_for_a_list() -> None:
    made = change_words(SAD, replace={"sad": "smiling"}, add="glasses", remove="hat")
    assert made == "a photo of a smiling lady with long hair and glasses on a grey background"
    assert change_words(SAD) == SAD


def test_the_subject_may_be_named() -> None:
    source = "a park at night with a man on a bench"
    assert change_words(source, add=["smiling"], subject="man") == "a park at night with a smiling man on a bench"
    with pytest.raises(ValueError, match="'dog' is not in the prompt"):
        change_words(source, add=["smiling"], subject="dog")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"replace": {"smilng": "sad"}}, r"'smilng' is not in the .*words are: a, photo, .*Did you mean 'smiling'\?"),
        ({"remove": ["hats"]}, r"'hats' is not in the prompt .*Did you mean 'hat'\?"),
        ({"remove": ["lady"]}, "'lady' is what the prompt is about"),
        ({"add": ["hat"]}, "'hat' is in the prompt already"),
        ({"remove": ["hat", "blue"]}, "remove='blue' is gone already"),
        ({"replace": {"hat": "cap"}, "remove": ["hat"]}, "remove='hat' is gone already"),
        ({"replace": {"hat": " "}}, "holds no word"),
        ({"add": [""]}, "holds no word"),
    ],
)  # fmt: skip
def test_what_cant_be_done_is_refused(changes: Change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        change_words("a photo of a smiling lady with a blue hat", **changes)


@pytest.mark.parametrize(
    "changes", [{"replace": ["a", "b"]}, {"add": [3]}, {"replace": {"lady": None}}, {"remove": [None]}]
)
def test_what_is_no_string_is_refused(changes: Change) -> None:
    with pytest.raises(TypeError, match="must be a"):
        change_words("a lady", **changes)
    with pytest.raises(TypeError, match="A prompt must be a string"):
        change_words(3)  # type: ignore[arg-type]


WORDS = "a an the photo of man lady [I] with and , on hat red smiling glasses no without wearing in .".split()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(WORDS), max_size=12), st.sampled_from(WORDS), st.sampled_from(WORDS))
def test_other_words_stay_in_their_order(words: list[str], gone: str, new: str) -> None:
    """Whatever the sentence: nothing but the named words, articles and what joins them is changed."""
    prompt = " ".join(words)
    joints = {"a", "an", "the", "and", ",", "with", "without", "on", "wearing", "in", "no", "of"}
    for changes in ({"replace": {gone: new}}, {"remove": [gone]}, {"add": [new]}):
        try:
            made = change_words(prompt, **changes)
        except ValueError:
            continue
        before, after = ([p.text for p in pieces_of(text) if p.text not in joints] for text in (prompt, made))
        if "replace" in changes:
            new_words = [p.text for p in pieces_of(new) if p.text not in joints]
            wanted = [w for word in before for w in (new_words if word == gone else [word])]
            if gone not in joints and new not in joints:
                assert after == wanted
        elif "add" in changes and not {"no", "without"} & set(words):  # what these deny is taken back first
            rest = list(after)
            if new not in joints:
                rest.remove(new)
            assert rest == before
        elif "remove" in changes:
            left = iter(before)
            assert all(word in left for word in after)  # in order, none new
            assert gone not in after or gone in joints


def test_a_phrase_whose_noun_is_inside_it() -> None:
    assert change_words("a 's ,b", replace={"'s": "b"}) == "a b ,b"


@settings(max_examples=80, deadline=None)
@given(st.lists(st.sampled_from([*WORDS, "man's", "女人", "é", "\n", "(", "'s"]), max_size=8), st.text(max_size=8))
def test_nothing_but_a_refusal_comes_of_any_text(words: list[str], other: str) -> None:
    prompt = " ".join(words) + other
    for phrase in (*words[:3], other):
        for changes in ({"replace": {phrase: other}}, {"remove": [phrase]}, {"add": [phrase]}):
            try:
                assert isinstance(change_words(prompt, **changes), str)
            except ValueError as error:
                assert "prompt" in str(error) or "holds no word" in str(error) or "gone" in str(error)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30))
def test_parts_are_all_of_the_text(text: str) -> None:
    pieces = pieces_of(text)
    parts = parts_of(pieces)
    assert [piece for part in parts for piece in (*part.lead, *part.body)] == pieces


# ---------------------------------------------------------------------------- what two prompts share


def test_shared_words_are_those_of_the_source() -> None:
    assert shared_words("a photo of a sad man", "a photo of a happy man") == 0.5
    assert shared_words("a sad man with a hat and a hat", "a hat") == pytest.approx(1 / 4)
    assert shared_words("a [I] man", "a man") == 1.0
    assert shared_words("with a", "man") == 1.0


@pytest.mark.parametrize(
    ("source", "target", "warns"),
    [
        ("a sad man with a hat", "make him smile", "reads like an instruction"),
        ("a sad man with a hat", "Please add glasses", "reads like an instruction"),
        ("make up on a face", "make up on a smiling face", None),
        ("a photo of a surprised man with short curly black hair", "a photo of a smiling [I] man", "few words"),
        ("a photo of a cat", "a photo of a dog", None),
        ("a photo of a sad man", "a photo of a smiling man", None),
        (SAD, change_words(SAD, replace={"sad": "smiling"}, remove=["hat"]), None),
        (SAD, "a lady", "repeat every word that you want to keep"),
        ("", "make him smile", "reads like an instruction"),
        ("", "", None),
    ],
)
def test_targets_that_leave_words_out_or_give_orders_are_warned_of(source: str, target: str, warns: str | None) -> None:
    warning = prompt_warning(source, target)
    assert warning is None if warns is None else warning is not None and warns in warning


def test_no_edit_of_the_captions_is_warned_of() -> None:
    for before, after in _edits()[::3]:
        assert prompt_warning(describe(before).text, describe(after).text) is None
