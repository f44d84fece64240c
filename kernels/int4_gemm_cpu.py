"""int4_gemm and int8_gemm on the CPU in float32: sums of FBGEMM's rows for few rows of x, exact float32 tiles for many.

torch's own int4 operator (aten._weight_int4pack_mm_for_cpu) has a vector kernel for bfloat16 only: in float32 it took
154 ms of one core where F.linear took 16 and the sums 8 (4096 x 12288, one row, torch 2.13, AVX512); in bfloat16 it
took 4 and rounds scales to 8 bits. So x of every dtype is computed in float32 here, as by the definition, then rounded.
"""

from functools import lru_cache

import torch
from torch import Tensor

from kernels.layout_cpu import CpuWeight

FEW_ROWS = 8  # up to here sums: 8 ms of one core a row; tiles cost 30 once, then what F.linear costs (40 at 8 rows)
TILE_CHANNELS = 256  # input channels of a tile, unless one group has more: 1 MiB in float32, within a core's L2
LONGEST_SUM = 128  # one running float32 sum over 4,096 channels is off by 1.2e-6, four times as much as F.linear


def gemm_cpu(x: Tensor, weight: CpuWeight, bias: Tensor | None = None) -> Tensor:
    """x (..., K) -> x @ W.T + bias (..., N) in x's dtype; sums in float32. ValueError if a gradient is asked for."""
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError('backend "cpu" computes no gradient; use torch.inference_mode() or backend="torch"')
    rows = x.reshape(-1, weight.in_features).float()
    if weight.perm is not None:
        rows = rows[:, weight.perm]
    y = _sums(rows, weight) if len(rows) <= FEW_ROWS else _floats(rows, weight)
    if bias is not None:
        y += bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], weight.out_features)


def _sums(x: Tensor, weight: CpuWeight) -> Tensor:
    """x (M, K) float32 in kernel order -> (M, N): per group, the sum of the columns weighted by x, then by scale."""
    count, groups, block = weight.scales.shape
    indices, ends = _bags(len(weight.columns), weight.group_size)
    y = x.new_empty(len(x), count, block)
    for row, out in zip(x, y, strict=True):
        # (rows, indices, offsets, scale_grad_by_freq, mode: sum, pruned, weights, mapping, include_last_offset)
        sums = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
            weight.columns, indices, ends, False, 0, False, row.repeat(count), None, True
        )
        torch.sum(sums.view(count, groups, -1, block).sum(2) * weight.scales, dim=1, out=out)
    if weight.offsets is not None:
        y -= (x.unflatten(1, (groups, -1)).sum(-1) @ weight.offsets).transpose(0, 1)
    return y.flatten(1)[:, : weight.out_features].contiguous()


@lru_cache(maxsize=16)  # a model has few shapes; the largest of Qwen-7B's takes 0.5 MB
def _bags(rows: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Every row once, in equal bags that do not cross a group: indices (rows,) and bounds of the bags, int32."""
    size = max(divisor for divisor in range(1, min(group_size, LONGEST_SUM) + 1) if group_size % divisor == 0)
    with torch.inference_mode(False):  # an inference tensor could not be used outside of inference mode later
        return torch.arange(rows, dtype=torch.int32), torch.arange(0, rows + 1, size, dtype=torch.int32)


def _floats(x: Tensor, weight: CpuWeight) -> Tensor:
    """x (M, K) float32 in kernel order -> (M, N): exact float32 weights, one block of outputs after another.

    Each block is multiplied over all K at once: adding up tiles of 256 channels in y took a third longer at 256 rows.
    """
    (_, groups, block), size, outputs = weight.scales.shape, weight.group_size, weight.out_features
    step = max(1, TILE_CHANNELS // size)  # groups of a tile
    minus_zeros = weight.scales * -weight.middle
    if weight.offsets is not None:
        minus_zeros -= weight.offsets
    y = x.new_empty(len(x), outputs)
    floats = x.new_empty(groups, size, block)
    for index, levels in enumerate(weight.blocks()):
        for g in range(0, groups, step):
            part = slice(g, g + step)
            tile = floats[part]
            tile.view(-1, block).copy_(levels[g * size : (g + step) * size])
            # level * scale - zero * scale: both products and their difference are exact for float16 scales
            torch.addcmul(minus_zeros[index, part, None], tile, weight.scales[index, part, None], out=tile)
        out = y[:, index * block : (index + 1) * block]
        torch.mm(x, floats.view(-1, block)[:, : out.shape[1]], out=out)
    return y
