"""GPTQ weights in the order in which AutoGPTQ stores them (qlinear_cuda.py). Each backend packs its own order from it.

B bits, P = 32 / B levels a word, G groups, K input and N output features:
    qweight (K / P, N) int32   level[k, n] = qweight[k // P, n] >> B * (k % P)  &  2^B - 1
    qzeros  (G, N / P) int32   stored[g, n] = qzeros[g, n // P] >> B * (n % P)  &  2^B - 1
                               zero = stored + 1 in checkpoint_format "gptq" (v1), stored in "gptq_v2"
    scales  (G, N) float16
    g_idx   (K,) int32, int64  group of each input channel
    W[n, k] = (level[k, n] - zero[g_idx[k], n]) * scales[g_idx[k], n]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

FORMATS = ("gptq", "gptq_v2")  # checkpoint_format of quantize_config.json


def pack_levels(levels: Tensor, bits: int = 4) -> Tensor:
    """levels (K, N) integers in [0, 2^bits) -> qweight (K * bits / 32, N) int32, lowest bits = lowest k.

    ValueError if K does not fill whole words, or a level does not fit into `bits`.
    """
    per_word = 32 // bits
    rows, columns = levels.shape
    if rows % per_word:
        raise ValueError(f"levels has {rows} rows, {bits}-bit packing needs a multiple of {per_word}")
    if levels.numel() and not 0 <= int(levels.min()) <= int(levels.max()) < 2**bits:
        raise ValueError(
            f"levels lie in [{int(levels.min())}, {int(levels.max())}], {bits} bits hold [0, {2**bits - 1}]"
        )
    words = torch.zeros(rows // per_word, columns, dtype=torch.int32, device=levels.device)
    parts = levels.reshape(rows // per_word, per_word, columns)
    for i in range(per_word):  # the sign bit of int32 is the top bit of the last level
        words |= parts[:, i].to(torch.int32) << (bits * i)
    return words


def unpack_levels(words: Tensor, bits: int = 4) -> Tensor:
    """qweight (R, N) int32 -> levels (R * 32 / bits, N) uint8; the inverse of pack_levels."""
    rows, columns = words.shape
    levels = torch.empty(rows, 32 // bits, columns, dtype=torch.uint8, device=words.device)
    for i in range(32 // bits):  # one level of each word at a time: no int32 temporary of all levels
        levels[:, i] = (words >> (bits * i)) & (2**bits - 1)
    return levels.flatten(0, 1)


def pack_zeros(zeros: Tensor, bits: int = 4, checkpoint_format: str = "gptq") -> Tensor:
    """zeros (G, N) integers -> qzeros (G, N * bits / 32) int32.

    ValueError if a zero cannot be stored: "gptq" (v1) holds [1, 2^bits], "gptq_v2" holds [0, 2^bits - 1].
    """
    lowest = _lowest_zero(checkpoint_format)
    if zeros.numel() and not lowest <= int(zeros.min()) <= int(zeros.max()) < 2**bits + lowest:
        raise ValueError(
            f"zeros lie in [{int(zeros.min())}, {int(zeros.max())}], checkpoint_format {checkpoint_format!r} with "
            f"{bits} bits holds [{lowest}, {2**bits + lowest - 1}]; the other of {FORMATS} may hold them"
        )
    return pack_levels((zeros.to(torch.int32) - lowest).T.contiguous(), bits).T.contiguous()


def unpack_zeros(qzeros: Tensor, bits: int = 4, checkpoint_format: str = "gptq") -> Tensor:
    """qzeros (G, N * bits / 32) int32 -> zeros (G, N) int16; the inverse of pack_zeros."""
    stored = unpack_levels(qzeros.T.contiguous(), bits).T.to(torch.int16).contiguous()
    # auto-gptq's kernels add one and keep no mask: a stored 15 is zero 16 (qlinear_cuda.py: zeros = zeros + 1)
    return stored + _lowest_zero(checkpoint_format)


def _lowest_zero(checkpoint_format: str) -> int:
    """The zero that a stored 0 stands for."""
    if checkpoint_format not in FORMATS:
        raise ValueError(f"checkpoint_format is {checkpoint_format!r}, expected one of {FORMATS}")
    return 1 if checkpoint_format == "gptq" else 0


def check_gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, *, bits: int, group_size: int, name: str = "weight"
) -> None:
    """ValueError if the tensors of one layer contradict one another, with the shapes and the next step."""
    if bits not in (4, 8):
        raise ValueError(f"{name} is said to have {bits} bits, 4 and 8 can be read; check quantize_config.json")
    if qweight.dim() != 2:
        raise ValueError(f"{name}.qweight has shape {tuple(qweight.shape)}, expected (in_features * {bits} / 32, N)")
    in_features, out_features = qweight.shape[0] * 32 // bits, qweight.shape[1]
    if group_size != -1 and (group_size < 1 or in_features % group_size):
        raise ValueError(
            f"{name} has {in_features} input features, which group_size {group_size} does not divide; "
            "check quantize_config.json against the weights"
        )
    groups = 1 if group_size == -1 else in_features // group_size
    expected = {
        "qweight": (qweight, (in_features * bits // 32, out_features), torch.int32),
        "qzeros": (qzeros, (groups, out_features * bits // 32), torch.int32),
        "scales": (scales, (groups, out_features), None),
        "g_idx": (g_idx, (in_features,), torch.int64 if g_idx.dtype == torch.int64 else torch.int32),
    }
    for part, (tensor, shape, dtype) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name}.{part} has shape {tuple(tensor.shape)}, expected {shape} for {bits} bits and group_size "
                f"{group_size}; check quantize_config.json against the weights"
            )
        if dtype is not None and tensor.dtype != dtype:
            raise ValueError(f"{name}.{part} is {tensor.dtype}, expected {dtype}")
    if not scales.is_floating_point():
        raise ValueError(f"{name}.scales is {scales.dtype}, expected a floating type")
    if out_features * bits % 32:
        raise ValueError(f"{name} has {out_features} outputs, whose zeros do not fill whole words of {32 // bits}")
    if in_features and not 0 <= int(g_idx.min()) <= int(g_idx.max()) < groups:
        raise ValueError(
            f"{name}.g_idx lies in [{int(g_idx.min())}, {int(g_idx.max())}], expected [0, {groups - 1}]; "
            "the file is damaged or was quantized with another group_size"
        )


def dequantize_gptq(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor,
    *,
    bits: int,
    group_size: int,
    checkpoint_format: str = "gptq",
    name: str = "weight",
) -> Tensor:
    """The tensors of one layer on disk, 4 or 8 bits -> W (N, K) float32. ValueError as in check_gptq."""
    check_gptq(qweight, qzeros, scales, g_idx, bits=bits, group_size=group_size, name=name)
    return _dequantize(unpack_levels(qweight, bits), unpack_zeros(qzeros, bits, checkpoint_format), scales, g_idx)


def _dequantize(levels: Tensor, zeros: Tensor, scales: Tensor, g_idx: Tensor) -> Tensor:
    """The formula at the top of this file."""
    group = g_idx.long()
    weight = levels.float()  # in place from here on: a layer of a large model in float32 takes 200 MB
    weight -= zeros.float()[group]
    weight *= scales.float()[group]
    return weight.T.contiguous()


@dataclass(frozen=True, eq=False)
class Int4Weight:
    """One int4 projection as it is on disk, checked by `from_gptq`; backends pack their own order from it.

    qweight (K / 8, N) int32; scales (G, N) floating; zeros (G, N) int16; perm (K,) int64: the input channels sorted by
    group, S = K / G of each, or None where they are in that order already (no desc_act).
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor
    perm: Tensor | None
    bits: ClassVar[int] = 4

    @property
    def out_features(self) -> int:
        """N."""
        return self.qweight.shape[1]

    @property
    def in_features(self) -> int:
        """K."""
        return self.qweight.shape[0] * 8

    @property
    def group_size(self) -> int:
        """S, input channels a group; a group_size of -1 on disk is in_features here."""
        return self.in_features // len(self.scales)

    @property
    def device(self) -> torch.device:
        """Where the levels are."""
        return self.qweight.device

    @classmethod
    def from_gptq(
        cls,
        qweight: Tensor,
        qzeros: Tensor,
        scales: Tensor,
        g_idx: Tensor,
        *,
        group_size: int,
        checkpoint_format: str = "gptq",
        name: str = "weight",
    ) -> Int4Weight:
        """The tensors of one layer as read from disk. ValueError names `name` and the rule that is broken."""
        check_gptq(qweight, qzeros, scales, g_idx, bits=4, group_size=group_size, name=name)
        groups, in_features = len(scales), len(g_idx)
        size = in_features // groups
        if size % 8:
            raise ValueError(f"{name} has groups of {size} channels, the int4 kernels need a multiple of 8")
        counts = torch.bincount(g_idx.long(), minlength=groups)
        if int(counts.min()) != size or int(counts.max()) != size:
            raise ValueError(
                f"{name}.g_idx puts {int(counts.min())} to {int(counts.max())} channels into a group, expected {size} "
                f"in each of {groups}"
            )
        perm = torch.argsort(g_idx.long(), stable=True)
        in_order = torch.equal(perm, torch.arange(in_features, device=perm.device))
        return cls(qweight, scales, unpack_zeros(qzeros, 4, checkpoint_format), None if in_order else perm)

    @classmethod
    def from_grouped(cls, levels: Tensor, scales: Tensor, zeros: Tensor, perm: Tensor | None) -> Int4Weight:
        """From levels (K, N) sorted by group, the inverse of `grouped_levels`."""
        return cls(pack_levels(_ungroup(levels, perm)), scales, zeros, perm)

    def to_gptq(self, checkpoint_format: str = "gptq") -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """qweight, qzeros, scales and g_idx, bit for bit what `from_gptq` was given.

        ValueError if a zero does not fit into `checkpoint_format` (a zero of 0 into v1, of 16 into v2).
        """
        return self.qweight, pack_zeros(self.zeros, 4, checkpoint_format), self.scales, self.g_idx()

    def g_idx(self) -> Tensor:
        """Group of each input channel (K,) int32."""
        grouped = torch.arange(self.in_features, device=self.device, dtype=torch.int32) // self.group_size
        return _ungroup(grouped, self.perm)

    def levels(self) -> Tensor:
        """Levels (K, N) uint8."""
        return unpack_levels(self.qweight)

    def grouped_words(self) -> Tensor:
        """qweight with the channels sorted by group: channel perm[k] at place k."""
        if self.perm is None:
            return self.qweight
        words = torch.empty_like(self.qweight)
        for target, part in zip(words.split(1024, 1), self.qweight.split(1024, 1), strict=True):  # bounds temporaries
            target.copy_(pack_levels(unpack_levels(part)[self.perm]))
        return words

    def dequantize(self) -> Tensor:
        """W (N, K) float32."""
        return _dequantize(self.levels(), self.zeros, self.scales, self.g_idx())


def _ungroup(grouped: Tensor, perm: Tensor | None) -> Tensor:
    """Rows sorted by group -> rows in the order of the input channels."""
    if perm is None:
        return grouped
    original = torch.empty_like(grouped)
    original[perm] = grouped
    return original
