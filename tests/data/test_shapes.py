import numpy as np
import pytest

from gresbox.data.shapes import SHAPES, UNITS, draw_shape, paint


def full(shape, x, y, radius, size):
    window, inside = draw_shape(shape, x, y, radius, size)
    mask = np.zeros((size, size), dtype=bool)
    mask[window] = inside
    return mask


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [32, 64, 97])
def test_a_shape_is_inside_its_extent_and_not_cut_by_its_window(shape, size):
    x, y, radius = 400, 600, 150
    mask = full(shape, x, y, radius, size)
    centres = (2 * np.arange(size) + 1) * UNITS / (2 * size)
    rows, columns = np.nonzero(mask)
    slack = 1e-9
    assert (abs(centres[columns] - x) <= radius + slack).all()
    assert (abs(centres[rows] - y) <= radius + slack).all()
    inside_extent = (abs(centres[None] - x) <= radius) & (abs(centres[:, None] - y) <= radius)
    assert mask.sum() > 0.2 * inside_extent.sum()


@pytest.mark.parametrize("size", [48, 64, 128])
def test_circle_and_ring_are_distances(size):
    centres = (2 * np.arange(size) + 1) * UNITS / (2 * size)
    distance = np.hypot(centres[None] - 500, centres[:, None] - 470)
    clear = (abs(distance - 200) > 1e-6) & (abs(distance - 100) > 1e-6)
    assert (full("circle", 500, 470, 200, size) == (distance <= 200))[clear].all()
    assert (full("ring", 500, 470, 200, size) == ((distance <= 200) & (distance > 100)))[clear].all()


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_symmetric_left_to_right_and_differ(shape):
    mask = full(shape, 512, 512, 176, 64)
    assert (mask == mask[:, ::-1]).all()
    others = [full(other, 512, 512, 176, 64) for other in SHAPES if other != shape]
    assert all((mask != other).mean() > 0.005 for other in others)


@pytest.mark.parametrize(("pattern", "share"), [("plain", 0.0), ("striped", 0.5), ("checkered", 0.5)])
def test_patterns_darken_about_half(pattern, share):
    image = np.zeros((64, 64, 3), dtype=np.uint8)
    window, inside = draw_shape("square", 512, 512, 300, 64)
    paint(image, window, inside, (200, 100, 40), pattern)
    painted = image[window][inside]
    assert {tuple(colour) for colour in painted.tolist()} <= {(200, 100, 40), (50, 25, 10)}
    assert abs((painted[:, 0] == 50).mean() - share) < 0.08
    assert not image.sum(-1)[: window[0].start].any()
