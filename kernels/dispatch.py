"""int4_gemm and rotary_attention: check shapes once, choose a backend, call it."""

from torch import Tensor

from kernels.int4_gemm_torch import int4_gemm_torch
from kernels.int4_layout import Int4Weight
from kernels.rotary_attention_torch import rotary_attention_torch


def int4_gemm(x: Tensor, weight: Int4Weight, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    return int4_gemm_torch(x, weight, bias)


def rotary_attention(q,k,v,cos,sin,k_cache,v_cache,start,*,q_scale=None,backend=None):
    return rotary_attention_torch(q, k, v, cos, sin, k_cache, v_cache, start, q_scale=q_scale)
