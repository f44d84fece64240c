"""The GEMMs on Turing (sm_75), whose tensor cores Triton does not use: there `tl.dot` becomes scalar arithmetic.

A few rows are multiplied by pairs of float16 numbers on the words of weight.py as they are. A level becomes
(level - middle) / LIFT, with its zero point exactly, so that one product is no larger than x and 16 of them can be
summed in float16: x is a residual times a norm weight and may come near 65,504. Many rows go through a weight that is
dequantized for one product (`dequantize`), which cuBLAS multiplies on the tensor cores.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.parts import finish, halves, sum_splits
from kernels.gpu.weight import CHUNK, TritonWeight
from kernels.reference import Rows, rms_rows


@triton.jit
def _fma(a, b, c, ASM: tl.constexpr):
    """a b + c of the two float16 numbers in each word; the interpreter has no inline assembly."""
    if ASM:
        return tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        exact = halves(a, tl.float16).to(tl.float32) * halves(b, tl.float16).to(tl.float32)
        sums = (exact + halves(c, tl.float16).to(tl.float32)).to(tl.float16)
        low, high = tl.split(sums)
        return _pair(low, high)


@triton.jit
def _pair(low, high):
    """Two float16 numbers as one word."""
    low = low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return low | (high.to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def _both(words, LONG: tl.constexpr, ASM: tl.constexpr):
    """The sum of a word's two numbers as float32; after a LONG chain rounded to float16, for an instruction less."""
    if ASM and LONG:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 l, h; mov.b32 {l, h}, $1; add.f16 l, l, h; cvt.f32.f16 $0, l; }",
            "=f,r", [words], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    elif ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 l, h; .reg .f32 a; mov.b32 {l, h}, $1; cvt.f32.f16 a, l; cvt.f32.f16 $0, h; "
            "add.f32 $0, $0, a; }",
            "=f,r", [words], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        low, high = tl.split(halves(words, tl.float16))
        if LONG:
            return (low + high).to(tl.float32)
        else:
            return low.to(tl.float32) + high.to(tl.float32)


@triton.jit
def _masked(words, MASK: tl.constexpr, ASM: tl.constexpr):
    """(words & MASK) | 0x64006400: in one instruction, where the assembler makes two of it."""
    if ASM:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xEA;",
            "=r,r,r,r",
            [words, tl.full(words.shape, MASK, tl.int32), tl.full(words.shape, 0x64006400, tl.int32)],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        return (words & MASK) | 0x64006400


@triton.jit
def _levels(words, even, odd, J: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """Plane J of words as pairs of float16: (level - zero) / 8, or for 8 bits / 128.

    even, odd: minus what is left of 1024 after the division, and the zero point, for planes at 1 and at 16 times.
    """
    of_128 = tl.full(words.shape, 0x20002000, tl.int32)
    if BITS == 8:
        return _fma(_masked(words >> 8 if J == 1 else words, 0x00FF00FF, ASM), of_128, odd, ASM)
    shifted = words >> 8 if J > 1 else words
    if J % 2 == 0:
        eighth = tl.full(words.shape, 0x30003000, tl.int32)
        return _fma(_masked(shifted, 0x000F000F, ASM), eighth, even, ASM)
    return _fma(_masked(shifted, 0x00F000F0, ASM), of_128, odd, ASM)


@triton.jit
def _quarter(x):
    """(…, 4 q) -> four of (…, q), one for each of a thread's four neighbours."""
    shape: tl.constexpr = x.shape[:-1] + [x.shape[-1] // 4, 2, 2]
    first, second = tl.split(tl.reshape(x, shape))
    a, c = tl.split(first)
    b, d = tl.split(second)
    return a, b, c, d


@triton.jit
def _row(
    words, even, odd, x_ptr, r,
    FIRST: tl.constexpr, COUNT: tl.constexpr, CHAIN: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Planes FIRST to FIRST + COUNT - 1 of a chunk times one row of x -> (BLOCK_N, WORDS / 4) float32.

    Four words of CHAIN planes are summed in float16 at once.
    """
    w0, w1, w2, w3 = _quarter(words)
    for first in tl.static_range(FIRST, FIRST + COUNT, CHAIN):
        part = tl.zeros(w0.shape, tl.int32)
        for j in tl.static_range(first, first + CHAIN):
            x0, x1, x2, x3 = _quarter(tl.load(x_ptr + j * WORDS + r))
            part = _fma(_levels(w0, even, odd, j, BITS, ASM), x0[None, :], part, ASM)
            part = _fma(_levels(w1, even, odd, j, BITS, ASM), x1[None, :], part, ASM)
            part = _fma(_levels(w2, even, odd, j, BITS, ASM), x2[None, :], part, ASM)
            part = _fma(_levels(w3, even, odd, j, BITS, ASM), x3[None, :], part, ASM)
        if first == FIRST:
            total = _both(part, CHAIN * 4 > 8, ASM)
        else:
            total += _both(part, CHAIN * 4 > 8, ASM)
    return total


@triton.jit(do_not_specialize_on_alignment=["M"])
def few_rows_kernel(
    x_ptr, words_ptr, scales_ptr, zeros_ptr,
    bias_ptr, squares_ptr, residual_ptr, norm_ptr, y_ptr, y_sums_ptr, y_squares_ptr, partials_ptr, locks_ptr,
    M, N, K, NP, CHUNKS, WIDTH, SQUARES, eps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SQUARES: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
    EPILOGUE: tl.constexpr, SPLIT_K: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_N outputs of all M <= BLOCK_M rows (1, 2 or 4) over its share of the chunks."""
    PLANES: tl.constexpr = 16 // BITS
    WORDS: tl.constexpr = 64 // PLANES
    SUBGROUPS: tl.constexpr = 128 // GROUP if GROUP < 128 else 1
    EACH: tl.constexpr = PLANES // SUBGROUPS
    CHUNKS_A_GROUP: tl.constexpr = 1 if GROUP < 128 else (GROUP + 127) // 128
    LIFT: tl.constexpr = 8.0 if BITS == 4 else 128.0
    # sums of 4 numbers in float16 round to 3e-4 of a result, of 16 to 8e-4; the long ones save what 4 rows need
    CHAIN: tl.constexpr = EACH if BLOCK_M == 4 else 1

    tile_n, split = tl.program_id(0), tl.program_id(1)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    r = tl.arange(0, WORDS)
    share = (CHUNKS + SPLIT_K - 1) // SPLIT_K
    first = split * share
    turns = tl.minimum(share, CHUNKS - first)
    tile = n[:, None] * WORDS + r[None, :]
    x_pairs = x_ptr.to(tl.pointer_type(tl.int32)) + first * 64
    row_1, row_2, row_3 = (tl.minimum(1, M - 1), tl.minimum(2, M - 1), tl.minimum(3, M - 1))  # they repeat the last
    acc = tl.zeros((BLOCK_N, WORDS // 4, BLOCK_M), tl.float32)
    words_ptr += tl.minimum(first, CHUNKS - 1) * NP * WORDS
    ahead = tl.load(words_ptr + tile, eviction_policy="evict_first")  # so that x stays in the L1 cache
    for c in range(0, turns):
        words = ahead
        # the next tile is loaded as soon as this one is in use: there are no asynchronous copies on Turing
        place = words_ptr + tl.minimum(c + 1, turns - 1) * (NP * WORDS) + tile
        ahead = tl.load(place, eviction_policy="evict_first")
        for q in tl.static_range(SUBGROUPS):
            group = (first + c) * SUBGROUPS + q if GROUP < 128 else (first + c) // CHUNKS_A_GROUP
            scale = tl.load(scales_ptr + group * NP + n).to(tl.float32) * LIFT
            even = tl.full((BLOCK_N,), -129.0, tl.float16)
            odd = tl.full((BLOCK_N,), -9.0, tl.float16)
            if zeros_ptr is not None:
                eighth = tl.load(zeros_ptr + group * NP + n) * 0.125
                even, odd = (even - eighth).to(tl.float16), (odd - eighth).to(tl.float16)
            even, odd = _pair(even, even)[:, None], _pair(odd, odd)[:, None]
            x_c = x_pairs + c * 64
            p = _row(words, even, odd, x_c, r, q * EACH, EACH, CHAIN, WORDS, BITS, ASM)
            if BLOCK_M == 1:
                sums = p[:, :, None]
            else:
                p1 = _row(words, even, odd, x_c + row_1 * (K // 2), r, q * EACH, EACH, CHAIN, WORDS, BITS, ASM)
                if BLOCK_M == 2:
                    sums = tl.join(p, p1)
                else:
                    p2 = _row(words, even, odd, x_c + row_2 * (K // 2), r, q * EACH, EACH, CHAIN, WORDS, BITS, ASM)
                    p3 = _row(words, even, odd, x_c + row_3 * (K // 2), r, q * EACH, EACH, CHAIN, WORDS, BITS, ASM)
                    sums = tl.reshape(tl.join(tl.join(p, p2), tl.join(p1, p3)), (BLOCK_N, WORDS // 4, 4))
            acc += sums * scale[:, None, None]
    total = tl.sum(acc, 1)
    last = True
    if SPLIT_K > 1:
        total, last = sum_splits(total, partials_ptr, locks_ptr, n, m, tile_n, BLOCK_M, BLOCK_N)
    if last:
        out = (bias_ptr, squares_ptr, residual_ptr, norm_ptr, y_ptr, y_sums_ptr, y_squares_ptr)
        finish(total, n, m, tile_n, out, M, N, WIDTH, SQUARES, eps, BLOCK_M, BLOCK_N, BLOCK_SQUARES, EPILOGUE)


@triton.jit
def dequantize_kernel(
    words_ptr, scales_ptr, zeros_ptr, out_ptr, N, NP, K, BLOCK_N: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """One program writes BLOCK_N rows of one chunk of W (N, K) float16, K padded to whole chunks."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1)
    words = tl.load(words_ptr + (c * NP + n)[:, None] * 16 + tl.arange(0, 16)[None, :])
    place = out_ptr + n.to(tl.int64)[:, None] * K + c * 128 + tl.arange(0, 32)[None, :]
    for j in tl.static_range(4):
        group = c * (128 // GROUP) + j * 32 // GROUP if GROUP < 128 else c // ((GROUP + 127) // 128)
        middle = tl.full((BLOCK_N,), 1032.0, tl.float16)
        if zeros_ptr is not None:
            middle += tl.load(zeros_ptr + group * NP + n)
        levels = halves(((words >> (4 * j)) & 0x000F000F) | 0x64006400, tl.float16)
        scale = tl.load(scales_ptr + group * NP + n).to(tl.float16)
        weight = (tl.reshape(levels, (BLOCK_N, 32)) - middle[:, None]) * scale[:, None]
        tl.store(place + 32 * j, weight, mask=(n < N)[:, None])


def dequantize(weight: TritonWeight) -> Tensor:
    """W (N, K) float16 of a weight with 4 bits, K padded to whole chunks."""
    chunks, padded, _ = weight.words.shape
    outputs = weight.out_features
    out = torch.empty(outputs, chunks * CHUNK, dtype=torch.float16, device=weight.device)
    dequantize_kernel[-(-outputs // 64), chunks](
        weight.words, weight.scales, weight.zeros, out, outputs, padded, chunks * CHUNK,
        BLOCK_N=64, GROUP=weight.group_size, num_warps=4,
    )  # fmt: skip
    return out


def many_rows(
    rows: Rows,
    width: int,
    weight: TritonWeight,
    bias: Tensor | None,
    epilogue: str,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> Rows:
    """gemm.gemm_triton for more rows than a decode step has: rows.x (M, K) contiguous, in the weight's order, K padded.

    width: K without the padding. The row factor comes first: without it a product might not fit into float16.
    """
    x = rows.x
    if rows.squares is not None:
        x = (x * torch.rsqrt(rows.squares.sum(1, keepdim=True) / width + rows.eps)).to(x.dtype)
    y = F.linear(x, dequantize(weight)).float()
    if bias is not None:
        y += bias
    if epilogue == "swiglu":
        up, gate = y.unflatten(1, (-1, 2)).unbind(2)
        y = up * F.silu(gate)
    if residual is None or norm_weight is None:
        return Rows(y.to(out_dtype))
    residual += y
    return rms_rows(residual, norm_weight, eps, out_dtype)
