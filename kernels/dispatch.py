"""int4_gemm and rotary_attention: check shapes once, choose a backend, call it."""

import torch
from torch import Tensor

from kernels.int4_gemm_cpu import int4_gemm_cpu
from kernels.int4_gemm_torch import int4_gemm_torch
from kernels.int4_layout import Int4Weight
from kernels.int4_layout_cpu import CpuInt4Weight
from kernels.rotary_attention_torch import rotary_attention_torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def int4_gemm(
    x: Tensor, weight: Int4Weight | CpuInt4Weight, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """x @ W.T + bias with W in int4: x (..., K) float32, bfloat16 or float16 -> (..., N) in x's dtype.

    bias (N,) in any float dtype, or None. Sums are in float32 in every backend.

    backend "torch" is the definition, on any device: it builds the whole float32 weight at each call. "cpu" reads a
    weight that `pack_for_cpu` put into the CPU's order, and agrees with the definition to float32 rounding. None takes
    "cpu" for such a weight, and "torch" for another one on the CPU.

    ValueError for shapes, dtypes or devices that do not fit, naming both; NotImplementedError for CUDA tensors with
    backend None, since this version has no kernel for them.
    """
    _check_float("x", x)
    if x.dim() == 0 or x.shape[-1] != weight.in_features:
        size = x.shape[-1] if x.dim() else "no"
        raise ValueError(f"x has K={size} (shape {tuple(x.shape)}) but weight holds K={weight.in_features}")
    _check_device("x", x, "weight", weight.device)
    if bias is not None:
        _check_shape("bias", bias, (weight.out_features,), f"weight holds N={weight.out_features}")
        _check_device("bias", bias, "weight", weight.device)
        if not bias.is_floating_point():
            raise ValueError(f"bias is {bias.dtype}, expected a floating type")
    if backend is None:
        _check_not_cuda("int4_gemm", x)
        backend = "cpu" if isinstance(weight, CpuInt4Weight) else "torch"
    if backend == "torch":
        return int4_gemm_torch(x, weight.unpack() if isinstance(weight, CpuInt4Weight) else weight, bias)
    if backend == "cpu":
        if not isinstance(weight, CpuInt4Weight):
            raise ValueError('backend "cpu" reads a weight that was packed once: weight = pack_for_cpu(weight)')
        return int4_gemm_cpu(x, weight, bias)
    raise ValueError(f'backend is {backend!r}, int4_gemm has "torch" and "cpu"')


def rotary_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    start: Tensor,
    *,
    q_scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Rotate q and k, append k and v to the caches, attend causally to all that each sequence has cached.

    q, k, v (B, T, H, D) in one float dtype, unrotated; cos, sin (B, T, D) float32, both halves of a head filled (the
    angles of pair i stand at i and i + D / 2); k_cache, v_cache (B, H, capacity, D), rotated keys, written in place;
    start (B,) int64 on the device: tokens already in each sequence's cache, so token t of sequence b gets position
    start[b] + t and sees positions up to its own; q_scale (B, T) float32 multiplies each token's query (log-n scaling).
    Logits are scaled by 1 / sqrt(D). Returns (B, T, H, D) in q's dtype. backend None or "torch": the definition.

    ValueError for shapes, dtypes or devices that do not fit and for positions beyond the capacity, naming both numbers;
    NotImplementedError for CUDA tensors with backend None, since this version has no kernel for them.
    """
    _check_float("q", q)
    if q.dim() != 4 or q.shape[1] == 0 or q.shape[3] % 2:
        raise ValueError(f"q has shape {tuple(q.shape)}, expected (B, T, H, D) with T of 1 or more and D even")
    batch, length, heads, dim = q.shape
    capacity = k_cache.shape[2] if k_cache.dim() == 4 else 0
    like_q = f"q has shape {tuple(q.shape)}"
    cache = (batch, heads, capacity, dim)
    expected = {
        "k": (k, (batch, length, heads, dim)),
        "v": (v, (batch, length, heads, dim)),
        "cos": (cos, (batch, length, dim)),
        "sin": (sin, (batch, length, dim)),
        "k_cache": (k_cache, cache),
        "v_cache": (v_cache, cache),
        "start": (start, (batch,)),
    }
    if q_scale is not None:
        expected["q_scale"] = (q_scale, (batch, length))
    for name, (tensor, shape) in expected.items():
        _check_shape(name, tensor, shape, like_q)
        _check_device(name, tensor, "q", q.device)
    for name, wanted in {"k": q.dtype, "v": q.dtype, "cos": torch.float32, "sin": torch.float32}.items():
        if expected[name][0].dtype != wanted:
            raise ValueError(f"{name} is {expected[name][0].dtype}, expected {wanted}")
    for name in ("k_cache", "v_cache"):
        _check_float(name, expected[name][0])
    if start.dtype != torch.int64:
        raise ValueError(f"start is {start.dtype}, expected torch.int64")
    if batch and not 0 <= int(start.min()) <= int(start.max()) <= capacity - length:
        raise ValueError(
            f"start lies in [{int(start.min())}, {int(start.max())}] and {length} tokens are appended, but the cache "
            f"holds positions 0 to {capacity - 1}; shorten the prompt or make the cache larger"
        )
    if backend is None:
        _check_not_cuda("rotary_attention", q)
    elif backend != "torch":
        raise ValueError(f'backend is {backend!r}, rotary_attention has "torch"')
    return rotary_attention_torch(q, k, v, cos, sin, k_cache, v_cache, start, q_scale=q_scale)


def _check_float(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name} is {tensor.dtype}, expected one of {', '.join(map(str, FLOATS))}")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], because: str) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}: {because}")


def _check_device(name: str, tensor: Tensor, other: str, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device} but {other} is on {device}; move one of them")


def _check_not_cuda(function: str, tensor: Tensor) -> None:
    if tensor.is_cuda:
        raise NotImplementedError(
            f"{function} has no triton kernel for CUDA tensors in this version; move the model to the CPU, or pass "
            'backend="torch" for the slow definition'
        )
