"""The Triton kernels of rotary_attention against a float64 formula: on CUDA, or on the CPU in Triton's interpreter."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import AttentionArgs, dequantize_rows, quantize_rows, rotary_attention, rotary_attention_rows
from kernels.gpu.attention import MAX_SPLITS, decode_config, splits_for

pytestmark = pytest.mark.slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# relative norm of the difference to float64 over the cache as it is. float16: prefill rounds q, p and the output, each
# by 2^-12 at most. bfloat16: the same by 2^-9, and the interpreter cuts off (2^-8, and always downwards) where the GPU
# rounds. An int8 cache adds nothing: the formula reads the same levels and scales.
TOLERANCE = {torch.float16: 5e-4, torch.bfloat16: 1.2e-2}
# a key rotated in float32 and not in float64 may be rounded the other way: one unit in the last place; a level likewise
UNIT = {torch.float16: 2**-10, torch.bfloat16: 2**-7}
CACHES = ["float16", "bfloat16", "int8"]
UNTOUCHED = 99  # of an int8 cache; a float cache and scales are NaN where nothing was written


@dataclass
class Case:
    """One call: inputs, caches that are filled up to each start and poisoned behind it, and what the caches held."""

    inputs: tuple[Tensor, ...]  # q, k, v, cos, sin
    caches: tuple[Tensor, Tensor]
    start: Tensor
    options: dict[str, Any]
    before: list[Tensor]

    @property
    def stores(self) -> list[Tensor]:
        """Everything that a call may write to: caches and scales."""
        return [*self.caches, *(self.options[n] for n in ("k_scales", "v_scales") if n in self.options)]

    def floats(self) -> tuple[Tensor, Tensor]:
        """The caches (B, H, capacity, D) in float64."""
        k, v = self.caches
        if k.dtype != torch.int8:
            return k.double(), v.double()
        k, v = dequantize_rows(k, self.options["k_scales"]), dequantize_rows(v, self.options["v_scales"])
        return k.double(), v.double()

    def args(self, **more: Tensor) -> AttentionArgs:
        return AttentionArgs(*self.inputs, *self.caches, self.start, **self.options, **more)

    def run(self, *, splits: int | None = None, **more: Tensor) -> Tensor:
        return rotary_attention(self.args(**more), backend="triton", splits=splits)


def make_case(
    cache: str,
    starts: list[int],
    length: int,
    *,
    heads: int = 2,
    dim: int = 128,
    capacity: int = 0,
    q_scale: bool = True,
) -> Case:
    """q, k and v are views of one (B, T, 3, H, D), as a projection makes them."""
    dtype = torch.bfloat16 if cache == "bfloat16" else torch.float16
    generator = torch.Generator().manual_seed(length)
    batch, capacity = len(starts), capacity or max(starts) + length + 3
    q, k, v = torch.randn(batch, length, 3, heads, dim, generator=generator).to(DEVICE, dtype).unbind(2)
    start = torch.tensor(starts)
    angles = rotary_angles(start[:, None] + torch.arange(length), dim)
    caches = torch.randn(2, batch, heads, capacity, dim, generator=generator).to(dtype)
    options: dict[str, Tensor] = {}
    if q_scale:
        options["q_scale"] = 1 + torch.rand(batch, length, generator=generator)
    unfilled = torch.arange(capacity) >= start[:, None]  # (B, capacity)
    if cache == "int8":
        caches, scales = quantize_rows(caches)
        caches.masked_fill_(unfilled[:, None, :, None], UNTOUCHED)
        options["k_scales"], options["v_scales"] = scales.masked_fill(unfilled[:, None], math.nan).to(DEVICE).unbind()
    else:
        caches.masked_fill_(unfilled[:, None, :, None], math.nan)
    cos, sin = angles.cos().float().to(DEVICE), angles.sin().float().to(DEVICE)
    k_cache, v_cache = caches.to(DEVICE).unbind()
    options = {name: tensor.to(DEVICE) for name, tensor in options.items()}
    case = Case((q, k, v, cos, sin), (k_cache, v_cache), start.to(DEVICE), options, [])
    case.before = [x.clone() for x in case.stores]
    return case


def rotary_angles(positions: Tensor, dim: int) -> Tensor:
    angles = positions[..., None].double() * 10000.0 ** (-torch.arange(0, dim, 2).double() / dim)
    return torch.cat((angles, angles), -1)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (T, H, D) in float64, its pairs turned as complex numbers by the angles of cos and sin (T, D)."""
    half = x.shape[-1] // 2
    pairs = torch.complex(x[..., :half].double(), x[..., half:].double())
    pairs = pairs * torch.complex(cos[:, None, :half].double(), sin[:, None, :half].double())
    return torch.cat((pairs.real, pairs.imag), -1)


def expected_output(case: Case, sequence: int, keys: Tensor, values: Tensor) -> Tensor:
    """(T, H, D) float64 of one sequence, a query at a time, over keys and values (H, capacity, D) float64."""
    q, _, _, cos, sin = (x[sequence] for x in case.inputs)
    query = rotated(q, cos, sin)
    if "q_scale" in case.options:
        query = query * case.options["q_scale"][sequence].double()[:, None, None]
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    for t in range(len(q)):
        end = int(case.start[sequence]) + t + 1
        logits = (keys[:, :end] @ query[t, :, :, None]).squeeze(-1) / math.sqrt(q.shape[-1])
        out[t] = (logits.softmax(-1)[:, None] @ values[:, :end]).squeeze(1)
    return out


def check(case: Case, out: Tensor, *, unfit: tuple[int, ...] = ()) -> None:
    """Caches first, then the output over what they hold; sequences in `unfit` give NaN and write nothing."""
    q, k, v, cos, sin = case.inputs
    keys, values = case.floats()
    assert out.shape == q.shape and out.dtype == q.dtype
    for sequence, start in enumerate(case.start.tolist()):
        new = torch.zeros(keys.shape[2], dtype=torch.bool, device=keys.device)
        if sequence in unfit:
            assert bool(out[sequence].isnan().all())
        else:
            new[start : start + q.shape[1]] = True
            for cache, x, unit in ((keys, rotated(k[sequence], cos[sequence], sin[sequence]), 1), (values, v, 0)):
                x = (x if unit else x[sequence]).double().transpose(0, 1)
                # the rounding to q's dtype, and in int8 half a scale, which is max|x| / 127
                allowed = x.abs() * UNIT[q.dtype] * unit
                if "k_scales" in case.options:
                    allowed = allowed + x.abs().amax(-1, keepdim=True) / 254 * 1.01
                assert bool(((cache[sequence, :, new] - x).abs() <= allowed).all())
            expected = expected_output(case, sequence, keys[sequence], values[sequence])
            error = float((out[sequence].double() - expected).norm() / expected.norm())
            assert error < TOLERANCE[q.dtype]
        for store, before in zip(case.stores, case.before, strict=True):
            old = (store[sequence, :, ~new], before[sequence, :, ~new])
            assert torch.equal(*(x.nan_to_num(-7.0) if x.is_floating_point() else x for x in old))


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is allocated starts as NaN, so that an element that no kernel writes shows."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.mark.parametrize("splits", [1, 3, 8])
@pytest.mark.parametrize("cache", CACHES)
def test_one_token_of_sequences_at_unequal_positions(cache: str, splits: int) -> None:
    # 0 and 5 tokens leave most of 8 shares empty; 70 take more than one turn of a share
    case = make_case(cache, [0, 5, 70], 1, q_scale=splits != 3)
    check(case, case.run(splits=splits))


def test_one_token_with_logits_far_beyond_the_range_of_exp2() -> None:
    case = make_case("float16", [70], 1)
    case.options["q_scale"].mul_(60)
    check(case, case.run(splits=3))


@pytest.mark.parametrize("dim", [16, 32, 64])
def test_one_token_with_smaller_heads(dim: int) -> None:
    for cache in ("float16", "int8"):
        case = make_case(cache, [33], 1, heads=1, dim=dim)
        check(case, case.run(splits=2))


@pytest.mark.parametrize("length", [2, 17])
@pytest.mark.parametrize("cache", CACHES)
def test_a_chunk_on_top_of_unequal_caches(cache: str, length: int) -> None:
    case = make_case(cache, [0, 69], length, heads=1 if length > 2 else 2, q_scale=length > 2)
    check(case, case.run())


def test_a_prompt_of_several_tiles() -> None:
    case = make_case("float16", [0], 257, heads=1, dim=64)
    check(case, case.run())
    case = make_case("int8", [3], 66, heads=1, dim=32)
    check(case, case.run())


def test_decoding_after_a_chunk_equals_the_chunk_that_holds_both() -> None:
    whole = make_case("float16", [11], 4, heads=1, dim=32)
    steps = make_case("float16", [11], 4, heads=1, dim=32)
    expected = whole.run()
    outs = []
    for part in (slice(0, 3), slice(3, 4)):
        inputs = (x[:, part] for x in steps.inputs)
        q_scale = steps.options["q_scale"][:, part]
        args = AttentionArgs(*inputs, *steps.caches, steps.start + part.start, q_scale=q_scale)
        outs.append(rotary_attention(args, backend="triton"))
    assert float((torch.cat(outs, 1) - expected).norm() / expected.norm()) < TOLERANCE[torch.float16]
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(whole.caches, steps.caches, strict=True))


@pytest.mark.parametrize("cache", ["float16", "int8"])
@pytest.mark.parametrize(("length", "beyond"), [(1, 12), (1, 2**40), (3, 10)])
def test_a_sequence_that_does_not_fit_writes_nothing_and_gives_nan(cache: str, length: int, beyond: int) -> None:
    case = make_case(cache, [0, 4, 9], length, heads=1, dim=32, capacity=12)
    case.start[0], case.start[1] = beyond, -1
    check(case, case.run(), unfit=(0, 1))


def test_int8_is_off_by_what_its_scales_allow() -> None:
    """Against float64 over numbers that were never quantized.

    A key's error, scale / 2 in each number, moves its logit by |q|_1 scale / 2 / sqrt(D) at most. If no logit moves by
    more than d, no probability moves by more than a factor of exp(2 d), and the output by (exp(2 d) - 1) sum p |v|;
    the values add max v_scale / 2, less than that being left after their mean. float16 roundings come on top.
    """
    case = make_case("int8", [60], 1)
    exact = make_case("float16", [60], 1)  # from the same numbers
    out = case.run(splits=2)
    q, k, v, cos, sin = (x[0] for x in exact.inputs)
    keys, values = (x[0].double() for x in exact.caches)
    keys[:, 60], values[:, 60] = rotated(k, cos, sin)[0], v[0].double()
    expected = expected_output(exact, 0, keys, values)[0]
    spread = expected_output(exact, 0, keys, values.abs())[0]
    query = rotated(q, cos, sin)[0].abs().sum(-1) * float(exact.options["q_scale"])
    moved = query * case.options["k_scales"][0, :, :61].double().amax(-1) / 2 / math.sqrt(q.shape[-1])
    bound = (
        torch.expm1(2 * moved)[:, None] * spread + case.options["v_scales"][0, :, :61].double().amax(-1)[:, None] / 2
    )
    error = (out[0, 0].double() - expected).abs()
    assert bool((error <= bound + 1e-3 * expected.abs()).all())
    assert float(error.max()) > 0  # it is quantized


@pytest.mark.parametrize("splits", [1, 3])
def test_rows_carry_the_sums_of_what_they_hold(splits: int) -> None:
    case = make_case("float16", [40, 7], 1, dim=64)
    other = make_case("float16", [40, 7], 1, dim=64)
    rows = rotary_attention_rows(case.args(), backend="triton", splits=splits)
    assert torch.equal(rows.x, other.run(splits=splits).flatten(1))
    assert rows.sums is not None and rows.sums.shape == (4, 16)
    assert torch.allclose(rows.sums[:, :2].T, rows.x.float().unflatten(1, (4, 32)).sum(-1), atol=1e-5)


def test_locks_are_zero_again_and_serve_the_next_call() -> None:
    locks = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    outs = []
    for _ in range(2):
        case = make_case("float16", [40, 7], 1, dim=32)
        outs.append(case.run(splits=3, locks=locks))
        assert not bool(locks.any())
    assert torch.equal(*outs)


def test_shares_fill_the_device_once() -> None:
    config = decode_config(128, torch.float16)
    tile = config["LANES"] * config["STEPS"]
    assert splits_for(32, 8192, 128, torch.float16, 28) == 4  # RTX 3060
    assert splits_for(32, 8192, 128, torch.float16, 132) == 17  # H200
    assert splits_for(512, 8192, 128, torch.float16, 28) == 1
    assert splits_for(2, 10**6, 128, torch.float16, 132) == MAX_SPLITS
    assert splits_for(32, 2 * tile, 128, torch.float16, 132) == 2


def test_what_the_kernels_cannot_do_is_refused() -> None:
    case = make_case("float16", [4], 1, heads=1, dim=32)
    q, k, v, cos, sin = case.inputs
    caches, start = case.caches, case.start

    def run(
        q: Tensor, k: Tensor, v: Tensor, caches: tuple[Tensor, Tensor], splits: int | None = None, **more: Tensor
    ) -> Tensor:
        table = (x[..., : q.shape[-1]] for x in (cos, sin))
        return rotary_attention(AttentionArgs(q, k, v, *table, *caches, start, **more), backend="triton", splits=splits)

    with pytest.raises(ValueError, match="q is torch.float32, the Triton kernels take torch.float16"):
        run(q.float(), k.float(), v.float(), (caches[0].float(), caches[1].float()))
    with pytest.raises(ValueError, match="heads of size 8, the Triton kernels take 16, 32, 64, 128"):
        run(q[..., :8], k[..., :8], v[..., :8], (caches[0][..., :8], caches[1][..., :8]))
    with pytest.raises(ValueError, match="v_cache is torch.bfloat16, the Triton kernels take torch.float16 as in q"):
        run(q, k, v, (caches[0], caches[1].bfloat16()))
    with pytest.raises(ValueError, match=r"v has strides \(64, 64, 64, 2\), the last has to be 1"):
        run(q, k, torch.stack((v, v), -1)[..., 0], caches)
    with pytest.raises(ValueError, match="a head's positions have to be contiguous"):
        run(q, k, v, (caches[0].transpose(2, 3).contiguous().transpose(2, 3), caches[1]))
    with pytest.raises(ValueError, match="splits is 33, expected 1 to 32"):
        run(q, k, v, caches, splits=33)
    with pytest.raises(ValueError, match=r"locks has shape \(2,\), expected \(1,\)"):
        run(q, k, v, caches, locks=torch.zeros(2, dtype=torch.int32, device=DEVICE))
