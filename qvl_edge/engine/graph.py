"""CUDA graphs of the decode step.

A graph replays the same launches on the same memory, so everything that changes between steps is in tensors that stay
where they are. One graph is captured for each kind of sampling and each bucket of positions, when first needed.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qvl_edge.engine.sampling import Kind

BUCKETS = (512, 1024, 2048, 4096, 8192)  # cache lengths that one graph covers: they decide how attention is split

Step = Callable[[int, Kind], None]
"""The part of a step that runs on the device, for a cache length of at most this and this kind of sampling."""


class StepGraphs:
    """Graphs of one `step`. kept: tensors that a step changes and that capturing has to restore."""

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
        """Capture a step. It runs once before, to compile and to allocate, and everything it changed is restored."""
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
    """The smallest bucket that holds this many positions."""
    return next((size for size in BUCKETS if positions <= size), capacity)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that graphs are captured on: one for all, as cuBLAS keeps up to 32 MiB for every stream it runs on."""
    return torch.cuda.Stream(device)
