"""Broken and odd bodies at a real engine: no 500, nothing hangs, and afterwards it still answers right.

QVL_EDGE_FUZZ=10000 sends so many instead of the few hundred of a usual run.
"""

import copy
import json
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import write_small_checkpoint
from PIL import Image

from qvl_edge.engine.worker import Worker
from qvl_edge.runtime import Runtime

from .harness import MODEL, data_uri, picture, serving, text, until

COUNT = int(os.environ.get("QVL_EDGE_FUZZ", "400"))
ALLOWED = {200, 400, 404, 413, 415, 429, 503}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object", "properties": {"a": {}}}}}
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 1e308, -1e308, 10**30, 0.1, "", " ", "\x00", "a" * 5000, "<|im_end|>", "<ref>",
    "<img>/etc/passwd</img>", "<box>(1,2),(3,4)</box>", "\ud83d", "\u202e", "用户", [], {}, [[]], {"": None},
    [None] * 40,
    "data:image/png;base64,AAAA", "file:///etc/passwd", "http://127.0.0.1/", {"type": "text", "text": "x"},
    {"type": "boxes"}, {"type": "json_object"}, SCHEMA,
]  # fmt: skip


def bodies() -> list[dict[str, Any]]:
    """Valid requests, each with other fields."""
    image = picture(data_uri(Image.new("RGB", (9, 7), "red")))
    hello = {"role": "user", "content": "hello"}
    turns = [{"role": "system", "content": "be brief"}, hello, {"role": "assistant", "content": "hi"}, hello]
    common = {"model": MODEL, "max_tokens": 3}
    return [
        {**common, "messages": [hello], "temperature": 0, "stop": ["x"], "seed": 1, "n": 2},
        {
            **common,
            "messages": [{"role": "user", "content": [image, text("what?")]}],
            "logprobs": True,
            "top_logprobs": 2,
        },
        {**common, "messages": turns, "stream": True, "stream_options": {"include_usage": True}, "top_p": 0.9},
        {**common, "messages": [hello], "response_format": SCHEMA, "top_k": 4, "repetition_penalty": 1.1},
        {**common, "messages": [hello], "response_format": {"type": "boxes"}, "user": "u", "tools": []},
    ]


OTHERS = [
    ("completions", {"model": MODEL, "prompt": ["hello", [5, 6]], "max_tokens": 3, "logprobs": 1, "stop": ["x"]}),
    ("completions", {"model": MODEL, "prompt": "hello", "max_tokens": 3, "stream": True, "logit_bias": {"5": 1}}),
    ("responses", {"model": MODEL, "max_output_tokens": 3, "instructions": "be brief", "stream": True, "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "y"}]}]}),
    ("responses", {"model": MODEL, "max_output_tokens": 3, "input": "a", "text": {"format": {"type": "json_object"}}}),
]  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) below a JSON value."""
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    return [(value, key) for key, _ in items] + [place for _, item in items for place in places(item)]


def mutated(body: dict[str, Any], rng: random.Random) -> bytes:
    """The body with a few nodes replaced, removed or doubled; sometimes with broken bytes."""
    body = copy.deepcopy(body)
    for _ in range(rng.randrange(0, 4)):
        where = places(body)
        if not where:
            break
        container, key = rng.choice(where)
        action = rng.random()
        if action < 0.6:
            container[key] = copy.deepcopy(rng.choice(ODD))
        elif action < 0.75:
            del container[key]
        elif isinstance(container, list):
            container.insert(key, copy.deepcopy(container[key]))
        else:
            container[str(rng.choice(ODD))[:20]] = copy.deepcopy(rng.choice(ODD))
    raw = bytearray(json.dumps(body).encode())
    if rng.random() < 0.2:
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(raw))
            action = rng.random()
            if action < 0.4:
                raw[at] = rng.randrange(256)
            elif action < 0.7:
                del raw[at : at + rng.randrange(1, 9)]
            else:
                raw[at:at] = rng.choice([b"[[", b'"', b"\xff", b"1e999", b"NaN", b"\\u0000", b"{}"])
            if not raw:
                break
    return bytes(raw)


@pytest.mark.slow
def test_no_body_makes_a_500_and_the_next_request_is_answered(tmp_path: Path, vit_cache: Path) -> None:
    path = write_small_checkpoint(tmp_path / "checkpoint")
    runtime = Runtime.from_pretrained(path, cache_dir=vit_cache, slots=4, max_context=512)
    expected = runtime.answer("hello", do_sample=False, max_new_tokens=8).text
    rng, found = random.Random(0), Counter[int]()
    engine = Worker(runtime)
    made = bodies()
    with serving(engine) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        for body in made:  # they are valid as they are
            assert client.post("/v1/chat/completions", json=body).status_code == 200, body
        for kind, body in OTHERS:
            assert client.post(f"/v1/{kind}", json=body).status_code == 200, body
        choices = [*(("chat/completions", body) for body in made), *OTHERS]
        for number in range(COUNT):
            path, body = rng.choice(choices)
            raw = mutated(body, rng)
            kind = "application/json" if rng.random() < 0.98 else "text/plain"
            response = client.post(f"/v1/{path}", content=raw, headers={"content-type": kind})
            assert response.status_code in ALLOWED, (number, raw[:2000], response.text)
            if response.status_code != 200:
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}, raw[:2000]
            found[response.status_code] += 1
        until(lambda: (engine.running, engine.waiting) == (0, 0))
        said = server.ask("hello", temperature=0, max_tokens=8).json()
        assert said["choices"][0]["message"]["content"] == expected
    assert found[200] > COUNT // 20 and found[400] > COUNT // 3


@pytest.mark.parametrize("raw", [b"", b"null", b"[]", b'"', b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000])
def test_what_is_no_request_at_all_is_a_400(raw: bytes, tmp_path: Path) -> None:
    from .harness import ScriptedWorker

    with serving(ScriptedWorker("x")) as server:
        assert server.post(content=raw).status_code == 400
