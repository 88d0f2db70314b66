import numpy as np

from s2edit_pipeline.avatars import dataset
from s2edit_pipeline.avatars.dataset import MASK_SIZE, load_pictures
from s2edit_pipeline.avatars.world import PARTS, part_masks, render_array, sample_creature, sample_person


def test_pictures_are_those_of_their_people(pictures):
    assert pictures.subjects == [sample_person(i) for i in range(8)]
    assert np.array_equal(pictures.images[3], render_array(sample_person(3)))


def test_a_mask_is_the_share_of_each_cell(pictures):
    assert pictures.masks.shape == (8, len(PARTS), MASK_SIZE, MASK_SIZE)
    fine = part_masks(pictures.subjects[2], 4 * MASK_SIZE)
    for p, part in enumerate(PARTS):
        for y in range(MASK_SIZE):
            for x in range(MASK_SIZE):
                covered = 0
                if part in fine:
                    covered = sum(fine[part][4 * y + i, 4 * x + j] for i in range(4) for j in range(4))
                assert abs(pictures.masks[2, p, y, x] - 255 * covered / 16) <= 0.5


def test_the_cache_returns_what_was_drawn_and_draws_nothing(tmp_path, monkeypatch):
    drawn = load_pictures(3, "held_out", first=5, masks=True, cache=tmp_path)
    assert drawn.subjects == [sample_person(i, "held_out") for i in (5, 6, 7)]
    monkeypatch.setattr(dataset, "_draw", None)
    kept = load_pictures(3, "held_out", first=5, masks=True, cache=tmp_path)
    assert np.array_equal(kept.images, drawn.images) and np.array_equal(kept.masks, drawn.masks)
    assert load_pictures(3, "held_out", first=5, cache=tmp_path).masks is None


def test_a_cache_without_masks_is_drawn_again_when_they_are_wanted(tmp_path):
    assert load_pictures(2, cache=tmp_path).masks is None
    both = load_pictures(2, masks=True, cache=tmp_path)
    assert np.array_equal(both.masks, load_pictures(2, masks=True).masks)


def test_many_pictures_are_drawn_by_several_processes_in_order():
    many = load_pictures(66)
    assert np.array_equal(many.images[[0, 40, 65]], [render_array(sample_person(i)) for i in (0, 40, 65)])


def test_two_sets_are_joined_in_order():
    people, creatures = load_pictures(2, masks=True), load_pictures(3, kind="creature", masks=True)
    both = people + creatures
    assert both.subjects == [*map(sample_person, range(2)), *map(sample_creature, range(3))]
    assert np.array_equal(both.images[3], render_array(sample_creature(1)))
    assert np.array_equal(both.masks[2:], creatures.masks)
    assert (people + load_pictures(1, kind="creature")).masks is None


def test_a_cache_tells_kinds_apart(tmp_path):
    people, creatures = (load_pictures(2, kind=kind, cache=tmp_path).images for kind in ("person", "creature"))
    assert not np.array_equal(people, creatures)
    assert np.array_equal(load_pictures(2, cache=tmp_path).images, people)
