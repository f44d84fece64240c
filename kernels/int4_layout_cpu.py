"""What the CPU path adds to an Int4Weight: two orders in which FBGEMM's 4-bit rows can be read, stated once here.

FBGEMM's row (torch.ops.quantized.embedding_bag_4bit_rowwise_offsets) is L levels, two a byte, lowest nibble first, then
a float16 scale and a float16 bias; it is read as level * scale + bias and multiplied by one float32 weight per row.
Here the row's scale is always 1 and its bias minus a zero point, which float16 holds exactly.

    rows    (N * G, S / 2 + 4) uint8  row n * G + g = the levels of words[g, n], bias -zeros[g, n]
            with weight scales[g, n] a row is read as exact float32 weights: for many rows of x
    columns (NB * K, D / 2 + 4) uint8  row b * K + k = the levels of channel perm[k] for outputs b * D ... b * D + D - 1
            with weight x[perm[k]] the rows of one group add up to D partial sums: for few rows of x
            bias -8; what a zero other than 8 adds is subtracted through `offsets`
Outputs past N are padding with scale 0. The words move into `rows` (Int4Weight.words becomes a view), so that a weight
of 4 bits takes 8 and its scales, not 12.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.int4_layout import Int4Weight

BLOCK = 256  # outputs of one column block: K = 4096 of them (0.5 MiB) stay in a core's L2; 64 to 2048 timed alike
TAIL = 4  # bytes of a row's scale and bias
MIDDLE = 8  # the zero of a symmetric weight


@dataclass(frozen=True, eq=False)
class PackedCpu:
    """The CPU's orders of one Int4Weight (module docstring); made by `pack_for_cpu`.

    rows and columns uint8; row_scales (N, G) float32; column_scales (NB, G, D) float32; offsets (G, N) float32 =
    scales * (zeros - 8), or None where every zero is 8.
    """

    rows: Tensor
    columns: Tensor
    row_scales: Tensor
    column_scales: Tensor
    offsets: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (self.rows, self.columns, self.row_scales, self.column_scales, self.offsets)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def pack_for_cpu(weight: Int4Weight) -> Int4Weight:
    """The same weight with `packed_cpu`, which backend "cpu" reads; done once, when a layer is loaded.

    ValueError if the weight is not on the CPU.
    """
    if weight.device.type != "cpu":
        raise ValueError(f"pack_for_cpu packs a weight on the CPU, this one is on {weight.device}; move it or leave it")
    if weight.packed_cpu is not None:
        return weight
    rows, words = _pack_rows(weight)
    scales = weight.scales.float()
    off_centre = weight.zeros.float() - MIDDLE
    columns, column_scales = _pack_columns(weight.grouped_levels(), scales)
    packed = PackedCpu(
        rows=rows,
        columns=columns,
        row_scales=scales.T.contiguous(),
        column_scales=column_scales,
        offsets=scales * off_centre if bool(off_centre.any()) else None,
    )
    return dataclasses.replace(weight, words=words, packed_cpu=packed)


def _pack_rows(weight: Int4Weight) -> tuple[Tensor, Tensor]:
    """rows (N * G, S / 2 + 4) uint8, and the words (G, N, S / 8) as a view into them."""
    groups, outputs, size = weight.words.shape
    words = torch.empty(outputs, groups, size + TAIL // 4, dtype=torch.int32)
    words[..., :size] = weight.words.transpose(0, 1)
    tail = words.view(torch.float16)[..., 2 * size :]
    tail[..., 0] = 1
    tail[..., 1] = -weight.zeros.T
    return words.view(torch.uint8).view(outputs * groups, -1), words[..., :size].transpose(0, 1)


def _pack_columns(levels: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """columns (NB * K, D / 2 + 4) uint8 and their scales (NB, G, D), from levels (K, N) and scales (G, N)."""
    channels, outputs = levels.shape
    blocks = -(-outputs // BLOCK)
    block = -(-outputs // blocks // 16) * 16  # equal blocks of whole vectors, as little padding as that allows
    padding = (0, blocks * block - outputs)
    levels = torch.nn.functional.pad(levels, padding, value=MIDDLE).view(channels, blocks, block).transpose(0, 1)
    columns = torch.empty(blocks, channels, block // 2 + TAIL, dtype=torch.uint8)
    torch.bitwise_or(levels[..., 0::2], levels[..., 1::2] << 4, out=columns[..., : block // 2])
    tail = columns.view(torch.float16)[..., block // 4 :]
    tail[..., 0] = 1
    tail[..., 1] = -MIDDLE
    padded = torch.nn.functional.pad(scales, padding).view(-1, blocks, block).transpose(0, 1).contiguous()
    return columns.view(blocks * channels, -1), padded
