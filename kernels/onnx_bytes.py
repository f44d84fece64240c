"""An ONNX model of one node as bytes: the runtime does without the package onnx (onnx/onnx.proto names the fields)."""

from collections.abc import Mapping, Sequence

FLOAT, UINT8, INT8, INT32 = 1, 2, 3, 6  # onnx.TensorProto.DataType
_INT, _EXTERNAL = 2, 1  # onnx.AttributeProto.AttributeType, onnx.TensorProto.DataLocation
_IR_VERSION, _OPSET = 10, 21
Tensors = Mapping[str, tuple[int, Sequence[int | str]]]
"""Data type and shape of each tensor by its name; a dimension is a number or a name."""


def one_node(
    op: str,
    inputs: Tensors,
    outputs: Tensors,
    *,
    initializers: Tensors | None = None,
    attributes: Mapping[str, int] | None = None,
    domain: str = "",
) -> bytes:
    """A ModelProto of node `op`. Its last inputs are `initializers`, whose values the session is given."""
    initializers, attributes = initializers or {}, attributes or {}
    # NodeProto: 1 input, 2 output, 4 op_type, 5 attribute, 7 domain; AttributeProto: 1 name, 3 i, 20 type
    node = b"".join(_field(1, name) for name in (*inputs, *initializers)) + b"".join(_field(2, y) for y in outputs)
    node += _field(4, op) + _field(7, domain)
    node += b"".join(_field(5, _field(1, name) + _field(3, n) + _field(20, _INT)) for name, n in attributes.items())
    # GraphProto: 1 node, 2 name, 5 initializer, 11 input, 12 output
    graph = _field(1, node) + _field(2, "graph")
    graph += b"".join(_field(5, _initializer(name, *kind)) for name, kind in initializers.items())
    for number, tensors in ((11, inputs), (12, outputs)):
        graph += b"".join(_field(number, _value(name, *kind)) for name, kind in tensors.items())
    # ModelProto: 1 ir_version, 7 graph, 8 opset_import (1 domain, 2 version)
    opsets = _field(8, _field(1, "") + _field(2, _OPSET)) + _field(8, _field(1, "com.microsoft") + _field(2, 1))
    return _field(1, _IR_VERSION) + _field(7, graph) + opsets


def _initializer(name: str, dtype: int, shape: Sequence[int | str]) -> bytes:
    """TensorProto: 1 dims, 2 data_type, 8 name, 13 external_data (1 key, 2 value), 14 data_location."""
    dims = b"".join(_field(1, size) for size in shape)
    location = _field(13, _field(1, "location") + _field(2, "in memory"))
    return dims + _field(2, dtype) + _field(8, name) + location + _field(14, _EXTERNAL)


def _value(name: str, dtype: int, shape: Sequence[int | str]) -> bytes:
    """ValueInfoProto: 1 name, 2 type (1 tensor_type: 1 elem_type, 2 shape)."""
    dims = b"".join(_field(1, _field(1 if isinstance(size, int) else 2, size)) for size in shape)
    return _field(1, name) + _field(2, _field(1, _field(1, dtype) + _field(2, dims)))


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
