"""All that a first card needs, in one run: python3 -m benchmarks.gpu --minutes 40 --out DIR [--bundle PATH] [--only …]

Needs a checkout, torch, triton and numpy; --bundle also what the runtime needs. Every kernel is checked, whole steps,
graphs and captures beside another thread too, then the benchmarks run, the most informative first, and the tuner last,
into DIR/tiles, until the time is used up. Results are saved to DIR/gpu.json one by one, and the same command goes on
with what is missing, also after a CUDA error that ends the process. DIR/gpu.svg is the chart, if matplotlib is
installed. Exit code 1 if a check or a benchmark fails. `--tiny --device cpu` is a smoke test on small shapes in
Triton's interpreter.
"""

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import int4_gemm, plot
from benchmarks.kernels import decode_step, first_contact, rotary_attention
from benchmarks.kernels.first_contact import check_captures, check_tokens
from benchmarks.kernels.problem import (
    HEAD,
    LAYER,
    Gemm,
    Problem,
    attention_error,
    cached,
    random_attention,
    relative_error,
    rotate_exactly,
)
from benchmarks.kernels.timing import copy_gb_per_s
from benchmarks.report import command, say
from kernels import rotary_attention as attend
from kernels.gpu.tiles import Tile
from qvl_edge.files import read_json, write_json
from qvl_edge.machine import describe_machine
from qvl_edge.model.cache import KVCache
from qvl_edge.model.fused import FusedDecoder
from qvl_edge.plot import optional

Record = dict[str, Any]
Task = tuple[str, Callable[[], Iterator[Record]]]  # name of the list of its records, and their generator
BENCHMARKS = ("guesses", "layer", "decode_step", "int4_gemm", "rotary_attention", "model", "tiles")
# odd sizes: the last tile and the last chunk are partial; fused forms need multiples of 32
ODD = (
    Gemm("odd, bias and norm", 416, 200, norm=True, bias=True),
    Gemm("odd, zeros in groups of 32", 384, 136, zeros=True, group=32),
    Gemm("odd, zeros in groups of 64", 256, 72, zeros=True, group=64),
    Gemm("odd, one group", 384, 136, group=384),
    Gemm("odd, SwiGLU", 256, 192, epilogue="swiglu", norm=True),
    Gemm("odd, residual", 416, 160, epilogue="residual", bias=True),
)
ODD_HEAD = Gemm("odd int8", 416, 200, bits=8, group=416)
# relative norm error against float64: rotated q and k are float16, p is float16 in a prefill
ATTENTION_TOLERANCE = 2e-3
# relative to a row's largest value: float16's rounding; for int8 half a level of 127 and the float16 scale
STORED_TOLERANCE = {False: 1e-3, True: 0.6 / 127}
# against the reference decoder, whose 2 blocks round to 16 bits in other places
DECODER_TOLERANCE = 1e-2


def check_gemm(device: str, tiny: bool) -> Iterator[Record]:
    """Both kernels in every fused form, with the tables' tiles and with splits; full shapes unless `tiny`."""
    half = torch.float16
    problems: list[tuple[Sequence[Gemm], Sequence[int], torch.dtype, Tile | None]] = [
        (ODD, (1, 12, 17) if tiny else (1, 16, 17, 300), half, None),
        ((ODD[0], *ODD[-2:]), (5,), half, Tile(8, 64, 3, 2, 3)),
        ((ODD_HEAD,), (1, 12), half, None),
    ]
    # bfloat16 is wrong in the interpreter
    if device == "cuda" and torch.cuda.get_device_capability() >= (8, 0):
        problems.append((ODD[:3], (3, 12, 70), torch.bfloat16, None))
    if not tiny:
        problems += [(LAYER, (1, 16, 300), half, None), ((HEAD,), (1, 16), half, None)]
    for gemms, counts, dtype, tile in problems:
        for gemm, count in product(gemms, counts):
            yield _problem(gemm, count, dtype, device, tile)


def _problem(gemm: Gemm, count: int, dtype: torch.dtype, device: str, tile: Tile | None) -> Record:
    """Against float64; repeated calls are bit-identical and leave the locks at zero."""
    name = f"{gemm.name}, {count} rows, {str(dtype).removeprefix('torch.')}" + (", split" if tile else "")
    problem = Problem.random(gemm, count, dtype=dtype, device=device)
    allowed = problem.tolerance
    if dtype == torch.bfloat16 and count > 16:
        allowed *= 1.5  # the weight is rounded to bfloat16 twice: scaled, and its scale
    try:
        error = problem.error(tile)
        repeats = problem.residual is not None or torch.equal(problem.run(tile).x, problem.run(tile).x)
    except Exception as raised:  # a form that does not compile must not hide the others
        return {"check": name, "error": None, "allowed": allowed, "holds": False, "raised": str(raised)[:500]}
    record = _record(name, error, allowed)
    return record | {"holds": record["holds"] and repeats and not bool(problem.weight.locks.any())}


def _record(name: str, error: float, allowed: float) -> Record:
    return {"check": name, "error": error, "allowed": allowed, "holds": error < allowed}


def check_attention(device: str, tiny: bool) -> Iterator[Record]:
    """Decode and prefill on top of a cache, sequences at unequal positions, float16 and int8 caches."""
    heads, dim, capacity = (2, 32, 64) if tiny else (4, 128, 700)
    starts = (0, 5, 41) if tiny else (0, 333, 640)
    for int8 in (False, True):
        for length in (1, 7) if tiny else (1, 16, 50):
            args = random_attention(heads, dim, capacity, starts, length, device=device, int8=int8, seed=2)
            args = replace(args, q_scale=1 + torch.randn(len(starts), length, device=device).abs() / 4)
            out = attend(args, backend="triton")
            # over the cache as the kernel left it; what it appended is checked below
            error = max(attention_error(out, args, sequence) for sequence in range(len(starts)))
            name = f"attention, {length} tokens on top of {starts}, {'int8' if int8 else 'float16'} cache"
            yield _record(name, error, ATTENTION_TOLERANCE)
            stored = 0.0
            for row, start in enumerate(starts):
                new = slice(start, start + length)
                key = rotate_exactly(args.k[row], args.cos[row], args.sin[row])
                value = args.v[row].double()
                for cache, scales, expected in (
                    (args.k_cache, args.k_scales, key),
                    (args.v_cache, args.v_scales, value),
                ):
                    found = cached(cache, scales, (row, slice(None), new)).transpose(0, 1)
                    off = (found - expected).abs().amax(-1) / expected.abs().amax(-1)
                    stored = max(stored, float(off.max()))
            yield _record(f"{name}: appended rows", stored, STORED_TOLERANCE[int8])


@torch.inference_mode()
def check_decoder(device: str, tiny: bool) -> Iterator[Record]:
    """Logits of a small decoder, a prompt and two steps: kernels against reference on the same device."""
    del tiny
    config = decode_step.decoder_config(tiny=True)
    for head in ("float16", "int8"):
        ours = FusedDecoder.random(config, device=device, head=head)
        logits: dict[str, list[Tensor]] = {}
        for backend in ("triton", "torch"):
            ours.backend = backend
            cache = KVCache(config, 2, 48, dtype=torch.float16, device=device)
            ids = torch.arange(2 * 19, device=device).view(2, 19) % config.vocab_size
            logits[backend] = [ours(ours.embed(ids), cache)]
            for _ in range(2):
                logits[backend].append(ours(ours.embed(ids[:, :1] + 7), cache))
        pairs = zip(logits["triton"], logits["torch"], strict=True)
        error = max(relative_error(one, other) for one, other in pairs)
        yield _record(f"decoder, {head} head", error, DECODER_TOLERANCE)


class Report:
    """The result, saved after every record."""

    def __init__(self, path: Path, machine: Record, minutes: float):
        self.path, self.begin, self.seconds = path, time.monotonic(), 60 * minutes
        self.result: Record = {"benchmark": "gpu", **machine, "minutes": minutes, "finished": False}
        self.result |= {"checks": [], "failed": [], "left_out": [], "done": []}
        earlier = read_json(path) if path.exists() else {}
        same = all(earlier.get(name) == self.result.get(name) for name in ("device", "commit", "versions"))
        if same and not earlier.get("finished", True):
            self.result = earlier | {"minutes": minutes, "left_out": []}
            say(f"going on with {path}: {', '.join(earlier['done']) or 'nothing'} done")
        self.save()

    @property
    def left(self) -> float:
        """Seconds left of the budget."""
        return self.seconds - (time.monotonic() - self.begin)

    def save(self) -> None:
        write_json(self.path, self.result)

    def add(self, name: str, record: Record) -> None:
        """Append to the list `name`, with the time in seconds."""
        at = round(time.monotonic() - self.begin, 1)
        self.result.setdefault(name, []).append(record | {"at_s": at})
        self.save()
        say(f"{at:6.1f} s  {name}: {_line(record)}")

    def run(self, task: str, name: str, make: Callable[[], Iterator[Record]]) -> None:
        """Add the records of a task to the list `name` until the time is used up; not again if it is done.

        Its exception is recorded as a failure. SystemExit if the device cannot be used after it.
        """
        if task in self.result["done"]:
            return
        if self.left < 0:
            self.result["left_out"].append(task)
            return
        kept = [record for record in self.result.get(name, []) if record["task"] != task]
        self.result[name] = kept  # what a part of it gave, before it was cut off
        try:
            for record in make():
                self.add(name, {"task": task, **record})
                if self.left < 0:
                    self.result["left_out"].append(f"the rest of {task}, after {len(self.result[name])} records")
                    return
        except (Exception, SystemExit) as error:  # the next task may still work
            where = traceback.format_exc().strip().splitlines()[-3:]
            self.result["failed"].append({"task": task, "error": f"{type(error).__name__}: {error}", "where": where})
            say(f"{task} failed: {error}")
        self.result["done"].append(task)
        self.save()
        if torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:  # which stays: nothing more runs in this process
                raise SystemExit(f"{task} left the device unusable ({error}); run the same command again") from None
            torch.cuda.empty_cache()


def _line(record: Record) -> str:
    small = {key: value for key, value in record.items() if not isinstance(value, dict | list)}
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in small.items())


def tasks(device: str, tiny: bool, copy_rate: float | None, bundle: str | None, tiles: Path) -> list[Task]:
    """The benchmarks, the most informative first."""
    rounds, seconds = (2, 0.1) if tiny else (50, 1.0)
    if tiny:
        shapes, rows = [(256, 128)], [[1, 20]]
        layer: tuple[Gemm, ...] = (
            Gemm("c_attn", 128, 384, norm=True, bias=True),
            Gemm("w1 and w2", 128, 512, epilogue="swiglu", norm=True),
            Gemm("mlp.c_proj", 256, 128, epilogue="residual"),
        )
    else:
        shapes, rows = int4_gemm.CUDA_SHAPES, [[1, 16, 256], [4, 512, 1024, 8], [2, 32, 64, 128, 2048]]
        layer = int4_gemm.LAYER
    peers_on = "interpreter" if device == "cpu" else device

    def layers() -> Iterator[Record]:
        for count in (1, 16, 4, 8) if not tiny else (1, 12):
            yield int4_gemm.bench_layer(
                count, rounds=rounds, seconds=seconds, copy_rate=copy_rate, device=device, projections=layer
            )

    def peers(count: list[int]) -> Iterator[Record]:
        for shape in shapes:
            yield from int4_gemm.bench_shape(
                shape, count, device=peers_on, rounds=rounds, seconds=seconds, copy_rate=copy_rate
            )

    shared: dict[str, Any] = {"tiny": tiny, "rounds": rounds, "copy_rate": copy_rate}
    found: list[Task] = [
        ("guesses", partial(first_contact.guesses, device, tiny)),
        ("layer", layers),
        ("decode_step", partial(decode_step.records, device, **shared)),
        ("int4_gemm", partial(peers, rows[0])),
        ("rotary_attention", partial(rotary_attention.records, device, seconds=seconds, **shared)),
    ]
    found += [("int4_gemm", partial(peers, more)) for more in rows[1:]]
    if bundle is not None:
        found.insert(1, ("model", partial(first_contact.whole_model, bundle, device)))
    if device == "cuda":
        from benchmarks import tune  # loads triton

        found.append(("tiles", partial(tune.records, tiles, rounds=20)))
    return found


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 1 if a check or a benchmark failed."""
    parser = command("gpu", __doc__)
    parser.add_argument("--minutes", type=float, default=40.0, help="when to stop (default: 40)")
    parser.add_argument("--bundle", metavar="PATH", help="a model to answer with, on the CPU too")
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and gpu.svg")
    parser.add_argument(
        "--only", nargs="+", choices=BENCHMARKS, default=BENCHMARKS, help="after the checks, only these"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, as a smoke test")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --device cpu --tiny needs none")
    if args.device == "cpu":
        if not args.tiny:
            parser.error("on the CPU the kernels run in Triton's interpreter, thousands of times slower: add --tiny")
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is loaded
    args.out.mkdir(parents=True, exist_ok=True)
    report = Report(args.out / "gpu.json", describe_machine(args.device), args.minutes)
    with torch.inference_mode():
        for check in (check_gemm, check_attention, check_decoder, check_tokens, check_captures):
            report.run(check.__name__, "checks", partial(check, args.device, args.tiny))
    if (copy_rate := copy_gb_per_s(args.device)) is not None:
        report.result["copy_gb_per_s"] = copy_rate
    chosen = tasks(args.device, args.tiny, copy_rate, args.bundle, args.out / "tiles")
    for index, (name, make) in enumerate(chosen):
        if name in args.only:
            with torch.inference_mode():
                report.run(f"{name} {index}", name, make)
    report.result["finished"] = not report.result["left_out"]
    report.save()
    with optional():
        plot.draw(report.result, args.out / "gpu.svg")
    lists = (found for found in report.result.values() if isinstance(found, list))
    checks = [entry for found in lists for entry in found if isinstance(entry, dict) and "holds" in entry]
    broken = [entry for entry in checks if not entry["holds"]]
    for entry in broken:
        print(f"check failed: {entry['check']}: error {entry['error']}, allowed {entry['allowed']:.2e}")
    for failure in report.result["failed"]:
        print(f"failed: {failure['task']}: {failure['error']}")
    if report.result["left_out"]:
        print(f"skipped (time limit): {', '.join(report.result['left_out'])}")
    print(f"{len(checks) - len(broken)} of {len(checks)} checks passed; see {args.out}")
    return 1 if broken or report.result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
