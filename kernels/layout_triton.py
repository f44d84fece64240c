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

from kernels.int4_layout import Int4Weight, pack_levels
from kernels.int8_layout import Int8Weight

CHUNK = 128  # input channels that one step of a kernel reads
TILE = 128  # output features that are padded to
SMALLEST_TILE = 32  # output features of the smallest program; it sets how many locks there are


@dataclass(frozen=True, eq=False)
class TritonWeight:
    """A weight in kernel order (module docstring); made by `pack_for_triton`, read by backend "triton".

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

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (self.words, self.scales, self.zeros, self.perm, self.locks)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

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
            signed = (levels.to(torch.int16) - 128).to(torch.int8)
            return Int8Weight(signed.T.contiguous(), self.scales[0, : self.out_features])
        groups, outputs = max(1, self.in_features // self.group_size), self.out_features
        words = pack_levels(levels).view(groups, -1, outputs).transpose(1, 2).contiguous()
        if self.zeros is None:
            zeros = torch.full((groups, outputs), 8, dtype=torch.int16, device=self.device)
        else:
            zeros = (self.zeros[:groups, :outputs] + 8).to(torch.int16).contiguous()
        return Int4Weight(words, self.scales[:groups, :outputs].contiguous(), zeros, self.perm)


def pack_for_triton(weight: Int4Weight | Int8Weight) -> TritonWeight:
    """The same weight in the Triton kernels' order; done once, when a layer is loaded, on the weight's own device.

    ValueError if groups are not of 32, 64 or a multiple of 128 channels, unless there is only one.
    """
    outputs, channels = weight.out_features, weight.in_features
    rows, columns = -outputs % TILE, -channels % CHUNK
    if isinstance(weight, Int8Weight):
        levels = (weight.levels.to(torch.int16) + 128).to(torch.uint8).T
        words = _pack_words(F.pad(levels, (0, rows, 0, columns), value=128), 8)
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
    middle = 8
    words = _pack_words(F.pad(weight.grouped_levels(), (0, rows, 0, columns), value=middle), 4)
    off_middle = weight.zeros - middle
    groups = -(-(channels + columns) // size) if size in (32, 64) else len(weight.scales)
    padding = (0, rows, 0, groups - len(weight.scales))
    zeros = F.pad(off_middle, padding).half() if bool(off_middle.any()) else None
    return TritonWeight(
        words, F.pad(weight.scales, padding), zeros, weight.perm, _locks(words), 4, channels, outputs, size
    )


def _locks(words: Tensor) -> Tensor:
    return torch.zeros(words.shape[1] // SMALLEST_TILE, dtype=torch.int32, device=words.device)


def _pack_words(levels: Tensor, bits: int) -> Tensor:
    """levels (K, N) uint8, K a multiple of 128 -> words (K / 128, N, D / 2) int32."""
    planes = 16 // bits
    pairs = levels.T.reshape(levels.shape[1], -1, planes, CHUNK // planes // 2, 2)  # N, C, plane, r, neighbour
    words = torch.zeros(pairs.shape[1], pairs.shape[0], pairs.shape[3], dtype=torch.int32, device=levels.device)
    for plane in range(planes):
        for neighbour in (0, 1):  # the sign bit is the top bit of the last plane's second neighbour
            part = pairs[:, :, plane, :, neighbour].transpose(0, 1).to(torch.int32)
            words |= part << (bits * plane + 16 * neighbour)
    return words


def interleave(first: Int4Weight, second: Int4Weight) -> Int4Weight:
    """Two projections of one x as one: output rows 2 n of `first`, 2 n + 1 of `second` (w1 and w2, for SwiGLU).

    ValueError if their shapes, groups or channel orders differ.
    """
    if first.words.shape != second.words.shape:
        raise ValueError(
            f"words have shapes {tuple(first.words.shape)} and {tuple(second.words.shape)}; only equal ones interleave"
        )
    orders = [p.perm if p.perm is not None else torch.arange(p.in_features, device=p.device) for p in (first, second)]
    if not torch.equal(*orders):
        raise ValueError("the two weights order their channels differently (desc_act); run them one after another")

    def zipped(one: Tensor, other: Tensor) -> Tensor:
        return torch.stack((one, other), 2).flatten(1, 2)

    return Int4Weight(
        zipped(first.words, second.words),
        zipped(first.scales, second.scales),
        zipped(first.zeros, second.zeros),
        first.perm,
    )
