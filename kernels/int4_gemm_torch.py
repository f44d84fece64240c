"""The definitions of int4_gemm, its fused forms and int8_gemm: dequantize, multiply in float32."""

import torch.nn.functional as F
from torch import Tensor

from kernels.int4_layout import Int4Weight
from kernels.int8_layout import Int8Weight
from kernels.rows import MOST_SUMMED, Rows, rms_rows_torch, sum_rows_torch


def dequantize(weight: Int4Weight) -> Tensor:
    """W (N, K) float32: W[n, k] = (level[k, n] - zeros[g_idx[k], n]) * scales[g_idx[k], n]."""
    group = weight.g_idx().long()
    return ((weight.levels().float() - weight.zeros.float()[group]) * weight.scales.float()[group]).T.contiguous()


def _product(rows: Rows, weight: Int4Weight, bias: Tensor | None) -> Tensor:
    """rows.x (..., K) -> (..., N) float32, with the row factor and the bias."""
    y = F.linear(rows.x.float(), dequantize(weight))
    if (factor := rows.rsqrt()) is not None:
        y *= factor
    return y if bias is None else y + bias.float()


def int4_gemm_torch(rows: Rows, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    """rows.x (..., K) -> x @ W.T + bias (..., N) in x's dtype; sums in float32."""
    return _product(rows, weight, bias).to(rows.x.dtype)


def int4_gemm_swiglu_torch(rows: Rows, weight: Int4Weight, bias: Tensor | None = None) -> Rows:
    """See kernels.int4_gemm_swiglu: even outputs times silu of odd ones."""
    up, gate = _product(rows, weight, bias).unflatten(1, (-1, 2)).unbind(2)
    y = (up * F.silu(gate)).to(rows.x.dtype)
    return Rows(y, sum_rows_torch(y) if len(y) <= MOST_SUMMED and y.shape[1] % 32 == 0 else None)


def int4_gemm_residual_torch(
    rows: Rows, weight: Int4Weight, bias: Tensor | None, residual: Tensor, norm_weight: Tensor, eps: float
) -> Rows:
    """See kernels.int4_gemm_residual; adds to `residual` in place."""
    residual += _product(rows, weight, bias)
    return rms_rows_torch(residual, norm_weight, eps, rows.x.dtype)


def int8_gemm_torch(x: Tensor, weight: Int8Weight) -> Tensor:
    """x (..., K) -> x @ W.T (..., N) float32."""
    return F.linear(x.float(), weight.levels.float() * weight.scales[:, None])
