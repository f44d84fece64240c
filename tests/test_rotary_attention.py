"""rotary_attention: the definition against a float64 loop, and one cache filled in any number of steps."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import (
    AttentionArgs,
    cpu_attention,
    dequantize_rows,
    quantize_rows,
    rotary_attention,
    rotary_attention_rows,
    rotate,
)

# largest difference of outputs of size 1: float32 sums over at most 40 keys; bfloat16 and float16 round q, k, v and the
# output, each by half a unit in the last place (2^-9, 2^-12)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
# of outputs of size 1 to 3 over 40 keys: queries are rounded by 2^-14 of their largest number, weights by 2^-15
DIGITS_TOLERANCE = 5e-4
HEADS, DIM, CAPACITY = 3, 8, 40


def tables(positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (B, T, DIM) float32 for positions (B, T)."""
    angles = positions[..., None] * 10000.0 ** (-torch.arange(0, DIM, 2).double() / DIM)
    angles = torch.cat((angles, angles), -1)
    return angles.cos().float(), angles.sin().float()


def make_inputs(batch: int, length: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch * 100 + length)
    return tuple(torch.randn(3, batch, length, HEADS, DIM, generator=generator).to(dtype).unbind())  # type: ignore[return-value]


def make_caches(batch: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Caches full of NaN, which shows if an unfilled position is read, even with a weight of 0."""
    return tuple(torch.full((2, batch, HEADS, CAPACITY, DIM), torch.nan, dtype=dtype).unbind())  # type: ignore[return-value]


def attend(
    q: Tensor, k: Tensor, v: Tensor, caches: tuple[Tensor, Tensor], start: list[int], q_scale: Tensor | None = None
) -> Tensor:
    begin = torch.tensor(start)
    cos, sin = tables(begin[:, None] + torch.arange(q.shape[1]))
    return rotary_attention(AttentionArgs(q, k, v, cos, sin, *caches, begin, q_scale=q_scale))


def loop_reference(q: Tensor, k: Tensor, v: Tensor, q_scale: Tensor | None = None) -> np.ndarray:
    """(B, T, H, D) float64 from an empty cache, one query at a time; pairs rotated as complex numbers."""

    def rotated(x: Tensor, position: int) -> np.ndarray:
        half = DIM // 2
        frequencies = 10000.0 ** (-np.arange(half) / half)
        pairs = x[:half].double().numpy() + 1j * x[half:].double().numpy()
        pairs = pairs * np.exp(1j * position * frequencies)
        return np.concatenate((pairs.real, pairs.imag))

    out = np.empty(q.shape)
    for b, t, h in np.ndindex(*q.shape[:3]):
        query = rotated(q[b, t, h], t) * (1.0 if q_scale is None else float(q_scale[b, t]))
        logits = [query @ rotated(k[b, s, h], s) / math.sqrt(DIM) for s in range(t + 1)]
        shares = np.exp(np.array(logits) - max(logits))
        out[b, t, h] = shares / shares.sum() @ v[b, : t + 1, h].double().numpy()
    return out


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("length", [1, 17])
def test_the_definition_is_the_written_formula(length: int, dtype: torch.dtype) -> None:
    q, k, v = make_inputs(2, length, dtype)
    out = attend(q, k, v, make_caches(2, dtype), [0, 0])
    assert out.dtype == dtype
    assert np.abs(out.double().numpy() - loop_reference(q, k, v)).max() < TOLERANCE[dtype]


def test_q_scale_multiplies_each_tokens_query() -> None:
    q, k, v = make_inputs(2, 9)
    q_scale = 1 + torch.rand(2, 9, generator=torch.Generator().manual_seed(5))
    out = attend(q, k, v, make_caches(2), [0, 0], q_scale)
    assert np.abs(out.numpy() - loop_reference(q, k, v, q_scale)).max() < TOLERANCE[torch.float32]


@pytest.mark.parametrize("steps", [[13, 1, 1, 1, 1, 1], [6, 12], [1] * 18])
def test_a_cache_filled_in_steps_equals_one_full_call(steps: list[int]) -> None:
    q, k, v = make_inputs(2, sum(steps))
    expected = attend(q, k, v, make_caches(2), [0, 0])
    caches, done = make_caches(2), 0
    for step in steps:
        part = slice(done, done + step)
        out = attend(q[:, part], k[:, part], v[:, part], caches, [done, done])
        assert (out - expected[:, part]).abs().max() < TOLERANCE[torch.float32]
        done += step


def test_rows_at_unequal_starts_equal_single_runs() -> None:
    starts, step = [0, 7, 30], 3
    caches = make_caches(3)
    singles = []
    for row, start in enumerate(starts):
        q, k, v = (x[row : row + 1] for x in make_inputs(3, start + step))
        singles.append(attend(q, k, v, make_caches(1), [0])[:, start:])
        if start:
            view = (caches[0][row : row + 1], caches[1][row : row + 1])
            attend(q[:, :start], k[:, :start], v[:, :start], view, [0])
    last = [tuple(x[row, start:] for x in make_inputs(3, start + step)) for row, start in enumerate(starts)]
    q, k, v = (torch.stack(parts) for parts in zip(*last, strict=True))
    out = attend(q, k, v, caches, starts)
    assert (out - torch.cat(singles)).abs().max() < TOLERANCE[torch.float32]


def test_the_caches_hold_rotated_keys_and_plain_values_at_their_positions_only() -> None:
    q, k, v = make_inputs(1, 4)
    k_cache, v_cache = make_caches(1)
    attend(q, k, v, (k_cache, v_cache), [5])
    assert torch.equal(v_cache[0, :, 5:9], v[0].transpose(0, 1))
    # rotation turns each pair and keeps its length
    pairs = k_cache[0, :, 5:9].unflatten(-1, (2, -1)).norm(dim=-2)
    assert torch.allclose(pairs, k[0].transpose(0, 1).unflatten(-1, (2, -1)).norm(dim=-2), atol=1e-6)
    for cache in (k_cache, v_cache):
        assert bool(cache[:, :, :5].isnan().all()) and bool(cache[:, :, 9:].isnan().all())


@pytest.mark.parametrize("start", [-1, CAPACITY - 2])
def test_a_position_outside_the_cache_is_refused_and_nothing_is_written(start: int) -> None:
    caches = make_caches(1)
    with pytest.raises(ValueError, match=rf"\[{start}, {start}\] and 3 tokens.*0 to {CAPACITY - 1}"):
        attend(*make_inputs(1, 3), caches, [start])
    assert bool(caches[0].isnan().all())


def test_what_does_not_fit_is_refused_with_both_shapes() -> None:
    q, k, v = make_inputs(2, 3)
    caches, start = make_caches(2), torch.zeros(2, dtype=torch.int64)
    cos, sin = tables(torch.arange(3).expand(2, 3))
    with pytest.raises(ValueError, match=r"k has shape \(2, 2, 3, 8\), expected \(2, 3, 3, 8\)"):
        rotary_attention(AttentionArgs(q, k[:, :2], v, cos, sin, *caches, start))
    with pytest.raises(ValueError, match=r"cos has shape \(1, 3, 8\), expected \(2, 3, 8\)"):
        rotary_attention(AttentionArgs(q, k, v, cos[:1], sin, *caches, start))
    with pytest.raises(ValueError, match=r"v_cache has shape \(1, 3, 40, 8\), expected \(2, 3, 40, 8\)"):
        rotary_attention(AttentionArgs(q, k, v, cos, sin, caches[0], caches[1][:1], start))
    with pytest.raises(ValueError, match="start is torch.int32, expected torch.int64"):
        rotary_attention(AttentionArgs(q, k, v, cos, sin, *caches, start.int()))
    with pytest.raises(ValueError, match="sin is torch.float64, expected torch.float32"):
        rotary_attention(AttentionArgs(q, k, v, cos, sin.double(), *caches, start))
    with pytest.raises(ValueError, match="v is torch.float16, expected torch.float32"):
        rotary_attention(AttentionArgs(q, k, v.half(), cos, sin, *caches, start))
    with pytest.raises(ValueError, match='backend is \'cuda\', rotary_attention has "torch" and "triton"'):
        rotary_attention(AttentionArgs(q, k, v, cos, sin, *caches, start), backend="cuda")
    levels, scales = torch.zeros(2, HEADS, CAPACITY, DIM, dtype=torch.int8), torch.zeros(2, HEADS, CAPACITY).half()
    with pytest.raises(ValueError, match="k_cache is torch.int8 but k_scales is missing"):
        rotary_attention(AttentionArgs(q, k, v, cos, sin, levels, levels, start))
    with pytest.raises(ValueError, match="k_cache is torch.float32 but k_scales is given"):
        rotary_attention(AttentionArgs(q, k, v, cos, sin, *caches, start, k_scales=scales, v_scales=scales))
    with pytest.raises(ValueError, match=r"k_scales has shape \(2, 3, 40, 1\), expected \(2, 3, 40\)"):
        rotary_attention(
            AttentionArgs(q, k, v, cos, sin, levels, levels, start, k_scales=scales[..., None], v_scales=scales)
        )
    with pytest.raises(ValueError, match=r"q has shape \(2, 3, 3, 8\), rotary_attention_rows takes \(B, 1, H, D\)"):
        rotary_attention_rows(AttentionArgs(q, k, v, cos, sin, *caches, start))


def test_a_row_in_int8_is_off_by_half_its_scale_at_most() -> None:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(3)) * 10.0 ** torch.arange(-8, 8).repeat(4)[:, None]
    x[:, 0] = x.abs().amax(1) * 1.1  # the largest, which gets the largest level
    x = x.clamp(-65504, 65504)
    levels, scales = quantize_rows(x)
    assert levels.dtype == torch.int8 and scales.dtype == torch.float16
    # half a scale, and the float32 rounding of the quotient
    assert bool(((x - dequantize_rows(levels, scales)).abs() <= scales.float()[:, None] * 0.50001).all())
    # where the scale is at its floor, 2^-17, a quarter of the levels would be enough
    assert bool((levels[:, 0] == 127)[x[:, 0] > 127 * 2**-17].all())
    assert bool((dequantize_rows(*quantize_rows(torch.zeros(2, 16))) == 0).all())


@pytest.mark.parametrize("steps", [[9], [5, 1, 3]])
def test_an_int8_cache_gives_what_its_numbers_give_in_float(steps: list[int]) -> None:
    q, k, v = make_inputs(2, 9)
    shape = (2, 2, HEADS, CAPACITY)
    k_cache, v_cache = torch.full((*shape, DIM), 99, dtype=torch.int8).unbind()
    k_scales, v_scales = torch.full(shape, math.nan, dtype=torch.float16).unbind()
    scales = {"k_scales": k_scales, "v_scales": v_scales}
    cos, sin = tables(torch.arange(9).expand(2, 9))
    outs, done = [], 0
    for step in steps:
        part = slice(done, done + step)
        inputs = (x[:, part] for x in (q, k, v, cos, sin))
        outs.append(rotary_attention(AttentionArgs(*inputs, k_cache, v_cache, torch.tensor([done, done]), **scales)))
        done += step
    caches = dequantize_rows(k_cache, k_scales), dequantize_rows(v_cache, v_scales)
    for cache, x in zip(caches, (rotate(k, cos, sin), v), strict=True):
        assert bool(((cache[:, :, :9] - x.transpose(1, 2)).abs() <= x.abs().amax() / 254 * 1.001).all())
        assert bool(cache[:, :, 9:].isnan().all())
    seen = torch.ones(9, 9).tril().bool()
    logits = rotate(q, cos, sin).transpose(1, 2) @ caches[0][:, :, :9].mT / math.sqrt(DIM)
    expected = logits.masked_fill(~seen, -math.inf).softmax(-1) @ caches[1][:, :, :9]
    assert (torch.cat(outs, 1) - expected.transpose(1, 2)).abs().max() < TOLERANCE[torch.float32]


@pytest.mark.parametrize("at_once", [1, cpu_attention.FLOATS_AT_ONCE])  # two of the three heads, or all
@pytest.mark.parametrize("steps", [[12, 1, 1, 1, 1], [3, 9, 4, 12, 12], [1, 2, 37]], ids=str)
def test_blocks_give_what_one_piece_gives(steps: list[int], at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "FLOATS_AT_ONCE", at_once)
    blocks, block, batch = 10, 4, 2
    levels = {
        "k": torch.full((batch, blocks, HEADS, DIM, block), 99, dtype=torch.int8),
        "v": torch.full((batch, blocks, HEADS, block, DIM), 99, dtype=torch.int8),
    }
    scales = {f"{name}_scales": torch.full((batch, blocks, HEADS, block), 3.0).half() for name in levels}
    q, k, v = make_inputs(batch, sum(steps))
    q_scale = torch.rand(batch, sum(steps), generator=torch.Generator().manual_seed(1)) + 1
    one_piece = torch.empty(2, batch, HEADS, CAPACITY, DIM, dtype=torch.int8)
    its_scales = dict(zip(scales, torch.empty(2, batch, HEADS, CAPACITY).half(), strict=True))
    done = 0
    for step in steps:
        part = slice(done, done + step)
        start = torch.tensor([done, done])
        cos, sin = tables(start[:, None] + torch.arange(step))
        inputs = (q[:, part], k[:, part], v[:, part], cos, sin)
        out = rotary_attention(
            AttentionArgs(*inputs, levels["k"], levels["v"], start, q_scale=q_scale[:, part], **scales)
        )
        expected = rotary_attention(AttentionArgs(*inputs, *one_piece, start, q_scale=q_scale[:, part], **its_scales))
        few = step <= cpu_attention.FEW_TOKENS
        assert (out - expected).abs().max() < (DIGITS_TOLERANCE if few else TOLERANCE[torch.float32])
        done += step
    held = levels["k"].permute(0, 2, 1, 4, 3).flatten(2, 3), levels["v"].transpose(1, 2).flatten(2, 3)
    for cache, blocked in zip(one_piece, held, strict=True):
        assert torch.equal(cache[:, :, :done], blocked[:, :, :done])


def test_blocks_of_numbers_that_are_none_give_none() -> None:
    q, k, v = make_inputs(1, 1)
    cache, scales = torch.zeros(1, 1, HEADS, DIM, 4, dtype=torch.int8), torch.zeros(1, 1, HEADS, 4).half()
    cos, sin = tables(torch.zeros(1, 1))
    args = AttentionArgs(q, k, v, cos, sin, cache, cache.mT.contiguous(), torch.tensor([0]), None, scales, scales)
    for bad in (q * math.nan, q * math.inf):
        assert not rotary_attention(replace(args, q=bad)).isfinite().any()
    with pytest.raises(ValueError, match='a cache in blocks has "cpu"'):
        rotary_attention(args, backend="torch")
    with pytest.raises(ValueError, match="blocks are int8 and each sequence's are contiguous"):
        rotary_attention(replace(args, k_cache=cache.mT.contiguous().mT))
    with pytest.raises(ValueError, match="holds positions 0 to 3"):
        rotary_attention(replace(args, start=torch.tensor([4])))


def test_rows_are_the_heads_side_by_side_with_their_sums() -> None:
    generator = torch.Generator().manual_seed(7)
    q, k, v = torch.randn(3, 2, 1, 2, 64, generator=generator).unbind()
    cos, sin = torch.ones(2, 1, 64), torch.zeros(2, 1, 64)
    caches, start = torch.zeros(2, 2, 2, 4, 64), torch.tensor([0, 0])
    rows = rotary_attention_rows(AttentionArgs(q, k, v, cos, sin, *caches, start))
    assert torch.equal(rows.x, rotary_attention(AttentionArgs(q, k, v, cos, sin, *caches, start)).flatten(1))
    assert rows.sums is not None and torch.allclose(rows.sums[:, :2].T, rows.x.unflatten(1, (4, 32)).sum(-1), atol=1e-5)
