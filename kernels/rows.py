"""Rows of activations, with what the next int4_gemm needs beside them."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SPAN = 32  # channels that share one sum: the smallest group
MOST_SUMMED = 16  # rows that carry sums: what one program of the decode kernel computes


@dataclass(frozen=True, eq=False)
class Rows:
    """M rows of K channels, made by one fused kernel for the next.

    x (M, K) float16 or bfloat16. sums (K / 32, 16) float32 or None: sums[j, m] adds up channels 32 j to 32 j + 31 of
    row m, columns from M on hold anything; made for 16 rows at most, and computed by the consumer where it is None.
    squares (M, T) float32 or None: parts of each row's sum of squares before its norm weight was multiplied in; the
    consumer multiplies its result by rsqrt(sum / K + eps), so that no kernel waits for the norm of a whole row.
    """

    x: Tensor
    sums: Tensor | None = None
    squares: Tensor | None = None
    eps: float = 0.0

    def rsqrt(self) -> Tensor | None:
        """The factor of each row (M, 1) float32 that is left to the consumer; None where there is none."""
        if self.squares is None:
            return None
        return torch.rsqrt(self.squares.sum(1, keepdim=True) / self.x.shape[1] + self.eps)


def sum_rows_torch(x: Tensor) -> Tensor:
    """The definition of Rows.sums: x (M, K), M of 16 or less -> (K / 32, 16) float32, zero past M."""
    sums = x.float().unflatten(1, (-1, SPAN)).sum(-1)
    return F.pad(sums, (0, 0, 0, MOST_SUMMED - len(x))).T.contiguous()


def rms_rows_torch(residual: Tensor, norm_weight: Tensor, eps: float, dtype: torch.dtype) -> Rows:
    """The definition of a normed row whose factor is left to the consumer: residual (M, K) float32 -> Rows."""
    x = (residual * norm_weight.float()).to(dtype)
    sums = sum_rows_torch(x) if len(x) <= MOST_SUMMED else None
    return Rows(x, sums, residual.square().sum(1, keepdim=True), eps)
