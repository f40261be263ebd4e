"""Ref-ZOM as released: expressions of zero, one or many things, on pictures of both of COCO's halves."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

from gresbox.data.catalogue import BENCHMARKS
from gresbox.data.folders import find_dataset
from gresbox.data.referring import ReferringDataset
from gresbox.structures import GresSample

__all__ = ["RefZOM"]


class RefZOM(ReferringDataset):
    """The Ref-ZOM benchmark from its released files.

    Reads ``ref-zom/refs(final).p`` (released as ``Ref-ZOM(final).p``, restricted to plain containers) and
    ``ref-zom/instances.json``. The pictures come from COCO's train2014 and val2014; both folders are looked into, and
    ``trainval2014``, which the released code wants them merged in. ``kind`` is the reference's ``source``: a ``"zero"`` has no
    target whatever its ``ann_id`` says.

    Paper: Hu et al., "Beyond One-to-One: Rethinking the Referring Image Segmentation", arXiv:2308.13853.
    Differs from the released loader: the annotations of a ``"zero"`` need not exist; run-length encodings are read, too; polygons
    of fewer than three points are left out with one warning instead of an error.

    Args:
        root: Folder that holds ``ref-zom`` and the pictures, or the folder ``ref-zom`` itself.
        split: ``"train"`` or ``"test"``.
        transform: Applied to every sample.
        sentence: Which form of a sentence is the text: ``"raw"`` or the cleaned ``"sent"``.
        images: Where the pictures are. True: below ``root``; a folder: there, or in COCO's folders in it. False: they are not
            read, only :meth:`target`, :meth:`text` and :meth:`info` are needed.
        size: Side of the square that picture and truth are brought to: DMMI's way of scoring, with 480, where the ready mask is
            resized to the nearest pixel. None: the picture's own size.
        exclude_images: Ids of pictures to leave out, against leakage; see :func:`gresbox.data.held_out_images`.

    Shape:
        - ``[i].image``: ``(3, H, W)`` uint8 at the picture's own size; ``[i].target.masks``: ``(M, H, W)`` bool.

    Raises:
        FileNotFoundError: If the files are not there; the message shows the expected layout. If pictures are missing, it names one.
        ValueError: If there is no such split, or a file is not of the released form.

    Example:
        >>> RefZOM("nowhere", "test")
        Traceback (most recent call last):
        ...
        FileNotFoundError: RefZOM: `root` must hold the Ref-ZOM dataset, got nowhere.
        ...
    """

    _who = "RefZOM"

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        *,
        transform: Callable[[GresSample], Any] | None = None,
        sentence: str = "raw",
        images: bool | str | os.PathLike[str] = True,
        size: int | None = None,
        exclude_images: Iterable[int] = (),
    ) -> None:
        benchmark = BENCHMARKS["ref-zom"]
        super().__init__(
            benchmark,
            find_dataset(self._who, benchmark, root),
            split,
            transform=transform,
            sentence=sentence,
            images=images,
            size=size,
            exclude_images=exclude_images,
        )
