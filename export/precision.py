"""How numbers are stored in the exported graph: its dtypes, weights in blocks of 8 or 4 bits, and the data file.

    float32   everything
    float16   weights, matrix products and attention; the residual stream and every LayerNorm are float32
    int8      as float16, but the weights of matrix products are 8 bits, a scale and a zero point per 128; on a CPU
              their activations too, unless the comparison shows that it loses too much
    int4      as float16, but the weights of matrix products are 4 bits, a scale and a zero point per 32

Pixels and features are always float32. The residual stream is the one place where values of many layers add up, so it
alone could leave float16's range (65504); in float32 it cannot, at the cost of two Casts per block. float16 products of
8- and 4-bit weights run on onnxruntime's CPU and CUDA providers alike.
"""

from dataclasses import dataclass
from typing import BinaryIO

import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from torch import Tensor

from qvl_edge.bundle import VIT_DTYPES
from qvl_edge.errors import ConfigError

# Relative error of the weights (normal random; trained small model), scales in float16:
#   4 bits   block 32, zero point: 8.1 %, 8.2 %    symmetric: 8.6 %, 8.8 %    block 128, zero point: 10.1 %, 11.0 %
#   8 bits   block 32, zero point: 0.48 %, 0.49 %  symmetric: 0.53 %, 0.61 %  block 128, zero point: 0.59 %, 0.67 %
# Searching the best of 12 narrower ranges for each block gains 3 % of the error at 4 bits and nothing at 8.
BLOCK_SIZES = {"int8": 128, "int4": 32}
ALLOWED_BLOCK_SIZES = (16, 32, 64, 128, 256)  # MatMulNBits: a power of two, 16 or more
BITS = {"int8": 8, "int4": 4}
# An accuracy_level of MatMulNBits (onnxruntime, ContribOperators.md): the CPU provider also rounds the activations to
# 8 bits, each block with a scale of its own; the CUDA provider ignores it. Without it every product first converts its
# weights to float32. Four blocks and the resampler at full width, CPU seconds per image (onnxruntime 1.32, AVX-512 with
# VNNI): int8 1.6 instead of 3.3, and 2.3 in float32; int4 2.1 instead of 2.3, for 40 % more memory.
INT8_ACTIVATIONS = 4
ALIGNMENT = 4096  # bytes: a page, as onnx.proto recommends for mmap


@dataclass(frozen=True)
class Precision:
    """One line of the table above. Make it with `Precision.of`."""

    dtype: str
    bits: int | None  # of the weights of matrix products; None: as `activations`
    block_size: int | None  # input features that share one scale and zero point
    activations: torch.dtype  # of matrix products and attention
    accuracy_level: int = 0  # of MatMulNBits: 0, or INT8_ACTIVATIONS

    @classmethod
    def of(cls, dtype: str, block_size: int | None = None) -> "Precision":
        """The precision called `dtype`; ConfigError if there is none or `block_size` does not go with it."""
        if dtype not in VIT_DTYPES:
            raise ConfigError(f"dtype is {dtype!r}, known are {', '.join(VIT_DTYPES)}")
        if block_size is not None and dtype not in BITS:
            raise ConfigError(f"block_size is {block_size}, but {dtype} has no blocks; leave it out or use int8, int4")
        if block_size is not None and block_size not in ALLOWED_BLOCK_SIZES:
            raise ConfigError(f"block_size is {block_size}, supported are {', '.join(map(str, ALLOWED_BLOCK_SIZES))}")
        activations = torch.float32 if dtype == "float32" else torch.float16
        level = INT8_ACTIVATIONS if dtype == "int8" else 0
        return cls(dtype, BITS.get(dtype), block_size or BLOCK_SIZES.get(dtype), activations, level)

    def product_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes of the weight of one matrix product."""
        if self.bits is None or self.block_size is None:
            return out_features * in_features * self.activations.itemsize
        blocks = -(-in_features // self.block_size)
        zeros = -(-blocks * self.bits // 8)
        return out_features * (blocks * (self.block_size * self.bits // 8 + self.activations.itemsize) + zeros)


def pack_blocks(weight: Tensor, *, bits: int, block_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Weight (N, K) float32 -> levels, scales, zero points as `com.microsoft.MatMulNBits` reads them.

        W[n, k] = (level[n, k] - zero[n, k // block_size]) * scale[n, k // block_size]

    levels (N, blocks, block_size · bits / 8) uint8, the lower bits first; scales (N, blocks) `dtype`;
    zero points (N, ⌈blocks · bits / 8⌉) uint8, packed alike. blocks = ⌈K / block_size⌉, the last one padded with W = 0.
    """
    top = 2**bits - 1
    blocks = F.pad(weight, (0, -weight.shape[1] % block_size)).unflatten(1, (-1, block_size))
    # 0 is always in the range, so that padding and zeros are exact
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    scales = ((high - low) / top).to(dtype)
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)  # all zeros, or too small for dtype
    zeros = (-low / scales.float()).round_().clamp_(0, top)  # with the scale as it is read back
    levels = (blocks / scales.float()[..., None]).add_(zeros[..., None]).round_().clamp_(0, top)
    return _pack_bits(levels.to(torch.uint8), bits), scales, _pack_bits(zeros.to(torch.uint8), bits)


def _pack_bits(levels: Tensor, bits: int) -> Tensor:
    """Levels (..., n) uint8 -> (..., ⌈n · bits / 8⌉) uint8, the lower bits first."""
    if bits == 8:
        return levels
    levels = F.pad(levels, (0, levels.shape[-1] % 2))
    return levels[..., ::2] | levels[..., 1::2] << 4


class ExternalData:
    """ONNX external data: tensors written one at a time to `file`, which the graph calls `location` (a bare file name).

    Layout (onnx.proto, "TensorProto.external_data"): raw little-endian values, row-major; the graph names file, offset
    and length of each tensor. Offsets are multiples of ALIGNMENT so that a runtime can map the file.
    """

    def __init__(self, file: BinaryIO, location: str):
        self._file, self._location, self._offset = file, location, 0

    def add(self, name: str, tensor: Tensor) -> TensorProto:
        """Write `tensor` (CPU; float32, float16 or uint8) and return the initializer that points to it."""
        array = tensor.contiguous().numpy()
        padding = -array.nbytes % ALIGNMENT
        self._file.write(array.data)
        self._file.write(bytes(padding))
        found = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape)
        found.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self._location), ("offset", self._offset), ("length", array.nbytes)):
            found.external_data.add(key=key, value=str(value))
        self._offset += array.nbytes + padding
        return found
