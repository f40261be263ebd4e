"""Which pictures must not be trained on: the benchmarks share COCO's pictures, and one's test is another's training."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from gresbox._checks import check_choice
from gresbox.data.catalogue import BENCHMARKS
from gresbox.data.folders import find_dataset, find_datasets
from gresbox.data.references import paused_collection, read_references

__all__ = ["held_out_images"]


def held_out_images(
    root: str | os.PathLike[str], benchmarks: Iterable[str] | None = None, *, splits: tuple[str, ...] = ("val", "test")
) -> frozenset[int]:
    """Ids of all pictures that some benchmark evaluates on, to be left out of a mixed training.

    Only the files of references are read. Google's partitions share pictures between training and validation by design and are
    not in the default.

    Args:
        root: Folder that holds the benchmarks' folders.
        benchmarks: Names of folders (``"refcoco+"``), each in its usual partition or in a named one (``"refcocog(google)"``);
            None: all that are there, in their usual partition.
        splits: How the names of the splits begin that are held out.

    Raises:
        FileNotFoundError: If a benchmark is not there, or none is.
        ValueError: If there is no benchmark of that name, or a file is not of the released form.

    Example:
        >>> import tempfile
        >>> from gresbox.data import GRefCOCO, synthesize
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     root = synthesize(f"{folder}/shapes", sizes={"train": 3, "val": 2, "testA": 1})
        ...     held_out = held_out_images(root)
        ...     len(held_out), len(GRefCOCO(root, "train", exclude_images=held_out))
        (3, 3)
    """
    who = "held_out_images"
    if benchmarks is None:
        found = [files for benchmark, files in find_datasets(root) if files.partition != "google"]
        if not found:
            raise FileNotFoundError(
                f"{who}: `root` must hold a folder of {', '.join(BENCHMARKS)} with its references and instances.json,"
                f" got {Path(root)}, which holds none."
            )
    else:
        found = []
        for name in benchmarks:
            folder, _, partition = name.rstrip(")").partition("(")
            check_choice(who, "benchmarks", folder, tuple(BENCHMARKS))
            found.append(find_dataset(who, BENCHMARKS[folder], root, partition or None))
    held_out: set[int] = set()
    with paused_collection():
        for files in found:
            references = read_references(who, files.references)
            held_out |= {reference["image_id"] for reference in references if str(reference["split"]).startswith(tuple(splits))}
    return frozenset(held_out)
