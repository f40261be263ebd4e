"""Pictures of results: bars of percentages, and how many samples reach which IoU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_bars", "draw_curves", "draw_reached", "figure_of", "new_axes"]

_BLUE, _ORANGE = (0.0, 114 / 255, 178 / 255), (213 / 255, 94 / 255, 0.0)
_COLOURS = (_BLUE, _ORANGE, (0.0, 158 / 255, 115 / 255), (204 / 255, 121 / 255, 167 / 255), (230 / 255, 159 / 255, 0.0))


def new_axes(who: str, panels: int, height: float) -> list[Axes]:
    """Empty panels side by side in a figure of their own.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{who}: `matplotlib` is not installed; install it with pip install 'gresbox[viz]'.") from error
    figure = Figure(figsize=(5.0 * panels, height), dpi=110, layout="constrained")  # no pyplot: no global state, no window system
    return list(figure.subplots(1, panels, squeeze=False)[0])


def draw_bars(ax: Axes, results: Sequence[Mapping[str, Tensor]]) -> None:
    """One group of horizontal bars per scalar, in percent; several results stand below each other in a group."""
    names = [name for name, value in results[0].items() if value.ndim == 0]
    thick = 0.8 / len(results)
    for index, result in enumerate(results):
        places = [row + thick * (index - (len(results) - 1) / 2) for row in range(len(names))]
        values = [float(result[name]) for name in names]
        finite = [0.0 if value != value else value for value in values]
        ax.barh(places, finite, height=0.9 * thick, color=_BLUE, alpha=1.0 - 0.6 * index / len(results))
        for place, value in zip(places, values, strict=True):
            text = "undefined" if value != value else f"{value:.1f}"
            ax.text(min(102.0, (0.0 if value != value else value) + 1.5), place, text, va="center", fontsize=8)
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set_xlim(0, 112)
    ax.set_xlabel("percent")
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def draw_reached(ax: Axes, iou: Tensor, marks: Sequence[float]) -> None:
    """Share of samples with at least each IoU: Pr@X as a curve; ``marks`` are the thresholds that the benchmark reports."""
    iou = iou[~iou.isnan()].double().cpu().sort().values
    levels = torch.arange(101, dtype=torch.float64) / 100
    below = torch.searchsorted(iou, levels)  # strictly smaller, as Pr counts an IoU that equals its threshold
    share = 100.0 * (len(iou) - below).double() / max(len(iou), 1)
    ax.plot(levels.tolist(), share.tolist(), color=_BLUE)
    for mark in marks:
        ax.plot([mark], [float(share[round(100 * mark)])], marker="o", color=_ORANGE)
    ax.set_xlabel(f"IoU reached ({len(iou)} samples with a target)")
    ax.set_ylabel("percent of them")
    ax.set_ylim(0, 102)
    ax.set_xlim(0, 1)
    ax.grid(alpha=0.3)


def draw_curves(ax: Axes, results: Sequence[Mapping[str, Tensor]], names: Sequence[str], title: str) -> None:
    """Metrics over the threshold, one colour per metric; later results are paler."""
    for index, result in enumerate(results):
        levels, alpha = result["threshold"].tolist(), 1.0 - 0.6 * index / len(results)
        for colour, name in zip(_COLOURS, names, strict=False):
            ax.plot(levels, result[name].tolist(), color=colour, alpha=alpha, label=name if index == 0 else None)
    ax.set_title(title, fontsize=9)
    ax.set_xlabel('answered with "nothing" above this no-target score')
    ax.set_ylabel("percent")
    ax.set_ylim(-2, 102)
    ax.set_xlim(0, 1)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8, ncols=len(names), loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)


def figure_of(axes: Axes) -> Figure:
    """The figure that holds a panel."""
    figure = axes.get_figure()
    assert figure is not None
    return figure  # type: ignore[return-value]
