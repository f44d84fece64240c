"""Interleaved timing of several candidates, so that other load on the machine affects all of them alike."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

# bytes of weights or KV caches to cycle through, so that none stays cached: the largest L2 of a GPU, an RTX PRO 6000's,
# has 128 MiB
OUTGROWS_CACHES = 512 * 2**20


@dataclass(frozen=True)
class Timing:
    """Median and quartiles over `rounds`, in milliseconds per call."""

    median_ms: float
    low_ms: float
    high_ms: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float], calls: int = 1) -> "Timing":
        """Of rounds of `calls` calls each."""
        low, median, high = (1000 * np.quantile(seconds, (0.25, 0.5, 0.75), method="nearest") / calls).tolist()
        return cls(median, low, high, len(seconds))

    def us(self) -> dict[str, float]:
        """In microseconds, by the names in saved results."""
        return {"us": 1000 * self.median_ms, "low_us": 1000 * self.low_ms, "high_us": 1000 * self.high_ms}

    def __str__(self) -> str:
        return f"{self.median_ms:.2f} ({self.low_ms:.2f} to {self.high_ms:.2f})"


def measure(
    candidates: Mapping[str, Sequence[Callable[[], object]]], *, device: str, rounds: int, seconds: float
) -> dict[str, Timing]:
    """Time the candidates in turn, `rounds` times each, after a warm-up: per call, of all calls of a candidate at once.

    On "cuda" these are one CUDA graph, timed by events, else by the host's clock; on "cpu" after an untimed one, as the
    threads of the candidate before may still spin. A candidate that has used up its `seconds` skips further
    rounds, from its fourth on.
    """
    clock = _device_seconds if device == "cuda" else _host_seconds
    runs = {name: _one_after_another(calls, device) for name, calls in candidates.items()}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            if len(times[name]) < 3 or sum(times[name]) <= seconds:
                if device == "cpu":
                    run()
                times[name].append(clock(run))
    return {name: Timing.of(times[name], len(calls)) for name, calls in candidates.items()}


def _host_seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _device_seconds(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def _one_after_another(calls: Sequence[Callable[[], object]], device: str) -> Callable[[], object]:
    """All calls as one; on "cuda" as a CUDA graph, captured after a warm-up, so that no call waits for Python."""

    def run() -> None:
        for call in calls:
            call()

    if device != "cuda":
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # compiles, and lets libraries allocate
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return lambda kept=run: graph.replay()  # type: ignore[misc]  # keeps the tensors that the graph reads


def copy_gb_per_s(device: str) -> float | None:
    """Measured memory bandwidth: GB/s, read and written, of a device copy of 1 GiB. None on the CPU."""
    if device != "cuda":
        return None
    source = torch.zeros(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    timing = measure({"copy": [lambda: target.copy_(source)]}, device=device, rounds=50, seconds=1.0)["copy"]
    return 2**31 / timing.median_ms / 1e6
