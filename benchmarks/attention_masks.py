"""Attention masks of the masked-attention decoder: factored, or full masks that are built and then resized.

``python -m benchmarks.attention_masks`` times what the predictions of one decoder pass need for their attention masks: which
positions of a memory level each query may read. Levels go round, lowest resolution first.

- factored: the pixel features are resized once per level; each prediction multiplies its embeddings with them, takes the sign.
- full: each prediction builds all masks at a quarter of the image's size, resizes them and cuts their probability at 0.5.

Both ways run in turn, in an order that alternates, and the speed-up is the median over rounds of the two times of the same
round, so that a slow moment of the machine hits both.
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
from torch.nn import functional as F

from gresbox.blocks import attention_mask_logits, downsample_pixels

LEVEL_STRIDES = (32, 16, 8)
RESULT = Path(__file__).parent / "results" / "attention_masks--cpu.json"
Masks = list[Tensor]


def factored(embeddings: Tensor, pixels: Tensor, sizes: list[tuple[int, int]]) -> Masks:
    """``embeddings`` (steps, B, N, C), ``pixels`` (B, C, H/4, W/4) -> per step (B, N, h * w) bool, True = may read."""
    levels = [downsample_pixels(pixels, size) for size in sizes]
    return [attention_mask_logits(step, levels[index % len(levels)]) >= 0 for index, step in enumerate(embeddings)]


@torch.no_grad()
def full(embeddings: Tensor, pixels: Tensor, sizes: list[tuple[int, int]]) -> Masks:
    """The same by resizing the masks."""
    masks = []
    for index, step in enumerate(embeddings):
        built = torch.einsum("bnc,bchw->bnhw", step, pixels)
        resized = F.interpolate(built, size=sizes[index % len(sizes)], mode="bilinear", align_corners=False)
        masks.append(resized.sigmoid().flatten(2) >= 0.5)
    return masks


def seconds(call: Callable[[], Masks]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(batch: int, options: argparse.Namespace) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    quarter = options.image_size // 4
    embeddings = torch.randn(options.predictions, batch, options.queries, options.dim, generator=generator)
    pixels = torch.randn(batch, options.dim, quarter, quarter, generator=generator)
    sizes = [(options.image_size // stride,) * 2 for stride in LEVEL_STRIDES]
    ways = {"factored": lambda: factored(embeddings, pixels, sizes), "full": lambda: full(embeddings, pixels, sizes)}
    pairs = list(zip(ways["factored"](), ways["full"](), strict=True))  # also the warm-up
    times: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(options.rounds):
        for name in list(ways) if index % 2 else list(ways)[::-1]:
            times[name].append(seconds(ways[name]))
    ratios = [b / a for a, b in zip(times["factored"], times["full"], strict=True)]
    return {
        "batch": batch,
        "speedup": round(statistics.median(ratios), 2),
        "speedup_min": round(min(ratios), 2),
        "speedup_max": round(max(ratios), 2),
        "factored_ms": round(1e3 * statistics.median(times["factored"]), 1),
        "full_ms": round(1e3 * statistics.median(times["full"]), 1),
        "sign_disagreements": sum(int((a != b).sum()) for a, b in pairs),
        "positions": sum(a.numel() for a, _ in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="images per pass (default: 1 4)")
    parser.add_argument("--image-size", type=int, default=480, help="side in pixels, a multiple of 32 (default: 480)")
    parser.add_argument("--queries", type=int, default=100, help="queries N (default: 100)")
    parser.add_argument("--dim", type=int, default=256, help="channels C (default: 256)")
    parser.add_argument("--predictions", type=int, default=10, help="predictions per pass (default: 10)")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default: 15)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write (default: beside this program)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [measure(batch, options) for batch in options.batch]
    for row in rows:
        print(
            f"B={row['batch']}: {row['full_ms']} ms -> {row['factored_ms']} ms, {row['speedup']}x "
            f"({row['speedup_min']} to {row['speedup_max']}), {row['sign_disagreements']} of {row['positions']} signs differ"
        )
    setting = {name: getattr(options, name) for name in ("image_size", "queries", "dim", "predictions", "rounds")}
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
    options.out.write_text(
        json.dumps({"what": "attention_masks", "setting": setting, "environment": environment, "rows": rows}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
