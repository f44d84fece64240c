"""What a model is, for the head of its predictions and for the report."""

from pathlib import Path
from typing import Any

from qvl_edge import Runtime
from qvl_edge.bundle import MANIFEST, is_bundle
from qvl_edge.checkpoint import Checkpoint
from qvl_edge.files import sha256_of


def name_of(model: str) -> str:
    """What a model is called in reports and file names: its folder, or its name on a hub without the owner."""
    return Path(model).name or Path(model).resolve().name


def identity(path: Path) -> str:
    """A hash that changes with a model's weights: of a bundle's manifest, or the fingerprint of a checkpoint."""
    return sha256_of(path / MANIFEST) if is_bundle(path) else Checkpoint(path).fingerprint


def describe(path: Path, runtime: Runtime) -> dict[str, Any]:
    """Identity and precision of a loaded model."""
    plan, quant = runtime.plan, runtime.config.quantization
    return {
        "identity": identity(path),
        "decoder": "float" if quant is None else f"int{quant.bits}, groups of {quant.group_size}",
        "dtype": str(plan.dtype).removeprefix("torch."),
        "vision_tower": plan.vit,
        "head": plan.head,
        "kv_cache": plan.kv_cache,
        "device": plan.device,
        "batch": plan.slots,
        "max_context": plan.context,
    }
