"""What a replica of the service and an actor of the batch job have in common: one Runtime that answers a crowd."""

import argparse
import math
import os
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ray

import qvl_edge
from qvl_edge.engine.run import Run
from qvl_edge.engine.scheduler import Job, Scheduler
from qvl_edge.runtime import Runtime

SMALL_MODEL = Path(qvl_edge.__file__).with_name("demo") / "checkpoint"


class Answerer:
    """A Runtime whose slots a Scheduler fills: questions that come at the same time are decoded together."""

    def __init__(self, bundle: Path, *, slots: int, **loading: Any):
        self.runtime = Runtime.from_pretrained(bundle, slots=slots, **loading)
        self._scheduler = Scheduler(self.runtime.slots, self.runtime.encode, self.runtime.sampler)

    def submit(
        self, query: list[dict[str, Any]], *, deadline: float = math.inf, **generation: Any
    ) -> tuple[Future[Run], threading.Event]:
        """Queue a question: the finished Run to come, and what to set when nobody wants it any more.

        query as for Runtime.answer; deadline is of time.monotonic(). The Future raises QvlError for a caller's mistake,
        and the scheduler's Cancelled, TimeLimit, OutOfMemory and RuntimeError.
        """
        end: Future[Run] = Future()
        end.set_running_or_notify_cancel()  # it cannot be cancelled any more, so that on_end may always set it

        def on_end(outcome: Run | Exception) -> None:
            if isinstance(outcome, Exception):
                end.set_exception(outcome)
            else:
                end.set_result(outcome)

        job = Job(lambda: self.runtime.prepare(query, **generation), lambda run, piece: None, on_end, deadline)
        self._scheduler.submit(job)
        return end, job.cancelled


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, and what each of its processes gets of a machine."""
    parser.add_argument("--bundle", type=Path, default=SMALL_MODEL, help="or a checkpoint (the small model that ships)")
    parser.add_argument("--slots", type=int, default=4, metavar="N", help="answers that a process decodes at once (4)")
    parser.add_argument("--num-cpus", type=float, default=1, metavar="N", help="cores for each process (1)")
    parser.add_argument("--num-gpus", type=float, default=0, metavar="N", help="cards for each process (0: on the CPU)")
    parser.add_argument("--max-context", type=int, metavar="N", help="positions for each slot (as many as fit)")
    parser.add_argument("--max-memory", metavar="8GB", help="for each process; needed where several share a card")
    parser.add_argument("--address", default="local", help="a Ray cluster: auto or HOST:PORT (one of its own, here)")


def loading_of(args: argparse.Namespace) -> dict[str, Any]:
    """What Answerer takes. Ray shows each process its own cards only, so "cuda" is the right one."""
    return {
        "bundle": args.bundle.resolve(),
        "slots": args.slots,
        "device": "cuda" if args.num_gpus else "cpu",
        "max_context": args.max_context,
        "max_memory": args.max_memory,
    }


def start_ray(address: str) -> None:
    """Join a cluster, or start one on this machine, which ends with this process. Nothing is reported to anybody."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address=address, include_dashboard=False if address == "local" else None, log_to_driver=True)
