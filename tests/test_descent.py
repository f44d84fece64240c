import pytest
import torch
from test_solver import correlated, weight_of
from torch import Tensor

from quantize.descent import descend
from quantize.solver import Method, quantize_weight
from qvl_edge.config import QuantConfig

QUANTS = [
    QuantConfig(group_size=32),
    QuantConfig(group_size=-1),
    QuantConfig(group_size=32, desc_act=True),
    QuantConfig(group_size=64, desc_act=True, static_groups=True, sym=False),
]
IDS = ["groups of 32", "one group", "by activity", "static groups by activity"]


def error(weight: Tensor, levels: Tensor, scales: Tensor, zeros: Tensor, g_idx: Tensor, hessian: Tensor) -> Tensor:
    """Of each output (N,), by the formula."""
    lost = weight - ((levels.double() - zeros[g_idx]) * scales[g_idx]).T
    return ((lost @ hessian) * lost).sum(1)


def problem(quant: QuantConfig) -> tuple[Tensor, list[Tensor], Tensor, float]:
    """A weight, what one pass of GPTQ finds for it, its Hessian with the damping on the diagonal, and that damping."""
    inputs, weight = correlated(500, 192), weight_of(6, 192)
    hessian = inputs.T @ inputs * (2 / len(inputs))
    found = quantize_weight(weight, hessian, quant, method=Method(sweeps=0))
    ridge = 0.01 * float(hessian.diagonal().mean())
    state = [found.levels, found.scales.double(), found.zeros.double(), found.g_idx.long()]
    return weight, state, hessian + ridge * torch.eye(192), ridge


def run(weight: Tensor, state: list[Tensor], damped: Tensor, ridge: float, sweeps: int) -> Tensor:
    """Descend from `state` in place; the residual that is left."""
    levels, scales, zeros, g_idx = state
    residual = (weight - ((levels.double() - zeros[g_idx]) * scales[g_idx]).T).T.contiguous()
    plain = damped - ridge * torch.eye(len(damped))
    descend(residual, *state, plain, ridge, bits=4, sweeps=sweeps)
    return residual


@pytest.mark.parametrize("quant", QUANTS, ids=IDS)
def test_no_sweep_makes_the_error_of_any_output_larger(quant: QuantConfig) -> None:
    weight, state, damped, ridge = problem(quant)
    first = before = error(weight, *state, damped)
    for _ in range(4):
        run(weight, state, damped, ridge, 1)
        after = error(weight, *state, damped)
        assert bool((after <= before * (1 + 1e-12)).all())
        before = after
    assert float(before.sum() / first.sum()) < 0.95


@pytest.mark.parametrize("quant", QUANTS, ids=IDS)
def test_it_ends_where_no_level_and_no_scale_alone_would_do_better(quant: QuantConfig) -> None:
    weight, state, damped, ridge = problem(quant)
    run(weight, state, damped, ridge, 60)
    levels, scales, zeros, g_idx = state
    best = error(weight, *state, damped)
    for column in range(192):
        for step in (-1, 1):
            other = levels.short()
            other[column] = (other[column] + step).clamp(0, 15)
            assert bool((error(weight, other, scales, zeros, g_idx, damped) >= best * (1 - 1e-12)).all())
    for group in range(len(scales)):
        for factor in (1 - 2**-10, 1 + 2**-10):  # one step of float16, or two
            other = scales.clone()
            other[group] = (other[group] * factor).half().double()
            assert bool((error(weight, levels, other, zeros, g_idx, damped) >= best * (1 - 1e-12)).all())


@pytest.mark.parametrize("quant", QUANTS, ids=IDS)
def test_the_residual_is_that_of_the_levels_and_scales_which_stay_on_the_disks_grid(quant: QuantConfig) -> None:
    weight, state, damped, ridge = problem(quant)
    before = [tensor.clone() for tensor in state]
    residual = run(weight, state, damped, ridge, 2)
    levels, scales, zeros, g_idx = state
    expected = (weight - ((levels.double() - zeros[g_idx]) * scales[g_idx]).T).T
    assert float((residual - expected).abs().max()) < 1e-12  # float64, and values of about 1
    assert torch.equal(scales.half().double(), scales) and bool((scales > 0).all())
    assert int(levels.max()) <= 15
    assert torch.equal(zeros, before[2]) and torch.equal(g_idx, before[3])
    assert not torch.equal(levels, before[0]) and not torch.equal(scales, before[1])


def test_weights_on_the_grid_and_groups_of_zeros_stay() -> None:
    state = [torch.randint(0, 16, (64, 4)).to(torch.uint8), torch.full((2, 4), 0.125, dtype=torch.float64)]
    state += [torch.full((2, 4), 8.0, dtype=torch.float64), torch.arange(64) // 32]
    state[0][32:] = 8  # nothing but zeros, which leave the scale open
    before = [tensor.clone() for tensor in state]
    weight = ((state[0].double() - 8) * 0.125).T
    run(weight, state, torch.eye(64, dtype=torch.float64), 0.0, 2)
    assert all(torch.equal(one, other) for one, other in zip(state, before, strict=True))
