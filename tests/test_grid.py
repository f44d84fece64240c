import pytest
import torch

from quantize.grid import fit_grid, from_levels, to_levels
from qvl_edge.config import QuantConfig
from qvl_edge.errors import CheckpointError

BITS = (4, 8)


def random_weight(rows: int = 16, columns: int = 64) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def rounded(weight: torch.Tensor, bits: int, sym: bool, importance: torch.Tensor | None = None) -> torch.Tensor:
    scale, zero = fit_grid(weight, QuantConfig(bits=bits, sym=sym), importance=importance)
    return from_levels(to_levels(weight, scale, zero, bits), scale, zero)


@pytest.mark.parametrize("bits", BITS)
def test_weights_that_lie_on_a_grid_are_kept_exactly(bits: int) -> None:
    levels = torch.randint(0, 2**bits, (8, 64), generator=torch.Generator().manual_seed(0)).double()
    levels[:, 0], levels[:, 1] = 0, 2**bits - 1  # the whole span is in use
    weight = (levels - 2 ** (bits - 1)) * 0.125
    assert torch.equal(rounded(weight, bits, sym=False), weight)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sym", [True, False])
def test_scales_are_float16_and_zeros_are_levels_that_auto_gptq_can_store(bits: int, sym: bool) -> None:
    for weight in (random_weight(), random_weight().abs(), -random_weight().abs()):
        scale, zero = fit_grid(weight, QuantConfig(bits=bits, sym=sym))
        assert torch.equal(scale.half().double(), scale)
        assert bool((scale > 0).all())
        assert bool(((zero >= 1) & (zero <= 2**bits - 1) & (zero == zero.round())).all())
        assert not sym or bool((zero == 2 ** (bits - 1)).all())


@pytest.mark.parametrize("sym", [True, False])
def test_no_plain_grid_is_better_for_any_output(sym: bool) -> None:
    """The plain grid of the GPTQ paper's code spans the smallest to the largest weight."""
    weight, importance = random_weight(), torch.rand(64, dtype=torch.float64)
    low, high = weight.amin(1), weight.amax(1)
    scale = ((2 * weight.abs().amax(1) if sym else high - low) / 15).half().double()
    zero = torch.full_like(scale, 8) if sym else (-low / scale).round()
    plain = from_levels(to_levels(weight, scale, zero, 4), scale, zero)
    cost = (rounded(weight, 4, sym, importance) - weight).square() @ importance
    assert bool((cost <= (plain - weight).square() @ importance + 1e-12).all())


def test_the_search_comes_close_to_an_exhaustive_one() -> None:
    weight = random_weight()
    best = torch.full((16,), torch.inf, dtype=torch.float64)
    for share in torch.linspace(0.3, 1.3, 1001):
        scale = 2 * weight.abs().amax(1) / 15 * share
        q = from_levels(to_levels(weight, scale, torch.full_like(scale, 8), 4), scale, torch.full_like(scale, 8))
        best = torch.minimum(best, (q - weight).square().sum(1))
    found = (rounded(weight, 4, sym=True) - weight).square().sum(1)
    assert float((found / best).max()) < 1.08  # 17 scales against 1,001


def test_important_channels_are_rounded_more_finely() -> None:
    weight = random_weight()
    weight[:, 0] = 6.0  # an outlier among weights of about 1
    importance = torch.ones(64, dtype=torch.float64)
    importance[0] = 0.0
    free, bound = rounded(weight, 4, True, importance), rounded(weight, 4, True)
    assert float((free - weight)[:, 1:].square().sum()) < 0.8 * float((bound - weight)[:, 1:].square().sum())


def test_a_group_of_zeros_stays_zero() -> None:
    assert not bool(rounded(torch.zeros(4, 32), 4, sym=True).any())
    assert not bool(rounded(torch.zeros(4, 32), 4, sym=False).any())


def test_a_weight_beyond_float16_scales_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"h\.0\.mlp\.w1 holds 1e\+07"):
        fit_grid(torch.full((2, 32), 1e7), QuantConfig(), name="h.0.mlp.w1")
