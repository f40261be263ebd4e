"""What is made of result files: the comparison of two runs, and the tables and plots of the documentation."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the benchmarks are programs of the repository, not a part of the installed package

from benchmarks import compare, page, results
from benchmarks.harness import Cost, Target, measure
from gresbox import __version__

CPU = torch.device("cpu")
CEILINGS = {"copy_bytes": 1e10, "matmul_float32_flops": 1e11, "gather_bytes": 1e10, "launch_seconds": 1e-6}


def square_module(**changes):
    """A benchmark of the square, in the form of benchmarks/ops."""
    parts = {
        "__name__": "square",
        "CASES": {"small": {"N": 1 << 12}},
        "ON": {"cpu": ("small",), "cuda": ()},
        "DIFFERENTIABLE": ("x",),
        "make_inputs": lambda case, device, dtype, generator: {"x": torch.randn(case["N"], generator=generator, dtype=dtype)},
        "forms": lambda device: {"gresbox": lambda x: x * x + 0, "eager": lambda x: x**2, "gone": "is not installed"},
        "reference": lambda x: x**2,
        "cost": lambda case, itemsize, direction: Cost(flops=case["N"], bytes=2 * case["N"] * itemsize),
    }
    return SimpleNamespace(**parts | changes)


@pytest.fixture(scope="module")
def groups():
    return measure(square_module(), "small", "float32", CPU, quick=True, ceilings=CEILINGS)


@pytest.fixture
def measured(groups, tmp_path):
    """A result file in a folder of its own."""
    path = tmp_path / "square--cpu.json"
    results.ResultFile(path, "square", CPU, CEILINGS).add(groups)
    return path


def rows_of(content, *forms):
    return [row for group in content["groups"] for row in group["rows"] if not forms or row["form"] in forms]


@pytest.fixture
def with_peer(measured):
    """A file with a peer from elsewhere beside "eager", and a narrow noise band."""
    content = results.read(measured)
    for group in content["groups"]:
        group["noise_band"] = 0.05
        group["rows"].append(copy.deepcopy(group["rows"][1]) | {"form": "SciPy"})
    measured.write_text(json.dumps(content))
    return content


@pytest.fixture
def told_of(measured, with_peer, monkeypatch, capsys):
    """What the comparison with another file says, and its exit code."""

    def call(content):
        path = measured.with_name("new.json")
        path.write_text(json.dumps(content))
        monkeypatch.setattr(sys, "argv", ["compare", str(measured), str(path)])
        capsys.readouterr()
        return compare.main(), capsys.readouterr().out

    return call


def test_a_regression_is_found_and_the_machine_taken_out(with_peer, told_of):
    slow, slow_machine, slow_definition = (copy.deepcopy(with_peer) for _ in range(3))
    for new, forms in ((slow, ["gresbox"]), (slow_machine, ["gresbox", "SciPy"]), (slow_definition, ["gresbox", "eager"])):
        for row in rows_of(new, *forms):
            row["ms"] *= 1.2
    for new, code in ((slow, 1), (slow_machine, 0), (slow_definition, 1), (with_peer, 0)):
        found, told = told_of(new)
        assert found == code
        assert told.count("SLOWER: square: small, float32, ") == 3 * code
    replayed = copy.deepcopy(with_peer)
    for row in rows_of(replayed):
        row["graph_ms"] = row["ms"] / 10  # a graph that only one of the two runs has says nothing
    assert all(change.raw == 1 for change in (*compare.changes(with_peer, replayed), *compare.changes(replayed, with_peer)))


@pytest.mark.parametrize("form", ["gresbox, compiled", "eager", "eager, compiled", "all of these", "phrases as Mask2Former"])
def test_peers_that_run_our_code_are_no_measure_of_the_machine(form, with_peer, told_of, measured):
    for row in rows_of(with_peer, "SciPy"):
        row["form"] = form
        if form.startswith("gresbox"):
            row |= {"wall_ratios": {}, "graph_ratios": {}}
    measured.write_text(json.dumps(with_peer))
    for row in rows_of(with_peer):
        row["ms"] *= 2
    code, told = told_of(with_peer)
    assert code == 1
    assert "2.00 of the time (2.00 as timed, without a foreign peer to tell the machine's part, at most 1.15)" in told


def test_what_is_gone_wrong_or_larger_fails(with_peer, told_of):
    gone, wrong, meant, larger = (copy.deepcopy(with_peer) for _ in range(4))
    del gone["groups"][0]
    gone["groups"][0]["rows"].pop(0)
    code, told = told_of(gone)
    assert code == 1
    assert told.splitlines()[:2] == [f"MISSING: square: small, float32, {name}: gresbox" for name in ("forward", "backward")]
    rows_of(wrong, "gresbox")[0]["right"] = False
    code, told = told_of(wrong)
    assert code == 1
    assert "WRONG: square: small, float32, forward: gresbox: its error is above the tolerance, and was not" in told
    rows_of(meant, "gresbox")[0].update(right=False, differs="on purpose")
    assert told_of(meant)[0] == 0
    rows_of(larger, "gresbox")[0]["working_bytes"] = 1 << 20
    code, told = told_of(larger)
    assert code == 1
    assert "LARGER: square: small, float32, forward: gresbox: 1.00 MB of memory, 0.02 MB before" in told


def test_environments_that_differ_are_named(with_peer, told_of):
    assert "environments" not in told_of(with_peer)[1]
    with_peer["environment"]["threads"] = 99
    with_peer["environment"]["packages"]["torch"] = "99"
    code, told = told_of(with_peer)
    assert code == 0
    line = told.splitlines()[0]
    assert line.startswith("square: environments differ, and times with them: threads ")
    assert " before, 99 now, torch " in line


def test_what_cannot_be_compared_is_one_line(measured, tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    folder, broken = measured.parent, tmp_path / "broken.json"
    broken.write_text("{")
    for old, new, message in (
        (measured, tmp_path / "no.json", "there is no "),
        (tmp_path / "no", folder, "there is no "),
        (folder, empty, "there are no result files in "),
        (measured, folder, "OLD and NEW must be two files or two folders"),
        (measured, broken, "broken.json is not valid: "),
    ):
        monkeypatch.setattr(sys, "argv", ["compare", str(old), str(new)])
        with pytest.raises(SystemExit, match=message) as refusal:
            compare.main()
        assert "\n" not in str(refusal.value)


def test_a_file_that_is_gone_fails(measured, tmp_path, monkeypatch, capsys):
    (tmp_path / "new").mkdir()
    for path in (measured.with_name("other--cpu.json"), tmp_path / "new" / measured.name):
        path.write_text(measured.read_text())
    monkeypatch.setattr(sys, "argv", ["compare", str(tmp_path), str(tmp_path / "new")])
    assert compare.main() == 1
    assert capsys.readouterr().out == f"MISSING: {tmp_path / 'new' / 'other--cpu.json'}\n3 forms compared, 1 failures\n"


def target(form="gresbox", peer: str | None = "eager", **limits):
    return Target(form, peer, "small", "forward", **limits)


def test_verdicts_are_read_from_the_files(measured):
    content = results.read(measured)
    modules = {"ops": {"square": square_module()}}
    ours, peer = content["groups"][0]["rows"]
    ours["wall_ratios"]["eager"] = {"ratio": 1.5, "low": 1.4, "high": 1.6}
    content["groups"][0]["noise_band"] = 0.1

    def verdict(*args, **limits):
        return page.verdict(content, target(*args, **limits), modules)

    assert page.verdict(None, target(at_least=1.4), modules) == "not yet measured"
    assert verdict(at_least=1.4) == "met: 1.50x"
    assert verdict(at_least=1.6) == "**missed**: 1.50x"
    assert verdict("gresbox", "gone", at_least=1) == "not run: is not installed"
    assert verdict("gresbox", None, microseconds_at_most=1e9).startswith("met")
    assert verdict("gresbox", None, syncs_at_most=0) == "**missed**: None waits"
    assert verdict(at_least=1.0, clock="graph") == "not run: no time for this clock"
    ours["working_bytes"], peer["working_bytes"] = 10, 100
    assert verdict(at_least=1.4, memory_at_most=0.2) == "met: 1.50x, memory 0.10x"
    assert verdict(memory_at_most=0.05) == "**missed**: memory 0.10x"
    peer.update(right=False, error_gradients=0.5)
    assert verdict(at_least=1.4) == "not judged: eager is wrong, error 5.0e-01"
    ours["right"] = False
    assert verdict(at_least=1.4).startswith("**missed**: wrong, error ")


def test_no_slower_within_the_noise_is_a_verdict_of_its_own(measured):
    content = results.read(measured)
    modules = {"ops": {"square": square_module()}}
    content["groups"][0]["noise_band"] = 0.1
    for ratio, at_least, told in (
        (0.95, 1.0, "within the noise: 0.95x (band 0.10)"),
        (0.85, 1.0, "**missed**: 0.85x"),
        (1.0, 1.0, "met: 1.00x"),
        (1.95, 2.0, "**missed**: 1.95x"),
    ):
        content["groups"][0]["rows"][0]["wall_ratios"]["eager"]["ratio"] = ratio
        assert page.verdict(content, target(at_least=at_least), modules) == told
    content["groups"][0]["rows"][0]["wall_ratios"]["eager"]["ratio"] = 0.95
    assert page.verdict(content, target(at_least=1.0, syncs_at_most=0), modules).startswith("**missed**: 0.95x (band 0.10), ")


def test_the_same_form_has_no_ratio(measured):
    content = results.read(measured)
    module = square_module(same_form=lambda case, device, direction: (case, device, direction) == ("small", "cpu", "forward"))
    assert page.verdict(content, target(at_least=1e-6), {"ops": {"square": module}}) == "same form"
    text = page.filled("<!-- benchmarks: square -->\n<!-- end -->", {("square", "cpu"): content}, {"square": module})
    told = {line.split(" | ")[1]: line.split(" | ")[-1].strip(" |") for line in text.splitlines() if line.startswith("| small")}
    assert told["forward"] == "same form"
    assert "same form" not in told["forward+backward"]


def test_a_note_of_a_target_is_in_its_row():
    assert page.demand(target(at_least=3.0, note="at half of its points")) == "gresbox ≥ 3x eager, at half of its points"


def test_wrong_peers_and_shares_above_the_roof_are_named(measured):
    content = results.read(measured)
    ours, peer = content["groups"][0]["rows"]
    ours["wall_ratios"], ours["graph_ms"], ours["roofline"] = {}, 1.0, 1.5
    peer.update(right=False, error=0.25)
    text = "\n".join(page._table_of(content, None))
    assert "| wrong (2e-01) |" in text
    assert "| above it |" in text
    assert page.percent(0.5) == "50 %"


def test_where_names_the_files_that_were_measured_otherwise(measured):
    content = results.read(measured)
    one = copy.deepcopy(content)
    content["environment"]["threads"], one["environment"]["threads"] = 2, 1
    lines = list(page._environments({("a", "cpu"): content, ("b", "cpu"): content, ("c", "cpu"): one}, ["cpu"]))
    assert ", 2 threads, " in lines[0]
    assert lines[1] == "  - c: with 1 thread."
    assert len(list(page._environments({("a", "cpu"): content}, ["cpu"]))) == 3


def test_pages_are_written_from_other_results(measured, tmp_path, monkeypatch, capsys):
    out = tmp_path / "pages"
    monkeypatch.setattr(sys, "argv", ["page", "--results", str(measured.parent), "--out", str(out), "--no-plots"])
    before = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    page.main()
    assert {path.name for path in out.glob("*.md")} == {page.PAGE, *page.OTHERS}
    assert "_static" not in (out / page.PAGE).read_text(encoding="utf-8")  # no plots are there
    assert (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8") == before
    monkeypatch.setattr(sys, "argv", ["page", "--results", str(out)])
    with pytest.raises(SystemExit, match=r"^there are no result files in "):
        page.main()


def test_marked_blocks_are_filled(measured):
    files = results.read_all(measured.parent)
    text = page.filled("before\n<!-- benchmarks: square -->\nold\n<!-- end -->\nafter", files)
    assert text.startswith("before\n<!-- benchmarks: square -->\n\ncpu, measured at")
    assert "| small | forward | gresbox |" in text
    assert "old" not in text
    assert text.endswith("<!-- end -->\nafter")
    assert page.filled(text, files) == text


def test_plots_are_drawn(measured):
    pytest.importorskip("matplotlib")
    from benchmarks import plot

    drawn = plot.draw_all(results.read_all(measured.parent), measured.parent)
    assert {path.name for path in drawn} >= {"benchmarks_ratios--cpu.png", "benchmarks_roofline--cpu.png"}
    content = results.read(measured)
    for row in rows_of(content):
        row["working_bytes"] = 0 if row["working_bytes"] is None else 2 if row["form"] == "gresbox" else 4
    bars = [("square, small, float32: eager", name, 0.5) for name in ("forward", "forward+backward")]
    assert list(plot._memory_shares([("square", group, CEILINGS) for group in content["groups"]])) == bars
    found = plot.best_ceilings([{"copy_bytes": 1.0, "launch_seconds": 1.0}, {"copy_bytes": 2.0, "launch_seconds": 2.0}])
    assert found == {"copy_bytes": 2.0, "launch_seconds": 1.0}


def test_the_documentation_holds_what_the_files_say():
    for path, text in page.pages(results.read_all(results.RESULTS / __version__)).items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is not that of the files; run python -m benchmarks.page"
