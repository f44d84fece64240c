"""Each kernel against its definition on small random operands: the relative norm error.

Odd sizes, so that the last tile is not full; 3 rows as in decoding, and 20 as in a prompt, which is another kernel on
the GPU.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels import (
    AttentionArgs,
    Int4Weight,
    Rows,
    int4_gemm,
    int4_gemm_residual,
    int4_gemm_swiglu,
    int8_gemm,
    pack_for_cpu,
    pack_for_triton,
    quantize_int8,
    rotary_attention,
)
from kernels.cpu import gemm_cpu
from kernels.ops import AnyInt4Weight

ROWS = (3, 20)
INPUTS, OUTPUTS, GROUP = 384, 160, 64
EPS = 1e-6
PACK: dict[str, Callable[[Int4Weight], AnyInt4Weight]] = {"cpu": pack_for_cpu, "triton": pack_for_triton}
DTYPES = {"cpu": torch.float32, "triton": torch.float16}  # what each backend is used with
CPU_ALONE = ("int8_activations",)
ON_CPU = ("int4_gemm", "int8_gemm", *CPU_ALONE)  # the others run as their definitions there


class Operands:
    """Random tensors on a device, the same in every test."""

    def __init__(self, device: str, backend: str):
        self.device, self.dtype = device, DTYPES[backend]
        self._generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        """In the backend's dtype."""
        return torch.randn(shape, device=self.device, generator=self._generator).to(self.dtype)

    def weight(self, outputs: int) -> Int4Weight:
        """Random levels, scales and zeros; products with normal x are about normal."""
        groups = INPUTS // GROUP

        def integers(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high, shape, device=self.device, generator=self._generator)

        words = integers(-(2**31), 2**31, INPUTS // 8, outputs).to(torch.int32)
        scales = (self.normal(groups, outputs).float().abs() + 0.5) * INPUTS**-0.5 / 8
        return Int4Weight(words, scales.half(), integers(6, 11, groups, outputs).to(torch.int16), None)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference by that of `expected`; infinite if `found` is not finite."""
    if not bool(found.isfinite().all()):
        return float("inf")
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def int4_gemm_error(device: str, backend: str) -> float:
    """x W^T with a bias."""
    make = Operands(device, backend)
    weight, bias = make.weight(OUTPUTS), make.normal(OUTPUTS)
    packed = PACK[backend](weight)
    return max(
        relative_error(int4_gemm(x, packed, bias, backend=backend), int4_gemm(x, weight, bias, backend="torch"))
        for x in (make.normal(count, INPUTS) for count in ROWS)
    )


def swiglu_error(device: str, backend: str) -> float:
    """w1(x) * silu(w2(x)) in one product."""
    make = Operands(device, backend)
    weight = make.weight(2 * OUTPUTS)
    packed = PACK[backend](weight)
    results = (
        (int4_gemm_swiglu(rows, packed, backend=backend), int4_gemm_swiglu(rows, weight, backend="torch"))
        for rows in (Rows(make.normal(count, INPUTS)) for count in ROWS)
    )
    return max(relative_error(found.x, expected.x) for found, expected in results)


def residual_error(device: str, backend: str) -> float:
    """The residual, and the normalized rows that follow from it."""
    make = Operands(device, backend)
    weight, norm = make.weight(OUTPUTS), make.normal(OUTPUTS)
    packed = PACK[backend](weight)
    errors = []
    for count in ROWS:
        rows, residual = Rows(make.normal(count, INPUTS)), make.normal(count, OUTPUTS).float()
        expected = residual.clone()
        ours = int4_gemm_residual(rows, packed, None, residual, norm, EPS, backend=backend)
        theirs = int4_gemm_residual(rows, weight, None, expected, norm, EPS, backend="torch")
        errors += [relative_error(residual, expected), relative_error(ours.x, theirs.x)]
    return max(errors)


def attention_error(device: str, backend: str) -> float:
    """Attention and the appended cache, for one token and for several, on top of unequal lengths."""
    make = Operands(device, backend)
    heads, size, capacity = 2, 64, 64
    start = torch.tensor([0, 37], device=device)
    errors = []
    for length in (1, 5):
        q, k, v = (make.normal(len(start), length, heads, size) for _ in range(3))
        half = 3 * make.normal(len(start), length, size // 2).float()
        angles = torch.cat((half, half), -1)
        keys, values = (make.normal(len(start), heads, capacity, size) for _ in range(2))
        results = []
        for by in (backend, "torch"):
            k_cache, v_cache = keys.clone(), values.clone()
            args = AttentionArgs(q, k, v, angles.cos(), angles.sin(), k_cache, v_cache, start)
            attended = rotary_attention(args, backend=by)
            results.append((attended, k_cache, v_cache))
        errors += [relative_error(found, expected) for found, expected in zip(*results, strict=True)]
    return max(errors)


def int8_gemm_error(device: str, backend: str) -> float:
    """As lm_head uses it."""
    make = Operands(device, backend)
    weight = quantize_int8(make.normal(OUTPUTS, INPUTS).float())
    packed = pack_for_cpu(weight) if backend == "cpu" else pack_for_triton(weight)
    return max(
        relative_error(int8_gemm(x, packed, backend=backend), int8_gemm(x, weight, backend="torch"))
        for x in (make.normal(count, INPUTS) for count in ROWS)
    )


def int8_activations_error(device: str, backend: str) -> float:
    """A CPU's x W^T with x rounded to int8."""
    make = Operands(device, backend)
    weight, x = make.weight(OUTPUTS), make.normal(max(ROWS), INPUTS)
    return relative_error(gemm_cpu(x, pack_for_cpu(weight, "int8")), x @ weight.dequantize().T)


KERNELS: dict[str, Callable[[str, str], float]] = {
    "int4_gemm": int4_gemm_error,
    "swiglu": swiglu_error,
    "residual": residual_error,
    "rotary_attention": attention_error,
    "int8_gemm": int8_gemm_error,
    "int8_activations": int8_activations_error,
}
