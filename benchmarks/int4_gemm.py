"""int4_gemm against its peers, in one run: python -m benchmarks.int4_gemm --device cpu [--all] [--json FILE]

Every candidate is checked against float64 before it is timed. Weights are kept in as many copies as it takes to outgrow
the caches, and used in turn: in a model the weights of a layer come from memory, not from cache.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import describe_machine
from benchmarks.timing import Timing, measure
from kernels import Int4Weight, int4_gemm, pack_for_cpu, pack_levels
from kernels.int4_gemm_torch import dequantize
from kernels.int4_layout import pack_zeros

# K, N of Qwen-7B's projections: c_attn first, then attn.c_proj, w1 and w2, mlp.c_proj
SHAPES = [(4096, 12288), (4096, 4096), (4096, 11008), (11008, 4096)]
ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
GROUP_SIZE = 128
OUTGROWS_CACHES = 192 * 2**20  # bytes of weights in turn; desktop and server caches end at 32 to 100 MiB
CHECKED_ROWS = 4
# relative norm error against float64: float32 sums over 11,008 channels; bfloat16 weights and outputs
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 6e-3}
FLOAT32, OURS = "float32", "int4"


@dataclass(frozen=True)
class Peer:
    """A way to compute x @ W.T: its call on (x, one copy of its weight), its weights, and what x is to be."""

    call: Callable[[Tensor, Any], Tensor]
    weights: list[Any]
    bytes_read: int  # of one weight, by one call
    dtype: torch.dtype


def random_weight(in_features: int, out_features: int) -> Int4Weight:
    """A symmetric int4 weight as the published checkpoint has them, from random levels."""
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(0, 16, (in_features, out_features), dtype=torch.uint8, generator=generator)
    shape = (in_features // GROUP_SIZE, out_features)
    scales = (0.005 + 0.01 * torch.rand(shape, generator=generator)).half()
    g_idx = torch.arange(in_features, dtype=torch.int32) // GROUP_SIZE
    return Int4Weight.from_gptq(
        pack_levels(levels), pack_zeros(torch.full(shape, 8)), scales, g_idx, group_size=GROUP_SIZE
    )


def copies(make: Callable[[], Any], size: int) -> list[Any]:
    """As many separate copies of a weight of `size` bytes as outgrow the caches."""
    return [make() for _ in range(-(-OUTGROWS_CACHES // size))]


def cpu_peers(weight: Int4Weight) -> dict[str, Peer]:
    """Everything that computes this product on a CPU."""
    dense = dequantize(weight)
    half = dense.bfloat16()
    levels = weight.levels().T.to(torch.int32).contiguous()
    scales = weight.scales.bfloat16()
    scales_and_zeros = torch.stack((scales, torch.zeros_like(scales)), dim=-1)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1)
    int4_bytes = weight.words.nbytes + weight.scales.nbytes

    def operator(x: Tensor, copy: Tensor) -> Tensor:
        result: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, copy, GROUP_SIZE, scales_and_zeros)
        return result

    return {
        FLOAT32: Peer(F.linear, copies(dense.clone, dense.nbytes), dense.nbytes, torch.float32),
        "bfloat16": Peer(F.linear, copies(half.clone, half.nbytes), half.nbytes, torch.bfloat16),
        "torch's int4 op, bfloat16": Peer(operator, copies(packed.clone, packed.nbytes), int4_bytes, torch.bfloat16),
        "definition": Peer(lambda x, w: int4_gemm(x, w, backend="torch"), [weight], int4_bytes, torch.float32),
        OURS: Peer(int4_gemm, copies(lambda: pack_for_cpu(weight), int4_bytes), int4_bytes, torch.float32),
    }


PEERS = {"cpu": cpu_peers}


def check(name: str, peer: Peer, x: Tensor, expected: Tensor) -> float:
    """Relative norm error of the first rows against float64; SystemExit if it is too large to be worth timing."""
    y = peer.call(x.to(peer.dtype), peer.weights[0])[:CHECKED_ROWS]
    error = float((y.double() - expected[: len(y)]).norm() / expected[: len(y)].norm())
    if not error < TOLERANCE[peer.dtype]:
        raise SystemExit(f"{name} at {len(x)} rows is off by {error:.1e}, allowed is {TOLERANCE[peer.dtype]:.1e}")
    return error


def bench_shape(
    shape: tuple[int, int], rows: list[int], *, device: str, rounds: int, seconds: float
) -> Iterator[dict[str, Any]]:
    """One record per number of rows: every peer's timing, error, GB/s and speed relative to float32."""
    weight = random_weight(*shape)
    peers = PEERS[device](weight)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(max(rows), shape[0], generator=generator)
    # exact in bfloat16 too, so that one reference serves every dtype
    inputs = inputs.bfloat16().float()
    expected = inputs[:CHECKED_ROWS].double() @ dequantize(weight).double().T
    for count in rows:
        x = inputs[:count]
        errors = {name: check(name, peer, x, expected) for name, peer in peers.items()}
        calls = {name: _call(peer, x) for name, peer in peers.items()}
        timings = measure(calls, rounds=rounds, seconds=seconds)
        baseline = timings[FLOAT32].median_ms
        yield {
            "in_features": shape[0],
            "out_features": shape[1],
            "rows": count,
            "peers": {
                name: asdict(timing)
                | {
                    "error": errors[name],
                    "gb_per_s": peers[name].bytes_read / timing.median_ms / 1e6,
                    "speed": baseline / timing.median_ms,
                }
                for name, timing in timings.items()
            },
        }


def _call(peer: Peer, x: Tensor) -> Callable[[], object]:
    x, weights = x.to(peer.dtype), cycle(peer.weights)
    return lambda: peer.call(x, next(weights))


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: per shape and rows, each peer's median and quartiles in ms, and speed relative to float32."""
    names = list(records[0]["peers"])
    lines = ["| K x N | rows | " + " | ".join(f"{name}, ms" for name in names) + " | int4 GB/s | int4 speed |"]
    lines.append("| --- " * (len(names) + 4) + "|")
    for record in records:
        peers = record["peers"]
        cells = [str(Timing(*(peers[n][f] for f in ("median_ms", "low_ms", "high_ms", "rounds")))) for n in names]
        ours = peers[OURS]
        head = f"| {record['in_features']} x {record['out_features']} | {record['rows']} | "
        lines.append(head + " | ".join(cells) + f" | {ours['gb_per_s']:.1f} | {ours['speed']:.2f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Parse, measure, print, save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.int4_gemm", description=__doc__)
    parser.add_argument("--device", choices=sorted(PEERS), default="cpu")
    parser.add_argument("--all", action="store_true", help="the model's other three shapes too")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="rows of x (default: 1 to 512)")
    parser.add_argument("--rounds", type=int, default=15, help="calls of each candidate that count (default: 15)")
    parser.add_argument("--seconds", type=float, default=3.0, help="at most, per candidate and rows (default: 3)")
    parser.add_argument("--json", type=Path, help="save the figures, with machine, versions, commit and date")
    args = parser.parse_args(arguments)
    machine = describe_machine()
    records = []
    with torch.inference_mode():
        for shape in SHAPES if args.all else SHAPES[:1]:
            bench = bench_shape(shape, args.rows, device=args.device, rounds=args.rounds, seconds=args.seconds)
            for record in bench:
                speed = record["peers"][OURS]["speed"]
                print(f"{shape[0]} x {shape[1]}, {record['rows']} rows: {speed:.2f} of float32", file=sys.stderr)
                records.append(record)
    print(f"{machine['device']}, {machine['threads']} of {machine['cores']} cores, torch {torch.__version__}\n")
    print("Median (quartiles); speed is relative to float32 in the same run.\n")
    print(table(records))
    if args.json:
        result = {"benchmark": "int4_gemm", "group_size": GROUP_SIZE, **machine, "records": records}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
