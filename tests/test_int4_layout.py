"""The disk order, the kernel order and the CPU's orders of an int4 weight hold the same levels, scales and zeros."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import (
    Int4Weight,
    dequantize_gptq,
    int4_gemm,
    pack_for_cpu,
    pack_levels,
    pack_zeros,
    unpack_levels,
    unpack_zeros,
)

GOLDEN = Path(__file__).parent / "data" / "gptq"
CASES = json.loads((GOLDEN / "cases.json").read_text())
TOLERANCE = 2e-6  # float32 sums over at most 384 channels, relative to the largest output


def make_gptq(
    k: int, n: int, group_size: int, *, sym: bool = False, desc_act: bool = False, checkpoint_format: str = "gptq"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random qweight, qzeros, scales and g_idx as on disk."""
    generator = torch.Generator().manual_seed(k + n)
    size = k if group_size == -1 else group_size
    first = 1 if checkpoint_format == "gptq" else 0
    zeros = torch.randint(first, first + 16, (k // size, n), generator=generator)
    g_idx = torch.arange(k, dtype=torch.int32) // size
    return (
        pack_levels(torch.randint(0, 16, (k, n), generator=generator)),
        pack_zeros(torch.full_like(zeros, 8) if sym else zeros, 4, checkpoint_format),
        (torch.rand(k // size, n, generator=generator) / 10).half(),
        g_idx[torch.randperm(k, generator=generator)] if desc_act else g_idx,
    )


def written_formula(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, plus: int) -> np.ndarray:
    """W (N, K) float64 element by element, with Python integers: the formula of AutoGPTQ's qlinear_cuda.py."""
    words, stored = qweight.numpy().astype(np.uint32), qzeros.numpy().astype(np.uint32)
    weights = np.empty((qweight.shape[1], g_idx.shape[0]))
    for n, k in np.ndindex(weights.shape):
        g = int(g_idx[k])
        level = int(words[k // 8, n]) >> (4 * (k % 8)) & 15
        zero = (int(stored[g, n // 8]) >> (4 * (n % 8)) & 15) + plus
        weights[n, k] = (level - zero) * float(scales[g, n])
    return weights


def test_lowest_bits_of_a_word_are_the_lowest_channel() -> None:
    levels = torch.arange(8).view(8, 1)
    assert pack_levels(levels).tolist() == [[0x76543210]]
    assert unpack_levels(torch.tensor([[0x76543210]], dtype=torch.int32)).flatten().tolist() == list(range(8))
    assert pack_levels(torch.tensor([[1], [2], [3], [255]]), 8).tolist() == [[0xFF030201 - 2**32]]


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_then_unpacking_gives_the_levels_back(bits: int) -> None:
    levels = torch.randint(0, 2**bits, (64, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert torch.equal(unpack_levels(pack_levels(levels, bits), bits), levels)


def test_a_level_that_does_not_fit_is_refused_with_the_range() -> None:
    with pytest.raises(ValueError, match=r"lie in \[0, 16\], 4 bits hold \[0, 15\]"):
        pack_levels(torch.tensor([[0]] * 7 + [[16]]))
    with pytest.raises(ValueError, match="12 rows.*multiple of 8"):
        pack_levels(torch.zeros(12, 1, dtype=torch.int32))


def test_v1_stores_zero_minus_one_and_v2_stores_zero() -> None:
    zeros = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]])
    assert pack_zeros(zeros).tolist() == [[0x76543210]]
    assert pack_zeros(zeros, checkpoint_format="gptq_v2").tolist() == [[0x87654321 - 2**32]]
    assert unpack_zeros(torch.tensor([[0x7654321F]], dtype=torch.int32)).tolist() == [[16, 2, 3, 4, 5, 6, 7, 8]]


@pytest.mark.parametrize(("zero", "checkpoint_format"), [(0, "gptq"), (17, "gptq"), (16, "gptq_v2")])
def test_a_zero_that_a_format_cannot_hold_is_refused(zero: int, checkpoint_format: str) -> None:
    with pytest.raises(ValueError, match=rf"zeros lie in \[{zero}, {zero}\].*{checkpoint_format}"):
        pack_zeros(torch.full((1, 8), zero), 4, checkpoint_format)


def test_an_unknown_format_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'marlin'.*gptq_v2"):
        unpack_zeros(torch.zeros(1, 1, dtype=torch.int32), 4, "marlin")


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
def test_both_orders_are_the_written_formula(group_size: int, desc_act: bool, checkpoint_format: str) -> None:
    disk = make_gptq(128, 24, group_size, desc_act=desc_act, checkpoint_format=checkpoint_format)
    expected = written_formula(*disk, plus=1 if checkpoint_format == "gptq" else 0)
    weight = Int4Weight.from_gptq(*disk, group_size=group_size, checkpoint_format=checkpoint_format)
    from_disk = dequantize_gptq(*disk, bits=4, group_size=group_size, checkpoint_format=checkpoint_format)
    # level times float16 scale is exact in float32
    assert np.array_equal(from_disk.double().numpy(), expected)
    assert np.array_equal(weight.dequantize().double().numpy(), expected)
    assert np.array_equal(pack_for_cpu(weight).dequantize().double().numpy(), expected)


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
def test_the_disk_tensors_come_back_bit_for_bit(desc_act: bool, checkpoint_format: str) -> None:
    disk = make_gptq(256, 40, 64, desc_act=desc_act, checkpoint_format=checkpoint_format)
    weight = Int4Weight.from_gptq(*disk, group_size=64, checkpoint_format=checkpoint_format)
    assert (weight.perm is not None) == desc_act
    for ours, theirs in zip(weight.to_gptq(checkpoint_format), disk, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_v1_and_v2_of_one_weight_are_the_same_weight() -> None:
    weight = Int4Weight.from_gptq(*make_gptq(64, 8, 32, sym=True), group_size=32)
    again = Int4Weight.from_gptq(*weight.to_gptq("gptq_v2"), group_size=32, checkpoint_format="gptq_v2")
    assert torch.equal(again.dequantize(), weight.dequantize())


def test_on_the_cpu_a_level_takes_half_a_byte() -> None:
    weight = pack_for_cpu(Int4Weight.from_gptq(*make_gptq(1024, 512, 128, sym=True), group_size=128))
    assert (weight.in_features, weight.out_features, weight.group_size) == (1024, 512, 128)
    assert 0.5 * 1024 * 512 < weight.nbytes < 0.54 * 1024 * 512


@pytest.mark.parametrize("index", range(len(CASES)))
@pytest.mark.parametrize("packed", [False, True])
def test_the_words_of_auto_gptq_give_its_output(index: int, packed: bool) -> None:
    case, data = CASES[index], np.load(GOLDEN / f"linear{index}.npz")
    disk = [torch.from_numpy(data[name]) for name in ("qweight", "qzeros", "scales", "g_idx")]
    weight = Int4Weight.from_gptq(*disk, group_size=case["group_size"])
    assert (weight.perm is not None) == case["desc_act"]
    x = torch.from_numpy(data["Xe"]).float()
    bias = torch.from_numpy(data["bias"]).float() if case["bias"] else None
    expected = torch.from_numpy(data["y"]).float()
    y = int4_gemm(x, pack_for_cpu(weight) if packed else weight, bias)
    assert (y - expected).abs().max() < TOLERANCE * expected.abs().max()


def test_tensors_that_contradict_one_another_are_named_with_both_shapes() -> None:
    qweight, qzeros, scales, g_idx = make_gptq(128, 16, 32)
    with pytest.raises(ValueError, match=r"h.0.c_attn.qzeros has shape \(3, 2\), expected \(4, 2\)"):
        Int4Weight.from_gptq(qweight, qzeros[:3], scales, g_idx, group_size=32, name="h.0.c_attn")
    with pytest.raises(ValueError, match=r"scales has shape \(4, 16\), expected \(2, 16\).*group_size 64"):
        Int4Weight.from_gptq(qweight, qzeros[:2], scales, g_idx, group_size=64)
    with pytest.raises(ValueError, match=r"g_idx has shape \(120,\), expected \(128,\)"):
        Int4Weight.from_gptq(qweight, qzeros, scales, g_idx[:120], group_size=32)
    with pytest.raises(ValueError, match="128 input features, which group_size 48 does not divide"):
        Int4Weight.from_gptq(qweight, qzeros, scales, g_idx, group_size=48)
    with pytest.raises(ValueError, match="qweight is torch.int64, expected torch.int32"):
        Int4Weight.from_gptq(qweight.long(), qzeros, scales, g_idx, group_size=32)
    with pytest.raises(ValueError, match="said to have 3 bits"):
        dequantize_gptq(qweight, qzeros, scales, g_idx, bits=3, group_size=32)


@pytest.mark.parametrize("bad", [-1, 4])
def test_a_group_index_out_of_range_is_refused_with_the_range(bad: int) -> None:
    qweight, qzeros, scales, g_idx = make_gptq(128, 16, 32)
    g_idx[5] = bad
    with pytest.raises(ValueError, match=rf"g_idx lies in \[{min(bad, 0)}, {max(bad, 3)}\], expected \[0, 3\]"):
        Int4Weight.from_gptq(qweight, qzeros, scales, g_idx, group_size=32)


def test_uneven_groups_are_refused_with_their_sizes() -> None:
    qweight, qzeros, scales, g_idx = make_gptq(128, 16, 32)
    g_idx[0] = 3
    with pytest.raises(ValueError, match="puts 31 to 33 channels into a group, expected 32 in each of 4"):
        Int4Weight.from_gptq(qweight, qzeros, scales, g_idx, group_size=32)
