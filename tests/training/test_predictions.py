from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gresbox.data import SyntheticGRES
from gresbox.data.masks import encode_rle
from gresbox.training import Answer, PredictionFile, PredictionWriter, predictions, score_predictions

SQUARE = {"size": [4, 6], "counts": [5, 3, 16]}
NAN, INFINITY = float("nan"), float("inf")


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def line(sent_id: object = 1, **more: object) -> dict[str, object]:
    return {"sent_id": sent_id, "mask": SQUARE, **more}


@st.composite
def answers(draw: st.DrawFn) -> list[Answer]:
    found = []
    boxed, judged = draw(st.booleans()), draw(st.booleans())
    for sent_id in draw(st.lists(st.integers(-(2**40), 2**62), unique=True, min_size=1, max_size=5)):
        height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
        bits = draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
        count = draw(st.integers(0, 3)) if boxed else 0
        corners = torch.rand(count, 4, generator=torch.Generator().manual_seed(len(bits))) * torch.tensor([3.0, 3.0, 5.0, 5.0])
        corners[:, 2:] += corners[:, :2]
        scores = [draw(st.floats(0, 1, width=32)) for _ in range(count)]
        found.append(
            Answer(
                sent_id,
                torch.tensor(bits).view(height, width),
                draw(st.floats(0, 1)) if judged else None,
                corners if boxed else None,
                torch.tensor(scores, dtype=torch.float64) if boxed else None,
                draw(st.none() | st.integers(0, 9)),
            )
        )
    return found


@given(answers())
def test_what_is_written_is_read_to_the_last_bit(tmp_path_factory, given_answers):
    path = tmp_path_factory.mktemp("file") / "deep" / "predictions.jsonl"
    with PredictionWriter(path) as writer:
        for answer in given_answers:
            writer.add([answer])
    read = list(PredictionFile(path))
    assert len(read) == len(given_answers)
    for one, other in zip(given_answers, read, strict=True):
        assert (one.sent_id, one.ref_id, one.no_target) == (other.sent_id, other.ref_id, other.no_target)
        for name in ("mask", "boxes_xyxy", "scores"):
            first, second = getattr(one, name), getattr(other, name)
            assert (first is None) == (second is None)
            assert first is None or (first.dtype == second.dtype and torch.equal(first, second))


def test_both_forms_of_encodings_remarks_and_empty_lines_are_read(tmp_path):
    mask = np.zeros((4, 6), dtype=bool)
    mask[1:, 1] = True
    text = line(2, mask=encode_rle(mask), text="the thing", image_id=5)
    file = PredictionFile(write(tmp_path / "p.jsonl", line(1, no_target=None), "", text, {"sent_id": 3, "boxes": [], "scores": []}))
    assert torch.equal(file[0].mask, torch.from_numpy(mask))
    assert torch.equal(file[1].mask, file[0].mask)
    assert (file[2].mask, tuple(file[2].boxes_xyxy.shape), file[0].boxes_xyxy) == (None, (0, 4), None)
    assert file.places([(9, 3), (8, 1), (8, 2)]) == [2, 0, 1]
    (tmp_path / "windows.jsonl").write_bytes(file.path.read_bytes().replace(b"\n", b" \r\n"))
    assert [answer.sent_id for answer in PredictionFile(tmp_path / "windows.jsonl")] == [1, 2, 3]
    assert torch.equal(PredictionFile(tmp_path / "windows.jsonl")[1].mask, file[1].mask)


def test_nothing_is_left_of_a_file_that_was_not_finished(tmp_path):
    path = write(tmp_path / "p.jsonl", "what was there")
    with pytest.raises(AttributeError), PredictionWriter(path) as writer:
        writer.add([Answer(1, torch.ones(2, 2, dtype=torch.bool)), None])
    assert path.read_text() == "what was there\n"
    with (
        pytest.raises(ValueError, match=r"expression 1 must have finite numbers, got one that is not"),
        PredictionWriter(path) as writer,
    ):
        writer.add([Answer(1, no_target=NAN)])
    assert [item.name for item in tmp_path.iterdir()] == ["p.jsonl"]
    with pytest.raises(ValueError, match="`path` must be a file to write, got the folder"):
        PredictionWriter(tmp_path)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_processes_deal_their_lines_back_in_turn(tmp_path, monkeypatch, count):
    path, ranks, writers = tmp_path / "p.jsonl", [0], []
    monkeypatch.setattr(predictions, "process_rank", lambda: ranks[-1])
    monkeypatch.setattr(predictions, "world_size", lambda: 2)
    for rank in (0, 1):
        ranks.append(rank)
        writers.append(PredictionWriter(path).__enter__())
        writers[rank].add([Answer(index) for index in range(rank, count, 2)])
    monkeypatch.setattr(predictions, "gather_objects", lambda item: writers[1]._file.close())  # where they wait for each other
    for rank in (0, 1):
        ranks.append(rank)
        writers[rank].__exit__(None, None, None)
    assert [answer.sent_id for answer in PredictionFile(path)] == list(range(count))
    assert [item.name for item in tmp_path.iterdir()] == ["p.jsonl"]


BAD = {
    "truncated JSON": (
        '{"sent_id": 1, "mask": {"size": [4, 6], "cou',
        "must be a JSON object, got what cannot be read as one (Unterm",
    ),
    "no JSON": ("a mask", "must be a JSON object, got what cannot be read as one (Expecting value"),
    "bytes that are no text": ("\udcff\udcfe{}", "cannot be read as one"),
    "brackets without end": ("[" * 100_000, "cannot be read as one"),
    "a list": ([1, SQUARE], "must be a JSON object, got a list."),
    "a misspelt name": ({"sentid": 1, "mask": SQUARE}, "(and text, image_id) alone, got 'sentid'."),
    "a name of another format": (line(no_target_prob=0.5), "alone, got 'no_target_prob'."),
    "no sent_id": ({"mask": SQUARE}, "must have `sent_id`, got none."),
    "a sent_id that is text": (line("1"), "must have a whole number as `sent_id`, got a string."),
    "a sent_id that is a fraction": (line(1.0), "must have a whole number as `sent_id`, got a fraction."),
    "a sent_id that is true": (line(True), "must have a whole number as `sent_id`, got true or false."),
    "a sent_id beyond 64 bits": (line(2**70), "must have a whole number as `sent_id`, got a number."),
    "a ref_id that is a list": (line(ref_id=[2]), "must have a whole number as `ref_id`, got a list."),
    "a probability that is none": (line(no_target=NAN), "must have a probability in [0, 1] as `no_target`, got NaN."),
    "a logit as probability": (line(no_target=3.2), "must have a probability in [0, 1] as `no_target`, got 3.2."),
    "a word as probability": (line(no_target="yes"), 'must have a probability in [0, 1] as `no_target`, got "yes".'),
    "a mask of pixels": (line(mask=[[0, 1], [1, 0]]), 'must have a run-length encoding {"size": [height, width], '),
    "a mask without a size": (line(mask={"counts": [24]}), "as `mask`, got an object."),
    "a mask without counts": (line(mask={"size": [4, 6]}), "as `mask`, got an object of another form."),
    "a mask of no height": (line(mask={"size": [0, 6], "counts": []}), "as `mask`, got an object of another form."),
    "runs that do not fill": (
        line(mask={"size": [4, 6], "counts": [5, 3]}),
        "must be runs that fill 4 x 6 pixels, got a sum of 8.",
    ),
    "runs that are negative": (line(mask={"size": [4, 6], "counts": [30, -6]}), "must be runs that fill 4 x 6 pixels"),
    "a cut encoding": (
        line(mask={"size": [4, 6], "counts": "5`"}),
        "a `mask` that cannot be decoded: decode_rle: `counts` must be",
    ),
    "an encoding of other letters": (line(mask={"size": [4, 6], "counts": "5 3"}), "must be COCO's run-length text"),
    "boxes without scores": (line(boxes=[[0, 0, 1, 1]]), "got 1 of boxes and nothing as `scores`."),
    "scores of another number": (line(boxes=[[0, 0, 1, 1]], scores=[0.5, 0.4]), "got 1 of boxes and 2 of scores."),
    "a score that is none": (line(boxes=[[0, 0, 1, 1]], scores=[NAN]), "must have numbers in [0, 1] as `scores`, got NaN."),
    "a score above 1": (line(boxes=[[0, 0, 1, 1]], scores=[97]), "must have numbers in [0, 1] as `scores`, got 97."),
    "a box of three numbers": (line(boxes=[[0, 0, 1]], scores=[0.5]), "must have boxes of four finite numbers, x0, y0, x1 and y1"),
    "a box without end": (
        line(boxes=[[0, 0, INFINITY, 1]], scores=[0.5]),
        "four finite numbers, x0, y0, x1 and y1 in pixels, got [0, 0",
    ),
    "a box of width and height": (line(boxes=[[5, 5, 2, 2]], scores=[0.5]), "must have boxes with x0 <= x1 and y0 <= y1, got [5"),
}


def assert_one_clear_line(error: BaseException, *expected: str) -> None:
    message = str(error)
    assert all(part in message for part in expected), message
    assert "\n" not in message
    assert message.endswith(".")
    assert len(message) < 400


@pytest.mark.parametrize("case", BAD)
def test_a_line_that_is_wrong_is_named(tmp_path, case):
    content, expected = BAD[case]
    path = tmp_path / "p.jsonl"
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_bytes(f"{json.dumps(line(8))}\n\n{text}\n".encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="PredictionFile: line 3 of ") as caught:
        PredictionFile(path)
    assert_one_clear_line(caught.value, expected)


FILES = {
    "no line": ([], "must hold a line per expression, got an empty file."),
    "an expression twice": ([line(1), line(2), line(1)], "line 3 of ", "another expression than line 1, got sent_id 1 again."),
    "some with a probability": (
        [line(1, no_target=0.5), line(2)],
        "or none must have `no_target`, got line 1 and line 2 that differ.",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_lines_that_do_not_go_together(tmp_path, case):
    lines, *expected = FILES[case]
    with pytest.raises(ValueError, match="PredictionFile: ") as caught:
        PredictionFile(write(tmp_path / "p.jsonl", *lines))
    assert_one_clear_line(caught.value, *expected)


def test_a_file_that_is_not_there(tmp_path):
    for path in (tmp_path, tmp_path / "nothing.jsonl"):
        with pytest.raises(FileNotFoundError, match="`path` must be a file of predictions") as caught:
            PredictionFile(path)
        assert_one_clear_line(caught.value, "which is none.")


OTHERS = {
    "an unknown id": (
        [line(1), line(2), line(3)],
        [(7, 1), (7, 2)],
        "line 3 of ",
        "of the data set, got sent_id 3, which it does not have.",
    ),
    "missing samples": (
        [line(1)],
        [(7, 1), (7, 2), (7, 3)],
        "must answer all 3 expressions, got no answer to 2 of them, the first is sent_id 2.",
    ),
    "another reference": (
        [line(1, ref_id=6)],
        [(7, 1)],
        "line 1 of ",
        "must be of ref_id 7, as the data set has it, got sent_id 1 of ref_id 6.",
    ),
    "an expression under two references": (
        [line(1), line(1, ref_id=7)],
        [(7, 1)],
        "line 2 of ",
        "than line 1, got sent_id 1 of ref_id 7",
    ),
    "ids that are not enough": (
        [line(1), line(2)],
        [(7, 1), (8, 1)],
        "line 1 of ",
        "must have `ref_id`, as the data set uses one `sent_id`",
    ),
    "a reference of several that is missing": ([line(1, ref_id=7)], [(7, 1), (8, 1)], "the first is sent_id 1 of ref_id 8."),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_file_for_another_data_set(tmp_path, case):
    lines, wanted, *expected = OTHERS[case]
    with pytest.raises(ValueError, match="PredictionFile: ") as caught:
        PredictionFile(write(tmp_path / "p.jsonl", *lines)).places(wanted)
    assert_one_clear_line(caught.value, *expected)


def test_one_id_for_several_expressions_is_told_apart_by_the_reference(tmp_path):
    file = PredictionFile(write(tmp_path / "p.jsonl", line(1, ref_id=8), line(1, ref_id=7), line(2, ref_id=7)))
    assert file.places([(7, 1), (8, 1), (7, 2)]) == [1, 0, 2]


def test_an_answer_of_another_size(tmp_path):
    file = PredictionFile(
        write(tmp_path / "p.jsonl", line(1, boxes=[[0, 0, 6.5, 4]], scores=[1]), line(2, boxes=[[7, 0, 9, 2]], scores=[1]))
    )
    assert tuple(file.answer(0, (4, 6)).mask.shape) == (4, 6)
    with pytest.raises(ValueError, match="PredictionFile: line 1 of ") as caught:
        file.answer(0, (6, 4))
    assert_one_clear_line(caught.value, "must have a mask of height and width (6, 4), at which the truth is scored, got (4, 6).")
    with pytest.raises(ValueError, match="PredictionFile: line 2 of ") as caught:
        file.answer(1, (4, 6))
    assert_one_clear_line(caught.value, "must have boxes that touch the picture of height and width (4, 6), got [7, 0, 9, 2].")


def test_a_huge_encoding_is_refused_before_it_is_decoded(tmp_path):
    data = SyntheticGRES("val", 1)
    huge = {"size": [10**7, 10**7], "counts": [10**14]}
    with pytest.raises(
        ValueError, match=r"of height and width \(64, 64\), at which the truth is scored, got \(10000000, 10000000\)"
    ):
        score_predictions(write(tmp_path / "p.jsonl", line(data[0].sent_id, mask=huge)), data)


def test_numbers_survive_as_they_are(tmp_path):
    probability = math.nextafter(0.7, 0)
    with PredictionWriter(tmp_path / "p.jsonl") as writer:
        writer.add([Answer(1, no_target=probability)])
    assert PredictionFile(tmp_path / "p.jsonl")[0].no_target == probability
