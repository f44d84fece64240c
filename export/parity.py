"""Does the exported graph compute what the model does? Numbers, limits, and a report."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.stages import run_definition, run_graph, stage_names
from export.weights import TensorSource
from qvl_edge.config import VisualConfig
from qvl_edge.errors import ParityError
from qvl_edge.vision.encoder import self_test_pixels

IMAGES = "noise, waves and squares"


@dataclass(frozen=True)
class Limit:
    """What features must keep to: the worst row's cosine at least, ‖difference‖ / ‖features‖ at most."""

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
    """The outcome: `features` decides, `stages` says where a difference begins."""

    dtype: str
    features: Difference
    stages: tuple[Difference, ...]
    self_test_features: Tensor  # (256, output_dim) of self_test_pixels, as the graph gave them

    @property
    def passed(self) -> bool:
        """Whether the features keep to the limit of this dtype and all that was computed is finite; NaN fails both."""
        limit = LIMITS[self.dtype]
        finite = all(math.isfinite(stage.range) for stage in self.stages)
        return finite and self.features.cosine_min >= limit.cosine and self.features.relative <= limit.relative

    def summary(self) -> dict[str, Any]:
        """For the manifest: figures and limits."""
        figures = {name: value for name, value in asdict(self.features).items() if name != "stage"}
        return {**figures, "limits": asdict(LIMITS[self.dtype]), "images": IMAGES}

    def report(self, *, per_layer: bool = False) -> str:
        """Lines for people."""
        limit = LIMITS[self.dtype]
        rows = self.stages if per_layer else (self.features,)
        lines = [
            f"parity of {self.dtype} with the definition in float32, on {IMAGES}",
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


def compare(
    source: TensorSource,
    visual: VisualConfig,
    path: Path,
    dtype: str,
    *,
    progress: Callable[[str], None] = lambda _: None,
) -> Parity:
    """Run the graph at `path` and the definition over `source`, stage by stage, on `probe_pixels`."""
    pixels = probe_pixels(visual.image_size)
    names, outputs = iter(stage_names(visual)), run_graph(path, pixels)
    stages: list[Difference] = []
    latest = pixels

    def on_stage(expected: Tensor) -> None:
        nonlocal latest
        latest, largest_computed = next(outputs)
        stages.append(Difference.of(next(names), latest, expected, largest_computed))
        progress(f"compared {stages[-1].stage}")

    run_definition(source, visual, pixels, on_stage)
    return Parity(dtype, stages[-1], tuple(stages), latest[0])


def require(parity: Parity) -> None:
    """ParityError unless it passed; it names the first stage that is not finite, or where the error grows most."""
    if parity.passed:
        return
    for stage in parity.stages:
        if not math.isfinite(stage.range):
            raise ParityError(
                f"the {parity.dtype} graph reaches values past the range of its numbers (float16 ends at 65504) in "
                f"{stage.stage}. Nothing was written. Export with --dtype float32"
            )
    errors = [1e-9, *(stage.relative for stage in parity.stages)]  # 1e-9: below float32's rounding
    growth = [after / max(before, 1e-9) for before, after in zip(errors, errors[1:], strict=False)]
    worst = parity.stages[growth.index(max(growth))].stage
    limit = LIMITS[parity.dtype]
    raise ParityError(
        f"the {parity.dtype} graph does not compute what the model does: cosine {parity.features.cosine_min:.6f} in "
        f"the worst row (at least {limit.cosine} is asked for), relative error {parity.features.relative:.3g} (at most "
        f"{limit.relative}). The error grows most in {worst}. Nothing was written. See every stage with --per-layer; a "
        "wider --dtype loses less"
    )
