"""int4_gemm against its peers, in one run: python -m benchmarks.int4_gemm --device cpu|cuda [--all] [--json FILE]

Every candidate is checked against float64 before it is timed. Weights are kept in as many copies as it takes to outgrow
the caches, and used in turn: in a model the weights of a layer come from memory, not from cache. On CUDA all calls of a
round are one graph, as in the runtime, and the four projections of a layer are timed in their fused forms too.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.projections import LAYER, Problem, Projection
from benchmarks.timing import Timing, copy_gb_per_s, in_one_graph, measure, measure_on_device
from kernels import (
    MAX_DECODE_ROWS,
    Int4Weight,
    Rows,
    TritonWeight,
    int4_gemm,
    pack_for_cpu,
    pack_for_triton,
    pack_levels,
    pack_zeros,
)
from qvl_edge.machine import describe_machine

# K, N of Qwen-7B's projections: c_attn first, then attn.c_proj, w1 and w2, mlp.c_proj
SHAPES = [(4096, 12288), (4096, 4096), (4096, 11008), (11008, 4096)]
CUDA_SHAPES = [(4096, 12288), (4096, 4096), (4096, 22016), (11008, 4096)]  # w1 and w2 are one weight there
ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
CUDA_ROWS = [*ROWS, 1024, 2048]
GROUP_SIZE = 128
# bytes of weights in turn; desktop and server caches end at 32 to 100 MiB, a GPU's (RTX PRO 6000) at 128
OUTGROWS_CACHES = {"cpu": 192 * 2**20, "cuda": 512 * 2**20, "interpreter": 1}
CHECKED_ROWS = 4
# relative norm error against float64: float32 sums over 11,008 channels; 16-bit weights and outputs, of which some
# libraries add up parts in 16 bits
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1.5e-3, torch.bfloat16: 6e-3}
OURS = "int4"
# what speeds are relative to: the same product without int4. "interpreter": what CUDA has, as far as it runs on a CPU
BASELINE = {"cpu": "float32", "cuda": "float16", "interpreter": "float16"}


@dataclass(frozen=True)
class Peer:
    """A way to compute x @ W.T: its call on (x, one copy of its weight), its weights, and what x is to be."""

    call: Callable[[Any, Any], Tensor]
    weights: list[Any]
    bytes_read: int  # of one weight, by one call
    dtype: torch.dtype
    prepare: Callable[[Tensor], Any] = lambda x: x  # x as the call takes it; not timed


def random_weight(in_features: int, out_features: int, device: str = "cpu") -> Int4Weight:
    """A symmetric int4 weight as the published checkpoint has them, from random levels."""
    generator = torch.Generator(device).manual_seed(0)
    levels = torch.randint(0, 16, (in_features, out_features), dtype=torch.uint8, generator=generator, device=device)
    shape = (in_features // GROUP_SIZE, out_features)
    scales = (0.005 + 0.01 * torch.rand(shape, generator=generator, device=device)).half()
    g_idx = torch.arange(in_features, dtype=torch.int32, device=device) // GROUP_SIZE
    zeros = pack_zeros(torch.full(shape, 8, device=device))
    return Int4Weight.from_gptq(pack_levels(levels), zeros, scales, g_idx, group_size=GROUP_SIZE)


def copies(make: Callable[[], Any], size: int, device: str = "cpu") -> list[Any]:
    """As many separate copies of a weight of `size` bytes as outgrow the caches."""
    return [make() for _ in range(-(-OUTGROWS_CACHES[device] // size))]


def cpu_peers(weight: Int4Weight, device: str = "cpu") -> dict[str, Peer]:
    """Everything that computes this product on a CPU."""
    del device
    dense = weight.dequantize()
    half = dense.bfloat16()
    levels = weight.levels().T.to(torch.int32).contiguous()
    scales = weight.scales.bfloat16()
    scales_and_zeros = torch.stack((scales, torch.zeros_like(scales)), dim=-1)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1)
    int4_bytes = weight.qweight.nbytes + weight.scales.nbytes

    def operator(x: Tensor, copy: Tensor) -> Tensor:
        result: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, copy, GROUP_SIZE, scales_and_zeros)
        return result

    return {
        BASELINE["cpu"]: Peer(F.linear, copies(dense.clone, dense.nbytes), dense.nbytes, torch.float32),
        "bfloat16": Peer(F.linear, copies(half.clone, half.nbytes), half.nbytes, torch.bfloat16),
        TORCHS: Peer(operator, copies(packed.clone, packed.nbytes), int4_bytes, torch.bfloat16),
        "definition": Peer(lambda x, w: int4_gemm(x, w, backend="torch"), [weight], int4_bytes, torch.float32),
        OURS: Peer(int4_gemm, copies(lambda: pack_for_cpu(weight), int4_bytes), int4_bytes, torch.float32),
    }


def cuda_peers(weight: Int4Weight, device: str = "cuda") -> dict[str, Peer]:
    """Everything that computes this product on a CUDA device; libraries that are not installed are left out."""
    half = weight.dequantize().half()
    ours = pack_for_triton(weight)
    int4_bytes = ours.words.nbytes + ours.scales.nbytes
    levels = weight.levels().T.contiguous()  # (N, K)
    scales = weight.scales.T.contiguous()  # (N, G)

    def cuda_copies(make: Callable[[], Any], size: int) -> list[Any]:
        return copies(make, size, device)

    def another() -> TritonWeight:
        return replace(ours, words=ours.words.clone(), scales=ours.scales.clone(), locks=ours.locks.clone())

    peers = {
        BASELINE["cuda"]: Peer(F.linear, cuda_copies(half.clone, half.nbytes), half.nbytes, torch.float16),
        # sums come with the rows in the runtime, whose kernels make both at once
        OURS: Peer(
            partial(int4_gemm, backend="triton"),
            cuda_copies(another, int4_bytes),
            int4_bytes,
            torch.float16,
            prepare=_with_sums,
        ),
    }
    with suppress(NotImplementedError):  # a build of torch without it
        # W = (level - 8) * scale + zero, two levels a byte, the first one on top
        packed = torch.ops.aten._convert_weight_to_int4pack(levels[:, ::2] << 4 | levels[:, 1::2], 8)
        parts = torch.stack((scales.T, torch.zeros_like(scales.T)), dim=-1).bfloat16().contiguous()

        def operator(x: Tensor, copy: Tensor) -> Tensor:
            result: Tensor = torch.ops.aten._weight_int4pack_mm(x, copy, GROUP_SIZE, parts)
            return result

        peers[TORCHS] = Peer(operator, cuda_copies(packed.clone, packed.nbytes), int4_bytes, torch.bfloat16)
    if importlib.util.find_spec("gemlite"):
        try:
            peers["gemlite"] = _gemlite_peer(levels, scales, int4_bytes)
        except Exception as error:  # another version's names, or no GPU: ours is measured all the same
            peers["gemlite"] = _unable(f"{type(error).__name__}: {error}")
    return peers


def _unable(reason: str) -> Peer:
    """Stands for a peer that could not be set up: its first call, which is not timed, says why."""

    def call(x: Tensor, weight: None) -> Tensor:
        raise RuntimeError(reason)

    return Peer(call, [None], 0, torch.float16)


def _with_sums(x: Tensor) -> Rows:
    rows: Any = importlib.import_module("kernels.gpu.rows")
    return Rows(x, rows.sum_rows(x) if len(x) <= MAX_DECODE_ROWS else None)


def _gemlite_peer(levels: Tensor, scales: Tensor, int4_bytes: int) -> Peer:
    """gemlite as its README says, with the tiles that it chooses by itself."""
    gemlite: Any = importlib.import_module("gemlite.core")  # asks for a GPU when it is imported

    def layer() -> Any:
        made = gemlite.GemLiteLinear(
            4,
            group_size=GROUP_SIZE,
            in_features=levels.shape[1],
            out_features=levels.shape[0],
            input_dtype=gemlite.DType.FP16,
            output_dtype=gemlite.DType.FP16,
        )
        made.pack(levels, scales, torch.full_like(scales, 8), None)
        return made

    weights = copies(layer, int4_bytes, "cuda")
    return Peer(lambda x, layer: layer(x), weights, int4_bytes, torch.float16)


TORCHS = "torch's int4 op, bfloat16"
PEERS = {"cpu": cpu_peers, "cuda": cuda_peers, "interpreter": cuda_peers}


def check(name: str, peer: Peer, x: Tensor, expected: Tensor) -> float:
    """Relative norm error of the first rows against float64; SystemExit if it is too large to be worth timing."""
    y = peer.call(peer.prepare(x.to(peer.dtype)), peer.weights[0])[:CHECKED_ROWS]
    error = float((y.double() - expected[: len(y)]).norm() / expected[: len(y)].norm())
    if not error < TOLERANCE[peer.dtype]:
        raise SystemExit(f"{name} at {len(x)} rows is off by {error:.1e}, allowed is {TOLERANCE[peer.dtype]:.1e}")
    return error


def bench_shape(
    shape: tuple[int, int],
    rows: list[int],
    *,
    device: str,
    rounds: int,
    seconds: float,
    copy_rate: float | None = None,
) -> Iterator[dict[str, Any]]:
    """One record per number of rows: every peer's timing, error, GB/s and speed relative to the device's baseline.

    copy_rate: GB/s of a copy of the device's memory, of which each peer's share is then given. A peer that cannot run
    here is left out and stands under "missing" with the reason.
    """
    where = "cuda" if device == "cuda" else "cpu"
    weight = random_weight(*shape, where)
    peers = PEERS[device](weight, device)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(max(rows), shape[0], generator=generator)
    # exact in bfloat16 too, so that one reference serves every dtype
    inputs = inputs.bfloat16().float().to(where)
    expected = inputs[:CHECKED_ROWS].double() @ weight.dequantize().double().T
    del weight
    missing: dict[str, str] = {}
    for count in rows:
        x = inputs[:count]
        errors: dict[str, float] = {}
        for name, peer in list(peers.items()):
            try:
                errors[name] = check(name, peer, x, expected)
            except (RuntimeError, NotImplementedError, SystemExit) as error:
                if name in (OURS, BASELINE[device]) or isinstance(error, torch.OutOfMemoryError):
                    raise
                missing[name] = str(error).splitlines()[0]
                del peers[name]
        timings = _time({name: peers[name] for name in errors}, x, device=device, rounds=rounds, seconds=seconds)
        baseline = timings[BASELINE[device]].median_ms
        record: dict[str, Any] = {"in_features": shape[0], "out_features": shape[1], "rows": count, "peers": {}}
        for name, timing in timings.items():
            rate = peers[name].bytes_read / timing.median_ms / 1e6
            record["peers"][name] = asdict(timing) | {
                "error": errors[name],
                "gb_per_s": rate,
                "speed": baseline / timing.median_ms,
            }
            if copy_rate is not None:
                flops = 2 * count * shape[0] * shape[1]
                record["peers"][name] |= {
                    "share_of_copy": rate / copy_rate,
                    "tflop_per_s": flops / timing.median_ms / 1e9,
                }
        yield record | ({"missing": dict(missing)} if missing else {})


def _time(peers: dict[str, Peer], x: Tensor, *, device: str, rounds: int, seconds: float) -> dict[str, Timing]:
    if device != "cuda":
        return measure({name: _call(peer, x) for name, peer in peers.items()}, rounds=rounds, seconds=seconds)
    replays, calls = {}, {}
    for name, peer in peers.items():
        # with many rows a call is long, and does not profit from a cache
        calls[name] = max(len(peer.weights), 16) if len(x) <= 64 else min(len(peer.weights), 4)
        replays[name] = in_one_graph([_call(peer, x)] * calls[name])
    timings = measure_on_device(replays, rounds=rounds, seconds=seconds)
    return {name: timing.of_one(calls[name]) for name, timing in timings.items()}


def _call(peer: Peer, x: Tensor) -> Callable[[], object]:
    x, weights = peer.prepare(x.to(peer.dtype)), cycle(peer.weights)
    return lambda: peer.call(x, next(weights))


def bench_layer(
    count: int,
    *,
    rounds: int,
    seconds: float,
    copy_rate: float | None,
    device: str = "cuda",
    projections: Sequence[Projection] = LAYER,
) -> dict[str, Any]:
    """The four projections of a layer as the runtime launches them, norm, bias, SwiGLU and residual included.

    Each in a graph of its own over weights that outgrow the caches; "layer_us" is their sum. On the CPU: interpreted.
    """
    calls: dict[str, Callable[[], object]] = {}
    parts: dict[str, dict[str, Any]] = {}
    for projection in projections:
        problem = Problem.random(projection, count, device=device)
        error = problem.error()
        if not error < problem.tolerance:
            raise SystemExit(
                f"{projection.name} at {count} rows is off by {error:.1e}, allowed is {problem.tolerance:.1e}"
            )
        number = 1
        if device == "cuda":
            number = -(-OUTGROWS_CACHES["cuda"] // problem.bytes_read) if count <= 64 else 4
        problems = [problem, *(problem.another_weight(seed) for seed in range(1, number))]
        parts[projection.name] = {"error": error, "calls": number, "bytes": problem.bytes_read}
        runs = [problem.run for problem in problems]
        calls[projection.name] = in_one_graph(runs) if device == "cuda" else runs[0]
    timer = measure_on_device if device == "cuda" else measure
    for name, timing in timer(calls, rounds=rounds, seconds=seconds).items():
        part, one = parts[name], timing.of_one(parts[name]["calls"])
        part |= {"us": 1000 * one.median_ms, "low_us": 1000 * one.low_ms, "high_us": 1000 * one.high_ms}
        part["gb_per_s"] = part["bytes"] / part["us"] / 1e3
        if copy_rate is not None:
            part["share_of_copy"] = part["gb_per_s"] / copy_rate
    return {"rows": count, "layer_us": sum(part["us"] for part in parts.values()), "projections": parts}


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: per shape and rows, each peer's median and quartiles in ms, and speed relative to the baseline."""
    names = list(records[0]["peers"])
    shares = "share_of_copy" in records[0]["peers"][OURS]
    last = " | int4 GB/s | of copy | int4 speed |" if shares else " | int4 GB/s | int4 speed |"
    lines = ["| K x N | rows | " + " | ".join(f"{name}, ms" for name in names) + last]
    lines.append("| --- " * (len(names) + (5 if shares else 4)) + "|")
    for record in records:
        peers = record["peers"]
        cells = [
            str(Timing(*(peers[n][f] for f in ("median_ms", "low_ms", "high_ms", "rounds")))) if n in peers else ""
            for n in names
        ]
        ours = peers[OURS]
        share = f" | {ours['share_of_copy']:.2f}" if shares else ""
        head = f"| {record['in_features']} x {record['out_features']} | {record['rows']} | "
        lines.append(head + " | ".join(cells) + f" | {ours['gb_per_s']:.1f}{share} | {ours['speed']:.2f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Parse, measure, print, save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.int4_gemm", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--all", action="store_true", help="the model's other three shapes too")
    parser.add_argument("--rows", type=int, nargs="+", help="rows of x (default: 1 to 512, on CUDA to 2,048)")
    parser.add_argument("--rounds", type=int, help="calls of each candidate that count (default: 15, on CUDA 50)")
    parser.add_argument("--seconds", type=float, default=3.0, help="at most, per candidate and rows (default: 3)")
    parser.add_argument("--json", type=Path, help="save the figures, with machine, versions, commit and date")
    args = parser.parse_args(arguments)
    on_cuda = args.device == "cuda"
    if on_cuda and not torch.cuda.is_available():
        parser.error("no CUDA device is here; use --device cpu")
    rows, shapes = args.rows or (CUDA_ROWS if on_cuda else ROWS), CUDA_SHAPES if on_cuda else SHAPES
    rounds, baseline = args.rounds or (50 if on_cuda else 15), BASELINE[args.device]
    copy_rate = copy_gb_per_s() if on_cuda else None
    machine = describe_machine(args.device)
    records, layers = [], []
    with torch.inference_mode():
        for shape in shapes if args.all else shapes[:1]:
            bench = bench_shape(
                shape, rows, device=args.device, rounds=rounds, seconds=args.seconds, copy_rate=copy_rate
            )
            for record in bench:
                speed = record["peers"][OURS]["speed"]
                print(f"{shape[0]} x {shape[1]}, {record['rows']} rows: {speed:.2f} of {baseline}", file=sys.stderr)
                records.append(record)
        for count in (1, 16) if copy_rate is not None else ():
            layers.append(bench_layer(count, rounds=rounds, seconds=args.seconds, copy_rate=copy_rate))
    print(f"{machine['device']}, {machine['threads']} of {machine['cores']} cores, torch {torch.__version__}\n")
    print(f"Median (quartiles); speed is relative to {baseline} in the same run.\n")
    print(table(records))
    for layer in layers:
        print(f"\nA layer's four projections, {layer['rows']} rows: {layer['layer_us']:.1f} us")
    if args.json:
        result = {"benchmark": "int4_gemm", "group_size": GROUP_SIZE, **machine, "records": records}
        if on_cuda:
            result |= {"copy_gb_per_s": copy_rate, "layers": layers}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
