"""Pictures of what a model answers: mask overlays, grids of truth, prediction and instances with their words, loss curves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gresbox._checks import check_range, check_shape
from gresbox._files import write_atomically
from gresbox.structures import GresPrediction, GresSample, GresTarget

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

__all__ = ["COLOURS", "draw_prediction", "overlay", "plot_losses", "prediction_grid"]

COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))
"""Okabe and Ito's colours, which stay apart for colour-blind eyes; instances take them in turn."""

_TRUTH, _PREDICTION = (0, 158, 115), (213, 94, 0)
_FORMATS = (".png", ".jpg", ".jpeg", ".webp")
_PANEL, _WORDS = 2.0, 2.9  # inches


def overlay(
    image: Tensor | Image,
    masks: Tensor,
    *,
    colours: Iterable[tuple[int, int, int]] = COLOURS,
    opacity: float = 0.5,
    outline: bool = True,
) -> Tensor:
    """Paint masks over a picture, each in its own colour.

    Args:
        image: The picture, as a tensor or a PIL image.
        masks: One mask or several; later ones lie on top.
        colours: RGB of each mask, used in turn.
        opacity: Share of the colour in a painted pixel.
        outline: Draw each mask's border in the full colour.

    Shape:
        - ``image``: ``(3, H, W)`` uint8; ``masks``: ``(H, W)`` or ``(K, H, W)`` bool; returns ``(3, H, W)`` uint8 on the CPU.

    Raises:
        TypeError: If the picture is not uint8 or a mask not bool.
        ValueError: If the sizes disagree.

    Example:
        >>> import torch
        >>> picture = torch.zeros(3, 4, 4, dtype=torch.uint8)
        >>> mask = torch.zeros(4, 4, dtype=torch.bool)
        >>> mask[1, 1] = True
        >>> overlay(picture, mask, colours=[(200, 100, 0)], opacity=0.5, outline=False)[:, 1, 1]
        tensor([100,  50,   0], dtype=torch.uint8)
    """
    picture = _picture("overlay", image)
    masks = masks[None] if isinstance(masks, Tensor) and masks.ndim == 2 else masks
    check_shape("overlay", image=(picture, "3 H W"), masks=(masks, "K H W"))
    check_range("overlay", "opacity", opacity, 0, 1)
    if masks.dtype != torch.bool:
        raise TypeError(f"overlay: `masks` must be bool, got {masks.dtype}.")
    canvas = picture.float()
    width = max(1, round(min(picture.shape[1:]) / 200))
    for mask, colour in zip(masks.cpu(), cycle(colours), strict=False):
        paint = torch.tensor(colour, dtype=torch.float32)[:, None, None]
        canvas = torch.where(mask, (1 - opacity) * canvas + opacity * paint, canvas)
        if outline:
            canvas = torch.where(_border(mask, width), paint, canvas)
    return canvas.round().to(torch.uint8)


def draw_prediction(
    image: Tensor | Image,
    prediction: GresPrediction,
    target: GresTarget | None = None,
    *,
    path: str | Path | None = None,
    max_instances: int = 8,
) -> Image:
    """One answer as a picture: the image, the truth if known, the merged mask, and the instances with the words they answered to.

    A model with prior points has them drawn, each with the box that was predicted from it.

    Args:
        image: The picture that was asked about.
        prediction: The answer, at the picture's size.
        target: The truth, at the picture's size.
        path: Also save it there; the ending names the format.
        max_instances: Draw that many instances at most, the most relevant ones.

    Shape:
        - ``image``: ``(3, H, W)`` uint8 or a PIL image.

    Raises:
        ValueError: If the sizes disagree or ``path`` has an unknown ending.
        ImportError: If matplotlib is not installed.

    Example:
        >>> import torch
        >>> mask = torch.zeros(8, 8, dtype=torch.bool)
        >>> answer = GresPrediction("a dog", mask, 0.9, torch.zeros(0), mask[None][:0], torch.zeros(0, 4))
        >>> draw_prediction(torch.zeros(3, 8, 8, dtype=torch.uint8), answer).mode
        'RGB'
    """
    figure = _new_figure("draw_prediction", (3 + (target is not None)) * _PANEL + _WORDS, _PANEL + 0.7)
    _draw_row("draw_prediction", figure, _picture("draw_prediction", image), prediction, target, max_instances, titles=True)
    return _finish("draw_prediction", figure, path)


def prediction_grid(
    samples: Sequence[GresSample],
    predictions: Sequence[GresPrediction],
    path: str | Path | None = None,
    *,
    max_instances: int = 8,
) -> Image:
    """Several answers under one another: image, truth, prediction, and instances in colours with their words.

    Args:
        samples: Pictures with their truth.
        predictions: The answer to each.
        path: Also save it there; the ending names the format.
        max_instances: Draw that many instances at most per answer.

    Raises:
        ValueError: If there is nothing to draw, the lengths or sizes disagree, or ``path`` has an unknown ending.
        ImportError: If matplotlib is not installed.

    Example:
        >>> import torch
        >>> mask = torch.zeros(8, 8, dtype=torch.bool)
        >>> sample = GresSample(torch.zeros(3, 8, 8, dtype=torch.uint8), "a dog", GresTarget(mask[None][:0]))
        >>> answer = GresPrediction("a dog", mask, 0.9, torch.zeros(0), mask[None][:0], torch.zeros(0, 4))
        >>> picture = prediction_grid([sample, sample], [answer, answer])
        >>> picture.height > draw_prediction(sample.image, answer, sample.target).height
        True
    """
    who = "prediction_grid"
    if len(samples) != len(predictions):
        raise ValueError(f"{who}: `predictions` must be as many as `samples`, {len(samples)}, got {len(predictions)}.")
    if not samples:
        raise ValueError(f"{who}: `samples` must hold at least one sample, got none.")
    figure = _new_figure(who, 4 * _PANEL + _WORDS, len(samples) * (_PANEL + 0.45) + 0.25)
    rows = figure.subfigures(len(samples), 1, squeeze=False)[:, 0]
    for index, (row, sample, prediction) in enumerate(zip(rows, samples, predictions, strict=True)):
        _draw_row(who, row, _picture(who, sample.image), prediction, sample.target, max_instances, titles=index == 0)
    return _finish(who, figure, path)


def plot_losses(history: Sequence[Mapping[str, Any]], path: str | Path | None = None) -> Image:
    """Loss terms over optimiser steps, raw and smoothed; evaluations, where there are any, in a second panel.

    Args:
        history: Entries with ``step`` and numbers. An entry whose ``kind`` is ``"evaluation"`` holds metrics in percent; of the
            others the numbers with ``loss`` in their name are drawn.
        path: Also save it there; the ending names the format.

    Raises:
        ValueError: If no entry holds a loss, or ``path`` has an unknown ending.
        ImportError: If matplotlib is not installed.

    Example:
        >>> plot_losses([{"step": 0, "loss": 2.0}, {"step": 1, "loss": 1.0}]).mode
        'RGB'
    """
    training = [entry for entry in history if entry.get("kind") != "evaluation"]
    losses = _series(training, lambda name: "loss" in name)
    if not losses:
        raise ValueError("plot_losses: `history` must hold entries with a step and a loss, got none.")
    scores = _series([entry for entry in history if entry.get("kind") == "evaluation"], lambda name: "loss" not in name)
    figure = _new_figure("plot_losses", 11.0 if scores else 6.0, 4.0)
    axes = figure.subplots(1, 2 if scores else 1, squeeze=False)[0]
    for (colour, dashes), (name, (steps, values)) in zip(_cycle(len(losses)), losses.items(), strict=True):
        smooth = _running_mean(values, max(1, len(values) // 25))
        axes[0].plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        axes[0].plot(steps, smooth, color=colour, linestyle=dashes, linewidth=2.2 if name == "loss" else 1.4, label=name)
    positive = [value for _, values in losses.values() for value in values]
    if min(positive) > 0 and max(positive) > 10 * min(positive):
        axes[0].set_yscale("log")
    _label_axes(axes[0], "loss")
    if scores:
        for (colour, dashes), (name, (steps, values)) in zip(_cycle(len(scores)), scores.items(), strict=True):
            axes[1].plot(steps, values, color=colour, linestyle=dashes, marker="o", markersize=3, label=name)
        axes[1].set_ylim(-2, 102)
        _label_axes(axes[1], "percent")
    return _finish("plot_losses", figure, path)


def _picture(who: str, image: Tensor | Image) -> Tensor:
    """The picture as ``(3, H, W)`` uint8 on the CPU."""
    if not isinstance(image, Tensor):
        from torchvision.transforms.functional import pil_to_tensor

        return pil_to_tensor(image.convert("RGB"))
    check_shape(who, image=(image, "3 H W"))
    if image.dtype != torch.uint8:
        raise TypeError(f"{who}: `image` must be uint8, got {image.dtype}.")
    return image.detach().cpu()


def _pale(image: Tensor) -> Tensor:
    """The picture nearly in grey and brightened, so that the colours of masks are not taken for the picture's own."""
    grey = (image.float() * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)
    return (0.5 * (0.75 * grey + 0.25 * image.float()) + 0.5 * 210).to(torch.uint8)


def _border(mask: Tensor, width: int) -> Tensor:
    """Pixels of a mask within ``width`` of its outside; the picture's edge is not outside."""
    outside = (~mask).float()[None, None]
    return mask & (F.max_pool2d(outside, 2 * width + 1, stride=1, padding=width)[0, 0] > 0)


def _new_figure(who: str, width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{who}: `matplotlib` is not installed; install it with pip install 'gresbox[viz]'.") from error
    return Figure(figsize=(width, height), dpi=110, layout="constrained")  # no pyplot: no global state, no window system


def _draw_row(
    who: str,
    figure: Any,
    image: Tensor,
    prediction: GresPrediction,
    target: GresTarget | None,
    max_instances: int,
    *,
    titles: bool,
) -> None:
    """Image, truth, prediction, instances and the instances' words, side by side."""
    check_shape(who, image=(image, "3 H W"), mask=(prediction.mask, "H W"), instance_masks=(prediction.instance_masks, "K H W"))
    panels, pale = [("image", image)], _pale(image)
    if target is not None:
        panels.append(("truth", overlay(pale, _merged(target), colours=[_TRUTH], opacity=0.65)))
    panels.append(("prediction", overlay(pale, prediction.mask, colours=[_PREDICTION], opacity=0.65)))
    panels.append(("instances", overlay(pale, prediction.instance_masks[:max_instances], opacity=0.65)))
    axes = figure.subplots(1, len(panels) + 1, squeeze=False, gridspec_kw={"width_ratios": [1] * len(panels) + [_WORDS / _PANEL]})[
        0
    ]
    for ax, (title, picture) in zip(axes, panels, strict=False):
        ax.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
        ax.set_xticks([])
        ax.set_yticks([])
        if titles:
            ax.set_title(title, fontsize=8, color="0.35", loc="left")
    _draw_places(axes[len(panels) - 1], prediction, max_instances)
    axes[len(panels) - 2].set_xlabel(_verdict(prediction, target), fontsize=8)
    if target is not None and not bool(_merged(target).any()):
        axes[1].set_xlabel("nothing", fontsize=8)
    _draw_words(axes[-1], prediction, max_instances)
    figure.suptitle(_shorten(prediction.text, 90), fontsize=10, x=0.01, ha="left", parse_math=False)


def _draw_places(ax: Axes, prediction: GresPrediction, max_instances: int) -> None:
    """Each instance's point and predicted box; without points the boxes are those of the masks, which one sees anyway."""
    from matplotlib.patches import Rectangle

    if prediction.points is None:
        return
    ax.autoscale(False)
    places = zip(prediction.points[:max_instances].tolist(), prediction.boxes_xyxy.tolist(), cycle(COLOURS), strict=False)
    for (x, y), (x0, y0, x1, y1), colour in places:
        paint = tuple(part / 255 for part in colour)
        # a pixel's centre is a whole number in a plot, its corner in a box
        ax.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor=paint, linewidth=1.6))
        ax.plot(x - 0.5, y - 0.5, marker="o", markersize=4.5, color=paint, markeredgecolor="black", markeredgewidth=0.8)


def _merged(target: GresTarget) -> Tensor:
    return target.masks.any(0) if target.merged is None else target.merged


def _verdict(prediction: GresPrediction, target: GresTarget | None) -> str:
    """What the answer says in numbers: probability of "nothing", and the overlap with the truth."""
    parts = [] if prediction.no_target_prob is None else [f"p(nothing) {prediction.no_target_prob:.2f}"]
    if target is not None:
        truth, mask = _merged(target).cpu(), prediction.mask.cpu()
        union = int((truth | mask).sum())
        parts.append(f"IoU {int((truth & mask).sum()) / union:.2f}" if union else "both empty")
    return " · ".join(parts)


def _draw_words(ax: Axes, prediction: GresPrediction, max_instances: int, words: int = 3) -> None:
    """A line per instance in its colour: relevance, and the words with the largest weights."""
    ax.set_axis_off()
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1)
    scores = prediction.scores[:max_instances].tolist()
    for index, (score, colour) in enumerate(zip(scores, cycle(COLOURS), strict=False)):
        top = 0.94 - index * 0.92 / max(len(scores), 6)
        said = prediction.phrases[index] if prediction.phrases is not None else []
        best = sorted(said, key=lambda pair: -pair[1])[:words]
        line = "  ".join(f"{_shorten(word, 11)} {weight:.2f}" for word, weight in best)
        ax.plot([0.02], [top], marker="s", markersize=7, color=tuple(part / 255 for part in colour), clip_on=False)
        ax.text(0.08, top, f"{score:.2f}  {line}", fontsize=7, va="center", parse_math=False).set_in_layout(False)
    if not scores:
        ax.text(0.02, 0.9, "no instance", fontsize=7, color="0.4", va="center")


def _shorten(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def _series(entries: Sequence[Mapping[str, Any]], wanted: Any) -> dict[str, tuple[list[float], list[float]]]:
    """Name -> (steps, values) of the wanted finite numbers, in order of steps."""
    series: dict[str, tuple[list[float], list[float]]] = {}
    for entry in sorted((entry for entry in entries if "step" in entry), key=lambda entry: float(entry["step"])):
        for name, value in entry.items():
            number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
            if name != "step" and number and wanted(name):
                steps, values = series.setdefault(name, ([], []))
                steps.append(float(entry["step"]))
                values.append(float(value))
    return series


def _running_mean(values: list[float], window: int) -> list[float]:
    """Mean of the last ``window`` values, of fewer at the start."""
    return [sum(values[max(0, end - window) : end]) / min(end, window) for end in range(1, len(values) + 1)]


def _cycle(count: int) -> list[tuple[tuple[float, ...], str]]:
    """Colours and line styles; a colour that comes again is dashed."""
    looks = [(colour, dashes) for dashes in ("-", "--", ":") for colour in COLOURS[4:] + COLOURS[:4]]
    return [(tuple(part / 255 for part in colour), dashes) for colour, dashes in islice(cycle(looks), count)]


def _label_axes(ax: Axes, ylabel: str) -> None:
    ax.set_xlabel("optimiser steps")
    ax.set_ylabel(ylabel)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7, ncols=4, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)


def _finish(who: str, figure: Figure, path: str | Path | None) -> Image:
    """Render, and save under a temporary name first, so that a reader never sees half a picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    path = None if path is None else Path(path)
    if path is not None and path.suffix.lower() not in _FORMATS:
        raise ValueError(f"{who}: `path` must end in one of {', '.join(_FORMATS)}, got {path.name!r}.")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.frombuffer("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba()), "raw", "RGBA", 0, 1).convert("RGB")
    if path is not None:
        write_atomically(path, picture.save)
    return picture
