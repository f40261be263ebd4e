"""Write the tables of the documentation from the files in ``benchmarks/results``: ``python -m benchmarks.page``.

``docs/benchmarks.md`` is written as a whole; in other pages what stands between ``<!-- benchmarks: NAME ... -->`` and
``<!-- end -->`` is. A test compares the pages with the files, so a number cannot be typed in.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.harness import DEFAULT_DTYPES, Target, is_ours
from benchmarks.results import RESULTS, ROOT, File, Group, read_all
from benchmarks.run import KINDS, modules_of
from gresbox import __version__
from gresbox._files import write_atomically

PAGE = ROOT / "docs" / "benchmarks.md"
OTHERS = ("aml.md", "metrics.md", "datasets.md")
BLOCK = re.compile(r"(<!-- benchmarks: ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
NOT_YET = "not yet measured"
TITLES = {"ops": "Ops", "step": "A training step", "metrics": "Metrics and data", "train": "Training"}
Files = dict[tuple[str, str], File]

HEAD = """\
# Benchmarks

```bash
python -m benchmarks.run all                  # ops, step, metrics, train, or names; goes on where it was stopped
python -m benchmarks.run all --device cuda --part 1/6
python -m benchmarks.compare OLD NEW          # fails where ours became slower by more than 10 % and the noise
python -m benchmarks.page                     # writes this page and the plots from the files
```

It needs the repository and PyTorch; what needs a package that is not installed, a peer or a whole benchmark, is named as not run
and is no failure. Parts may be run one after the other or at once, into one folder. Every number on this page is read from
`benchmarks/results/`; none is typed in, and none is a model's estimate.

## How a number is taken

- All forms of a computation run on the same inputs, once per round, in an order that turns round. **A ratio is the median over
  rounds of the peer's time over ours in the same round**, so that a slow moment of the machine hits both: above 1, ours is faster.
  In brackets is the 95 % bootstrap interval.
- Ours runs twice in each round. How far the ratio of these two may be from 1 is the **noise band**; a ratio inside it is shown as
  "=".
- Every row has the **error** of its outputs and gradients against a float64 reference, relative in the 2-norm. A form whose error
  is above the dtype's tolerance (`gresbox.testing`) gets no ratio.
- "backward" is the second part of the calls of "forward+backward"; "forward" runs without gradients.
- **Extra memory** is the largest sum of allocations during a call beyond its results.
- On CUDA a row has two times, wall time and that of a replayed CUDA graph, with cold caches, and its share of the **roofline**:
  the least time that copies, products, gathers and launches allow, as measured in the same run.
- "eager" is the definition in plain PyTorch; "compiled" is `torch.compile` of the form before the comma.
"""


def render(files: Files, modules: dict[str, dict[str, ModuleType]]) -> str:
    """The page ``docs/benchmarks.md``."""
    devices = sorted({"cpu", *(device for _, device in files)}, key=lambda device: (device != "cpu", device))
    parts = [HEAD, "## Where\n", *_environments(files, devices), "## Targets\n", *_targets(files, modules, devices)]
    for device in devices:
        for name, title in (("ratios", "Ratios to the peers"), ("roofline", "Rooflines"), ("memory", "Extra memory")):
            picture = ROOT / "docs" / "_static" / f"benchmarks_{name}--{device}.png"
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
        first = next((content["environment"] for (_, where), content in files.items() if where == device), None)
        if first is None:
            yield f"- **{device}**: {NOT_YET}."
            continue
        packages = ", ".join(f"{name} {number}" for name, number in first["packages"].items() if number != "not installed")
        yield (
            f"- **{device}**: {first['processor']}, {first['cores']} cores, {first['threads']} threads, {first['timer']}, "
            f"Python {first['python']}, {packages}."
        )
    if not any(device != "cpu" for device in devices):
        yield f"- **GPU**: {NOT_YET}; no card was at hand."
    yield ""


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
        limits.append(f"extra memory ≤ {target.memory_at_most:g}x {target.peer}'s")
    if target.microseconds_at_most is not None:
        limits.append(f"≤ {target.microseconds_at_most:g} µs")
    if target.syncs_at_most is not None:
        limits.append(f"≤ {target.syncs_at_most} waits for the device")
    clock = ", replayed" if target.clock == "graph" else ""
    return what + ", ".join(limits) + clock


def verdict(content: File | None, target: Target, modules: dict[str, dict[str, ModuleType]]) -> str:
    """What was measured, and whether that is enough."""
    group = None if content is None else _group_of(content, target, modules)
    rows = {} if group is None else {row["form"]: row for row in group["rows"]}
    if group is None or target.form not in rows:
        return NOT_YET
    row, told = rows[target.form], []
    if not row["right"] and not row["differs"]:
        return f"**missed**: wrong, error {row['error']:.1e}"
    if target.at_least is not None:
        ratio = row[f"{target.clock}_ratios"].get(target.peer)
        if ratio is None:
            return f"not run: {group['not_run'].get(target.peer, 'no time for this clock')}"
        slack = (group["noise_band"] or 0.0) if target.at_least <= 1 else 0.0  # "no slower" is meant within the noise
        told.append((ratio["ratio"] >= target.at_least - slack, f"{ratio['ratio']:.2f}x"))
    if target.memory_at_most is not None:
        if target.peer not in rows:
            return f"not run: {group['not_run'].get(target.peer, target.peer)}"
        share = row["extra_bytes"] / max(rows[target.peer]["extra_bytes"], 1)
        told.append((share <= target.memory_at_most, f"memory {share:.2f}x"))
    if target.microseconds_at_most is not None:
        took = 1e3 * (row["graph_ms"] if target.clock == "graph" and row["graph_ms"] else row["ms"])
        told.append((took <= target.microseconds_at_most, f"{took:.0f} µs"))
    if target.syncs_at_most is not None:
        told.append((row["syncs"] is not None and row["syncs"] <= target.syncs_at_most, f"{row['syncs']} waits"))
    met = all(fine for fine, _ in told)
    return f"{'met' if met else '**missed**'}: {', '.join(words for _, words in told)}"


def _group_of(content: File, target: Target, modules: dict[str, dict[str, ModuleType]]) -> Group | None:
    module = next(of_kind[content["what"]] for of_kind in modules.values() if content["what"] in of_kind)
    dtype = target.dtype or getattr(module, "DTYPES", DEFAULT_DTYPES)[target.device][0]
    wanted = (target.case, dtype, target.direction)
    return next((g for g in content["groups"] if (g["case"], g["dtype"], g["direction"]) == wanted), None)


def _tables(files: Files, name: str, module: ModuleType | None, devices: Sequence[str]) -> Iterator[str]:
    """A table per device, what was not run, and the module's notes."""
    for device in devices:
        content = files.get((name, device))
        if content is None or not content["groups"]:
            yield f"{device}: {NOT_YET}.\n"
            continue
        yield from _table_of(content)
    if not any(device != "cpu" for device in devices) and module is not None and module.ON.get("cuda"):
        yield f"GPU: {NOT_YET}.\n"
    notes = getattr(module, "NOTES", "")
    if notes:
        yield notes.strip() + "\n"


def _table_of(content: File) -> Iterator[str]:
    groups = content["groups"]
    peers = list(dict.fromkeys(row["form"] for group in groups for row in group["rows"] if not is_ours(row["form"])))
    graphs = any(row["graph_ms"] is not None for group in groups for row in group["rows"])
    many = len({group["dtype"] for group in groups}) > 1
    head = ["case", *(["dtype"] if many else []), "direction", "form", "ms", *(["replayed, ms", "roofline"] if graphs else [])]
    head += ["extra memory", "error", *(f"against {peer}" for peer in peers)]
    rows = []
    for group in groups:
        for row in group["rows"]:
            if is_ours(row["form"]):
                start = [group["case"], *([group["dtype"]] if many else []), group["direction"], row["form"], number(row["ms"])]
                if graphs:
                    share = "" if row["roofline"] is None else f"{100 * row['roofline']:.0f} %"
                    start += ["" if row["graph_ms"] is None else number(row["graph_ms"]), share]
                error = max(row["error"], row["error_gradients"] or 0.0)
                start += [memory(row["extra_bytes"]), f"{error:.0e}" if row["right"] or row["differs"] else f"**{error:.0e}**"]
                rows.append(start + [against(group, row, peer) for peer in peers])
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
        return ""
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


def memory(count: int | None) -> str:
    if count is None:
        return ""
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


def pages(folder: Path = RESULTS / __version__) -> dict[Path, str]:
    """What every page must hold."""
    files = read_all(folder)
    modules = {kind: modules_of([kind]) for kind in KINDS}
    of_all = {name: module for of_kind in modules.values() for name, module in of_kind.items()}
    found = {PAGE: render(files, modules)}
    for name in OTHERS:
        path = ROOT / "docs" / name
        found[path] = filled(path.read_text(encoding="utf-8"), files, of_all)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the documentation's tables and plots from the result files.")
    parser.add_argument("--no-plots", action="store_true", help="tables only; without it matplotlib is needed")
    if not parser.parse_args().no_plots:
        from benchmarks.plot import draw_all

        for path in draw_all(read_all(RESULTS / __version__), ROOT / "docs" / "_static"):
            print(path.relative_to(ROOT))
    for path, text in pages().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_atomically(path, lambda temporary, text=text: temporary.write_text(text, encoding="utf-8"))
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
