"""The benchmarks: the harness on tiny cases, the program that runs them, and the form of result files."""

from __future__ import annotations

import copy
import json
import re
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the benchmarks are programs of the repository, not a part of the installed package

from benchmarks import results
from benchmarks import run as program
from benchmarks.ceilings import measure_ceilings
from benchmarks.clocks import CPUTimer, CUDATimer, peak_beside
from benchmarks.harness import Cost, Form, Target, compiled, largest_error, measure, missing
from benchmarks.rounds import median_interval
from gresbox import __version__

CPU = torch.device("cpu")
CEILINGS = {"copy_bytes": 1e10, "matmul_float32_flops": 1e11, "gather_bytes": 1e10, "launch_seconds": 1e-6}


def square_module(**changes) -> ModuleType:
    """A benchmark of the square, in the form of benchmarks/ops."""
    parts = {
        "__name__": "square",
        "__doc__": "Squares.",
        "CASES": {"small": {"N": 64}},
        "ON": {"cpu": ("small",), "cuda": ()},
        "DIFFERENTIABLE": ("x",),
        "make_inputs": lambda case, device, dtype, generator: {"x": torch.randn(case["N"], generator=generator, dtype=dtype)},
        "forms": lambda device: {"gresbox": lambda x: x * x, "eager": lambda x: x**2, "gone": "is not installed"},
        "reference": lambda x: x**2,
        "cost": lambda case, itemsize, direction: Cost(flops=case["N"], bytes=2 * case["N"] * itemsize),
        "TARGETS": [Target("gresbox", "eager", "small", "forward", at_least=1e-6)],
    }
    return SimpleNamespace(**parts | changes)


def with_forms(**forms):
    return square_module(forms=lambda device: forms)


def test_a_case_has_its_directions_errors_memory_ratios_and_reasons():
    groups = measure(square_module(), "small", "float32", CPU, seconds=0.0, ceilings=CEILINGS)
    assert [group["direction"] for group in groups] == ["forward", "backward", "forward+backward"]
    for group in groups:
        assert group["rounds"] == 7
        assert group["noise_band"] >= 0
        assert group["not_run"] == {"gone": "is not installed"}
        ours, peer = group["rows"]
        assert ours["form"] == "gresbox"
        assert 0 < ours["error"] < 1e-6
        assert (ours["error_gradients"] is None) == (group["direction"] == "forward")
        assert ours["wall_ratios"].keys() == {"eager"}
        assert ours["wall_ratios"]["eager"]["low"] <= ours["wall_ratios"]["eager"]["ratio"] <= ours["wall_ratios"]["eager"]["high"]
        assert ours["roofline"] is None  # a CPU's caches are warm
        assert "wall_ratios" not in peer
        assert (ours["working_bytes"] is None) == (group["direction"] == "backward")


def test_a_wrong_result_gets_no_ratio_and_is_none():
    groups = measure(
        with_forms(gresbox=lambda x: x * x, wrong=lambda x: x * x + 1, other=Form(lambda x: x * x + 1, differs="one more")),
        "small",
        "float32",
        CPU,
        quick=True,
    )
    rows = {row["form"]: row for row in groups[0]["rows"]}
    assert not rows["wrong"]["right"]
    assert rows["gresbox"]["wall_ratios"].keys() == {"other"}
    ours = measure(with_forms(gresbox=lambda x: x * x + 1, eager=lambda x: x * x), "small", "float32", CPU, quick=True)[0]["rows"][
        0
    ]
    assert ours["wall_ratios"] == {}


def test_wrong_gradients_are_errors():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * x

        @staticmethod
        def backward(ctx, grad):
            return grad

    forms = with_forms(gresbox=lambda x: Twice.apply(x), eager=lambda x: x * x)
    forward, _, both = measure(forms, "small", "float32", CPU, quick=True)
    assert forward["rows"][0]["right"]
    assert not both["rows"][0]["right"]


def test_what_cannot_run_is_named_and_ours_must_run():
    def broken(x):
        raise ValueError("no such thing\nat all")

    groups = measure(with_forms(gresbox=lambda x: x * x, peer=broken), "small", "float32", CPU, quick=True)
    assert groups[0]["not_run"] == {"peer": "fails: no such thing"}
    with pytest.raises(RuntimeError, match="square, small: gresbox fails: no such thing"):
        measure(with_forms(gresbox=broken), "small", "float32", CPU, quick=True)


def test_no_kind_of_error_of_a_peer_stops_the_others():
    class TooLargeError(Exception):  # as Triton's OutOfResources
        pass

    def fails(x):
        raise TooLargeError("out of resource: shared memory")

    groups = measure(with_forms(gresbox=lambda x: x * x, peer=fails), "small", "float32", CPU, quick=True)
    assert groups[0]["not_run"] == {"peer": "fails: out of resource: shared memory"}


def needs_gone(*args, **inputs):
    import no_such_package.part  # noqa: F401


@pytest.mark.parametrize("changes", [{"forms": lambda device: {"gresbox": needs_gone}}, {"make_inputs": needs_gone}])
def test_what_ours_needs_and_is_not_there_is_no_failure(changes, tmp_path, monkeypatch, capsys):
    run_square(monkeypatch, tmp_path)
    monkeypatch.setattr(
        program, "modules_of", lambda words, failed: {"lacking": square_module(**changes), "square": square_module()}
    )
    assert program.main() == 0
    assert capsys.readouterr().err == "lacking: small, float32: not run: no_such_package is not installed\n"
    assert [path.name for path in tmp_path.iterdir()] == ["square--cpu.json"]


def test_what_ours_does_wrong_is_a_failure_and_the_others_run(tmp_path, monkeypatch, capsys):
    run_square(monkeypatch, tmp_path)
    broken = with_forms(gresbox=lambda x: x.no_such_method())
    monkeypatch.setattr(program, "modules_of", lambda words, failed: {"broken": broken, "square": square_module()})
    assert program.main() == 1
    assert "broken: small, float32: FAILED: square, small: gresbox fails: 'Tensor' object" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["square--cpu.json"]


def test_a_benchmark_that_cannot_be_imported_is_named(monkeypatch, capsys):
    def lacking(name):
        if name.endswith("boxes"):
            needs_gone()
        return square_module()

    monkeypatch.setattr(program.importlib, "import_module", lacking)
    assert list(program.modules_of(["boxes", "assignment"])) == ["assignment"]
    assert capsys.readouterr().err == "boxes: not run: no_such_package is not installed\n"
    monkeypatch.setattr(program.importlib, "import_module", lambda name: __import__("gresbox.no_such_module"))
    failed: list[str] = []
    assert program.modules_of(["boxes"], failed) == {}
    assert failed == ["boxes"]
    assert "boxes: FAILED: No module named 'gresbox.no_such_module'" in capsys.readouterr().err
    with pytest.raises(ImportError):
        program.modules_of(["boxes"])


def test_only_the_peers_that_are_asked_for():
    groups = measure(square_module(), "small", "float32", CPU, peers=["gone"], quick=True)
    assert [row["form"] for row in groups[0]["rows"]] == ["gresbox"]
    assert groups[0]["not_run"] == {"gone": "is not installed"}


def test_inputs_are_prepared_and_results_read_outside_the_time():
    seen = []
    form = Form(
        lambda x, factor: [x, factor], prepare=lambda x: {"x": x, "factor": x.detach()}, read=lambda made: made[0] * made[1]
    )
    module = square_module(forms=lambda device: {"gresbox": form}, DIFFERENTIABLE=())
    module.error = lambda got, wanted, inputs: seen.append(inputs.keys()) or largest_error(got, wanted)
    rows = measure(module, "small", "float32", CPU, quick=True)[0]["rows"]
    assert rows[0]["right"]
    assert seen == [{"x"}]


def test_inputs_may_be_dicts_with_gradients():
    module = square_module(
        DIFFERENTIABLE=("parts",),
        make_inputs=lambda case, device, dtype, generator: {"parts": {"a": torch.randn(4), "b": torch.randn(4)}},
        forms=lambda device: {"gresbox": lambda parts: parts["a"] * parts["b"]},
        reference=lambda parts: parts["a"] * parts["b"],
    )
    assert measure(module, "small", "float32", CPU, quick=True)[2]["rows"][0]["right"]


def test_gradients_of_a_dict_are_one():
    """A part whose gradient is nothing but rounding has no error of its own."""
    draw = {"a": torch.ones(8, dtype=torch.float32), "b": torch.full((8,), 1e-30)}
    module = square_module(
        DIFFERENTIABLE=("parts",),
        make_inputs=lambda case, device, dtype, generator: {"parts": draw},
        forms=lambda device: {"gresbox": lambda parts: parts["a"] * 3 + parts["b"] * 1e-7},
        reference=lambda parts: parts["a"] * 3 + parts["b"] * 1e-12,
    )
    assert measure(module, "small", "float32", CPU, quick=True)[2]["rows"][0]["right"]


def test_working_memory_is_what_is_held_beside_the_results():
    def wasteful():
        return [(torch.ones(1 << 18) + 1).sum(0, keepdim=True)], []

    def in_turn():
        torch.ones(1 << 18).sum()
        return [torch.ones(1 << 18)], [torch.ones(1 << 18)]  # not there yet when the first is

    here = torch.ones(1 << 18)
    assert 2 * (1 << 20) <= CPUTimer(wasteful).working_bytes() < 3 * (1 << 20)
    assert CPUTimer(lambda: ([torch.empty(1 << 18)], [])).working_bytes() == 0
    assert 1 << 20 <= CPUTimer(in_turn).working_bytes() < (1 << 20) + 64
    assert CPUTimer(lambda: ([here.add_((here + 1).mean())], [])).working_bytes() >= 1 << 20  # a result that was there before


def test_gradients_take_no_working_memory_away():
    """A pass with a backward pass never needs less than one without."""
    module = square_module(forms=lambda device: {"gresbox": lambda x: (x.exp() * x).sum()}, reference=lambda x: (x.exp() * x).sum())
    module.CASES = {"small": {"N": 1 << 16}}
    forward, _, both = measure(module, "small", "float32", CPU, quick=True)
    assert forward["rows"][0]["working_bytes"] <= both["rows"][0]["working_bytes"]


def test_the_peak_beside_what_is_kept():
    assert peak_beside([(1, 8), (2, 4), (1, -8), (3, 4)], {3}) == 12
    assert peak_beside([(1, 8), (1, -8), (1, 8)], {1}) == 8  # an address that is taken again: only the last is the result
    assert peak_beside([(9, -100), (1, 8)], set()) == 8  # given back, but not taken here


def test_working_memory_is_read_from_the_allocators_trace(monkeypatch):
    result = torch.ones(4)
    names = [("alloc", 1, 96), ("segment_alloc", 1, 4096), ("free_requested", 1, 96), ("free_completed", 1, 96)]
    names += [("alloc", 2, 64), ("alloc", result.data_ptr(), 512)]
    trace = [{"action": action, "addr": address, "size": size} for action, address, size in names]
    recorded = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda enabled="all", **options: recorded.append(enabled))
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda device: {"device_traces": [[], trace]})
    timer = CUDATimer.__new__(CUDATimer)
    timer.run, timer.device = lambda: ([result], []), torch.device("cuda", 1)
    assert timer.working_bytes() == 96
    assert recorded == ["all", None]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_working_memory_on_a_gpu():
    def in_turn():
        torch.ones(1 << 18, device="cuda").sum()
        return [torch.ones(1 << 18, device="cuda")], [torch.ones(1 << 18, device="cuda")]

    timer = CUDATimer(torch.device("cuda", 0), in_turn)
    assert 1 << 20 <= timer.working_bytes() < (1 << 20) + 4096
    timer.close()


def test_errors_of_outputs():
    assert largest_error([torch.tensor([1, 2])], [torch.tensor([1, 3])]) == 0.5
    assert largest_error([None], [torch.zeros(2)]) == 0.0
    assert largest_error([None], [torch.ones(2)]) == 1.0
    assert largest_error([torch.tensor([float("nan")])], [torch.ones(1)]) == float("inf")


def test_the_interval_of_a_median():
    low, high = median_interval([1.0, 1.1, 0.9, 1.0, 5.0, 1.0, 1.0])
    assert 0.9 <= low <= 1.0 <= high <= 5.0
    assert median_interval([1.0] * 7) == (1.0, 1.0)


def test_versions_are_compared():
    assert missing("no-such-package") == "no-such-package is not installed"
    assert missing("torch", "2.8") is None
    assert "is older than 99" in missing("torch", "99")


@pytest.fixture(scope="module")
def text_of_file(tmp_path_factory):
    """What the program writes about the square."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        run_square(patch, folder)
        assert program.main() == 0
    return (folder / "square--cpu.json").read_text()


def run_square(monkeypatch, folder, *arguments):
    monkeypatch.setattr(program, "modules_of", lambda words, failed: {"square": square_module()})
    monkeypatch.setattr(program, "measure_ceilings", lambda device: CEILINGS)
    monkeypatch.setattr(sys, "argv", ["run", "square", "--out", str(folder), "--seconds", "0", *arguments])


@pytest.fixture
def measured(text_of_file, tmp_path, monkeypatch):
    """Its file in a folder of its own; the program is about to run on it again."""
    run_square(monkeypatch, tmp_path)
    path = tmp_path / "square--cpu.json"
    path.write_text(text_of_file)
    return path


def test_the_program_writes_resumes_and_refuses_what_was_measured_elsewhere(measured, monkeypatch, capsys):
    content = results.read(measured)
    assert [group["direction"] for group in content["groups"]] == ["forward", "backward", "forward+backward"]
    before = measured.read_text()
    capsys.readouterr()
    assert program.main() == 0
    assert "square" not in capsys.readouterr().out
    assert measured.read_text() == before
    changed = json.loads(before)
    changed["environment"]["processor"] = "another"
    measured.write_text(json.dumps(changed))
    with pytest.raises(SystemExit, match=r"square--cpu.json was measured with another processor; --again forgets it\."):
        program.main()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--again"])
    assert program.main() == 0
    assert results.read(measured)["environment"]["processor"] != "another"


def test_the_program_stops_in_time_and_says_what_is_left(measured, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--again", "--minutes", "-1"])
    assert program.main() == program.UNFINISHED
    assert "left, --again begins anew, so name them with --case: square: small, float32" in capsys.readouterr().out


def test_parts_share_the_cases(monkeypatch, capsys):
    shown = []
    for part in ("1/2", "2/2", "1/1"):
        monkeypatch.setattr(sys, "argv", ["run", "ops", "--list", "--part", part])
        assert program.main() == 0
        shown.append(capsys.readouterr().out.split("\n")[:-1])
    assert sorted(shown[0] + shown[1]) == sorted(shown[2])
    for part in ("3/2", "0/2", "x", "1/0", "1"):
        monkeypatch.setattr(sys, "argv", ["run", "ops", "--part", part])
        with pytest.raises(SystemExit, match=f"^--part must be I/N with I from 1 to N, got {part}$"):
            program.main()


def test_names_that_nothing_has_are_refused(tmp_path, monkeypatch):
    run_square(monkeypatch, tmp_path, "--case", "small", "nope")
    with pytest.raises(SystemExit, match=r"^--case: there is no 'nope' in what is to run; there are small$"):
        program.main()
    run_square(monkeypatch, tmp_path, "--against", "nobody")
    with pytest.raises(SystemExit, match=r"^--against: there is no 'nobody' in what is to run; there are gresbox; eager; gone$"):
        program.main()
    assert not list(tmp_path.iterdir())


def test_a_quick_run_takes_the_case_that_is_asked_for_and_warns(tmp_path, monkeypatch, capsys):
    assert run_parts(monkeypatch, tmp_path, "--quick", "--case", "c") == 0
    told = capsys.readouterr().out
    assert "square: c, float32" in told
    assert "--quick: too few rounds to rely on a ratio" in told
    assert not list(tmp_path.iterdir())


def run_parts(monkeypatch, folder, *arguments):
    """The program on a benchmark of four cases."""
    cases = {name: {"N": 8} for name in "abcd"}
    run_square(monkeypatch, folder, *arguments)
    monkeypatch.setattr(
        program, "modules_of", lambda words, failed: {"square": square_module(CASES=cases, ON={"cpu": tuple(cases)})}
    )
    return program.main()


def cases_in(folder):
    return [group["case"] for group in results.read(folder / "square--cpu.json")["groups"] if group["direction"] == "forward"]


def test_parts_go_into_one_folder_and_go_on(tmp_path, monkeypatch, capsys):
    assert run_parts(monkeypatch, tmp_path, "--part", "1/2") == 0
    assert cases_in(tmp_path) == ["a", "c"]
    assert run_parts(monkeypatch, tmp_path, "--part", "2/2", "--minutes", "-1") == program.UNFINISHED
    assert "left, the same command goes on with them: square: b, float32; square: d, float32" in capsys.readouterr().out
    assert run_parts(monkeypatch, tmp_path, "--part", "2/2", "--case", "b") == 0  # cut off after its first case
    assert run_parts(monkeypatch, tmp_path, "--part", "2/2") == 0
    assert capsys.readouterr().out.count("square: d, float32") == 1
    assert sorted(cases_in(tmp_path)) == ["a", "b", "c", "d"]
    assert run_parts(monkeypatch, tmp_path, "--part", "2/2", "--again") == 0
    assert sorted(cases_in(tmp_path)) == ["a", "b", "c", "d"]


def test_runs_at_once_keep_each_others_rows(measured):
    groups = results.read(measured)["groups"]
    for group in groups:
        del group["commit"], group["date"]
    first, second = (results.ResultFile(measured, "square", CPU, CEILINGS) for _ in range(2))
    first.add([group | {"case": "b"} for group in groups])
    second.add([group | {"case": "c"} for group in groups])
    assert {group["case"] for group in results.read(measured)["groups"]} == {"small", "b", "c"}
    assert second.has("b", "float32")


def test_only_one_run_writes_at_a_time(tmp_path):
    order = []

    def write():
        with results.alone_in(tmp_path):
            order.append("second")

    with results.alone_in(tmp_path):
        other = threading.Thread(target=write)
        other.start()
        other.join(0.2)
        order.append("first")
    other.join()
    assert order == ["first", "second"]


def test_a_row_without_an_error_is_refused(measured):
    content = results.read(measured)
    file = results.ResultFile(measured, "square", CPU, CEILINGS)
    group = copy.deepcopy(content["groups"][0])
    del group["rows"][0]["error"], group["commit"], group["date"]
    with pytest.raises(ValueError, match="error is missing"):
        file.add([group])
    assert results.read(measured) == content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["groups"][0]["rows"][0].update(error=None), "error is None"),
        (lambda c: c["groups"][1]["rows"][0].update(error_gradients=None), "the gradients have no error"),
        (lambda c: c["groups"][0]["rows"][0].update(right=1), "right is 1"),
        (lambda c: c["groups"][0].update(host="a"), "host is unknown"),
        (lambda c: c["environment"].pop("threads"), "environment: threads is missing"),
        (lambda c: c["groups"].append(c["groups"][0]), "a case occurs twice"),
        (lambda c: c.update(schema=0), "schema must be 1"),
        (lambda c: c["groups"][0]["rows"][0]["wall_ratios"]["eager"].pop("low"), "low is missing"),
        (lambda c: c["groups"][0]["rows"][0].pop("working_bytes"), "working_bytes is missing"),
        (lambda c: c["groups"][0]["rows"][0].update(extra_bytes=1), "extra_bytes is unknown"),
    ],
)
def test_what_is_no_valid_file(measured, change, message):
    content = results.read(measured)
    change(content)
    assert any(message in problem for problem in results.problems_of(content))


def test_ceilings_are_rates(monkeypatch):
    monkeypatch.setattr("benchmarks.ceilings.best", lambda call, device, **options: 1e-3)
    found = measure_ceilings(CPU)
    assert found["copy_bytes"] > 1e9
    assert found.keys() >= {"copy_bytes", "matmul_float32_flops", "gather_bytes", "launch_seconds"}


def modules():
    return program.modules_of(["all"])


def test_every_benchmark_is_in_form():
    for name, module in modules().items():
        assert module.__doc__, name
        assert {case for cases in module.ON.values() for case in cases} <= module.CASES.keys(), name
        assert module.ON.keys() == {"cpu", "cuda"}, name
        for target in getattr(module, "TARGETS", []):
            assert target.case in module.ON[target.device], f"{name}: {target}"
            assert target.form.startswith("gresbox"), f"{name}: {target}"
        for device in ("cpu",):
            forms = module.forms(device)
            assert any(form.startswith("gresbox") for form in forms), name
            named = {target.form for target in getattr(module, "TARGETS", []) if target.device == device}
            named |= {target.peer for target in getattr(module, "TARGETS", []) if target.device == device and target.peer}
            assert named <= forms.keys(), f"{name}: {named - forms.keys()}"


def test_the_files_in_results_are_valid():
    paths = sorted((ROOT / "benchmarks" / "results").glob("*/*--*.json"))
    versions = [path for path in paths if path.parent.name[0].isdigit()]
    for path in versions:
        content = results.read(path)
        assert path.name == f"{content['what']}--{content['device']}.json"
        assert path.parent.name == content["version"]
        text = path.read_text(encoding="utf-8")
        assert not re.search(r'"(/|[A-Z]:)|hostname', text), f"{path.name} names a path or a machine"


def test_no_result_is_of_another_version_than_its_folder():
    folder = ROOT / "benchmarks" / "results" / __version__
    assert all(results.read(path)["version"] == __version__ for path in folder.glob("*--*.json"))


def test_compiled_forms_are_compiled_once_for_their_case():
    form = compiled(lambda x: x + 1, backend="eager")
    assert form(x=torch.ones(2)).tolist() == [2, 2]
    made = form.made
    form(x=torch.zeros(2))
    assert form.made is made
