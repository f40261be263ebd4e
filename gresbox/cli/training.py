"""``gresbox train``."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from gresbox.cli.arguments import add_command, add_data_options, add_machine_options, key_values, open_dataset, table, use_threads
from gresbox.cli.scoring import add_scoring_options, side_of_scoring

__all__ = ["add_commands"]

MASKING = ("threshold", "relative", "drop", "block", "scale", "protect_target")
"""What ``--aml-...`` gives to the masking block."""


def add_commands(commands: Any) -> None:
    """Add the parser.

    Args:
        commands: What ``add_subparsers`` gave.
    """
    parser = add_command(commands, "train", _train, "Train a model; the folder holds weights, metrics, a loss curve and pictures.")
    parser.add_argument("--model", default="instalign_tiny", metavar="NAME", help="a preset; 'gresbox models' lists them")
    parser.add_argument("--pretrained", action="store_true", help="fetch the encoders' weights and the tokenizer")
    parser.add_argument("--init", metavar="DIR", help="start from this saved model instead of a preset")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="replace a number of the preset; repeatable"
    )
    add_data_options(parser)
    parser.add_argument(
        "--image-size", type=int, metavar="PX", help="side of synthetic pictures and of the model's input (default: the preset's)"
    )
    parser.add_argument("--train-split", default="train", metavar="SPLIT", help="split to train on")
    parser.add_argument("--val-split", metavar="SPLIT", help="split to evaluate on (default: val; test for refzom)")
    parser.add_argument("--train-size", type=int, default=40_000, metavar="N", help="synthetic samples to train on")
    parser.add_argument("--val-size", type=int, default=1_000, metavar="N", help="synthetic samples to evaluate on")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the run (default: runs/MODEL, then runs/MODEL-2, ...)")
    parser.add_argument("--resume", action="store_true", help="continue the run in the folder from its last checkpoint")
    _add_length(parser.add_argument_group("length and optimiser; where nothing is given, the model's recipe decides"))
    _add_masking(parser.add_argument_group("alignment-aware masked training (AML)"))
    add_scoring_options(parser.add_argument_group("evaluation"))
    machine = parser.add_argument_group("machine and reports")
    add_machine_options(machine)
    _add_reports(machine)


def _add_length(group: Any) -> None:
    group.add_argument("--max-steps", type=int, metavar="N", help="optimiser steps; wins over --epochs")
    group.add_argument("--epochs", type=float, metavar="E", help="passes over the training split")
    group.add_argument("--max-seconds", type=float, metavar="S", help="stop training after this many seconds, schedule or not")
    group.add_argument("--batch", type=int, metavar="B", help="samples per step, over all processes and accumulation steps")
    group.add_argument("--accumulate", type=int, default=1, metavar="A", help="micro-batches per step")
    group.add_argument(
        "--capture",
        type=int,
        default=0,
        metavar="M",
        help="replay decoder, matching and losses from a CUDA graph, M instances at most",
    )
    group.add_argument("--lr", type=float, help="peak learning rate")
    group.add_argument("--clip", type=float, help="largest gradient norm; 0: none")
    group.add_argument("--schedule", choices=("linear", "step", "poly", "cosine", "constant"), help="learning-rate schedule")
    group.add_argument("--amp", choices=("no", "bf16", "fp16"), help="mixed precision")
    group.add_argument("--seed", type=int, default=0, help="seed of weights, data order and everything random")


def _add_masking(group: Any) -> None:
    group.add_argument("--aml", action="store_true", help="hide a random part of the blocks that match the expression weakly")
    group.add_argument(
        "--aml-threshold", type=float, metavar="T", help="similarity below which a pixel is weak, in [0, 1] (default: 0.4)"
    )
    group.add_argument("--aml-relative", action="store_true", help="the threshold is the share of a picture's patches that is weak")
    group.add_argument("--aml-drop", type=float, metavar="P", help="share of the weak blocks that is hidden (default: 0.25)")
    group.add_argument(
        "--aml-block", type=int, metavar="PX", help="side of a block (default: 32, or an eighth of the input where that is less)"
    )
    group.add_argument("--aml-scale", type=float, metavar="S", help="factor of the match's logits (default: twice the root of D)")
    group.add_argument("--aml-protect-target", action="store_true", help="hide no block that touches the target")
    group.add_argument(
        "--aml-clean-loss", type=float, metavar="W", help="share of the clean picture's loss, in [0, 1) (default: 0.0)"
    )
    group.add_argument(
        "--aml-score-dtype", choices=("float32", "bfloat16", "float16"), help="what scoring computes in (default: as --amp says)"
    )


def _add_reports(group: Any) -> None:
    group.add_argument("--log-every", type=int, default=20, metavar="N", help="steps between two entries of log.jsonl")
    group.add_argument("--evaluate-every", type=int, default=0, metavar="N", help="steps between two evaluations; 0: at the end")
    group.add_argument("--evaluate-start", action="store_true", help="evaluate before the first step too")
    group.add_argument(
        "--checkpoint-every", type=int, default=0, metavar="N", help="steps between two checkpoints; 0: by the clock"
    )
    group.add_argument("--checkpoint-seconds", type=float, default=300.0, metavar="S", help="seconds between two checkpoints")
    group.add_argument("--pictures", type=int, default=8, metavar="N", help="answers to draw at the end")
    group.add_argument("--tensorboard", action="store_true", help="write TensorBoard scalars")


def _train(args: argparse.Namespace) -> None:
    import torch

    from gresbox.training import EvaluationOptions, TrainOptions, train
    from gresbox.training.processes import own_device, process_rank

    own_device(cpu=args.cpu)  # before anything is decided: the processes have to find each other
    use_threads(args)
    evaluation = EvaluationOptions(
        workers=args.workers, no_target_threshold=args.threshold, progress=not args.quiet, metric=args.metric
    )
    given = {item.name: getattr(args, item.name) for item in fields(TrainOptions) if hasattr(args, item.name)}
    options = TrainOptions(**given, progress=not args.quiet, evaluation=evaluation)
    torch.manual_seed(args.seed)
    model = _model(args)
    aml = _masked_training(args, model)
    side = model.processor.image_size
    drawn = args.image_size or side
    train_set = open_dataset(args, args.train_split, count=args.train_size, side=drawn)
    val_set = open_dataset(args, args.val_split, count=args.val_size, side=drawn, resized=side_of_scoring(args, side))
    _check_evaluation(model, val_set, evaluation)
    out = _run_folder(args)
    if process_rank() == 0:
        steps = options.total_steps(options.applied_to(model.recipe), len(train_set))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(
            f"{out}: {args.init or args.model}, {parameters:,} parameters, {len(train_set):,} samples, {steps:,} steps", flush=True
        )
    scores = train(model, train_set, val_set, out, options, resume=args.resume, aml=aml)
    if process_rank() == 0:
        print(table(scores))
        print(f"{out} holds {', '.join(sorted(item.name for item in out.iterdir() if not item.name.startswith('.')))}")


def _check_evaluation(model: Any, dataset: Any, options: Any) -> None:
    """What the evaluation would refuse is refused now, not after the last step."""
    from gresbox.training import evaluate
    from gresbox.training.scoring import check_metric

    if options.metric is not None:
        check_metric("gresbox train", options.metric, dataset)
    if options.metric == "grec":  # only the model knows whether it has boxes
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of one sample not every number is defined
            evaluate(model, dataset, replace(options, limit=1, workers=0, progress=False))


def _model(args: argparse.Namespace) -> Any:
    from gresbox.models import create_model, load_model, preset_config

    overrides = key_values("gresbox train", args.set)
    if args.image_size is not None:
        overrides["image_size"] = args.image_size
    if args.init is not None:
        if overrides:
            raise ValueError("gresbox train: --set and --image-size must not come with --init, which fixes the model's numbers.")
        return load_model(args.init)
    if args.data != "synthetic" and preset_config(args.model).vocabulary:
        overrides.setdefault("vocabulary", _vocabulary(args, preset_config(args.model).vocabulary))
    return create_model(args.model, pretrained=args.pretrained, **overrides)


def _vocabulary(args: argparse.Namespace, words: Sequence[str]) -> tuple[str, ...]:
    """A small preset's words and those of the training texts: its word-level tokenizer knows nothing else."""
    from gresbox.models import words_in

    texts = open_dataset(args, args.train_split, count=0, side=0, pictures=False)
    return tuple(sorted({*words, *words_in(texts.text(index) for index in range(len(texts)))}))


def _masked_training(args: argparse.Namespace, model: Any) -> Any:
    """The wrapper that ``--aml`` asks for; None without it."""
    given = {name: getattr(args, f"aml_{name}") for name in (*MASKING, "clean_loss", "score_dtype")}
    given = {name: value for name, value in given.items() if value is not None and value is not False}
    if not args.aml:
        if given:
            raise ValueError(f"gresbox train: `--aml-{next(iter(given)).replace('_', '-')}` must come with --aml.")
        return None
    import torch

    from gresbox.blocks import AlignmentAwareMasking
    from gresbox.training import AlignmentMaskedTraining

    dtype = given.pop("score_dtype", None)
    options = {"clean_loss_weight": given.pop("clean_loss", 0.0), "score_dtype": dtype and getattr(torch, dtype)}
    training = AlignmentMaskedTraining(model, **options)
    if not given:
        return training
    masking = AlignmentAwareMasking(*model.encode_dims, **{"block": training.masking.block, **given})
    return AlignmentMaskedTraining(model, masking, **options)


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
