import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gresbox.data import Letterbox, Resize, SyntheticGRES
from gresbox.data.transforms import letterbox_window, resize_image, resize_masks
from gresbox.structures import GresSample, GresTarget, masks_to_boxes


def sample(height=48, width=80):
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    masks = torch.zeros(2, height, width, dtype=torch.bool)
    masks[0, 10:30, 20:40] = True
    masks[1, 40, 70] = True
    merged = masks.any(0)
    merged[:4, :8] = True  # a region that is no instance
    return GresSample(image, "both", GresTarget(masks, merged=merged, no_target=False), kind="many")


def test_masks_at_half_size_are_majorities():
    masks = torch.rand(3, 8, 12) > 0.5
    share = masks.float().reshape(3, 4, 2, 6, 2).mean((2, 4))
    assert (resize_masks(masks, (4, 6)) == (share >= 0.5)).all()


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_masks_keep_everything_that_matters(height, width, new_height, new_width):
    masks = torch.zeros(4, height, width, dtype=torch.bool)
    masks[1] = True
    masks[2, height // 2, width // 3] = True
    masks[3, :, : width // 2 + 1] = True
    resized = resize_masks(masks, (new_height, new_width))
    assert resized.shape == (4, new_height, new_width)
    assert resized.dtype == torch.bool
    assert not resized[0].any()
    assert resized[1].all()
    assert resized[2].any()  # one pixel does not vanish
    assert (resize_masks(masks, (height, width)) == masks).all()


def test_no_masks_have_the_new_size():
    assert resize_masks(torch.zeros(0, 5, 5, dtype=torch.bool), (3, 4)).shape == (0, 3, 4)


def test_doubling_repeats_mask_pixels():
    masks = torch.rand(2, 5, 7) > 0.5
    assert (resize_masks(masks, (10, 14)) == masks.repeat_interleave(2, 1).repeat_interleave(2, 2)).all()


def test_images_are_antialiased_and_rounded():
    stripes = torch.zeros(3, 64, 64, dtype=torch.uint8)
    stripes[:, :, ::2] = 255
    small = resize_image(stripes, (16, 16))
    assert small.dtype == torch.uint8
    assert (small[..., 2:-2].int() - 127).abs().max() <= 16  # plain bilinear would give 0 or 255
    flat = torch.full((3, 9, 13), 77, dtype=torch.uint8)
    assert (resize_image(flat, (20, 5)) == 77).all()


def test_resize_squashes_and_keeps_relative_boxes():
    before = sample()
    after = Resize(32)(before)
    assert after.image.shape == (3, 32, 32)
    assert after.target.masks.shape == (2, 32, 32)
    assert (after.target.boxes == before.target.boxes).all()
    assert (after.target.boxes[0] - masks_to_boxes(after.target.masks)[0]).abs().max() <= 1.5 / 32
    assert after.target.merged[0, 0]  # the region that is no instance is still there
    assert (after.text, after.kind, after.target.no_target) == ("both", "many", False)


def test_letterbox_keeps_the_aspect_and_its_border_is_background():
    before = sample()
    after = Letterbox(64, fill=(1, 2, 3))(before)
    top, left, height, width = letterbox_window(48, 80, 64)
    assert (height, width, left) == (38, 64, 0)
    inner = slice(top, top + height), slice(left, left + width)
    border = torch.ones(64, 64, dtype=torch.bool)
    border[inner] = False
    assert after.image[:, border].unique(dim=1).tolist() == [[1], [2], [3]]
    assert not after.target.masks[:, border].any()
    assert not after.target.merged[border].any()
    assert (after.image[:, *inner] == resize_image(before.image, (height, width))).all()
    assert (after.target.masks[:, *inner] == resize_masks(before.target.masks, (height, width))).all()
    assert (after.target.boxes[0] - masks_to_boxes(after.target.masks)[0]).abs().max() <= 1.5 / 64


@given(st.integers(1, 700), st.integers(1, 700), st.integers(1, 128))
def test_letterbox_window_is_inside_and_touches_two_sides(height, width, size):
    top, left, inner_height, inner_width = letterbox_window(height, width, size)
    assert 0 <= top <= top + inner_height <= size
    assert 0 <= left <= left + inner_width <= size
    assert max(inner_height, inner_width) == size
    assert abs(inner_height * width - inner_width * height) <= max(height, width) / 2 + max(height, width)


@pytest.mark.parametrize("transform", [Resize(48), Letterbox(48)])
def test_a_sample_without_targets(transform):
    data = SyntheticGRES("val", 40, proportions=(1, 0, 0), transform=transform)
    assert data[0].target.masks.shape == (0, 48, 48)
    assert data[0].target.no_target
    assert data[0].target.boxes.shape == (0, 4)


@pytest.mark.parametrize("transform", [Resize, Letterbox])
def test_bad_size(transform):
    with pytest.raises(ValueError, match=f"{transform.__name__}: `size` must be at least 1, got 0"):
        transform(0)
