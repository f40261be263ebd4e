"""Every metric and every option against the evaluator it stands for; the table in docs/metrics.md is what is measured here.

``GRESBOX_UPDATE_DOCS=1 pytest tests/metrics/test_golden.py`` writes the table.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from gresbox.metrics import (
    coverage_accuracy,
    grec_metrics,
    gres_metrics,
    no_target_from_logits,
    no_target_from_scores,
    refzom_metrics,
    res_metrics,
    rrefcoco_metrics,
)
from gresbox.ops import box_xyxy_to_cxcywh

PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
START, END = "<!-- golden table: written by tests/metrics/test_golden.py -->", "<!-- end of the golden table -->"
Pairs = list[tuple[object, object]]  # what we compute, what the evaluator returned


@dataclass(frozen=True)
class Case:
    metric: str
    evaluator: str
    how: str  # the option or flags that select this variant
    run: Callable[[SimpleNamespace], tuple[Pairs, int]]  # pairs of numbers, and how many samples sit on an edge
    tolerance: float = 1e-9


def pairs_of(got: dict[str, Tensor], want: dict[str, float | None]) -> Pairs:
    return [(got[name], value) for name, value in want.items()]


def percents(record: dict[str, float]) -> dict[str, float]:
    """The evaluators of gRefCOCO give fractions for accuracies."""
    return {name: value * (100.0 if name.endswith("_acc") else 1.0) for name, value in record.items()}


def mask_edges(data: SimpleNamespace, is_none: Tensor, says_none: Tensor) -> Tensor:
    """Samples that a slightly different rule would count differently, ``(B,)`` bool."""
    both, either = (data.pred & data.gt).sum((1, 2)), (data.pred | data.gt).sum((1, 2))
    predicted = data.pred.sum((1, 2))
    exact = torch.zeros_like(is_none)
    for tenths in (5, 6, 7, 8, 9):
        exact |= (10 * both == tenths * either) & (either > 0)
    empty = predicted == 0
    return torch.where(is_none, says_none != empty, exact | empty | (predicted == 49) | (predicted == 50))


def gres(key: str, flags: str, **options: object) -> Callable[[SimpleNamespace], tuple[Pairs, int]]:
    def run(sets: SimpleNamespace) -> tuple[Pairs, int]:
        data = sets.grefcoco
        says_none = {
            "sigmoid": no_target_from_logits(data.nt_logits),
            "logits": no_target_from_logits(data.nt_logits, sigmoid=False),
            "scores": no_target_from_scores(data.ivg_scores),
            "mask": None,
        }[flags]
        got = gres_metrics(data.pred, data.gt, says_none, data.gt_nt, per_sample=True, **options)
        record = data.official[key]
        if "res" in record:
            want = percents(record["res"])
        else:
            levels = dict(zip(("Pr@0.7", "Pr@0.8", "Pr@0.9"), record["Pr@[.7,.8,.9]"], strict=True))
            want = {**{name: record[name] for name in ("gIoU", "cIoU", "T_acc", "N_acc")}, **levels}
        pairs = pairs_of(got, want)
        if key == "main":
            rows = torch.stack([got[name].double() for name in ("no_target", "intersection", "union", "iou")], 1)
            pairs.append((rows, torch.tensor(data.official["per_sample"], dtype=torch.float64)))
        edges = mask_edges(data, data.gt_nt, got["no_target"])
        if flags in ("sigmoid", "logits"):
            close = data.nt_logits.sigmoid()
            edges |= (close[:, 0] == close[:, 1]) | (data.nt_logits[:, 0] == data.nt_logits[:, 1])
        if flags == "scores":
            edges |= (data.ivg_scores == 0.7).any(1)
        return pairs, int(edges.sum())

    return run


def gres_of_instancevg(key: str, threshold: float) -> Callable[[SimpleNamespace], tuple[Pairs, int]]:
    def run(sets: SimpleNamespace) -> tuple[Pairs, int]:
        data = sets.instancevg
        keep = ~data.empty if "noempty" in key else torch.ones_like(data.empty)
        says_none = no_target_from_scores(data.scores, threshold=threshold)
        got = gres_metrics(data.pred_masks[keep].bool(), data.gt_masks[keep].bool(), says_none[keep], data.empty[keep])
        names = ("gIoU", "cIoU", "T_acc", "N_acc")
        want = dict(zip(names, getattr(data, f"{key}_gIoU_cIoU_Tacc_Nacc").tolist(), strict=True))
        if key == "gres":
            want |= dict(zip(("Pr@0.7", "Pr@0.8", "Pr@0.9"), data.gres_pr_07_08_09.tolist(), strict=True))
        return pairs_of(got, want), int((data.scores == threshold).any(1).sum())

    return run


def two_sources(sets: SimpleNamespace) -> tuple[Pairs, int]:
    """The evaluator's row of one source is the metric of that subset; it leaves the accuracies out of the full row."""
    data = sets.grefcoco
    refcoco = ~data.gt_nt & (torch.arange(200) % 3 == 0)
    says_none = no_target_from_logits(data.nt_logits)
    pairs = []
    for source, keep in {"refcoco": refcoco, "grefcoco": ~refcoco, "full": torch.ones_like(refcoco)}.items():
        got = gres_metrics(data.pred[keep], data.gt[keep], says_none[keep], data.gt_nt[keep])
        pairs += pairs_of(got, percents(data.official["two_sources"]["res"][source]))
    targets = ~data.gt_nt
    got = gres_metrics(data.pred[targets], data.gt[targets], says_none[targets], data.gt_nt[targets])
    pairs += pairs_of(got, percents(data.official["targets_only"]["res"]))
    return pairs, int(mask_edges(data, data.gt_nt, says_none).sum())


def emptied(data: SimpleNamespace) -> SimpleNamespace:
    """The set with one targeted sample in which nothing is predicted and nothing true."""
    pred, gt, index = data.pred.clone(), data.gt.clone(), int(data.degenerate_index)
    pred[index] = gt[index] = False
    return SimpleNamespace(**{**vars(data), "pred": pred, "gt": gt})


def zom_names(record: dict) -> dict[str, float | None]:
    want = {name: record[name] for name in ("mIoU", "oIoU", "Acc")}
    levels = record["Pr"] if "Pr" in record else dict(zip("56789", record["Pr@[.5,.6,.7,.8,.9]"], strict=True))
    return {**want, **{f"Pr@{key if len(key) > 1 else '0.' + key}": value for key, value in levels.items()}}


def zom(flags: bool) -> Callable[[SimpleNamespace], tuple[Pairs, int]]:
    def run(sets: SimpleNamespace) -> tuple[Pairs, int]:
        data = sets.refzom
        says_none = no_target_from_scores(data.ivg_scores) if flags else None
        got = refzom_metrics(data.pred, data.gt, data.kind, says_none, per_sample=True)
        official = data.official
        pairs = pairs_of(got, zom_names(official["instancevg_refzom" if flags else "overall"]))
        if not flags:
            pairs += pairs_of(
                refzom_metrics(emptied(data).pred, emptied(data).gt, data.kind), zom_names(official["with_degenerate_target"])
            )
            for kind, key in (("one", "one_to_one"), ("many", "one_to_many")):
                pairs += [(got[f"{name}_{kind}"], official[key][name]) for name in ("mIoU", "oIoU")]
                keep = [place for place, value in enumerate(data.kind) if value == kind]
                alone = refzom_metrics(data.pred[keep], data.gt[keep], [kind] * len(keep))
                pairs += pairs_of(alone, zom_names(official[key]))
        is_zero = torch.tensor([kind == "zero" for kind in data.kind])
        return pairs, int(mask_edges(data, is_zero, got["no_target"]).sum()) + (not flags)

    return run


def zom_of_instancevg(sets: SimpleNamespace) -> tuple[Pairs, int]:
    data = sets.instancevg
    kind = ["zero" if empty else "one" for empty in data.empty.tolist()]
    pred, gt, says_none = data.pred_masks.bool(), data.gt_masks.bool(), no_target_from_scores(data.scores)
    names = ("mIoU", "oIoU", "Acc")
    got = refzom_metrics(pred, gt, kind, says_none)
    pairs = pairs_of(got, dict(zip(names, data.refzom_mIoU_oIoU_acc.tolist(), strict=True)))
    levels = [f"Pr@0.{tenths}" for tenths in "56789"]
    pairs += pairs_of(got, dict(zip(levels, data.refzom_pr_05_09.tolist(), strict=True)))
    some = ~data.empty
    got = refzom_metrics(pred[some], gt[some], ["many"] * int(some.sum()), says_none[some])
    return pairs + pairs_of(got, dict(zip(names, data.refzom_noempty_mIoU_oIoU_acc.tolist(), strict=True))), 0


def res(key: str, empty_union: str) -> Callable[[SimpleNamespace], tuple[Pairs, int]]:
    def run(sets: SimpleNamespace) -> tuple[Pairs, int]:
        data = sets.res
        pairs = []
        for suffix, chosen in {"": data, "_with_degenerate_target": emptied(data)}.items():
            if f"{key}{suffix}" not in data.official:
                continue
            record = data.official[f"{key}{suffix}"]
            got = res_metrics(chosen.pred, chosen.gt, empty_union=empty_union)
            pairs += [(got[name], record[name]) for name in ("mIoU", "oIoU")]
            pairs += [(got[f"Pr@{level}"], value) for level, value in record["Pr"].items()]
        none = torch.zeros(len(data.pred), dtype=torch.bool)
        return pairs, int(mask_edges(data, none, none).sum()) + ("degenerate" in str(data.official.keys()))

    return run


def rref_pairs(got: dict[str, Tensor], record: dict) -> Pairs:
    return [(got[name], record.get(name, record.get("r"))) for name in ("mIoU", "oIoU", "mRR", "rIoU")]


def rref(key: str) -> Callable[[SimpleNamespace], tuple[Pairs, int]]:
    def run(sets: SimpleNamespace) -> tuple[Pairs, int]:
        data = sets.rrefcoco
        flags = data.exist_score < 0.5
        pred, gt, options = data.pred, data.gt, {}
        if key == "instancevg_rrefcoco":
            options = {"pred_no_target": flags, "protocol": "instancevg"}  # its two scores, 0.9 and 0.1, against 0.7
        elif key == "use_exist":
            options = {"pred_no_target": flags}
        got = rrefcoco_metrics(pred, gt, data.exist, data.group, **options)
        pairs = rref_pairs(got, data.official[key])
        edges = (data.exist_score == 0.5) | (~data.exist & (flags != (pred.sum((1, 2)) == 0)))
        if key == "mask_only":
            empty = data.group == 0
            got = rrefcoco_metrics(pred & ~empty[:, None, None], gt & ~empty[:, None, None], data.exist, data.group)
            pairs += rref_pairs(got, data.official["mask_only_with_empty_positive_in_group_0"])
            edges |= empty
        return pairs, int(edges.sum())

    return run


def rref_of_instancevg(sets: SimpleNamespace) -> tuple[Pairs, int]:
    data = sets.instancevg
    order = data.rref_order
    group = torch.cat([torch.full((int(end - start),), place) for place, (start, end) in enumerate(data.rref_groups)])
    got = rrefcoco_metrics(
        data.pred_masks[order].bool(),
        data.gt_masks[order].bool(),
        ~data.empty[order],
        group,
        no_target_from_scores(data.scores[order]),
        protocol="instancevg",
    )
    return list(zip((got[name] for name in ("mIoU", "oIoU", "mRR", "rIoU")), data.rref_mIoU_oIoU_mRR_rIoU, strict=True)), 0


def grec_edges(data: SimpleNamespace) -> int:
    near = (data.scores - 0.7).abs() < 1e-6
    ranked = data.scores.sort(1).values
    tied = (ranked[:, 1:] == ranked[:, :-1]) & (ranked[:, 1:] >= 0.69)
    return int((near.any(1) | tied.any(1) | data.empty | ~(data.scores >= 0.7).any(1)).sum())


def grec(key: str, **options: object) -> Callable[[SimpleNamespace], tuple[Pairs, int]]:
    def run(sets: SimpleNamespace) -> tuple[Pairs, int]:
        data = sets.grec
        found = [{"boxes_xyxy": boxes, "scores": scores} for boxes, scores in zip(data.boxes, data.scores, strict=True)]
        true = [boxes[:count] for boxes, count in zip(data.gt_boxes, data.n_gt.tolist(), strict=True)]
        record = data.official[key]
        got = grec_metrics(found, true, data.empty, per_sample=True, **options)
        if "F1_score" in record:
            pairs = [(got["F1"], 100 * record["F1_score"]), *((got[name], 100 * record[name]) for name in ("T_acc", "N_acc"))]
        else:
            pairs = [(got["F1"], record["F1score"]), *((got[name], record[name]) for name in ("T_acc", "N_acc"))]
        if key == "score>=0.7":
            rows = torch.stack([got[name].double() for name in ("matched", "kept", "f1")], 1)
            pairs.append((rows, torch.tensor(data.official["per_sample_[TP,num_pred,F1]"], dtype=torch.float64)))
        return pairs, grec_edges(data)

    return run


def grec_of_instancevg(sets: SimpleNamespace) -> tuple[Pairs, int]:
    data = sets.instancevg
    true = data.gt_boxes_xyxy.split(data.gt_sizes.tolist())
    pairs: Pairs = []
    everything = list(range(len(true)))
    some = (~data.empty).nonzero().ravel().tolist()
    for key, threshold, keep in (("grec", 0.7, everything), ("grec_thr075", 0.75, everything), ("grec_noempty", 0.7, some)):
        found = [{"boxes_xyxy": data.boxes_xyxy[index], "scores": data.scores[index]} for index in keep]
        options = {"score_threshold": threshold, "protocol": "instancevg", "per_sample": True}
        got = grec_metrics(found, [true[index] for index in keep], data.empty[keep], **options)
        want = getattr(data, f"{key}_F1_Nacc_Tacc").tolist()
        pairs += pairs_of(got, dict(zip(("F1", "N_acc", "T_acc"), want, strict=True)))
        if key == "grec":
            pairs.append(((got["f1"] >= 1).double(), data.grec_correct_per_sample))
    return pairs, int((data.scores == 0.75).any(1).sum())


def cover(sets: SimpleNamespace) -> tuple[Pairs, int]:
    """The evaluator multiplies the points' x by the height and their y by the width; so do these points before they come in."""
    data, whole = sets.grec, 2048  # pixels, more than any side: a power of two keeps borders exact
    counts = [0 if empty else int(count) for empty, count in zip(data.empty[:40], data.n_gt[:40], strict=True)]
    points = data.cover_points.double() * data.cover_hw[:, None] / whole
    boxes = [box_xyxy_to_cxcywh(data.gt_boxes[index, :count].double() / whole) for index, count in enumerate(counts)]
    got = coverage_accuracy(points, boxes, per_sample=True)
    share = (got["covered"] / got["boxes"])[got["boxes"] > 0]
    record = data.official["coveracc"]
    each = torch.tensor(record["per_image_in_order_skipping_no_target"], dtype=torch.float64)
    pairs: Pairs = [(got["CoverAcc"], record["mean_percent"]), (share, each)]
    data = sets.instancevg
    boxes = [box_xyxy_to_cxcywh(part.double() / data.cover_img[0]) for part in (data.cover_gt0, data.cover_gt1, data.cover_gt2)]
    other = coverage_accuracy(data.cover_points.double(), boxes)
    wide = (sets.grec.cover_hw[:, 0] != sets.grec.cover_hw[:, 1]).sum()
    return [*pairs, (other["CoverAcc"], 100 * data.cover_cover.mean())], int((got["boxes"] == 0).sum() + wide) + 1


RELA = "ReLA `refer_evaluation.py`"
IVG = "InstanceVG"
CASES = [
    Case("GRESMetric", RELA, "flags of `no_target_from_logits`", gres("main", "sigmoid")),
    Case("GRESMetric", RELA, "flags of `no_target_from_logits(sigmoid=False)`", gres("main_without_sigmoid_on_nt", "logits")),
    Case("GRESMetric", RELA, '`no_target_rule="empty_mask"`', gres("empty_mask_rule", "mask")),
    Case("GRESMetric", RELA, '`no_target_rule="pixels"`', gres("fifty_pixel_rule", "mask", no_target_rule="pixels")),
    Case("GRESMetric", RELA, "each source, and only targets", two_sources),
    Case("GRESMetric", f"{IVG} `grefcoco.py`", "flags of `no_target_from_scores`", gres("instancevg_gres", "scores")),
    Case("GRESMetric", f"{IVG} `grefcoco.py`", "second set", gres_of_instancevg("gres", 0.7)),
    Case("GRESMetric", f"{IVG} `grefcoco.py`", "second set, `threshold=0.75`", gres_of_instancevg("gres_thr075", 0.75)),
    Case("GRESMetric", f"{IVG} `grefcoco.py`", "second set, only targets", gres_of_instancevg("gres_noempty", 0.7)),
    Case("GRECMetric", "gRefCOCO `refexp.py`", "default", grec("score>=0.7")),
    Case("GRECMetric", "gRefCOCO `refexp.py`", "`score_threshold=0.5`", grec("score>=0.5", score_threshold=0.5)),
    Case("GRECMetric", "gRefCOCO `refexp.py`", "`score_threshold=0.8`", grec("score>=0.8", score_threshold=0.8)),
    Case(
        "GRECMetric",
        "the same rule with IoU (no released code)",
        '`iou_type="iou"`',
        grec("NOT_official_plain_iou", iou_type="iou"),
    ),
    Case("GRECMetric", f"{IVG} `grefcoco.py`", '`protocol="instancevg"`', grec("instancevg_grec", protocol="instancevg")),
    Case("GRECMetric", f"{IVG} `grefcoco.py`", "second set, three ways", grec_of_instancevg),
    Case("RefZOMMetric", "DMMI `test.py`", "default, also one and many alone", zom(flags=False)),
    Case("RefZOMMetric", f"{IVG} `refzom.py`", "flags of `no_target_from_scores`", zom(flags=True)),
    Case("RefZOMMetric", f"{IVG} `refzom.py`", "second set", zom_of_instancevg),
    Case("RRefCOCOMetric", "robust-ref-seg `validation.py`", "default", rref("mask_only"), 1e-5),
    Case("RRefCOCOMetric", "robust-ref-seg `validation.py`", "flags: existence below 0.5", rref("use_exist"), 1e-5),
    Case("RRefCOCOMetric", f"{IVG} `rrefcoco.py`", '`protocol="instancevg"`', rref("instancevg_rrefcoco")),
    Case("RRefCOCOMetric", f"{IVG} `rrefcoco.py`", "second set", rref_of_instancevg),
    Case("RESMetric", "LAVT's loop in DMMI `test.py`", "default", res("lavt_style_dmmi", "zero")),
    Case("RESMetric", "CARIS `eval.py`", '`empty_union="nan"`', res("caris", "nan"), 1e-5),
    Case("RESMetric", "AMLRIS `eval.py`", '`empty_union="nan"`', res("amlris", "nan"), 1e-5),
    # its shares per picture are float32
    Case("CoverageAccuracy", f"{IVG} `mix_gref_unimodel.py`", "both sets, its exchange of x and y undone", cover, 1e-7),
]


def difference(pairs: Pairs) -> tuple[float, int]:
    """The largest, and how many numbers were compared; NaN and null mean the same and equal nothing else."""
    largest, count = 0.0, 0
    for got, want in pairs:
        one = torch.as_tensor(got, dtype=torch.float64)
        other = torch.as_tensor(math.nan if want is None else want, dtype=torch.float64)
        assert one.shape == other.shape
        assert torch.equal(one.isnan(), other.isnan())
        gap = (one - other).abs().nan_to_num(0.0)
        largest, count = max(largest, float(gap.max())), count + gap.numel()
    return largest, count


@pytest.fixture(scope="module")
def measure(sets) -> Callable[[Case], tuple[float, int, int]]:
    """The largest difference, how many numbers, and how many samples on an edge; each case is run once."""

    @functools.cache
    def result(case: Case) -> tuple[float, int, int]:
        pairs, edges = case.run(sets)
        return (*difference(pairs), edges)

    return result


@pytest.mark.filterwarnings("ignore:.*divide by zero:UserWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.metric}-{case.evaluator}-{case.how}")
def test_equals_the_evaluator(measure, case):
    largest, count, _ = measure(case)
    assert count >= 1
    assert largest <= case.tolerance


def table(measured: list[tuple[float, int, int]]) -> list[str]:
    lines = [
        "| metric | evaluator | selected by | numbers compared | largest difference | samples on an edge |",
        "|---|---|---|---|---|---|",
    ]
    for case, (largest, count, edges) in zip(CASES, measured, strict=True):
        shown = "0" if largest == 0 else f"{largest:.0e}"
        lines.append(f"| `{case.metric}` | {case.evaluator} | {case.how} | {count} | {shown} | {edges} |")
    return lines


@pytest.mark.filterwarnings("ignore:.*divide by zero:UserWarning")
def test_the_table_in_the_documentation_is_what_was_measured(measure):
    measured = [measure(case) for case in CASES]
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(START)
    written, after = rest.split(END)
    lines = table(measured)
    if os.environ.get("GRESBOX_UPDATE_DOCS"):
        PAGE.write_text(f"{before}{START}\n\n" + "\n".join(lines) + f"\n\n{END}{after}", encoding="utf-8")
        return
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in written.strip().splitlines()[2:]]
    assert len(rows) == len(measured)
    for row, case, (largest, count, edges) in zip(rows, CASES, measured, strict=True):
        assert row[:4] + row[5:] == [f"`{case.metric}`", case.evaluator, case.how, str(count), str(edges)]
        # the last bits depend on the processor, their order of magnitude does not
        assert largest <= max(10 * float(row[4]), 1e-12)
