import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import dequantize_gptq
from quantize.grid import fit_grid, from_levels, round_weight, to_levels
from quantize.solver import PLAIN, Hessian, Method, descend, inverse_factor, quantize_weight, relative_error
from qvl_edge.config import QuantConfig
from qvl_edge.errors import CalibrationError, CheckpointError

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parent / "data" / "gptq"
CASES = json.loads((GOLDEN / "cases.json").read_text())
GPTQ_ALONE = Method(by_activity=False, sweeps=0)
TOLERANCE = (
    1e-6  # float64 on both sides: what is left is the condition of H, about 1e3, times 1e-16, with much to spare
)


def correlated(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Inputs (rows, columns) float64 in which channels depend on one another, as in a real network."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns // 4, columns, generator=generator, dtype=torch.float64)
    own = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return torch.randn(rows, columns // 4, generator=generator, dtype=torch.float64) @ mix + own


def weight_of(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def resolve_after_every_column(weight: torch.Tensor, hessian: torch.Tensor, quant: QuantConfig) -> torch.Tensor:
    """GPTQ without any of its algebra: after each column is rounded, least squares over all that are still free.

    A grid is fitted by what an error in each column would cost after that, with all later columns free.
    """
    columns = weight.shape[1]
    size = columns if quant.group_size == -1 else quant.group_size
    energy = hessian.diagonal()
    order = energy.argsort(descending=True, stable=True) if quant.desc_act else torch.arange(columns)
    damp = quant.damp_percent * energy.mean()
    damped = (hessian + damp * torch.eye(columns, dtype=hessian.dtype))[order][:, order]
    original = weight[:, order]
    importance = torch.stack([1 / torch.linalg.inv(damped[k:, k:])[0, 0] for k in range(columns)])
    current, fixed = original.clone(), torch.zeros_like(weight)
    group_of, grids = order // size, {}
    for group in group_of.unique().tolist() if quant.static_groups else ():
        members = group_of == group
        grids[group] = fit_grid(original[:, members], quant, importance=importance[members])
    for k in range(columns):
        if quant.static_groups:
            scale, zero = grids[int(group_of[k])]
        elif k % size == 0:
            scale, zero = fit_grid(current[:, k : k + size], quant, importance=importance[k : k + size])
        column = current[:, k : k + 1]
        fixed[:, k] = from_levels(to_levels(column, scale, zero, quant.bits), scale, zero)[:, 0]
        done, free = slice(0, k + 1), slice(k + 1, None)
        lost = fixed[:, done] - original[:, done]
        current[:, free] = original[:, free] - torch.linalg.solve(damped[free, free], damped[free, done] @ lost.T).T
    result = torch.empty_like(fixed)
    result[:, order] = fixed
    return result


@pytest.mark.parametrize("index", range(4))
def test_error_on_held_out_inputs_is_at_most_auto_gptqs(index: int) -> None:
    case, data = CASES[index], np.load(GOLDEN / f"linear{index}.npz")
    quant = QuantConfig(**{key: case[key] for key in ("bits", "group_size", "sym", "desc_act", "static_groups")})
    hessian = Hessian(case["in_features"])
    hessian.add(torch.from_numpy(data["X"]))
    weight, held = torch.from_numpy(data["W"]).float(), torch.from_numpy(data["Xe"]).double()
    result = quantize_weight(weight, hessian.matrix(), quant)
    # the stated error is relative to the layer's whole output, its bias included
    lost = (held @ (result.weight().double() - weight.double()).T).square().sum()
    error = float(lost / torch.from_numpy(data["y_full"]).double().square().sum())
    assert error <= 1.01 * case["relative_sq_error"]


@pytest.mark.parametrize(
    "quant",
    [
        QuantConfig(group_size=-1),
        QuantConfig(group_size=64, sym=False),
        QuantConfig(group_size=32, desc_act=True),
        QuantConfig(group_size=96, bits=8, sym=False, desc_act=True),
        QuantConfig(group_size=32, desc_act=True, static_groups=True),
    ],
    ids=["one group", "groups of 64", "groups of 32 by activity", "8 bits, groups of 96 by activity", "static groups"],
)
def test_lazy_updates_equal_resolving_least_squares_after_every_column(quant: QuantConfig) -> None:
    inputs, weight = correlated(400, 192), weight_of(6, 192)
    hessian = inputs.T @ inputs * (2 / len(inputs))
    expected = resolve_after_every_column(weight, hessian, quant)
    found = quantize_weight(weight, hessian, quant, method=GPTQ_ALONE).weight().double()
    assert float((found - expected).norm() / expected.norm()) < TOLERANCE


@pytest.mark.parametrize("desc_act", [False, True])
def test_with_a_drift_the_weight_that_makes_up_for_it_is_quantized(desc_act: bool) -> None:
    inputs, weight, quant = correlated(400, 192), weight_of(6, 192), QuantConfig(group_size=32, desc_act=desc_act)
    exact = inputs + 0.1 * correlated(400, 192, seed=1)  # what the float model has in their place
    hessian, drift = inputs.T @ inputs * (2 / 400), weight @ (exact - inputs).T @ inputs * (2 / 400)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(192)
    found = quantize_weight(weight, hessian, quant, drift=drift)
    expected = quantize_weight(weight + torch.linalg.solve(damped, drift.T).T, hessian, quant)
    assert torch.equal(found.levels, expected.levels) and torch.equal(found.scales, expected.scales)
    blind = quantize_weight(weight, hessian, quant)
    wanted = exact @ weight.T
    lost, lost_blind = ((inputs @ one.weight().double().T - wanted).square().sum() for one in (found, blind))
    assert float(lost) < 0.95 * float(lost_blind)


def test_the_inverse_factor_is_that_of_the_damped_hessian() -> None:
    inputs = correlated(100, 48)
    hessian = inputs.T @ inputs
    factor, damp = inverse_factor(hessian, 0.02)
    damped = hessian + 0.02 * hessian.diagonal().mean() * torch.eye(48)
    assert damp == 0.02
    assert torch.equal(factor, factor.triu())
    assert float((factor.T @ factor @ damped - torch.eye(48)).norm()) < TOLERANCE


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_beats_rounding_on_correlated_inputs(bits: int) -> None:
    inputs, weight = correlated(1000, 256), weight_of(32, 256)
    hessian, quant = inputs.T @ inputs, QuantConfig(bits=bits)
    solved, rounded = quantize_weight(weight, hessian, quant).weight(), round_weight(weight, quant).weight()
    assert relative_error(weight, solved, hessian) < 0.5 * relative_error(weight, rounded, hessian)


@pytest.mark.parametrize("index", range(4))
def test_grid_search_and_descent_beat_plain_gptq_on_held_out_inputs(index: int) -> None:
    case, data = CASES[index], np.load(GOLDEN / f"linear{index}.npz")
    quant = QuantConfig(**{key: case[key] for key in ("bits", "group_size", "sym", "desc_act", "static_groups")})
    seen, held = (torch.from_numpy(data[key]).double() for key in ("X", "Xe"))
    weight, hessian = torch.from_numpy(data["W"]).double(), seen.T @ seen * (2 / len(seen))
    ours, plain = (quantize_weight(weight, hessian, quant, method=method).weight() for method in (Method(), PLAIN))
    assert relative_error(weight, ours, held.T @ held) < 0.8 * relative_error(weight, plain, held.T @ held)


@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(("desc_act", "static_groups"), [(False, False), (True, False), (True, True), (False, True)])
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_tensors_read_back_to_the_weight(
    bits: int, group_size: int, sym: bool, desc_act: bool, static_groups: bool
) -> None:
    quant = QuantConfig(bits=bits, group_size=group_size, sym=sym, desc_act=desc_act, static_groups=static_groups)
    inputs, weight = correlated(64, 128).float(), weight_of(16, 128).float()
    result = quantize_weight(weight, inputs.T @ inputs, quant)
    read = dequantize_gptq(**result.packed(quant), bits=bits, group_size=group_size)
    assert torch.equal(read, result.weight())
    assert relative_error(weight, read, None) < (0.04 if bits == 4 else 2e-4)
    in_order = torch.equal(result.g_idx, result.g_idx.sort().values)
    assert in_order or (desc_act and not static_groups)


@pytest.mark.parametrize("static_groups", [False, True])
def test_channels_are_taken_by_activity_and_stay_where_they_are_on_disk(static_groups: bool) -> None:
    inputs, weight = correlated(300, 128), weight_of(8, 128)
    inputs *= torch.arange(1, 129)
    hessian = inputs.T @ inputs
    found = quantize_weight(weight, hessian, QuantConfig(group_size=32, static_groups=static_groups))
    asked = quantize_weight(weight, hessian, QuantConfig(group_size=32, desc_act=True, static_groups=True))
    assert torch.equal(found.weight(), asked.weight())
    assert torch.equal(found.g_idx, torch.arange(128, dtype=torch.int32) // 32)
    in_order = quantize_weight(weight, hessian, QuantConfig(group_size=32), method=Method(by_activity=False))
    assert relative_error(weight, found.weight(), hessian) < relative_error(weight, in_order.weight(), hessian)


def test_groups_by_activity_hold_the_most_active_channels_first() -> None:
    inputs = torch.randn(200, 64, dtype=torch.float64) * torch.arange(1, 65)
    result = quantize_weight(weight_of(8, 64), inputs.T @ inputs, QuantConfig(group_size=32, desc_act=True))
    energy = inputs.square().sum(0)
    assert float(energy[result.g_idx == 0].min()) >= float(energy[result.g_idx == 1].max())


def test_channels_that_were_never_active_are_rounded_and_disturb_nothing() -> None:
    inputs, weight = correlated(300, 64), weight_of(8, 64)
    inputs[:, 32:] = 0.0
    quant = QuantConfig(group_size=32)
    result = quantize_weight(weight, inputs.T @ inputs, quant)
    alone = quantize_weight(
        weight[:, :32], inputs[:, :32].T @ inputs[:, :32], QuantConfig(group_size=32, damp_percent=0.005)
    )  # half of the channels are silent, so that the mean of the diagonal is half as large
    assert result.dead_channels == 32
    assert torch.equal(result.weight()[:, :32], alone.weight())
    silent, rounded = (
        one - weight[:, 32:] for one in (result.weight()[:, 32:], round_weight(weight[:, 32:], quant).weight())
    )
    assert bool((silent.square().sum(1) <= rounded.square().sum(1) + TOLERANCE).all())


def test_a_layer_without_any_active_input_is_rounded() -> None:
    quant = QuantConfig(group_size=32)
    result = quantize_weight(weight_of(8, 64), torch.zeros(64, 64), quant, method=GPTQ_ALONE)
    assert torch.equal(result.weight(), round_weight(weight_of(8, 64), quant).weight())


def test_damping_grows_until_a_singular_hessian_can_be_factored() -> None:
    inputs = torch.randn(4, 96, generator=torch.Generator().manual_seed(1))
    hessian = inputs.T @ inputs  # rank 4 of 96
    result = quantize_weight(weight_of(8, 96), hessian, QuantConfig(group_size=32, damp_percent=1e-9))
    assert result.damp_percent is not None
    assert 1e-9 < result.damp_percent <= 1
    assert relative_error(weight_of(8, 96), result.weight(), hessian) < 0.02


def test_a_hessian_that_no_damping_helps_is_an_error() -> None:
    with pytest.raises(CalibrationError, match=r"h\.3\.mlp\.w1.*not positive definite"):
        inverse_factor(-torch.eye(32), 0.01, name="h.3.mlp.w1")


def test_hessian_is_two_over_n_times_the_sum_of_outer_products_however_inputs_arrive() -> None:
    inputs = torch.randn(30, 16, generator=torch.Generator().manual_seed(2))
    hessian = Hessian(16)
    hessian.add(inputs[:7])
    hessian.add(inputs[7:].view(1, 23, 16))
    expected = sum(2 / 30 * torch.outer(row, row) for row in inputs.double())
    assert float((hessian.matrix().double() - expected).norm() / expected.norm()) < TOLERANCE


def test_the_trace_form_of_the_error_is_the_error_of_the_outputs() -> None:
    inputs, weight = correlated(50, 64), weight_of(8, 64)
    rounded = round_weight(weight, QuantConfig(group_size=32)).weight().double()
    direct = (inputs @ (weight - rounded).T).square().sum() / (inputs @ weight.T).square().sum()
    assert abs(relative_error(weight, rounded, inputs.T @ inputs) / float(direct) - 1) < TOLERANCE


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_values_that_are_not_finite_name_the_layer(bad: float) -> None:
    weight, hessian = weight_of(8, 32).float(), torch.eye(32)
    broken_weight, broken_hessian = weight.clone(), hessian.clone()
    broken_weight[3, 4], broken_hessian[3, 4] = bad, bad
    with pytest.raises(CheckpointError, match=r"h\.0\.attn\.c_attn\.weight"):
        quantize_weight(broken_weight, hessian, QuantConfig(group_size=32), name="h.0.attn.c_attn")
    with pytest.raises(CalibrationError, match=r"inputs of h\.0\.attn\.c_attn"):
        quantize_weight(weight, broken_hessian, QuantConfig(group_size=32), name="h.0.attn.c_attn")


def test_a_hessian_without_inputs_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="no calibration input"):
        Hessian(8).matrix()


QUANTS = [
    QuantConfig(group_size=32),
    QuantConfig(group_size=-1),
    QuantConfig(group_size=32, desc_act=True),
    QuantConfig(group_size=64, desc_act=True, static_groups=True, sym=False),
]
IDS = ["groups of 32", "one group", "by activity", "static groups by activity"]


def output_errors(
    weight: Tensor, levels: Tensor, scales: Tensor, zeros: Tensor, g_idx: Tensor, hessian: Tensor
) -> Tensor:
    """Of each output (N,), by the formula."""
    lost = weight - ((levels.double() - zeros[g_idx]) * scales[g_idx]).T
    return ((lost @ hessian) * lost).sum(1)


def gptq_result(quant: QuantConfig) -> tuple[Tensor, list[Tensor], Tensor, float]:
    """A weight, what one pass of GPTQ finds for it, its Hessian with the damping on the diagonal, and that damping."""
    inputs, weight = correlated(500, 192), weight_of(6, 192)
    hessian = inputs.T @ inputs * (2 / len(inputs))
    found = quantize_weight(weight, hessian, quant, method=Method(sweeps=0))
    ridge = 0.01 * float(hessian.diagonal().mean())
    state = [found.levels, found.scales.double(), found.zeros.double(), found.g_idx.long()]
    return weight, state, hessian + ridge * torch.eye(192), ridge


def sweep(weight: Tensor, state: list[Tensor], damped: Tensor, ridge: float, sweeps: int) -> Tensor:
    """Descend from `state` in place; the residual that is left."""
    levels, scales, zeros, g_idx = state
    residual = (weight - ((levels.double() - zeros[g_idx]) * scales[g_idx]).T).T.contiguous()
    plain = damped - ridge * torch.eye(len(damped))
    descend(residual, *state, plain, ridge, bits=4, sweeps=sweeps)
    return residual


@pytest.mark.parametrize("quant", QUANTS, ids=IDS)
def test_no_sweep_makes_the_error_of_any_output_larger(quant: QuantConfig) -> None:
    weight, state, damped, ridge = gptq_result(quant)
    first = before = output_errors(weight, *state, damped)
    for _ in range(4):
        sweep(weight, state, damped, ridge, 1)
        after = output_errors(weight, *state, damped)
        assert bool((after <= before * (1 + 1e-12)).all())
        before = after
    assert float(before.sum() / first.sum()) < 0.95


@pytest.mark.parametrize("quant", QUANTS, ids=IDS)
@pytest.mark.slow
def test_it_ends_where_no_level_and_no_scale_alone_would_do_better(quant: QuantConfig) -> None:
    weight, state, damped, ridge = gptq_result(quant)
    sweep(weight, state, damped, ridge, 60)
    levels, scales, zeros, g_idx = state
    best = output_errors(weight, *state, damped)
    for column in range(192):
        for step in (-1, 1):
            other = levels.short()
            other[column] = (other[column] + step).clamp(0, 15)
            assert bool((output_errors(weight, other, scales, zeros, g_idx, damped) >= best * (1 - 1e-12)).all())
    for group in range(len(scales)):
        for factor in (1 - 2**-10, 1 + 2**-10):  # one step of float16, or two
            other = scales.clone()
            other[group] = (other[group] * factor).half().double()
            assert bool((output_errors(weight, levels, other, zeros, g_idx, damped) >= best * (1 - 1e-12)).all())


@pytest.mark.parametrize("quant", QUANTS, ids=IDS)
def test_the_residual_is_that_of_the_levels_and_scales_which_stay_on_the_disks_grid(quant: QuantConfig) -> None:
    weight, state, damped, ridge = gptq_result(quant)
    before = [tensor.clone() for tensor in state]
    residual = sweep(weight, state, damped, ridge, 2)
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
    sweep(weight, state, torch.eye(64, dtype=torch.float64), 0.0, 2)
    assert all(torch.equal(one, other) for one, other in zip(state, before, strict=True))
