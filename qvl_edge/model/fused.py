"""The int4 decoder on a GPU: the arithmetic of decoder.py, in five launches a layer (docs/kernels.md).

The residual stream is float32; every kernel leaves the rows that the next one reads. Policy (dynamic NTK, log-n) is
decoder.py's own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import (
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
MOST_SEQUENCES = 16  # that one decode step serves: the rows of one tile of the int4 kernel


@dataclass(frozen=True, eq=False)
class Projection:
    """An int4 weight in the kernels' order and its bias, or None."""

    weight: TritonWeight
    bias: Tensor | None


@dataclass(frozen=True, eq=False)
class FusedBlock:
    """One block's projections and norm weights, under their names in the checkpoint; w1 and w2 interleaved."""

    ln_1: Tensor
    c_attn: Projection
    attn_c_proj: Projection
    ln_2: Tensor
    w1_w2: Projection
    mlp_c_proj: Projection


def fuse_block(ln_1: Tensor, ln_2: Tensor, layers: Mapping[str, tuple[Int4Weight, Tensor | None]]) -> FusedBlock:
    """A block from its int4 weights and biases by their names in it ("attn.c_attn", …), the biases None where zero.

    ConfigError if w1 and w2 order their channels differently, which no quantizer does that calibrates them together.
    """

    def packed(name: str) -> Projection:
        weight, bias = layers[name]
        return Projection(pack_for_triton(weight), bias)

    (w1, bias1), (w2, bias2) = layers["mlp.w1"], layers["mlp.w2"]
    bias = None
    if bias1 is not None or bias2 is not None:
        first, second = (w.scales.new_zeros(w.out_features) if b is None else b for w, b in ((w1, bias1), (w2, bias2)))
        bias = torch.stack((first, second), 1).flatten()
    try:
        both = interleave(w1, w2)
    except ValueError as error:
        raise ConfigError(f"mlp.w1 and mlp.w2 cannot run as one: {error}. Quantize again with desc_act=false") from None
    return FusedBlock(
        ln_1,
        packed("attn.c_attn"),
        packed("attn.c_proj"),
        ln_2,
        Projection(pack_for_triton(both), bias),
        packed("mlp.c_proj"),
    )


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

    def embed(self, ids: Tensor) -> Tensor:
        """ids (B, T) int64 -> embeddings (B, T, hidden)."""
        return embed(ids, self.wte, self.ln_f)

    @torch.inference_mode()
    def __call__(self, embeds: Tensor, cache: KVCache, *, all_logits: bool = False) -> Tensor:
        """Append T tokens to every sequence and return logits in float32; see QWenLMHeadModel.forward."""
        batch, length, width = embeds.shape
        start, cos, sin, q_scale = place_tokens(self.config, length, cache)
        eps, backend = self.config.layer_norm_epsilon, self.backend
        residual = embeds.reshape(-1, width).float()
        residual = residual.clone() if residual.data_ptr() == embeds.data_ptr() else residual
        rows = rms_rows(residual, self.blocks[0].ln_1, eps, self.dtype, backend=backend)
        following = [*(block.ln_1 for block in self.blocks[1:]), self.ln_f]
        for index, (block, next_norm) in enumerate(zip(self.blocks, following, strict=True)):
            qkv = int4_gemm(rows, block.c_attn.weight, block.c_attn.bias, backend=backend)
            q, k, v = qkv.view(batch, length, 3, -1, self.config.kv_channels).unbind(2)
            caches, scales = cache.layer(index)
            options: dict[str, Any] = {"q_scale": q_scale, **scales, "locks": cache.locks, "backend": backend}
            if length == 1 and batch <= MOST_SEQUENCES and self.config.kv_channels % 32 == 0:
                rows = rotary_attention_rows(q, k, v, cos, sin, *caches, start, **options)
            else:
                attended = rotary_attention(q, k, v, cos, sin, *caches, start, **options)
                if block is self.blocks[-1] and not all_logits:  # nobody reads what the other positions would become
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

        def int4(n_in: int, n_out: int) -> Int4Weight:
            groups = n_in // group_size
            words = torch.empty(groups, n_out, group_size // 8, dtype=torch.int32, device=device)
            words.random_(-(2**31), 2**31 - 1, generator=generator)
            # levels around 8 are off by 4.6 in the mean: outputs keep the size of inputs
            scale = 1 / (4.6 * n_in**0.5)
            scales = torch.full((groups, n_out), scale, dtype=torch.float16, device=device)
            return Int4Weight(words, scales, torch.full_like(scales, 8, dtype=torch.int16), None)

        def block() -> FusedBlock:
            layers = {
                "attn.c_attn": (int4(hidden, 3 * hidden), normal(3 * hidden, scale=0.1)),
                "attn.c_proj": (int4(hidden, hidden), None),
                "mlp.w1": (int4(hidden, inner), None),
                "mlp.w2": (int4(hidden, inner), None),
                "mlp.c_proj": (int4(inner, hidden), None),
            }
            return fuse_block(ones, ones, layers)

        ones = torch.ones(hidden, dtype=dtype, device=device)
        lm_head = normal(config.vocab_size, hidden, scale=hidden**-0.5)
        return cls(
            config,
            wte=normal(config.vocab_size, hidden, scale=1.0),
            blocks=[block() for _ in range(config.num_hidden_layers)],
            ln_f=ones,
            lm_head=pack_for_triton(quantize_int8(lm_head)) if head == "int8" else lm_head,
        )
