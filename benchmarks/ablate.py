"""Ablations on the synthetic benchmark: one suite per paper, the same budget for every cell, three seeds.

    python -m benchmarks.ablate --suite igvg --list              the cells and which are done
    python -m benchmarks.ablate --suite igvg --cell 3/39         run one cell; a cell that has its file is skipped
    python -m benchmarks.ablate --suite igvg --cells 1-20        run several
    python -m benchmarks.ablate --suite igvg --table             write the suite's page and picture in docs/ from the files

A cell is one training and one JSON file in benchmarks/results/ablate/SUITE/, written when it is finished, so that cells can be run
in any order, anywhere, and again. A difference that is smaller than the larger spread over seeds of the two is printed as "=".
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.suites import aml, aml_tuning, igvg, instalign
from benchmarks.suites.suite import DOCS, RESULTS, Suite, run, table
from gresbox._files import write_atomically

SUITES: dict[str, Suite] = {module.SUITE.name: module.SUITE for module in (instalign, igvg, aml, aml_tuning)}


def show(suite: Suite, folder: Path) -> None:
    """Print the cells."""
    for number, (name, seed) in enumerate(suite.cells, 1):
        done = suite.cell_file(folder, name, seed).is_file()
        print(f"{number:2d}/{len(suite.cells)}  {name:24s} seed {seed}  {'done' if done else '-'}")


def write_page(suite: Suite, folder: Path, docs: Path = DOCS) -> None:
    """Write the page and its picture."""
    found = suite.finished(folder)
    text = suite.page(suite, found)
    write_atomically(docs / f"{suite.page_file}.md", lambda temporary: temporary.write_text(text))
    suite.plot(suite, found, docs / "_static" / f"{suite.page_file}.png")
    print("\n".join(table(suite, found)))


def run_cells(suite: Suite, cells: list[tuple[str, int]], given: dict[str, Any], folder: Path) -> None:
    """Run what has no file yet; ``given`` are numbers of the budget that are asked for."""
    for name, seed in cells:
        path = suite.cell_file(folder, name, seed)
        if path.is_file():
            print(f"{path.name}: done before")
            continue
        steps = suite.variants[name].steps or suite.budget.steps
        result = run(suite, name, seed, replace(suite.budget, **{"steps": steps, **given}), folder)
        numbers = "  ".join(f"{metric} {result['scores'][metric]:.1f}" for metric in suite.metrics)
        print(f"{path.name}: {numbers}  ({result['scores']['seconds']:.0f} s of training)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, default="instalign", help="what is compared (default: instalign)")
    parser.add_argument("--list", action="store_true", help="show the cells")
    parser.add_argument("--cell", "--cells", dest="cells", metavar="I/N", help="cell I, cells I-J, or a list of these")
    parser.add_argument("--table", action="store_true", help="write the documentation's page and plot")
    parser.add_argument("--steps", type=int, help="optimiser steps of a cell (default: the suite's)")
    parser.add_argument("--samples", type=int, help="validation samples (default: the suite's)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: the suite's)")
    parser.add_argument(
        "--start", type=Path, metavar="FOLDER", help="a trained model, for the suites whose cells start from its encoder"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="holds a folder of results per suite")
    args = parser.parse_args()
    suite = SUITES[args.suite]
    given = {name: getattr(args, name) for name in ("steps", "samples", "threads", "start") if getattr(args, name) is not None}
    if args.list:
        show(suite, args.out)
    if args.cells:
        run_cells(suite, suite.chosen(args.cells), given, args.out)
    if args.table:
        write_page(suite, args.out)


if __name__ == "__main__":
    main()
