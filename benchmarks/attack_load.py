"""Honest clients of the server beside attackers: python -m benchmarks.attack_load [--seconds 180]

64 clients ask about text and pictures, without attackers and then beside all of them at once, over one server process.
Wanted: every honest answer is the one that it was alone, the slowest takes at most three times as long as the slowest
without attackers, and the server's memory comes back.
"""

import argparse
import base64
import contextlib
import hashlib
import io
import itertools
import json
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

import qvl_edge.demo
from qvl_edge.demo.scenes import make_scene

CHECKPOINT = Path(qvl_edge.demo.__file__).parent / "checkpoint"
MODEL, CLIENTS, SCENES = "small", 64, range(2_100_000_011, 2_100_000_019)
ATTACKER = "127.0.0.2"  # where attackers come from, as far as they may be told apart by address


@dataclass
class Run:
    """A server under load."""

    port: int
    stop: threading.Event = field(default_factory=threading.Event)
    times: list[float] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    expected: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """Of chat completions."""
        return f"http://127.0.0.1:{self.port}/v1/chat/completions"

    def ask(self, key: str, content: Any, timeout_s: float = 120, **fields: Any) -> httpx.Response:
        """One question under a key."""
        body = {"model": MODEL, "messages": [{"role": "user", "content": content}], **fields}
        headers = {"authorization": f"Bearer {key}"}
        return httpx.post(self.url, json=body, headers=headers, timeout=timeout_s)


def picture(content: bytes) -> dict[str, Any]:
    """A part of a message."""
    return {"type": "image_url", "image_url": {"url": f"data:;base64,{base64.b64encode(content).decode()}"}}


def file_of(image: Image.Image, kind: str, **options: Any) -> bytes:
    """An image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def questions() -> dict[str, Any]:
    """What honest clients ask, by name."""
    shown = {str(seed): picture(file_of(make_scene(seed).image, "PNG")) for seed in SCENES}
    words = {"type": "text", "text": "Describe the picture."}
    return {name: [part, words] for name, part in shown.items()} | {f"text {n}": f"What is {n}?" for n in range(8)}


def honest(run: Run, number: int, asked: dict[str, Any]) -> None:
    """One client: asks, tries again where it is told to, and compares."""
    for name in itertools.islice(itertools.cycle(asked), number, None):
        if run.stop.is_set():
            return
        began = time.perf_counter()
        while True:
            try:
                response = run.ask("honest", asked[name], max_tokens=12, temperature=0)
            except httpx.HTTPError as error:
                run.counts[f"honest {type(error).__name__}"] += 1
                break
            if response.status_code != 429:
                said = response.json()
                text = said["choices"][0]["message"]["content"] if response.status_code == 200 else str(said)
                right = run.expected.setdefault(name, text) == text
                run.counts["right" if right and response.status_code == 200 else f"WRONG {text[:60]}"] += 1
                break
            run.counts["asked again"] += 1
            time.sleep(0.25)
        run.times.append(time.perf_counter() - began)


def connected(run: Run, sent: bytes = b"") -> socket.socket:
    """A connection of an attacker's."""
    made = socket.create_connection(("127.0.0.1", run.port), timeout=20, source_address=(ATTACKER, 0))
    made.sendall(sent)
    return made


def attacks() -> dict[str, Callable[[Run], None]]:
    """What attackers do once, by name. Those of `mallory` have a key."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    keyed = head + b"Authorization: Bearer mallory\r\n"
    bits = picture(file_of(Image.new("1", (7000, 7000)), "PNG"))
    jpeg = file_of(Image.new("RGB", (4000, 4000)), "JPEG", progressive=True)
    scans = picture(jpeg[:-2] + jpeg[jpeg.rindex(b"\xff\xda") : -2] * 40 + jpeg[-2:])
    numbers = itertools.count(10_000_019, 2)

    def crowd(sent: bytes) -> Callable[[Run], None]:
        def attack(run: Run) -> None:
            held = [connected(run, sent) for _ in range(300)]
            run.stop.wait(5)
            for one in held:
                one.close()

        return attack

    def once(sent: bytes) -> Callable[[Run], None]:
        def attack(run: Run) -> None:
            with connected(run, sent) as one:
                one.recv(1000)

        return attack

    def unread(run: Run) -> None:
        content = {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "stream": True, "max_tokens": 500}
        body = json.dumps({**content, "n": 8, "logprobs": True, "top_logprobs": 20, "ignore_eos": True}).encode()
        with connected(run, keyed + b"Content-Length: %d\r\n\r\n" % len(body) + body):
            run.stop.wait(10)

    def asking(content: Any, **fields: Any) -> Callable[[Run], None]:
        return lambda run: run.ask("mallory", content, **fields) and None  # type: ignore[func-returns-value]

    def schema(run: Run) -> None:
        run.ask("mallory", "a", guided_json={"type": "integer", "multipleOf": next(numbers)}, max_tokens=4)

    return {
        "silent": crowd(b""),
        "slow heads": crowd(b"GET / HTTP/1.1\r\nHost:"),
        "slow bodies": crowd(keyed + b"Content-Length: 55\r\n\r\n{"),
        "two framings": once(head + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
        "headers": once(b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 5000),
        "tiny chunks": once(keyed + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 20_000),
        "unread body": once(head + b"Content-Length: 9000000\r\n\r\n" + b" " * 9_000_000),
        "large bodies": once(keyed + b"Content-Length: 33000000\r\n\r\n" + b" " * 31_000_000),
        "deep JSON": once(keyed + b"Content-Length: 1000000\r\n\r\n" + b"[" * 1_000_000),
        "unread answers": unread,
        "marks": asking("a" + "\u0301" * 100_000),
        "spaces": asking(" " * 1_000_000),
        "a long text": asking("x" * 20_000_000),
        "schemas": schema,
        "large pictures": asking([bits] * 5),
        "repeated scans": asking([scans]),
        "many draws": asking("a", n=8, max_tokens=400),
    }


def attacking(run: Run, name: str, attack: Callable[[Run], None]) -> None:
    """The same attack again and again."""
    while not run.stop.is_set():
        with contextlib.suppress(OSError, httpx.HTTPError):
            attack(run)
        run.counts[f"attack: {name}"] += 1
        run.stop.wait(0.5)


def memory_mb(pid: int) -> float:
    """Resident memory of a process."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def load(run: Run, seconds: float, attackers: dict[str, Callable[[Run], None]]) -> Run:
    """All clients and attackers for so long."""
    asked = questions()
    threads = [threading.Thread(target=honest, args=(run, number, asked), daemon=True) for number in range(CLIENTS)]
    threads += [threading.Thread(target=attacking, args=(run, *attack), daemon=True) for attack in attackers.items()]
    for thread in threads:
        thread.start()
    time.sleep(seconds)
    run.stop.set()
    for thread in threads[:CLIENTS]:
        thread.join(120)
    return run


def main() -> None:
    """Run both and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=180, help="beside the attackers (default: 180)")
    parser.add_argument("--alone", type=float, default=45, help="seconds without them (default: 45)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder, "keys.toml")
        tables = {"honest": "", "mallory": "max_concurrent_requests = 4"}
        digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in tables}
        keys.write_text("".join(f'[{name}]\nsha256 = "{digests[name]}"\n{tables[name]}\n' for name in tables))
        command = [sys.executable, "-m", "qvl_edge", "serve", str(CHECKPOINT), "--device", "cpu", "--port", "0"]
        command += ["--slots", "8", "--max-concurrent-requests", "80", "--served-model-name", MODEL]
        log = Path(folder, "log")
        with log.open("wb") as written:
            server = subprocess.Popen([*command, "--api-keys-file", str(keys)], stdout=written, stderr=written)
        try:
            while not (said := re.search(r"page http://127.0.0.1:(\d+)", log.read_text())):
                assert server.poll() is None, log.read_text()
                time.sleep(0.2)
            while not ready(port := int(said[1])):
                time.sleep(0.2)
            alone = load(Run(port), args.alone, {})
            before = memory_mb(server.pid)
            beside = load(Run(port, expected=alone.expected), args.seconds, attacks())
            time.sleep(20)
            after = memory_mb(server.pid)
            print(f"log: {log.stat().st_size} bytes; exit: {server.poll()}")
        finally:
            server.terminate()
            server.wait(60)
    for name, run in (("alone", alone), ("beside attackers", beside)):
        times = sorted(run.times)
        print(f"{name}: {len(times)} answers, median {times[len(times) // 2]:.2f} s, slowest {times[-1]:.2f} s")
        print("  " + ", ".join(f"{what} {count}" for what, count in sorted(run.counts.items())))
    print(
        f"slowest: {max(beside.times) / max(alone.times):.2f} times; memory {before:.0f} MB before, {after:.0f} after"
    )


def ready(port: int) -> bool:
    """Whether the server listens."""
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    return False


if __name__ == "__main__":
    main()
