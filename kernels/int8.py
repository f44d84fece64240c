"""int8 with one scale a row: of a weight (lm_head), and of the key-value cache."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

MAX_LEVEL = 127  # symmetric: -128 is not used
MIN_CACHE_SCALE = 2.0**-17
_ROWS_AT_ONCE = 4096  # a float32 copy of the whole head would take 2.5 GB


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """W[n, k] = levels[n, k] * scales[n]: levels (N, K) int8 and scales (N,) float32 of one projection."""

    levels: Tensor
    scales: Tensor
    bits: ClassVar[int] = 8

    @property
    def out_features(self) -> int:
        """N."""
        return self.levels.shape[0]

    @property
    def in_features(self) -> int:
        """K."""
        return self.levels.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the levels are."""
        return self.levels.device

    def dequantize(self) -> Tensor:
        """W (N, K) float32."""
        return self.levels.float() * self.scales[:, None]


def quantize_int8(weight: Tensor) -> Int8Weight:
    """Round a weight (N, K) to the nearest of 255 levels; the largest of each row becomes level ±127.

    ValueError if the weight is not a matrix or holds NaN or infinity.
    """
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected (N, K)")
    levels = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    for first in range(0, len(weight), _ROWS_AT_ONCE):
        part = slice(first, first + _ROWS_AT_ONCE)
        rows = weight[part].float()
        largest = rows.abs().amax(1)
        if not bool(largest.isfinite().all()):
            row = first + int((~largest.isfinite()).nonzero()[0])
            raise ValueError(f"row {row} of {len(weight)} holds NaN or infinity")
        scale = (largest / MAX_LEVEL).clamp(min=torch.finfo(torch.float32).tiny)  # a row of zeros: levels of zero
        scales[part] = scale
        levels[part] = rows.div_(scale[:, None]).round_()
    return Int8Weight(levels, scales)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Keys or values x (..., D) in a float dtype -> levels (..., D) int8 and scales (...) float16.

        scale = float16(max(max|x| / 127, 2^-17))      level = round(x / scale), half to even      x ~ level * scale

    The smallest scale is the smallest float16 whose rounding, half of 2^-24, keeps x / scale below 127.5, so no level
    is clipped: the error is at most scale / 2 for every finite row whose scale is finite, and a row of zeros is exact.
    """
    x = x.float()
    scales = (x.abs().amax(-1) / MAX_LEVEL).clamp(min=MIN_CACHE_SCALE).half()
    return (x / scales.float().unsqueeze(-1)).round_().to(torch.int8), scales


def dequantize_rows(levels: Tensor, scales: Tensor) -> Tensor:
    """levels (..., D) int8 and scales (...) float16 -> (..., D) float32."""
    return levels.float() * scales.float().unsqueeze(-1)
