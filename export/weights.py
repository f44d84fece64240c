"""The vision tower's weights as the graph wants them: q, k and v apart, position tables folded, one at a time."""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from qvl_edge.checkpoint import VISUAL, Checkpoint
from qvl_edge.config import VisualConfig
from qvl_edge.errors import CheckpointError
from qvl_edge.model.vit import LAYER_NORM_EPS, interpolate_positions


class TensorSource(Protocol):
    """Tensors by their names in a checkpoint: a `Checkpoint`, or a mapping."""

    def __getitem__(self, name: str) -> Tensor: ...


def read_float(source: TensorSource, name: str) -> Tensor:
    """The tensor `name` as a float32 copy; a mapped source gives back the pages that reading it has taken."""
    tensor = source[name].to(torch.float32, copy=True)
    if isinstance(source, Checkpoint):
        source.release(name)
    return tensor


class VisualWeights:
    """Float32 tensors of the vision tower, each read from `source` when asked for and kept by nobody."""

    def __init__(self, source: TensorSource, visual: VisualConfig):
        self._source, self._visual = source, visual

    def __getitem__(self, name: str) -> Tensor:
        """The tensor at `transformer.visual.{name}`. CheckpointError if it holds a NaN or an infinity."""
        return self._finite(name, read_float(self._source, VISUAL + name))

    def _finite(self, name: str, tensor: Tensor) -> Tensor:
        if not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{VISUAL + name} holds values that are not finite; the checkpoint is damaged, copy it again"
            )
        return tensor

    def qkv(self, block: str) -> list[tuple[str, Tensor, Tensor]]:
        """("q", weight (width, width), bias (width,)), then "k", "v" of a block's attention.

        The rows of the checkpoint's in_proj are interleaved: for each head its q, its k, its v (visual.py).
        """
        weight, bias = self[f"{block}.attn.in_proj.weight"], self[f"{block}.attn.in_proj.bias"]
        width, heads = self._visual.width, self._visual.heads
        weights = weight.view(heads, 3, width // heads, width).unbind(1)
        biases = bias.view(heads, 3, width // heads).unbind(1)
        return [(n, w.reshape(width, width), b.reshape(width)) for n, w, b in zip("qkv", weights, biases, strict=True)]

    def patch_positions(self) -> Tensor:
        """What is added to the patches: the position table at this image size, (patches, width)."""
        return interpolate_positions(self["positional_embedding"], self._visual.patches)

    def resampler_query(self) -> Tensor:
        """The resampler's queries after its q projection (256, output_dim): they depend on no image."""
        query, positions = self["attn_pool.query"], self["attn_pool.pos_embed"]
        normed = F.layer_norm(
            query, query.shape[-1:], self["attn_pool.ln_q.weight"], self["attn_pool.ln_q.bias"], LAYER_NORM_EPS
        )
        weight, bias = self.resampler_rows(0)
        return F.linear(normed + positions, weight, bias)

    def resampler_key(self) -> tuple[Tensor, Tensor]:
        """Weight (D, D) of the k projection, and what is added to its product (patches, D): W·positions + bias.

        The original projects value + positions; the product of the positions is the same for every image.
        """
        weight, bias = self.resampler_rows(1)
        positions = interpolate_positions(self["attn_pool.pos_embed"], self._visual.patches)
        return weight, F.linear(positions, weight, bias)

    def resampler_rows(self, index: int) -> tuple[Tensor, Tensor]:
        """Weight (D, D) and bias (D,) of the resampler's projection: q (0), k (1), v (2), one after another there."""
        rows = slice(index * self._visual.output_dim, (index + 1) * self._visual.output_dim)
        name = "attn_pool.attn.in_proj_"
        weight, bias = (read_float(self._source, f"{VISUAL}{name}{part}")[rows] for part in ("weight", "bias"))
        return self._finite(f"{name}weight", weight), self._finite(f"{name}bias", bias)
