"""int4_gemm, its fused forms, the int8 head and rms_rows on the GPU.

One kernel computes the product of 1 to 16 rows of x, another that of more.

Both compute the product transposed: the weight is the left operand of the tensor cores and reaches them through
registers only, the few rows of x are the right operand, padded to 8 or 16; weight.py has the words' order.
`_decode_kernel` multiplies by 1024 + level, a float16 number that costs no conversion, and starts each sum at minus
what the 1024 adds, which it knows from the sums of x (Rows.sums). `_prefill_kernel`, where one weight serves many rows,
subtracts and scales the levels in 16 bits first, so that it needs one sum only.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu import turing
from kernels.gpu.parts import dot, finish, halves, sum_splits
from kernels.gpu.tiles import TURING_ROWS, Tile, device_key, tile_for
from kernels.gpu.weight import CHUNK, TritonWeight
from kernels.reference import MAX_DECODE_ROWS, SPAN, Rows

# what is done with x W^T: stored, w1(x) * silu(w2(x)), added to a residual
EPILOGUES = {"plain": 0, "swiglu": 1, "residual": 2}


@triton.jit
def _plane(words, BLOCK_N: tl.constexpr, WORDS: tl.constexpr, DTYPE: tl.constexpr, BITS: tl.constexpr):
    """The lowest plane of words (BLOCK_N, WORDS) -> (BLOCK_N, 2 WORDS): 1024 + level, in bfloat16 128 + level."""
    if BITS == 8:
        floats = halves((words & 0x00FF00FF) | 0x64006400, DTYPE)
    elif DTYPE == tl.bfloat16:
        floats = halves((words & 0x000F000F) | 0x43004300, DTYPE)
    else:
        floats = halves((words & 0x000F000F) | 0x64006400, DTYPE)
    return tl.reshape(floats, (BLOCK_N, 2 * WORDS))


@triton.jit(do_not_specialize_on_alignment=["M"])  # otherwise every 16th prompt length would compile again
def _decode_kernel(
    x_ptr, sums_ptr, words_ptr, scales_ptr, zeros_ptr,
    bias_ptr, squares_ptr, residual_ptr, norm_ptr, y_ptr, y_sums_ptr, y_squares_ptr, partials_ptr, locks_ptr,
    M, N, K, NP, CHUNKS, WIDTH, SQUARES, eps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SQUARES: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
    EPILOGUE: tl.constexpr, SPLIT_K: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_N outputs of all M <= BLOCK_M rows over its share of the chunks of 128 channels.

    x (M, K), K padded to whole chunks; WIDTH is K without the padding, by which the norm divides.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    PLANES: tl.constexpr = 16 // BITS
    DEPTH: tl.constexpr = 128 // PLANES
    WORDS: tl.constexpr = DEPTH // 2
    SUBGROUPS: tl.constexpr = 128 // GROUP if GROUP < 128 else 1  # scales a chunk
    EACH: tl.constexpr = PLANES // SUBGROUPS  # planes a scale
    CHUNKS_A_GROUP: tl.constexpr = 1 if GROUP < 128 else (GROUP + 127) // 128
    SPANS: tl.constexpr = DEPTH // 32  # sums a plane
    # what the exponent bits add to a level, and the middle level, which means zero
    EVEN: tl.constexpr = 1024.0 + 128.0 if BITS == 8 else (128.0 + 8.0 if DTYPE == tl.bfloat16 else 1024.0 + 8.0)
    ODD: tl.constexpr = 1024.0 / 16.0 + 8.0  # of a plane that is left at 16 times its level (float16, 4 bits)
    SHIFTED: tl.constexpr = DTYPE == tl.bfloat16 or BITS == 8  # every plane is shifted to its level

    tile_n, split = tl.program_id(0), tl.program_id(1)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    row = tl.minimum(m, M - 1)  # rows past the last repeat it and store nothing
    r = tl.arange(0, WORDS)
    k = tl.arange(0, DEPTH)
    share = (CHUNKS + SPLIT_K - 1) // SPLIT_K
    first = split * share
    # offsets fit into 32 bits: the largest weight, an int8 head of 151,936 x 4,096, has 156 million words
    tile = n[:, None] * WORDS + r[None, :]
    x_tile = row[None, :] * K + k[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    words_ptr += first * NP * WORDS
    x_ptr += first * 128
    sums_ptr += first * 64
    if GROUP < 128:
        scales_ptr += first * SUBGROUPS * NP
        if zeros_ptr is not None:
            zeros_ptr += first * SUBGROUPS * NP
    turns = tl.minimum(share, CHUNKS - first)
    span = tl.arange(0, 4)
    if SUBGROUPS == 1:
        # Triton loads words and x ahead and nothing else. Without this, each turn waits for what is small: 2,100 cycles
        # on an RTX 3060 instead of 1,380, by the model of benchmarks.model
        scale_ahead = tl.load(scales_ptr + tl.minimum(first, CHUNKS - 1) // CHUNKS_A_GROUP * NP + n)
        behind = tl.minimum(0, CHUNKS - 1 - first) * 64  # a program without chunks reads the last one's
        sums_ahead = tl.load(sums_ptr + behind + span[:, None] * 16 + m[None, :])
    for c in range(0, turns):
        # without an eviction policy: the asynchronous copies of Triton 3.7.1 take none, and every program reads x again
        words = tl.load(words_ptr + c * (NP * WORDS) + tile)
        x_c = x_ptr + c * 128 + x_tile
        sums_c = sums_ptr + c * 64 + m
        for q in tl.static_range(SUBGROUPS):
            group = c * SUBGROUPS + q if GROUP < 128 else (first + c) // CHUNKS_A_GROUP
            if SUBGROUPS == 1:
                scale, sums = scale_ahead.to(tl.float32), sums_ahead
                ahead = tl.minimum(c + 1, turns - 1)
                scale_ahead = tl.load(scales_ptr + (first + ahead) // CHUNKS_A_GROUP * NP + n)
                sums_ahead = tl.load(sums_ptr + ahead * 64 + span[:, None] * 16 + m[None, :])
            else:
                scale = tl.load(scales_ptr + group * NP + n).to(tl.float32)
            start = tl.zeros((BLOCK_M,), tl.float32)
            late = tl.zeros((BLOCK_M,), tl.float32)
            total = tl.zeros((BLOCK_M,), tl.float32)
            for j in tl.static_range(q * EACH, q * EACH + EACH):
                for i in tl.static_range(SPANS):
                    if SUBGROUPS == 1:
                        s = tl.sum(tl.where(span[:, None] == j * SPANS + i, sums, 0.0), 0)
                    else:
                        s = tl.load(sums_c + (j * SPANS + i) * 16)
                    if SHIFTED:
                        start -= EVEN * s
                    elif j % 2 == 0:
                        late -= EVEN * s
                    else:
                        start -= ODD * s
                    total += s
            if SHIFTED:
                p = tl.broadcast_to(start[None, :], (BLOCK_N, BLOCK_M))
                for j in tl.static_range(q * EACH, q * EACH + EACH):
                    plane = _plane(words >> (BITS * j), BLOCK_N, WORDS, DTYPE, BITS)
                    p = dot(plane, tl.load(x_c + DEPTH * j), p, WIDEN)
            else:
                # planes 1 and 3 at 16 times their level, in sums of their own: one shift a word instead of three
                p = tl.broadcast_to(start[None, :], (BLOCK_N, BLOCK_M))
                if EACH > 1 or q % 2 == 1:
                    p *= 16.0
                    for j in tl.static_range(q * EACH, q * EACH + EACH):
                        if j % 2 == 1:
                            shifted = words >> 8 if j > 1 else words
                            plane = halves((shifted & 0x00F000F0) | 0x64006400, DTYPE)
                            plane = tl.reshape(plane, (BLOCK_N, 2 * WORDS))
                            p = dot(plane, tl.load(x_c + DEPTH * j), p, WIDEN)
                    p *= 0.0625
                # not earlier: tensor cores truncate, and the sums at 16 times the level would lose 4 more bits
                p += late[None, :]
                for j in tl.static_range(q * EACH, q * EACH + EACH):
                    if j % 2 == 0:
                        shifted = words >> 8 if j > 1 else words
                        plane = _plane(shifted, BLOCK_N, WORDS, DTYPE, 4)
                        p = dot(plane, tl.load(x_c + DEPTH * j), p, WIDEN)
            if zeros_ptr is not None:
                p -= tl.load(zeros_ptr + group * NP + n).to(tl.float32)[:, None] * total[None, :]
            acc += p * scale[:, None]
    last = True
    if SPLIT_K > 1:
        acc, last = sum_splits(acc, partials_ptr, locks_ptr, n, m, tile_n, BLOCK_M, BLOCK_N)
    if last:
        out = (bias_ptr, squares_ptr, residual_ptr, norm_ptr, y_ptr, y_sums_ptr, y_squares_ptr)
        finish(acc, n, m, tile_n, out, M, N, WIDTH, SQUARES, eps, BLOCK_M, BLOCK_N, BLOCK_SQUARES, EPILOGUE)


@triton.jit(do_not_specialize_on_alignment=["M"])  # otherwise every 16th prompt length would compile again
def _prefill_kernel(
    x_ptr, words_ptr, scales_ptr, zeros_ptr,
    bias_ptr, squares_ptr, residual_ptr, norm_ptr, y_ptr, y_squares_ptr,
    M, N, K, NP, CHUNKS, WIDTH, SQUARES, eps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SQUARES: tl.constexpr, GROUP: tl.constexpr,
    EPILOGUE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_N outputs of BLOCK_M rows.

    Programs that follow one another share 4 blocks of rows. A block of 128 rows is 1 MiB at K = 4,096, a tile of the
    weight a quarter of it: what runs at once reads least with sqrt(SMs / 4) blocks, 2.6 for 28 SMs and 5.7 for 132.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    PLANES: tl.constexpr = 4
    DEPTH: tl.constexpr = 32
    WORDS: tl.constexpr = 16
    SUBGROUPS: tl.constexpr = 128 // GROUP if GROUP < 128 else 1
    EACH: tl.constexpr = PLANES // SUBGROUPS
    CHUNKS_A_GROUP: tl.constexpr = 1 if GROUP < 128 else (GROUP + 127) // 128
    MIDDLE: tl.constexpr = 128 + 8 if DTYPE == tl.bfloat16 else 1024 + 8

    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first_m = tl.program_id(0) // (4 * tiles_n) * 4
    blocks = tl.minimum(tiles_m - first_m, 4)
    place = tl.program_id(0) % (4 * tiles_n)
    tile_m, tile_n = first_m + place % blocks, place // blocks
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.minimum(m, M - 1)
    r = tl.arange(0, WORDS)
    k = tl.arange(0, DEPTH)
    dtype = tl.float32 if WIDEN else x_ptr.dtype.element_ty
    x_m = x_ptr + row.to(tl.int64)[None, :] * K + k[:, None]
    tile = n[:, None] * WORDS + r[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for c in range(0, CHUNKS):
        words = tl.load(words_ptr + c * (NP * WORDS) + tile)
        for q in tl.static_range(SUBGROUPS):
            group = c * SUBGROUPS + q if GROUP < 128 else c // CHUNKS_A_GROUP
            scale = tl.load(scales_ptr + group * NP + n).to(dtype)[:, None]
            middle = tl.full((BLOCK_N, 1), MIDDLE, tl.float32).to(dtype)
            if zeros_ptr is not None:
                middle += tl.load(zeros_ptr + group * NP + n).to(dtype)[:, None]
            for j in tl.static_range(q * EACH, q * EACH + EACH):
                # the difference is exact; its product with the scale is rounded to 16 bits, as a 16-bit weight is
                plane = (_plane(words >> (4 * j), BLOCK_N, WORDS, DTYPE, 4).to(dtype) - middle) * scale
                acc = dot(plane, tl.load(x_m + c * 128 + DEPTH * j), acc, WIDEN)
    out = (bias_ptr, squares_ptr, residual_ptr, norm_ptr, y_ptr, None, y_squares_ptr)
    finish(acc, n, m, tile_n, out, M, N, WIDTH, SQUARES, eps, BLOCK_M, BLOCK_N, BLOCK_SQUARES, EPILOGUE)


@triton.jit(do_not_specialize_on_alignment=["M"])  # as above
def _rows_kernel(x_ptr, norm_ptr, y_ptr, sums_ptr, squares_ptr, M, K, BLOCK_K: tl.constexpr):
    """One program reads one row (K a multiple of 32): its sums over 32 channels, with a norm what rms_rows makes."""
    m = tl.program_id(0)
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_K,), tl.float32)
    for first in range(0, K, BLOCK_K):
        kept = first + k < K
        x = tl.load(x_ptr + m.to(tl.int64) * K + first + k, mask=kept, other=0.0).to(tl.float32)
        if norm_ptr is not None:
            total += x * x
            y = (x * tl.load(norm_ptr + first + k, mask=kept, other=0.0).to(tl.float32)).to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + m.to(tl.int64) * K + first + k, y, mask=kept)
            x = y.to(tl.float32)
        if sums_ptr is not None:
            sums = tl.sum(tl.reshape(x, (BLOCK_K // 32, 32)), 1)
            span = first // 32 + tl.arange(0, BLOCK_K // 32)
            tl.store(sums_ptr + span * 16 + m, sums, mask=span * 32 < K)
    if norm_ptr is not None:
        tl.store(squares_ptr + m, tl.sum(total, 0))


def rows_triton(
    x: Tensor, norm_weight: Tensor | None = None, eps: float = 0.0, dtype: torch.dtype | None = None
) -> Rows:
    """Rows that no other kernel has made, of x (M, K), contiguous, K a multiple of 32.

    Without a norm weight they are x as it is; with one, x is a residual in float32: see kernels.rms_rows.
    """
    count, width = x.shape
    y = squares = sums = None
    if norm_weight is not None:
        norm_weight = norm_weight.contiguous()
        y = torch.empty(count, width, dtype=dtype, device=x.device)
        squares = torch.empty(count, 1, dtype=torch.float32, device=x.device)
    if count <= MAX_DECODE_ROWS:
        sums = torch.empty(width // SPAN, MAX_DECODE_ROWS, dtype=torch.float32, device=x.device)
    block = max(SPAN, min(1024, triton.next_power_of_2(width)))
    _rows_kernel[count,](x, norm_weight, y, sums, squares, count, width, BLOCK_K=block, num_warps=4)
    return Rows(x if y is None else y, sums, squares, eps)


def gemm_triton(
    rows: Rows,
    weight: TritonWeight,
    bias: Tensor | None = None,
    *,
    epilogue: str = "plain",
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    out_dtype: torch.dtype | None = None,
    tile: Tile | None = None,
) -> Rows:
    """Launch for rows.x (M, K) and W (N, K); shapes and dtypes were checked in ops.py.

    Returns Rows of (M, N), or (M, N / 2) for "swiglu": x in `out_dtype` (default: that of rows.x); sums for the two
    fused epilogues where M is 16 or less; squares and `eps` for "residual", which adds to `residual` (M, N) float32 in
    place. `tile` overrides the table's.
    """
    x, sums = rows.x, rows.sums
    count, width = x.shape
    outputs = weight.out_features
    if weight.perm is not None:
        x, sums = x[:, weight.perm], None
    if width % CHUNK:
        x, sums = torch.nn.functional.pad(x, (0, -width % CHUNK)), None
    x = x.contiguous()
    bias, norm_weight = (None if t is None else t.contiguous() for t in (bias, norm_weight))
    chunks, padded, _ = weight.words.shape
    device = device_key(x.device)
    few = count <= MAX_DECODE_ROWS
    if device.turing and x.dtype != torch.float16:
        raise ValueError(f"x is {x.dtype}, the kernels for Turing take torch.float16; load the model in float16")
    if device.turing and not few:
        rows = Rows(x, None, rows.squares, rows.eps)
        return turing.many_rows(rows, width, weight, bias, epilogue, residual, norm_weight, eps, out_dtype or x.dtype)
    if tile is None:
        tile = tile_for(count, outputs, width, weight.group_size, bits=weight.bits, device=device)
    y_width = outputs // 2 if epilogue == "swiglu" else outputs
    y = torch.empty(count, y_width, dtype=out_dtype or x.dtype, device=x.device)
    if count == 0:
        return Rows(y, None, y.new_empty(0, 1, dtype=torch.float32) if epilogue == "residual" else None, eps)
    tiles_n = -(-outputs // tile.block_n)
    y_sums = y_squares = None
    if few and epilogue != "plain":
        y_sums = torch.empty(y_width // SPAN, MAX_DECODE_ROWS, dtype=torch.float32, device=x.device)
    if epilogue == "residual":
        y_squares = torch.empty(count, tiles_n, dtype=torch.float32, device=x.device)
    squares = rows.squares
    flags = {
        "BLOCK_SQUARES": 1 if squares is None else triton.next_power_of_2(squares.shape[1]),
        "GROUP": weight.group_size,
        "WIDEN": x.dtype == torch.bfloat16 and not x.is_cuda,
        "EPILOGUE": EPILOGUES[epilogue],
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    parts = 0 if squares is None else squares.shape[1]
    sizes = (count, outputs, chunks * CHUNK, padded, chunks, width, parts, rows.eps)
    before = (weight.words, weight.scales, weight.zeros, bias, squares, residual, norm_weight, y)
    if few:
        splits = min(tile.split_k, chunks)
        partials = None
        if splits > 1:
            size = tiles_n * splits * tile.block_n * tile.block_m
            partials = torch.empty(size, dtype=torch.float32, device=x.device)
        options = {"BITS": weight.bits, "SPLIT_K": splits, **flags}
        if tile.block_m in TURING_ROWS:
            options["ASM"] = not options.pop("WIDEN") and x.device.type != "cpu"
            for first in range(0, count, tile.block_m):
                part = slice(first, first + tile.block_m)
                x_part, squares_part, residual_part, y_part, y_squares_part = (
                    None if t is None else t[part] for t in (x, squares, residual, y, y_squares)
                )
                turing.few_rows_kernel[tiles_n, splits](
                    x_part, weight.words, weight.scales, weight.zeros, bias, squares_part, residual_part, norm_weight,
                    y_part, None if y_sums is None else y_sums[:, first:], y_squares_part, partials, weight.locks,
                    min(tile.block_m, count - first), *sizes[1:], **options,
                )  # fmt: skip
            return Rows(y, y_sums, y_squares, eps)
        if sums is None:
            sums = rows_triton(x).sums
        _decode_kernel[tiles_n, splits](
            x, sums, *before, y_sums, y_squares, partials, weight.locks, *sizes, **options,
        )  # fmt: skip
    else:
        _prefill_kernel[-(-count // tile.block_m) * tiles_n,](x, *before, y_squares, *sizes, **flags)
    return Rows(y, y_sums, y_squares, eps)
