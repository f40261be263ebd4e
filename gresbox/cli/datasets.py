"""``gresbox data``: make a data set, check one, convert one's own."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gresbox.cli.arguments import DATASETS, Parser, add_command

__all__ = ["add_commands"]

FOLDERS = {"refzom": "ref-zom"}
"""Folders of benchmarks that are not called as on the command line."""


def add_commands(commands: Any) -> None:
    """Add the parsers.

    Args:
        commands: What ``add_subparsers`` gave.
    """
    parser = commands.add_parser(
        "data", help="Make, check and convert data sets.", description="Make, check and convert data sets."
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=Parser)

    make = add_command(actions, "synthesize", _synthesize, "Write the synthetic benchmark as files, in gRefCOCO's own layout.")
    make.add_argument("out", type=Path, metavar="DIR", help="folder to make")
    make.add_argument("--level", choices=("basic", "full"), default="basic", help="how hard the scenes are")
    make.add_argument("--image-size", type=int, default=64, metavar="PX", help="side of the pictures, in pixels")
    make.add_argument("--seed", type=int, default=0, help="the benchmark's seed")
    for split, size in (("train", 2000), ("val", 500), ("testA", 500), ("testB", 500)):
        make.add_argument(f"--{split}", type=int, default=size, metavar="N", help=f"samples of {split}; 0: none")

    check = add_command(actions, "verify", _verify, "Check the files of a data set: counts, missing pictures, ids, masks.")
    check.add_argument("root", type=Path, metavar="ROOT", help="folder that holds the benchmarks' folders, or one of these")
    check.add_argument(
        "--dataset", nargs="+", choices=DATASETS, metavar="NAME", help="which of the benchmarks (default: all there)"
    )
    check.add_argument("--images", metavar="DIR", help="folder of the pictures (default: looked for in ROOT)")
    check.add_argument("--no-images", action="store_true", help="do not look for pictures")
    check.add_argument("--out", type=Path, metavar="FILE", help="also write the report to this JSON file")

    convert = add_command(
        actions, "convert", _convert, "Turn COCO-style instances and your own expressions into gRefCOCO's layout."
    )
    convert.add_argument("out", type=Path, metavar="DIR", help="folder to make")
    convert.add_argument("--instances", required=True, type=Path, metavar="FILE", help="COCO's images, annotations and categories")
    convert.add_argument(
        "--expressions",
        required=True,
        type=Path,
        metavar="FILE",
        help='a line per expression: {"text": ..., "ann_ids": [...], "split": ...}; without ids also "image_id" or "file_name"',
    )
    convert.add_argument(
        "--images", required=True, type=Path, metavar="DIR", help="folder that the pictures' names are relative to"
    )
    convert.add_argument("--link", action="store_true", help="link the pictures instead of copying them")


def _synthesize(args: argparse.Namespace) -> None:
    from gresbox.data import synthesize

    sizes = {split: getattr(args, split) for split in ("train", "val", "testA", "testB") if getattr(args, split) != 0}
    if not sizes or min(sizes.values()) < 0:
        raise ValueError("gresbox data synthesize: sizes must be at least 0, and one of them at least 1.")
    out = synthesize(args.out, sizes=sizes, level=args.level, image_size=args.image_size, seed=args.seed)
    print(f"wrote {', '.join(f'{size} {split}' for split, size in sizes.items())} to {out}")


def _verify(args: argparse.Namespace) -> None:
    from dataclasses import asdict

    from gresbox.data import verify

    names = None if args.dataset is None else [FOLDERS.get(name, name) for name in args.dataset]
    report = verify(args.root, names, images=False if args.no_images else args.images or True)
    print(report)
    if args.out is not None:
        from gresbox.training.results import write_json

        write_json(args.out, {"ok": report.ok, **asdict(report)})
    if not report.ok:
        raise ValueError("gresbox data verify: every sample must be readable, got problems; the report lists them.")


def _convert(args: argparse.Namespace) -> None:
    from gresbox.data import convert_coco, verify

    out = convert_coco(args.instances, args.expressions, args.images, args.out, link=args.link)
    print(verify(out))
    print(f"wrote {out}; train on it with: gresbox train --data {out}")
