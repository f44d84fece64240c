"""Running an exported graph and the torch definition side by side, one stage in memory at a time.

The definition in float32 and a whole graph take 7.7 GB and 2 to 4 GB. A stage is a block; a full-size tower then needs
some hundred megabytes. Sessions have the options of engine.vision, so that a CPU later computes what was compared.

onnxruntime computes float16 products on a CPU in float32 and drops the rounding in between. So that a value past
float16's range is seen here and not first on a GPU, every stage also gives the largest of the values that it computes.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import helper
from torch import Tensor, nn

from export.weights import TensorSource, read_float
from qvl_edge.checkpoint import VISUAL
from qvl_edge.config import VisualConfig
from qvl_edge.model.vit import VisionTransformer
from qvl_edge.vision.encoder import cpu_options

STAGE_FILE = "vit.stage.onnx"  # beside the data file while a stage is run
_COMPUTING = ("Add", "Gelu", "LayerNormalization", "MatMul", "MatMulNBits", "MultiHeadAttention")


def stage_names(visual: VisualConfig) -> list[str]:
    """The stages: "ln_pre" (with all before it), each block, "features" (resampler, ln_post, proj)."""
    return ["ln_pre", *(f"block {index}" for index in range(visual.layers)), "features"]


def cut_stages(model: onnx.ModelProto) -> Iterator[onnx.ModelProto]:
    """The model cut after each tensor that its value_info lists: every node is in one stage, in the same order."""
    graph = model.graph
    ends = {info.name: info for info in [*graph.value_info, *graph.output]}
    known = {info.name: info for info in [*graph.input, *ends.values()]}
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        if node.output[0] not in ends:
            continue
        made = {output for inner in nodes for output in inner.output}
        used = dict.fromkeys(name for inner in nodes for name in inner.input if name not in made)
        stage = helper.make_graph(
            nodes,
            "stage",
            [known[name] for name in used if name not in initializers],
            [ends[node.output[0]]],
            [initializers[name] for name in used if name in initializers],
        )
        yield helper.make_model(stage, opset_imports=model.opset_import, ir_version=model.ir_version)
        nodes = []


def run_graph(path: Path, pixels: Tensor) -> Iterator[tuple[Tensor, float]]:
    """Run the graph at `path` on the CPU, each stage on the output of the one before it.

    Yields the output of every stage, float32, and the largest magnitude of all that was computed in it (infinite where
    a float16 value left its range).
    """
    model = onnx.load(str(path), load_external_data=False)
    values: dict[str, Any] = {"pixels": pixels.numpy()}
    options = cpu_options(next((entry.value for entry in model.metadata_props if entry.key == "dtype"), None))
    stage_path = path.with_name(STAGE_FILE)  # a session finds the weights beside its file
    for stage in cut_stages(model):
        output = stage.graph.output[0].name
        extra = [node.output[0] for node in stage.graph.node if node.op_type in _COMPUTING and node.output[0] != output]
        stage.graph.output.extend(onnx.ValueInfoProto(name=name) for name in extra)
        try:
            stage_path.write_bytes(stage.SerializeToString())
            session = ort.InferenceSession(str(stage_path), options, providers=["CPUExecutionProvider"])
        finally:
            stage_path.unlink(missing_ok=True)
        rows, largest = [], 0.0
        for index in range(len(pixels)):  # one image at a time: the extra outputs of a full-size block take 170 MB each
            inputs = {info.name: values[info.name][index : index + 1] for info in stage.graph.input}
            row, *computed = session.run([output, *extra], inputs)
            rows.append(row)
            # np.maximum and not max(): it keeps a NaN
            largest = float(np.maximum.reduce([largest, *(np.abs(array).max() for array in (row, *computed))]))
        values = {"pixels": values["pixels"], output: np.concatenate(rows)}
        del session, row, computed  # or they would stay until the next stage is open
        yield torch.from_numpy(values[output]), largest


@torch.inference_mode()
def run_definition(
    source: TensorSource, visual: VisualConfig, pixels: Tensor, on_stage: Callable[[Tensor], None]
) -> None:
    """Run qvl_edge.model.vit in float32, its weights read stage by stage; `on_stage` gets each stage's output."""
    with torch.device("meta"):
        model = VisionTransformer(visual).eval()

    def fill(module: nn.Module, prefix: str, *, recurse: bool = True) -> None:
        names = [name for name, _ in module.named_parameters(recurse=recurse)]
        tensors = {name: read_float(source, f"{VISUAL}{prefix}{name}") for name in names}
        module.load_state_dict(tensors, assign=True, strict=recurse)

    def stage(module: nn.Module, name: str, *, report: bool) -> None:
        module.register_forward_pre_hook(lambda *_: fill(module, f"{name}."))

        def finish(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            module.to("meta")
            if report:
                on_stage(output)

        module.register_forward_hook(finish)

    fill(model, "", recurse=False)
    for name in ("conv1", "ln_pre", "attn_pool", "ln_post"):
        stage(model.get_submodule(name), name, report=name == "ln_pre")
    for index in range(visual.layers):
        name = f"transformer.resblocks.{index}"
        stage(model.get_submodule(name), name, report=True)
    on_stage(model(pixels))
