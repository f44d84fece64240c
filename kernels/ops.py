"""int4_gemm, its fused forms, int8_gemm and rotary_attention: check the operands once, choose a backend, call it."""

import importlib
import os
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kernels import reference
from kernels.cpu import CpuWeight, gemm_cpu
from kernels.cpu_attention import attention_cpu
from kernels.gptq import Int4Weight
from kernels.gpu.weight import TritonWeight
from kernels.int8 import Int8Weight
from kernels.reference import MAX_DECODE_ROWS, SPAN, AttentionArgs, Rows

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
AnyInt4Weight: TypeAlias = Int4Weight | CpuWeight | TritonWeight
AnyWeight: TypeAlias = AnyInt4Weight | Int8Weight
# the weights that each backend reads
BACKENDS = {"torch": (Int4Weight, Int8Weight), "cpu": (CpuWeight,), "triton": (TritonWeight,)}
FUSED = ("torch", "triton")  # backends of everything but int4_gemm and int8_gemm
# their modules in kernels.gpu
LAUNCHERS = {"gemm_triton": "gemm", "rows_triton": "gemm", "attention_triton": "attention"}


def int4_gemm(
    x: Tensor | Rows, weight: AnyInt4Weight, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """x @ W.T + bias with W in int4: x (..., K) float32, bfloat16 or float16 -> (..., N) in x's dtype.

    bias (N,) in any float dtype, or None. Sums are in float32 in every backend. x may be Rows, whose row factor is
    multiplied in before the bias.

    backend "torch" is the definition, on any device: it builds the whole float32 weight at each call. "cpu" reads a
    weight packed by `pack_for_cpu`, and agrees with the definition to float32 rounding. "triton" reads one packed by
    `pack_for_triton`, with float16 or bfloat16 x. None: "triton" on CUDA; on the CPU "cpu" for a CpuWeight and "torch"
    for an Int4Weight.

    ValueError for shapes, dtypes or devices that do not fit, naming both, and for a weight packed for another backend.
    """
    rows = x if isinstance(x, Rows) else Rows(x)
    if _int4_backend("int4_gemm", rows, weight, bias, backend) == "torch":
        return reference.int4_gemm(rows, weight, bias)
    if isinstance(weight, CpuWeight):
        if rows.squares is not None:
            raise ValueError('backend "cpu" takes a tensor or Rows without squares; multiply by rows.rsqrt() yourself')
        return gemm_cpu(rows.x, weight, bias)
    flat = replace(rows, x=rows.x.reshape(-1, weight.in_features))
    return _launch("gemm_triton", flat.x, flat, weight, bias).x.view(*rows.x.shape[:-1], weight.out_features)


def int4_gemm_swiglu(
    rows: Rows, weight: AnyInt4Weight, bias: Tensor | None = None, *, backend: str | None = None
) -> Rows:
    """w1(x) * silu(w2(x)) in one product: rows (M, K), weight = interleave(w1, w2) of 2 N outputs -> Rows (M, N).

    bias (2 N,) is interleaved likewise. Triton: N a multiple of 32. Errors and `backend` as in int4_gemm, without
    "cpu".
    """
    if _int4_backend("int4_gemm_swiglu", rows, weight, bias, backend) == "torch":
        return reference.int4_gemm_swiglu(rows, weight, bias)
    _check_spans("int4_gemm_swiglu", weight.out_features // 2)
    return _launch("gemm_triton", rows.x, rows, weight, bias, epilogue="swiglu")


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
    backend = _int4_backend("int4_gemm_residual", rows, weight, bias, backend)
    _check_residual(residual, norm_weight, (len(rows.x), weight.out_features), rows.x.device)
    if backend == "torch":
        return reference.int4_gemm_residual(rows, weight, bias, residual, norm_weight, eps)
    _check_spans("int4_gemm_residual", weight.out_features)
    options = {"epilogue": "residual", "residual": residual, "norm_weight": norm_weight, "eps": eps}
    return _launch("gemm_triton", rows.x, rows, weight, bias, **options)


def rms_rows(
    residual: Tensor, norm_weight: Tensor, eps: float, dtype: torch.dtype, *, backend: str | None = None
) -> Rows:
    """The Rows of a residual (M, K) float32 that no kernel has made yet: x = residual * norm_weight in `dtype`."""
    _check_residual(residual, norm_weight, tuple(residual.shape), residual.device)
    if _weightless_backend("rms_rows", residual, backend) == "torch":
        return reference.rms_rows(residual, norm_weight, eps, dtype)
    _check_spans("rms_rows", residual.shape[1])
    return _launch("rows_triton", residual, residual, norm_weight, eps, dtype)


def int8_gemm(x: Tensor, weight: Int8Weight | CpuWeight | TritonWeight, *, backend: str | None = None) -> Tensor:
    """x @ W.T with W in int8, one scale a row: x (M, K) -> (M, N) float32; sums in float32.

    "torch" (the definition) and "cpu" take any float dtype, "triton" float16, 16 rows at a time, as it is for the last
    position of a few sequences. Errors and `backend` as in int4_gemm.
    """
    _check_x(x, weight)
    _check_matrix(x)
    if weight.bits != 8:
        raise ValueError(f"weight has {weight.bits} bits, int8_gemm takes 8; use int4_gemm")
    backend = _backend("int8_gemm", x, weight, backend)
    if backend == "torch":
        return reference.int8_gemm(x, weight)
    if isinstance(weight, CpuWeight):
        return gemm_cpu(x.float(), weight)
    if x.dtype != torch.float16:
        raise ValueError(f"x is {x.dtype}, the int8 kernel takes torch.float16: bfloat16 holds no 8-bit level exactly")
    parts = [
        _launch("gemm_triton", x, Rows(part), weight, out_dtype=torch.float32).x for part in x.split(MAX_DECODE_ROWS)
    ]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def rotary_attention(args: AttentionArgs, *, backend: str | None = None, splits: int | None = None) -> Tensor:
    """Rotate q and k, append k and v to the caches in place, attend causally to all that each sequence has cached.

    Logits are scaled by 1 / sqrt(D). Returns (B, T, H, D) in q's dtype.

    backend "torch" is the definition, on any device; "cpu" takes caches in blocks, whose keys and values it multiplies
    as integers; "triton" takes float16 and bfloat16; None: "triton" on CUDA, "cpu" for caches in blocks, else "torch".
    Triton never waits for the device, so whether the positions fit is for the caller to check: a sequence
    that does not fit gets NaN and writes nothing. One token is one launch, which splits each head's cache into
    `splits` shares (None: by capacity and device) and counts them in `args.locks`.

    ValueError for shapes, dtypes or devices that do not fit and, from "torch", for positions beyond the capacity,
    naming both numbers.
    """
    _check_attention(args)
    if args.k_cache.dim() == 5:
        if backend not in (None, "cpu"):
            raise ValueError(
                f'backend is {backend!r}, a cache in blocks has "cpu"; "torch" and "triton" take one piece'
            )
        _check_positions(args)
        return attention_cpu(args)
    if _weightless_backend("rotary_attention", args.q, backend) == "torch":
        _check_positions(args)
        return reference.rotary_attention(args)
    return _launch("attention_triton", args.q, args, splits=splits)


def rotary_attention_rows(args: AttentionArgs, *, backend: str | None = None, splits: int | None = None) -> Rows:
    """rotary_attention of one token of up to 16 sequences, as Rows (B, H * D) with the sums that int4_gemm needs.

    ValueError as there, and for more tokens, more sequences or a head size that 32 does not divide.
    """
    _check_attention(args)
    q = args.q
    batch, length, heads, dim = q.shape
    if length != 1 or batch > MAX_DECODE_ROWS or dim % SPAN:
        raise ValueError(
            f"q has shape {tuple(q.shape)}, rotary_attention_rows takes (B, 1, H, D) with B of {MAX_DECODE_ROWS} or "
            f"less and D a multiple of {SPAN}; use rotary_attention"
        )
    if _weightless_backend("rotary_attention_rows", q, backend) == "torch":
        x = rotary_attention(args, backend="torch").reshape(batch, heads * dim)
        return Rows(x, reference.sum_rows(x))
    sums = torch.empty(heads * dim // SPAN, MAX_DECODE_ROWS, dtype=torch.float32, device=q.device)
    x = _launch("attention_triton", q, args, splits=splits, sums=sums)
    return Rows(x.view(batch, heads * dim), sums)


def _launch(launcher: str, tensor: Tensor, *arguments: Any, **options: Any) -> Any:
    """Call one of LAUNCHERS, imported on first use, on `tensor`'s device; ValueError where it cannot run."""
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f'backend "triton" runs on CUDA, x is on {tensor.device}; move it there, or set TRITON_INTERPRET=1 before '
            "triton is loaded to run the kernels in its (very slow) interpreter"
        )
    module = importlib.import_module(f"kernels.gpu.{LAUNCHERS[launcher]}")
    with torch.cuda.device_of(tensor):  # Triton launches on the current device, wherever the tensors are
        return getattr(module, launcher)(*arguments, **options)


def _backend(
    function: str, x: Tensor, weight: AnyWeight, backend: str | None, known: tuple[str, ...] = tuple(BACKENDS)
) -> str:
    """The backend to use: chosen by device and by what the weight was packed for, never by what might work."""
    packed_for = next(name for name, kinds in BACKENDS.items() if isinstance(weight, kinds))
    if backend is None:
        backend = "triton" if x.is_cuda else packed_for
        if backend == "triton" and not x.is_cuda:
            raise ValueError(
                f"{function} got a weight in Triton's order on the {x.device}; use pack_for_cpu for the CPU, or say "
                'backend="triton" (interpreter) or backend="torch" (slow definition)'
            )
    if backend not in known:
        raise ValueError(f"backend is {backend!r}, {function} has {' and '.join(map(repr, known))}")
    if backend not in ("torch", packed_for):
        raise ValueError(
            f'backend "{backend}" reads a weight that was packed once: weight = pack_for_{backend}(weight)'
        )
    if backend == "triton" and x.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"x is {x.dtype}, the Triton kernels take torch.float16 and torch.bfloat16")
    return backend


def _weightless_backend(function: str, tensor: Tensor, backend: str | None) -> str:
    """The backend of a function without a weight."""
    if backend not in (None, *FUSED):
        raise ValueError(f'backend is {backend!r}, {function} has "torch" and "triton"')
    return backend or ("triton" if tensor.is_cuda else "torch")


def _check_attention(args: AttentionArgs) -> None:
    """Everything but the positions."""
    q = args.q
    _check_float("q", q)
    if q.dim() != 4 or q.shape[1] == 0 or q.shape[3] % 2:
        raise ValueError(f"q has shape {tuple(q.shape)}, expected (B, T, H, D) with T of 1 or more and D even")
    batch, length, heads, dim = q.shape
    tokens, (k_cache, v_cache, of_scales) = (batch, length, heads, dim), _cache_shapes(args.k_cache, batch, heads, dim)
    expected: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {
        "k": (tokens, q.dtype),
        "v": (tokens, q.dtype),
        "cos": ((batch, length, dim), torch.float32),
        "sin": ((batch, length, dim), torch.float32),
        "k_cache": (k_cache, None),
        "v_cache": (v_cache, None),
        "start": ((batch,), torch.int64),
        "q_scale": ((batch, length), torch.float32),
        "k_scales": (of_scales, torch.float16),
        "v_scales": (of_scales, torch.float16),
        "locks": ((batch * heads,), torch.int32),
    }
    for name, (shape, dtype) in expected.items():
        tensor: Tensor | None = getattr(args, name)
        if tensor is None:
            continue
        _check(name, tensor, shape, f"q has shape {tuple(q.shape)}", q.device)
        if dtype is not None and tensor.dtype != dtype:
            raise ValueError(f"{name} is {tensor.dtype}, expected {dtype}")
    if args.locks is not None and not args.locks.is_contiguous():
        raise ValueError(f"locks has strides {args.locks.stride()}, expected (1,)")
    for name, of_cache, scales in (("k", args.k_cache, args.k_scales), ("v", args.v_cache, args.v_scales)):
        if of_cache.dtype != torch.int8:
            _check_float(f"{name}_cache", of_cache)
        if (of_cache.dtype == torch.int8) != (scales is not None):
            given = "missing" if scales is None else "given"
            raise ValueError(f"{name}_cache is {of_cache.dtype} but {name}_scales is {given}; only int8 has scales")
    blocks = (args.k_cache, args.v_cache) if args.k_cache.dim() == 5 else ()
    if any(cache.dtype != torch.int8 or not cache[:1].is_contiguous() for cache in blocks):
        raise ValueError(
            f"k_cache in blocks is {args.k_cache.dtype} with strides {args.k_cache.stride()}; blocks are int8 and each "
            "sequence's are contiguous"
        )
    if args.k_cache.dtype != args.v_cache.dtype and torch.int8 in (args.k_cache.dtype, args.v_cache.dtype):
        raise ValueError(f"k_cache is {args.k_cache.dtype} but v_cache is {args.v_cache.dtype}; both are int8 or none")


def _cache_shapes(k_cache: Tensor, batch: int, heads: int, dim: int) -> tuple[tuple[int, ...], ...]:
    """What k_cache, v_cache and their scales should have, with the capacity, or the blocks, of this k_cache."""
    if k_cache.dim() == 5:
        blocks, block = k_cache.shape[1], k_cache.shape[4]
        return (batch, blocks, heads, dim, block), (batch, blocks, heads, block, dim), (batch, blocks, heads, block)
    cache = (batch, heads, k_cache.shape[2] if k_cache.dim() == 4 else 0, dim)
    return cache, cache, cache[:3]


def _check_positions(args: AttentionArgs) -> None:
    """Waits for the device."""
    start, length, shape = args.start, args.q.shape[1], args.k_cache.shape
    capacity = shape[2] if len(shape) == 4 else shape[1] * shape[4]
    if len(start) and not 0 <= int(start.min()) <= int(start.max()) <= capacity - length:
        raise ValueError(
            f"start lies in [{int(start.min())}, {int(start.max())}] and {length} tokens are appended, but the cache "
            f"holds positions 0 to {capacity - 1}; shorten the prompt or make the cache larger"
        )


def _int4_backend(function: str, rows: Rows, weight: AnyInt4Weight, bias: Tensor | None, backend: str | None) -> str:
    """Check the operands of int4_gemm or of a fused form, and choose its backend."""
    if weight.bits != 4:
        raise ValueError(f"weight has {weight.bits} bits, {function} takes 4; use int8_gemm")
    _check_x(rows.x, weight)
    if bias is not None:
        _check("bias", bias, (weight.out_features,), f"weight holds N={weight.out_features}", weight.device)
        if not bias.is_floating_point():
            raise ValueError(f"bias is {bias.dtype}, expected a floating type")
    if function == "int4_gemm":
        return _backend(function, rows.x, weight, backend)
    _check_matrix(rows.x)
    return _backend(function, rows.x, weight, backend, FUSED)


def _check_x(x: Tensor, weight: AnyWeight) -> None:
    _check_float("x", x)
    if x.dim() == 0 or x.shape[-1] != weight.in_features:
        size = x.shape[-1] if x.dim() else "no"
        raise ValueError(f"x has K={size} (shape {tuple(x.shape)}) but weight holds K={weight.in_features}")
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device} but weight is on {weight.device}; move one of them")


def _check_matrix(x: Tensor) -> None:
    if x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (M, {x.shape[-1]})")


def _check_residual(residual: Tensor, norm_weight: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    _check("residual", residual, shape, "the rows of x by the outputs of weight", device)
    if residual.dim() != 2 or residual.dtype != torch.float32 or not residual.is_contiguous():
        raise ValueError(
            f"residual is {residual.dtype} of shape {tuple(residual.shape)} and strides {residual.stride()}, expected "
            "a contiguous matrix of torch.float32"
        )
    _check("norm_weight", norm_weight, shape[1:], f"residual has shape {shape}", device)


def _check_spans(function: str, outputs: int) -> None:
    if outputs % SPAN:
        raise ValueError(f"{function} in Triton makes sums over {SPAN} channels, which do not divide {outputs}")


def _check_float(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name} is {tensor.dtype}, expected one of {', '.join(map(str, FLOATS))}")


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], because: str, device: torch.device) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}: {because}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the other operands are on {device}; move one of them")
