"""What several kernels are made of: halves of words, a product, and what follows the product of a tile of a GEMM."""

import triton
import triton.language as tl


@triton.jit
def halves(words, DTYPE: tl.constexpr):
    """words (...) int32 -> (..., 2): their low and high halves as 16-bit floats."""
    low, high = (words & 0xFFFF).to(tl.int16), (words >> 16).to(tl.int16)
    return tl.join(low.to(DTYPE, bitcast=True), high.to(DTYPE, bitcast=True))


@triton.jit
def dot(a, b, acc, WIDEN: tl.constexpr):
    """acc + a b; WIDEN is for the interpreter, which takes bfloat16 for integers (triton 3.7.1)."""
    if WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc)


@triton.jit
def finish(
    acc, n, m, tile_n, out,
    M, N, WIDTH, SQUARES, eps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SQUARES: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """What follows the product of a tile, acc (BLOCK_N, BLOCK_M) float32: row factor, bias, activation or residual, and
    what the next kernel needs.
    """
    bias_ptr, squares_ptr, residual_ptr, norm_ptr, y_ptr, y_sums_ptr, y_squares_ptr = out
    tiles_n = tl.cdiv(N, BLOCK_N)
    HALF: tl.constexpr = BLOCK_N // 2 if EPILOGUE == 1 else BLOCK_N  # outputs that are stored
    outputs = N
    kept = (n < N)[:, None] & (m < M)[None, :]
    if squares_ptr is not None:
        part = tl.arange(0, BLOCK_SQUARES)
        squares = tl.load(
            squares_ptr + m[:, None] * SQUARES + part[None, :],
            mask=(m < M)[:, None] & (part < SQUARES)[None, :],
            other=0.0,
        )
        acc *= tl.rsqrt(tl.sum(squares, 1) / WIDTH + eps)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if EPILOGUE == 1:
        # rows 2 i and 2 i + 1 are w1's and w2's: (BLOCK_N, BLOCK_M) -> two of (BLOCK_N / 2, BLOCK_M)
        pair = tl.permute(tl.reshape(acc, (HALF, 2, BLOCK_M)), (0, 2, 1))
        up, gate = tl.split(pair)
        y = up * gate / (1.0 + tl.exp(-gate))
        outputs = N // 2
        n = tile_n * HALF + tl.arange(0, HALF)
        kept = (n < outputs)[:, None] & (m < M)[None, :]
    else:
        y = acc
    if EPILOGUE == 2:
        place = m.to(tl.int64)[None, :] * N + n[:, None]
        y += tl.load(residual_ptr + place, mask=kept, other=0.0)
        tl.store(residual_ptr + place, y, mask=kept)
        tl.store(y_squares_ptr + m * tiles_n + tile_n, tl.sum(y * y, 0), mask=m < M)
        y *= tl.load(norm_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    y = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + m.to(tl.int64)[None, :] * outputs + n[:, None], y, mask=kept)
    if y_sums_ptr is not None:
        sums = tl.sum(tl.reshape(y.to(tl.float32), (HALF // 32, 32, BLOCK_M)), 1)
        span = tile_n * (HALF // 32) + tl.arange(0, HALF // 32)
        tl.store(y_sums_ptr + span[:, None] * 16 + m[None, :], sums, mask=(span * 32 < outputs)[:, None])


@triton.jit
def sum_splits(acc, partials_ptr, locks_ptr, n, m, tile_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Store this program's partial sum; the last program of a tile adds up all of them, always in the same order.

    Returns the sum and whether this program is the last.
    """
    splits = tl.num_programs(1)
    offsets = (n - tile_n * BLOCK_N)[:, None] * BLOCK_M + m[None, :]
    part = partials_ptr + (tile_n * splits).to(tl.int64) * (BLOCK_N * BLOCK_M)
    tl.store(part + tl.program_id(1) * (BLOCK_N * BLOCK_M) + offsets, acc)
    tl.debug_barrier()  # the atomic below releases what every thread of this program stored
    last = tl.atomic_add(locks_ptr + tile_n, 1, sem="acq_rel") == splits - 1
    if last:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for split in range(splits):
            acc += tl.load(part + split * (BLOCK_N * BLOCK_M) + offsets, cache_modifier=".cg")
        tl.store(locks_ptr + tile_n, 0)
    return acc, last
