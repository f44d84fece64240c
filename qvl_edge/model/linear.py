"""The decoder's projections: float or GPTQ int4; and its head in int8."""

from torch import Tensor, nn

from qvl_edge.config import Config
from qvl_edge.options import Activations

try:
    from kernels import (
        Activations,
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


def packed(weight: Int4Weight | Int8Weight, activations: Activations) -> CpuWeight | TritonWeight:
    """In the order of the backend that its device takes; activations: of the CPU's."""
    return pack_for_cpu(weight, activations) if weight.device.type == "cpu" else pack_for_triton(weight)


class Int4Linear(nn.Module):
    """A projection in int4. It has no parameters: the loader sets `weight`, and `bias` unless it is zero.

    The constructor is nn.Linear's, whose `bias` says nothing here: the published layers all carry one.
    """

    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight: CpuWeight | TritonWeight | None = None
        self.register_buffer("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features) in x's dtype."""
        if self.weight is None:
            raise RuntimeError("Int4Linear has no weight yet; the loader sets it")
        return int4_gemm(x, self.weight, self.bias)


class Int8Linear(nn.Module):
    """lm_head in int8, one scale a row; its logits are float32."""

    def __init__(self, weight: Int8Weight, activations: Activations = "float"):
        super().__init__()
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.weight = packed(weight, activations)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features) float32."""
        rows = x.reshape(-1, self.in_features)
        # the kernel for CUDA takes float16: bfloat16 holds no 8-bit level exactly
        y = int8_gemm(rows.half() if rows.is_cuda else rows, self.weight)
        return y.view(*x.shape[:-1], self.out_features)


def linear_for(config: Config) -> type[nn.Linear] | type[Int4Linear]:
    """The class of this config's projections.

    GPTQ with 8 bits gets float layers: the loader dequantizes it, since the kernels are 4-bit ones.
    """
    quant = config.quantization
    return Int4Linear if quant is not None and quant.bits == 4 else nn.Linear
