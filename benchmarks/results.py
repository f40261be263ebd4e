"""The files ``results/<version>/<what>--<device>.json``: what they say about where, how they are checked and grow."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.clocks import CPUTimer
from gresbox import __version__
from gresbox._files import write_atomically

SCHEMA = 1
ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "scipy",
    "transformers",
    "torchvision",
    "torchmetrics",
    "torch-linear-assignment",
    "deformops",
    "msda-triton",
)
File = dict[str, Any]
Group = dict[str, Any]
Kinds = Mapping[str, type | tuple[type, ...]]

_OPTIONAL_NUMBER = (int, float, type(None))
FILE: Kinds = {
    "schema": int,
    "what": str,
    "device": str,
    "version": str,
    "environment": dict,
    "ceilings": dict,
    "groups": list,
}
ENVIRONMENT: Kinds = {
    "device": str,
    "timer": str,
    "threads": int,
    "cores": int,
    "system": str,
    "machine": str,
    "python": str,
    "packages": dict,
    "processor": str,
    "clocks": dict,
}
GROUP: Kinds = {
    "case": str,
    "sizes": dict,
    "dtype": str,
    "direction": str,
    "tolerance": float,
    "rounds": int,
    "noise_band": _OPTIONAL_NUMBER,
    "cost": (dict, type(None)),
    "rows": list,
    "not_run": dict,
    "commit": str,
    "date": str,
}
ROW: Kinds = {
    "form": str,
    "ms": (int, float),
    "ms_low": (int, float),
    "ms_high": (int, float),
    "graph_ms": _OPTIONAL_NUMBER,
    "graph_failure": (str, type(None)),
    "syncs": (int, type(None)),
    "error": (int, float),
    "error_gradients": _OPTIONAL_NUMBER,
    "right": bool,
    "differs": str,
    "roofline": _OPTIONAL_NUMBER,
    "working_bytes": (int, type(None)),
}
RATIO: Kinds = {"ratio": (int, float), "low": (int, float), "high": (int, float)}


def device_name(device: torch.device) -> str:
    """What the file is called by: ``cpu``, or the card's model as in ``h200``."""
    if device.type != "cuda":
        return device.type
    words = re.findall(r"[a-z0-9]+", torch.cuda.get_device_name(device).lower())
    models = [word for word in words if re.search(r"\d", word) and word not in ("80gb", "40gb")]
    return models[0] if models else "cuda"


def describe_environment(device: torch.device) -> dict[str, Any]:
    """What times depend on; nothing that says whose machine it is."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    cuda = device.type == "cuda"
    return {
        "device": device.type,
        "timer": "CPU time" if not cuda and CPUTimer.now is time.process_time else "wall time",
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "system": platform.system(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "packages": packages,
        "processor": torch.cuda.get_device_name(device) if cuda else _processor(),
        "clocks": _gpu_clocks() if cuda else _cpu_clocks(),
    }


def commit() -> str:
    """The commit that is measured, with ``+`` after it where files of the library or the benchmarks differ from it."""
    given = os.environ.get("GRESBOX_COMMIT")  # a copy of the tree has no history
    if given:
        return given
    try:
        sha = _output("git", "rev-parse", "--short=12", "HEAD")
        changed = _output("git", "status", "--porcelain", "--", "gresbox", "benchmarks/*.py", "benchmarks/**/*.py")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return sha + ("+" if changed else "")


class ResultFile:
    """The file of one benchmark on one device: read if it is there, written after each case.

    Several runs may write one file at the same time, each its own cases (not on Windows): what is there is read again before each
    writing. The ceilings are those of the last run.

    Args:
        path: Its place.
        what: The benchmark's name.
        device: Where it runs.
        ceilings: Of this run.
        again: Forget what was measured elsewhere or with other versions.

    Raises:
        ValueError: If the file was written elsewhere or with other versions, and is not to be forgotten.
    """

    def __init__(
        self,
        path: Path,
        what: str,
        device: torch.device,
        ceilings: Mapping[str, float],
        *,
        again: bool = False,
    ) -> None:
        self.path, self.again = path, again
        self.content: File = {
            "schema": SCHEMA,
            "what": what,
            "device": device_name(device),
            "version": __version__,
            "environment": describe_environment(device),
            "ceilings": dict(ceilings),
            "groups": [],
        }
        self.content["groups"] = self._there()

    def _there(self) -> list[Group]:
        """What the file holds now."""
        if not self.path.exists():
            return []
        try:
            there = read(self.path)
        except ValueError:
            if self.again:
                return []
            raise
        environment = self.content["environment"]
        differs = [key for key in environment if key != "clocks" and there["environment"][key] != environment[key]]
        if differs and not self.again:
            raise ValueError(f"{self.path.name} was measured with another {', '.join(differs)}; --again forgets it.")
        return [] if differs else there["groups"]

    def has(self, case: str, dtype: str) -> bool:
        return any(group["case"] == case and group["dtype"] == dtype for group in self.content["groups"])

    def add(self, groups: list[Group]) -> None:
        """Put groups in the place of those of the same case, dtype and direction, and write the file."""
        stamp = {"commit": commit(), "date": datetime.now(UTC).date().isoformat()}
        fresh = [group | stamp for group in groups]
        keys = {key_of(group) for group in fresh}
        with alone_in(self.path.parent):
            self.content["groups"] = [group for group in self._there() if key_of(group) not in keys] + fresh
            problems = list(problems_of(self.content))
            if problems:
                raise ValueError(f"{self.path.name} would not be valid: {'; '.join(problems[:5])}.")
            text = json.dumps(self.content, indent=1, ensure_ascii=False) + "\n"
            write_atomically(self.path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other run writes into a folder, and keep others waiting; the system ends it with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    if os.name == "nt":  # Windows cannot open a directory
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def key_of(group: Group) -> tuple[str, str, str]:
    return group["case"], group["dtype"], group["direction"]


def is_wrong(row: Mapping[str, Any]) -> bool:
    """Whether the error is too large for a form that is meant to give the reference's result."""
    return not row["right"] and not row["differs"]


def read(path: Path) -> File:
    """A file's content.

    Raises:
        ValueError: If it is not in the form of today.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as failure:
        raise ValueError(f"{path.name} is not valid: {failure}.") from failure
    problems = list(problems_of(content))
    if problems:
        raise ValueError(f"{path.name} is not valid: {'; '.join(problems[:5])}.")
    return content


def read_all(folder: Path) -> dict[tuple[str, str], File]:
    """All files of a version by benchmark and device."""
    return {(content["what"], content["device"]): content for content in map(read, sorted(folder.glob("*--*.json")))}


def problems_of(content: File) -> Iterator[str]:
    """What is wrong with a file; a row without an error is."""
    yield from _kinds(content, FILE, "file")
    if content.get("schema") != SCHEMA or not isinstance(content.get("groups"), list):
        yield f"file: schema must be {SCHEMA}"
        return
    yield from _kinds(content["environment"], ENVIRONMENT, "environment")
    for group in content["groups"]:
        where = "/".join(str(group.get(name)) for name in ("case", "dtype", "direction"))
        yield from _kinds(group, GROUP, where)
        for row in group.get("rows", []):
            yield from _row_problems(row, f"{where}/{row.get('form')}", group.get("direction"))
    keys = [key_of(group) for group in content["groups"]]
    if len(set(keys)) < len(keys):
        yield "file: a case occurs twice"


def _row_problems(row: dict[str, Any], where: str, direction: object) -> Iterator[str]:
    extra = {"wall_ratios": dict, "graph_ratios": dict} if str(row.get("form")).startswith("gresbox") else {}
    yield from _kinds(row, {**ROW, **extra}, where)
    if direction != "forward" and not isinstance(row.get("error_gradients"), int | float):
        yield f"{where}: the gradients have no error"
    for clock in extra:
        for peer, ratio in row.get(clock, {}).items():
            yield from _kinds(ratio, RATIO, f"{where}, {clock} to {peer}")


def _kinds(found: Any, kinds: Kinds, where: str) -> Iterator[str]:
    if not isinstance(found, dict):
        yield f"{where}: must be an object"
        return
    for name, kind in kinds.items():
        if name not in found:
            yield f"{where}: {name} is missing"
        elif not isinstance(found[name], kind) or (isinstance(found[name], bool) and kind is not bool):
            yield f"{where}: {name} is {found[name]!r}"
    for name in found.keys() - kinds.keys():
        yield f"{where}: {name} is unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _cpu_clocks() -> dict[str, float]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    speeds = [float(line.split(":", 1)[1]) for line in lines if line.startswith("cpu MHz")]
    return {"mhz": max(speeds)} if speeds else {}


def _gpu_clocks() -> dict[str, float | str]:
    names = {"clocks.sm": "sm_mhz", "clocks.mem": "memory_mhz", "clocks.max.sm": "sm_most_mhz", "driver_version": "driver"}
    try:
        text = _output("nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits", "--id=0")
    except (OSError, subprocess.CalledProcessError):
        return {}
    values = [value.strip() for value in text.split(",")]
    return dict(zip(names.values(), values, strict=False))


def _output(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=20).stdout.strip()
