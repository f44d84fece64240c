"""The vision tower as an ONNX graph, node by node: attention is `com.microsoft.MultiHeadAttention`, the rest opset 20.

    pixels (batch, 3, S, S) float32 -> features (batch, 256, output_dim) float32

The graph's value_info lists the output of ln_pre and of every block, float32 (batch, patches, width): the places where
it can be cut into stages. There is no Shape and no Resize: the batch is the only dynamic size.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from export.precision import ExternalData, Precision, pack_blocks
from qvl_edge.checkpoint import VISUAL, Checkpoint
from qvl_edge.config import HEAD_DIM, IMAGE_TOKENS, VisualConfig
from qvl_edge.errors import CheckpointError
from qvl_edge.model.streaming import check_finite
from qvl_edge.model.vit import LAYER_NORM_EPS, interpolate_positions

OPSET = 20  # the first with Gelu
IR_VERSION = 9  # that of opset 20: the oldest that every reader of it supports
MICROSOFT = "com.microsoft"


class VisualWeights:
    """The vision tower's weights as the graph needs them, float32, each read from `source` when asked for: q, k and v
    apart, position tables folded into what they are added to."""

    def __init__(self, source: Checkpoint, visual: VisualConfig):
        self._source, self.visual = source, visual

    def __getitem__(self, name: str) -> Tensor:
        """A copy of the tensor at `transformer.visual.{name}`. CheckpointError if it holds NaN or infinity."""
        full = VISUAL + name
        tensor = self._source[full].to(torch.float32, copy=True)
        self._source.release(full)
        check_finite(full, tensor)
        return tensor

    def qkv(self, block: str) -> list[tuple[str, Tensor, Tensor]]:
        """("q", weight (width, width), bias (width,)), then "k", "v" of a block's attention.

        The rows of the checkpoint's in_proj are interleaved: for each head its q, its k, its v (visual.py).
        """
        weight, bias = self[f"{block}.attn.in_proj.weight"], self[f"{block}.attn.in_proj.bias"]
        width, heads = self.visual.width, self.visual.heads
        weights = weight.view(heads, 3, width // heads, width).unbind(1)
        biases = bias.view(heads, 3, width // heads).unbind(1)
        return [(n, w.reshape(width, width), b.reshape(width)) for n, w, b in zip("qkv", weights, biases, strict=True)]

    def patch_positions(self) -> Tensor:
        """What is added to the patches: the position table at this image size, (patches, width)."""
        return interpolate_positions(self["positional_embedding"], self.visual.patches)

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
        positions = interpolate_positions(self["attn_pool.pos_embed"], self.visual.patches)
        return weight, F.linear(positions, weight, bias)

    def resampler_rows(self, index: int) -> tuple[Tensor, Tensor]:
        """Weight (D, D) and bias (D,) of the resampler's projection: q (0), k (1), v (2), one after another there."""
        rows = slice(index * self.visual.output_dim, (index + 1) * self.visual.output_dim)
        return self["attn_pool.attn.in_proj_weight"][rows], self["attn_pool.attn.in_proj_bias"][rows]


class GraphBuilder:
    """Collects nodes in running order; weights go straight to `data`, under the name of the module they belong to."""

    def __init__(self, weights: VisualWeights, data: ExternalData, precision: Precision):
        self.weights = weights
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[TensorProto] = []
        self._data, self._precision = data, precision

    def node(self, op: str, inputs: Sequence[str], output: str, *, domain: str = "", **attributes: Any) -> str:
        """Append a node with one output, which names it too; returns the output."""
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, domain=domain, **attributes))
        return output

    def constant(self, name: str, values: Sequence[int] | float) -> str:
        """A few int64 or one float32 inside the graph, where shape inference can see them."""
        array = np.array(values, dtype=np.float32 if isinstance(values, float) else np.int64)
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def weight(self, name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> str:
        """A constant in the data file, in `dtype` (default: the activations'). CheckpointError if it does not fit."""
        stored = tensor.to(dtype or self._precision.activations)
        if stored.is_floating_point() and not torch.isfinite(stored).all():
            raise CheckpointError(
                f"{name} reaches {float(tensor.abs().max()):.6g}, past float16's 65504; export with --dtype float32"
            )
        self.initializers.append(self._data.add(name, stored))
        return name

    def cast(self, x: str, dtype: torch.dtype) -> str:
        """x in `dtype`, one of float32 and the activations'; x is known to be in the other, if they differ."""
        if self._precision.activations == torch.float32:
            return x
        name, element = ("float32", TensorProto.FLOAT) if dtype == torch.float32 else ("float16", TensorProto.FLOAT16)
        return self.node("Cast", [x], f"{x}.{name}", to=element)

    def activations(self, x: str) -> str:
        """x, float32, in the activations' dtype."""
        return self.cast(x, self._precision.activations)

    def layer_norm(self, x: str, name: str) -> str:
        """The norm `name` of x, both float32."""
        names = [f"{name}.weight", f"{name}.bias"]
        inputs = [x, *(self.weight(each, self.weights[each], torch.float32) for each in names)]
        return self.node("LayerNormalization", inputs, f"{name}.out", axis=-1, epsilon=LAYER_NORM_EPS)

    def product(self, x: str, name: str, weight: Tensor) -> str:
        """x (..., K) @ weight (N, K)ᵀ, in the activations' dtype."""
        n, k = weight.shape
        bits, block_size = self._precision.bits, self._precision.block_size
        if bits is None or block_size is None:
            return self.node("MatMul", [x, self.weight(f"{name}.weight", weight.T)], f"{name}.product")
        packed = pack_blocks(weight, bits=bits, block_size=block_size, dtype=self._precision.activations)
        parts = zip(("levels", "scales", "zeros"), packed, strict=True)
        inputs = [x, *(self.weight(f"{name}.{part}", tensor, tensor.dtype) for part, tensor in parts)]
        sizes = {"K": k, "N": n, "bits": bits, "block_size": block_size}
        level = self._precision.accuracy_level
        return self.node("MatMulNBits", inputs, f"{name}.product", domain=MICROSOFT, accuracy_level=level, **sizes)

    def linear(self, x: str, name: str, weight: Tensor, bias: Tensor) -> str:
        """x @ weightᵀ + bias; bias (N,), or (L, N) to add another one at each of L positions."""
        product = self.product(x, name, weight)
        return self.node("Add", [product, self.weight(f"{name}.bias", bias)], f"{name}.out")

    def module(self, x: str, name: str) -> str:
        """The checkpoint's linear layer `name` of x."""
        return self.linear(x, name, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def attention(self, q: str, k: str, v: str, name: str, heads: int) -> str:
        """Softmax attention of `heads` heads over (batch, length, heads · size), scaled by 1/√size."""
        return self.node("MultiHeadAttention", [q, k, v], f"{name}.heads", domain=MICROSOFT, num_heads=heads)


def build_vit(
    weights: VisualWeights,
    data: ExternalData,
    precision: Precision,
    *,
    metadata: dict[str, str],
    progress: Callable[[str], None],
) -> onnx.ModelProto:
    """The whole graph; weights have been written to `data` when it returns. `metadata` becomes its metadata_props."""
    build, visual = GraphBuilder(weights, data, precision), weights.visual
    stages = [_stem(build)]
    for index in range(visual.layers):
        stages.append(_block(build, stages[-1], f"transformer.resblocks.{index}"))
        progress(f"wrote block {index + 1} of {visual.layers}")
    _resampler(build, stages[-1])
    progress("wrote the resampler")
    size, patches, width = visual.image_size, visual.patches, visual.width
    graph = helper.make_graph(
        build.nodes,
        "vit",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 3, size, size])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", IMAGE_TOKENS, visual.output_dim])],
        build.initializers,
        value_info=[helper.make_tensor_value_info(x, TensorProto.FLOAT, ["batch", patches, width]) for x in stages],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="qvl_edge")
    helper.set_model_props(model, metadata)
    return model


def _stem(build: GraphBuilder) -> str:
    """Patches, their positions, ln_pre: in float32, a thousandth of the compute."""
    visual, weights = build.weights.visual, build.weights
    conv1 = build.weight("conv1.weight", weights["conv1.weight"], torch.float32)
    patches = build.node("Conv", ["pixels", conv1], "conv1.out", strides=[visual.patch_size] * 2)
    flat = build.node("Reshape", [patches, build.constant("conv1.flat", [0, visual.width, -1])], "conv1.flattened")
    x = build.node("Transpose", [flat], "conv1.patches", perm=[0, 2, 1])
    positions = build.weight("positional_embedding", weights.patch_positions(), torch.float32)
    return build.layer_norm(build.node("Add", [x, positions], "positioned"), "ln_pre")


def _block(build: GraphBuilder, x: str, name: str) -> str:
    """Pre-norm attention and MLP added to x, the residual stream."""
    normed = build.activations(build.layer_norm(x, f"{name}.ln_1"))
    q, k, v = (build.linear(normed, f"{name}.attn.{part}", w, b) for part, w, b in build.weights.qkv(name))
    heads = build.attention(q, k, v, f"{name}.attn", build.weights.visual.heads)
    x = _add(build, x, f"{name}.attn", build.module(heads, f"{name}.attn.out_proj"))
    normed = build.activations(build.layer_norm(x, f"{name}.ln_2"))
    wide = build.node("Gelu", [build.module(normed, f"{name}.mlp.c_fc")], f"{name}.mlp.c_fc.gelu")
    return _add(build, x, f"{name}.mlp", build.module(wide, f"{name}.mlp.c_proj"))


def _add(build: GraphBuilder, x: str, name: str, y: str) -> str:
    return build.node("Add", [x, build.cast(y, torch.float32)], f"{name}.residual")


def _resampler(build: GraphBuilder, x: str) -> str:
    """256 constant queries over the patches, ln_post, proj."""
    visual, weights = build.weights.visual, build.weights
    if visual.width != visual.output_dim:
        kv = build.product(build.activations(x), "attn_pool.kv_proj", weights["attn_pool.kv_proj.weight"])
        x = build.cast(kv, torch.float32)
    kv = build.activations(build.layer_norm(x, "attn_pool.ln_kv"))
    key = build.linear(kv, "attn_pool.attn.k", *weights.resampler_key())
    value = build.linear(kv, "attn_pool.attn.v", *weights.resampler_rows(2))
    query = _per_image(build, build.weight("attn_pool.attn.q", weights.resampler_query()))
    pooled = build.attention(query, key, value, "attn_pool.attn", visual.output_dim // HEAD_DIM)
    pooled = build.module(pooled, "attn_pool.attn.out_proj")
    normed = build.activations(build.layer_norm(build.cast(pooled, torch.float32), "ln_post"))
    features = build.product(normed, "proj", weights["proj"].T)
    # always a node of its own, so that the output has its name in every precision
    return build.node("Cast", [features], "features", to=TensorProto.FLOAT)


def _per_image(build: GraphBuilder, constant: str) -> str:
    """The constant (L, D) once for each image: (batch, L, D).

    MultiHeadAttention does not broadcast its query. Adding a zero made of each image's first pixel does it without
    Shape and Expand, whose sizes would be computed on the host.
    """
    ones, axes = build.constant("first_pixel.ends", [1, 1, 1]), build.constant("first_pixel.axes", [1, 2, 3])
    first = build.node("Slice", ["pixels", build.constant("first_pixel.starts", [0, 0, 0]), ones, axes], "first_pixel")
    flat = build.node("Reshape", [first, build.constant("first_pixel.shape", [0, 1, 1])], "first_pixel.flat")
    zero = build.node("Mul", [flat, build.constant("zero", 0.0)], "first_pixel.zero")
    return build.node("Add", [build.activations(zero), constant], f"{constant}.batch")
