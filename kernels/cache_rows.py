"""Rows of an int8 cache: the one statement of how a key or value becomes int8, and back.

    scale = float16(max(max|x| / 127, 2^-17))      level = round(x / scale), half to even      x ~ level * scale

One scale stands for one token of one head. The floor is the smallest float16 whose rounding, half of 2^-24, keeps x /
scale below 127.5, so no level is ever cut off: the error is at most scale / 2, for every finite row whose scale is
finite, and a row of zeros is exact.
"""

import torch
from torch import Tensor

SMALLEST_SCALE = 2.0**-17


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., D) in a float dtype -> levels (..., D) int8 and scales (...) float16."""
    x = x.float()
    scales = (x.abs().amax(-1) / 127).clamp(min=SMALLEST_SCALE).half()
    return torch.round(x / scales.float().unsqueeze(-1)).to(torch.int8), scales


def dequantize_rows(levels: Tensor, scales: Tensor) -> Tensor:
    """levels (..., D) int8 and scales (...) float16 -> (..., D) float32."""
    return levels.float() * scales.float().unsqueeze(-1)
