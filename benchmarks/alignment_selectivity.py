"""What the projections of alignment-aware masking preserve, and what its scale, threshold and unit of choice select.

``python -m benchmarks.alignment_selectivity`` draws random features, no model, and writes numbers and one picture:

- what is left of a cosine after projection, by one shared matrix and by two independent ones;
- the share of weak patches over the scale, by number of words (those of one text have cosine 0.5: contextual features are alike);
- the share of a 448 px picture that is hidden over the share that is weak, chosen by block and by pixel, for smooth 14 x 14 maps.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gresbox.ops import filter_blocks, match_patches, random_projections

RESULT = Path(__file__).parent / "results" / "alignment_selectivity.json"
PICTURE = Path(__file__).parents[1] / "docs" / "_static" / "aml_selectivity.png"
LENGTHS = (3, 6, 10, 20)
BLUE, ORANGE, GREEN, RED = "#0072b2", "#d55e00", "#009e73", "#cc79a7"


def pairs_by_cosine(count: int, dim: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Unit vectors whose cosines run evenly from -1 to 1."""
    left = F.normalize(torch.randn(count, dim, generator=generator), dim=-1)
    other = torch.randn(count, dim, generator=generator)
    other = F.normalize(other - (other * left).sum(-1, keepdim=True) * left, dim=-1)
    cosine = torch.linspace(-1, 1, count)[:, None]
    return left, cosine * left + (1 - cosine.square()).sqrt() * other


def preserved(dim: int, align_dim: int, draws: int, generator: torch.Generator) -> dict[str, Any]:
    left, right = pairs_by_cosine(201, dim, generator)
    true, kept = (left * right).sum(-1), {}
    for name, shared in (("shared", True), ("independent", False)):
        products = []
        for seed in range(draws):
            visual, text = random_projections(dim, dim, align_dim, shared=shared, seed=seed)
            products.append(((left @ visual) * (right @ text)).sum(-1))
        stacked = torch.stack(products)  # (draws, pairs)
        slope = (stacked * true).sum() / (draws * true.square().sum())
        kept[name] = {
            "slope": round(slope.item(), 3),
            "deviation": round((stacked - slope * true).std().item(), 4),
            "one_draw": [round(value, 4) for value in stacked[0].tolist()],
        }
    return {"dim": dim, "align_dim": align_dim, "draws": draws, "cosine": [round(value, 4) for value in true.tolist()], **kept}


def weak_shares(align_dim: int, scales: list[float], threshold: float, generator: torch.Generator) -> dict[int, list[float]]:
    """Number of words -> share of patches below the threshold at each scale."""
    left, right = random_projections(1024, 768, align_dim)
    matrix, shares = right @ left.mT, {}
    for length in LENGTHS:
        visual = torch.randn(24, 196, 1024, generator=generator)
        tokens = torch.randn(24, 1, 768, generator=generator) + torch.randn(24, length, 768, generator=generator)
        shares[length] = [
            round((match_patches(visual, tokens, None, None, matrix, scale=scale) < threshold).float().mean().item(), 4)
            for scale in scales
        ]
    return shares


def hidden_shares(drop: float, generator: torch.Generator) -> dict[str, list[tuple[float, float]]]:
    """Unit of choice -> (weak share of the pixels, hidden share) of smooth maps at several levels."""
    smooth = F.avg_pool2d(torch.randn(24, 1, 18, 18, generator=generator), 5, 1)[:, 0]  # (24, 14, 14)
    smooth = (smooth - smooth.mean()) / smooth.std()
    curves: dict[str, list[tuple[float, float]]] = {"block": [], "pixel": []}
    for level in (-2.2, -1.8, -1.4, -1.0, -0.6, -0.2, 0.2, 0.6, 1.0, 1.4, 2.0, 4.0):
        similarity = ((smooth - level) * 0.05 + 0.4).clamp(0, 1)
        pixels = F.interpolate(similarity[:, None], size=(448, 448), mode="bilinear", align_corners=False)
        weak = (pixels < 0.4).float().mean().item()
        for unit, points in curves.items():
            removed = filter_blocks(similarity, (448, 448), drop=drop, unit=unit, generator=generator)
            points.append((round(weak, 4), round(removed.float().mean().item(), 4)))
    return curves


def draw(report: dict[str, Any], path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit("alignment_selectivity: pictures need matplotlib; pip install 'gresbox[viz]'.") from error
    figure = Figure(figsize=(12.5, 3.9), dpi=110, layout="constrained")
    first, second, third = figure.subplots(1, 3)
    kept = report["preserved"]
    for name, colour in (("shared", BLUE), ("independent", ORANGE)):
        first.plot(
            kept["cosine"], kept[name]["one_draw"], ".", color=colour, markersize=4, label=f"{name}: slope {kept[name]['slope']}"
        )
    first.plot([-1, 1], [-1, 1], color="0.6", linewidth=0.8)
    first.set_xlabel("cosine of the features")
    first.set_ylabel(f"product after projection to D = {kept['align_dim']}")
    first.set_title("one matrix preserves, two do not", fontsize=10)
    root = math.sqrt(report["align_dim"])
    for (length, shares), colour in zip(report["weak"].items(), (GREEN, BLUE, RED, ORANGE), strict=True):
        second.plot([scale / root for scale in report["scales"]], shares, color=colour, label=f"{length} words")
    for scale, name in ((1.0, "as printed"), (2 * root, "default")):
        second.axvline(scale / root, color="0.5", linestyle=":", linewidth=1)
        second.text(
            scale / root, 0.5, f" {name}", fontsize=8, rotation=90, ha="right", va="center", color="0.35", backgroundcolor="white"
        )
    second.set_xscale("log")
    second.set_xlabel("scale over the root of D")
    second.set_ylabel(f"patches below {report['threshold']}")
    second.set_title("the scale decides what is weak", fontsize=10)
    for (unit, points), colour in zip(report["hidden"].items(), (BLUE, ORANGE), strict=True):
        third.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3, label=f"drawn among {unit}s")
    third.plot([0, 1], [0, report["drop"]], color="0.6", linewidth=0.8)
    third.set_xlabel("weak share of the pixels")
    third.set_ylabel(f"hidden share at drop = {report['drop']}")
    third.set_title("drawn among pixels, the share retains nothing", fontsize=10)
    for ax in (first, second, third):
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--align-dim", type=int, default=2048, help="channels D of the common space (default: 2048)")
    parser.add_argument("--threshold", type=float, default=0.4, help="similarity below which a patch is weak (default: 0.4)")
    parser.add_argument("--drop", type=float, default=0.25, help="share of what is weak that is hidden (default: 0.25)")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write (default: under results)")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="picture to write (default: in the documentation)")
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    root = math.sqrt(options.align_dim)
    scales = sorted([1.0, root, 2 * root, 100.0, *(root * 10 ** (step / 10) for step in range(-20, 17))])
    report = {
        "what": "alignment_selectivity",
        "align_dim": options.align_dim,
        "threshold": options.threshold,
        "drop": options.drop,
        "preserved": preserved(768, options.align_dim, 8, generator),
        "scales": [round(scale, 4) for scale in scales],
        "weak": weak_shares(options.align_dim, scales, options.threshold, generator),
        "hidden": hidden_shares(options.drop, generator),
    }
    for name in ("shared", "independent"):
        row = report["preserved"][name]
        print(f"{name}: slope {row['slope']}, deviation {row['deviation']} (1 / root of D = {1 / root:.4f})")
    for scale in (1.0, root, 2 * root, 100.0):
        place = scales.index(scale)
        print(f"scale {scale:6.1f}: weak", {length: shares[place] for length, shares in report["weak"].items()})
    for unit, points in report["hidden"].items():
        print(unit, points)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report) + "\n")
    draw(report, options.picture)


if __name__ == "__main__":
    main()
