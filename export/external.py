"""ONNX external data: weights in a file beside the graph, written one tensor at a time.

Layout (onnx.proto, "TensorProto.external_data"): raw little-endian values, row-major; the graph names file, offset and
length of each tensor. Offsets are multiples of ALIGNMENT so that a runtime can map the file.
"""

from typing import BinaryIO

import torch
from onnx import TensorProto
from torch import Tensor

ALIGNMENT = 4096  # bytes: a page, as onnx.proto recommends for mmap
ELEMENT_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.uint8: TensorProto.UINT8,
    torch.int64: TensorProto.INT64,
}


def padded(nbytes: int) -> int:
    """Bytes that a tensor of `nbytes` takes in the file."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class ExternalData:
    """Appends tensors to `file`, which the graph calls `location` (a bare file name). Holds none of them."""

    def __init__(self, file: BinaryIO, location: str):
        self._file, self._location, self._offset = file, location, 0

    def add(self, name: str, tensor: Tensor) -> TensorProto:
        """Write `tensor` (CPU; float32, float16 or uint8) and return the initializer that points to it."""
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        self._file.write(raw.data)
        self._file.write(bytes(padded(raw.nbytes) - raw.nbytes))
        found = TensorProto(name=name, data_type=ELEMENT_TYPES[tensor.dtype], dims=tensor.shape)
        found.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self._location), ("offset", self._offset), ("length", raw.nbytes)):
            found.external_data.add(key=key, value=str(value))
        self._offset += padded(raw.nbytes)
        return found
