"""The vision tower in torch: what training uses, what the export is compared with, what the golden data checks.

Module names are the published checkpoint's below `transformer.visual.`. Source: Qwen-VL's visual.py (OpenCLIP ViT with
a resampler of 256 queries instead of a class token).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qvl_edge.config import HEAD_DIM, IMAGE_TOKENS, VisualConfig

LAYER_NORM_EPS = 1e-6  # visual.py: norm_layer = partial(nn.LayerNorm, eps=1e-6)


def interpolate_positions(table: Tensor, positions: int) -> Tensor:
    """Position table (16², C) resized bicubically to (positions, C), in the table's dtype.

    At 448 pixels and patches of 14 there are 32² positions over tables of 16² (visual.py: get_abs_pos).
    """
    source, target = int(table.shape[0] ** 0.5), int(positions**0.5)
    if source == target:
        return table
    grid = table.float().reshape(1, source, source, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(target, target), mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1).flatten(0, 2).to(table.dtype)


class VisualAttention(nn.Module):
    """Self-attention whose in_proj rows are interleaved: for each head its q, then its k, then its v."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, width) -> (B, L, width)."""
        batch, length, width = x.shape
        q, k, v = self.in_proj(x).view(batch, length, self.heads, 3, width // self.heads).permute(3, 0, 2, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(out.transpose(1, 2).reshape(batch, length, width))


class VisualAttentionBlock(nn.Module):
    """Pre-norm transformer block with an exact-GELU MLP."""

    def __init__(self, visual: VisualConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(visual.width, eps=LAYER_NORM_EPS)
        self.ln_2 = nn.LayerNorm(visual.width, eps=LAYER_NORM_EPS)
        self.attn = VisualAttention(visual.width, visual.heads)
        self.mlp = nn.ModuleDict(
            {
                "c_fc": nn.Linear(visual.width, visual.mlp_width),
                "c_proj": nn.Linear(visual.mlp_width, visual.width),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, width) -> (B, L, width)."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class VisualTransformer(nn.Module):
    """The blocks, under their name in the checkpoint; VisionTransformer runs them."""

    def __init__(self, visual: VisualConfig):
        super().__init__()
        self.resblocks = nn.ModuleList([VisualAttentionBlock(visual) for _ in range(visual.layers)])


class ResamplerAttention(nn.Module):
    """Cross-attention with the parameter names of torch's nn.MultiheadAttention: q, k and v rows one after another."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = width // HEAD_DIM
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query (B, Q, C), key and value (B, L, C) -> (B, Q, C)."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, w, b).unflatten(-1, (self.heads, HEAD_DIM)).transpose(1, 2)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class Resampler(nn.Module):
    """256 learned queries over the ViT's patches: any number of patches becomes 256 features."""

    def __init__(self, visual: VisualConfig):
        super().__init__()
        width = visual.output_dim
        self.query = nn.Parameter(torch.empty(IMAGE_TOKENS, width))
        self.pos_embed = nn.Parameter(torch.empty(IMAGE_TOKENS, width), requires_grad=False)  # fixed sine-cosine
        # visual.py: an nn.Identity when the widths agree, so there is no tensor then
        self.kv_proj = nn.Linear(visual.width, width, bias=False) if visual.width != width else nn.Identity()
        self.attn = ResamplerAttention(width)
        self.ln_q = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.ln_kv = nn.LayerNorm(width, eps=LAYER_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, width) -> (B, 256, output_dim)."""
        value = self.ln_kv(self.kv_proj(x))
        key = value + interpolate_positions(self.pos_embed, x.shape[1])
        query = (self.ln_q(self.query) + self.pos_embed).expand(x.shape[0], -1, -1)
        return self.attn(query, key, value)


class VisionTransformer(nn.Module):
    """Pixels to image features, the module at `transformer.visual` of the checkpoint."""

    def __init__(self, visual: VisualConfig):
        super().__init__()
        self.conv1 = nn.Conv2d(3, visual.width, visual.patch_size, stride=visual.patch_size, bias=False)
        self.positional_embedding = nn.Parameter(torch.empty(IMAGE_TOKENS, visual.width))
        self.ln_pre = nn.LayerNorm(visual.width, eps=LAYER_NORM_EPS)
        self.transformer = VisualTransformer(visual)
        self.attn_pool = Resampler(visual)
        self.ln_post = nn.LayerNorm(visual.output_dim, eps=LAYER_NORM_EPS)
        self.proj = nn.Parameter(torch.empty(visual.output_dim, visual.output_dim))

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalized pixels (B, 3, S, S) -> features (B, 256, output_dim), both in the weights' dtype."""
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = self.ln_pre(x + interpolate_positions(self.positional_embedding, x.shape[1]))
        for block in self.transformer.resblocks:
            x = block(x)
        return self.ln_post(self.attn_pool(x)) @ self.proj
