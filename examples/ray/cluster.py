"""Shared by the service and the batch job: the model's options, and a Ray cluster."""

import argparse
import os
from pathlib import Path
from typing import Any

import ray

from qvl_edge.demo import SMALL_MODEL


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, and the resources of each process."""
    parser.add_argument("--bundle", type=Path, default=SMALL_MODEL, help="or a checkpoint (the small model that ships)")
    parser.add_argument("--slots", type=int, default=4, metavar="N", help="batch size of a process (4)")
    parser.add_argument("--num-cpus", type=float, default=1, metavar="N", help="cores per process (1)")
    parser.add_argument("--num-gpus", type=float, default=0, metavar="N", help="GPUs per process (0: on the CPU)")
    parser.add_argument("--max-context", type=int, metavar="N", help="positions per slot (as many as fit)")
    parser.add_argument("--max-memory", metavar="8GB", help="per process; needed if several share a GPU")
    parser.add_argument("--address", default="local", help="a Ray cluster: auto or HOST:PORT (default: start one here)")


def loading_of(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of Runtime.from_pretrained. Ray hides other processes' GPUs, so "cuda" is the right one."""
    return {
        "path": args.bundle.resolve(),
        "slots": args.slots,
        "device": "cuda" if args.num_gpus else "cpu",
        "max_context": args.max_context,
        "max_memory": args.max_memory,
    }


def start_ray(address: str) -> None:
    """Join a cluster, or start one on this machine that ends with this process. Telemetry is off."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address=address, include_dashboard=False if address == "local" else None, log_to_driver=True)
