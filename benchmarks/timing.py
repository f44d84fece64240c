"""Timing several candidates against one another: interleaved, so that a busy moment of the machine hits all of them."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call over `rounds` of them: the median, and the quartiles as its spread."""

    median_ms: float
    low_ms: float
    high_ms: float
    rounds: int

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
