"""The classes that the decoder's projections are built from: float, or GPTQ int4; and its head in int8."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qvl_edge.config import Config

try:
    from kernels import (
        CpuWeight,
        Int4Weight,
        Int8Weight,
        TritonWeight,
        int4_gemm,
        int8_gemm,
        pack_for_cpu,
        pack_for_triton,
    )
except ImportError as error:  # the Hugging Face package `kernels` shadows ours when both are installed
    import kernels

    raise ImportError(
        f"the package `kernels` at {getattr(kernels, '__file__', None)} is not qvl_edge's; another package of that "
        "name is installed. Uninstall it (pip uninstall kernels) and reinstall qvl_edge, or use a separate environment."
    ) from error


def read_gptq(
    tensors: dict[str, Tensor], *, name: str, dtype: torch.dtype, group_size: int, checkpoint_format: str
) -> tuple[Int4Weight, Tensor | None]:
    """A layer's tensors as read from disk -> its weight, and its bias in `dtype` or None where that is zero.

    auto-gptq writes a bias of zeros for layers that had none; adding it would only cost time. ValueError names `name`.
    """
    weight = Int4Weight.from_gptq(
        tensors["qweight"],
        tensors["qzeros"],
        tensors["scales"],
        tensors["g_idx"],
        group_size=group_size,
        checkpoint_format=checkpoint_format,
        name=name,
    )
    bias = tensors["bias"]
    if tuple(bias.shape) != (weight.out_features,):
        raise ValueError(f"{name}.bias has shape {tuple(bias.shape)}, expected ({weight.out_features},)")
    return weight, bias.to(dtype, copy=True) if bool(bias.any()) else None


class Int4Linear(nn.Module):
    """A projection whose weight is an Int4Weight; `bias` is always there, as auto-gptq writes one for every layer.

    State-dict keys are those of the published Int4 checkpoint (qweight, qzeros, scales, g_idx, bias); `load_gptq` takes
    them in and keeps the kernel order only.
    """

    def __init__(self, in_features: int, out_features: int, *, group_size: int, checkpoint_format: str = "gptq"):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.group_size, self.checkpoint_format = group_size, checkpoint_format
        self.weight: CpuWeight | TritonWeight | None = None
        self.register_buffer("bias", None)

    def load_gptq(self, tensors: dict[str, Tensor], *, name: str, dtype: torch.dtype) -> None:
        """Take qweight, qzeros, scales, g_idx and bias as read from disk; ValueError names `name` on a bad one."""
        weight, self.bias = read_gptq(
            tensors, name=name, dtype=dtype, group_size=self.group_size, checkpoint_format=self.checkpoint_format
        )
        if (weight.in_features, weight.out_features) != (self.in_features, self.out_features):
            raise ValueError(
                f"{name} is {weight.in_features} x {weight.out_features}, expected {self.in_features} x "
                f"{self.out_features} from config.json"
            )
        self.weight = pack_for_cpu(weight) if weight.device.type == "cpu" else pack_for_triton(weight)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features) in x's dtype."""
        if self.weight is None:
            raise RuntimeError("Int4Linear has no weight yet; load_gptq comes first")
        return int4_gemm(x, self.weight, self.bias)


class Int8Linear(nn.Module):
    """lm_head in int8, one scale a row; its logits are float32."""

    def __init__(self, weight: Int8Weight):
        super().__init__()
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.weight = pack_for_cpu(weight) if weight.device.type == "cpu" else pack_for_triton(weight)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features) float32."""
        rows = x.reshape(-1, self.in_features)
        # the kernel for CUDA takes float16: bfloat16 holds no 8-bit level exactly
        y = int8_gemm(rows.half() if rows.is_cuda else rows, self.weight)
        return y.view(*x.shape[:-1], self.out_features)


LinearClass = Callable[..., nn.Module]


def linear_for(config: Config) -> LinearClass:
    """The constructor (in_features, out_features, bias=...) of this config's projections.

    GPTQ with 8 bits is built from float layers: the loader dequantizes it, since the kernels are 4-bit ones.
    """
    quant = config.quantization
    if quant is None or quant.bits != 4:
        return nn.Linear

    def int4(in_features: int, out_features: int, bias: bool = True) -> nn.Module:
        del bias  # the published layers all carry one
        return Int4Linear(
            in_features, out_features, group_size=quant.group_size, checkpoint_format=quant.checkpoint_format
        )

    return int4
