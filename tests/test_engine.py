"""The engine: answers of a crowd are those of lone runs, whatever joins, leaves, fails or has to wait."""

import gc
import random
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_small_checkpoint
from torch import Tensor

from qvl_edge import ConfigError, ImageError, PromptError, Runtime
from qvl_edge.answer import Answer
from qvl_edge.engine.engine import MAX_FAILURES
from qvl_edge.engine.request import Request
from qvl_edge.engine.slots import CHUNK, SCORED
from qvl_edge.errors import Cancelled, EngineFailed, OutOfMemory, TimeLimit
from qvl_edge.model.cache import KVCache

LONG = {"max_new_tokens": 900, "ignore_eos": True, "do_sample": False}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, vit_cache: Path) -> Callable[..., Runtime]:
    path = write_small_checkpoint(tmp_path_factory.mktemp("engine") / "checkpoint")
    return lambda **options: Runtime.from_pretrained(path, cache_dir=vit_cache, max_context=1024, **options)


@pytest.fixture(scope="module")
def loaded(made: Callable[..., Runtime]) -> Runtime:
    return made(slots=3)


@pytest.fixture
def runtime(loaded: Runtime):
    yield loaded
    assert (loaded.engine.slots.free, loaded.engine.waiting, loaded.engine.running) == (3, 0, 0)
    loaded.forget()


def asked(runtime: Runtime, query: Any, **generation: Any) -> Request:
    """A prepared request."""
    return runtime.prepare(Request(query, generation=generation))


def added(runtime: Runtime, query: Any, **generation: Any) -> Request:
    request = asked(runtime, query, **generation)
    runtime.engine.add(request)
    return request


def steps_until(runtime: Runtime, holds: Callable[[], Any]) -> None:
    for _ in range(5000):
        if holds():
            return
        runtime.engine.step()
    raise AssertionError("it never came true")


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)


def queries(count: int) -> list[tuple[Any, dict[str, Any]]]:
    """Mixed lengths, with and without pictures, greedy and sampled."""
    rng = random.Random(0)
    found = []
    for index in range(count):
        query: list[dict[str, Any]] = [{"text": "word " * rng.randrange(1, 60) + str(index % 5)}]
        if rng.random() < 0.4:
            query.insert(0, {"image": picture(index % 3)})
        options: dict[str, Any] = {"max_new_tokens": rng.randrange(1, 25), "ignore_eos": True}
        options |= {"do_sample": False} if rng.random() < 0.5 else {"seed": index, "top_p": 0.9}
        found.append((query, options))
    return found


def test_a_crowd_gets_the_answers_of_lone_runs(runtime: Runtime) -> None:
    crowd = [asked(runtime, query, **options) for query, options in queries(24)]
    assert set(runtime.engine.run(crowd)) == set(crowd)
    runtime.forget()
    for request, (query, options) in zip(crowd, queries(24), strict=True):
        assert request.answer().token_ids == runtime.answer(query, **options).token_ids
        assert request.finish_reason == "length"
    assert any(request.cached_tokens for request in crowd)


def test_threads_share_one_runtime_and_get_the_answers_of_lone_runs(runtime: Runtime) -> None:
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda one: runtime.answer(one[0], **one[1]), queries(18)))
    runtime.forget()
    assert [one.token_ids for one in answers] == [runtime.answer(q, **options).token_ids for q, options in queries(18)]


def test_run_takes_requests_as_slots_become_free(runtime: Runtime) -> None:
    taken: list[int] = []

    def source():
        for index in range(7):
            taken.append(index)
            yield asked(runtime, f"question {index}", max_new_tokens=3, ignore_eos=True)

    done = 0
    for request in runtime.engine.run(source()):
        assert request.finish_reason == "length" and len(taken) <= done + 3
        done += 1
    assert done == 7


def test_a_request_that_cannot_be_prepared_comes_back_with_its_error(runtime: Runtime) -> None:
    one = {"do_sample": False, "max_new_tokens": 2}
    crowd = [Request(query, generation=one) for query in ("a", [{"image": b"no picture"}], "c")]
    assert set(runtime.run(crowd)) == set(crowd)
    assert [type(request.error) for request in crowd] == [type(None), ImageError, type(None)]


def test_the_same_prompt_from_many_is_prefilled_once(runtime: Runtime) -> None:
    query = [{"image": picture(7)}, {"text": "the same for all of them"}]
    crowd = [asked(runtime, query, seed=seed, max_new_tokens=20, ignore_eos=True) for seed in range(6)]
    assert len(list(runtime.engine.run(crowd))) == 6
    assert sorted(request.cached_tokens for request in crowd)[1:] == [len(crowd[0].ids) - 1] * 5
    assert sum(request.cached_images for request in crowd) == 5


def test_an_aborted_request_frees_its_slot_at_once(runtime: Runtime) -> None:
    crowd = [added(runtime, f"say much {i}", **LONG) for i in range(3)]
    waiting = added(runtime, "and me", max_new_tokens=2, ignore_eos=True)
    steps_until(runtime, lambda: all(request.token_ids for request in crowd))
    runtime.engine.abort(crowd[1])
    assert isinstance(crowd[1].error, Cancelled) and runtime.engine.slots.free == 1
    steps_until(runtime, lambda: waiting.done)
    assert len(waiting.answer().token_ids) == 2
    crowd[0].cancel()  # from a thread that cannot wait for a step
    runtime.engine.step()
    assert isinstance(crowd[0].error, Cancelled)
    late = added(runtime, "never begun", max_new_tokens=2)
    runtime.engine.abort(late)
    runtime.engine.abort(crowd[2])
    assert isinstance(late.error, Cancelled) and runtime.engine.waiting == 0
    with pytest.raises(Cancelled):
        late.answer()


def test_a_request_past_its_time_limit_ends(runtime: Runtime) -> None:
    for limit in (0.0, 0.05):  # before it begins, and while it runs
        request = runtime.prepare(Request("x", generation=LONG, time_limit_s=limit))
        with pytest.raises(TimeLimit, match=f"time limit of {limit:g} s"):
            runtime.engine.complete(request)


def test_a_stream_that_is_closed_ends_its_request(runtime: Runtime) -> None:
    pieces = runtime.answer_stream("say much", **LONG)
    next(pieces)
    assert runtime.engine.running == 1
    pieces.close()
    assert runtime.engine.running == 0


def test_an_unfinished_stream_and_a_chat_share_the_planned_cache(made, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = made(slots=1)
    alone = [runtime.answer(text, do_sample=False, max_new_tokens=30, ignore_eos=True).text for text in ("one", "two")]
    caches = []
    monkeypatch.setattr("qvl_edge.engine.slots.KVCache", lambda *_, **__: caches.append(1))
    stream = runtime.answer_stream("one", do_sample=False, max_new_tokens=30, ignore_eos=True)
    first = next(stream)
    second = runtime.answer("two", do_sample=False, max_new_tokens=30, ignore_eos=True)
    *pieces, whole = stream
    assert not caches and second.text == alone[1]
    assert isinstance(whole, Answer) and whole.text == alone[0] == "".join([first, *pieces]).strip()


def test_a_long_prompt_does_not_stop_the_others(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    for name in ("prefill", "step"):
        real = getattr(runtime.engine.slots, name)

        def watched(*args: Any, name: str = name, real: Any = real) -> Any:
            order.append(name)
            return real(*args)

        monkeypatch.setattr(runtime.engine.slots, name, watched)
    first = added(runtime, "short", **LONG)
    steps_until(runtime, lambda: first.token_ids)
    second = added(runtime, "w " * 250, max_new_tokens=2, ignore_eos=True)
    steps_until(runtime, lambda: second.done)
    runtime.engine.abort(first)
    chunks = [index for index, name in enumerate(order) if name == "prefill"][1:]
    assert len(chunks) >= 4  # 500 tokens by 128
    assert all(after - before == 2 for before, after in zip(chunks, chunks[1:], strict=False))  # a step between


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory: …")]
)
def test_memory_that_runs_out_ends_what_runs_and_the_next_one_works(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    expected = runtime.answer("next", do_sample=False, max_new_tokens=9, ignore_eos=True).token_ids
    crowd = [added(runtime, f"much {i}", **LONG) for i in range(3)]
    steps_until(runtime, lambda: all(request.token_ids for request in crowd))

    def fail(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(runtime.engine.slots, "_step", fail)
        runtime.engine.step()
    assert [type(request.error) for request in crowd] == [OutOfMemory] * 3
    for _ in range(2 * MAX_FAILURES):  # requests that are too large say nothing about the engine
        assert runtime.engine.healthy
    assert runtime.answer("next", do_sample=False, max_new_tokens=9, ignore_eos=True).token_ids == expected


class Panic(BaseException):
    """As a native library's; no Exception."""


@pytest.mark.parametrize("kind", [ValueError, Panic])
def test_a_failure_says_nothing_of_the_prompt(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: type[BaseException]
) -> None:
    prompt = "hush"[::-1]  # a traceback shows lines of code

    def fail(*_: Any, **__: Any) -> None:
        raise kind(prompt)

    with monkeypatch.context() as patch:
        patch.setattr(runtime.engine.slots, "prefill", fail)
        with pytest.raises(EngineFailed) as said:
            runtime.answer(prompt, max_new_tokens=9)
    assert prompt not in str(said.value) + caplog.text and kind.__name__ in caplog.text


def test_steps_that_keep_failing_make_the_engine_unhealthy_until_one_succeeds(made, monkeypatch) -> None:
    runtime = made()

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with monkeypatch.context() as patch:
        patch.setattr(runtime.engine.slots, "prefill", fail)
        for failures in range(MAX_FAILURES):
            assert runtime.engine.healthy, failures
            with pytest.raises(EngineFailed, match="the engine failed"):
                runtime.answer("x")
        assert not runtime.engine.healthy and runtime.engine.broken is None
    runtime.answer("x", max_new_tokens=1)
    assert runtime.engine.healthy


def test_a_device_that_cannot_be_used_any_more_ends_every_request(made, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = made(slots=2)
    engine = runtime.engine

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    crowd = [added(runtime, f"much {i}", **LONG) for i in range(4)]
    steps_until(runtime, lambda: crowd[1].token_ids)
    for name in ("_step", "_park", "prefill"):  # whatever touches the device, clearing a slot too
        monkeypatch.setattr(engine.slots, name, fail)
    engine.step()
    assert [type(request.error) for request in crowd] == [EngineFailed] * 4
    assert not engine.healthy and engine.broken is not None
    with pytest.raises(EngineFailed, match="cannot be used any more .*restart the process"):
        runtime.answer("later")


def test_a_bad_request_ends_alone(runtime: Runtime) -> None:
    good = added(runtime, "fine", **LONG)
    steps_until(runtime, lambda: good.token_ids)
    with pytest.raises(PromptError):
        asked(runtime, "w " * 3000)
    with pytest.raises(ConfigError):
        asked(runtime, "x", top_p=7)
    too_long = Request.of_ids([1] * 1024, good.options)
    runtime.engine.add(too_long)
    steps_until(runtime, lambda: too_long.done)
    assert isinstance(too_long.error, PromptError) and not good.done
    runtime.engine.abort(good)


@pytest.mark.slow
def test_scoring_keeps_one_part_of_the_logits_at_a_time(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    model, parts, alive = runtime.decoder, list[int](), list[weakref.ref[Tensor]]()
    forward = type(model).forward

    def watched(self: Any, *args: Any, all_logits: bool = False, **named: Any) -> Tensor:
        gc.collect()
        assert not any(reference() is not None for reference in alive)
        logits = forward(self, *args, all_logits=all_logits, **named)
        if all_logits:
            parts.append(logits.shape[1])
            alive.append(weakref.ref(logits))
        return logits

    monkeypatch.setattr(type(model), "forward", watched)
    scores = runtime.score("x", "w " * 300)
    assert len(scores) == len(runtime.tokenizer.encode("w " * 300)) == sum(parts)
    assert len(parts) >= 3 and max(parts) <= SCORED < CHUNK


def test_scores_are_those_of_the_plain_forward(runtime: Runtime) -> None:
    prompt, ids = runtime._prompt(Request("q")).ids, runtime.tokenizer.encode("an answer of several tokens")
    whole, start, end = [*prompt, *ids], len(prompt), len(prompt) + len(ids)
    model = runtime.decoder
    with torch.inference_mode():
        cache = KVCache(model.config, 1, end, dtype=torch.float32)
        logits = model(model.embed(torch.tensor([whole])), cache, all_logits=True)[0]
    expected = logits.double().log_softmax(1)[range(start - 1, end - 1), ids].tolist()
    assert runtime.score("q", "an answer of several tokens") == pytest.approx(expected, abs=1e-4)
    # two spans, the second one across a gap
    apart = Request.of_ids(whole, runtime.options, scored=[(start, start + 2), (end - 1, end)])
    found = runtime.engine.complete(apart).scores
    assert found == pytest.approx([*expected[:2], expected[-1]], abs=1e-4)


def test_a_thread_that_waits_for_another_threads_step_gets_its_answer(runtime: Runtime) -> None:
    found: list[Answer] = []
    with runtime.engine.lock:
        thread = threading.Thread(target=lambda: found.append(runtime.answer("hi", max_new_tokens=2)))
        thread.start()
    thread.join(60)
    assert found


@pytest.mark.parametrize(("when", "method"), [(0, "allowed"), (3, "allowed"), (0, "accept"), (3, "accept")])
def test_a_constraint_that_fails_ends_its_own_request_and_no_other(runtime: Runtime, when: int, method: str) -> None:
    class Failing:
        """A grammar that runs into a limit of its library after some tokens, as a large pattern does."""

        calls = {"allowed": 0, "accept": 0}

        def allowed(self) -> Tensor:
            self.count("allowed")
            return torch.ones(runtime.config.vocab_size, dtype=torch.bool)

        def accept(self, token: int) -> None:
            self.count("accept")

        def count(self, name: str) -> None:
            self.calls = self.calls | {name: self.calls[name] + 1}
            if name == method and self.calls[name] > when:
                raise ConfigError("too many expressions")

    expected = runtime.answer("one", do_sample=False, max_new_tokens=12, ignore_eos=True).token_ids
    good = added(runtime, "one", do_sample=False, max_new_tokens=12, ignore_eos=True)
    bad = asked(runtime, "two", do_sample=False, max_new_tokens=12, ignore_eos=True)
    bad.sampler.constraint = Failing()
    runtime.engine.add(bad)
    steps_until(runtime, lambda: good.done and bad.done)
    assert isinstance(bad.error, ConfigError) and good.answer().token_ids == expected and runtime.engine.healthy
