"""Tensor functions of qvl_edge: int4 and int8 GEMM and rotary attention. They know no model, no file and no config."""

from kernels.dispatch import (
    int4_gemm,
    int4_gemm_residual,
    int4_gemm_swiglu,
    int8_gemm,
    rms_rows,
    rotary_attention,
    rotary_attention_rows,
)
from kernels.int4_layout import Int4Weight, dequantize_gptq, pack_levels, unpack_levels
from kernels.int8_layout import Int8Weight, quantize_int8
from kernels.layout_cpu import CpuWeight, pack_for_cpu
from kernels.layout_triton import TritonWeight, interleave, pack_for_triton
from kernels.rows import Rows

__all__ = [
    "CpuWeight",
    "Int4Weight",
    "Int8Weight",
    "Rows",
    "TritonWeight",
    "dequantize_gptq",
    "int4_gemm",
    "int4_gemm_residual",
    "int4_gemm_swiglu",
    "int8_gemm",
    "interleave",
    "pack_for_cpu",
    "pack_for_triton",
    "pack_levels",
    "quantize_int8",
    "rms_rows",
    "rotary_attention",
    "rotary_attention_rows",
    "unpack_levels",
]
