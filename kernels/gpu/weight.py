"""The Triton kernels' order of a weight with 4 or 8 bits, stated once here.

Input channels come in chunks of 128, output features in tiles of 128; both are padded, so that no kernel masks words.
A chunk has P = 16 / B planes of D = 128 / P channels, B bits each. One word holds two neighbours of every plane:
    words (C, NP, D / 2) int32   level of channel 128 c + D j + 2 r     = words[c, n, r] >> (B j)      & (2^B - 1)
                                 level of channel 128 c + D j + 2 r + 1 = words[c, n, r] >> (B j + 16) & (2^B - 1)
so that `word & 0x000F000F` (4 bits; plane 0) holds the levels of channels 2 r and 2 r + 1 in the two halves of a word,
where or-ing 0x6400 into each half makes them the float16 numbers 1024 + level: no conversion, and x stays in order.
One row of one chunk is 64 bytes (4 bits) or 128 (8 bits), read 16 at a time.
    scales (G, NP), 0 in the padding; zeros (G, NP) float16 = zero - middle, or None where all zeros are the middle
The middle is 8 or 128: 8-bit levels are stored with 128 added. Groups are of 32, 64, or a multiple of 128 channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.gptq import Int4Weight
from kernels.int8 import Int8Weight
from kernels.reference import PackedWeight

CHUNK = 128  # input channels that one step of a kernel reads
TILE = 128  # output features that are padded to
SMALLEST_TILE = 32  # output features of the smallest program; it sets how many locks there are
MIDDLE = 8  # the zero of a symmetric int4 weight
_MIDDLES = 0x88888888 - 2**32  # a word of middle levels, for the padding
_SIGNS = 0x80808080 - 2**32  # the sign bits of four 8-bit levels
_PACKED_AT_ONCE = 32 * TILE  # outputs, so that temporaries stay small beside a weight


@dataclass(frozen=True, eq=False)
class TritonWeight(PackedWeight):
    """A weight in the kernels' order (top of this file); made by `pack_for_triton`, read by backend "triton".

    perm (K,) int64 or None: channel of x that stands at each place (desc_act). locks (NP / 32,) int32, zero between
    launches: programs that share an output tile count themselves here, so one weight serves one launch at a time.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    perm: Tensor | None
    locks: Tensor
    bits: int
    in_features: int
    out_features: int
    group_size: int

    @property
    def device(self) -> torch.device:
        """Where the words are."""
        return self.words.device

    def levels(self) -> Tensor:
        """Levels (K, N) uint8 in kernel order; 8-bit ones with 128 added."""
        planes = 16 // self.bits
        words = self.words.unsqueeze(-1)  # (C, NP, D / 2, 1)
        shifts = torch.tensor([0, 16], device=self.device)
        parts = [(words >> (shifts + self.bits * j)) & (2**self.bits - 1) for j in range(planes)]
        levels = torch.stack(parts, 2).to(torch.uint8).flatten(2)  # (C, NP, 128)
        return levels.transpose(1, 2).flatten(0, 1)[: self.in_features, : self.out_features].contiguous()

    def unpack(self) -> Int4Weight | Int8Weight:
        """Back to what it was packed from, bit for bit."""
        levels = self.levels()
        if self.bits == 8:
            return Int8Weight((levels ^ 128).view(torch.int8).T.contiguous(), self.scales[0, : self.out_features])
        part = (slice(max(1, self.in_features // self.group_size)), slice(self.out_features))  # without the padding
        scales = self.scales[part].contiguous()
        if self.zeros is None:
            zeros = torch.full(scales.shape, MIDDLE, dtype=torch.int16, device=self.device)
        else:
            zeros = (self.zeros[part] + MIDDLE).to(torch.int16)
        return Int4Weight.from_grouped(levels, scales, zeros, self.perm)

    def dequantize(self) -> Tensor:
        """See PackedWeight."""
        return self.unpack().dequantize()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, Tensor))


def pack_for_triton(weight: Int4Weight | Int8Weight) -> TritonWeight:
    """The same weight in the Triton kernels' order; done once, when a layer is loaded, on the weight's own device.

    ValueError if groups are not of 32, 64 or a multiple of 128 channels, unless there is only one.
    """
    outputs, channels = weight.out_features, weight.in_features
    rows, columns = -outputs % TILE, -channels % CHUNK
    if isinstance(weight, Int8Weight):
        levels = F.pad(weight.levels, (0, columns)) if columns else weight.levels
        words = _pack_words(levels.view(torch.int32).T, 8)
        scales = F.pad(weight.scales, (0, rows))[None]
        return TritonWeight(words, scales, None, None, _locks(words), 8, channels, outputs, max(channels, CHUNK))
    size = weight.group_size
    if size not in (32, 64) and size % CHUNK and size != channels:
        raise ValueError(
            f"weight has groups of {size} channels, the Triton kernels take 32, 64, a multiple of {CHUNK}, or one "
            f"group of all {channels}; quantize again with one of these"
        )
    if size not in (32, 64):
        size = max(size, CHUNK)  # one group of less than a chunk: what is padded belongs to it
    words = _pack_words(weight.grouped_words(), 4)
    off_middle = weight.zeros - MIDDLE
    groups = -(-(channels + columns) // size) if size in (32, 64) else len(weight.scales)
    padding = (0, rows, 0, groups - len(weight.scales))
    zeros = F.pad(off_middle, padding).half() if bool(off_middle.any()) else None
    return TritonWeight(
        words, F.pad(weight.scales, padding), zeros, weight.perm, _locks(words), 4, channels, outputs, size
    )


def _locks(words: Tensor) -> Tensor:
    return torch.zeros(words.shape[1] // SMALLEST_TILE, dtype=torch.int32, device=words.device)


def _pack_words(words: Tensor, bits: int) -> Tensor:
    """words (K * bits / 32, N) int32 in gptq.py's order, 8-bit levels signed -> words (C, NP, D / 2) in this one's.

    A chunk's words are P planes of A. Channels 2 b and 2 b + 1 of word a of a plane belong to word P a + b.
    """
    planes, depth = 16 // bits, CHUNK * bits // 32  # depth: words of one output's chunk
    chunks, outputs = -(-len(words) // depth), words.shape[1]
    packed = torch.empty(
        chunks, -(-outputs // TILE) * TILE, depth // planes, planes, dtype=torch.int32, device=words.device
    )
    for target, part in zip(packed.split(_PACKED_AT_ONCE, 1), words.split(_PACKED_AT_ONCE, 1), strict=True):
        padding = (0, target.shape[1] - part.shape[1], 0, chunks * depth - len(words))
        if any(padding):
            part = F.pad(part, padding, value=_MIDDLES if bits == 4 else 0)
        part = part.reshape(chunks, planes, depth // planes, -1)  # C, P, A, N
        for b in range(planes):
            word = torch.zeros_like(part[:, 0])
            for plane in range(planes):
                for neighbour in (0, 1):  # the sign bit is the top bit of the last plane's second neighbour
                    level = part[:, plane] >> (bits * (2 * b + neighbour))
                    level &= 2**bits - 1
                    word |= level.bitwise_left_shift_(bits * plane + 16 * neighbour)
            if bits == 8:
                word ^= _SIGNS  # adds 128
            target[..., b] = word.transpose(1, 2)
    return packed.flatten(2)


def interleave(first: Int4Weight, second: Int4Weight) -> Int4Weight:
    """Two projections of one x as one: output rows 2 n of `first`, 2 n + 1 of `second` (w1 and w2, for SwiGLU).

    ValueError if their shapes, groups or channel orders differ.
    """
    for name in ("qweight", "scales"):
        shapes = [tuple(getattr(weight, name).shape) for weight in (first, second)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{name} has shapes {shapes[0]} and {shapes[1]}; only equal ones interleave")
    orders = [w.perm if w.perm is not None else torch.arange(w.in_features, device=w.device) for w in (first, second)]
    if not torch.equal(*orders):
        raise ValueError("the two weights order their channels differently (desc_act); run them one after another")

    def zipped(one: Tensor, other: Tensor) -> Tensor:
        return torch.stack((one, other), 2).flatten(1)

    return Int4Weight(
        zipped(first.qweight, second.qweight),
        zipped(first.scales, second.scales),
        zipped(first.zeros, second.zeros),
        first.perm,
    )
