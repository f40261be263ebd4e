"""Time forms of one computation against each other: interleaved rounds, per-round ratios, a noise band, an error in every row.

A benchmark is a module; ``benchmarks/ops/<name>.py`` stands for ``gresbox/ops/<name>.py``. It holds::

    CASES = {"B=8": {"B": 8, "N": 100, "C": 256, "H": 120, "W": 120}, ...}     # name -> sizes (numbers and strings)
    ON = {"cpu": ("B=1", "B=8"), "cuda": ("B=32", "B=8", "2x", "4x")}          # which cases run where; the first one with --quick
    DTYPES = {"cpu": ("float32",), "cuda": ("bfloat16", "float32")}            # optional; this is what is left out means
    DIFFERENTIABLE = ("queries", "pixels")                                     # inputs with gradients, tensors or dicts of them

    def make_inputs(case, device, dtype, generator) -> dict[str, object]:      # random, never zeros; same seed, same values
    def forms(device) -> dict[str, Callable | Form | str]:                     # device is "cpu" or "cuda"
        return {
            "eager": lambda queries, pixels: ...,                              # called as form(**inputs)
            "eager, compiled": compiled(...),
            "gresbox": lambda queries, pixels: op(queries, pixels),            # ours begin with "gresbox"
            "gresbox, compiled": compiled(...),
            "transformers": missing("transformers") or Form(call, prepare=...),
            "torchmetrics": missing("torchmetrics") or attempt(make),          # ``make`` imports it and returns the form
            "msda-triton": "needs a GPU",                                      # a reason: named as not run
        }
    def reference(**inputs) -> Tensor | tuple[Tensor, ...]:                    # floating-point inputs come in float64
    def cost(case, itemsize, direction) -> Cost:                               # optional: least work; direction as below
    TARGETS = [Target("gresbox", "eager", "B=8", "forward", at_least=2.0), Target(..., device="cuda", memory_at_most=0.1)]
    def same_form(case, device, direction) -> bool: ...                        # optional: "gresbox" runs the very code of "eager"
    TOLERANCES = {"float32": 1e-4}                                             # optional: over gresbox.testing.TOLERANCES
    def error(got, wanted, inputs) -> float:                                   # optional: got, wanted: lists of tensors
    NOTES = "Why a target is missed; what else was tried."                     # optional: printed under its table in the docs

Forms whose name begins with "gresbox" are ours; every other form is a peer, and each of ours gets a ratio to each peer: peer's time
over our time, so above 1 ours is faster. "gresbox" is what a user gets without asking (``backend="auto"``). A form returns what
``reference`` returns; :class:`Form` says more about one that does not. ``forms`` is called once per case, so a compiled form is
compiled for one case only; imports of peers belong into it.

Directions: "forward" runs without gradients; "forward+backward" takes gradients of all ``DIFFERENTIABLE`` inputs for fixed random
gradients of the outputs, and "backward" is the second part of the same calls. Every row has the error of its outputs, and of its
gradients where it has some, against ``reference``: relative in the 2-norm, for integers and booleans the share that differs.
A form whose error is above the tolerance gets no ratio, unless it says why it ``differs``. Without ``DIFFERENTIABLE`` inputs there
is only "forward".

All forms of a case run once per round, in an order that rotates and turns round. A ratio is the median over rounds of the ratio of
two times of the same round, with its 95 % bootstrap interval. Ours runs twice in each round: the interval of that ratio around 1
is the noise band. On CUDA the second-level cache is overwritten before each call, and there are two times: "wall", host and waiting
included, and "graph", of a replayed CUDA graph, where the form can be captured. Working memory is the most that a call holds at one
moment of what it has allocated, its results left out wherever they are there; on the CPU PyTorch's allocations. The share of the
roofline is given on CUDA only: a CPU's caches stay warm, and what is measured beyond them bounds nothing that they hold.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.clocks import CLOCKS, Timer, give_memory_back
from benchmarks.rounds import AGAIN, Rounds
from gresbox.testing import TOLERANCES, relative_error

DIRECTIONS = ("forward", "backward", "forward+backward")
DEFAULT_DTYPES = {"cpu": ("float32",), "cuda": ("bfloat16", "float32")}
FAILURES = (Exception,)  # Triton's errors, of a kernel too large for a card, share no other base; what is left must still run
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """One way to compute the result.

    Args:
        call: ``call(**inputs)``; what is timed.
        prepare: Turns the inputs into those of ``call``, outside the time; it hands on inputs that get gradients as they are.
        read: Turns what ``call`` returns into what ``reference`` returns; outside the time in the direction "forward".
        backward: Whether it has gradients.
        differs: Why its result is not the reference's (other points are sampled, say); its error is shown, not judged.
    """

    call: Callable[..., Any]
    prepare: Callable[..., Inputs] | None = None
    read: Callable[[Any], Any] | None = None
    backward: bool = True
    differs: str = ""


@dataclass(frozen=True)
class Cost:
    """The least work of any implementation: multiplications and additions, bytes to and from memory, bytes from a cache."""

    flops: float = 0.0
    bytes: float = 0.0
    cached_bytes: float = 0.0

    def seconds(self, ceilings: Mapping[str, float], dtype: str) -> float:
        """The least time that the device's measured ceilings allow."""
        matmul = ceilings.get(f"matmul_{dtype}_flops", ceilings["matmul_float32_flops"])
        rates = (self.flops / matmul, self.bytes / ceilings["copy_bytes"], self.cached_bytes / ceilings["gather_bytes"])
        return max(*rates, ceilings["launch_seconds"])


@dataclass(frozen=True)
class Target:
    """What must hold of one form in one case.

    Args:
        form: One of ours.
        peer: What ``at_least`` and ``memory_at_most`` are a ratio to; None with limits that need no peer.
        case: Its name.
        direction: One of the three.
        at_least: Peer's time over ours.
        memory_at_most: Our working memory over the peer's.
        microseconds_at_most: Our time.
        syncs_at_most: How often ours may wait for the device.
        device: "cpu" or "cuda".
        clock: "wall" or "graph".
        dtype: None: the device's first.
        note: What a reader must know of the two to read the number.
    """

    form: str
    peer: str | None
    case: str
    direction: str
    at_least: float | None = None
    memory_at_most: float | None = None
    microseconds_at_most: float | None = None
    syncs_at_most: int | None = None
    device: str = "cpu"
    clock: str = "wall"
    dtype: str | None = None
    note: str = ""


class compiled:  # noqa: N801  reads as a word in a list of forms
    """The form under ``torch.compile``; compiled at its first call, afresh for each case."""

    def __init__(self, call: Callable[..., Any], **options: Any) -> None:
        self.call, self.options = call, {"dynamic": False, **options}
        self.made: Callable[..., Any] | None = None

    def __call__(self, **inputs: Any) -> Any:
        if self.made is None:
            self.made = torch.compile(self.call, **self.options)
        return self.made(**inputs)


def missing(package: str, at_least: str = "") -> str | None:
    """Why a package cannot be used, or None."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version(package)
    except PackageNotFoundError:
        return f"{package} is not installed"
    numbers = [tuple(int(part) for part in text.split("+")[0].split(".")[:3] if part.isdigit()) for text in (found, at_least)]
    return f"{package} {found} is older than {at_least}" if numbers[0] < numbers[1] else None


def not_installed(failure: BaseException) -> str | None:
    """Which package a failure comes from the lack of, in words; None where it comes from something else."""
    cause: BaseException | None = failure
    while cause is not None:
        package = (cause.name or "").partition(".")[0] if isinstance(cause, ModuleNotFoundError) else ""
        if package and package not in sys.modules and find_spec(package) is None:
            return f"{package} is not installed"
        cause = cause.__cause__ or (cause.__context__ if isinstance(cause, ImportError) else None)
    return None


def attempt(make: Callable[[], Callable[..., Any] | Form]) -> Callable[..., Any] | Form | str:
    """What ``make`` returns, or why a peer cannot be made: the other forms run all the same."""
    try:
        return make()
    except FAILURES as failure:
        return not_installed(failure) or f"fails: {reason_of(failure)}"


def reason_of(failure: BaseException) -> str:
    """The first line of a message, with the second where that says what; or the kind of failure."""
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    return " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])[:200] or type(failure).__name__


def measure(
    module: ModuleType,
    case: str,
    dtype: str,
    device: torch.device,
    *,
    peers: Sequence[str] = (),
    seconds: float = 3.0,
    quick: bool = False,
    ceilings: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """All directions of one case: groups as ``benchmarks/results`` keeps them, one per direction.

    Args:
        module: In the form above.
        case: Its name in ``CASES``.
        dtype: Name of the inputs' dtype.
        device: Where it runs.
        peers: Only these forms beside ours; empty: all.
        seconds: Time to spend on the rounds of a direction; never fewer than 7 rounds (3 with ``quick``).
        quick: A few rounds, to see whether it runs.
        ceilings: Of :func:`benchmarks.ceilings.measure_ceilings`; None: no share of them is given.
    """
    scene = Scene(module, case, dtype, device)
    usable, not_run = scene.usable(peers)
    found = []
    for backward in (False, True) if module.DIFFERENTIABLE else (False,):
        runners, left_out = scene.check(usable, backward)
        rounds = run_rounds(runners, device, seconds, quick)
        for direction in DIRECTIONS[1:] if backward else DIRECTIONS[:1]:
            found.append(scene.group(direction, runners, rounds, not_run | left_out, ceilings or {}))
        for runner in runners:
            runner.close()
    return found


class Scene:
    """One case: its inputs, what is wanted of every form, and the forms."""

    def __init__(self, module: ModuleType, case: str, dtype: str, device: torch.device) -> None:
        torch._dynamo.reset()  # what other cases compiled does not count towards the limit of this one
        self.module, self.case, self.dtype, self.device = module, case, dtype, device
        kind = getattr(torch, dtype)
        generator = torch.Generator(device).manual_seed(0)
        self.inputs: Inputs = module.make_inputs(module.CASES[case], device, kind, generator)
        unknown = set(module.DIFFERENTIABLE) - set(self.inputs)
        if unknown:
            raise ValueError(f"{module.__name__}: DIFFERENTIABLE names {sorted(unknown)}, which make_inputs does not give.")
        own = getattr(module, "TOLERANCES", {})
        self.tolerance: float = own.get(dtype, TOLERANCES[kind])
        exact = tree_map(_in_double, self.inputs)
        leaves = [leaf.requires_grad_() for name in module.DIFFERENTIABLE for leaf in tree_leaves(exact[name])]
        outputs = as_list(module.reference(**exact))
        generator = torch.Generator(device).manual_seed(1)
        self.weights = [
            torch.randn(out.shape, generator=generator, device=device).to(kind) if out.requires_grad else None for out in outputs
        ]
        self.wanted = [out.detach() for out in outputs]
        self.wanted_gradients = take_gradients(outputs, self.weights, leaves) if leaves else []

    def error_of_gradients(self, gradients: Sequence[Tensor | None]) -> float:
        """The largest error of an input's gradient; a dict of inputs is one: a part of it may have none but rounding errors."""
        errors, start = [0.0], 0
        for name in self.module.DIFFERENTIABLE:
            parts = tree_leaves(self.inputs[name])
            whole = []
            for side in (gradients, self.wanted_gradients):
                own = zip(side[start : start + len(parts)], parts, strict=True)
                whole.append(torch.cat([(torch.zeros_like(x) if g is None else g).double().flatten() for g, x in own]))
            errors.append(largest_error(whole[:1], whole[1:]))
            start += len(parts)
        return max(errors)

    def usable(self, peers: Sequence[str]) -> tuple[dict[str, Form], dict[str, str]]:
        """The forms that can run, and why the others cannot."""
        usable: dict[str, Form] = {}
        not_run: dict[str, str] = {}
        for name, form in self.module.forms(self.device.type).items():
            if peers and name not in peers and not is_ours(name):
                continue
            if isinstance(form, str):
                not_run[name] = form
            else:
                usable[name] = form if isinstance(form, Form) else Form(form)
        return usable, not_run

    def check(self, forms: Mapping[str, Form], backward: bool) -> tuple[list[Runner], dict[str, str]]:
        """Run each form once; those that work, with the errors of their results, and why the others do not."""
        runners: list[Runner] = []
        left_out: dict[str, str] = {}
        for name, form in forms.items():
            if backward and not form.backward:
                left_out[name] = "has no gradients"
                continue
            try:
                runner = Runner(name, form, self, backward)
            except FAILURES as failure:
                if self.device.type == "cuda":
                    give_memory_back()  # it may have been memory that failed
                if is_ours(name):
                    raise RuntimeError(f"{self.module.__name__}, {self.case}: {name} fails: {reason_of(failure)}") from failure
                left_out[name] = not_installed(failure) or f"fails: {reason_of(failure)}"
                continue
            runners.append(runner)
        return runners, left_out

    def group(
        self, direction: str, runners: list[Runner], rounds: Rounds, not_run: dict[str, str], ceilings: Mapping[str, float]
    ) -> dict[str, Any]:
        """The rows of one direction."""
        itemsize = getattr(torch, self.dtype).itemsize
        cost = self.module.cost(self.module.CASES[self.case], itemsize, direction) if hasattr(self.module, "cost") else None
        rows = []
        for runner in runners:
            row = runner.row(direction) | rounds.summary(runner.name, direction)
            if cost is not None and ceilings and row["right"] and self.device.type == "cuda":
                row["roofline"] = round(1e3 * cost.seconds(ceilings, self.dtype) / (row["graph_ms"] or row["ms"]), 4)
            if is_ours(runner.name):
                judged = [other.name for other in runners if not is_ours(other.name) and other.judged]
                for clock in CLOCKS:
                    row[f"{clock}_ratios"] = rounds.ratios(runner.name, judged, direction, clock) if runner.judged else {}
            rows.append(row)
        return {
            "case": self.case,
            "sizes": dict(self.module.CASES[self.case]),
            "dtype": self.dtype,
            "direction": direction,
            "tolerance": self.tolerance,
            "rounds": rounds.count,
            "noise_band": rounds.noise_band(direction),
            "cost": None if cost is None else {"flops": cost.flops, "bytes": cost.bytes, "cached_bytes": cost.cached_bytes},
            "rows": rows,
            "not_run": not_run,
        }


class Runner:
    """One form, ready to run again and again on the case's inputs; made by running it once and checking the results."""

    def __init__(self, name: str, form: Form, scene: Scene, backward: bool) -> None:
        self.name, self.form, self.backward, self.weights = name, form, backward, scene.weights
        differentiable = scene.module.DIFFERENTIABLE if backward else ()
        own = {n: tree_map(lambda value: value.detach().requires_grad_(), scene.inputs[n]) for n in differentiable}
        self.inputs, self.leaves = scene.inputs | own, tree_leaves(own)
        if form.prepare is not None:
            with torch.no_grad():
                self.inputs = form.prepare(**self.inputs)
        outputs, gradients = self.run()
        if len(outputs) != len(scene.wanted):
            raise ValueError(f"{len(outputs)} outputs, the reference has {len(scene.wanted)}")
        measure_error = getattr(scene.module, "error", None)
        shown = [out.detach() for out in outputs]
        self.error = measure_error(shown, scene.wanted, scene.inputs) if measure_error else largest_error(shown, scene.wanted)
        self.error_gradients = scene.error_of_gradients(gradients) if backward else None
        self.right = max(self.error, self.error_gradients or 0.0) <= scene.tolerance
        del outputs, gradients, shown
        self.timer = Timer.of(scene.device, self.run)
        self.working_bytes = self.timer.working_bytes()

    @property
    def judged(self) -> bool:
        """Whether its time counts: the result is right, or is meant to be another."""
        return self.right or bool(self.form.differs)

    def run(self, between: Callable[[], None] | None = None) -> tuple[list[Tensor], list[Tensor | None]]:
        """Outputs and gradients; a timer gives ``between``, which is called between the passes, and gets what the form returns."""
        if not self.backward:
            with torch.no_grad():
                made = self.form.call(**self.inputs)
                return (made if between is not None else self._read(made)), []
        outputs = self._read(self.form.call(**self.inputs))
        if between is not None:
            between()
        return outputs, take_gradients(outputs, self.weights, self.leaves)

    def _read(self, made: Any) -> list[Tensor]:
        return as_list(made if self.form.read is None else self.form.read(made))

    def row(self, direction: str) -> dict[str, Any]:
        return {
            "form": self.name,
            "error": self.error,
            "error_gradients": self.error_gradients,
            "right": self.right,
            "differs": self.form.differs,
            "working_bytes": None if direction == "backward" else self.working_bytes,
            "graph_failure": self.timer.graph_failure,
            "syncs": self.timer.syncs,
            "roofline": None,
        }

    def close(self) -> None:
        self.timer.close()


def run_rounds(runners: Sequence[Runner], device: torch.device, seconds: float, quick: bool) -> Rounds:
    """Time all forms in turn, round by round; ours twice."""
    ours = next((runner.name for runner in runners if is_ours(runner.name)), runners[0].name if runners else None)
    entries = [(runner.name, runner) for runner in runners]
    entries += [(runner.name + AGAIN, runner) for runner in runners if runner.name == ours]
    rounds = Rounds([name for name, _ in entries], ours)
    took = sum(runner.timer.warm_up(quick) for _, runner in entries)
    rounds.count = 3 if quick else max(7, min(40, int(seconds / max(took, 1e-9))))
    gc.collect()
    gc.disable()  # a collection in the middle of one form's time is not that form's
    try:
        for index in range(rounds.count):
            turned = entries[index % len(entries) :] + entries[: index % len(entries)]
            for name, runner in turned if index % 2 else turned[::-1]:
                rounds.add(name, runner.timer.sample())
    finally:
        gc.enable()
    return rounds


def is_ours(name: str) -> bool:
    return name.startswith("gresbox")


def as_list(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def take_gradients(outputs: Sequence[Tensor], weights: Sequence[Tensor | None], leaves: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients of the leaves for the outputs' gradients ``weights``; None where an output has none."""
    pairs = [(out, weight.to(out.dtype)) for out, weight in zip(outputs, weights, strict=True) if weight is not None]
    chosen, gradients = [out for out, _ in pairs], [weight for _, weight in pairs]
    return list(torch.autograd.grad(chosen, list(leaves), gradients, allow_unused=True))


def largest_error(got: Sequence[Tensor | None], wanted: Sequence[Tensor | None]) -> float:
    """Relative error in the 2-norm, for integers and booleans the share that differs; no gradient counts as zeros."""
    errors = [0.0]
    for out, ref in zip(got, wanted, strict=True):
        if ref is None or out is None:
            other = ref if out is None else out
            errors.append(0.0 if other is None or not other.any() else 1.0)
        elif ref.is_floating_point():
            errors.append(relative_error(out, ref))
        else:
            errors.append((out != ref).double().mean().item() if ref.numel() else 0.0)
    return max(errors)


def _in_double(value: Any) -> Any:
    return value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value
