"""Dist-Score point selection: the nearest chosen cell kept up to date, or candidates and distances rebuilt in every step.

``python -m benchmarks.point_selection`` times :func:`gresbox.ops.select_points` and the loop of ``benchmarks/peers`` on the same
score maps, and counts the indices in which they differ. Both run in turn, in an order that alternates; the ratio is the median over
rounds of the two times of the same round, so that a slow moment of the machine hits both.
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

import torch
from torch import Tensor

from benchmarks.peers.point_selection import select_points_by_rebuilding
from gresbox.ops import select_points

RESULT = Path(__file__).parent / "results" / "point_selection--cpu.json"


def seconds(call: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(size: tuple[int, int, int], num_points: int, rounds: int) -> dict[str, object]:
    maps = torch.randn(size, generator=torch.Generator().manual_seed(0))
    ways = {
        "incremental": lambda: select_points(maps, num_points),
        "rebuilt": lambda: select_points_by_rebuilding(maps, num_points),
    }
    first, second = ways["incremental"](), ways["rebuilt"]()  # also the warm-up
    times: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(rounds):
        for name in list(ways) if index % 2 else list(ways)[::-1]:
            times[name].append(seconds(ways[name]))
    shares = [a / b for a, b in zip(times["incremental"], times["rebuilt"], strict=True)]
    return {
        "size": list(size),
        "points": num_points,
        "share_of_time": round(statistics.median(shares), 3),
        "share_min": round(min(shares), 3),
        "share_max": round(max(shares), 3),
        "incremental_ms": round(1e3 * statistics.median(times["incremental"]), 2),
        "rebuilt_ms": round(1e3 * statistics.median(times["rebuilt"]), 2),
        "different_indices": int((first != second).sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8, help="images (default: 8)")
    parser.add_argument("--sides", type=int, nargs="+", default=[20, 64], help="rows and columns of the maps (default: 20 64)")
    parser.add_argument("--points", type=int, default=10, help="points per image (default: 10)")
    parser.add_argument("--rounds", type=int, default=50, help="timed rounds (default: 50)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write (default: beside this program)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [measure((options.batch, side, side), options.points, options.rounds) for side in options.sides]
    for row in rows:
        print(
            f"{row['size']}, {row['points']} points: {row['rebuilt_ms']} ms -> {row['incremental_ms']} ms, "
            f"{row['share_of_time']} of the time ({row['share_min']} to {row['share_max']}), "
            f"{row['different_indices']} indices differ"
        )
    environment = {
        "device": "cpu",
        "threads": options.threads,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"what": "point_selection", "setting": {"rounds": options.rounds}, "environment": environment, "rows": rows}
    options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
