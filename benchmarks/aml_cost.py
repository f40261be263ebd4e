"""What alignment-aware masking adds to a training step: its time, its peak memory, and where the time goes.

``python -m benchmarks.aml_cost`` trains CARIS at the paper's size (random weights, drawn pictures) without AML, with it, and with
its stage 1 in bfloat16: forward, backward, clipping and the optimiser's step, on the same model in one process. The ways run in
turn, in an order that rotates, and a ratio is the median over rounds of two times of the same round. With one thread the processor
time is what the step takes on an idle core, whatever else runs on the machine: it is recorded beside the wall time. Peak memory is
that of PyTorch's own allocations: what is held between steps (parameters, the optimiser's state, the masking's matrix) and the most
that a step adds to it. ``--page`` writes the table of ``docs/aml.md`` from the file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gresbox import create_model
from gresbox._files import write_atomically
from gresbox.data import SyntheticGRES
from gresbox.structures import GresTarget
from gresbox.training import AlignmentMaskedTraining
from gresbox.training.optimizers import make_optimizer

RESULT = Path(__file__).parent / "results" / "aml_cost.json"
PAGE = Path(__file__).parents[1] / "docs" / "aml.md"
BLOCK = re.compile(r"(?<=<!-- aml_cost -->\n).*?(?=<!-- end of aml_cost -->)", re.DOTALL)
WAYS = {"plain": "plain", "aml": "AML", "aml_bf16": "AML, stage 1 in bfloat16"}
Times = tuple[float, float]  # wall and processor seconds


class Steps:
    """One model with its optimiser, trained in either way on one batch."""

    def __init__(self, name: str, size: int, batch: int, tokens: int) -> None:
        torch.manual_seed(0)
        self.model: Any = create_model(name, image_size=size).train()
        full = AlignmentMaskedTraining(self.model).train()
        half = AlignmentMaskedTraining(self.model, full.masking, score_dtype=torch.bfloat16).train()
        self.wrapped = {"plain": self.model, "aml": full, "aml_bf16": half}
        self.criterion = self.model.criterion()
        groups = self.model.parameter_groups(self.model.recipe.lr)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = make_optimizer(self.model.recipe, groups)
        samples = [SyntheticGRES("train", batch, image_size=size)[index] for index in range(batch)]
        words = torch.randint(5, 25, (batch, tokens))
        images = torch.stack([sample.image for sample in samples]).float().div(64).sub(2)
        self.inputs = {"images": images, "input_ids": words, "attention_mask": torch.ones_like(words)}
        self.targets: list[GresTarget] = [sample.target for sample in samples]

    def step(self, way: str) -> None:
        """One training step, as the training loop takes it."""
        wrapped = self.wrapped[way]
        passes = [(1.0, self.inputs)] if way == "plain" else wrapped.passes(self.inputs, self.targets)
        for weight, arguments in passes:
            loss = self.criterion(wrapped(**arguments), self.targets)["loss"]
            (loss * weight).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.model.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def parts(self) -> dict[str, Callable[[], object]]:
        """Stage 1, and what a plain step is made of."""
        inputs = self.inputs
        visual, tokens, valid = (part.detach() for part in self.model.encode(**inputs))
        return {
            "stage 1": lambda: self.wrapped["aml"].mask_images(**inputs, targets=self.targets),
            "stage 1 in bfloat16": lambda: self.wrapped["aml_bf16"].mask_images(**inputs, targets=self.targets),
            "the masking alone": lambda: self.wrapped["aml"].masking(inputs["images"], visual, tokens, valid, targets=self.targets),
            "forward": lambda: self.criterion(self.model(**inputs), self.targets),
        }

    def held(self) -> int:
        """Bytes between two steps."""
        states = [value for state in self.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        return sum(tensor.nbytes for tensor in (*self.parameters, *self.model.buffers(), *states))


def seconds(call: Callable[[], object]) -> Times:
    wall, processor = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - processor


def added_bytes(call: Callable[[], object]) -> int:
    """The most that a call holds at one time beyond what was held before, by PyTorch's record of its allocations."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def compare_times(steps: Steps, rounds: int) -> dict[str, Any]:
    times: dict[str, list[Times]] = {way: [] for way in WAYS}
    for way in WAYS:  # the warm-up, which also makes the optimiser's state
        steps.step(way)
    for index in range(rounds):
        first = index % len(WAYS)
        for way in [*WAYS, *WAYS][first : first + len(WAYS)]:
            times[way].append(seconds(partial(steps.step, way)))
    parts = {name: statistics.median(seconds(call)[1] for _ in range(3)) for name, call in steps.parts().items()}
    rounded = {name: round(value, 3) for name, value in parts.items()}
    return {"wall": summary(times, 0), "processor": summary(times, 1), "parts_processor_seconds": rounded}


def summary(times: dict[str, list[Times]], clock: int) -> dict[str, Any]:
    """Medians of one clock, and of what each way adds to the plain step of the same round."""
    found: dict[str, Any] = {f"{way}_seconds": round(statistics.median(pair[clock] for pair in times[way]), 3) for way in WAYS}
    for way in list(WAYS)[1:]:
        shares = [masked[clock] / plain[clock] - 1 for plain, masked in zip(times["plain"], times[way], strict=True)]
        ends = {"median": statistics.median(shares), "least": min(shares), "most": max(shares)}
        found[f"{way}_adds"] = {name: round(value, 4) for name, value in ends.items()}
    return found


def compare_memory(steps: Steps) -> dict[str, Any]:
    matrix = sum(buffer.nbytes for buffer in steps.wrapped["aml"].masking.buffers())
    held = {way: steps.held() + (0 if way == "plain" else matrix) for way in WAYS}
    peaks = {way: held[way] + added_bytes(partial(steps.step, way)) for way in WAYS}
    found: dict[str, Any] = {f"{way}_mib": round(peaks[way] / 2**20, 1) for way in WAYS}
    adds = {f"{way}_adds": round(peaks[way] / peaks["plain"] - 1, 4) for way in list(WAYS)[1:]}
    return {**found, **adds, "held_mib": round(held["plain"] / 2**20, 1)}


def lines(report: dict[str, Any]) -> Iterator[str]:
    """The page's block."""
    setting, time_of, memory = report["setting"], report["time"]["processor"], report["memory"]
    threads = report["environment"]["threads"]
    yield f"`{setting['model']}` at {setting['image_size']} px, {setting['batch']} picture(s) and {setting['tokens']} tokens"
    yield f"a step, {threads} CPU thread(s), {setting['rounds']} rounds in turn. Time is the processor's; what a way adds is"
    yield "the median over rounds of two times of the same round, least and most in brackets."
    yield ""
    yield "| step | seconds | more time | peak memory | more memory |"
    yield "|---|---|---|---|---|"
    for way, title in WAYS.items():
        adds = time_of.get(f"{way}_adds")
        more = "" if adds is None else f"{adds['median']:+.1%} ({adds['least']:+.1%} to {adds['most']:+.1%})"
        share = "" if adds is None else f"{memory[f'{way}_adds']:+.1%}"
        yield f"| {title} | {time_of[f'{way}_seconds']:.2f} | {more} | {memory[f'{way}_mib']:.0f} MiB | {share} |"
    yield "| the paper's report | | +17.2% | | +4.9% |"
    yield ""
    parts = report["time"]["parts_processor_seconds"]
    yield "Seconds of the parts: " + ", ".join(f"{name} {value:.3g}" for name, value in parts.items()) + "."


def write_page(report: dict[str, Any], page: Path = PAGE) -> str:
    """Put the block into the page; returns the page's new text."""
    text = BLOCK.sub(lambda _: "\n".join(["", *lines(report), "", ""]), page.read_text())
    write_atomically(page, lambda path: path.write_text(text))
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="caris_swin_base", help="a preset (default: caris_swin_base)")
    parser.add_argument("--image-size", type=int, default=448, help="side in pixels (default: 448)")
    parser.add_argument("--batch", type=int, default=1, help="pictures per step (default: 1)")
    parser.add_argument("--tokens", type=int, default=20, help="tokens per expression (default: 20)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default: 7)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write (default: beside the other results)")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page's table from the file")
    options = parser.parse_args()
    if options.page:
        write_page(json.loads(options.out.read_text()))
        return
    torch.set_num_threads(options.threads)
    steps = Steps(options.model, options.image_size, options.batch, options.tokens)
    times = compare_times(steps, options.rounds)
    memory = compare_memory(steps)
    for way in list(WAYS)[1:]:
        for clock in ("wall", "processor"):
            row, adds = times[clock], times[clock][f"{way}_adds"]
            change = f"{row['plain_seconds']} s -> {row[f'{way}_seconds']} s"
            print(f"{way}, {clock}: {change}, {adds['median']:+.1%} ({adds['least']:+.1%} to {adds['most']:+.1%})")
        print(f"{way}, peak memory: {memory['plain_mib']} MiB -> {memory[f'{way}_mib']} MiB, {memory[f'{way}_adds']:+.1%}")
    print(f"parts, processor seconds: {times['parts_processor_seconds']}")
    environment = {
        "device": "cpu",
        "threads": options.threads,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }
    setting = {name: getattr(options, name) for name in ("model", "image_size", "batch", "tokens", "rounds")}
    report = {"what": "aml_cost", "setting": setting, "environment": environment, "time": times, "memory": memory}
    write_atomically(options.out, lambda path: path.write_text(json.dumps(report, indent=2) + "\n"))


if __name__ == "__main__":
    main()
