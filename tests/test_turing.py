"""The kernels of Turing against float64 and against the reference: interpreted without a card, run on one."""

import pytest
import torch
from conftest import SMALL
from test_int4_gemm import make_weight, relative_error
from test_int4_gemm_triton import DEVICE, EPS, packed, poison, random

pytest.importorskip("triton", reason="needs the triton package, which Linux has")
from kernels import AttentionArgs, Rows, interleave, pack_for_triton, quantize_int8, reference, rotary_attention
from kernels.gpu import attention, gemm
from kernels.gpu.gemm import gemm_triton
from kernels.gpu.tiles import DeviceKey, Tile, tile_for
from kernels.gpu.turing import dequantize
from qvl_edge.config import Config
from qvl_edge.model.cache import KVCache
from qvl_edge.model.fused import FusedDecoder

pytestmark = pytest.mark.slow

RTX_2080 = DeviceKey((7, 5), 46, 65_536)
# relative norm error against float64: the result is rounded to float16, 2e-4, after sums of 4 numbers in float16 for
# one and two rows (3e-4, more where levels have a mean), of 16 for more (8e-4)
TOLERANCE = {1: 6e-4, 2: 6e-4, 4: 1.2e-3}
LAUNCHES = [(1, 1, 1), (2, 2, 2), (3, 4, 1), (7, 4, 9)]  # rows, block_m, split_k
SHAPES = [(128, 40, 32), (256, 96, 64), (256, 136, 128), (144, 24, -1), (512, 40, 256)]
__all__ = ["poison"]  # a fixture of every test here


def tile(block_m: int, split_k: int = 1) -> Tile:
    return Tile(block_m, 128, split_k, 4, 1)


@pytest.fixture
def turing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launchers choose as on a card of Turing."""
    for module in (gemm, attention):
        monkeypatch.setattr(module, "device_key", lambda _: RTX_2080)


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "zeros"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_few_rows_are_the_written_formula(shape: tuple[int, int, int], sym: bool) -> None:
    weight, formula = make_weight(*shape, sym=sym, desc_act=False)
    ours, bias = packed(weight), random(shape[1], seed=2)
    for rows, block_m, split_k in LAUNCHES:
        x = random(rows, shape[0])
        y = gemm_triton(Rows(x), ours, bias, tile=tile(block_m, split_k)).x
        expected = x.double().cpu() @ formula.T + bias.double().cpu()
        assert relative_error(y.cpu(), expected) < TOLERANCE[block_m], (rows, block_m, split_k)
        assert not bool(ours.locks.any())


@pytest.mark.parametrize("block_m", TOLERANCE)
def test_a_channel_near_the_end_of_float16_fits(block_m: int) -> None:
    weight, formula = make_weight(256, 40, 128, sym=True, desc_act=False)
    x = random(block_m, 256)
    x[:, 77] = 60000  # an activation of a massive channel, times its norm weight
    squares = x.double().square().sum(1, keepdim=True).float()
    y = gemm_triton(Rows(x, None, squares, EPS), packed(weight), tile=tile(block_m)).x
    factor = torch.rsqrt(squares.double().cpu() / 256 + EPS)
    assert relative_error(y.cpu(), (x.double().cpu() @ formula.T) * factor) < TOLERANCE[block_m]


@pytest.mark.parametrize("rows", [1, 3, 9, 20])
@pytest.mark.parametrize("epilogue", ["plain", "swiglu", "residual"])
def test_the_fused_forms_leave_the_rows_of_their_definitions(turing: None, epilogue: str, rows: int) -> None:
    one, _ = make_weight(256, 96, 64, sym=False, desc_act=True)
    weight = one
    if epilogue == "swiglu":
        weight = interleave(one, one)
    x, norm = random(rows, 256), random(96, seed=3)
    squares = x.float().square().sum(1, keepdim=True)
    given = Rows(x, None, squares, EPS)
    options, theirs = {}, given
    if epilogue == "residual":
        residual = random(rows, 96, seed=4, dtype=torch.float32)
        expected_residual = residual.clone()
        options = {"residual": residual, "norm_weight": norm, "eps": EPS}
        expected = reference.int4_gemm_residual(theirs, weight, None, expected_residual, norm, EPS)
    elif epilogue == "swiglu":
        expected = reference.int4_gemm_swiglu(theirs, weight)
    else:
        expected = Rows(reference.int4_gemm(theirs, weight))
    found = gemm_triton(given, packed(weight), epilogue=epilogue, **options)
    assert relative_error(found.x.cpu(), expected.x.cpu()) < 1e-3
    if epilogue == "residual":
        assert relative_error(residual.cpu(), expected_residual.cpu()) < 1e-3
        assert found.rsqrt() is not None and expected.rsqrt() is not None
        torch.testing.assert_close(found.rsqrt(), expected.rsqrt(), rtol=1e-3, atol=0)
    if epilogue != "plain" and rows <= 16:
        assert found.sums is not None and expected.sums is not None
        sums = found.x.float().unflatten(1, (-1, 32)).sum(2).T
        torch.testing.assert_close(found.sums[:, :rows], sums, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_the_int8_head(turing: None, rows: int) -> None:
    dense = random(72, 256, dtype=torch.float32)
    weight = quantize_int8(dense)
    x = random(rows, 256)
    y = gemm_triton(Rows(x), pack_for_triton(weight), out_dtype=torch.float32).x
    assert y.dtype == torch.float32
    assert relative_error(y.cpu(), x.double().cpu() @ weight.dequantize().double().cpu().T) < TOLERANCE[4]


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "zeros"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_weight_is_dequantized_as_it_is_written(shape: tuple[int, int, int], sym: bool) -> None:
    weight, formula = make_weight(*shape, sym=sym, desc_act=False)
    found = dequantize(packed(weight))
    assert found.shape[1] % 128 == 0
    assert relative_error(found[:, : shape[0]].cpu(), formula) < 3e-4  # each is rounded to float16
    assert found.isfinite().all()


def test_a_prompts_attention_is_torchs_and_appends(turing: None) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 5, 2, 32, generator=generator).half().to(DEVICE) for _ in range(3))
    angles = torch.randn(2, 5, 32, generator=generator).to(DEVICE)
    results = []
    for backend in ("triton", "torch"):
        cache = torch.full((2, 2, 2, 40, 32), float("nan"), dtype=torch.float16, device=DEVICE)
        cache[:, :, :, :7] = 0.25
        start = torch.tensor([0, 7], device=DEVICE)
        args = AttentionArgs(q, k, v, angles.cos(), angles.sin(), cache[0], cache[1], start)
        results.append((rotary_attention(args, backend=backend), cache[:, :, :, :12].nan_to_num()))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("head", ["float16", "int8"])
def test_a_small_decoder_gives_the_logits_of_the_definitions(turing: None, head: str) -> None:
    config = Config.from_dict(SMALL)
    model = FusedDecoder.random(config, device=DEVICE, head=head)
    logits: dict[str, list[torch.Tensor]] = {}
    for backend in ("triton", "torch"):
        model.backend = backend
        cache = KVCache(config, 2, 32, dtype=torch.float16, device=DEVICE)
        ids = torch.arange(2 * 18, device=DEVICE).view(2, 18)
        logits[backend] = [model(model.embed(ids), cache), model(model.embed(ids[:, :1] + 7), cache)]
    for found, expected in zip(logits["triton"], logits["torch"], strict=True):
        assert relative_error(found.cpu(), expected.cpu()) < 1e-2


def test_rows_take_the_smallest_block_and_more_than_four_are_several_launches() -> None:
    for rows, block_m in ((1, 1), (2, 2), (3, 4), (4, 4), (16, 4)):
        assert tile_for(rows, 12288, 4096, 128, device=RTX_2080).block_m == block_m


def test_bfloat16_is_refused_by_name(turing: None) -> None:
    weight = packed(make_weight(128, 40, 128, sym=True, desc_act=False)[0])
    for rows in (1, 20):
        with pytest.raises(ValueError, match=r"x is torch.bfloat16, the kernels for Turing take torch.float16"):
            gemm_triton(Rows(random(rows, 128, dtype=torch.bfloat16)), weight)
