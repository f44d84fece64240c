"""CUDA graphs of the decode step.

A graph replays the same launches on the same memory, so everything that changes between steps lies in tensors that
stay. One is recorded for each kind of choice and each bucket of positions that is met, at the first step that needs it.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qvl_edge.engine.sampling import Kind

BUCKETS = (512, 1024, 2048, 4096, 8192)  # positions that one graph may meet: they decide how attention is split

Step = Callable[[int, Kind], None]
"""All of a step that happens on the device, for at most so many positions and this kind of choice."""


class StepGraphs:
    """Graphs of one `step`. kept: tensors that a step changes and that recording has to put back."""

    def __init__(self, step: Step, kept: Sequence[Tensor], device: torch.device):
        self._step, self._kept, self._device = step, kept, device
        self._graphs: dict[tuple[int, Kind], torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def replay(self, bucket: int, kind: Kind) -> None:
        """The step, on the current stream."""
        if (bucket, kind) not in self._graphs:
            self._graphs[bucket, kind] = self._capture(bucket, kind)
        self._graphs[bucket, kind].replay()

    def _capture(self, bucket: int, kind: Kind) -> torch.cuda.CUDAGraph:
        """Record a step. It runs once before, to compile and to allocate, and everything it changed is put back."""
        before = [tensor.clone() for tensor in self._kept]
        side = _side_stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            self._step(bucket, kind)  # the place it writes to in the cache is written again by the replay
            for tensor, value in zip(self._kept, before, strict=True):
                tensor.copy_(value)
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # one pool for all: no two graphs run at once, and what a step leaves lies outside of it
        with torch.cuda.graph(graph, pool=self._pool, stream=side):
            self._step(bucket, kind)
        return graph


def bucket_of(positions: int, capacity: int) -> int:
    """The smallest bucket that holds so many positions."""
    return next((size for size in BUCKETS if positions <= size), capacity)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Where graphs are recorded: one for all, as cuBLAS keeps up to 32 MiB for every stream that it was used on."""
    return torch.cuda.Stream(device)
