"""The products of one decoding step of Qwen-7B, as the runtime launches them, each with a check against float64."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kernels import MAX_DECODE_ROWS, Rows, TritonWeight, reference, rms_rows
from kernels.gpu.tiles import Tile
from kernels.gpu.weight import CHUNK, SMALLEST_TILE, TILE

EPS = 1e-6
CHECKED = 128  # first, last, and about as many other outputs are compared with float64
# relative norm error of what is stored, in 16 bits from sums in float32: the rounding of the result, and for more than
# 16 rows that of each weight too
TOLERANCE = {torch.float16: 7e-4, torch.bfloat16: 6e-3, torch.float32: 1e-4}


@dataclass(frozen=True)
class Projection:
    """x (M, k) times W (n, k), and what is fused with it."""

    name: str
    k: int
    n: int  # of w1 and w2: both, interleaved
    epilogue: str = "plain"  # or "swiglu", "residual"
    norm: bool = False
    bias: bool = False
    bits: int = 4
    group: int = 128  # channels that share a scale; an int8 row has one scale for all k
    zeros: bool = False


C_ATTN = Projection("c_attn", 4096, 12288, norm=True, bias=True)
ATTN_C_PROJ = Projection("attn.c_proj", 4096, 4096, epilogue="residual")
W1_W2 = Projection("w1 and w2", 4096, 22016, epilogue="swiglu", norm=True)
MLP_C_PROJ = Projection("mlp.c_proj", 11008, 4096, epilogue="residual")
HEAD = Projection("int8 head", 4096, 151936, bits=8, group=4096)
LAYER = (C_ATTN, ATTN_C_PROJ, W1_W2, MLP_C_PROJ)
PROJECTIONS = (*LAYER, HEAD)


def weight_of(projection: Projection, *, device: torch.device | str, seed: int = 0) -> TritonWeight:
    """A weight of random levels made in kernel order on the device itself (also on "meta", where nothing is made).

    Scales are such that a product of normal x is normal.
    """
    in_features, out_features, bits, group = projection.k, projection.n, projection.bits, projection.group
    on_meta = torch.device(device).type == "meta"
    generator = None if on_meta else torch.Generator(device).manual_seed(seed)
    chunks, padded = -(-in_features // CHUNK), -(-out_features // TILE) * TILE
    shape = (chunks, padded, CHUNK * bits // 32)
    groups = 1 if group == in_features else -(-chunks * CHUNK // group)
    if on_meta:
        words = torch.empty(shape, dtype=torch.int32, device=device)
    else:
        words = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=device, generator=generator)
    deviation = 4.6 if bits == 4 else 74.0  # of a uniform level
    scales = torch.full((groups, padded), in_features**-0.5 / deviation, device=device)
    scales[:, out_features:] = 0
    off_middle = None
    if projection.zeros:
        off_middle = torch.full((groups, padded), 1.0, dtype=torch.float16, device=device)
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
    """W (len(outputs), K) float64 of some output features, level by level from the words (gpu/weight.py)."""
    part = replace(weight, words=weight.words[:, outputs], out_features=len(outputs))
    levels = part.levels().double() - (8 if weight.bits == 4 else 128)
    group = torch.arange(weight.in_features, device=weight.device) // weight.group_size
    if weight.zeros is not None:
        levels -= weight.zeros[:, outputs].double()[group]
    return (levels * weight.scales[:, outputs].double()[group]).T


@dataclass(frozen=True, eq=False)
class Problem:
    """A projection with random operands on a device."""

    projection: Projection
    rows: Rows
    weight: TritonWeight
    bias: Tensor | None
    residual: Tensor | None  # (M, N) float32; every run adds to it
    norm_weight: Tensor | None

    @classmethod
    def random(
        cls, projection: Projection, count: int, *, dtype: torch.dtype = torch.float16, device: str, seed: int = 0
    ) -> Problem:
        """Operands for `count` rows."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, generator=generator)

        weight = weight_of(projection, device=device, seed=seed)
        outputs = projection.n // 2 if projection.epilogue == "swiglu" else projection.n
        if projection.norm:
            rows = rms_rows(normal(count, projection.k), normal(projection.k).to(dtype), EPS, dtype, backend="torch")
        else:
            x = normal(count, projection.k).to(dtype)
            rows = Rows(x, reference.sum_rows(x) if count <= MAX_DECODE_ROWS else None)
        residual = projection.epilogue == "residual"
        return cls(
            projection,
            rows,
            weight,
            normal(outputs).to(dtype) if projection.bias else None,
            normal(count, outputs) if residual else None,
            normal(outputs).to(dtype) if residual else None,
        )

    def another_weight(self, seed: int) -> Problem:
        """The same rows with a weight of its own, for a benchmark that must not find it in a cache."""
        return replace(self, weight=weight_of(self.projection, device=self.weight.device, seed=seed))

    @property
    def bytes_read(self) -> int:
        """What one run has to read of the weight."""
        return self.weight.words.nbytes + self.weight.scales.nbytes

    def run(self, tile: Tile | None = None) -> Rows:
        """One launch."""
        gemm: Any = importlib.import_module("kernels.gpu.gemm")
        result: Rows = gemm.gemm_triton(
            self.rows,
            self.weight,
            self.bias,
            epilogue=self.projection.epilogue,
            residual=self.residual,
            norm_weight=self.norm_weight,
            eps=EPS if self.residual is not None else 0.0,
            out_dtype=torch.float32 if self.projection.bits == 8 else None,
            tile=tile,
        )
        return result

    def error(self, tile: Tile | None = None) -> float:
        """Run once and compare with float64: relative norm error over the first, the last and many other outputs.

        NaN if any output at all is not finite. A residual is compared as well as the rows that come from it.
        """
        before = None if self.residual is None else self.residual.double()
        y = self.run(tile).x.double()
        outputs = y.shape[1]
        if not bool(y.isfinite().all()):
            return math.nan
        chosen = torch.arange(outputs, device=y.device)
        spread = chosen[:: max(1, outputs // CHECKED) | 1]  # an odd step: no tile is always met in the same place
        chosen = torch.cat((chosen[:CHECKED], spread, chosen[-CHECKED:])).unique()
        x = self.rows.x.double()

        def product(of: Tensor) -> Tensor:
            result = x @ formula(self.weight, of).T
            if self.rows.squares is not None:
                squares = self.rows.squares.double().sum(1, keepdim=True)
                result *= torch.rsqrt(squares / x.shape[1] + self.rows.eps)
            return result if self.bias is None else result + self.bias.double()[of]

        if self.projection.epilogue == "swiglu":
            gate = product(2 * chosen + 1)
            expected = product(2 * chosen) * gate / (1 + (-gate).exp())
        else:
            expected = product(chosen)
        if before is not None:
            assert self.residual is not None and self.norm_weight is not None
            expected += before[:, chosen]
            added = float((self.residual.double()[:, chosen] - expected).norm() / expected.norm())
            expected *= self.norm_weight.double()[chosen]
            return max(added, float((y[:, chosen] - expected).norm() / expected.norm()))
        return float((y[:, chosen] - expected).norm() / expected.norm())

    @property
    def tolerance(self) -> float:
        """The largest `error` that rounding explains."""
        return TOLERANCE[torch.float32 if self.projection.bits == 8 else self.rows.x.dtype]
