"""``gresbox evaluate`` and ``gresbox score`` on a tiny folder of each benchmark, through the command alone."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path

import pytest
import torch
from PIL import Image

from gresbox import cli
from gresbox.cli import scoring
from gresbox.data import CORRUPTIONS, GRefCOCO
from gresbox.metrics import ThresholdSweep
from gresbox.models import create_model
from gresbox.training import Answer, PredictionFile, PredictionWriter
from gresbox.training.scoring import METRICS

SHAPES = importlib.util.spec_from_file_location("benchmark_files", Path(__file__).parent / "data" / "conftest.py")
GRES = {"gIoU", "cIoU", "N_acc", "T_acc", "Pr@0.7", "Pr@0.8", "Pr@0.9"}
RES = {"mIoU", "oIoU", "Pr@0.5", "Pr@0.6", "Pr@0.7", "Pr@0.8", "Pr@0.9"}
KEYS = {
    "grefcoco": GRES,
    "refcoco": RES,
    "refcoco+": RES,
    "refcocog": RES,
    "refzom": RES | {"Acc", "mIoU_one", "oIoU_one", "mIoU_many", "oIoU_many"},
    "rrefcoco": {"mIoU", "oIoU", "mRR", "rIoU"},
    "rrefcoco+": {"mIoU", "oIoU", "mRR", "rIoU"},
}


def write_benchmark(files, dataset: str) -> Path:
    """Six expressions of two noisy pictures."""
    folder, name = {
        "grefcoco": ("grefcoco", "grefs(unc).json"),
        "refcocog": ("refcocog", "refs(umd).p"),
        "refzom": ("ref-zom", "refs(final).p"),
    }.get(dataset, (dataset, "refs(unc).p"))
    split = "test" if dataset == "refzom" else "val"
    refs = [
        files.ref(1, [1], "the square", "a square", source="one", split=split),
        files.ref(2, [2], "the wide thing", source="one", split=split, image_id=8),
    ]
    if dataset in ("grefcoco", "refzom"):
        refs += [files.ref(3, [1, 3], "both", source="many", split=split)]
        refs += [files.ref(4, [-1], "nothing", "no dog", source="zero", split=split)]
    if dataset.startswith("rref"):
        for ref in refs:
            ref["ann_id"] = ref["ann_id"][0]
            lie = {**ref["sentences"][0], "sent_id": 500 + ref["ref_id"], "raw": "a lie", "exist": False}
            ref["sentences"].append(lie)
    anns = [files.ann(1), files.ann(2, [files.wide], image_id=8), files.ann(3, [files.wide])]
    root = files.write(folder, name, refs, anns, image_ids=(7, 8))
    for number in (7, 8):
        Image.effect_noise((16, 12), 80).convert("RGB").save(root / "images" / "train2014" / files.name(number))
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("cli_scoring") / "model"
    numbers = {"dim": 32, "num_queries": 4, "num_layers": 1, "pixel_layers": 1}
    create_model("instalign_tiny", image_size=64, **numbers).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> dict[str, Path]:
    module = importlib.util.module_from_spec(SHAPES)
    SHAPES.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("benchmarks")
    return {name: write_benchmark(module.Files(folder / name.replace("+", "_plus")), name) for name in KEYS}


def numbers(path: Path) -> dict[str, object]:
    content = json.loads(path.read_text())
    return {name: value for name, value in content.items() if isinstance(value, float) or name == "sweep"}


@pytest.mark.parametrize("resized", [False, True])
@pytest.mark.parametrize("dataset", KEYS)
def test_the_file_that_evaluate_writes_scores_as_evaluate_did(checkpoint, roots, tmp_path, monkeypatch, capsys, dataset, resized):
    monkeypatch.chdir(tmp_path)
    data = ["--data", str(roots[dataset]), "--dataset", dataset, "--threshold", "0.54"]
    evaluate = ["evaluate", "--checkpoint", str(checkpoint), *data, "--cpu", "--quiet", "--batch", "4", "--out", "evaluated.json"]
    assert cli.main([*evaluate, "--predictions", "p.jsonl", *(["--resized"] if resized else [])]) == 0
    printed = capsys.readouterr().out
    lines = Path("p.jsonl").read_text().splitlines(keepends=True)
    random.Random(0).shuffle(lines)
    Path("p.jsonl").write_text("".join(lines))
    score = ["score", *data, "--predictions", "p.jsonl", "--out", "scored.json", *(["--resized", "64"] if resized else [])]
    assert cli.main(score) == 0
    assert capsys.readouterr().out == printed
    assert numbers(Path("scored.json")) == numbers(Path("evaluated.json"))
    content = json.loads(Path("scored.json").read_text())
    assert KEYS[dataset] <= content.keys()
    assert (content["dataset"], content["split"]) == (dataset, "test" if dataset == "refzom" else "val")
    assert content["resized"] == (64 if resized else None)
    answers = list(PredictionFile("p.jsonl"))
    assert len(answers) == content["samples"]
    assert {tuple(answer.mask.shape) for answer in answers} == {(64, 64) if resized else (12, 16)}
    assert not list(tmp_path.rglob("*.partial*"))


@pytest.mark.parametrize("dataset", ["refcoco", "refzom", "rrefcoco"])
def test_training_on_a_benchmark_reports_its_own_metric(roots, tmp_path, dataset):
    small = ["--set", "dim=32", "--set", "num_queries=4", "--set", "num_layers=1", "--set", "pixel_layers=1", "--image-size", "64"]
    split = "test" if dataset == "refzom" else "val"
    data = ["--data", str(roots[dataset]), "--dataset", dataset, "--train-split", split, "--resized"]
    command = ["train", *data, *small, "--batch", "2", "--max-steps", "1", "--pictures", "0", "--cpu", "--quiet"]
    assert cli.main([*command, "--out", str(tmp_path / "run")]) == 0
    assert KEYS[dataset] <= json.loads((tmp_path / "run" / "metrics.json").read_text()).keys()
    assert "lie" in (tmp_path / "run" / "tokenizer.json").read_text() or dataset != "rrefcoco"  # the training texts' words


def truth(root: Path, path: Path, size: int | None = None) -> Path:
    """The right answers to gRefCOCO's expressions."""
    data = GRefCOCO(root, "val", images=False, size=size)
    with PredictionWriter(path) as writer:
        for index in range(len(data)):
            target = data.target(index)
            writer.add([Answer(data.info(index).sent_id, target.merged, 0.9 if target.no_target else 0.2)])
    return path


def test_a_sweep_is_printed_drawn_and_written(roots, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["score", "--data", str(roots["grefcoco"]), "--predictions", str(truth(roots["grefcoco"], Path("p.jsonl")))]
    assert cli.main([*command, "--sweep", "--plot", "curves.png", "--out", "s.json"]) == 0
    printed = capsys.readouterr().out
    assert "6 expressions, 33.3 % without a target; AUROC 100.0, AP 100.0" in printed
    content = json.loads(Path("s.json").read_text())
    assert (content["gIoU"], content["T_acc"]) == (100, 100)
    sweep = content["sweep"]
    assert len(sweep["threshold"]) == len(sweep["gIoU"]) == len(ThresholdSweep().thresholds)
    assert (sweep["T_acc"][10], sweep["N_acc"][95]) == (0, 0)
    with Image.open("curves.png") as picture:
        assert picture.width > 300


@pytest.mark.parametrize("size", [None, 480])
def test_the_truth_about_real_photos_scores_full_marks(realdata, tmp_path, size):
    root, path = realdata / "grefcoco_mini", tmp_path / "p.jsonl"
    assert cli.main(["data", "verify", str(root)]) == 0
    command = ["score", "--data", str(root), "--predictions", str(truth(root, path, size)), "--out", str(tmp_path / "s.json")]
    assert cli.main([*command, *(["--resized"] if size else [])]) == 0
    scores = json.loads((tmp_path / "s.json").read_text())
    assert {scores[name] for name in GRES} == {100.0}
    assert (scores["samples"], scores["resized"]) == (33, size)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--threshold 0.1", {"T_acc": 0.0, "N_acc": 100.0}),
        ("--threshold 0.95", {"T_acc": 100.0, "N_acc": 0.0}),
        ("--threshold none", {"T_acc": 100.0, "N_acc": 100.0}),
        ("--set no_target_rule=pixels --set min_pixels=30", {"T_acc": 25.0, "N_acc": 100.0}),
        ("--metric refzom", {"mIoU": 100.0, "Acc": 100.0, "oIoU_many": 100.0}),
    ],
)
def test_who_decides_and_whose_rules(roots, tmp_path, capsys, options, expected):
    path = truth(roots["grefcoco"], tmp_path / "p.jsonl")
    command = ["score", "--data", str(roots["grefcoco"]), "--predictions", str(path), "--out", str(tmp_path / "s.json")]
    assert cli.main([*command, *options.split()]) == 0
    assert json.loads((tmp_path / "s.json").read_text()).items() >= expected.items()


def test_boxes_by_the_rules_of_detection(roots, tmp_path, capsys):
    data = GRefCOCO(roots["grefcoco"], "val", images=False)
    lines = []
    for index in range(len(data)):
        boxes = [[1, 1, 5, 5]] if data.info(index).kind != "zero" else []
        lines.append(json.dumps({"sent_id": data.info(index).sent_id, "boxes": boxes, "scores": [0.7] * len(boxes)}))
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    command = ["score", "--data", str(roots["grefcoco"]), "--predictions", str(tmp_path / "p.jsonl"), "--metric", "grec"]
    assert cli.main([*command, "--out", str(tmp_path / "s.json"), "--set", "iou_type=iou"]) == 0
    scores = json.loads((tmp_path / "s.json").read_text())
    assert (scores["F1"], scores["N_acc"], scores["T_acc"]) == (pytest.approx(400 / 6), 100.0, 100.0)
    assert scores["options"] == {"iou_type": "iou"}


def test_corruptions_spoil_the_pictures_alone(checkpoint, roots, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = {}
    for name in ("", *CORRUPTIONS):
        command = [
            "evaluate",
            "--checkpoint",
            str(checkpoint),
            "--data",
            str(roots["refcoco"]),
            "--cpu",
            "--quiet",
            "--dataset",
            "refcoco",
        ]
        spoilt = ["--corrupt", name, "--severity", "5"] if name else []
        assert cli.main([*command, *spoilt, "--limit", "3", "--predictions", "p.jsonl", "--out", "e.json"]) == 0
        content = json.loads(Path("e.json").read_text())
        assert (content.get("corrupt", ""), content.get("severity")) == (name, 5 if name else None)
        found[name] = [answer.no_target for answer in PredictionFile("p.jsonl")]
    assert len({tuple(answers) for answers in found.values()}) == 8
    assert tuple(CORRUPTIONS) == scoring.CORRUPTIONS


def test_the_command_names_the_metrics_that_there_are():
    assert tuple(METRICS) == scoring.METRICS


@pytest.mark.filterwarnings("default")
def test_what_is_undefined_is_noted_and_null(roots, tmp_path, capsys):
    command = ["score", "--data", str(roots["grefcoco"]), "--predictions", str(truth(roots["grefcoco"], tmp_path / "p.jsonl"))]
    lines = (tmp_path / "p.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "p.jsonl").write_text("".join(lines[:4]))
    assert cli.main([*command, "--limit", "4", "--metric", "refzom", "--out", str(tmp_path / "s.json")]) == 0
    noted = capsys.readouterr()
    assert noted.err.startswith("gresbox: note: RefZOMMetric.compute: Acc ")
    assert noted.err.count("\n") == 1
    assert json.loads((tmp_path / "s.json").read_text())["Acc"] is None
    assert "nan" in noted.out


MISTAKES = {
    "no file": ("--predictions nothing.jsonl", "`path` must be a file of predictions, got nothing.jsonl"),
    "truncated JSON": ("--predictions cut.jsonl", "PredictionFile: line 6 of cut.jsonl must be a JSON object"),
    "an unknown id": (
        "--predictions unknown.jsonl",
        "line 7 of unknown.jsonl must answer an expression of the data set, got sent_id 9",
    ),
    "an id twice": (
        "--predictions twice.jsonl",
        "line 7 of twice.jsonl must answer another expression than line 1, got sent_id 10 again.",
    ),
    "missing samples": ("--predictions missing.jsonl", "got no answer to 5 of them, the first is sent_id 11."),
    "an empty file": ("--predictions empty.jsonl", "must hold a line per expression, got an empty file."),
    "another size": (
        "--predictions right.jsonl --resized 480",
        "height and width (480, 480), at which the truth is scored, got (12, 16).",
    ),
    "a score that is none": (
        "--predictions nan.jsonl",
        "line 7 of nan.jsonl must have a probability in [0, 1] as `no_target`, got NaN.",
    ),
    "no boxes": ("--predictions right.jsonl --metric grec", "must have `boxes`, which GRECMetric reads, got none."),
    "another benchmark's metric": (
        "--predictions right.jsonl --metric rrefcoco",
        "must be one of 'gres', 'grec', 'refzom' on gRefCOCO",
    ),
    "one target's metric": (
        "--predictions right.jsonl --metric res",
        "gresbox score: `metric` must be one of 'gres', 'grec', 'refzom'",
    ),
    "no probabilities": ("--predictions masks.jsonl --sweep", 'must have `no_target`, the probability of "nothing" that a sweep'),
    "another data set": ("--predictions right.jsonl --dataset refcoco", "`root` must hold the RefCOCO dataset, got"),
    "another split": ("--predictions right.jsonl --split testC", "`split` must be one of 'val', got 'testC'."),
    "a threshold": ("--predictions right.jsonl --threshold 2", "`no_target_threshold` must be in [0, 1], got 2.0."),
    "a plot of nothing": ("--predictions right.jsonl --plot a.png", "`--plot` must come with --sweep, whose curves it draws."),
    "a plot of no format": (
        "--predictions right.jsonl --sweep --plot a.doc",
        "`--plot` must end in one of .png, .pdf, .svg, got 'a.doc'.",
    ),
    "a folder to write": ("--predictions right.jsonl --out .", "must be files, got the folder ."),
    "an option that is none": (
        "--predictions right.jsonl --set pixels=3",
        "'gres' has no option 'pixels'. Options: no_target_rule, min",
    ),
    "an option without value": (
        "--predictions right.jsonl --set pixels",
        "gresbox score: `--set` must be KEY=VALUE, got 'pixels'.",
    ),
    "a square of no size": ("--predictions right.jsonl --resized 0", "`size` must be at least 1, got 0."),
    "a partition of gRefCOCO": (
        "--predictions right.jsonl --split-by unc",
        "`--split-by` must come with one of RefCOCO's data sets",
    ),
    "a limit": ("--predictions right.jsonl --limit 0", "`limit` must be at least 1, got 0."),
    "a data set of no files": (
        "--predictions right.jsonl --data synthetic --dataset refcoco",
        "`--dataset` must come with the folder",
    ),
    "synthetic for files": ("--predictions right.jsonl --data synthetic --size 3", "got sent_id 10, which it does not have."),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(roots, tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    right = truth(roots["grefcoco"], Path("right.jsonl")).read_text()
    first, *_ = lines = right.splitlines(keepends=True)
    Path("cut.jsonl").write_text(right[:-30])
    Path("unknown.jsonl").write_text(right + first.replace('"sent_id": 10', '"sent_id": 99'))
    Path("twice.jsonl").write_text(right + first)
    Path("missing.jsonl").write_text(first)
    Path("empty.jsonl").write_text("\n")
    Path("nan.jsonl").write_text(right + lines[0].replace('"no_target": 0.2', '"no_target": NaN'))
    Path("masks.jsonl").write_text(
        "".join(line.replace('"no_target": 0', '"no_target": null, "text": "0').replace(', "mask"', '", "mask"') for line in lines)
    )
    options, expected = MISTAKES[case]
    data = [] if "--data " in options else ["--data", str(roots["grefcoco"])]
    assert cli.main(["score", *data, *options.split(), *([] if "--out" in options else ["--out", "s.json"])]) == 1
    line = capsys.readouterr().err
    assert line.startswith("gresbox: error: ")
    assert line.count("\n") == 1
    assert expected in line, line
    assert not Path("s.json").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--corrupt fog", "Corrupt: `name` must be one of 'occlusion', 'gaussian_noise'"),
        ("--corrupt haze --severity 6", "`severity` must be in [1, 5], got 6."),
        ("--severity 2", "gresbox evaluate: `--severity` must come with --corrupt."),
        ("--predictions .", "must be files, got the folder ."),
        ("--metric rrefcoco", "gresbox evaluate: `metric` must be one of 'gres', 'grec', 'refzom' on the synthetic benchmark"),
        ("--data {root} --dataset refzom --split val", "RefZOM: `split` must be one of 'test', got 'val'."),
        ("--data {root} --dataset refzom --metric res", "must be one of 'refzom', 'gres', 'grec' on Ref-ZOM, got 'res'."),
        ("--data {root} --dataset refzom --images nowhere", "`images` must be a folder of pictures, got nowhere"),
    ],
)
def test_a_mistake_of_evaluation_is_one_line(checkpoint, roots, tmp_path, monkeypatch, capsys, options, expected):
    monkeypatch.chdir(tmp_path)
    command = ["evaluate", "--checkpoint", str(checkpoint), "--cpu", "--quiet", "--size", "2"]
    assert cli.main([*command, *options.format(root=roots["refzom"]).split()]) == 1
    line = capsys.readouterr().err
    assert line.startswith("gresbox: error: ")
    assert line.count("\n") == 1
    assert expected in line, line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command", ["score", "score --predictions", "score --predictions p --metric miou", "score --predictions p --dataset coco"]
)
def test_a_wrong_argument_is_one_line(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(command.split())
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
