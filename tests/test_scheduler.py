"""The scheduler: answers of a crowd are those of lone runs, whatever joins, leaves, fails or has to wait."""

import queue
import random
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_small_checkpoint

from qvl_edge import ConfigError, ImageError, PromptError, Runtime
from qvl_edge.engine.run import Run
from qvl_edge.engine.scheduler import Cancelled, Closed, Job, OutOfMemory, Scheduler, TimeLimit

WAIT = 60  # seconds: far more than anything here takes


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    folder = tmp_path_factory.mktemp("scheduler")
    path = write_small_checkpoint(folder / "checkpoint")
    return Runtime.from_pretrained(path, cache_dir=folder / "cache", slots=3, max_context=1024)


@pytest.fixture
def scheduler(runtime: Runtime):
    made = Scheduler(runtime.slots, runtime.encode, runtime.sampler)
    yield made
    made.close()
    assert runtime.slots.free == 3
    runtime.forget()


class Asked:
    """A submitted request; `outcome` waits for its end."""

    def __init__(self, scheduler: Scheduler, runtime: Runtime, query: Any, deadline: float = float("inf"), **options):
        self.pieces: list[str] = []
        self.first = threading.Event()
        self._end: queue.SimpleQueue[Run | Exception] = queue.SimpleQueue()
        self.job = Job(lambda: runtime.prepare(query, **options), self._piece, self._end.put, deadline)
        scheduler.submit(self.job)

    def _piece(self, run: Run, piece: str) -> None:
        assert run.text.endswith(piece)
        self.pieces.append(piece)
        self.first.set()

    def outcome(self) -> Run | Exception:
        return self._end.get(timeout=WAIT)

    def run(self) -> Run:
        outcome = self.outcome()
        if isinstance(outcome, Exception):
            raise outcome
        assert "".join(self.pieces) == outcome.text
        return outcome


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)


def queries(count: int) -> list[tuple[Any, dict[str, Any]]]:
    """Mixed lengths, with and without pictures, greedy and sampled."""
    rng = random.Random(0)
    made = []
    for index in range(count):
        query: list[dict[str, Any]] = [{"text": "word " * rng.randrange(1, 60) + str(index % 5)}]
        if rng.random() < 0.4:
            query.insert(0, {"image": picture(index % 3)})
        options: dict[str, Any] = {"max_new_tokens": rng.randrange(1, 25), "ignore_eos": True}
        options |= {"do_sample": False} if rng.random() < 0.5 else {"seed": index, "top_p": 0.9, "do_sample": True}
        made.append((query, options))
    return made


def test_a_crowd_gets_the_answers_of_lone_runs(scheduler: Scheduler, runtime: Runtime) -> None:
    asked = [Asked(scheduler, runtime, query, **options) for query, options in queries(24)]
    runs = [one.run() for one in asked]
    assert (scheduler.waiting, scheduler.running) == (0, 0)
    runtime.forget()
    for run, (query, options) in zip(runs, queries(24), strict=True):
        assert run.token_ids == runtime.answer(query, **options).token_ids
        assert run.finish_reason == "length"
    assert any(run.cached_tokens for run in runs)


def test_the_same_prompt_from_many_is_prefilled_once(scheduler: Scheduler, runtime: Runtime) -> None:
    query = [{"image": picture(7)}, {"text": "the same for all of them"}]
    asked = [Asked(scheduler, runtime, query, seed=seed, max_new_tokens=20, ignore_eos=True) for seed in range(6)]
    runs = [one.run() for one in asked]
    assert [run.cached_tokens for run in runs[1:]] == [len(run.prompt.ids) - 1 for run in runs[1:]]
    assert sum(run.cached_images for run in runs) == 5


def test_a_caller_who_goes_frees_the_slot_within_a_step(scheduler: Scheduler, runtime: Runtime) -> None:
    asked = [
        Asked(scheduler, runtime, f"say much {i}", max_new_tokens=900, ignore_eos=True, do_sample=False)
        for i in range(3)
    ]
    waiting = Asked(scheduler, runtime, "and me", max_new_tokens=2, ignore_eos=True)
    for one in asked:
        assert one.first.wait(WAIT)
    asked[1].job.cancelled.set()
    assert isinstance(asked[1].outcome(), Cancelled)
    assert len(waiting.run().token_ids) == 2
    for one in (asked[0], asked[2]):
        one.job.cancelled.set()
        assert isinstance(one.outcome(), Cancelled)


def test_a_request_that_takes_too_long_ends(scheduler: Scheduler, runtime: Runtime) -> None:
    late = Asked(scheduler, runtime, "x", deadline=time.monotonic() - 1, max_new_tokens=5)
    assert isinstance(late.outcome(), TimeLimit)
    slow = Asked(scheduler, runtime, "x", deadline=time.monotonic() + 0.3, max_new_tokens=900, ignore_eos=True)
    assert isinstance(slow.outcome(), TimeLimit)


def test_a_bad_request_harms_nobody_else(scheduler: Scheduler, runtime: Runtime) -> None:
    good = Asked(scheduler, runtime, "fine", max_new_tokens=30, ignore_eos=True, do_sample=False)
    bad = [
        Asked(scheduler, runtime, [{"image": b"no picture"}]),
        Asked(scheduler, runtime, "w " * 3000),
        Asked(scheduler, runtime, "x", top_p=7),
    ]
    assert [type(one.outcome()) for one in bad] == [ImageError, PromptError, ConfigError]
    assert good.run().token_ids == runtime_alone(runtime, "fine", 30)


def runtime_alone(runtime: Runtime, text: str, tokens: int) -> list[int]:
    return runtime.answer(text, max_new_tokens=tokens, ignore_eos=True, do_sample=False).token_ids


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory: …")]
)
def test_memory_that_runs_out_ends_who_runs_and_the_next_one_works(
    scheduler: Scheduler, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    asked = [Asked(scheduler, runtime, f"much {i}", max_new_tokens=900, ignore_eos=True) for i in range(3)]
    for one in asked:
        assert one.first.wait(WAIT)

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(runtime.slots, "_step", fail)
    assert [type(one.outcome()) for one in asked] == [OutOfMemory] * 3
    monkeypatch.undo()
    after = Asked(scheduler, runtime, "next", max_new_tokens=9, ignore_eos=True, do_sample=False)
    assert after.run().token_ids == runtime_alone(runtime, "next", 9)


def test_a_failure_says_nothing_of_the_prompt(
    scheduler: Scheduler, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = "hush"[::-1]  # a traceback shows lines of code

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError(prompt)

    monkeypatch.setattr(runtime.slots, "prefill", fail)
    outcome = Asked(scheduler, runtime, prompt, max_new_tokens=9).outcome()
    assert isinstance(outcome, RuntimeError) and prompt not in str(outcome)
    assert "ValueError" in caplog.text and prompt not in caplog.text


def test_closing_ends_everybody(runtime: Runtime) -> None:
    scheduler = Scheduler(runtime.slots, runtime.encode, runtime.sampler)
    asked = [Asked(scheduler, runtime, f"much {i}", max_new_tokens=900, ignore_eos=True) for i in range(8)]
    assert asked[0].first.wait(WAIT)
    scheduler.close()
    assert [type(one.outcome()) for one in asked] == [Closed] * 8
    with pytest.raises(Closed):
        Asked(scheduler, runtime, "late")


def test_a_long_prompt_does_not_stop_the_others(
    scheduler: Scheduler, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    for name in ("prefill", "step"):
        real = getattr(runtime.slots, name)

        def watched(*args: Any, name: str = name, real: Any = real) -> Any:
            order.append(name)
            return real(*args)

        monkeypatch.setattr(runtime.slots, name, watched)
    first = Asked(scheduler, runtime, "short", max_new_tokens=400, ignore_eos=True)
    assert first.first.wait(WAIT)
    second = Asked(scheduler, runtime, "w " * 250, max_new_tokens=2, ignore_eos=True)
    second.run()
    first.job.cancelled.set()
    first.outcome()
    chunks = [index for index, name in enumerate(order) if name == "prefill"][1:]
    assert len(chunks) >= 4  # 500 tokens by 128
    assert all(after - before == 2 for before, after in zip(chunks, chunks[1:], strict=False))  # a step between
