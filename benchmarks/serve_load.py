"""Load test of the server: correct answers, 429 for the rest, and the speed-up by batching.

    python -m benchmarks.serve_load PATH [--clients 64] [--seconds 180] [--slots 8] [--json FILE]

Over loopback, each client streams answers of mixed lengths about synthetic scenes, one after another; a fifth of the
requests disconnect at a random moment. Answers must equal those of a Runtime without a server. Afterwards a single
client measures the throughput of one request at a time. The speed-up depends on the model and the device: a step of the
small model is mostly overhead.
"""

import base64
import contextlib
import io
import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import httpx
import numpy as np

from benchmarks.report import exits_with_its_message, model_command, save, say
from qvl_edge import Runtime
from qvl_edge.demo.scenes import UNSEEN, ask_any, make_scene
from qvl_edge.engine.worker import Worker
from qvl_edge.memory import resident_bytes, trim_heap
from qvl_edge.options import LoadOptions

DISCONNECT = 0.2  # share of requests whose client disconnects before the end
TIMEOUT_S = 60.0  # a request that takes longer counts as hanging


@dataclass
class Case:
    """A request, and its expected answer."""

    body: dict[str, Any]
    text: str
    tokens: int


def cases(runtime: Runtime, count: int) -> list[Case]:
    """Requests about a few scenes, so that images and prompts repeat, as in real traffic."""
    rng = np.random.default_rng(0)
    made: list[Case] = []
    for _ in range(count):
        scene = make_scene(UNSEEN + int(rng.integers(12)))
        question = ask_any(scene, rng)
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
    """Outcomes of the requests."""

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


def ask_once(client: httpx.Client, case: Case, rng: random.Random, tally: Tally, *, disconnect: float) -> None:
    """One request, to its end or until its client disconnects."""
    start = time.perf_counter()
    leave = start + rng.expovariate(1 / 0.3) if rng.random() < disconnect else None
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
    seconds = time.perf_counter() - start
    if text.strip() == case.text:
        tally.add("right", tokens=case.tokens, seconds=seconds)
    else:
        tally.add("wrong", wrong=f"{text.strip()!r} for {case.text!r}")


def run_clients(*arguments: Any) -> tuple[Tally, float]:
    """`_run_clients` in another process, whose GIL the server's threads do not share."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_run_clients, *arguments).result()


def _run_clients(url: str, made: list[Case], clients: int, seconds: float, disconnect: float) -> tuple[Tally, float]:
    """`clients` threads for `seconds`; the tally, and the seconds until the last request ended."""
    start = time.perf_counter()
    tally, end = Tally(), start + seconds

    def work(seed: int) -> None:
        rng = random.Random(seed)
        with httpx.Client(base_url=url, timeout=TIMEOUT_S) as client:
            while time.perf_counter() < end:
                try:
                    ask_once(client, rng.choice(made), rng, tally, disconnect=disconnect)
                except httpx.TimeoutException:
                    tally.add("hangs")
                except httpx.HTTPError as error:
                    tally.add(type(error).__name__)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(clients)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(min(10.0, seconds / 4))
        say(f"{time.perf_counter() - start:.0f} s: {dict(tally.counts)}")
    return tally, time.perf_counter() - start


@contextlib.contextmanager
def serving(runtime: Runtime, waiting: int, access: Any = None) -> Iterator[tuple[str, Worker]]:
    """The server on a free loopback port: its address and its worker."""
    import uvicorn

    from qvl_edge.server.app import Settings, create_app
    from qvl_edge.server.connection import configure
    from qvl_edge.server.guard import Access

    worker = Worker(runtime, max_waiting=waiting)
    access = access or Access("127.0.0.1", None)
    settings = Settings("small", max_model_len=runtime.max_context, access=access, max_concurrent=4 * waiting)
    server = uvicorn.Server(configure(create_app(worker, settings)))
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}", worker
    finally:
        server.should_exit = True
        thread.join()


def measure(runtime: Runtime, *, clients: int, seconds: float, waiting: int, requests: int) -> dict[str, Any]:
    """All clients, then one request at a time; SystemExit if an answer is wrong or a request hangs."""
    made = cases(runtime, requests)
    runtime.forget()
    short = min(30.0, seconds)
    with serving(runtime, waiting) as (url, worker):
        run_clients(url, made, clients, short, DISCONNECT)  # warm-up: one-time allocations
        trim_heap()
        before = resident_bytes()
        tally, took = run_clients(url, made, clients, seconds, DISCONNECT)
        deadline = time.perf_counter() + 10
        while (worker.running or worker.waiting) and time.perf_counter() < deadline:
            time.sleep(0.05)
        idle = not (worker.running or worker.waiting)
        trim_heap()
        after = resident_bytes()
        lone, lone_took = run_clients(url, made, 1, short, 0.0)
    bad = {name: count for name, count in tally.counts.items() if name not in ("right", "429", "hung up")}
    if bad or not idle or lone.counts["right"] != lone.counts.total():
        raise SystemExit(f"{bad or lone.counts}, idle at the end: {idle}; first wrong ones: {tally.wrong[:3]}")
    latencies = np.percentile(tally.seconds, (50, 90, 99), method="inverted_cdf")
    return {
        "clients": clients,
        "slots": runtime.plan.slots,
        "waiting": waiting,
        "seconds": took,
        "outcomes": dict(tally.counts),
        "tokens_per_s": tally.tokens / took,
        "latency_s": dict(zip(("p50", "p90", "p99"), latencies.tolist(), strict=True)),
        "one_at_a_time": {"outcomes": dict(lone.counts), "tokens_per_s": lone.tokens / lone_took},
        "before_bytes": before,
        "after_bytes": after,
        "idle_at_the_end": idle,
    }


@exits_with_its_message("benchmarks.serve_load")
def main(arguments: list[str] | None = None) -> None:
    parser = model_command("serve_load", __doc__, device="cpu", max_context=1024)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--waiting", type=int, default=32, help="queue limit; further requests get 429")
    parser.add_argument("--cases", type=int, default=60, help="different requests")
    args = parser.parse_args(arguments)
    runtime = Runtime.from_pretrained(args.path, **LoadOptions.given(args))
    found = measure(runtime, clients=args.clients, seconds=args.seconds, waiting=args.waiting, requests=args.cases)
    latency = ", ".join(f"{name} {value:.2f} s" for name, value in found["latency_s"].items())
    print(
        f"{found['clients']} clients, {found['slots']} slots, {found['seconds']:.0f} s: {found['outcomes']}\n"
        f"all finished answers are right; {latency}\n"
        f"{found['tokens_per_s']:.0f} tokens/s, {found['one_at_a_time']['tokens_per_s']:.0f} one at a time\n"
        f"memory {found['before_bytes'] / 1e6:.0f} MB before, {found['after_bytes'] / 1e6:.0f} MB after"
    )
    save(args.json, "serve_load", runtime.plan.device, **found)


if __name__ == "__main__":
    main()
