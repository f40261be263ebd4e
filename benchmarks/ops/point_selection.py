"""Dist-Score point selection: a table or one launch, a running minimum, or candidates and distances rebuilt in every step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Cost, Form, Target, compiled
from benchmarks.peers.point_selection import select_points_by_rebuilding
from gresbox.ops import select_points

CASES = {
    "20 x 20, B=8": {"B": 8, "side": 20, "points": 10},
    "20 x 20, B=1": {"B": 1, "side": 20, "points": 10},
    "20 x 20, B=32": {"B": 32, "side": 20, "points": 20},
    "60 x 60, B=8": {"B": 8, "side": 60, "points": 20},
    "64 x 64, B=8": {"B": 8, "side": 64, "points": 10},
    "60 x 60, B=1": {"B": 1, "side": 60, "points": 20},
    "120 x 120, B=8": {"B": 8, "side": 120, "points": 20},  # beyond table and kernel
}
ON = {"cpu": tuple(CASES), "cuda": tuple(CASES)}
DTYPES = {"cpu": ("float32",), "cuda": ("float32",)}
DIFFERENTIABLE = ()


def make_inputs(case: dict[str, int], device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    maps = torch.randn(case["B"], case["side"], case["side"], generator=generator, device=device)
    return {"score_map": maps.to(dtype), "num_points": case["points"]}


def forms(device: str) -> dict[str, Callable[..., Any] | Form | str]:
    eager = partial(select_points, backend="eager")
    return {
        "gresbox": select_points,
        "gresbox, compiled": compiled(select_points),
        "eager": eager,
        "eager, compiled": compiled(eager),
        "InstanceVG's loop": select_points_by_rebuilding,
    }


def reference(score_map: Tensor, num_points: int) -> Tensor:
    return select_points(score_map, num_points, backend="eager")


def same_form(case: str, device: str, direction: str) -> bool:
    return device == "cpu" and case == "120 x 120, B=8"


def cost(case: dict[str, int], itemsize: int, direction: str) -> Cost:
    """A distance, a root, a sum and a comparison per cell and step; the map is read once."""
    cells = case["B"] * case["side"] ** 2
    return Cost(flops=8 * cells * case["points"], bytes=cells * itemsize + 8 * case["B"] * case["points"])


TARGETS = [
    Target("gresbox", "InstanceVG's loop", "20 x 20, B=8", "forward", at_least=10.0),
    Target("gresbox", "InstanceVG's loop", "60 x 60, B=8", "forward", at_least=10.0),
    Target("gresbox", "InstanceVG's loop", "64 x 64, B=8", "forward", at_least=5.0),
    Target(
        "gresbox",
        "InstanceVG's loop",
        "20 x 20, B=8",
        "forward",
        at_least=50.0,
        microseconds_at_most=50,
        syncs_at_most=0,
        device="cuda",
    ),
]
