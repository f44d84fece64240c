"""Coordinate descent on what GPTQ found: QuantEase (Behdin et al., arXiv:2309.01885), here on the scales as well.

GPTQ settles a column before it knows how those after it will be rounded. Once all are, each group can take the scale
that is best while all else stays, and each column the levels. No step makes the error larger.
"""

import torch
from torch import Tensor

from quantize.grid import SMALLEST

_BLOCK = 128  # columns between two updates of the rest of their group


def descend(
    residual: Tensor,
    levels: Tensor,
    scales: Tensor,
    zeros: Tensor,
    g_idx: Tensor,
    hessian: Tensor,
    ridge: float,
    *,
    bits: int,
    sweeps: int,
) -> None:
    """Lower tr R.T (H + ridge I) R in place, R (K, N) being the residual (W - Q).T and H (K, K) the Hessian.

    levels (K, N) uint8; scales, exact in float16, and zeros (G, N) in H's dtype; g_idx (K,). The ridge is GPTQ's
    damping: without it, what the samples hardly show would be given up for the last bit of what they do.
    """
    groups = [(g_idx == index).nonzero()[:, 0] for index in range(len(scales))]
    for _ in range(sweeps):
        for columns, scale, zero in zip(groups, scales, zeros, strict=True):
            curvature = hessian[columns[:, None], columns]
            curvature.diagonal().add_(ridge)
            pull = (hessian[columns] @ residual).add_(residual[columns], alpha=ridge)  # half of the error's fall
            steps = levels[columns] - zero
            bend = curvature @ steps
            found = (scale + (steps * pull).sum(0) / (steps * bend).sum(0)).half().to(scale)
            change = torch.where(found.isfinite() & (found >= SMALLEST), found, scale) - scale
            scale += change
            residual[columns] -= change * steps
            pull = pull.sub_(bend.mul_(change)).div_(scale)  # from here on in levels
            moves = _settle(steps, pull, curvature, -zero, 2**bits - 1 - zero)
            residual[columns] -= moves * scale
            levels[columns] = moves.add_(steps).add_(zero).to(torch.uint8)


def _settle(steps: Tensor, pull: Tensor, curvature: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """By how much the levels `steps` (S, N) move when one row after another takes its best between low and high (N,).

    pull (S, N), in levels, is used up.
    """
    moves = torch.empty_like(pull)
    for start in range(0, len(steps), _BLOCK):
        block, rest = slice(start, start + _BLOCK), slice(start + _BLOCK, None)
        now, rows, made = steps[block], pull[block], moves[block]
        triangle = curvature[block, block]
        for k, bend in enumerate(triangle.diagonal().tolist()):
            torch.sub((now[k] + rows[k] / bend).round_().clamp_(low, high), now[k], out=made[k])
            rows[k + 1 :].addcmul_(triangle[k + 1 :, k, None], made[k], value=-1)
        pull[rest].addmm_(curvature[rest, block], made, alpha=-1)
    return moves
