"""Texts and schemas that cost more than they are long: what counts is that others are answered meanwhile."""

import threading
import time

import httpx
import pytest

from qvl_edge import Runtime
from qvl_edge.engine import compile_check
from qvl_edge.engine.request import Request
from qvl_edge.engine.worker import PREPARERS, Worker

from ..harness import serving, until

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "words",
    ["a" + "\u0301" * 100_000, " " * 1_000_000, "\n" * 100_000, "x" * 3_000_000, "\u1100" * 100_000, "<ref>" * 50_000,
     "<|im_start|>" * 50_000, "a\u0338\u0301" * 100_000, "\U0001f468\u200d" * 50_000],
    ids=lambda words: f"{words[:6]!a}",
)  # fmt: skip
def test_a_costly_text_is_refused_or_answered_while_health_goes_on(server, words: str) -> None:
    said: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: said.append(server.ask(words, max_tokens=1)))
    asking.start()
    answered = 0
    while asking.is_alive():
        assert httpx.get(f"{server.url}/health").status_code == 200
        answered += 1
        time.sleep(0.01)
    assert said[0].status_code == 400 and said[0].json()["error"]["code"] == "context_length_exceeded"
    assert answered > 0


def test_a_request_that_takes_long_to_prepare_delays_nobody_else(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, prepare, held = threading.Event(), runtime.prepare, []

    def slowly(request: Request) -> Request:
        if request.messages and "slow" in str(request.messages[-1].content):
            held.append(1)
            release.wait(30)
        return prepare(request)

    monkeypatch.setattr(runtime, "prepare", slowly)
    with serving(Worker(runtime)) as server:
        slow = [
            threading.Thread(target=server.ask, args=("slow",), kwargs={"max_tokens": 1}) for _ in range(PREPARERS - 1)
        ]
        for each in slow:
            each.start()
        until(lambda: len(held) == PREPARERS - 1)
        assert server.ask("quick", max_tokens=1).status_code == 200
        release.set()
        for each in slow:
            each.join()


def test_schemas_that_compile_for_ever_end_and_others_are_answered(server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_check, "WALL_S", 1.5)
    said: list[httpx.Response] = []

    def attack(number: int) -> None:
        schema = {"type": "integer", "multipleOf": 10_000_019 + 2 * number}
        said.append(server.ask("a", guided_json=schema, max_tokens=1))

    attacks = [threading.Thread(target=attack, args=(number,)) for number in range(2 * PREPARERS)]
    for each in attacks:
        each.start()
    assert server.ask("a", max_tokens=1).status_code == 200
    for each in attacks:
        each.join()
    assert [response.status_code for response in said] == [400] * 2 * PREPARERS
