"""int4_gemm, its fused forms and int8_gemm in Triton against float64: interpreted without a GPU, run on one with it."""

import math
from typing import Any

import pytest
import torch
from test_int4_gemm import make_weight, relative_error
from torch import Tensor

from kernels import (
    Int4Weight,
    Rows,
    int4_gemm,
    int4_gemm_residual,
    int4_gemm_swiglu,
    int8_gemm,
    interleave,
    pack_for_triton,
    quantize_int8,
    rms_rows,
)
from kernels.gpu.tiles import Tile

triton = pytest.importorskip("triton", reason="needs the triton package, which Linux has")
from kernels.gpu.gemm import gemm_triton, rows_triton  # noqa: E402

pytestmark = pytest.mark.slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# relative norm error against float64 of x as it is given: the result is rounded to 16 bits, and so is, for many rows,
# each weight: 2^-11 / sqrt(3) and 2^-8 / sqrt(3) at most for each. The interpreter cuts bfloat16 off where a GPU
# rounds, which is twice as much
TOLERANCE = {torch.float16: 5e-4, torch.bfloat16: 4e-3 if DEVICE == "cuda" else 5e-3}
EPS = 1e-6

# (K, N, group_size): odd outputs, one and several chunks, padding of both, groups smaller and larger than a chunk
SHAPES = [(128, 40, 32), (256, 96, 64), (384, 264, 128), (144, 24, -1), (512, 40, 256), (48, 40, -1)]
# (rows, block_m, split_k): both kernels, full and ragged blocks, more splits than chunks
LAUNCHES = [(1, 8, 1), (3, 8, 2), (8, 8, 9), (9, 16, 2), (16, 16, 1), (17, 32, 1), (70, 32, 1)]


def tile(block_m: int, split_k: int = 1, block_n: int = 64) -> Tile:
    return Tile(block_m=block_m, block_n=block_n, split_k=split_k, num_warps=4, num_stages=3)


def random(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def packed(weight: Int4Weight):
    parts = (weight.qweight, weight.scales, weight.zeros, weight.perm)
    return pack_for_triton(Int4Weight(*(None if part is None else part.to(DEVICE) for part in parts)))


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer that a launcher makes is full of NaN: what a kernel does not write shows."""
    empty = torch.empty

    def poisoned(*size: int, **options: Any) -> Tensor:
        buffer = empty(*size, **options)
        return buffer.fill_(math.nan) if buffer.is_floating_point() else buffer

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "zeros"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_computes_the_written_formula(shape: tuple[int, int, int], sym: bool, dtype: torch.dtype) -> None:
    weight, formula = make_weight(*shape, sym=sym, desc_act=False)
    ours = packed(weight)
    bias = random(shape[1], seed=2)
    for rows, block_m, split_k in LAUNCHES:
        x = random(rows, shape[0], dtype=dtype)
        y = gemm_triton(Rows(x), ours, bias, tile=tile(block_m, split_k)).x
        assert y.dtype == dtype
        expected = x.double().cpu() @ formula.T + bias.double().cpu()
        assert relative_error(y.cpu(), expected) < TOLERANCE[dtype], (rows, block_m, split_k)
        assert not bool(ours.locks.any())


def test_vectors_with_strides_are_read_as_they_are() -> None:
    weight, formula = make_weight(128, 64, 128, sym=True, desc_act=False)
    x, bias, norm_weight = random(3, 128), random(128, seed=2)[::2], random(128, seed=3)[::2]
    residual = random(3, 64, dtype=torch.float32)
    expected = (residual.double() + (x.double().cpu() @ formula.T).to(DEVICE) + bias.double()) * norm_weight.double()
    out = int4_gemm_residual(Rows(x), packed(weight), bias, residual, norm_weight, EPS, backend="triton")
    assert relative_error(out.x.cpu(), expected.cpu()) < TOLERANCE[torch.float16]
    rows = rms_rows(residual, norm_weight, EPS, torch.float16, backend="triton")
    assert torch.equal(rows.x, (residual * norm_weight).half())


def test_many_blocks_of_rows_are_all_computed_once() -> None:
    weight, formula = make_weight(128, 136, 128, sym=True, desc_act=False)
    x = random(11 * 32 - 5, 128)  # groups of four blocks, and one of three
    y = gemm_triton(Rows(x), packed(weight), tile=tile(32)).x
    assert relative_error(y.cpu(), x.double().cpu() @ formula.T) < TOLERANCE[torch.float16]


def test_a_mean_far_from_zero_costs_no_accuracy() -> None:
    # every sum starts at minus what the exponent bits add: 1,032 times the sum of x, large when x has a mean
    weight, formula = make_weight(512, 64, 128, sym=True, desc_act=False)
    x = random(4, 512) + 4
    y = gemm_triton(Rows(x), packed(weight), tile=tile(8, 2)).x
    assert relative_error(y.cpu(), x.double().cpu() @ formula.T) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("rows", [3, 20])
def test_desc_act_takes_the_channels_in_their_order(rows: int) -> None:
    weight, formula = make_weight(256, 40, 64, sym=True, desc_act=True)
    assert weight.perm is not None
    x = random(rows, 256)
    y = int4_gemm(x, packed(weight), backend="triton")
    assert relative_error(y.cpu(), x.double().cpu() @ formula.T) < TOLERANCE[torch.float16]


def rows_of(residual: Tensor, norm_weight: Tensor, parts: int = 1) -> Rows:
    """Rows of a residual with its sum of squares in `parts`."""
    squares = residual.square().unflatten(1, (parts, -1)).sum(2).contiguous()
    return Rows((residual * norm_weight).half(), None, squares, EPS)


def normed(residual: Tensor, x: Tensor) -> Tensor:
    """float64 x with the factor of RMSNorm (Zhang and Sennrich 2019) of the residual's rows."""
    r = residual.double().cpu()
    return x.double().cpu() / (r.square().mean(1, keepdim=True) + EPS).sqrt()


@pytest.mark.parametrize("launch", [(1, 8, 1), (5, 8, 3), (12, 16, 2), (40, 32, 1)], ids=str)
def test_the_norm_is_a_factor_after_the_product(launch: tuple[int, int, int]) -> None:
    weight, formula = make_weight(384, 72, 128, sym=True, desc_act=False)
    residual, norm_weight = random(launch[0], 384, dtype=torch.float32) * 3, random(384, seed=3).abs() + 0.1
    bias = random(72, seed=4)
    rows = rows_of(residual, norm_weight, parts=3)
    y = gemm_triton(rows, packed(weight), bias, tile=tile(*launch[1:])).x
    expected = normed(residual, rows.x) @ formula.T + bias.double().cpu()
    assert relative_error(y.cpu(), expected) < TOLERANCE[torch.float16]


def check_sums(rows: Rows) -> None:
    """The sums are those of the rounded rows."""
    if len(rows.x) > 16:
        assert rows.sums is None
        return
    assert rows.sums is not None
    expected = rows.x.double().unflatten(1, (-1, 32)).sum(2).T
    # float32 sums of 32 numbers of size 1
    torch.testing.assert_close(rows.sums[:, : len(rows.x)].double(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("launch", [(1, 8, 1), (5, 8, 2), (12, 16, 3), (40, 32, 1)], ids=str)
def test_swiglu_multiplies_w1_by_the_silu_of_w2(launch: tuple[int, int, int]) -> None:
    w1, formula1 = make_weight(256, 96, 128, sym=True, desc_act=False)
    w2, formula2 = make_weight(256, 96, 128, sym=False, desc_act=False)
    residual, norm_weight = random(launch[0], 256, dtype=torch.float32), random(256, seed=3).abs() + 0.1
    rows = rows_of(residual, norm_weight)
    out = gemm_triton(rows, packed(interleave(w1, w2)), epilogue="swiglu", tile=tile(*launch[1:]))
    x = normed(residual, rows.x)
    gate = x @ formula2.T
    assert relative_error(out.x.cpu(), (x @ formula1.T) * gate / (1 + (-gate).exp())) < TOLERANCE[torch.float16]
    check_sums(out)


@pytest.mark.parametrize("launch", [(1, 8, 1), (5, 8, 3), (12, 16, 2), (40, 32, 1)], ids=str)
def test_the_residual_grows_in_place_and_leaves_rows_for_the_next_norm(launch: tuple[int, int, int]) -> None:
    weight, formula = make_weight(384, 160, 128, sym=True, desc_act=False)
    x, residual = random(launch[0], 384), random(launch[0], 160, seed=5, dtype=torch.float32) * 100
    norm_weight, bias = random(160, seed=3).abs() + 0.1, random(160, seed=4)
    before, more = residual.double().cpu(), x.double().cpu() @ formula.T + bias.double().cpu()
    expected = before + more
    out = gemm_triton(
        Rows(x), packed(weight), bias, epilogue="residual", residual=residual, norm_weight=norm_weight, eps=EPS,
        tile=tile(*launch[1:]),
    )  # fmt: skip
    # in a residual that was rounded to float16 on the way what is added would be off by ten times as much
    assert relative_error(residual.double().cpu() - before, more) < TOLERANCE[torch.float16]
    assert relative_error(out.x.cpu(), expected * norm_weight.double().cpu()) < TOLERANCE[torch.float16]
    assert out.squares is not None and out.eps == EPS
    torch.testing.assert_close(out.squares.double().sum(1).cpu(), expected.square().sum(1), atol=0, rtol=1e-5)
    check_sums(out)


def test_splits_are_added_in_one_order_so_that_equal_calls_are_equal() -> None:
    weight = packed(make_weight(512, 64, 128, sym=True, desc_act=False)[0])
    x = random(5, 512)
    first = gemm_triton(Rows(x), weight, tile=tile(8, 4)).x
    assert all(torch.equal(first, gemm_triton(Rows(x), weight, tile=tile(8, 4)).x) for _ in range(3))


@pytest.mark.parametrize("rows", [1, 7, 20])
def test_the_first_layers_rows_are_those_of_the_definition(rows: int) -> None:
    residual, norm_weight = random(rows, 160, dtype=torch.float32), random(160, seed=3)
    ours = rms_rows(residual, norm_weight, EPS, torch.float16, backend="triton")
    expected = rms_rows(residual, norm_weight, EPS, torch.float16, backend="torch")
    assert torch.equal(ours.x, expected.x) and ours.eps == EPS
    torch.testing.assert_close(ours.squares, expected.squares)
    check_sums(ours)
    if rows <= 16:
        torch.testing.assert_close(rows_triton(ours.x).sums[:, :rows], ours.sums[:, :rows])


@pytest.mark.parametrize("shape", [(256, 40), (144, 300), (32, 40)], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 16, 19])
def test_the_int8_head_computes_the_written_formula(shape: tuple[int, int], rows: int) -> None:
    weight = quantize_int8(random(shape[1], shape[0], seed=6))
    x = random(rows, shape[0])
    y = int8_gemm(x, pack_for_triton(weight), backend="triton")
    assert y.dtype == torch.float32
    formula = weight.levels.double() * weight.scales.double()[:, None]
    # float32 sums that start at 1,152 times the sum of a chunk
    assert relative_error(y.cpu(), (x.double() @ formula.T).cpu()) < 2e-5
    assert relative_error(int8_gemm(x, weight, backend="torch").cpu(), (x.double() @ formula.T).cpu()) < 1e-6


def test_the_fused_definitions_are_what_the_kernels_compute() -> None:
    w1, w2 = (make_weight(128, 64, 64, sym=sym, desc_act=False)[0] for sym in (True, False))
    both, down = interleave(w1, w2), make_weight(64, 128, 32, sym=True, desc_act=False)[0]
    results = []
    for backend in ("torch", "triton"):
        wide, narrow = (packed(both), packed(down)) if backend == "triton" else (both, down)
        residual = random(3, 128, dtype=torch.float32)
        rows = rms_rows(residual, random(128, seed=3), EPS, torch.float16, backend=backend)
        inner = int4_gemm_swiglu(rows, wide, backend=backend)
        out = int4_gemm_residual(inner, narrow, None, residual, random(128, seed=4), EPS, backend=backend)
        results.append((inner.x, out.x, residual))
    for ours, expected in zip(results[1], results[0], strict=True):
        assert relative_error(ours.cpu(), expected.double().cpu()) < 2 * TOLERANCE[torch.float16]


def test_no_rows_in_give_no_rows_out() -> None:
    weight = packed(make_weight(128, 64, 64, sym=True, desc_act=False)[0])
    none = Rows(random(0, 128), None, random(0, 1, dtype=torch.float32), EPS)
    residual = random(0, 64, dtype=torch.float32)
    assert int4_gemm(none, weight, backend="triton").shape == (0, 64)
    assert int4_gemm_swiglu(none, weight, backend="triton").x.shape == (0, 32)
    assert int4_gemm_residual(none, weight, None, residual, random(64), EPS, backend="triton").x.shape == (0, 64)
    assert rms_rows(random(0, 128, dtype=torch.float32), random(128), EPS, torch.float16, backend="triton").x.shape == (
        0,
        128,
    )
    assert int8_gemm(random(0, 128), pack_for_triton(quantize_int8(random(8, 128))), backend="triton").shape == (0, 8)


def test_what_a_kernel_cannot_do_is_an_error_that_names_the_rule() -> None:
    weight = make_weight(128, 40, 64, sym=True, desc_act=False)[0]
    ours = packed(weight)
    with pytest.raises(ValueError, match="x is torch.float32, the Triton kernels take torch.float16"):
        int4_gemm(random(2, 128).float(), ours, backend="triton")
    with pytest.raises(ValueError, match=r"weight = pack_for_triton\(weight\)"):
        int4_gemm(random(2, 128), weight, backend="triton")
    with pytest.raises(ValueError, match="x has K=64 .*but weight holds K=128"):
        int4_gemm(random(2, 64), ours, backend="triton")
    with pytest.raises(ValueError, match="sums over 32 channels, which do not divide 40"):
        int4_gemm_residual(
            Rows(random(2, 128)), ours, None, random(2, 40, dtype=torch.float32), random(40), EPS, backend="triton"
        )
    with pytest.raises(ValueError, match="residual is torch.float16 .*expected a contiguous matrix of torch.float32"):
        int4_gemm_residual(Rows(random(2, 128)), ours, None, random(2, 40), random(40), EPS, backend="triton")
    with pytest.raises(ValueError, match=r"residual has shape \(3, 40\), expected \(2, 40\)"):
        int4_gemm_residual(
            Rows(random(2, 128)), ours, None, random(3, 40, dtype=torch.float32), random(40), EPS, backend="triton"
        )
    for call in (
        lambda x: int8_gemm(x, ours, backend="triton"),
        lambda x: int4_gemm_swiglu(Rows(x), ours, backend="triton"),
    ):
        with pytest.raises(ValueError, match=r"x has shape \(1, 2, 128\), expected \(M, 128\)"):
            call(random(1, 2, 128))
    with pytest.raises(ValueError, match="weight has 4 bits, int8_gemm takes 8"):
        int8_gemm(random(2, 128), ours, backend="triton")
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="a weight in Triton's order on the cpu"):
            int4_gemm(random(2, 128), ours)
    assert int4_gemm(random(2, 3, 256)[..., ::2], ours, backend="triton").shape == (2, 3, 40)
