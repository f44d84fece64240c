"""The int4 decoder on a GPU: the arithmetic of decoder.py, in five launches a layer (docs/kernels.md).

The residual stream is float32; every kernel leaves the rows that the next one reads. Positions, dynamic NTK and log-n
are those of decoder.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import (
    MAX_DECODE_ROWS,
    Int4Weight,
    Rows,
    TritonWeight,
    int4_gemm,
    int4_gemm_residual,
    int4_gemm_swiglu,
    int8_gemm,
    interleave,
    pack_for_triton,
    quantize_int8,
    rms_rows,
    rotary_attention,
    rotary_attention_rows,
)
from qvl_edge.config import Config
from qvl_edge.errors import ConfigError
from qvl_edge.model.cache import KVCache
from qvl_edge.model.decoder import embed, place_tokens

DTYPES = (torch.float16, torch.bfloat16)
Int4Projection: TypeAlias = tuple[Int4Weight, Tensor | None]
"""A weight as read from disk, and its bias or None where that is zero."""


@dataclass(frozen=True, eq=False)
class PackedLinear:
    """An int4 weight in the kernels' order and its bias, or None."""

    weight: TritonWeight
    bias: Tensor | None


@dataclass(frozen=True, eq=False)
class FusedBlock:
    """One block's projections and norm weights, under their names in the checkpoint; w1 and w2 interleaved."""

    ln_1: Tensor
    c_attn: PackedLinear
    attn_c_proj: PackedLinear
    ln_2: Tensor
    w1_w2: PackedLinear
    mlp_c_proj: PackedLinear


def fuse_block(prefix: str, read: Callable[[str], Tensor], read_int4: Callable[[str], Int4Projection]) -> FusedBlock:
    """The block `prefix` ("transformer.h.0"), from what reads its norm weights and its projections by their names.

    Each projection is packed before the next is read, so that one at a time takes memory beside what stays. ConfigError
    if w1 and w2 order their channels differently, which no quantizer does that calibrates them together.
    """

    return FusedBlock(
        ln_1=read(f"{prefix}.ln_1.weight"),
        c_attn=_packed(read_int4(f"{prefix}.attn.c_attn")),
        attn_c_proj=_packed(read_int4(f"{prefix}.attn.c_proj")),
        ln_2=read(f"{prefix}.ln_2.weight"),
        w1_w2=_packed(_interleaved(read_int4(f"{prefix}.mlp.w1"), read_int4(f"{prefix}.mlp.w2"))),
        mlp_c_proj=_packed(read_int4(f"{prefix}.mlp.c_proj")),
    )


def _packed(projection: Int4Projection) -> PackedLinear:
    weight, bias = projection
    return PackedLinear(pack_for_triton(weight), bias)


def _interleaved(first: Int4Projection, second: Int4Projection) -> Int4Projection:
    """w1 and w2 as one weight, and their biases as one."""
    try:
        weight = interleave(first[0], second[0])
    except ValueError as error:
        raise ConfigError(f"mlp.w1 and mlp.w2 cannot run as one: {error}. Quantize again with desc_act=false") from None
    if first[1] is None and second[1] is None:
        return weight, None
    biases = (w.scales.new_zeros(w.out_features) if b is None else b for w, b in (first, second))
    return weight, torch.stack(tuple(biases), 1).flatten()


class FusedDecoder:
    """Embeddings, fused blocks, final norm and head; called as QWenLMHeadModel is.

    wte (vocab, hidden) may be in host memory and in any float dtype; lm_head is a float weight (vocab, hidden) or int8.
    backend "torch" computes the same calls by their definitions, for tests.
    """

    def __init__(
        self,
        config: Config,
        *,
        wte: Tensor,
        blocks: list[FusedBlock],
        ln_f: Tensor,
        lm_head: Tensor | TritonWeight,
        backend: str = "triton",
    ):
        if ln_f.dtype not in DTYPES:
            raise ConfigError(
                f"dtype is {ln_f.dtype}, the int4 kernels compute in torch.float16 or torch.bfloat16; pass one of them"
            )
        self.config, self.backend = config, backend
        self.wte, self.blocks, self.ln_f = wte, blocks, ln_f
        self.lm_head = lm_head

    @property
    def dtype(self) -> torch.dtype:
        """Of activations, and of a cache that is not int8."""
        return self.ln_f.dtype

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.ln_f.device

    @property
    def embeddings_device(self) -> torch.device:
        """Where the embedding table is: the model's device, or the CPU."""
        return self.wte.device

    @property
    def cache_block(self) -> int:
        """KVCache's `block`: the Triton kernels take one piece."""
        return 0

    def embed(self, ids: Tensor, out: Tensor | None = None) -> Tensor:
        """ids (B, T) int64 -> embeddings (B, T, hidden): into `out`, or a new tensor on the model's device."""
        return embed(ids, self.wte, self.ln_f, out)

    @torch.inference_mode()
    def __call__(self, embeds: Tensor, cache: KVCache, *, all_logits: bool = False) -> Tensor:
        """Append T tokens to every sequence and return logits in float32; see QWenLMHeadModel.forward."""
        batch, length, width = embeds.shape
        placement = place_tokens(self.config, length, cache)
        eps, backend = self.config.layer_norm_epsilon, self.backend
        residual = embeds.reshape(-1, width).float()
        residual = residual.clone() if residual.data_ptr() == embeds.data_ptr() else residual
        rows = rms_rows(residual, self.blocks[0].ln_1, eps, self.dtype, backend=backend)
        following = [*(block.ln_1 for block in self.blocks[1:]), self.ln_f]
        for index, (block, next_norm) in enumerate(zip(self.blocks, following, strict=True)):
            qkv = int4_gemm(rows, block.c_attn.weight, block.c_attn.bias, backend=backend)
            q, k, v = qkv.view(batch, length, 3, -1, self.config.kv_channels).unbind(2)
            args = placement.attention(index, q, k, v)
            if length == 1 and batch <= MAX_DECODE_ROWS and self.config.kv_channels % 32 == 0:
                rows = rotary_attention_rows(args, backend=backend)
            else:
                attended = rotary_attention(args, backend=backend)
                if block is self.blocks[-1] and not all_logits:  # the other positions are not read after this
                    attended, residual = attended[:, -1:], residual.view(batch, length, width)[:, -1].contiguous()
                rows = Rows(attended.reshape(-1, width))
            attn, mlp = block.attn_c_proj, block.mlp_c_proj
            rows = int4_gemm_residual(rows, attn.weight, attn.bias, residual, block.ln_2, eps, backend=backend)
            rows = int4_gemm_swiglu(rows, block.w1_w2.weight, block.w1_w2.bias, backend=backend)
            rows = int4_gemm_residual(rows, mlp.weight, mlp.bias, residual, next_norm, eps, backend=backend)
        cache.advance(length)
        factor = rows.rsqrt()
        assert factor is not None  # int4_gemm_residual leaves one
        logits = self._logits(rows.x * factor)  # float16 times float32 is float32
        return logits.view(batch, length, -1) if all_logits else logits

    def _logits(self, x: Tensor) -> Tensor:
        """x (M, hidden) float32, normed -> (M, vocab) float32."""
        if isinstance(self.lm_head, TritonWeight):
            return int8_gemm(x.half(), self.lm_head, backend=self.backend)
        return F.linear(x.to(self.dtype), self.lm_head).float()

    @classmethod
    def random(
        cls,
        config: Config,
        *,
        device: torch.device | str,
        dtype: torch.dtype = torch.float16,
        head: str = "float16",
        group_size: int = 128,
        seed: int = 0,
    ) -> "FusedDecoder":
        """A decoder of random weights, made on the device: the shapes, bytes and speed of a real one."""
        generator = torch.Generator(device=device).manual_seed(seed)
        hidden, inner = config.hidden_size, config.ffn_size

        def normal(*shape: int, scale: float) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device).normal_(0, scale, generator=generator)

        sizes = {
            "h.attn.c_attn": (hidden, 3 * hidden),
            "h.attn.c_proj": (hidden, hidden),
            "h.mlp.w1": (hidden, inner),
            "h.mlp.w2": (hidden, inner),
            "h.mlp.c_proj": (inner, hidden),
        }

        def projection(name: str) -> Int4Projection:
            n_in, n_out = sizes[name]
            words = torch.empty(n_in // 8, n_out, dtype=torch.int32, device=device)
            words.random_(-(2**31), 2**31 - 1, generator=generator)
            # levels around 8 are off by 4.6 in the mean: outputs keep the size of inputs
            scale = 1 / (4.6 * n_in**0.5)
            scales = torch.full((n_in // group_size, n_out), scale, dtype=torch.float16, device=device)
            weight = Int4Weight(words, scales, torch.full_like(scales, 8, dtype=torch.int16), None)
            return weight, normal(n_out, scale=0.1) if name == "h.attn.c_attn" else None

        ones = torch.ones(hidden, dtype=dtype, device=device)
        lm_head = normal(config.vocab_size, hidden, scale=hidden**-0.5)
        return cls(
            config,
            wte=normal(config.vocab_size, hidden, scale=1.0),
            blocks=[fuse_block("h", lambda _: ones, projection) for _ in range(config.num_hidden_layers)],
            ln_f=ones,
            lm_head=pack_for_triton(quantize_int8(lm_head)) if head == "int8" else lm_head,
        )
