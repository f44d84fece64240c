"""The runtime's launches of each kernel at Qwen-7B's shapes, recorded without a GPU for benchmarks.offline."""

from dataclasses import replace

import torch

from benchmarks.offline import Launch, record_one
from benchmarks.projections import Projection, weight_of
from kernels.gpu.attention import attention_triton
from kernels.gpu.gemm import gemm_triton
from kernels.gpu.tiles import Tile
from kernels.reference import MAX_DECODE_ROWS, SPAN, AttentionArgs, Rows

HEADS, HEAD_DIM, CAPACITY = 32, 128, 2048
PARTS = 32  # of a row's sum of squares, as attn.c_proj's 32 tiles of 128 leave them


def meta(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def projection_launch(
    projection: Projection, tile: Tile, dtype: torch.dtype = torch.float16, *, one_row: bool = False
) -> Launch:
    """The launch of a projection with `tile`, as the runtime makes it: with all its rows, or one of the first layer.

    Two splits stand for any number above one: the loop is the same. One row, and the one part of its squares that the
    first layer has, become constants of the kernel.
    """
    tile = replace(tile, split_k=min(tile.split_k, 2))
    rows, parts = (1, 1) if one_row else (tile.block_m, PARTS)
    few = rows <= MAX_DECODE_ROWS
    weight = weight_of(projection, device="meta")
    outputs = projection.n // 2 if projection.epilogue == "swiglu" else projection.n
    residual = projection.epilogue == "residual"
    return record_one(
        "_decode_kernel" if few else "_prefill_kernel",
        gemm_triton,
        Rows(
            meta(rows, projection.k, dtype=dtype),
            meta(projection.k // SPAN, MAX_DECODE_ROWS, dtype=torch.float32) if few else None,
            meta(rows, parts, dtype=torch.float32) if projection.norm else None,
            1e-6,
        ),
        weight,
        meta(outputs, dtype=dtype) if projection.bias else None,
        epilogue=projection.epilogue,
        residual=meta(rows, outputs, dtype=torch.float32) if residual else None,
        norm_weight=meta(outputs, dtype=dtype) if residual else None,
        out_dtype=torch.float32 if projection.bits == 8 else None,
        tile=tile,
    )


def attention_launch(
    kernel: str, cache: torch.dtype, length: int, *, splits: int | None = None, logn: bool = True
) -> Launch:
    """The launch of an attention kernel for `length` tokens of two sequences."""
    dtype = torch.float16 if cache == torch.int8 else cache
    scales = [meta(2, HEADS, CAPACITY) if cache == torch.int8 else None for _ in range(2)]
    args = AttentionArgs(
        *meta(2, length, 3, HEADS, HEAD_DIM, dtype=dtype).unbind(2),
        *(meta(2, length, HEAD_DIM, dtype=torch.float32) for _ in range(2)),
        *(meta(2, HEADS, CAPACITY, HEAD_DIM, dtype=cache) for _ in range(2)),
        meta(2, dtype=torch.int64),
        q_scale=meta(2, length, dtype=torch.float32) if logn else None,
        k_scales=scales[0],
        v_scales=scales[1],
    )
    return record_one(
        kernel,
        attention_triton,
        args,
        splits=splits,
        sums=meta(HEADS * HEAD_DIM // SPAN, MAX_DECODE_ROWS, dtype=torch.float32) if length == 1 else None,
    )
