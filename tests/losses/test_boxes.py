import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import generalized_box_iou_loss

from gresbox.losses import BoxLoss, box_giou_loss, box_l1_loss
from gresbox.ops import box_cxcywh_to_xyxy, box_iou, box_xyxy_to_cxcywh
from gresbox.testing import assert_matches_reference


def random_boxes(*shape):
    centre = torch.rand(*shape, 2) * 0.6 + 0.2
    return torch.cat([centre, torch.rand(*shape, 2) * 0.3 + 0.05], -1)


def giou_reference(boxes, targets):
    """One minus GIoU of each pair in scalars of the corners."""

    def corners(box):
        cx, cy, w, h = box.unbind(-1)
        return cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2

    (x0, y0, x1, y1), (u0, v0, u1, v1) = corners(boxes), corners(targets)
    zero = torch.zeros_like(x0)
    overlap = (torch.minimum(x1, u1) - torch.maximum(x0, u0)).maximum(zero) * (
        torch.minimum(y1, v1) - torch.maximum(y0, v0)
    ).maximum(zero)
    union = (x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - overlap
    around = (torch.maximum(x1, u1) - torch.minimum(x0, u0)) * (torch.maximum(y1, v1) - torch.minimum(y0, v0))
    return 1 - (overlap / union - (around - union) / around)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(7,), (2, 3, 4), ()])
def test_giou_matches_its_definition_and_gradients(dtype, shape):
    assert_matches_reference(box_giou_loss, giou_reference, [random_boxes(*shape), random_boxes(*shape)], dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_l1_matches_its_definition_and_gradients(dtype):
    inputs = [random_boxes(3, 5), random_boxes(3, 5)]
    assert_matches_reference(box_l1_loss, lambda a, b: (a - b).abs().sum(-1), inputs, dtype=dtype)


def test_pairs_are_the_official_ones(golden):
    at = {name: torch.from_numpy(value) for name, value in golden("igvg_boxes").items()}
    boxes, targets = at["a_cxcywh"], at["b_cxcywh"]
    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(4), indexing="ij")
    loss = box_giou_loss(boxes[rows], targets[columns])
    torch.testing.assert_close(loss, 1 - at["eval_giou"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, 1 - at["giou"], rtol=0, atol=1e-3)  # the model side adds 1e-6 to its denominators


def test_conversions_and_overlaps_are_the_official_ones(golden):
    at = {name: torch.from_numpy(value) for name, value in golden("igvg_boxes").items()}
    boxes, others = box_cxcywh_to_xyxy(at["a_cxcywh"]), box_cxcywh_to_xyxy(at["b_cxcywh"])
    torch.testing.assert_close(boxes, at["a_xyxy"])
    torch.testing.assert_close(others, at["b_xyxy"])
    torch.testing.assert_close(box_xyxy_to_cxcywh(boxes), at["back_cxcywh"])
    iou = box_iou(boxes, others)
    torch.testing.assert_close(iou, at["eval_iou"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(iou * at["union"] / (at["union"] + 1e-6), at["iou"], rtol=1e-5, atol=1e-6)  # the model side's 1e-6
    areas = at["a_cxcywh"][:, 2:].prod(-1)[:, None] + at["b_cxcywh"][:, 2:].prod(-1)
    torch.testing.assert_close(areas / (1 + iou), at["union"], rtol=1e-5, atol=1e-6)


def test_agrees_with_torchvision():
    from torchvision.ops import box_convert

    boxes, targets = random_boxes(9), random_boxes(9)
    expected = generalized_box_iou_loss(box_convert(boxes, "cxcywh", "xyxy"), box_convert(targets, "cxcywh", "xyxy"), eps=0.0)
    torch.testing.assert_close(box_giou_loss(boxes, targets), expected, rtol=1e-5, atol=1e-5)


@given(st.integers(0, 10_000))
def test_losses_are_symmetric_bounded_and_zero_for_equal_boxes(seed):
    torch.manual_seed(seed)
    boxes, targets = random_boxes(6), random_boxes(6)
    l1, giou = BoxLoss()(boxes, targets)
    l1_swapped, giou_swapped = BoxLoss()(targets, boxes)
    torch.testing.assert_close(l1, l1_swapped)
    torch.testing.assert_close(giou, giou_swapped)
    assert (giou >= 0).all()
    assert (giou < 2).all()
    same = BoxLoss()(boxes, boxes)
    assert same[0].abs().max() == 0
    assert same[1].abs().max() < 1e-6


@pytest.mark.parametrize("size", [(0.0, 0.0), (0.0, 0.3), (0.2, 0.0)])
def test_boxes_without_area_are_finite_with_finite_gradients(size):
    flat = torch.tensor([0.4, 0.6, *size])
    for target in (flat, torch.tensor([0.7, 0.7, 0.1, 0.2])):
        boxes = flat.clone().requires_grad_()
        l1, giou = BoxLoss()(boxes, target)
        (l1 + giou).backward()
        assert boxes.grad.isfinite().all()
        assert 1 <= giou < 2
    assert box_giou_loss(flat, flat) == 1


def test_boxes_outside_the_image_are_compared_as_they_are():
    boxes, targets = random_boxes(5), random_boxes(5)
    shift = torch.tensor([3.0, -2.0, 0.0, 0.0])
    torch.testing.assert_close(box_giou_loss(boxes + shift, targets + shift), box_giou_loss(boxes, targets), rtol=1e-4, atol=1e-5)


def test_half_precision_is_computed_in_float32():
    boxes, targets = random_boxes(5).bfloat16(), random_boxes(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        l1, giou = BoxLoss()(boxes, targets)
    assert l1.dtype == giou.dtype == torch.float32
    torch.testing.assert_close(giou, box_giou_loss(boxes.float(), targets))


def test_no_boxes():
    boxes = torch.zeros(0, 4, requires_grad=True)
    l1, giou = BoxLoss()(boxes, torch.zeros(0, 4))
    (l1.sum() + giou.sum()).backward()
    assert boxes.grad.shape == (0, 4)


@pytest.mark.parametrize(
    ("kind", "boxes", "targets", "message"),
    [
        (ValueError, torch.rand(3, 5), torch.rand(3, 5), r"`boxes` must be \(\.\.\., 4\), got \(3, 5\)\."),
        (ValueError, torch.rand(3, 4), torch.rand(2, 4), r"`targets` must be \(3, 4\) like `boxes`, got \(2, 4\)\."),
        (
            TypeError,
            torch.ones(3, 4, dtype=torch.int64),
            torch.rand(3, 4),
            r"`boxes` must be a floating-point tensor",
        ),
    ],
)
@pytest.mark.parametrize("function", [box_l1_loss, box_giou_loss])
def test_wrong_input_is_one_clear_line(function, kind, boxes, targets, message):
    with pytest.raises(kind, match=rf"^{function.__name__}: {message}"):
        function(boxes, targets)
