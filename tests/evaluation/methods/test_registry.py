"""The methods by name: their arguments, from the file of the best ones and over it."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest

from s2edit_pipeline import S2EditPipeline
from s2edit_pipeline.evaluation.methods.registry import METHODS, SETTINGS_FILE, method_specs, variants


def test_methods_take_their_best_arguments_and_models(tmp_path: Path) -> None:
    path = tmp_path / "best.json"
    path.write_text('{"methods": {"SDEdit": {"strength": 0.4, "more": {"a": 1}}}}')
    sdedit, plain = method_specs(["SDEdit", "unedited"], path, {"unedited": "there"})
    assert sdedit.arguments == {"strength": 0.4, "more": {"a": 1}} and plain.arguments == {"model": "there"}
    first, second = variants(sdedit, [{"strength": 0.9}, {"more": {"b": 2}}])
    assert (first.name, first.arguments) == ("SDEdit (strength=0.9)", {"strength": 0.9, "more": {"a": 1}})
    assert (second.name, second.arguments) == ("SDEdit (b=2)", {"strength": 0.4, "more": {"a": 1, "b": 2}})
    with pytest.raises(ValueError, match="no method hard; choose from unedited"):
        method_specs(["hard"])
    with pytest.raises(ValueError, match="no method hard; choose from unedited"):
        method_specs(["unedited"], models={"hard": "there"})
    with pytest.raises(ValueError, match="named twice"):
        method_specs(["unedited", "unedited"])


def test_every_argument_is_one_that_the_method_takes() -> None:
    fit, call = (inspect.signature(f).parameters for f in (S2EditPipeline.fit_identity, S2EditPipeline.__call__))
    best = json.loads(SETTINGS_FILE.read_text("utf-8"))["methods"]
    assert set(best) <= set(METHODS)
    for name, factory in METHODS.items():
        assert len(factory.grid) <= 6
        for arguments in (*factory.grid, *factory.curve, best.get(name, {})):
            assert set(arguments.get("edit", {})) <= set(call) and set(arguments.get("fit", {})) <= set(fit)


def test_the_best_arguments_are_the_ones_that_scored_best() -> None:
    """Every tuned method's name with its best arguments is the highest of its scores."""
    content = json.loads(SETTINGS_FILE.read_text("utf-8"))
    for name, arguments in content["methods"].items():
        (spec,) = variants(method_specs([name], SETTINGS_FILE)[0], [arguments])
        chosen = spec.name if arguments else name
        scores = content["scores"][name]
        assert scores[chosen] == max(scores.values()), name
