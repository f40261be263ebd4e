"""gRefCOCO as released: expressions that refer to many things, to one or to nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

from gresbox.data.catalogue import BENCHMARKS
from gresbox.data.folders import find_dataset
from gresbox.data.referring import ReferringDataset
from gresbox.structures import GresSample

__all__ = ["GRefCOCO"]


class GRefCOCO(ReferringDataset):
    """The gRefCOCO benchmark from its released files.

    Reads ``grefcoco/grefs(unc).json`` (or the pickle ``grefs(unc).p``, restricted to plain containers) and
    ``grefcoco/instances.json``. A picture is found by its ``image_id``; the ``file_name`` of a reference often has a suffix that no
    file has. ``ann_id`` may be a list, a number, or -1 for no target. References without sentences are skipped, so are crowd
    annotations. Polygons that are none (fewer than three points) are left out; a reference that has targets but none with a usable
    mask is left out too; one warning counts both.

    Paper: Liu et al., "GRES: Generalized Referring Expression Segmentation", arXiv:2306.00968.
    Differs from the released loader: run-length encodings are read, too; boxes are those of the masks, not the ``bbox`` fields.

    Args:
        root: Folder that holds ``grefcoco`` and the pictures, or the folder ``grefcoco`` itself.
        split: ``"train"``, ``"val"``, ``"testA"`` or ``"testB"``, or whatever the file holds.
        transform: Applied to every sample.
        sentence: Which form of a sentence is the text: ``"raw"`` or the cleaned ``"sent"``.
        images: Where the pictures are. True: below ``root``; a folder: there, or in COCO's folders in it. False: they are not
            read, only :meth:`target`, :meth:`text` and :meth:`info` are needed, as for scoring ready predictions.
        size: Side of the square that picture and truth are brought to: ReLA's way of scoring, with 480, where the polygons are
            scaled and rasterised there. None: the picture's own size.
        exclude_images: Ids of pictures to leave out, against leakage; see :func:`gresbox.data.held_out_images`.

    Shape:
        - ``[i].image``: ``(3, H, W)`` uint8 at the picture's own size; ``[i].target.masks``: ``(M, H, W)`` bool.

    Raises:
        FileNotFoundError: If the files are not there; the message shows the expected layout. If pictures are missing, it names one.
        ValueError: If there is no such split (the message lists those that are), or a file is not of the released form.

    Example:
        >>> import tempfile
        >>> from gresbox.data import synthesize
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     data = GRefCOCO(synthesize(f"{folder}/shapes", sizes={"val": 2}), "val")
        ...     data[0].text == data.text(0), len(data.image_ids)
        (True, 2)
    """

    _who = "GRefCOCO"

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
        benchmark = BENCHMARKS["grefcoco"]
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
