"""com.microsoft.MatMulNBits of onnxruntime's CPU provider: a session of one node over weights that are in memory.

The operator has kernels for AVX2, AVX-512, VNNI, AMX and NEON (onnxruntime, docs/ContribOperators.md). Its weights are
external initializers, which the session packs for the machine's kernel and then lets go: 0.532 bytes a weight in
blocks of 128, where the same bytes inside the model would be kept twice (onnxruntime 1.32).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.sessions import session_options

Activations = Literal["float", "int8"]
BLOCKS = (128, 64, 32, 16)  # block sizes that the kernels are made for
_ACCURACY: dict[Activations, int] = {"float": 0, "int8": 4}  # the operator's accuracy_level
_FLOAT, _UINT8 = 1, 2  # onnx.TensorProto.DataType
_INT, _EXTERNAL = 2, 1  # onnx.AttributeProto.AttributeType, onnx.TensorProto.DataLocation
_IR_VERSION, _OPSET = 10, 21


class MatMulNBits:
    """y = x @ W.T with W[n, k] = (level[n, k] - zero[n, b]) * scale[n, b], b the block of channel k.

    levels (N, K) uint8, or with 4 bits (N, K / 2), the even channel in the low half of a byte; scales (N, B) float32;
    zeros (N, B) uint8 of 0 to 15, or None where every zero is the middle, 8 or 128. All may be freed afterwards.
    activations: x as it is, or each block of a row rounded to int8 for the product (accuracy_level 4).
    """

    def __init__(
        self, levels: Tensor, scales: Tensor, zeros: Tensor | None, *, bits: int = 4, activations: Activations = "float"
    ):
        import onnxruntime as ort

        self.out_features, self.in_features = levels.shape[0], levels.shape[1] * 8 // bits
        block = self.in_features // scales.shape[1]
        tensors = {"levels": levels.view(len(levels), -1, block * bits // 8), "scales": scales.flatten()}
        if zeros is not None:
            zeros = F.pad(zeros, (0, zeros.shape[1] % 2))
            tensors["zeros"] = (zeros[:, 0::2] | zeros[:, 1::2] << 4).flatten()
        options = session_options()
        values = [ort.OrtValue.ortvalue_from_numpy(tensor.contiguous().numpy()) for tensor in tensors.values()]
        options.add_external_initializers(list(tensors), values)
        self.nbytes = sum(tensor.nbytes for tensor in tensors.values())
        sizes = {"K": self.in_features, "N": self.out_features, "bits": bits, "block_size": block}
        model = _model(sizes | {"accuracy_level": _ACCURACY[activations]}, tensors)
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def __call__(self, x: Tensor) -> Tensor:
        """x (M, K) float32 -> (M, N) float32. Several threads may call at once."""
        x, y = x.contiguous(), x.new_empty(len(x), self.out_features)
        if len(x):
            binding = self._session.io_binding()
            binding.bind_input("x", "cpu", 0, _FLOAT, x.shape, x.data_ptr())
            binding.bind_output("y", "cpu", 0, _FLOAT, y.shape, y.data_ptr())
            self._session.run_with_iobinding(binding)
        return y


def block_size(group_size: int) -> int:
    """The largest of BLOCKS that divides groups of so many channels, a multiple of 16."""
    return next(block for block in BLOCKS if group_size % block == 0)


def _model(sizes: dict[str, int], tensors: dict[str, Tensor]) -> bytes:
    """An onnx.ModelProto of the one node. It is written here because the runtime does without the package onnx."""
    # NodeProto: 1 input, 2 output, 4 op_type, 5 attribute, 7 domain; AttributeProto: 1 name, 3 i, 20 type
    node = b"".join(_field(1, name) for name in ("x", *tensors)) + _field(2, "y") + _field(4, "MatMulNBits")
    node += _field(7, "com.microsoft")
    node += b"".join(_field(5, _field(1, name) + _field(3, n) + _field(20, _INT)) for name, n in sizes.items())
    # GraphProto: 1 node, 2 name, 5 initializer, 11 input, 12 output
    graph = _field(1, node) + _field(2, "graph")
    graph += b"".join(_field(5, _initializer(name, tensor)) for name, tensor in tensors.items())
    graph += _field(11, _matrix("x", sizes["K"])) + _field(12, _matrix("y", sizes["N"]))
    # ModelProto: 1 ir_version, 7 graph, 8 opset_import (1 domain, 2 version)
    opsets = _field(8, _field(1, "") + _field(2, _OPSET)) + _field(8, _field(1, "com.microsoft") + _field(2, 1))
    return _field(1, _IR_VERSION) + _field(7, graph) + opsets


def _initializer(name: str, tensor: Tensor) -> bytes:
    """TensorProto: 1 dims, 2 data_type, 8 name, 13 external_data (1 key, 2 value), 14 data_location."""
    dtype = _UINT8 if tensor.dtype == torch.uint8 else _FLOAT
    dims = b"".join(_field(1, size) for size in tensor.shape)
    location = _field(13, _field(1, "location") + _field(2, "in memory"))  # the session is given the values
    return dims + _field(2, dtype) + _field(8, name) + location + _field(14, _EXTERNAL)


def _matrix(name: str, columns: int) -> bytes:
    """ValueInfoProto of (rows, columns) float32: 1 name, 2 type (1 tensor_type: 1 elem_type, 2 shape)."""
    shape = _field(1, _field(2, "rows")) + _field(1, _field(1, columns))  # a dimension is 1 a number or 2 a name
    return _field(1, name) + _field(2, _field(1, _field(1, _FLOAT) + _field(2, shape)))


def _field(number: int, value: int | str | bytes) -> bytes:
    """A field of a protobuf message (protobuf.dev, Encoding): a varint, or bytes with their length."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    """Seven bits a byte, lowest first, the top bit set in all but the last."""
    data = bytearray()
    while value > 127:
        data.append(value & 127 | 128)
        value >>= 7
    return bytes([*data, value])
