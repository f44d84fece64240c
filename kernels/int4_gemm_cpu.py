"""int4_gemm on the CPU in float32, through FBGEMM's 4-bit rows: sums over them for few rows of x, tiles for many.

torch's own int4 operator (aten._weight_int4pack_mm_for_cpu) has a vector kernel for bfloat16 only: in float32 it took
154 ms of one core where F.linear takes 16 and the sums below 7 (4096 x 12288, one row, torch 2.13, AVX512); in bfloat16
it takes 4 and rounds scales to 8 bits. So x of every dtype is computed in float32 here, as by the definition, then
rounded.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
from torch import Tensor

from kernels.int4_layout import Int4Weight
from kernels.int4_layout_cpu import PackedCpu

FEW_ROWS = 8  # up to here sums: 5 ms of one core a row; tiles cost 13 to 20 once, then what F.linear costs
TILE_OUTPUTS = 1024  # outputs of the tile of one thread
TILE_CHANNELS = 1024  # and its input channels, unless one group has more: 4 MiB in float32, within the shared cache
WORTH_A_THREAD = 2**19  # weights; reading them takes 0.05 to 0.13 ms, starting a thread on them about as long


def int4_gemm_cpu(x: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    """x (..., K) -> x @ W.T + bias (..., N) in x's dtype; sums in float32. `weight` comes from pack_for_cpu.

    ValueError if it does not, or if a gradient is asked for.
    """
    packed = weight.packed_cpu
    if packed is None:
        raise ValueError('backend "cpu" reads a weight that was packed once: weight = pack_for_cpu(weight)')
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError('backend "cpu" computes no gradient; use torch.inference_mode() or backend="torch"')
    rows = x.reshape(-1, weight.in_features).float()
    if weight.perm is not None:
        rows = rows[:, weight.perm]
    y = _sums(rows, weight, packed) if len(rows) <= FEW_ROWS else _tiles(rows, weight, packed)
    if bias is not None:
        y += bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], weight.out_features)


def _sums(x: Tensor, weight: Int4Weight, packed: PackedCpu) -> Tensor:
    """x (M, K) float32 in kernel order -> (M, N): per group, the sum of the columns weighted by x, then by scale."""
    channels = weight.in_features
    blocks, _, block = packed.column_scales.shape
    bounds = _pieces(blocks, weight.out_features * channels)
    y = x.new_empty(len(x), blocks * block)
    for row, out in zip(x, y.view(-1, blocks, block), strict=True):
        weights = row.repeat(blocks)
        jobs = []
        for first, last in bounds:
            part = slice(first * channels, last * channels)
            indices, ends = _steps((last - first) * channels, weight.group_size)
            jobs.append((packed.columns[part], indices, ends, weights[part]))
        for (first, last), sums in zip(bounds, _bags(jobs), strict=True):
            scales = packed.column_scales[first:last]
            by_group = sums.view(last - first, scales.shape[1], -1, block).sum(2)
            torch.sum(by_group * scales, dim=1, out=out[first:last])
    y = y[:, : weight.out_features]
    if packed.offsets is not None:
        y = y - x.unflatten(1, (-1, weight.group_size)).sum(-1) @ packed.offsets
    return y.contiguous()


def _tiles(x: Tensor, weight: Int4Weight, packed: PackedCpu) -> Tensor:
    """x (M, K) float32 in kernel order -> (M, N): exact float32 weights, tile by tile while in cache."""
    outputs, groups, size = weight.out_features, len(weight.scales), weight.group_size
    step = max(1, TILE_CHANNELS // size)  # groups of a tile
    wide = TILE_OUTPUTS * torch.get_num_threads()
    y = x.new_empty(len(x), outputs)
    for n in range(0, outputs, wide):
        count = min(wide, outputs - n)
        bounds = [(n + first, n + last) for first, last in _pieces(count, count * step * size)]
        for g in range(0, groups, step):
            jobs = []
            for first, last in bounds:
                scales = packed.row_scales[first:last, g : g + step]
                indices, ends = _grid(last - first, scales.shape[1], groups)
                # the operator reads weights as if they were contiguous, and one column flattens to a strided view
                jobs.append((packed.rows[first * groups + g :], indices, ends, scales.contiguous().view(-1)))
            inputs = x[:, g * size : (g + step) * size]
            for (first, last), tile in zip(bounds, _bags(jobs), strict=True):
                y[:, first:last].addmm_(inputs, tile.view(last - first, -1).T, beta=1 if g else 0)
    return y


def _pieces(count: int, weights: int) -> list[tuple[int, int]]:
    """[0, count) in as many equal pieces as torch has threads, fewer if `weights` in all are not worth them."""
    pieces = max(1, min(torch.get_num_threads(), count, weights // WORTH_A_THREAD))
    bounds = [count * i // pieces for i in range(pieces + 1)]
    return list(zip(bounds[:-1], bounds[1:], strict=True))


def _bags(jobs: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> list[Tensor]:
    """Per job (rows, indices, ends, weights): bag i = sum of weights[j] * rows[indices[j]], ends[i] <= j < ends[i + 1].

    FBGEMM's rows use one thread a call, so each job gets a thread of its own; nothing else may run there, or every one
    of them would start torch's threads again.
    """
    # (rows, indices, offsets, scale_grad_by_freq, mode sum, pruned, per_sample_weights, mapping, include_last_offset)
    operator = torch.ops.quantized.embedding_bag_4bit_rowwise_offsets
    calls = [(rows, indices, ends, False, 0, False, weights, None, True) for rows, indices, ends, weights in jobs]
    waiting = [_pool(os.getpid(), len(calls) - 1).submit(operator, *call) for call in calls[1:]]
    return [operator(*calls[0]), *(future.result() for future in waiting)]


@lru_cache(maxsize=8)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    del process  # a forked child has none of its parent's threads: a pool of its own
    return ThreadPoolExecutor(threads, thread_name_prefix="int4_gemm")


@lru_cache(maxsize=16)  # a model has few shapes; the largest of Qwen-7B's takes 1 MB
def _steps(count: int, size: int) -> tuple[Tensor, Tensor]:
    """Every row once, in bags that divide a group's `size` rows. int32, half the memory of int64 at the same speed."""
    # one running float32 sum over a group of 4096 is off by 1.2e-6, four times as much as F.linear; over 128 by 3e-7
    bag = max(divisor for divisor in range(1, min(size, 128) + 1) if size % divisor == 0)
    with torch.inference_mode(False):
        return torch.arange(count, dtype=torch.int32), torch.arange(0, count + 1, bag, dtype=torch.int32)


@lru_cache(maxsize=16)
def _grid(outputs: int, groups: int, stride: int) -> tuple[Tensor, Tensor]:
    """Row n * stride + g for n < outputs and g < groups, one a bag. int64: with int32 this took 1.4 times as long."""
    with torch.inference_mode(False):
        indices = (torch.arange(outputs)[:, None] * stride + torch.arange(groups)).view(-1)
        return indices, torch.arange(indices.numel() + 1)
