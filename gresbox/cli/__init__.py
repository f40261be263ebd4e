"""The ``gresbox`` command: argument handling and printing; the work is done by the library.

One file per family of commands: each adds its parsers with ``add_commands`` and holds what they run. What several share is in
:mod:`gresbox.cli.arguments`. Nothing here imports torch before a command runs, so that ``--help`` is quick.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from gresbox.cli import datasets, inspection, prediction, scoring, training
from gresbox.cli.arguments import Parser

__all__ = ["main"]

INTERRUPTED = 130  # what a shell reports for Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; default: those of the process.

    Returns:
        0, 1 after an error, or 130 after Ctrl-C.
    """
    args = _parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _note
            args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("gresbox: interrupted; a training goes on from its last checkpoint with --resume.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the output has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if args.debug:
            raise
        print(f"gresbox: error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 1
    finally:
        _leave_processes()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="gresbox", description="Generalised referring expression segmentation: many things, one, or nothing.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for family in (training, scoring, prediction, datasets, inspection):
        family.add_commands(commands)
    return parser


def _note(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    """A warning as a line for a person."""
    print(f"gresbox: note: {' '.join(str(message).split())}", file=sys.stderr)


def _leave_processes() -> None:
    """Say goodbye to the other processes, if this one was launched with others."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
