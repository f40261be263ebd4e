"""Write the tables of the documentation from the files in ``benchmarks/results``: ``python -m benchmarks.page``.

``docs/benchmarks.md`` is written as a whole; in other pages what stands between ``<!-- benchmarks: NAME ... -->`` and
``<!-- end -->`` is. A test compares the pages with the files, so a number in a table cannot be typed in. With ``--results`` and
``--out`` the same pages are written from other files into another folder.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.harness import DEFAULT_DTYPES, Target, is_ours
from benchmarks.results import RESULTS, ROOT, File, Group, is_wrong, key_of, read_all
from benchmarks.run import KINDS, modules_of
from gresbox import __version__
from gresbox._files import write_atomically

DOCS = ROOT / "docs"
PAGE = "benchmarks.md"
OTHERS = ("aml.md", "metrics.md", "datasets.md")
BLOCK = re.compile(r"(<!-- benchmarks: ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
NOT_YET = "not yet measured"
SAME = "same form"
VERDICTS = ("met", "within the noise", "**missed**")  # from the best to the worst
TITLES = {"ops": "Ops", "step": "A training step", "metrics": "Metrics and data", "train": "Training"}
Files = dict[tuple[str, str], File]

HEAD = """\
# Benchmarks

```bash
python -m benchmarks.run all                  # ops, step, metrics, train, or names; goes on where it was stopped
python -m benchmarks.run all --device cuda --part 1/6
python -m benchmarks.compare OLD NEW          # fails where ours became slower, larger or wrong, or is gone
python -m benchmarks.page                     # writes this page and the plots from the files
```

It needs the repository and PyTorch; what needs a package that is not installed, a peer or a whole benchmark, is named as not run
and is no failure. Parts may be run one after the other or at once, into one folder. Every number in a table is read from
`benchmarks/results/`; none is typed in, and none is a model's estimate. The notes beneath tables are written by hand: their numbers
are those of trials beside these files.

## How a number is taken

- All forms of a computation run on the same inputs, once per round, in an order that turns round. **A ratio is the median over
  rounds of the peer's time over ours in the same round**, so that a slow moment of the machine hits both: above 1, ours is faster.
  In brackets is the 95 % bootstrap interval.
- Ours runs twice in each round. How far the ratio of these two may be from 1 is the **noise band**; a ratio inside it is shown as
  "=".
- Every row has the **error** of its outputs and gradients against a float64 reference, relative in the 2-norm. A form whose error
  is above the dtype's tolerance (`gresbox.testing`, or the benchmark's own) is wrong: its error is bold, and it gets no ratio. The
  exception is a form that is meant to give another result (points drawn at random, say): it is named under the table with its
  reason, its error is shown but not judged, and it has ratios.
- A **target** is met if the median ratio reaches it, and missed otherwise. One of "≥ 1x" asks that ours be no slower: where the
  ratio is below 1 by no more than the noise band, the verdict is "within the noise", with both numbers, and neither met nor missed.
- "**same form**": for this device and size `backend="auto"` picks the very code of "eager", so their ratio would be noise.
- "backward" is the second part of the calls of "forward+backward"; "forward" runs without gradients.
- **Memory** is working memory: the most that a call holds at one moment of what it has allocated, its results left out wherever
  they are there already (on the CPU: of PyTorch's allocations).
- On CUDA a row has two times, wall time and that of a replayed CUDA graph, with cold caches, and its share of the **roofline**:
  the least time that copies, products, gathers and launches allow, as measured in the same run. On a CPU there is no share: its
  caches stay warm, and what is measured beyond them bounds nothing that they hold. The plots draw the best ceilings of all runs on
  the device.
- "eager" is the definition in plain PyTorch; "compiled" is `torch.compile` of the form before the comma.
"""


def render(files: Files, modules: dict[str, dict[str, ModuleType]], out: Path = DOCS) -> str:
    """The page ``benchmarks.md``, with the plots that are in the folder it goes to."""
    devices = sorted({"cpu", *(device for _, device in files)}, key=lambda device: (device != "cpu", device))
    parts = [HEAD, "## Where\n", *_environments(files, devices), "## Targets\n", *_targets(files, modules, devices)]
    for device in devices:
        for name, title in (("ratios", "Ratios to the peers"), ("roofline", "Rooflines"), ("memory", "Memory")):
            picture = out / "_static" / f"benchmarks_{name}--{device}.png"
            if picture.exists():
                parts.append(f"![{title} on {device}.](_static/{picture.name})\n")
    for kind, of_kind in modules.items():
        parts.append(f"## {TITLES[kind]}\n")
        for name, module in of_kind.items():
            parts += [f"### {name}\n", _summary(module), *_tables(files, name, module, devices)]
    parts += [
        "## Ablations\n",
        "Trainings on the synthetic benchmark, one switch at a time, are on pages of their own: [InstAlign](ablation.md),\n"
        "[IGVG](ablation_igvg.md), [AML](ablation_aml.md), [AML's scale and threshold](ablation_aml_tuning.md).\n",
    ]
    return "\n".join(parts)


def _summary(module: ModuleType) -> str:
    return (module.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ") + "\n"


def _environments(files: Files, devices: Sequence[str]) -> Iterator[str]:
    for device in devices:
        found = {what: _places(content["environment"]) for (what, where), content in files.items() if where == device}
        if not found:
            yield f"- **{device}**: {NOT_YET}."
            continue
        common = Counter(found.values()).most_common(1)[0][0]
        yield f"- **{device}**: {', '.join(common)}."
        others: dict[str, list[str]] = {}
        for what, places in found.items():
            if places != common:
                others.setdefault(", ".join(place for place in places if place not in common), []).append(what)
        yield from (f"  - {', '.join(names)}: with {places}." for places, names in others.items())
    if not any(device != "cpu" for device in devices):
        yield f"- **GPU**: {NOT_YET}; no card was at hand."
    yield ""


def _places(environment: Mapping[str, Any]) -> tuple[str, ...]:
    """An environment in words."""
    packages = (f"{name} {number}" for name, number in environment["packages"].items() if number != "not installed")
    counts = (f"{environment[name]} {name[: -1 if environment[name] == 1 else None]}" for name in ("cores", "threads"))
    return (environment["processor"], *counts, environment["timer"], f"Python {environment['python']}", *packages)


def _targets(files: Files, modules: dict[str, dict[str, ModuleType]], devices: Sequence[str]) -> Iterator[str]:
    found = [(name, target) for of_kind in modules.values() for name, m in of_kind.items() for target in getattr(m, "TARGETS", [])]
    cards = [device for device in devices if device != "cpu"]
    for kind, where, columns in (("cpu", "CPU", ["cpu"]), ("cuda", "GPU", cards or ["GPU"])):
        rows = []
        for name, target in found:
            if target.device == kind:
                told = [verdict(files.get((name, column)), target, modules) for column in columns]
                rows.append([name, target.case, target.direction, demand(target), *told])
        if rows:
            yield f"{where}:\n"
            yield table(["benchmark", "case", "direction", "target", *columns], rows)
            yield ""


def demand(target: Target) -> str:
    """A target in words."""
    what = f"{target.form} "
    limits = []
    if target.at_least is not None:
        limits.append(f"≥ {target.at_least:g}x {target.peer}")
    if target.memory_at_most is not None:
        limits.append(f"memory ≤ {target.memory_at_most:g}x {target.peer}'s")
    if target.microseconds_at_most is not None:
        limits.append(f"≤ {target.microseconds_at_most:g} µs")
    if target.syncs_at_most is not None:
        limits.append(f"≤ {target.syncs_at_most} waits for the device")
    clock = ", replayed" if target.clock == "graph" else ""
    return what + ", ".join(limits) + clock + (f", {target.note}" if target.note else "")


def verdict(content: File | None, target: Target, modules: dict[str, dict[str, ModuleType]]) -> str:
    """What was measured, and whether that is enough."""
    if content is None:
        return NOT_YET
    module = next(of_kind[content["what"]] for of_kind in modules.values() if content["what"] in of_kind)
    group = _group_of(content, target, module)
    rows = {} if group is None else {row["form"]: row for row in group["rows"]}
    if group is None or target.form not in rows:
        return NOT_YET
    row, peer = rows[target.form], rows.get(target.peer)
    if is_wrong(row):
        return f"**missed**: wrong, error {_error(row):.1e}"
    if target.peer is not None:
        if _same_form(module, content, group, target.form, target.peer):
            return SAME
        if peer is None:
            return f"not run: {group['not_run'].get(target.peer, 'not asked for')}"
        if is_wrong(peer):
            return f"not judged: {target.peer} is wrong, error {_error(peer):.1e}"
        if target.at_least is not None and target.peer not in row[f"{target.clock}_ratios"]:
            return "not run: no time for this clock"
    told = list(_findings(target, group["noise_band"] or 0.0, row, peer))
    worst = max((word for word, _ in told), key=VERDICTS.index)
    return f"{worst}: {', '.join(words for _, words in told)}"


def _findings(target: Target, band: float, row: dict[str, Any], peer: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    """For each limit of a target one of ``VERDICTS`` and what was measured."""

    def judge(fine: bool) -> str:
        return VERDICTS[0 if fine else -1]

    if target.at_least is not None:
        ratio = row[f"{target.clock}_ratios"][target.peer]["ratio"]
        if target.at_least <= 1 and target.at_least - band <= ratio < target.at_least:  # "no slower" cannot be told there
            yield VERDICTS[1], f"{ratio:.2f}x (band {band:.2f})"
        else:
            yield judge(ratio >= target.at_least), f"{ratio:.2f}x"
    if target.memory_at_most is not None and peer is not None:
        share = row["working_bytes"] / max(peer["working_bytes"], 1)  # a target for memory is never one of "backward" alone
        yield judge(share <= target.memory_at_most), f"memory {share:.2f}x"
    if target.microseconds_at_most is not None:
        took = 1e3 * (row["graph_ms"] if target.clock == "graph" and row["graph_ms"] else row["ms"])
        yield judge(took <= target.microseconds_at_most), f"{took:.0f} µs"
    if target.syncs_at_most is not None:
        yield judge(row["syncs"] is not None and row["syncs"] <= target.syncs_at_most), f"{row['syncs']} waits"


def _group_of(content: File, target: Target, module: ModuleType) -> Group | None:
    dtype = target.dtype or getattr(module, "DTYPES", DEFAULT_DTYPES)[target.device][0]
    wanted = (target.case, dtype, target.direction)
    return next((group for group in content["groups"] if key_of(group) == wanted), None)


def _error(row: Mapping[str, Any]) -> float:
    return max(row["error"], row["error_gradients"] or 0.0)


def _same_form(module: ModuleType | None, content: File, group: Group, form: str, peer: str) -> bool:
    """Whether both run the same code, so that their ratio is noise."""
    told = getattr(module, "same_form", None)
    device = content["environment"]["device"]
    return told is not None and (form, peer) == ("gresbox", "eager") and told(group["case"], device, group["direction"])


def _tables(files: Files, name: str, module: ModuleType | None, devices: Sequence[str]) -> Iterator[str]:
    """A table per device, what was not run, and the module's notes."""
    for device in devices:
        content = files.get((name, device))
        if content is None or not content["groups"]:
            yield f"{device}: {NOT_YET}.\n"
            continue
        yield from _table_of(content, module)
    if not any(device != "cpu" for device in devices) and module is not None and module.ON.get("cuda"):
        yield f"GPU: {NOT_YET}.\n"
    notes = getattr(module, "NOTES", "")
    if notes:
        yield notes.strip() + "\n"


def _table_of(content: File, module: ModuleType | None) -> Iterator[str]:
    groups = content["groups"]
    peers = list(dict.fromkeys(row["form"] for group in groups for row in group["rows"] if not is_ours(row["form"])))
    graphs = any(row["graph_ms"] is not None for group in groups for row in group["rows"])
    many = len({group["dtype"] for group in groups}) > 1
    head = ["case", *(["dtype"] if many else []), "direction", "form", "ms", *(["replayed, ms", "roofline"] if graphs else [])]
    head += ["memory", "error", *(f"against {peer}" for peer in peers)]
    rows = []
    for group in groups:
        for row in group["rows"]:
            if is_ours(row["form"]):
                start = [group["case"], *([group["dtype"]] if many else []), group["direction"], row["form"], number(row["ms"])]
                if graphs:
                    share = "" if row["roofline"] is None else percent(row["roofline"])
                    start += ["" if row["graph_ms"] is None else number(row["graph_ms"]), share]
                held, stars = row["working_bytes"], "**" if is_wrong(row) else ""
                start += ["" if held is None else memory(held), f"{stars}{_error(row):.0e}{stars}"]
                for peer in peers:
                    same = _same_form(module, content, group, row["form"], peer)
                    start.append(SAME if same else against(group, row, peer))
                rows.append(start)
    yield f"{content['device']}, {_commits(groups)}:\n"
    yield table(head, rows)
    yield ""
    reasons = {f"{form} ({reason})" for group in groups for form, reason in group["not_run"].items()}
    if reasons:
        yield f"Not run: {', '.join(sorted(reasons))}.\n"
    differs = {f"{row['form']}: {row['differs']}" for group in groups for row in group["rows"] if row["differs"]}
    if differs:
        yield f"Not the same result: {'; '.join(sorted(differs))}.\n"


def against(group: Group, row: dict[str, Any], peer: str) -> str:
    """One form's ratio to a peer, as a cell."""
    ratio = row["wall_ratios"].get(peer)
    if ratio is None:
        other = next((other for other in group["rows"] if other["form"] == peer), None)
        return f"wrong ({_error(other):.0e})" if other is not None and is_wrong(other) else ""
    if abs(ratio["ratio"] - 1) <= (group["noise_band"] or 0.0):
        return f"= ({ratio['ratio']:.2f})"
    return f"{ratio['ratio']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})"


def _commits(groups: Iterable[Group]) -> str:
    found = list(dict.fromkeys(group["commit"] for group in groups))
    bands = [group["noise_band"] for group in groups if group["noise_band"] is not None]
    noise = f"; median noise band {statistics.median(bands):.2f}" if bands else ""
    return f"measured at {', '.join(found)}{noise}"


def number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def percent(share: float) -> str:
    """A share of the roofline; above it a cache held what was counted as memory's."""
    return f"{100 * share:.0f} %" if share <= 1 else "above it"


def memory(count: int) -> str:
    return f"{count / 2**20:.1f} MB" if count >= 2**20 else f"{count / 2**10:.0f} kB"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def filled(text: str, files: Files, modules: Mapping[str, ModuleType] | None = None) -> str:
    """A page with its marked blocks written anew."""
    devices = sorted({device for _, device in files}) or ["cpu"]

    def block(match: re.Match[str]) -> str:
        names = match[2].split()
        tables = [line for name in names for line in _tables(files, name, (modules or {}).get(name), devices)]
        return match[1] + "\n" + "\n".join(tables) + "\n" + match[3]

    return BLOCK.sub(block, text)


def pages(files: Files, out: Path = DOCS) -> dict[Path, str]:
    """What every page must hold, by its place in ``out``."""
    modules = {kind: modules_of([kind]) for kind in KINDS}
    of_all = {name: module for of_kind in modules.values() for name, module in of_kind.items()}
    marked = {out / name: filled((DOCS / name).read_text(encoding="utf-8"), files, of_all) for name in OTHERS}
    return {out / PAGE: render(files, modules, out)} | marked


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the documentation's tables and plots from the result files.")
    parser.add_argument(
        "--results", type=Path, default=RESULTS / __version__, help="folder of result files (default: the version's)"
    )
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of the pages (default: docs)")
    parser.add_argument("--no-plots", action="store_true", help="tables only; without it matplotlib is needed")
    options = parser.parse_args()
    try:
        files = read_all(options.results)
    except ValueError as refusal:
        raise SystemExit(str(refusal)) from refusal
    if not files:
        raise SystemExit(f"there are no result files in {options.results}")
    (options.out / "_static").mkdir(parents=True, exist_ok=True)
    if not options.no_plots:
        from benchmarks.plot import draw_all

        print(*draw_all(files, options.out / "_static"), sep="\n")
    for path, text in pages(files, options.out).items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            _write(path, text)
            print(path)


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    main()
