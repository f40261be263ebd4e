"""What the metrics share: one row of numbers per sample, summed at once or kept, and ratios that may be undefined."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from gresbox.metrics._inputs import Ids, integers
from gresbox.metrics._plot import draw_bars, draw_reached, figure_of, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["RecordMetric", "percent", "warn_undefined"]


def percent(part: Tensor, whole: Tensor) -> Tensor:
    """``100 * part / whole`` in float64; 0 / 0 is NaN."""
    return 100.0 * (part.double() / whole.double())


def warn_undefined(who: str, result: Mapping[str, Tensor], reason: str) -> None:
    """One warning that names every scalar that is NaN."""
    undefined = [name for name, value in result.items() if value.ndim == 0 and bool(value.isnan())]
    if undefined:
        text = f"{who}: {', '.join(undefined)} would divide by zero and are NaN, because {reason}."
        warnings.warn(text, UserWarning, stacklevel=3)


class RecordMetric(Metric):
    """A metric of records, one row of numbers per sample.

    Rows are added up at once, so the state is one vector, unless somebody reads them later: then they are kept, a few numbers per
    sample. Masks are never kept. A sample that is named by an id counts once, however often and in whatever process it comes; so
    the repeated samples with which a sampler fills up the last batch do no harm.

    Args:
        per_sample: Keep the rows and return them with the result.
        **kwargs: Of :class:`torchmetrics.Metric`.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    columns: ClassVar[tuple[str, ...]] = ()
    """What a row holds."""
    keeps_rows: ClassVar[bool] = False
    """Whether the metric is more than a function of the rows' sum."""
    vectors: ClassVar[frozenset[str]] = frozenset({"sample_id"})
    """Entries of a result that are not scalars."""
    marks: ClassVar[tuple[float, ...]] = ()
    """IoU thresholds that the benchmark reports."""

    sums: Tensor
    records: list[Tensor] | Tensor
    keys: list[Tensor] | Tensor

    def __init__(self, *, per_sample: bool = False, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.per_sample = per_sample
        self.add_state("sums", torch.zeros(len(self.columns), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("records", [], dist_reduce_fx="cat")
        self.add_state("keys", [], dist_reduce_fx="cat")  # (named, id, group) of each kept row
        self._keep_vectors()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._keep_vectors()

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the states of all processes, also where some have seen no sample."""
        if isinstance(self.records, list) and isinstance(self.keys, list) and not self.records:
            # of an empty list a process does not know the shape that the others send
            self.records.append(torch.empty(0, len(self.columns), dtype=torch.float64, device=self.sums.device))
            self.keys.append(torch.empty(0, 3, dtype=torch.int64, device=self.sums.device))
        super().sync(*args, **kwargs)

    def compute(self) -> dict[str, Tensor]:
        """The metrics of everything added so far, in percent; with ``per_sample`` also each sample's numbers."""
        records, keys = self._kept()
        sums = self.sums + records.sum(0)
        result = self._ratios(sums)
        if self.update_called:  # else torchmetrics warns
            warn_undefined(f"{type(self).__name__}.compute", result, self._why_undefined(sums))
        return {**result, **self._listed(records, keys)}

    def plot(
        self, val: dict[str, Tensor] | Sequence[dict[str, Tensor]] | None = None, ax: Axes | None = None
    ) -> tuple[Figure, Sequence[Axes]]:
        """Bars of the metrics; beside them, with per-sample results, the share of samples that reach each IoU.

        Args:
            val: A result of :meth:`compute` or several to compare; None: of everything added so far.
            ax: Where to draw the bars; None: a new figure.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        results = [self.compute()] if val is None else [val] if isinstance(val, dict) else list(val)
        iou = self._reached(results[-1])
        bars = sum(value.ndim == 0 for value in results[0].values())
        axes = [ax] if ax is not None else new_axes(type(self).__name__, 1 if iou is None else 2, 1.0 + 0.3 * bars * len(results))
        draw_bars(axes[0], results)
        if iou is not None and len(axes) > 1:
            draw_reached(axes[1], iou, self.marks)
        return figure_of(axes[0]), axes

    def _reached(self, result: Mapping[str, Tensor]) -> Tensor | None:
        """The IoU of each sample with a target, NaN elsewhere, where a result lists them."""
        return result.get("iou")

    def _add(self, who: str, records: Tensor, sample_ids: Ids | None, group: Tensor | None = None) -> None:
        """Take rows in; ``group`` is an integer that must not be rounded."""
        device, count = self.sums.device, len(records)
        if sample_ids is None and not (self.per_sample or self.keeps_rows):
            self.sums.add_(records.sum(0).to(device))
            return
        keys = torch.zeros(count, 3, dtype=torch.int64, device=device)
        if sample_ids is not None:
            keys[:, 0] = 1
            keys[:, 1] = integers(who, "sample_ids", sample_ids, count).to(device)
        if group is not None:
            keys[:, 2] = group.to(device)
        assert isinstance(self.records, list)
        assert isinstance(self.keys, list)
        self.records.append(records.to(device))
        self.keys.append(keys)

    def _kept(self) -> tuple[Tensor, Tensor]:
        """The kept rows, every named sample once, and their keys."""
        records = _joined(self.records, self.sums.new_empty(0, len(self.columns)))
        keys = _joined(self.keys, self.sums.new_empty(0, 3, dtype=torch.int64))
        named = keys[:, 0] == 1
        places = torch.arange(len(keys), device=keys.device)
        ids, inverse = torch.unique(keys[named, 1], return_inverse=True)
        first = torch.full((len(ids),), len(keys), device=keys.device).scatter_reduce(0, inverse, places[named], "amin")
        chosen = torch.cat([places[~named], first]).sort().values
        return records[chosen], keys[chosen]

    def _listed(self, records: Tensor, keys: Tensor) -> dict[str, Tensor]:
        if not self.per_sample:
            return {}
        named = {"sample_id": keys[:, 1]} if len(keys) and bool(keys[:, 0].all()) else {}
        return {**self._samples(records), **named}

    def _ratios(self, sums: Tensor) -> dict[str, Tensor]:
        """The metrics of the rows' sum."""
        raise NotImplementedError

    def _why_undefined(self, sums: Tensor) -> str:
        """What is missing where a metric is NaN."""
        raise NotImplementedError

    def _samples(self, records: Tensor) -> dict[str, Tensor]:
        """The part of the rows that a reader wants to see."""
        raise NotImplementedError

    def _keep_vectors(self) -> None:
        """Keep vectors of one element, those of a single sample: torchmetrics makes scalars of them."""
        compute = self.compute

        @functools.wraps(compute)
        def unsqueezed() -> dict[str, Tensor]:
            return {name: value.reshape(-1) if name in self.vectors else value for name, value in compute().items()}

        self.compute = unsqueezed  # type: ignore[method-assign]


def _joined(parts: list[Tensor] | Tensor, nothing: Tensor) -> Tensor:
    if isinstance(parts, Tensor):  # after processes were synchronised
        return parts
    return torch.cat(parts) if parts else nothing
