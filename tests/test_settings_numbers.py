"""Numbers and words that a call takes, and what it refuses in words before any work."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from s2edit_pipeline.edit_settings import EditSettings
from s2edit_pipeline.fit_settings import FitSettings


@pytest.mark.parametrize("name", ["guidance_scale", "strength", "self_replace_steps", "blend_threshold"])
def test_numpys_numbers_are_numbers(name: str) -> None:
    assert getattr(EditSettings(**{name: np.float32(0.5)}), name) == 0.5


@pytest.mark.parametrize("value", [True, "0.5", None, float("nan"), float("inf"), [0.5]])
@pytest.mark.parametrize("name", ["guidance_scale", "strength", "self_replace_steps", "blend_threshold"])
def test_what_is_no_number_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be"):
        EditSettings(**{name: value})


@pytest.mark.parametrize("value", ["1e-4", float("inf"), float("nan"), True, -1.0])
@pytest.mark.parametrize("name", ["learning_rate", "semantic_weight"])
def test_a_fits_rates_are_numbers(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a number"):
        FitSettings(**{name: value})


@pytest.mark.parametrize("value", [{"hair"}, 3, ["hair", 3], {"hair": 1.0}])
@pytest.mark.parametrize("name", ["blend_words", "keep_words"])
def test_words_are_words(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{name} must be a word, a list of words"):
        EditSettings(**{name: value})
