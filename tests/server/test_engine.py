"""BatchEngine: many at once, bounded, cancelled within a token, alive after whatever went wrong."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import write_small_checkpoint

from qvl_edge.errors import ConfigError
from qvl_edge.runtime import Runtime
from qvl_edge.server.engine import (
    BatchEngine,
    ChatRequest,
    Delta,
    Failed,
    Finished,
    OutOfMemory,
    QueueFull,
    Stopped,
    TimeLimit,
)

from .harness import serving

LONG = {"max_new_tokens": 900, "ignore_eos": True}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    folder: Path = tmp_path_factory.mktemp("engine")
    path = write_small_checkpoint(folder / "checkpoint")
    return Runtime.from_pretrained(path, cache_dir=folder / "cache", slots=2, max_context=1024)


@pytest.fixture
def engine(tiny: Runtime) -> Iterator[BatchEngine]:
    made = BatchEngine(tiny, max_waiting=2)
    yield made
    made.close()
    assert tiny.slots.free == 2


def request(words: str = "hello", **fields) -> ChatRequest:
    return ChatRequest([{"text": words}], [], None, {"do_sample": False, **fields.pop("generation", {})}, **fields)


async def everything(engine: BatchEngine, asked: ChatRequest) -> list:
    return [event async for event in engine.submit(asked)]


async def until(holds) -> None:
    while not holds():
        await asyncio.sleep(0.001)


def test_it_gives_the_runtimes_pieces_and_answer(engine: BatchEngine, tiny: Runtime) -> None:
    events = asyncio.run(everything(engine, request(n=2)))
    answer = tiny.answer("hello", do_sample=False)
    for index in range(2):
        (finished,) = (event for event in events if isinstance(event, Finished) and event.index == index)
        pieces = [event.text for event in events if isinstance(event, Delta) and event.index == index]
        assert finished.answer.token_ids == answer.token_ids and "".join(pieces).strip() == answer.text


def test_each_draw_has_a_seed_of_its_own(engine: BatchEngine, tiny: Runtime) -> None:
    sampled = {"do_sample": True, "seed": 5, "max_new_tokens": 12, "ignore_eos": True}
    events = asyncio.run(everything(engine, request(n=3, generation=sampled)))
    found = {event.index: event.answer.token_ids for event in events if isinstance(event, Finished)}
    assert found == {i: tiny.answer("hello", **{**sampled, "seed": 5 + i}).token_ids for i in range(3)}
    assert len({tuple(ids) for ids in found.values()}) == 3


def test_log_probabilities_come_with_the_text_that_their_tokens_made(engine: BatchEngine, tiny: Runtime) -> None:
    asked = request(logprobs=2, generation={"max_new_tokens": 20, "ignore_eos": True})
    events = asyncio.run(everything(engine, asked))
    tokens = [token for event in events if isinstance(event, Delta) for token in event.logprobs]
    answer = tiny.answer("hello", do_sample=False, max_new_tokens=20, ignore_eos=True)
    assert [token.token for token in tokens] == [tiny.tokenizer.decode_bytes([token]) for token in answer.token_ids]
    assert all(token.logprob == token.top[0][1] and len(token.top) == 2 for token in tokens)  # greedy: the likeliest


def test_past_the_bound_requests_are_refused(engine: BatchEngine) -> None:
    async def scenario() -> None:
        tasks = []
        for running, waiting in ((1, 0), (2, 0), (2, 1), (2, 2)):
            tasks.append(asyncio.create_task(everything(engine, request(generation=LONG))))
            await until(lambda running=running, waiting=waiting: (engine.running, engine.waiting) == (running, waiting))
        with pytest.raises(QueueFull, match="2 requests wait"):
            await everything(engine, request())
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await until(lambda: (engine.running, engine.waiting) == (0, 0))

    asyncio.run(scenario())


def test_closing_the_iterator_frees_the_slot(engine: BatchEngine) -> None:
    async def scenario() -> None:
        events = engine.submit(request(generation=LONG))
        await anext(events)
        assert engine.running == 1
        await events.aclose()
        await until(lambda: engine.running == 0)
        assert isinstance((await everything(engine, request()))[-1], Finished)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), OutOfMemory),
        (torch.OutOfMemoryError("CUDA out of memory. hush"), OutOfMemory),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), OutOfMemory),
        (ConfigError("your mistake"), ConfigError),
        (KeyError("hush"), Failed),
    ],
)
@pytest.mark.parametrize("place", ["prepare", "encode"])
def test_after_an_error_the_next_request_works(
    tiny: Runtime, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, place: str, error, expected
) -> None:
    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(tiny, place, fail)
        engine = BatchEngine(tiny)
        with pytest.raises(expected) as said:
            asyncio.run(everything(engine, request()))
        engine.close()
    assert "hush" not in str(said.value) + caplog.text
    assert ("in fail" in caplog.text) == (expected is not ConfigError)
    engine = BatchEngine(tiny)
    assert isinstance(asyncio.run(everything(engine, request()))[-1], Finished)
    engine.close()


def test_memory_that_runs_out_in_a_step_is_a_503_for_who_runs_and_the_next_request_works(
    tiny: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tiny.answer("hello", do_sample=False)
    step, armed = tiny.slots._step, threading.Event()

    def fail(*arguments) -> None:
        if armed.is_set():
            raise torch.OutOfMemoryError("no more")
        step(*arguments)

    monkeypatch.setattr(tiny.slots, "_step", fail)
    engine = BatchEngine(tiny)
    with serving(engine) as server:
        codes: list[tuple[int, str]] = []

        def ask(words: str) -> None:
            response = server.ask(words, max_tokens=900, temperature=0)
            codes.append((response.status_code, response.json()["error"]["code"]))

        armed.set()
        crowd = [threading.Thread(target=ask, args=(f"hello {i}",)) for i in range(2)]
        for thread in crowd:
            thread.start()
        for thread in crowd:
            thread.join()
        assert codes == [(503, "out_of_memory")] * 2
        armed.clear()
        said = server.ask("hello", temperature=0).json()
    assert said["choices"][0]["message"]["content"] == before.text


def test_a_request_past_its_time_ends_and_frees_the_engine(tiny: Runtime) -> None:
    engine = BatchEngine(tiny, time_limit_s=0.3)
    with pytest.raises(TimeLimit, match="0.3 s"):
        asyncio.run(everything(engine, request(generation=LONG)))
    assert (engine.waiting, engine.running) == (0, 0)
    engine.close()


def test_closing_ends_what_runs_and_what_waits(tiny: Runtime) -> None:
    async def scenario(engine: BatchEngine) -> list:
        tasks = [asyncio.create_task(everything(engine, request(generation=LONG))) for _ in range(3)]
        await until(lambda: engine.running == 2)
        await asyncio.to_thread(engine.close)
        with pytest.raises(Stopped):
            await everything(engine, request())
        return await asyncio.gather(*tasks, return_exceptions=True)

    assert [type(end) for end in asyncio.run(scenario(BatchEngine(tiny)))] == [Stopped] * 3
