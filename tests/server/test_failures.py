"""What callers and whoever watches /health see when decoding fails: once, or for good."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from conftest import write_small_checkpoint

from qvl_edge import Runtime
from qvl_edge.engine.worker import Worker
from qvl_edge.server import endpoint
from qvl_edge.server.media import Media

from .attacks.raw import connected, whole
from .harness import MODEL, WAIT_S, ScriptedWorker, Server, for_ever, picture, serving, until

pytestmark = pytest.mark.slow


@pytest.fixture
def tiny(tmp_path: Path, vit_cache: Path) -> Iterator[Runtime]:
    path = write_small_checkpoint(tmp_path / "checkpoint")
    yield Runtime.from_pretrained(path, cache_dir=vit_cache, slots=2, max_context=1024)


def test_memory_that_runs_out_in_a_step_is_a_503_for_who_runs_and_the_next_request_works(
    tiny: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tiny.answer("hello", do_sample=False)
    step, armed = tiny.engine.slots._step, threading.Event()

    def fail(*arguments: Any) -> None:
        if armed.is_set():
            raise torch.OutOfMemoryError("no more")
        step(*arguments)

    monkeypatch.setattr(tiny.engine.slots, "_step", fail)
    with serving(Worker(tiny)) as server:
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
        assert httpx.get(f"{server.url}/health").status_code == 200
        armed.clear()
        said = server.ask("hello", temperature=0).json()
    assert said["choices"][0]["message"]["content"] == before.text


@pytest.mark.parametrize("at", ["reading", "preparing"])
@pytest.mark.parametrize("stream", [False, True])
def test_memory_that_runs_out_before_a_step_is_a_503_and_the_next_request_works(
    runtime: Runtime, server: Server, monkeypatch: pytest.MonkeyPatch, at: str, stream: bool
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(*(endpoint, "parse_json") if at == "reading" else (runtime, "prepare"), fail)
        refused = server.ask("hello", stream=stream)
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "out_of_memory"
    assert "does not fit into memory; send fewer" in refused.json()["error"]["message"]
    assert server.ask("hello", max_tokens=1).status_code == 200


@pytest.mark.parametrize("ends", ["late", "gone"])
def test_a_request_that_is_still_read_ends_by_the_time_limit_or_when_its_client_leaves(
    monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    worker, begun, cancelled = ScriptedWorker("x"), threading.Event(), threading.Event()

    async def load(*_: Any) -> None:
        begun.set()
        try:
            await for_ever()
        finally:
            cancelled.set()

    monkeypatch.setattr(Media, "load", load)
    if ends == "late":
        worker.time_limit_s = 0.1
    with serving(worker, max_concurrent=1) as server:
        if ends == "late":
            late = server.ask([picture("data:,")])
            assert late.status_code == 503 and late.json()["error"]["code"] == "time_limit"
        else:
            content = [{"role": "user", "content": [picture("data:,")]}]
            with connected(server, whole(json.dumps({"model": MODEL, "messages": content}).encode())):
                assert begun.wait(WAIT_S)
        assert cancelled.wait(WAIT_S)
        until(lambda: server.ask("a").status_code == 200)  # its place is free


def test_a_device_that_fails_for_good_ends_requests_with_an_error_and_turns_health_to_503(
    tiny: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: hush")

    with serving(Worker(tiny), key="sesame") as server:
        authorized = {"authorization": "Bearer sesame", "content-type": "application/json"}
        assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
        for name in ("_step", "_park", "prefill"):  # whatever touches the device, clearing a slot too
            monkeypatch.setattr(tiny.engine.slots, name, fail)
        for stream in (False, True, False):
            failed = server.ask("hello", headers=authorized, stream=stream)
            assert failed.status_code == 500 and failed.json()["error"]["code"] == "internal_error"
        health = httpx.get(f"{server.url}/health")
        assert health.status_code == 503 and health.json()["error"]["code"] == "engine_failed"
        assert "log" in health.json()["error"]["message"] and "hush" not in failed.text + health.text


def test_health_follows_the_worker() -> None:
    worker = ScriptedWorker("x")
    with serving(worker) as server:
        for healthy, status in ((True, 200), (False, 503), (True, 200)):
            worker.healthy = healthy
            assert httpx.get(f"{server.url}/health").status_code == status
