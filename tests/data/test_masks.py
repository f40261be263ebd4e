import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gresbox.data.masks import (
    check_rle,
    decode_rle,
    encode_rle,
    is_polygon,
    rasterise_polygons,
    resize_nearest,
    segmentation_mask,
)

masks = hnp.arrays(bool, st.tuples(st.integers(1, 24), st.integers(1, 24)))


@given(masks, st.booleans())
def test_round_trip(mask, compressed):
    rle = encode_rle(mask, compressed=compressed)
    assert rle["size"] == list(mask.shape)
    assert (decode_rle(rle) == mask).all()
    assert (segmentation_mask(rle, *mask.shape) == mask).all()


def test_run_lengths_are_those_of_pycocotools():
    coco = pytest.importorskip("pycocotools.mask")
    draw = np.random.default_rng(0)
    for _ in range(300):
        height, width = draw.integers(1, 200, 2)
        mask = draw.random((height, width)) < draw.choice([0.0, 0.001, 0.02, 0.5, 1.0])
        theirs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert encode_rle(mask)["counts"] == theirs["counts"].decode()
        assert (decode_rle(theirs) == mask).all()


@pytest.mark.parametrize("kind", ["outside", "integers", "cents", "repeated", "thin"])
def test_polygons_are_the_same_bits_as_pycocotools(kind):
    pytest.importorskip("pycocotools")
    draw = np.random.default_rng(1)
    for _ in range(250):
        height, width = (int(side) for side in draw.integers(1, 70, 2))
        count = int(draw.integers(3, 14))
        points = {
            "outside": lambda: draw.uniform(-20, 90, (count, 2)),  # noqa: B023
            "integers": lambda: draw.integers(-3, 40, (count, 2)).astype(float),  # noqa: B023
            "cents": lambda: draw.uniform(0, 60, (count, 2)).round(2),  # noqa: B023
            "repeated": lambda: np.repeat(draw.uniform(0, 40, (count, 2)), 2, axis=0),  # noqa: B023
            "thin": lambda: draw.uniform(0, 40, (count, 2)) * [1.0, 0.01] + [0, 7.3],  # noqa: B023
        }[kind]()
        parts = [points.ravel().tolist(), (points + 5).ravel().tolist()][: int(draw.integers(1, 3))]
        ours = rasterise_polygons(parts, height, width, backend="numpy")
        assert (ours == rasterise_polygons(parts, height, width, backend="pycocotools")).all()


def test_polygons_of_known_area():
    square = rasterise_polygons([[1, 1, 3, 1, 3, 3, 1, 3]], 5, 5, backend="numpy")
    assert square.astype(int).tolist() == [[0] * 5, [0, 1, 1, 0, 0], [0, 1, 1, 0, 0], [0] * 5, [0] * 5]
    assert rasterise_polygons([[-9, -9, 99, -9, 99, 99, -9, 99]], 4, 7, backend="numpy").all()
    assert not rasterise_polygons([], 4, 7).any()


def test_parts_are_joined_not_counted():
    part = [0.0, 0, 4, 0, 4, 4, 0, 4]
    assert (rasterise_polygons([part, part], 6, 6) == rasterise_polygons([part], 6, 6)).all()


@pytest.mark.parametrize(
    "part", [[], [1, 2], [1, 2, 3, 4], [1, 2, 3, 4, 5], [0, 0, 1, 1, float("nan"), 2], "123456", None, [[0, 0]]]
)
def test_what_is_no_polygon(part):
    assert not is_polygon(part)
    with pytest.raises(ValueError, match="rasterise_polygons: `polygons` must be flat lists of at least three points"):
        rasterise_polygons([part], 4, 4)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([3], "fill 2 x 2 pixels"),
        ([2**70, 4 - 2**70], "fill 2 x 2 pixels"),
        ([2**62, 2**62, 2**62, 2**62, 4], "fill 2 x 2 pixels"),
        ([1, 2.0, 1], "whole numbers"),
        (None, "whole numbers"),
        ({"a": 1}, "whole numbers"),
        ([5], "fill 2 x 2"),
        ([-1, 5], "fill 2 x 2"),
        ("\t", "other characters"),
        ("P", "cut text"),
        ("", "fill 2 x 2"),
    ],
)
def test_bad_run_lengths(counts, message):
    with pytest.raises(ValueError, match=message):
        decode_rle({"size": [2, 2], "counts": counts})


@pytest.mark.parametrize("size", [None, [2], [2, 2, 2], ["2", "2"], [2, -2], [2.0, 2.0], 4])
def test_bad_sizes(size):
    with pytest.raises(ValueError, match="decode_rle: `size` must be a height and a width in pixels"):
        decode_rle({"size": size, "counts": [4]})


@given(masks, st.integers(0, 1000), st.booleans())
def test_check_says_what_decoding_would(mask, cut, compressed):
    rle = encode_rle(mask, compressed=compressed)
    check_rle("f", rle, *mask.shape)
    rle["counts"] = rle["counts"][: cut % (len(rle["counts"]) + 1)]
    try:
        decode_rle(rle)
    except ValueError as error:
        with pytest.raises(ValueError, match=re.escape(str(error))):
            check_rle("f", rle, *mask.shape)
    else:
        check_rle("f", rle, *mask.shape)


@given(masks, st.integers(1, 40), st.integers(1, 40))
def test_nearest(mask, height, width):
    resized = resize_nearest(mask, (height, width))
    assert resized.shape == (height, width)
    assert (resize_nearest(mask, mask.shape) == mask).all()
    assert (resize_nearest(mask, (3 * mask.shape[0], 3 * mask.shape[1])) == mask.repeat(3, 0).repeat(3, 1)).all()
    assert resized.any() <= mask.any()
    assert resized.all() >= mask.all()


def test_an_encoding_of_another_size():
    with pytest.raises(ValueError, match=r"must be of size \(3, 2\), got \(2, 2\)"):
        segmentation_mask({"size": [2, 2], "counts": [4]}, 3, 2)


def test_without_pycocotools(monkeypatch):
    monkeypatch.setattr("gresbox.data.masks.find_spec", lambda name: None)
    part = [1, 1, 3, 1, 3, 3, 1, 3]
    assert rasterise_polygons([part], 5, 5).sum() == 4
    with pytest.raises(ImportError, match=r"pip install 'gresbox\[coco\]'"):
        rasterise_polygons([part], 5, 5, backend="pycocotools")
