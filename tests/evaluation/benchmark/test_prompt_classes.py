"""How much prompts say, read back by the grammar's own reader."""

from __future__ import annotations

import pytest

from s2edit_pipeline.avatars.captions import describe, read_caption
from s2edit_pipeline.avatars.world import Subject, sample
from s2edit_pipeline.evaluation.benchmark.prompt_classes import PROMPT_CLASSES, EditPrompts, edit_prompts
from s2edit_pipeline.evaluation.metrics.counterfactual import CounterfactualEdit, demo_edits

SUBJECTS = [sample(kind, n, "held_out") for kind in ("person", "creature") for n in range(12)]


def prompts_of(subject: Subject, prompt_class: str, n: int) -> tuple[EditPrompts, list[CounterfactualEdit]]:
    edits = demo_edits(subject)
    return edit_prompts(subject, edits, prompt_class, seed=n), edits


@pytest.mark.parametrize("prompt_class", PROMPT_CLASSES)
def test_the_target_says_what_is_asked_for_and_the_source_what_goes(prompt_class: str) -> None:
    for n, subject in enumerate(SUBJECTS):
        said, edits = prompts_of(subject, prompt_class, n)
        assert said == prompts_of(subject, prompt_class, n)[0] and len(said.targets) == len(edits)
        source = read_caption(said.source)
        for edit, target in zip(edits, said.targets, strict=True):
            assert target != said.source and subject.noun in target.split()
            read = read_caption(target)
            for name in subject.ATTRIBUTES:
                before, after = getattr(subject, name), getattr(edit.target, name)
                if before != after:
                    assert after == "none" or f" {after.split()[0]} " in f" {target} ", (target, name)
                    assert after != "none" or source[name] == before
                elif name in source:  # what stays is said of both alike
                    assert read.get(name, "none") == source[name]


def test_complete_short_and_half() -> None:
    for n, subject in enumerate(SUBJECTS):
        complete, edits = prompts_of(subject, "complete", n)
        assert complete.source == describe(subject).text
        assert list(complete.targets) == [edit.target_prompt for edit in edits]
        only_added = [edit for edit in edits if "none" not in {getattr(edit.target, n) for n in _changed(edit)}]
        article = "an" if subject.noun[0] in "aeiou" else "a"
        short = edit_prompts(subject, only_added, "short")
        assert short.source == f"a photo of {article} {subject.noun}"
        lengths = [len(prompts_of(subject, one, n)[0].source.split()) for one in ("short", "half", "complete")]
        assert lengths == sorted(lengths) and lengths[0] < lengths[2]


def _changed(edit: CounterfactualEdit) -> list[str]:
    return [n for n in edit.subject.ATTRIBUTES if getattr(edit.subject, n) != getattr(edit.target, n)]


def test_a_vague_caption_has_one_fault_that_no_edit_changes() -> None:
    for n, subject in enumerate(SUBJECTS):
        said, edits = prompts_of(subject, "vague", n)
        truth, told = read_caption(describe(subject).text), read_caption(said.source)
        faults = {name for name in truth if told.get(name, "none") != truth[name]}
        kinds = {name.removesuffix("_color") for name in faults}
        assert len(kinds) == 1, (said.source, describe(subject).text)
        assert not faults & {name for edit in edits for name in _changed(edit)}
        wrong = [name for name in faults if name in told and told[name] != "none"]
        assert bool(wrong) == bool(n % 2)


def test_red_hair_is_said_without_its_cut() -> None:
    person = next(
        s for s in SUBJECTS if s.PART == "person" and getattr(s, "hair", "bald") != "bald" and s.shows("hair")
    )
    target = person.edited(hair_color="red" if getattr(person, "hair_color", "") != "red" else "black")
    (text,) = edit_prompts(person, [CounterfactualEdit("hair", person, target)], "short").targets
    assert text == f"a photo of a {person.noun} with {getattr(target, 'hair_color', '')} hair"
    with pytest.raises(ValueError, match="one of complete, half, short, vague, not 'long'"):
        edit_prompts(person, [], "long")
