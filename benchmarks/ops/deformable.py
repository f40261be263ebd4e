"""Multi-scale deformable attention of a pixel decoder and of a query decoder, against grid_sample and others' kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Cost, Form, Target, compiled, missing
from benchmarks.peers.deformable import attend_by_sampling
from gresbox.ops import deformable_attention

HEADS, CHANNELS, POINTS, LEVELS = 8, 32, 4, 3
CASES = {  # side: of the coarsest level, stride 32; 15 is an image of 480 pixels
    "B=1, 4725 queries": {"B": 1, "side": 15, "queries": "pixels"},
    "B=8, 4725 queries": {"B": 8, "side": 15, "queries": "pixels"},
    "B=32, 4725 queries": {"B": 32, "side": 15, "queries": "pixels"},
    "B=1, 10 queries": {"B": 1, "side": 15, "queries": 10},
    "B=1, 100 queries": {"B": 1, "side": 15, "queries": 100},
    "B=8, 100 queries": {"B": 8, "side": 15, "queries": 100},
    "B=32, 100 queries": {"B": 32, "side": 15, "queries": 100},
    "2x: B=1, 18900 queries": {"B": 1, "side": 30, "queries": "pixels"},
    "2x: B=8, 18900 queries": {"B": 8, "side": 30, "queries": "pixels"},
    "4x: B=4, 75600 queries": {"B": 4, "side": 60, "queries": "pixels"},
}
MARGIN = 1e-3  # of a pixel, between locations and the places where their gradients jump
ON = {
    "cpu": ("B=8, 100 queries", "B=1, 4725 queries", "B=1, 100 queries", "B=1, 10 queries", "2x: B=1, 18900 queries"),
    "cuda": tuple(name for name in CASES if name != "2x: B=1, 18900 queries"),
}
DIFFERENTIABLE = ("value", "locations", "logits")


def levels(case: dict[str, Any]) -> list[tuple[int, int]]:
    return [(case["side"] * scale, case["side"] * scale) for scale in (1, 2, 4)]


def make_inputs(case: dict[str, Any], device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """Offsets of about two pixels around the queries' own places: pixels' centres, or anywhere for a few queries.

    Interpolation has a kink where a location is level with a pixel's centre, and which side the location is on depends there on
    how it is rounded. So all locations keep a distance from such places.
    """
    drawn = partial(torch.randn, generator=generator, device=device)
    shapes, batch = levels(case), case["B"]
    if case["queries"] == "pixels":
        reference = torch.cat([centres(side, device) for side, _ in shapes]).expand(batch, -1, -1)
    else:
        reference = torch.rand(batch, case["queries"], 2, generator=generator, device=device)
    sizes = torch.tensor(shapes, device=device)[:, None]
    offsets = 2 * drawn(batch, reference.shape[1], HEADS, len(shapes), POINTS, 2) / sizes
    pixels = (reference[:, :, None, None, None] + offsets) * sizes - 0.5
    whole = pixels.floor()
    pixels = whole + (pixels - whole).clamp(MARGIN, 1 - MARGIN)
    return {
        "value": drawn(batch, sum(math.prod(shape) for shape in shapes), HEADS, CHANNELS).to(dtype),
        "shapes": shapes,
        "locations": ((pixels + 0.5) / sizes).contiguous(),
        "logits": drawn(offsets.shape[:-1]),
    }


def centres(side: int, device: torch.device) -> Tensor:
    along = (torch.arange(side, device=device) + 0.5) / side
    return torch.cartesian_prod(along, along).flip(-1)


def forms(device: str) -> dict[str, Callable[..., Any] | Form | str]:
    on_cuda = device == "cuda"
    return {
        "gresbox": attend,
        "gresbox, compiled": compiled(attend),
        "eager": by_definition,
        "eager, compiled": compiled(by_definition),
        "transformers": transformers,
        "transformers, compiled": compiled(transformers),
        "transformers' kernels": "they are downloaded from a hub when they run",
        "deformops": (missing("deformops") or deformops_form()) if on_cuda else "its kernels need a GPU",
        "msda-triton": "no package index has it",
    }


def attend(value: Tensor, shapes: Any, locations: Tensor, logits: Tensor, backend: str = "auto") -> Tensor:
    return deformable_attention(value, shapes, locations, logits, softmax=True, backend=backend)


by_definition = partial(attend, backend="eager")


def transformers(value: Tensor, shapes: Any, locations: Tensor, logits: Tensor) -> Tensor:
    """As it runs under autocast, which widens what is sampled: locations in bfloat16 would be wrong by more than a pixel."""
    weights = logits.flatten(-2).softmax(-1).view(logits.shape)
    return attend_by_sampling(value.to(locations.dtype), shapes, locations, weights).to(value.dtype)


def deformops_form() -> Form:
    from deformops.registry import msda

    def ready(shapes: Any, value: Tensor, **others: Tensor) -> dict[str, Any]:
        sizes = torch.tensor(shapes, device=value.device)
        areas = sizes.prod(1)
        return {"value": value, "sizes": sizes, "starts": areas.cumsum(0) - areas, **others}

    def call(value: Tensor, sizes: Tensor, starts: Tensor, locations: Tensor, logits: Tensor) -> Tensor:
        return msda(value, sizes, starts, locations, logits.to(value.dtype), method="softmax")

    return Form(call, prepare=ready)


def reference(value: Tensor, shapes: Any, locations: Tensor, logits: Tensor) -> Tensor:
    return by_definition(value, shapes, locations, logits)


def same_form(case: str, device: str, direction: str) -> bool:
    return device == "cpu" and case == "B=1, 10 queries"


def cost(case: dict[str, Any], itemsize: int, direction: str) -> Cost:
    """Each sample reads four pixels from a cache; backward it reads them again and adds to four of float32."""
    passes = {"forward": 1, "backward": 2, "forward+backward": 3}[direction]
    pixels = sum(math.prod(shape) for shape in levels(case))
    queries = pixels if case["queries"] == "pixels" else case["queries"]
    lines = case["B"] * queries * HEADS
    samples = lines * LEVELS * POINTS
    values, outputs, places = case["B"] * pixels * HEADS * CHANNELS * itemsize, lines * CHANNELS * itemsize, samples * 3 * 4
    read = 4 * samples * CHANNELS
    forward, added = values + outputs + places, 2 * values + outputs + 2 * places
    return Cost(
        flops={1: 8, 2: 24, 3: 32}[passes] * samples * CHANNELS,
        bytes={1: forward, 2: added, 3: forward + added}[passes],
        cached_bytes={1: read * itemsize, 2: read * (itemsize + 4), 3: read * (2 * itemsize + 4)}[passes],
    )


TARGETS = [
    Target("gresbox", "transformers", "B=1, 4725 queries", "forward", at_least=1.3),
    Target("gresbox", "transformers", "B=8, 100 queries", "forward", at_least=3.0),
    Target("gresbox, compiled", "transformers", "B=1, 4725 queries", "forward", at_least=8.0),
    Target("gresbox, compiled", "transformers", "B=8, 100 queries", "forward", at_least=8.0),
    Target("gresbox", "transformers", "B=1, 4725 queries", "forward+backward", at_least=1.1),
    Target("gresbox", "transformers", "B=8, 100 queries", "forward+backward", at_least=1.5),
    Target("gresbox", "eager", "B=32, 4725 queries", "forward", at_least=4.0, memory_at_most=0.1, device="cuda"),
    Target("gresbox", "eager", "B=32, 4725 queries", "forward+backward", at_least=2.5, memory_at_most=0.1, device="cuda"),
    Target("gresbox", "deformops", "B=32, 4725 queries", "forward", at_least=1.0, device="cuda"),
    Target("gresbox", "deformops", "B=32, 4725 queries", "forward+backward", at_least=1.0, device="cuda"),
]
NOTES = (
    "On the CPU one weighted sum over the four pixels around each location (`embedding_bag`) replaces `grid_sample`; its backward "
    "pass sorts the pixels and sums them in the same way. For ten queries `grid_sample` itself runs."
)
