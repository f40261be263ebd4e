"""Run benchmarks and keep what they measure, one file per benchmark and device.

    python -m benchmarks.run ops                      every op on the CPU; what is in the files already is not measured again
    python -m benchmarks.run all --device cuda --part 2/6
    python -m benchmarks.run mask_costs --again       one benchmark, afresh
    python -m benchmarks.run ops --quick              a few rounds of each first case, too few for ratios; nothing is written
    python -m benchmarks.run --list

A file grows case by case; a run that was stopped goes on where it was. After ``--minutes`` no case is begun any more. Parts are
every n-th case, so that several runs share the work and a folder, one after the other or at once.

What needs a package that is not installed is named as not run, whether it is a form, a case or a benchmark, and is no failure. The
exit code is 1 after a failure of ours, 3 while cases are left, and otherwise 0.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None  # importing PyTorch may make it all there are
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch: its profiler, asked for memory, otherwise writes a line per call

import torch  # noqa: E402
import torch._inductor.config  # noqa: E402

from benchmarks.ceilings import measure_ceilings  # noqa: E402
from benchmarks.clocks import CPUTimer  # noqa: E402
from benchmarks.harness import DEFAULT_DTYPES, FAILURES, is_ours, measure, not_installed, reason_of  # noqa: E402
from benchmarks.results import RESULTS, ResultFile, device_name  # noqa: E402
from gresbox import __version__  # noqa: E402

KINDS = ("ops", "step", "metrics", "train")
UNFINISHED = 3


class Piece(NamedTuple):
    """What is measured and written at once: all directions and forms of one case."""

    what: str
    module: ModuleType
    case: str
    dtype: str


def names_of(kind: str) -> list[str]:
    """The benchmarks of a kind: the files of its folder."""
    return sorted(path.stem for path in (Path(__file__).parent / kind).glob("[a-z]*.py"))


def modules_of(chosen: Sequence[str], failed: list[str] | None = None) -> dict[str, ModuleType]:
    """Benchmarks by name; ``chosen`` are kinds, names or "all". One that cannot be imported is named in ``failed``, or raises."""
    of_kind = {kind: names_of(kind) for kind in KINDS}
    homes = {name: kind for kind, names in of_kind.items() for name in names}
    wanted: list[str] = []
    for word in chosen:
        names = list(homes) if word == "all" else of_kind.get(word, [word])
        unknown = [name for name in names if name not in homes]
        if unknown:
            raise SystemExit(f"no benchmark {unknown[0]!r}; there are {', '.join([*KINDS, *homes])}")
        wanted += [name for name in names if name not in wanted]
    modules = {}
    for name in wanted:
        try:
            modules[name] = importlib.import_module(f"benchmarks.{homes[name]}.{name}")
        except ImportError as failure:
            lacks = not_installed(failure)
            if lacks is None:
                if failed is None:
                    raise
                failed.append(name)
            said = f"not run: {lacks}" if lacks else f"FAILED: {reason_of(failure)}"
            print(f"{name}: {said}", file=sys.stderr)
    return modules


def pieces_of(modules: dict[str, ModuleType], device: str, *, chosen: Sequence[str], quick: bool) -> Iterator[Piece]:
    for what, module in modules.items():
        cases = [case for case in module.ON.get(device, ()) if not chosen or case in chosen]
        dtypes = getattr(module, "DTYPES", DEFAULT_DTYPES)[device] if cases else ()
        for case in cases[:1] if quick else cases:
            for dtype in dtypes[:1] if quick else dtypes:
                yield Piece(what, module, case, dtype)


def part_of(text: str) -> tuple[int, int]:
    """``"2/6"`` -> ``(2, 6)``."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    turn, parts = (int(number) for number in found.groups()) if found else (0, 0)
    if not 1 <= turn <= parts:
        raise SystemExit(f"--part must be I/N with I from 1 to N, got {text}")
    return turn, parts


def refuse_unknown(option: str, asked: Sequence[str], there: Iterable[str]) -> None:
    """A name that nothing has would measure nothing."""
    known = list(dict.fromkeys(there))
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise SystemExit(f"{option}: there is no {unknown[0]!r} in what is to run; there are {'; '.join(known)}")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Run benchmarks; see the head of the file for examples.")
    parser.add_argument("what", nargs="*", default=["all"], help="ops, step, metrics, train, all, or names of benchmarks")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default: cpu)")
    parser.add_argument("--against", nargs="+", default=[], metavar="FORM", help="only these peers beside our own forms")
    parser.add_argument("--case", nargs="+", default=[], metavar="CASE", help="only these cases")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="every N-th case, from the I-th (default: 1/1)")
    parser.add_argument("--minutes", type=float, default=None, help="begin no case after this time (default: 7 with --part)")
    parser.add_argument("--seconds", type=float, default=2.0, help="for the rounds of a case and direction (default: 2)")
    parser.add_argument("--cpu-time", action="store_true", help="this process's CPU time, for busy machines (with one thread)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--out", type=Path, default=RESULTS / __version__, help="folder to write to (default: the version's)")
    parser.add_argument("--again", action="store_true", help="measure again what the files hold")
    parser.add_argument("--quick", action="store_true", help="a few rounds of each first case, to see whether it runs")
    parser.add_argument("--list", action="store_true", help="name the cases and leave")
    return parser


def main() -> int:
    options = arguments().parse_args()
    turn, parts = part_of(options.part)
    broken: list[str] = []
    modules = modules_of(options.what, broken)
    if modules:
        refuse_unknown("--case", options.case, (case for module in modules.values() for case in module.ON.get(options.device, ())))
    pieces = list(pieces_of(modules, options.device, chosen=options.case, quick=options.quick))[turn - 1 :: parts]
    if options.list:
        print("\n".join(f"{piece.what}: {piece.case}, {piece.dtype}" for piece in pieces))
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here")
    if options.against:
        refuse_unknown("--against", options.against, (form for m in modules.values() for form in m.forms(options.device)))
    if CORES is not None:  # `taskset` holds
        os.sched_setaffinity(0, CORES)
    if options.device == "cpu":  # a pool of compilers would take time from what is measured
        torch._inductor.config.compile_threads = 1
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.cpu_time:
        if options.device != "cpu" or torch.get_num_threads() > 1:
            raise SystemExit("--cpu-time is for the CPU with --threads 1: threads that wait for each other use CPU time too")
        CPUTimer.now = staticmethod(time.process_time)
    minutes = options.minutes if options.minutes is not None or parts == 1 else 7.0
    code = run(pieces, options, deadline=None if minutes is None else time.monotonic() + 60 * minutes)
    return 1 if broken else code


def run(pieces: Sequence[Piece], options: argparse.Namespace, deadline: float | None) -> int:
    """Measure what is not in the files yet; 0, 1 after a failure of ours, or 3 if the time was over first."""
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    ceilings = measure_ceilings(device)
    print("ceilings: " + ", ".join(f"{name} {value:.3g}" for name, value in ceilings.items()), flush=True)
    files: dict[str, ResultFile] = {}
    failed, left = 0, []
    for piece in pieces:
        if not options.quick and piece.what not in files:
            path = options.out / f"{piece.what}--{device_name(device)}.json"
            try:
                files[piece.what] = ResultFile(path, piece.what, device, ceilings, again=options.again)
            except ValueError as refusal:
                raise SystemExit(str(refusal)) from refusal
        if not options.quick and not options.again and files[piece.what].has(piece.case, piece.dtype):
            continue
        if deadline is not None and time.monotonic() > deadline:
            left.append(piece)
            continue
        start = time.monotonic()
        try:
            groups = measure(
                piece.module,
                piece.case,
                piece.dtype,
                device,
                peers=options.against,
                seconds=options.seconds,
                quick=options.quick,
                ceilings=ceilings,
            )
        except FAILURES as failure:
            lacks = not_installed(failure)
            said = f"not run: {lacks}" if lacks else f"FAILED: {reason_of(failure)}"
            print(f"{piece.what}: {piece.case}, {piece.dtype}: {said}", file=sys.stderr, flush=True)
            failed += lacks is None
            continue
        if not options.quick:
            files[piece.what].add(groups)
        show(piece, groups, time.monotonic() - start)
    if options.quick:
        print("\n--quick: too few rounds to rely on a ratio, and nothing is written")
    if left:
        how = "--again begins anew, so name them with --case" if options.again else "the same command goes on with them"
        print(f"left, {how}: {'; '.join(f'{piece.what}: {piece.case}, {piece.dtype}' for piece in left)}")
    return 1 if failed else UNFINISHED if left else 0


def show(piece: Piece, groups: Sequence[dict[str, Any]], seconds: float) -> None:
    print(f"\n{piece.what}: {piece.case}, {piece.dtype} ({seconds:.0f} s)")
    for group in groups:
        noise = "" if group["noise_band"] is None else f", noise band {group['noise_band']:.2f}"
        print(f"  {group['direction']} ({group['rounds']} rounds{noise})")
        for row in group["rows"]:
            memory = "" if row["working_bytes"] is None else f"  {row['working_bytes'] / 2**20:9.2f} MB"
            error = max(row["error"], row["error_gradients"] or 0.0)
            note = row["differs"] or ("" if row["right"] else "WRONG")
            line = f"    {row['form']:28} {row['ms']:10.3f} ms{memory}  error {error:.1e}  {note}"
            if is_ours(row["form"]):
                line += "  " * bool(note) + "  ".join(f"{peer} {ratio['ratio']:.2f}x" for peer, ratio in row["wall_ratios"].items())
            print(line.rstrip())
        for form, reason in group["not_run"].items():
            print(f"    {form:28} not run: {reason}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
