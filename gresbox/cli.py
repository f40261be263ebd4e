"""The ``gresbox`` command: argument handling and printing; the work is done by the library."""

from __future__ import annotations

import argparse
import ast
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["main"]

DATASETS = ("grefcoco",)
INTERRUPTED = 130  # what a shell reports for Ctrl-C


class _Help(argparse.HelpFormatter):
    """Names the default where there is one to name."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        without = action.default is None or action.default is False or action.default in (argparse.SUPPRESS, [])
        if action.help is None or not action.option_strings or without:
            return action.help
        return f"{action.help} (default: {action.default})"


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, whose help names defaults, and that guesses no abbreviations."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": _Help, "allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; default: those of the process.

    Returns:
        0, 1 after an error, or 130 after Ctrl-C.
    """
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        print("gresbox: interrupted; a training goes on from its last checkpoint with --resume.", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if args.debug:
            raise
        print(f"gresbox: error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 1
    finally:
        _leave_processes()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="gresbox", description="Generalised referring expression segmentation: many things, one, or nothing.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for add in (_add_train, _add_evaluate, _add_predict, _add_data, _add_models, _add_env):
        add(commands)
    return parser


def _add_command(commands: Any, name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run)
    return parser


def _add_train(commands: Any) -> None:
    parser = _add_command(commands, "train", _train, "Train a model; the folder holds weights, metrics, a loss curve and pictures.")
    parser.add_argument("--model", default="instalign_tiny", metavar="NAME", help="a preset; 'gresbox models' lists them")
    parser.add_argument("--pretrained", action="store_true", help="fetch the encoders' weights and the tokenizer")
    parser.add_argument("--init", metavar="DIR", help="start from this saved model instead of a preset")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="replace a number of the preset; repeatable"
    )
    _add_data_options(parser)
    parser.add_argument("--train-split", default="train", metavar="SPLIT", help="split to train on")
    parser.add_argument("--val-split", default="val", metavar="SPLIT", help="split to evaluate on")
    parser.add_argument("--train-size", type=int, default=40_000, metavar="N", help="synthetic samples to train on")
    parser.add_argument("--val-size", type=int, default=1_000, metavar="N", help="synthetic samples to evaluate on")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the run (default: runs/MODEL, then runs/MODEL-2, ...)")
    parser.add_argument("--resume", action="store_true", help="continue the run in the folder from its last checkpoint")
    length = parser.add_argument_group("length and optimiser; where nothing is given, the model's recipe decides")
    length.add_argument("--max-steps", type=int, metavar="N", help="optimiser steps; wins over --epochs")
    length.add_argument("--epochs", type=float, metavar="E", help="passes over the training split")
    length.add_argument("--max-seconds", type=float, metavar="S", help="stop training after this many seconds, schedule or not")
    length.add_argument("--batch", type=int, metavar="B", help="samples per step, over all processes and accumulation steps")
    length.add_argument("--accumulate", type=int, default=1, metavar="A", help="micro-batches per step")
    length.add_argument("--lr", type=float, help="peak learning rate")
    length.add_argument("--clip", type=float, help="largest gradient norm; 0: none")
    length.add_argument("--schedule", choices=("linear", "step", "poly", "cosine", "constant"), help="learning-rate schedule")
    length.add_argument("--amp", choices=("no", "bf16", "fp16"), help="mixed precision")
    length.add_argument("--seed", type=int, default=0, help="seed of weights, data order and everything random")
    machine = parser.add_argument_group("machine and reports")
    _add_machine_options(machine)
    machine.add_argument("--log-every", type=int, default=20, metavar="N", help="steps between two entries of log.jsonl")
    machine.add_argument("--evaluate-every", type=int, default=0, metavar="N", help="steps between two evaluations; 0: at the end")
    machine.add_argument("--evaluate-start", action="store_true", help="evaluate before the first step too")
    machine.add_argument(
        "--checkpoint-every", type=int, default=0, metavar="N", help="steps between two checkpoints; 0: by the clock"
    )
    machine.add_argument("--checkpoint-seconds", type=float, default=300.0, metavar="S", help="seconds between two checkpoints")
    machine.add_argument("--pictures", type=int, default=8, metavar="N", help="answers to draw at the end")
    machine.add_argument("--tensorboard", action="store_true", help="write TensorBoard scalars")


def _add_evaluate(commands: Any) -> None:
    parser = _add_command(commands, "evaluate", _evaluate, "Score a saved model with the benchmark's metrics, in percent.")
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a run's folder, one of its checkpoints, or a hub id")
    _add_data_options(parser)
    parser.add_argument("--split", default="val", help="split to score")
    parser.add_argument("--size", type=int, default=1_000, metavar="N", help="synthetic samples to score")
    parser.add_argument("--limit", type=int, metavar="N", help="score the first samples only")
    parser.add_argument("--batch", type=int, default=16, metavar="B", help="samples per forward pass and process")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the numbers to this JSON file")
    _add_machine_options(parser)


def _add_predict(commands: Any) -> None:
    parser = _add_command(commands, "predict", _predict, "Segment what a text refers to in a picture.")
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a run's folder, one of its checkpoints, or a hub id")
    parser.add_argument("--image", required=True, type=Path, metavar="FILE", help="the picture")
    parser.add_argument("--text", required=True, help="the expression")
    parser.add_argument("--out", type=Path, default=Path("prediction.png"), metavar="FILE", help="where the overlay goes")
    parser.add_argument("--threshold", type=float, default=0.5, metavar="P", help="'nothing' above this probability, in [0, 1]")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU where there is a GPU")


def _add_data(commands: Any) -> None:
    parser = commands.add_parser("data", help="Make data sets.", description="Make data sets.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=_Parser)
    make = _add_command(actions, "synthesize", _synthesize, "Write the synthetic benchmark as files, in gRefCOCO's own layout.")
    make.add_argument("out", type=Path, metavar="DIR", help="folder to make")
    make.add_argument("--level", choices=("basic", "full"), default="basic", help="how hard the scenes are")
    make.add_argument("--image-size", type=int, default=64, metavar="PX", help="side of the pictures, in pixels")
    make.add_argument("--seed", type=int, default=0, help="the benchmark's seed")
    for split, size in (("train", 2000), ("val", 500), ("testA", 500), ("testB", 500)):
        make.add_argument(f"--{split}", type=int, default=size, metavar="N", help=f"samples of {split}; 0: none")


def _add_models(commands: Any) -> None:
    parser = _add_command(commands, "models", _models, "List the presets, or count one's parameters per part.")
    parser.add_argument("name", nargs="?", metavar="NAME", help="a preset")


def _add_env(commands: Any) -> None:
    _add_command(commands, "env", _env, "Print versions and devices, for a bug report.")


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", default="synthetic", metavar="synthetic|PATH", help="'synthetic', or the folder of a data set")
    parser.add_argument("--dataset", choices=DATASETS, default="grefcoco", help="what the folder holds")
    parser.add_argument("--level", choices=("basic", "full"), default="basic", help="how hard synthetic scenes are")
    parser.add_argument(
        "--image-size", type=int, metavar="PX", help="side of synthetic pictures and, in training, of the model's input"
    )
    parser.add_argument("--resized", action="store_true", help="score on the model's input square, not at the pictures' own sizes")
    parser.add_argument("--threshold", type=float, default=0.5, metavar="P", help="'nothing' above this probability, in [0, 1]")


def _add_machine_options(parser: Any) -> None:
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that load data; 0: the program itself")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's)")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU where there is a GPU")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _train(args: argparse.Namespace) -> None:
    import torch

    from gresbox.models import create_model, load_model, preset_config
    from gresbox.training import EvaluationOptions, TrainOptions, train
    from gresbox.training.processes import own_device, process_rank

    own_device(cpu=args.cpu)  # before anything is decided: the processes have to find each other
    _use_threads(args)
    evaluation = EvaluationOptions(
        resized=args.resized, no_target_threshold=args.threshold, workers=args.workers, progress=not args.quiet
    )
    given = {item.name: getattr(args, item.name) for item in fields(TrainOptions) if hasattr(args, item.name)}
    options = TrainOptions(**given, progress=not args.quiet, evaluation=evaluation)
    torch.manual_seed(args.seed)
    overrides = _overrides(args.set)
    if args.image_size is not None:
        overrides["image_size"] = args.image_size
    if args.init is not None and overrides:
        raise ValueError("gresbox train: --set and --image-size must not come with --init, which fixes the model's numbers.")
    if args.init is None and args.data != "synthetic" and preset_config(args.model).vocabulary:
        overrides.setdefault("vocabulary", _vocabulary(args, preset_config(args.model).vocabulary))
    model = load_model(args.init) if args.init is not None else create_model(args.model, pretrained=args.pretrained, **overrides)
    side = model.processor.image_size
    train_set = _dataset(args, args.train_split, args.train_size, side)
    val_set = _dataset(args, args.val_split, args.val_size, side)
    out = _run_folder(args)
    if process_rank() == 0:
        steps = options.total_steps(options.applied_to(model.recipe), len(train_set))
        sizes = f"{_count(model):,} parameters, {len(train_set):,} samples, {steps:,} steps"
        print(f"{out}: {args.init or args.model}, {sizes}", flush=True)
    scores = train(model, train_set, val_set, out, options, resume=args.resume)
    if process_rank() == 0:
        print(_table(scores))
        print(f"{out} holds {', '.join(sorted(item.name for item in out.iterdir() if not item.name.startswith('.')))}")


def _evaluate(args: argparse.Namespace) -> None:
    from gresbox.models import load_model
    from gresbox.training import EvaluationOptions, evaluate
    from gresbox.training.processes import own_device, process_rank
    from gresbox.training.results import write_json

    if args.out is not None and args.out.is_dir():
        raise ValueError(f"gresbox evaluate: --out must be a file, got the folder {args.out}.")
    device = own_device(cpu=args.cpu)
    _use_threads(args)
    options = EvaluationOptions(args.batch, args.workers, args.resized, args.threshold, args.limit, not args.quiet)
    model = load_model(args.checkpoint).to(device)
    scores = evaluate(model, _dataset(args, args.split, args.size, model.processor.image_size), options)
    if process_rank() == 0:
        print(_table(scores))
        if args.out is not None:
            write_json(args.out, {**scores, "checkpoint": args.checkpoint, "data": args.data, "split": args.split})


def _predict(args: argparse.Namespace) -> None:
    from gresbox.models import load_model
    from gresbox.training.processes import own_device
    from gresbox.viz import draw_prediction

    image = _read_picture(args.image)
    model = load_model(args.checkpoint).to(own_device(cpu=args.cpu))
    answer = model.predict(image, args.text, no_target_threshold=args.threshold)
    draw_prediction(image, answer, path=args.out)
    if answer.no_target_prob is not None:
        verdict = "nothing" if answer.no_target_prob > args.threshold else "something"
        print(f"refers to {verdict} (no-target probability {answer.no_target_prob:.3f})")
    print(f"mask: {100 * answer.mask.float().mean().item():.1f} % of the picture")
    for place in range(len(answer.scores)):
        x0, y0, x1, y1 = (round(value) for value in answer.boxes_xyxy[place].tolist())
        words = sorted(answer.phrases[place], key=lambda item: -item[1])[:3] if answer.phrases else []
        said = ", ".join(f"{word} {weight:.2f}" for word, weight in words)
        print(f"instance {place + 1}: score {answer.scores[place]:.2f}, box {x0} {y0} {x1} {y1} px; {said}")
    print(f"wrote {args.out}")


def _synthesize(args: argparse.Namespace) -> None:
    from gresbox.data import synthesize

    sizes = {split: getattr(args, split) for split in ("train", "val", "testA", "testB") if getattr(args, split) != 0}
    if not sizes or min(sizes.values()) < 0:
        raise ValueError("gresbox data synthesize: sizes must be at least 0, and one of them at least 1.")
    out = synthesize(args.out, sizes=sizes, level=args.level, image_size=args.image_size, seed=args.seed)
    print(f"wrote {', '.join(f'{size} {split}' for split, size in sizes.items())} to {out}")


def _models(args: argparse.Namespace) -> None:
    from gresbox.models import create_model, list_models

    if args.name is None:
        print("\n".join(list_models()))
        return
    model = create_model(args.name)
    rows = [(name, _count(part)) for name, part in model.named_children()]
    loose = _count(model) - sum(count for _, count in rows)
    rows += [("(of its own)", loose)] if loose else []
    for name, count in [*rows, ("total", _count(model))]:
        print(f"{name:<20} {count:>12,} parameters")


def _env(args: argparse.Namespace) -> None:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from gresbox import __version__
    from gresbox.ops._backend import why_not_triton

    print(f"gresbox {__version__}, Python {platform.python_version()}, {platform.platform()}")
    names = "torch torchvision numpy scipy timm transformers tokenizers torchmetrics safetensors huggingface_hub accelerate"
    for name in (*names.split(), "pycocotools", "matplotlib", "tensorboard", "triton"):
        try:
            print(f"{name:<16} {version(name)}")
        except PackageNotFoundError:
            print(f"{name:<16} not installed")
    print(f"CPU: {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        print(f"GPU {index}: {torch.cuda.get_device_name(index)}, CUDA {torch.version.cuda}")
    reason = why_not_triton(torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu"))
    print("Triton: " + ("usable; no operation has a kernel yet" if reason is None else f"not used, {reason}"))


def _dataset(args: argparse.Namespace, split: str, size: int, side: int) -> Any:
    from gresbox.data import GRefCOCO, SyntheticGRES

    if args.data == "synthetic":
        return SyntheticGRES(split, size, level=args.level, image_size=args.image_size or side)
    return GRefCOCO(args.data, split)


def _vocabulary(args: argparse.Namespace, words: Sequence[str]) -> tuple[str, ...]:
    """A small preset's words and those of the training texts: its word-level tokenizer knows nothing else."""
    from gresbox.data import GRefCOCO
    from gresbox.models import words_in

    texts = GRefCOCO(args.data, args.train_split, images=False)
    return tuple(sorted({*words, *words_in(texts.text(index) for index in range(len(texts)))}))


def _run_folder(args: argparse.Namespace) -> Path:
    """The folder asked for, or the first free (to resume: the last taken) of runs/NAME, runs/NAME-2, ..."""
    from gresbox.training.processes import same_everywhere

    if args.out is not None:
        return args.out
    name = Path(args.init).name if args.init is not None else args.model
    folders = [Path("runs") / name]
    while folders[-1].exists():
        folders.append(Path("runs") / f"{name}-{len(folders) + 1}")
    return same_everywhere(folders[-2] if args.resume and len(folders) > 1 else folders[-1])


def _overrides(pairs: Sequence[str]) -> dict[str, Any]:
    overrides = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"gresbox train: `--set` must be KEY=VALUE, got {pair!r}.")
        try:
            overrides[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            overrides[key] = value  # a word needs no quotes
    return overrides


def _read_picture(path: Path) -> Any:
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not path.is_file():
        raise FileNotFoundError(f"gresbox predict: `--image` must be a picture file, got {path}, which does not exist.")
    try:
        return ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"gresbox predict: `--image` must be a picture, got {path}, which cannot be read as one.") from error


def _use_threads(args: argparse.Namespace) -> None:
    import torch

    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"gresbox {args.command}: `--threads` must be at least 1, got {args.threads}.")
        torch.set_num_threads(args.threads)


def _count(module: Any) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def _table(scores: dict[str, float]) -> str:
    return "\n".join(f"{name:<18}{value:10.2f}" for name, value in scores.items())


def _leave_processes() -> None:
    """Say goodbye to the other processes, if this one was launched with others."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
