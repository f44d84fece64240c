"""rotary_attention against torch's attention, in one run: python -m benchmarks.rotary_attention [--json FILE]

Decoding one token at several contexts and batches, with a float16 and an int8 cache, and prefill from an empty cache.
Every candidate is checked against float64 before it is timed. A candidate is timed over as many separate caches as
outgrow the device's own, all calls of a round captured into one CUDA graph: in a model, too, each layer has its cache,
and no call waits for Python. `--device cpu --tiny` shows on small shapes, in Triton's interpreter, that it all runs.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.timing import copy_gb_per_s, in_one_graph, measure, measure_on_device
from kernels import AttentionArgs, dequantize_rows, quantize_rows, rotary_attention, rotate
from qvl_edge.machine import describe_machine, use_device

OUTGROWS_CACHES = 512 * 2**20  # bytes of caches in turn; the largest L2, an RTX PRO 6000's, holds 128 MiB
MOST_COPIES = 64
# relative norm error against float64, over the cache as it is; torch rounds q, k and p to float16 on its way
TOLERANCE = 2e-3
CHECKED_HEADS = 2  # of the first and the last sequence
OURS, OURS_INT8 = "rotary_attention", "rotary_attention, int8"


@dataclass(frozen=True)
class Shapes:
    """What is measured; Qwen-7B's attention unless tiny."""

    heads: int = 32
    dim: int = 128
    contexts: tuple[int, ...] = (2048, 256, 8192)  # the most telling first
    batches: tuple[int, ...] = (1, 4, 16)
    prompts: tuple[int, ...] = (256, 512, 1024, 2048)


TINY = Shapes(heads=2, dim=32, contexts=(40,), batches=(2,), prompts=(20,))


@dataclass(frozen=True)
class Inputs:
    """One layer's call: `length` tokens of each sequence, after `start` that are cached."""

    q: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    start: Tensor
    locks: Tensor
    begin: int  # what start holds, as torch has to know on the host


@dataclass(frozen=True)
class Cache:
    """One layer's keys and values (B, H, capacity, D), with scales if int8."""

    k: Tensor
    v: Tensor
    k_scales: Tensor | None = None
    v_scales: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Read by one decoded token."""
        return sum(x.nbytes for x in (self.k, self.v, self.k_scales, self.v_scales) if x is not None)

    def floats(self, sequence: int) -> tuple[Tensor, Tensor]:
        """The first heads of one sequence in float64."""
        rows = []
        for levels, scales in ((self.k, self.k_scales), (self.v, self.v_scales)):
            part = levels[sequence, :CHECKED_HEADS]
            rows.append(
                part.double() if scales is None else dequantize_rows(part, scales[sequence, :CHECKED_HEADS]).double()
            )
        return rows[0], rows[1]


def make_inputs(shapes: Shapes, batch: int, length: int, start: int, device: str) -> Inputs:
    """Random tokens at positions from `start` on; q, k and v are views of one tensor, as a projection makes them."""
    generator = torch.Generator(device).manual_seed(0)
    heads, dim = shapes.heads, shapes.dim
    qkv = torch.randn(batch, length, 3, heads, dim, generator=generator, device=device).half()
    positions = torch.arange(start, start + length, device=device).double()
    angles = positions[:, None] * 10000.0 ** (-torch.arange(0, dim, 2, device=device).double() / dim)
    angles = torch.cat((angles, angles), -1).expand(batch, length, dim).contiguous()
    starts = torch.full((batch,), start, device=device)
    locks = torch.zeros(batch * heads, dtype=torch.int32, device=device)
    q, k, v = qkv.unbind(2)
    return Inputs(q, k, v, angles.cos().float(), angles.sin().float(), starts, locks, start)


def make_cache(shapes: Shapes, batch: int, capacity: int, device: str, *, int8: bool, seed: int) -> Cache:
    """Random keys and values."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (batch, shapes.heads, capacity, shapes.dim)
    k, v = (torch.randn(shape, generator=generator, device=device, dtype=torch.float16) for _ in range(2))
    if not int8:
        return Cache(k, v)
    (k, k_scales), (v, v_scales) = quantize_rows(k), quantize_rows(v)
    return Cache(k, v, k_scales, v_scales)


def ours(inputs: Inputs, cache: Cache) -> Tensor:
    """The kernels of this project."""
    args = AttentionArgs(
        inputs.q, inputs.k, inputs.v, inputs.cos, inputs.sin, cache.k, cache.v, inputs.start,
        k_scales=cache.k_scales, v_scales=cache.v_scales, locks=inputs.locks,
    )  # fmt: skip
    return rotary_attention(args, backend="triton")


def separate(inputs: Inputs, cache: Cache, *, begin: int, backend: SDPBackend | None) -> Tensor:
    """Rotary and append in torch, then torch's attention by `backend`, torch's own choice if None."""
    q, k = rotate(inputs.q, inputs.cos, inputs.sin), rotate(inputs.k, inputs.cos, inputs.sin)
    end = begin + q.shape[1]
    cache.k[:, :, begin:end] = k.transpose(1, 2)
    cache.v[:, :, begin:end] = inputs.v.transpose(1, 2)
    return alone(q, cache, end=end, backend=backend)


def alone(q: Tensor, cache: Cache, *, end: int, backend: SDPBackend | None) -> Tensor:
    """torch's attention only, of a rotated q over a cache that holds the new tokens."""
    context: AbstractContextManager[Any] = nullcontext() if backend is None else sdpa_kernel(backend)
    with context:
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), cache.k[:, :, :end], cache.v[:, :, :end], is_causal=q.shape[1] > 1
        )
    return out.transpose(1, 2)


def candidates(inputs: Inputs, device: str) -> dict[str, Callable[[Cache], Tensor]]:
    """Everything that computes this attention, by name; those with int8 in it take an int8 cache."""
    begin = inputs.begin
    calls: dict[str, Callable[[Cache], Tensor]] = {
        OURS: partial(ours, inputs),
        OURS_INT8: partial(ours, inputs),
    }
    kinds = (
        {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION} if device == "cuda" else {"": None}
    )
    q = rotate(inputs.q, inputs.cos, inputs.sin)
    for name, kind in kinds.items():
        label = f"sdpa {name}".strip()
        calls[f"rotary, append, {label}"] = partial(separate, inputs, begin=begin, backend=kind)
        calls[f"{label} alone"] = partial(alone, q, end=begin + q.shape[1], backend=kind)
    return calls


def expected_output(inputs: Inputs, cache: Cache, sequence: int) -> Tensor:
    """(T, CHECKED_HEADS, D) float64, over a cache that holds the new tokens."""
    q = inputs.q[sequence, :, :CHECKED_HEADS].double()
    q1, q2 = q.chunk(2, -1)
    cos, sin = inputs.cos[sequence].double(), inputs.sin[sequence].double()
    q = q * cos[:, None] + torch.cat((-q2, q1), -1) * sin[:, None]
    keys, values = cache.floats(sequence)
    end = inputs.begin + len(q)
    logits = q.transpose(0, 1) @ keys[:, :end].mT / math.sqrt(q.shape[-1])
    seen = torch.arange(end, device=q.device) <= inputs.begin + torch.arange(len(q), device=q.device)[:, None]
    return (logits.masked_fill(~seen, -math.inf).softmax(-1) @ values[:, :end]).transpose(0, 1)


def check(name: str, out: Tensor, inputs: Inputs, cache: Cache) -> float:
    """Largest relative norm error of what is checked; SystemExit if it is too large to be worth timing."""
    error = 0.0
    for sequence in {0, len(out) - 1}:
        expected = expected_output(inputs, cache, sequence)
        difference = (out[sequence, :, :CHECKED_HEADS].double() - expected).norm() / expected.norm()
        error = max(error, float(difference))
    if not error < TOLERANCE:
        raise SystemExit(f"{name} at {tuple(out.shape)} is off by {error:.1e}, allowed is {TOLERANCE:.1e}")
    return error


def round_of(call: Callable[[Cache], object], caches: list[Cache], device: str) -> Callable[[], object]:
    """`call` on each cache in turn; on CUDA a graph's replay."""
    calls = [partial(call, cache) for cache in caches]
    return in_one_graph(calls) if device == "cuda" else lambda: [one() for one in calls]


def records(
    device: str, *, tiny: bool = False, rounds: int = 50, seconds: float = 2.0, shapes: Shapes | None = None
) -> Iterator[dict[str, Any]]:
    """One record per decode step and per prompt, each as soon as it is measured: every candidate's microseconds a call.

    A candidate that cannot run here stands under "missing" with the reason; what does not fit into memory is a record
    with "skipped" in it.
    """
    shapes = shapes or (TINY if tiny else Shapes())
    bandwidth = copy_gb_per_s() if device == "cuda" else None
    tasks = [("decode", batch, context) for batch in shapes.batches for context in shapes.contexts]
    tasks[len(shapes.contexts) : len(shapes.contexts)] = [("prefill", 1, length) for length in shapes.prompts]
    for kind, batch, context in tasks:
        record: dict[str, Any] = {"kind": kind, "batch": batch, "context": context, "copy_gb_per_s": bandwidth}
        length = 1 if kind == "decode" else context
        try:
            peers, missing = _measure(shapes, batch, length, context - length, device, rounds, seconds)
        except torch.OutOfMemoryError as error:
            yield record | {"skipped": f"does not fit into memory: {error}".split(". ")[0]}
            continue
        for peer in peers.values():
            if kind == "decode":
                peer["gb_per_s"] = peer["bytes"] / peer["us"] / 1e3
                if bandwidth:
                    peer["share_of_copy"] = peer["gb_per_s"] / bandwidth
            else:
                flops = 4 * batch * shapes.heads * shapes.dim * length * (length + 1) / 2
                peer["tflop_per_s"] = flops / peer["us"] / 1e6
        yield record | {"peers": peers, "missing": missing}


def _measure(
    shapes: Shapes, batch: int, length: int, start: int, device: str, rounds: int, seconds: float
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    inputs = make_inputs(shapes, batch, length, start, device)
    capacity = start + length
    size = 4 * batch * shapes.heads * shapes.dim * capacity  # bytes of a float16 cache
    count = max(2, min(MOST_COPIES, OUTGROWS_CACHES // size if device == "cuda" else 2))
    caches = {
        int8: [make_cache(shapes, batch, capacity, device, int8=int8, seed=i) for i in range(count * (1 + int8))]
        for int8 in (False, True)
    }
    peers: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    graphs: dict[str, Callable[[], object]] = {}
    for name, call in candidates(inputs, device).items():
        mine = caches["int8" in name]
        try:
            out = call(mine[0])
        except RuntimeError as reason:
            if isinstance(reason, torch.OutOfMemoryError):
                raise
            missing[name] = str(reason).splitlines()[0]
            continue
        error = check(name, out, inputs, mine[0])
        graphs[name] = round_of(call, mine, device)
        peers[name] = {"error": error, "bytes": mine[0].nbytes, "calls": len(mine)}
    timer = measure_on_device if device == "cuda" else measure
    for name, timing in timer(graphs, rounds=rounds, seconds=seconds).items():
        one = timing.of_one(peers[name]["calls"])
        times = {"us": one.median_ms, "low_us": one.low_ms, "high_us": one.high_ms}
        peers[name] |= {key: 1000 * value for key, value in times.items()} | {"rounds": timing.rounds}
    return peers, missing


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: per task, each candidate's microseconds, and ours in share of the copy bandwidth or TFLOP/s."""
    names = list(dict.fromkeys(name for record in results for name in record.get("peers", ())))
    lines = ["| task | " + " | ".join(f"{name}, us" for name in names) + " | ours | ours, int8 |"]
    lines.append("| --- " * (len(names) + 3) + "|")
    for record in results:
        peers = record.get("peers", {})
        cells = [
            f"{peers[n]['us']:.1f} ({peers[n]['low_us']:.1f} to {peers[n]['high_us']:.1f})" if n in peers else ""
            for n in names
        ]
        rates = []
        for name in (OURS, OURS_INT8):
            peer = peers.get(name, {})
            if "gb_per_s" in peer:
                share = f", {peer['share_of_copy']:.2f} of copy" if "share_of_copy" in peer else ""
                rates.append(f"{peer['gb_per_s']:.0f} GB/s{share}")
            else:
                rates.append(f"{peer['tflop_per_s']:.0f} TFLOP/s" if peer else record.get("skipped", ""))
        lines.append(
            f"| {record['kind']} {record['batch']} x {record['context']} | " + " | ".join(cells + rates) + " |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Parse, measure, print, save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rotary_attention", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument("--rounds", type=int, default=50, help="graphs of each candidate that count (default: 50)")
    parser.add_argument("--seconds", type=float, default=2.0, help="at most, per candidate and task (default: 2)")
    parser.add_argument("--json", type=Path, help="save the figures, with machine, versions, commit and date")
    args = parser.parse_args(arguments)
    use_device(parser, args.device, tiny=args.tiny)
    results = []
    with torch.inference_mode():
        for record in records(args.device, tiny=args.tiny, rounds=args.rounds, seconds=args.seconds):
            print(f"{record['kind']} {record['batch']} x {record['context']}", file=sys.stderr)
            results.append(record)
    machine = describe_machine(args.device)
    print(f"{machine['device']}, torch {torch.__version__}\n")
    print("Median (quartiles) of one call; prefill is from an empty cache, decode adds one token.\n")
    print(table(results))
    if args.json:
        args.json.write_text(
            json.dumps({"benchmark": "rotary_attention", **machine, "records": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
