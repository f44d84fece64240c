"""Does the exported graph compute what the model does? Both run side by side, stage by stage, against stated limits.

The model in float32 takes 7.7 GB and a whole graph 2 to 4 GB. A stage is a block: with one in memory at a time, a
full-size tower needs some hundred megabytes. Sessions have the options of vision/encoder.py, so that a CPU later
computes what was compared.

onnxruntime computes float16 products on a CPU in float32 and drops the rounding in between. So that a value past
float16's range is seen here and not first on a GPU, every stage also returns the largest of the values it computes.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import helper
from torch import Tensor

from qvl_edge.checkpoint import Checkpoint
from qvl_edge.errors import ParityError
from qvl_edge.model.streaming import stream_vision
from qvl_edge.vision.encoder import cpu_options, self_test_pixels

IMAGES = "noise, waves and squares"
_STAGE_FILE = "vit.stage.onnx"  # beside the data file while a stage runs
_COMPUTING = ("Add", "Gelu", "LayerNormalization", "MatMul", "MatMulNBits", "MultiHeadAttention")


@dataclass(frozen=True)
class Limit:
    """What the features must meet: at least this cosine in the worst row, at most this ‖difference‖ / ‖features‖."""

    cosine: float
    relative: float


# Measured, worst row's cosine and relative error:
#             random towers of 1 and 2 layers    trained tower of the small model
#   float32   1.000000, 1.1e-6                   1.000000, 1e-6
#   float16   1.000000, 2.1e-4                   1.000000, 3.0e-4
#   int8      0.99964,  1.6e-2                   0.99992,  4.9e-3
#   int4      0.876,    0.25                     0.985,    6.4e-2
# Random weights are the hard case: nothing in them is redundant. A wrong graph stands out in the first three (unordered
# q, k, v: 0.15 to 0.64; a transposed weight: above 1). At 4 bits only gross mistakes do, and whether its loss is
# acceptable is a question for the task.
LIMITS = {
    "float32": Limit(cosine=0.999999, relative=1e-4),
    "float16": Limit(cosine=0.9999, relative=1e-2),
    "int8": Limit(cosine=0.999, relative=4e-2),
    "int4": Limit(cosine=0.8, relative=0.35),
}


@dataclass(frozen=True)
class Difference:
    """How far `found` is from `expected` after one stage; rows are the vectors along the last axis."""

    stage: str
    cosine_min: float
    cosine_mean: float
    largest: float  # max |found - expected|
    relative: float  # ‖found - expected‖ / ‖expected‖
    range: float  # largest magnitude that the graph computed on the way; infinite past float16's 65504

    @classmethod
    def of(cls, stage: str, found: Tensor, expected: Tensor, largest_computed: float) -> "Difference":
        """Compare two tensors (…, C) of one shape, in float64. A NaN anywhere makes every figure NaN."""
        found, expected = found.double(), expected.double()
        cosine = torch.cosine_similarity(found, expected, dim=-1)
        error = found - expected
        return cls(
            stage,
            cosine_min=float(cosine.min()),
            cosine_mean=float(cosine.mean()),
            largest=float(error.abs().max()),
            relative=float(error.norm() / expected.norm()),
            range=largest_computed,
        )


@dataclass(frozen=True)
class Parity:
    """The result: `features` decides, `stages` shows where a difference begins."""

    dtype: str
    features: Difference
    stages: tuple[Difference, ...]
    self_test_features: Tensor  # (256, output_dim) of self_test_pixels, as the graph computes them

    @property
    def passed(self) -> bool:
        """Whether the features meet the limit of this dtype and every computed value is finite; NaN fails both."""
        limit = LIMITS[self.dtype]
        finite = all(math.isfinite(stage.range) for stage in self.stages)
        return finite and self.features.cosine_min >= limit.cosine and self.features.relative <= limit.relative

    def summary(self) -> dict[str, Any]:
        """Figures and limits, for the manifest."""
        figures = {name: value for name, value in asdict(self.features).items() if name != "stage"}
        return {**figures, "limits": asdict(LIMITS[self.dtype]), "images": IMAGES}

    def report(self, *, per_layer: bool = False) -> str:
        """A table to read: the features, or with per_layer every stage."""
        limit = LIMITS[self.dtype]
        rows = self.stages if per_layer else (self.features,)
        lines = [
            f"parity of {self.dtype} with the PyTorch model in float32, on {IMAGES}",
            f"{'stage':<10} {'cosine min':>10} {'mean':>10} {'largest |Δ|':>12} {'relative':>10} {'max |x|':>10}",
            *(
                f"{row.stage:<10} {row.cosine_min:>10.6f} {row.cosine_mean:>10.6f} {row.largest:>12.3e} "
                f"{row.relative:>10.2e} {row.range:>10.4g}"
                for row in rows
            ),
            f"{'passed' if self.passed else 'FAILED'}: features need a cosine of at least {limit.cosine} in every row "
            f"and a relative error of at most {limit.relative}, and no value out of range",
        ]
        return "\n".join(lines)


def probe_pixels(image_size: int) -> Tensor:
    """Three images (3, 3, S, S) float32 in the range of normalized pixels: waves (the self-test), noise, squares."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(3, image_size, image_size, generator=generator) * 4 - 2
    # large flat areas and hard edges, as in screenshots and documents
    coarse = torch.rand(1, 3, 7, 7, generator=generator) * 4 - 2
    squares = torch.nn.functional.interpolate(coarse, size=(image_size, image_size), mode="nearest")
    return torch.cat([self_test_pixels(image_size), noise[None], squares])


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

    Yields the output of every stage, float32, and the largest magnitude of all values computed in it (infinite where a
    float16 value left its range).
    """
    model = onnx.load(str(path), load_external_data=False)
    values: dict[str, Any] = {"pixels": pixels.numpy()}
    options = cpu_options(next((entry.value for entry in model.metadata_props if entry.key == "dtype"), None))
    stage_path = path.with_name(_STAGE_FILE)  # a session finds the weights beside its file
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
        del session, row, computed  # or they would stay until the next session is open
        yield torch.from_numpy(values[output]), largest


def compare(
    checkpoint: Checkpoint, path: Path, dtype: str, *, progress: Callable[[str], None] = lambda _: None
) -> Parity:
    """Run the graph at `path` and the checkpoint's own vision tower, stage by stage, on `probe_pixels`."""
    visual = checkpoint.config.visual
    pixels = probe_pixels(visual.image_size)
    names = ["ln_pre", *(f"block {index}" for index in range(visual.layers)), "features"]  # each ends a stage
    outputs = run_graph(path, pixels)
    stages: list[Difference] = []
    latest = pixels

    def on_stage(stage: int, expected: Tensor) -> None:
        nonlocal latest
        latest, largest_computed = next(outputs)
        stages.append(Difference.of(names[stage], latest, expected, largest_computed))
        progress(f"compared {names[stage]}")

    tower = stream_vision(checkpoint, on_stage=on_stage)
    with torch.inference_mode():
        on_stage(len(names) - 1, tower(pixels))
    return Parity(dtype, stages[-1], tuple(stages), latest[0])


def require(parity: Parity) -> None:
    """ParityError unless it passed: names the first stage that is not finite, or the one where the error grows most."""
    if parity.passed:
        return
    for stage in parity.stages:
        if not math.isfinite(stage.range):
            if parity.dtype == "float32":
                raise ParityError(
                    f"the float32 graph computes NaN or infinity in {stage.stage}. Nothing was written. The weights "
                    "are damaged, or of a training that diverged"
                )
            raise ParityError(
                f"the {parity.dtype} graph computes values beyond the range of its dtype (float16 ends at 65504) in "
                f"{stage.stage}. Nothing was written. Export with --dtype float32"
            )
    errors = [1e-9, *(stage.relative for stage in parity.stages)]  # 1e-9: below float32's rounding
    growth = [after / max(before, 1e-9) for before, after in zip(errors, errors[1:], strict=False)]
    worst = parity.stages[growth.index(max(growth))].stage
    limit = LIMITS[parity.dtype]
    raise ParityError(
        f"the {parity.dtype} graph does not compute what the model does: cosine {parity.features.cosine_min:.6f} in "
        f"the worst row (at least {limit.cosine} is required), relative error {parity.features.relative:.3g} (at most "
        f"{limit.relative}). The error grows most in {worst}. Nothing was written. See every stage with --per-layer; a "
        "wider --dtype loses less"
    )
