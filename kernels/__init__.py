"""Tensor functions of qvl_edge: int4 GEMM and rotary attention. They know no model, no file and no config."""

from kernels.dispatch import int4_gemm, rotary_attention
from kernels.int4_layout import Int4Weight, dequantize_gptq, pack_levels, unpack_levels
from kernels.int4_layout_cpu import CpuInt4Weight, pack_for_cpu

__all__ = [
    "CpuInt4Weight",
    "Int4Weight",
    "dequantize_gptq",
    "int4_gemm",
    "pack_for_cpu",
    "pack_levels",
    "rotary_attention",
    "unpack_levels",
]
