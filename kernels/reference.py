"""The operands of the kernels, and the definition of every kernel in plain torch: backend "torch", on any device."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.gptq import Int4Weight
from kernels.int8 import Int8Weight, dequantize_rows, quantize_rows

SPAN = 32  # channels that share one of Rows.sums: the smallest group
MAX_DECODE_ROWS = 16  # rows of one decode step: what one program of the decode kernel computes


@dataclass(frozen=True, eq=False)
class Rows:
    """M rows of K channels that one fused kernel leaves to the next.

    x (M, K) float16 or bfloat16. sums (K / 32, 16) float32 or None: sums[j, m] adds up channels 32 j to 32 j + 31 of
    row m, columns from M on are undefined; made for 16 rows at most, and computed by the consumer where it is None.
    squares (M, T) float32 or None: parts of each row's sum of squares before its norm weight was multiplied in; the
    consumer multiplies its result by rsqrt(sum / K + eps), so that no kernel waits for the norm of a whole row.
    """

    x: Tensor
    sums: Tensor | None = None
    squares: Tensor | None = None
    eps: float = 0.0

    def rsqrt(self) -> Tensor | None:
        """The factor of each row (M, 1) float32 that is left to the consumer; None where there is none."""
        if self.squares is None:
            return None
        return torch.rsqrt(self.squares.sum(1, keepdim=True) / self.x.shape[1] + self.eps)


@dataclass(frozen=True, eq=False)
class AttentionArgs:
    """The tensors of rotary_attention: T new tokens of B sequences, and one layer's cache.

    q, k, v (B, T, H, D) in one float dtype, unrotated, views of one (B, T, 3, H, D) or not. cos, sin (B, T, D) float32,
    both halves of a head filled: the angles of pair i are at i and i + D / 2. k_cache, v_cache (B, H, capacity, D),
    rotated keys, in a float dtype, or int8 with k_scales, v_scales (B, H, capacity) float16 (int8.quantize_rows). For
    "cpu" int8 lies in blocks of N positions: k_cache (B, blocks, H, D, N), v_cache (B, blocks, H, N, D), scales
    (B, blocks, H, N), all finite.
    start (B,) int64: tokens already in each sequence's cache, so token t of sequence b gets position start[b] + t and
    sees positions up to its own. q_scale (B, T) float32 multiplies each token's query (log-n scaling). locks (B * H,)
    int32, for "triton": zero before and after, used by one call at a time (None: allocated).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    k_cache: Tensor
    v_cache: Tensor
    start: Tensor
    q_scale: Tensor | None = None
    k_scales: Tensor | None = None
    v_scales: Tensor | None = None
    locks: Tensor | None = None


class PackedWeight(ABC):
    """A weight of 4 or 8 bits in the order of one backend."""

    @abstractmethod
    def dequantize(self) -> Tensor:
        """W (N, K) float32."""


Weight: TypeAlias = Int4Weight | Int8Weight | PackedWeight


def _product(rows: Rows, weight: Weight, bias: Tensor | None) -> Tensor:
    """rows.x (..., K) -> (..., N) float32, with the row factor and the bias."""
    y = F.linear(rows.x.float(), weight.dequantize())
    if (factor := rows.rsqrt()) is not None:
        y *= factor
    return y if bias is None else y + bias.float()


def int4_gemm(rows: Rows, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """rows.x (..., K) -> x @ W.T + bias (..., N) in x's dtype; sums in float32."""
    return _product(rows, weight, bias).to(rows.x.dtype)


def int4_gemm_swiglu(rows: Rows, weight: Weight, bias: Tensor | None = None) -> Rows:
    """See kernels.int4_gemm_swiglu: even outputs times silu of odd ones."""
    up, gate = _product(rows, weight, bias).unflatten(1, (-1, 2)).unbind(2)
    y = (up * F.silu(gate)).to(rows.x.dtype)
    return Rows(y, sum_rows(y) if len(y) <= MAX_DECODE_ROWS and y.shape[1] % SPAN == 0 else None)


def int4_gemm_residual(
    rows: Rows, weight: Weight, bias: Tensor | None, residual: Tensor, norm_weight: Tensor, eps: float
) -> Rows:
    """See kernels.int4_gemm_residual; adds to `residual` in place."""
    residual += _product(rows, weight, bias)
    return rms_rows(residual, norm_weight, eps, rows.x.dtype)


def int8_gemm(x: Tensor, weight: Weight) -> Tensor:
    """x (..., K) -> x @ W.T (..., N) float32."""
    return F.linear(x.float(), weight.dequantize())


def sum_rows(x: Tensor) -> Tensor:
    """Rows.sums of x (M, K), M of 16 or less -> (K / 32, 16) float32, zero past M."""
    sums = x.float().unflatten(1, (-1, SPAN)).sum(-1)
    return F.pad(sums, (0, 0, 0, MAX_DECODE_ROWS - len(x))).T.contiguous()


def rms_rows(residual: Tensor, norm_weight: Tensor, eps: float, dtype: torch.dtype) -> Rows:
    """residual (M, K) float32 -> the Rows of RMSNorm, the factor of each row left to the consumer."""
    x = (residual * norm_weight.float()).to(dtype)
    sums = sum_rows(x) if len(x) <= MAX_DECODE_ROWS else None
    return Rows(x, sums, residual.square().sum(1, keepdim=True), eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (B, T, H, D) by cos and sin (B, T, D) float32, in float32: x cos + [-x2, x1] sin.

    The two halves of a head are the pair (GPT-NeoX order; Qwen's _rotate_half).
    """
    half, cos, sin = x.shape[-1] // 2, cos.unsqueeze(2), sin.unsqueeze(2)
    y = x.float() * cos
    y[..., :half].addcmul_(x[..., half:].float(), sin[..., :half], value=-1)
    y[..., half:].addcmul_(x[..., :half].float(), sin[..., half:])
    return y.to(x.dtype)


def rotated(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    """q and k with their positions, q times q_scale."""
    q, k = rotate(args.q, args.cos, args.sin), rotate(args.k, args.cos, args.sin)
    if args.q_scale is not None:
        q = (q.float() * args.q_scale[:, :, None, None]).to(q.dtype)
    return q, k


def rotary_attention(args: AttentionArgs) -> Tensor:
    """See kernels.rotary_attention; writes into the caches and their scales."""
    q, k = rotated(args)
    batch, length = q.shape[:2]
    positions = args.start[:, None] + torch.arange(length, device=q.device)  # (B, T)
    rows = torch.arange(batch, device=q.device)[:, None]
    caches = ((args.k_cache, args.k_scales), (args.v_cache, args.v_scales))
    for x, (cache, scales) in zip((k, args.v), caches, strict=True):
        if scales is None:
            cache[rows, :, positions] = x.to(cache.dtype)
        else:
            cache[rows, :, positions], scales[rows, :, positions] = quantize_rows(x)
    out = torch.empty_like(q)
    # one sequence at a time, each over its own positions: a shorter one's cache may hold NaN where it is not filled,
    # and 0 * NaN is NaN; clearing that for a whole batch took longer than the attention itself
    for row, end in enumerate((positions[:, -1] + 1).tolist()):
        filled = (slice(row, row + 1), slice(None), slice(end))
        keys, values = (
            cache[filled] if scales is None else dequantize_rows(cache[filled], scales[filled])
            for cache, scales in caches
        )
        visible = None if length == 1 else torch.arange(end, device=q.device) <= positions[row, :, None]
        attended = F.scaled_dot_product_attention(
            q[row, None].transpose(1, 2), keys.to(q.dtype), values.to(q.dtype), attn_mask=visible
        )
        out[row] = attended[0].transpose(0, 1)
    return out
