"""The CPU backend: the order of a weight with 4 or 8 bits, and its product with x in float32.

A level takes a byte, in rows that FBGEMM adds up. FBGEMM's 8-bit row (torch.ops.quantized.
embedding_bag_byte_rowwise_offsets) is D bytes, then a float32 scale and a float32 bias; it is read as byte * scale +
bias and multiplied by one float32 weight per row. Here the scale is 1 and the bias minus the middle, which is 8 or 128:
8-bit levels are stored with 128 added.

    columns (NB * K, D + 8) uint8  byte j of row b * K + k = level of channel perm[k] for output b * D + j
    scales  (NB, G, D) float32, 0 for the padding outputs past N
With weight x[perm[k]], the rows of one group add up to D partial sums of (level - middle) * x: x is multiplied without
the weight ever being float. 4 bits take 8 here: FBGEMM's 4-bit rows run on one thread only, and torch has no vector
operator that turns nibbles into float32 at the speed a matrix product needs. Its own int4 operator
(aten._weight_int4pack_mm_for_cpu) has a vector kernel for bfloat16 only: in float32 it took 154 ms of one core where
F.linear took 16 and these sums 8 (4096 x 12288, one row, torch 2.13, AVX512); in bfloat16 it took 4 and rounds scales
to 8 bits. So x of every dtype is computed in float32, as by the definition, then rounded.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.gptq import Int4Weight, unpack_levels
from kernels.int8 import Int8Weight
from kernels.reference import PackedWeight

BLOCK = 1024  # outputs of one block of columns; sums took the same time with 256 to 1024, tiles less with 1024
TAIL = 8  # bytes of a row's scale and bias
MIDDLES = {4: 8, 8: 128}  # by bits: the zero of a symmetric weight
FEW_ROWS = 8  # up to here sums: 8 ms of one core a row; tiles cost 30 once, then what F.linear costs (40 at 8 rows)
TILE_CHANNELS = 256  # input channels of a tile, unless one group has more: 1 MiB in float32, within a core's L2
MAX_SUM = 128  # one running float32 sum over 4,096 channels is off by 1.2e-6, four times as much as F.linear


@dataclass(frozen=True, eq=False)
class CpuWeight(PackedWeight):
    """A weight in the CPU's order (top of this file); made by `pack_for_cpu`, read by backend "cpu".

    columns uint8 and scales float32 as above; zeros (G, N) int16, or None where every zero is the middle; offsets
    (NB, G, D) float32 = scales * (zeros - middle), or None likewise; perm (K,) int64 or None; scales_dtype: what the
    scales were before.
    """

    columns: Tensor
    scales: Tensor
    zeros: Tensor | None
    offsets: Tensor | None
    perm: Tensor | None
    scales_dtype: torch.dtype
    bits: int
    out_features: int

    @property
    def in_features(self) -> int:
        """K."""
        return self.columns.shape[0] // self.scales.shape[0]

    @property
    def group_size(self) -> int:
        """S, input channels a group."""
        return self.in_features // self.scales.shape[1]

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return self.columns.device

    def blocks(self) -> Tensor:
        """Levels (NB, K, D) uint8, a view: the columns without their tails."""
        return self.columns.view(self.scales.shape[0], self.in_features, -1)[..., :-TAIL]

    def unpack(self) -> Int4Weight | Int8Weight:
        """See PackedWeight."""
        levels = self.blocks().transpose(0, 1).flatten(1)[:, : self.out_features]
        scales = self.scales.transpose(0, 1).flatten(1)[:, : self.out_features].to(self.scales_dtype).contiguous()
        if self.bits == 8:
            return Int8Weight((levels ^ 128).view(torch.int8).T.contiguous(), scales[0])
        zeros = self.zeros
        if zeros is None:
            zeros = torch.full(scales.shape, MIDDLES[4], dtype=torch.int16)
        return Int4Weight.from_grouped(levels, scales, zeros, self.perm)


def pack_for_cpu(weight: Int4Weight | Int8Weight) -> CpuWeight:
    """The same weight in the CPU's order; done once, when a layer is loaded (0.4 s of one core for 50 M weights).

    ValueError if the weight is not on the CPU.
    """
    if weight.device.type != "cpu":
        raise ValueError(f"pack_for_cpu takes a weight on the CPU, this one is on {weight.device}; it needs no packing")
    bits = 8 if isinstance(weight, Int8Weight) else 4
    outputs, middle = weight.out_features, MIDDLES[bits]
    count = -(-outputs // BLOCK)
    block = -(-outputs // count // 16) * 16  # equal blocks of whole vectors, as little padding as that allows
    columns = torch.empty(count, weight.in_features, block + TAIL, dtype=torch.uint8)
    words = weight.grouped_words() if isinstance(weight, Int4Weight) else weight.levels
    for index, rows in enumerate(columns):
        part = slice(index * block, min((index + 1) * block, outputs))
        # int8 levels become bytes with 128 added by flipping their sign bit
        levels = unpack_levels(words[:, part]) if bits == 4 else words[part].view(torch.uint8).T ^ 128
        rows[:, : levels.shape[1]] = levels
        rows[:, levels.shape[1] : block] = 0
    tail = columns.view(torch.float32)[..., block // 4 :]
    tail[..., 0] = 1
    tail[..., 1] = -middle

    def in_blocks(values: Tensor) -> Tensor:
        padded = F.pad(values, (0, count * block - outputs))
        return padded.view(-1, count, block).transpose(0, 1).contiguous()

    zeros = offsets = perm = None
    if isinstance(weight, Int8Weight):
        scales = weight.scales[None]
    else:
        scales, perm = weight.scales, weight.perm
        off_middle = weight.zeros.float() - middle
        if bool(off_middle.any()):
            zeros, offsets = weight.zeros, in_blocks(scales.float() * off_middle)
    return CpuWeight(
        columns=columns.view(count * weight.in_features, -1),
        scales=in_blocks(scales.float()),
        zeros=zeros,
        offsets=offsets,
        perm=perm,
        scales_dtype=scales.dtype,
        bits=bits,
        out_features=outputs,
    )


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
    size = max(divisor for divisor in range(1, min(group_size, MAX_SUM) + 1) if group_size % divisor == 0)
    with torch.inference_mode(False):  # an inference tensor could not be used outside of inference mode later
        return torch.arange(rows, dtype=torch.int32), torch.arange(0, rows + 1, size, dtype=torch.int32)


def _floats(x: Tensor, weight: CpuWeight) -> Tensor:
    """x (M, K) float32 in kernel order -> (M, N): exact float32 weights, one block of outputs after another.

    Each block is multiplied over all K at once: adding up tiles of 256 channels in y took a third longer at 256 rows.
    """
    (_, groups, block), size, outputs = weight.scales.shape, weight.group_size, weight.out_features
    step = max(1, TILE_CHANNELS // size)  # groups of a tile
    minus_zeros = weight.scales * -MIDDLES[weight.bits]
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
