"""R-RefCOCO, R-RefCOCO+ and R-RefCOCOg as released: RefCOCO with sentences that are not true of the picture."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

from gresbox._checks import check_choice
from gresbox.data.catalogue import BENCHMARKS
from gresbox.data.folders import find_dataset
from gresbox.data.referring import ReferringDataset
from gresbox.structures import GresSample

__all__ = ["RRefCOCO"]

_NAMES = ("refcoco", "refcoco+", "refcocog", "rrefcoco", "rrefcoco+", "rrefcocog")


class RRefCOCO(ReferringDataset):
    """R-RefCOCO, R-RefCOCO+ or R-RefCOCOg from their released files.

    Reads ``rNAME/refs(unc).p``, restricted to plain containers, and ``rNAME/instances.json``. A sentence with ``exist`` False is a
    sample of kind ``"zero"`` without a target; ``exists`` is False then. The metrics average over references, not sentences:
    ``ref_id`` is the group of :class:`gresbox.metrics.RRefCOCOMetric`.

    Paper: Wu et al., "Towards Robust Referring Image Segmentation", arXiv:2209.09554.
    Differs from the released loader: one sample per sentence instead of one per reference; a mask is the union of its polygons;
    run-length encodings are read, too.

    Args:
        root: Folder that holds the benchmark's folder and the pictures, or the benchmark's folder itself.
        name: ``"refcoco"``, ``"refcoco+"`` or ``"refcocog"``, with or without the leading r of the folder's name.
        split: ``"train"`` or ``"val"``; the benchmark is evaluated on ``"val"``.
        split_by: Which partition into splits; default: unc, and umd for R-RefCOCOg where only that is there.
        transform: Applied to every sample.
        sentence: Which form of a sentence is the text: ``"raw"`` or the cleaned ``"sent"``.
        images: Where the pictures are. True: below ``root``; a folder: there, or in COCO's folders in it. False: they are not
            read, only :meth:`target`, :meth:`text` and :meth:`info` are needed.
        size: Side of the square that picture and truth are brought to: the benchmark's way of scoring, with 480, where the ready
            mask is resized to the nearest pixel. None: the picture's own size.
        exclude_images: Ids of pictures to leave out, against leakage; see :func:`gresbox.data.held_out_images`.

    Shape:
        - ``[i].image``: ``(3, H, W)`` uint8 at the picture's own size; ``[i].target.masks``: ``(M, H, W)`` bool, M is 0 or 1.

    Raises:
        FileNotFoundError: If the files are not there; the message shows the expected layout. If pictures are missing, it names one.
        ValueError: If there is no such set or split, or a file is not of the released form.

    Example:
        >>> RRefCOCO("nowhere", "rrefcocog", "val")
        Traceback (most recent call last):
        ...
        FileNotFoundError: RRefCOCO: `root` must hold the R-RefCOCOg dataset, got nowhere.
        ...
    """

    _who = "RRefCOCO"

    def __init__(
        self,
        root: str | os.PathLike[str],
        name: str = "refcoco",
        split: str = "val",
        split_by: str | None = None,
        *,
        transform: Callable[[GresSample], Any] | None = None,
        sentence: str = "raw",
        images: bool | str | os.PathLike[str] = True,
        size: int | None = None,
        exclude_images: Iterable[int] = (),
    ) -> None:
        check_choice(self._who, "name", name, _NAMES)
        self.name = name if name.startswith("rr") else f"r{name}"
        benchmark = BENCHMARKS[self.name]
        super().__init__(
            benchmark,
            find_dataset(self._who, benchmark, root, split_by),
            split,
            transform=transform,
            sentence=sentence,
            images=images,
            size=size,
            exclude_images=exclude_images,
        )
