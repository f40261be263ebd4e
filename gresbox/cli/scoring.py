"""``gresbox evaluate`` and ``gresbox score``: the same numbers, from a model or from a file of predictions."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gresbox.cli.arguments import (
    add_checkpoint,
    add_command,
    add_data_options,
    add_machine_options,
    key_values,
    open_dataset,
    table,
    threshold,
    use_threads,
)

__all__ = ["METRICS", "add_commands", "add_scoring_options", "side_of_scoring"]

METRICS = ("gres", "res", "refzom", "rrefcoco", "grec")
CORRUPTIONS = ("occlusion", "gaussian_noise", "blur", "colour_shift", "haze", "low_light", "block_dropout")
PICTURES = (".png", ".pdf", ".svg")
BENCHMARK_SIDE = 480  # what the evaluators of gRefCOCO, Ref-ZOM, R-RefCOCO and LAVT resize to


def add_commands(commands: Any) -> None:
    """Add the parsers.

    Args:
        commands: What ``add_subparsers`` gave.
    """
    parser = add_command(commands, "evaluate", _evaluate, "Score a saved model with the benchmark's metrics, in percent.")
    add_checkpoint(parser)
    _add_split(parser)
    parser.add_argument("--batch", type=int, default=16, metavar="B", help="samples per forward pass and process")
    add_scoring_options(parser)
    _add_numbers(parser)
    parser.add_argument(
        "--predictions", type=Path, metavar="FILE", help="write the answers to this file, as 'gresbox score' reads it"
    )
    parser.add_argument("--corrupt", metavar="NAME", help=f"spoil the pictures: {', '.join(CORRUPTIONS)}")
    parser.add_argument("--severity", type=int, metavar="1..5", help="how much --corrupt spoils them (default: 3)")
    add_machine_options(parser)

    parser = add_command(commands, "score", _score, "Score a file of predictions, anyone's, with the benchmark's own rules.")
    parser.add_argument(
        "--predictions", required=True, type=Path, metavar="FILE", help="a line of JSON per expression; see the docs"
    )
    _add_split(parser)
    add_scoring_options(parser)
    _add_numbers(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_split(parser: argparse.ArgumentParser) -> None:
    add_data_options(parser)
    parser.add_argument("--split", help="split to score (default: val; test for refzom)")
    parser.add_argument("--size", type=int, default=1_000, metavar="N", help="synthetic samples to score")
    parser.add_argument(
        "--image-size", type=int, metavar="PX", help="side of synthetic pictures (default: the model's input, or 64)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="score the first samples only")


def add_scoring_options(parser: Any) -> None:
    """Add what says how answers are scored.

    Args:
        parser: A parser or a group of one.
    """
    parser.add_argument("--metric", choices=METRICS, help="whose rules (default: those of the data set's benchmark)")
    parser.add_argument(
        "--threshold",
        type=threshold,
        default=0.5,
        metavar="P|none",
        help="'nothing' above this probability, in [0, 1]; none: the metric's own rule decides from the mask",
    )
    parser.add_argument(
        "--resized",
        nargs="?",
        type=int,
        const=True,
        metavar="PX",
        help="score on a square of this side, the benchmarks' way, not at the pictures' own sizes"
        f" (without a number: the model's input; {BENCHMARK_SIDE} for 'score')",
    )


def _add_numbers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="an option of the metric; repeatable")
    parser.add_argument("--sweep", action="store_true", help="also score at other thresholds of the no-target probability")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the sweep's curves")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the numbers to this JSON file")


def side_of_scoring(args: argparse.Namespace, usual: int) -> int | None:
    """The side of the square to score on; None: the pictures' own sizes.

    Args:
        args: With what :func:`add_scoring_options` added.
        usual: The side where ``--resized`` comes without a number.
    """
    return usual if args.resized is True else args.resized


def _evaluate(args: argparse.Namespace) -> None:
    from gresbox.models import load_model
    from gresbox.training import EvaluationOptions, evaluate
    from gresbox.training.processes import own_device, process_rank

    _check_files(args, args.predictions)
    device = own_device(cpu=args.cpu)
    use_threads(args)
    options = EvaluationOptions(
        args.batch, args.workers, no_target_threshold=_threshold(args), limit=args.limit, progress=not args.quiet
    )
    change = _corruption(args)
    model = load_model(args.checkpoint).to(device)
    side = model.processor.image_size
    args.resized = side_of_scoring(args, side)
    dataset = open_dataset(args, args.split, count=args.size, side=args.image_size or side, resized=args.resized, change=change)
    sweep = _sweep(args)
    scores = evaluate(model, dataset, options, metric=_metric(args, dataset), predictions=args.predictions, sweep=sweep)
    more = {"checkpoint": args.checkpoint, **_said(args, dataset)}
    if change is not None:
        more |= {"corrupt": change.name, "severity": change.severity}
    _report(args, scores, sweep, more, show=process_rank() == 0)


def _score(args: argparse.Namespace) -> None:
    from gresbox.training import score_predictions

    _check_files(args)
    side = args.image_size or 64
    args.resized = side_of_scoring(args, side if args.data == "synthetic" else BENCHMARK_SIDE)
    dataset = open_dataset(args, args.split, count=args.size, side=side, resized=args.resized, pictures=False)
    sweep = _sweep(args)
    scores = score_predictions(
        args.predictions,
        dataset,
        metric=_metric(args, dataset),
        no_target_threshold=_threshold(args),
        sweep=sweep,
        limit=args.limit,
        progress=not args.quiet and sys.stderr.isatty() and find_spec("tqdm") is not None,
    )
    _report(args, scores, sweep, {"predictions": str(args.predictions), **_said(args, dataset)})


def _check_files(args: argparse.Namespace, *more: Path | None) -> None:
    """Everything that will be written can be, as far as one can see now."""
    who = f"gresbox {args.command}"
    for path in (args.out, args.plot, *more):
        if path is not None and path.is_dir():
            raise ValueError(f"{who}: --out, --plot and --predictions must be files, got the folder {path}.")
    if args.plot is not None and not args.sweep:
        raise ValueError(f"{who}: `--plot` must come with --sweep, whose curves it draws.")
    if args.plot is not None and args.plot.suffix.lower() not in PICTURES:
        raise ValueError(f"{who}: `--plot` must end in one of {', '.join(PICTURES)}, got {args.plot.name!r}.")


def _threshold(args: argparse.Namespace) -> float | None:
    """Who decides "nothing": a rule of the metric that is asked for wins over the probability."""
    return None if any(pair.startswith("no_target_rule=") for pair in args.set) else args.threshold


def _metric(args: argparse.Namespace, dataset: Any) -> Any:
    """The metric by name where that is all that is said, else built; None: the data set's own."""
    from gresbox.training import default_metric, make_metric
    from gresbox.training.scoring import check_metric

    if args.metric is not None:
        check_metric(f"gresbox {args.command}", args.metric, dataset)
    options = key_values(f"gresbox {args.command}", args.set)
    return make_metric(args.metric or default_metric(dataset), **options) if options else args.metric


def _corruption(args: argparse.Namespace) -> Any:
    if args.corrupt is None:
        if args.severity is not None:
            raise ValueError("gresbox evaluate: `--severity` must come with --corrupt.")
        return None
    from gresbox.data import Corrupt

    return Corrupt(args.corrupt, 3 if args.severity is None else args.severity)


def _sweep(args: argparse.Namespace) -> Any:
    from gresbox.metrics import ThresholdSweep

    return ThresholdSweep() if args.sweep else None


def _said(args: argparse.Namespace, dataset: Any) -> dict[str, Any]:
    """What was scored and how, for the JSON file, with the defaults that were taken."""
    from gresbox.training import default_metric

    name = "synthetic" if args.data == "synthetic" else args.dataset or "grefcoco"
    return {
        "data": args.data,
        "dataset": name,
        "split": dataset.split,
        "metric": args.metric or default_metric(dataset),
        "options": key_values(f"gresbox {args.command}", args.set),
        "threshold": _threshold(args),
        "resized": args.resized,
    }


def _report(args: argparse.Namespace, scores: dict[str, float], sweep: Any, more: dict[str, Any], *, show: bool = True) -> None:
    """Print the numbers and write them where they are asked for; a sweep of several processes needs all of them."""
    summary, curves = (None, None) if sweep is None else (sweep.summary(), sweep.compute())
    if not show:
        return
    print(table(scores))
    content: dict[str, Any] = {**scores, **more}
    if curves is not None:
        print(f"\n{summary}")
        content["sweep"] = {name: _plain(value.tolist()) for name, value in curves.items()}
    if args.out is not None:
        from gresbox.training.results import write_json

        write_json(args.out, content)
    if args.plot is not None:
        from gresbox._files import write_atomically

        write_atomically(args.plot, sweep.plot(curves)[0].savefig)


def _plain(value: Any) -> Any:
    """A number or a list of them; NaN becomes None, which JSON has a word for."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if value != value else value
