"""Measured memory of a run beside the estimate of `qvl-edge fit`.

    python -m benchmarks.memory PATH [--profile 8g] [--context 512] [--tokens 16] [--json FILE]

Loads the model, encodes one image and generates. On a CPU the peak is the process's VmHWM; on CUDA it is reported both
by torch and by the driver. Not every peak can be reset: use one process per run.
"""

import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks.report import exits_with_its_message, model_command, save, say
from qvl_edge import Runtime
from qvl_edge.engine.budget import estimate
from qvl_edge.engine.device import find_device
from qvl_edge.memory import device_memory, peak_host_bytes
from qvl_edge.options import LoadOptions


def random_blocks() -> np.ndarray[Any, Any]:
    """An image (640, 640, 3) of random 32-pixel blocks."""
    blocks = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    return blocks.repeat(32, 0).repeat(32, 1)


def measure(path: str, options: dict[str, Any], tokens: int) -> dict[str, Any]:
    """The estimate, and the stages and peak of one run."""
    device = find_device(options["device"])
    cuda = device.type == "cuda"
    before = device_memory(device).free if cuda else 0
    stages: dict[str, dict[str, float]] = {}

    def stage(name: str, start: float) -> None:
        peak = torch.cuda.max_memory_allocated(device) if cuda else peak_host_bytes()
        stages[name] = {"seconds": time.perf_counter() - start, "peak_bytes": peak}
        if cuda:
            stages[name]["driver_bytes"] = before - device_memory(device).free
        say(f"{name}: {stages[name]['seconds']:.1f} s, peak {peak / 1e9:.2f} GB")

    start = time.perf_counter()
    runtime = Runtime.from_pretrained(path, progress=say, **options)
    stage("load", start)
    start = time.perf_counter()
    answer = runtime.ask(random_blocks(), "What is this?", max_new_tokens=tokens, do_sample=False, ignore_eos=True)
    stage("answer", start)
    positions = answer.usage.prompt_tokens + answer.usage.completion_tokens
    # a CPU commits the memory of filled positions only, a GPU that of the whole context
    plan = runtime.plan if cuda else replace(runtime.plan, context=positions)
    budget = estimate(runtime.config, plan)
    peak = stages["answer"]["driver_bytes" if cuda else "peak_bytes"]
    return {
        "profile": options["profile"],
        "plan": {name: str(value) for name, value in vars(plan).items()},
        "estimate": {**vars(budget), "total": budget.total},
        "peak_bytes": peak,
        "estimate_over_peak": budget.total / peak,
        "stages": stages,
        "usage": vars(answer.usage),
        "timing": vars(answer.timing),
    }


@exits_with_its_message("benchmarks.memory")
def main(arguments: list[str] | None = None) -> None:
    parser = model_command("memory", __doc__, leave_out=["max_context"], device="cpu", profile="auto", max_context=512)
    parser.add_argument("--context", dest="max_context", type=int, metavar="N", help="positions (default: 512)")
    parser.add_argument("--tokens", type=int, default=16, help="to generate (default: 16)")
    args = parser.parse_args(arguments)
    options = LoadOptions.given(args)
    found = measure(args.path, options, args.tokens)
    parts = ", ".join(f"{name} {size / 1e9:.3f}" for name, size in found["estimate"].items() if size)
    print(f"estimate in GB: {parts}")
    print(
        f"peak {found['peak_bytes'] / 1e9:.3f} GB, estimate / peak {found['estimate_over_peak']:.3f}; image "
        f"{found['timing']['image_s']:.1f} s, prompt {found['timing']['prefill_s']:.1f} s, decoding "
        f"{found['timing']['decoded_tokens'] / max(found['timing']['decode_s'], 1e-9):.2f} tokens/s"
    )
    save(args.json, "memory", found["plan"]["device"], **found)


if __name__ == "__main__":
    main()
