import numpy as np
import pytest

from gresbox.data.randomness import Stream
from gresbox.data.scenes import LEVELS, SPLITS, draw_scene, render
from gresbox.data.shapes import draw_shape


def scenes(level, split, count=40, size=64):
    return [draw_scene(Stream(9, index), LEVELS[level], split, size) for index in range(count)]


@pytest.mark.parametrize("level", list(LEVELS))
@pytest.mark.parametrize("split", SPLITS)
def test_masks_are_disjoint_visible_parts_of_at_least_the_promised_share(level, split):
    spec, crowded = LEVELS[level], split == "testB"
    fewest, most = spec.counts[crowded]
    hidden = 0
    for scene in scenes(level, split):
        _, masks = render(scene)
        assert fewest <= len(scene.objects) <= most
        assert masks.sum(0).max() <= 1
        for index, (thing, mask) in enumerate(zip(scene.objects, masks, strict=True)):
            window, inside = draw_shape(thing.shape, thing.x, thing.y, thing.radius, 64)
            whole = np.zeros((64, 64), dtype=bool)
            whole[window] = inside
            later = np.zeros((64, 64), dtype=bool)
            for other in scene.objects[index + 1 :]:
                window, inside = draw_shape(other.shape, other.x, other.y, other.radius, 64)
                later[window] |= inside
            assert (mask == whole & ~later).all()  # later objects are in front
            assert 100 * mask.sum() >= spec.visible[crowded] * whole.sum()
            hidden += int(whole.sum() > mask.sum())
    assert (hidden > 0) == (level == "full" or crowded)


@pytest.mark.parametrize("level", list(LEVELS))
def test_held_out_pairs_are_in_every_picture_of_test_a_and_in_no_other(level):
    for split in SPLITS:
        for scene in scenes(level, split, 60):
            assert any(thing.held_out for thing in scene.objects) == (split == "testA")


def test_every_attribute_of_the_held_out_pairs_is_seen_in_training():
    for level, spec in LEVELS.items():
        seen = [thing for scene in scenes(level, "train", 150) for thing in scene.objects]
        assert {thing.shape for thing in seen} == set(spec.shapes)
        assert {thing.colour for thing in seen} == set(spec.colours)
        assert {thing.pattern for thing in seen} == {name for name, _ in spec.patterns}
        assert {thing.size for thing in seen} == {name for name, *_ in spec.sizes}


def test_basic_pictures_are_plain_and_full_ones_are_not():
    for level in LEVELS:
        for scene in scenes(level, "train", 10):
            image, masks = render(scene)
            assert image.dtype == np.uint8
            colours = np.unique(image[~masks.any(0)].reshape(-1, 3), axis=0)
            assert (len(colours) == 1) == (level == "basic")


def test_objects_stand_out_from_the_background():
    for scene in scenes("basic", "train", 60):
        image, masks = render(scene)
        background = image[~masks.any(0)][0].astype(int)
        for mask in masks:
            assert abs(image[mask][0].astype(int) - background).max() >= 40


@pytest.mark.parametrize("size", [32, 96])
def test_a_scene_can_be_drawn_at_other_sizes(size):
    for scene in scenes("full", "testB", 5, size):
        image, masks = render(scene)
        assert image.shape == (size, size, 3)
        assert masks.any((1, 2)).all()


def test_basic_scenes_are_the_same_at_every_size():
    for index in range(10):
        small, large = (draw_scene(Stream(3, index), LEVELS["basic"], "val", size) for size in (64, 128))
        assert small.objects == large.objects
