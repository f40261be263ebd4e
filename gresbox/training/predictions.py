"""Predictions as a file that anyone can write: a line of JSON per expression, with ids, run-length encoded masks, boxes, scores."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gresbox._files import remove, write_atomically
from gresbox.data.masks import check_rle, decode_rle, encode_rle
from gresbox.training.processes import gather_objects, process_rank, world_size

__all__ = ["Answer", "PredictionFile", "PredictionWriter"]

FIELDS = ("sent_id", "ref_id", "no_target", "mask", "boxes", "scores")
REMARKS = ("text", "image_id")
_LARGEST = 2**63  # of an id
_FARTHEST = 1e9  # of a box, in pixels


@dataclass(frozen=True, eq=False)
class Answer:
    """A model's answer to one expression, before anybody decides whether it is "nothing".

    Args:
        sent_id: The expression.
        mask: Everything that it refers to, as predicted, also where the answer will be "nothing"; None: boxes alone.
        no_target: Probability that it refers to nothing; None: the mask tells.
        boxes_xyxy: Boxes of instances, in pixels of the mask's picture; None: there are none in this file.
        scores: One per box.
        ref_id: The expression's reference, which is needed where a data set uses a ``sent_id`` for several.

    Shape:
        - ``mask``: ``(H, W)`` bool; ``boxes_xyxy``: ``(K, 4)`` float32; ``scores``: ``(K,)`` float64 in [0, 1].
    """

    sent_id: int
    mask: Tensor | None = None
    no_target: float | None = None
    boxes_xyxy: Tensor | None = None
    scores: Tensor | None = None
    ref_id: int | None = None

    def record(self) -> dict[str, Any]:
        """The answer as a line of the file has it; what is None is left out.

        Example:
            >>> Answer(7, torch.tensor([[False, True], [True, True]]), 0.25).record()
            {'sent_id': 7, 'no_target': 0.25, 'mask': {'size': [2, 2], 'counts': '13'}}
        """
        record: dict[str, Any] = {"sent_id": self.sent_id, "ref_id": self.ref_id, "no_target": self.no_target}
        if self.mask is not None:
            record["mask"] = encode_rle(self.mask.numpy(force=True))
        if self.boxes_xyxy is not None and self.scores is not None:
            record |= {"boxes": self.boxes_xyxy.tolist(), "scores": self.scores.tolist()}
        return {name: value for name, value in record.items() if value is not None}


class PredictionWriter:
    """Write answers while they come; the file appears, complete, when the block ends without an error.

    Several processes write together: each adds the answers to every ``world``-th expression, and the file has them in order.

    Args:
        path: The file.

    Raises:
        ValueError: If the path is a folder, or an answer holds a number that is none.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "predictions.jsonl"
        >>> with PredictionWriter(path) as writer:
        ...     writer.add([Answer(7, torch.ones(2, 2, dtype=torch.bool)), Answer(8, torch.zeros(2, 2, dtype=torch.bool), 0.9)])
        >>> print(path.read_text().strip())
        {"sent_id": 7, "mask": {"size": [2, 2], "counts": "04"}}
        {"sent_id": 8, "no_target": 0.9, "mask": {"size": [2, 2], "counts": "4"}}
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            raise ValueError(f"PredictionWriter: `path` must be a file to write, got the folder {path}.")

    def __enter__(self) -> PredictionWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._part(process_rank()).open("w", encoding="utf-8")
        return self

    def add(self, answers: Sequence[Answer]) -> None:
        """Write answers, in the order of their expressions."""
        for answer in answers:
            try:
                self._file.write(json.dumps(answer.record(), allow_nan=False) + "\n")
            except ValueError as error:
                who = f"PredictionWriter: expression {answer.sent_id}"
                raise ValueError(f"{who} must have finite numbers, got one that is not ({error}).") from None

    def __exit__(self, failed: object, *_: object) -> None:
        self._file.close()
        try:
            if failed is None:
                gather_objects(None)  # everybody has written
                try:
                    if process_rank() == 0:
                        write_atomically(self.path, self._join)
                finally:
                    gather_objects(None)  # nobody tidies up before that is read
        finally:
            remove(self._part(process_rank()))

    def _part(self, rank: int) -> Path:
        return self.path.with_name(f".{self.path.stem}.partial-{rank}{self.path.suffix}")

    def _join(self, temporary: Path) -> None:
        """Lines of all processes, dealt back in turn."""
        if world_size() == 1:
            self._part(0).replace(temporary)
            return
        missing = [str(part) for part in map(self._part, range(world_size())) if not part.is_file()]
        if missing:
            raise RuntimeError(f"PredictionWriter: all processes must see the folder of `path`, got none of {missing[0]}.")
        parts = [self._part(rank).read_text(encoding="utf-8").splitlines(keepends=True) for rank in range(world_size())]
        with temporary.open("w", encoding="utf-8") as file:
            for place in range(sum(map(len, parts))):
                file.write(parts[place % len(parts)][place // len(parts)])


class _Line(NamedTuple):
    """Where a line is and what it holds; the rest is read again when it is asked for."""

    number: int
    start: int
    sent_id: int
    ref_id: int | None
    holds: frozenset[str]


class PredictionFile(Sequence[Answer]):
    """Read anyone's predictions, one line of JSON per expression; see the documentation's page "Predictions".

    Every line is checked when the file is opened; masks are decoded one by one when they are asked for, so a file may be larger
    than the memory.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If a line is not of the form, an expression is answered twice, or some lines have ``no_target`` and others not.
            The message names the line.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "predictions.jsonl"
        >>> _ = path.write_text('{"sent_id": 7, "no_target": 0.25, "mask": {"size": [2, 2], "counts": [1, 3]}}')
        >>> answers = PredictionFile(path)
        >>> len(answers), answers[0].sent_id, answers[0].mask.tolist()
        (1, 7, [[False, True], [True, True]])
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"PredictionFile: `path` must be a file of predictions, got {path}, which is none.")
        self._lines = list(self._read())
        self._check_lines()

    def __len__(self) -> int:
        return len(self._lines)

    def __iter__(self) -> Iterator[Answer]:
        return (self[place] for place in range(len(self)))

    def __getitem__(self, place: Any) -> Any:
        return self.answer(place)

    def answer(self, place: int, size: tuple[int, int] | None = None) -> Answer:
        """One line's answer.

        Args:
            place: Which, from 0.
            size: Height and width that its mask must have and its boxes lie in; None: any.

        Raises:
            ValueError: If it is of another size.
        """
        line = self._lines[place]
        with self.path.open("rb") as file:
            file.seek(line.start)
            record = json.loads(file.readline())
        if size is not None:
            _check_place(f"PredictionFile: line {line.number} of {self.path}", record, size)
        mask, boxes, scores = (record.get(name) for name in ("mask", "boxes", "scores"))
        no_target = record.get("no_target")
        return Answer(
            sent_id=line.sent_id,
            mask=None if mask is None else torch.from_numpy(decode_rle(mask)),
            no_target=None if no_target is None else float(no_target),
            boxes_xyxy=None if boxes is None else torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            scores=None if scores is None else torch.tensor(scores, dtype=torch.float64),
            ref_id=line.ref_id,
        )

    def require(self, field: str, because: str) -> None:
        """Check that every line has a field.

        Args:
            field: Its name in the file.
            because: Who needs it, for the message.

        Raises:
            ValueError: If a line has not.
        """
        for line in self._lines:
            if field not in line.holds:
                raise ValueError(f"PredictionFile: line {line.number} of {self.path} must have `{field}`, {because}, got none.")

    def places(self, wanted: Sequence[tuple[int, int]]) -> list[int]:
        """Where the answers to a data set's expressions stand.

        Args:
            wanted: Each expression's ``ref_id`` and ``sent_id``.

        Returns:
            For each the place in the file.

        Raises:
            ValueError: If an expression has no answer, or an answer no expression.
        """
        several = len({sent_id for _, sent_id in wanted}) < len(wanted)
        if several:
            self.require("ref_id", "as the data set uses one `sent_id` for several expressions")
        keys = [(ref_id if several else None, sent_id) for ref_id, sent_id in wanted]
        known = dict(zip(keys, wanted, strict=True))
        found: dict[tuple[int | None, int], int] = {}
        for place, line in enumerate(self._lines):
            key = (line.ref_id if several else None, line.sent_id)
            where, name = f"PredictionFile: line {line.number} of {self.path}", _named(line.ref_id, line.sent_id)
            if key not in known:
                raise ValueError(f"{where} must answer an expression of the data set, got {name}, which it does not have.")
            if line.ref_id not in (None, known[key][0]):
                raise ValueError(f"{where} must be of ref_id {known[key][0]}, as the data set has it, got {name}.")
            if found.setdefault(key, place) != place:
                raise ValueError(
                    f"{where} must answer another expression than line {self._lines[found[key]].number}, got {name} again."
                )
        missing = [key for key in keys if key not in found]
        if missing:
            raise ValueError(
                f"PredictionFile: {self.path} must answer all {len(keys):,} expressions, got no answer to {len(missing):,} of them,"
                f" the first is {_named(*missing[0])}."
            )
        return [found[key] for key in keys]

    def _read(self) -> Iterator[_Line]:
        start = 0
        with self.path.open("rb") as file:
            for number, text in enumerate(file, 1):
                if text.strip():
                    record = _checked_record(f"PredictionFile: line {number} of {self.path}", text.strip())
                    holds = frozenset(name for name in FIELDS if record.get(name) is not None)
                    yield _Line(number, start, record["sent_id"], record.get("ref_id"), holds)
                start += len(text)

    def _check_lines(self) -> None:
        if not self._lines:
            raise ValueError(f"PredictionFile: {self.path} must hold a line per expression, got an empty file.")
        first = self._lines[0]
        seen: dict[tuple[int | None, int], int] = {}
        for line in self._lines:
            if ("no_target" in line.holds) != ("no_target" in first.holds):
                raise ValueError(
                    f"PredictionFile: all lines of {self.path} or none must have `no_target`, got line {first.number} and line"
                    f" {line.number} that differ."
                )
            earlier = seen.setdefault((line.ref_id, line.sent_id), line.number)
            if earlier != line.number:
                where, name = f"PredictionFile: line {line.number} of {self.path}", _named(line.ref_id, line.sent_id)
                raise ValueError(f"{where} must answer another expression than line {earlier}, got {name} again.")


def _named(ref_id: int | None, sent_id: int) -> str:
    return f"sent_id {sent_id}" if ref_id is None else f"sent_id {sent_id} of ref_id {ref_id}"


def _checked_record(where: str, text: bytes) -> Mapping[str, Any]:
    """A line's content, of the documented form."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} must be a JSON object, got what cannot be read as one ({error}).") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where} must be a JSON object, got {_kind(record)}.")
    strange = sorted(record.keys() - {*FIELDS, *REMARKS})
    if strange:
        raise ValueError(f"{where} must hold {', '.join(FIELDS)} (and {', '.join(REMARKS)}) alone, got {strange[0]!r}.")
    if "sent_id" not in record:
        raise ValueError(f"{where} must have `sent_id`, got none.")
    for name in ("sent_id", "ref_id"):
        value = record.get(name)
        if not (type(value) is int and abs(value) < _LARGEST) and (name == "sent_id" or value is not None):
            raise ValueError(f"{where} must have a whole number as `{name}`, got {_kind(value)}.")
    if record.get("no_target") is not None and not _is_probability(record["no_target"]):
        raise ValueError(f"{where} must have a probability in [0, 1] as `no_target`, got {_shown(record['no_target'])}.")
    _check_mask(where, record.get("mask"))
    _check_boxes(where, record.get("boxes"), record.get("scores"))
    return record


def _check_mask(where: str, rle: Any) -> None:
    if rle is None:
        return
    size = rle.get("size") if isinstance(rle, dict) else None
    if not (isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size) and "counts" in rle):
        expected = 'a run-length encoding {"size": [height, width], "counts": ...}'
        raise ValueError(f"{where} must have {expected} as `mask`, got {_kind(rle)}{'' if size is None else ' of another form'}.")
    try:
        check_rle(where, rle, *size)
    except ValueError as error:
        raise ValueError(f"{where} has a `mask` that cannot be decoded: {error}") from None


def _check_boxes(where: str, boxes: Any, scores: Any) -> None:
    if boxes is None and scores is None:
        return
    if not isinstance(boxes, list) or not isinstance(scores, list) or len(boxes) != len(scores):
        got = " and ".join(
            f"{len(part)} of {name}" if isinstance(part, list) else f"{_kind(part)} as `{name}`"
            for name, part in (("boxes", boxes), ("scores", scores))
        )
        raise ValueError(f"{where} must have lists of one length as `boxes` and `scores`, got {got}.")
    for box in boxes:
        if not isinstance(box, list) or len(box) != 4 or not all(_is_number(side) for side in box):
            raise ValueError(f"{where} must have boxes of four finite numbers, x0, y0, x1 and y1 in pixels, got {_shown(box)}.")
        if box[2] < box[0] or box[3] < box[1]:
            raise ValueError(f"{where} must have boxes with x0 <= x1 and y0 <= y1, got {_shown(box)}.")
    for score in scores:
        if not _is_probability(score):
            raise ValueError(f"{where} must have numbers in [0, 1] as `scores`, got {_shown(score)}.")


def _check_place(where: str, record: Mapping[str, Any], size: tuple[int, int]) -> None:
    """The mask is of the truth's size, and every box touches the picture."""
    if record.get("mask") is not None and tuple(record["mask"]["size"]) != size:
        found = tuple(record["mask"]["size"])
        raise ValueError(f"{where} must have a mask of height and width {size}, at which the truth is scored, got {found}.")
    for x0, y0, x1, y1 in record.get("boxes") or ():
        if x1 < 0 or y1 < 0 or x0 > size[1] or y0 > size[0]:
            box = _shown([x0, y0, x1, y1])
            raise ValueError(f"{where} must have boxes that touch the picture of height and width {size}, got {box}.")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < _FARTHEST


def _is_probability(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value <= 1


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", float: "a fraction", type(None): "nothing"}
    return kinds.get(type(value), "a number")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
