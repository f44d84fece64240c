"""The CPU backend: the order of a weight with 4 or 8 bits, and its product with x in float32 by MatMulNBits.

    4 bits  the disk's words turned to rows of outputs: their nibbles are already in MatMulNBits's order. A zero of 16,
            which v1 can say and four bits cannot, is 15 there, and what is missing is subtracted: the group's sum of x
            times its scale.
    8 bits  twice as many channels of 4 bits, a level's high half and then its low half: level = 16 * (high - 8) + low,
            so x is repeated. The operator's own 8 bits take 30 times as long at float precision (onnxruntime 1.32);
            with int8 activations they are as fast as two of 4 bits, and are what it gets.
Groups that no block of 16 or more divides are padded with channels of x that are 0.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.gptq import Int4Weight
from kernels.int8 import Int8Weight
from kernels.matmul_nbits import BLOCKS, Activations, MatMulNBits, block_size
from kernels.reference import PackedWeight

OUTPUTS = 32_768  # of one product: only lm_head has more, and is packed part by part
MIDDLE, MOST = 8, 15  # the zero of a symmetric weight, and the largest that four bits hold


@dataclass(frozen=True, eq=False)
class CpuWeight(PackedWeight):
    """A weight in the CPU's order (top of this file); made by `pack_for_cpu`, read by backend "cpu".

    products: outputs after outputs. perm (K,) int64 or None; missing (G, N) float32: scales where a zero is 16, or None
    where there is none.
    """

    products: tuple[MatMulNBits, ...]
    perm: Tensor | None
    missing: Tensor | None
    bits: int
    in_features: int
    out_features: int
    group_size: int

    @property
    def nbytes(self) -> int:
        """Bytes of the packed levels, scales and zeros."""
        return sum(product.nbytes for product in self.products)

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def dequantize(self) -> Tensor:
        """See PackedWeight: the products of one channel after another, which are exact for float16 scales."""
        parts = torch.eye(self.in_features).split(256)
        return torch.cat([gemm_cpu(part, self) for part in parts]).T.contiguous()


def pack_for_cpu(weight: Int4Weight | Int8Weight, activations: Activations = "float") -> CpuWeight:
    """The same weight in the CPU's order; done once, when a layer is loaded. activations: see MatMulNBits.

    ValueError if the weight is not on the CPU.
    """
    if weight.device.type != "cpu":
        raise ValueError(f"pack_for_cpu takes a weight on the CPU, this one is on {weight.device}; it needs no packing")
    if isinstance(weight, Int4Weight):
        return _pack_int4(weight, activations)
    return _pack_int8(weight, activations)


def _pack_int4(weight: Int4Weight, activations: Activations) -> CpuWeight:
    size, padded = weight.group_size, padded_group(weight.group_size)
    levels = weight.grouped_words().T.contiguous().view(torch.uint8)
    if padded != size:
        levels = F.pad(levels.unflatten(1, (-1, size // 2)), (0, (padded - size) // 2)).flatten(1)
    blocks = padded // block_size(padded)
    scales, zeros = (values.T.repeat_interleave(blocks, 1) for values in (weight.scales, weight.zeros))
    off_middle, full = bool((zeros != MIDDLE).any()), weight.zeros > MOST
    nibbles = zeros.clamp(max=MOST).to(torch.uint8) if off_middle else None
    product = MatMulNBits(levels, scales.float(), nibbles, activations=activations)
    missing = weight.scales.float() * full if bool(full.any()) else None
    return CpuWeight((product,), weight.perm, missing, 4, weight.in_features, weight.out_features, size)


def _pack_int8(weight: Int8Weight, activations: Activations) -> CpuWeight:
    size, padded = weight.in_features, padded_group(weight.in_features)
    blocks = padded // block_size(padded)
    factors = torch.tensor([16.0, 1.0]).repeat_interleave(blocks)
    middles = torch.tensor([MIDDLE, 0], dtype=torch.uint8).repeat_interleave(blocks)
    products = []
    for levels, scales in zip(weight.levels.split(OUTPUTS), weight.scales.split(OUTPUTS), strict=True):
        levels = F.pad(levels.view(torch.uint8) ^ 128, (0, padded - size))  # ^ 128 adds 128
        if activations == "int8":
            products.append(
                MatMulNBits(levels, scales.float()[:, None].expand(-1, blocks), None, bits=8, activations="int8")
            )
            continue
        even, odd = levels[:, 0::2], levels[:, 1::2]
        halves = torch.cat((even >> 4 | odd & 0xF0, even & 15 | odd << 4), dim=1)
        scales, zeros = scales.float()[:, None] * factors, middles.expand(len(levels), -1)
        products.append(MatMulNBits(halves, scales, zeros))
    return CpuWeight(tuple(products), None, None, 8, weight.in_features, weight.out_features, size)


def padded_group(size: int) -> int:
    """Channels that a group of `size` takes here."""
    return -(-size // BLOCKS[-1]) * BLOCKS[-1]


def gemm_cpu(x: Tensor, weight: CpuWeight, bias: Tensor | None = None) -> Tensor:
    """x (..., K) -> x @ W.T + bias (..., N) in x's dtype; sums in float32. ValueError if a gradient is asked for."""
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError('backend "cpu" computes no gradient; use torch.inference_mode() or backend="torch"')
    rows = x.reshape(-1, weight.in_features).float()
    if weight.perm is not None:
        rows = rows[:, weight.perm]
    grouped = rows.unflatten(1, (-1, weight.group_size))
    padding = padded_group(weight.group_size) - weight.group_size
    channels = F.pad(grouped, (0, padding)).flatten(1) if padding else rows
    if weight.products[0].in_features > channels.shape[1]:  # both halves of 8 bits
        channels = channels.repeat(1, 2)
    parts = [product(channels) for product in weight.products]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    if weight.missing is not None:
        y -= grouped.sum(-1) @ weight.missing
    if bias is not None:
        y += bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], weight.out_features)
