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
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from export.external import ELEMENT_TYPES, ExternalData
from export.precision import Precision, pack_blocks
from export.weights import VisualWeights
from qvl_edge.config import HEAD_DIM, IMAGE_TOKENS, VisualConfig
from qvl_edge.errors import CheckpointError
from qvl_edge.model.vit import LAYER_NORM_EPS

OPSET = 20  # the first with Gelu
IR_VERSION = 9  # that of opset 20: the oldest that every reader of it knows
MICROSOFT = "com.microsoft"


class GraphBuilder:
    """Collects nodes in running order; weights go straight to `data`, named after the module that they belong to."""

    def __init__(self, data: ExternalData, precision: Precision):
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
        element = ELEMENT_TYPES[dtype]
        return self.node("Cast", [x], f"{x}.{'float32' if dtype == torch.float32 else 'float16'}", to=element)

    def activations(self, x: str) -> str:
        """x, float32, in the activations' dtype."""
        return self.cast(x, self._precision.activations)

    def layer_norm(self, x: str, name: str, weights: VisualWeights) -> str:
        """LayerNormalization of x, both float32."""
        inputs = [x, *(self.weight(f"{name}.{p}", weights[f"{name}.{p}"], torch.float32) for p in ("weight", "bias"))]
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

    def attention(self, q: str, k: str, v: str, name: str, heads: int) -> str:
        """Softmax attention of `heads` heads over (batch, length, heads · size), scaled by 1/√size."""
        return self.node("MultiHeadAttention", [q, k, v], f"{name}.heads", domain=MICROSOFT, num_heads=heads)


def build_vit(
    visual: VisualConfig,
    weights: VisualWeights,
    data: ExternalData,
    precision: Precision,
    *,
    metadata: dict[str, str],
    progress: Callable[[str], None],
) -> onnx.ModelProto:
    """The whole graph; weights have been written to `data` when it returns. `metadata` becomes its metadata_props."""
    build = GraphBuilder(data, precision)
    stages = [_stem(build, visual, weights)]
    for index in range(visual.layers):
        name = f"transformer.resblocks.{index}"
        stages.append(_block(build, stages[-1], name, visual, weights))
        progress(f"wrote block {index + 1} of {visual.layers}")
    _resampler(build, stages[-1], visual, weights)
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


def _stem(build: GraphBuilder, visual: VisualConfig, weights: VisualWeights) -> str:
    """Patches, their positions, ln_pre: in float32, a thousandth of the arithmetic."""
    conv1 = build.weight("conv1.weight", weights["conv1.weight"], torch.float32)
    patches = build.node("Conv", ["pixels", conv1], "conv1.out", strides=[visual.patch_size] * 2)
    flat = build.node("Reshape", [patches, build.constant("conv1.flat", [0, visual.width, -1])], "conv1.flattened")
    x = build.node("Transpose", [flat], "conv1.patches", perm=[0, 2, 1])
    positions = build.weight("positional_embedding", weights.patch_positions(), torch.float32)
    return build.layer_norm(build.node("Add", [x, positions], "positioned"), "ln_pre", weights)


def _block(build: GraphBuilder, x: str, name: str, visual: VisualConfig, weights: VisualWeights) -> str:
    """Pre-norm attention and MLP added to x, the residual stream."""
    normed = build.activations(build.layer_norm(x, f"{name}.ln_1", weights))
    q, k, v = (build.linear(normed, f"{name}.attn.{part}", w, b) for part, w, b in weights.qkv(name))
    x = _add(build, x, f"{name}.attn", build.attention(q, k, v, f"{name}.attn", visual.heads), "out_proj", weights)
    normed = build.activations(build.layer_norm(x, f"{name}.ln_2", weights))
    c_fc = f"{name}.mlp.c_fc"
    wide = build.linear(normed, c_fc, weights[f"{c_fc}.weight"], weights[f"{c_fc}.bias"])
    return _add(build, x, f"{name}.mlp", build.node("Gelu", [wide], f"{c_fc}.gelu"), "c_proj", weights)


def _add(build: GraphBuilder, x: str, name: str, y: str, projection: str, weights: VisualWeights) -> str:
    projection = f"{name}.{projection}"
    y = build.linear(y, projection, weights[f"{projection}.weight"], weights[f"{projection}.bias"])
    return build.node("Add", [x, build.cast(y, torch.float32)], f"{name}.residual")


def _resampler(build: GraphBuilder, x: str, visual: VisualConfig, weights: VisualWeights) -> str:
    """256 constant queries over the patches, ln_post, proj."""
    if visual.width != visual.output_dim:
        kv = build.product(build.activations(x), "attn_pool.kv_proj", weights["attn_pool.kv_proj.weight"])
        x = build.cast(kv, torch.float32)
    kv = build.activations(build.layer_norm(x, "attn_pool.ln_kv", weights))
    key = build.linear(kv, "attn_pool.attn.k", *weights.resampler_key())
    value = build.linear(kv, "attn_pool.attn.v", *weights.resampler_rows(2))
    query = _per_image(build, build.weight("attn_pool.attn.q", weights.resampler_query()))
    pooled = build.attention(query, key, value, "attn_pool.attn", visual.output_dim // HEAD_DIM)
    out_proj = "attn_pool.attn.out_proj"
    pooled = build.linear(pooled, out_proj, weights[f"{out_proj}.weight"], weights[f"{out_proj}.bias"])
    normed = build.activations(build.layer_norm(build.cast(pooled, torch.float32), "ln_post", weights))
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
