"""What the kernels are checked and timed on: Qwen-7B's GEMMs and attention, with float64 references."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.kernels.timing import OUTGROWS_CACHES
from kernels import (
    MAX_DECODE_ROWS,
    AttentionArgs,
    Rows,
    TritonWeight,
    dequantize_rows,
    quantize_rows,
    reference,
    rms_rows,
)
from kernels.gpu.tiles import Tile
from kernels.gpu.weight import CHUNK, SMALLEST_TILE, TILE

EPS = 1e-6
CHECKED = 128  # outputs at the start, at the end and in between that are compared with float64
# relative norm error of 16-bit results of float32 sums: the result is rounded, past 16 rows each weight is too
TOLERANCE = {torch.float16: 7e-4, torch.bfloat16: 6e-3, torch.float32: 1e-4}


@dataclass(frozen=True)
class Gemm:
    """x (M, k) times W (n, k), with its fused operations."""

    name: str
    k: int
    n: int  # w1 and w2 count as one, interleaved
    epilogue: str = "plain"  # or "swiglu", "residual"
    norm: bool = False
    bias: bool = False
    bits: int = 4
    group: int = 128  # channels that share a scale; an int8 row has one scale for all k
    zeros: bool = False

    @property
    def outputs(self) -> int:
        """Columns of the result."""
        return self.n // 2 if self.epilogue == "swiglu" else self.n


C_ATTN = Gemm("c_attn", 4096, 12288, norm=True, bias=True)
ATTN_C_PROJ = Gemm("attn.c_proj", 4096, 4096, epilogue="residual")
W1_W2 = Gemm("w1 and w2", 4096, 22016, epilogue="swiglu", norm=True)
MLP_C_PROJ = Gemm("mlp.c_proj", 11008, 4096, epilogue="residual")
HEAD = Gemm("int8 head", 4096, 151936, bits=8, group=4096)
LAYER = (C_ATTN, ATTN_C_PROJ, W1_W2, MLP_C_PROJ)
GEMMS = (*LAYER, HEAD)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| over all elements, in float64."""
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm())


def expect_below(error: float, allowed: float, what: str) -> float:
    """`error`; SystemExit if it is too large, or NaN: a wrong result is not worth timing."""
    if not error < allowed:
        raise SystemExit(f"{what} is off by {error:.1e}, allowed is {allowed:.1e}")
    return error


def weight_of(gemm: Gemm, *, device: torch.device | str, seed: int = 0) -> TritonWeight:
    """Random levels in kernel order, made on the device (or on "meta"); scaled so that normal x gives normal y."""
    in_features, out_features, bits, group = gemm.k, gemm.n, gemm.bits, gemm.group
    generator = None if torch.device(device).type == "meta" else torch.Generator(device).manual_seed(seed)
    chunks, padded = -(-in_features // CHUNK), -(-out_features // TILE) * TILE
    shape = (chunks, padded, CHUNK * bits // 32)
    groups = 1 if group == in_features else -(-chunks * CHUNK // group)
    words = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=device, generator=generator)
    deviation = 4.6 if bits == 4 else 74.0  # of a uniform level
    scales = torch.full((groups, padded), in_features**-0.5 / deviation, device=device)
    scales[:, out_features:] = 0
    off_middle = torch.ones(groups, padded, dtype=torch.float16, device=device) if gemm.zeros else None
    return TritonWeight(
        words,
        scales if bits == 8 else scales.half(),
        off_middle,
        None,
        torch.zeros(padded // SMALLEST_TILE, dtype=torch.int32, device=device),
        bits,
        in_features,
        out_features,
        group,
    )


def formula(weight: TritonWeight, outputs: Tensor) -> Tensor:
    """W (len(outputs), K) float64 of some output features, unpacked from the words (gpu/weight.py)."""
    part = replace(weight, words=weight.words[:, outputs], out_features=len(outputs))
    levels = part.levels().double() - (8 if weight.bits == 4 else 128)
    group = torch.arange(weight.in_features, device=weight.device) // weight.group_size
    if weight.zeros is not None:
        levels -= weight.zeros[:, outputs].double()[group]
    return (levels * weight.scales[:, outputs].double()[group]).T


@dataclass(frozen=True, eq=False)
class Problem:
    """A Gemm with random operands on a device."""

    gemm: Gemm
    rows: Rows
    weight: TritonWeight
    bias: Tensor | None
    residual: Tensor | None  # (M, N) float32; `run` adds to it in place
    norm_weight: Tensor | None

    @classmethod
    def random(
        cls, gemm: Gemm, count: int, *, dtype: torch.dtype = torch.float16, device: str, seed: int = 0
    ) -> "Problem":
        """Random operands, `count` rows."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, generator=generator)

        weight = weight_of(gemm, device=device, seed=seed)
        if gemm.norm:
            rows = rms_rows(normal(count, gemm.k), normal(gemm.k).to(dtype), EPS, dtype, backend="torch")
        else:
            x = normal(count, gemm.k).to(dtype)
            rows = Rows(x, reference.sum_rows(x) if count <= MAX_DECODE_ROWS else None)
        residual = gemm.epilogue == "residual"
        return cls(
            gemm,
            rows,
            weight,
            normal(gemm.outputs).to(dtype) if gemm.bias else None,
            normal(count, gemm.outputs) if residual else None,
            normal(gemm.outputs).to(dtype) if residual else None,
        )

    def copies(self, count: int | None = None) -> "list[Problem]":
        """`count` problems with the same rows and separate weights (None: enough to exceed the caches), self first."""
        count = count or -(-OUTGROWS_CACHES // self.bytes_read)
        others = (weight_of(self.gemm, device=self.weight.device, seed=seed) for seed in range(1, count))
        return [self, *(replace(self, weight=weight) for weight in others)]

    @property
    def bytes_read(self) -> int:
        """Of the weight, by one run."""
        return self.weight.words.nbytes + self.weight.scales.nbytes

    def run(self, tile: Tile | None = None) -> Rows:
        """One launch."""
        from kernels.gpu.gemm import gemm_triton  # loads triton

        return gemm_triton(
            self.rows,
            self.weight,
            self.bias,
            epilogue=self.gemm.epilogue,
            residual=self.residual,
            norm_weight=self.norm_weight,
            eps=EPS if self.residual is not None else 0.0,
            out_dtype=torch.float32 if self.gemm.bits == 8 else None,
            tile=tile,
        )

    def error(self, tile: Tile | None = None) -> float:
        """Run once; relative norm error against float64 over the first, the last and a spread of other outputs.

        NaN if any output is not finite. The residual is compared too.
        """
        before = None if self.residual is None else self.residual.double()
        y = self.run(tile).x.double()
        outputs = y.shape[1]
        if not bool(y.isfinite().all()):
            return math.nan
        chosen = torch.arange(outputs, device=y.device)
        spread = chosen[:: max(1, outputs // CHECKED) | 1]  # an odd step: other places in each tile
        chosen = torch.cat((chosen[:CHECKED], spread, chosen[-CHECKED:])).unique()
        x = self.rows.x.double()

        def product(of: Tensor) -> Tensor:
            result = x @ formula(self.weight, of).T
            if self.rows.squares is not None:
                squares = self.rows.squares.double().sum(1, keepdim=True)
                result *= torch.rsqrt(squares / x.shape[1] + self.rows.eps)
            return result if self.bias is None else result + self.bias.double()[of]

        if self.gemm.epilogue == "swiglu":
            gate = product(2 * chosen + 1)
            expected = product(2 * chosen) * gate / (1 + (-gate).exp())
        else:
            expected = product(chosen)
        added = 0.0
        if before is not None:
            assert self.residual is not None and self.norm_weight is not None
            expected += before[:, chosen]
            added = relative_error(self.residual[:, chosen], expected)
            expected *= self.norm_weight.double()[chosen]
        return max(added, relative_error(y[:, chosen], expected))

    def checked(self, tile: Tile | None = None) -> float:
        """`error`; SystemExit if it exceeds the tolerance."""
        with_tile = f" with {tile}" if tile else ""
        return expect_below(self.error(tile), self.tolerance, f"{self.gemm.name}, {len(self.rows.x)} rows{with_tile}")

    @property
    def tolerance(self) -> float:
        """The largest `error` that rounding can cause."""
        return TOLERANCE[torch.float32 if self.gemm.bits == 8 else self.rows.x.dtype]


def random_attention(
    heads: int, dim: int, capacity: int, starts: Sequence[int], length: int, *, device: str, int8: bool, seed: int = 0
) -> AttentionArgs:
    """`length` new tokens per sequence after `starts` cached ones; q, k and v are views of one tensor."""
    batch, generator = len(starts), torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    q, k, v = normal(batch, length, 3, heads, dim).half().unbind(2)
    angles = normal(batch, length, dim // 2) * 3
    angles = torch.cat((angles, angles), -1)
    return AttentionArgs(
        q, k, v, angles.cos(), angles.sin(),
        **random_cache(batch, heads, capacity, dim, device=device, int8=int8, seed=seed + 1000),
        start=torch.tensor(starts, device=device),
        locks=torch.zeros(batch * heads, dtype=torch.int32, device=device),
    )  # fmt: skip


def random_cache(*shape: int, device: str, int8: bool, seed: int) -> dict[str, Tensor]:
    """Keys and values (B, H, capacity, D), with their scales if int8, by the names of AttentionArgs."""
    generator = torch.Generator(device).manual_seed(seed)
    k, v = (torch.randn(shape, generator=generator, device=device, dtype=torch.float16) for _ in range(2))
    if not int8:
        return {"k_cache": k, "v_cache": v}
    (k, k_scales), (v, v_scales) = quantize_rows(k), quantize_rows(v)
    return {"k_cache": k, "v_cache": v, "k_scales": k_scales, "v_scales": v_scales}


def cached(cache: Tensor, scales: Tensor | None, where: tuple[int | slice, ...]) -> Tensor:
    """Rows of a cache (B, H, capacity, D), dequantized if they have scales, in float64."""
    return (cache[where] if scales is None else dequantize_rows(cache[where], scales[where])).double()


def rotate_exactly(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (T, H, D) rotated by cos and sin (T, D), in float64."""
    x1, x2 = x.double().chunk(2, -1)
    return x.double() * cos[:, None].double() + torch.cat((-x2, x1), -1) * sin[:, None].double()


def attention_error(attended: Tensor, args: AttentionArgs, sequence: int, heads: int | None = None) -> float:
    """Relative norm error of one sequence's output (its first `heads`) against float64 over the current cache."""
    q = rotate_exactly(args.q[sequence, :, :heads], args.cos[sequence], args.sin[sequence])
    if args.q_scale is not None:
        q *= args.q_scale[sequence, :, None, None].double()
    start, length = int(args.start[sequence]), len(q)
    where = (sequence, slice(heads), slice(start + length))
    keys, values = cached(args.k_cache, args.k_scales, where), cached(args.v_cache, args.v_scales, where)
    logits = q.transpose(0, 1) @ keys.mT / math.sqrt(q.shape[-1])
    positions = torch.arange(start + length, device=q.device)
    visible = positions <= positions[start:, None]
    expected = (logits.masked_fill(~visible, -math.inf).softmax(-1) @ values).transpose(0, 1)
    return relative_error(attended[sequence, :, :heads], expected)
