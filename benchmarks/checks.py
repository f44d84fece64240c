"""Correctness of every GPU kernel on the device at hand, with torch alone: what benchmarks.gpu runs before it times."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.decode_step import decoder_config
from benchmarks.projections import HEAD, LAYER, Problem, Projection
from kernels import AttentionArgs, dequantize_rows, quantize_rows, rotary_attention
from kernels.gpu.tiles import Tile
from qvl_edge.model.cache import KVCache
from qvl_edge.model.fused import FusedDecoder

# odd sizes: the last tile and the last chunk are not full; fused forms need multiples of 32
ODD = (
    Projection("odd, bias and norm", 416, 200, norm=True, bias=True),
    Projection("odd, zeros in groups of 32", 384, 136, zeros=True, group=32),
    Projection("odd, zeros in groups of 64", 256, 72, zeros=True, group=64),
    Projection("odd, one group", 384, 136, group=384),
    Projection("odd, SwiGLU", 256, 192, epilogue="swiglu", norm=True),
    Projection("odd, residual", 416, 160, epilogue="residual", bias=True),
)
ODD_HEAD = Projection("odd int8", 416, 200, bits=8, group=416)
# relative norm error against float64: q and k are rotated into float16, p is float16 in a prefill
ATTENTION_TOLERANCE = 2e-3
# of a row's largest number: float16's rounding; half a level of 127, and a scale that is rounded to float16
STORED_TOLERANCE = {False: 1e-3, True: 0.6 / 127}
# against the same decoder by definition: 2 blocks whose rows are rounded to 16 bits in other places
DECODER_TOLERANCE = 1e-2


def check_gemm(device: str, tiny: bool) -> Iterator[dict[str, Any]]:
    """Every form and both kernels, with the tiles of the tables and with splits; on a GPU the full shapes too."""
    half = torch.float16
    for projection in ODD:
        for count in (1, 12, 17) if tiny else (1, 16, 17, 300):
            yield _problem(projection, count, half, device)
    for projection in (ODD[0], *ODD[-2:]):
        yield _problem(projection, 5, half, device, Tile(8, 64, 3, 2, 3))
    for count in (1, 12):
        yield _problem(ODD_HEAD, count, half, device)
    if device == "cuda":  # the interpreter knows no bfloat16
        for projection in ODD[:3]:
            for count in (3, 12, 70):
                yield _problem(projection, count, torch.bfloat16, device)
    if not tiny:
        for projection in LAYER:
            for count in (1, 16, 300):
                yield _problem(projection, count, half, device)
        for count in (1, 16):
            yield _problem(HEAD, count, half, device)


def _problem(
    projection: Projection, count: int, dtype: torch.dtype, device: str, tile: Tile | None = None
) -> dict[str, Any]:
    """Against float64; equal calls give equal bits, and the locks are zero again."""
    name = f"{projection.name}, {count} rows, {str(dtype).removeprefix('torch.')}" + (", split" if tile else "")
    problem = Problem.random(projection, count, dtype=dtype, device=device)
    allowed = problem.tolerance
    if dtype == torch.bfloat16 and count > 16:
        allowed *= 1.5  # the weight is rounded to bfloat16 twice: scaled, and its scale
    try:
        error = problem.error(tile)
        repeats = problem.residual is not None or torch.equal(problem.run(tile).x, problem.run(tile).x)
    except Exception as raised:  # one form that does not compile should not hide the others
        return {"check": name, "error": None, "allowed": allowed, "holds": False, "raised": str(raised)[:500]}
    record = _record(name, error, allowed)
    return record | {"holds": record["holds"] and repeats and not bool(problem.weight.locks.any())}


def _record(name: str, error: float, allowed: float) -> dict[str, Any]:
    return {"check": name, "error": error, "allowed": allowed, "holds": error < allowed}


def check_attention(device: str, tiny: bool) -> Iterator[dict[str, Any]]:
    """Decode and prefill on top of a cache, sequences at unequal positions, float16 and int8 caches."""
    heads, dim, capacity = (2, 32, 64) if tiny else (4, 128, 700)
    starts = (0, 5, 41) if tiny else (0, 333, 640)
    for int8 in (False, True):
        for length in (1, 7) if tiny else (1, 16, 50):
            yield from _attention(device, heads, dim, capacity, starts, length, int8)


def _attention(
    device: str, heads: int, dim: int, capacity: int, starts: tuple[int, ...], length: int, int8: bool
) -> Iterator[dict[str, Any]]:
    generator = torch.Generator(device).manual_seed(2)
    batch = len(starts)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    q, k, v = normal(batch, length, 3, heads, dim).half().unbind(2)
    angles = normal(batch, length, dim // 2) * 3
    angles = torch.cat((angles, angles), -1)
    cos, sin, q_scale = angles.cos(), angles.sin(), 1 + normal(batch, length).abs() / 4
    k_cache, v_cache = (normal(batch, heads, capacity, dim).half() for _ in range(2))
    k_scales = v_scales = None
    if int8:
        (k_cache, k_scales), (v_cache, v_scales) = quantize_rows(k_cache), quantize_rows(v_cache)
    start = torch.tensor(starts, device=device)
    args = AttentionArgs(
        q, k, v, cos, sin, k_cache, v_cache, start, q_scale=q_scale, k_scales=k_scales, v_scales=v_scales
    )
    out = rotary_attention(args, backend="triton")
    if k_scales is not None and v_scales is not None:
        k_cache, v_cache = dequantize_rows(k_cache, k_scales), dequantize_rows(v_cache, v_scales)

    def rotated(x: Tensor) -> Tensor:
        x = x.double()
        turned = torch.cat((-x[..., dim // 2 :], x[..., : dim // 2]), -1)
        return x * cos[:, :, None].double() + turned * sin[:, :, None].double()

    queries, keys = rotated(q) * q_scale[:, :, None, None].double(), rotated(k)
    error = stored = 0.0
    for b, begin in enumerate(starts):
        end = begin + length
        # over the cache as the kernel left it; that what it appended is right is seen separately
        logits = torch.einsum("thd,hnd->htn", queries[b], k_cache[b, :, :end].double()) / math.sqrt(dim)
        seen = torch.arange(end, device=device) <= begin + torch.arange(length, device=device)[:, None]
        weights = logits.masked_fill(~seen, -math.inf).softmax(-1)
        expected = torch.einsum("htn,hnd->thd", weights, v_cache[b, :, :end].double())
        error = max(error, float((out[b].double() - expected).norm() / expected.norm()))
        for cache, row in ((k_cache, keys[b]), (v_cache, v[b].double())):
            off = (cache[b, :, begin:end].transpose(0, 1) - row).abs().amax(-1) / row.abs().amax(-1)
            stored = max(stored, float(off.max()))
    name = f"attention, {length} tokens on top of {starts}, {'int8' if int8 else 'float16'} cache"
    yield _record(name, error, ATTENTION_TOLERANCE)
    yield _record(f"{name}: what is appended", stored, STORED_TOLERANCE[int8])


@torch.inference_mode()
def check_decoder(device: str, tiny: bool) -> Iterator[dict[str, Any]]:
    """A small decoder's logits, prompt and two steps, by the kernels and by their definitions on the same device."""
    del tiny
    config = decoder_config(tiny=True)
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
        error = max(float((one - other).double().norm() / other.double().norm()) for one, other in pairs)
        yield _record(f"decoder, {head} head", error, DECODER_TOLERANCE)


CHECKS = (check_gemm, check_attention, check_decoder)
