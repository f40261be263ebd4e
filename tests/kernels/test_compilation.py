"""Every kernel compiles ahead of time for each architecture and stays within its budget of registers and shared memory.

``GRESBOX_UPDATE_BUDGET=write pytest -m "slow or not slow" tests/kernels/test_compilation.py -k NAME`` writes what is measured,
rounded up, to budget.json; ``raise`` keeps what is more there, so that the file can hold what two releases of Triton need: it holds
those of 3.6 and 3.9. An entry with spills must carry a ``reason``.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.6")
import triton

ROOT = Path(__file__).resolve().parent.parent.parent
BUDGET = ROOT / "tests" / "kernels" / "budget.json"
COMPILE = ROOT / "tests" / "kernels" / "compile_kernels.py"
KERNELS = sorted(path.stem for path in (ROOT / "gresbox" / "kernels").glob("*.py") if path.stem[0] != "_")
ARCHITECTURES = ("sm_80", "sm_90", "gfx942")
SHARED = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}  # sm_80's launches serve consumer cards, too
FILE = {"sm_80": 65536, "sm_90": 65536, "gfx942": 512 * 4 * 64}  # registers that one program's threads share
WIDTH = {"sm_80": 32, "sm_90": 32, "gfx942": 64}


def measured(cache, name: str, everything: bool) -> dict[str, dict[str, dict]]:
    """By architecture and launch what it needs, from the last run if no source changed since."""
    sources = [COMPILE, ROOT / "gresbox" / "kernels" / f"{name}.py", *sorted((ROOT / "gresbox" / "kernels").glob("_*.py"))]
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    key = hashlib.sha256(f"{triton.__version__}{text}".encode()).hexdigest()
    place = f"kernels/{name}-{'all' if everything else 'default'}"
    known = cache.get(place, None)
    if known is not None and known["key"] == key:
        return known["found"]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    command = [sys.executable, str(COMPILE), name, ",".join(ARCHITECTURES), *(["all"] if everything else [])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    found: dict[str, dict[str, dict]] = {}
    for line in lines:
        if "launch" in line:
            found.setdefault(line.pop("arch"), {})[line.pop("launch")] = line
    started = [(line["arch"], line["start"]) for line in lines if "start" in line]
    failed = [pair for pair in started if pair[1] not in found.get(pair[0], {})]
    assert done.returncode == 0, f"{name}: {failed} failed\n{done.stderr[-4000:]}"
    cache.set(place, {"key": key, "found": found})
    return found


def exceeded(found: dict[str, int], budget: dict | None, arch: str) -> list[str]:
    """What a launch needs more of than it may."""
    if budget is None:
        return ["no budget"]
    problems = [
        f"{what} {found[what]} > {budget[what]}" for what in ("registers", "shared", "spills") if found[what] > budget[what]
    ]
    if budget["spills"] and not budget.get("reason"):
        problems.append("spills without a reason")
    if budget.get("matrix") and not found["matrix"]:
        problems.append("no matrix instructions")
    if found["shared"] > SHARED[arch]:
        problems.append(f"shared memory {found['shared']} > {SHARED[arch]} that {arch} has")
    threads = found["warps"] * WIDTH[arch]
    if arch != "gfx942" and found["registers"] * threads > FILE[arch]:
        problems.append(f"{found['registers']} registers in {threads} threads")
    return problems


def update(name: str, found: dict[str, dict[str, dict]], everything: bool, keep: bool) -> None:
    known = json.loads(BUDGET.read_text(encoding="utf-8"))
    for arch, launches in found.items():
        before = known.setdefault(name, {}).setdefault(arch, {})
        entries = {} if everything else dict(before)
        for label, needs in launches.items():
            roomy = -(-(needs["registers"] + 8) // 32) * 32  # the compiler's next release may need a few more
            limit = {"registers": min(roomy, 255 if arch != "gfx942" else 512)}
            limit |= {"shared": (needs["shared"] // 4096 + 1) * 4096, "spills": needs["spills"], "matrix": needs["matrix"] > 0}
            old = before.get(label, {})
            if keep and old:
                limit = {what: (min if what == "matrix" else max)(limit[what], old[what]) for what in limit}
            entries[label] = limit | ({"reason": old["reason"]} if limit["spills"] and "reason" in old else {})
        known[name][arch] = entries
    BUDGET.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def check(cache, name: str, everything: bool) -> None:
    found = measured(cache, name, everything)
    assert set(found) == set(ARCHITECTURES)
    how = os.environ.get("GRESBOX_UPDATE_BUDGET")
    if how:
        update(name, found, everything, keep={"write": False, "raise": True}[how])
    budget = json.loads(BUDGET.read_text(encoding="utf-8")).get(name, {})
    problems = []
    for arch, launches in found.items():
        for label, needs in launches.items():
            too_much = exceeded(needs, budget.get(arch, {}).get(label), arch)
            problems += [f"{arch}, {label}: {', '.join(too_much)}"] if too_much else []
        if everything:
            problems += [f"{arch}, {label}: the launch is gone" for label in set(budget.get(arch, {})) - set(launches)]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("name", KERNELS)
def test_the_default_launch_of_every_kernel_compiles(pytestconfig, name):
    check(pytestconfig.cache, name, everything=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_every_launch_compiles(pytestconfig, name):
    check(pytestconfig.cache, name, everything=True)


def test_a_budget_is_red_when_exceeded():
    fine = {"registers": 100, "shared": 1024, "spills": 0, "matrix": 4, "warps": 4}
    budget = {"registers": 128, "shared": 4096, "spills": 0, "matrix": True}
    assert not exceeded(fine, budget, "sm_80")
    assert exceeded(fine, None, "sm_80") == ["no budget"]
    for worse in ({"registers": 129}, {"shared": 4097}, {"spills": 1}, {"matrix": 0}):
        assert exceeded(fine | worse, budget, "sm_80")
    assert exceeded(fine | {"spills": 3}, budget | {"spills": 3}, "sm_80") == ["spills without a reason"]
    assert not exceeded(fine | {"spills": 3}, budget | {"spills": 3, "reason": "it is measured faster"}, "sm_80")
    assert exceeded(fine | {"shared": 120_000}, budget | {"shared": 120_000}, "sm_80")
    assert exceeded(fine | {"warps": 32}, budget, "sm_80")
