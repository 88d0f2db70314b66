"""Every metric under perturbations: what is worse has to score worse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from skimage.color import deltaE_ciede2000, rgb2lab
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from s2edit_pipeline.avatars.world import changed_pixels, render, render_array, sample_creature, sample_person
from s2edit_pipeline.evaluation.benchmark.scoring import (
    PSNR_CEILING,
    Score,
    feature_distance,
    identity_distance,
    identity_regions,
    score_edit,
)
from s2edit_pipeline.evaluation.metrics.classifier import AttributeClassifier, load_attribute_classifier
from s2edit_pipeline.evaluation.metrics.counterfactual import CounterfactualEdit, counterfactual


@pytest.fixture(scope="module")
def classifier() -> AttributeClassifier:
    return load_attribute_classifier()


@pytest.fixture(scope="module")
def edit() -> CounterfactualEdit:
    """Of a man with a print on his shirt and a mark on his face."""
    people = (sample_person(n, "held_out") for n in range(200))
    person = next(p for p in people if p.mark == "freckles" and p.print != "none" and p.glasses == "none")
    mood = "smiling" if person.expression != "smiling" else "surprised"
    return counterfactual(person, mood, expression=mood)


@pytest.fixture(scope="module")
def scores(edit: CounterfactualEdit, classifier: AttributeClassifier) -> dict[str, Score]:
    truth = edit.truth()
    shifted = Image.fromarray(np.roll(np.asarray(truth), 3, 1))
    stranger = sample_person(7, "held_out").edited(expression=edit.target.expression)
    pictures = {
        "truth": truth,
        "slightly blurred": truth.filter(ImageFilter.GaussianBlur(0.6)),
        "blurred": truth.filter(ImageFilter.GaussianBlur(2.5)),
        "shifted": shifted,
        "unedited": render(edit.subject),
        "wrong person": render(stranger),
    }
    return {name: score_edit(edit, picture, classifier) for name, picture in pictures.items()}


def test_the_truth_is_perfect(scores: dict[str, Score]) -> None:
    perfect = scores["truth"]
    assert perfect.psnr == perfect.inside == perfect.outside == PSNR_CEILING
    assert (perfect.ssim, perfect.aligned, perfect.agreement) == (pytest.approx(1), 1, 1)
    assert (perfect.feature_distance, perfect.identity) == (0, 0)
    assert perfect.done and not perfect.unchanged


@pytest.mark.parametrize("metric", ["psnr", "ssim", "feature_distance", "outside", "identity"])
def test_the_farther_the_worse(scores: dict[str, Score], metric: str) -> None:
    order = ["truth", "slightly blurred", "blurred", "wrong person"]
    values = [getattr(scores[name], metric) for name in order]
    if metric in ("feature_distance", "identity"):
        values = [-value for value in values]
    assert values == sorted(values, reverse=True) and len(set(values)) == 4
    shifted = getattr(scores["shifted"], metric) * (-1 if metric in ("feature_distance", "identity") else 1)
    assert values[3] < shifted < values[1]


def test_an_edit_that_was_not_made_is_seen(scores: dict[str, Score]) -> None:
    none = scores["unedited"]
    assert none.unchanged and not none.done and none.aligned == 0 and none.outside == PSNR_CEILING
    assert none.identity == 0 and none.inside < scores["blurred"].inside
    assert not scores["slightly blurred"].unchanged and scores["slightly blurred"].done
    assert scores["wrong person"].agreement < none.agreement < 1


def test_psnr_and_ssim_are_scikit_images(edit: CounterfactualEdit, classifier: AttributeClassifier) -> None:
    truth = np.asarray(edit.truth())
    picture = edit.truth().filter(ImageFilter.GaussianBlur(1))
    got = score_edit(edit, picture, classifier)
    assert got.psnr == pytest.approx(peak_signal_noise_ratio(truth, np.asarray(picture)), abs=1e-6)
    expected = structural_similarity(truth, np.asarray(picture), channel_axis=2, data_range=255)
    assert got.ssim == pytest.approx(expected, abs=1e-6)
    changed = changed_pixels(edit.subject, edit.target)
    for region, found in ((changed, got.inside), (~changed, got.outside)):
        a, b = truth[region][None], np.asarray(picture)[region][None]
        assert found == pytest.approx(peak_signal_noise_ratio(a, b), abs=1e-6)


def test_feature_distance_is_the_formula(edit: CounterfactualEdit, classifier: AttributeClassifier) -> None:
    a, b = render_array(edit.subject), render_array(edit.target)
    total, x = 0.0, torch.from_numpy(np.stack([a, b])).permute(0, 3, 1, 2).double() / 255 * 2 - 1
    network = classifier.features.double()
    try:
        with torch.no_grad():
            for layer in list(network)[:12]:
                x = layer(x)
                if isinstance(layer, torch.nn.SiLU):
                    total += _naive_distance(x[0].numpy(), x[1].numpy())
    finally:
        network.float()
    assert feature_distance(classifier, a, b) == pytest.approx(total, rel=1e-4)
    assert feature_distance(classifier, b, a) == pytest.approx(total, rel=1e-4)


def _naive_distance(first: np.ndarray, second: np.ndarray) -> float:
    _, height, width = first.shape
    total = 0.0
    for y in range(height):
        for x in range(width):
            a, b = first[:, y, x], second[:, y, x]
            total += float((((a / np.sqrt((a * a).sum())) - b / np.sqrt((b * b).sum())) ** 2).sum())
    return total / (height * width)


def test_identity_lies_where_no_caption_says_it_and_no_edit_goes(edit: CounterfactualEdit) -> None:
    person = edit.subject
    regions = identity_regions(person, edit.target)
    assert {"skin", "mark", "print", "clothes_shade"} <= set(regions)
    changed = changed_pixels(person, edit.target)
    assert not any((region & changed).any() for region in regions.values())
    assert regions["mark"].sum() < 200 < regions["skin"].sum() and regions["print"][90:].sum() == regions["print"].sum()
    # the mark's colour is as much of the mean as the skin's, however few its pixels
    truth = render_array(edit.target)
    spoiled = truth.copy()
    spoiled[regions["mark"]] = (0, 255, 0)
    difference = deltaE_ciede2000(rgb2lab(spoiled), rgb2lab(truth))
    wanted = np.mean([difference[region].mean() for region in regions.values()])
    assert identity_distance(edit, spoiled, truth) == pytest.approx(wanted, abs=1e-9) and wanted > 5
    # a background of another colour is no other person
    elsewhere = truth.copy()
    elsewhere[:4, :4] = 0
    assert identity_distance(edit, elsewhere, truth) == 0


def test_what_is_new_is_asked_for_with_its_colour(classifier: AttributeClassifier) -> None:
    people = (sample_person(n, "held_out") for n in range(100))
    person = next(p for p in people if p.headwear == "none" and p.hair.startswith("short"))
    worn = {"headwear": "beanie", "headwear_color": person.headwear_color}  # the same that none would have had
    edit = counterfactual(person, "beanie", **worn)
    other = person.edited(headwear="beanie", headwear_color="green" if person.headwear_color != "green" else "red")
    assert score_edit(edit, render(edit.target), classifier).done
    half = score_edit(edit, render(other), classifier)
    assert half.aligned == 0.5 and not half.done


def test_creatures_have_an_identity_of_their_own() -> None:
    creatures = (sample_creature(n, "held_out") for n in range(100))
    creature = next(c for c in creatures if c.mark != "none" and c.pattern != "none" and c.glasses == "none")
    edit = counterfactual(creature, "mood", expression="sad" if creature.expression != "sad" else "smiling")
    assert {"eyes", "mark", "layout", "fur_shade"} <= set(identity_regions(creature, edit.target))
    score = score_edit(edit, edit.truth(), load_attribute_classifier("creature"))
    assert score.identity == 0 and score.done
