"""The benchmarks whose released files are read: what the files are called, how they are read, and how much they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from gresbox._checks import check_choice

__all__ = ["BENCHMARKS", "Benchmark", "Counts", "published_counts"]

KINDS = ("zero", "one", "many")


@dataclass(frozen=True)
class Benchmark:
    """One benchmark's files and the rules by which its own code reads them.

    Args:
        title: Its name in texts.
        folder: Its folder.
        partitions: The partitions into splits that were released, the usual one first; they are part of the file's name.
        stem: What the file of references is called before the partition.
        skips_crowds: Crowd regions are not part of the truth.
        scales_polygons: At another size the polygons are scaled and rasterised there; otherwise the ready mask is resized.
        joint_splits: ``"testA"`` takes every split with an A in it (such as testAB) and ``"test"`` every one with "test".
        sources: A reference says itself whether it means one, many or zero, and ``"zero"`` overrules its annotations.
    """

    title: str
    folder: str
    partitions: tuple[str, ...]
    stem: str = "refs"
    skips_crowds: bool = False
    scales_polygons: bool = False
    joint_splits: bool = True
    sources: bool = False

    def file_names(self, partition: str) -> tuple[str, str]:
        """What the file of references may be called; the first is the released form."""
        endings = ("json", "p") if self.stem == "grefs" else ("p", "json")
        return (f"{self.stem}({partition}).{endings[0]}", f"{self.stem}({partition}).{endings[1]}")

    def select(self, who: str, references: Sequence[Mapping[str, Any]], split: str) -> list[Mapping[str, Any]]:
        """The references of a split.

        Raises:
            ValueError: If there is no such split; the message lists those that are.
        """
        splits = tuple({reference["split"]: None for reference in references})
        if self.joint_splits and split == "test":
            wanted = {name for name in splits if "test" in name}
        elif self.joint_splits and split in ("testA", "testB", "testC"):
            wanted = {name for name in splits if split[-1] in name}
        else:
            wanted = {split} & set(splits)
        if not wanted:
            check_choice(who, "split", split, splits)
        return [reference for reference in references if reference["split"] in wanted]

    def referred(self, reference: Mapping[str, Any]) -> list[int]:
        """The annotations that a reference refers to; its ``ann_id`` is a list, a number, or -1 for none."""
        if self.sources and reference.get("source") == "zero":
            return []
        numbers = reference["ann_id"]
        return [number for number in (numbers if isinstance(numbers, list | tuple) else (numbers,)) if number != -1]


class Counts(NamedTuple):
    """How much a split holds; None: not known."""

    references: int | None = None
    pictures: int | None = None
    sentences: int | None = None


BENCHMARKS: dict[str, Benchmark] = {
    benchmark.folder: benchmark
    for benchmark in (
        Benchmark("gRefCOCO", "grefcoco", ("unc",), stem="grefs", skips_crowds=True, scales_polygons=True, joint_splits=False),
        Benchmark("RefCOCO", "refcoco", ("unc", "google")),
        Benchmark("RefCOCO+", "refcoco+", ("unc",)),
        Benchmark("RefCOCOg", "refcocog", ("umd", "google")),
        Benchmark("RefCOCOm", "refcocom", ("mix",)),
        Benchmark("Ref-ZOM", "ref-zom", ("final",), sources=True),
        Benchmark("R-RefCOCO", "rrefcoco", ("unc",)),
        Benchmark("R-RefCOCO+", "rrefcoco+", ("unc",)),
        Benchmark("R-RefCOCOg", "rrefcocog", ("unc", "umd")),
    )
}
"""The benchmarks by the name of their folder."""

# References and pictures of the RefCOCO family: README of ref_coco in tensorflow/datasets. Sentences of RefCOCO: its authors.
# gRefCOCO: pictures are those of RefCOCO's unc splits; sentences of the released version: GREx, arXiv:2601.05244 (the paper of
# GRES, arXiv:2306.00968, says 278,232). Ref-ZOM: arXiv:2308.13853.
_PUBLISHED: dict[tuple[str, str], dict[str, Counts]] = {
    ("grefcoco", "unc"): {
        "train": Counts(pictures=16994),
        "val": Counts(pictures=1500),
        "testA": Counts(pictures=750),
        "testB": Counts(pictures=750),
        "all": Counts(pictures=19994, sentences=259859),
    },
    ("refcoco", "unc"): {
        "train": Counts(42404, 16994, 120624),
        "val": Counts(3811, 1500, 10834),
        "testA": Counts(1975, 750, 5657),
        "testB": Counts(1810, 750, 5095),
        "all": Counts(50000, 19994),
    },
    ("refcoco", "google"): {"train": Counts(40000, 19213), "val": Counts(5000, 4559), "test": Counts(5000, 4527)},
    ("refcoco+", "unc"): {
        "train": Counts(42278, 16992),
        "val": Counts(3805, 1500),
        "testA": Counts(1975, 750),
        "testB": Counts(1798, 750),
        "all": Counts(49856, 19992, 141564),
    },
    ("refcocog", "umd"): {
        "train": Counts(42226, 21899),
        "val": Counts(2573, 1300),
        "test": Counts(5023, 2600),
        "all": Counts(sentences=95010),
    },
    ("refcocog", "google"): {
        "train": Counts(44822, 24698),
        "val": Counts(5000, 4650),
        "all": Counts(sentences=104560),
    },
    ("ref-zom", "final"): {"all": Counts(pictures=55078)},
}


def published_counts(folder: str, partition: str) -> Mapping[str, Counts]:
    """What was published about a benchmark, by split; ``"all"`` is all of them together.

    Args:
        folder: The benchmark's folder.
        partition: Its partition into splits.

    Example:
        >>> published_counts("refcoco", "unc")["testA"]
        Counts(references=1975, pictures=750, sentences=5657)
    """
    return _PUBLISHED.get((folder, partition), {})
