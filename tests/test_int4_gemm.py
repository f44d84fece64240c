"""int4_gemm: the definition is the written formula, and the CPU path equals the definition."""

import math
import threading

import pytest
import torch
from torch import Tensor

from kernels import Int4Weight, int4_gemm, int8_gemm, pack_for_cpu, pack_levels, pack_zeros, quantize_int8
from kernels.cpu import OUTPUTS

# relative norm error against float64; float32: sums over up to 4,096 channels; the others: half a unit in the last
# place of the one rounding at the end, 2^-8 and 2^-11
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 3.91e-3, torch.float16: 4.9e-4}
# torch's BLAS and onnxruntime's MLAS may add K products one after another: u / sqrt(6) * sqrt(K) is then to be expected
# (u = 2^-24; 1.6e-6 at K = 4,096, of which 1.3e-6 was seen in both), and twice that is allowed


def tolerance(dtype: torch.dtype, k: int) -> float:
    """The relative norm error that is allowed."""
    one_by_one = 2 * 2**-24 * math.sqrt(k / 6) if dtype == torch.float32 else 0.0
    return max(TOLERANCE[dtype], one_by_one)


# (K, N, group_size): one group, groups that are padded to whole blocks of 16, blocks of 16 to 128
SHAPES = [(64, 8, 32), (256, 40, 64), (384, 264, 128), (768, 520, -1), (4096, 24, -1), (144, 1000, 72), (1408, 16, 704)]
ROWS = [1, 3, 8, 33]


def make_weight(k: int, n: int, group_size: int, *, sym: bool, desc_act: bool) -> tuple[Int4Weight, Tensor]:
    """A random weight and W (N, K) float64 by the formula, from the numbers that went in."""
    generator = torch.Generator().manual_seed(k * 31 + n)
    size = k if group_size == -1 else group_size
    levels = torch.randint(0, 16, (k, n), generator=generator)
    zeros = torch.full((k // size, n), 8) if sym else torch.randint(1, 17, (k // size, n), generator=generator)
    scales = (torch.rand(k // size, n, generator=generator) / 10).half()
    g_idx = torch.arange(k, dtype=torch.int32) // size
    if desc_act:
        g_idx = g_idx[torch.randperm(k, generator=generator)]
    weight = Int4Weight.from_gptq(pack_levels(levels), pack_zeros(zeros), scales, g_idx, group_size=group_size)
    return weight, ((levels - zeros[g_idx]).double() * scales.double()[g_idx]).T


def relative_error(y: Tensor, expected: Tensor) -> float:
    assert y.shape == expected.shape
    return float((y.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_every_backend_computes_the_written_formula(
    backend: str, shape: tuple[int, int, int], desc_act: bool, sym: bool, dtype: torch.dtype
) -> None:
    unpacked, formula = make_weight(*shape, sym=sym, desc_act=desc_act)
    weight = pack_for_cpu(unpacked) if backend == "cpu" else unpacked
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(shape[1], generator=generator)
    for rows in ROWS:
        x = torch.randn(rows, shape[0], generator=generator).to(dtype)
        y = int4_gemm(x, weight, bias, backend=backend)
        assert y.dtype == dtype
        expected = x.double() @ formula.T + bias.double()
        assert relative_error(y, expected) < tolerance(dtype, shape[0]), rows


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("rows", ROWS)
def test_int8_activations_are_off_by_half_a_level_of_their_block(
    shape: tuple[int, int, int], sym: bool, desc_act: bool, rows: int
) -> None:
    channels, outputs, _ = shape
    unpacked, formula = make_weight(*shape, sym=sym, desc_act=desc_act)
    x = torch.randn(rows, channels, generator=torch.Generator().manual_seed(1))
    y = int4_gemm(x, pack_for_cpu(unpacked, "int8"))
    # a block has no larger values than its row: each is off by half a level, uniformly
    off = x.double().abs().amax(1, keepdim=True) / 127 / math.sqrt(12)
    expected = off * formula.norm(dim=1)
    error = y.double() - x.double() @ formula.T
    assert 0.05 < float(error.norm() / expected.norm()) < 1.2  # rounded, and no worse


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize(("channels", "outputs"), [(64, 8), (320, 1500), (72, 9), (64, OUTPUTS + 40)])
def test_an_int8_head_takes_int8_activations_too(rows: int, channels: int, outputs: int) -> None:
    generator = torch.Generator().manual_seed(outputs)
    weight = quantize_int8(torch.randn(outputs, channels, generator=generator))
    x = torch.randn(rows, channels, generator=generator)
    formula = weight.dequantize().double()
    packed = pack_for_cpu(weight, "int8")
    assert packed.nbytes <= pack_for_cpu(weight).nbytes
    off = x.double().abs().amax(1, keepdim=True) / 127 / math.sqrt(12)
    error = int8_gemm(x, packed).double() - x.double() @ formula.T
    assert 0.05 < float(error.norm() / (off * formula.norm(dim=1)).norm()) < 1.2


def test_outputs_past_one_product_are_put_together_in_order() -> None:
    generator = torch.Generator().manual_seed(2)
    weight = quantize_int8(torch.randn(OUTPUTS + 40, 64, generator=generator))
    x = torch.randn(3, 64, generator=generator)
    assert relative_error(int8_gemm(x, pack_for_cpu(weight)), x.double() @ weight.dequantize().double().T) < 1e-6


def test_two_threads_may_call_at_once() -> None:
    unpacked, formula = make_weight(256, 40, 64, sym=False, desc_act=True)
    weight = pack_for_cpu(unpacked)
    inputs = [torch.randn(rows, 256, generator=torch.Generator().manual_seed(rows)) for rows in (1, 2, 20, 30)]
    results: dict[int, Tensor] = {}

    def call(index: int) -> None:
        results[index] = int4_gemm(inputs[index], weight)

    threads = [threading.Thread(target=call, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, x in enumerate(inputs):
        assert relative_error(results[index], x.double() @ formula.T) < TOLERANCE[torch.float32]


def test_leading_dimensions_strides_and_inference_mode_change_nothing() -> None:
    unpacked, formula = make_weight(256, 40, 64, sym=True, desc_act=False)
    weight = pack_for_cpu(unpacked)
    wide = torch.randn(2, 3, 512, generator=torch.Generator().manual_seed(3))
    x = wide[..., ::2]
    with torch.inference_mode():
        assert relative_error(int4_gemm(x + 0, weight), x.double() @ formula.T) < TOLERANCE[torch.float32]
    assert relative_error(int4_gemm(x, weight), x.double() @ formula.T) < TOLERANCE[torch.float32]
    assert relative_error(int4_gemm(x[0, 0], weight), x[0, 0].double() @ formula.T) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_no_rows_in_give_no_rows_out(backend: str) -> None:
    weight = pack_for_cpu(make_weight(64, 8, 32, sym=False, desc_act=True)[0])
    assert int4_gemm(torch.empty(0, 64), weight, torch.ones(8), backend=backend).shape == (0, 8)


def test_rows_that_are_not_finite_stay_alone() -> None:
    weight = pack_for_cpu(make_weight(64, 8, 32, sym=True, desc_act=False)[0])
    for rows in (2, 10):
        x = torch.ones(rows, 64)
        clean = int4_gemm(x, weight)
        x[1] = float("nan")
        y = int4_gemm(x, weight)
        assert torch.equal(y[0], clean[0])
        assert bool(y[1].isnan().all())


def test_a_weight_that_was_not_packed_takes_the_definition() -> None:
    weight, _ = make_weight(256, 40, 64, sym=False, desc_act=False)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(4))
    assert torch.equal(int4_gemm(x, weight), int4_gemm(x, weight, backend="torch"))
    with pytest.raises(ValueError, match="weight = pack_for_cpu"):
        int4_gemm(x, weight, backend="cpu")
    packed = pack_for_cpu(weight)
    assert torch.equal(int4_gemm(x, packed, backend="torch"), int4_gemm(x, weight, backend="torch"))


def test_what_does_not_fit_is_refused_with_both_numbers() -> None:
    weight = pack_for_cpu(make_weight(128, 24, 32, sym=True, desc_act=False)[0])
    with pytest.raises(ValueError, match="x has K=64 .*but weight holds K=128"):
        int4_gemm(torch.ones(2, 64), weight)
    with pytest.raises(ValueError, match=r"bias has shape \(8,\), expected \(24,\)"):
        int4_gemm(torch.ones(2, 128), weight, torch.ones(8))
    with pytest.raises(ValueError, match="x is torch.float64, expected one of torch.float32"):
        int4_gemm(torch.ones(2, 128, dtype=torch.float64), weight)
    with pytest.raises(ValueError, match="x is on meta but weight is on cpu"):
        int4_gemm(torch.ones(2, 128, device="meta"), weight)
    with pytest.raises(ValueError, match="backend is 'cublas', int4_gemm has 'torch' and 'cpu' and 'triton'"):
        int4_gemm(torch.ones(2, 128), weight, backend="cublas")
    with pytest.raises(ValueError, match="computes no gradient"):
        int4_gemm(torch.ones(2, 128, requires_grad=True), weight)


@pytest.mark.parametrize("rows", [1, 8, 9])
@pytest.mark.parametrize(("channels", "outputs"), [(64, 8), (320, 1500), (72, 9)])
def test_int8_gemm_on_the_cpu_is_the_float64_formula(rows: int, channels: int, outputs: int) -> None:
    generator = torch.Generator().manual_seed(outputs)
    weight = quantize_int8(torch.randn(outputs, channels, generator=generator))
    x = torch.randn(rows, channels, generator=generator)
    formula = x.double() @ (weight.levels.double() * weight.scales.double()[:, None]).T
    assert relative_error(int8_gemm(x, pack_for_cpu(weight)), formula) < TOLERANCE[torch.float32]
    assert relative_error(int8_gemm(x, weight), formula) < TOLERANCE[torch.float32]


def test_an_int8_weight_dequantizes_to_its_levels_times_its_scales() -> None:
    weight = quantize_int8(torch.randn(1500, 64, generator=torch.Generator().manual_seed(0)))
    error = (pack_for_cpu(weight).dequantize() - weight.dequantize()).abs().max()
    assert error <= 2**-22 * weight.dequantize().abs().max()  # high and low half are each rounded, then their sum


def rounded_in_blocks(x: Tensor, block: int) -> Tensor:
    """x float64 with every block of channels rounded to 255 levels of its largest."""
    blocks = x.double().unflatten(-1, (-1, block))
    scales = blocks.abs().amax(-1, keepdim=True) / 127
    return ((blocks / scales).round() * scales).flatten(-2)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(("shape", "block"), [((256, 40, 64), 64), ((384, 264, 128), 128), ((4096, 24, -1), 128)])
def test_activations_in_int8_are_rounded_in_blocks_and_nothing_else_is(
    shape: tuple[int, int, int], block: int, sym: bool, rows: int
) -> None:
    unpacked, formula = make_weight(*shape, sym=sym, desc_act=False)
    x = torch.randn(rows, shape[0], generator=torch.Generator().manual_seed(2))
    y = int4_gemm(x, pack_for_cpu(unpacked, "int8"))
    assert relative_error(y, rounded_in_blocks(x, block) @ formula.T) < 1e-3  # a tie may go either way
    assert 1e-3 < relative_error(y, x.double() @ formula.T) < 1.5e-2
