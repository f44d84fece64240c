"""CUDA graphs of the decode step.

A graph replays the same launches on the same memory, so everything that changes between steps is in tensors that stay
where they are. One graph is captured for each number of leading slots, bucket of positions and kind of sampling, when
first needed.
"""

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qvl_edge.engine.sampling import Kind

BUCKETS = (512, 1024, 2048, 4096, 8192)  # cache lengths that one graph covers: they decide how attention is split
COUNTS = (1, 4, 8, 16)  # leading slots that one graph steps: kernels of 8 and 16 rows, attention splits by sequences
MAX_GRAPHS = 24  # kept at once; the one that was not used for longest is captured again when it is needed
GRAPH_BYTES = 1 << 20  # of one, apart from what a step computes; assumed, benchmarks.gpu measures it

Step = Callable[[int, int, Kind], None]
"""The part of a step that runs on the device: for this many leading slots, a cache length of at most this, and this
kind of sampling."""


class StepGraphs:
    """Graphs of one `step`. kept: tensors that a step changes and that capturing has to restore, on the host too."""

    def __init__(self, step: Step, kept: Sequence[Tensor], device: torch.device):
        self._step, self._kept, self._device = step, kept, device
        self._graphs: OrderedDict[tuple[int, int, Kind], torch.cuda.CUDAGraph] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle()

    def replay(self, count: int, bucket: int, kind: Kind) -> None:
        """The step, on the current stream."""
        key = (count, bucket, kind)
        if key not in self._graphs:
            if len(self._graphs) >= MAX_GRAPHS:
                self._graphs.popitem(last=False)
            self._graphs[key] = self._capture(*key)
        self._graphs.move_to_end(key)
        self._graphs[key].replay()

    def _capture(self, count: int, bucket: int, kind: Kind) -> torch.cuda.CUDAGraph:
        """Capture a step. It runs once before, to compile and to allocate, and everything it changed is restored."""
        before = [tensor.clone() for tensor in self._kept]
        current, side = torch.cuda.current_stream(self._device), _side_stream(self._device)
        side.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(side):
                self._step(count, bucket, kind)  # the place it writes to in the cache is written again by the replay
                self._restore(before)
            current.wait_stream(side)
            # One pool for all: no two graphs run at once, and what a step leaves lies outside of it. Only this thread's
            # calls are captured: another one encodes a picture meanwhile, and onnxruntime allocates and frees there,
            # which would end a global capture. torch.cuda.graph leaves its stream current when a capture fails.
            with (
                torch.cuda.stream(current),
                torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"),
            ):
                self._step(count, bucket, kind)
        except BaseException:
            self._pool = torch.cuda.graph_pool_handle()  # torch takes the old one to be captured into for ever
            raise
        finally:
            self._restore(before)  # a capture runs nothing on the device, and counts on the host
        return graph

    def _restore(self, before: list[Tensor]) -> None:
        for tensor, value in zip(self._kept, before, strict=True):
            tensor.copy_(value)


def bucket_of(positions: int, capacity: int) -> int:
    """The smallest bucket that holds this many positions."""
    return next((size for size in BUCKETS if positions <= size), capacity)


def buckets_of(capacity: int) -> list[int]:
    """All that `bucket_of` gives for a cache of this capacity."""
    return [*(size for size in BUCKETS if size < capacity), bucket_of(capacity, capacity)]


def count_of(slots: int, most: int) -> int:
    """The smallest number of leading slots, of those that have graphs, that holds this many of `most`."""
    return next((count for count in COUNTS if slots <= count < most), most)


def counts_of(most: int) -> list[int]:
    """All that `count_of` gives."""
    return [*(count for count in COUNTS if count < most), most]


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that graphs are captured on: one for all, as cuBLAS keeps up to 32 MiB for every stream it runs on."""
    return torch.cuda.Stream(device)
