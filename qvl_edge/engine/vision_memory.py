"""What the vision tower takes of memory, by formula: its session, and the encoding of some images."""

from qvl_edge.config import VisualConfig

_BYTES = {"float32": 4.0, "float16": 2.0, "int8": 1.0 + 2.5 / 128, "int4": 0.5 + 2.5 / 32}  # scale and zero included


def parameters(visual: VisualConfig) -> int:
    """Weights of the tower's matrix products."""
    width, hidden = visual.width, visual.output_dim
    block = 4 * width * width + 2 * width * visual.mlp_width
    return visual.layers * block + width * hidden + 5 * hidden * hidden


def session_bytes(visual: VisualConfig, dtype: str, device_type: str) -> int:
    """A session that is open."""
    factor = 2.0 if device_type == "cpu" and dtype == "float16" else 1.0  # widened to float32
    return int(parameters(visual) * _BYTES[dtype] * factor)


def workspace_bytes(visual: VisualConfig, dtype: str, batch: int, device_type: str) -> int:
    """What encoding `batch` images takes beside the session."""
    size = 4 if device_type == "cpu" else 2
    return batch * visual.patches * (4 * visual.width + 2 * visual.mlp_width) * size
