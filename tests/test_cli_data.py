"""``gresbox data verify`` and ``gresbox data convert``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from gresbox import cli
from gresbox.data import GRefCOCO, synthesize

SQUARE = [1, 1, 5, 1, 5, 5, 1, 5]
RECORDS = [
    {"text": ["the square", "a square"], "ann_ids": [3]},
    {"text": "the dog", "ann_ids": [], "file_name": "sub/a.png", "split": "val"},
]


@pytest.fixture
def shapes(tmp_path) -> Path:
    return synthesize(tmp_path / "shapes", sizes={"train": 3, "val": 2})


@pytest.fixture
def own(tmp_path) -> Path:
    """Data of one's own: a picture, instances, expressions."""
    (tmp_path / "pictures" / "sub").mkdir(parents=True)
    Image.new("RGB", (16, 12)).save(tmp_path / "pictures" / "sub" / "a.png")
    content = {
        "images": [{"id": 1, "file_name": "sub/a.png", "height": 12, "width": 16}],
        "annotations": [{"id": 3, "image_id": 1, "category_id": 1, "segmentation": [SQUARE]}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(content))
    (tmp_path / "expressions.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    return tmp_path


def convert(own: Path, out: str = "mine", **changed: str) -> list[str]:
    given = {"instances": "instances.json", "expressions": "expressions.jsonl", "images": "pictures", **changed}
    return ["data", "convert", str(own / out), *(word for name, file in given.items() for word in (f"--{name}", str(own / file)))]


def test_a_good_folder_is_told_and_written(shapes, tmp_path, capsys):
    assert cli.main(["data", "verify", str(shapes), "--dataset", "grefcoco", "--out", str(tmp_path / "report.json")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("gRefCOCO (unc): grefcoco/grefs(unc).json")
    assert printed.endswith("every sample can be read\n")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["ok"] is True
    assert report["benchmarks"][0]["counts"]["val"] == [2, 2, 2]


def test_a_broken_folder_is_an_error_after_its_report(shapes, tmp_path, capsys):
    missing = sorted((shapes / "images" / "train2014").iterdir())[0]
    missing.unlink()
    assert cli.main(["data", "verify", str(shapes), "--out", str(tmp_path / "report.json")]) == 1
    told = capsys.readouterr()
    assert f"problem: 1 pictures that are missing: {missing.name}" in told.out
    assert told.err == "gresbox: error: gresbox data verify: every sample must be readable, got problems; the report lists them.\n"
    assert json.loads((tmp_path / "report.json").read_text())["ok"] is False
    assert cli.main(["data", "verify", str(shapes), "--no-images"]) == 0


def test_own_data_is_converted_and_read(own, capsys):
    assert cli.main(convert(own)) == 0
    assert f"train on it with: gresbox train --data {own / 'mine'}" in capsys.readouterr().out
    assert [(one.text, one.kind) for one in GRefCOCO(own / "mine", "train")] == [("the square", "one"), ("a square", "one")]
    assert [(one.text, one.kind) for one in GRefCOCO(own / "mine", "val")] == [("the dog", "zero")]
    assert cli.main([*convert(own, "linked"), "--link"]) == 0
    assert (own / "linked" / "images" / "train2014" / "sub_a.png").is_symlink()


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("verify nowhere", "`root` must hold a folder of grefcoco, refcoco, refcoco+, "),
        ("verify {shapes} --dataset refzom", "`root` must hold the Ref-ZOM dataset, got"),
        ("verify {shapes} --images nowhere", "every sample must be readable, got problems"),
        ("verify {broken}", "grefs(unc).json is not JSON"),
        (
            "convert {own}/mine --instances {own}/nothing --expressions {own}/expressions.jsonl --images {own}",
            "`instances` must be a file",
        ),
        (
            "convert {own}/mine --instances {own}/instances.json --expressions {own}/nothing --images {own}",
            "`expressions` must be a file",
        ),
        (
            "convert {own}/mine --instances {own}/instances.json --expressions {own}/expressions.jsonl --images {own}",
            "picture 1 is missing: ",
        ),
        (
            "convert {own} --instances {own}/instances.json --expressions {own}/expressions.jsonl --images {own}/pictures",
            "`out_dir` must not exist",
        ),
        ("convert {own}/mine --instances {own}/instances.json --expressions {own}/bad.jsonl --images {own}/pictures", "line 2 of "),
        (
            "convert {own}/mine --instances {own}/instances.json --expressions {own}/other.jsonl --images {own}/pictures",
            "expression 1 refers to annotation 4",
        ),
    ],
)
def test_a_mistake_is_one_line(shapes, own, tmp_path, capsys, command, expected):
    (own / "bad.jsonl").write_text(json.dumps(RECORDS[0]) + '\n{"text": "the do')
    (own / "other.jsonl").write_text(json.dumps({"text": "it", "ann_ids": [4]}))
    broken = synthesize(tmp_path / "broken", sizes={"val": 1})
    (broken / "grefcoco" / "grefs(unc).json").write_text('[{"ref_id": 1')
    assert cli.main(["data", *command.format(shapes=shapes, own=own, broken=broken).split()]) == 1
    line = capsys.readouterr().err
    assert line.startswith("gresbox: error: ")
    assert line.count("\n") == 1
    assert expected in line, line
    assert not (own / "mine").exists()


@pytest.mark.parametrize("command", ["data verify", "data verify . --dataset coco", "data convert x", "data convert --instances a"])
def test_a_wrong_argument_is_one_line(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(command.split())
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
