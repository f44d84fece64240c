"""A crowd at the server: is every accepted answer the right one, does the rest get a 429, and what does batching bring?

    python -m benchmarks.serve_load PATH [--clients 64] [--seconds 180] [--slots 8] [--json FILE]

Clients ask for themselves, over loopback, questions of mixed lengths about synthetic scenes, some streamed; a fifth of
them hangs up at a random moment. Right is what a lone Runtime answers, greedily. Afterwards one client asks one thing
at a time, in the same process, for the throughput to compare with. The model is small, so a step is mostly overhead:
how much batching brings is a matter of the model and the device.
"""

import argparse
import contextlib
import json
import random
import socket
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from qvl_edge import Runtime
from qvl_edge.demo.scenes import UNSEEN, ask, make_scene
from qvl_edge.machine import describe_machine, ends_with_its_message
from qvl_edge.memory import resident_bytes, trim_heap

KINDS = ("find", "count", "read", "describe", "at")
HANG_UP = 0.2  # share of requests whose client leaves before the end
HUNG_S = 60.0  # a request that has taken so long counts as hanging


@dataclass
class Case:
    """One request, and its right answer."""

    body: dict[str, Any]
    text: str
    tokens: int


def cases(runtime: Runtime, count: int) -> list[Case]:
    """Requests over a few scenes, so that images and prompts are shared as in life."""
    import base64
    import io

    rng = np.random.default_rng(0)
    made: list[Case] = []
    while len(made) < count:
        scene = make_scene(UNSEEN + int(rng.integers(12)))
        question = ask(scene, str(rng.choice(KINDS)), str(rng.choice(["en", "zh"])), rng)
        if question is None:
            continue
        stream = io.BytesIO()
        scene.image.save(stream, "png")
        limit = int(rng.choice([8, 40, 120]))
        answer = runtime.ask(stream.getvalue(), question.text, do_sample=False, max_new_tokens=limit)
        uri = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
        content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": question.text}]
        body = {"model": "small", "messages": [{"role": "user", "content": content}], "temperature": 0}
        made.append(Case({**body, "max_tokens": limit}, answer.text, answer.usage.completion_tokens))
    return made


_LOCK = threading.Lock()


@dataclass
class Tally:
    """What happened to the requests."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    tokens: int = 0
    seconds: list[float] = field(default_factory=list)

    def add(self, outcome: str, *, tokens: int = 0, seconds: float | None = None, wrong: str = "") -> None:
        with _LOCK:
            self.counts[outcome] += 1
            self.tokens += tokens
            if seconds is not None:
                self.seconds.append(seconds)
            if wrong:
                self.wrong.append(wrong)


def ask_once(client: httpx.Client, case: Case, rng: random.Random, tally: Tally, *, hang_up: float) -> None:
    """One request to its end, or to where its client leaves."""
    began = time.perf_counter()
    leave = began + rng.expovariate(1 / 0.3) if rng.random() < hang_up else None
    text = ""
    with client.stream("POST", "/v1/chat/completions", json={**case.body, "stream": True}) as response:
        if response.status_code != 200:
            retry = response.headers.get("retry-after")
            tally.add(f"{response.status_code}" if response.status_code != 429 or retry else "429 without Retry-After")
            time.sleep(float(retry or 1) * (0.5 + rng.random()))
            return
        for line in response.iter_lines():
            if leave is not None and time.perf_counter() > leave:
                tally.add("hung up")
                return
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    tally.add("error in a stream")
                    return
                for choice in event["choices"]:
                    text += choice["delta"].get("content") or ""
    seconds = time.perf_counter() - began
    if text.strip() == case.text:
        tally.add("right", tokens=case.tokens, seconds=seconds)
    else:
        tally.add("wrong", wrong=f"{text.strip()!r} for {case.text!r}")


def crowd(*arguments: Any) -> tuple[Tally, float]:
    """`clients` in a process of their own, so that they do not hold up the server's threads."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_crowd, *arguments).result()


def _crowd(url: str, made: list[Case], clients: int, seconds: float, hang_up: float) -> tuple[Tally, float]:
    """`clients` at once for `seconds`; the tally and the time until all were through."""
    tally, end, began = Tally(), time.perf_counter() + seconds, time.perf_counter()

    def work(seed: int) -> None:
        rng = random.Random(seed)
        with httpx.Client(base_url=url, timeout=HUNG_S) as client:
            while time.perf_counter() < end:
                try:
                    ask_once(client, rng.choice(made), rng, tally, hang_up=hang_up)
                except httpx.TimeoutException:
                    tally.add("hangs")
                except httpx.HTTPError as error:
                    tally.add(type(error).__name__)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(clients)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(min(10.0, seconds / 4))
        print(f"{time.perf_counter() - began:.0f} s: {dict(tally.counts)}", file=sys.stderr, flush=True)
    return tally, time.perf_counter() - began


@contextlib.contextmanager
def serving(runtime: Runtime, waiting: int) -> Any:
    """The server on a free port of loopback; yields its address and its engine."""
    import uvicorn

    from qvl_edge.commands.serve import UVICORN
    from qvl_edge.engine.worker import Worker
    from qvl_edge.server.app import Settings, create_app
    from qvl_edge.server.guard import Access

    engine = Worker(runtime, max_waiting=waiting)
    settings = Settings(
        model="small", max_model_len=runtime.max_context, access=Access("127.0.0.1", None), max_concurrent=4 * waiting
    )
    server = uvicorn.Server(uvicorn.Config(create_app(engine, settings), **UVICORN))
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}", engine
    finally:
        server.should_exit = True
        thread.join()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The crowd, then one at a time; SystemExit if an answer was wrong or something hung."""
    runtime = Runtime.from_pretrained(args.path, device=args.device, max_context=1024, slots=args.slots)
    made = cases(runtime, args.cases)
    runtime.forget()
    with serving(runtime, args.waiting) as (url, engine):
        crowd(url, made, args.clients, min(30.0, args.seconds), HANG_UP)  # what is allocated once
        trim_heap()
        before = resident_bytes()
        tally, took = crowd(url, made, args.clients, args.seconds, HANG_UP)
        left = time.perf_counter() + 10
        while (engine.running or engine.waiting) and time.perf_counter() < left:
            time.sleep(0.05)
        idle = (engine.running, engine.waiting) == (0, 0)
        trim_heap()
        after = resident_bytes()
        lone, lone_took = crowd(url, made, 1, min(30.0, args.seconds), 0.0)
    ordered = sorted(tally.seconds)
    found = {
        "clients": args.clients,
        "slots": args.slots,
        "waiting": args.waiting,
        "seconds": took,
        "outcomes": dict(tally.counts),
        "tokens_per_s": tally.tokens / took,
        "latency_s": {f"p{p}": ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in (50, 90, 99)},
        "one_at_a_time": {"outcomes": dict(lone.counts), "tokens_per_s": lone.tokens / lone_took},
        "before_bytes": before,
        "after_bytes": after,
        "idle_at_the_end": idle,
    }
    bad = {name: count for name, count in tally.counts.items() if name not in ("right", "429", "hung up")}
    if bad or not idle or lone.counts["right"] != lone.counts.total():
        raise SystemExit(f"{bad or lone.counts}, idle at the end: {idle}; first wrong ones: {tally.wrong[:3]}")
    return found


@ends_with_its_message("benchmarks.serve_load")
def main(arguments: list[str] | None = None) -> None:
    """Parse, run, print, save."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serve_load",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", help="a bundle or checkpoint of the small model")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--waiting", type=int, default=32, help="requests that may wait for a slot; more get 429")
    parser.add_argument("--cases", type=int, default=60, help="different requests")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="save the figures, with machine, versions, commit and date")
    args = parser.parse_args(arguments)
    found = measure(args)
    latency = ", ".join(f"{name} {value:.2f} s" for name, value in found["latency_s"].items())
    print(
        f"{found['clients']} clients, {found['slots']} slots, {found['seconds']:.0f} s: {found['outcomes']}\n"
        f"every finished answer is that of a lone run; {latency}\n"
        f"{found['tokens_per_s']:.0f} tokens/s, one at a time {found['one_at_a_time']['tokens_per_s']:.0f}\n"
        f"memory {found['before_bytes'] / 1e6:.0f} MB before, {found['after_bytes'] / 1e6:.0f} MB after"
    )
    if args.json:
        args.json.write_text(json.dumps({"benchmark": "serve_load", **describe_machine(), **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
