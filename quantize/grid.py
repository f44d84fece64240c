"""The levels that a group of weights may take: w = (level - zero) * scale, with levels 0 … 2^bits - 1.

GPTQ prescribes no grid. The plain one spans the group's largest weight; a slightly narrower one rounds the many small
weights more finely and clips a few large ones. `fit_grid` tries both and keeps what costs least, output by output. On
the four cases of tests/data/gptq this, weighted by what an error in a column costs GPTQ, leaves 0.64 to 0.76 of the
squared output error that auto-gptq 0.7.1 leaves with the plain grid.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import pack_levels, pack_zeros
from qvl_edge.config import QuantConfig
from qvl_edge.errors import CheckpointError
from qvl_edge.model.streaming import check_finite

SMALLEST_SCALE = 2.0**-24  # the smallest positive float16
ROWS = 1024  # rows per slice, where an intermediate result would be as large as the whole matrix
_SPANS = [round(1.08 - 0.04 * step, 2) for step in range(15)]  # shares of the plain scale; below 0.5 never won
_REFINE = (0.98, 1.02)  # around the best of them; finer steps gained nothing on tests/data/gptq


@dataclass(frozen=True, eq=False)
class Quantized:
    """One projection on its grid: W[n, k] = (levels[k, n] - zeros[g, n]) * scales[g, n] with g = g_idx[k].

    levels (K, N) uint8, scales (G, N) float16, zeros (G, N) int32, g_idx (K,) int32.
    """

    levels: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor
    damp_percent: float | None = None  # the damping that made the Hessian positive definite; None: no Hessian was used
    dead_channels: int = 0  # inputs that were 0 in every sample

    def weight(self) -> Tensor:
        """W (N, K) float32, as every reader of the file computes it."""
        weight = torch.empty(self.levels.shape[::-1], dtype=torch.float32, device=self.levels.device)
        zeros, scales = self.zeros.float(), self.scales.float()
        parts = zip(weight.split(ROWS, dim=1), self.levels.split(ROWS), self.g_idx.long().split(ROWS), strict=True)
        for part, levels, group in parts:
            part.copy_(((levels - zeros[group]) * scales[group]).T)
        return weight

    def packed(self, quant: QuantConfig) -> dict[str, Tensor]:
        """qweight, qzeros, scales and g_idx in GPTQ's disk order, on the CPU."""
        return {
            "qweight": pack_levels(self.levels, quant.bits).cpu(),
            "qzeros": pack_zeros(self.zeros, quant.bits, quant.checkpoint_format).cpu(),
            "scales": self.scales.cpu(),
            "g_idx": self.g_idx.cpu(),
        }


def to_levels(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Nearest levels of weight (N, S) on each output's grid, scale and zero (N,): (N, S) in weight's dtype."""
    return ((weight / scale[:, None]).round() + zero[:, None]).clamp(0, 2**bits - 1)


def from_levels(levels: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The weights (N, S) that levels stand for."""
    return (levels - zero[:, None]) * scale[:, None]


def fit_grid(
    weight: Tensor, quant: QuantConfig, *, importance: Tensor | None = None, search: bool = True, name: str = "weight"
) -> tuple[Tensor, Tensor]:
    """Scale and zero (N,) of each output for one group, weight (N, S), with quant's bits and sym.

    Minimizes sum_s importance[s] * (w[s] - rounded w[s])², importance (S,) being 1 everywhere if None. Scales are exact
    in float16, the dtype on disk, so that a solver that works with them corrects for their rounding too. With `sym`
    zero is the middle level; otherwise it lies in 1 … 2^bits - 1: AutoGPTQ v1 stores zero - 1 and its kernels cannot
    read a zero of 0 back. Without `search` it is the plain grid. CheckpointError if a weight is too large for float16
    scales.
    """
    bits, top, middle = quant.bits, 2**quant.bits - 1, 2 ** (quant.bits - 1)
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    plain = (2 * torch.maximum(-low, high) if quant.sym else high - low) / top
    plain = torch.where(plain == 0, torch.ones_like(plain), plain)  # only zeros: any scale represents them exactly
    best_scale, best_zero = plain, torch.full_like(plain, middle)
    best_cost = torch.full_like(plain, torch.inf)

    def offer(scale: Tensor) -> None:
        nonlocal best_scale, best_zero, best_cost
        scale = scale.half().to(weight.dtype).clamp(min=SMALLEST_SCALE)
        if quant.sym:
            zeros = [torch.full_like(scale, middle)]
        else:
            centred = (top / 2 - (low + high) / 2 / scale).round()
            zeros = [(centred + shift).clamp(1, top) for shift in ((-1, 0, 1) if search else (0,))]
        for zero in zeros:
            error = (from_levels(to_levels(weight, scale, zero, bits), scale, zero) - weight).square()
            cost = error.sum(1) if importance is None else error @ importance
            better = cost < best_cost
            best_cost = torch.where(better, cost, best_cost)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)

    if not bool(torch.isfinite(plain.half()).all()):
        raise CheckpointError(
            f"{name} holds {float(weight.abs().max()):.3g}; its scale does not fit into float16 (65504), the dtype "
            "of GPTQ scales. Is the checkpoint damaged?"
        )
    for span in _SPANS if search else (1.0,):
        offer(plain * span)
    coarse = best_scale
    for factor in _REFINE if search else ():
        offer(coarse * factor)
    return best_scale, best_zero


def round_weight(weight: Tensor, quant: QuantConfig, *, name: str = "weight") -> Quantized:
    """Round weight (N, K) to nearest, without data: on the same kind of grid, all channels being equally important."""
    check_finite(f"{name}.weight", weight)
    weight = weight.float()
    n_in = weight.shape[1]
    group_size = n_in // quant.groups(n_in)
    levels, scales, zeros = [], [], []
    for part in weight.split(group_size, dim=1):
        scale, zero = fit_grid(part, quant, name=name)
        levels.append(to_levels(part, scale, zero, quant.bits).T.to(torch.uint8))
        scales.append(scale.half())
        zeros.append(zero.int())
    g_idx = torch.arange(n_in, device=weight.device, dtype=torch.int32) // group_size
    return Quantized(torch.cat(levels).contiguous(), torch.stack(scales), torch.stack(zeros), g_idx)
