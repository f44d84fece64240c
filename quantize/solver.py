"""GPTQ (Frantar et al., arXiv:2210.17323): round one column after another and let those that follow make up for it.

Column k of W (N, K) is rounded; its error divided by U[k, k], times row k of U, is taken off the later columns. U is
the upper Cholesky factor of the inverse Hessian (U.T @ U = inverse), H = 2 / n * sum of x x.T. That is the
least-squares answer of the columns that are still free, found without solving anew.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.int4_layout import pack_levels, pack_zeros
from quantize.descent import descend
from quantize.finite import is_finite
from quantize.grid import fit_grid, from_levels, to_levels
from qvl_edge.config import QuantConfig
from qvl_edge.errors import CalibrationError, CheckpointError

BLOCK = 128  # columns between two updates of all that follow (the paper's lazy batches)
_ROWS = 1024  # of a matrix at a time, where an intermediate result would be as large as the matrix


class Hessian:
    """What a projection's inputs say about the cost of changing its weights: 2 / n * sum of x x.T, float32."""

    def __init__(self, in_features: int, *, device: torch.device | str = "cpu"):
        self._sum = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.rows = 0  # inputs seen

    def add(self, x: Tensor) -> None:
        """Take in inputs x (..., K) of any floating dtype."""
        x = x.reshape(-1, self._sum.shape[0]).to(self._sum)
        self._sum.addmm_(x.T, x)
        self.rows += len(x)

    def matrix(self) -> Tensor:
        """H (K, K) float32, in the memory of the sum: the last call. CalibrationError if nothing was added."""
        if self.rows == 0:
            raise CalibrationError("no calibration input reached this projection; add samples")
        return self._sum.mul_(2 / self.rows)


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
        parts = zip(weight.split(_ROWS, dim=1), self.levels.split(_ROWS), self.g_idx.long().split(_ROWS), strict=True)
        for part, levels, group in parts:
            part.copy_(((levels - zeros[group]) * scales[group]).T)
        return weight

    def packed(self, quant: QuantConfig) -> dict[str, Tensor]:
        """qweight, qzeros, scales and g_idx in the order of the disk, on the CPU."""
        return {
            "qweight": pack_levels(self.levels, quant.bits).cpu(),
            "qzeros": pack_zeros(self.zeros, quant.bits, quant.checkpoint_format).cpu(),
            "scales": self.scales.cpu(),
            "g_idx": self.g_idx.cpu(),
        }


def output_energy(weight: Tensor, hessian: Tensor | None, *, minus: Tensor | None = None) -> float:
    """|W X|² or, with `minus`, |(W - minus) X|², by way of the Hessian of X; X = I if that is None. Up to a factor."""
    total = 0.0
    for start in range(0, len(weight), _ROWS):
        rows = weight[start : start + _ROWS].to(weight.dtype if hessian is None else hessian.dtype)
        if minus is not None:
            rows = rows - minus[start : start + _ROWS].to(rows)
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

    H is taken in `order` (K,), and a channel that was never active as one of mean energy: its row and column are 0, so
    that it stands alone. Starts at `damp_percent` and doubles it while the matrix is not positive definite (fewer
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
        # At K = 11,008 each of these matrices is 485 MB, so each takes the place of one that is not needed any more.
        matrix = hessian[backwards[:, None], backwards]
        matrix.diagonal().add_(damp * mean).add_(dead)
        info = torch.empty((), dtype=torch.int32, device=hessian.device)
        lower = matrix.T  # the same, being symmetric, in the order that LAPACK works in
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


def _check_finite(weight: Tensor, hessian: Tensor | None, name: str) -> None:
    if not is_finite(weight):
        raise CheckpointError(f"{name}.weight holds NaN or infinity; the checkpoint is damaged, copy it again")
    if hessian is not None and not is_finite(hessian):
        raise CalibrationError(
            f"the inputs of {name} hold NaN or infinity; look for a damaged layer before it, or an unusual sample"
        )


def _block_edges(in_features: int, group: int, *, aligned: bool) -> list[int]:
    """Where lazy updates are applied: every BLOCK columns, and where a grid is fitted, which needs current weights."""
    edges = {*range(0, in_features, BLOCK), in_features}
    return sorted(edges | set(range(0, in_features, group)) if aligned else edges)


@dataclass(frozen=True)
class Method:
    """What is done beyond GPTQ as published; all of it unless a comparison asks for less."""

    by_activity: bool = (
        True  # the order of desc_act with static_groups also without desc_act: files stay in channel order
    )
    search_grid: bool = True  # fit_grid's search instead of the grid that spans the largest weight
    sweeps: int = 3  # of coordinate descent over what GPTQ found
    follow: float = 1.0  # share of what the float model's activations differ by that a projection makes up for


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

    drift (N, K): 2 / n * sum of d x.T, d being what is to be added to the outputs W x to come back to the float model.
    What is rounded is then W + drift H^-1, the weight that comes nearest to both (GPTAQ, Li et al., arXiv:2504.02692;
    QEP, Arai and Ichikawa, arXiv:2504.09629).

    Channels that were never active (H[k, k] = 0) are rounded to nearest rather than set to zero: that costs nothing on
    the samples, and inputs beyond them may use the channel. With desc_act and without static_groups a group is
    `group_size` channels in the order of falling energy, as in auto-gptq; otherwise groups are neighbours on disk.
    CheckpointError or CalibrationError name `name` where weights or inputs are not finite.
    """
    _check_finite(weight, hessian, name)
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
    """One pass of GPTQ: what was rounded (N, K), levels (K, N) uint8, scales and zeros (G, N) in H's dtype, g_idx (K,),
    and the damping."""
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
        for rows, step in zip(work.split(_ROWS), drift.split(_ROWS), strict=True):
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
            work[:, columns],
            bits=bits,
            sym=quant.sym,
            importance=importance[columns],
            search=method.search_grid,
            name=name,
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


def round_weight(weight: Tensor, quant: QuantConfig, *, name: str = "weight") -> Quantized:
    """Round to nearest, without data: weight (N, K) on the same kind of grid, all channels being equally important."""
    _check_finite(weight, None, name)
    weight = weight.float()
    n_in = weight.shape[1]
    count = quant.groups(n_in)
    levels, scales, zeros = [], [], []
    for part in weight.split(n_in // count, dim=1):
        scale, zero = fit_grid(part, bits=quant.bits, sym=quant.sym, name=name)
        levels.append(to_levels(part, scale, zero, quant.bits).T.to(torch.uint8))
        scales.append(scale.half())
        zeros.append(zero.int())
    g_idx = torch.arange(n_in, device=weight.device, dtype=torch.int32) // (n_in // count)
    return Quantized(torch.cat(levels).contiguous(), torch.stack(scales), torch.stack(zeros), g_idx)
