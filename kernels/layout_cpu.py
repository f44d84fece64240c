"""The CPU's order of a weight with 4 or 8 bits, stated once here: a byte a level, in rows that FBGEMM adds up.

FBGEMM's 8-bit row (torch.ops.quantized.embedding_bag_byte_rowwise_offsets) is D bytes, then a float32 scale and a
float32 bias; it is read as byte * scale + bias and multiplied by one float32 weight per row. Here the scale is 1 and
the bias minus the middle, which is 8 or 128: 8-bit levels are stored with 128 added.

    columns (NB * K, D + 8) uint8  byte j of row b * K + k = level of channel perm[k] for output b * D + j
    scales  (NB, G, D) float32, 0 for the padding outputs past N
With weight x[perm[k]], the rows of one group add up to D partial sums of (level - middle) * x: x is multiplied without
the weight ever being float. 4 bits take 8 here: FBGEMM's 4-bit rows run on one thread only, and torch has no vector
operator that turns nibbles into float32 at the speed a matrix product needs.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.int4_layout import Int4Weight, pack_levels
from kernels.int8_layout import Int8Weight

BLOCK = 1024  # outputs of one block of columns; sums took the same time with 256 to 1024, tiles less with 1024
TAIL = 8  # bytes of a row's scale and bias
MIDDLES = {4: 8, 8: 128}  # by bits: the zero of a symmetric weight


@dataclass(frozen=True, eq=False)
class CpuWeight:
    """A weight in the CPU's order (module docstring); made by `pack_for_cpu`, read by backend "cpu".

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
    def middle(self) -> int:
        """The level that stands for 0 where there is no other zero."""
        return MIDDLES[self.bits]

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

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (self.columns, self.scales, self.zeros, self.offsets, self.perm)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def blocks(self) -> Tensor:
        """Levels (NB, K, D) uint8, a view: the columns without their tails."""
        return self.columns.view(self.scales.shape[0], self.in_features, -1)[..., :-TAIL]

    def unpack(self) -> Int4Weight | Int8Weight:
        """Back to what it was packed from, bit for bit."""
        groups, outputs = self.scales.shape[1], self.out_features
        levels = self.blocks().transpose(0, 1).flatten(1)[:, :outputs]
        scales = self.scales.transpose(0, 1).flatten(1)[:, :outputs].to(self.scales_dtype).contiguous()
        if self.bits == 8:
            return Int8Weight((levels ^ 128).view(torch.int8).T.contiguous(), scales[0])
        words = pack_levels(levels).view(groups, -1, outputs).transpose(1, 2).contiguous()
        zeros = torch.full((groups, outputs), self.middle, dtype=torch.int16) if self.zeros is None else self.zeros
        return Int4Weight(words, scales, zeros, self.perm)


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
    # int8 levels become bytes with 128 added by turning their sign bit
    levels = weight.grouped_levels() if isinstance(weight, Int4Weight) else (weight.levels.view(torch.uint8)).T
    for columns_of, part in zip(columns, levels.split(block, dim=1), strict=True):
        columns_of[:, : part.shape[1]] = part if bits == 4 else part ^ 128
        columns_of[:, part.shape[1] : block] = 0
    tail = columns.view(torch.float32)[..., block // 4 :]
    tail[..., 0] = 1
    tail[..., 1] = -middle

    def in_blocks(values: Tensor) -> Tensor:
        padded = F.pad(values, (0, count * block - outputs))
        return padded.view(-1, count, block).transpose(0, 1).contiguous()

    if isinstance(weight, Int8Weight):
        scales, zeros, offsets, perm = weight.scales[None], None, None, None
    else:
        scales, zeros, offsets, perm = weight.scales, weight.zeros, None, weight.perm
        off_middle = zeros.float() - middle
        if bool(off_middle.any()):
            offsets = in_blocks(scales.float() * off_middle)
        else:
            zeros = None
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
