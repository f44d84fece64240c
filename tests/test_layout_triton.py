"""The Triton kernels' order: words by hand, nothing lost on the way there and back."""

from dataclasses import replace

import pytest
import torch
from test_int4_gemm import make_weight

from kernels import interleave, pack_for_triton, quantize_int8
from kernels.gpu.weight import TILE

SHAPES = [(128, 40, 32), (384, 264, 128), (256, 128, 64), (144, 24, -1), (160, 8, 32), (512, 16, 256), (48, 8, -1)]


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packing_and_unpacking_give_the_same_bits(shape: tuple[int, int, int], desc_act: bool, sym: bool) -> None:
    weight, _ = make_weight(*shape, sym=sym, desc_act=desc_act)
    packed = pack_for_triton(weight)
    assert packed.words.shape[1] % TILE == 0 and packed.words.is_contiguous()
    assert (packed.zeros is None) == sym
    again = packed.unpack()
    for name in ("qweight", "scales", "zeros"):
        assert torch.equal(getattr(again, name), getattr(weight, name)), name
    assert again.perm is weight.perm


def test_a_words_nibbles_stand_where_the_formula_says() -> None:
    weight, _ = make_weight(256, 8, 128, sym=True, desc_act=False)
    levels, packed = weight.levels(), pack_for_triton(weight)
    for c, n, r in [(0, 0, 0), (0, 7, 15), (1, 3, 4)]:
        word = int(packed.words[c, n, r]) & 0xFFFFFFFF
        for j in range(4):
            for neighbour in (0, 1):
                assert (word >> (4 * j + 16 * neighbour)) & 15 == int(levels[128 * c + 32 * j + 2 * r + neighbour, n])


def test_eight_bits_come_back_and_stand_where_the_formula_says() -> None:
    weight = quantize_int8(torch.randn(10, 160, generator=torch.Generator().manual_seed(0)))
    packed = pack_for_triton(weight)
    again = packed.unpack()
    assert torch.equal(again.levels, weight.levels) and torch.equal(again.scales, weight.scales)
    word = int(packed.words[0, 4, 9]) & 0xFFFFFFFF
    for j in range(2):
        for neighbour in (0, 1):
            assert (word >> (8 * j + 16 * neighbour)) & 255 == int(weight.levels[4, 64 * j + 18 + neighbour]) + 128


def test_int8_keeps_every_weight_within_half_a_step() -> None:
    dense = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    dense[2] = 0
    weight = quantize_int8(dense.half())
    assert int(weight.levels.abs().max()) == 127
    error = (weight.levels * weight.scales[:, None] - dense.half().float()).abs()
    assert bool((error <= weight.scales[:, None] * 0.5001).all())
    with pytest.raises(ValueError, match="row 1 of 2 holds NaN or infinity"):
        quantize_int8(torch.tensor([[1.0], [float("inf")]]))


@pytest.mark.parametrize("desc_act", [False, True])
def test_interleaved_rows_come_from_the_two_weights_in_turn(desc_act: bool) -> None:
    first, _ = make_weight(128, 24, 32, sym=False, desc_act=desc_act)
    second = replace(
        first, qweight=first.qweight.flip(1), scales=first.scales * 2
    )  # w1 and w2 order their channels alike
    both = interleave(first, second).dequantize()
    assert torch.equal(both[::2], first.dequantize()) and torch.equal(both[1::2], second.dequantize())


def test_what_cannot_be_packed_or_interleaved_is_refused_with_both_numbers() -> None:
    weight, _ = make_weight(144, 8, 72, sym=True, desc_act=False)
    with pytest.raises(ValueError, match="groups of 72 channels, the Triton kernels take 32, 64, a multiple of 128"):
        pack_for_triton(weight)
    other, _ = make_weight(144, 16, 72, sym=True, desc_act=False)
    with pytest.raises(ValueError, match=r"shapes \(18, 8\) and \(18, 16\)"):
        interleave(weight, other)
    in_order, _ = make_weight(128, 24, 32, sym=True, desc_act=False)
    shuffled, _ = make_weight(128, 24, 32, sym=True, desc_act=True)
    with pytest.raises(ValueError, match="order their channels differently"):
        interleave(in_order, shuffled)
