"""Muon (Jordan et al. 2024, "Muon: an optimizer for hidden layers"): momentum whose update is made orthogonal."""

from collections.abc import Sequence

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, as published
ITERATIONS = 5


def orthogonalize(matrices: Tensor) -> Tensor:
    """Push the singular values of each matrix (L, N, K), N <= K, towards 1 by Newton-Schulz iterations."""
    a, b, c = COEFFICIENTS
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class Muon(torch.optim.Optimizer):
    """For matrices only. The update has the size of AdamW's (0.2 sqrt(max(N, K)), Liu et al., arXiv:2502.16982).

    torch.optim.Muon iterates in bfloat16: 0.46 s a step for the small model on two cores without AMX, a third of the
    whole step. This one iterates in float32 over all matrices of one shape at once, and a step is no slower with it.
    """

    def __init__(
        self, params: Sequence[Tensor], *, lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.05
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(tuple(parameter.shape), []).append(parameter)
            for (rows, columns), parameters in shapes.items():
                updates = torch.stack([self._momentum(p, group["momentum"]) for p in parameters])
                updates = orthogonalize(updates.mT).mT if rows > columns else orthogonalize(updates)
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-group["lr"] * 0.2 * max(rows, columns) ** 0.5)

    def _momentum(self, parameter: Tensor, momentum: float) -> Tensor:
        """Nesterov momentum of the gradient."""
        assert parameter.grad is not None
        buffer: Tensor = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
        buffer.lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(buffer, momentum)
