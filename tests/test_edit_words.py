"""What prompts ask of an edit, word by word."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from s2edit_pipeline.avatars.tokenizer import build_tokenizer
from s2edit_pipeline.edit_settings import EditSettings
from s2edit_pipeline.edit_words import TargetPlan, plan_edits
from s2edit_pipeline.prompt_columns import TokenizedPrompt
from s2edit_pipeline.prompt_tokenizing import tokenize

TOKENIZER = build_tokenizer(num_captions=200)
SOURCE = "a photo of a sad man with a beard"
TARGET = "a photo of a smiling man with glasses and a beard"


def plan(target: str = TARGET, **changes: Any) -> tuple[TargetPlan, TokenizedPrompt, TokenizedPrompt]:
    region = changes.pop("region", None)
    source, wanted = tokenize(TOKENIZER, SOURCE), tokenize(TOKENIZER, target)
    (found,) = plan_edits(source, [wanted], EditSettings(**changes), num_steps=50, region=region)
    return found, source, wanted


def test_shares_become_steps_for_each_word() -> None:
    found, _, target = plan(cross_replace_steps={"default_": 0.8, "beard": 0.2, "man": 0.0})
    until = found.cross_until
    assert until[list(target.find("beard"))].tolist() == [10.0] * len(target.find("beard"))
    assert until[list(target.find("man"))].tolist() == [0.0]
    assert until[list(target.find("with"))].tolist() == [40.0]
    assert plan(cross_replace_steps=0.5)[0].cross_until.unique().tolist() == [25.0]
    assert plan(cross_replace_steps={"beard": 1.0})[0].cross_until[1] == 20.0  # the default's default


def test_weights_are_the_words_alone() -> None:
    found, _, target = plan(reweight={"smiling": 2.5, "beard": -1})
    assert found.weights is not None
    wanted = torch.ones(TOKENIZER.model_max_length)
    wanted[list(target.find("smiling"))], wanted[list(target.find("beard"))] = 2.5, -1.0
    assert torch.equal(found.weights, wanted)
    assert plan(reweight={"smiling": 1.0})[0].weights is None


def test_by_itself_an_edit_is_confined_to_its_changed_words() -> None:
    found, source, target = plan()
    assert found.confinement is not None
    assert found.confinement.source_tokens == (source.find("sad"),)
    assert found.confinement.target_tokens == (target.find("smiling"), target.find("glasses"))
    # a word that only weighs more may change its place as well
    same, _, again = plan(SOURCE, reweight={"beard": 3.0})
    assert same.confinement is not None and same.confinement.target_tokens == (again.find("beard"),)


def test_blend_words_and_regions_say_otherwise() -> None:
    assert plan(blend_words=False)[0].confinement is None
    for words in ("beard", ["beard"], ("beard",)):
        found, source, target = plan(blend_words=words)
        assert found.confinement is not None
        assert found.confinement.source_tokens == (source.find("beard"),)
        assert found.confinement.target_tokens == (target.find("beard"),)
    only, _, target = plan(blend_words=["glasses"])
    assert only.confinement is not None
    assert (only.confinement.source_tokens, only.confinement.target_tokens) == ((), (target.find("glasses"),))
    region = torch.ones(4, 4)
    for words in (None, False):
        given = plan(region=region, blend_words=words)[0].confinement
        assert given is not None and given.region is region


def test_the_source_is_kept_from_the_share_asked_for() -> None:
    for region in (None, torch.ones(4, 4)):
        found = plan(confine_from=0.7, region=region)[0].confinement
        assert found is not None and found.start == 0.7


def test_kept_words_are_looked_for_in_both_prompts() -> None:
    for words in ("beard", ["beard"]):
        found, source, target = plan(keep_words=words)
        assert found.confinement is not None
        assert found.confinement.kept_source == (source.find("beard"),)
        assert found.confinement.kept_target == (target.find("beard"),)
        assert found.confinement.target_tokens == (target.find("smiling"), target.find("glasses"))  # as ever
    only, source, _ = plan(keep_words=["sad"])
    assert only.confinement is not None
    assert (only.confinement.kept_source, only.confinement.kept_target) == ((source.find("sad"),), ())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reweight": {"hat": 2.0}}, "reweight names 'hat'"),
        ({"reweight": {"sad": 2.0}}, "none of the prompts"),
        ({"keep_words": ["hat"]}, "keep_words names 'hat', which is in none of the prompts"),
        ({"keep_words": ["beard"], "blend_words": False}, "blend_words=False has none"),
        ({"keep_words": ["beard"], "region": torch.ones(2, 2)}, "edit_mask is taken as it is"),
        ({"reweight": {"beard": float("nan")}}, "must be a number"),
        ({"reweight": {"beard": "much"}}, "must be a number"),
        ({"cross_replace_steps": 1.5}, "from 0 to 1, not 1.5"),
        ({"cross_replace_steps": {"beard": -0.1}}, r"of 'beard' must be from 0 to 1, not -0.1"),
        ({"cross_replace_steps": {"hat": 0.5}}, "cross_replace_steps names 'hat'"),
        ({"blend_words": ["hat"]}, "blend_words=\\['hat'\\]: none is in"),
        ({"edit": "replace"}, "one for one"),
    ],
)
def test_what_cannot_be_meant(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plan(**changes)
