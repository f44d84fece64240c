"""A weight in int8 with one scale a row: W[n, k] = level[n, k] * scale[n]."""

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = 127  # symmetric: -128 is not used


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """levels (N, K) int8 and scales (N,) float32 of one projection."""

    levels: Tensor
    scales: Tensor

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


def quantize_int8(weight: Tensor) -> Int8Weight:
    """Round a weight (N, K) to the nearest of 255 levels, the largest of each row being level ±127.

    ValueError if the weight is no matrix or holds a number that is not finite.
    """
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected (N, K)")
    levels = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    for first in range(0, len(weight), 4096):  # a float32 copy of the whole head would take 2.5 GB
        rows = weight[first : first + 4096].float()
        largest = rows.abs().amax(1)
        if not bool(largest.isfinite().all()):
            row = first + int((~largest.isfinite()).nonzero()[0])
            raise ValueError(f"row {row} of {len(weight)} holds a number that is not finite; the weight is damaged")
        scale = (largest / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)  # a row of zeros: levels of zero
        scales[first : first + 4096] = scale
        levels[first : first + 4096] = rows.div_(scale[:, None]).round_()
    return Int8Weight(levels, scales)
