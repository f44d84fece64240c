"""The Qwen-7B decoder of Qwen-VL in torch. Attribute names are the published checkpoint's keys.

Source: Qwen-VL-Chat's modeling_qwen.py. What is policy stays here (dynamic NTK, log-n scaling); what is arithmetic over
tensors is `kernels.rotary_attention` and `kernels.int4_gemm`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import BLOCK, AttentionArgs, rotary_attention
from qvl_edge.config import Config
from qvl_edge.model.cache import KVCache
from qvl_edge.model.linear import linear_for

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q, k, v (B, T, H, D) -> (B, T, H, D): the attention of one layer, with its positions and cache bound."""


class Decoder(Protocol):
    """What the engine needs of a decoder: QWenLMHeadModel on any device, and FusedDecoder."""

    config: Config

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def embeddings_device(self) -> torch.device: ...
    @property
    def cache_block(self) -> int: ...
    def embed(self, ids: Tensor, out: Tensor | None = None) -> Tensor: ...
    def __call__(self, embeds: Tensor, cache: KVCache, *, all_logits: bool = False) -> Tensor: ...


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) in float32, rounded to x's dtype, times weight (modeling_qwen.py: RMSNorm)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x (..., width) -> (..., width)."""
        if x.dtype == torch.float32:  # where nothing is rounded in between
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight


class QWenAttention(nn.Module):
    """Multi-head attention; c_attn makes q, k and v one after another."""

    def __init__(self, config: Config):
        super().__init__()
        linear = linear_for(config)
        self.heads, self.head_dim = config.num_attention_heads, config.kv_channels
        self.c_attn = linear(config.hidden_size, 3 * config.hidden_size, bias=True)
        self.c_proj = linear(config.hidden_size, config.hidden_size, bias=not config.no_bias)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """x (B, T, hidden) -> (B, T, hidden)."""
        q, k, v = self.c_attn(x).unflatten(-1, (3, self.heads, self.head_dim)).unbind(2)
        return self.c_proj(attend(q, k, v).flatten(2))


class QWenMLP(nn.Module):
    """c_proj(w1(x) * silu(w2(x))): the gate is w2."""

    def __init__(self, config: Config):
        super().__init__()
        linear = linear_for(config)
        self.w1 = linear(config.hidden_size, config.ffn_size, bias=not config.no_bias)
        self.w2 = linear(config.hidden_size, config.ffn_size, bias=not config.no_bias)
        self.c_proj = linear(config.ffn_size, config.hidden_size, bias=not config.no_bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, hidden) -> (B, T, hidden)."""
        if torch.is_grad_enabled():
            return self.c_proj(self.w1(x) * F.silu(self.w2(x)))
        # in place: of a prompt's 13 MB each, a new tensor is mostly page faults
        return self.c_proj(self.w1(x).mul_(F.silu(self.w2(x), inplace=True)))


class QWenBlock(nn.Module):
    """Pre-norm block: attention, then MLP, each added to the residual."""

    def __init__(self, config: Config):
        super().__init__()
        self.ln_1 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = QWenAttention(config)
        self.ln_2 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = QWenMLP(config)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """x (B, T, hidden) -> (B, T, hidden), or of the last positions only, if `attend` gives no more."""
        attended = self.attn(self.ln_1(x), attend)
        x = x[:, -attended.shape[1] :] + attended
        return x + self.mlp(self.ln_2(x))


def ntk_alpha(prompt_length: int, seq_length: int) -> float:
    """Dynamic NTK: 1 up to seq_length, 3 up to twice, 7 up to four times (modeling_qwen.py: get_ntk_alpha)."""
    return max(2 ** math.ceil(math.log2(prompt_length / seq_length) + 1) - 1, 1)


def rotary_tables(config: Config, positions: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (B, T, head size) float32 for `positions` (B, T) and each sequence's NTK `alpha` (B,)."""
    return _tables(positions, rotary_frequencies(config, alpha))


def rotary_frequencies(config: Config, alpha: Tensor) -> Tensor:
    """Radians per position (B, head size) float32 for NTK `alpha` (B,): that of pair i is at i and i + D / 2."""
    dim = config.kv_channels
    base = config.rotary_emb_base * alpha.to(torch.float64) ** (dim / (dim - 2))
    exponents = torch.arange(0, dim, 2, device=alpha.device, dtype=torch.float64) / dim
    inverse = (1.0 / base[:, None] ** exponents).float()
    return torch.cat((inverse, inverse), dim=-1)


def _tables(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    angles = positions.float()[:, :, None] * frequencies[:, None, :]
    return angles.cos(), angles.sin()


def logn_scale(config: Config, positions: Tensor) -> Tensor:
    """log-n scaling of queries (B, T) float32: 1 up to seq_length, then log(position, base seq_length), from 1 on."""
    count = positions.to(torch.float64) + 1
    return (count.log() / math.log(config.seq_length)).clamp(min=1.0).float()


def prompt_alpha(config: Config, prompt_length: int) -> float:
    """The NTK alpha of a sequence from the tokens of its whole prompt; it is kept while decoding."""
    return ntk_alpha(prompt_length, config.seq_length) if config.use_dynamic_ntk else 1.0


def place_sequence(config: Config, cache: KVCache, index: int, prompt_length: int) -> None:
    """Set the frequencies of sequence `index` of a cache from its whole prompt's length, before its first chunk."""
    alpha = torch.full((1,), prompt_alpha(config, prompt_length), device=cache.frequencies.device)
    cache.frequencies[index] = rotary_frequencies(config, alpha)[0]
    cache.placed[index] = True


@dataclass(frozen=True, eq=False)
class Placement:
    """Positions of the new tokens: start (B,), cos and sin (B, T, head size), q_scale (B, T) or None."""

    cache: KVCache
    start: Tensor
    cos: Tensor
    sin: Tensor
    q_scale: Tensor | None

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> AttentionArgs:
        """The attention of one layer, q, k and v (B, T, H, D) unrotated."""
        k_cache, v_cache, k_scales, v_scales = self.cache.layer(layer)
        return AttentionArgs(
            q, k, v, self.cos, self.sin, k_cache, v_cache, self.start,
            q_scale=self.q_scale, k_scales=k_scales, v_scales=v_scales, locks=self.cache.locks,
        )  # fmt: skip


def place_tokens(config: Config, tokens: int, cache: KVCache) -> Placement:
    """The positions of the next `tokens` tokens of every sequence of the cache. PromptError if they do not fit.

    For a sequence that has no frequencies yet these tokens are its whole prompt. A decode step takes four launches
    here: what does not change between steps is computed at prefill, and a cache that ends before seq_length needs no
    log-n. Nothing waits for the device, so that a CUDA graph can hold this.
    """
    cache.check_room(tokens)
    for index, placed in enumerate(cache.placed.tolist()):
        if not placed:
            place_sequence(config, cache, index, tokens)
    start = cache.lengths
    positions = start[:, None]
    if tokens > 1:
        positions = positions + torch.arange(tokens, device=start.device)
    cos, sin = _tables(positions, cache.frequencies)
    scaled = config.use_logn_attn and cache.capacity > config.seq_length
    return Placement(cache, start, cos, sin, logn_scale(config, positions) if scaled else None)


def embed(ids: Tensor, table: Tensor, like: Tensor, out: Tensor | None) -> Tensor:
    """Rows of table (vocab, hidden) for ids (B, T) int64: into `out`, or with `like`'s dtype on its device."""
    rows = F.embedding(ids.to(table.device), table)
    return rows.to(like) if out is None else out.copy_(rows)


class QWenModel(nn.Module):
    """Embeddings, blocks and final norm, under their names in the checkpoint; QWenLMHeadModel runs them."""

    def __init__(self, config: Config):
        super().__init__()
        # nn.Embedding would draw its values, which on "meta" imports torch._dynamo and sympy: 1.1 s of every start
        self.wte = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size), freeze=False)
        self.h = nn.ModuleList([QWenBlock(config) for _ in range(config.num_hidden_layers)])
        self.ln_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)


class QWenLMHeadModel(nn.Module):
    """Embeddings, blocks, final norm and head; the vision tower is a module of its own (vit.py)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.transformer = QWenModel(config)
        self.lm_head: nn.Module = nn.Linear(config.hidden_size, config.vocab_size, bias=False)  # or Int8Linear

    @property
    def dtype(self) -> torch.dtype:
        """Of activations, and of a cache that is not int8."""
        return self.transformer.ln_f.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.transformer.ln_f.weight.device

    @property
    def embeddings_device(self) -> torch.device:
        """Where the embedding table is: the model's device, or the CPU."""
        return self.transformer.wte.weight.device

    @property
    def cache_block(self) -> int:
        """KVCache's `block` for the backend of this device."""
        return BLOCK if self.device.type == "cpu" else 0

    def embed(self, ids: Tensor, out: Tensor | None = None) -> Tensor:
        """ids (B, T) int64 -> embeddings (B, T, hidden); the table may be in host memory and in the file's dtype.

        out: where they go, instead of a new tensor on the model's device.
        """
        return embed(ids, self.transformer.wte.weight, self.transformer.ln_f.weight, out)

    def forward(self, embeds: Tensor, cache: KVCache, *, all_logits: bool = False) -> Tensor:
        """Append T tokens to every sequence of the cache and return logits in float32.

        embeds (B, T, hidden) in the weights' dtype -> (B, vocab) for the last position, or (B, T, vocab) with
        `all_logits`. An empty cache is a prefill: the NTK alpha is chosen for T and kept. PromptError if it is full.
        """
        placement = place_tokens(self.config, embeds.shape[1], cache)

        last = None if all_logits else len(self.transformer.h) - 1

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            attended = rotary_attention(placement.attention(layer, q, k, v))
            return attended[:, -1:] if layer == last else attended  # nothing reads the last layer's other positions

        x = embeds
        for index, block in enumerate(self.transformer.h):
            x = block(x, partial(attend, index))
        cache.advance(embeds.shape[1])
        x = self.transformer.ln_f(x)
        return self.lm_head(x if all_logits else x[:, -1]).float()
