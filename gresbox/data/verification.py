"""Check downloaded files before a training stumbles over them: counts, missing pictures, dangling ids, broken masks."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from gresbox._checks import check_choice
from gresbox.data.catalogue import BENCHMARKS, Benchmark, Counts, published_counts
from gresbox.data.folders import DatasetFiles, find_dataset, find_datasets, find_pictures
from gresbox.data.masks import check_rle
from gresbox.data.references import Instances, paused_collection, read_instances, read_references, usable_segmentation

__all__ = ["BenchmarkReport", "VerificationReport", "verify"]

_SHOWN = 5
_WHO = "verify"


@dataclass(frozen=True)
class BenchmarkReport:
    """What was found in one benchmark's files.

    Args:
        title: The benchmark and its partition into splits.
        file: The file of references.
        counts: Of each split, and of ``"all"``.
        published: What was published about them; splits of which nothing is known are absent.
        no_target: Expressions without a target, by split.
        shared_pictures: How many pictures two splits share, where they do, under ``"train and val"``.
        problems: What makes a dataset fail: the kind of problem, then ids or names.
        notes: What is left out or is unusual, in the same form.
    """

    title: str
    file: str
    counts: Mapping[str, Counts]
    published: Mapping[str, Counts]
    no_target: Mapping[str, int]
    shared_pictures: Mapping[str, int]
    problems: Mapping[str, Sequence[int | str]] = field(default_factory=dict)
    notes: Mapping[str, Sequence[int | str]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether every sample can be read."""
        return not self.problems

    @property
    def as_published(self) -> bool | None:
        """Whether all counts are the published ones; None: nothing was published about any of these splits."""
        known = [(self.counts.get(split, Counts(0, 0, 0)), counts) for split, counts in self.published.items()]
        pairs = [(found, said) for both in known for found, said in zip(*both, strict=True) if said is not None]
        return all(found == said for found, said in pairs) if pairs else None

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("split", "references", "pictures", "sentences", "no target", "published")]
        for split in dict.fromkeys((*self.counts, *self.published)):
            found, said = self.counts.get(split, Counts(0, 0, 0)), self.published.get(split, Counts())
            rows.append((split, *(f"{value:,}" for value in (*found, self.no_target.get(split, 0))), _compared(found, said)))
        widths = [max(len(row[place]) for row in rows) for place in range(5)]
        lines = [f"{self.title}: {self.file}"]
        for row in rows:
            numbers = "  ".join(f"{value:>{width}}" for value, width in zip(row[1:5], widths[1:], strict=True))
            lines.append(f"  {row[0]:<{widths[0]}}  {numbers}  {row[5]}".rstrip())
        lines += [f"  problem: {_told(kind, items)}" for kind, items in self.problems.items()]
        lines += [f"  note: {_told(kind, items)}" for kind, items in self.notes.items()]
        lines += [f"  note: {splits} share {count:,} pictures" for splits, count in self.shared_pictures.items()]
        if self.as_published is False:
            lines.append("  note: counts differ from the published ones; of data of one's own that is to be expected")
        return "\n".join([*lines, "  every sample can be read" if self.ok else "  NOT every sample can be read"])


@dataclass(frozen=True)
class VerificationReport:
    """What :func:`verify` found; ``str()`` of it is the report for a person.

    Args:
        root: The folder.
        benchmarks: One report per benchmark and partition.
    """

    root: str
    benchmarks: tuple[BenchmarkReport, ...]

    @property
    def ok(self) -> bool:
        """Whether every sample of every benchmark can be read."""
        return all(report.ok for report in self.benchmarks)

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.benchmarks))


def verify(
    root: str | os.PathLike[str], benchmarks: Iterable[str] | None = None, *, images: bool | str | os.PathLike[str] = True
) -> VerificationReport:
    """Check the files of the benchmarks in a folder; nothing is decoded or changed.

    Problems are missing pictures, references to pictures or annotations that are not listed, annotations of another picture,
    pictures without a size, run-length encodings that do not fit, a source that is none. Notes are what the datasets skip or
    tolerate: references without sentences or without a usable mask, degenerate polygons (fewer than three points, odd counts),
    crowd annotations where the benchmark leaves them out, ids that occur twice, pictures that splits share, and counts that differ
    from the published ones.

    Args:
        root: Folder that holds the benchmarks' folders, or one benchmark's folder itself.
        benchmarks: Names of folders, as ``"refcoco+"``; None: all that are there. Every partition that is there is checked.
        images: Where the pictures are, as for :class:`gresbox.data.GRefCOCO`; False: they are not looked for.

    Raises:
        FileNotFoundError: If a benchmark is not there, or none is.
        ValueError: If there is no benchmark of that name, or a file is not of the released form.

    Example:
        >>> import tempfile
        >>> from gresbox.data import synthesize
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = verify(synthesize(f"{folder}/shapes", sizes={"train": 4, "val": 2}))
        >>> report.ok, report.benchmarks[0].counts["val"]
        (True, Counts(references=2, pictures=2, sentences=2))
        >>> print(report)
        gRefCOCO (unc): grefcoco/grefs(unc).json
        ...
    """
    wanted = None if benchmarks is None else tuple(benchmarks)
    for name in wanted or ():
        check_choice(_WHO, "benchmarks", name, tuple(BENCHMARKS))
    found = [(one, files) for one, files in find_datasets(root) if wanted is None or one.folder in wanted]
    for name in wanted or ():
        if name not in {benchmark.folder for benchmark, _ in found}:
            find_dataset(_WHO, BENCHMARKS[name], root)
    if not found:
        raise FileNotFoundError(
            f"{_WHO}: `root` must hold a folder of {', '.join(BENCHMARKS)} with its references and instances.json, got {root},"
            " which holds none."
        )
    with paused_collection():
        return VerificationReport(str(root), tuple(_report(benchmark, files, images) for benchmark, files in found))


def _report(benchmark: Benchmark, files: DatasetFiles, images: bool | str | os.PathLike[str]) -> BenchmarkReport:
    references, instances = read_references(_WHO, files.references), read_instances(_WHO, files.instances)
    splits: dict[str, list[Mapping[str, Any]]] = {}
    for reference in references:
        splits.setdefault(str(reference["split"]), []).append(reference)
    pictures = {split: {reference["image_id"] for reference in items} for split, items in splits.items()}
    try:
        problems, notes = _Findings(benchmark, references, instances).sorted()
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{_WHO}: {files.references} holds an entry that is not of the released form ({error!r}).") from None
    if images is not False:
        names = {str(one["file_name"]) for key in set().union(*pictures.values()) if (one := instances.pictures.get(key))}
        missing = find_pictures(files, names, None if images is True else images)[2]
        if missing:
            problems["pictures that are missing"] = sorted(missing)
    pairs = combinations(pictures, 2)
    shared = {f"{one} and {two}": len(pictures[one] & pictures[two]) for one, two in pairs if pictures[one] & pictures[two]}
    everything = {**splits, "all": references}
    return BenchmarkReport(
        title=f"{benchmark.title} ({files.partition})",
        file=files.references.relative_to(files.root).as_posix(),
        counts={split: _counts(items) for split, items in everything.items()},
        published=published_counts(benchmark.folder, files.partition),
        no_target={split: _no_target(benchmark, items) for split, items in everything.items()},
        shared_pictures=shared,
        problems=problems,
        notes=notes,
    )


def _counts(references: Sequence[Mapping[str, Any]]) -> Counts:
    pictures = {reference["image_id"] for reference in references}
    return Counts(len(references), len(pictures), sum(len(reference["sentences"]) for reference in references))


def _no_target(benchmark: Benchmark, references: Sequence[Mapping[str, Any]]) -> int:
    return sum(
        not benchmark.referred(reference) or not sentence.get("exist", True)
        for reference in references
        for sentence in reference["sentences"]
    )


class _Findings:
    """Ids of everything unusual, by kind; a kind is the sentence that the report says."""

    def __init__(self, benchmark: Benchmark, references: Sequence[Mapping[str, Any]], instances: Instances) -> None:
        self.benchmark, self.instances = benchmark, instances
        self.problems: dict[str, list[Any]] = {}
        self.notes: dict[str, list[Any]] = {}
        self.usable = {number: self._usable(annotation) for number, annotation in instances.annotations.items()}
        for reference in references:
            self._look_at(reference)
        self._repeated("reference ids that occur more than once", (one["ref_id"] for one in references))
        sentences = (sentence["sent_id"] for one in references for sentence in one["sentences"])
        self._repeated("sentence ids that occur more than once", sentences)

    def sorted(self) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Problems and notes, each id once."""
        problems, notes = ({kind: sorted(set(ids)) for kind, ids in part.items()} for part in (self.problems, self.notes))
        return problems, notes

    def _problem(self, kind: str, number: Any) -> None:
        self.problems.setdefault(kind, []).append(number)

    def _note(self, kind: str, number: Any) -> None:
        self.notes.setdefault(kind, []).append(number)

    def _repeated(self, kind: str, numbers: Iterable[Any]) -> None:
        for number, count in Counter(numbers).items():
            if count > 1:
                self._note(kind, number)

    def _usable(self, annotation: Mapping[str, Any]) -> bool:
        segmentation = annotation.get("segmentation")
        if isinstance(segmentation, bytes):
            try:
                segmentation = json.loads(segmentation)
            except ValueError:
                segmentation = None
        usable, clean = usable_segmentation(segmentation)
        if not clean:
            self._note("annotations with degenerate polygons, which are left out", annotation["id"])
        if isinstance(usable, Mapping):
            picture = self.instances.pictures.get(annotation["image_id"], {})
            try:
                check_rle(_WHO, usable, picture.get("height", 0), picture.get("width", 0))
            except ValueError:
                self._problem("annotations with a run-length encoding that does not fit their picture", annotation["id"])
        return usable is not None

    def _look_at(self, reference: Mapping[str, Any]) -> None:
        number, image_id, numbers = reference["ref_id"], reference["image_id"], self.benchmark.referred(reference)
        if not any(str(sentence["sent"]).strip() for sentence in reference["sentences"]):
            self._note("references without sentences, which are skipped", number)
        picture = self.instances.pictures.get(image_id)
        if picture is None:
            self._problem("references to a picture that instances.json does not list", number)
        elif not all(isinstance(picture.get(side), int) and picture[side] > 0 for side in ("height", "width")):
            self._problem("pictures without a height or width", image_id)
        if self.benchmark.sources and reference.get("source", "one") not in ("zero", "one", "many"):
            self._problem("references whose source is not zero, one or many", number)
        known = [self.instances.annotations[one] for one in numbers if one in self.instances.annotations]
        if len(known) < len(numbers):
            self._problem("references to an annotation that instances.json does not list", number)
        if any(annotation["image_id"] != image_id for annotation in known):
            self._problem("references to an annotation of another picture", number)
        crowds = [one for one in known if self.benchmark.skips_crowds and one.get("iscrowd", 0)]
        if crowds:
            self._note("references to crowd annotations, which the benchmark leaves out", number)
        if known and not any(self.usable[one["id"]] for one in known if one not in crowds):
            self._note("references that have targets but no usable mask, which are skipped", number)


def _compared(found: Counts, said: Counts) -> str:
    pairs = [(name, have, want) for name, have, want in zip(Counts._fields, found, said, strict=True) if want is not None]
    wrong = [f"{want:,} {name}" for name, have, want in pairs if have != want]
    if not pairs:
        return "-"
    return f"differs: {', '.join(wrong)}" if wrong else f"equal ({', '.join(name for name, _, _ in pairs)})"


def _told(kind: str, items: Sequence[int | str]) -> str:
    more = f" and {len(items) - _SHOWN:,} more" if len(items) > _SHOWN else ""
    return f"{len(items):,} {kind}: {', '.join(map(str, items[:_SHOWN]))}{more}"
