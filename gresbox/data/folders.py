"""Find a benchmark's files and pictures in the layouts that exist, or say what was expected and what is there."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gresbox.data.catalogue import BENCHMARKS, Benchmark

__all__ = ["PICTURE_FOLDERS", "DatasetFiles", "find_dataset", "find_datasets", "find_pictures"]

PICTURE_FOLDERS = tuple(
    f"{parent}{name}"
    for name in ("train2014", "trainval2014", "val2014")
    for parent in ("images/", "images/mscoco/images/", "images/mscoco/", "")
)
"""Where pictures may be: in gRefCOCO's layout, that of the refer API, that of R-RefCOCO, or COCO's own folder."""

_SHOWN = 12


@dataclass(frozen=True)
class DatasetFiles:
    """Where a benchmark's files are.

    Args:
        root: The folder that was asked for.
        folder: The folder that holds the files.
        references: The file of references.
        partition: Which partition into splits that is.
    """

    root: Path
    folder: Path
    references: Path
    partition: str

    @property
    def instances(self) -> Path:
        """The file of pictures and annotations."""
        return self.folder / "instances.json"


def find_dataset(who: str, benchmark: Benchmark, root: str | os.PathLike[str], partition: str | None = None) -> DatasetFiles:
    """Find a benchmark below a folder, or in it.

    Args:
        who: The caller's public name, for the message.
        benchmark: What to look for.
        root: Folder that holds the benchmark's folder, or the benchmark's folder itself.
        partition: The partition into splits; None: the first of ``benchmark.partitions`` that is there.

    Raises:
        FileNotFoundError: If it is not there; the message shows the layout that was expected and what was found.
    """
    for found in _candidates(benchmark, Path(root), benchmark.partitions if partition is None else (partition,)):
        return found
    raise FileNotFoundError(_not_found(who, benchmark, Path(root), partition or benchmark.partitions[0]))


def find_datasets(root: str | os.PathLike[str]) -> list[tuple[Benchmark, DatasetFiles]]:
    """All benchmarks below a folder, or the one that the folder itself holds, in every partition that is there.

    Args:
        root: The folder.
    """
    return [
        (benchmark, found)
        for benchmark in BENCHMARKS.values()
        for found in _candidates(benchmark, Path(root), benchmark.partitions)
    ]


def _candidates(benchmark: Benchmark, root: Path, partitions: Iterable[str]) -> Iterator[DatasetFiles]:
    # RefCOCO and RefCOCO+ call their files alike: a folder that is named as another benchmark's is not this one's
    itself = [] if root.resolve().name in BENCHMARKS.keys() - {benchmark.folder} else [root]
    for partition in partitions:
        for folder in (root / benchmark.folder, *itself):
            names = [name for name in benchmark.file_names(partition) if (folder / name).is_file()]
            if names and (folder / "instances.json").is_file():
                yield DatasetFiles(root, folder, folder / names[0], partition)
                break


def _not_found(who: str, benchmark: Benchmark, root: Path, partition: str) -> str:
    usual, other = benchmark.file_names(partition)
    names = (f"{benchmark.folder}/{usual}", f"{benchmark.folder}/instances.json", "images/train2014/*.jpg")
    notes = (f"(or {other})", "", f"(or {', '.join(PICTURE_FOLDERS[1:4])}; also trainval2014 and val2014)")
    width = max(map(len, names))
    tree = "\n".join(f"  ROOT/{name:<{width}}  {note}".rstrip() for name, note in zip(names, notes, strict=True))
    found = _listing(root)
    for folder in (root / benchmark.folder, root / "images"):
        if folder.is_dir():
            found += f"; in ROOT/{folder.name}: {_listing(folder)}"
    title = f"the {benchmark.title} dataset" if partition == benchmark.partitions[0] else f"{benchmark.title} split by {partition}"
    return f"{who}: `root` must hold {title}, got {root}.\nexpected:\n{tree}\nfound in ROOT: {found}"


def _listing(folder: Path) -> str:
    if not folder.is_dir():
        return "not a folder" if folder.exists() else "no such folder"
    names = sorted(name + "/" * (folder / name).is_dir() for name in os.listdir(folder))
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more or "nothing"


def find_pictures(
    files: DatasetFiles, names: Iterable[str], pictures: str | os.PathLike[str] | None = None
) -> tuple[dict[str, Path], list[Path], set[str]]:
    """Find pictures by name in the folders where they may be.

    Args:
        files: The benchmark's files; its pictures are beside or above them.
        names: The pictures' names.
        pictures: A folder that holds them, or COCO's folders; None: look in :data:`PICTURE_FOLDERS`.

    Returns:
        The folder of each picture that was found, the folders that were looked into, and the names that are in none of them.
    """
    if pictures is None:
        bases = dict.fromkeys((files.root, files.folder, files.folder.parent))
        folders = [base / inner for base in bases for inner in PICTURE_FOLDERS]
    else:
        folders = [Path(pictures), *(Path(pictures) / inner for inner in PICTURE_FOLDERS)]
    found: dict[str, Path] = {}
    missing, searched = set(names), []
    for folder in folders:
        if missing and folder.is_dir():
            searched.append(folder)
            here = missing.intersection(os.listdir(folder))
            found.update(dict.fromkeys(here, folder))
            missing -= here
    return found, searched, missing
