"""Graphs of the decode step, over a CUDA of the test's own: what is captured, kept, and stepped for how many slots."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import SMALL
from torch import Tensor

from qvl_edge.config import Config
from qvl_edge.engine import graph as graphs
from qvl_edge.engine import slots as slots_module
from qvl_edge.engine.engine import Engine
from qvl_edge.engine.graph import buckets_of, count_of, counts_of
from qvl_edge.engine.request import Request
from qvl_edge.engine.slots import WARM_UP, Slots, _neighbours
from qvl_edge.errors import OutOfMemory
from qvl_edge.model.cache import KVCache
from qvl_edge.model.decoder import embed
from qvl_edge.model.fused import FusedDecoder
from qvl_edge.options import GenerationOptions

GREEDY = GenerationOptions(do_sample=False)
PENALIZED = GenerationOptions(do_sample=False, repetition_penalty=1.3)


class FakeCuda:
    """torch.cuda as far as StepGraphs sees it: streams, pools that a failed capture spoils, and graphs.

    What runs while it captures has no effect on `device_tensors`, and a replay has none on the host's `filled`.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.streams, self.pools, self.spoiled = ["default"], 0, set[int]()
        self.captured: list[tuple[int, int, Any]] = []
        self.modes: list[str] = []
        self.fail = 0
        self.slots: Slots | None = None

        def step(slots: Slots, count: int, bucket: int, kind: Any) -> None:
            at_work = [request.slot for request in slots.requests if request.decoding]
            assert max(at_work) < count
            for rows in _neighbours(at_work):  # the definition of attention refuses parked slots
                slots._step(rows, bucket, kind)

        def watched(slots: Slots, *key: Any) -> None:
            self.slots, self.key = slots, key
            step(slots, *key)

        self.step: Callable[..., None] = step
        monkeypatch.setattr(Slots, "_step_leading", watched)
        monkeypatch.setattr(graphs, "_side_stream", lambda _: FakeStream("side"))
        for name, value in {
            "graph_pool_handle": self.pool,
            "current_stream": lambda _=None: FakeStream(self.streams[-1]),
            "stream": self.stream,
            "graph": self.graph,
            "CUDAGraph": lambda: FakeGraph(self),
            "synchronize": lambda _=None: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def pool(self) -> int:
        self.pools += 1
        return self.pools

    @contextlib.contextmanager
    def stream(self, stream: "FakeStream") -> Iterator[None]:
        depth = len(self.streams)
        self.streams.append(stream.name)
        try:
            yield
        finally:
            del self.streams[depth:]

    @contextlib.contextmanager
    def graph(self, graph: "FakeGraph", *, pool: int, stream: "FakeStream", capture_error_mode: str) -> Iterator[None]:
        assert pool not in self.spoiled, "beginAllocateToPool: already recording to mempool_id"
        self.modes.append(capture_error_mode)
        self.streams.append(stream.name)
        self.spoiled.add(pool)
        assert self.slots is not None
        tensors = (self.slots._tokens, self.slots.cache.lengths, self.slots.samplers.seen, self.slots.samplers.counts)
        before = [tensor.clone() for tensor in tensors]
        yield
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)
        if self.fail:
            self.fail -= 1
            raise RuntimeError("operation failed due to a previous error during capture")
        self.spoiled.discard(pool)
        self.streams.pop()
        graph.key = self.key
        self.captured.append(self.key)


class FakeStream:
    def __init__(self, name: str):
        self.name = name

    def wait_stream(self, other: "FakeStream") -> None:
        pass


class FakeGraph:
    key: tuple[Any, ...] = ()

    def __init__(self, cuda: FakeCuda):
        self.cuda = cuda

    def replay(self) -> None:
        assert self.cuda.streams == ["default"]
        slots = self.cuda.slots
        assert slots is not None
        filled = slots.cache.filled.clone()
        self.cuda.step(slots, *self.key)
        slots.cache.filled.copy_(filled)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


@pytest.fixture(scope="module")
def model() -> FusedDecoder:
    made = FusedDecoder.random(Config.from_dict(SMALL), device="cpu")
    made.backend = "torch"
    return made


def begun(slots: Slots, length: int, seed: int = 0, options: GenerationOptions = GREEDY) -> Request:
    ids = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    request = Request.of_ids(ids, options)
    slots.begin(request)
    while slots.prefill(request) is None:
        pass
    return request


def alone(model: FusedDecoder, length: int, steps: int, seed: int = 0, options: GenerationOptions = GREEDY) -> list:
    """The tokens of `steps` eager steps of one request."""
    slots = Slots(model, capacity=1200, graph=False)
    request = begun(slots, length, seed, options)
    return [slots.step()[request] for _ in range(steps)]


@pytest.mark.parametrize("length", [510, 511, 1023])
def test_the_first_step_at_a_buckets_last_position_is_captured(
    length: int, cuda: FakeCuda, model: FusedDecoder
) -> None:
    slots = Slots(model, capacity=1200, graph=True)
    request = begun(slots, length, options=PENALIZED)
    assert [slots.step()[request] for _ in range(3)] == alone(model, length, 3, options=PENALIZED)
    assert slots.cache.filled.tolist() == [length + 3]


def test_only_this_threads_calls_are_captured(cuda: FakeCuda, model: FusedDecoder) -> None:
    slots = Slots(model, capacity=60, graph=True)
    begun(slots, 5)
    slots.step()
    assert cuda.modes == ["thread_local"]  # another thread encodes a picture, and onnxruntime calls cudaMalloc there


def test_after_a_failed_capture_the_next_one_has_a_fresh_pool_and_its_stream(
    cuda: FakeCuda, model: FusedDecoder
) -> None:
    slots = Slots(model, capacity=60, graph=True)
    request = begun(slots, 5, options=PENALIZED)
    cuda.fail = 1
    with pytest.raises(RuntimeError, match="during capture"):
        slots.step()
    assert cuda.streams == ["default"] and slots.cache.filled.tolist() == [5]
    assert [slots.step()[request] for _ in range(3)] == alone(model, 5, 3, options=PENALIZED)


def test_counts_and_buckets_are_those_that_requests_can_have() -> None:
    assert [count_of(slots, 16) for slots in (1, 2, 4, 5, 8, 9, 16)] == [1, 4, 4, 8, 8, 16, 16]
    assert [count_of(slots, 6) for slots in (1, 2, 5, 6)] == [1, 4, 6, 6]
    for most in (1, 2, 4, 6, 16):
        assert {count_of(slots, most) for slots in range(1, most + 1)} == set(counts_of(most))
    assert buckets_of(600) == [512, 1024] and buckets_of(512) == [512] and buckets_of(9000) == [*graphs.BUCKETS, 9000]


def test_a_lone_request_moves_to_the_leading_slot_and_nothing_held_is_lost(cuda: FakeCuda, model: FusedDecoder) -> None:
    slots = Slots(model, capacity=60, count=6, graph=True)
    options = GenerationOptions(do_sample=True, seed=3, repetition_penalty=1.2, logit_bias={7: 2.0}, logprobs=2)
    crowd = [begun(slots, 6 + index, index, options) for index in range(5)]
    said: dict[int, list[int]] = {index: [] for index in range(5)}

    def step() -> None:
        tokens = slots.step()
        for index, request in enumerate(crowd):
            if request in tokens:
                said[index].append(tokens[request])

    step()
    for request in crowd[:4]:
        slots.end(request)
    held = [list(slot.held) for slot in slots._slots]
    step()
    assert [key[0] for key in cuda.captured] == [6, 1] and crowd[4].slot == 0
    assert slots._slots[4].held == held[0] and slots._slots[0].held[: len(held[4])] == held[4]
    step()
    assert crowd[4].logprob is not None and crowd[4].logprob.token_id == said[4][-1]
    assert said[4] == alone(model, 10, 3, 4, options) and said[0] == alone(model, 6, 1, 0, options)
    # what the ended request left is in the other slot now, with the keys that belong to it
    again = Request.of_ids(held[0], GREEDY)
    slots.begin(again)
    assert again.cached_tokens == len(held[0]) - 1 and again.slot == 4
    slots.prefill(again)
    fresh = Slots(model, capacity=60, graph=False)
    first = Request.of_ids(held[0], GREEDY)
    fresh.begin(first)
    fresh.prefill(first)
    assert again.last == first.last


def test_a_prompt_that_is_prefilled_in_a_leading_slot_changes_places_too(cuda: FakeCuda, model: FusedDecoder) -> None:
    slots = Slots(model, capacity=60, count=2, graph=True)
    ids = list(range(1, 21))
    waiting = Request.of_ids(ids, GREEDY)
    slots.begin(waiting)
    assert slots.prefill(waiting, 7) is None
    running = begun(slots, 9, 5)
    tokens = [slots.step()[running] for _ in range(2)]
    assert (running.slot, waiting.slot) == (0, 1) and tokens == alone(model, 9, 2, 5)
    assert slots.prefill(waiting) is not None
    other = Slots(model, capacity=60, graph=False)
    expected = Request.of_ids(ids, GREEDY)
    other.begin(expected)
    assert waiting.last == other.prefill(expected)


def test_graphs_past_the_most_are_dropped_and_captured_again(
    cuda: FakeCuda, model: FusedDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 1)
    slots = Slots(model, capacity=60, count=2, graph=True)
    first = begun(slots, 5)
    slots.step()
    second = begun(slots, 5, 1)
    slots.step()
    slots.end(second)
    assert slots.step()[first] == alone(model, 5, 3)[-1]
    assert [key[0] for key in cuda.captured] == [1, 2, 1]


def test_warming_up_runs_every_count_and_bucket_and_changes_nothing(cuda: FakeCuda, model: FusedDecoder) -> None:
    slots = Slots(model, capacity=600, count=6, graph=True)
    ran = []

    class Recorder:
        device = embeddings_device = torch.device("cpu")
        embed = staticmethod(model.embed)

        def __call__(self, embeds: Tensor, cache: KVCache) -> Tensor:
            ran.append((*embeds.shape[:2], cache.capacity))
            cache.advance(embeds.shape[1])
            return torch.zeros(len(embeds), model.config.vocab_size)

    slots.model = Recorder()
    slots.warm_up()
    steps = {(count, 1, capacity) for count in (1, 4, 6) for capacity in (512, 600)}
    assert set(ran) == steps | {(1, tokens, capacity) for tokens in WARM_UP for capacity in (512, 600)}
    assert slots.cache.lengths.tolist() == [600] * 6 and not slots.cache.filled.any()
    slots.model = model
    request = begun(slots, 5, options=PENALIZED)
    assert [slots.step()[request] for _ in range(2)] == alone(model, 5, 2, options=PENALIZED)


def test_embeddings_on_the_host_go_straight_into_the_buffer_that_is_copied(model: FusedDecoder) -> None:
    table, buffer = torch.randn(9, 4).bfloat16(), torch.zeros(2, 1, 4, dtype=torch.float16)
    on_the_device = torch.empty(4, dtype=torch.float16, device="meta")
    assert embed(torch.tensor([[3], [8]]), table, on_the_device, buffer) is buffer
    assert torch.equal(buffer[:, 0], table[[3, 8]].half())
    slots = Slots(model, capacity=60, graph=False)
    slots._embeds, slots._host_embeds = torch.zeros(1, 1, 128).half(), torch.zeros(1, 1, 128).half()
    request = begun(slots, 5)
    assert [slots.step()[request] for _ in range(2)] == alone(model, 5, 2)


def test_a_request_whose_cache_does_not_fit_any_more_ends_with_the_error(
    model: FusedDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = Slots(model, capacity=60, graph=False)
    slots.unload()

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    real = slots_module.KVCache
    monkeypatch.setattr(slots_module, "KVCache", full)
    engine = Engine(slots)
    request = Request.of_ids([1, 2, 3], GREEDY)
    engine.add(request)
    engine.step()
    assert request.done and isinstance(request.error, OutOfMemory)
    monkeypatch.setattr(slots_module, "KVCache", real)
    options = replace(GREEDY, max_new_tokens=2)
    assert len(engine.complete(Request.of_ids([1, 2, 3], options)).token_ids) == 2
