"""The decode step: from the batch's last tokens to its next ones without waiting for the device, as CUDA graphs on one.

A graph replays the same launches on the same memory, so everything that changes between steps lies in tensors that
stay: tokens, lengths, who has ended, and the noise of those that sample. On the CPU, or with graph=False, the same
function runs eagerly; the tokens are the same.
"""

import functools
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from qvl_edge.config import Config
from qvl_edge.engine.sampling import Sampler, Samplers, check_tokens
from qvl_edge.model.cache import KVCache
from qvl_edge.model.fused import FusedDecoder

BUCKETS = (512, 1024, 2048, 4096, 8192)  # positions that one graph may meet: they decide how attention is split
SLACK = 256  # positions that a kept cache is rounded up to: 128 MiB of Qwen-7B's in float16


class Decoder(Protocol):
    """What a step needs of a model: `QWenLMHeadModel` and `FusedDecoder`."""

    config: Config

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def embed(self, ids: Tensor) -> Tensor: ...
    def __call__(self, embeds: Tensor, cache: KVCache, *, all_logits: bool = False) -> Tensor: ...


class DecodeStep:
    """Steps of one batch over one cache.

    graph: replay CUDA graphs, one for each bucket of positions that is met, captured at its first step; it needs CUDA.
    """

    def __init__(self, model: Decoder, cache: KVCache, samplers: Samplers, *, graph: bool):
        self.model, self.cache, self.samplers = model, cache, samplers
        batch = len(samplers.samplers)
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=model.device)
        self.ended = torch.zeros(batch, dtype=torch.int64, device=model.device)
        self._ended_on_host = [False] * batch
        self._graphs: dict[int, torch.cuda.CUDAGraph] | None = {} if graph else None
        self._pool = torch.cuda.graph_pool_handle() if graph else None
        # pinned, so that the copy of a step's tokens is the only thing the host ever waits for
        self._host_tokens = torch.zeros(batch, dtype=torch.int64, pin_memory=model.device.type == "cuda")

    def fits(self, samplers: Sequence[Sampler]) -> bool:
        """Whether the graphs that there are would do for another batch that fits into the cache."""
        ours = self.samplers
        return Samplers.kind_of(samplers) == (ours.sampled, ours.cut, ours.penalized)

    @torch.inference_mode()
    def reset(self, samplers: Sequence[Sampler]) -> None:
        """Start anew with other sequences in the same memory."""
        self.samplers.load(samplers)
        self.cache.clear()
        self.ended.zero_()
        self._ended_on_host = [False] * len(samplers)

    @torch.inference_mode()
    def first(self, logits: Tensor) -> list[int]:
        """The tokens that follow the prompts, from their logits (B, vocab)."""
        self.samplers.draw()
        self.tokens.copy_(self.samplers.choose(logits))
        return self._read()

    @torch.inference_mode()
    def next(self, ended: list[bool]) -> list[int]:
        """The tokens after the last ones. A sequence that has ended goes along and keeps its length in the cache.

        PromptError if a sequence that goes on finds no room; ConfigError if logits are not finite.
        """
        if ended != self._ended_on_host:
            self.ended.copy_(torch.tensor(ended, dtype=torch.int64))
            self._ended_on_host = list(ended)
        self.samplers.draw()
        # an ended sequence computes its last place again
        self.cache.filled -= torch.tensor(ended, dtype=torch.int64)
        self.cache.check_room(1)
        needed = int(self.cache.filled.max()) + 1
        bucket = next((size for size in BUCKETS if needed <= size), self.cache.capacity)
        if self._graphs is None:
            self._step(bucket)
        else:
            if bucket not in self._graphs:
                self._graphs[bucket] = self._capture(bucket)
            self._graphs[bucket].replay()
            self.cache.filled += 1  # what a replay counts on the device only
        return self._read()

    def _step(self, bucket: int) -> None:
        """All of a step that happens on the device; the model counts the host's side of the cache too."""
        self.cache.lengths.sub_(self.ended)
        # an ended sequence goes on with whatever it gets, NOT_FINITE included, which is no row of the embeddings
        ids = self.tokens.clamp(min=0)[:, None]
        logits = self.model(self.model.embed(ids), self.cache.window(bucket))
        self.tokens.copy_(self.samplers.choose(logits))

    def _capture(self, bucket: int) -> torch.cuda.CUDAGraph:
        """Record a step. It runs once before, to compile and to allocate, and everything it changed is put back."""
        kept = (self.tokens, self.cache.lengths, self.cache.filled, self.samplers.seen)
        before = [tensor.clone() for tensor in kept]

        def restore() -> None:
            for tensor, value in zip(kept, before, strict=True):
                tensor.copy_(value)

        side = _side_stream(self.model.device)
        side.wait_stream(torch.cuda.current_stream(self.model.device))
        with torch.cuda.stream(side):
            self._step(bucket)  # the place it writes to in the cache is written again by the replay
            restore()
        torch.cuda.current_stream(self.model.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # one pool for all: no two graphs run at once, and what a step leaves lies outside of it
        with torch.cuda.graph(graph, pool=self._pool, stream=side):
            self._step(bucket)
        self.cache.filled.copy_(before[2])  # capturing ran the host's side only
        return graph

    def _read(self) -> list[int]:
        self._host_tokens.copy_(self.tokens)
        tokens = self._host_tokens.tolist()
        check_tokens([0 if ended else token for token, ended in zip(tokens, self._ended_on_host, strict=True)])
        return tokens


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Where graphs are recorded: one for all, as cuBLAS keeps up to 32 MiB for every stream that it was used on."""
    return torch.cuda.Stream(device)


class Decoding:
    """Makes the steps of batches, and keeps the cache and the graphs of the last one for the next that fits into them.

    kv_cache: dtype of keys and values (None: the model's). graph: see DecodeStep (None: for a FusedDecoder on CUDA).
    """

    def __init__(self, model: Decoder, *, kv_cache: torch.dtype | None = None, graph: bool | None = None):
        self.model, self.kv_cache = model, kv_cache or model.dtype
        self.graph = graph if graph is not None else isinstance(model, FusedDecoder) and model.device.type == "cuda"
        self._idle: DecodeStep | None = None

    def take(self, samplers: Sequence[Sampler], capacity: int) -> DecodeStep:
        """A step for `samplers` over an empty cache of `capacity` positions or more, until `give_back`."""
        step, self._idle = self._idle, None  # whoever comes meanwhile gets one of its own
        device, cache = self.model.device, None
        if step is not None and len(step.tokens) == len(samplers) and capacity <= step.cache.capacity:
            if step.fits(samplers):
                step.reset(samplers)
                return step
            cache = step.cache
            cache.clear()
        del step  # what does not fit goes before the next one comes
        if cache is None:
            if self.graph:  # room for somewhat longer next prompts; a whole bucket could be gigabytes too many
                capacity = -(-capacity // SLACK) * SLACK
            cache = KVCache(self.model.config, len(samplers), capacity, dtype=self.kv_cache, device=device)
        return DecodeStep(
            self.model, cache, Samplers(samplers, self.model.config.vocab_size, device=device), graph=self.graph
        )

    def give_back(self, step: DecodeStep) -> None:
        """End with a step. Only one with graphs is worth keeping its cache for, and of two that one with more room."""
        if self.graph and (self._idle is None or step.cache.capacity > self._idle.cache.capacity):
            self._idle = step
