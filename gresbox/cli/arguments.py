"""What the commands share: parsers, arguments that several take, and what these arguments mean."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

__all__ = [
    "DATASETS",
    "Parser",
    "add_checkpoint",
    "add_command",
    "add_data_options",
    "add_machine_options",
    "key_values",
    "open_dataset",
    "table",
    "threshold",
    "use_threads",
]

DATASETS: dict[str, tuple[str, str | None]] = {
    "grefcoco": ("GRefCOCO", None),
    "refcoco": ("RefCOCO", "refcoco"),
    "refcoco+": ("RefCOCO", "refcoco+"),
    "refcocog": ("RefCOCO", "refcocog"),
    "refcocom": ("RefCOCO", "refcocom"),
    "refzom": ("RefZOM", None),
    "rrefcoco": ("RRefCOCO", "rrefcoco"),
    "rrefcoco+": ("RRefCOCO", "rrefcoco+"),
    "rrefcocog": ("RRefCOCO", "rrefcocog"),
}
"""What ``--dataset`` may say: the class of :mod:`gresbox.data` that reads it, and its ``name`` there."""


class _Help(argparse.HelpFormatter):
    """Names the default where there is one to name."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        without = action.default is None or action.default is False or action.default in (argparse.SUPPRESS, [])
        if action.help is None or not action.option_strings or without:
            return action.help
        return f"{action.help} (default: {action.default})"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, whose help names defaults, and that guesses no abbreviations."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": _Help, "allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        """End the program with one line."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (see {self.prog} --help)\n")


def add_command(commands: Any, name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
    """Add a command.

    Args:
        commands: What ``add_subparsers`` gave.
        name: The word on the command line.
        run: What it does.
        text: What it does, in a sentence.
    """
    parser = commands.add_parser(name, help=text, description=text)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run)
    return parser


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add ``--checkpoint``."""
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a run's folder, one of its checkpoints, or a hub id")


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add what names a data set; :func:`open_dataset` reads it."""
    parser.add_argument("--data", default="synthetic", metavar="synthetic|PATH", help="'synthetic', or the folder of a data set")
    parser.add_argument("--dataset", choices=DATASETS, help="what the folder holds (default: grefcoco)")
    parser.add_argument(
        "--split-by", metavar="NAME", help="RefCOCO's partition: unc, google or umd (default: unc; umd for refcocog)"
    )
    parser.add_argument("--images", metavar="DIR", help="folder of the pictures (default: looked for in the data set's folder)")
    parser.add_argument("--sentence", choices=("raw", "sent"), default="raw", help="which form of a sentence is the text")
    parser.add_argument("--level", choices=("basic", "full"), default="basic", help="how hard synthetic scenes are")


def add_machine_options(parser: Any) -> None:
    """Add what says where to run."""
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that load data; 0: the program itself")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's)")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU where there is a GPU")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def threshold(text: str) -> float | None:
    """A threshold of the no-target probability, or None for the word "none"."""
    return None if text == "none" else float(text)


def key_values(who: str, pairs: Sequence[str]) -> dict[str, Any]:
    """The values of repeated ``--set KEY=VALUE``; a word needs no quotes.

    Args:
        who: The command, for the message.
        pairs: As given.

    Raises:
        ValueError: If one is no pair.

    Example:
        >>> key_values("gresbox train", ["dim=32", "object_text=shared"])
        {'dim': 32, 'object_text': 'shared'}
    """
    values = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"{who}: `--set` must be KEY=VALUE, got {pair!r}.")
        try:
            values[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            values[key] = value
    return values


def open_dataset(
    args: argparse.Namespace,
    split: str | None,
    *,
    count: int,
    side: int,
    resized: int | None = None,
    change: Any = None,
    pictures: bool = True,
) -> Any:
    """The data set that the arguments name.

    Args:
        args: With what :func:`add_data_options` added.
        split: Which; None: the one to evaluate on.
        count: Samples, if it is synthetic.
        side: Side of its pictures, if it is synthetic.
        resized: Side of the square that truth and picture are brought to, the benchmark's way; None: their own size.
        change: Applied to every sample.
        pictures: Whether they are read.

    Raises:
        ValueError: If the arguments contradict each other.
    """
    from gresbox import data

    split = split or ("test" if args.dataset == "refzom" else "val")
    if args.data == "synthetic":
        given = [name for name in ("dataset", "split_by", "images") if getattr(args, name) is not None]
        if given:
            option = given[0].replace("_", "-")
            raise ValueError(f"gresbox {args.command}: `--{option}` must come with the folder of a data set as --data.")
        changes = [*([] if resized is None else [data.Resize(resized)]), *([] if change is None else [change])]
        return data.SyntheticGRES(split, count, level=args.level, image_size=side, transform=_in_turn(changes))
    kind, name = DATASETS[args.dataset or "grefcoco"]
    options = {
        "transform": change,
        "sentence": args.sentence,
        "size": resized,
        "images": args.images or True if pictures else False,
    }
    if name is None:
        if args.split_by is not None:
            raise ValueError(
                f"gresbox {args.command}: `--split-by` must come with one of RefCOCO's data sets, got {args.split_by}."
            )
        return getattr(data, kind)(args.data, split, **options)
    return getattr(data, kind)(args.data, name, split, args.split_by, **options)


def _in_turn(changes: list[Any]) -> Any:
    """One transform of several; None of none."""
    from torchvision.transforms import Compose

    return Compose(changes) if changes else None


def use_threads(args: argparse.Namespace) -> None:
    """Set PyTorch's threads.

    Args:
        args: With what :func:`add_machine_options` added.

    Raises:
        ValueError: If there are none.
    """
    import torch

    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"gresbox {args.command}: `--threads` must be at least 1, got {args.threads}.")
        torch.set_num_threads(args.threads)


def table(scores: dict[str, float]) -> str:
    """Names and numbers, one line each.

    Args:
        scores: What ``evaluate`` gave.

    Example:
        >>> print(table({"gIoU": 63.25}))
        gIoU                   63.25
    """
    return "\n".join(f"{name:<18}{value:10.2f}" for name, value in scores.items())
