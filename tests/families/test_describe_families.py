"""Every kind of model judges captions."""

from __future__ import annotations

import pytest
from PIL import Image

from s2edit_pipeline import S2EditPipeline


@pytest.mark.parametrize("family", ["sd2_v", "sdxl"])
def test_words_that_are_known_stay_and_the_model_chooses_the_rest(
    small_families: dict[str, S2EditPipeline], wide_picture: Image.Image, family: str
) -> None:
    """The vocabulary is the pipeline's own."""
    about = small_families[family].describe(
        wide_picture, prompt="a photo of a sad man with a blue hat", height=16, width=16
    )
    known = "a photo of a sad man with a blue hat"
    assert about.subject == "man" and about.prompt in (known, f"{known} and glasses")
    assert about.scores["sad"] == 0 and sum(score > 0 for score in about.scores.values()) <= 2
