"""Draw result files: ratios to the peers as bars, rooflines as points, memory as bars. ``benchmarks.page`` calls it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks.results import File, Group

Files = dict[tuple[str, str], File]
OURS = "gresbox"
COLOURS = {"forward": "#1f77b4", "backward": "#9ecae1", "forward+backward": "#ff7f0e"}
MARKERS = "os^D"  # one for each turn through the colours
METADATA = {"Software": None}  # the same picture from the same numbers


def draw_all(files: Files, folder: Path) -> list[Path]:
    """All plots of all devices; what has nothing to show is not drawn."""
    made = []
    for device in sorted({device for _, device in files}):
        groups = [
            (what, group, content["ceilings"])
            for (what, where), content in files.items()
            if where == device
            for group in content["groups"]
        ]
        for name, draw in (("ratios", _ratios), ("roofline", _roofline), ("memory", _memory)):
            figure = draw(groups, device)
            if figure is not None:
                path = folder / f"benchmarks_{name}--{device}.png"
                figure.savefig(path, dpi=110, metadata=METADATA, bbox_inches="tight")
                pyplot.close(figure)
                made.append(path)
    return made


def _ours(group: Group) -> dict[str, Any] | None:
    return next((row for row in group["rows"] if row["form"] == OURS), None)


def _ratios(groups: list[tuple[str, Group, dict[str, float]]], device: str) -> Any:
    """One bar per case, direction and peer, on a logarithmic axis; the interval as a line."""
    bars = []
    for what, group, _ in groups:
        row = _ours(group)
        if row is not None and group["direction"] != "backward":
            for peer, ratio in row["wall_ratios"].items():
                bars.append((f"{what}, {group['case']}, {group['dtype']}: {peer}", group["direction"], ratio))
    if not bars:
        return None
    figure, axes = pyplot.subplots(figsize=(9, 0.22 * len(bars) + 1))
    for place, (_, direction, ratio) in enumerate(bars):
        axes.barh(place, ratio["ratio"] - 1, left=1, color=COLOURS[direction], height=0.75)
        axes.plot([ratio["low"], ratio["high"]], [place, place], color="black", linewidth=0.8)
    _finish(axes, [label for label, _, _ in bars], f"peer's time over ours on {device}; right of 1 ours is faster")
    return figure


def _memory(groups: list[tuple[str, Group, dict[str, float]]], device: str) -> Any:
    """Our memory over the peer's."""
    bars = list(_memory_shares(groups))
    if not bars:
        return None
    figure, axes = pyplot.subplots(figsize=(9, 0.22 * len(bars) + 1))
    for place, (_, direction, share) in enumerate(bars):
        axes.barh(place, share - 1, left=1, color=COLOURS[direction], height=0.75)
    _finish(
        axes, [label for label, _, _ in bars], f"our memory over the peer's on {device}, cut off at 0.01; left of 1 ours is smaller"
    )
    axes.set_xlim(left=1e-2)  # next to nothing would make all others hard to tell apart
    return figure


def _memory_shares(groups: list[tuple[str, Group, dict[str, float]]]) -> Iterator[tuple[str, str, float]]:
    for what, group, _ in groups:
        row = _ours(group)
        held = None if row is None else row["working_bytes"]
        for peer in group["rows"] if held else ():
            most = peer["working_bytes"]
            if held and most and not peer["form"].startswith(OURS):
                label = f"{what}, {group['case']}, {group['dtype']}: {peer['form']}"
                yield label, group["direction"], held / most


def _finish(axes: Any, labels: list[str], title: str) -> None:
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(labels)), labels, fontsize=6)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_title(title, fontsize=9)
    axes.grid(axis="x", linewidth=0.3)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in ("forward", "forward+backward")]
    axes.legend(handles, ["forward", "forward+backward"], loc="lower right", fontsize=7)


def best_ceilings(measured: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of several runs on one device: what was reached once is a rate that the device has."""
    return {name: (min if name.endswith("seconds") else max)(found[name] for found in measured) for name in measured[0]}


def _roofline(groups: list[tuple[str, Group, dict[str, float]]], device: str) -> Any:
    """Work per byte against work per second, under the best ceilings that a run behind one of the points has measured."""
    points, measured = [], []
    for what, group, found in groups:
        row = _ours(group)
        if (
            row is not None
            and group["cost"]
            and group["cost"]["flops"]
            and group["cost"]["bytes"]
            and group["direction"] == "forward"
        ):
            seconds = (row["graph_ms"] or row["ms"]) / 1e3
            points.append((what, group["dtype"], group["cost"]["flops"] / group["cost"]["bytes"], group["cost"]["flops"] / seconds))
            measured.append(found)
    if not points:
        return None
    ceilings = best_ceilings(measured)
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    ends = {0.1, 1000.0, *(point[2] for point in points)}
    roofs = [(name, rate) for name, rate in ceilings.items() if name.startswith("matmul")]
    for (name, rate), dashes in zip(roofs, ("-", "--", ":"), strict=False):
        label, corner = name.removeprefix("matmul_").removesuffix("_flops"), rate / ceilings["copy_bytes"]
        reach = [min(ends), corner, max(*ends, corner)]
        roof = [min(rate, intensity * ceilings["copy_bytes"]) for intensity in reach]
        axes.plot(reach, roof, linewidth=0.9, color="0.3", linestyle=dashes, label=label)
    for turn, name in enumerate(dict.fromkeys(point[0] for point in points)):
        mine = [point[2:] for point in points if point[0] == name]
        look: dict[str, Any] = {"marker": MARKERS[turn // 10 % len(MARKERS)], "color": f"C{turn % 10}"}
        across, up = zip(*mine, strict=True)
        axes.scatter(across, up, s=18, label=name, **look)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("least work over least traffic, operations per byte", fontsize=8)
    axes.set_ylabel("operations per second", fontsize=8)
    axes.set_title(f"forward passes under the best ceilings of {device}", fontsize=9)
    axes.legend(fontsize=6)
    axes.grid(linewidth=0.3)
    return figure
