"""What alignment-aware masking adds to a training step: its time, its peak memory, and where the time goes.

``python -m benchmarks.aml_cost`` trains CARIS at the paper's size (random weights, drawn pictures) in both ways: forward, backward,
clipping and the optimiser's step, on the same model in one process. Both run in turn, in an order that alternates, and a ratio is
the median over rounds of the two times of the same round. With one thread the processor time is what the step takes on an idle
core, whatever else runs on the machine: it is recorded beside the wall time. Peak memory is that of PyTorch's own allocations: what
is held between steps (parameters, the optimiser's state, the masking's matrix) and the most that a step adds to it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
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

RESULT = Path(__file__).parent / "results" / "aml_cost--cpu.json"
WAYS = ("plain", "aml")
Times = tuple[float, float]  # wall and processor seconds


class Steps:
    """One model with its optimiser, trained in either way on one batch."""

    def __init__(self, name: str, size: int, batch: int, tokens: int) -> None:
        torch.manual_seed(0)
        self.model: Any = create_model(name, image_size=size).train()
        self.training = AlignmentMaskedTraining(self.model).train()
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
        wrapped = self.model if way == "plain" else self.training
        passes = [(1.0, self.inputs)] if way == "plain" else self.training.passes(self.inputs, self.targets)
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
            "stage 1": lambda: self.training.mask_images(**inputs, targets=self.targets),
            "the masking alone": lambda: self.training.masking(inputs["images"], visual, tokens, valid, targets=self.targets),
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
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
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
        for way in WAYS[:: -1 if index % 2 else 1]:
            times[way].append(seconds(partial(steps.step, way)))
    found: dict[str, Any] = {}
    for place, clock in enumerate(("wall", "processor")):
        shares = [masked[place] / plain[place] - 1 for plain, masked in zip(times["plain"], times["aml"], strict=True)]
        found[clock] = {
            "added_share": round(statistics.median(shares), 4),
            "added_min": round(min(shares), 4),
            "added_max": round(max(shares), 4),
            **{f"{way}_seconds": round(statistics.median(pair[place] for pair in times[way]), 3) for way in WAYS},
        }
    parts = {name: statistics.median(seconds(call)[1] for _ in range(3)) for name, call in steps.parts().items()}
    return {**found, "parts_processor_seconds": {name: round(value, 3) for name, value in parts.items()}}


def compare_memory(steps: Steps) -> dict[str, Any]:
    matrix = sum(buffer.nbytes for buffer in steps.training.masking.buffers())
    held = {"plain": steps.held(), "aml": steps.held() + matrix}
    peaks = {way: held[way] + added_bytes(partial(steps.step, way)) for way in WAYS}
    mib = {f"{way}_mib": round(peaks[way] / 2**20, 1) for way in WAYS}
    return {**mib, "held_mib": round(held["plain"] / 2**20, 1), "added_share": round(peaks["aml"] / peaks["plain"] - 1, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="caris_swin_base", help="a preset (default: caris_swin_base)")
    parser.add_argument("--image-size", type=int, default=448, help="side in pixels (default: 448)")
    parser.add_argument("--batch", type=int, default=1, help="pictures per step (default: 1)")
    parser.add_argument("--tokens", type=int, default=20, help="tokens per expression (default: 20)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default: 7)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write (default: beside the other results)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    steps = Steps(options.model, options.image_size, options.batch, options.tokens)
    times = compare_times(steps, options.rounds)
    memory = compare_memory(steps)
    for clock in ("wall", "processor"):
        row = times[clock]
        print(f"{clock}: {row['plain_seconds']} s -> {row['aml_seconds']} s, {row['added_share']:+.1%}")
    print(f"parts, processor seconds: {times['parts_processor_seconds']}")
    print(f"peak memory: {memory['plain_mib']} MiB -> {memory['aml_mib']} MiB, {memory['added_share']:+.1%}")
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
