"""The two orders of a GPTQ int4 weight, each stated once here: AutoGPTQ's on disk, and ours in memory.

On disk (AutoGPTQ qlinear_cuda.py; B bits, P = 32 / B levels a word, G groups, K input and N output features):
    qweight (K / P, N) int32   level[k, n] = qweight[k // P, n] >> B * (k % P)  &  2^B - 1
    qzeros  (G, N / P) int32   stored[g, n] = qzeros[g, n // P] >> B * (n % P)  &  2^B - 1
                               zero = stored + 1 in checkpoint_format "gptq" (v1), stored in "gptq_v2"
    scales  (G, N) float16
    g_idx   (K,) int32         group of each input channel
    W[n, k] = (level[k, n] - zero[g_idx[k], n]) * scales[g_idx[k], n]

In memory (Int4Weight): the channels of one group are neighbours, so that a program reads one row's share of a group,
S = K / G levels, as S / 8 consecutive words:
    words  (G, N, S / 8) int32  level of channel perm[g * S + 8 * j + i] = words[g, n, j] >> 4 * i  &  15
    scales (G, N), zeros (G, N)
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def pack_levels(levels: Tensor, bits: int = 4) -> Tensor:
    """levels (K, N) integers in [0, 2^bits) -> qweight (K * bits / 32, N) int32, lowest bits = lowest k."""
    per_word = 32 // bits
    rows, columns = levels.shape
    if rows % per_word:
        raise ValueError(f"levels has {rows} rows, {bits}-bit packing needs a multiple of {per_word}")
    if levels.numel() and not 0 <= int(levels.min()) <= int(levels.max()) < 2**bits:
        raise ValueError(f"levels lie in [{int(levels.min())}, {int(levels.max())}], {bits} bits hold [0, {2**bits - 1}]")
    words = torch.zeros(rows // per_word, columns, dtype=torch.int32, device=levels.device)
    parts = levels.to(torch.int32).view(rows // per_word, per_word, columns)
    for i in range(per_word):  # the sign bit of int32 is the top bit of the last level
        words |= parts[:, i] << (bits * i)
    return words


def unpack_levels(words: Tensor, bits: int = 4) -> Tensor:
    """qweight (R, N) int32 -> levels (R * 32 / bits, N) uint8; the inverse of pack_levels."""
    shifts = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32).view(1, -1, 1)
    levels = (words.unsqueeze(1) >> shifts) & (2**bits - 1)
    return levels.flatten(0, 1).to(torch.uint8)


def pack_zeros(zeros: Tensor, bits: int = 4, checkpoint_format: str = "gptq") -> Tensor:
    """zeros (G, N) integers -> qzeros (G, N * bits / 32) int32."""
    stored = zeros - 1 if checkpoint_format == "gptq" else zeros
    # v1 stores zero 0 as -1, which wraps around within the level's bits as auto-gptq's packing does
    return pack_levels((stored.to(torch.int32) & (2**bits - 1)).T.contiguous(), bits).T.contiguous()


def unpack_zeros(qzeros: Tensor, bits: int = 4, checkpoint_format: str = "gptq") -> Tensor:
    """qzeros (G, N * bits / 32) int32 -> zeros (G, N) int16."""
    stored = unpack_levels(qzeros.T.contiguous(), bits).T.to(torch.int16)
    # auto-gptq's kernels add one and keep no mask: a stored 15 is zero 16 (qlinear_cuda.py: zeros = zeros + 1)
    return stored + 1 if checkpoint_format == "gptq" else stored


def check_gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, *, bits: int, group_size: int, name: str = "weight"
) -> None:
    """ValueError if the tensors of one layer contradict one another, with the shapes and the next step."""
    in_features, out_features = qweight.shape[0] * 32 // bits, qweight.shape[1]
    groups = 1 if group_size == -1 else in_features // group_size
    expected = {
        "qweight": (qweight, (in_features * bits // 32, out_features), torch.int32),
        "qzeros": (qzeros, (groups, out_features * bits // 32), torch.int32),
        "scales": (scales, (groups, out_features), None),
        "g_idx": (g_idx, (in_features,), torch.int32),
    }
    for part, (tensor, shape, dtype) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name}.{part} has shape {tuple(tensor.shape)}, expected {shape} for {bits} bits and group_size "
                f"{group_size}; check quantize_config.json against the weights"
            )
        if dtype is not None and tensor.dtype != dtype:
            raise ValueError(f"{name}.{part} is {tensor.dtype}, expected {dtype}")
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
    """The disk order's own formula, for 4 and 8 bits: W (N, K) float32."""
    check_gptq(qweight, qzeros, scales, g_idx, bits=bits, group_size=group_size, name=name)
    group = g_idx.long()
    zeros = unpack_zeros(qzeros, bits, checkpoint_format).float()
    return ((unpack_levels(qweight, bits).float() - zeros[group]) * scales.float()[group]).T.contiguous()


@dataclass(frozen=True, eq=False)
class Int4Weight:
    """One int4 projection in kernel order (module docstring); made by `from_gptq`, read by every backend.

    words (G, N, S / 8) int32, scales (G, N) floating, zeros (G, N) int16, perm (K,) int64 or None where the channels of
    a group are neighbours already (no desc_act).
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor
    perm: Tensor | None

    @property
    def out_features(self) -> int:
        """N."""
        return self.words.shape[1]

    @property
    def group_size(self) -> int:
        """S, input channels a group; a group_size of -1 on disk is in_features here."""
        return self.words.shape[2] * 8

    @property
    def in_features(self) -> int:
        """K."""
        return self.words.shape[0] * self.group_size

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = [self.words, self.scales, self.zeros] + ([] if self.perm is None else [self.perm])
        return sum(tensor.nbytes for tensor in tensors)

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
    ) -> "Int4Weight":
        """The one turn from disk order into kernel order. ValueError names `name` and the rule that is broken."""
        check_gptq(qweight, qzeros, scales, g_idx, bits=4, group_size=group_size, name=name)
        in_features, out_features = qweight.shape[0] * 8, qweight.shape[1]
        groups = scales.shape[0]
        size = in_features // groups
        counts = torch.bincount(g_idx.long(), minlength=groups)
        if groups and int(counts.min()) != size or int(counts.max()) != size:
            raise ValueError(
                f"{name}.g_idx puts {int(counts.min())} to {int(counts.max())} channels into a group, expected {size} "
                f"in each of {groups}"
            )
        perm = torch.argsort(g_idx.long(), stable=True)
        if torch.equal(perm, torch.arange(in_features, device=perm.device)):
            words, perm = qweight, None
        else:
            words = pack_levels(unpack_levels(qweight)[perm])
        words = words.view(groups, size // 8, out_features).transpose(1, 2).contiguous()
        return cls(words, scales, unpack_zeros(qzeros, 4, checkpoint_format), perm)

    def levels(self) -> Tensor:
        """Levels (K, N) uint8 in the channel order of the disk."""
        words = self.words.transpose(1, 2).reshape(self.in_features // 8, self.out_features)
        levels = unpack_levels(words)
        if self.perm is None:
            return levels
        original = torch.empty_like(levels)
        original[self.perm] = levels
        return original

    def g_idx(self) -> Tensor:
        """Group of each input channel (K,) int32 in the channel order of the disk."""
        groups = torch.arange(self.in_features, device=self.words.device, dtype=torch.int32) // self.group_size
        if self.perm is None:
            return groups
        original = torch.empty_like(groups)
        original[self.perm] = groups
        return original
