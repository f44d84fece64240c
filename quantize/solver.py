"""GPTQ (Frantar et al., arXiv:2210.17323), and coordinate descent on what it found.

GPTQ rounds one column after another, and the columns that follow make up for each error. Column k of W (N, K) is
rounded; its error divided by U[k, k], times row k of U, is subtracted from the later columns. U is the upper Cholesky
factor of the inverse Hessian (U.T @ U = inverse), H = 2 / n * sum of x x.T. That is the least-squares solution over the
columns that are still free, found without solving again.

GPTQ settles a column before it knows how those after it will be rounded. Once all are, each group can take the scale
that is best while everything else stays, and each column the levels: QuantEase (Behdin et al., arXiv:2309.01885), here
for the scales as well. No step makes the error larger.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.grid import ROWS, SMALLEST_SCALE, Quantized, fit_grid, from_levels, to_levels
from qvl_edge.config import QuantConfig
from qvl_edge.errors import CalibrationError
from qvl_edge.model.streaming import check_finite, is_finite

BLOCK = 128  # columns between two updates of all that follow (the paper's lazy batches)


class Hessian:
    """H = 2 / n * sum of x x.T over a projection's inputs, float32: the cost of changing its weights."""

    def __init__(self, in_features: int, *, device: torch.device | str = "cpu"):
        self._sum = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.rows = 0  # inputs seen

    def add(self, x: Tensor) -> None:
        """Add inputs x (..., K) of any floating dtype."""
        x = x.reshape(-1, self._sum.shape[0]).to(self._sum)
        self._sum.addmm_(x.T, x)
        self.rows += len(x)

    def matrix(self) -> Tensor:
        """H (K, K) float32, made in place of the sum: call it once. CalibrationError if nothing was added."""
        if self.rows == 0:
            raise CalibrationError("no calibration input reached this projection; add samples")
        return self._sum.mul_(2 / self.rows)


def output_energy(weight: Tensor, hessian: Tensor | None, *, minus: Tensor | None = None) -> float:
    """|W X|² or, with `minus`, |(W - minus) X|², up to a factor, from the Hessian of X (None: X = I)."""
    total = 0.0
    for start in range(0, len(weight), ROWS):
        rows = weight[start : start + ROWS].to(weight.dtype if hessian is None else hessian.dtype)
        if minus is not None:
            rows = rows - minus[start : start + ROWS].to(rows)
        total += float((rows if hessian is None else rows @ hessian).mul(rows).sum(dtype=torch.float64))
    return total


def relative_error(weight: Tensor, quantized: Tensor, hessian: Tensor | None, *, whole: float | None = None) -> float:
    """|(W - Q) X|² / |W X|²; 0 for 0 / 0. `whole` is output_energy(weight, hessian) where that is known."""
    lost = output_energy(weight, hessian, minus=quantized)
    return lost / (output_energy(weight, hessian) if whole is None else whole) if lost else 0.0


def _mean_energy(hessian: Tensor) -> Tensor:
    """Mean of the diagonal; 1 where nothing was ever active."""
    mean = hessian.diagonal().mean()
    return torch.where(mean == 0, torch.ones_like(mean), mean)


def inverse_factor(
    hessian: Tensor, damp_percent: float, *, order: Tensor | None = None, name: str = "weight"
) -> tuple[Tensor, float]:
    """U (K, K) upper triangular with U.T @ U = (H + damp * mean(diag H) * I)^-1, and the damping that it took.

    H is permuted by `order` (K,). A channel that was never active, whose row and column are 0, gets the mean energy on
    the diagonal. Starts at `damp_percent` and doubles it while the matrix is not positive definite (fewer
    samples than channels, or channels that repeat one another). CalibrationError if a damping of 1 does not suffice.
    """
    if order is None:
        order = torch.arange(len(hessian), device=hessian.device)
    backwards = order.flip(0)
    mean = _mean_energy(hessian)
    dead = torch.where(hessian.diagonal() == 0, mean, 0.0)[backwards]
    damp = damp_percent
    while True:
        # With J the reversal of order, J H J = L L.T gives H = (J L J)(J L J).T, whose first factor R is upper
        # triangular; then U = R^-1. One factorization and one triangular inverse instead of two and a full inverse.
        # At K = 11,008 each of these matrices is 485 MB, so each is freed or reused as soon as it can be.
        matrix = hessian[backwards[:, None], backwards]
        matrix.diagonal().add_(damp * mean).add_(dead)
        info = torch.empty((), dtype=torch.int32, device=hessian.device)
        lower = matrix.T  # the same, being symmetric, in LAPACK's column-major order
        torch.linalg.cholesky_ex(lower, out=(lower, info))
        if int(info) == 0:
            upper = lower.flip(0, 1)
            del matrix, lower
            factor = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
            torch.linalg.solve_triangular(upper, factor, upper=True, out=factor)
            del upper
            if is_finite(factor):
                return factor, damp
        if damp >= 1:
            raise CalibrationError(
                f"{name}: the Hessian is not positive definite even with damp_percent {damp:g}; "
                "use more or other calibration samples"
            )
        damp = min(2 * damp, 1.0)


def _block_edges(in_features: int, group: int, *, aligned: bool) -> list[int]:
    """Where lazy updates are applied: every BLOCK columns, and where a grid is fitted, which needs current weights."""
    edges = {*range(0, in_features, BLOCK), in_features}
    return sorted(edges | set(range(0, in_features, group)) if aligned else edges)


@dataclass(frozen=True)
class Method:
    """The steps beyond GPTQ as published: all of them, unless a comparison asks for fewer."""

    # desc_act's order with static_groups also without desc_act: the files stay in channel order
    by_activity: bool = True
    search_grid: bool = True  # fit_grid's search instead of the grid that spans the largest weight
    sweeps: int = 3  # of coordinate descent over what GPTQ found
    follow: float = 1.0  # share of the difference to the float model's activations that a projection makes up for


FULL = Method()
PLAIN = Method(by_activity=False, search_grid=False, sweeps=0, follow=0.0)
"""GPTQ as auto-gptq does it."""


def quantize_weight(
    weight: Tensor,
    hessian: Tensor,
    quant: QuantConfig,
    *,
    drift: Tensor | None = None,
    method: Method = FULL,
    name: str = "weight",
) -> Quantized:
    """GPTQ on one projection: weight (N, K), hessian (K, K) of its inputs, in whose dtype everything is computed.

    drift (N, K): 2 / n * sum of d x.T, d being what the outputs W x lack of the float model's. What is rounded is then
    W + drift H^-1, the least-squares weight for the float model's outputs (GPTAQ, Li et al., arXiv:2504.02692; QEP,
    Arai and Ichikawa, arXiv:2504.09629).

    Channels that were never active (H[k, k] = 0) are rounded to nearest rather than set to zero: that costs nothing on
    the samples, and other inputs may use the channel. With desc_act and without static_groups a group is `group_size`
    channels in descending order of energy, as in auto-gptq; otherwise groups are contiguous on disk.
    CheckpointError or CalibrationError name `name` where weights or inputs are not finite.
    """
    check_finite(f"{name}.weight", weight)
    if not is_finite(hessian):
        raise CalibrationError(
            f"the inputs of {name} hold NaN or infinity; look for a damaged layer before it, or an unusual sample"
        )
    weight = weight.to(hessian)
    aim, levels, scales, zeros, g_idx, damp = _solve(weight, hessian, drift, quant, method, name)

    def found() -> Quantized:
        dead = int((hessian.diagonal() == 0).sum())
        return Quantized(levels, scales.half(), zeros.int(), g_idx.int(), damp_percent=damp, dead_channels=dead)

    if method.sweeps:
        residual = found().weight().to(weight).neg_().add_(aim).T.contiguous()
        del aim
        ridge = damp * float(_mean_energy(hessian))
        descend(residual, levels, scales, zeros, g_idx, hessian, ridge, bits=quant.bits, sweeps=method.sweeps)
    return found()


def _solve(
    weight: Tensor, hessian: Tensor, drift: Tensor | None, quant: QuantConfig, method: Method, name: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float]:
    """One pass of GPTQ: the weight that was rounded (N, K), levels (K, N) uint8, scales and zeros (G, N) in H's dtype,
    g_idx (K,), and the damping."""
    dtype, device, (n_out, n_in) = hessian.dtype, hessian.device, weight.shape
    count, bits = quant.groups(n_in), quant.bits
    group = n_in // count
    energy = hessian.diagonal()
    ordered = quant.desc_act or method.by_activity
    order = torch.argsort(energy, descending=True, stable=True) if ordered else torch.arange(n_in, device=device)
    static = quant.static_groups or not quant.desc_act and method.by_activity
    back = torch.argsort(order)
    factor, damp = inverse_factor(hessian, quant.damp_percent, order=order, name=name)
    work = weight[:, order]  # a copy
    aim = weight
    if drift is not None:
        for rows, step in zip(work.split(ROWS), drift.split(ROWS), strict=True):
            rows += (step[:, order] @ factor.T) @ factor
        aim = work[:, back]
    # what an error in a column costs once the later ones have made up for it; the damping alone where nothing was seen
    importance = factor.diagonal().square().reciprocal()
    importance = torch.where(energy[order] == 0, damp * _mean_energy(hessian), importance)

    natural = torch.arange(n_in, device=device) // group
    g_idx = natural[order] if static else natural  # in working order
    scales = torch.empty(count, n_out, dtype=dtype, device=device)
    zeros = torch.empty_like(scales)

    def fit(index: int, columns: Tensor) -> None:
        scales[index], zeros[index] = fit_grid(
            work[:, columns], quant, importance=importance[columns], search=method.search_grid, name=name
        )

    if static:
        for index in range(count):
            fit(index, (g_idx == index).nonzero()[:, 0])
    levels = torch.empty(n_in, n_out, dtype=torch.uint8, device=device)
    edges = _block_edges(n_in, group, aligned=not static)
    for start, end in zip(edges, edges[1:], strict=False):
        if not static and start % group == 0:
            fit(start // group, torch.arange(start, start + group, device=device))
        block, triangle = work[:, start:end], factor[start:end, start:end]
        errors = torch.empty_like(block)
        groups = g_idx[start:end].tolist()
        for k in range(end - start):
            scale, zero = scales[groups[k]], zeros[groups[k]]
            column = block[:, k : k + 1]
            level = to_levels(column, scale, zero, bits)
            error = (column - from_levels(level, scale, zero)) / triangle[k, k]
            block[:, k:].addcmul_(error, triangle[k, k:], value=-1)
            errors[:, k] = error[:, 0]
            levels[start + k] = level[:, 0].to(torch.uint8)
        work[:, end:].addmm_(errors, factor[start:end, end:], alpha=-1)

    return aim, levels[back], scales, zeros, g_idx[back], damp


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
    damping: without it, directions that the samples barely cover would be sacrificed to fit the others slightly better.
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
            change = torch.where(found.isfinite() & (found >= SMALLEST_SCALE), found, scale) - scale
            scale += change
            residual[columns] -= change * steps
            pull = pull.sub_(bend.mul_(change)).div_(scale)  # from here on in levels
            moves = _settle(steps, pull, curvature, -zero, 2**bits - 1 - zero)
            residual[columns] -= moves * scale
            levels[columns] = moves.add_(steps).add_(zero).to(torch.uint8)


def _settle(steps: Tensor, pull: Tensor, curvature: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The change of the levels `steps` (S, N) when each row in turn takes its best value between low and high (N,).

    pull (S, N), in levels, is overwritten.
    """
    moves = torch.empty_like(pull)
    for start in range(0, len(steps), BLOCK):
        block, rest = slice(start, start + BLOCK), slice(start + BLOCK, None)
        now, rows, made = steps[block], pull[block], moves[block]
        triangle = curvature[block, block]
        for k, bend in enumerate(triangle.diagonal().tolist()):
            torch.sub((now[k] + rows[k] / bend).round_().clamp_(low, high), now[k], out=made[k])
            rows[k + 1 :].addcmul_(triangle[k + 1 :, k, None], made[k], value=-1)
        pull[rest].addmm_(curvature[rest, block], made, alpha=-1)
    return moves
