"""Tensor functions of qvl_edge: int4 and int8 GEMM and rotary attention. They know no model, no file and no config."""

import os

from kernels.cpu import CpuWeight, pack_for_cpu
from kernels.cpu_attention import BLOCK
from kernels.gptq import Int4Weight, check_gptq, dequantize_gptq, pack_levels, pack_zeros, unpack_levels, unpack_zeros
from kernels.gpu.weight import TritonWeight, interleave, pack_for_triton
from kernels.int8 import Int8Weight, dequantize_rows, quantize_int8, quantize_rows
from kernels.matmul_nbits import Activations
from kernels.ops import (
    int4_gemm,
    int4_gemm_residual,
    int4_gemm_swiglu,
    int8_gemm,
    rms_rows,
    rotary_attention,
    rotary_attention_rows,
)
from kernels.reference import MAX_DECODE_ROWS, AttentionArgs, Rows, rotate

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime writes a device id and events where it is imported
os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # read as torch loads: its waiting threads would take onnxruntime's cores

__all__ = [
    "BLOCK",
    "MAX_DECODE_ROWS",
    "Activations",
    "AttentionArgs",
    "CpuWeight",
    "Int4Weight",
    "Int8Weight",
    "Rows",
    "TritonWeight",
    "check_gptq",
    "dequantize_gptq",
    "dequantize_rows",
    "int4_gemm",
    "int4_gemm_residual",
    "int4_gemm_swiglu",
    "int8_gemm",
    "interleave",
    "pack_for_cpu",
    "pack_for_triton",
    "pack_levels",
    "pack_zeros",
    "quantize_int8",
    "quantize_rows",
    "rms_rows",
    "rotary_attention",
    "rotary_attention_rows",
    "rotate",
    "unpack_levels",
    "unpack_zeros",
]
