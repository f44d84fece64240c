"""int4_gemm, its fused forms, int8_gemm and rotary_attention: check shapes once, choose a backend, call it."""

import importlib
import os
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kernels.int4_gemm_cpu import gemm_cpu
from kernels.int4_gemm_torch import (
    int4_gemm_residual_torch,
    int4_gemm_swiglu_torch,
    int4_gemm_torch,
    int8_gemm_torch,
)
from kernels.int4_layout import Int4Weight
from kernels.int8_layout import Int8Weight
from kernels.layout_cpu import CpuWeight
from kernels.layout_triton import TritonWeight
from kernels.rotary_attention_torch import rotary_attention_torch
from kernels.rows import MOST_SUMMED, SPAN, Rows, rms_rows_torch, sum_rows_torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
AnyInt4Weight: TypeAlias = Int4Weight | CpuWeight | TritonWeight
AnyWeight: TypeAlias = AnyInt4Weight | Int8Weight
# the weight that each backend reads
ORDERS = {"torch": (Int4Weight, Int8Weight), "cpu": (CpuWeight,), "triton": (TritonWeight,)}
FUSED = ("torch", "triton")  # backends of the fused forms


def int4_gemm(
    x: Tensor | Rows, weight: AnyInt4Weight, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """x @ W.T + bias with W in int4: x (..., K) float32, bfloat16 or float16 -> (..., N) in x's dtype.

    bias (N,) in any float dtype, or None. Sums are in float32 in every backend. x may be Rows, whose row factor is
    multiplied in before the bias.

    backend "torch" is the definition, on any device: it builds the whole float32 weight at each call. "cpu" reads a
    weight that `pack_for_cpu` put into the CPU's order, and agrees with the definition to float32 rounding. "triton"
    reads one by `pack_for_triton`, float16 or bfloat16 x. None takes "triton" on CUDA and, on the CPU, "cpu" for a
    weight in the CPU's order and "torch" for an Int4Weight.

    ValueError for shapes, dtypes or devices that do not fit, naming both, and for a weight in another backend's order.
    """
    rows = x if isinstance(x, Rows) else Rows(x)
    _check_int4("int4_gemm", rows, weight, bias)
    backend = _backend("int4_gemm", rows.x, weight, backend)
    if backend == "triton":
        gemm = _gemm_triton(rows.x)
        flat = Rows(rows.x.reshape(-1, weight.in_features), rows.sums, rows.squares, rows.eps)
        with torch.cuda.device_of(flat.x):  # Triton launches on the current device, wherever the tensors are
            y: Tensor = gemm.gemm_triton(flat, weight, bias).x
        return y.view(*rows.x.shape[:-1], weight.out_features)
    if backend == "torch":
        return int4_gemm_torch(rows, _unpacked(weight), bias)
    if rows.squares is not None:
        raise ValueError('backend "cpu" takes a tensor or Rows without squares; multiply by rows.rsqrt() yourself')
    assert isinstance(weight, CpuWeight)  # as _backend made sure
    return gemm_cpu(rows.x, weight, bias)


def int4_gemm_swiglu(
    rows: Rows, weight: AnyInt4Weight, bias: Tensor | None = None, *, backend: str | None = None
) -> Rows:
    """w1(x) * silu(w2(x)) in one product: rows (M, K), weight = interleave(w1, w2) of 2 N outputs -> Rows (M, N).

    bias (2 N,) is interleaved likewise. Triton: N a multiple of 32. Errors and `backend` as in int4_gemm, without
    "cpu".
    """
    _check_int4("int4_gemm_swiglu", rows, weight, bias)
    _check_matrix(rows.x)
    backend = _backend("int4_gemm_swiglu", rows.x, weight, backend, FUSED)
    if backend != "triton":
        return int4_gemm_swiglu_torch(rows, _unpacked(weight), bias)
    _check_spans("int4_gemm_swiglu", weight.out_features // 2)
    gemm = _gemm_triton(rows.x)
    with torch.cuda.device_of(rows.x):
        return gemm.gemm_triton(rows, weight, bias, epilogue=gemm.SWIGLU)


def int4_gemm_residual(
    rows: Rows,
    weight: AnyInt4Weight,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    *,
    backend: str | None = None,
) -> Rows:
    """residual (M, N) float32 += x @ W.T + bias, in place; returns the new residual's Rows for the next projection.

    Their x is residual * norm_weight (N,) in rows.x's dtype, with the row factor of RMSNorm (`eps`) left to the next
    kernel: x has to stay below 65,504 in float16. Triton: N a multiple of 32. Errors and `backend` as in int4_gemm,
    without "cpu".
    """
    _check_int4("int4_gemm_residual", rows, weight, bias)
    _check_matrix(rows.x)
    _check_residual(residual, norm_weight, (len(rows.x), weight.out_features))
    backend = _backend("int4_gemm_residual", rows.x, weight, backend, FUSED)
    if backend != "triton":
        return int4_gemm_residual_torch(rows, _unpacked(weight), bias, residual, norm_weight, eps)
    _check_spans("int4_gemm_residual", weight.out_features)
    gemm = _gemm_triton(rows.x)
    with torch.cuda.device_of(rows.x):
        return gemm.gemm_triton(
            rows, weight, bias, epilogue=gemm.RESIDUAL, residual=residual, norm_weight=norm_weight, eps=eps
        )


def rms_rows(
    residual: Tensor, norm_weight: Tensor, eps: float, dtype: torch.dtype, *, backend: str | None = None
) -> Rows:
    """The Rows of a residual (M, K) float32 that no kernel has made yet: x = residual * norm_weight in `dtype`."""
    _check_residual(residual, norm_weight, tuple(residual.shape))
    if backend == "triton" or (backend is None and residual.is_cuda):
        _check_spans("rms_rows", residual.shape[1])
        with torch.cuda.device_of(residual):
            return _load_triton("kernels.rows_triton", residual).rms_rows_triton(residual, norm_weight, eps, dtype)
    if backend not in (None, "torch"):
        raise ValueError(f'backend is {backend!r}, rms_rows has "torch" and "triton"')
    return rms_rows_torch(residual, norm_weight, eps, dtype)


def int8_gemm(x: Tensor, weight: Int8Weight | CpuWeight | TritonWeight, *, backend: str | None = None) -> Tensor:
    """x @ W.T with W in int8, one scale a row: x (M, K) -> (M, N) float32; sums in float32.

    "torch" (the definition) and "cpu" take any float dtype, "triton" float16, 16 rows at a time, as it is for the last
    position of a few sequences. Errors and `backend` as in int4_gemm.
    """
    _check_x(x, weight)
    _check_matrix(x)
    if not isinstance(weight, Int8Weight) and weight.bits != 8:
        raise ValueError(f"weight has {weight.bits} bits, int8_gemm takes 8; use int4_gemm")
    backend = _backend("int8_gemm", x, weight, backend)
    if backend == "torch":
        unpacked = weight if isinstance(weight, Int8Weight) else weight.unpack()
        assert isinstance(unpacked, Int8Weight)  # 8 bits, as checked
        return int8_gemm_torch(x, unpacked)
    if isinstance(weight, CpuWeight):
        return gemm_cpu(x.float(), weight)
    if x.dtype != torch.float16:
        raise ValueError(f"x is {x.dtype}, the int8 kernel takes torch.float16: bfloat16 holds no 8-bit level exactly")
    gemm = _gemm_triton(x)
    with torch.cuda.device_of(x):
        parts = [gemm.gemm_triton(Rows(part), weight, out_dtype=torch.float32).x for part in x.split(MOST_SUMMED)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _gemm_triton(x: Tensor) -> Any:
    """The module with the GPU kernels, loaded at first use."""
    return _load_triton("kernels.int4_gemm_triton", x)


def _load_triton(module: str, tensor: Tensor) -> Any:
    """Import a *_triton module; ValueError where its kernels cannot run on `tensor`'s device."""
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f'backend "triton" runs on CUDA, x is on {tensor.device}; move it there, or set TRITON_INTERPRET=1 before '
            "triton is loaded to run the kernels in its (very slow) interpreter"
        )
    return importlib.import_module(module)


def _backend(
    function: str, x: Tensor, weight: AnyWeight, backend: str | None, known: tuple[str, ...] = tuple(ORDERS)
) -> str:
    """The backend to use: chosen by device and by the order that the weight is in, never by what might work."""
    order = next(name for name, kind in ORDERS.items() if isinstance(weight, kind))
    if backend is None:
        backend = "triton" if x.is_cuda else order
        if backend == "triton" and not x.is_cuda:
            raise ValueError(
                f"{function} got a weight in Triton's order on the {x.device}; use pack_for_cpu for the CPU, or say "
                'backend="triton" (interpreter) or backend="torch" (slow definition)'
            )
    if backend not in known:
        raise ValueError(f"backend is {backend!r}, {function} has {' and '.join(map(repr, known))}")
    if backend not in ("torch", order):
        raise ValueError(
            f'backend "{backend}" reads a weight that was packed once: weight = pack_for_{backend}(weight)'
        )
    if backend == "triton" and x.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"x is {x.dtype}, the Triton kernels take torch.float16 and torch.bfloat16")
    return backend


def _unpacked(weight: AnyInt4Weight) -> Int4Weight:
    if isinstance(weight, Int4Weight):
        return weight
    unpacked = weight.unpack()
    assert isinstance(unpacked, Int4Weight)  # 4 bits, as _check_int4 made sure
    return unpacked


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
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    locks: Tensor | None = None,
    backend: str | None = None,
    splits: int | None = None,
) -> Tensor:
    """Rotate q and k, append k and v to the caches, attend causally to all that each sequence has cached.

    q, k, v (B, T, H, D) in one float dtype, unrotated, views of one (B, T, 3, H, D) or not; cos, sin (B, T, D) float32,
    both halves of a head filled (the angles of pair i stand at i and i + D / 2); k_cache, v_cache (B, H, capacity, D),
    rotated keys, written in place, in a float dtype, or int8 with k_scales, v_scales (B, H, capacity) float16
    (cache_rows.py); start (B,) int64 on the device: tokens already in each sequence's cache, so token t of sequence b
    gets position start[b] + t and sees positions up to its own; q_scale (B, T) float32 multiplies each token's query
    (log-n scaling). Logits are scaled by 1 / sqrt(D). Returns (B, T, H, D) in q's dtype.

    backend "torch" is the definition, on any device; "triton" takes float16 and bfloat16; None: "triton" on CUDA, else
    "torch". Triton never waits for the device, so whether the positions fit is for the caller to check: a sequence
    that does not fit gets NaN and writes nothing. One token is one launch, which splits each head's cache into
    `splits` shares (None: by capacity and device) and counts them in `locks` (B * H,) int32, zeros before and after
    and used by one call at a time (None: allocated).

    ValueError for shapes, dtypes or devices that do not fit and, from "torch", for positions beyond the capacity,
    naming both numbers.
    """
    scales = _check_attention(q, k, v, cos, sin, k_cache, v_cache, start, q_scale, k_scales, v_scales, locks)
    if _attention_backend("rotary_attention", q, backend) == "torch":
        _check_positions(q, k_cache, start)
        return rotary_attention_torch(q, k, v, cos, sin, k_cache, v_cache, start, q_scale=q_scale, **scales)
    kernels = _load_triton("kernels.rotary_attention_triton", q)
    with torch.cuda.device_of(q):
        attention: Tensor = kernels.rotary_attention_triton(
            q, k, v, cos, sin, k_cache, v_cache, start, q_scale=q_scale, **scales, locks=locks, splits=splits
        )
    return attention


def rotary_attention_rows(
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
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    locks: Tensor | None = None,
    backend: str | None = None,
    splits: int | None = None,
) -> Rows:
    """rotary_attention of one token of up to 16 sequences, as Rows (B, H * D) with the sums that int4_gemm needs.

    ValueError as there, and for more tokens, more sequences or a head size that 32 does not divide.
    """
    scales = _check_attention(q, k, v, cos, sin, k_cache, v_cache, start, q_scale, k_scales, v_scales, locks)
    batch, length, heads, dim = q.shape
    if length != 1 or batch > MOST_SUMMED or dim % SPAN:
        raise ValueError(
            f"q has shape {tuple(q.shape)}, rotary_attention_rows takes (B, 1, H, D) with B of {MOST_SUMMED} or less "
            f"and D a multiple of {SPAN}; use rotary_attention"
        )
    if _attention_backend("rotary_attention_rows", q, backend) == "torch":
        _check_positions(q, k_cache, start)
        x = rotary_attention_torch(q, k, v, cos, sin, k_cache, v_cache, start, q_scale=q_scale, **scales)
        x = x.reshape(batch, heads * dim)
        return Rows(x, sum_rows_torch(x))
    sums = torch.empty(heads * dim // SPAN, MOST_SUMMED, dtype=torch.float32, device=q.device)
    kernels = _load_triton("kernels.rotary_attention_triton", q)
    with torch.cuda.device_of(q):
        x = kernels.rotary_attention_triton(
            q, k, v, cos, sin, k_cache, v_cache, start, q_scale=q_scale, **scales, locks=locks, splits=splits, sums=sums
        )
    return Rows(x.view(batch, heads * dim), sums)


def _attention_backend(function: str, q: Tensor, backend: str | None) -> str:
    if backend not in (None, "torch", "triton"):
        raise ValueError(f'backend is {backend!r}, {function} has "torch" and "triton"')
    return backend or ("triton" if q.is_cuda else "torch")


def _check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    start: Tensor,
    q_scale: Tensor | None,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    locks: Tensor | None,
) -> dict[str, Tensor | None]:
    """Everything but where the sequences stand; returns the two scales by name."""
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
    wanted = {"k": q.dtype, "v": q.dtype, "cos": torch.float32, "sin": torch.float32, "start": torch.int64}
    optional = {
        "q_scale": (q_scale, (batch, length), torch.float32),
        "k_scales": (k_scales, cache[:3], torch.float16),
        "v_scales": (v_scales, cache[:3], torch.float16),
        "locks": (locks, (batch * heads,), torch.int32),
    }
    if locks is not None and not locks.is_contiguous():
        raise ValueError(f"locks has strides {locks.stride()}, expected (1,)")
    for name, (tensor, shape, dtype) in optional.items():
        if tensor is not None:
            expected[name], wanted[name] = (tensor, shape), dtype
    for name, (tensor, shape) in expected.items():
        _check_shape(name, tensor, shape, like_q)
        _check_device(name, tensor, "q", q.device)
    for name, dtype in wanted.items():
        if expected[name][0].dtype != dtype:
            raise ValueError(f"{name} is {expected[name][0].dtype}, expected {dtype}")
    for name in ("k_cache", "v_cache"):
        scales = f"{name[0]}_scales"
        if expected[name][0].dtype != torch.int8:
            _check_float(name, expected[name][0])
        if (expected[name][0].dtype == torch.int8) != (scales in expected):
            given = "given" if scales in expected else "missing"
            raise ValueError(f"{name} is {expected[name][0].dtype} but {scales} is {given}; an int8 cache has scales")
    if k_cache.dtype != v_cache.dtype and torch.int8 in (k_cache.dtype, v_cache.dtype):
        raise ValueError(f"k_cache is {k_cache.dtype} but v_cache is {v_cache.dtype}; both are int8 or none")
    return {"k_scales": k_scales, "v_scales": v_scales}


def _check_positions(q: Tensor, k_cache: Tensor, start: Tensor) -> None:
    """Waits for the device."""
    length, capacity = q.shape[1], k_cache.shape[2]
    if len(start) and not 0 <= int(start.min()) <= int(start.max()) <= capacity - length:
        raise ValueError(
            f"start lies in [{int(start.min())}, {int(start.max())}] and {length} tokens are appended, but the cache "
            f"holds positions 0 to {capacity - 1}; shorten the prompt or make the cache larger"
        )


def _check_int4(function: str, rows: Rows, weight: AnyInt4Weight, bias: Tensor | None) -> None:
    if not isinstance(weight, Int4Weight) and weight.bits != 4:
        raise ValueError(f"weight has {weight.bits} bits, {function} takes 4; use int8_gemm")
    _check_x(rows.x, weight)
    if bias is not None:
        _check_shape("bias", bias, (weight.out_features,), f"weight holds N={weight.out_features}")
        _check_device("bias", bias, "weight", weight.device)
        if not bias.is_floating_point():
            raise ValueError(f"bias is {bias.dtype}, expected a floating type")


def _check_x(x: Tensor, weight: AnyWeight) -> None:
    _check_float("x", x)
    if x.dim() == 0 or x.shape[-1] != weight.in_features:
        size = x.shape[-1] if x.dim() else "no"
        raise ValueError(f"x has K={size} (shape {tuple(x.shape)}) but weight holds K={weight.in_features}")
    _check_device("x", x, "weight", weight.device)


def _check_matrix(x: Tensor) -> None:
    if x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (M, {x.shape[-1]})")


def _check_residual(residual: Tensor, norm_weight: Tensor, shape: tuple[int, ...]) -> None:
    _check_shape("residual", residual, shape, "the rows of x by the outputs of weight")
    if residual.dim() != 2 or residual.dtype != torch.float32 or not residual.is_contiguous():
        raise ValueError(
            f"residual is {residual.dtype} of shape {tuple(residual.shape)} and strides {residual.stride()}, expected "
            "a contiguous matrix of torch.float32"
        )
    _check_shape("norm_weight", norm_weight, shape[1:], f"residual has shape {shape}")
    _check_device("norm_weight", norm_weight, "residual", residual.device)


def _check_spans(function: str, outputs: int) -> None:
    if outputs % SPAN:
        raise ValueError(f"{function} in Triton makes sums over {SPAN} channels, which do not divide {outputs}")


def _check_float(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name} is {tensor.dtype}, expected one of {', '.join(map(str, FLOATS))}")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], because: str) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}: {because}")


def _check_device(name: str, tensor: Tensor, other: str, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device} but {other} is on {device}; move one of them")
