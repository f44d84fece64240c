"""com.microsoft.MatMulNBits of onnxruntime's CPU provider: a session of one node over weights that are in memory.

The operator has kernels for AVX2, AVX-512, VNNI, AMX and NEON (onnxruntime, docs/ContribOperators.md). Its weights are
external initializers, which the session packs for the machine's kernel and then lets go: 0.532 bytes a weight in
blocks of 128, where the same bytes inside the model would be kept twice (onnxruntime 1.32).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.onnx_bytes import FLOAT, UINT8, one_node
from kernels.sessions import session_options

Activations = Literal["float", "int8"]
BLOCKS = (128, 64, 32, 16)  # block sizes that the kernels are made for
_ACCURACY: dict[Activations, int] = {"float": 0, "int8": 4}  # the operator's accuracy_level


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
        model = one_node(
            "MatMulNBits",
            {"x": (FLOAT, ("rows", self.in_features))},
            {"y": (FLOAT, ("rows", self.out_features))},
            initializers={
                name: (UINT8 if tensor.dtype == torch.uint8 else FLOAT, tensor.shape)
                for name, tensor in tensors.items()
            },
            attributes=sizes | {"accuracy_level": _ACCURACY[activations]},
            domain="com.microsoft",
        )
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def __call__(self, x: Tensor) -> Tensor:
        """x (M, K) float32 -> (M, N) float32. Several threads may call at once."""
        x, y = x.contiguous(), x.new_empty(len(x), self.out_features)
        if len(x):
            binding = self._session.io_binding()
            binding.bind_input("x", "cpu", 0, FLOAT, x.shape, x.data_ptr())
            binding.bind_output("y", "cpu", 0, FLOAT, y.shape, y.data_ptr())
            self._session.run_with_iobinding(binding)
        return y


def block_size(group_size: int) -> int:
    """The largest of BLOCKS that divides groups of so many channels, a multiple of 16."""
    return next(block for block in BLOCKS if group_size % block == 0)
