"""Arguments that make the pipeline S2Edit, its ablations, or what came before it."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace

import pytest

from s2edit_pipeline import S2EditPipeline
from s2edit_pipeline.edit_settings import EditSettings
from s2edit_pipeline.evaluation.methods.pipeline_arguments import (
    ABLATION,
    PAPER,
    PIPELINE_METHODS,
    PROMPT_TO_PROMPT,
    PipelineArguments,
)
from s2edit_pipeline.fit_settings import RECIPES
from s2edit_pipeline.inversion_record import inversion_method


def test_every_argument_is_one_that_the_pipeline_takes() -> None:
    fit, call = (inspect.signature(f).parameters for f in (S2EditPipeline.fit_identity, S2EditPipeline.__call__))
    for arguments in (*PIPELINE_METHODS.values(), *ABLATION.values()):
        inversion_method(arguments.inversion)
        assert set(arguments.edit) <= set(call) and set(arguments.fit or {}) <= set(fit)


def test_the_papers_setting_and_its_ablation() -> None:
    assert PAPER.fit == {"preset": "paper"} and PAPER.inversion == "null_text"
    assert PAPER.edit == {"guidance_scale": 4.5, "guidance_stop": 1.0, "blend_words": False}
    first, tuned, semantic, both = ABLATION.values()
    assert first.fit is None and (tuned.fit, semantic.fit, both.fit) == (
        {"preset": "paper", "semantic_weight": 0.0, "spatial_control": False},
        {"preset": "paper", "spatial_control": False},
        {"preset": "paper"},
    )
    assert len({(s.inversion, tuple(s.edit.items())) for s in ABLATION.values()}) == 1


def test_as_published_means_one_thing() -> None:
    """Whoever edits by plain prompt-to-prompt does so as its authors' notebook, and nobody else does."""
    assert (PROMPT_TO_PROMPT["cross_replace_steps"], PROMPT_TO_PROMPT["self_replace_steps"]) == (0.8, 0.5)
    assert PROMPT_TO_PROMPT["guidance_stop"] == 1.0 and PROMPT_TO_PROMPT["blend_words"] is False
    for name, arguments in PIPELINE_METHODS.items():
        plain = name.endswith("+ P2P") or name in ("DreamBooth", "textual inversion")
        shared = {key: value for key, value in arguments.edit.items() if key != "strength"}
        assert (shared == PROMPT_TO_PROMPT) is plain, name


def test_a_fit_that_is_not_there_takes_no_arguments() -> None:
    with pytest.raises(ValueError, match="Nothing is fitted here, so a fit can't take num_steps"):
        PipelineArguments(None).with_changes(fit={"num_steps": 3})
    changed = PipelineArguments({"method": "full"}).with_changes({"num_steps": 3}, {"strength": 0.5})
    assert changed == PipelineArguments({"method": "full", "num_steps": 3}, "direct", {"strength": 0.5})


def test_what_decides_a_setting_has_the_packages_defaults_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, paper = PipelineArguments().resolved(), PAPER.resolved()
    recipe = RECIPES["lora"]
    assert ours["fit"]["num_steps"] == recipe.num_steps and ours["fit"]["method"] == "lora"
    assert ours["edit"]["guidance_stop"] == EditSettings.guidance_stop and ours["inversion"] == "direct"
    assert paper["fit"]["num_steps"] == 400 and paper["fit"]["learning_rate"] == 5e-6
    assert paper["edit"]["guidance_stop"] == 1.0 and paper["edit"]["blend_words"] is False
    assert PipelineArguments(None).resolved()["fit"] is None
    monkeypatch.setitem(RECIPES, "lora", replace(recipe, num_steps=recipe.num_steps + 1))
    changed = PipelineArguments().resolved()
    assert changed["fit"].pop("num_steps") == ours["fit"].pop("num_steps") + 1 and changed == ours
    for setting in (*PIPELINE_METHODS.values(), *ABLATION.values()):
        json.dumps(setting.resolved())
