"""Updates of GRESMetric and GRECMetric against NumPy forms of the official evaluators' loops (benchmarks/peers/metrics.py).

``python -m benchmarks.metrics`` checks first that both give the same numbers, then times them on the same inputs in turn, in an
order that alternates. Times are CPU time of this one thread, so that other programs on the machine do not count; the ratio is the
median over rounds of the two times of the same round. Below 1 the metric is faster. All checks of the metrics are on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from benchmarks.peers.metrics import GRESLoop, grec_expression, overlap_of_ready_masks
from gresbox.metrics import GRECMetric, GRESMetric, gres_metrics

RESULT = Path(__file__).parent / "results" / "metrics--cpu.json"
Row = dict[str, object]


class MaskBatch:
    """Two channels per expression, the masks and flags they stand for, and true masks; a quarter have no target."""

    def __init__(self, batch: int, size: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.pred, self.target = (np.zeros((batch, size, size), dtype=bool) for _ in range(2))
        for one, other in zip(self.pred, self.target, strict=True):
            for mask in (one, other):
                row, column = rng.integers(0, size // 2, 2)
                mask[row : row + size // 3, column : column + size // 3] = True
        self.is_none = np.arange(batch) % 4 == 3
        self.target[self.is_none] = False
        noise = rng.standard_normal((batch, 2, size, size), dtype=np.float32)
        noise[:, 1] += np.where(self.pred, np.float32(12), np.float32(-12))
        self.channels = noise
        self.no_target = rng.standard_normal((batch, 2), dtype=np.float32)
        self.says_none = self.no_target.argmax(1) == 1

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(torch.from_numpy(part) for part in (self.pred, self.target, self.says_none, self.is_none))

    def by_loop(self, loop: GRESLoop) -> GRESLoop:
        targets = self.target.astype(np.int8)[:, None]
        for channels, flags, target, none in zip(self.channels, self.no_target, targets, self.is_none, strict=True):
            loop.add_channels(channels, flags, target, bool(none))
        return loop


def box_batch(batch: int, boxes: int, true: int, kept: int | None, seed: int = 0) -> list[tuple[np.ndarray, ...]]:
    """Scores, boxes near the true ones, true boxes; ``kept`` scores lie above 0.7, None: scores are uniform."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(batch):
        centre, side = rng.uniform(50, 430, (true, 2)), rng.uniform(20, 120, (true, 2))
        truth = np.concatenate([centre - side / 2, centre + side / 2], 1)
        near = truth[np.arange(boxes) % true] + rng.normal(0, 3, (boxes, 1))
        scores = rng.uniform(0, 1, boxes)
        if kept is not None:
            scores = np.where(np.arange(boxes) < kept, 0.71 + 0.29 * scores, 0.6 * scores)
        found.append(tuple(part.astype(np.float32) for part in (scores, near, truth)))
    return found


def compare(
    name: str, batch: int, ours: Callable[[], object], peer: Callable[[], object], rounds: int, target: float | None
) -> Row:
    times: dict[str, list[float]] = {"ours": [], "peer": []}
    calls = {"ours": ours, "peer": peer}
    for index in range(rounds + 3):
        for key in ("ours", "peer") if index % 2 else ("peer", "ours"):
            start = time.thread_time()
            calls[key]()
            if index >= 3:  # the first rounds warm up
                times[key].append(time.thread_time() - start)
    ratios = [one / other for one, other in zip(times["ours"], times["peer"], strict=True)]
    return {
        "what": name,
        "batch": batch,
        "ours_ms": round(1e3 * statistics.median(times["ours"]), 3),
        "peer_ms": round(1e3 * statistics.median(times["peer"]), 3),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_quartiles": [round(value, 3) for value in statistics.quantiles(ratios, n=4)[::2]],
        "target": target,
    }


def mask_rows(options: argparse.Namespace) -> list[Row]:
    rows = []
    for batch in (1, 8):
        data = MaskBatch(batch, options.size)
        tensors, channels = data.tensors(), torch.from_numpy(data.channels)
        check_masks(options.size)
        metric, loop = GRESMetric(), GRESLoop()

        def from_channels(metric: GRESMetric = metric, channels: torch.Tensor = channels, rest: tuple = tensors[1:]) -> None:
            metric.update(channels[:, 1] > channels[:, 0], *rest)

        def update(metric: GRESMetric = metric, tensors: tuple = tensors) -> None:
            metric.update(*tensors)

        def rela(data: MaskBatch = data, loop: GRESLoop = loop) -> None:
            data.by_loop(loop)

        def ready(data: MaskBatch = data) -> None:
            overlap_of_ready_masks(data.pred, data.target)

        rounds = options.rounds
        rows.append(compare("GRESMetric.update / ReLA's way", batch, update, rela, rounds, 0.15))
        rows.append(compare("comparison of channels and GRESMetric.update / ReLA's way", batch, from_channels, rela, rounds, None))
        rows.append(compare("GRESMetric.update / sums of ready masks", batch, update, ready, rounds, 0.6 if batch == 8 else None))
    return rows


def check_masks(size: int) -> None:
    """Both ways agree, on a batch in which every row of the truth table occurs."""
    data = MaskBatch(32, size, seed=1)
    want = data.by_loop(GRESLoop()).result()
    got = gres_metrics(*data.tensors())
    assert {name: float(value) for name, value in got.items()}.keys() == want.keys()
    assert all(abs(float(got[name]) - value) < 1e-9 for name, value in want.items())


def box_rows(options: argparse.Namespace) -> list[Row]:
    scenes = {
        "100 boxes, as many kept as true (3)": (3, 3),
        "100 boxes, uniform scores, 3 true": (3, None),
        "100 boxes, all kept, 100 true": (100, 100),
    }
    rows = []
    for name, (true, kept) in scenes.items():
        for batch in (1, 8, 16):
            data = box_batch(batch, 100, true, kept)
            found = [{"boxes_xyxy": torch.from_numpy(boxes), "scores": torch.from_numpy(scores)} for scores, boxes, _ in data]
            truth = [torch.from_numpy(boxes) for *_, boxes in data]
            check_boxes(data, found, truth)
            metric = GRECMetric()

            def update(metric: GRECMetric = metric, found: list = found, truth: list = truth) -> None:
                metric.update(found, truth)

            def greedy(data: list = data) -> None:
                for expression in data:
                    grec_expression(*expression)

            rows.append(compare(f"GRECMetric.update, {name} / greedy loop", batch, update, greedy, options.rounds, 0.3))
    return rows


def check_boxes(data: list[tuple[np.ndarray, ...]], found: list[dict[str, torch.Tensor]], truth: list[torch.Tensor]) -> None:
    metric = GRECMetric(protocol="instancevg", per_sample=True)
    metric.update(found, truth)
    got = metric.compute()
    rows = torch.stack([got[name].double() for name in ("kept", "matched", "f1")], 1)
    assert torch.equal(rows, torch.tensor([grec_expression(*expression) for expression in data], dtype=torch.float64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=480, help="side of the masks in pixels (default: 480)")
    parser.add_argument("--rounds", type=int, default=101, help="timed rounds (default: 101)")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write (default: beside this program)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = mask_rows(options) + box_rows(options)
    for row in rows:
        goal = "" if row["target"] is None else f"  (at most {row['target']})"
        print(f"{row['what']}, batch {row['batch']}: {row['ours_ms']} ms / {row['peer_ms']} ms = {row['ratio']}{goal}")
    environment = {
        "device": "cpu",
        "threads": 1,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }
    setting = {"size": options.size, "rounds": options.rounds, "clock": "CPU time of the thread"}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(
        json.dumps({"what": "metrics", "setting": setting, "environment": environment, "rows": rows}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
