"""Read a benchmark's references and instances, and join them to what a dataset needs.

Polygons are most of ``instances.json`` and few are needed at once: they stay the file's bytes until a mask is asked for.
"""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from gresbox.data.catalogue import KINDS, Benchmark
from gresbox.data.masks import is_polygon
from gresbox.data.pickles import PICKLE_ERRORS, load_plain_pickle

__all__ = [
    "Index",
    "Instances",
    "Picture",
    "Reference",
    "index_references",
    "paused_collection",
    "read_instances",
    "read_references",
    "usable_segmentation",
]

_FIELDS = frozenset({"ref_id", "image_id", "split", "ann_id", "sentences"})
_POLYGONS = re.compile(rb'"segmentation"\s*:\s*(\[\s*\[[^\]]*\](?:\s*,\s*\[[^\]]*\])*\s*\])')
_PLACE = "place of the polygons in the file"  # stands for them while the rest is parsed


class Picture(NamedTuple):
    """A picture's file name and size in pixels."""

    name: str
    height: int
    width: int


class Reference(NamedTuple):
    """What some expressions refer to; ``segmentations`` as :func:`usable_segmentation` gives them."""

    ref_id: int
    image_id: int
    kind: str
    segmentations: tuple[Any, ...]


@dataclass
class Instances:
    """The content of ``instances.json`` by id."""

    pictures: dict[int, Mapping[str, Any]]
    annotations: dict[int, Mapping[str, Any]]
    categories: Any = None


@dataclass
class Index:
    """The sentences of a split, what they refer to, and what was left out.

    Sentences are columns, not records: there are hundreds of thousands, and lists of strings and numbers cost the garbage collector
    and a forked data worker next to nothing.

    Args:
        references: Those with a sentence and, if they have targets, with a usable mask.
        pictures: Their pictures.
        texts: The sentences.
        sent_ids: Their ids.
        exists: Whether each is true of the picture.
        owners: The place of each one's reference in ``references``.
        degenerate: Annotations with parts that are no polygons.
        lost: References that have targets but no usable mask.
    """

    references: list[Reference] = field(default_factory=list)
    pictures: dict[int, Picture] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    sent_ids: list[int] = field(default_factory=list)
    exists: list[bool] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    degenerate: set[int] = field(default_factory=set)
    lost: list[int] = field(default_factory=list)

    def add(self, reference: Reference, sentences: list[Mapping[str, Any]], form: str) -> None:
        """Add a reference with its sentences."""
        place = len(self.references)
        self.references.append(reference)
        for sentence in sentences:
            self.texts.append(sentence.get(form) or sentence["sent"])
            self.sent_ids.append(sentence["sent_id"])
            self.exists.append(bool(sentence.get("exist", True)))
            self.owners.append(place)

    def warning(self, who: str) -> str:
        """One line about what was left out, or nothing."""
        facts = []
        if self.degenerate:
            facts.append(f"{len(self.degenerate)} annotations hold polygons of fewer than three points, which are left out")
        if self.lost:
            facts.append(f"{len(self.lost)} references have no usable mask and are skipped")
        repeated = len(self.sent_ids) - len(set(self.sent_ids))
        if repeated:
            facts.append(f"{repeated} sentence ids occur more than once")
        return f"{who}: {'; '.join(facts)}." if facts else ""


@contextmanager
def paused_collection() -> Iterator[None]:
    """Keep the garbage collector from walking hundreds of thousands of new records again and again, half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def read_references(who: str, path: Path) -> list[Mapping[str, Any]]:
    """Read a file of references, JSON or a pickle of plain containers.

    Args:
        who: The caller's public name, for messages.
        path: The file; a name that ends in ``.p`` is a pickle.

    Raises:
        ValueError: If it is not of the released form.
    """
    if path.suffix == ".p":
        try:
            with path.open("rb") as file:
                references = load_plain_pickle(file)
        except PICKLE_ERRORS as error:
            raise ValueError(f"{who}: {path} is not a pickle of plain references: {error}.") from None
    else:
        references = _parse(who, path, path.read_bytes())
    if not isinstance(references, list) or not all(
        isinstance(one, dict) and one.keys() >= _FIELDS and isinstance(one["split"], str) for one in references
    ):
        raise ValueError(f"{who}: {path} must be a list of references with {', '.join(sorted(_FIELDS))}, got another content.")
    return references


def read_instances(who: str, path: Path) -> Instances:
    """Read ``instances.json``; an annotation's polygons are left as the bytes that hold them.

    Args:
        who: The caller's public name, for messages.
        path: The file.

    Raises:
        ValueError: If it is not of the released form.
    """
    raw, polygons = path.read_bytes(), []

    def keep(match: re.Match[bytes]) -> bytes:
        polygons.append(match[1])
        return b'"%s":%d' % (_PLACE.encode(), len(polygons) - 1)

    try:
        content = json.loads(_POLYGONS.sub(keep, raw))
    except (ValueError, RecursionError):
        polygons.clear()
        content = _parse(who, path, raw)  # what is wrong is told of the file as it is
    if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
        raise ValueError(f"{who}: {path} must hold `images` and `annotations`, got another content.")
    try:
        for annotation in content["annotations"]:
            if _PLACE in annotation:
                annotation["segmentation"] = polygons[annotation.pop(_PLACE)]
        return Instances(
            {picture["id"]: picture for picture in content["images"]},
            {annotation["id"]: annotation for annotation in content["annotations"]},
            content.get("categories"),
        )
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise _other_form(who, error) from None


def _parse(who: str, path: Path, raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{who}: {path} is not JSON ({error}).") from None


def _other_form(who: str, error: Exception) -> ValueError:
    got = f"without ({error})" if isinstance(error, KeyError) else f"of another form ({error})"
    return ValueError(f"{who}: references and instances must have the released form's fields, got an entry {got}.")


def index_references(
    who: str,
    benchmark: Benchmark,
    references: Iterable[Mapping[str, Any]],
    instances: Instances,
    sentence: str = "raw",
    excluded: frozenset[int] = frozenset(),
) -> Index:
    """Join references with their pictures and annotations.

    Args:
        who: The caller's public name, for messages.
        benchmark: Whose rules to follow.
        references: As :func:`read_references` gives them.
        instances: As :func:`read_instances` gives them.
        sentence: Which form of a sentence is the text, ``"raw"`` or ``"sent"``.
        excluded: Pictures to leave out.

    Raises:
        ValueError: If a reference needs what is not there, or an entry is not of the released form.
    """
    index, known = Index(), dict[int, Any]()  # known: the usable segmentation of each annotation that was met
    try:
        for reference in references:
            sentences = [said for said in reference["sentences"] if (said.get(sentence) or said["sent"]).strip()]
            if not sentences or reference["image_id"] in excluded:
                continue
            image_id, numbers = reference["image_id"], benchmark.referred(reference)
            if image_id not in index.pictures:
                index.pictures[image_id] = _picture(who, reference, instances)
            for number in numbers:
                if number not in known:
                    known[number] = _segmentation(who, benchmark, reference, number, instances, index.degenerate)
            usable = tuple(known[number] for number in numbers if known[number] is not None)
            if numbers and not usable:
                index.lost.append(reference["ref_id"])
                continue
            kind = reference.get("source", "one") if benchmark.sources else KINDS[min(len(usable), 2)]
            if kind not in KINDS:
                raise ValueError(f"{who}: reference {reference['ref_id']} must have a source in {', '.join(KINDS)}, got {kind!r}.")
            index.add(Reference(reference["ref_id"], image_id, kind, usable), sentences, sentence)
    except (KeyError, TypeError, AttributeError) as error:
        raise _other_form(who, error) from error
    return index


def _picture(who: str, reference: Mapping[str, Any], instances: Instances) -> Picture:
    image_id = reference["image_id"]
    if image_id not in instances.pictures:
        raise ValueError(f"{who}: reference {reference['ref_id']} needs picture {image_id}, which instances.json does not list.")
    entry = instances.pictures[image_id]
    picture = Picture(entry["file_name"], entry["height"], entry["width"])
    if not all(isinstance(side, int) and side > 0 for side in picture[1:]):
        raise ValueError(f"{who}: picture {image_id} must have a height and a width in pixels, got {picture[1]} and {picture[2]}.")
    return picture


def _segmentation(
    who: str, benchmark: Benchmark, reference: Mapping[str, Any], number: int, instances: Instances, degenerate: set[int]
) -> Any:
    """The annotation's usable segmentation; None where there is none."""
    if number not in instances.annotations:
        raise ValueError(f"{who}: reference {reference['ref_id']} needs annotation {number}, which instances.json does not list.")
    annotation = instances.annotations[number]
    if annotation["image_id"] != reference["image_id"]:
        raise ValueError(
            f"{who}: reference {reference['ref_id']} is of picture {reference['image_id']}, but its annotation {number} is of "
            f"picture {annotation['image_id']}."
        )
    if benchmark.skips_crowds and annotation.get("iscrowd", 0):
        return None
    usable, clean = usable_segmentation(annotation.get("segmentation"))
    if not clean:
        degenerate.add(number)
    return usable


def usable_segmentation(segmentation: Any) -> tuple[Any, bool]:
    """What of an annotation's segmentation can be rasterised.

    Args:
        segmentation: A run-length encoding, a list of polygons, or the bytes of one.

    Returns:
        The run-length encoding, the list of proper polygons or the bytes if all are proper, None if there are none; and whether
        nothing had to be left out.

    Example:
        >>> usable_segmentation([[0, 0, 4, 0, 4, 4], [1, 1, 2, 2]])
        ([[0, 0, 4, 0, 4, 4]], False)
        >>> usable_segmentation(b"[[0, 0, 4, 0, 4, 4]]")
        (b'[[0, 0, 4, 0, 4, 4]]', True)
    """
    if isinstance(segmentation, Mapping):
        return segmentation, True
    if isinstance(segmentation, bytes):
        if _all_proper(segmentation):
            return segmentation, True
        try:
            segmentation = json.loads(segmentation)
        except ValueError:
            return None, False
    if not isinstance(segmentation, list):
        return None, False
    parts = [part for part in segmentation if is_polygon(part)]
    return parts or None, bool(parts) and len(parts) == len(segmentation)


def _all_proper(polygons: bytes) -> bool:
    """Whether each of the polygons has at least three points, by the commas; an unusual character asks for a closer look."""
    if polygons.translate(None, b"0123456789.,- \n[]"):
        return False
    counts = [part.count(b",") for part in polygons.split(b"]")[:-2]]
    counts[0] += 1  # the others begin with the comma between the parts
    return all(count >= 6 and count % 2 == 0 for count in counts)
