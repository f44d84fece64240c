"""The CPU's order of an int4 weight, stated once here: a byte a level, in rows that FBGEMM adds up.

FBGEMM's 8-bit row (torch.ops.quantized.embedding_bag_byte_rowwise_offsets) is D bytes, then a float32 scale and a
float32 bias; it is read as byte * scale + bias and multiplied by one float32 weight per row. Here the scale is 1 and
the bias -8.

    columns (NB * K, D + 8) uint8  byte j of row b * K + k = level of channel perm[k] for output b * D + j
    scales  (NB, G, D) float32, 0 for the padding outputs past N
With weight x[perm[k]], the rows of one group add up to D partial sums of (level - 8) * x: x is multiplied without the
weight ever being float. A level takes 8 bits instead of 4: FBGEMM's 4-bit rows run on one thread only, and torch has no
vector operator that turns nibbles into float32 at the speed a matrix product needs.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.int4_layout import Int4Weight, pack_levels

BLOCK = 1024  # outputs of one block of columns; sums took the same time with 256 to 1024, tiles less with 1024
TAIL = 8  # bytes of a row's scale and bias
MIDDLE = 8  # the zero of a symmetric weight


@dataclass(frozen=True, eq=False)
class CpuInt4Weight:
    """An Int4Weight in the CPU's order (module docstring); made by `pack_for_cpu`, read by backend "cpu".

    columns uint8 and scales float32 as above; zeros (G, N) int16; offsets (NB, G, D) float32 = scales * (zeros - 8), or
    None where every zero is 8; perm (K,) int64 or None; scales_dtype: what the scales were before.
    """

    columns: Tensor
    scales: Tensor
    zeros: Tensor
    offsets: Tensor | None
    perm: Tensor | None
    scales_dtype: torch.dtype

    @property
    def out_features(self) -> int:
        """N."""
        return self.zeros.shape[1]

    @property
    def in_features(self) -> int:
        """K."""
        return self.columns.shape[0] // self.scales.shape[0]

    @property
    def group_size(self) -> int:
        """S, input channels a group."""
        return self.in_features // self.zeros.shape[0]

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return self.columns.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (self.columns, self.scales, self.zeros, self.offsets, self.perm)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def blocks(self) -> Tensor:
        """Levels (NB, K, D) uint8, a view: the columns without their tails."""
        return self.columns.view(self.scales.shape[0], self.in_features, -1)[..., :-TAIL]

    def unpack(self) -> Int4Weight:
        """Back to the kernel order, bit for bit."""
        groups, outputs = self.zeros.shape
        levels = self.blocks().transpose(0, 1).flatten(1)[:, :outputs]
        words = pack_levels(levels).view(groups, -1, outputs).transpose(1, 2).contiguous()
        scales = self.scales.transpose(0, 1).flatten(1)[:, :outputs].to(self.scales_dtype).contiguous()
        return Int4Weight(words, scales, self.zeros, self.perm)


def pack_for_cpu(weight: Int4Weight) -> CpuInt4Weight:
    """The same weight in the CPU's order; done once, when a layer is loaded (0.4 s of one core for 50 M weights).

    ValueError if the weight is not on the CPU.
    """
    if weight.device.type != "cpu":
        raise ValueError(f"pack_for_cpu takes a weight on the CPU, this one is on {weight.device}; it needs no packing")
    channels, outputs = weight.in_features, weight.out_features
    count = -(-outputs // BLOCK)
    block = -(-outputs // count // 16) * 16  # equal blocks of whole vectors, as little padding as that allows
    padding = (0, count * block - outputs)
    columns = torch.empty(count, channels, block + TAIL, dtype=torch.uint8)
    columns[..., :block] = F.pad(weight.grouped_levels(), padding).view(channels, count, block).transpose(0, 1)
    tail = columns.view(torch.float32)[..., block // 4 :]
    tail[..., 0] = 1
    tail[..., 1] = -MIDDLE

    def in_blocks(values: Tensor) -> Tensor:
        return F.pad(values, padding).view(-1, count, block).transpose(0, 1).contiguous()

    scales, off_middle = weight.scales.float(), weight.zeros.float() - MIDDLE
    return CpuInt4Weight(
        columns=columns.view(count * channels, -1),
        scales=in_blocks(scales),
        zeros=weight.zeros,
        offsets=in_blocks(scales * off_middle) if bool(off_middle.any()) else None,
        perm=weight.perm,
        scales_dtype=weight.scales.dtype,
    )
