"""Rows that no other kernel has made: the sums of an x, and the rows of a residual."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference import MAX_DECODE_ROWS, SPAN, Rows


@triton.jit(do_not_specialize_on_alignment=["M"])  # else every 16th length of a prompt compiles anew
def _rows_kernel(
    x_ptr, norm_ptr, y_ptr, sums_ptr, squares_ptr, M, K, BLOCK_K: tl.constexpr, NORM: tl.constexpr, SUMS: tl.constexpr
):
    """One program reads one row (K a multiple of 32): its sums over 32 channels, and with NORM what rms_rows makes."""
    m = tl.program_id(0)
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_K,), tl.float32)
    for first in range(0, K, BLOCK_K):
        kept = first + k < K
        x = tl.load(x_ptr + m.to(tl.int64) * K + first + k, mask=kept, other=0.0).to(tl.float32)
        if NORM:
            total += x * x
            y = (x * tl.load(norm_ptr + first + k, mask=kept, other=0.0).to(tl.float32)).to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + m.to(tl.int64) * K + first + k, y, mask=kept)
            x = y.to(tl.float32)
        if SUMS:
            sums = tl.sum(tl.reshape(x, (BLOCK_K // 32, 32)), 1)
            span = first // 32 + tl.arange(0, BLOCK_K // 32)
            tl.store(sums_ptr + span * 16 + m, sums, mask=span * 32 < K)
    if NORM:
        tl.store(squares_ptr + m, tl.sum(total, 0))


def sum_rows(x: Tensor) -> Tensor:
    """Rows.sums of x (M, K), contiguous, M of 16 or less, K a multiple of 32."""
    count, width = x.shape
    sums = torch.empty(width // SPAN, MAX_DECODE_ROWS, dtype=torch.float32, device=x.device)
    _rows_kernel[count,](
        x, None, None, sums, None, count, width, BLOCK_K=_row_block(width), NORM=False, SUMS=True, num_warps=4
    )
    return sums


def rms_rows_triton(residual: Tensor, norm_weight: Tensor, eps: float, dtype: torch.dtype) -> Rows:
    """residual (M, K) float32, contiguous -> Rows whose row factor is left to the consumer (RMSNorm)."""
    count, width = residual.shape
    norm_weight = norm_weight.contiguous()
    few = count <= MAX_DECODE_ROWS
    x = torch.empty(count, width, dtype=dtype, device=residual.device)
    squares = torch.empty(count, 1, dtype=torch.float32, device=residual.device)
    sums = torch.empty(width // SPAN, MAX_DECODE_ROWS, dtype=torch.float32, device=residual.device) if few else None
    _rows_kernel[count,](
        residual, norm_weight, x, sums, squares, count, width,
        BLOCK_K=_row_block(width), NORM=True, SUMS=few, num_warps=4,
    )  # fmt: skip
    return Rows(x, sums, squares, eps)


def _row_block(width: int) -> int:
    return max(SPAN, min(1024, triton.next_power_of_2(width)))
