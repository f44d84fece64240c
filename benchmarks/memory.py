"""What a run takes of memory beside what `qvl-edge fit` says that it will take.

    python -m benchmarks.memory PATH [--profile 8g] [--context 512] [--tokens 16] [--json FILE]

Loads, encodes one picture, and generates; the peak of the process (VmHWM) on a CPU, on CUDA the most that torch held
and what the driver counts as taken. Run it in a process of its own: a peak cannot be taken back.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qvl_edge import Runtime
from qvl_edge.engine.budget import estimate
from qvl_edge.engine.device import find_device
from qvl_edge.machine import describe_machine, ends_with_its_message
from qvl_edge.memory import device_memory, peak_host_bytes


def picture(size: int = 640) -> np.ndarray[Any, Any]:
    """A picture of random blocks."""
    blocks = np.random.default_rng(0).integers(0, 256, (size // 32, size // 32, 3), dtype=np.uint8)
    return blocks.repeat(32, 0).repeat(32, 1)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Estimate, stages and peak of one run."""
    options = {"profile": args.profile, "max_context": args.context, "device": args.device}
    device = find_device(args.device)
    cuda = device.type == "cuda"
    before = device_memory(device).free if cuda else 0
    stages: dict[str, dict[str, float]] = {}

    def stage(name: str, began: float) -> None:
        peak = torch.cuda.max_memory_allocated() if cuda else peak_host_bytes()
        stages[name] = {"seconds": time.perf_counter() - began, "peak_bytes": peak}
        if cuda:
            stages[name]["driver_bytes"] = before - device_memory(device).free
        print(f"{name}: {stages[name]['seconds']:.1f} s, peak {peak / 1e9:.2f} GB", file=sys.stderr, flush=True)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    began = time.perf_counter()
    runtime = Runtime.from_pretrained(args.path, release_vision=args.release_vision, progress=say, **options)
    stage("load", began)
    began = time.perf_counter()
    answer = runtime.ask(picture(), "What is this?", max_new_tokens=args.tokens, do_sample=False, ignore_eos=True)
    stage("answer", began)
    positions = answer.usage.prompt_tokens + answer.usage.completion_tokens
    # a CPU takes the memory of the positions that are filled, a card that of the whole context
    plan = runtime.plan if cuda else replace(runtime.plan, context=positions)
    budget = estimate(runtime.config, plan)
    peak = stages["answer"]["driver_bytes" if cuda else "peak_bytes"]
    return {
        "profile": args.profile,
        "plan": {name: str(value) for name, value in vars(plan).items()},
        "estimate": {**vars(budget), "total": budget.total},
        "peak_bytes": peak,
        "estimate_over_peak": budget.total / peak,
        "stages": stages,
        "usage": vars(answer.usage),
        "timing": vars(answer.timing),
    }


@ends_with_its_message("benchmarks.memory")
def main(arguments: list[str] | None = None) -> None:
    """Parse, run, print, save."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", help="a bundle or checkpoint")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--profile", default="auto")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--release-vision", action="store_true")
    parser.add_argument("--json", type=Path, help="save the figures, with machine, versions, commit and date")
    args = parser.parse_args(arguments)
    found = measure(args)
    parts = ", ".join(f"{name} {size / 1e9:.3f}" for name, size in found["estimate"].items() if size)
    print(f"estimate in GB: {parts}")
    print(
        f"peak {found['peak_bytes'] / 1e9:.3f} GB, estimate / peak {found['estimate_over_peak']:.3f}; image "
        f"{found['timing']['image_s']:.1f} s, prompt {found['timing']['prefill_s']:.1f} s, decoding "
        f"{found['timing']['decoded_tokens'] / max(found['timing']['decode_s'], 1e-9):.2f} tokens/s"
    )
    if args.json:
        device = "cuda" if args.device.startswith("cuda") else "cpu"
        args.json.write_text(json.dumps({"benchmark": "memory", **describe_machine(device), **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
