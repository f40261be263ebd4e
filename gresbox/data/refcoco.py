"""RefCOCO, RefCOCO+ and RefCOCOg as released: every expression refers to one thing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

from gresbox._checks import check_choice
from gresbox.data.catalogue import BENCHMARKS
from gresbox.data.folders import find_dataset
from gresbox.data.referring import ReferringDataset
from gresbox.structures import GresSample

__all__ = ["RefCOCO"]

_NAMES = ("refcoco", "refcoco+", "refcocog", "refcocom")


class RefCOCO(ReferringDataset):
    """RefCOCO, RefCOCO+ or RefCOCOg from the files of the refer API.

    Reads ``NAME/refs(PARTITION).p``, a pickle of Python 2 that is restricted to plain containers (or the same as ``.json``), and
    ``NAME/instances.json``. A picture is found by its ``image_id``; the ``file_name`` of a reference has a suffix that no file has.

    Papers: Yu et al., "Modeling Context in Referring Expressions", arXiv:1608.00272; Mao et al., "Generation and Comprehension of
    Unambiguous Object Descriptions", CVPR 2016.
    Differs from the refer API: a mask is the union of its polygons, also where they overlap (LAVT's ``== 1`` makes holes there);
    run-length encodings are read, too; polygons of fewer than three points are left out with one warning instead of an error.

    Args:
        root: Folder that holds the benchmark's folder and the pictures, or the benchmark's folder itself.
        name: ``"refcoco"``, ``"refcoco+"`` or ``"refcocog"``; ``"refcocom"`` is the merged set of CARIS.
        split: ``"train"``, ``"val"``, and ``"testA"``, ``"testB"`` (unc) or ``"test"`` (umd, google); ``"test"`` takes all tests.
        split_by: Which partition into splits: ``"unc"``, ``"google"`` or ``"umd"``; default: unc, and umd for RefCOCOg. Google's
            partitions share pictures between training and validation by design.
        transform: Applied to every sample.
        sentence: Which form of a sentence is the text: ``"raw"`` (LAVT) or the cleaned ``"sent"`` (CARIS).
        images: Where the pictures are. True: below ``root``; a folder: there, or in COCO's folders in it. False: they are not
            read, only :meth:`target`, :meth:`text` and :meth:`info` are needed.
        size: Side of the square that picture and truth are brought to: LAVT's way of scoring, with 480, where the ready mask is
            resized to the nearest pixel. None: the picture's own size.
        exclude_images: Ids of pictures to leave out, against leakage; see :func:`gresbox.data.held_out_images`.

    Shape:
        - ``[i].image``: ``(3, H, W)`` uint8 at the picture's own size; ``[i].target.masks``: ``(1, H, W)`` bool.

    Raises:
        FileNotFoundError: If the files are not there; the message shows the expected layout. If pictures are missing, it names one.
        ValueError: If there is no such set or split, or a file is not of the released form.

    Example:
        >>> RefCOCO("nowhere", "refcoco+", "val")
        Traceback (most recent call last):
        ...
        FileNotFoundError: RefCOCO: `root` must hold the RefCOCO+ dataset, got nowhere.
        expected:
          ROOT/refcoco+/refs(unc).p     (or refs(unc).json)
          ...
    """

    _who = "RefCOCO"

    def __init__(
        self,
        root: str | os.PathLike[str],
        name: str = "refcoco",
        split: str = "train",
        split_by: str | None = None,
        *,
        transform: Callable[[GresSample], Any] | None = None,
        sentence: str = "raw",
        images: bool | str | os.PathLike[str] = True,
        size: int | None = None,
        exclude_images: Iterable[int] = (),
    ) -> None:
        check_choice(self._who, "name", name, _NAMES)
        benchmark = BENCHMARKS[name]
        self.name = name
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
