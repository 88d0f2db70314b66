"""The base model's standards, on the model in the package."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from PIL import ImageFilter

from s2edit_pipeline import S2EditPipeline, load_avatars
from s2edit_pipeline.avatars.captions import describe
from s2edit_pipeline.avatars.creatures import UNSEEN_PAIRS
from s2edit_pipeline.avatars.world import (
    CREATURE_ATTRIBUTES,
    part_masks,
    render,
    render_array,
    sample_creature,
    sample_person,
)
from s2edit_pipeline.evaluation.studies.base_model import (
    captions_with_unseen_pairs,
    draw_captions,
    fits,
    grounding_overlaps,
    mean_delta_e,
    measure_base_model,
)


@pytest.fixture(scope="module")
def avatars() -> S2EditPipeline:
    pipe = load_avatars()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_small_report_meets_the_first_standard(avatars: S2EditPipeline) -> None:
    report = measure_base_model(
        avatars, num_held_out=8, num_captions=8, num_pairs=2, num_grounded=4, num_inference_steps=10
    )
    assert report.autoencoder_psnr > 32 and report.autoencoder_ssim > 0.95 and report.autoencoder_delta_e < 3
    assert report.agreement > 0.8 and len(report.generated) == len(report.captions) == 8
    assert report.agreement_pairs > 0.7 and len(report.generated_pairs) == report.num_pairs == 2
    assert 0 < report.num_unseen <= 8 and report.agreement_unseen > 0.7 and 0 < report.seconds < 60
    shown = report.table()
    for kind, of_kind in report.kinds.items():
        assert of_kind.grounding[kind] > 0.6 and f"| {kind} | glasses | " in shown
        assert f"| {kind} | {kind} | {of_kind.grounding[kind]:.2f} |" in shown
    assert f"{report.agreement:.1%}" in shown and f"{report.agreement_pairs:.1%}" in shown


def test_a_caption_fits_who_is_all_that_it_says() -> None:
    creature = sample_creature(0)
    caption = describe(creature)
    assert fits(caption, creature)
    for name, values in CREATURE_ATTRIBUTES.items():
        other = replace(creature, **{name: next(v for v in values if v != getattr(creature, name))})
        assert fits(caption, other) != (name in caption.said), name
    assert not fits(caption, sample_person(0))


def test_captions_of_unseen_pairs_say_what_no_training_caption_does() -> None:
    results = list(islice(captions_with_unseen_pairs(random.Random(0)), 40))
    trained = [describe(sample_creature(seed), random.Random(seed)).said for seed in range(3000)]
    for caption in results:
        pairs = [pair for pair in UNSEEN_PAIRS if pair.items() <= caption.said.items()]
        assert pairs and not any(pair.items() <= said.items() for pair in pairs for said in trained)


def test_grounding_is_the_overlap_with_the_true_pixels() -> None:
    people = [sample_person(seed, "held_out") for seed in (3, 12)]

    class Answers:
        """Looks at the caption's words as told: the truth of the first part, all of the picture for the rest."""

        def preview_mask(self, picture: object, prompt: str, subject: str) -> object:
            person = next(p for p in people if describe(p).text == prompt)
            if subject == person.noun:
                return part_masks(person)["person"].astype(np.uint8) * 255
            return np.full((128, 128), 255, np.uint8)

    results = grounding_overlaps(Answers(), people)
    assert results["person"] == 1
    assert results["hair"] == pytest.approx(np.mean([part_masks(p)["hair"].mean() for p in people]))
    assert results[people[0].facial_hair] == pytest.approx(
        part_masks(people[0])["facial_hair"].mean()
    )  # hers is not counted


def test_colour_differences_come_out_in_order() -> None:
    picture = render(sample_person(3, "held_out"))
    array = np.asarray(picture)[None]
    blurred = np.asarray(picture.filter(ImageFilter.GaussianBlur(1)))[None]
    tinted = np.clip(array + np.array([20, 0, -20]), 0, 255).astype(np.uint8)
    other = render_array(sample_person(4, "held_out"))[None]
    scores = [mean_delta_e(array, b) for b in (array, blurred, tinted, other)]
    assert scores[0] == 0 and scores == sorted(scores)
    # one known pair of the CIE ΔE2000 test data, in Lab, comes through sRGB white to black as 100
    assert mean_delta_e(np.zeros((1, 1, 1, 3), np.uint8), np.full((1, 1, 1, 3), 255, np.uint8)) == pytest.approx(
        100, abs=0.1
    )


def test_a_caption_is_drawn_the_same_whatever_is_drawn_beside_it(avatars: S2EditPipeline) -> None:
    captions = ["a photo of a smiling lady", "a photo of a man with glasses"]
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "seed": 1}
    both = draw_captions(avatars, captions, **settings)
    alone = draw_captions(avatars, captions, batch_size=1, **settings)
    assert np.abs(both.astype(int) - alone).max() <= 1
