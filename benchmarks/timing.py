"""Timing several candidates against one another: interleaved, so that a busy moment of the machine hits all of them."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call over `rounds` of them: the median, and the quartiles as its spread."""

    median_ms: float
    low_ms: float
    high_ms: float
    rounds: int

    def of_one(self, calls: int) -> "Timing":
        """Of one call, where each round was `calls` of them."""
        return replace(self, median_ms=self.median_ms / calls, low_ms=self.low_ms / calls, high_ms=self.high_ms / calls)

    def __str__(self) -> str:
        return f"{self.median_ms:.2f} ({self.low_ms:.2f} to {self.high_ms:.2f})"


def measure(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    seconds: float,
    synchronize: Callable[[], None] | None = None,
) -> dict[str, Timing]:
    """Time each candidate `rounds` times in turn, after one call of each that does not count.

    A candidate that has used up its `seconds` is left out of further rounds, but not before its third. `synchronize`
    waits for the device, where calls return before their work is done.
    """
    wait = synchronize or (lambda: None)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for call in candidates.values():
        call()
    for _ in range(rounds):
        for name, call in candidates.items():
            if len(times[name]) >= 3 and sum(times[name]) > seconds:
                continue
            wait()
            begin = time.perf_counter()
            call()
            wait()
            times[name].append(time.perf_counter() - begin)
    return {name: _summary(values) for name, values in times.items()}


def _summary(times: list[float]) -> Timing:
    ordered = sorted(1000 * value for value in times)
    last = len(ordered) - 1
    quarter, half, three = (ordered[round(last * share)] for share in (0.25, 0.5, 0.75))
    return Timing(half, quarter, three, len(ordered))


def in_one_graph(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """The replay of a CUDA graph of these calls, one after another; they are run once before it is captured.

    What is timed so waits for the device only, never for Python, and for the launches that a model's graph has too.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()  # compiles, and lets libraries allocate
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return partial(_replay, graph, calls)


def _replay(graph: torch.cuda.CUDAGraph, calls: Sequence[Callable[[], object]]) -> None:
    del calls  # kept as long as the graph, which reads the tensors that they hold
    graph.replay()


def measure_on_device(
    candidates: Mapping[str, Callable[[], object]], *, rounds: int, seconds: float
) -> dict[str, Timing]:
    """As `measure`, by the CUDA device's own clock: from the start of a candidate's work to its end."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for call in candidates.values():
        call()
    for _ in range(rounds):
        for name, call in candidates.items():
            if len(times[name]) >= 3 and sum(times[name]) > seconds:
                continue
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            call()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) / 1000)
    return {name: _summary(values) for name, values in times.items()}


def copy_gb_per_s(size: int = 2**30) -> float:
    """What a CUDA device's memory does at best: bytes that a copy of `size` bytes reads and writes, per second."""
    source = torch.zeros(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    timing = measure_on_device({"copy": lambda: target.copy_(source)}, rounds=50, seconds=1.0)["copy"]
    return 2 * size / timing.median_ms / 1e6
