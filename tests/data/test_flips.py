from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gresbox.data import HorizontalFlip, SyntheticGRES, swap_sides
from gresbox.structures import GresTarget, masks_to_boxes


@pytest.mark.parametrize(
    ("text", "swapped"),
    [
        ("the bright one", "the bright one"),
        ("leftover pizza upright", "leftover pizza upright"),
        ("Left guy, RIGHT hand", "Right guy, LEFT hand"),
        ("leftmost, right-most and the lefthand one", "rightmost, left-most and the righthand one"),
        ("rightward of the left-hand cleft", "leftward of the right-hand cleft"),
        ("the left's hat (right)", "the right's hat (left)"),
        ("left_1", "left_1"),
        ("left to right", "right to left"),
        ("copyright, frights and aleft", "copyright, frights and aleft"),
        ("", ""),
    ],
)
def test_sides_are_swapped_as_words(text, swapped):
    assert swap_sides(text) == swapped
    assert swap_sides(swapped) == text


@given(st.text() | st.lists(st.sampled_from(["left", "Right", "LEFT", "bright", "leftmost", "a", "-", "'s"])).map(" ".join))
def test_twice_is_the_text_itself(text):
    assert swap_sides(swap_sides(text)) == text


def test_picture_masks_boxes_and_words_are_flipped_together():
    flip = HorizontalFlip(1.0)
    for sample in SyntheticGRES("val", 12):
        flipped = flip(sample)
        assert (flipped.image == sample.image.flip(-1)).all()
        assert (flipped.target.masks == sample.target.masks.flip(-1)).all()
        assert (flipped.target.merged == sample.target.merged.flip(-1)).all()
        assert torch.allclose(flipped.target.boxes, masks_to_boxes(flipped.target.masks), atol=1e-6)
        assert (flipped.target.no_target, flipped.kind, flipped.sent_id) == (sample.target.no_target, sample.kind, sample.sent_id)
        assert flipped.text == swap_sides(sample.text)
        again = flip(flipped)
        assert torch.allclose(again.target.boxes, sample.target.boxes, atol=1e-6)
        assert again.text == sample.text


def test_an_empty_mask_keeps_its_box_and_a_wider_merged_mask_is_flipped_as_it_is():
    sample = SyntheticGRES("val", 1)[0]
    merged = torch.zeros(64, 64, dtype=torch.bool)
    merged[3, 5] = True
    target = GresTarget(torch.zeros(1, 64, 64, dtype=torch.bool), merged=merged, no_target=False)
    flipped = HorizontalFlip(1.0)(replace(sample, target=target)).target
    assert flipped.boxes.tolist() == [[0, 0, 0, 0]]
    assert flipped.merged[3, 58]
    assert flipped.no_target is False


def test_how_often():
    sample = replace(SyntheticGRES("val", 1)[0], text="left")
    assert HorizontalFlip(0.0)(sample) is sample
    draw = HorizontalFlip(0.3, torch.Generator().manual_seed(0))
    share = sum(draw(sample).text == "right" for _ in range(400)) / 400
    assert 0.2 < share < 0.4
    with pytest.raises(ValueError, match=r"HorizontalFlip: `probability` must be in \[0, 1\], got 1\.5"):
        HorizontalFlip(1.5)


def test_no_dataset_flips_by_itself():
    assert SyntheticGRES("val", 1).transform is None
    flipped = SyntheticGRES("val", 3, transform=HorizontalFlip(1.0))
    assert (flipped[2].image == SyntheticGRES("val", 3)[2].image.flip(-1)).all()
