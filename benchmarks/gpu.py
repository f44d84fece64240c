"""Everything that is to be known of a GPU, in one go: python3 -m benchmarks.gpu --minutes 8 --out DIR

From a plain checkout, with nothing installed but torch, triton and numpy. Correctness comes first, then the benchmarks,
the most telling first, until the time is used up. Every result is written to DIR/gpu.json as it comes, so that a run
that is cut off still tells; DIR/gpu.svg is the picture. Exit code 1 if a check does not hold or a benchmark fails.
`--tiny --device cpu` runs all of it on small shapes in Triton's interpreter, to see that it works.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.plot import picture
from benchmarks.timing import copy_gb_per_s
from qvl_edge.machine import describe_machine, use_device

Task = tuple[str, Callable[[], Iterator[dict[str, Any]]]]  # the list that its records go to, and how they are made


class Report:
    """The result, on disk whenever it has grown."""

    def __init__(self, path: Path, machine: dict[str, Any], minutes: float):
        self.path, self.begin, self.seconds = path, time.monotonic(), 60 * minutes
        self.result: dict[str, Any] = {"benchmark": "gpu", **machine, "minutes": minutes, "finished": False}
        self.result |= {"checks": [], "failed": [], "left_out": []}
        self.save()

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.seconds - (time.monotonic() - self.begin)

    def save(self) -> None:
        """At once or not at all."""
        beside = self.path.with_suffix(".partial")
        beside.write_text(json.dumps(self.result, indent=1) + "\n")
        beside.replace(self.path)

    def add(self, name: str, record: dict[str, Any]) -> None:
        """One record to the list `name`, with the second it came at."""
        at = round(time.monotonic() - self.begin, 1)
        self.result.setdefault(name, []).append(record | {"at_s": at})
        self.save()
        print(f"{at:6.1f} s  {name}: {_line(record)}", file=sys.stderr, flush=True)

    def run(self, name: str, make: Callable[[], Iterator[dict[str, Any]]]) -> None:
        """All records of a task, as far as there is time. What it raises is a result too."""
        try:
            for record in make():
                self.add(name, record)
                if self.left < 0:
                    self.result["left_out"].append(f"the rest of {name}, after {len(self.result[name])} records")
                    break
        except (Exception, SystemExit) as error:  # the next task may still tell something
            where = traceback.format_exc().strip().splitlines()[-3:]
            self.result["failed"].append({"task": name, "error": f"{type(error).__name__}: {error}", "where": where})
            print(f"{name} failed: {error}", file=sys.stderr, flush=True)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        self.save()


def _line(record: dict[str, Any]) -> str:
    small = {key: value for key, value in record.items() if not isinstance(value, dict | list)}
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in small.items())


def tasks(device: str, tiny: bool, copy_rate: float | None) -> list[Task]:
    """What is measured after the checks, the most telling first."""
    # here and not above: with `--device cpu` the kernels must be loaded after TRITON_INTERPRET is set
    from benchmarks import decode_step, int4_gemm, rotary_attention
    from benchmarks.projections import Projection

    rounds = 2 if tiny else 50
    if tiny:
        shapes, rows = [(256, 128)], [[1, 20]]
        layer: tuple[Projection, ...] = (
            Projection("c_attn", 128, 384, norm=True, bias=True),
            Projection("w1 and w2", 128, 512, epilogue="swiglu", norm=True),
            Projection("mlp.c_proj", 256, 128, epilogue="residual"),
        )
    else:
        shapes, rows = int4_gemm.CUDA_SHAPES, [[1, 16, 256], [4, 512, 1024, 8], [2, 32, 64, 128, 2048]]
        layer = int4_gemm.LAYER
    peers_on = "interpreter" if device == "cpu" else device

    def layers() -> Iterator[dict[str, Any]]:
        for count in (1, 16, 4, 8) if not tiny else (1, 12):
            yield int4_gemm.bench_layer(
                count, rounds=rounds, seconds=1.0, copy_rate=copy_rate, device=device, projections=layer
            )

    def peers(count: list[int]) -> Iterator[dict[str, Any]]:
        for shape in shapes:
            yield from int4_gemm.bench_shape(
                shape, count, device=peers_on, rounds=rounds, seconds=1.0, copy_rate=copy_rate
            )

    found: list[Task] = [
        ("layer", layers),
        ("decode_step", partial(decode_step.records, device, tiny=tiny, rounds=rounds, copy_rate=copy_rate)),
        ("int4_gemm", partial(peers, rows[0])),
        ("rotary_attention", partial(rotary_attention.records, device, tiny=tiny, rounds=rounds, seconds=1.0)),
    ]
    return found + [("int4_gemm", partial(peers, more)) for more in rows[1:]]


def main(arguments: list[str] | None = None) -> int:
    """Parse, check, measure, draw; 1 if something does not hold."""
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0, help="when to stop (default: 8)")
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and gpu.svg")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to see that it runs")
    args = parser.parse_args(arguments)
    use_device(parser, args.device, tiny=args.tiny)
    from benchmarks.checks import CHECKS

    args.out.mkdir(parents=True, exist_ok=True)
    report = Report(args.out / "gpu.json", describe_machine(args.device), args.minutes)
    copy_rate = None
    with torch.inference_mode():
        for check in CHECKS:
            report.run("checks", partial(check, args.device, args.tiny))
    if args.device == "cuda":
        copy_rate = report.result["copy_gb_per_s"] = copy_gb_per_s()
    for name, make in tasks(args.device, args.tiny, copy_rate):
        if report.left < 0:
            report.result["left_out"].append(name)
        else:
            with torch.inference_mode():
                report.run(name, make)
    report.result["finished"] = not report.result["left_out"]
    report.save()
    drawing = picture(report.result)
    if drawing:
        (args.out / "gpu.svg").write_text(drawing, encoding="utf-8")
    broken = [entry for entry in report.result["checks"] if not entry["holds"]]
    for entry in broken:
        print(f"does not hold: {entry['check']}: {entry['error']}, allowed is {entry['allowed']:.2e}")
    for failure in report.result["failed"]:
        print(f"failed: {failure['task']}: {failure['error']}")
    if report.result["left_out"]:
        print(f"left out for want of time: {', '.join(report.result['left_out'])}")
    print(f"{len(report.result['checks']) - len(broken)} of {len(report.result['checks'])} checks hold; see {args.out}")
    return 1 if broken or report.result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
