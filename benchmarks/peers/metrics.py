"""NumPy forms of the official evaluators' work on one expression, the loops that benchmarks/metrics.py compares with.

Written from descriptions of the evaluators, in our own words, and then left alone: a peer is as vectorised as what it stands for.
"""

from __future__ import annotations

import numpy as np

__all__ = ["GRESLoop", "grec_expression", "overlap_of_ready_masks"]


class GRESLoop:
    """gRefCOCO's evaluator, of ReLA's released code (gres_model/evaluation/refer_evaluation.py, lines 50-65 and 129-202).

    Per expression: the mask is the argmax over two channels, copied to int8; intersection and union are sums of logical_and and
    logical_or; Python numbers add up.
    """

    def __init__(self) -> None:
        self.iou = 0.0
        self.intersection = self.union = self.count = 0
        self.right_none = self.missed_none = self.right_some = self.missed_some = 0
        self.hits = dict.fromkeys((0.7, 0.8, 0.9), 0)

    def add_channels(self, channels: np.ndarray, no_target: np.ndarray, target: np.ndarray, is_none: bool) -> None:
        """``channels`` (2, H, W) and ``no_target`` (2,) as the model gives them, ``target`` (1, H, W) int8."""
        mask = np.array(channels.argmax(0), dtype=np.int8)
        self.add(mask, bool(no_target.argmax(0)), target, is_none)

    def add(self, mask: np.ndarray, says_none: bool, target: np.ndarray, is_none: bool) -> None:
        """``mask`` (H, W) and ``target`` (1, H, W) or (H, W)."""
        intersection = np.sum(np.logical_and(mask, target))
        union = np.sum(np.logical_or(mask, target))
        self.count += 1
        if is_none:
            if says_none:
                self.right_none += 1
                self.iou += 1
            else:
                self.missed_none += 1
                self.union += int(union)
            return
        if says_none:
            self.missed_some += 1
            intersection = 0
        else:
            self.right_some += 1
        iou = 0.0 if union == 0 else float(intersection) / float(union)
        self.iou += iou
        self.intersection += int(intersection)
        self.union += int(union)
        for level in self.hits:
            self.hits[level] += iou >= level

    def result(self) -> dict[str, float]:
        """Percentages."""
        some, none = self.right_some + self.missed_some, self.right_none + self.missed_none
        return {
            "gIoU": 100.0 * self.iou / self.count,
            "cIoU": 100.0 * self.intersection / self.union,
            "N_acc": 100.0 * self.right_none / none if none else 0.0,  # there, too, both are 0 then
            "T_acc": 100.0 * self.right_some / some if none else 0.0,
            **{f"Pr@{level}": 100.0 * hits / some for level, hits in self.hits.items()},
        }


def overlap_of_ready_masks(pred: np.ndarray, target: np.ndarray) -> list[tuple[int, int]]:
    """The two sums alone, of bool masks ``(B, H, W)``, expression by expression."""
    return [
        (int(np.sum(np.logical_and(one, other))), int(np.sum(np.logical_or(one, other))))
        for one, other in zip(pred, target, strict=True)
    ]


def grec_expression(
    scores: np.ndarray, boxes: np.ndarray, true: np.ndarray, *, score_threshold: float = 0.7, overlap_threshold: float = 0.5
) -> tuple[int, int, float]:
    """GREC's evaluator, of gRefCOCO's released code (mdetr/datasets/refexp.py, lines 59-113): kept boxes, matched boxes, F1.

    Scores and boxes become Python lists and are sorted as tuples; boxes above the threshold meet the true boxes in a matrix of
    generalised IoU; a loop takes its largest entry and clears the row and the column.
    """
    ranked = sorted(zip(scores.tolist(), boxes.tolist(), strict=True), reverse=True)
    values, rows = zip(*ranked, strict=True)
    kept = np.array(rows, dtype=np.float32)[np.array(values) >= score_threshold]
    if len(true) == 0:
        return len(kept), 0, float(len(kept) == 0)
    overlap = _generalised_iou(kept, true)
    matched = 0
    for _ in range(min(len(kept), len(true))):
        best = overlap.argmax()
        if overlap.flat[best] < overlap_threshold:
            break
        row, column = divmod(int(best), len(true))
        matched += 1
        overlap[row, :] = 0.0
        overlap[:, column] = 0.0
    return len(kept), matched, 2 * matched / (len(kept) + len(true))


def _generalised_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    area = np.prod(first[:, 2:] - first[:, :2], axis=1)[:, None] + np.prod(second[:, 2:] - second[:, :2], axis=1)
    both = np.clip(np.minimum(first[:, None, 2:], second[:, 2:]) - np.maximum(first[:, None, :2], second[:, :2]), 0, None)
    shared = both[..., 0] * both[..., 1]
    union = area - shared
    around = np.maximum(first[:, None, 2:], second[:, 2:]) - np.minimum(first[:, None, :2], second[:, :2])
    hull = around[..., 0] * around[..., 1]
    return shared / union - (hull - union) / hull
