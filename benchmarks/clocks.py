"""How one call is timed and its memory counted: on the CPU, and on CUDA with cold caches, from a graph, with its waits counted."""

from __future__ import annotations

import contextlib
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._profiler import _EventType

CLOCKS = ("wall", "graph")
GRAPH_SHARE = 0.12  # of the device's memory that one form's graph may keep
SHORTEST = 2e-3  # seconds; shorter calls are repeated within a sample on the CPU
Sample = dict[tuple[str, str], float]
Run = Callable[..., tuple[list[Tensor], list[Tensor | None]]]


class Timer(ABC):
    """Samples of the time of ``run``, which calls its argument, if it has one, between its forward and its backward pass."""

    graph_failure: str | None = None
    syncs: int | None = None

    def __init__(self, run: Run) -> None:
        self.run = run

    @staticmethod
    def of(device: torch.device, run: Run) -> Timer:
        return CUDATimer(device, run) if device.type == "cuda" else CPUTimer(run)

    @abstractmethod
    def warm_up(self, quick: bool) -> float:
        """Run a few times; how long a sample takes."""

    @abstractmethod
    def sample(self) -> Sample:
        """Seconds by direction and clock."""

    @abstractmethod
    def working_bytes(self) -> int:
        """The most bytes that a run holds at one moment, of those that it has allocated and that are no results of it."""

    def close(self) -> None:  # noqa: B027  most hold nothing
        """Give back what the timer holds."""


class CPUTimer(Timer):
    """Wall time; memory from PyTorch's own record of its allocations (what NumPy and SciPy allocate is not in it)."""

    repeats = 1
    now: Callable[[], float] = staticmethod(time.perf_counter)

    def warm_up(self, quick: bool) -> float:
        start = took = self.now()
        for count in range(1, 2 if quick else 21):
            took = self.now()
            self.run()
            if count >= 2 and self.now() - start > 0.3:
                break
        once = self.now() - took
        self.repeats = max(1, min(100, int(SHORTEST / max(once, 1e-7))))
        return once * self.repeats

    def sample(self) -> Sample:
        marks: list[float] = []
        forward = both = 0.0
        for _ in range(self.repeats):
            start = self.now()
            result = self.run(lambda: marks.append(self.now()))
            end = self.now()
            del result
            both += end - start
            forward += (marks.pop() if marks else end) - start
        if both == forward:
            return {("forward", "wall"): forward / self.repeats}
        return {
            ("backward", "wall"): (both - forward) / self.repeats,
            ("forward+backward", "wall"): both / self.repeats,
        }

    def working_bytes(self) -> int:
        cpu = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profile:
            outputs, gradients = self.run()
        events = list(_allocations(profile.profiler.kineto_results.experimental_event_tree()))
        events.sort(key=lambda event: event.start_time_ns)
        changes = [(event.extra_fields.ptr, event.extra_fields.alloc_size) for event in events]
        return peak_beside(changes, addresses([*outputs, *gradients]))


class CUDATimer(Timer):
    """Wall time with the device idle before and after; time of a replayed graph; both with the second-level cache overwritten."""

    def __init__(self, device: torch.device, run: Run) -> None:
        super().__init__(run)
        self.device = device
        properties = torch.cuda.get_device_properties(device)
        self.cache = torch.empty(4 * getattr(properties, "L2_cache_size", 64 << 20), dtype=torch.int8, device=device)
        self.syncs = self._count_syncs()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.results: object = None
        self.working = 0

    def warm_up(self, quick: bool) -> float:
        for _ in range(3 if quick else 10):
            self.run()
        torch.cuda.synchronize(self.device)
        if self.graph is None and self.graph_failure is None:
            self._capture()
        start = time.perf_counter()
        self.sample()
        return time.perf_counter() - start

    def sample(self) -> Sample:
        marks: list[Any] = []

        def between() -> None:
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[0].record()

        self._flush()
        torch.cuda.synchronize(self.device)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start = time.perf_counter()
        first.record()
        result = self.run(between)
        last.record()
        torch.cuda.synchronize(self.device)
        wall = time.perf_counter() - start
        del result
        if marks:
            found = {("backward", "wall"): marks[0].elapsed_time(last) / 1e3, ("forward+backward", "wall"): wall}
        else:
            found = {("forward", "wall"): wall}
        if self.graph is not None:
            self._flush()
            first.record()
            self.graph.replay()
            last.record()
            torch.cuda.synchronize(self.device)
            found["forward+backward" if marks else "forward", "graph"] = first.elapsed_time(last) / 1e3
        return found

    def working_bytes(self) -> int:
        torch.cuda.synchronize(self.device)
        torch.cuda.memory._record_memory_history(context=None, clear_history=True)
        try:
            outputs, gradients = self.run()
            torch.cuda.synchronize(self.device)
            entries = torch.cuda.memory._snapshot(self.device)["device_traces"][self.device.index]
        finally:
            torch.cuda.memory._record_memory_history(enabled=None)
        signs = {"alloc": 1, "free_completed": -1}
        changes = [(entry["addr"], signs[entry["action"]] * entry["size"]) for entry in entries if entry["action"] in signs]
        self.working = peak_beside(changes, addresses([*outputs, *gradients]))
        return self.working

    def close(self) -> None:
        self.graph, self.results, self.cache = None, None, torch.empty(0)
        give_memory_back()

    def _flush(self) -> None:
        self.cache.zero_()

    def _count_syncs(self) -> int:
        """How often one run waits for the device."""
        self.run()
        torch.cuda.synchronize(self.device)
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                self.run()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        return sum("synchronizing CUDA operation" in str(item.message) for item in caught)

    def _capture(self) -> None:
        if self.syncs:
            self.graph_failure = f"waits for the device {self.syncs} times"
            return
        if self.working > GRAPH_SHARE * torch.cuda.mem_get_info(self.device)[1]:
            self.graph_failure = "a graph keeps its memory, and this one's would not leave room for the other forms"
            return
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(3):
                self.run()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            with torch.cuda.graph(graph):
                outputs, gradients = self.run()
                # Kept, as the graph writes into them; without their history, which would tie the leaves to this stream.
                self.results = [out.detach() for out in outputs], gradients
                del outputs
        except RuntimeError as failure:
            torch.cuda.set_stream(stream)  # a capture that breaks off may leave its own behind
            self.graph_failure = str(failure).strip().splitlines()[0][:200]
            torch.cuda.synchronize(self.device)
            return
        self.graph = graph


def give_memory_back() -> None:
    """What PyTorch keeps for later, back to the device; after a capture that broke off it may refuse, and goes on keeping it."""
    with contextlib.suppress(RuntimeError):
        torch.cuda.empty_cache()


def addresses(tensors: Iterable[Tensor | None]) -> set[int]:
    """Where the memory behind some tensors begins."""
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor is not None}


def peak_beside(changes: Sequence[tuple[int, int]], kept: Collection[int]) -> int:
    """The largest sum of bytes held at one time, without what is at the addresses ``kept`` in the end.

    ``changes`` are addresses and bytes in the order of time, negative where they are given back. Only what was taken counts when it
    is given back, and of an address that is taken several times only the last is ``kept``.
    """
    results = {address: place for place, (address, count) in enumerate(changes) if count > 0 and address in kept}
    sizes: dict[int, int] = {}
    held = peak = 0
    for place, (address, count) in enumerate(changes):
        if count < 0:
            held -= sizes.pop(address, 0)
        elif results.get(address) != place:
            sizes[address] = count
            held += count
            peak = max(peak, held)
    return peak


def _allocations(events: Iterable[Any]) -> Iterator[Any]:
    """What a profile has recorded of memory, anywhere in its tree of events."""
    for event in events:
        if event.tag == _EventType.Allocation:
            yield event
        yield from _allocations(event.children)
