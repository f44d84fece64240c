"""Honest clients beside attackers: every answer right, none much slower than without them, memory back afterwards.

    python -m benchmarks.attacks PATH [--clients 64] [--seconds 180] [--slots 8] [--json FILE]

First the honest clients alone, then the same beside all attacks at once. An honest client asks about synthetic scenes,
one after another, and comes again after a 429; its time is from the first try to the answer. The attackers come from
other loopback addresses, half of them with a key of their own, which has the limit of concurrent requests that
docs/server.md advises. They run at the lowest priority: what they compute themselves is not what they take.
"""

import base64
import contextlib
import hashlib
import io
import json
import logging
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
from PIL import Image

from benchmarks.report import exits_with_its_message, model_command, save, say
from benchmarks.serve_load import Case, cases, serving
from qvl_edge import Runtime
from qvl_edge.engine.worker import Worker
from qvl_edge.memory import resident_bytes, return_buffers, trim_heap
from qvl_edge.options import LoadOptions
from qvl_edge.server.callers import Caller
from qvl_edge.server.guard import Access
from qvl_edge.server.logs import spare

HONEST, ATTACKER = "honest-key", "attacker-key"
ATTACKERS_REQUESTS = 4  # at once, of the attackers' key
SLOWER, MORE_BYTES = 3.0, 64 << 20  # what attackers may make of the slowest answer, and of memory afterwards
TIMEOUT_S = 120.0
HEAD = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def uri(content: bytes) -> str:
    """A picture's bytes as base64, as requests take it."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """A picture as a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def body(content: Any, **fields: Any) -> bytes:
    """A request of an attacker."""
    asked = {"model": "small", "messages": [{"role": "user", "content": content}], "max_tokens": 8, **fields}
    return json.dumps(asked).encode()


def bodies() -> dict[str, bytes]:
    """Requests that cost more than they look, by name."""
    scans = encoded(Image.effect_noise((1200, 1200), 60), "jpeg", progressive=True)
    last = scans.rindex(b"\xff\xda")
    repeated = scans[:-2] + scans[last:-2] * 400 + scans[-2:]
    flat = encoded(Image.new("1", (7000, 7000)), "png")
    photo = encoded(Image.effect_noise((4000, 3000), 10), "jpeg")

    def pictures(*files: bytes) -> list[dict[str, Any]]:
        return [{"type": "image_url", "image_url": {"url": uri(file)}} for file in files]

    def schema(made: dict[str, Any]) -> dict[str, Any]:
        return {"type": "json_schema", "json_schema": {"name": "a", "schema": made}}

    return {
        "combining marks": body("a" + "\u0301" * 100_000),
        "spaces": body(" " * 1_000_000),
        "long text": body("a b " * 5_000_000),
        "schema without end": body("a", response_format=schema({"type": "integer", "multipleOf": 10_000_019})),
        "pattern": body("a", response_format={"type": "regex", "pattern": "(a|b){1,5000}" * 20}),
        "repeated scans": body(pictures(repeated)),
        "16 large pictures": body(pictures(*[flat] * 16)),
        "photos for 8 answers": body(pictures(*[photo] * 4), n=8),
        "file": body([{"type": "image_url", "image_url": {"url": "file:///etc"}}]),
        "inner address": body([{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]),
        "deep JSON": b"[" * 1_000_000,
        "crowded JSON": b"[" + b"1," * 5_000_000 + b"1]",
    }


class Attackers:
    """Threads that attack `url` until `stop`."""

    def __init__(self, url: str, seed: int = 0):
        parts = urlsplit(url)
        self.there = parts.hostname, parts.port
        self.stop, self.rng = threading.Event(), random.Random(seed)
        self.done: Counter[str] = Counter()
        self.threads = [threading.Thread(target=self._repeat, args=each) for each in self._attacks()]

    def _attacks(self) -> Iterator[tuple[str, Callable[[], None]]]:
        key = f"Authorization: Bearer {ATTACKER}\r\n"
        for name, made in bodies().items():
            said = f"{HEAD}{key}Content-Length: {len(made)}\r\n\r\n".encode() + made
            yield name, lambda said=said: self._ask(said)  # type: ignore[misc]
        held = {
            "silent": b"",
            "slow headers": b"GET /health HTTP/1.1\r\nX-A: ",
            "slow bodies": f"{HEAD}{key}Content-Length: 55\r\n\r\n{{".encode(),
            "large bodies without an end": f"{HEAD}{key}Content-Length: 30000000\r\n\r\n".encode() + b" " * 5_000_000,
        }
        for name, said in held.items():
            yield name, lambda said=said: self._hold(said, 100)  # type: ignore[misc]
        large, pieces = b"x" * (40 << 20), b"1\r\n \r\n" * 100_000
        yield (
            "large body without a key",
            lambda: self._ask(f"{HEAD}Content-Length: {len(large)}\r\n\r\n".encode() + large),
        )
        yield "tiny pieces", lambda: self._ask(f"{HEAD}{key}Transfer-Encoding: chunked\r\n\r\n".encode() + pieces)
        two = f"{HEAD}Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\n"
        yield "two framings", lambda: self._ask(two.encode())
        yield "no HTTP", lambda: self._ask(os.urandom(5000))
        stream = body("describe everything", stream=True, max_tokens=400)
        asked = f"{HEAD}{key}Content-Length: {len(stream)}\r\n\r\n".encode() + stream
        yield "streams that nobody reads", lambda: self._hold(asked, 4)
        yield "streams that are left", lambda: self._leave(asked)

    def _repeat(self, name: str, attack: Callable[[], None]) -> None:
        while not self.stop.is_set():
            with contextlib.suppress(OSError):
                attack()
            self.done[name] += 1
            self.stop.wait(0.2)

    def _connected(self) -> socket.socket:
        address = f"127.0.0.{self.rng.randint(2, 9)}"
        return socket.create_connection(self.there, timeout=TIMEOUT_S, source_address=(address, 0))

    def _ask(self, said: bytes) -> None:
        with self._connected() as connection:
            connection.settimeout(20)
            connection.sendall(said)
            connection.recv(65536)

    def _leave(self, said: bytes) -> None:
        with self._connected() as connection:
            connection.sendall(said)
            self.stop.wait(self.rng.random())

    def _hold(self, said: bytes, count: int) -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(count):
                connection = stack.enter_context(self._connected())
                connection.settimeout(1)
                with contextlib.suppress(OSError):
                    connection.sendall(said)
            self.stop.wait(5)


def attack(url: str, seconds: float) -> Counter[str]:
    """All attacks for so long: how often each was made."""
    os.nice(19)
    attackers = Attackers(url)
    for thread in attackers.threads:
        thread.start()
    time.sleep(seconds)
    attackers.stop.set()
    for thread in attackers.threads:
        thread.join()
    return attackers.done


def honest(url: str, made: list[Case], clients: int, seconds: float) -> dict[str, Any]:
    """`clients` threads for `seconds`: the time of each answer, how many 429 they got, and what went wrong."""
    took: list[float] = []
    wrong: list[str] = []
    again, end = Counter[int](), time.perf_counter() + seconds

    def work(seed: int) -> None:
        rng = random.Random(seed)
        with httpx.Client(base_url=url, timeout=TIMEOUT_S, headers={"authorization": f"Bearer {HONEST}"}) as client:
            while time.perf_counter() < end:
                case, start = rng.choice(made), time.perf_counter()
                try:
                    while (response := client.post("/v1/chat/completions", json=case.body)).status_code == 429:
                        again[seed] += 1
                        time.sleep(float(response.headers["retry-after"]) * (0.5 + rng.random()))
                except httpx.HTTPError as error:
                    wrong.append(repr(error))
                    continue
                took.append(time.perf_counter() - start)
                if response.status_code != 200:
                    wrong.append(response.text)
                elif (text := response.json()["choices"][0]["message"]["content"].strip()) != case.text:
                    wrong.append(f"{text!r} for {case.text!r}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"seconds": took, "retries": again.total(), "wrong": wrong}


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Of honest clients."""
    p50, p99 = np.percentile(found["seconds"], (50, 99), method="inverted_cdf").tolist()
    return {
        "answers": len(found["seconds"]),
        "wrong": found["wrong"][:5],
        "retries": found["retries"],
        "latency_s": {"p50": p50, "p99": p99, "slowest": max(found["seconds"])},
    }


def measure(runtime: Runtime, *, clients: int, seconds: float, baseline: float, requests: int) -> dict[str, Any]:
    """The honest clients alone, then beside the attackers; SystemExit if one of the bounds does not hold."""
    made = cases(runtime, requests)
    runtime.forget()
    limited = Caller("attacker", hashlib.sha256(ATTACKER.encode()).hexdigest(), ATTACKERS_REQUESTS)
    access = Access("127.0.0.1", HONEST, callers=(limited,))
    spawn = get_context("spawn")
    with serving(runtime, 2 * clients, access) as (url, worker), ProcessPoolExecutor(2, mp_context=spawn) as pool:
        pool.submit(honest, url, made, clients, min(10.0, baseline)).result()  # warm-up: one-time allocations
        alone = summary(pool.submit(honest, url, made, clients, baseline).result())
        say(f"alone: {alone}")
        memory = [_settled(worker)]
        for part in (min(20.0, seconds), seconds):  # the first attacks make one-time allocations too
            attackers = pool.submit(attack, url, part)
            beside = summary(pool.submit(honest, url, made, clients, part).result())
            attacks = dict(attackers.result())
            memory.append(_settled(worker))
    found = {"clients": clients, "slots": runtime.plan.slots, "seconds": seconds, "alone": alone, "beside": beside}
    found |= {"attacks": attacks, "memory_bytes": dict(zip(("alone", "after_20_s", "after"), memory, strict=True))}
    say(json.dumps(found))
    if alone["wrong"] or beside["wrong"]:
        raise SystemExit(f"wrong answers: {alone['wrong'] + beside['wrong']}")
    slowest, bound = beside["latency_s"]["slowest"], SLOWER * alone["latency_s"]["slowest"]
    if slowest > bound:
        raise SystemExit(
            f"the slowest answer beside the attackers took {slowest:.1f} s, at most {bound:.1f} are wanted"
        )
    if (more := memory[-1] - memory[0]) > MORE_BYTES:
        raise SystemExit(f"{more / 1e6:.0f} MB more afterwards, at most {MORE_BYTES / 1e6:.0f} are wanted")
    return found


def _settled(worker: Worker) -> int:
    """Resident bytes once nothing runs."""
    deadline = time.perf_counter() + 30
    while (worker.running or worker.waiting) and time.perf_counter() < deadline:
        time.sleep(0.05)
    time.sleep(5)  # what was being read when its client left is read to its end
    trim_heap()
    return resident_bytes()


@exits_with_its_message("benchmarks.attacks")
def main(arguments: list[str] | None = None) -> None:
    parser = model_command("attacks", __doc__, device="cpu", max_context=1024)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--baseline", type=float, default=60.0, help="seconds without attackers")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--cases", type=int, default=60, help="different requests")
    args = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    spare(logging.getLogger())  # as `qvl-edge serve` does, and the next
    return_buffers()
    runtime = Runtime.from_pretrained(args.path, **LoadOptions.given(args))
    found = measure(runtime, clients=args.clients, seconds=args.seconds, baseline=args.baseline, requests=args.cases)
    for name in ("alone", "beside"):
        part = found[name]
        times = ", ".join(f"{label} {value:.2f} s" for label, value in part["latency_s"].items())
        print(f"{name}: {part['answers']} answers, all right; {times}; {part['retries']} tries got 429")
    memory = ", ".join(f"{when.replace('_', ' ')} {size / 1e6:.0f} MB" for when, size in found["memory_bytes"].items())
    print(f"{sum(found['attacks'].values())} attacks of {len(found['attacks'])} kinds; memory {memory}")
    save(args.json, "attacks", runtime.plan.device, **found)


if __name__ == "__main__":
    main()
