"""The CPU backend of rotary_attention: an int8 cache in blocks of positions, multiplied as integers by MatMulInteger.

A block of positions is one matrix a head: keys (D, block), their channels as rows, and values (block, D), so that both
products read a matrix from front to back. A query, and the weight of each value, becomes two digits of 7 bits with one
scale a row: 14 bits, beside which the cache's own 8 are coarse. With 7 bits the operator's sums of two products fit
16 bits, which is what AVX2 without VNNI adds in.

Beside a token's at 293 positions, 2,000 take 1.1 ms more a layer of the published model, where float32 values made of
the same cache took 6.2 ms (two threads of a Zen 4).
"""

import math
from functools import cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.int8 import quantize_rows
from kernels.onnx_bytes import INT8, INT32, UINT8, one_node
from kernels.reference import AttentionArgs, rotated
from kernels.sessions import session_options

if TYPE_CHECKING:
    import onnxruntime as ort

BLOCK = 128  # positions of a block; a cache of fewer is one block
FEW_TOKENS = 8  # new ones: for more it is faster to turn the cache to float32, which is read once for all of them
FLOATS_AT_ONCE = 1 << 19  # keys, and as many values: 2 MB, which stay in a core's cache
QUERIES_AT_ONCE = 128  # over the keys that they may see: a prompt's mask is not computed only to be hidden
DIGIT = 128
MIDDLE = DIGIT * DIGIT // 2  # a query's levels are 1 to 2 * MIDDLE - 1, those of weights 0 to 2 * MIDDLE - 1


def attention_cpu(args: AttentionArgs) -> Tensor:
    """rotary_attention over caches in blocks: see AttentionArgs."""
    assert args.k_scales is not None and args.v_scales is not None
    q, k = rotated(args)
    batch, length = q.shape[:2]
    starts, block = args.start.tolist(), args.k_cache.shape[-1]
    if length == 1:  # both at once; and an assignment by tensors of indices takes 30 us, of which there would be four
        (k_levels, v_levels), (k_scales, v_scales) = quantize_rows(torch.stack((k, args.v)))
        for row, start in enumerate(starts):
            where, place = (row, start // block), start % block
            args.k_cache[*where, :, :, place], args.k_scales[*where, :, place] = k_levels[row, 0], k_scales[row, 0]
            args.v_cache[*where, :, place], args.v_scales[*where, :, place] = v_levels[row, 0], v_scales[row, 0]
    else:
        positions = args.start[:, None] + torch.arange(length)
        (k_levels, k_scales), (v_levels, v_scales) = quantize_rows(k), quantize_rows(args.v)
        at, places = (torch.arange(batch)[:, None], positions // block), positions % block
        args.k_cache[*at, :, :, places], args.k_scales[*at, :, places] = k_levels, k_scales
        args.v_cache[*at, :, places], args.v_scales[*at, :, places] = v_levels, v_scales
    out = torch.empty_like(q)
    for row, start in enumerate(starts):
        filled = (row, slice(-(-(start + length) // block)))
        attend = _attend_integers if length <= FEW_TOKENS else _attend_floats
        out[row] = attend(
            q[row].transpose(0, 1).float(),
            args.k_cache[filled], args.k_scales[filled], args.v_cache[filled], args.v_scales[filled],
            start,
        ).transpose(0, 1)  # fmt: skip
    return out


def _attend_integers(q: Tensor, keys: Tensor, k_scales: Tensor, values: Tensor, v_scales: Tensor, start: int) -> Tensor:
    """q (H, T, D) float32 of positions from `start` on, the cache's first blocks of a sequence -> (H, T, D)."""
    (heads, tokens, dim), block = q.shape, keys.shape[-1]
    unit = q.abs().amax(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny) / (MIDDLE - 1)
    digits = torch.empty(1, heads, 3, tokens, dim, dtype=torch.uint8)
    digits[0, :, :2] = _digits((q / unit + (MIDDLE + 0.5)).int())
    digits[0, :, 2] = MIDDLE // DIGIT  # each key's sum, by which the middle is taken off
    high, low, middle = _multiply(digits, keys).unbind(2)  # (blocks, H, T, block) each
    scores = torch.add(low, high.sub_(middle), alpha=DIGIT).float()
    scores.mul_(unit * (dim**-0.5 / math.log(2))).mul_(k_scales[:, :, None])  # for 2^x, a fifth of the time of e^x
    first = start // block  # whose positions a token may not all see
    position = torch.arange(first * block, len(keys) * block).view(-1, 1, 1, block)
    scores[first:].masked_fill_(position > torch.arange(start, start + tokens)[:, None], -torch.inf)
    weights = scores.sub_(scores.amax((0, 3), keepdim=True)).exp2_()
    total = weights.sum((0, 3)).unsqueeze(-1)
    weights.mul_(v_scales[:, :, None])
    unit = weights.amax((0, 3), keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny) / (2 * MIDDLE - 1)
    high, low = _multiply(_digits(weights.div_(unit).add_(0.5).int()), values).sum(0, dtype=torch.int32).unbind(1)
    return torch.add(low.float(), high.float(), alpha=DIGIT) * (unit[0] / total)


def _digits(levels: Tensor) -> Tensor:
    """levels (..., T, K) int32 below DIGIT² -> (..., 2, T, K) uint8, the high digit first."""
    digits = levels.new_empty(*levels.shape[:-2], 2, *levels.shape[-2:], dtype=torch.uint8)
    digits[..., 1, :, :] = levels & (DIGIT - 1)
    digits[..., 0, :, :] = levels >> 7
    return digits


def _multiply(rows: Tensor, matrices: Tensor) -> Tensor:
    """rows (blocks or 1, H, R, T, K) uint8 @ matrices (blocks, H, K, N) int8 -> (blocks, H, R, T, N) int32.

    A row is a product of its own where T is 1, which the operator multiplies without a copy of the matrix.
    """
    blocks, heads, inner, outputs = matrices.shape
    count, tokens = rows.shape[2:4]
    y = torch.empty(blocks, heads, count, tokens, outputs, dtype=torch.int32)
    if tokens > 1:
        rows = rows.view(len(rows), heads, 1, count * tokens, inner)
    binding = _session().io_binding()
    binding.bind_input("a", "cpu", 0, UINT8, rows.shape, rows.data_ptr())
    binding.bind_input("b", "cpu", 0, INT8, (blocks, heads, 1, inner, outputs), matrices.data_ptr())
    binding.bind_output("y", "cpu", 0, INT32, (*y.shape[:2], *rows.shape[2:4], outputs), y.data_ptr())
    _session().run_with_iobinding(binding)
    return y


@cache
def _session() -> "ort.InferenceSession":
    import onnxruntime as ort

    model = one_node(
        "MatMulInteger",
        {
            "a": (UINT8, ("parts", "heads", "rows", "tokens", "inner")),
            "b": (INT8, ("blocks", "heads", 1, "inner", "outputs")),
        },
        {"y": (INT32, ("blocks", "heads", "rows", "tokens", "outputs"))},
    )
    return ort.InferenceSession(model, session_options(), providers=["CPUExecutionProvider"])


def _attend_floats(q: Tensor, keys: Tensor, k_scales: Tensor, values: Tensor, v_scales: Tensor, start: int) -> Tensor:
    """As _attend_integers, over as many heads' keys and values in float32 as FLOATS_AT_ONCE says."""
    (heads, tokens, dim), block = q.shape, keys.shape[-1]
    end, held = start + tokens, len(keys) * block
    visible = torch.arange(end) <= torch.arange(start, end)[:, None]
    at_once = min(heads, max(2, FLOATS_AT_ONCE // (held * dim)))
    buffers = torch.empty(2, at_once, len(keys), block, dim)
    out = torch.empty_like(q)
    for first in range(0, heads, at_once):
        part = slice(first, min(first + at_once, heads))
        k, v = buffers[:, : part.stop - first]
        k.copy_(keys[:, part].permute(1, 0, 3, 2)).mul_(k_scales[:, part].transpose(0, 1)[..., None])
        v.copy_(values[:, part].transpose(0, 1)).mul_(v_scales[:, part].transpose(0, 1)[..., None])
        k, v = (floats.flatten(1, 2) for floats in (k, v))
        for token in range(0, tokens, QUERIES_AT_ONCE):
            some = slice(token, min(token + QUERIES_AT_ONCE, tokens))
            keys_seen = slice(start + some.stop)
            out[part, some] = F.scaled_dot_product_attention(
                q[None, part, some], k[None, :, keys_seen], v[None, :, keys_seen], attn_mask=visible[some, keys_seen]
            )[0]
    return out
