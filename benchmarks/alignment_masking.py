"""Alignment-aware masking: the block of the library, or patches and a loop over the samples.

``python -m benchmarks.alignment_masking`` times what stage 1 adds after the encoders - match, choice of blocks, masked picture -
and the same by ``benchmarks/peers``, on the same features and the same noise, and counts the values in which the pictures differ.
``hide`` is the second half alone, from the similarity on; "by pixel" draws among pixels, as the paper and its code do, "by block"
among blocks, the library's default. Both ways run in turn, in an order that alternates; the share is the median over rounds of the
two times of the same round, so that a slow moment of the machine hits both.
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
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.alignment_masking import hide_by_patches, match_by_projecting_both
from gresbox.blocks import AlignmentAwareMasking
from gresbox.ops import filter_blocks, random_projections

RESULT = Path(__file__).parent / "results" / "alignment_masking--cpu.json"


def seconds(call: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(name: str, batch: int, ours: Callable[[], Tensor], peer: Callable[[], Tensor], rounds: int) -> dict[str, object]:
    first, second = ours(), peer()  # also the warm-up
    times: dict[str, list[float]] = {"ours": [], "peer": []}
    for index in range(rounds):
        for way, call in [("ours", ours), ("peer", peer)][:: 1 if index % 2 else -1]:
            times[way].append(seconds(call))
    shares = [a / b for a, b in zip(times["ours"], times["peer"], strict=True)]
    return {
        "what": name,
        "batch": batch,
        "share_of_time": round(statistics.median(shares), 3),
        "share_min": round(min(shares), 3),
        "share_max": round(max(shares), 3),
        "ours_ms": round(1e3 * statistics.median(times["ours"]), 2),
        "loop_ms": round(1e3 * statistics.median(times["peer"]), 2),
        "different_values": int((first != second).sum()),
        "hidden": round((first == 0).all(1).float().mean().item(), 3),
    }


@torch.no_grad()
def measure(batch: int, options: argparse.Namespace) -> list[dict[str, object]]:
    generator = torch.Generator().manual_seed(0)
    size, grid, blocks = options.image_size, options.image_size // 32, options.image_size // options.block
    images = torch.randn(batch, 3, size, size, generator=generator)
    visual = torch.randn(batch, options.visual_dim, grid, grid, generator=generator)
    tokens = torch.randn(batch, options.tokens, options.text_dim, generator=generator)
    valid = (torch.arange(options.tokens) < torch.randint(4, options.tokens + 1, (batch, 1), generator=generator)).long()
    noises = {
        "block": torch.rand(batch, blocks, blocks, generator=generator),
        "pixel": torch.rand(batch, size, size, generator=generator),
    }
    left, right = random_projections(options.visual_dim, options.text_dim, options.align_dim)
    rows = []
    for unit, noise in noises.items():
        dims = options.visual_dim, options.text_dim
        masking = AlignmentAwareMasking(*dims, align_dim=options.align_dim, block=options.block, unit=unit, mode="exact")
        similarity = masking(images, visual, tokens, valid, noise=noise)[2]
        drawn, choice = noise.flatten(1) if unit == "block" else noise, {"block": options.block, "unit": unit}

        def ours(masking: AlignmentAwareMasking = masking, noise: Tensor = noise) -> Tensor:
            return masking(images, visual, tokens, valid, noise=noise)[0]

        def peer(scale: float = masking.scale, drawn: Tensor = drawn, choice: Any = choice) -> Tensor:
            matched = match_by_projecting_both(visual, tokens, valid, left, right, scale)
            return hide_by_patches(images, matched, drawn, **choice)

        def hide(similarity: Tensor = similarity, noise: Tensor = noise, choice: Any = choice) -> Tensor:
            removed = filter_blocks(similarity, (size, size), mode="exact", noise=noise, **choice)
            return torch.where(removed[:, None], 0.0, images)

        def hide_peer(similarity: Tensor = similarity, drawn: Tensor = drawn, choice: Any = choice) -> Tensor:
            return hide_by_patches(images, similarity, drawn, **choice)

        rows.append(compare(f"match and hide by {unit}", batch, ours, peer, options.rounds))
        rows.append(compare(f"hide by {unit}", batch, hide, hide_peer, options.rounds))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="images per step (default: 1 8)")
    parser.add_argument("--image-size", type=int, default=448, help="side in pixels, a multiple of 32 and the block (default: 448)")
    parser.add_argument("--block", type=int, default=32, help="side of a block in pixels (default: 32)")
    parser.add_argument("--tokens", type=int, default=20, help="tokens L, padding included (default: 20)")
    parser.add_argument("--visual-dim", type=int, default=1024, help="channels of the features (default: 1024)")
    parser.add_argument("--text-dim", type=int, default=768, help="channels of the tokens (default: 768)")
    parser.add_argument("--align-dim", type=int, default=2048, help="channels D of the common space (default: 2048)")
    parser.add_argument("--rounds", type=int, default=30, help="timed rounds (default: 30)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write (default: beside this program)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [row for batch in options.batch for row in measure(batch, options)]
    for row in rows:
        print(
            f"{row['what']}, B={row['batch']}: {row['loop_ms']} ms -> {row['ours_ms']} ms, {row['share_of_time']} of the time "
            f"({row['share_min']} to {row['share_max']}), {row['different_values']} values differ, {row['hidden']} hidden"
        )
    names = ("image_size", "block", "tokens", "visual_dim", "text_dim", "align_dim", "rounds")
    environment = {
        "device": "cpu",
        "threads": options.threads,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }
    setting = {name: getattr(options, name) for name in names}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"what": "alignment_masking", "setting": setting, "environment": environment, "rows": rows}
    options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
