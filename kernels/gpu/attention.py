"""rotary_attention on the GPU: one launch for a decode step, two (append, attend) for a chunk of tokens.

All kernels read positions from `start` on the device, so that a CUDA graph replays them at any position, and none
writes outside the cache: a sequence that would not fit gets NaN as its output and writes nothing. Softmax is in base 2;
its logits are scaled where q is rotated. An int8 cache is multiplied as it is: the scale of a key goes into the logit,
that of a value into the probability.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.gpu.parts import dot, halves
from kernels.gpu.tiles import device_key
from kernels.int8 import MIN_CACHE_SCALE
from kernels.reference import AttentionArgs

LOWEST = tl.constexpr(-3.0e38)  # the maximum of nothing: unlike -inf, it can be subtracted from itself
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves a float32 no fraction, rounded half to even
MIN_SCALE = tl.constexpr(MIN_CACHE_SCALE)
# keeps p * v_scale out of float16's subnormal numbers; the largest scale of a float16 row, 65,504 / 127, stays finite
LIFT = tl.constexpr(64.0)

MAX_SPLITS = 32  # the last program of a head merges this many parts at once, in registers
PROGRAMS_PER_SM = 4  # of the decode kernel: as many as run at once with an int8 cache
HEAD_DIMS = (16, 32, 64, 128)
APPEND = {"BLOCK_T": 16, "num_warps": 4, "num_stages": 1}  # how `append_kernel` is launched


@triton.jit
def _rotate(x, partner, cos, sin, d, D: tl.constexpr):
    """x cos + [-x2, x1] sin in float32; partner is x with its halves exchanged."""
    return x.to(tl.float32) * cos + tl.where(d < D // 2, -partner.to(tl.float32), partner.to(tl.float32)) * sin


@triton.jit
def _rotated(x_ptr, X_T, cos_ptr, sin_ptr, b, token, T, D: tl.constexpr):
    """Tokens (BLOCK,) of one head of sequence b, whose token 0 is at x_ptr -> (BLOCK, D) float32."""
    d = tl.arange(0, D)
    partner = (d + D // 2) % D
    place = token.to(tl.int64)[:, None] * X_T
    angle = (b * T + token)[:, None] * D + d[None, :]
    x, other = tl.load(x_ptr + place + d[None, :]), tl.load(x_ptr + place + partner[None, :])
    return _rotate(x, other, tl.load(cos_ptr + angle), tl.load(sin_ptr + angle), d[None, :], D)


@triton.jit
def _scale(x, AXIS: tl.constexpr):
    """The int8 scale of rows of x in float32 (int8.quantize_rows), as float16."""
    return tl.maximum(tl.max(tl.abs(x), AXIS) / 127.0, MIN_SCALE).to(tl.float16)


@triton.jit
def _levels(x, scale):
    """x / scale rounded half to even, as int8."""
    return ((x / scale.to(tl.float32) + ROUNDER) - ROUNDER).to(tl.int32).to(tl.int8)


@triton.jit
def _head(ptr, b, h, STRIDE_B, STRIDE_H):
    """Where head h of sequence b begins."""
    return ptr + (b.to(tl.int64) * STRIDE_B + h * STRIDE_H)


@triton.jit
def _floats(words, SHAPE: tl.constexpr, CACHE: tl.constexpr):
    """words (..., W) int32 as loaded from a cache -> SHAPE float32: the numbers in them, or 1152 + level for int8.

    A byte becomes the low end of 1024 as float16, which takes one operation for two of them. Converting integers takes
    one each, on a pipe too slow for the memory bandwidth of an H200.
    """
    if CACHE == tl.int8:
        even = halves((words & 0x00FF00FF) ^ 0x64806480, tl.float16)
        odd = halves(((words >> 8) & 0x00FF00FF) ^ 0x64806480, tl.float16)
        x = tl.join(even, odd).to(tl.float32)
    elif CACHE == tl.bfloat16:
        x = tl.join((words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True))
    else:
        x = halves(words, tl.float16).to(tl.float32)
    return tl.reshape(x, SHAPE)


@triton.jit
def decode_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, k_cache_ptr, v_cache_ptr, k_scales_ptr, v_scales_ptr, start_ptr,
    q_scale_ptr, out_ptr, sums_ptr, parts_ptr, stats_ptr, locks_ptr,
    H, CAPACITY,
    Q_B, Q_H, K_B, K_H, V_B, V_H, CACHE_B, CACHE_H, SCALES_B, SCALES_H,
    D: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
    SCALE: tl.constexpr,
):  # fmt: skip
    """One program attends to one of SPLITS parts of a head's cache; the last one to finish merges all.

    Tiles are (STEPS, LANES, D): every thread keeps a softmax of its own over the STEPS positions that it reads at once,
    so threads exchange nothing before the end. The last split adds the new token, from registers, and appends it.
    """
    INT8: tl.constexpr = k_scales_ptr is not None
    h, b, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    d = tl.arange(0, D)
    partner = (d + D // 2) % D
    start = tl.load(start_ptr + b)
    fits = (start >= 0) & (start < CAPACITY)
    length = tl.where(fits, start, 0).to(tl.int32)

    cos, sin = tl.load(cos_ptr + b * D + d), tl.load(sin_ptr + b * D + d)
    q_ptr, k_ptr, v_ptr = _head(q_ptr, b, h, Q_B, Q_H), _head(k_ptr, b, h, K_B, K_H), _head(v_ptr, b, h, V_B, V_H)
    q = _rotate(tl.load(q_ptr + d), tl.load(q_ptr + partner), cos, sin, d, D)
    factor = SCALE
    if q_scale_ptr is not None:
        factor = tl.load(q_scale_ptr + b) * SCALE
    q *= factor
    k_head = k_cache_ptr + b.to(tl.int64) * CACHE_B + h.to(tl.int64) * CACHE_H
    v_head = v_cache_ptr + b.to(tl.int64) * CACHE_B + h.to(tl.int64) * CACHE_H
    if INT8:
        k_scales = _head(k_scales_ptr, b, h, SCALES_B, SCALES_H)
        v_scales = _head(v_scales_ptr, b, h, SCALES_B, SCALES_H)

    owner = split == SPLITS - 1
    new_m = LOWEST
    new_v = tl.zeros((D,), tl.float32)
    if owner:
        k = _rotate(tl.load(k_ptr + d), tl.load(k_ptr + partner), cos, sin, d, D).to(q_ptr.dtype.element_ty)
        v = tl.load(v_ptr + d)
        place = length * D + d
        kept = fits & (d < D)
        if INT8:
            k_scale, v_scale = _scale(k.to(tl.float32), 0), _scale(v.to(tl.float32), 0)
            k_level, v_level = _levels(k.to(tl.float32), k_scale), _levels(v.to(tl.float32), v_scale)
            tl.store(k_head + place, k_level, mask=kept)
            tl.store(v_head + place, v_level, mask=kept)
            tl.store(k_scales + length, k_scale, mask=fits)
            tl.store(v_scales + length, v_scale, mask=fits)
            new_m = tl.sum(q * k_level.to(tl.float32), 0) * k_scale.to(tl.float32)
            new_v = v_level.to(tl.float32) * v_scale.to(tl.float32)
        else:
            tl.store(k_head + place, k, mask=kept)
            tl.store(v_head + place, v, mask=kept)
            new_m = tl.sum(q * k.to(tl.float32), 0)
            new_v = v.to(tl.float32)

    share = tl.cdiv(tl.cdiv(length, SPLITS), LANES) * LANES
    first = split * share
    end = tl.minimum(first + share, length)
    offsets = tl.arange(0, STEPS * LANES)
    CACHE: tl.constexpr = k_cache_ptr.dtype.element_ty
    # Rows are loaded as words in two dimensions, and unpacked and split into steps and lanes in registers. Keeping
    # float16 tiles between iterations costs 0.2 to 0.5 more instructions per element, and for three-dimensional loads
    # triton 3.6 chooses layouts that need 9 barriers an iteration and 8.9 instructions per element instead of 4.0.
    WIDTH: tl.constexpr = D * CACHE.primitive_bitwidth // 32
    k_rows, v_rows = k_head.to(tl.pointer_type(tl.int32)), v_head.to(tl.pointer_type(tl.int32))
    column = tl.arange(0, WIDTH)[None, :]
    lift = 1152.0 * tl.sum(q, 0)  # what _floats adds to a logit
    m = tl.full((LANES,), LOWEST, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    acc = tl.zeros((LANES, D), tl.float32)
    # rows past the end repeat the last one with a weight of 0: cheaper than a mask that fills in zeros
    row = tl.maximum(tl.minimum(first + offsets, end - 1), 0)
    place = row[:, None] * WIDTH + column
    k_tile, v_tile = tl.load(k_rows + place), tl.load(v_rows + place)
    if INT8:
        k_scales_tile, v_scales_tile = tl.load(k_scales + row), tl.load(v_scales + row)
    for n in range(first, end, STEPS * LANES):
        # the next tile is loaded as soon as this one has been used, so that memory is never idle
        row = tl.maximum(tl.minimum(n + STEPS * LANES + offsets, end - 1), 0)
        place = row[:, None] * WIDTH + column
        logits = tl.sum(_floats(k_tile, (STEPS * LANES, D), CACHE) * q[None, :], 1)
        if INT8:
            logits = (logits - lift) * k_scales_tile.to(tl.float32)
            k_scales_tile = tl.load(k_scales + row)
        k_tile = tl.load(k_rows + place)
        logits = tl.reshape(tl.where(n + offsets < end, logits, -float("inf")), (STEPS, LANES))
        new = tl.maximum(m, tl.max(logits, 0))
        fade = tl.exp2(m - new)
        p = tl.exp2(logits - new[None, :])
        total = total * fade + tl.sum(p, 0)
        if INT8:
            p *= tl.reshape(v_scales_tile.to(tl.float32), (STEPS, LANES))
            v_scales_tile = tl.load(v_scales + row)
        part = tl.sum(p[:, :, None] * _floats(v_tile, (STEPS, LANES, D), CACHE), 0)
        if INT8:
            # what _floats adds is subtracted before these few rows are added to the sum, so that it costs no accuracy
            part -= 1152.0 * tl.sum(p, 0)[:, None]
        acc = acc * fade[:, None] + part
        v_tile = tl.load(v_rows + place)
        m = new

    top = tl.maximum(tl.max(m, 0), new_m)
    weight = tl.exp2(m - top)
    new_weight = tl.where(owner, tl.exp2(new_m - top), 0.0)
    denominator = tl.sum(weight * total, 0) + new_weight
    x = tl.sum(weight[:, None] * acc, 0) + new_weight * new_v
    last = True
    if SPLITS > 1:
        head = b * H + h
        s = tl.arange(0, BLOCK_SPLITS)
        parts_ptr += head.to(tl.int64) * (SPLITS * D)
        stats_ptr += head * (2 * SPLITS)
        tl.store(parts_ptr + split * D + d, x)
        tl.store(stats_ptr + split, top)
        tl.store(stats_ptr + SPLITS + split, denominator)
        tl.debug_barrier()  # the atomic below releases what every thread of this program stored
        last = tl.atomic_add(locks_ptr + head, 1, sem="acq_rel") == SPLITS - 1
        if last:
            there = s < SPLITS
            tops = tl.load(stats_ptr + s, mask=there, other=LOWEST, cache_modifier=".cg")
            denominators = tl.load(stats_ptr + SPLITS + s, mask=there, other=0.0, cache_modifier=".cg")
            parts = tl.load(
                parts_ptr + s[:, None] * D + d[None, :], mask=there[:, None], other=0.0, cache_modifier=".cg"
            )
            # a part without tokens has LOWEST as its maximum; the last one always has a token
            weights = tl.exp2(tops - tl.max(tops, 0))
            denominator = tl.sum(weights * denominators, 0)
            x = tl.sum(weights[:, None] * parts, 0)
            tl.store(locks_ptr + head, 0)
    if last:
        y = tl.where(fits, x / denominator, float("nan")).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (b * H + h).to(tl.int64) * D + d, y)
        if sums_ptr is not None:
            sums = tl.sum(tl.reshape(y.to(tl.float32), (D // 32, 32)), 1)
            span = h * (D // 32) + tl.arange(0, D // 32)
            tl.store(sums_ptr + span * 16 + b, sums)


@triton.jit(do_not_specialize_on_alignment=["T"])  # otherwise every 16th prompt length would compile again
def append_kernel(
    k_ptr, v_ptr, cos_ptr, sin_ptr, k_cache_ptr, v_cache_ptr, k_scales_ptr, v_scales_ptr, start_ptr,
    T, CAPACITY,
    K_B, K_T, K_H, V_B, V_T, V_H, CACHE_B, CACHE_H, SCALES_B, SCALES_H,
    D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One program rotates and appends BLOCK_T tokens of one head."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    h, b = tl.program_id(1), tl.program_id(2)
    d = tl.arange(0, D)
    start = tl.load(start_ptr + b)
    there = (t < T) & (start >= 0) & (start + T <= CAPACITY)
    row = start.to(tl.int32) + t
    token = tl.minimum(t, T - 1)  # rows past the last read it again and store nothing

    k_ptr, v_ptr = _head(k_ptr, b, h, K_B, K_H), _head(v_ptr, b, h, V_B, V_H)
    k = _rotated(k_ptr, K_T, cos_ptr, sin_ptr, b, token, T, D).to(k_ptr.dtype.element_ty)
    v = tl.load(v_ptr + token.to(tl.int64)[:, None] * V_T + d[None, :])
    head = b.to(tl.int64) * CACHE_B + h.to(tl.int64) * CACHE_H
    place = row[:, None] * D + d[None, :]
    if k_scales_ptr is not None:
        k_scale, v_scale = _scale(k.to(tl.float32), 1), _scale(v.to(tl.float32), 1)
        head_scales = b.to(tl.int64) * SCALES_B + h * SCALES_H
        tl.store(k_scales_ptr + head_scales + row, k_scale, mask=there)
        tl.store(v_scales_ptr + head_scales + row, v_scale, mask=there)
        k, v = _levels(k.to(tl.float32), k_scale[:, None]), _levels(v.to(tl.float32), v_scale[:, None])
    tl.store(k_cache_ptr + head + place, k, mask=there[:, None])
    tl.store(v_cache_ptr + head + place, v, mask=there[:, None])


@triton.jit
def _attend(
    acc, total, m, q, k_head, v_head, k_scales, v_scales, position, first, last, end,
    D: tl.constexpr, BLOCK_N: tl.constexpr, INT8: tl.constexpr, MASKED: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Continue the softmax of q (BLOCK_M, D) over positions `first` to `last`; MASKED: causally, and not past `end`."""
    d = tl.arange(0, D)
    for n0 in range(first, last, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        place = n[:, None] * D + d[None, :]
        if MASKED:
            # zeros instead of what the cache holds there: a probability of 0 times NaN would be NaN
            k = tl.load(k_head + place, mask=(n < end)[:, None], other=0)
        else:
            k = tl.load(k_head + place)
        logits = dot(q, tl.trans(k.to(q.dtype)), tl.zeros((q.shape[0], BLOCK_N), tl.float32), WIDEN)
        if INT8:
            logits *= tl.load(k_scales + n, mask=n < end, other=0.0).to(tl.float32)[None, :]
        if MASKED:
            logits = tl.where(n[None, :] <= position[:, None], logits, -float("inf"))
        new = tl.maximum(m, tl.max(logits, 1))
        fade = tl.exp2(m - new)
        p = tl.exp2(logits - new[:, None])
        total = total * fade + tl.sum(p, 1)
        acc *= fade[:, None]
        if INT8:
            p *= tl.load(v_scales + n, mask=n < end, other=0.0).to(tl.float32)[None, :] * LIFT
        if MASKED:
            v = tl.load(v_head + place, mask=(n < end)[:, None], other=0)
        else:
            v = tl.load(v_head + place)
        acc = dot(p.to(q.dtype), v.to(q.dtype), acc, WIDEN)
        m = new
    return acc, total, m


@triton.jit(do_not_specialize_on_alignment=["T"])  # otherwise every 16th prompt length would compile again
def prefill_kernel(
    q_ptr, cos_ptr, sin_ptr, k_cache_ptr, v_cache_ptr, k_scales_ptr, v_scales_ptr, start_ptr, q_scale_ptr, out_ptr,
    T, H, CAPACITY,
    Q_B, Q_T, Q_H, CACHE_B, CACHE_H, SCALES_B, SCALES_H,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SCALE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One program attends with BLOCK_M tokens of one head to all of its cache up to their own positions."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest start first
    h, b = tl.program_id(1), tl.program_id(2)
    t = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, D)
    token = tl.minimum(t, T - 1)  # rows past the last compute it again and store nothing
    start64 = tl.load(start_ptr + b)
    fits = (start64 >= 0) & (start64 + T <= CAPACITY)
    start = tl.where(fits, start64, 0).to(tl.int32)

    q = _rotated(_head(q_ptr, b, h, Q_B, Q_H), Q_T, cos_ptr, sin_ptr, b, token, T, D)
    if q_scale_ptr is not None:
        q *= (tl.load(q_scale_ptr + b * T + token) * SCALE)[:, None]
    else:
        q *= SCALE
    q = q.to(q_ptr.dtype.element_ty)

    k_head = k_cache_ptr + b.to(tl.int64) * CACHE_B + h.to(tl.int64) * CACHE_H
    v_head = v_cache_ptr + b.to(tl.int64) * CACHE_B + h.to(tl.int64) * CACHE_H
    INT8: tl.constexpr = k_scales_ptr is not None
    k_scales, v_scales = k_scales_ptr, v_scales_ptr
    if INT8:
        k_scales = _head(k_scales_ptr, b, h, SCALES_B, SCALES_H)
        v_scales = _head(v_scales_ptr, b, h, SCALES_B, SCALES_H)
    m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    position = start + t
    # what all tokens of this tile see, in whole blocks, and then the rest; none of it for a sequence that does not fit
    end = tl.where(fits, tl.minimum(start + tile * BLOCK_M + BLOCK_M, start + T), 0)
    seen = tl.where(fits, (start + tile * BLOCK_M + 1) // BLOCK_N * BLOCK_N, 0)
    acc, total, m = _attend(
        acc, total, m, q, k_head, v_head, k_scales, v_scales, position, 0, seen, end,
        D, BLOCK_N, INT8, False, WIDEN,
    )  # fmt: skip
    acc, total, m = _attend(
        acc, total, m, q, k_head, v_head, k_scales, v_scales, position, seen, end, end,
        D, BLOCK_N, INT8, True, WIDEN,
    )  # fmt: skip
    if INT8:
        total *= LIFT
    total = tl.where(fits, total, 1.0)
    x = tl.where(fits, acc / total[:, None], float("nan")).to(out_ptr.dtype.element_ty)
    place = (b * T + t).to(tl.int64)[:, None] * (H * D) + h * D + d[None, :]
    tl.store(out_ptr + place, x, mask=(t < T)[:, None])


def decode_config(head_dim: int, cache_dtype: torch.dtype) -> dict[str, int]:
    """How `decode_kernel` is launched: a tile's LANES positions of all threads times STEPS of each, warps, stages.

    LANES follows from loads of 16 bytes per thread. Compiled for Qwen's heads of 128: 72 registers for a 16-bit cache
    and 128 for int8, so 7 and 4 programs per multiprocessor, each with 128 bytes per thread being loaded.
    """
    num_warps, threads_a_row = 4, head_dim * cache_dtype.itemsize // 16
    return {"LANES": num_warps * 32 // threads_a_row, "STEPS": 4, "num_warps": num_warps, "num_stages": 1}


def prefill_config(tokens: int, cache_dtype: torch.dtype) -> dict[str, int]:
    """How `prefill_kernel` is launched: tokens BLOCK_M by positions BLOCK_N, warps, stages.

    All fit into the 99 KiB of shared memory and the 255 registers of every card. Converting an int8 tile takes
    registers of its own, so its tiles are smaller.
    """
    int8 = cache_dtype == torch.int8
    block_m = 16 if tokens <= 16 else 64 if tokens <= 64 or int8 else 128
    return {"BLOCK_M": block_m, "BLOCK_N": 32 if int8 else 64, "num_warps": 8 if block_m == 128 else 4, "num_stages": 2}


def splits_for(heads: int, capacity: int, head_dim: int, cache_dtype: torch.dtype, multiprocessors: int) -> int:
    """Parts into which `decode_kernel` splits the cache of each of `heads` heads (of the whole batch).

    From what is fixed in a CUDA graph: enough programs to fill the device once, none with less than one tile of a full
    cache, MAX_SPLITS at most.
    """
    config = decode_config(head_dim, cache_dtype)
    tiles = -(-capacity // (config["LANES"] * config["STEPS"]))
    return max(1, min(-(-PROGRAMS_PER_SM * multiprocessors // max(heads, 1)), tiles, MAX_SPLITS))


def attention_triton(args: AttentionArgs, *, splits: int | None = None, sums: Tensor | None = None) -> Tensor:
    """Launch for kernels.rotary_attention, after checks of what only these kernels ask for.

    For one token, `sums` (H * D / 32, 16) float32 is filled as Rows.sums, if given.
    """
    _check_limits(args, splits)
    q, k, v = args.q, args.k, args.v
    if q.shape[1] > 1 and device_key(q.device).turing:
        return reference.rotary_attention(args)  # torch's attention uses Turing's tensor cores, which Triton does not
    batch, length, heads, dim = q.shape
    capacity, dtype = args.k_cache.shape[2], args.k_cache.dtype
    cos, sin, start = args.cos.contiguous(), args.sin.contiguous(), args.start.contiguous()
    q_scale = None if args.q_scale is None else args.q_scale.contiguous()
    caches = (args.k_cache, args.v_cache, args.k_scales, args.v_scales, start)
    strides = (*args.k_cache.stride()[:2], *((0, 0) if args.k_scales is None else args.k_scales.stride()[:2]))
    scale = math.log2(math.e) / math.sqrt(dim)  # logits in base 2, divided by sqrt(D)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if length > 1:
        append_kernel[-(-length // APPEND["BLOCK_T"]), heads, batch](
            k, v, cos, sin, *caches, length, capacity, *k.stride()[:3], *v.stride()[:3], *strides, D=dim, **APPEND,
        )  # fmt: skip
        config = prefill_config(length, dtype)
        prefill_kernel[-(-length // config["BLOCK_M"]), heads, batch](
            q, cos, sin, *caches, q_scale, out, length, heads, capacity, *q.stride()[:3], *strides,
            D=dim, SCALE=scale, WIDEN=q.dtype == torch.bfloat16 and not q.is_cuda, **config,
        )  # fmt: skip
        return out
    if splits is None:
        splits = splits_for(batch * heads, capacity, dim, dtype, device_key(q.device).multiprocessors)
    parts = stats = None
    locks = args.locks
    if splits > 1:
        parts = torch.empty(batch * heads, splits, dim, dtype=torch.float32, device=q.device)
        stats = torch.empty(batch * heads, 2, splits, dtype=torch.float32, device=q.device)
        if locks is None:
            locks = torch.zeros(batch * heads, dtype=torch.int32, device=q.device)
    decode_kernel[heads, batch, splits](
        q, k, v, cos, sin, *caches, q_scale, out, sums, parts, stats, locks, heads, capacity,
        q.stride(0), q.stride(2), k.stride(0), k.stride(2), v.stride(0), v.stride(2), *strides,
        D=dim, SPLITS=splits, BLOCK_SPLITS=triton.next_power_of_2(splits), SCALE=scale, **decode_config(dim, dtype),
    )  # fmt: skip
    return out


def _check_limits(args: AttentionArgs, splits: int | None) -> None:
    q = args.q
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"q is {q.dtype}, the Triton kernels take torch.float16 and torch.bfloat16; convert the model, or pass "
            'backend="torch" for the slow definition'
        )
    if q.shape[3] not in HEAD_DIMS:
        raise ValueError(f"q has heads of size {q.shape[3]}, the Triton kernels take {', '.join(map(str, HEAD_DIMS))}")
    for name in ("k_cache", "v_cache"):
        if (dtype := getattr(args, name).dtype) not in (q.dtype, torch.int8):
            raise ValueError(f"{name} is {dtype}, the Triton kernels take {q.dtype} as in q, or torch.int8")
    for name in ("q", "k", "v"):
        if (strides := getattr(args, name).stride())[3] != 1:
            raise ValueError(f"{name} has strides {strides}, the last has to be 1; make it contiguous")
    for name, ours, other in (
        ("k_cache", args.k_cache, args.v_cache),
        ("k_scales", args.k_scales, args.v_scales),
    ):
        if ours is None or other is None:
            continue
        inner = ours.shape[3:] + (1,)  # strides of the positions and of the numbers of one
        if ours.stride() != other.stride() or ours.stride()[2:] != inner:
            raise ValueError(
                f"{name} has strides {ours.stride()} and its v_ twin {other.stride()}, expected the same, and the last "
                f"to be {tuple(inner)}: a head's positions have to be contiguous"
            )
    if splits is not None and not 1 <= splits <= MAX_SPLITS:
        raise ValueError(f"splits is {splits}, expected 1 to {MAX_SPLITS}")
