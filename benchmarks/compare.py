"""Compare two runs of the same benchmarks, old and new: ``python -m benchmarks.compare OLD NEW``, two files or two folders.

A form of ours that became slower by more than 10 % and the noise band is a regression, and the exit code is 1. The machine may have
been slower too: what the peers of the same case lost, in the median, is taken out, because their code did not change.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import is_ours
from benchmarks.results import File, Group, key_of, read

ALLOWED = 0.10


class Change(NamedTuple):
    """How one form's time changed: new over old, without and with the machine's part taken out, and how much is allowed."""

    where: str
    raw: float
    own: float
    limit: float

    @property
    def regressed(self) -> bool:
        return self.own > self.limit


def changes(old: File, new: File) -> Iterator[Change]:
    """Of all forms of ours that are in both."""
    before = {key_of(group): group for group in old["groups"]}
    for group in new["groups"]:
        if key_of(group) in before:
            yield from _changes(new["what"], before[key_of(group)], group)


def _changes(what: str, old: Group, new: Group) -> Iterator[Change]:
    before = {row["form"]: row for row in old["rows"]}
    factors = {row["form"]: _factor(before[row["form"]], row) for row in new["rows"] if row["form"] in before}
    peers = [factor for form, factor in factors.items() if not is_ours(form)]
    machine = statistics.median(peers) if peers else 1.0
    band = max(old["noise_band"] or 0.0, new["noise_band"] or 0.0)
    for form, factor in factors.items():
        if is_ours(form):
            yield Change(f"{what}: {', '.join(key_of(new))}: {form}", factor, factor / machine, 1 + ALLOWED + band)


def _factor(old: dict[str, Any], new: dict[str, Any]) -> float:
    """New time over old, by the clock of replayed graphs where both have it."""
    clock = "graph_ms" if old["graph_ms"] and new["graph_ms"] else "ms"
    return new[clock] / old[clock]


def pairs(old: Path, new: Path) -> Iterator[tuple[Path, Path]]:
    """The files to compare: two files, or those that two folders share."""
    if new.is_file():
        yield old, new
    else:
        yield from ((old / path.name, path) for path in sorted(new.glob("*--*.json")) if (old / path.name).exists())


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare two runs of the same benchmarks; fails on a regression.")
    parser.add_argument("old", type=Path, help="file, or folder of a version")
    parser.add_argument("new", type=Path, help="file, or folder of a version")
    options = parser.parse_args()
    compared = regressions = 0
    for old, new in pairs(options.old, options.new):
        for change in changes(read(old), read(new)):
            compared += 1
            regressions += change.regressed
            if change.regressed or change.own < 1 / change.limit:
                verdict = "SLOWER" if change.regressed else "faster"
                told = f"{change.own:.2f} of the time ({change.raw:.2f} as timed, at most {change.limit:.2f})"
                print(f"{verdict}: {change.where}: {told}")
    print(f"{compared} forms compared, {regressions} slower than allowed")
    return 1 if regressions or not compared else 0


if __name__ == "__main__":
    sys.exit(main())
