"""What the times of many rounds say: medians, ratios within rounds with their intervals, and the noise band."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence

AGAIN = " (again)"  # the second run of the same code


class Rounds:
    """The times of all rounds: ``times[name][direction, clock]`` is a list with one number per round, in seconds."""

    def __init__(self, names: Sequence[str], again: str | None) -> None:
        self.times: dict[str, dict[tuple[str, str], list[float]]] = {name: {} for name in names}
        self.again, self.count = again, 0

    def add(self, name: str, sample: Mapping[tuple[str, str], float]) -> None:
        for key, value in sample.items():
            self.times[name].setdefault(key, []).append(value)

    def summary(self, name: str, direction: str) -> dict[str, float | None]:
        times = self.times[name][direction, "wall"]
        graph = self.times[name].get((direction, "graph"))
        low, middle, high = quantile(times, 0.2), statistics.median(times), quantile(times, 0.8)
        return {
            "ms": _milliseconds(middle),
            "ms_low": _milliseconds(low),
            "ms_high": _milliseconds(high),
            "graph_ms": _milliseconds(statistics.median(graph)) if graph else None,
        }

    def ratios(self, ours: str, peers: Sequence[str], direction: str, clock: str) -> dict[str, dict[str, float]]:
        key = direction, clock
        if key not in self.times[ours]:
            return {}
        found = {}
        for peer in peers:
            if key in self.times[peer]:
                shares = [b / a for a, b in zip(self.times[ours][key], self.times[peer][key], strict=True)]
                low, high = median_interval(shares)
                found[peer] = {"ratio": round(statistics.median(shares), 4), "low": round(low, 4), "high": round(high, 4)}
        return found

    def noise_band(self, direction: str) -> float | None:
        """How far from 1 the ratio of two runs of the same code may be."""
        if self.again is None:
            return None
        key = direction, "wall"
        pairs = zip(self.times[self.again][key], self.times[self.again + AGAIN][key], strict=True)
        low, high = median_interval([a / b for a, b in pairs])
        return round(max(high - 1, 1 - low), 4)


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def median_interval(values: Sequence[float], draws: int = 400) -> tuple[float, float]:
    """The 95 % bootstrap interval of the median; the same numbers for the same values."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws)]


def _milliseconds(value: float) -> float:
    return float(f"{1e3 * value:.4g}")
