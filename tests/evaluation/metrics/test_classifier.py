"""What the classifier reads, what it is trained on, and the shares that are measured with it."""

from __future__ import annotations

import colorsys
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from safetensors import safe_open
from safetensors.torch import save_file

from s2edit_pipeline.avatars.captions import Caption, describe
from s2edit_pipeline.avatars.dataset import load_pictures
from s2edit_pipeline.avatars.world import (
    CREATURE_ATTRIBUTES,
    PERSON_ATTRIBUTES,
    Person,
    changed_pixels,
    render_array,
    sample_creature,
    sample_person,
)
from s2edit_pipeline.evaluation.metrics.classifier import (
    AttributeClassifier,
    accuracy_by_attribute,
    agreement_with_captions,
    load_attribute_classifier,
    save_attribute_classifier,
    weights_file,
)
from s2edit_pipeline.evaluation.metrics.classifier_training import (
    ClassifierRecipe,
    attribute_labels,
    attribute_loss,
    augment,
    train_attribute_classifier,
)


@pytest.fixture(scope="module")
def shipped() -> AttributeClassifier:
    return load_attribute_classifier()


@pytest.fixture(scope="module")
def held_out() -> tuple[list[Person], np.ndarray]:
    people = [sample_person(seed, "held_out") for seed in range(200)]
    return people, np.stack([render_array(person) for person in people])


class _Said(AttributeClassifier):
    """Finds what it was told, whatever the pictures."""

    def __init__(self, predicted: list[dict[str, str]]) -> None:
        super().__init__()
        self.predicted = predicted

    def predict(self, images: np.ndarray, batch_size: int = 64) -> list[dict[str, str]]:
        return self.predicted


def _blank(count: int) -> np.ndarray:
    return np.zeros((count, 128, 128, 3), np.uint8)


# ---------------------------------------------------------------------------- the shipped weights


def test_every_attribute_of_held_out_people_is_read(
    shipped: AttributeClassifier, held_out: tuple[list[Person], np.ndarray]
) -> None:
    accuracy = accuracy_by_attribute(shipped, *held_out)
    assert list(accuracy) == list(PERSON_ATTRIBUTES)
    assert min(accuracy.values()) >= 0.97, accuracy


def test_every_attribute_of_held_out_creatures_is_read() -> None:
    creatures = [sample_creature(seed, "held_out") for seed in range(200)]
    images = np.stack([render_array(creature) for creature in creatures])
    accuracy = accuracy_by_attribute(load_attribute_classifier("creature"), creatures, images)
    assert list(accuracy) == list(CREATURE_ATTRIBUTES)
    assert min(accuracy.values()) >= 0.97, accuracy


def test_soft_and_noisy_pictures_are_read_too(
    shipped: AttributeClassifier, held_out: tuple[list[Person], np.ndarray]
) -> None:
    people, images = held_out
    rng = np.random.default_rng(0)
    soft = np.stack([np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(0.8))) for image in images])
    noisy = np.clip(soft + rng.normal(0, 6, soft.shape), 0, 255).round().astype(np.uint8)
    accuracy = accuracy_by_attribute(shipped, people, noisy)
    assert min(accuracy.values()) >= 0.95, accuracy


def test_pictures_agree_with_their_own_captions_and_not_with_others(
    shipped: AttributeClassifier, held_out: tuple[list[Person], np.ndarray]
) -> None:
    people, images = held_out
    rng = random.Random(0)
    captions = [describe(person, rng) for person in people]
    agreement, by_attribute = agreement_with_captions(shipped, images, captions)
    assert agreement >= 0.98 and min(by_attribute.values()) >= 0.97, by_attribute
    other, others_by_attribute = agreement_with_captions(shipped, images, captions[1:] + captions[:1])
    assert other < 0.6
    assert all(others_by_attribute[name] < by_attribute[name] - 0.2 for name in PERSON_ATTRIBUTES)


def test_an_edit_changes_what_is_read(shipped: AttributeClassifier) -> None:
    person = replace(sample_person(7, "held_out"), hair="long straight", cut=0, headwear="none", glasses="none")
    changes = {"expression": "angry", "glasses": "sunglasses", "background": "green", "hair_color": "pink"}
    assert all(getattr(person, name) != value for name, value in changes.items())
    before, *after = shipped.predict(
        np.stack([render_array(person), *(render_array(person.edited(**{n: v})) for n, v in changes.items())])
    )
    shown_names = [name for name in before if person.shows(name)]
    for (name, value), predicted in zip(changes.items(), after, strict=True):
        assert [n for n in shown_names if predicted[n] != before[n]] == [name]
        assert predicted[name] == value


def test_the_weights_are_small_and_say_what_they_are(shipped: AttributeClassifier) -> None:
    assert weights_file("person").stat().st_size <= 3e6
    with safe_open(str(weights_file("person")), framework="pt") as opened:
        config = json.loads(opened.metadata()["config"])
        assert all(opened.get_tensor(n).dtype in (torch.float16, torch.int64) for n in opened.keys())  # noqa: SIM118
    assert config == {"widths": list(shipped.widths), "attributes": {k: list(v) for k, v in PERSON_ATTRIBUTES.items()}}


# ---------------------------------------------------------------------------- shown or not


@pytest.mark.parametrize("seed", range(12))
def test_what_is_shown_is_what_changes_the_picture(seed: int) -> None:
    person = replace(sample_person(seed), cut=0, garment=0)
    for name, values in PERSON_ATTRIBUTES.items():
        if name == "hair_color" and not person.shows(name):
            continue  # yet it may be seen, in a beard or at a bald head's sides
        other = next(v for v in reversed(values) if v != getattr(person, name))
        assert changed_pixels(person, replace(person, **{name: other})).any() == person.shows(name), name


def test_hair_color_needs_hair() -> None:
    person = replace(sample_person(0), headwear="none", hair="short curly", cut=0)
    assert person.shows("hair_color") and person.shows("hair") and not person.shows("headwear_color")
    bald = replace(person, hair="bald")
    assert not bald.shows("hair_color") and bald.shows("hair")
    for headwear in ("hat", "beanie", "hijab", "turban"):
        covered = replace(person, headwear=headwear)
        assert [n for n in PERSON_ATTRIBUTES if not covered.shows(n)] == ["hair", "hair_color"]


# ---------------------------------------------------------------------------- shares


def test_agreement_is_the_share_of_what_captions_say() -> None:
    predicted = [
        {name: values[0] for name, values in PERSON_ATTRIBUTES.items()},
        {name: values[1] for name, values in PERSON_ATTRIBUTES.items()},
        {name: values[0] for name, values in PERSON_ATTRIBUTES.items()},
    ]
    captions = [
        Caption(("a",), (None,), {"hair": "short straight", "glasses": "none", "clothes": "hoodie"}),  # 2 of 3
        Caption(("b",), (None,), {"glasses": "none", "clothes_color": "orange"}),  # 1 of 2
        Caption(("c",), (None,), {"glasses": "sunglasses", "clothes": "shirt"}),  # 1 of 2
    ]
    overall, by_attribute = agreement_with_captions(_Said(predicted), _blank(3), captions)
    assert overall == 4 / 7
    assert by_attribute == {"hair": 1.0, "glasses": 1 / 3, "clothes": 1 / 2, "clothes_color": 1.0}


def test_accuracy_counts_only_those_who_show_it() -> None:
    bare = replace(sample_person(0), headwear="none", hair="short straight", cut=0)
    people = [
        replace(bare, hair_color="black", glasses="glasses"),
        replace(bare, hair_color="red", glasses="none"),
        replace(bare, hair="bald", hair_color="grey", glasses="none"),
        replace(bare, headwear="hat", headwear_color="blue", glasses="sunglasses"),
    ]
    predicted = [{name: getattr(person, name) for name in PERSON_ATTRIBUTES} for person in people]
    predicted[1]["hair_color"] = "brown"
    predicted[2]["hair_color"] = "pink"  # nothing to be wrong about
    predicted[3].update(hair="bald", glasses="none", headwear_color="green")
    accuracy = accuracy_by_attribute(_Said(predicted), people, _blank(4))
    wrong = {"hair_color": 1 / 2, "glasses": 3 / 4, "headwear_color": 0.0}
    assert accuracy == {name: wrong.get(name, 1.0) for name in PERSON_ATTRIBUTES}
    assert "headwear_color" not in accuracy_by_attribute(_Said(predicted[:3]), people[:3], _blank(3))


def test_measures_that_mean_nothing_are_refused(shipped: AttributeClassifier) -> None:
    person = sample_person(0)
    with pytest.raises(ValueError, match="2 pictures and 1 subjects"):
        accuracy_by_attribute(shipped, [person], _blank(2))
    with pytest.raises(ValueError, match="1 pictures and 2 captions"):
        agreement_with_captions(shipped, _blank(1), [describe(person)] * 2)
    with pytest.raises(ValueError, match="say nothing"):
        agreement_with_captions(shipped, _blank(1), [Caption(("a",), (None,), {})])


# ---------------------------------------------------------------------------- the network


def test_prediction_is_each_pictures_own(shipped: AttributeClassifier) -> None:
    images = np.stack([render_array(sample_person(seed)) for seed in range(5)])
    before_call = images.copy()
    together = shipped.predict(images)
    assert together == shipped.predict(images, batch_size=2) == [shipped.predict(i[None])[0] for i in images]
    logits = shipped(torch.from_numpy(images).permute(0, 3, 1, 2) / 255)
    for name, values in PERSON_ATTRIBUTES.items():
        best = [max(range(len(values)), key=row.__getitem__) for row in logits[name].tolist()]
        assert [predicted[name] for predicted in together] == [values[i] for i in best]
    assert np.array_equal(images, before_call) and shipped.predict(images[:0]) == []


def test_prediction_leaves_the_mode_and_the_statistics_as_they_were() -> None:
    torch.manual_seed(0)
    model = AttributeClassifier().train()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    images = np.stack([render_array(sample_person(seed)) for seed in range(3)])
    predicted = model.predict(images)
    assert model.training and predicted == model.eval().predict(images) and not model.training
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    with pytest.raises(ValueError, match=r"\(N, 128, 128, 3\) uint8, not \(128, 128, 3\) uint8; put one picture"):
        model.predict(images[0])
    with pytest.raises(ValueError, match=r"not \(3, 128, 128, 3\) float64"):
        model.predict(images / 255)
    with pytest.raises(ValueError, match=r"not \(3, 64, 64, 3\)"):
        model.predict(images[:, ::2, ::2])


# ---------------------------------------------------------------------------- training


def _naive_loss(logits: dict[str, torch.Tensor], people: list[Person]) -> float:
    means = []
    for name, values in PERSON_ATTRIBUTES.items():
        terms = []
        for row, p in zip(logits[name].double().tolist(), people, strict=True):
            hidden = (name in ("hair", "hair_color") and p.headwear != "none") or (
                (name == "hair_color" and p.hair == "bald") or (name == "headwear_color" and p.headwear == "none")
            )
            if not hidden:
                terms.append(math.log(sum(math.exp(v) for v in row)) - row[values.index(getattr(p, name))])
        means.append(sum(terms) / len(terms) if terms else 0.0)
    return sum(means) / len(means)


def _logits(count: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: (2 * torch.randn(count, len(values), generator=generator, dtype=torch.float64)).requires_grad_()
        for name, values in PERSON_ATTRIBUTES.items()
    }


@pytest.mark.parametrize("headwear", [None, "none", "hat"])
def test_the_loss_is_the_cross_entropy_of_what_is_shown(headwear: str | None) -> None:
    people = [sample_person(seed) for seed in range(30)]
    assert any(p.hair == "bald" for p in people) and any(p.headwear != "none" for p in people)
    if headwear is not None:  # then nobody shows one of the attributes
        people = [replace(p, headwear=headwear) for p in people]
    logits = _logits(len(people))
    loss = attribute_loss(logits, attribute_labels(people))
    assert loss.item() == pytest.approx(_naive_loss(logits, people), rel=1e-9)
    loss.backward()
    for name, values in logits.items():
        assert values.grad is not None
        for row, person in zip(values.grad, people, strict=True):
            assert row.isfinite().all() and row.any() == person.shows(name)


def test_augmentation_keeps_colors_their_words() -> None:
    generator = torch.Generator().manual_seed(0)
    flat = torch.tensor([0.75, 0.35, 0.2])
    x = flat.view(1, 3, 1, 1).repeat(200, 1, 128, 128)
    before_call = x.clone()
    changed = augment(x, generator)
    assert torch.equal(x, before_call) and changed.min() >= 0 and changed.max() <= 1
    hue, saturation, value = colorsys.rgb_to_hsv(*flat.tolist())
    hsv = np.array([colorsys.rgb_to_hsv(*c) for c in changed[:, :, :90].mean((2, 3)).tolist()])
    # 0.012 turns, then at most 0.03 between two channels that lie 0.5 apart: a sixth of a turn times 0.06
    assert np.abs(hsv[:, 0] - hue).max() < 0.012 + 0.01 + 0.003
    assert np.abs(hsv[:, 1] - saturation).max() < 0.08 and np.abs(hsv[:, 2] - value).max() < 0.07
    assert hsv[:, 0].std() > 0.005 and hsv[:, 2].std() > 0.01
    # and prints white on the chest of about half of them, nowhere else
    white = (changed.amin(1) > 0.75).flatten(1).any(1)
    assert 0.3 < white.float().mean() < 0.6
    assert not (changed[:, :, :90].amin(1) > 0.6).any()


def test_augmentation_turns_hue_as_hsv_does() -> None:
    # with every draw at the middle of its range nothing is turned; at its end, all is turned one way
    class _Draws:
        def __init__(self, at: float) -> None:
            self.at = at

        def rand(self, *shape: int, generator: object) -> torch.Tensor:
            return torch.full(shape, self.at)

    flat = torch.tensor([0.6, 0.35, 0.3])
    x = flat.view(1, 3, 1, 1).repeat(1, 1, 128, 128)
    hue = colorsys.rgb_to_hsv(*flat.tolist())[0]
    for at, turns in ((0.0, -0.012), (0.5, 0.0), (1.0, 0.012)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "rand", _Draws(at).rand)
            out = augment(x, torch.Generator().manual_seed(0))
        turned = colorsys.rgb_to_hsv(*out[0, :, :90].mean((1, 2)).tolist())[0]
        assert turned - hue == pytest.approx(turns, abs=0.004)


@pytest.fixture(scope="module")
def pictures_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    load_pictures(16, cache=folder)
    return folder


def test_going_on_gives_the_same_as_going_through(tmp_path: Path, pictures_folder: Path) -> None:
    def train(folder: Path, stop_at: int | None = None, seed: int = 0) -> AttributeClassifier:
        return train_attribute_classifier(
            folder,
            recipe=ClassifierRecipe(3, 4, num_pictures=16, seed=seed),
            device="cpu",
            cache=pictures_folder,
            stop_at=stop_at,
        )

    whole = train(tmp_path / "whole")
    assert train(tmp_path / "parts", stop_at=1).training is False
    parts, other = train(tmp_path / "parts"), train(tmp_path / "other", stop_at=1, seed=1)
    torch.testing.assert_close(whole.state_dict(), parts.state_dict(), rtol=0, atol=0)
    assert not torch.equal(whole.heads["hair"].weight, other.heads["hair"].weight)
    states = [torch.load(tmp_path / f / "classifier.ckpt", weights_only=True) for f in ("whole", "parts")]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def test_training_learns_its_people(tmp_path: Path, pictures_folder: Path) -> None:
    model = train_attribute_classifier(
        tmp_path, recipe=ClassifierRecipe(40, 16, num_pictures=16), device="cpu", cache=pictures_folder
    )
    pictures = load_pictures(16, cache=pictures_folder)
    accuracy = accuracy_by_attribute(model, pictures.subjects, pictures.images)
    assert np.mean(list(accuracy.values())) > 0.9, accuracy


# ---------------------------------------------------------------------------- files


def test_saving_and_loading_keeps_the_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AttributeClassifier(widths=(8, 16, 24)).eval()
    for name, t in model.state_dict().items():
        if t.is_floating_point():
            t.copy_(t + 0.1 * torch.rand(t.shape) if "var" in name else t + 0.1 * torch.randn(t.shape))
    before_saving = {name: t.clone() for name, t in model.state_dict().items()}
    save_attribute_classifier(model, tmp_path / "new" / "weights.safetensors")
    loaded = load_attribute_classifier(path=tmp_path / "new" / "weights.safetensors")
    assert loaded.widths == (8, 16, 24) and not loaded.training
    for name, t in loaded.state_dict().items():
        assert torch.equal(model.state_dict()[name], before_saving[name])
        assert t.dtype == before_saving[name].dtype
        torch.testing.assert_close(t, before_saving[name], rtol=2**-11, atol=2**-24)


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is missing; write it with train_"):
        load_attribute_classifier(path=tmp_path / "none.safetensors")
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="has no config in its header"):
        load_attribute_classifier(path=path)
    attributes = {**PERSON_ATTRIBUTES, "glasses": ("none", "monocle"), "hair": PERSON_ATTRIBUTES["hair"][::-1]}
    del attributes["clothes"]
    save_file({"a": torch.zeros(1)}, path, {"config": json.dumps({"widths": [8], "attributes": attributes})})
    with pytest.raises(ValueError, match="trained for other values of clothes, glasses, hair; train"):
        load_attribute_classifier(path=path)
