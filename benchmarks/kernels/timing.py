"""Timing several candidates against one another: interleaved, so that a busy moment of the machine hits all of them."""

import argparse
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

# bytes of weights or caches that are used in turn, so that none is found in a cache: the largest L2 of a GPU, an
# RTX PRO 6000's, holds 128 MiB
OUTGROWS_CACHES = 512 * 2**20


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call over `rounds` of them: the median, and the quartiles as its spread."""

    median_ms: float
    low_ms: float
    high_ms: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        """Of one call each."""
        ordered = sorted(1000 * value for value in seconds)
        last = len(ordered) - 1
        low, median, high = (ordered[round(last * share)] for share in (0.25, 0.5, 0.75))
        return cls(median, low, high, len(ordered))

    def of_one(self, calls: int) -> "Timing":
        """Of one call, where each round was `calls` of them."""
        return replace(self, median_ms=self.median_ms / calls, low_ms=self.low_ms / calls, high_ms=self.high_ms / calls)

    def us(self) -> dict[str, float]:
        """In microseconds, as results have it."""
        return {"us": 1000 * self.median_ms, "low_us": 1000 * self.low_ms, "high_us": 1000 * self.high_ms}

    def __str__(self) -> str:
        return f"{self.median_ms:.2f} ({self.low_ms:.2f} to {self.high_ms:.2f})"


def measure(
    candidates: Mapping[str, Callable[[], object]], *, device: str, rounds: int, seconds: float
) -> dict[str, Timing]:
    """Time each candidate `rounds` times in turn, after one call of each that does not count.

    On "cuda" by the device's own clock, from the start of a candidate's work to its end, else by the host's. A
    candidate that has used up its `seconds` is left out of further rounds, but not before its third.
    """
    clock = _device_seconds if device == "cuda" else _host_seconds
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for call in candidates.values():
        call()
    for _ in range(rounds):
        for name, call in candidates.items():
            if len(times[name]) < 3 or sum(times[name]) <= seconds:
                times[name].append(clock(call))
    return {name: Timing.of(values) for name, values in times.items()}


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


def one_after_another(calls: Sequence[Callable[[], object]], device: str) -> Callable[[], object]:
    """All calls as one; on "cuda" the replay of a CUDA graph of them, which are run once before it is captured.

    What is timed so waits for the device only, never for Python, and for the launches that a model's graph has too.
    """
    if device != "cuda":
        return lambda: [call() for call in calls]
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
    return lambda kept=calls: graph.replay()  # kept, because the graph reads the tensors that the calls hold


def copy_gb_per_s(device: str, size: int = 2**30) -> float | None:
    """What a GPU's memory does at best: bytes that a copy of `size` bytes reads and writes, per second. CPU: None."""
    if device != "cuda":
        return None
    source = torch.zeros(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    timing = measure({"copy": lambda: target.copy_(source)}, device=device, rounds=50, seconds=1.0)["copy"]
    return 2 * size / timing.median_ms / 1e6


def use_device(parser: argparse.ArgumentParser, device: str, *, tiny: bool) -> None:
    """End with a way out if `device` cannot run the GPU kernels; on the CPU they are interpreted, small shapes only."""
    if device == "cpu":
        if not tiny:
            parser.error("on the CPU the kernels run in Triton's interpreter, thousands of times slower: add --tiny")
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is loaded
    elif not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --device cpu --tiny needs none")
