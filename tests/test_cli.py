from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from gresbox import cli
from gresbox.blocks import AlignmentAwareMasking
from gresbox.data import GRefCOCO
from gresbox.models import load_model
from gresbox.training import AlignmentMaskedTraining

SMALL = [
    *("--image-size", "64", "--set", "dim=32", "--set", "num_queries=4", "--set", "num_layers=1", "--set", "pixel_layers=1"),
    *("--train-size", "16", "--val-size", "6", "--batch", "4", "--cpu", "--quiet"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "run"
    assert (
        cli.main(["train", *SMALL, "--max-steps", "3", "--log-every", "1", "--out", str(out), "--set", "object_text=shared"]) == 0
    )
    return out


def test_train_leaves_a_whole_run(run):
    names = {item.name for item in run.iterdir()}
    wanted = {"config.json", "metrics.json", "model.safetensors", "loss_curve.png", "pictures.png", "log.jsonl", "run.json"}
    assert wanted <= names
    metrics = json.loads((run / "metrics.json").read_text())
    assert {"gIoU", "cIoU", "N_acc", "T_acc", "Pr@0.7", "steps", "seconds", "seed"} <= metrics.keys()
    assert (metrics["steps"], metrics["samples"], metrics["seed"]) == (3, 6, 0)
    assert json.loads((run / "run.json").read_text())["options"]["max_steps"] == 3
    for name in ("loss_curve.png", "pictures.png"):
        with Image.open(run / name) as picture:
            assert picture.size > (300, 300)
    model = load_model(str(run))
    assert (model.config.dim, model.config.object_text, model.processor.image_size) == (32, "shared", 64)


def test_training_starts_from_a_saved_model_and_repeats_itself(run, tmp_path):
    for name in ("first", "second"):
        command = ["train", "--init", str(run), "--train-size", "8", "--val-size", "2", "--batch", "2", "--max-steps", "1"]
        assert cli.main([*command, "--cpu", "--quiet", "--pictures", "0", "--out", str(tmp_path / name)]) == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert weights[0] == weights[1]
    assert not (tmp_path / "first" / "pictures.png").exists()


def test_evaluate_prints_and_writes(run, tmp_path, capsys):
    out = tmp_path / "scores.json"
    command = ["evaluate", "--checkpoint", str(run), "--data", "synthetic", "--split", "val", "--size", "6", "--cpu", "--quiet"]
    assert cli.main([*command, "--out", str(out)]) == 0
    scores, metrics = json.loads(out.read_text()), json.loads((run / "metrics.json").read_text())
    assert scores["gIoU"] == pytest.approx(metrics["gIoU"], abs=1e-6)
    printed = capsys.readouterr().out
    assert f"gIoU              {scores['gIoU']:10.2f}" in printed
    assert "no_target_share" in printed


def test_predict_writes_an_overlay(run, tmp_path, capsys):
    picture, out = tmp_path / "photo.jpg", tmp_path / "answers" / "overlay.png"
    Image.effect_noise((90, 60), 50).convert("RGB").save(picture)
    command = ["predict", "--checkpoint", str(run), "--image", str(picture), "--text", "the red circle", "--out", str(out), "--cpu"]
    assert cli.main(command) == 0
    assert "no-target probability" in capsys.readouterr().out
    with Image.open(out) as overlay:
        assert overlay.width > 200


def test_synthesize_then_train_on_the_files(tmp_path, capsys):
    out = tmp_path / "shapes"
    assert cli.main(["data", "synthesize", str(out), "--train", "6", "--val", "3", "--testA", "0", "--testB", "0"]) == 0
    assert "6 train, 3 val" in capsys.readouterr().out
    assert len(GRefCOCO(out, "train")) == 6
    command = ["train", "--data", str(out), *SMALL, "--max-steps", "2", "--val-split", "train", "--evaluate-start", "--resized"]
    assert cli.main([*command, "--out", str(tmp_path / "run"), "--pictures", "2"]) == 0
    assert "6 samples, 2 steps" in capsys.readouterr().out


def test_masked_training_is_a_switch(tmp_path):
    command = ["train", *SMALL, "--max-steps", "2", "--log-every", "1", "--pictures", "0"]
    assert cli.main([*command, "--aml", "--out", str(tmp_path / "plain")]) == 0
    options = ["--aml-threshold", "0.9", "--aml-relative", "--aml-drop", "1", "--aml-scale", "3", "--aml-clean-loss", "0.5"]
    options += ["--aml-block", "16", "--aml-protect-target", "--aml-score-dtype", "bfloat16"]
    assert cli.main([*command, "--aml", *options, "--out", str(tmp_path / "set")]) == 0
    assert cli.main([*command, "--aml", "--aml-drop", "0.5", "--out", str(tmp_path / "drop")]) == 0
    assert "drop=0.5, block=8, " in (tmp_path / "drop" / "run.json").read_text()  # an eighth of the picture stays an eighth
    plain, given = (json.loads((tmp_path / name / "run.json").read_text())["aml"] for name in ("plain", "set"))
    assert "scale=90.51, threshold=0.4, relative=False, drop=0.25, block=8, " in plain["masking"]
    assert (plain["clean_loss_weight"], plain["score_dtype"]) == (0, None)
    assert "scale=3, threshold=0.9, relative=True, drop=1.0, block=16, " in given["masking"]
    assert (given["clean_loss_weight"], given["score_dtype"]) == (0.5, "bfloat16")
    entries = [json.loads(line) for line in (tmp_path / "set" / "log.jsonl").read_text().splitlines()]
    assert entries[0]["aml/masked"] > 0
    assert entries[0]["aml/target_hidden"] == 0  # protected


def test_the_help_of_masked_training_names_its_own_defaults(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    numbers = inspect.signature(AlignmentAwareMasking).parameters
    weight = inspect.signature(AlignmentMaskedTraining).parameters["clean_loss_weight"].default
    for name, said in (("threshold", "in [0, 1]"), ("drop", "that is hidden"), ("block", "side of a block")):
        assert f"{said} (default: {numbers[name].default}" in text
    assert f"in [0, 1) (default: {weight})" in text


def test_folders_are_numbered_and_resumed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["train", *SMALL, "--max-steps", "1", "--pictures", "0"]
    assert cli.main(command) == 0
    assert cli.main(command) == 0
    assert cli.main([*command, "--resume"]) == 0
    assert sorted(item.name for item in Path("runs").iterdir()) == ["instalign_tiny", "instalign_tiny-2"]
    assert capsys.readouterr().out.count("runs/instalign_tiny-2: instalign_tiny, ") == 2


def test_models_are_listed_and_counted(capsys):
    assert cli.main(["models"]) == 0
    assert "instalign_swin_base" in capsys.readouterr().out.split()
    assert cli.main(["models", "instalign_tiny"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    counts = {row[0]: int(row[1].replace(",", "")) for row in rows}
    assert counts["aggregation"] == 1
    assert counts.pop("total") == sum(counts.values())


def test_env_names_versions(capsys):
    assert cli.main(["env"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in printed
    assert "\nTriton: " in printed


def test_env_says_where_kernels_run(capsys, monkeypatch):
    from gresbox.ops import _backend

    for name in ("TRITON_INTERPRET", "GRESBOX_DISABLE_TRITON"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_backend, "_TRITON", (3, 6))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    find_spec = _backend.importlib.util.find_spec
    monkeypatch.setattr(
        _backend.importlib.util, "find_spec", lambda name: "found" if name in _backend.ADAPTERS else find_spec(name)
    )
    assert cli.main(["env"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "Triton: not used, there is no CUDA device here" in printed
    assert "backend='deformops': usable on CUDA" in printed
    assert "backend='torch_linear_assignment': usable on the CPU and on CUDA" in printed


def test_help_is_quick_and_names_defaults_and_units():
    program = "import sys; from gresbox.cli import main\ntry: main(sys.argv[1:])\nfinally: print('torch' in sys.modules)"
    command = [sys.executable, "-X", "importtime", "-c", program, "train", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=True)
    text = " ".join(result.stdout.split())
    assert "(default: instalign_tiny)" in text
    assert "seconds between two checkpoints (default: 300.0)" in text
    assert "side of synthetic pictures" in text
    assert text.endswith("False")


@pytest.mark.parametrize(
    "command",
    ["train", "evaluate", "score", "predict", "data synthesize", "data verify", "data convert", "models", "env"],
)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([*command.split(), "--help"])
    assert ended.value.code == 0
    assert command in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("train --model instaling_tiny", "Did you mean 'instalign_tiny'?"),
        ("train --set queries=3", "has no option 'queries'"),
        ("train --set dim", "`--set` must be KEY=VALUE, got 'dim'."),
        ("train --data nowhere", "GRefCOCO: `root` must hold the gRefCOCO dataset, got nowhere. expected: ROOT/grefcoco"),
        ("train --max-steps 0", "`max_steps` must be at least 1, got 0."),
        ("train --model instalign_swin_tiny --max-steps 1", "`tokenizer` must be set"),
        ("train --init {run} --set dim=4", "must not come with --init"),
        ("train --out {run}", "`out` must be a new folder"),
        ("train --aml-drop 0.5", "gresbox train: `--aml-drop` must come with --aml."),
        ("train --aml-relative", "gresbox train: `--aml-relative` must come with --aml."),
        ("train --aml --aml-drop 2 --max-steps 1", "AlignmentAwareMasking: `drop` must be in [0, 1], got 2.0."),
        ("train --aml --aml-threshold -1 --max-steps 1", "`threshold` must be in [0, 1], got -1.0."),
        ("train --aml --aml-block 0 --max-steps 1", "`block` must be"),
        ("train --aml --aml-clean-loss 1 --max-steps 1", "`clean_loss_weight` must be at least 0 and below 1, got 1.0."),
        ("train --metric res --max-steps 1", "`metric` must be one of 'gres', 'grec', 'refzom' on the synthetic benchmark"),
        ("train --model caris_tiny --metric grec", "evaluate: `metric` must not be 'grec' for Caris, which predicts no boxes."),
        ("train --dataset refzom", "gresbox train: `--dataset` must come with the folder of a data set as --data."),
        ("train --threshold 1.5", "`no_target_threshold` must be in [0, 1], got 1.5."),
        ("train --threads 0", "`--threads` must be at least 1, got 0."),
        ("train --batch 5 --accumulate 2", "`batch` must be a multiple of processes x accumulate = 1 x 2, got 5."),
        ("evaluate --checkpoint nowhere", "no folder nowhere"),
        ("evaluate --checkpoint {run} --split valley", "`split` must be one of"),
        ("evaluate --checkpoint {run} --threshold 1.5", "`no_target_threshold` must be in [0, 1], got 1.5."),
        ("predict --checkpoint {run} --image nothing.png --text cat", "got nothing.png, which does not exist."),
        ("predict --checkpoint {run} --image {file} --text cat", "which cannot be read as one."),
        ("predict --checkpoint {run} --image {picture} --text ' '", "`texts` must not be empty"),
        ("predict --checkpoint {run} --image {picture} --text cat --out x.txt", "must end in one of .png"),
        ("data synthesize {run}", "`out_dir` must not exist or be empty"),
        ("models instalign", "list_models() shows all."),
    ],
)
def test_a_mistake_is_one_line(command, expected, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file.png").write_text("not a picture")
    Image.new("RGB", (8, 8)).save("picture.png")
    words = command.replace("' '", "BLANK").format(run=run, file="file.png", picture="picture.png").split()
    assert cli.main([" " if word == "BLANK" else word for word in words]) == 1
    line = capsys.readouterr().err
    assert line.startswith("gresbox: error: ")
    assert line.count("\n") == 1
    assert expected in line
    assert not list(tmp_path.rglob("*.partial*"))


@pytest.mark.parametrize(
    "command", ["", "trian", "train --max-steps many", "train --data", "predict --image x", "data", "train --lev full"]
)
def test_a_wrong_argument_is_one_line(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(command.split())
    assert ended.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert line.startswith("gresbox")
    assert "error: " in line
    assert "--help" in line


def test_the_module_is_the_command():
    command = [sys.executable, "-m", "gresbox.cli", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=True)
    assert "Generalised referring expression segmentation" in result.stdout


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="no model 'unknown'"):
        cli.main(["models", "unknown", "--debug"])


def test_an_interrupt_ends_with_a_line(monkeypatch, capsys):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("gresbox.models.create_model", interrupt)
    assert cli.main(["train", "--max-steps", "1"]) == 130
    assert "--resume" in capsys.readouterr().err
