"""rotary_attention against torch's attention.

Decoding one token at several contexts and batches, with a float16 and an int8 cache, and prefill from an empty cache.
Every candidate is checked against float64, then timed over enough KV caches to exceed L2, all calls of a round in one
CUDA graph: as in a model, where each layer has its cache and no call waits for Python.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernels.problem import attention_error, expect_below, random_attention, random_cache
from benchmarks.kernels.timing import OUTGROWS_CACHES, measure
from kernels import AttentionArgs, rotary_attention, rotate

MAX_COPIES = 64
# relative norm error against float64 over the same cache; torch rounds q, k and p to float16
TOLERANCE = 2e-3
CHECKED_HEADS = 2  # of the first and the last sequence
Candidate = Callable[[AttentionArgs], Tensor]


@dataclass(frozen=True)
class Shapes:
    """What is measured; by default Qwen-7B's attention."""

    heads: int = 32
    dim: int = 128
    contexts: tuple[int, ...] = (2048, 256, 8192)  # the most informative first
    batches: tuple[int, ...] = (1, 4, 16)
    prompts: tuple[int, ...] = (256, 512, 1024, 2048)


TINY = Shapes(heads=2, dim=32, contexts=(40,), batches=(2,), prompts=(20,))


def separate(args: AttentionArgs, *, backend: SDPBackend | None) -> Tensor:
    """Rotary and append in torch, then torch's attention; backend None: torch's choice."""
    q, k = rotate(args.q, args.cos, args.sin), rotate(args.k, args.cos, args.sin)
    args.k_cache[:, :, -q.shape[1] :] = k.transpose(1, 2)
    args.v_cache[:, :, -q.shape[1] :] = args.v.transpose(1, 2)
    return alone(args, q=q, backend=backend)


def alone(args: AttentionArgs, *, q: Tensor, backend: SDPBackend | None) -> Tensor:
    """torch's attention of a rotated q over a cache that already has the new tokens."""
    context: AbstractContextManager[Any] = nullcontext() if backend is None else sdpa_kernel(backend)
    with context:
        causal = q.shape[1] > 1
        out = F.scaled_dot_product_attention(q.transpose(1, 2), args.k_cache, args.v_cache, is_causal=causal)
    return out.transpose(1, 2)


def candidates(args: AttentionArgs, device: str) -> dict[str, Candidate]:
    """By name, implementations of the attention of `args`, whose tokens end the cache; "int8": over an int8 cache."""
    ours = partial(rotary_attention, backend="triton")
    calls: dict[str, Candidate] = {"rotary_attention": ours, "rotary_attention, int8": ours}
    backends: dict[str, SDPBackend | None] = {"sdpa": None}
    if device == "cuda":
        backends = {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa cudnn": SDPBackend.CUDNN_ATTENTION}
    q = rotate(args.q, args.cos, args.sin)
    for label, kind in backends.items():
        calls[f"rotary, append, {label}"] = partial(separate, backend=kind)
        calls[f"{label} alone"] = partial(alone, q=q, backend=kind)
    return calls


def check(name: str, out: Tensor, args: AttentionArgs) -> float:
    """The largest relative norm error; SystemExit if it exceeds the tolerance."""
    error = max(attention_error(out, args, sequence, CHECKED_HEADS) for sequence in {0, len(out) - 1})
    return expect_below(error, TOLERANCE, f"{name} at {tuple(out.shape)}")


def records(
    device: str, *, tiny: bool, rounds: int, seconds: float, copy_rate: float | None
) -> Iterator[dict[str, Any]]:
    """One record per decode step and per prompt, yielded when measured: every candidate's microseconds per call.

    "missing" has the reason why a candidate cannot run here; "skipped" is in a record that does not fit into memory.
    """
    shapes = TINY if tiny else Shapes()
    tasks = [("decode", batch, context) for batch in shapes.batches for context in shapes.contexts]
    tasks[len(shapes.contexts) : len(shapes.contexts)] = [("prefill", 1, length) for length in shapes.prompts]
    for kind, batch, context in tasks:
        record: dict[str, Any] = {"kind": kind, "batch": batch, "context": context, "copy_gb_per_s": copy_rate}
        length = 1 if kind == "decode" else context
        try:
            peers, missing = _measure(shapes, batch, length, context - length, device, rounds, seconds)
        except torch.OutOfMemoryError as error:
            yield record | {"skipped": f"does not fit into memory: {error}".split(". ")[0]}
            continue
        for peer in peers.values():
            if kind == "decode":
                peer["gb_per_s"] = peer["bytes"] / peer["us"] / 1e3
                if copy_rate:
                    peer["share_of_copy"] = peer["gb_per_s"] / copy_rate
            else:
                flops = 4 * batch * shapes.heads * shapes.dim * length * (length + 1) / 2
                peer["tflop_per_s"] = flops / peer["us"] / 1e6
        yield record | {"peers": peers, "missing": missing}


def _measure(
    shapes: Shapes, batch: int, length: int, start: int, device: str, rounds: int, seconds: float
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    heads, dim, capacity = shapes.heads, shapes.dim, start + length
    size = 4 * batch * heads * dim * capacity  # bytes of a float16 cache
    count = max(2, min(MAX_COPIES, OUTGROWS_CACHES // size if device == "cuda" else 2))
    first = random_attention(heads, dim, capacity, [start] * batch, length, device=device, int8=False)
    copies = {False: [first], True: []}
    for int8, seeds in ((False, range(1, count)), (True, range(2 * count))):
        for seed in seeds:
            cache = random_cache(batch, heads, capacity, dim, device=device, int8=int8, seed=seed)
            copies[int8].append(replace(first, **cache))
    peers: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    calls: dict[str, list[Callable[[], object]]] = {}
    for name, call in candidates(first, device).items():
        mine = copies["int8" in name]
        try:
            out = call(mine[0])
        except RuntimeError as reason:
            if isinstance(reason, torch.OutOfMemoryError):
                raise
            missing[name] = str(reason).splitlines()[0]
            continue
        error = check(name, out, mine[0])
        calls[name] = [partial(call, one) for one in mine]
        peers[name] = {"error": error, "bytes": cache_bytes(mine[0]), "calls": len(mine)}
    for name, timing in measure(calls, device=device, rounds=rounds, seconds=seconds).items():
        peers[name] |= timing.us() | {"rounds": timing.rounds}
    return peers, missing


def cache_bytes(args: AttentionArgs) -> int:
    """Read for one decoded token."""
    parts = (args.k_cache, args.v_cache, args.k_scales, args.v_scales)
    return sum(part.nbytes for part in parts if part is not None)
