from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gresbox.blocks import InstancePostprocess, merge_masks
from gresbox.ops import box_xyxy_to_cxcywh
from gresbox.structures import GresOutput, InstancePrediction

SIZE = (20, 24)
WHOLE = [0.5, 0.5, 1.0, 1.0]


@pytest.fixture(scope="module")
def arrays(golden):
    return {name: torch.from_numpy(value) for name, value in golden("igvg_post").items()}


def official_output(arrays):
    classes = arrays["class_logits"]
    masks = arrays["pred_mask_logits"]
    step = InstancePrediction.from_masks(classes[..., 0] - classes[..., 1], masks, torch.zeros(3, 6, 2), torch.zeros(3, 1, 2))
    step = dataclasses.replace(step, boxes=arrays["boxes_cxcywh"])
    return GresOutput(arrays["global_logits"][:, 0], instances=step, extras={"existence": arrays["nt_logits"]})


def shifted_masks(masks, found, threshold):
    """The official union of instance masks: place k of the boxes that are left takes mask k of all masks."""
    left = found.queries.sort().values  # the official order is that of the queries
    score = {int(query): float(s) for query, s in zip(found.queries, found.scores, strict=True)}
    places = [place for place, query in enumerate(left.tolist()) if score[query] > threshold]
    return (masks[places].sigmoid() >= 0.5).any(0)


CASES = [
    (weighted, nms, union) for weighted in (1, 0) for nms, union in ((0, "merge"), (0, "instance"), (0, "global"), (1, "merge"))
]


@pytest.mark.parametrize(("weighted", "nms", "union"), CASES)
def test_golden(arrays, weighted, nms, union):
    output, name = official_output(arrays), f"sw{weighted}_nms{nms}_{union}"
    options = {"existence": "sigmoid" if weighted else "none", "union": union, "blank": False}
    process = InstancePostprocess(nms_iou=0.7 if nms else None, **options)
    answers = process(output, [SIZE] * 3, ["a", "b", "c"])
    torch.testing.assert_close(output.extras["existence"].sigmoid(), arrays[f"{name}_pred_nt"])
    for index, (answer, found) in enumerate(zip(answers, process.detect(output, [SIZE] * 3), strict=True)):
        filtered = "f" if nms else ""
        scores, boxes = arrays[f"{name}_{filtered}scores{index}"], arrays[f"{name}_{filtered}boxes{index}"]
        order = scores.argsort(descending=True)
        torch.testing.assert_close(found.scores, scores[order], rtol=0, atol=1e-7)
        torch.testing.assert_close(found.boxes_xyxy, boxes[order], rtol=0, atol=1e-5)
        kept = scores[order] > 0.7
        torch.testing.assert_close(answer.boxes_xyxy, boxes[order][kept], rtol=0, atol=1e-5)
        assert len(answer.instance_masks) == len(answer.scores) == kept.sum()
        want = arrays[f"{name}_mask{index}"].bool()
        if index != 1 or union == "global":
            assert torch.equal(answer.mask, want)
        else:  # an empty box was dropped, the official masks were not: the golden mask is made of other queries
            official = shifted_masks(arrays["pred_mask_logits"][1], found, 0.7)
            official = official | (arrays["global_logits"][1, 0].sigmoid() >= 0.5) if union == "merge" else official
            assert torch.equal(official, want)
            assert not torch.equal(answer.mask, want)
            own = arrays["pred_mask_logits"][1, found.queries[found.scores > 0.7]].sigmoid() >= 0.5
            assert torch.equal(answer.instance_masks, own)


def output(scores, boxes, *, existence=((9.0, -9.0),), masks=None, **fields):
    """One image; scores are probabilities."""
    logits = torch.tensor([scores]).logit()
    count = len(scores)
    masks = torch.randn(1, count, 8, 8) if masks is None else masks
    step = InstancePrediction.from_masks(logits, masks, torch.zeros(1, count, 2), torch.zeros(1, 1, 2))
    step = dataclasses.replace(step, boxes=torch.tensor([boxes]), points=torch.rand(1, count, 2))
    fields.setdefault("merged", torch.randn(1, 8, 8))
    return GresOutput(instances=step, extras={"existence": torch.tensor(existence)}, **fields)


def test_an_empty_box_takes_its_own_mask_and_point_along():
    masks = torch.full((1, 3, 8, 8), -5.0)
    for query in range(3):
        masks[0, query, query] = 5.0
    out = output([0.9, 0.99, 0.95], [[0.2, 0.2, 0.2, 0.2], [3.0, 3.0, 0.1, 0.1], [0.8, 0.8, 0.2, 0.2]], masks=masks)
    (answer,) = InstancePostprocess(union="instance", existence="none")(out, [(8, 8)])
    assert answer.scores.tolist() == pytest.approx([0.95, 0.9])
    assert [mask.any(1).nonzero()[:, 0].tolist() for mask in answer.instance_masks] == [[2], [0]]
    torch.testing.assert_close(answer.points, out.instances.points[0, [2, 0]] * 8)
    assert answer.mask.any(1).nonzero()[:, 0].tolist() == [0, 2]


def test_a_pixel_at_the_threshold_belongs_to_the_mask():
    out = output([0.9], [WHOLE], masks=torch.zeros(1, 1, 8, 8), merged=torch.full((1, 8, 8), -0.1))
    (answer,) = InstancePostprocess(existence="none")(out, [(8, 8)])
    assert answer.instance_masks.all()
    assert answer.mask.all()
    (stricter,) = InstancePostprocess(existence="none", mask_threshold=0.51)(out, [(8, 8)])
    assert not stricter.mask.any()


def test_a_score_at_the_threshold_is_not_kept():
    scores, boxes = [0.5, 0.75], [WHOLE, WHOLE]
    (answer,) = InstancePostprocess(score_threshold=0.5, existence="none")(output(scores, boxes), [(8, 8)])
    assert answer.scores.tolist() == pytest.approx([0.75])


@pytest.mark.parametrize(
    ("existence", "logits", "factor"),
    [
        ("sigmoid", (0.4, -1.0), 0.59869),
        ("softmax", (0.4, -1.0), 0.80218),
        ("none", (0.4, -1.0), 1.0),
        ("sigmoid", (0.4,), 0.59869),
        ("softmax", (0.4,), 0.59869),
    ],
)
def test_factors_of_the_score(existence, logits, factor):
    (found,) = InstancePostprocess(existence=existence).detect(output([0.9], [WHOLE], existence=(logits,)), [(8, 8)])
    assert found.scores.item() == pytest.approx(0.9 * factor, abs=1e-4)


def test_nothing():
    out = output([0.5, 0.2], [WHOLE, WHOLE], merged=torch.ones(1, 8, 8), no_target=torch.tensor([-4.0]))
    (blank,) = InstancePostprocess(existence="none")(out, [(8, 8)])
    assert not blank.mask.any() and len(blank.scores) == 0 and blank.instance_masks.shape == (0, 8, 8)
    assert blank.no_target_prob == pytest.approx(0.5)
    (kept,) = InstancePostprocess(existence="none", blank=False)(out, [(8, 8)])
    assert kept.mask.all()
    (by_head,) = InstancePostprocess(existence="none", no_target_threshold=0.5)(out, [(8, 8)])
    assert by_head.mask.all() and by_head.no_target_prob == pytest.approx(0.018, abs=1e-3)
    sure = dataclasses.replace(out, no_target=torch.tensor([4.0]))
    (by_head,) = InstancePostprocess(existence="none", score_threshold=0.1, no_target_threshold=0.5)(sure, [(8, 8)])
    assert not by_head.mask.any() and len(by_head.scores) == 0


def test_all_boxes_empty():
    out = output([0.9, 0.9], [[0.5, 0.5, 0.0, 0.5], [-2.0, 0.5, 0.1, 0.1]])
    (answer,) = InstancePostprocess()(out, [(8, 8)])
    assert answer.no_target_prob == 1.0 and len(answer.scores) == 0
    assert InstancePostprocess().detect(out, [(8, 8)])[0].boxes_xyxy.shape == (0, 4)


@given(st.integers(0, 10**6), st.sampled_from([(7, 9), (40, 30)]))
def test_boxes_are_inside_and_sorted(seed, size):
    generator = torch.Generator().manual_seed(seed)
    boxes = (torch.rand(6, 4, generator=generator) * 1.5 - 0.2).tolist()
    scores = torch.rand(6, generator=generator).tolist()
    out = output(scores, boxes)
    (found,) = InstancePostprocess().detect(out, [size])
    x0, y0, x1, y1 = found.boxes_xyxy.unbind(-1)
    assert (x0 >= 0).all() and (y0 >= 0).all() and (x1 <= size[1]).all() and (y1 <= size[0]).all()
    assert (x1 > x0).all() and (y1 > y0).all()
    assert (found.scores.diff() <= 0).all()
    (answer,) = InstancePostprocess()(out, [size])
    kept = len(answer.scores)
    assert torch.equal(answer.boxes_xyxy, found.boxes_xyxy[:kept])
    assert answer.mask.shape == size and answer.instance_masks.shape == (kept, *size)
    assert not (answer.instance_masks.any(0) & ~answer.mask).any()


def test_suppression_drops_the_lower_of_two_equal_boxes_with_its_mask():
    out = output([0.8, 0.9, 0.85], [[0.5, 0.5, 0.4, 0.4], [0.5, 0.5, 0.41, 0.4], [0.1, 0.1, 0.1, 0.1]])
    (answer,) = InstancePostprocess(existence="none", nms_iou=0.7)(out, [(8, 8)])
    assert answer.scores.tolist() == pytest.approx([0.9, 0.85])
    masks = out.instances.masks[0, [1, 2]] >= 0
    assert torch.equal(answer.instance_masks, masks)


def test_suppression_keeps_the_official_boxes_in_their_order(golden):
    at = {name: torch.from_numpy(value) for name, value in golden("igvg_boxes").items() if name.startswith("nms_")}
    out = output(at["nms_scores"].tolist(), box_xyxy_to_cxcywh(at["nms_boxes"]).tolist())
    (found,) = InstancePostprocess(existence="none", nms_iou=0.7).detect(out, [(100, 100)])
    assert found.queries.tolist() == at["nms_keep_07"].tolist()


def test_unions():
    whole, parts = torch.rand(4, 5) > 0.5, torch.rand(2, 4, 5) > 0.5
    assert torch.equal(merge_masks(whole, parts), whole | parts[0] | parts[1])
    assert torch.equal(merge_masks(whole, parts, "instance"), parts[0] | parts[1])
    assert torch.equal(merge_masks(whole, parts, "global"), whole)
    assert torch.equal(merge_masks(whole, parts[:0]), whole)
    assert not merge_masks(whole, parts[:0], "instance").any()


def test_images_of_several_sizes_and_texts():
    torch.manual_seed(0)
    step = InstancePrediction(
        torch.randn(2, 3) + 2, torch.randn(2, 3, 4), torch.randn(2, 4, 8, 8), torch.zeros(2, 3, 4), torch.zeros(2, 1, 4)
    )
    step = dataclasses.replace(step, boxes=torch.rand(2, 3, 4))
    out = GresOutput(torch.randn(2, 8, 8), instances=step, align_corners=True, extras={"existence": torch.full((2, 2), 5.0)})
    sizes = [(16, 12), (8, 20)]
    answers = InstancePostprocess()(out, sizes, ["one", "two"])
    assert [answer.text for answer in answers] == ["one", "two"]
    assert [tuple(answer.mask.shape) for answer in answers] == sizes
    assert answers[0].points is None
    want = out.resized(sizes[1])[1] >= 0
    assert torch.equal(merge_masks(want, answers[1].instance_masks) & bool(len(answers[1].scores)), answers[1].mask)


def test_errors():
    who = "InstancePostprocess: "
    with pytest.raises(ValueError, match=who + r"`score_threshold` must be in \[0, 1\], got 70"):
        InstancePostprocess(score_threshold=70)
    with pytest.raises(ValueError, match=who + r"`nms_iou` must be in \[0, 1\], got -1"):
        InstancePostprocess(nms_iou=-1)
    with pytest.raises(ValueError, match="`union` must be one of 'merge', 'instance', 'global', got 'both'"):
        InstancePostprocess(union="both")
    with pytest.raises(ValueError, match="`existence` must be one of 'sigmoid', 'softmax', 'none'"):
        InstancePostprocess(existence="yes")
    with pytest.raises(ValueError, match="`union` must be one of"):
        merge_masks(torch.ones(2, 2).bool(), torch.ones(1, 2, 2).bool(), "or")
    out = output([0.9], [WHOLE])
    with pytest.raises(ValueError, match=who + "`sizes` must be one per image with B=1, got 2"):
        InstancePostprocess()(out, [(8, 8)] * 2)
    with pytest.raises(ValueError, match=who + r"`sizes` must be heights and widths of at least 1, got \(0, 8\)"):
        InstancePostprocess()(out, [(0, 8)])
    with pytest.raises(ValueError, match=who + "`texts` must be one per image with B=1, got 0"):
        InstancePostprocess()(out, [(8, 8)], [])
    with pytest.raises(ValueError, match=who + r"`output.extras` must hold 'existence' .*, got \['minimap'\]"):
        InstancePostprocess()(dataclasses.replace(out, extras={"minimap": torch.zeros(1, 2, 2)}), [(8, 8)])
    with pytest.raises(ValueError, match=who + "`output.no_target` must be there for a no_target_threshold, got None"):
        InstancePostprocess(no_target_threshold=0.5)(out, [(8, 8)])
    with pytest.raises(ValueError, match=who + "`output.instances` must hold boxes, got none"):
        InstancePostprocess()(dataclasses.replace(out, instances=None), [(8, 8)])
    without = dataclasses.replace(out, instances=dataclasses.replace(out.instances, boxes=None))
    with pytest.raises(ValueError, match=who + "`output.instances` must hold boxes, got some without boxes"):
        InstancePostprocess()(without, [(8, 8)])
