"""The levels that a group of weights may take: w = (level - zero) * scale, with levels 0 … 2^bits - 1.

GPTQ prescribes no grid. The plain one spans the group's largest weight; a slightly narrower one rounds the many small
weights more finely and clips a few large ones. `fit_grid` tries both and keeps what costs least, output by output. On
the four cases of tests/data/gptq this, weighted by what an error in a column costs GPTQ, leaves 0.64 to 0.76 of the
squared output error that auto-gptq 0.7.1 leaves with the plain grid.
"""

import torch
from torch import Tensor

from qvl_edge.errors import CheckpointError

_SPANS = [round(1.08 - 0.04 * step, 2) for step in range(15)]  # shares of the plain scale; below 0.5 never won
_REFINE = (0.98, 1.02)  # around the best of them; finer steps gained nothing on tests/data/gptq
SMALLEST = 2.0**-24  # the smallest positive float16


def to_levels(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Nearest levels of weight (N, S) on each output's grid, scale and zero (N,): (N, S) in weight's dtype."""
    return ((weight / scale[:, None]).round() + zero[:, None]).clamp(0, 2**bits - 1)


def from_levels(levels: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The weights (N, S) that levels stand for."""
    return (levels - zero[:, None]) * scale[:, None]


def fit_grid(
    weight: Tensor,
    *,
    bits: int,
    sym: bool,
    importance: Tensor | None = None,
    search: bool = True,
    name: str = "weight",
) -> tuple[Tensor, Tensor]:
    """Scale and zero (N,) of each output for one group, weight (N, S).

    Minimizes sum_s importance[s] * (w[s] - rounded w[s])², importance (S,) being 1 everywhere if None. Scales are exact
    in float16, the dtype on disk, so that a solver that runs on them corrects for their rounding too. With `sym` zero
    is the middle level; otherwise it lies in 1 … 2^bits - 1: AutoGPTQ v1 stores zero - 1 and its kernels cannot read a
    zero of 0 back. Without `search` it is the plain grid. CheckpointError if a weight is too large for float16 scales.
    """
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    plain = (2 * torch.maximum(-low, high) if sym else high - low) / top
    plain = torch.where(plain == 0, torch.ones_like(plain), plain)  # only zeros: any scale holds them exactly
    best_scale, best_zero = plain, torch.full_like(plain, middle)
    best_cost = torch.full_like(plain, torch.inf)

    def offer(scale: Tensor) -> None:
        nonlocal best_scale, best_zero, best_cost
        scale = scale.half().to(weight.dtype).clamp(min=SMALLEST)
        if sym:
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
