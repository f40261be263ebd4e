"""Boxes against DETR's numbers, torchvision, and boxes without area."""

from __future__ import annotations

import pytest
import torch
import torchvision.ops
from hypothesis import given
from hypothesis import strategies as st

from gresbox.ops import box_cxcywh_to_xyxy, box_iou, box_xyxy_to_cxcywh, generalized_box_iou


def test_golden(golden):
    data = {key: torch.from_numpy(x) for key, x in golden("m2f_boxes").items()}
    torch.testing.assert_close(box_iou(data["xyxy1"], data["xyxy2"]), data["iou"], rtol=0, atol=1e-15)
    torch.testing.assert_close(generalized_box_iou(data["xyxy1"], data["xyxy2"]), data["giou"], rtol=0, atol=1e-15)
    corners = box_cxcywh_to_xyxy(data["cxcywh1"])
    torch.testing.assert_close(corners, data["xyxy1"][: len(corners)], rtol=0, atol=1e-15)
    torch.testing.assert_close(box_xyxy_to_cxcywh(corners), data["roundtrip"], rtol=0, atol=1e-15)
    costs = {key: torch.from_numpy(x) for key, x in golden("m2f_matcher").items()}
    for case in ("detr0", "detr1"):
        giou = generalized_box_iou(box_cxcywh_to_xyxy(costs[f"{case}/boxes"]), box_cxcywh_to_xyxy(costs[f"{case}/tgt_boxes"]))
        torch.testing.assert_close(-giou, costs[f"{case}/cost_giou"], rtol=0, atol=1e-15)


def test_boxes_without_area_stay_finite(golden):
    point = torch.from_numpy(golden("m2f_boxes")["degenerate/box"]).requires_grad_()
    other = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.3, 0.3, 0.3, 0.3], [0.8, 0.3, 0.8, 0.3]], dtype=torch.float64)
    iou, giou = box_iou(point, other), generalized_box_iou(point, other)
    assert iou.tolist() == [[0, 0, 0]]
    assert giou.tolist() == [[0, 0, 0]]
    assert giou[0, 0] == torch.from_numpy(golden("m2f_boxes")["degenerate/giou_vs_unit"])
    assert torch.autograd.grad((iou + giou).sum(), point)[0].isfinite().all()


@given(st.integers(0, 5), st.integers(0, 5))
def test_equals_torchvision_where_that_is_finite(first, second):
    torch.manual_seed(0)  # each example on its own, so that a failure repeats
    centre1, centre2 = torch.rand(first, 4, dtype=torch.float64) + 0.01, torch.rand(second, 4, dtype=torch.float64) + 0.01
    boxes1, boxes2 = box_cxcywh_to_xyxy(centre1), box_cxcywh_to_xyxy(centre2)
    torch.testing.assert_close(box_xyxy_to_cxcywh(boxes1), centre1)
    torch.testing.assert_close(box_iou(boxes1, boxes2), torchvision.ops.box_iou(boxes1, boxes2))
    giou = generalized_box_iou(boxes1, boxes2)
    torch.testing.assert_close(giou, torchvision.ops.generalized_box_iou(boxes1, boxes2))
    torch.testing.assert_close(generalized_box_iou(boxes2, boxes1), giou.T)
    order = torch.randperm(first)
    torch.testing.assert_close(generalized_box_iou(boxes1[order], boxes2), giou[order])


def test_errors():
    with pytest.raises(ValueError, match=r"^box_iou: `boxes2` must be \(M, 4\), got \(4,\)\.$"):
        box_iou(torch.zeros(1, 4), torch.zeros(4))
    with pytest.raises(ValueError, match=r"^box_cxcywh_to_xyxy: `boxes` must be \(\.\.\., 4\), got \(3, 5\)\.$"):
        box_cxcywh_to_xyxy(torch.zeros(3, 5))
