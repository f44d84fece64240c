"""rotary_attention's definition: rotate q and k, append k and v to the cache, causal softmax over the cache."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cache_rows import dequantize_rows, quantize_rows


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (B, T, H, D) by cos and sin (B, T, D) float32, in float32: x cos + [-x2, x1] sin.

    The two halves of a head are the pair (GPT-NeoX order; Qwen's _rotate_half).
    """
    x1, x2 = x.float().chunk(2, dim=-1)
    rotated = torch.cat((-x2, x1), dim=-1)
    return (x.float() * cos.unsqueeze(2) + rotated * sin.unsqueeze(2)).to(x.dtype)


def rotary_attention_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    start: Tensor,
    *,
    q_scale: Tensor | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """See kernels.rotary_attention; writes into k_cache and v_cache, and into their scales."""
    batch, length = q.shape[:2]
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    if q_scale is not None:
        q = (q.float() * q_scale[:, :, None, None]).to(q.dtype)
    positions = start[:, None] + torch.arange(length, device=q.device)  # (B, T)
    rows = torch.arange(batch, device=q.device)[:, None]
    for x, cache, scales in ((k, k_cache, k_scales), (v, v_cache, v_scales)):
        if scales is None:
            cache[rows, :, positions] = x.to(cache.dtype)
        else:
            cache[rows, :, positions], scales[rows, :, positions] = quantize_rows(x)
    out = torch.empty_like(q)
    # one sequence at a time, each over its own positions: a shorter one's cache may hold NaN where it is not filled,
    # and 0 * NaN is NaN; clearing that for a whole batch took longer than the attention itself
    for row, end in enumerate((positions[:, -1] + 1).tolist()):
        one = slice(row, row + 1)
        keys, values = _cached(k_cache, k_scales, one, end), _cached(v_cache, v_scales, one, end)
        visible = None if length == 1 else torch.arange(end, device=q.device) <= positions[row, :, None]
        attended = F.scaled_dot_product_attention(
            q[one].transpose(1, 2), keys.to(q.dtype), values.to(q.dtype), attn_mask=visible
        )
        out[one] = attended.transpose(1, 2)
    return out


def _cached(cache: Tensor, scales: Tensor | None, rows: slice, end: int) -> Tensor:
    found = cache[rows, :, :end]
    return found if scales is None else dequantize_rows(found, scales[rows, :, :end])
