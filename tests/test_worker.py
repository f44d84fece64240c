"""The worker: requests from an event loop, bounded, cancelled within a step, alive after whatever went wrong."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_small_checkpoint

from qvl_edge import ConfigError, Runtime
from qvl_edge.answer import Answer
from qvl_edge.engine.request import Piece, Request
from qvl_edge.engine.worker import Worker
from qvl_edge.errors import EngineFailed, OutOfMemory, QueueFull, Stopped, TimeLimit

LONG = {"max_new_tokens": 900, "ignore_eos": True}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, vit_cache: Path) -> Runtime:
    path = write_small_checkpoint(tmp_path_factory.mktemp("worker") / "checkpoint")
    return Runtime.from_pretrained(path, cache_dir=vit_cache, slots=2, max_context=1024)


@pytest.fixture
def worker(tiny: Runtime) -> Iterator[Worker]:
    made = Worker(tiny, max_waiting=2)
    yield made
    made.close()
    assert tiny.engine.slots.free == 2 and not made.healthy


def request(words: str = "hello", **generation: Any) -> Request:
    return Request([{"text": words}], generation={"do_sample": False, **generation})


async def everything(worker: Worker, *requests: Request) -> list[tuple[int, Piece | Answer]]:
    return [event async for event in worker.stream(requests)]


def answers(events: list[tuple[int, Piece | Answer]]) -> dict[int, Answer]:
    return {index: event for index, event in events if isinstance(event, Answer)}


async def until(holds: Any) -> None:
    while not holds():
        await asyncio.sleep(0.001)


def test_it_gives_the_runtimes_pieces_and_answer(worker: Worker, tiny: Runtime) -> None:
    events = asyncio.run(everything(worker, request(), request()))
    answer = tiny.answer("hello", do_sample=False)
    for index in range(2):
        pieces = [event.text for at, event in events if at == index and isinstance(event, Piece)]
        assert answers(events)[index].token_ids == answer.token_ids and "".join(pieces).strip() == answer.text


def test_a_whole_answer_comes_in_at_most_two_pieces(worker: Worker, tiny: Runtime) -> None:
    async def scenario() -> None:
        events = [event async for event in worker.stream([request(max_new_tokens=20, ignore_eos=True)], whole=True)]
        *pieces, answer = (event for _, event in events)
        alone = tiny.answer("hello", do_sample=False, max_new_tokens=20, ignore_eos=True)
        assert len(pieces) <= 2 and isinstance(answer, Answer)  # one, if this thread slept until the end
        assert answer.text == alone.text == "".join(piece.text for piece in pieces).strip()

    asyncio.run(scenario())


def test_requests_of_one_call_have_options_of_their_own(worker: Worker, tiny: Runtime) -> None:
    sampled = [{"do_sample": True, "seed": 5 + i, "max_new_tokens": 12, "ignore_eos": True} for i in range(3)]
    events = asyncio.run(everything(worker, *(request(**options) for options in sampled)))
    found = {index: answer.token_ids for index, answer in answers(events).items()}
    assert found == {i: tiny.answer("hello", **options).token_ids for i, options in enumerate(sampled)}
    assert len({tuple(ids) for ids in found.values()}) == 3


def test_log_probabilities_come_with_the_text_that_their_tokens_made(worker: Worker, tiny: Runtime) -> None:
    events = asyncio.run(everything(worker, request(logprobs=2, max_new_tokens=20, ignore_eos=True)))
    tokens = [token for _, event in events if isinstance(event, Piece) for token in event.logprobs]
    answer = tiny.answer("hello", do_sample=False, max_new_tokens=20, ignore_eos=True)
    assert [token.token_id for token in tokens] == answer.token_ids
    assert all(token.logprob == token.top[0][1] and len(token.top) == 2 for token in tokens)  # greedy: the likeliest


def test_past_the_bound_requests_are_refused(worker: Worker) -> None:
    async def scenario() -> None:
        tasks = []
        for running, waiting in ((1, 0), (2, 0), (2, 1), (2, 2)):
            tasks.append(asyncio.create_task(everything(worker, request(**LONG))))
            await until(lambda running=running, waiting=waiting: (worker.running, worker.waiting) == (running, waiting))
        with pytest.raises(QueueFull, match="2 requests are waiting"):
            await everything(worker, request())
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await until(lambda: (worker.running, worker.waiting) == (0, 0))

    asyncio.run(scenario())


def test_answers_that_are_asked_for_together_count_each_and_have_their_turn_where_none_waits(worker: Worker) -> None:
    async def scenario() -> None:
        many = [asyncio.create_task(everything(worker, *(request(**LONG) for _ in range(5))))]  # of 2 that may wait
        await until(lambda: (worker.running, worker.waiting) == (2, 3))
        many[0].cancel()
        await until(lambda: (worker.running, worker.waiting) == (0, 0))
        for waiting in (0, 0, 1):
            many.append(asyncio.create_task(everything(worker, request(**LONG))))
            await until(lambda waiting=waiting: worker.running == min(len(many) - 1, 2) and worker.waiting == waiting)
        with pytest.raises(QueueFull, match="1 requests are waiting"):
            await everything(worker, request(), request())
        for task in many:
            task.cancel()
        await asyncio.wait(many)
        await until(lambda: (worker.running, worker.waiting) == (0, 0))

    asyncio.run(scenario())


def test_closing_the_iterator_frees_the_slot(worker: Worker) -> None:
    async def scenario() -> None:
        events = worker.stream([request(**LONG)])
        await anext(events)
        assert worker.running == 1
        await events.aclose()
        await until(lambda: worker.running == 0)
        assert answers(await everything(worker, request()))

    asyncio.run(scenario())


class Panic(BaseException):
    """As a native library's; no Exception."""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), OutOfMemory),
        (torch.OutOfMemoryError("CUDA out of memory. hush"), OutOfMemory),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), OutOfMemory),
        (ConfigError("your mistake"), ConfigError),
        (KeyError("hush"), EngineFailed),
        (Panic("hush"), EngineFailed),
    ],
)
def test_after_an_error_in_preparing_the_next_request_works(
    worker: Worker, tiny: Runtime, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error, expected
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(tiny, "prepare", fail)
        with pytest.raises(expected) as said:
            asyncio.run(everything(worker, request()))
    assert "hush" not in str(said.value) + caplog.text
    assert ("in fail" in caplog.text) == (expected is not ConfigError)
    assert answers(asyncio.run(everything(worker, request())))


def test_a_device_that_fails_for_good_ends_every_request_and_shows(
    tiny: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(tiny)
    assert worker.healthy

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    async def scenario() -> list[Any]:
        crowd = [asyncio.create_task(everything(worker, request(**LONG))) for _ in range(5)]
        await until(lambda: worker.running == 2)
        for name in ("_step", "_park", "prefill"):
            monkeypatch.setattr(tiny.engine.slots, name, fail)
        return await asyncio.wait_for(asyncio.gather(*crowd, return_exceptions=True), 60)

    try:
        assert [type(end) for end in asyncio.run(scenario())] == [EngineFailed] * 5
        assert not worker.healthy and (worker.waiting, worker.running) == (0, 0)
        with pytest.raises(EngineFailed, match="restart the process"):
            asyncio.run(everything(worker, request()))
        worker.close()  # and it ends as a healthy one does
    finally:
        monkeypatch.undo()
        tiny.engine.slots.reset()
        tiny.engine.broken = None


def test_a_request_past_its_time_limit_ends_and_frees_the_engine(tiny: Runtime) -> None:
    worker = Worker(tiny, time_limit_s=0.3)
    with pytest.raises(TimeLimit, match="0.3 s"):
        asyncio.run(everything(worker, request(**LONG)))
    assert (worker.waiting, worker.running) == (0, 0)
    worker.close()


def test_closing_ends_what_runs_and_what_waits(tiny: Runtime) -> None:
    async def scenario(worker: Worker) -> list[Any]:
        tasks = [asyncio.create_task(everything(worker, request(**LONG))) for _ in range(3)]
        await until(lambda: worker.running == 2)
        await asyncio.to_thread(worker.close)
        with pytest.raises(Stopped):
            await everything(worker, request())
        return await asyncio.gather(*tasks, return_exceptions=True)

    assert [type(end) for end in asyncio.run(scenario(Worker(tiny)))] == [Stopped] * 3
