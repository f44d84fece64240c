"""int4_gemm's definition: dequantize, multiply in float32."""

import torch.nn.functional as F
from torch import Tensor

from kernels.int4_layout import Int4Weight


def dequantize(weight: Int4Weight) -> Tensor:
    """W (N, K) float32: W[n, k] = (level[k, n] - zeros[g_idx[k], n]) * scales[g_idx[k], n]."""
    group = weight.g_idx().long()
    return ((weight.levels().float() - weight.zeros.float()[group]) * weight.scales.float()[group]).T.contiguous()


def int4_gemm_torch(x: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    """x (..., K) -> x @ W.T + bias (..., N) in x's dtype; sums in float32."""
    return F.linear(x.float(), dequantize(weight), None if bias is None else bias.float()).to(x.dtype)
