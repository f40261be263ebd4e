"""Compare two runs of the same benchmarks, old and new: ``python -m benchmarks.compare OLD NEW``, two files or two folders.

The exit code is 1 if a form of ours that OLD holds

- became slower by more than 10 % and the noise band. The machine may have been slower too: what the foreign peers of the same case
  lost, in the median, is taken out, because their code did not change. Peers that run gresbox's code, as "eager" does, are no such
  measure; where there is no other, nothing is taken out, and the line says so;
- needs more memory by more than 10 % and 64 kB;
- was right and is wrong; or
- is missing in NEW;

or if there is nothing to compare. Environments that differ are named, one line for each file.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import is_ours
from benchmarks.results import File, Group, is_wrong, key_of, read

ALLOWED = 0.10
SMALL = 64 << 10  # bytes
RUNS_OURS = re.compile(r"gresbox|eager|all of these|.* as Mask2Former$")  # the last two: our step with pieces exchanged


class Change(NamedTuple):
    """How one form of ours changed.

    Attributes:
        where: Benchmark, case, dtype, direction and form.
        raw: New time over old.
        machine: The same of the foreign peers; None where there are none.
        limit: What ``own`` may be.
        memory: Bytes, old and new; None where they were not counted in the same way.
        went_wrong: Whether it was right and is not.
    """

    where: str
    raw: float
    machine: float | None
    limit: float
    memory: tuple[int, int] | None
    went_wrong: bool

    @property
    def own(self) -> float:
        """``raw`` with the machine's part taken out."""
        return self.raw / (self.machine or 1.0)

    def failures(self) -> Iterator[str]:
        if self.went_wrong:
            yield f"WRONG: {self.where}: its error is above the tolerance, and was not"
        if self.own > self.limit:
            yield f"SLOWER: {self.where}: {self.told()}"
        if self.memory is not None:
            old, new = self.memory
            if new > (1 + ALLOWED) * old and new - old > SMALL:
                yield f"LARGER: {self.where}: {new / 2**20:.2f} MB of memory, {old / 2**20:.2f} MB before"

    def told(self) -> str:
        source = "as timed" if self.machine else "as timed, without a foreign peer to tell the machine's part"
        return f"{self.own:.2f} of the time ({self.raw:.2f} {source}, at most {self.limit:.2f})"


def changes(old: File, new: File) -> Iterator[Change]:
    """Of all forms of ours that are in both."""
    after = {key_of(group): group for group in new["groups"]}
    for group in old["groups"]:
        if key_of(group) in after:
            yield from _changes(old["what"], group, after[key_of(group)])


def _changes(what: str, old: Group, new: Group) -> Iterator[Change]:
    before = {row["form"]: row for row in old["rows"]}
    both = [(before[row["form"]], row) for row in new["rows"] if row["form"] in before]
    foreign = [_factor(*pair) for pair in both if not RUNS_OURS.match(pair[0]["form"])]
    band = max(old["noise_band"] or 0.0, new["noise_band"] or 0.0)
    for was, row in both:
        if is_ours(row["form"]):
            yield Change(
                where=_where(what, new, row),
                raw=_factor(was, row),
                machine=statistics.median(foreign) if foreign else None,
                limit=1 + ALLOWED + band,
                memory=_memory(was, row),
                went_wrong=is_wrong(row) and not is_wrong(was),
            )


def _factor(old: dict[str, Any], new: dict[str, Any]) -> float:
    """New time over old, by the clock of replayed graphs where both have it."""
    clock = "graph_ms" if old["graph_ms"] and new["graph_ms"] else "ms"
    return new[clock] / old[clock]


def _memory(old: dict[str, Any], new: dict[str, Any]) -> tuple[int, int] | None:
    was, held = old["working_bytes"], new["working_bytes"]
    return None if was is None or held is None else (was, held)


def _where(what: str, group: Group, row: dict[str, Any]) -> str:
    return f"{what}: {', '.join(key_of(group))}: {row['form']}"


def lost(old: File, new: File) -> Iterator[str]:
    """The forms of ours that only the old file holds."""
    there = {(key_of(group), row["form"]) for group in new["groups"] for row in group["rows"]}
    for group in old["groups"]:
        for row in group["rows"]:
            if is_ours(row["form"]) and (key_of(group), row["form"]) not in there:
                yield f"MISSING: {_where(old['what'], group, row)}"


def other_environment(old: File, new: File) -> str:
    """What times depend on and is not the same in both files; empty if all is."""
    before, after = (
        {key: value for key, value in file["environment"].items() if key not in ("clocks", "packages")}
        | file["environment"]["packages"]
        for file in (old, new)
    )
    names = [name for name in before | after if before.get(name) != after.get(name)]
    return ", ".join(f"{name} {before.get(name)} before, {after.get(name)} now" for name in names)


def pairs(old: Path, new: Path) -> list[tuple[Path, Path]]:
    """The files to compare: two files, or those of the old folder with those of the same name.

    Raises:
        ValueError: If there is nothing to compare.
    """
    for path in (old, new):
        if not path.exists():
            raise ValueError(f"there is no {path}")
        if path.is_dir() and not any(path.glob("*--*.json")):
            raise ValueError(f"there are no result files in {path}")
    if old.is_dir() != new.is_dir():
        raise ValueError(f"OLD and NEW must be two files or two folders, got {old} and {new}")
    return [(path, new / path.name) for path in sorted(old.glob("*--*.json"))] if old.is_dir() else [(old, new)]


def compare(old: File, new: File) -> tuple[int, int]:
    """Say how a file changed; how many forms are in both, and how many failures there are."""
    warning = other_environment(old, new)
    if warning:
        print(f"{old['what']}: environments differ, and times with them: {warning}")
    failures = list(lost(old, new))
    found = list(changes(old, new))
    for change in found:
        failures += change.failures()
        if change.own < 1 / change.limit:
            print(f"faster: {change.where}: {change.told()}")
    print(*failures, sep="\n", end="\n" * bool(failures))
    return len(found), len(failures)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare two runs of the same benchmarks; fails on a regression.")
    parser.add_argument("old", type=Path, help="file, or folder of a version")
    parser.add_argument("new", type=Path, help="file, or folder of a version")
    options = parser.parse_args()
    compared = failures = 0
    try:
        for old, new in pairs(options.old, options.new):
            if new.exists():
                counts = compare(read(old), read(new))
                compared, failures = compared + counts[0], failures + counts[1]
            else:
                failures += 1
                print(f"MISSING: {new}")
    except ValueError as refusal:
        raise SystemExit(str(refusal)) from refusal
    print(f"{compared} forms compared, {failures} failures")
    return 1 if failures or not compared else 0


if __name__ == "__main__":
    sys.exit(main())
